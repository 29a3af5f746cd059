"""Clients that hold connections and say nothing take neither files nor service from a node."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from tests.process.running import Running, until

DIM = 64


def test_idle_connections_do_not_stop_writes(tmp_path: Path) -> None:
    """With 256 descriptors and 400 connections that each send half a header, inserts go on over new journal files,
    other clients are answered, and the log does not repeat itself."""
    settings = {"storage.journal_file_bytes_max": "64KiB", "storage.segment_bytes_max": "256KiB"}
    node = Running(tmp_path / "n1", settings=settings, prefix=["prlimit", "--nofile=256:256"])
    with node, contextlib.ExitStack() as idle:
        node.ask("/collections/create", collectionName="c", dimension=DIM)
        for _ in range(400):
            one = idle.enter_context(socket.create_connection(("127.0.0.1", node.port), timeout=30))
            with contextlib.suppress(OSError):  # already closed
                one.sendall(b"POST /v2/vectordb/entities/insert HTTP/1.1\r\nHost: a\r\n")
        until(node.is_ready, seconds=10, what="room is made")
        for number in range(20):
            rows = [{"id": 100 * number + i, "vector": [random.random() for _ in range(DIM)]} for i in range(100)]
            node.ask("/entities/insert", collectionName="c", data=rows)
        node.ask("/collections/flush", collectionName="c")
        assert node.count("c") == 2000
        assert node.is_alive()
        told = [one for one in node.events() if one["logger"] == "node.connections"]
        assert 1 <= len(told) <= 2, node.said()
        assert node.stop() == 0
