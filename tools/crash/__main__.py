"""The command line: how many rounds, from which seed, where."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import tempfile
import time

import click

from tools.crash.canary import run_canaries
from tools.crash.rounds import Arena
from tools.crash.trace import Trace

SHOWN_MAX = 12


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=200, help="How often the node is ended.")
@click.option("--seed", type=int, default=None, help="Chooses what is done and when; drawn if left out.")
@click.option("--dir", "folder", default=None, help="Where data, log and trace go, and stay.")
@click.option("--canary", is_flag=True, help="Break promises on purpose; succeed if each is noticed.")
@click.option("--node-module", default="node", hidden=True)
def main(rounds: int, seed: int | None, folder: str | None, canary: bool, node_module: str) -> None:
    """End a node again and again while clients work, and hold it to what it acknowledged.

    Exits with 0 if it kept every promise, with 1 if not; then the directory and the trace are kept.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    kept = folder is not None
    folder = folder or tempfile.mkdtemp(prefix="annulus-crash-")
    os.makedirs(folder, exist_ok=True)
    started = time.monotonic()
    click.echo(f"seed {seed}, {folder}")
    with Trace(os.path.join(folder, "trace.jsonl")) as trace:
        arena = Arena(folder, seed, trace, click.echo, node_module=node_module)
        if canary:
            missed = asyncio.run(run_canaries(arena, click.echo))
            good, verdict = not missed, f"canaries missed: {', '.join(missed) or 'none'}"
        else:
            asyncio.run(arena.run(rounds))
            good, verdict = arena.sound, _verdict(arena, rounds)
    click.echo(f"{verdict}, {time.monotonic() - started:.0f} s")
    if not good:
        click.echo(f"data, node.log and trace.jsonl are in {folder}")
        extra = "--canary" if canary else f"--rounds {rounds}"
        click.echo(f"again: python -m tools.crash --seed {seed} {extra}")
    elif not kept:
        shutil.rmtree(folder)
    sys.exit(0 if good else 1)


def _verdict(arena: Arena, rounds: int) -> str:
    world = arena.world
    done = f"{world.trace.round} of {rounds} rounds, {world.acknowledged} writes acknowledged, {world.reads} reads"
    if arena.sound:
        return f"{done}, every promise kept"
    shown = "\n".join(f"  {violation}" for violation in world.violations[:SHOWN_MAX])
    more = len(world.violations) - SHOWN_MAX
    return f"{shown}\n{f'  and {more} more' if more > 0 else ''}\n{done}, {len(world.violations)} promises broken"


if __name__ == "__main__":
    main()
