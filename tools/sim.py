"""python -m tools.sim: simulated worlds, one seed after the other, until one breaks a promise or the time is up.

python -m tools.sim --seeds 2000             seeds 0 to 1999, with 1, 3 or 5 nodes as each seed has it
python -m tools.sim --minutes 2 --from 5000  as many as fit
python -m tools.sim --minutes 2 --commit     as many as fit, from a seed that follows from the commit
python -m tools.sim --nodes 3 --seeds 100    all of them with three nodes
python -m tools.sim --churn --seeds 100      in all of them nodes come and go
python -m tools.sim --only 123               one seed again, with its log
python -m tools.sim --script FILE            a script that a failing seed has left

A seed that fails is cut down to the steps that matter, which are left as a script to be played again.
"""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from tests.sim.history import Violation
from tests.sim.plan import Plan, plan_of
from tests.sim.shrink import shrink
from tests.sim.simulate import Summary, play

PROJECT = Path(__file__).resolve().parent.parent
SHRINK_S = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if no seed broke a promise."""
    parser = argparse.ArgumentParser(prog="tools.sim", description="Simulate clusters of nodes from seeds.")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds (default: as many as fit into --minutes)")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this long")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--commit", action="store_true", help="the first seed follows from the commit: CI tries new ones"
    )
    parser.add_argument("--nodes", type=int, help="nodes of each world (default: as the seed has it)")
    parser.add_argument(
        "--churn",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether nodes come and go (default: as the seed has it)",
    )
    parser.add_argument("--only", type=int, help="run this one seed and show its log")
    parser.add_argument("--script", type=Path, help="play this script and show its log")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--scripts", type=Path, default=Path(), help="where failing seeds leave their scripts")
    parser.add_argument("--shrink-s", type=float, default=SHRINK_S, help="how long to make a failing seed shorter")
    chosen = parser.parse_args(arguments)
    planned = partial(plan_of, nodes=chosen.nodes, churn=chosen.churn)
    if chosen.only is not None or chosen.script is not None:
        return _show(_plan_from(chosen.script) if chosen.script else planned(chosen.only))
    if not chosen.seeds and not chosen.minutes:
        parser.error("give --seeds or --minutes")
    first = seed_of_commit() if chosen.commit else chosen.first
    seeds = range(first, first + (chosen.seeds or 10**9))
    failing = run(seeds, planned, chosen.minutes * 60 or float("inf"), chosen.jobs)
    if failing is None:
        return 0
    leave_script(failing, chosen.scripts, chosen.shrink_s)
    return 1


def run(seeds: range, planned: Callable[[int], Plan], budget_s: float, jobs: int) -> Plan | None:
    """Run seeds until one fails, all are done, or the time is up; return the plan that failed."""
    began_s = time.monotonic()
    left = iter(seeds)
    done = requests = faults = churned = compared = 0
    with ProcessPoolExecutor(jobs, initializer=prepare) as pool:
        waiting = {pool.submit(_one, planned, seed): seed for _, seed in zip(range(2 * jobs), left, strict=False)}
        while waiting:
            finished = next(as_completed(waiting))
            seed = waiting.pop(finished)
            result = finished.result()
            if isinstance(result, str):
                print(f"VIOLATION {result}", flush=True)
                pool.shutdown(cancel_futures=True)
                return planned(seed)
            done, requests, faults = done + 1, requests + result.requests, faults + result.faults
            churned, compared = churned + result.churned, compared + result.compared
            if done % 50 == 0:
                print(f"{done} seeds, {requests} requests, {time.monotonic() - began_s:.0f} s", flush=True)
            if time.monotonic() - began_s < budget_s and (following := next(left, None)) is not None:
                waiting[pool.submit(_one, planned, following)] = following
    print(
        f"{done} seeds from {seeds.start}, {requests} requests, {faults} faults, {churned} comings and goings, "
        f"{compared} states compared, {time.monotonic() - began_s:.0f} s: no violation"
    )
    return None


def prepare() -> None:
    """Let the collector look less often, and never at what was there before the first world: both cost seconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def seed_of_commit() -> int:
    """Return a number that follows from the commit; 0 outside a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    return int(found.stdout[:7], 16) if found.returncode == 0 else 0


def leave_script(plan: Plan, where: Path, shrink_s: float) -> Path:
    """Write a failing plan, made as short as time allows, as a script; return its path."""
    until_s = time.monotonic() + shrink_s
    shorter = shrink(plan, partial(_fails_in_time, until_s))
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"sim-{plan.seed}.script"
    path.write_text(shorter.to_script(_failure_of(shorter)), encoding="utf-8")
    print(f"{len(plan.steps)} steps cut down to {len(shorter.steps)}\nreplay: python -m tools.sim --script {path}")
    return path


def _plan_from(path: Path) -> Plan:
    return Plan.from_script(path.read_text(encoding="utf-8"))


def _show(plan: Plan) -> int:
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    try:
        print(f"no violation: {play(plan)}")
    except Violation as violation:
        print(f"VIOLATION {violation}")
        return 1
    return 0


def _one(planned: Callable[[int], Plan], seed: int) -> Summary | str:
    try:
        return play(planned(seed))
    except Violation as violation:
        return str(violation)


def _failure_of(plan: Plan) -> str:
    try:
        play(plan)
    except Violation as violation:
        return str(violation)
    return ""


def _fails_in_time(until_s: float, plan: Plan) -> bool:
    return time.monotonic() < until_s and bool(_failure_of(plan))


if __name__ == "__main__":
    sys.exit(main())
