"""Raft groups with peers: schedules of faults, and what must hold through them."""

from __future__ import annotations

from unittest import mock

import pytest

from storage.journal import GroupLog
from tests.cluster.raft_mutations import MUTATIONS
from tests.cluster.raft_stage import Stage
from tests.cluster.raft_world import World, fuzz


@pytest.mark.parametrize("seed", range(20))
def test_schedules_of_faults(seed: int) -> None:
    """Crashes, lost disks, partitions, slow disks and links, pauses, checkpoints and transfers break no promise."""
    fuzz(seed, seconds=8.0)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 1_100, 100))
def test_many_schedules_of_faults(first: int) -> None:
    for seed in range(first, first + 100):
        fuzz(seed)


def flapping(seed: int) -> tuple[int, float]:
    """Return elections, and the part of the time with a leader that can decide, while one follower hears nobody,
    again and again, for 20 s."""
    world = World(seed)
    world.run(3.0)
    leader = world.leader()
    assert leader is not None
    deaf = next(name for name in world.servers if name != leader.name)
    elected, available, samples = world.stats["leaders"], 0, 0
    for _ in range(16):
        for name in world.servers:
            world.hung[name, deaf] = world.now + 1.1
        for _ in range(62):
            world.run(0.02)
            leader = world.leader()
            guard = None if leader is None else leader.raft._guard  # type: ignore[union-attr]
            samples += 1
            if leader is not None and guard is not None and guard.leadership is not None:
                available += guard.leadership.has_lease(leader.now())
    world.must_converge()
    return world.stats["leaders"] - elected, available / samples


def test_without_pre_vote_availability_is_lost() -> None:
    """A link that carries one way only costs nothing; without the question before a campaign it costs leaders."""
    elections, available = flapping(5)
    with MUTATIONS["no pre-vote"].applied():
        elections_without, available_without = flapping(5)
    assert (elections, available) == (0, 1.0)
    assert elections_without >= 8
    assert available_without < 0.99


def test_the_same_seed_replays() -> None:
    """A schedule is its seed: two runs have the same messages, leaders and deliveries."""
    first, second = fuzz(11), fuzz(11)
    assert first.stats == second.stats
    assert first.committed == second.committed


def test_a_long_log_is_committed_and_replayed_without_a_stall() -> None:
    """After all have restarted with a log that no checkpoint covers, one tick settles what older terms left."""
    stage = Stage()
    stage.lead("a", "bc")
    for serial in range(3_000):
        stage["a"].raft.propose(b"%d" % serial)
    stage.settle()
    stage.crash("a", "b", "c")
    stage.start("a", "b", "c")
    looked_at = 0
    term_at = GroupLog.term_at

    def counted(log: GroupLog, position: int) -> int:
        nonlocal looked_at
        looked_at += 1
        return term_at(log, position)

    with mock.patch.object(GroupLog, "term_at", counted):
        assert stage.elect("a", "bc")
        while stage["a"].raft.committed < 3_000:
            before = looked_at
            stage["a"].raft._core.doTick(0.0)
            assert looked_at - before < 50, "PySyncObj goes through the log"
            stage.settle(rounds=1)
    stage.settle()
    assert len(stage["a"].delivered) == 3_000
