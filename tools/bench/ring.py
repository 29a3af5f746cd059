"""Where things are, and how fast that is known: shares moved, spread of loads, and look-ups of keys.

    python -m tools.bench.ring

Moves: nodes come one at a time, then go again. `ideal` is what no placement could do with less; `spread` is what the
fullest node holds over the mean. Look-ups: the best of many rounds, as other work on the machine only adds to them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, TypeVar

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.ring import Placed, place
from cluster.route import channels_of, number_finder, text_finder
from storage.types import ShardId

COPIES: Final = 3
KEYS: Final = 10_000
ROUNDS: Final = 300
Key = TypeVar("Key", int, str)


def placements(shards: int, counts: Sequence[int]) -> Iterator[tuple[int, int, float, float, float]]:
    """Yield (nodes, replicas that moved, ideal, spread, share of keys whose nodes changed), for each count in turn."""
    held: Placed = place(_names(counts[0]), shards, COPIES)
    for before, nodes in pairwise(counts):
        placed = place(_names(nodes), shards, COPIES, held=held)
        moved = sum(len(set(placed[shard]) - set(held[shard])) for shard in placed)
        load = Counter(name for names in placed.values() for name in names)
        mean = shards * min(COPIES, nodes) / nodes
        changed = sum(set(placed[shard]) != set(held[shard]) for shard in placed) / shards
        yield (
            nodes,
            moved,
            shards * COPIES * abs(nodes - before) / max(nodes, before),
            max(load.values()) / mean,
            changed,
        )
        held = placed


def look_ups() -> Iterator[tuple[str, float, str]]:
    """Yield (what, nanoseconds a key, goal)."""
    shards = tuple(ShardId(shard) for shard in range(8))
    table = np.array(shards)
    numbers = np.arange(KEYS, dtype=np.int64) * 7919
    names = [f"user-{number}" for number in range(KEYS)]
    yield "batch of 10,000 Int64 keys", _best_ns(lambda: table[channels_of(numbers, 8)]), "100"
    yield "batch of 10,000 VarChar keys", _best_ns(lambda: table[channels_of(names, 8)]), "100"
    singles = numbers.tolist()

    def one_by_one(find: Callable[[Key], ShardId], keys: Sequence[Key]) -> Callable[[], object]:
        def run() -> None:
            for key in keys:
                find(key)

        return run

    yield "one Int64 key", _best_ns(one_by_one(number_finder(shards), singles)), "400"
    yield "one VarChar key", _best_ns(one_by_one(text_finder(shards), names)), "400"
    yield "one Int64 key, 9 shards", _best_ns(one_by_one(number_finder((*shards, ShardId(8))), singles)), ""


def _best_ns(work: Callable[[], object]) -> float:
    best_s = float("inf")
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s / KEYS * 1e9


def _names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]


@click.command()
@click.option("--shards", default="8,64", show_default=True, help="numbers of shards")
def main(shards: str) -> None:
    """Print what moves and what look-ups cost."""
    console = Console()
    for count in map(int, shards.split(",")):
        table = Table(
            "nodes",
            "replicas moved",
            "ideal",
            "spread, max over mean",
            "keys that changed a replica",
            title=f"{count} shards, {COPIES} copies",
        )
        for nodes, moved, ideal, spread, changed in placements(count, (3, 4, 5, 6, 5, 4, 3)):
            table.add_row(str(nodes), str(moved), f"{ideal:.1f}", f"{spread:.2f}", f"{changed:.0%}")
        console.print(table)
    table = Table("look-up", "ns a key", "goal")
    for what, cost_ns, goal in look_ups():
        table.add_row(what, f"{cost_ns:.0f}", goal and f"under {goal}")
    console.print(table)


if __name__ == "__main__":
    main()
