"""What Milvus's own client does on a node: inserts and searches by pymilvus, beside the same over REST, in one run.

    python -m tools.bench.grpc --data ../shared/data --rows 20000

The clients are what people write: pymilvus over gRPC, and `requests` with a session and JSON over REST, each parsing
its answers, on the cores that the node is on. So the figures are those of client and server together; the node's CPU a
request tells them apart. Rounds of both take turns, and the median of the rounds counts.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from tools.bench.builds import cpu_s
from tools.bench.client import wait_until
from tools.bench.data import Dataset, load_dataset
from tools.bench.node import NodeProcess
from tools.bench.run import INDEXED_S_MAX
from tools.bench.wire import Address
from tools.nodes import free_port

BATCH_ROWS: Final = 1000
K: Final = 10
ROUNDS: Final = 5
INSERT_GOAL: Final = 8000
"""Rows a second by batches of BATCH_ROWS."""


class Interface:
    """One way to ask a node."""

    name = ""

    def create(self, collection: str, data: Dataset) -> None:
        raise NotImplementedError

    def insert(self, collection: str, rows: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def search(self, collection: str, query: list[float]) -> list[int]:
        """Return the ids of the K nearest rows."""
        raise NotImplementedError


class Pymilvus(Interface):
    name = "pymilvus, gRPC"

    def __init__(self, address: Address) -> None:
        from pymilvus import MilvusClient  # 2 s, and for this benchmark only

        self.client: Any = MilvusClient(uri=f"http://{address}")

    def create(self, collection: str, data: Dataset) -> None:
        self.client.create_collection(collection, dimension=data.dim, metric_type=data.metric)

    def insert(self, collection: str, rows: list[dict[str, Any]]) -> None:
        self.client.insert(collection, rows)

    def search(self, collection: str, query: list[float]) -> list[int]:
        (hits,) = self.client.search(collection, data=[query], limit=K)
        return [hit["id"] for hit in hits]


class Rest(Interface):
    name = "requests, REST"

    def __init__(self, address: Address) -> None:
        import requests

        self.session: Any = requests.Session()
        self.base = f"http://{address}/v2/vectordb"

    def call(self, path: str, **body: Any) -> Any:
        reply = self.session.post(self.base + path, json=body).json()
        assert reply["code"] == 0, reply
        return reply["data"]

    def create(self, collection: str, data: Dataset) -> None:
        self.call("/collections/create", collectionName=collection, dimension=data.dim, metricType=data.metric)

    def insert(self, collection: str, rows: list[dict[str, Any]]) -> None:
        self.call("/entities/insert", collectionName=collection, data=rows)

    def search(self, collection: str, query: list[float]) -> list[int]:
        return [hit["id"] for hit in self.call("/entities/search", collectionName=collection, data=[query], limit=K)]


def batches_of(data: Dataset) -> list[list[dict[str, Any]]]:
    """Return the rows as people have them, vectors as lists of floats."""
    rows = [
        {"id": i, "vector": vector, "bucket": bucket}
        for i, (vector, bucket) in enumerate(zip(data.vectors.tolist(), data.buckets.tolist(), strict=True))
    ]
    return [rows[at : at + BATCH_ROWS] for at in range(0, len(rows), BATCH_ROWS)]


def per_second(work: Callable[[Any], object], items: Sequence[Any], threads: int) -> tuple[float, list[float]]:
    """Return (items a second, seconds of each) of doing all items on so many threads."""

    def timed(item: Any) -> float:
        began_s = time.perf_counter()
        work(item)
        return time.perf_counter() - began_s

    began_s = time.perf_counter()
    if threads == 1:
        times = [timed(item) for item in items]
    else:
        with ThreadPoolExecutor(threads) as pool:
            times = list(pool.map(timed, items))
    return len(items) / (time.perf_counter() - began_s), times


def measure(node: NodeProcess, interfaces: Sequence[Interface], data: Dataset, searches: int) -> list[tuple[str, ...]]:
    """Return lines of the table: what, by whom, how many a second, median and p99 in ms, the node's CPU in us."""
    shown = []
    batches = batches_of(data)
    for threads in (1, 2):
        for one in interfaces:
            collection = f"insert_{interfaces.index(one)}_{threads}"
            one.create(collection, data)
            one.insert(collection, batches[0])
            before_s = cpu_s([node.pid])
            rate, times = per_second(lambda rows: one.insert(collection, rows), batches[1:], threads)  # noqa: B023
            used_s = cpu_s([node.pid]) - before_s
            shown.append(_line(f"insert, rows, {threads} threads", one, [rate * BATCH_ROWS], times, used_s))
    for number in (1, 2):
        for which in range(len(interfaces)):
            _wait_indexed(node, f"insert_{which}_{number}")
    queries = [data.queries[i % len(data.queries)].tolist() for i in range(searches)]
    for threads in (1, 4, 8):
        rates: dict[str, list[float]] = {one.name: [] for one in interfaces}
        all_times: dict[str, list[float]] = {one.name: [] for one in interfaces}
        used = dict.fromkeys(rates, 0.0)
        for _ in range(ROUNDS):
            for one in interfaces:
                before_s = cpu_s([node.pid])
                rate, times = per_second(lambda query: one.search("insert_0_1", query), queries, threads)  # noqa: B023
                used[one.name] += cpu_s([node.pid]) - before_s
                rates[one.name].append(rate)
                all_times[one.name] += times
        for one in interfaces:
            line = _line(f"search, {threads} threads", one, rates[one.name], all_times[one.name], used[one.name])
            shown.append(line)
    answers = [one.search("insert_0_1", queries[0]) for one in interfaces]
    assert all(answer == answers[0] for answer in answers), "the interfaces answer differently"
    return shown


def _wait_indexed(node: NodeProcess, collection: str) -> None:
    node.client.call("/collections/flush", collectionName=collection)

    def is_over() -> bool:
        (found,) = node.client.call("/indexes/describe", collectionName=collection, indexName="vector")
        return bool(found["indexState"] == "Finished")

    wait_until(lambda: is_over() or None, timeout_s=INDEXED_S_MAX, what=f"index of {collection}")


def _line(what: str, one: Interface, rates: list[float], times: list[float], used_s: float) -> tuple[str, ...]:
    return (
        what,
        one.name,
        f"{statistics.median(rates):,.0f}",
        f"{np.percentile(times, 50) * 1000:.2f}",
        f"{np.percentile(times, 99) * 1000:.2f}",
        f"{used_s / len(times) * 1e6:,.0f}",
    )


@click.command()
@click.option("--data", "source", default="node/sample/vectors.npy", show_default=True)
@click.option("--rows", default=20_000, show_default=True)
@click.option("--searches", default=300, show_default=True, help="of each round")
def main(source: str, rows: int, searches: int) -> None:
    """Measure one node through both interfaces."""
    data = load_dataset(source, queries_path=None, rows=rows, queries=100, seed=1, metric="COSINE")
    address = Address("127.0.0.1", free_port())
    table = Table("what", "by", "a second", "median ms", "p99 ms", "node's CPU us", show_edge=False)
    with tempfile.TemporaryDirectory() as directory:
        log_path = str(Path(directory) / "log")
        with NodeProcess(f"{directory}/data", address, log_path=log_path) as node:
            node.start()
            for line in measure(node, [Pymilvus(address), Rest(address)], data, searches):
                table.add_row(*line)
    Console().print(table)
    Console().print(f"{len(data.vectors):,} rows x {data.dim}, {os.cpu_count()} cores; goal: {INSERT_GOAL:,} rows/s")


if __name__ == "__main__":
    main()
