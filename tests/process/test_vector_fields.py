"""Collections with several vector fields, over REST: each is indexed and searched by itself, or all at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.process.running import Running

ROWS = 40
RNG = np.random.default_rng(5)
A, B = RNG.normal(size=(ROWS, 4)).astype(np.float32), RNG.normal(size=(ROWS, 8)).astype(np.float32)
GROUPS = [number % 3 for number in range(ROWS)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("vector_fields")
    with Running(folder / "data", settings={"shards": "2", "index.rows_min": "1"}) as running:
        created = running.call(
            "/collections/create",
            collectionName="c",
            consistencyLevel="Strong",
            params={"shardsNum": 2},
            schema={
                "fields": [
                    {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                    {"fieldName": "group", "dataType": "Int32"},
                    {"fieldName": "a", "dataType": "FloatVector", "elementTypeParams": {"dim": 4}},
                    {"fieldName": "b", "dataType": "FloatVector", "elementTypeParams": {"dim": 8}},
                ]
            },
            indexParams=[
                {"fieldName": "a", "indexType": "HNSW", "metricType": "L2"},
                {"fieldName": "b", "indexType": "AUTOINDEX", "metricType": "COSINE"},
            ],
        )
        assert created == {"code": 0, "data": {}}
        for some in (range(ROWS // 2), range(ROWS // 2, ROWS)):
            rows = [{"id": i, "group": GROUPS[i], "a": A[i].tolist(), "b": B[i].tolist()} for i in some]
            assert running.call("/entities/insert", collectionName="c", data=rows)["code"] == 0
            if some.start == 0:
                assert running.call("/collections/flush", collectionName="c")["code"] == 0
        yield running


def a_search(i: int, **more: Any) -> dict[str, Any]:
    return {"data": [A[i].tolist()], "annsField": "a", "limit": 10, **more}


def b_search(i: int, **more: Any) -> dict[str, Any]:
    return {"data": [B[i].tolist()], "annsField": "b", "limit": 10, **more}


def near(field: str, i: int, passing: range | list[int] = range(ROWS)) -> list[int]:
    """Return all ids, nearest first."""
    if field == "a":
        distances = ((A.astype(np.float64) - A[i]) ** 2).sum(axis=1)
    else:
        unit = B / np.linalg.norm(B.astype(np.float64), axis=1, keepdims=True)
        distances = -(unit @ unit[i])
    return sorted(passing, key=lambda one: distances[one])


@pytest.mark.parametrize("field", ["a", "b"])
def test_each_field_is_searched_by_its_own_index(node: Running, field: str) -> None:
    """By its metric, and the vectors of both are returned."""
    data = A if field == "a" else B
    reply = node.call(
        "/entities/search",
        collectionName="c",
        data=[data[7].tolist()],
        annsField=field,
        limit=10,
        outputFields=["a", "b"],
    )
    assert [row["id"] for row in reply["data"]] == near(field, 7)[:10]
    assert reply["data"][0]["a"] == pytest.approx(A[7].tolist()) and reply["data"][0]["b"] == pytest.approx(
        B[7].tolist()
    )
    described = node.call("/collections/describe", collectionName="c")["data"]
    assert {(one["fieldName"], one["metricType"]) for one in described["indexes"]} == {("a", "L2"), ("b", "COSINE")}


def test_a_search_names_its_field(node: Running) -> None:
    """Where there are several, a search without annsField is refused with 1801."""
    reply = node.call("/entities/search", collectionName="c", data=[[0, 0, 0, 0]], limit=1)
    assert reply["code"] == 1801 and "a, b" in reply["message"]


@pytest.mark.parametrize("route", ["hybrid_search", "advanced_search"])
def test_reciprocal_rank(node: Running, route: str) -> None:
    """Sum of 1 / (60 + rank) over both searches, of which one has a filter; limit and offset come after."""
    passing = [i for i in range(ROWS) if GROUPS[i] == 1]
    wanted: dict[int, float] = {}
    for ids in (near("a", 3)[:10], near("b", 9, passing)[:10]):
        for rank, i in enumerate(ids, start=1):
            wanted[i] = wanted.get(i, 0.0) + 1 / (60 + rank)
    order = sorted(wanted, key=lambda i: (-np.float32(wanted[i]), i))
    body = {
        "collectionName": "c",
        "search": [a_search(3), b_search(9, filter="group == {g}", exprParams={"g": 1})],
        "rerank": {"strategy": "rrf", "params": {"k": 60}},
        "outputFields": ["group"],
    }
    reply = node.call(f"/entities/{route}", **body, limit=5, offset=2)
    assert [row["id"] for row in reply["data"]] == order[2:7]
    assert [row["distance"] for row in reply["data"]] == pytest.approx([wanted[i] for i in order[2:7]])
    assert [row["group"] for row in reply["data"]] == [GROUPS[i] for i in order[2:7]]
    assert reply["topks"] == [5]
    assert node.call(f"/entities/{route}", **body, limit=5, offset=100)["data"] == []


def test_weighted(node: Running) -> None:
    """Distances are put between 0 and 1 as one metric is a similarity; the functionScore form says the same."""
    body = {"collectionName": "c", "search": [a_search(3), b_search(3)], "limit": 4}
    params = {"weights": [0.7, 0.3], "norm_score": True}
    one = node.call("/entities/hybrid_search", **body, rerank={"strategy": "weighted", "params": params})
    assert one["data"][0] == {"id": 3, "distance": pytest.approx(1.0)}
    functions = [{"name": "r", "type": "Rerank", "inputFieldNames": [], "params": {"reranker": "weighted", **params}}]
    other = node.call("/entities/hybrid_search", **body, functionScore={"functions": functions})
    assert other == one


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"search": []}, 1802, "search"),
    ({"search": None}, 1802, "required"),
    ({"rerank": {"strategy": "", "params": {}}}, 1100, "unsupported rank type"),
    ({"rerank": {"strategy": "best", "params": {}}}, 1100, "unsupported rank type best"),
    ({"rerank": {"strategy": "rrf", "params": {"k": 0}}}, 1100, "should be in range (0, 16384)"),
    ({"rerank": {"strategy": "rrf", "params": {"k": "60"}}}, 1100, "k should be float"),
    ({"rerank": {"strategy": "weighted", "params": {}}}, 1100, "weights not found"),
    ({"rerank": {"strategy": "weighted", "params": {"weights": [0.5]}}}, 1100, "expected=2"),
    ({"rerank": {"strategy": "weighted", "params": {"weights": [0.5, 1.5]}}}, 1100, "in range [0, 1]"),
    ({"limit": 0}, 1100, "invalid max query result window"),
    ({"offset": -1}, 1100, "invalid max query result window"),
    ({"limit": 16384, "offset": 1}, 1100, "16385"),
    ({"offset": "abc"}, 1801, "offset"),
    ({"search": [{"data": [A[0].tolist()], "annsField": "a"}, b_search(0)]}, 1100, "topk [0] is invalid"),
    ({"search": [a_search(0), b_search(0, data=[[1.0]])]}, 1801, "dimension: 8"),
    ({"search": [a_search(0), b_search(0, data=[B[0].tolist()] * 2)]}, 1100, "nq of all searches"),
    ({"search": [a_search(0), {**b_search(0), "annsField": "nope"}]}, 1801, "nope"),
    ({"search": [a_search(0, metricType="IP"), b_search(0)]}, 1100, "metric type not match"),
    ({"search": [a_search(0, filter="nope == 1"), b_search(0)]}, 1100, "field nope not exist"),
]


@pytest.mark.parametrize(("change", "code", "words"), REFUSED)
def test_what_hybrid_search_refuses(node: Running, change: dict[str, Any], code: int, words: str) -> None:
    """Codes and texts are Milvus's where its clients compare them, and name the part that is wrong."""
    body = {"collectionName": "c", "search": [a_search(0), b_search(0)], "rerank": {"strategy": "rrf", "params": {}}}
    reply = node.call("/entities/hybrid_search", **(body | change))
    assert reply["code"] == code and words in reply["message"], reply
