"""A cluster beside one node, on the same rows in one run: what copies cost writes, and that they cost reads nothing.

    python -m tools.bench.cluster --data ../shared/data --rows 20000 --nodes 3

Rows go in through all nodes at once, searches through one node and through all. The nodes share this machine's cores
with each other and with the load, so what counts are ratios to the one node of the same run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from tools.bench.__main__ import FILE_COLUMNS
from tools.bench.client import Client, wait_until
from tools.bench.data import Dataset, load_dataset
from tools.bench.goals import CLUSTER_GOALS
from tools.bench.loading import Load, Replies, run_load
from tools.bench.reads import WARM_UP_REQUESTS, answers_of, recall_of
from tools.bench.report import as_json, machine, print_report, write_json
from tools.bench.results import Results
from tools.bench.run import INDEXED_S_MAX, K
from tools.bench.truth import Truth, exact
from tools.bench.wire import Address, Codec, Form, insert_requests, schema_body, search_requests
from tools.nodes import Cluster

COLLECTION = "bench_cluster"
INSERT_CONNECTIONS = 2
"""Of each node; a single node gets as many as all of them have together."""
SEARCH_CONNECTIONS = 8
EF = 64


@dataclass(frozen=True)
class Side:
    """A running cluster of any size, and how it is driven."""

    name: str
    cluster: Cluster
    clients: Sequence[Client]

    @property
    def addresses(self) -> list[Address]:
        return [client.address for client in self.clients]

    def create(self, data: Dataset, shards: int) -> None:
        index = {"fieldName": "vector", "indexName": "vector", "indexType": "AUTOINDEX", "metricType": data.metric}
        self.clients[0].call("/collections/drop", collectionName=COLLECTION)
        self.clients[0].call(
            "/collections/create", collectionName=COLLECTION, schema=schema_body(data), indexParams=[index],
            params={"shardsNum": shards},
        )  # fmt: skip

    def insert(self, data: Dataset, form: Form, connections: int, collection: str = COLLECTION) -> list[Replies]:
        """Insert everything through all nodes at once. Raises RuntimeError if any batch was not acknowledged."""
        requests = list(insert_requests(self.addresses[0], collection, data, form))
        shares = [requests[i :: len(self.clients)] for i in range(len(self.clients))]
        found = run_loads(self.addresses, shares, connections=connections)
        rows = sum(form.codec.loads(body)["data"]["insertCount"] for one in found for body in one.bodies)
        if any(one.failures for one in found) or rows != data.rows:
            raise RuntimeError(f"{rows} of {data.rows} rows acknowledged by {self.name}")
        return found

    def wait_indexed(self, rows: int) -> None:
        """Return when the index covers all rows on every node."""
        self.clients[0].call("/collections/flush", collectionName=COLLECTION)
        for client in self.clients:
            wait_until(lambda: is_indexed(client, rows), timeout_s=INDEXED_S_MAX, what="index")  # noqa: B023


def run_loads(
    targets: Sequence[Address], requests: Sequence[Sequence[bytes]], *, connections: int, seconds: float | None = None
) -> list[Replies]:
    """Run a load on each target at the same time and return what came back."""
    with ExitStack() as stack:
        loads = [
            stack.enter_context(Load(target, some, connections=connections, seconds=seconds, cycle=seconds is not None))
            for target, some in zip(targets, requests, strict=True)
        ]
        return [load.replies() for load in loads]


def joint_wall_s(found: Sequence[Replies]) -> float:
    """Return the seconds from the first request of any load to the last reply of any."""
    return float(max(one.done_ns.max() for one in found) - min(one.sent_ns.min() for one in found)) / 1e9


def insert(side: Side, data: Dataset, form: Form, *, shards: int, connections: int, results: Results) -> None:
    """Insert everything in one form into a fresh collection; acknowledged rows a second of all nodes together."""
    side.create(data, shards)
    found = side.insert(data, form, connections)
    counted = [
        int(
            client.call(
                "/entities/query", collectionName=COLLECTION, filter="", outputFields=["count(*)"],
                consistencyLevel="Strong",
            )[0]["count(*)"]
        )
        for client in side.clients
    ]  # fmt: skip
    results.add(
        "insert",
        f"{side.name}, {form}",
        rows_per_s=data.rows / joint_wall_s(found),
        p50_ms=statistics.median(one.latency_ms(50) for one in found),
        p99_ms=max(one.latency_ms(99) for one in found),
        missing_rows=max(data.rows - one for one in counted),
    )


def search(
    sides: Sequence[Side], data: Dataset, truth: Truth, *, seconds: float, repeats: int, results: Results
) -> None:
    """Search through one node of each side, one after the other, and through all nodes of each at once; medians."""
    for codec in Codec:
        rates: dict[str, list[float]] = {}
        tails: dict[str, list[float]] = {}
        shares: dict[str, float] = {}
        for _ in range(repeats):
            for side in sides:
                ways = {
                    f"{side.name}, {name}": [one]
                    for name, one in zip(side.cluster.members, side.addresses, strict=True)
                }
                if len(side.clients) > 1:
                    ways[f"{side.name}, all"] = side.addresses
                for way, targets in ways.items():
                    name = f"{way}, {codec}"
                    asked = search_requests(
                        targets[0], COLLECTION, data.queries, codec, k=K, ef=EF, consistency="Bounded"
                    )
                    for target in targets:
                        run_load(target, asked[:WARM_UP_REQUESTS], connections=SEARCH_CONNECTIONS)
                    each = SEARCH_CONNECTIONS if len(targets) == 1 else max(2, SEARCH_CONNECTIONS // len(targets))
                    found = run_loads(targets, [asked] * len(targets), connections=each, seconds=seconds)
                    rates.setdefault(name, []).append(sum(map(len, found)) / joint_wall_s(found))
                    tails.setdefault(name, []).append(max(one.latency_ms(99) for one in found))
                    shares[name] = recall_of(data, answers_of(found[0], codec), truth)
        for name, rate in rates.items():
            results.add(
                "search",
                name,
                per_s=statistics.median(rate),
                of_one_node=statistics.median(rate) / statistics.median(rates[f"1 node, n1, {codec}"]),
                p99_ms=statistics.median(tails[name]),
                recall=shares[name],
            )


def is_indexed(client: Client, rows: int, collection: str = COLLECTION) -> bool:
    """Return whether a node has the index of all rows in memory."""
    state = client.call("/indexes/describe", collectionName=collection, indexName="vector")[0]
    status = client.exchange("GET", "/readyz")[0]
    return bool(status == 200 and state["indexState"] == "Finished" and state["indexedRows"] >= rows)


@contextmanager
def running(nodes: int, directory: Path) -> Iterator[Side]:
    """Give a cluster of so many nodes, ready; it is stopped at the end."""
    cluster = Cluster.make(Path(sys.executable), directory, nodes=nodes)
    try:
        cluster.start_all()
        cluster.wait_all_ready()
        clients = [Client(Address.parse(one.client_address)) for one in cluster.members.values()]
        yield Side("1 node" if nodes == 1 else f"{nodes} nodes", cluster, clients)
    finally:
        cluster.stop_all()


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", "data_path", required=True, help="Any 2-d .npy, or a folder with wordnet_*.npy.")
@click.option("--rows", default=20_000, help="Rows to insert.")
@click.option("--nodes", default=3, help="Nodes of the cluster.")
@click.option("--shards", default=3, help="shardsNum of the collection, on both sides.")
@click.option("--seed", default=1, help="Chooses the rows and their order.")
@click.option("--seconds", default=3.0, help="Length of each search measurement.")
@click.option("--repeats", default=3, help="Passes over the search measurements; medians are shown.")
@click.option("--out", default=None, help="Write the run as JSON.")
def main(data_path: str, rows: int, nodes: int, shards: int, seed: int, seconds: float, repeats: int,
         out: str | None) -> None:  # fmt: skip
    """Measure a cluster beside one node, on real vectors."""
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    data = load_dataset(data_path, queries_path=None, rows=rows, queries=1000, seed=seed, metric="COSINE")
    truth = exact(data.queries, data.vectors, K, data.metric)
    results, before = Results(), machine()
    with tempfile.TemporaryDirectory(prefix="annulus-bench-") as scratch, ExitStack() as stack:
        sides = [stack.enter_context(running(count, Path(scratch) / str(count))) for count in (1, nodes)]
        for form in Form:
            for side in sides:
                console.print(f"[dim]insert {rows} rows, {form}, {side.name}[/dim]")
                connections = INSERT_CONNECTIONS * nodes // len(side.clients)
                insert(side, data, form, shards=shards, connections=connections, results=results)
        for side in sides:
            console.print(f"[dim]index, {side.name}[/dim]")
            began_s = time.monotonic()
            side.wait_indexed(rows)
            results.add("index", side.name, indexed_s=time.monotonic() - began_s)
        search(sides, data, truth, seconds=seconds, repeats=repeats, results=results)
    print_report(results, console, CLUSTER_GOALS)
    if out:
        described = {"name": data.name, "rows": data.rows, "dim": data.dim, "nodes": nodes, "shards": shards}
        command = ["python", "-m", "tools.bench.cluster", *sys.argv[1:]]
        write_json(
            out, as_json(results, seed=seed, command=command, machine=before, data=described, goals=CLUSTER_GOALS)
        )


if __name__ == "__main__":
    main()
