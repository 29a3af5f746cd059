"""Other databases' servers, given the same rows and queries in the same run, by the same client as far as they allow.

Chroma speaks HTTP, so the load generator drives it with ready-made requests. Milvus Lite speaks gRPC, so a script with
its own client library does, in the peer's environment (`peer_milvus_lite`); that costs it client time, which is its lot
with every user. Neither is part of our environment: `--peer-python` names the interpreter of one that has them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson

from tools.bench import goals
from tools.bench.client import Client, wait_until
from tools.bench.loading import REPOSITORY, Replies, run_load
from tools.bench.node import disk_bytes, free_address
from tools.bench.reads import recall_of
from tools.bench.run import Bench, K
from tools.bench.wire import BATCH_ROWS, Address, http_request, row_objects

START_S_MAX = 60
CHROMA_PATH = "/api/v2/tenants/default_tenant/databases/default_database/collections"
CHROMA_SPACE = {"COSINE": "cosine", "L2": "l2", "IP": "ip"}
GRAPH_M, GRAPH_EF_CONSTRUCTION, GRAPH_EF = 16, 200, 64


class PeerMissing(Exception):
    """The peer is not installed where we were told to look."""


def chroma(bench: Bench, python: str) -> None:
    """Measure Chroma's server: insert and search, as the node was."""
    program = os.path.join(os.path.dirname(python), "chroma")
    if not os.path.exists(program):
        raise PeerMissing(f"no {program}; install chromadb in an environment of its own and name it by --peer-python")
    data, address = bench.data, free_address()
    with tempfile.TemporaryDirectory(prefix="annulus-chroma-") as folder:
        command = [program, "run", "--path", folder, "--host", address.host, "--port", str(address.port)]
        with _server(command, lambda: _answers(address, "/api/v2/heartbeat")):
            path = f"{CHROMA_PATH}/{_create_in_chroma(address, data.metric)}"
            inserts = run_load(
                address, _chroma_inserts(bench, address, path), connections=bench.plan.insert_connections
            )
            _all_well(inserts, "chroma: insert")
            _add_insert(bench, "chroma", inserts.wall_s, disk_of_raw=disk_bytes(folder) / data.raw_bytes)
            bodies = [{"query_embeddings": [query], "n_results": K, "include": ["distances"]} for query in data.queries]
            asked = [http_request(address, f"{path}/query", _json(body)) for body in bodies]
            for connections in (1, 8):
                run_load(address, asked[:100], connections=connections)
                replies = run_load(address, asked, connections=connections, seconds=bench.plan.seconds, cycle=True)
                _all_well(replies, "chroma: search")
                found = {i: [int(key) for key in orjson.loads(body)["ids"][0]] for i, body in
                         replies.first_bodies().items()}  # fmt: skip
                _add_search(bench, "chroma", connections, found, replies.per_s,
                            p50_ms=replies.latency_ms(50), p99_ms=replies.latency_ms(99))  # fmt: skip


def milvus_lite(bench: Bench, python: str) -> None:
    """Measure Milvus Lite's server through pymilvus."""
    program = os.path.join(os.path.dirname(python), "milvus-lite")
    if not os.path.exists(program):
        raise PeerMissing(f"no {program}; install milvus-lite and pymilvus in an environment of their own")
    data, address = bench.data, free_address()
    with tempfile.TemporaryDirectory(prefix="annulus-milvus-lite-") as folder:
        np.save(os.path.join(folder, "vectors.npy"), data.vectors)
        np.save(os.path.join(folder, "queries.npy"), data.queries)
        task = {"uri": f"http://{address}", "metric": data.metric, "k": K, "seconds": bench.plan.seconds}
        task |= {"m": GRAPH_M, "ef_construction": GRAPH_EF_CONSTRUCTION, "ef": GRAPH_EF, "batch_rows": BATCH_ROWS}
        store = os.path.join(folder, "store")
        command = [program, "server", "--data-dir", store, "--host", address.host, "--port", str(address.port)]
        with _server(command, lambda: _listens(address)):
            script = os.path.join(REPOSITORY, "tools", "bench", "peer_milvus_lite.py")
            done = subprocess.run(
                [python, script, folder, json.dumps(task)], stdout=subprocess.PIPE, check=True, cwd=folder
            )
            figures = json.loads(done.stdout.splitlines()[-1])
            _add_insert(bench, "milvus-lite", figures["insert_s"], disk_of_raw=disk_bytes(store) / data.raw_bytes)
        for search in figures["searches"]:
            found = {int(i): ids for i, ids in search["answers"].items()}
            _add_search(bench, "milvus-lite", search["connections"], found, search["per_s"],
                        p50_ms=search["p50_ms"], p99_ms=search["p99_ms"])  # fmt: skip


PEERS: Mapping[str, Callable[[Bench, str], None]] = {"chroma": chroma, "milvus-lite": milvus_lite}


@contextmanager
def _server(command: list[str], ready: Callable[[], bool]) -> Iterator[None]:
    quiet = {**os.environ, "ANONYMIZED_TELEMETRY": "False"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr, env=quiet)
    try:
        wait_until(ready, timeout_s=START_S_MAX, what=f"{command[0]} ready")
        yield
    finally:
        process.terminate()
        process.wait(START_S_MAX)


def _create_in_chroma(address: Address, metric: str) -> str:
    graph = {"space": CHROMA_SPACE[metric], "max_neighbors": GRAPH_M, "ef_construction": GRAPH_EF_CONSTRUCTION}
    body = {"name": "bench", "configuration": {"hnsw": {**graph, "ef_search": GRAPH_EF}}}
    status, reply = Client(address).exchange("POST", CHROMA_PATH, _json(body))
    if status not in (200, 201):
        raise RuntimeError(f"chroma: create collection: {status} {reply[:300]!r}")
    return str(orjson.loads(reply)["id"])


def _chroma_inserts(bench: Bench, address: Address, path: str) -> Iterator[bytes]:
    for start in range(0, bench.data.rows, BATCH_ROWS):
        stop = min(start + BATCH_ROWS, bench.data.rows)
        rows = row_objects(bench.data, range(start, stop))
        body = {
            "ids": [str(row["id"]) for row in rows],
            "embeddings": [row["vector"] for row in rows],
            "metadatas": [{k: v for k, v in row.items() if k not in ("id", "vector")} for row in rows],
        }
        yield http_request(address, f"{path}/add", _json(body))


def _add_insert(bench: Bench, peer: str, seconds: float, **more: float) -> None:
    rows_per_s = bench.data.rows / seconds
    ours = bench.results.get("insert", "json", "rows/s")
    ratio = {"annulus_ratio": ours / rows_per_s} if ours else {}
    bench.results.add("peers", f"{peer}: insert", rows_per_s=rows_per_s, **ratio, **more)


def _add_search(
    bench: Bench, peer: str, connections: int, found: Mapping[int, list[int]], per_s: float, **latencies: float
) -> None:
    share = recall_of(bench.data, found, bench.truth)
    ours = bench.results.get("search", goals.best_search("json"), "queries/s") if connections == 8 else None
    ratio = {"annulus_ratio": ours / per_s} if ours else {}
    bench.results.add(
        "peers", f"{peer}: search, {connections} connections", recall=share, per_s=per_s, **latencies, **ratio
    )


def _all_well(replies: Replies, what: str) -> None:
    bad = [i for i, status in enumerate(replies.statuses) if status not in (200, 201)]
    if bad:
        raise RuntimeError(f"{what}: status {replies.statuses[bad[0]]}: {replies.bodies[bad[0]][:300]!r}")


def _answers(address: Address, path: str) -> bool:
    try:
        return Client(address).exchange("GET", path)[0] == 200
    except OSError:
        return False


def _listens(address: Address) -> bool:
    try:
        with socket.create_connection((address.host, address.port), timeout=1):
            return True
    except OSError:
        return False


def _json(body: Any) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
