"""What searches of one client share: everything but their query vectors, decoded and checked once.

A client sends the same body again and again with other vectors in `data`. So its values are remembered by what is
around `data`, together with what the handler made of them, and only the vectors are decoded anew.

    JSON   the bytes before the first `[[` and behind the last `]]`, where `data` was seen to be exactly what lies
           between. JSON has no context: another list of lists of numbers in that place changes the meaning of nothing
           around it. Such vectors become float32 byte strings, the CBOR form
    CBOR   all values but `data`, as text, since the items themselves take little time to decode

Whatever does not fit is decoded as if nothing were remembered, and errors are found there.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

from node.api.requests import Shape, decode_json, load_cbor, values_of_cbor

DATA: Final = "data"
FORMS_KEPT: Final = 128
FORM_BYTES_MAX: Final = 2_048
"""Of what is around `data`."""
_vectors = msgspec.json.Decoder(list[list[float]])


class Singles(list[bytes]):
    """Vectors that were lists of numbers, as float32."""


class Form:
    """One body's values without `data`, which stay as they are, and what its handler keeps with them."""

    __slots__ = ("made", "values")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.made: Any = None


class Forms:
    """The forms of one route's bodies that were used last. For small bodies only: it works on the loop."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._known: OrderedDict[Hashable, Form] = OrderedDict()

    def decode_json(self, body: bytes) -> tuple[dict[str, Any], Form]:
        """Return what `requests.decode_json` does, and the form. Raises the same."""
        start, stop = body.find(b"[["), body.rfind(b"]]") + 2
        if not 0 <= start < stop - 2 or len(body) - (stop - start) > FORM_BYTES_MAX:
            values = decode_json(body, self._shape)
            return values, Form(values)
        key, middle = (body[:start], body[stop:]), body[start:stop]
        form = self._find(key)
        if form is not None and (vectors := _float32(middle)) is not None:
            return {**form.values, DATA: vectors}, form
        values = decode_json(body, self._shape)
        form = Form(values)
        data = values[DATA]
        # As long as what lies between the two places, and at both ends the same: it lies there.
        if isinstance(data, msgspec.Raw) and bytes(data) == middle and _float32(middle) is not None:
            form = self._keep(key, values)
        return values, form

    def decode_cbor(self, body: bytes) -> tuple[dict[str, Any], Form]:
        """Return what `requests.decode_cbor` does, and the form. Raises the same."""
        given = load_cbor(body)
        if type(given) is not dict or DATA not in given:
            values = values_of_cbor(given, self._shape)
            return values, Form(values)
        data = given.pop(DATA)
        key = repr(given)
        form = self._find(key)
        if form is not None:
            return {**form.values, DATA: data}, form
        values = values_of_cbor({**given, DATA: data}, self._shape)
        return values, self._keep(key, values) if len(key) <= FORM_BYTES_MAX else Form(values)

    def _find(self, key: Hashable) -> Form | None:
        form = self._known.get(key)
        if form is not None:
            self._known.move_to_end(key)
        return form

    def _keep(self, key: Hashable, values: Mapping[str, Any]) -> Form:
        form = self._known[key] = Form({**values, DATA: None})
        if len(self._known) > FORMS_KEPT:
            self._known.popitem(last=False)
        return form


@lru_cache(maxsize=256)
def packer(dim: int) -> struct.Struct:
    """Return what writes so many numbers as little-endian float32."""
    return struct.Struct(f"<{dim}f")


def _float32(text: bytes) -> Singles | None:
    """Return the vectors of a JSON text, each as bytes; None if it is no list of lists of numbers that fit."""
    try:
        return Singles(packer(len(row)).pack(*row) for row in _vectors.decode(text))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError, struct.error):
        return None
