"""Requests of few bytes and many values: refused before they are decoded, in words, and what is legitimate passes."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import cbor2
import msgspec
import numpy as np
import pytest

from node.api.entities import _json_queries
from node.api.exact import NotExact, split_object
from node.api.limits import (
    CONTAINERS_MAX,
    IDS_MAX,
    ITEMS_MAX,
    LIST_MAX,
    check_cbor,
    check_output,
    check_properties,
)
from node.api.requests import decode_cbor, decode_json
from node.api.routes import ROUTES
from node.api.rows import Write, rows_from_cbor, rows_from_json
from node.edge import apart
from storage.errors import AnnulusError, BadJson, InvalidParameter
from storage.schema import DataType, FieldSchema, make_schema
from tests.node.api.fake import Client, serve

MILLION = 1_000_000
SPARE_BYTES = 2_000_000
"""What a refusal may take beside one copy of the body; values made of it would take several times the body."""
SHAPES = {one.path: one.shape for one in ROUTES}
SCHEMA = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=384),
        FieldSchema("n", DataType.INT64, nullable=True),
    ],
    dynamic=True,
)
MANY = b",".join([b"1"] * (2 * MILLION))
EMPTIES = b",".join([b"[]"] * (2 * MILLION))
TEXTS = b",".join([b'"a"'] * (2 * MILLION))


def refused_within(size: int, work: Callable[[], Any], words: str) -> None:
    """Refuse, in these words, what is of this size, without making its values."""
    tracemalloc.start()
    try:
        with pytest.raises(AnnulusError, match=words) as caught:
            work()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500
    assert peak_bytes <= size + SPARE_BYTES


HOSTILE = [
    ("/entities/query", b'{"collectionName":"c","outputFields":[%b]}' % TEXTS, "outputFields has 2000000 values"),
    ("/entities/query", b'{"collectionName":"c","partitionNames":[%b]}' % TEXTS, "partitionNames has 2000000 values"),
    ("/entities/query", b'{"collectionName":"c","exprParams":{"a":[%b]}}' % EMPTIES, "exprParams is too large"),
    ("/entities/search", b'{"collectionName":"c","ids":[%b]}' % MANY, "ids is too large"),
    ("/entities/search", b'{"collectionName":"c","searchParams":{"a":[%b]}}' % EMPTIES, "searchParams is too large"),
    ("/segments/describe", b'{"segmentIDs":[%b]}' % MANY, "segmentIDs has 2000000 values"),
    ("/collections/create", b'{"collectionName":"c","schema":{"fields":[%b]}}' % EMPTIES, "schema is too large"),
    ("/collections/create", b'{"collectionName":"c","indexParams":[%b]}' % EMPTIES, "indexParams is too large"),
    (
        "/collections/drop_properties",
        b'{"collectionName":"c","propertyKeys":[%b]}' % TEXTS,
        "propertyKeys has 2000000 values",
    ),
    (
        "/collections/has",
        b'{"collectionName":"c",%b}' % b",".join(b'"k%d":1' % i for i in range(MILLION)),
        "1000001 ':' outside its declared fields|1000000 ':' outside",
    ),
    ("/collections/has", b"[%b]" % b",".join([b'{"a":1}'] * MILLION), "not a JSON object"),
]


@pytest.mark.parametrize(("path", "body", "words"), HOSTILE, ids=[f"{path}-{words}" for path, _, words in HOSTILE])
def test_too_many_values_are_refused_before_they_are_made(path: str, body: bytes, words: str) -> None:
    """Millions of small values in any declared field, or as keys of no meaning, are refused by counting them."""
    refused_within(len(body), lambda: decode_json(body, SHAPES[path]), words)


def test_keys_of_a_body_are_bounded_exactly() -> None:
    """A thousand keys pass, one more does not, in JSON and in CBOR."""
    for decode, dump in ((decode_json, msgspec.json.encode), (decode_cbor, cbor2.dumps)):
        body = {"collectionName": "c", **{f"k{i}": i for i in range(999)}}
        decode(dump(body), SHAPES["/collections/has"])
        with pytest.raises(InvalidParameter, match="1001 keys, at most 1000"):
            decode(dump({**body, "one": 1}), SHAPES["/collections/has"])


def test_lists_are_bounded_exactly() -> None:
    """1,024 output fields and 16,384 keys pass, one more is 1100 naming field, limit and number, in both forms."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2, "idType": "Int64"})
        for post in (client.post, client.post_cbor):
            for field, path, limit, value, more in (
                ("outputFields", "/entities/query", LIST_MAX, "a,b", {"filter": "id == 1"}),
                ("id", "/entities/get", IDS_MAX, 1, {}),
                ("ids", "/entities/search", IDS_MAX, 1, {"limit": 1}),
            ):
                body = {"collectionName": "c", **more}
                reply = await post(path, body | {field: [value] * limit}, Accept="application/json")
                assert reply["code"] == 0, reply
                reply = await post(path, body | {field: [value] * (limit + 1)}, Accept="application/json")
                assert reply["code"] == 1100, reply
                assert f"{field} has {limit + 1} values, at most {limit} are accepted" in reply["message"]

    serve(script)


def test_millions_of_keys_to_get_are_refused() -> None:
    """A list of hundreds of thousands of keys is refused, and the number of them named."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        _, reply = await client.send("/entities/get", b'{"collectionName":"c","id":[%b]}' % MANY[: 800_000 - 1])
        assert reply["code"] == 1100
        assert "id has 400000 values" in reply["message"]

    serve(script)


def test_a_large_body_whose_colons_are_in_its_fields_passes() -> None:
    """What counts against the number of keys is what lies outside the declared fields."""
    rows = [{"id": i, "a": 1, "b": "x:y"} for i in range(50_000)]
    body = json.dumps({"collectionName": "c", "data": rows}).encode()
    assert bytes(decode_json(body, SHAPES["/entities/insert"])["data"])[:1] == b"["


@pytest.mark.parametrize(
    ("data", "copies", "words"),
    [
        (b"[%b]" % b",".join([b"{}"] * (5 * MILLION)), 1, "5000000 of the characters"),
        (b'[{"id":1,"v":[%b]}]' % MANY, 3, "2000000.* is not equal to schema dim|2e\\+06"),
        (b"[%b]" % MANY, 3, "row 0: not an object"),
        (b"[%b]" % EMPTIES, 3, "row 0: not an object"),
        (
            b'[{"id":1,"v":[%b],%b}]' % (MANY[: 2 * 384 - 1], b",".join(b'"k%d":1' % i for i in range(200_000))),
            15,  # keys are made to be counted, their values are not
            "200000 dynamic keys, at most 16384",
        ),
        (b'[{"id":1,"v":[%b]}]' % EMPTIES, 3, "2e\\+06"),
    ],
    ids=["rows", "numbers", "no rows", "no rows either", "dynamic keys", "lists"],
)
def test_rows_are_bounded_before_they_are_made(data: bytes, copies: int, words: str) -> None:
    """Millions of empty rows, or of numbers in one vector, are refused by counting them in the text."""
    refused_within(copies * len(data), lambda: rows_from_json(msgspec.Raw(data), SCHEMA, Write.INSERT), words)


@pytest.mark.parametrize(
    "data",
    [b"[%b]" % MANY, b"[[%b]]" % MANY, b"[%b]" % EMPTIES, b"[[1],%b]" % MANY, b'["%b"]' % (b"x" * MILLION)],
    ids=["numbers", "one vector", "many vectors", "both", "text"],
)
def test_query_vectors_are_bounded_before_they_are_made(data: bytes) -> None:
    """Query vectors in any number or of any length are refused by counting."""
    refused_within(len(data), lambda: _json_queries(msgspec.Raw(data), SCHEMA.vectors[0]), ".")


def test_large_queries_are_read_exactly() -> None:
    """Query vectors that are read one by one are the ones that were sent, spaces or not."""
    vectors = np.random.default_rng(1).random((100, 384), np.float32)
    for text in (json.dumps(vectors.tolist()), json.dumps(vectors.tolist(), indent=1)):
        assert (_json_queries(msgspec.Raw(text.encode()), SCHEMA.vectors[0]) == vectors).all()


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        (b'{"a:b": 1, "c": {"x": 1}}', True),
        (b'{ "\\u003a" : 1 , "c" : [ 1 ] } ', True),
        (b'{"a:": 1, "b": 2, "a:": 3}', False),
        (b'{"a:": 1, "a:": 3}', False),
        (b'{"x": 1, "a\\"": ":", "x": ","}', False),
    ],
)
def test_keys_given_twice_are_found_without_decoding(text: bytes, fine: bool) -> None:
    """A key that hides a ':' does not make the whole text be decoded, and keys given twice are found all the same."""
    if fine:
        assert split_object(text)
    else:
        with pytest.raises(NotExact, match="duplicate key"):
            split_object(text)


# --- CBOR --------------------------------------------------------------------------------------------------------


def many(item: bytes, count: int) -> bytes:
    return b"\x9a" + struct.pack(">I", count) + item * count


@pytest.mark.parametrize(
    "item", [b"\xa0", b"\x80", b"\x60", b"\x00", b"\xf6", b"\xa1\x00\x00", b"\x81\x80"], ids=lambda one: one.hex()
)
def test_small_cbor_values_are_bounded(item: bytes) -> None:
    """Millions of tiny values are refused after a walk over as many as are allowed, wherever they are."""
    body = b"\xa2\x6ecollectionName\x61c\x64data" + many(item, 5 * MILLION)
    refused_within(len(body), lambda: decode_cbor(body, SHAPES["/entities/insert"]), "CBOR body holds more than")


def test_cbor_budget_is_exact() -> None:
    """As many values and containers as allowed pass the walk."""
    check_cbor(many(b"\x60", ITEMS_MAX - 1))
    check_cbor(many(b"\xa0", CONTAINERS_MAX - 1))
    check_cbor(many(b"\xf4", 10))
    for body in (many(b"\x60", ITEMS_MAX), many(b"\xa0", CONTAINERS_MAX)):
        with pytest.raises(InvalidParameter):
            check_cbor(body)


@pytest.mark.parametrize("rows", [1_000, 16_000])
@pytest.mark.parametrize("form", ["bytes", "doubles", "columns", "column lists"])
def test_large_inserts_pass_the_budget(rows: int, form: str) -> None:
    """Inserts of thousands of vectors of 384 numbers pass, in every form of CBOR, whatever bytes they are made of."""
    vectors = np.random.default_rng(1).random((rows, 384), np.float32) - 0.5
    data: Any
    if form == "bytes":
        data = [{"id": i, "v": row.tobytes(), "n": None, "colour": "red"} for i, row in enumerate(vectors)]
    elif form == "doubles":
        if rows > 1_000:
            vectors = np.repeat(vectors[:1], rows, axis=0)
        data = [{"id": i, "v": row} for i, row in enumerate(vectors.tolist())]
    elif form == "columns":
        data = {"id": np.arange(rows).tobytes(), "v": vectors.tobytes(), "n": list(range(rows))}
    else:
        data = {"id": list(range(rows)), "v": [row.tobytes() for row in vectors], "colour": ["red"] * rows}
    body = cbor2.dumps({"collectionName": "c", "data": data})
    check_cbor(body)
    if rows == 1_000:
        values = decode_cbor(body, SHAPES["/entities/insert"])
        batch = rows_from_cbor(values["data"], SCHEMA, Write.INSERT)
        assert (batch.columns[SCHEMA.vectors[0].id].values == vectors).all()  # type: ignore[union-attr]


# --- properties and replies --------------------------------------------------------------------------------------


def test_properties_are_bounded() -> None:
    """At most 256 properties, names of 255 and values of 65,535 characters; each refusal names what is too much."""
    check_properties("p", {"k" * 255: "v" * 65_535, **{str(i): i for i in range(255)}})
    for given, words in (
        ({str(i): i for i in range(257)}, "p has 257 entries, at most 256"),
        ({"k" * 256: 1}, "256 characters, at most 255"),
        ({"k": "v" * 65_536}, "'k' has 65536 characters, at most 65535"),
    ):
        with pytest.raises(InvalidParameter, match=words):
            check_properties("p", given)


def test_properties_are_bounded_wherever_they_are_given() -> None:
    """Properties of collections and databases, index parameters and type parameters are refused as 1100."""
    lots = {f"k{i}": "v" for i in range(257)}
    field = {"fieldName": "id", "dataType": "Int64", "isPrimary": True}
    vector = {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/collections/alter_properties", {"collectionName": "c", "properties": lots}),
        ("/collections/alter_properties", {"collectionName": "c", "properties": {"k": ["x" * 70_000]}}),
        ("/databases/create", {"dbName": "d", "properties": lots}),
        ("/databases/alter_properties", {"dbName": "default", "properties": lots}),
        ("/indexes/create", {"collectionName": "c", "indexParams": [{"fieldName": "vector", "params": lots}]}),
        ("/collections/create", {"collectionName": "d", "dimension": 2, "properties": lots}),
        (
            "/collections/create",
            {"collectionName": "d", "schema": {"fields": [{**field, "elementTypeParams": lots}, vector]}},
        ),
    ]

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        for path, body in requests:
            reply = await client.post(path, body)
            assert reply["code"] == 1100, (path, reply)
            assert "at most" in reply["message"]

    serve(script)


def test_output_is_bounded() -> None:
    """A million hits of a key each pass, what would take more than 100 MiB does not."""
    check_output(MILLION, 12)
    with pytest.raises(InvalidParameter, match="at most 104857600 are returned"):
        check_output(16_384 * 16_384, 0)
    with pytest.raises(InvalidParameter, match="at most 104857600 are returned"):
        check_output(16_384, 4 * 2_000)


def test_a_search_of_too_many_hits_is_refused_before_it_runs() -> None:
    """Queries times limit times the width of the asked fields must fit a reply."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        body = {"collectionName": "c", "data": [[1, 2]] * 16_384, "limit": 16_384}
        reply = await client.post("/entities/search", body)
        assert (reply["code"], client.service.searched) == (1100, [])
        assert "104857600" in reply["message"]
        assert (await client.post("/entities/search", body | {"limit": 10}))["code"] == 0

    serve(script)


def test_a_result_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that turn out larger than a reply may be are refused before they are encoded."""
    monkeypatch.setattr("node.api.limits.OUTPUT_BYTES_MAX", 1000)

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        rows = [{"id": i, "vector": [1, 2], "text": "x" * 500} for i in range(3)]
        assert (await client.post("/entities/insert", {"collectionName": "c", "data": rows}))["code"] == 0
        reply = await client.post("/entities/query", {"collectionName": "c", "filter": "id > 0"})
        assert (reply["code"], "at most 1000 are returned" in reply["message"]) == (1100, True)

    serve(script)


def test_a_refusal_on_a_thread_is_a_result() -> None:
    """What a worker thread refuses comes back without its frames, and is no failed work if nobody waits for it."""

    def refuse(ballast: list[int]) -> None:
        try:
            raise ValueError("inner")
        except ValueError:
            raise BadJson("no") from None

    result, error = apart(refuse, [1])
    assert result is None and isinstance(error, BadJson)
    assert error.__traceback__ is None and error.__context__ is None
    assert apart(len, [1]) == (1, None)
