"""Rows as clients see them: exact numbers, native documents, the older shapes, both encodings."""

from __future__ import annotations

import json
from typing import Any

import cbor2
import msgspec
import numpy as np
import pytest

from node.api.replies import Style, encode, encode_large, is_large, rows_reply, search_reply, write_reply
from node.api.rows import Write, rows_from_json
from node.service import Rows, SearchResult, WriteResult
from storage.columns import Batch, Column, ScalarColumn, StringColumn
from storage.evolution import with_field
from storage.schema import DataType, FieldSchema, make_schema
from storage.strings import StringArray
from storage.types import FieldId

SCHEMA = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("small", DataType.INT8, nullable=True),
        FieldSchema("flag", DataType.BOOL),
        FieldSchema("single", DataType.FLOAT, nullable=True),
        FieldSchema("double", DataType.DOUBLE),
        FieldSchema("word", DataType.VARCHAR, max_bytes=50, nullable=True),
        FieldSchema("doc", DataType.JSON, nullable=True),
        FieldSchema("longs", DataType.ARRAY, element=DataType.INT64, capacity=4, nullable=True),
        FieldSchema("reals", DataType.ARRAY, element=DataType.FLOAT, capacity=4),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
    ],
    dynamic=True,
)
FULL = (
    '{"id":9007199254740993,"small":-1,"flag":true,"single":1.1,"double":0.1,"word":"a\\"b","doc":{"a":[1,null]},'
    '"longs":[9007199254740993,2],"reals":[0.1,2.0],"v":[0.1,1e-20],"x":{"y":18446744073709551615},"z":"t"}'
)
NULLS = (
    '{"id":2,"small":null,"flag":false,"single":null,"double":2.0,"word":null,"doc":null,"longs":null,"reals":[],'
    '"v":[1.0,2.0]}'
)
NAMES = [one.name for one in SCHEMA.user_fields]


def batch() -> Batch:
    return rows_from_json(msgspec.Raw(f"[{FULL},{NULLS}]".encode()), SCHEMA, Write.INSERT)


def test_json_gives_back_what_was_written() -> None:
    """A row comes back as it was inserted, to the character: shortest floats, exact integers, native documents."""
    reply = encode(rows_reply(Rows(SCHEMA, batch(), NAMES, None), Style()), Style()).decode()
    data = json.loads(reply)["data"]
    assert data == [json.loads(FULL), json.loads(NULLS)]
    for part in (
        '"single":1.1,',
        '"reals":[0.1,2.0]',
        '"v":[0.1,1e-20]',
        '"doc":{"a":[1,null]}',
        "18446744073709551615",
    ):
        assert part in reply


@pytest.mark.parametrize(
    ("style", "name", "value"),
    [
        (Style(int64_text=True), "id", "9007199254740993"),
        (Style(int64_text=True), "longs", ["9007199254740993", "2"]),
        (Style(int64_text=True), "small", -1),
        (Style(legacy_arrays=True), "longs", {"Data": {"LongData": {"data": [9007199254740993, 2]}}}),
        (Style(legacy_json=True), "doc", '{"a":[1,null]}'),
    ],
)
def test_styles(style: Style, name: str, value: Any) -> None:
    """Int64 as text, and the shapes of arrays and documents that older clients parse; nulls stay null."""
    data = json.loads(encode(rows_reply(Rows(SCHEMA, batch(), NAMES), style), style))["data"]
    assert data[0][name] == value
    assert data[1]["longs"] is None and data[1]["doc"] is None


def test_cbor_rows() -> None:
    """CBOR gives the same rows with vectors as little-endian float32 bytes."""
    style = Style(cbor=True)
    data = cbor2.loads(encode(rows_reply(Rows(SCHEMA, batch(), NAMES, None), style), style))["data"]
    assert data[0].pop("v") == np.array([0.1, 1e-20], "<f4").tobytes()
    expected = json.loads(FULL)
    del expected["v"]
    assert data[0].pop("single") == np.float32(expected.pop("single"))
    assert data[0].pop("reals") == [np.float32(0.1), 2.0] and expected.pop("reals")
    assert data[0] == expected


def test_only_what_was_asked_for() -> None:
    """The key is always there, first; dynamic keys only where asked for and present."""
    rows = Rows(SCHEMA, batch(), ["word"], ["z", "none"])
    data = json.loads(encode(rows_reply(rows, Style()), Style()))["data"]
    assert data == [{"id": 9007199254740993, "word": 'a"b', "z": "t"}, {"id": 2, "word": None}]
    assert next(iter(data[0])) == "id"


def test_hits() -> None:
    """Hits carry their distance in its shortest form, and topks says how many belong to each query."""
    result = SearchResult(Rows(SCHEMA, batch(), []), np.array([0.1, 2], np.float32), [2, 0])
    reply = encode(search_reply(result, Style()), Style()).decode()
    assert '"distance":0.1}' in reply
    assert json.loads(reply)["topks"] == [2, 0]
    assert json.loads(reply)["cost"] == 0
    none = SearchResult(Rows(SCHEMA, Batch({}, 0), NAMES), np.zeros(0, np.float32), [])
    assert search_reply(none, Style()) == {"code": 0, "cost": 0, "data": []}


@pytest.mark.parametrize("style", [Style(), Style(cbor=True)], ids=["json", "cbor"])
def test_large_replies_are_encoded_the_same(style: Style) -> None:
    """Encoding in slices gives the same reply as encoding at once."""
    rows = Batch.concat([batch()] * 300)
    envelope = rows_reply(Rows(SCHEMA, rows, NAMES, None), style) | {"topks": [600]}
    assert is_large(envelope) and not is_large({"code": 0, "data": {}})
    read = cbor2.loads if style.cbor else json.loads
    assert read(encode_large(envelope, style)) == read(encode(envelope, style))


def test_counts_and_keys() -> None:
    """count(*) is one row; inserted keys are numbers or, when asked, text."""
    count = Rows(SCHEMA, Batch({}, 0), (), count=5)
    assert rows_reply(count, Style())["data"] == [{"count(*)": 5}]
    written = WriteResult(2, np.array([1, 2]))
    assert write_reply(written, "insert", Style())["data"] == {"insertCount": 2, "insertIds": [1, 2]}
    assert write_reply(written, "upsert", Style(int64_text=True))["data"] == {"upsertCount": 2, "upsertIds": ["1", "2"]}


def test_a_field_hides_the_key_whose_name_it_took() -> None:
    """Of rows whose dynamic key was there before the field: they show what the field has, null or not."""
    schema = with_field(
        make_schema(
            [FieldSchema("id", DataType.INT64, primary=True), FieldSchema("v", DataType.FLOAT_VECTOR, dim=2)],
            dynamic=True,
        ),
        FieldSchema("price", DataType.INT64, nullable=True),
    )
    columns: dict[FieldId, Column] = {
        FieldId(100): ScalarColumn(np.array([1, 2])),
        FieldId(102): StringColumn(StringArray.from_strings(['{"price":3,"other":4}', "{}"])),
        schema.field("price").id: ScalarColumn(np.array([0, 5]), np.array([False, True])),
    }
    found = Rows(schema, Batch(columns, 2), ["id", "price"], None)
    assert rows_reply(found, Style())["data"] == [{"id": 1, "price": None, "other": 4}, {"id": 2, "price": 5}]
