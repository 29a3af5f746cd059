"""The ring: the same for everybody, even, and calm when a node comes or goes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from cluster.ring import place
from storage.types import ShardId

GOLDEN = {0: ("n1", "n3"), 1: ("n2", "n3"), 2: ("n1", "n2")}
NAMES = [f"n{i}" for i in range(1, 8)]


def test_placement_is_a_function_of_the_names_alone() -> None:
    """Order does not matter, and these are the nodes for ever: an update must not move a shard."""
    assert place(["n3", "n1", "n2"], 4, 2) == place(["n1", "n2", "n3"], 4, 2)
    assert place(["n1", "n2", "n3"], 3, 2) == GOLDEN


@pytest.mark.parametrize("nodes", range(1, 8))
def test_replicas_are_distinct_and_as_many_as_can_be(nodes: int) -> None:
    """A shard is on `replication_factor` different nodes, or on all there are."""
    for held in place(NAMES[:nodes], 64, 3).values():
        assert len(set(held)) == len(held) == min(3, nodes)


@pytest.mark.parametrize("nodes", range(3, 7))
@pytest.mark.parametrize("shards", [8, 64, 250])
def test_adding_a_node_moves_its_share_and_nothing_else(nodes: int, shards: int) -> None:
    """From n to n + 1 nodes, no replica moves between old nodes, and 1 / (n + 1) of all, rounded down, to the new."""
    before = place(NAMES[:nodes], shards, 3)
    after = place(NAMES[: nodes + 1], shards, 3, held=before)
    gained = Counter(one for shard in before for one in set(after[shard]) - set(before[shard]))
    assert gained == {NAMES[nodes]: shards * 3 // (nodes + 1)}


@pytest.mark.parametrize("nodes", range(1, 8))
@pytest.mark.parametrize("shards", [1, 8, 50])
def test_all_nodes_hold_the_same_or_one_less(nodes: int, shards: int) -> None:
    """However few shards there are, no node has two replicas more than another."""
    held = Counter(name for names in place(NAMES[:nodes], shards, 3).values() for name in names)
    assert max(held.values()) - min(held[name] for name in NAMES[:nodes]) <= 1


@pytest.mark.parametrize("seed", range(40))
def test_what_was_placed_stays(seed: int) -> None:
    """Placed again, everything is where it is, and the order of nodes and of what they hold changes nothing."""
    dice = Random(seed)
    nodes = NAMES[: dice.randint(1, 7)]
    zones = {name: dice.choice("abcd") for name in nodes if dice.random() < 0.7} if seed % 2 else {}
    held = {ShardId(shard): dice.sample(NAMES, dice.randint(0, 4)) for shard in range(12)}
    closed, spare = nodes[:1], NAMES[len(nodes) :]
    placed = place(nodes, 12, 3, zones=zones, held=held, closed=closed, spare=spare)
    shuffled = dice.sample(nodes, len(nodes))
    held_again = {shard: dice.sample(names, len(names)) for shard, names in held.items()}
    assert placed == place(shuffled, 12, 3, zones=zones, held=held_again, closed=closed, spare=spare)
    assert placed == place(nodes, 12, 3, zones=zones, held=placed, closed=closed, spare=spare)
    for shard, names in placed.items():
        assert len(set(names)) == len(names) <= 3
        assert set(names) - set(held[shard]) <= set(nodes) - set(closed), "what is closed, or spare, gets nothing new"
