"""Clusters of node processes on this machine, and what is asked of them together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.process.running import START_S_MAX, Running, until
from tools.nodes import free_ports

SECRET = "a secret of sixteen or more"
QUICK = {"shards": "4", "api.drain_s_max": "2"}


class Trio:
    """Nodes n1, n2, n3 (or more) of one cluster; each is a `Running` with the cluster's settings."""

    def __init__(
        self,
        directory: Path,
        *,
        count: int = 3,
        names: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`names` are those that `with` starts; all unless given."""
        directory.mkdir(parents=True, exist_ok=True)
        ports = free_ports(2 * count)
        self.secret = directory / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        self.peer_ports = {f"n{number + 1}": ports[2 * number] for number in range(count)}
        self.peers = ",".join(f"{name}=127.0.0.1:{port}" for name, port in self.peer_ports.items())
        self.nodes: dict[str, Running] = {}
        self.names = names or tuple(self.peer_ports)
        for number, name in enumerate(self.peer_ports):
            node = Running(directory / name, settings={**QUICK, **(settings or {}), **self.settings(name)})
            node.port = ports[2 * number + 1]
            self.nodes[name] = node

    def settings(self, name: str) -> dict[str, str]:
        return {"name": name, "peers": self.peers, "cluster_secret_file": str(self.secret)}

    def __enter__(self) -> Trio:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            if hasattr(node, "process"):
                node.kill()

    def __getitem__(self, name: str) -> Running:
        return self.nodes[name]

    def __iter__(self) -> Iterator[Running]:
        return iter(self.nodes.values())

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start nodes side by side; return when all of them are ready."""
        started = [self.nodes[name] for name in names or self.names]
        for node in started:
            node.launch()
        for node in started:
            self.wait_ready(node)

    def wait_ready(self, node: Running) -> None:
        until_s = time.monotonic() + START_S_MAX
        while not node.is_ready():
            assert node.is_alive(), f"exit {node.process.returncode}\n{node.said()}"
            assert time.monotonic() < until_s, f"not ready: {node.get('/readyz')}\n{node.said()}"
            time.sleep(0.02)

    def kill(self) -> None:
        for node in self:
            node.process.kill()
        for node in self:
            node.kill()

    def leader(self, group: str, ask: str = "n1") -> str:
        """Return the name of the node that leads a group ("s0", "control"), as one node sees it; "" if none."""
        groups = self.nodes[ask].status()["cluster"]["groups"]
        return str(next(one["leader"] for one in groups if one["group"] == group))

    def wait_leader(self, group: str, ask: str = "n1", other_than: str = "") -> str:
        until(lambda: self.leader(group, ask) not in ("", other_than), what=f"a leader of {group}")
        return self.leader(group, ask)


def keys_of(node: Running, collection: str, level: str = "Strong") -> set[int]:
    """Return all keys that a node answers with."""
    found = node.ask(
        "/entities/query",
        collectionName=collection,
        filter="",
        limit=16_384,
        outputFields=["id"],
        consistencyLevel=level,
    )
    return {row["id"] for row in found}


def put(node: Running, collection: str, keys: Iterable[int]) -> None:
    node.ask("/entities/insert", collectionName=collection, data=[row(key) for key in keys])


def row(key: int) -> dict[str, Any]:
    return {"id": key, "vector": [float(key % 7), float(key % 11)], "word": f"w{key}"}
