"""Changes of the catalogue: how long one takes over all shards, what many collections take, and what they cost at rest.

    python -m tools.bench.ddl --nodes 3 --collections 500

The nodes share this machine's cores with each other and with the load.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console

from tools.bench.__main__ import FILE_COLUMNS
from tools.bench.builds import cpu_s, pids_of
from tools.bench.cluster import Side, running
from tools.bench.goals import DDL_GOALS
from tools.bench.report import as_json, machine, print_report, write_json
from tools.bench.results import Results

NAME: Final = "bench_ddl"
WARM_UP: Final = 3
IDLE_AFTER_S: Final = 5.0
"""After the last change, for what it leaves to do in the background."""

Change = Callable[[Side, int], None]


def _call(path: str, **body: Any) -> Change:
    return lambda side, number: side.clients[number % len(side.clients)].call(path, collectionName=NAME, **body)


def _numbered(path: str, body: Callable[[int], Mapping[str, Any]]) -> Change:
    return lambda side, number: _call(path, **body(number))(side, number)


def _create(shards: int) -> Change:
    return _call("/collections/create", dimension=4, params={"shardsNum": shards})


def changes(shards: int) -> Mapping[str, tuple[Change, Change]]:
    """Return kind -> (the change that is timed, what undoes it), each of a collection over so many shards."""
    nullable: Any = {"dataType": "Int32", "nullable": True}
    return {
        "create a collection": (_create(shards), _call("/collections/drop")),
        "drop a collection": (_call("/collections/drop"), _create(shards)),
        "create a partition": (
            _numbered("/partitions/create", lambda number: {"partitionName": f"p{number}"}),
            lambda side, number: None,
        ),
        "alter properties": (
            _numbered("/collections/alter_properties", lambda n: {"properties": {"collection.ttl.seconds": str(n)}}),
            lambda side, number: None,
        ),
        "add a field": (
            _numbered("/collections/fields/add", lambda number: {"schema": {"fieldName": f"f{number}", **nullable}}),
            _numbered("/collections/fields/drop", lambda number: {"fieldName": f"f{number}"}),
        ),
        "truncate": (_call("/collections/truncate"), lambda side, number: None),
        "release": (_call("/collections/release"), _call("/collections/load")),
    }


def latency(side: Side, shards: int, repeats: int, results: Results) -> None:
    """Time each kind of change, one after the other, through all nodes in turn."""
    everything: list[float] = []
    for kind, (change, undo) in changes(shards).items():
        side.clients[0].call("/collections/drop", collectionName=NAME)
        if kind != "create a collection":
            _create(shards)(side, 0)
        took_ms = []
        for number in range(repeats + WARM_UP):
            began_s = time.perf_counter()
            change(side, number)
            took_ms.append((time.perf_counter() - began_s) * 1000)
            undo(side, number)
        everything += took_ms[WARM_UP:]
        _add(results, f"{side.name}, {kind}", took_ms[WARM_UP:])
    _add(results, f"{side.name}, all", everything)
    side.clients[0].call("/collections/drop", collectionName=NAME)


def _add(results: Results, name: str, took_ms: list[float]) -> None:
    p50, p99 = np.percentile(took_ms, [50, 99])
    results.add("latency", name, p50_ms=float(p50), p99_ms=float(p99))


def many(side: Side, count: int, connections: int, results: Results, *, drop: bool) -> None:
    """Create and describe many collections, and drop them again if wanted."""
    names = [f"{NAME}_{number}" for number in range(count)]
    steps = {"create": "/collections/create", "describe": "/collections/describe", "drop": "/collections/drop"}
    took_s: dict[str, float] = {}
    with ThreadPoolExecutor(connections) as pool:
        for what, path in steps.items():
            if what == "drop" and not drop:
                continue
            more = {"dimension": 4} if what == "create" else {}

            def ask(number: int, path: str = path, more: Mapping[str, Any] = more) -> None:
                side.clients[number % len(side.clients)].call(path, collectionName=names[number], **more)

            began_s = time.perf_counter()
            list(pool.map(ask, range(count)))
            took_s[what] = time.perf_counter() - began_s
    results.add(
        "many", f"{side.name}, {count} collections", **{f"{what}_s": one for what, one in took_s.items()},
        total_s=sum(took_s.values()),
    )  # fmt: skip


def idle(side: Side, count: int, seconds: float, results: Results) -> None:
    """Measure what the nodes' processes use while nobody asks anything."""
    time.sleep(IDLE_AFTER_S)
    before = [cpu_s([pid]) for pid in pids_of(side)]
    time.sleep(seconds)
    used = [(cpu_s([pid]) - one) / seconds for pid, one in zip(pids_of(side), before, strict=True)]
    results.add("idle", f"{side.name}, {count} collections", cores=max(used), all_cores=sum(used))


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--nodes", default=3, help="Nodes of the cluster.")
@click.option("--shards", default=8, help="shardsNum of the collections whose changes are timed.")
@click.option("--collections", default=500, help="Collections that are created, described and dropped.")
@click.option("--connections", default=4, help="Clients that create them.")
@click.option("--repeats", default=30, help="Changes of each kind that are timed.")
@click.option("--idle-s", default=20.0, help="How long the nodes are watched at rest.")
@click.option("--out", default=None, help="Write the run as JSON.")
def main(nodes: int, shards: int, collections: int, connections: int, repeats: int, idle_s: float,
         out: str | None) -> None:  # fmt: skip
    """Measure changes of the catalogue on one node and on a cluster."""
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    results, before = Results(), machine()
    with tempfile.TemporaryDirectory(prefix="annulus-bench-") as scratch:
        for count in dict.fromkeys((1, nodes)):
            with ExitStack() as stack:
                side = stack.enter_context(running(count, Path(scratch) / str(count)))
                console.print(f"[dim]changes over {shards} shards, {side.name}[/dim]")
                latency(side, shards, repeats, results)
                idle(side, 0, idle_s / 2, results)
                console.print(f"[dim]{collections} collections, {side.name}[/dim]")
                many(side, collections, connections, results, drop=count == 1)
                if count > 1:
                    idle(side, collections, idle_s, results)
    print_report(results, console, DDL_GOALS)
    if out:
        described = {"nodes": nodes, "shards": shards, "collections": collections, "repeats": repeats}
        command = ["python", "-m", "tools.bench.ddl", *sys.argv[1:]]
        write_json(out, as_json(results, seed=0, command=command, machine=before, data=described, goals=DDL_GOALS))


if __name__ == "__main__":
    main()
