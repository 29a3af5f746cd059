"""Consistency over HTTP on three processes: tokens, pages, and what is said when a majority is gone."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.process.clusters import Trio, keys_of, put, row
from tests.process.running import BASE_PATH, Running, until


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with Trio(tmp_path_factory.mktemp("reads")) as cluster:
        cluster["n1"].ask("/collections/create", collectionName="c", dimension=2, params={"shardsNum": 2})
        yield cluster


def post(node: Running, path: str, headers: Mapping[str, str], **body: Any) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return the reply and its headers."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)) as connection:
        connection.request("POST", BASE_PATH + path, json.dumps(body), dict(headers))
        answer = connection.getresponse()
        return json.loads(answer.read()), dict(answer.getheaders())


def test_a_session_token_shows_a_client_its_own_writes_on_every_node(trio: Trio) -> None:
    """Write on one node, read with its token on the next, again and again, never behind."""
    names = list(trio.nodes)
    token = ""
    for i in range(30):
        writer, reader = trio[names[i % 3]], trio[names[(i + 1) % 3]]
        reply, headers = post(writer, "/entities/insert", {"Annulus-Session": token}, collectionName="c", data=[row(i)])
        assert reply["code"] == 0
        token = headers["Annulus-Session"]
        asked = {"collectionName": "c", "filter": "", "limit": 100, "outputFields": ["id"]}
        reply, headers = post(
            reader, "/entities/query", {"Annulus-Session": token}, **asked, consistencyLevel="Session"
        )
        assert [one["id"] for one in reply["data"]] == list(range(i + 1))
        token = headers["Annulus-Session"]


def test_pages_of_a_snapshot_fit_together_across_nodes(trio: Trio) -> None:
    """Rows that come and go between the pages change nothing."""
    put(trio["n1"], "c", range(100, 200))
    found: list[int] = []
    headers: Mapping[str, str] = {}
    for page, name in enumerate(["n1", "n2", "n3", "n1"]):
        reply, answered = post(
            trio[name],
            "/entities/query",
            {"Annulus-Snapshot": headers["Annulus-Snapshot"]} if headers else {},
            collectionName="c", filter="id >= 100", limit=25, offset=25 * page, outputFields=["id"],
            consistencyLevel="Strong",
        )  # fmt: skip
        assert reply["code"] == 0, reply
        headers = answered
        found += [one["id"] for one in reply["data"]]
        trio["n2"].ask("/entities/delete", collectionName="c", filter=f"id == {100 + 26 * page + 24}")
        put(trio["n3"], "c", [1_000 + page])
    assert found == list(range(100, 200))
    assert keys_of(trio["n1"], "c") >= {1_000, 1_001, 1_002, 1_003}


def test_what_a_lone_survivor_says(trio: Trio) -> None:
    """It reads what it may and names the shard for what it may not; a repeat of what was not done is invited."""
    put(trio["n1"], "c", [5_000])
    until(lambda: 5_000 in keys_of(trio["n3"], "c", "Eventually"), what="its own copy")
    for name in ("n1", "n2"):
        trio[name].process.kill()
    lone = trio["n3"]
    assert 5_000 in keys_of(lone, "c", "Eventually")
    asked = {"collectionName": "c", "filter": "", "limit": 5, "outputFields": ["id"]}
    limit = {"Request-Timeout": "3"}
    # A leader may go on until its lease is over: nobody else can have been elected before.
    strong = {**asked, "consistencyLevel": "Strong"}
    until(lambda: post(lone, "/entities/query", limit, **strong)[0]["code"] != 0, what="its leases to end")
    reply, headers = post(lone, "/entities/query", limit, **strong)
    assert reply["code"] == 1 and "has no leader that can be reached, which a Strong read needs" in reply["message"]
    assert "shard " in reply["message"] and headers["Retry-After"] == "1"
    until(
        lambda: "shard " in post(lone, "/entities/query", limit, **asked)[0].get("message", ""),
        what="a Bounded read to fail",
    )
    reply, headers = post(lone, "/entities/query", limit, **asked)
    assert reply["code"] == 2 and "answers that is as fresh as asked for" in reply["message"]
    assert headers["Retry-After"] == "1"
    reply, headers = post(lone, "/entities/insert", limit, collectionName="c", data=[row(6_000), row(6_001)])
    assert reply["code"] in (1, 2) and "shard " in reply["message"]
    assert ("Retry-After" in headers) == (reply["code"] == 1)
    assert lone.is_alive()
