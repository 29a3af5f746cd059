"""Inserts under a key are made once, however often they come and whatever dies in between."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.process.running import BASE_PATH, Running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("keyed") / "n1") as running:
        yield running


def insert(node: Running, key: str, rows: list[dict[str, Any]], collection: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=30)
    body = json.dumps({"collectionName": collection, "data": rows})
    headers = {"Content-Type": "application/json", "Annulus-Idempotency-Key": key}
    connection.request("POST", f"{BASE_PATH}/entities/insert", body, headers)
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_a_named_insert_is_made_once(node: Running) -> None:
    """Also when its keys are given by the database, its rows go to several channels, and the node was killed."""
    fields = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
    ]
    schema = {"autoID": True, "fields": fields}
    node.ask("/collections/create", collectionName="c", schema=schema, params={"shardsNum": 4},
             indexParams=[{"fieldName": "vector", "metricType": "L2"}])  # fmt: skip
    rows = [{"vector": [i, 1]} for i in range(50)]
    first = insert(node, "job/1", rows, "c")
    assert first["code"] == 0 and first["data"]["insertCount"] == 50
    assert insert(node, "job/1", rows, "c") == first
    assert insert(node, "job/0", rows[:7], "c")["data"]["insertCount"] == 7
    node.restart(kill=True)
    assert insert(node, "job/1", rows, "c") == first
    assert insert(node, "other/1", rows, "c")["data"]["insertIds"] != first["data"]["insertIds"]
    assert node.count("c") == 107


def test_what_was_refused_can_be_asked_for_again(node: Running) -> None:
    """A bad row uses up no key: nothing was written under it."""
    node.ask("/collections/create", collectionName="d", dimension=2)
    assert insert(node, "k/5", [{"id": 1, "vector": [1, 2, 3]}], "d")["code"] == 1804
    assert insert(node, "k/5", [{"id": 1, "vector": [1, 2]}], "d")["code"] == 0
    assert insert(node, "k/1234567890123456789", [{"id": 2, "vector": [1, 2]}], "d")["code"] == 1100
    assert node.count("d") == 1
