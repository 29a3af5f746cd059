"""Bodies that nobody would send: whatever comes, the answer is an envelope, soon, and never a fault of the server."""

from __future__ import annotations

import json
from typing import Any

import cbor2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.api.requests import Kind, Shape
from node.api.routes import ROUTES
from tests.node.api.fake import Client, serve

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["c", "default", "id", "vector", "word", "1", "-1", "Strong", "L2", "*", "count(*)", "Int64", ""]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
USUAL: dict[str, Any] = {
    "collectionName": "c",
    "data": [[1, 2]],
    "dimension": 2,
    "id": [1],
    "filter": "id == 1",
    "schema": {"fields": [{"fieldName": "id", "dataType": "Int64", "isPrimary": True}]},
    "indexParams": [{"fieldName": "vector"}],
    "partitionName": "p",
    "partitionNames": ["p"],
    "indexName": "vector",
    "aliasName": "a",
    "dbName": "default",
    "newCollectionName": "d",
    "properties": {"collection.ttl.seconds": 5},
    "propertyKeys": ["x"],
}


def _value(shape: Shape, name: str) -> st.SearchStrategy[Any]:
    one = shape.exact[name]
    usual: st.SearchStrategy[Any] = st.just(USUAL[name]) if name in USUAL else st.nothing()
    if one.shape is not None:
        inner = _body(one.shape)
        usual |= inner if one.kind is Kind.OBJECT else st.lists(inner, max_size=2)
    return usual | ODD


def _body(shape: Shape) -> st.SearchStrategy[dict[str, Any]]:
    names = [one.name for one in shape.fields]
    if not names:
        return st.just({})
    return st.fixed_dictionaries({}, optional={name: _value(shape, name) for name in names})


REQUEST = st.sampled_from([route for route in ROUTES if route.handler]).flatmap(
    lambda route: st.tuples(st.just(route), _body(route.shape))
)
ROW = st.dictionaries(st.sampled_from(["id", "vector", "x", "$meta", "y:z"]), ODD, max_size=4)


async def _ask(client: Client, path: str, body: bytes, content_type: str) -> None:
    status, reply = await client.send(path, body, {"Content-Type": content_type, "Accept": "application/json"})
    assert status in (200, 413), (path, body, reply)
    assert isinstance(reply["code"], int)
    assert (reply["code"] == 0) == ("message" not in reply or "data" in reply)
    assert len(json.dumps(reply)) < 20_000


def _run(requests: list[tuple[str, bytes, str]]) -> None:
    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        await client.post("/entities/insert", {"collectionName": "c", "data": [{"id": 1, "vector": [1, 2]}]})
        for path, body, content_type in requests:
            await _ask(client, path, body, content_type)

    serve(script)


BOUNDED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@BOUNDED
@given(st.lists(REQUEST, min_size=1, max_size=6))
def test_odd_values_in_declared_fields(requests: list[Any]) -> None:
    """Fields of any type, on any route, as JSON and as CBOR, never break the server."""
    sent = []
    for route, body in requests:
        sent.append((route.full_path, json.dumps(body).encode(), "application/json"))
        sent.append((route.full_path, cbor2.dumps(body), "application/cbor"))
    _run(sent)


@BOUNDED
@given(st.lists(st.tuples(st.sampled_from(ROUTES), st.binary(max_size=60)), min_size=1, max_size=8))
def test_odd_bytes(requests: list[Any]) -> None:
    """Bytes that are neither JSON nor CBOR are refused."""
    _run(
        [(route.full_path, body, kind) for route, body in requests for kind in ("application/json", "application/cbor")]
    )


@BOUNDED
@given(st.lists(ROW, max_size=3), st.dictionaries(st.sampled_from(["id", "vector", "x"]), ODD, max_size=3))
def test_odd_rows(rows: list[Any], columns: dict[str, Any]) -> None:
    """Rows and columns of anything are taken or refused whole."""
    sent = []
    for path in ("/entities/insert", "/entities/upsert"):
        for partial in (False, True):
            body = {"collectionName": "c", "data": rows, "partialUpdate": partial}
            sent.append((path, json.dumps(body).encode(), "application/json"))
            sent.append((path, cbor2.dumps(body), "application/cbor"))
            sent.append((path, cbor2.dumps(body | {"data": columns}), "application/cbor"))
    _run(sent)
