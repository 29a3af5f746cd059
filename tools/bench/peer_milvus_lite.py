"""Drives a Milvus Lite server with pymilvus, in an environment that has it; knows nothing of this repository.

    PEER_PYTHON tools/bench/peer_milvus_lite.py FOLDER TASK

FOLDER holds vectors.npy and queries.npy, TASK is JSON; the last line on standard output is the answer as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np

NAME = "bench"


def main() -> None:
    """Insert, wait for the index, search with 1 and 8 threads, print the figures."""
    folder, task = sys.argv[1], json.loads(sys.argv[2])
    vectors = np.load(os.path.join(folder, "vectors.npy"))
    queries = np.load(os.path.join(folder, "queries.npy"))
    pymilvus = importlib.import_module("pymilvus")
    client = pymilvus.MilvusClient(uri=task["uri"])
    create(pymilvus, client, task, dim=int(vectors.shape[1]))
    insert_s = insert(client, vectors, task["batch_rows"])
    client.flush(NAME)
    client.load_collection(NAME)
    searches = [search(pymilvus, queries, task, connections) for connections in (1, 8)]
    print(json.dumps({"insert_s": insert_s, "searches": searches}))


def create(pymilvus: Any, client: Any, task: dict[str, Any], *, dim: int) -> None:
    """Create the collection with an HNSW index of the same shape as everybody's."""
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    params = {"M": task["m"], "efConstruction": task["ef_construction"]}
    index.add_index(field_name="vector", index_type="HNSW", metric_type=task["metric"], params=params)
    client.create_collection(NAME, schema=schema, index_params=index)


def insert(client: Any, vectors: Any, batch_rows: int) -> float:
    """Return the seconds that inserting everything took."""
    rows = [{"id": i, "vector": vector} for i, vector in enumerate(vectors)]
    started = time.monotonic()
    for start in range(0, len(rows), batch_rows):
        client.insert(NAME, rows[start : start + batch_rows])
    return time.monotonic() - started


def search(pymilvus: Any, queries: Any, task: dict[str, Any], connections: int) -> dict[str, Any]:
    """Return throughput, latencies and the first answer to each query, from some threads with a client each."""
    answers: dict[int, list[int]] = {}
    took_ns: list[int] = []
    deadline = time.monotonic() + task["seconds"] + 1.0
    measured_from = deadline - task["seconds"]

    def ask(first: int) -> None:
        client = pymilvus.MilvusClient(uri=task["uri"])
        params = {"metric_type": task["metric"], "params": {"ef": task["ef"]}}
        i = first
        while time.monotonic() < deadline:
            number = i % len(queries)
            before = time.monotonic_ns()
            hits = client.search(NAME, [queries[number]], limit=task["k"], search_params=params)[0]
            if before > measured_from * 1e9:
                took_ns.append(time.monotonic_ns() - before)
            answers.setdefault(number, [int(hit["id"]) for hit in hits])
            i += connections

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = np.sort(np.array(took_ns))
    return {
        "connections": connections,
        "per_s": len(times) / task["seconds"],
        "p50_ms": float(times[len(times) // 2]) / 1e6,
        "p99_ms": float(times[int(len(times) * 0.99)]) / 1e6,
        "answers": answers,
    }


if __name__ == "__main__":
    main()
