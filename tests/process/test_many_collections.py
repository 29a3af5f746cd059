"""Thousands of collections on one node: made, described, searched, restarted; how fast and how large is printed."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.process.running import BASE_PATH, Running

KIB = 1 << 10


class Client:
    """One connection for all requests."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", BASE_PATH + path, json.dumps(body).encode(), headers)
        reply = json.loads(self._connection.getresponse().read())
        assert reply["code"] == 0, (path, reply)
        return reply["data"]


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_collections(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each costs little memory; all are there after a restart and after a kill, and one is as quick as if alone."""
    names = [f"c{number}" for number in range(count)]
    node = Running(tmp_path / "n1")
    with node:
        with Client(node.port) as client:
            client.ask("/collections/create", collectionName="first", dimension=4)  # what the first costs comes once
            client.ask("/entities/insert", collectionName="first", data=[{"id": 0, "vector": [1, 2, 3, 4]}])
            client.ask("/collections/drop", collectionName="first")
            empty_bytes = node.rss_bytes()
            began_s = time.monotonic()
            for name in names:
                client.ask("/collections/create", collectionName=name, dimension=4)
            create_s = time.monotonic() - began_s
            for number in range(0, count, 10):
                client.ask(
                    "/entities/insert", collectionName=names[number], data=[{"id": number, "vector": [1, 2, 3, 4]}]
                )
            full_bytes = node.rss_bytes()
            assert (full_bytes - empty_bytes) / count < 100 * KIB
            _look(client, names)
        stopped_s = node.restart()
        with Client(node.port) as client:
            _look(client, names)
            client.ask("/collections/drop", collectionName=names.pop())
        killed_s = node.restart(kill=True)
        with Client(node.port) as client:
            _look(client, names)
    each_kib = (full_bytes - empty_bytes) / count / KIB
    with capsys.disabled():
        print(
            f"\n{count} collections: {count / create_s:.0f} made per second, {each_kib:.0f} KiB each, "
            f"ready {stopped_s:.1f} s after a stop and {killed_s:.1f} s after a kill"
        )


def _look(client: Client, names: list[str]) -> None:
    assert client.ask("/collections/list") == names
    for number in (0, len(names) // 20 * 10):
        name = names[number]
        began_s = time.monotonic()
        assert client.ask("/collections/describe", collectionName=name)["collectionName"] == name
        found = client.ask("/entities/search", collectionName=name, data=[[1, 2, 3, 4]], limit=3)
        assert [hit["id"] for hit in found] == [number]
        assert time.monotonic() - began_s < 2
