"""A run for people (tables on the terminal) and for programs (one JSON file)."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.goals import GOALS, Goal, Verdict
from tools.bench.loading import REPOSITORY
from tools.bench.results import Results, Row

PACKAGES = ("numpy", "faiss-cpu", "nmslib", "plyvel", "pysyncobj", "aiohttp", "uvloop", "orjson", "cbor2", "pyarrow")
_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.BELOW: "yellow", Verdict.UNMEASURED: "dim"}


def print_report(results: Results, console: Console, goals: Sequence[Goal] = GOALS) -> None:
    """Print one table per scenario, then the goals."""
    for scenario, rows in results.scenarios().items():
        console.print(_scenario_table(scenario, rows))
    table = Table(title="goals", title_justify="left", title_style="bold")
    for heading in ("goal", "wanted", "found", ""):
        table.add_column(heading, justify="left" if heading in ("goal", "") else "right")
    for goal in goals:
        value, verdict = goal.judge(results)
        style = _STYLES[verdict]
        table.add_row(goal.text, f"{goal.bound} {goal.column}", number(value), f"[{style}]{verdict}[/{style}]")
    console.print(table)


def as_json(
    results: Results,
    *,
    seed: int,
    command: Sequence[str],
    machine: Mapping[str, Any],
    data: Mapping[str, Any],
    goals: Sequence[Goal] = GOALS,
) -> dict[str, Any]:
    """Return the whole run as plain data."""
    return {
        "command": list(command),
        "seed": seed,
        "commit": _commit(),
        "machine": dict(machine),
        "versions": versions(),
        "data": dict(data),
        "results": [
            {"scenario": row.scenario, "name": row.name, **{k: _finite(v) for k, v in row.values.items()}}
            for row in results.rows
        ],
        "goals": [
            {"goal": goal.text, "wanted": f"{goal.bound} {goal.column}", "found": value, "verdict": str(verdict)}
            for goal in goals
            for value, verdict in [goal.judge(results)]
        ],
    }


def write_json(path: str, run: Mapping[str, Any]) -> None:
    """Write a run to a file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(run, file, indent=1)
        file.write("\n")


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, memory, kernel."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of what does the work."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def number(value: float | None) -> str:
    """Return a number with as many digits as it deserves."""
    if value is None or math.isnan(value):
        return ""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _scenario_table(scenario: str, rows: Sequence[Row]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    table = Table(title=scenario, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, *(number(row.values.get(column)) for column in columns))
    return table


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()


def _field(path: str, name: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "")
    except OSError:
        return ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
