"""What a client is promised of its rows, through insert, upsert, delete, flush, index build, compaction and restart."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from tests.process.running import Running, until

DIM = 8
DISTINCT = 5_000
SETTINGS = {
    "storage.segment_bytes_max": "1MiB",
    "storage.segment_idle_s_max": "2",
    "storage.checkpoint_interval_s": "2",
    "compaction.interval_s": "0.5",
    "index.rows_min": "256",
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("promises") / "n1", settings=SETTINGS) as running:
        yield running


def compact(node: Running, collection: str) -> None:
    job = node.ask("/collections/compact", collectionName=collection)["compactionID"]
    until(lambda: node.ask("/collections/get_compaction_state", jobID=job)["state"] == "Completed", what="compaction")


def nearest(node: Running, collection: str, vector: list[float], **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.ask(
        "/entities/search", collectionName=collection, data=[vector], consistencyLevel="Strong", **more
    )
    return found


def test_deleted_and_replaced_rows_stay_so(node: Running) -> None:
    """A deleted row never comes back and a replaced one is found by its new vector only: at once, after flush, index
    build, compaction, restart and kill."""
    random = Random(11)
    old = [[random.random() for _ in range(DIM)] for _ in range(1_200)]
    new = {key: [random.random() + 5 for _ in range(DIM)] for key in range(300, 600)}
    gone = range(100, 300)
    node.ask("/collections/create", collectionName="c", dimension=DIM, metricType="L2")
    for first in range(0, 1_200, 300):
        data = [{"id": key, "vector": old[key], "turn": 1} for key in range(first, first + 300)]
        node.ask("/entities/insert", collectionName="c", data=data)
        if first == 300:
            node.ask("/collections/flush", collectionName="c")
    node.ask("/entities/delete", collectionName="c", filter=f"id in {list(gone)}")
    data = [{"id": key, "vector": vector, "turn": 2} for key, vector in new.items()]
    node.ask("/entities/upsert", collectionName="c", data=data)

    def look() -> None:
        assert node.count("c") == 1_000
        assert node.count("c", "turn == 2") == 300
        assert node.count("c", f"id in {list(gone)}") == 0
        for key in random.sample(gone, 10):
            hits = nearest(node, "c", old[key], limit=20)
            assert len(hits) == 20 and not {hit["id"] for hit in hits} & set(gone)
        for key in random.sample(sorted(new), 10):
            (hit,) = nearest(node, "c", new[key], limit=1, outputFields=["turn"])
            assert (hit["id"], hit["turn"]) == (key, 2) and hit["distance"] < 1e-6
            assert all(hit["id"] != key for hit in nearest(node, "c", old[key], limit=5))
        assert len(nearest(node, "c", old[0], limit=1_200)) == 1_000

    look()
    node.ask("/collections/flush", collectionName="c")
    look()
    until(lambda: node.index_finished("c"), what="index")
    look()
    compact(node, "c")
    look()
    for kill in (True, False):
        node.restart(kill=kill)
        look()


def test_every_distinct_value_is_found(node: Running) -> None:
    """5,000 distinct numbers, some at the edges of 64 bits: each equality finds its row, ranges find all, before and
    after a restart; a selective search returns all that matches."""
    edges = [-(1 << 63), (1 << 63) - 1, (1 << 53) + 1, -(1 << 53) - 1, 0, 1_700_000_000_123_456_789]
    values = edges + [3 * number + 1 for number in range(DISTINCT - len(edges))]
    fields = [
        {"fieldName": "id", "dataType": "VarChar", "isPrimary": True, "elementTypeParams": {"max_length": 16}},
        {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
        {"fieldName": "n", "dataType": "Int64"},
    ]
    index = [{"fieldName": "v", "indexName": "v", "metricType": "L2", "indexType": "HNSW", "params": {"M": 8}}]
    node.ask(
        "/collections/create",
        collectionName="numbers",
        schema={"fields": fields, "enableDynamicField": True},
        indexParams=index,
    )
    for first in range(0, DISTINCT, 1_000):
        data = [{"id": f"k{i}", "v": [i, 1], "n": values[i], "m": values[i]} for i in range(first, first + 1_000)]
        node.ask("/entities/insert", collectionName="numbers", data=data)

    def look() -> None:
        for i in [*range(len(edges)), *Random(2).sample(range(DISTINCT), 150)]:
            for name in ("n", "m"):
                found = node.ask(
                    "/entities/query",
                    collectionName="numbers",
                    filter=f"{name} == {values[i]}",
                    outputFields=["n", "m"],
                    consistencyLevel="Strong",
                )
                assert found == [{"id": f"k{i}", "n": values[i], "m": values[i]}]
        for name in ("n", "m"):
            assert node.count("numbers", f"{name} >= {-(1 << 63)}") == DISTINCT
            assert node.count("numbers", f"{name} > {(1 << 63) - 2}") == 1
        hits = nearest(node, "numbers", [0, 0], limit=10, filter=f"n == {values[4_000]} or n == {values[4_500]}")
        assert [hit["id"] for hit in hits] == ["k4000", "k4500"]

    look()
    node.ask("/collections/flush", collectionName="numbers")
    until(lambda: node.index_finished("numbers", "v"), what="index")
    look()
    node.restart()
    look()


DOCUMENT: dict[str, Any] = {
    "deep": {"a": {"b": [1, [2, {"c": None}], "x"]}},
    "empty": [{}, [], "", 0, -0.5, False, None],
    "numbers": [9223372036854775807, -9223372036854775808, 18446744073709551615, 9007199254740993, 1e300, 5e-324, 0.1],
    "text": 'quotes " and \\ and \u0000 and \U0001f600 and \u00e9 and e\u0301',
    "": {" ": {"$": 1, "a.b": 2, '"': 3}},
    "nanoseconds": 1_700_000_000_123_456_789,
}


def test_documents_come_back_exactly(node: Running) -> None:
    """Nested documents, in a JSON field and in dynamic keys, are the same through log, chunks and restart."""
    fields = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
        {"fieldName": "doc", "dataType": "JSON", "nullable": True},
        {"fieldName": "float", "dataType": "Float", "nullable": True},
        {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {"max_length": 65_535}, "defaultValue": "d"},
        {"fieldName": "list", "dataType": "Array", "elementDataType": "Int64",
         "elementTypeParams": {"max_capacity": 8}},
    ]  # fmt: skip
    index = [{"fieldName": "v", "metricType": "COSINE", "indexType": "AUTOINDEX"}]
    node.ask(
        "/collections/create",
        collectionName="docs",
        schema={"fields": fields, "enableDynamicField": True},
        indexParams=index,
    )
    edges = [-(1 << 63), (1 << 63) - 1, 0]
    full = {
        "id": -(1 << 63), "v": [1.5, -2.25], "doc": DOCUMENT, "float": 3.4028235e38, "text": "\u00e9" * 9_000,
        "list": edges, "extra": DOCUMENT,
    }  # fmt: skip
    bare = {"id": (1 << 63) - 1, "v": [0.1, 1e-30], "doc": None, "list": []}
    node.ask("/entities/insert", collectionName="docs", data=[full, bare])

    def look() -> None:
        found = node.ask("/entities/get", collectionName="docs", id=[full["id"], bare["id"]], outputFields=["*"])
        rows = {row["id"]: row for row in found}
        assert rows[full["id"]] == full
        assert {**rows[bare["id"]], "v": None} == {**bare, "v": None, "float": None, "text": "d"}
        assert rows[bare["id"]]["v"] == pytest.approx(bare["v"], rel=1e-6)
        assert (
            node.count("docs", 'doc["deep"]["a"]["b"][1][1] == 1 or extra["nanoseconds"] == 1700000000123456789') == 1
        )
        assert node.count("docs", f"id == {full['id']}") == 1

    look()
    node.restart(kill=True)
    look()
    node.ask("/collections/flush", collectionName="docs")
    look()
    node.restart()
    look()


def test_compaction_frees_the_disk(node: Running) -> None:
    """With most rows deleted, compaction makes the directory smaller; the rest is as before."""
    random = Random(4)
    node.ask("/collections/create", collectionName="big", dimension=128, metricType="L2")
    for first in range(0, 4_000, 1_000):
        data = [{"id": key, "vector": [random.random() for _ in range(128)]} for key in range(first, first + 1_000)]
        node.ask("/entities/insert", collectionName="big", data=data)
    node.ask("/collections/flush", collectionName="big")
    until(lambda: node.index_finished("big"), what="index")
    compact(node, "big")

    def stored_bytes() -> int:
        return sum(path.stat().st_size for path in (node.data / "chunks").glob("*.ldb"))

    until(lambda: stored_bytes() > 2 << 20, what="rows on the disk")
    before_bytes = stored_bytes()
    node.ask("/entities/delete", collectionName="big", filter="id >= 200")
    compact(node, "big")
    until(lambda: stored_bytes() < before_bytes * 0.5, what=f"smaller than {before_bytes}")
    assert node.count("big") == 200
    assert len(nearest(node, "big", [0.5] * 128, limit=300)) == 200
