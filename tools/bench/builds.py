"""What building an index costs: CPU of a cluster beside one node, and what searches feel of it.

    python -m tools.bench.builds --data ../shared/data --rows 20000 --nodes 3

Rows are inserted and flushed before an index is asked for, so that what is measured is the index alone: built by the
leader of each shard, shipped, verified, stored and loaded by all replicas. CPU time is that of all processes, from the
request until every node has the index in memory; what they use when idle is measured before, and told apart.

Searches run at a fixed pace through one node: at rest, and while the index of other rows is being built.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from tools.bench.__main__ import FILE_COLUMNS
from tools.bench.client import Client, wait_until
from tools.bench.cluster import COLLECTION, EF, INSERT_CONNECTIONS, Side, is_indexed, running
from tools.bench.data import Dataset, load_dataset
from tools.bench.goals import Goal
from tools.bench.loading import Load
from tools.bench.report import as_json, machine, print_report, write_json
from tools.bench.results import Results
from tools.bench.run import INDEXED_S_MAX, K
from tools.bench.wire import Codec, Form, schema_body, search_requests

BUILD_GOALS: tuple[Goal, ...] = (
    Goal("CPU of an index for 3 replicas beside one", "build", "3 nodes", "of one node", at_most=1.3),
    Goal("the same with what they use when idle", "build", "3 nodes", "with idling", at_most=1.3, orientation=True),
    Goal("searches during a build, p99", "search", "during a build", "p99 ms", at_most=100, orientation=True),
)
IDLE_S = 5.0
SEARCHED = "bench_searched"
SEARCH_CONNECTIONS = 2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pids: Sequence[int]) -> float:
    """Return the CPU time that processes have used, user and system, all threads."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def pids_of(side: Side) -> list[int]:
    return [node.pid for node in side.cluster.nodes.values()]


def metric(client: Client, name: str) -> float:
    """Return a metric of a node; 0 if it has none of that name and those labels."""
    lines = client.exchange("GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))


def create_bare(side: Side, name: str, data: Dataset, shards: int) -> None:
    """Make a loaded collection whose vectors are to have an exact index first, which costs nothing to build."""
    index = {"fieldName": "vector", "indexName": "vector", "indexType": "FLAT", "metricType": data.metric}
    side.clients[0].call("/collections/drop", collectionName=name)
    side.clients[0].call(
        "/collections/create", collectionName=name, schema=schema_body(data), indexParams=[index],
        params={"shardsNum": shards},
    )  # fmt: skip


def flush(side: Side, name: str, rows: int) -> None:
    """Return when all rows are in chunks, with their exact index, on every node."""
    side.clients[0].call("/collections/flush", collectionName=name)
    for client in side.clients:
        wait_until(
            lambda: not metric(client, 'annulus_segments{state="sealed"}')  # noqa: B023
            and is_indexed(client, rows, name),  # noqa: B023
            timeout_s=INDEXED_S_MAX, what="flush",
        )  # fmt: skip


def reindex(side: Side, name: str, data: Dataset) -> None:
    """Ask for a graph in place of the exact index."""
    side.clients[0].call("/collections/release", collectionName=name)
    side.clients[0].call("/indexes/drop", collectionName=name, indexName="vector")
    index = {"fieldName": "vector", "indexName": "vector", "indexType": "AUTOINDEX", "metricType": data.metric}
    side.clients[0].call("/indexes/create", collectionName=name, indexParams=[index])
    side.clients[0].call("/collections/load", collectionName=name)


def build(side: Side, data: Dataset, shards: int, results: Results, one: tuple[float, float]) -> tuple[float, float]:
    """Measure one side; return the CPU time of its build, without what it uses when idle, and with it.

    one  the same of the one node; zeros if this is it
    """
    create_bare(side, COLLECTION, data, shards)
    side.insert(data, Form.COLUMNS, INSERT_CONNECTIONS)
    flush(side, COLLECTION, data.rows)
    time.sleep(1.0)
    before_s = cpu_s(pids_of(side))
    time.sleep(IDLE_S)
    idle = (cpu_s(pids_of(side)) - before_s) / IDLE_S
    before_s, began_s = cpu_s(pids_of(side)), time.monotonic()
    reindex(side, COLLECTION, data)
    for client in side.clients:
        wait_until(lambda: is_indexed(client, data.rows, COLLECTION), timeout_s=INDEXED_S_MAX, what="index")  # noqa: B023
    wall_s = time.monotonic() - began_s
    used_s = cpu_s(pids_of(side)) - before_s
    net_s = used_s - idle * wall_s
    results.add(
        "build", side.name, cpu_s=used_s, idle_cpu_s=idle * wall_s, wall_s=wall_s,
        of_one_node=net_s / (one[0] or net_s), with_idling=used_s / (one[1] or used_s),
    )  # fmt: skip
    return net_s, used_s


def search_meanwhile(side: Side, data: Dataset, shards: int, seconds: float, results: Results) -> None:
    """Search a collection that is whole while the index of another is built."""
    create_bare(side, SEARCHED, data, shards)
    half = data.head(data.rows // 4)
    side.insert(half, Form.COLUMNS, INSERT_CONNECTIONS, collection=SEARCHED)
    reindex(side, SEARCHED, data)
    flush(side, SEARCHED, half.rows)
    asked = search_requests(side.addresses[0], SEARCHED, data.queries, Codec.CBOR, k=K, ef=EF, consistency="Bounded")
    for name, builds in (("at rest", False), ("during a build", True)):
        if builds:
            create_bare(side, COLLECTION, data, shards)
            side.insert(data, Form.COLUMNS, INSERT_CONNECTIONS)
            flush(side, COLLECTION, data.rows)
            reindex(side, COLLECTION, data)
            time.sleep(1.0)
        with Load(side.addresses[0], asked, connections=SEARCH_CONNECTIONS, seconds=seconds, cycle=True) as load:
            found = load.replies()
        still = builds and not is_indexed(side.clients[0], data.rows, COLLECTION)
        results.add(
            "search", name, per_s=len(found) / seconds, p50_ms=found.latency_ms(50), p99_ms=found.latency_ms(99),
            built_to_the_end=float(still),
        )  # fmt: skip


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", "data_path", required=True, help="Any 2-d .npy, or a folder with wordnet_*.npy.")
@click.option("--rows", default=20_000, help="Rows to index.")
@click.option("--nodes", default=3, help="Nodes of the cluster.")
@click.option("--shards", default=3, help="shardsNum of the collection, on both sides.")
@click.option("--seed", default=1, help="Chooses the rows and their order.")
@click.option("--seconds", default=5.0, help="Length of each search measurement; shorter than the build.")
@click.option("--out", default=None, help="Write the run as JSON.")
def main(data_path: str, rows: int, nodes: int, shards: int, seed: int, seconds: float, out: str | None) -> None:
    """Measure what building an index costs."""
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    data = load_dataset(data_path, queries_path=None, rows=rows, queries=1000, seed=seed, metric="COSINE")
    results, before = Results(), machine()
    one = (0.0, 0.0)
    with tempfile.TemporaryDirectory(prefix="annulus-bench-") as scratch:
        for count in (1, nodes):
            console.print(f"[dim]build, {count} nodes[/dim]")
            with running(count, Path(scratch) / str(count)) as side:
                used = build(side, data, shards, results, one)
                one = one if any(one) else used
                if count == 1:
                    console.print("[dim]searches[/dim]")
                    search_meanwhile(side, data, shards, seconds, results)
    print_report(results, console, BUILD_GOALS)
    if out:
        described = {"name": data.name, "rows": data.rows, "dim": data.dim, "nodes": nodes, "shards": shards}
        command = ["python", "-m", "tools.bench.builds", *sys.argv[1:]]
        write_json(out, as_json(results, seed=seed, command=command, machine=before, data=described, goals=BUILD_GOALS))


if __name__ == "__main__":
    main()
