"""Nodes in a simulated world keep their promises; and the simulation would notice if they did not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cluster.machine import StateMachine
from cluster.shard import Shard
from cluster.tick import HybridClock
from node.upkeep import Upkeep
from storage.deletes import DeleteLog
from storage.journal import GroupLog
from tests.sim.disk import SimFile
from tests.sim.history import Violation
from tests.sim.simulate import simulate

SEEDS_TO_FIND = 60


@pytest.mark.parametrize("seed", range(12))
def test_seed_keeps_every_promise(seed: int) -> None:
    """Crashes at any moment, torn writes, full disks, jumping clocks: nothing is lost, doubled or there by halves."""
    assert simulate(seed, nodes=1).requests > 0


def test_same_seed_same_run() -> None:
    """A seed is the whole story: the same one does the same, write for write."""
    assert simulate(3, nodes=1) == simulate(3, nodes=1)


def _sync_lies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimFile, "datasync", lambda self: None)


def _acknowledge_before_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GroupLog, "durable_position", property(lambda self: self.last_position))


def _forget_outcomes(patch: pytest.MonkeyPatch) -> None:
    def load(self: StateMachine, data: Mapping[str, Any]) -> None:
        original(self, {**data, "tick": 0})

    original = StateMachine.load_machine
    patch.setattr(StateMachine, "load_machine", load)
    patch.setattr(HybridClock, "observe", lambda self, tick: None)


def _lose_deletes_in_compaction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Shard, "_delete_again", staticmethod(lambda *args: None))


def _lose_deletes_in_checkpoint(patch: pytest.MonkeyPatch) -> None:
    def from_bytes(data: bytes | memoryview, rows: int) -> DeleteLog:
        return DeleteLog(rows)

    patch.setattr(DeleteLog, "from_bytes", staticmethod(from_bytes))


def _trim_too_far(patch: pytest.MonkeyPatch) -> None:
    async def checkpoint(self: Upkeep) -> None:
        self._host.raft.trim(self.shard.position)

    patch.setattr(Upkeep, "checkpoint", checkpoint)


def _remove_needed_chunks(patch: pytest.MonkeyPatch) -> None:
    def forget(self: Shard, digests: Any) -> None:
        for digest in digests:
            self.digests.pop(digest, None)
            self.garbage.add(digest)

    patch.setattr(Shard, "forget", forget)


@pytest.mark.parametrize(
    "plant",
    [
        _sync_lies,
        _acknowledge_before_sync,
        _forget_outcomes,
        _lose_deletes_in_compaction,
        _lose_deletes_in_checkpoint,
        _trim_too_far,
        _remove_needed_chunks,
    ],
)
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation that finds nothing proves nothing: each of these bugs is found within a few seeds."""
    plant(monkeypatch)
    with pytest.raises(Violation):
        for seed in range(SEEDS_TO_FIND):
            simulate(seed, nodes=1)
