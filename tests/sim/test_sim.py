"""Nodes in a simulated world keep their promises; and the simulation would notice if they did not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from cluster.machine import StateMachine
from cluster.shard import Shard
from cluster.tick import HybridClock
from node.checkpoints import Checkpoints
from storage.columns import Offsets
from storage.deletes import DeleteLog
from storage.filter.compiled import CompiledFilter
from storage.journal import GroupLog
from storage.view import SegmentView
from tests.sim.disk import SimFile
from tests.sim.history import Violation
from tests.sim.plan import Plan, plan_of
from tests.sim.shrink import shrink
from tests.sim.simulate import play, simulate
from tools.sim import leave_script

PROJECT: Final = Path(__file__).resolve().parent.parent.parent
SEEDS_TO_FIND: Final = 60


@pytest.mark.parametrize("seed", range(10))
def test_one_node_keeps_every_promise(seed: int) -> None:
    """Crashes at any moment, torn writes, full disks, jumping clocks: nothing is lost, doubled or there by halves."""
    assert simulate(seed, nodes=1).requests > 0


@pytest.mark.parametrize(("seed", "nodes"), [*((seed, 3) for seed in range(8)), (4, 5), (50463293, 5), (236678471, 3)])
def test_clusters_keep_every_promise(seed: int, nodes: int) -> None:
    """The same, and networks cut, nodes paused, disks lost: what was acknowledged stays, and all replicas agree."""
    assert simulate(seed, nodes=nodes).compared > 0


@pytest.mark.parametrize("seed", [0, 2, 8, 51])
def test_clusters_whose_nodes_come_and_go_keep_every_promise(seed: int) -> None:
    """And nodes join, leave, are replaced, machines and zones are lost: each shard is whole again in the end."""
    assert play(plan_of(seed, churn=True)).churned > 0


@pytest.mark.parametrize("seed", [515134, 515142, 7000046, 7300127])
def test_worlds_that_once_broke_a_promise_keep_it(seed: int) -> None:
    """Plans in which nodes may come and go: of each an answer was once old, or a move never ended."""
    assert play(plan_of(seed, churn=True)).compared > 0


def test_a_share_of_seeds_has_churn() -> None:
    """Nobody has to ask for it; and who asks, gets it in every world."""
    drawn = [plan_of(seed).churn for seed in range(200)]
    assert 20 < sum(drawn) < 60
    assert all(plan_of(seed, churn=True).churn for seed in range(20))
    assert not any(plan_of(seed, churn=False).churn for seed in range(20))


def test_a_failing_seed_leaves_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is cut down to a script, which fails in the same world when it is played, and not without the bug."""
    with monkeypatch.context() as patch:
        _acknowledge_before_sync(patch)
        seed = next(seed for seed in range(SEEDS_TO_FIND) if _fails(plan_of(seed, nodes=1)))
        whole = plan_of(seed, nodes=1)
        shorter = shrink(whole, _fails, attempts_max=12)
        path = leave_script(shorter, tmp_path / "new", shrink_s=0)
        plan = Plan.from_script(path.read_text(encoding="utf-8"))
        assert _fails(plan) and len(plan.steps) < len(whole.steps)
    assert not _fails(plan)


def _fails(plan: Plan) -> bool:
    try:
        play(plan)
    except Violation:
        return True
    return False


@pytest.mark.parametrize("nodes", [1, 3])
def test_same_seed_same_run(nodes: int) -> None:
    """A seed is the whole story: in whatever process, the same one does the same, callback for callback."""
    program = f"from tests.sim.simulate import simulate; print(simulate(24, nodes={nodes}))"
    results = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(salt)},
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for salt in (1, 2)
    ]
    assert results[0] == results[1] and b"callbacks" in results[0]


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
    async def write(self: Checkpoints) -> None:
        self._host.raft.trim(self._host.machine.position)

    patch.setattr(Checkpoints, "write", write)


def _remove_needed_chunks(patch: pytest.MonkeyPatch) -> None:
    def forget(self: Shard, digests: Any) -> None:
        for digest in digests:
            self.digests.pop(digest, None)
            self.garbage.add(digest)

    patch.setattr(Shard, "forget", forget)


def _lose_rows_that_indexes_know(patch: pytest.MonkeyPatch) -> None:
    def chosen(self: SegmentView, row_filter: CompiledFilter) -> Offsets | None:
        found = original(self, row_filter)
        return None if found is None else found[1:]

    original = SegmentView.chosen
    patch.setattr(SegmentView, "chosen", chosen)


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
        _lose_rows_that_indexes_know,
    ],
)
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation that finds nothing proves nothing: each of these bugs is found within a few seeds."""
    plant(monkeypatch)
    with pytest.raises(Violation):
        for seed in range(SEEDS_TO_FIND):
            simulate(seed, nodes=1)
