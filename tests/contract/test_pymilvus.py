"""Milvus's own Python client against a real node: what its users write works unchanged, over the port of REST.

Where a claim says "as REST", the same is asked of both interfaces of one node.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from pymilvus import (
    AnnSearchRequest,
    AsyncMilvusClient,
    Collection,
    CollectionSchema,
    DataType,
    FieldSchema,
    MilvusClient,
    MilvusException,
    RRFRanker,
    WeightedRanker,
    connections,
    utility,
)

from node.grpc.methods import REFUSED, SERVED
from node.grpc.protocol import SERVICE, message, methods
from tests.process.clusters import Trio
from tests.process.running import Running

DIM = 8
ROWS = 500
RNG = np.random.default_rng(11)
VECTORS = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
COLORS = ["red", "green", "blue"]
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each error that a test asks for


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("pymilvus")
    with Running(folder / "data", settings={"shards": "4"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(node: Running) -> Iterator[MilvusClient]:
    made = MilvusClient(uri=f"http://127.0.0.1:{node.port}")
    yield made
    made.close()


@pytest.fixture
def demo(client: MilvusClient) -> Iterator[str]:
    """A quickly made collection with rows in it."""
    client.create_collection("demo", dimension=DIM, metric_type="L2", consistency_level="Strong")
    client.insert("demo", [row(i) for i in range(ROWS)])
    yield "demo"
    client.drop_collection("demo")


def row(i: int) -> dict[str, Any]:
    return {"id": i, "vector": VECTORS[i].tolist(), "color": COLORS[i % 3], "n": i}


def nearest(query: np.ndarray[Any, Any], passing: Any = range(ROWS)) -> list[int]:
    distance = ((VECTORS - query) ** 2).sum(axis=1)
    return sorted(passing, key=lambda i: (distance[i], i))


# --- quick start -------------------------------------------------------------------------------------------------


def test_quick_start(client: MilvusClient, demo: str) -> None:
    """The program of Milvus's quick start: create, insert, search with a filter, query, get, delete, drop."""
    assert demo in client.list_collections() and client.has_collection(demo)
    described = client.describe_collection(demo)
    assert [(one["name"], one["type"]) for one in described["fields"]] == [
        ("id", DataType.INT64),
        ("vector", DataType.FLOAT_VECTOR),
    ]
    assert described["fields"][1]["params"] == {"dim": DIM} and described["enable_dynamic_field"]
    found = client.search(
        demo,
        data=[VECTORS[3].tolist(), VECTORS[7].tolist()],
        filter='color == "red"',
        limit=4,
        output_fields=["color", "n"],
    )
    red = [i for i in range(ROWS) if i % 3 == 0]
    assert [[hit["id"] for hit in hits] for hits in found] == [nearest(VECTORS[i], red)[:4] for i in (3, 7)]
    assert found[0][0]["entity"] == {"color": "red", "n": 3} and found[0][0]["distance"] == 0
    assert list(client.query(demo, filter="n in [5, 6]", output_fields=["color"])) == [
        {"id": 5, "color": "blue"},
        {"id": 6, "color": "red"},
    ]
    (got,) = client.get(demo, ids=[9])
    assert got == row(9) | {"vector": pytest.approx(VECTORS[9])}
    assert client.delete(demo, ids=[1, 2])["delete_count"] == 2
    assert client.delete(demo, filter="n >= 490")["delete_count"] == 10
    assert list(client.query(demo, output_fields=["count(*)"])) == [{"count(*)": ROWS - 12}]
    client.flush(demo)
    assert client.get_collection_stats(demo)["row_count"] == ROWS - 12
    client.drop_collection(demo)
    assert not client.has_collection(demo)
    client.drop_collection(demo)  # once more does no harm


def test_search_options(client: MilvusClient, demo: str) -> None:
    """Offset, ids, templates, rounding, range, consistency levels, partition names: as Milvus has them."""
    expected = nearest(VECTORS[0])

    def ids(**more: Any) -> list[int]:
        given = {"data": [VECTORS[0].tolist()], "limit": 5, **more}
        return [hit["id"] for hit in client.search(demo, **given)[0]]

    assert ids(offset=3) == ids(search_params={"offset": 3}) == expected[3:8]
    assert ids(filter="n < {edge}", filter_params={"edge": 50}) == [i for i in expected if i < 50][:5]
    assert ids(filter="n in {some}", filter_params={"some": [4, 8]}) == [i for i in expected if i in (4, 8)]
    for level in ("Strong", "Session", "Bounded", "Eventually"):
        assert ids(consistency_level=level) == expected[:5]
    assert ids(partition_names=["_default"]) == expected[:5]
    (hits,) = client.search(demo, data=[VECTORS[0].tolist()], limit=50, search_params={"params": {"radius": 6.0}})
    assert [hit["id"] for hit in hits] == [i for i in expected if ((VECTORS[i] - VECTORS[0]) ** 2).sum() < 6][:50]
    (rounded,) = client.search(demo, data=[VECTORS[0].tolist()], limit=3, round_decimal=1)
    assert all(round(hit["distance"], 1) == pytest.approx(hit["distance"], abs=1e-6) for hit in rounded)
    (by_id,) = client.search(demo, ids=[0], limit=5)
    assert [hit["id"] for hit in by_id] == expected[:5]
    array = client.search(demo, data=VECTORS[:2], limit=1)
    assert [hits[0]["id"] for hits in array] == [0, 1]


def test_iterators(client: MilvusClient, demo: str) -> None:
    """Pages of a query and of a search bring every row once, as of their beginning, and rows of one distance whole."""
    pages = client.query_iterator(demo, batch_size=70, filter="n >= 100", output_fields=["n"])
    client.delete(demo, filter="n >= 300")
    seen = []
    while page := pages.next():
        seen += [one["id"] for one in page]
    assert seen == list(range(100, ROWS))
    same = [{"id": 1000 + i, "vector": VECTORS[0].tolist(), "n": 1000 + i} for i in range(45)]
    client.insert(demo, same)
    hits = client.search_iterator(demo, data=[VECTORS[0].tolist()], batch_size=20, output_fields=["n"])
    found = []
    while page := hits.next():
        found += [hit["id"] for hit in page]
    assert sorted(found[:46]) == [0, *range(1000, 1045)]
    assert found[46:] == nearest(VECTORS[0], range(1, 300))
    limited = client.search_iterator(demo, data=[VECTORS[5].tolist()], batch_size=7, limit=30, filter="n < 300")
    found = []
    while page := limited.next():
        found += [hit["id"] for hit in page]
    assert found == nearest(VECTORS[5], range(300))[:30]


def test_groups_and_orders(client: MilvusClient, node: Running) -> None:
    """Hits of groups, rows in an order of their fields, and aggregates, as REST."""
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("color", DataType.VARCHAR, max_length=9, nullable=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params("vector", metric_type="L2", index_type="FLAT")
    client.create_collection("groups", schema=schema, index_params=index, consistency_level="Strong")
    colors = [*COLORS, None]
    client.insert("groups", [{"id": i, "color": colors[i % 4], "vector": VECTORS[i]} for i in range(100)])
    vector = VECTORS[0].tolist()
    (hits,) = client.search(
        "groups", data=[vector], limit=3, group_by_field="color", group_size=2, output_fields=["color"]
    )
    shown = node.ask(
        "/entities/search", collectionName="groups", data=[vector], limit=3, groupingField="color", groupSize=2
    )
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in shown] and len(hits) == 6
    asked = [AnnSearchRequest([vector], "vector", {"metric_type": "L2"}, 4)]
    (hits,) = client.hybrid_search(
        "groups", asked, RRFRanker(), limit=2, group_by_field="color", group_size=3, strict_group_size=True
    )
    search = [{"data": [vector], "annsField": "vector", "limit": 4}]
    asked_there = {
        "search": search,
        "rerank": {"strategy": "rrf"},
        "limit": 2,
        "groupingField": "color",
        "groupSize": 3,
    }
    shown = node.ask("/entities/hybrid_search", collectionName="groups", **asked_there)
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in shown] and len(hits) == 6
    for params, output, body in [
        ({"order_by_fields": "color:desc,id:desc"}, ["color"], {"orderByFields": ["color:desc", "id:desc"]}),
        ({"group_by_fields": "color"}, ["color", "count(*)", "avg(id)"], {"groupByFields": ["color"]}),
    ]:
        request = message("milvus.QueryRequest")(
            collection_name="groups",
            expr="id < 8",
            output_fields=output,
            use_default_consistency=True,
            query_params=[{"key": key, "value": value} for key, value in (params | {"limit": "50"}).items()],
        )
        answer = message("milvus.QueryResults").FromString(channel_call(node, "Query", request.SerializeToString()))
        assert answer.status.code == 0, answer.status.reason
        shown = node.ask("/entities/query", collectionName="groups", filter="id < 8", outputFields=output, **body)
        columns = {one.field_name: _values(one) for one in answer.fields_data}
        assert [{name: column[i] for name, column in columns.items()} for i in range(len(shown))] == shown
    client.drop_collection("groups")


def test_a_query_for_more_groups_than_are_answered(node: Running, client: MilvusClient) -> None:
    """Without a limit nothing is cut off in silence: all groups come, or the query is refused."""
    client.create_collection("many", dimension=2, consistency_level="Strong")
    client.insert("many", [{"id": i, "vector": [1.0, i]} for i in range(16_385)])
    for expr, wanted in (("id < 16384", 16_384), ("", None)):
        request = message("milvus.QueryRequest")(
            collection_name="many",
            expr=expr,
            output_fields=["id", "count(*)"],
            use_default_consistency=True,
            query_params=[{"key": "group_by_fields", "value": "id"}],
        )
        answer = message("milvus.QueryResults").FromString(channel_call(node, "Query", request.SerializeToString()))
        if wanted is None:
            assert answer.status.code == 1100 and "more than 16384 groups" in answer.status.reason
        else:
            assert [len(_values(one)) for one in answer.fields_data] == [wanted, wanted], answer.status.reason
    client.drop_collection("many")


def _values(data: Any) -> list[Any]:
    """Return the values of a scalar column of an answer."""
    values = list(getattr(data.scalars, data.scalars.WhichOneof("data")).data)
    return [
        value if live else None for value, live in zip(values, data.valid_data or [True] * len(values), strict=True)
    ]


def test_upsert(client: MilvusClient, demo: str) -> None:
    """An upsert replaces a row; a partial one changes what it names and leaves the rest."""
    assert client.upsert(demo, [row(5) | {"color": "grey"}])["upsert_count"] == 1
    client.upsert(demo, [{"id": 6, "color": "pink"}], partial_update=True)
    assert list(client.get(demo, ids=[5, 6], output_fields=["color", "n"])) == [
        {"id": 5, "color": "grey", "n": 5},
        {"id": 6, "color": "pink", "n": 6},
    ]
    assert list(client.query(demo, output_fields=["count(*)"])) == [{"count(*)": ROWS}]


# --- schemas -----------------------------------------------------------------------------------------------------


def typed_schema(client: MilvusClient) -> CollectionSchema:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=True, description="of all types")
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=40)
    schema.add_field("bool", DataType.BOOL, nullable=True)
    schema.add_field("int8", DataType.INT8)
    schema.add_field("int16", DataType.INT16, default_value=7)
    schema.add_field("int32", DataType.INT32, nullable=True)
    schema.add_field("int64", DataType.INT64)
    schema.add_field("float", DataType.FLOAT)
    schema.add_field("double", DataType.DOUBLE, nullable=True)
    schema.add_field("text", DataType.VARCHAR, max_length=100, nullable=True)
    schema.add_field("json", DataType.JSON, nullable=True)
    schema.add_field("ints", DataType.ARRAY, element_type=DataType.INT64, max_capacity=8, nullable=True)
    schema.add_field("words", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=8, max_length=20)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
    return schema


TYPED: list[dict[str, Any]] = [
    {
        "key": "a", "bool": True, "int8": -128, "int16": 9, "int32": 5, "int64": -(1 << 63), "float": 1.5,
        "double": 0.1, "text": "häßlich", "json": {"a": [1, {"b": None}]}, "ints": [1, -2, 1 << 62],
        "words": ["x", "y"], "vector": [1, 2, 3, 4.5], "extra": {"deep": [True, "z"]},
    },
    {
        "key": "b", "bool": None, "int8": 127, "int16": None, "int32": None, "int64": (1 << 63) - 1, "float": -0.25,
        "double": None, "text": None, "json": None, "ints": None, "words": [], "vector": [0, 0, 0, 1],
    },
    {
        "key": "c", "bool": False, "int8": 0, "int32": 0, "int64": 0, "float": 0, "double": 0.0, "text": "",
        "json": {}, "ints": [], "words": ["ü"], "vector": [0, 1, 0, 1], "n": 3,
    },
]  # fmt: skip


def test_every_type_comes_back(client: MilvusClient, node: Running) -> None:
    """Values of every type, nulls, defaults, dynamic keys: what is inserted is what both interfaces answer."""
    index = client.prepare_index_params()
    index.add_index("vector", index_type="HNSW", metric_type="COSINE", params={"M": 8, "efConstruction": 64})
    client.create_collection(
        "typed", schema=typed_schema(client), index_params=index, consistency_level="Strong", num_shards=2
    )
    assert client.insert("typed", TYPED)["ids"] == ["a", "b", "c"]
    expected = [{**one, "int16": one.get("int16") or 7} for one in TYPED]
    rows = client.query("typed", filter='key != ""', output_fields=["*"])
    assert list(rows) == expected
    shown = node.ask("/entities/query", collectionName="typed", filter='key != ""', outputFields=["*"])
    assert shown == expected
    described = client.describe_collection("typed")
    kinds = {one["name"]: one for one in described["fields"]}
    assert kinds["int16"]["default_value"].int_data == 7 and kinds["bool"]["nullable"]
    assert kinds["words"]["element_type"] == DataType.VARCHAR
    assert kinds["words"]["params"] == {"max_capacity": 8, "max_length": 20}
    assert described["description"] == "of all types" and described["num_shards"] == 2
    (index_name,) = client.list_indexes("typed")
    one = client.describe_index("typed", index_name)
    assert (one["index_type"], one["metric_type"], one["M"], one["efConstruction"]) == ("HNSW", "COSINE", "8", "64")
    (hit,) = client.search("typed", data=[[1, 2, 3, 4.5]], limit=1, output_fields=["*"])[0]
    assert hit["entity"] == expected[0]
    client.drop_collection("typed")


def test_schema_changes_reach_clients_that_know_the_old_one(client: MilvusClient, node: Running, demo: str) -> None:
    """A client with an old schema is told so and takes the new one: no value of a field goes to the dynamic keys."""
    client.insert(demo, [row(0) | {"id": 9000, "pages": 3}])
    field = {"fieldName": "pages", "dataType": "Int64", "nullable": True}
    node.ask("/collections/fields/add", collectionName=demo, schema=field)
    client.insert(demo, [row(0) | {"id": 9001, "pages": 4}])
    assert list(client.query(demo, filter="pages == 4", output_fields=["pages"])) == [{"id": 9001, "pages": 4}]
    client.add_collection_field(demo, "more", DataType.VARCHAR, max_length=20, nullable=True)
    client.insert(demo, [row(0) | {"id": 9002, "more": "x"}])
    assert list(client.query(demo, filter='more == "x"', output_fields=["more", "pages"])) == [
        {"id": 9002, "more": "x", "pages": None}
    ]


# --- everything around rows --------------------------------------------------------------------------------------


def test_databases_aliases_partitions(client: MilvusClient, node: Running) -> None:
    """They are made, listed, described, used and dropped."""
    client.create_database("other", properties={"database.replica.number": "1"})
    assert set(client.list_databases()) == {"default", "other"}
    assert client.describe_database("other")["database.replica.number"] == "1"
    there = MilvusClient(uri=f"http://127.0.0.1:{node.port}", db_name="other")
    there.create_collection("c", dimension=4)
    assert there.list_collections() == ["c"] and client.list_collections() == []
    there.create_alias("c", "d")
    assert there.list_aliases("c")["aliases"] == ["d"] and there.describe_alias("d")["collection_name"] == "c"
    there.insert("d", [{"id": 1, "vector": [1, 2, 3, 4]}])
    there.drop_alias("d")
    there.create_partition("c", "p")
    assert there.list_partitions("c") == ["_default", "p"] and there.has_partition("c", "p")
    there.insert("c", [{"id": 2, "vector": [1, 2, 3, 4]}], partition_name="p")
    assert there.get_partition_stats("c", "p")["row_count"] == 1
    assert [one["id"] for one in there.query("c", filter="id > 0", partition_names=["p"])] == [2]
    there.release_partitions("c", ["p"])
    there.drop_partition("c", "p")
    assert there.list_partitions("c") == ["_default"]
    there.rename_collection("c", "e")
    assert there.list_collections() == ["e"]
    there.truncate_collection("e")
    assert there.get_collection_stats("e")["row_count"] == 0
    there.alter_collection_properties("e", {"collection.ttl.seconds": "100"})
    assert there.describe_collection("e")["properties"] == {"collection.ttl.seconds": "100"}
    there.drop_collection_properties("e", ["collection.ttl.seconds"])
    assert there.describe_collection("e")["properties"] == {}
    there.drop_collection("e")
    there.close()
    client.drop_database("other")
    assert client.list_databases() == ["default"]


def test_loading_indexes_flush_compaction(client: MilvusClient, demo: str) -> None:
    """States and progress are those of Milvus; flush and compaction end; segments are listed."""
    assert str(client.get_load_state(demo)["state"]) == "Loaded"
    client.release_collection(demo)
    assert str(client.get_load_state(demo)["state"]) == "NotLoad"
    client.drop_index(demo, "vector")
    assert client.list_indexes(demo) == []
    with pytest.raises(MilvusException) as missing:
        client.load_collection(demo)
    assert missing.value.code == 1100
    index = client.prepare_index_params("vector", index_type="IVF_FLAT", metric_type="L2", params={"nlist": 4})
    client.create_index(demo, index)
    client.load_collection(demo)
    assert client.describe_index(demo, "vector")["nlist"] == "4"
    client.flush(demo)
    assert client.describe_index(demo, "vector")["state"] == "Finished"
    assert sum(one.num_rows for one in client.list_persistent_segments(demo)) == ROWS
    assert sum(one.num_rows for one in client.list_loaded_segments(demo)) == ROWS
    job = client.compact(demo)
    assert client.get_compaction_state(job) in ("Executing", "Completed")
    assert client.list_resource_groups() == ["__default_resource_group"]
    assert client.describe_replica(demo)[0].resource_group == "__default_resource_group"
    assert client.get_server_version()


@pytest.mark.filterwarnings("ignore:.* is an ORM-style PyMilvus API")
def test_orm(node: Running) -> None:
    """The older object interface: connections, Collection, Partition, utility."""
    connections.connect("orm", uri=f"http://127.0.0.1:{node.port}")
    fields = [
        FieldSchema("pk", DataType.INT64, is_primary=True, auto_id=True),
        FieldSchema("n", DataType.INT32),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=DIM),
    ]
    made = Collection("orm", CollectionSchema(fields), using="orm", consistency_level="Strong", shards_num=2)
    assert utility.has_collection("orm", using="orm") and utility.list_collections(using="orm") == ["orm"]
    written = made.insert([list(range(ROWS)), VECTORS])
    assert written.insert_count == ROWS and len(set(written.primary_keys)) == ROWS
    made.flush()
    assert made.num_entities == ROWS
    made.create_index("v", {"index_type": "HNSW", "metric_type": "L2", "params": {"M": 8, "efConstruction": 64}})
    assert utility.wait_for_index_building_complete("orm", using="orm")
    assert utility.index_building_progress("orm", using="orm")["pending_index_rows"] == 0
    made.load()
    assert utility.loading_progress("orm", using="orm") == {"loading_progress": "100%"}
    assert str(utility.load_state("orm", using="orm")) == "Loaded"
    (hits,) = made.search(
        VECTORS[:1].tolist(), "v", {"metric_type": "L2", "params": {"ef": 64}}, 3, output_fields=["n"]
    )
    assert [hit.entity.get("n") for hit in hits] == nearest(VECTORS[0])[:3]
    assert list(made.query("n < 3", output_fields=["n"])) == [
        {"n": i, "pk": key} for i, key in enumerate(written.primary_keys[:3])
    ]
    assert made.delete(f"pk in {written.primary_keys[:2]}").delete_count == 2
    part = made.create_partition("p")
    part.insert([[1], VECTORS[:1]])
    assert part.num_entities == 1 and made.has_partition("p")
    assert made.describe()["num_partitions"] == 2 and made.indexes[0].params["index_type"] == "HNSW"
    pages, count = made.query_iterator(batch_size=100, expr="n >= 0"), 0
    while page := pages.next():
        count += len(page)
    assert count == ROWS - 1
    made.release()
    made.drop_index()
    made.drop()
    assert not utility.has_collection("orm", using="orm")
    connections.disconnect("orm")


def test_async_client(node: Running) -> None:
    """AsyncMilvusClient: the same over grpc.aio, many at a time."""

    async def script() -> None:
        client = AsyncMilvusClient(uri=f"http://127.0.0.1:{node.port}")
        await client.create_collection("later", dimension=DIM, metric_type="L2", consistency_level="Strong")
        parts = [client.insert("later", [row(i) for i in range(at, at + 50)]) for at in range(0, ROWS, 50)]
        assert sum(one["insert_count"] for one in await asyncio.gather(*parts)) == ROWS
        found = await asyncio.gather(*(client.search("later", data=[VECTORS[i].tolist()], limit=3) for i in range(40)))
        assert [[hit["id"] for hit in hits[0]] for hits in found] == [nearest(VECTORS[i])[:3] for i in range(40)]
        assert list(await client.query("later", filter="", output_fields=["count(*)"])) == [{"count(*)": ROWS}]
        await client.delete("later", ids=[1])
        assert list(await client.get("later", ids=[1])) == []
        await client.drop_collection("later")
        await client.close()

    asyncio.run(script())


HALVES = (VECTORS[:40].view(np.uint32) >> 16).astype(np.uint16)
VECTOR_TYPES = {
    DataType.FLOAT16_VECTOR: ({"dim": DIM}, "L2", list(VECTORS[:40].astype(np.float16))),
    DataType.BFLOAT16_VECTOR: ({"dim": DIM}, "L2", [one.tobytes() for one in HALVES]),
    DataType.INT8_VECTOR: ({"dim": DIM}, "L2", list((VECTORS[:40] * 20).clip(-128, 127).astype(np.int8))),
    DataType.BINARY_VECTOR: ({"dim": 32}, "HAMMING", [bytes([i, 255 - i, i * 3 % 256, 7]) for i in range(40)]),
    DataType.SPARSE_FLOAT_VECTOR: ({}, "IP", [{i: 2.0, i + 1: 0.5, 999: 0.25} for i in range(40)]),
}


def _joined(value: Any) -> Any:
    """Return a vector of bytes as it is inserted: the client has a list of one around it, or not."""
    return b"".join(value) if isinstance(value, list) else value


@pytest.mark.parametrize("kind", VECTOR_TYPES, ids=lambda kind: kind.name)
def test_vectors_of_other_types(client: MilvusClient, node: Running, kind: DataType) -> None:
    """They go in, are found, come back as they went in, and pages bring every hit once; as REST."""
    params, metric, vectors = VECTOR_TYPES[kind]
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("v", kind, **params)
    index = client.prepare_index_params("v", metric_type=metric, index_type="AUTOINDEX")
    client.create_collection("kinds", schema=schema, index_params=index, consistency_level="Strong")
    client.insert("kinds", [{"id": i, "v": vector} for i, vector in enumerate(vectors)])
    (hits,) = client.search("kinds", data=[vectors[7]], limit=5, output_fields=["v"])
    shown = node.ask("/entities/search", collectionName="kinds", ids=[7], limit=5)
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in shown] and hits[0]["id"] == 7
    (got,) = client.get("kinds", ids=[7], output_fields=["v"])
    assert _joined(got["v"]) == _joined(hits[0]["entity"]["v"])
    expected = vectors[7]
    assert _joined(got["v"]) == (expected.tobytes() if isinstance(expected, np.ndarray) else expected)
    pages, found = client.search_iterator("kinds", data=[vectors[7]], batch_size=6), []
    while page := pages.next():
        found += [hit["id"] for hit in page]
    assert sorted(found) == list(range(40))
    client.drop_collection("kinds")


def test_analyzers(client: MilvusClient, node: Running) -> None:
    """Texts become the same tokens through both interfaces."""
    params = {"tokenizer": "standard", "filter": ["lowercase"]}
    (found,) = client.run_analyzer(["Two Words"], params, with_detail=True)
    asked = {"text": ["Two Words"], "analyzerParams": json.dumps(params), "withDetail": True}
    (shown,) = node.ask("/common/run_analyzer", **asked)["results"]
    assert [one["token"] for one in found.tokens] == [one["token"] for one in shown["tokens"]] == ["two", "words"]
    assert [one["start_offset"] for one in found.tokens] == [one["startOffset"] for one in shown["tokens"]]


def test_hybrid_search(client: MilvusClient) -> None:
    """Two vector fields, ranked by reciprocal rank and by weights, as REST; an offset is the whole ranking's alone."""
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("a", DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("b", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("a", metric_type="L2")
    index.add_index("b", metric_type="L2")
    client.create_collection("two", schema=schema, index_params=index, consistency_level="Strong")
    client.insert("two", [{"id": i, "a": VECTORS[i], "b": VECTORS[ROWS - 1 - i]} for i in range(ROWS)])
    asked = [
        AnnSearchRequest([VECTORS[0].tolist()], "a", {"metric_type": "L2"}, 20, expr="id < 400"),
        AnnSearchRequest([VECTORS[9].tolist()], "b", {"metric_type": "L2"}, 20),
    ]
    by_a, by_b = nearest(VECTORS[0], range(400))[:20], [ROWS - 1 - i for i in nearest(VECTORS[9])[:20]]
    scores: dict[int, float] = {}
    for ranking in (by_a, by_b):
        for rank, key in enumerate(ranking):
            scores[key] = scores.get(key, 0) + 1 / (60 + rank + 1)
    (hits,) = client.hybrid_search("two", asked, RRFRanker(), limit=10, output_fields=["id"])
    best = sorted(scores, key=lambda key: (-scores[key], key))
    assert [hit["id"] for hit in hits] == best[:10]
    (hits,) = client.hybrid_search("two", asked, RRFRanker(), limit=10, offset=3, output_fields=["id"])
    assert [hit["id"] for hit in hits] == best[3:13]
    (weighted,) = client.hybrid_search("two", asked, WeightedRanker(1.0, 0.0), limit=1)
    assert weighted[0]["id"] in by_a + by_b
    with pytest.raises(MilvusException) as wrong:
        client.hybrid_search("two", asked, WeightedRanker(0.5), limit=1)
    assert wrong.value.code == 1100
    client.drop_collection("two")


def test_times(client: MilvusClient, node: Running) -> None:
    """Timestamptz fields take and give ISO 8601 texts, in the collection's zone, as over REST; filters compare them."""
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("t", DataType.TIMESTAMPTZ, nullable=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params("vector", metric_type="L2", index_type="FLAT")
    index.add_index("t", index_type="STL_SORT")
    client.create_collection(
        "times", schema=schema, index_params=index, consistency_level="Strong", properties={"timezone": "Asia/Shanghai"}
    )
    given = ["2025-01-01T00:00:00Z", "2025-01-01 08:30:00", None, "2025-02-03T04:05:06.7-03:00"]
    client.insert("times", [{"id": i, "t": one, "vector": VECTORS[i]} for i, one in enumerate(given)])
    node.ask("/entities/insert", collectionName="times", data=[{"id": 4, "t": given[3], "vector": VECTORS[4].tolist()}])
    shown = [
        "2025-01-01T08:00:00+08:00", "2025-01-01T08:30:00+08:00", None, "2025-02-03T15:05:06.7+08:00",
        "2025-02-03T15:05:06.7+08:00",
    ]  # fmt: skip
    assert [row["t"] for row in client.query("times", filter="id >= 0", output_fields=["t"])] == shown
    body = {"collectionName": "times", "outputFields": ["t"]}
    assert [row["t"] for row in node.ask("/entities/query", filter="id >= 0", **body)] == shown
    for filter, wanted in (
        ("t >= ISO '2025-01-01T00:30:00Z'", [1, 3, 4]),
        ("t == ISO '2025-01-01 08:00:00'", [0]),
        ("t + INTERVAL 'P1M' > ISO '2025-02-01T00:15:00Z'", [1, 3, 4]),
        ("t is null", [2]),
    ):
        assert [row["id"] for row in client.query("times", filter=filter)] == wanted, filter
        assert [row["id"] for row in node.ask("/entities/query", filter=filter, **body)] == wanted, filter
    (hits,) = client.search("times", [VECTORS[1].tolist()], filter="t < ISO '2025-01-02'", output_fields=["t"])
    assert [(hit["id"], hit["entity"]["t"]) for hit in hits] == [(1, shown[1]), (0, shown[0])]
    (row,) = client.query("times", ids=[0], output_fields=["t"], timezone="America/Havana")
    assert row["t"] == "2024-12-31T19:00:00-05:00"
    ((hit,),) = client.search("times", [VECTORS[0].tolist()], limit=1, output_fields=["t"], timezone="UTC")
    assert hit["entity"]["t"] == "2025-01-01T00:00:00Z"
    with pytest.raises(MilvusException, match="time_fields is not supported"):
        client.query("times", ids=[0], output_fields=["t"], time_fields="year,month")
    client.alter_collection_properties("times", {"timezone": "UTC"})
    rows = client.query("times", filter="t >= ISO '2025-01-01T00:30:00'", output_fields=["t"])
    assert [row["t"] for row in rows] == ["2025-01-01T00:30:00Z", *["2025-02-03T07:05:06.7Z"] * 2]
    for wrong, says in (("soon", "is not a Timestamptz"), (5, "")):
        with pytest.raises((MilvusException, TypeError)) as refused:
            client.insert("times", [{"id": 9, "t": wrong, "vector": VECTORS[0]}])
        assert says in str(refused.value)
    with pytest.raises(MilvusException, match="no zone of the IANA database"):
        client.alter_collection_properties("times", {"timezone": "Nowhere"})
    client.drop_collection("times")


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "call"),
    [
        ("/entities/query", {"filter": "n = 1"}, lambda c: c.query("demo", filter="n = 1")),
        ("/entities/query", {"filter": "", "limit": 0}, lambda c: c.query("demo", filter="")),
        ("/entities/query", {"filter": "n > {x}"}, lambda c: c.query("demo", filter="n > {x}")),
        ("/entities/delete", {"filter": "n ="}, lambda c: c.delete("demo", filter="n =")),
        (
            "/entities/search",
            {"data": [[1.0] * DIM], "limit": 20_000},
            lambda c: c.search("demo", data=[[1.0] * DIM], limit=20_000),
        ),
        (
            "/entities/search",
            {"data": [[1.0] * DIM], "annsField": "nothing"},
            lambda c: c.search("demo", data=[[1.0] * DIM], anns_field="nothing"),
        ),
        (
            "/entities/search",
            {"data": [[1.0] * DIM], "searchParams": {"metric_type": "IP"}},
            lambda c: c.search("demo", data=[[1.0] * DIM], search_params={"metric_type": "IP"}),
        ),
        ("/collections/describe", {"collectionName": "no"}, lambda c: c.describe_collection("no")),
        ("/collections/load", {"collectionName": "no"}, lambda c: c.load_collection("no")),
        (
            "/partitions/create",
            {"partitionName": "a b"},
            lambda c: c.create_partition("demo", "a b"),
        ),
        (
            "/indexes/alter_properties",
            {"indexName": "no", "properties": {"mmap.enabled": True}},
            lambda c: c.alter_index_properties("demo", "no", {"mmap.enabled": True}),
        ),
        ("/aliases/describe", {"aliasName": "no"}, lambda c: c.describe_alias("no")),
        ("/databases/describe", {"dbName": "no"}, lambda c: c.describe_database("no")),
    ],
)
def test_errors_are_those_of_rest(
    client: MilvusClient, node: Running, demo: str, route: str, body: dict[str, Any], call: Any
) -> None:
    """Code and message of an error are the same through both interfaces."""
    shown = node.call(route, **{"collectionName": demo, **body})
    assert shown["code"] != 0
    with pytest.raises(MilvusException) as raised:
        call(client)
    assert (raised.value.code, raised.value.message) == (shown["code"], shown["message"])


def channel_call(node: Running, method: str, body: bytes, timeout: float = 10) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
        answer: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=timeout)
        return answer


def test_rows_that_do_not_fit_are_refused(node: Running, demo: str) -> None:
    """Columns of wrong type, length, dimension or range, NaN, twice, unknown: code 1804, and nothing is written."""
    Insert, Result = message("milvus.InsertRequest"), message("milvus.MutationResult")

    def refused(*fields: dict[str, Any], rows: int = 1) -> tuple[int, str]:
        request = Insert(collection_name=demo, num_rows=rows, fields_data=fields)
        status = Result.FromString(channel_call(node, "Insert", request.SerializeToString())).status
        return status.code, status.reason

    key = {"field_name": "id", "type": 5, "scalars": {"long_data": {"data": [70_000]}}}
    vector = {"field_name": "vector", "type": 101, "vectors": {"dim": DIM, "float_vector": {"data": [1.0] * DIM}}}
    nan = {"dim": DIM, "float_vector": {"data": [float("nan")] * DIM}}
    for fields, word in [
        ([key], "vector"),
        ([vector], "id"),
        ([key, key, vector], "twice"),
        ([key, {**vector, "type": 5}], "Int64"),
        ([key, {**vector, "vectors": {"dim": 4, "float_vector": {"data": [1.0] * 4}}}], "dim"),
        ([key, {**vector, "vectors": {"dim": DIM, "float_vector": {"data": [1.0] * 4}}}], "bytes"),
        ([key, {**vector, "vectors": nan}], "NaN"),
        ([{**key, "scalars": {"long_data": {"data": [1, 2]}}}, vector], "2 values"),
        ([{**key, "valid_data": [False]}, vector], "required"),
        ([key, vector, {"field_name": "x", "type": 5, "scalars": {"long_data": {"data": [1]}}}], "no such field"),
        ([key, vector, {"is_dynamic": True, "type": 23, "scalars": {"json_data": {"data": [b"{"]}}}], "dynamic"),
        ([key, vector, {"is_dynamic": True, "type": 23, "scalars": {"json_data": {"data": [b"[1]"]}}}], "object"),
        ([key, vector, {"is_dynamic": True, "type": 23, "scalars": {"json_data": {"data": [b'{"id":1}']}}}], "id"),
    ]:
        code, reason = refused(*fields)
        assert code == 1804 and word in reason, reason
    assert refused(key, vector, rows=0)[0] == 1804
    assert node.count(demo, "id == 70000") == 0


def test_bad_bytes_are_answered(node: Running) -> None:
    """Bytes that are no message, methods that are not there, connections that say nonsense: the node goes on."""
    for method in ("Insert", "Search", "Query", "CreateCollection"):
        answer = methods()[method].response.FromString(channel_call(node, method, b"\xff\xfe nonsense"))
        assert (answer.status if hasattr(answer, "status") else answer).code == 1100
    for method in ("NoSuchMethod", "CreateSnapshot", "CreateReplicateStream"):
        with pytest.raises(grpc.RpcError) as unknown:
            channel_call(node, method, b"")
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED and unknown.value.details()
    for first in (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 100,
        b"PRI * HTT",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as raw:
            raw.sendall(first)
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as raw:  # byte by byte is HTTP as well
        for byte in b"POST /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
            raw.sendall(bytes([byte]))
        assert raw.recv(100).startswith(b"HTTP/1.1 404")
    assert node.is_ready()


def test_every_method_is_served_or_refused_with_a_reason() -> None:
    """Milvus's service has no method that the table does not know."""
    assert SERVED.keys() | REFUSED.keys() == methods().keys() and not SERVED.keys() & REFUSED.keys()
    assert all(REFUSED.values())


def test_too_large_and_too_late(node: Running, demo: str) -> None:
    """A message beyond the limit is refused by its size, a call whose time is up by its deadline."""
    with pytest.raises(grpc.RpcError) as large:
        channel_call(node, "Insert", bytes(65 << 20), timeout=60)
    assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as late:
        channel_call(node, "Insert", bytes(60 << 20), timeout=0.005)  # which no machine carries in that time
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert node.is_ready() and node.count(demo) == ROWS


def test_it_is_counted(node: Running, demo: str) -> None:
    """Requests over gRPC are in the metrics by their method."""
    text = node.get("/metrics")[1].decode()
    assert 'route="Insert"' in text and 'route="DescribeCollection"' in text


def test_a_stop_lets_calls_finish(tmp_path: Path) -> None:
    """At SIGTERM what runs is answered, and a client that is connected does not hold the node up."""
    with Running(tmp_path / "data", settings={"shards": "2"}) as node:
        client = MilvusClient(uri=f"http://127.0.0.1:{node.port}")
        client.create_collection("c", dimension=DIM)
        Insert = message("milvus.InsertRequest")
        key = {"field_name": "id", "type": 5, "scalars": {"long_data": {"data": range(20_000)}}}
        floats = {"dim": DIM, "float_vector": {"data": np.ones(20_000 * DIM).tolist()}}
        vector = {"field_name": "vector", "type": 101, "vectors": floats}
        request = Insert(collection_name="c", num_rows=20_000, fields_data=[key, vector])
        with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/Insert").future(request.SerializeToString(), timeout=60)
            while node.metric("annulus_requests_running") < 1 and not call.done():
                pass
            assert node.stop() == 0
            assert message("milvus.MutationResult").FromString(call.result()).insert_cnt == 20_000
        client.close()


# --- a cluster ---------------------------------------------------------------------------------------------------


def test_three_nodes(tmp_path: Path) -> None:
    """What is written through one node of a cluster is read through the others, also when one is gone."""
    with Trio(tmp_path) as trio:
        clients = [MilvusClient(uri=f"http://127.0.0.1:{node.port}") for node in trio]
        clients[0].create_collection("c", dimension=DIM, metric_type="L2", consistency_level="Strong")
        clients[1].insert("c", [row(i) for i in range(ROWS)])
        for client in clients:
            (hits,) = client.search("c", data=[VECTORS[4].tolist()], limit=5, output_fields=["n"])
            assert [hit["entity"]["n"] for hit in hits] == nearest(VECTORS[4])[:5]
        pages, seen = clients[2].query_iterator("c", batch_size=90, filter="n >= 0"), []
        while page := pages.next():
            seen += [one["id"] for one in page]
        assert seen == list(range(ROWS))
        trio["n1"].kill()
        clients[1].insert("c", [row(0) | {"id": 5000}])
        assert list(clients[2].query("c", output_fields=["count(*)"])) == [{"count(*)": ROWS + 1}]
        for client in clients[1:]:
            client.close()


def test_rows_that_are_all_null(client: MilvusClient) -> None:
    """Rows of which none has a value of a nullable field are taken, whatever the field's type."""
    kinds = [
        DataType.BOOL, DataType.INT8, DataType.INT16, DataType.INT32, DataType.INT64, DataType.FLOAT, DataType.DOUBLE,
        DataType.VARCHAR, DataType.JSON,
    ]  # fmt: skip
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
    for kind in kinds:
        schema.add_field(kind.name.lower(), kind, nullable=True, max_length=9)
    index = client.prepare_index_params("v", metric_type="L2")
    client.create_collection("nulls", schema=schema, index_params=index, consistency_level="Strong")
    client.insert("nulls", [{"id": 1, "v": [1.0, 2.0]}])
    client.insert("nulls", [{"id": 2, "v": [1.0, 2.0]}, {"id": 3, "v": [1.0, 2.0]}])
    rows = client.query("nulls", filter="id > 0", output_fields=["*"])
    assert [{key: value for key, value in row.items() if key != "v"} for row in rows] == [
        {"id": key, **{kind.name.lower(): None for kind in kinds}} for key in (1, 2, 3)
    ]
    client.drop_collection("nulls")
