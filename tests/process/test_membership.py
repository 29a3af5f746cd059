"""Nodes come, go, are killed and replaced in real processes while rows are written: no row is lost, none is double."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.process.clusters import QUICK, Trio, keys_of, row
from tests.process.running import Running, free_port, until

NAME = "moved"
WRITERS = 3
BATCH = 5
WRITE_S_MAX = 30.0


class Cluster:
    """The nodes there are, and writers that go to any of them until an acknowledgement comes."""

    def __init__(self, trio: Trio, directory: Path) -> None:
        self.trio = trio
        self.directory = directory
        self.nodes: dict[str, Running] = dict(trio.nodes)
        self.acknowledged: set[int] = set()
        self.failed: list[str] = []
        self._ending = threading.Event()

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Write until the block is left; every write must be acknowledged in the end."""
        threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join()

    def _write(self, number: int) -> None:
        key, turn = number * 1_000_000, number
        while not self._ending.wait(0.05):
            keys = range(key, key + BATCH)
            until_s, last = time.monotonic() + WRITE_S_MAX, ""
            while time.monotonic() < until_s:
                turn += 1
                nodes = list(self.nodes.values())
                try:
                    reply = nodes[turn % len(nodes)].call(
                        "/entities/upsert", collectionName=NAME, data=[row(one) for one in keys]
                    )
                except (OSError, HTTPException, ValueError) as error:
                    last = repr(error)
                else:
                    if reply["code"] == 0:
                        self.acknowledged.update(keys)
                        break
                    last = str(reply)
                time.sleep(0.1)
            else:
                self.failed.append(last)
            key += BATCH

    def add(self, name: str) -> Running:
        """Start a blank node that joins by n3."""
        settings = {
            "name": name,
            "peer_listen": f"127.0.0.1:{free_port()}",
            "join": f"127.0.0.1:{self.trio['n3'].port}",
            "cluster_secret_file": str(self.trio.secret),
        }
        self.nodes[name] = node = Running(self.directory / name, settings={**QUICK, **settings})
        node.start()
        return node

    def operate(self, what: str, **body: Any) -> Mapping[str, Any]:
        """Return the answer of n3, whatever it is."""
        path = f"/v2/annulus/nodes/{what}"
        reply: dict[str, Any] = json.loads(_posted(self.trio["n3"], path, body))
        return reply

    def shards(self) -> dict[str, int]:
        """Return how many shards each node holds; nothing while anything moves, or n3 does not know."""
        reply = self.operate("list")
        found = reply.get("data") or {"nodes": [], "moves": [1]}
        return {} if found["moves"] else {one["name"]: one["shards"] for one in found["nodes"]}


def _posted(node: Running, path: str, body: Mapping[str, Any]) -> bytes:
    with contextlib.closing(node.socket()) as line:
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        line.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        answer = b""
        while piece := line.recv(65_536):
            answer += piece
    return answer.partition(b"\r\n\r\n")[2]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Trio(tmp_path / "trio") as trio:
        one = Cluster(trio, tmp_path)
        try:
            yield one
        finally:
            for node in one.nodes.values():
                node.kill()


def test_rows_survive_what_nodes_do(cluster: Cluster) -> None:
    """A node joins and the coordinator dies amid its moves; a founder is drained and removed, another dies for good and
    is replaced by a blank node by one command. All that was acknowledged is there, once, on every node that is left."""
    first = cluster.nodes["n3"]
    first.ask("/collections/create", collectionName=NAME, dimension=2, params={"shardsNum": 4})
    with cluster.written():
        # One more, and the coordinator is killed as soon as shards move, if that is not the node that is asked.
        cluster.add("n4")
        until(lambda: bool((cluster.operate("list").get("data") or {"moves": []})["moves"]), what="moves")
        leader = cluster.trio.wait_leader("control", ask="n3")
        victim = cluster.nodes[leader if leader != "n3" else "n2"]
        victim.kill()
        victim.launch()
        until(lambda: cluster.shards() == dict.fromkeys(("n1", "n2", "n3", "n4"), 3), seconds=60, what="even shares")
        cluster.trio.wait_ready(victim)

        refused = cluster.operate("remove", nodeName="n1")
        assert refused["code"] != 0 and "drain it first" in refused["message"]
        assert cluster.operate("drain", nodeName="n1")["code"] == 0
        until(lambda: cluster.shards().get("n1") == 0, seconds=60, what="n1 drained")
        gone = cluster.nodes.pop("n1")
        until(lambda: cluster.operate("remove", nodeName="n1")["code"] == 0, what="n1 removed")
        until(lambda: gone.get("/readyz")[0] == 503, what="it knows that it was removed")
        gone.kill()

        cluster.nodes.pop("n2").kill()
        cluster.add("n5")
        assert cluster.operate("replace", nodeName="n2", newNodeName="n5")["code"] == 0
        until(lambda: cluster.shards() == dict.fromkeys(("n3", "n4", "n5"), 4), seconds=60, what="n2 replaced")
    assert not cluster.failed
    for name, node in cluster.nodes.items():
        found = keys_of(node, NAME)
        assert found == cluster.acknowledged, name
        assert node.count(NAME) == len(found), name
