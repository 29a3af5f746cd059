"""The command line: which faults, for how long, from which seed, and what is left to read."""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.chaos.failover import Failover
from tools.chaos.faults import FAULTS
from tools.chaos.fleet import Outcome
from tools.chaos.report import page, summary
from tools.chaos.run import ZONES, Run, folder_of
from tools.crash.trace import Trace

SHOWN_MAX = 12
TEXT_CHARS_MAX, SHORT_CHARS = 1_200, 200
BROKEN = 1


@click.group(
    invoke_without_command=True, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.option("--seed", type=int, default=None, help="Chooses faults, victims and requests; drawn if left out.")
@click.option("--minutes", type=float, default=2.0, help="Time under load; verification comes on top.")
@click.option("--nodes", type=click.IntRange(1, 9), default=3, help="Nodes of the cluster, all on this machine.")
@click.option("--data", "folder", default=None, help="Where data, logs and trace go, and stay.")
@click.option("--only", "names", multiple=True, metavar="FAULT", help="Only this fault; may be given several times.")
@click.option("--without", multiple=True, metavar="FAULT", help="Not this fault; may be given several times.")
@click.option("--churn", is_flag=True, help="Nodes come, go and are replaced too; they are in three zones.")
@click.option(
    "--patience",
    type=click.FloatRange(min=1.0),
    default=1.0,
    help="How many times longer nodes may take to get ready and heal: on a machine that has more to do.",
)
@click.option("--report", "report_path", default=None, metavar="FILE.html", help="Write the run as a page.")
@click.option("--list", "listing", is_flag=True, help="Explain the faults and end.")
@click.option("--python", default=sys.executable, hidden=True)
@click.pass_context
def main(
    context: click.Context,
    seed: int | None,
    minutes: float,
    nodes: int,
    folder: str | None,
    names: Sequence[str],
    without: Sequence[str],
    churn: bool,
    patience: float,
    report_path: str | None,
    listing: bool,
    python: str,
) -> None:
    """Run a cluster of real processes under load and faults, and hold it to what it acknowledged.

    Exits with 0 if it kept every promise, with 1 if not; then the directory and the trace are kept.
    """
    console = Console(highlight=False)
    if listing:
        console.print(_listing())
        return
    if context.invoked_subcommand is not None:
        return
    chosen = _chosen(names, without, churn)
    churn = churn or any(FAULTS[name].churns for name in chosen)
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    kept = folder is not None
    folder = folder_of(folder or tempfile.mkdtemp(prefix="annulus-chaos-"))
    console.print(f"seed {seed}, {nodes} nodes, {minutes:g} min, {folder}")
    with Trace(os.path.join(folder, "trace.jsonl")) as trace:
        run = Run(
            folder, seed=seed, nodes=nodes, names=chosen, trace=trace, say=lambda line: None, python=python,
            zones=ZONES if churn else 0, patience=patience,
        )  # fmt: skip
        asyncio.run(_shown(run, minutes * 60, console))
    for name, why in run.record.skipped.items():
        console.print(f"left out: {name}: {why}")
    facts = {"seed": seed, "nodes": nodes, "minutes under load": minutes, **summary(run.fleet.requests, run.record)}
    for key, value in facts.items():
        console.print(f"{key}: {value}")
    if report_path is not None:
        _write_report(report_path, run, facts)
        console.print(f"report: {report_path}")
    for violation in run.world.violations[:SHOWN_MAX]:
        text = str(violation)
        shown = text if len(text) <= TEXT_CHARS_MAX else f"{text[:SHORT_CHARS]} ... {text[-TEXT_CHARS_MAX:]}"
        console.print(f"  {shown}", style="red", markup=False)
    if run.sound:
        console.print(f"every promise kept: {run.world.acknowledged} writes acknowledged, {run.world.reads} reads")
        if not kept:
            shutil.rmtree(folder)
        return
    console.print(f"{len(run.world.violations)} promises broken; data, logs and trace.jsonl are in {folder}")
    again = f"--seed {seed} --minutes {minutes:g} --nodes {nodes}" + " --churn" * churn
    console.print(f"again: python -m tools.chaos {again}")
    sys.exit(BROKEN)


@main.command()
@click.option("--seed", type=int, default=None, help="Chooses victims and moments; drawn if left out.")
@click.option("--kills", default=50, help="How often a leader is ended with SIGKILL.")
@click.option("--stops", default=10, help="How often a leader is ended with SIGTERM.")
@click.option("--nodes", type=click.IntRange(2, 9), default=3, help="Nodes of the cluster.")
@click.option("--data", "folder", default=None, help="Where data and logs go, and stay.")
@click.option("--strict", is_flag=True, help="Fail also where the goals for time are missed.")
@click.option("--python", default=sys.executable, hidden=True)
def failover(
    seed: int | None, kills: int, stops: int, nodes: int, folder: str | None, strict: bool, python: str
) -> None:
    """End leaders under load, and measure how long writes wait and what readers notice."""
    console = Console(highlight=False)
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    kept = folder is not None
    folder = folder_of(folder or tempfile.mkdtemp(prefix="annulus-failover-"))
    console.print(f"seed {seed}, {nodes} nodes, {folder}")
    test = Failover(folder, seed=seed, nodes=nodes, say=lambda line: console.print(line, markup=False), python=python)
    asyncio.run(_failed_over(test, kills, stops))
    for line in test.found.lines():
        console.print(line, markup=False)
    if test.found.lost or (strict and not test.found.within_goals()):
        console.print(f"data and logs are in {folder}")
        sys.exit(BROKEN)
    if not kept:
        shutil.rmtree(folder)


async def _failed_over(test: Failover, kills: int, stops: int) -> None:
    _end_gently()
    await test.go(kills=kills, stops=stops)


async def _shown(run: Run, seconds: float, console: Console) -> None:
    """Let the run go on under a line that tells how it goes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("chaos", total=seconds, told="")
        began_s = time.monotonic()
        run.say = lambda line: console.print(f"{time.monotonic() - began_s:7.1f} s  {line}", markup=False)

        async def tell() -> None:
            while True:
                requests = run.fleet.requests
                failed = sum(one.outcome is not Outcome.OK for one in requests)
                told = f"{len(requests)} requests, {failed} without an answer"
                progress.update(task, completed=time.monotonic() - began_s, told=told)
                await asyncio.sleep(0.5)

        teller = asyncio.create_task(tell())
        _end_gently()
        try:
            await run.go(seconds)
        finally:
            teller.cancel()


def _end_gently() -> None:
    """Let SIGTERM end this process as Ctrl-C does: the nodes are detached and would go on."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def _chosen(names: Sequence[str], without: Sequence[str], churn: bool) -> list[str]:
    unknown = sorted({*names, *without} - FAULTS.keys())
    if unknown:
        raise click.UsageError(f"no such fault: {', '.join(unknown)}; --list explains them all")
    asked = names or [name for name, one in FAULTS.items() if churn or not one.churns]
    return [name for name in FAULTS if name in asked and name not in without]


def _listing() -> Table:
    table = Table("fault", "what it does", box=None, pad_edge=False)
    for one in FAULTS.values():
        low, high = one.lasts_s
        table.add_row(one.name, f"{one.sentence}; {low:g} to {high:g} s" + "; with --churn" * one.churns)
    return table


def _write_report(path: str, run: Run, facts: dict[str, object]) -> None:
    text = page(
        command=shlex.join(["python", "-m", "tools.chaos", *sys.argv[1:]]),
        record=run.record,
        ended_s=time.monotonic(),
        requests=run.fleet.requests,
        leaders=run.machines.moments,
        names=run.machines.names,
        violations=run.world.violations,
        facts=facts,
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
