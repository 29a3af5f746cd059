"""python -m tools.sim: simulated seeds, one after the other, until one fails or the time is up.

python -m tools.sim --seeds 2000            seeds 0 to 1999
python -m tools.sim --minutes 2 --from 5000 as many as fit
python -m tools.sim --only 123              one seed again, with its log
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.sim.simulate import Simulation, Violation, simulate


def main() -> int:
    """Return the exit status: 0 if no seed broke a promise."""
    parser = argparse.ArgumentParser(prog="tools.sim", description="Simulate whole nodes from seeds.")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds (default: as many as fit into --minutes)")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this long")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, help="run this one seed and show its log")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    chosen = parser.parse_args()
    if chosen.only is not None:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
        print(f"seed {chosen.only}: {Simulation(chosen.only).run().requests} requests, no violation")
        return 0
    if not chosen.seeds and not chosen.minutes:
        parser.error("give --seeds or --minutes")
    return run(chosen.first, chosen.seeds or 10**9, chosen.minutes * 60 or float("inf"), chosen.jobs)


def run(first: int, seeds: int, budget_s: float, jobs: int) -> int:
    """Run seeds until one fails, all are done, or the time is up."""
    began_s = time.monotonic()
    done = requests = 0
    block = 2 * jobs
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_one, seed): seed for seed in range(first, first + min(block, seeds))}
        following = first + len(waiting)
        while waiting:
            finished = next(as_completed(waiting))
            del waiting[finished]
            count, violation = finished.result()
            if violation:
                print(f"VIOLATION {violation}\nreplay: python -m tools.sim --only {_seed_in(violation)}")
                pool.shutdown(cancel_futures=True)
                return 1
            done, requests = done + 1, requests + count
            if done % 50 == 0:
                print(f"{done} seeds, {requests} requests, {time.monotonic() - began_s:.0f} s", flush=True)
            if following < first + seeds and time.monotonic() - began_s < budget_s:
                waiting[pool.submit(_one, following)] = following
                following += 1
    print(f"{done} seeds from {first}, {requests} requests, {time.monotonic() - began_s:.0f} s: no violation")
    return 0


def _one(seed: int) -> tuple[int, str]:
    try:
        return simulate(seed).requests, ""
    except Violation as violation:
        return 0, str(violation)


def _seed_in(violation: str) -> str:
    return violation.split(":")[0].removeprefix("seed ")


if __name__ == "__main__":
    sys.exit(main())
