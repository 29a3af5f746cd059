"""Remembered forms of bodies: what they decode to, in which order ever bodies come, is what plain decoding gives."""

from __future__ import annotations

from typing import Any

import cbor2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.api.forms import FORMS_KEPT, Forms
from node.api.requests import decode_cbor, decode_json
from node.api.routes import SEARCH
from storage.errors import AnnulusError

NUMBERS = st.one_of(st.integers(-5, 5), st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(1e39))
VECTORS = st.lists(st.lists(NUMBERS, max_size=3), max_size=3)
ODD: st.SearchStrategy[Any] = st.sampled_from([None, "[[1]]", [[]], [], {}, [["a"]], [[[1]]], [[True]], [[None]], 7])
REST = st.fixed_dictionaries(
    {"collectionName": st.sampled_from(["c", "d", "[[1]]", 'a"data":[[1]]', "", None, 5])},
    optional={
        "limit": st.sampled_from([1, 10, "10", True, 1.0, None]),
        "filter": st.sampled_from(["", "a in [[1]]", ":"]),
        "searchParams": st.sampled_from([{}, {"ef": 1}, {"ef": True}, {"ef": 1.0}, {"x": [[1, 2]]}]),
        "exprParams": st.sampled_from([{}, {"list": [[1.5]]}]),
        "DATA": VECTORS,
        "other": VECTORS,
    },
)


@st.composite
def bodies(draw: st.DrawFn) -> list[dict[str, Any]]:
    forms = draw(st.lists(REST, min_size=1, max_size=3))
    made = []
    for _ in range(draw(st.integers(1, 8))):
        items = [*draw(st.sampled_from(forms)).items()]
        items.insert(draw(st.sampled_from([0, len(items)])), ("data", draw(VECTORS | ODD)))
        made.append(dict(items))
    return made


def outcome(decode: Any, *args: Any) -> Any:
    """Return the values or the refusal, JSON's vectors as the float32 they become, if they do."""
    try:
        found = decode(*args)
    except AnnulusError as error:
        return type(error), error.message
    values = dict(found[0] if isinstance(found, tuple) else found)
    data = values["data"]
    try:
        rows = msgspec.json.decode(data, type=list[list[float]]) if isinstance(data, msgspec.Raw) else data
        with np.errstate(over="raise"):
            values["data"] = [
                row if isinstance(row, bytes) else np.array(row, np.float64).astype("<f4").tobytes() for row in rows
            ]
    except (msgspec.MsgspecError, FloatingPointError, ValueError, TypeError):
        values["data"] = bytes(data) if isinstance(data, msgspec.Raw) else data
    return repr(values)


@given(bodies())
def test_json_bodies_decode_as_if_nothing_were_remembered(given: list[dict[str, Any]]) -> None:
    """Also where other values and texts look like vectors."""
    forms = Forms(SEARCH)
    for one in given:
        body = msgspec.json.encode(one)
        assert outcome(forms.decode_json, body) == outcome(decode_json, body, SEARCH)


@given(bodies())
def test_cbor_bodies_decode_as_if_nothing_were_remembered(given: list[dict[str, Any]]) -> None:
    """Values that are equal but of other types, such as 1 and true, are told apart."""
    forms = Forms(SEARCH)
    for one in given:
        body = cbor2.dumps(one)
        assert outcome(forms.decode_cbor, body) == outcome(decode_cbor, body, SEARCH)


@pytest.mark.parametrize("body", [b"", b"null", b"[[1]]", b'{"a":[[1]],"a":[[1]]}', b'{"data":[[1]]', b"\xff", b"]][["])
def test_what_is_no_body_is_refused_in_the_same_words(body: bytes) -> None:
    """A body is refused as ever, before and after one with a form was seen."""
    forms = Forms(SEARCH)
    for _ in range(2):
        assert outcome(forms.decode_json, body) == outcome(decode_json, body, SEARCH)
        assert outcome(forms.decode_cbor, body) == outcome(decode_cbor, body, SEARCH)
        forms.decode_json(b'{"collectionName":"c","data":[[1]]}')


def test_a_form_is_shared_by_bodies_with_other_vectors_and_few_are_kept() -> None:
    """The same form object comes back, with the vectors of each body; memory for them is bounded."""
    forms = Forms(SEARCH)

    def body(name: int, value: float) -> bytes:
        return msgspec.json.encode({"collectionName": f"c{name}", "data": [[value, 2]]})

    first = forms.decode_json(body(0, 1))[1]
    values, form = forms.decode_json(body(0, 7))
    assert form is first and values["data"] == [np.array([7, 2], "<f4").tobytes()]
    assert form.values["data"] is None
    for name in range(FORMS_KEPT + 1):
        forms.decode_json(body(name, 1))
    assert len(forms._known) == FORMS_KEPT
