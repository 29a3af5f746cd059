"""python -m tools.check: format, lint, types, tests, tests of processes, in that order; the same here and in CI.

Stops at the first step that fails; --all runs the rest too. --fix formats and mends what ruff can mend by itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PLACES = ("node", "cluster", "storage", "index", "tools", "tests")
PYTEST = ("pytest", "-q", "--durations=15", "--durations-min=10")
MACHINE_TESTS = ("tests/process", "tests/tools")
"""They start processes and look at what the machine does to them."""


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    step: Step
    passed: bool
    seconds: float


def steps(*, fix: bool = False, slow: bool = False) -> list[Step]:
    """Return what is run, in order: tests of the code two at a time, then those that take a whole machine."""
    slowly = ("--slow",) if slow else ()
    return [
        Step("format", ("ruff", "format", *(() if fix else ("--check",)), ".")),
        Step("lint", ("ruff", "check", *(("--fix",) if fix else ()), ".")),
        Step("types", ("mypy", "--strict", *PLACES)),
        Step(
            "tests", (*PYTEST, *slowly, "-n", "2", "--dist", "loadfile", *(f"--ignore={one}" for one in MACHINE_TESTS))
        ),
        Step("machine", (*PYTEST, *slowly, *MACHINE_TESTS)),
    ]


def run(wanted: Sequence[Step], *, all_steps: bool) -> list[Outcome]:
    """Run the steps with this interpreter's tools, from the project's root; return how each went."""
    outcomes: list[Outcome] = []
    for step in wanted:
        print(f"=== {step.name}: {' '.join(step.command)}", flush=True)
        begun_s = time.monotonic()
        passed = subprocess.run([sys.executable, "-m", *step.command], cwd=PROJECT).returncode == 0
        outcomes.append(Outcome(step, passed, time.monotonic() - begun_s))
        if not passed and not all_steps:
            break
    return outcomes


def summary(wanted: Sequence[Step], outcomes: Sequence[Outcome]) -> str:
    """Return one line per step: ok, FAILED or not run, and how long it took."""
    done = {outcome.step.name: outcome for outcome in outcomes}
    lines = []
    for step in wanted:
        if (outcome := done.get(step.name)) is None:
            lines.append(f"  {step.name:<8} not run")
        else:
            lines.append(f"  {step.name:<8} {'ok' if outcome.passed else 'FAILED':<8} {outcome.seconds:6.1f} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--all", action="store_true", help="go on after a step that fails")
    parser.add_argument("--fix", action="store_true", help="format and mend what can be mended mechanically")
    parser.add_argument("--slow", action="store_true", help="run the slow tests too (minutes)")
    chosen = parser.parse_args(arguments)
    wanted = steps(fix=chosen.fix, slow=chosen.slow)
    outcomes = run(wanted, all_steps=chosen.all)
    print(summary(wanted, outcomes))
    return 0 if len(outcomes) == len(wanted) and all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
