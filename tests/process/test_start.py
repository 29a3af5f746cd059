"""What a start does not do: import what a node without gRPC clients, files and terminals has no use for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LATER = {"grpc", "google.protobuf", "node.grpc.server", "pandas", "pyarrow.parquet", "rich", "node.bulk.commands"}
SERVING = """
import os, signal, socket, sys, threading, time, urllib.request
from node.__main__ import main

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"

def look():
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/readyz").close()
            break
        except OSError:
            time.sleep(0.05)
    body = b'{"collectionName": "few", "dimension": 2, "data": [{"id": 1, "vector": [1, 0], "word": "a"}]}'
    for route in ("collections/create", "entities/insert"):
        urllib.request.urlopen(f"http://{address}/v2/vectordb/{route}", body).close()
    print(*sys.modules, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=look, daemon=True).start()
main(["serve", "--data", sys.argv[1], "--listen", address])
"""


def modules(*command: str) -> set[str]:
    run = subprocess.run([sys.executable, "-c", *command], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_a_node_at_work_has_not_imported_what_it_may_never_need(tmp_path: Path) -> None:
    """gRPC comes with its first client, Parquet with its first file, tables with a terminal, and pandas never."""
    loaded = modules(SERVING, str(tmp_path / "data"))
    assert "node.front" in loaded
    assert sorted(LATER & loaded) == []


def test_what_clients_need_is_imported_beside_the_data() -> None:
    """The HTTP server is no part of what is imported before the data is read."""
    loaded = modules("import sys, node.app; print(*sys.modules)")
    assert sorted({"aiohttp", "node.front", "node.database"} & loaded) == []
