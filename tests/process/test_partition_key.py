"""Partition keys over REST: the rows of one value are found where they are, and nothing else is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.process.running import Running

ROWS = 120
V = np.random.default_rng(4).normal(size=(ROWS, 4)).astype(np.float32)
TENANT = [f"t{i % 9}" for i in range(ROWS)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("partition_key")
    with Running(folder / "data", settings={"index.rows_min": "1"}) as running:
        for name, isolated in (("open", False), ("isolated", True)):
            running.ask(
                "/collections/create",
                collectionName=name,
                consistencyLevel="Strong",
                params={"partitionsNum": 8, "partitionKeyIsolation": isolated},
                schema={
                    "fields": [
                        {"fieldName": "id", "dataType": "Int64", "isPrimary": True, "isClusteringKey": False},
                        {
                            "fieldName": "tenant",
                            "dataType": "VarChar",
                            "isPartitionKey": True,
                            "isClusteringKey": True,
                            "elementTypeParams": {"max_length": 8},
                        },
                        {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 4}},
                    ]
                },
                indexParams=[{"fieldName": "v", "indexType": "HNSW", "metricType": "L2"}],
            )
            data = [{"id": i, "tenant": TENANT[i], "v": V[i].tolist()} for i in range(ROWS)]
            running.ask("/entities/insert", collectionName=name, data=data[:80])
            running.ask("/collections/flush", collectionName=name)
            running.ask("/entities/insert", collectionName=name, data=data[80:])
        yield running


def nearest(i: int, passing: list[int]) -> list[int]:
    return sorted(passing, key=lambda one: float(((V[one].astype(float) - V[i]) ** 2).sum()))


@pytest.mark.parametrize(
    ("text", "tenants"),
    [
        ("tenant == 't3'", {"t3"}),
        ("tenant in ['t1', 't8'] and id > 20", {"t1", "t8"}),
        ("tenant == 't2' or tenant == 't5'", {"t2", "t5"}),
        ("tenant == 'nobody'", set()),
        ("tenant != 't3'", set(TENANT) - {"t3"}),
        ("", set(TENANT)),
    ],
)
def test_a_filter_on_the_key_finds_what_a_scan_finds(node: Running, text: str, tenants: set[str]) -> None:
    """Searches, queries and counts; segments of partitions that cannot match are not looked at."""
    passing = [i for i in range(ROWS) if TENANT[i] in tenants and ("id > 20" not in text or i > 20)]
    reply = node.call(
        "/entities/search", collectionName="open", data=[V[7].tolist()], filter=text, limit=10, explain=True
    )
    assert [row["id"] for row in reply["data"]] == nearest(7, passing)[:10]
    if 0 < len(tenants) < 3:
        assert len(reply["explain"]) <= 2 * len(tenants)  # a sealed and a growing one each
    found = node.ask("/entities/query", collectionName="open", filter=text, limit=1000, outputFields=["id"])
    assert [row["id"] for row in found] == passing
    assert node.count("open", text) == len(passing)


def test_isolation(node: Running) -> None:
    """A search of an isolated collection names one value of the key, or is refused; queries may be of all."""
    body: dict[str, Any] = {"collectionName": "isolated", "data": [V[7].tolist()], "limit": 5}
    found = node.ask("/entities/search", **body, filter="tenant == 't7' and id < 90")
    assert [row["id"] for row in found] == nearest(7, [i for i in range(90) if TENANT[i] == "t7"])[:5]
    for text in ("", "id < 90", "tenant in ['t1', 't2']", "tenant == 't1' or tenant == 't2'", "tenant != 't1'"):
        reply = node.call("/entities/search", **body, filter=text)
        assert reply["code"] == 1100 and "partition key isolation" in reply["message"], reply
    assert node.count("isolated") == ROWS
