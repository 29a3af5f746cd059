"""Rows of JSON and CBOR bodies into batches: what is kept, to the bit, and what is refused, in which words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cbor2
import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from node.api import exact
from node.api import rows as rows_module
from node.api.exact import NotExact, count_of, loads
from node.api.requests import load_cbor
from node.api.rows import Write, rows_from_cbor, rows_from_json
from node.api.values import gatherer
from storage.columns import Batch, VectorColumn
from storage.errors import BadJson, BadRow
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema


def schema_of(*fields: FieldSchema, dynamic: bool = False, auto_id: bool = False) -> CollectionSchema:
    return make_schema(
        [
            FieldSchema("id", DataType.INT64, primary=True, auto_id=auto_id),
            FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
            *fields,
        ],
        dynamic=dynamic,
    )


def field(kind: DataType, **more: Any) -> FieldSchema:
    if kind is DataType.VARCHAR:
        more = {"max_bytes": 20} | more
    if kind is DataType.ARRAY:
        more = {"capacity": 3, "max_bytes": 5} | more
    return FieldSchema("f", kind, **more)


def one(literal: str, kind: DataType, **more: Any) -> Any:
    """Return what a field of one row holds after decoding the JSON literal (None to leave it out)."""
    schema = schema_of(field(kind, **more))
    pair = "" if literal == "" else f', "f": {literal}'
    batch = rows_from_json(msgspec.Raw(f'[{{"id": 1, "v": [1, 2]{pair}}}]'.encode()), schema, Write.INSERT)
    return batch.columns[schema.field("f").id].to_list()[0]


def dynamic(pairs: str, write: Write = Write.INSERT) -> str:
    """Return the text of the dynamic field after decoding a row with these pairs."""
    schema = schema_of(dynamic=True)
    assert schema.dynamic is not None
    batch = rows_from_json(msgspec.Raw(f'[{{"id": 1, "v": [1, 2], {pairs}}}]'.encode()), schema, write)
    return str(batch.columns[schema.dynamic.id].to_list()[0])


KEPT = [
    ("1e3", DataType.INT64, 1000),
    ("9007199254740993.0", DataType.INT64, 9007199254740993),
    ("9223372036854775807", DataType.INT64, 9223372036854775807),
    ("-9223372036854775808", DataType.INT64, -9223372036854775808),
    ("-0", DataType.INT64, 0),
    ("-0.0", DataType.INT64, 0),
    ("0e999999999999", DataType.INT64, 0),
    ('"42"', DataType.INT64, 42),
    ("-128", DataType.INT8, -128),
    ("127", DataType.INT8, 127),
    ("-32768", DataType.INT16, -32768),
    ("2147483647", DataType.INT32, 2147483647),
    ("1.5", DataType.FLOAT, 1.5),
    ("3.4028235e38", DataType.FLOAT, float(np.float32(3.4028235e38))),
    ("1e-60", DataType.FLOAT, 0.0),
    ("0.1", DataType.DOUBLE, 0.1),
    ("1e308", DataType.DOUBLE, 1e308),
    ("1.50", DataType.VARCHAR, "1.50"),
    ("1e300", DataType.VARCHAR, "1e300"),
    ("123456789012345678", DataType.VARCHAR, "123456789012345678"),
    ("true", DataType.VARCHAR, "true"),
    ('"\\u00e9\\u003a"', DataType.VARCHAR, "é:"),
    ('"\\ud83d\\ude00"', DataType.VARCHAR, "😀"),
    ("true", DataType.BOOL, True),
    ('"true"', DataType.BOOL, True),
    ('"F"', DataType.BOOL, False),
    ("1", DataType.BOOL, True),
    ("0", DataType.BOOL, False),
    ('{"b": 1.50, "a": [1, 18446744073709551615]}', DataType.JSON, '{"b":1.5,"a":[1,18446744073709551615]}'),
    ('"text: plain"', DataType.JSON, '"text: plain"'),
    ('"{\\"a\\": 1}"', DataType.JSON, '{"a":1}'),
    ("1e19", DataType.JSON, "1e+19"),
    ('{"u": "\\u003a:"}', DataType.JSON, '{"u":"::"}'),
]


@pytest.mark.parametrize(
    ("literal", "kind", "value"), KEPT, ids=[f"{kind}-{literal[:20]}" for literal, kind, _ in KEPT]
)
def test_a_value_is_kept_exactly(literal: str, kind: DataType, value: Any) -> None:
    """What fits the field arrives unchanged, however it is written."""
    got = one(literal, kind)
    assert got == value and type(got) is type(value)


REFUSED = [
    ("1.5", DataType.INT64, "whole number"),
    ("9223372036854775808", DataType.INT64, "out of the range"),
    ("-9223372036854775809", DataType.INT64, "out of the range"),
    ("1e999999999", DataType.INT64, "out of the range"),
    ("1e9999999999999999999", DataType.INT64, "out of the range"),
    ("1e-9999999999999999999", DataType.INT64, "whole number|out of the range"),
    ("9" * 5000, DataType.INT64, "out of the range"),
    ('"1_0"', DataType.INT64, "not an Int64"),
    ('" 1"', DataType.INT64, "not an Int64"),
    ('""', DataType.INT64, "not an Int64"),
    ("true", DataType.INT64, "not an Int64"),
    ("[1]", DataType.INT64, "not an Int64"),
    ("128", DataType.INT8, "out of the range of Int8"),
    ("-129", DataType.INT8, "out of the range"),
    ("32768", DataType.INT16, "out of the range"),
    ("2147483648", DataType.INT32, "out of the range"),
    ("3.4028236e38", DataType.FLOAT, "out of the range of Float"),
    ("1e400", DataType.FLOAT, "out of range|invalid JSON|out of the range"),
    ("1e400", DataType.DOUBLE, "out of range|invalid JSON|out of the range"),
    ('"inf"', DataType.DOUBLE, "not a Double"),
    ("{}", DataType.VARCHAR, "not a VarChar"),
    ("[]", DataType.VARCHAR, "not a VarChar"),
    ('"' + "é" * 11 + '"', DataType.VARCHAR, "length 22 bytes, max length 20"),
    ("2", DataType.BOOL, "not a Bool"),
    ('"yes"', DataType.BOOL, "not a Bool"),
    ('{"a": 1, "a": 2}', DataType.JSON, "duplicate key 'a'"),
    ('{"x": {"a": 1, "\\u0061": 2}}', DataType.JSON, "duplicate key 'a'"),
    ('{"\\u003a": 1, "a": 1, "a": 2}', DataType.JSON, "duplicate key 'a'"),
    ("18446744073709551616", DataType.JSON, "does not fit in 64 bits"),
    ('{"a": [-9223372036854775809]}', DataType.JSON, "does not fit in 64 bits"),
    ("[" * 101 + "]" * 101, DataType.JSON, "nested deeper than 100"),
    ('"' + "x" * 70_000 + '"', DataType.JSON, "at most 65536"),
    ("[" + "[]," * 300_000 + "1]", DataType.JSON, "at most 65536"),
    ("null", DataType.INT64, "required"),
    ("", DataType.INT64, "required"),
    ("null", DataType.JSON, "required"),
]


@pytest.mark.parametrize(
    ("literal", "kind", "words"), REFUSED, ids=[f"{kind}-{literal[:20]}" for literal, kind, _ in REFUSED]
)
def test_a_value_that_does_not_fit_is_refused(literal: str, kind: DataType, words: str) -> None:
    """Nothing is rounded, wrapped or cut: the row and the field are named."""
    with pytest.raises(BadRow, match=words) as caught:
        one(literal, kind)
    assert "row 0" in caught.value.message
    assert len(caught.value.message) < 400


ARRAYS = [
    ("[1, 2.0, 3]", DataType.INT64, [1, 2, 3]),
    ("[]", DataType.INT8, []),
    ('["a", 1.50]', DataType.VARCHAR, ["a", "1.50"]),
    ("[true, 0]", DataType.BOOL, [True, False]),
    ("[0.5]", DataType.FLOAT, [0.5]),
]


@pytest.mark.parametrize(("literal", "element", "value"), ARRAYS)
def test_an_arrays_elements_are_values_of_the_element_type(literal: str, element: DataType, value: list[Any]) -> None:
    """Each element is read as a value of its own."""
    assert one(literal, DataType.ARRAY, element=element) == value


@pytest.mark.parametrize(
    ("literal", "words"),
    [
        ("[1, null]", "element 1 is null"),
        ("[1,2,3,4]", "max capacity 3"),
        ('"[1]"', "not an array"),
        ("[1.5]", "whole"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(literal: str, words: str) -> None:
    """Null elements, too many elements and wrong elements are refused."""
    with pytest.raises(BadRow, match=words):
        one(literal, DataType.ARRAY, element=DataType.INT64)


@pytest.mark.parametrize("literal", ['"\\ud800"', "010", "NaN", "-", "1.", "[" * 50_000 + "]" * 50_000, "[1", '"\\q"'])
def test_text_that_is_no_json_is_no_data(literal: str) -> None:
    """What no reader can read is not a bad row: the whole body is refused."""
    with pytest.raises((BadJson, BadRow)):
        one(literal, DataType.JSON)


def test_nulls_and_defaults() -> None:
    """A null or missing value is the default, else null if the field is nullable; the default wins over null."""
    assert one("null", DataType.INT64, nullable=True) is None
    assert one("", DataType.VARCHAR, nullable=True) is None
    assert one("null", DataType.JSON, nullable=True) is None
    assert one("null", DataType.ARRAY, element=DataType.INT8, nullable=True) is None
    assert one("null", DataType.VARCHAR, nullable=True, default="8888") == "8888"
    assert one("", DataType.FLOAT, default=2.5) == 2.5
    assert one("0", DataType.INT64, default=7) == 0


VECTORS_REFUSED = [
    ("[1]", r"the dim \(1\) of field data\(v\) is not equal to schema dim \(2\)"),
    ("[1, 2, 3]", "is not equal to schema dim"),
    ('"[1, 2]"', "not a float vector"),
    ("[true, 1]", "not a float vector"),
    ("[null, 1]", "not a float vector"),
    ('["1", 1]', "not a float vector"),
    ("[1e39, 1]", "too large for a float32"),
    ("[1e400, 1]", "not a float vector|out of range"),
    ("null", "required"),
    ("{}", "not a float vector"),
]


@pytest.mark.parametrize(("literal", "words"), VECTORS_REFUSED)
def test_a_vector_that_does_not_fit_is_refused(literal: str, words: str) -> None:
    """Wrong lengths, wrong components and numbers beyond float32 are refused."""
    data = msgspec.Raw(f'[{{"id": 1, "v": [1, 2]}}, {{"id": 1, "v": {literal}}}]'.encode())
    with pytest.raises(BadRow, match=words) as caught:
        rows_from_json(data, schema_of(), Write.INSERT)
    assert "row 1" in caught.value.message


DYNAMIC = [
    ('"a": 9007199254740993', '{"a":9007199254740993}'),
    ('"a": {"b": [18446744073709551615]}', '{"a":{"b":[18446744073709551615]}}'),
    ('"a": 1e19', '{"a":1e19}'),
    ('"a": null, "b": 1', '{"b":1}'),
    ('"a": null', "{}"),
    ('"a:b": "c:d"', '{"a:b":"c:d"}'),
    ('"a\\u003a": 1', '{"a:":1}'),
]


@pytest.mark.parametrize(("pairs", "text"), DYNAMIC)
def test_dynamic_keys_are_kept_exactly(pairs: str, text: str) -> None:
    """Keys that are no field become one JSON object per row; keys that are null are left out."""
    assert json.loads(dynamic(pairs)) == json.loads(text)


def test_a_partial_update_keeps_null_keys() -> None:
    """In a partial update a null dynamic key means: clear it."""
    assert dynamic('"a": null', Write.PARTIAL) == '{"a":null}'


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"id": 1, "v": [1, 2], "$meta": {}}', r"\$meta"),
        ('{"id": 1, "v": [1, 2], "x": 18446744073709551616}', "64 bits"),
        ('{"id": 1, "v": [1, 2], "id": 2}', "duplicate key 'id'"),
        ('{"id": 1, "v": [1, 2], "\\u0069d": 2}', "duplicate key 'id'"),
        ('{"id": 1, "v": [1, 2], ":": 1, "id": 2}', "duplicate key 'id'"),
        ("[1]", "not an object"),
        ("7", "not an object"),
        ("null", "not an object"),
    ],
)
def test_a_row_that_is_not_sound_is_refused(row: str, words: str) -> None:
    """The dynamic field's own name, numbers beyond 64 bits, keys given twice and rows that are no objects."""
    with pytest.raises(BadRow, match=words):
        rows_from_json(msgspec.Raw(f"[{row}]".encode()), schema_of(dynamic=True), Write.INSERT)


def test_unknown_keys_need_the_dynamic_field() -> None:
    """Without a dynamic field an unknown key is refused in Milvus's words."""
    with pytest.raises(BadRow, match="has pass more field without dynamic schema, please check it"):
        rows_from_json(msgspec.Raw(b'[{"id": 1, "v": [1, 2], "x": 1}]'), schema_of(), Write.INSERT)


def test_generated_keys() -> None:
    """With autoID an insert carries no key and refuses one; an upsert needs it."""
    schema = schema_of(auto_id=True)
    batch = rows_from_json(msgspec.Raw(b'[{"v": [1, 2]}]'), schema, Write.INSERT)
    assert schema.primary.id not in batch.columns
    with pytest.raises(BadRow, match="autoID"):
        rows_from_json(msgspec.Raw(b'[{"id": 1, "v": [1, 2]}]'), schema, Write.INSERT)
    assert schema.primary.id in rows_from_json(msgspec.Raw(b'[{"id": 1, "v": [1, 2]}]'), schema, Write.UPSERT).columns
    with pytest.raises(BadRow, match="required"):
        rows_from_json(msgspec.Raw(b'[{"v": [1, 2]}]'), schema, Write.UPSERT)


def test_a_partial_update_names_the_same_fields_in_every_row() -> None:
    """Only the named fields have columns; rows that name others are refused."""
    schema = schema_of(field(DataType.INT64), dynamic=True)
    batch = rows_from_json(msgspec.Raw(b'[{"id": 1, "f": 2}, {"id": 2, "f": 3}]'), schema, Write.PARTIAL)
    assert set(batch.columns) == {schema.primary.id, schema.field("f").id}
    for other in (b'{"id": 2}', b'{"id": 2, "f": 1, "v": [1, 2]}', b'{"f": 2}'):
        with pytest.raises(BadRow, match="row 1"):
            rows_from_json(msgspec.Raw(b'[{"id": 1, "f": 2}, ' + other + b"]"), schema, Write.PARTIAL)


def test_no_rows() -> None:
    """An empty list is refused with the words that clients look for; one bare object is one row; else it is no data."""
    with pytest.raises(BadRow, match="missing required parameters"):
        rows_from_json(msgspec.Raw(b"[]"), schema_of(), Write.INSERT)
    with pytest.raises(BadRow, match="missing required parameters"):
        rows_from_cbor([], schema_of(), Write.INSERT)
    with pytest.raises(BadRow, match="missing required parameters"):
        rows_from_cbor({}, schema_of(), Write.INSERT)
    assert rows_from_json(msgspec.Raw(b'{"id": 1, "v": [1, 2]}'), schema_of(), Write.INSERT).rows == 1
    for data in (b'"x"', b"7", b"true"):
        with pytest.raises(BadJson):
            rows_from_json(msgspec.Raw(data), schema_of(), Write.INSERT)


# --- the three forms ---------------------------------------------------------------------------------------------

WIDE = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("flag", DataType.BOOL),
        FieldSchema("small", DataType.INT16, nullable=True),
        FieldSchema("ratio", DataType.FLOAT),
        FieldSchema("word", DataType.VARCHAR, max_bytes=100),
        FieldSchema("note", DataType.VARCHAR, max_bytes=100, nullable=True),
        FieldSchema("doc", DataType.JSON),
        FieldSchema("tags", DataType.ARRAY, element=DataType.VARCHAR, max_bytes=9, capacity=9),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=3),
    ],
    dynamic=True,
)
SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False)
)
DOCUMENT = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ROW = st.fixed_dictionaries(
    {
        "id": st.integers(-(1 << 63), (1 << 63) - 1),
        "flag": st.booleans(),
        "small": st.none() | st.integers(-(1 << 15), (1 << 15) - 1),
        "ratio": SINGLE,
        "word": st.text(max_size=20),
        "note": st.none() | st.text(max_size=3),
        "doc": DOCUMENT.filter(lambda one: one is not None and not (isinstance(one, str) and one.lstrip()[:1] == "{")),
        "tags": st.lists(st.text(max_size=2), max_size=4),
        "v": st.lists(SINGLE, min_size=3, max_size=3),
    },
    optional={"x:y": DOCUMENT},
)


def texts(values: list[str | None]) -> dict[str, bytes]:
    """Return a column of texts as bytes and lengths."""
    encoded = [(one or "").encode() for one in values]
    lengths = np.array(list(map(len, encoded)), "<u4").tobytes()
    valid = np.array([one is not None for one in values]).tobytes()
    return {"values": b"".join(encoded), "lengths": lengths, "valid": valid}


@given(st.lists(ROW, min_size=1, max_size=4), st.booleans())
def test_all_forms_of_a_body_give_the_same_batch(rows: list[dict[str, Any]], escape: bool) -> None:
    """JSON, CBOR rows (vectors as numbers or bytes) and CBOR columns of the same values give equal bytes."""
    text = json.dumps(rows, ensure_ascii=escape).encode()
    expected = rows_from_json(msgspec.Raw(text), WIDE, Write.INSERT).to_bytes()
    assert rows_from_cbor(load_cbor(cbor2.dumps(rows)), WIDE, Write.INSERT).to_bytes() == expected
    packed = [row | {"v": np.array(row["v"], "<f4").tobytes()} for row in rows]
    assert rows_from_cbor(load_cbor(cbor2.dumps(packed)), WIDE, Write.INSERT).to_bytes() == expected
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for row in rows for name in row}
    assert rows_from_cbor(load_cbor(cbor2.dumps(columns)), WIDE, Write.INSERT).to_bytes() == expected
    small = columns["small"]
    columns |= {
        "id": np.array(columns["id"], "<i8").tobytes(),
        "flag": np.array(columns["flag"], bool).tobytes(),
        "small": {
            "values": np.array([one or 0 for one in small], "<i2").tobytes(),
            "valid": np.array([one is not None for one in small]).tobytes(),
        },
        "ratio": np.array(columns["ratio"], "<f4").tobytes(),
        "word": texts(columns["word"]),
        "note": texts(columns["note"]),
        "v": np.array(columns["v"], "<f4").tobytes(),
    }
    assert rows_from_cbor(load_cbor(cbor2.dumps(columns)), WIDE, Write.INSERT).to_bytes() == expected
    with viewing(1):
        viewed = load_cbor(cbor2.dumps(columns), views=True)
    assert isinstance(viewed["v"], memoryview)
    assert rows_from_cbor(viewed, WIDE, Write.INSERT).to_bytes() == expected
    assert Batch.from_bytes(expected).rows == len(rows)


@contextmanager
def viewing(bytes_min: int) -> Iterator[None]:
    """Take byte strings of this length for long ones, in bodies of any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("node.api.limits.LONG_BYTES_MIN", bytes_min)
        patch.setattr("node.api.limits.SMALL_CBOR_BYTES", 0)
        yield


ITEM = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.text(max_size=4) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(ITEM, st.integers(1, 40), st.none() | st.tuples(st.integers(0, 999), st.integers(0, 255)))
def test_views_of_a_body_are_what_it_holds(item: Any, bytes_min: int, damage: tuple[int, int] | None) -> None:
    """Long byte strings that come as views have the bytes that they would have had, and what is refused is refused."""
    body = bytearray(cbor2.dumps(item))
    if damage is not None:
        body[damage[0] % len(body)] = damage[1]

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            assume(all(isinstance(key, str) for key in value))  # others are refused, here or by who reads the map
            return {key: copied(one) for key, one in value.items()}
        if isinstance(value, memoryview):
            assert len(value) >= bytes_min
        return [copied(one) for one in value] if isinstance(value, list) else _plain_bytes(value)

    with viewing(bytes_min):
        try:
            expected = load_cbor(bytes(body))
        except BadJson:
            with pytest.raises(BadJson):
                load_cbor(bytes(body), views=True)
        else:
            assert repr(copied(expected)) == repr(expected)
            assert repr(copied(load_cbor(bytes(body), views=True))) == repr(expected)


def _plain_bytes(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


def test_a_tag_of_a_client_is_no_view() -> None:
    """A body with the very tag that stands for a view is refused, also beside long byte strings."""
    body = cbor2.dumps({"v": bytes(300 << 10), "w": cbor2.CBORTag(40_000, 0)})
    with pytest.raises(BadJson, match="tag"):
        load_cbor(body, views=True)


@pytest.mark.parametrize(
    ("name", "values", "is_whole"),
    [
        ("word", ["a", "é" * 10], True),
        ("word", ["a", None], False),
        ("word", ["a", 7], False),
        ("word", ["a", "é" * 60], False),
        ("word", ["a", "x" * 100], True),
        ("word", ["a", "x" * 101], False),
        ("small", [1, -(1 << 15), (1 << 15) - 1], True),
        ("small", [1, 1 << 15], False),
        ("small", [1, -(1 << 15) - 1], False),
        ("small", [1, True], False),
        ("small", [1, 2.0], False),
        ("ratio", [1.5], False),
    ],
)
def test_lists_are_taken_whole_where_all_values_fit(name: str, values: list[Any], is_whole: bool) -> None:
    """A list is taken as it is only if each of its values would be; nothing of it is, if not."""
    column = gatherer(WIDE.by_name[name])
    assert column.takes_all(values) == is_whole
    assert column.values == (values if is_whole else [])


BASE: dict[str, Any] = {"id": b"\1" + bytes(7), "v": bytes(8)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BASE | {"v": bytes(7)}, "rows of 8 bytes need 8"),
        (BASE | {"v": np.array([1, math.nan], "<f4").tobytes()}, "NaN or infinite"),
        (BASE | {"v": [[1.0, math.inf]]}, "NaN or infinite"),
        (BASE | {"v": {"values": bytes(8), "valid": b"\0"}}, "nulls"),
        (BASE | {"id": [1, 2]}, "rows|values"),
        (BASE | {"id": {"values": bytes(8), "valid": b"\2"}}, "valid is a byte string"),
        (BASE | {"id": {"values": bytes(8), "valid": b"\0"}}, "not nullable"),
        (BASE | {"id": 7}, "a column is a list"),
        (BASE | {"x": [1]}, "dynamic schema"),
        ({"id": [1]}, "required"),
        ({"id": [1.5], "v": bytes(8)}, "not an Int64"),
        ({"id": [True], "v": bytes(8)}, "not an Int64"),
        ({"id": [1 << 63], "v": bytes(8)}, "out of the range"),
        ([{"id": 1, "v": bytes(4)}], r"the dim \(1\)"),
        ([{"id": 1, "v": [1, "x"]}], "not a float vector"),
        ([{"id": 1, "v": [1, 1e39]}], "too large"),
        ([7], "a map is expected"),
        ([{b"id": 1}], "required|keys are text"),
    ],
)
def test_cbor_that_does_not_fit_is_refused(data: Any, words: str) -> None:
    """Columns of unequal length, numbers that are none and nulls where there are none are refused as bad rows."""
    with pytest.raises(BadRow, match=words):
        rows_from_cbor(data, schema_of(), Write.INSERT)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"values": b"abc", "lengths": b"\2\0\0\0"}, "add up to 2"),
        ({"values": b"abc", "lengths": b"\3\0\0"}, "4 bytes of lengths"),
        ({"values": b"abc", "lengths": [3]}, "4 bytes of lengths"),
        ({"values": "abc", "lengths": b"\3\0\0\0"}, "4 bytes of lengths"),
        ({"values": b"\xff", "lengths": b"\1\0\0\0"}, "not UTF-8"),
        ({"values": b"", "lengths": b"\0\0\0\0", "valid": b"\0"}, "not nullable"),
        ({"values": bytes(101), "lengths": b"\x65\0\0\0"}, "row 0: length of varchar field exceeds max length"),
    ],
)
def test_texts_that_are_not_sound_are_refused(column: dict[str, Any], words: str) -> None:
    """Lengths that do not add up, what is no text, too long or null where it may not be."""
    row = {"id": [1], "flag": [True], "ratio": [1.5], "doc": [{}], "tags": [[]], "v": bytes(12)}
    with pytest.raises(BadRow, match=f"field 'word': .*{words}"):
        rows_from_cbor(row | {"word": column}, WIDE, Write.INSERT)
    with pytest.raises(BadRow, match="null has a text"):
        null = {"values": b"a", "lengths": b"\1\0\0\0", "valid": b"\0"}
        rows_from_cbor(row | {"word": ["w"], "note": null}, WIDE, Write.INSERT)
    with pytest.raises(BadRow, match="has no lengths"):
        rows_from_cbor(row | {"word": ["w"], "id": {"values": b"a", "lengths": b"\1\0\0\0"}}, WIDE, Write.INSERT)


@pytest.mark.parametrize(
    "body",
    [
        cbor2.dumps(2**70),
        cbor2.dumps({"a": cbor2.CBORTag(28, [1])}),
        cbor2.dumps(cbor2.CBORTag(52, b"1234")),
        cbor2.dumps(cbor2.CBORTag(55799, {})),
        cbor2.dumps({1, 2}),
        cbor2.dumps({1: 2}),
        b"\x9f\xff",
        b"\x81" * 5000,
        b"\x5b" + (1 << 40).to_bytes(8, "big"),
        b"\x9b" + (1 << 60).to_bytes(8, "big"),
        b"\xa0\xa0",
        b"\xa2\x61a\x01\x61a\x02",
        b"\x61\xff",
    ],
    ids=lambda body: body[:6].hex(),
)
def test_cbor_beyond_jsons_model_is_refused(body: bytes) -> None:
    """Tags, odd keys, indefinite and endless lengths, deep nesting and trailing bytes are refused before any use."""
    with pytest.raises(BadJson):
        load_cbor(body)


@given(DOCUMENT)
def test_exact_reading_agrees_with_a_slow_reader(document: Any) -> None:
    """What `loads` accepts is what the standard library reads."""
    assert loads(json.dumps(document).encode()) == document


@given(st.recursive(st.integers(0, 9).map(str), lambda inner: st.lists(st.tuples(st.sampled_from(
    ['"a"', '"b"', '":"', '"\\u003a"', '"\\u0061"']), inner), max_size=3).map(
        lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"), max_leaves=8))  # fmt: skip
def test_a_key_given_twice_never_passes(text: str) -> None:
    """Objects with escaped and plain keys are refused exactly when a key repeats somewhere."""
    repeated = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        repeated = repeated or len({key for key, _ in pairs}) < len(pairs)
        return dict(pairs)

    expected = json.loads(text, object_pairs_hook=look)
    try:
        assert loads(text.encode()) == expected
        assert not repeated
    except NotExact:
        assert repeated


def test_vectors_arrive_as_one_matrix() -> None:
    """All vectors of a body share one block of float32."""
    data = msgspec.Raw(b'[{"id": 1, "v": [1, 2]}, {"id": 2, "v": [0.1, 1e-50]}]')
    column = rows_from_json(data, schema_of(), Write.INSERT).columns[schema_of().field("v").id]
    assert isinstance(column, VectorColumn)
    assert column.values.flags.c_contiguous and not column.values.flags.writeable
    assert np.array_equal(column.values, np.array([[1, 2], [0.1, 0]], np.float32))


tricky = st.recursive(
    st.one_of(st.integers(), st.sampled_from(["},{", '\\"},{', "}", "a:b", ""])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)),
    max_leaves=5,
)


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["id", "},{", "vector"]), tricky, max_size=3), max_size=8),
    piece_bytes=st.integers(1, 40),
    spaces=st.booleans(),
    broken=st.one_of(st.none(), st.integers(0, 200)),
)
def test_rows_split_by_pieces(rows: list[dict[str, Any]], piece_bytes: int, spaces: bool, broken: int | None) -> None:
    """Wherever the text is cut, the rows are those of the whole text, or none are given."""
    text = json.dumps(rows, separators=None if spaces else (",", ":")).encode()
    if broken is not None and broken < len(text):
        text = text[:broken] + b"}" + text[broken + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_PIECE_BYTES", piece_bytes)
        found = rows_module._split_by_pieces(text)
    if found is not None:
        assert found == msgspec.json.decode(text, type=list[dict[str, msgspec.Raw]])


@given(text=st.binary(max_size=200), slice_bytes=st.integers(1, 50))
def test_characters_are_counted(text: bytes, slice_bytes: int) -> None:
    """As `bytes.count` does, in long texts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_LONG_BYTES", slice_bytes)
        for mark in (b":", b"{", text[:1] or b"x"):
            assert count_of(mark, text) == text.count(mark)
