"""Raft groups with peers: schedules of faults, and what must hold through them."""

from __future__ import annotations

import pytest

from tests.cluster.raft_world import fuzz


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_schedules_of_faults(first: int) -> None:
    """Crashes, power loss, partitions, slow disks and links, pauses, snapshots and transfers break no promise."""
    for seed in range(first, first + 10):
        fuzz(seed)
