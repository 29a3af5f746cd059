"""The command line of the benchmark: what to measure, on what, beside whom."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from tools.bench.client import Client, wait_until
from tools.bench.data import load_dataset
from tools.bench.node import READY_S_MAX, NodeProcess, free_address
from tools.bench.peers import PEERS, PeerMissing
from tools.bench.report import as_json, machine, print_report, write_json
from tools.bench.run import Bench, Plan
from tools.bench.scenarios import SCENARIOS
from tools.bench.wire import Address

FILE_COLUMNS = 150


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", "data_path", required=True, help="Any 2-d .npy, or a folder with wordnet_*.npy.")
@click.option("--queries", "queries_path", default=None, help="Queries as .npy; else some rows are held out.")
@click.option("--rows", default=50_000, help="Rows to insert.")
@click.option("--query-count", default=1000, help="Queries to ask at most.")
@click.option("--metric", type=click.Choice(["COSINE", "L2", "IP"]), default="COSINE")
@click.option("--seed", default=1, help="Chooses the rows and their order.")
@click.option("--only", default=",".join(SCENARIOS), help="Scenarios, separated by commas.")
@click.option("--index", "index_type", default="AUTOINDEX", help="Index type, of the node and of the engine alone.")
@click.option("--index-params", default="{}", help="Its parameters, as JSON.")
@click.option("--efs", default="32,64,128,256", help="Search efforts, ascending.")
@click.option("--repeats", default=3, help="Passes over the search measurements; medians are shown.")
@click.option("--seconds", default=3.0, help="Length of each search measurement.")
@click.option("--insert-connections", default=2)
@click.option("--search-rate", default=100.0, help="Searches a second while rows are inserted.")
@click.option("--shards", default=1, help="shardsNum of the collections.")
@click.option("--restart-rows", default=60_000, help="Rows for the restart, if the data has as many.")
@click.option("--build-threads", default=os.cpu_count() or 1, help="Threads of the engine's own build.")
@click.option("--settle", default=90.0, help="Idle seconds before a node at rest is weighed.")
@click.option("--url", default=None, help="Drive this node instead of starting one (no size, no restart).")
@click.option("--dir", "folder", default=None, help="Data directory of the node started; default a temporary one.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Measure these too.")
@click.option("--peer-python", default=sys.executable, help="Interpreter of an environment that has the peers.")
@click.option("--out", default=None, help="Write the run as JSON.")
def main(**options: Any) -> None:
    """Measure a node on real vectors, beside the engine alone and other databases."""
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    chosen = [name.strip() for name in options["only"].split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in SCENARIOS]:
        raise click.UsageError(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    plan = _plan(options)
    everything = load_dataset(
        options["data_path"],
        queries_path=options["queries_path"],
        rows=max(options["rows"], plan.restart_rows),
        queries=options["query_count"],
        seed=options["seed"],
        metric=options["metric"],
    )
    data = everything.head(options["rows"])
    described = {"name": data.name, "rows": data.rows, "dim": data.dim, "queries": len(data.queries)}
    described |= {"metric": data.metric, "index": plan.index_type, "shards": plan.shards}
    console.print(f"[bold]{data.rows} rows of {data.name}[/bold], {data.dim} components, seed {options['seed']}")
    before = machine()

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    with _node(options) as (client, node), Bench(client, node, everything, data, plan, say) as bench:
        bench.empty_bytes = node.memory_bytes()["rss"] if node else 0
        for name in [name for name in SCENARIOS if name in chosen]:
            SCENARIOS[name](bench)
    for peer in options["peers"]:
        bench.say(f"peer {peer}")
        try:
            PEERS[peer](bench, options["peer_python"])
        except PeerMissing as missing:
            console.print(f"[yellow]{peer} left out: {missing}[/yellow]")
    print_report(bench.results, console)
    if options["out"]:
        command = ["python", "-m", "tools.bench", *sys.argv[1:]]
        write_json(options["out"], as_json(bench.results, seed=options["seed"], command=command, machine=before,
                                           data=described))  # fmt: skip


def _plan(options: dict[str, Any]) -> Plan:
    return Plan(
        efs=sorted(int(ef) for ef in options["efs"].split(",")),
        seconds=options["seconds"],
        repeats=options["repeats"],
        insert_connections=options["insert_connections"],
        search_rate=options["search_rate"],
        index_type=options["index_type"],
        index_params=json.loads(options["index_params"]),
        shards=options["shards"],
        restart_rows=options["restart_rows"],
        build_threads=options["build_threads"],
        settle_s=options["settle"],
    )


@contextmanager
def _node(options: dict[str, Any]) -> Iterator[tuple[Client, NodeProcess | None]]:
    """Give a client of the node named by --url, or of one that runs for the time of the benchmark."""
    if options["url"]:
        client = Client(Address.parse(options["url"]))
        wait_until(client.ready, timeout_s=READY_S_MAX, what="node ready")
        yield client, None
        return
    with tempfile.TemporaryDirectory(prefix="annulus-bench-") as scratch:
        data_dir = options["folder"] or os.path.join(scratch, "data")
        log_path = os.path.join(scratch, "node.log")
        with NodeProcess(data_dir, free_address(), log_path=log_path) as node:
            node.start()
            try:
                yield node.client, node
            except Exception:
                sys.stderr.write(node.last_words())
                raise


if __name__ == "__main__":
    main()
