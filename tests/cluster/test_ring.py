"""The ring: the same for everybody, even, and calm when a node comes or goes."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.ring import place

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
def test_adding_a_node_moves_its_share_and_nothing_else(nodes: int) -> None:
    """From n to n + 1 nodes, no replica moves between old nodes, and about 1 / (n + 1) of all move to the new one."""
    shards, factor = 1000, 3
    before, after = place(NAMES[:nodes], shards, factor), place(NAMES[: nodes + 1], shards, factor)
    gained = Counter(one for shard in before for one in set(after[shard]) - set(before[shard]))
    assert set(gained) == {NAMES[nodes]}
    assert gained[NAMES[nodes]] / (shards * factor) == pytest.approx(1 / (nodes + 1), rel=0.35)
