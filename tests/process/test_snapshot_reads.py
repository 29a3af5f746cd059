"""Reads under a snapshot token, over REST: hybrid searches, groups, orders, aggregates see what the first read saw."""

from __future__ import annotations

import contextlib
import http.client
import json
from pathlib import Path
from typing import Any

from tests.process.running import BASE_PATH, Running


def read(node: Running, path: str, token: str = "", **body: Any) -> tuple[Any, str]:
    """Return the reply's data and its snapshot token."""
    headers = {"Content-Type": "application/json", **({"Annulus-Snapshot": token} if token else {})}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", node.port, timeout=30)) as connection:
        connection.request("POST", BASE_PATH + path, json.dumps({"collectionName": "c", **body}).encode(), headers)
        answer = connection.getresponse()
        reply = json.loads(answer.read())
        assert reply["code"] == 0, reply
        return reply["data"], str(answer.headers["Annulus-Snapshot"])


def test_every_kind_of_read_stays_on_its_snapshot(tmp_path: Path) -> None:
    """Whatever is inserted, deleted and flushed after the first one, in any shard."""
    with Running(tmp_path / "data", settings={"shards": "2", "index.rows_min": "1"}) as node:
        node.ask(
            "/collections/create",
            collectionName="c",
            consistencyLevel="Strong",
            params={"shardsNum": 2},
            schema={
                "fields": [
                    {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                    {"fieldName": "kind", "dataType": "Int8"},
                    {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
                    {"fieldName": "s", "dataType": "SparseFloatVector"},
                ]
            },
            indexParams=[{"fieldName": "v", "metricType": "L2"}, {"fieldName": "s", "metricType": "IP"}],
        )

        def insert(ids: range) -> None:
            data = [{"id": i, "kind": i % 3, "v": [i, 0], "s": {str(i % 4): 1 + i}} for i in ids]
            node.ask("/entities/insert", collectionName="c", data=data)

        near_v = {"data": [[5.2, 0]], "annsField": "v", "limit": 6}
        near_s = {"data": [{"1": 1}], "annsField": "s", "limit": 6}
        reads: list[tuple[str, dict[str, Any]]] = [
            ("/entities/search", near_v),
            ("/entities/search", {**near_s, "orderByFields": ["kind:desc"]}),
            ("/entities/search", {**near_v, "groupingField": "kind", "groupSize": 2, "limit": 2}),
            ("/entities/hybrid_search", {"search": [near_v, near_s], "rerank": {"strategy": "rrf"}, "limit": 5}),
            ("/entities/query", {"orderByFields": ["kind", "id:desc"], "outputFields": ["kind", "s"], "limit": 7}),
            ("/entities/query", {"groupByFields": ["kind"], "outputFields": ["kind", "count(*)", "max(id)"]}),
        ]
        insert(range(40))
        _, token = read(node, "/entities/query", filter="id >= 0", limit=1)
        before = [read(node, path, token, **body)[0] for path, body in reads]
        assert before == [read(node, path, **body)[0] for path, body in reads]
        insert(range(40, 60))
        node.ask("/entities/delete", collectionName="c", filter="id in [4, 5, 6, 37]")
        assert [read(node, path, token, **body)[0] for path, body in reads] == before
        node.ask("/collections/flush", collectionName="c")
        assert [read(node, path, token, **body)[0] for path, body in reads] == before
        now = [read(node, path, **body)[0] for path, body in reads]
        assert all(a != b for a, b in zip(now, before, strict=True))
