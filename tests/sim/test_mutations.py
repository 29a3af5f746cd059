"""A simulation that finds nothing proves nothing: with one rule taken away, some seed must tell.

The rules inside one Raft group have hand-made schedules of their own (tests/cluster/test_raft_mutations.py); here the
whole cluster is without them, or without one of its own. `python -m tests.sim.test_mutations` prints the seed that
finds each.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

import pytest

from cluster import planner
from cluster.idempotency import KeyedStep, Keys
from cluster.machine import StateMachine
from cluster.membership import Membership, MemberState, SetMember
from cluster.shard import Shard
from node.broadcaster import Broadcaster
from node.group import GroupHost
from node.route import Router
from storage.journal import GroupLog
from storage.types import Position
from tests.cluster.raft_mutations import MUTATIONS as OF_RAFT
from tests.sim.history import Violation
from tests.sim.plan import plan_of
from tests.sim.simulate import play

Patches = Callable[[ExitStack], object]


@dataclass(frozen=True)
class Mutation:
    """Something that a cluster must not do, and the faults that bring it to light within so many seeds.

    The seeds begin where one was found, to save time; with other code another of them finds it.
    """

    plant: Patches
    kinds: tuple[str, ...]
    seeds: range
    churn: bool = False
    """Whether nodes come and go."""
    says: str = ""
    """What notices it, by its name."""


def _replaced(target: Any, name: str, replacement: Any) -> Patches:
    return lambda stack: stack.enter_context(mock.patch.object(target, name, replacement))


def _of_raft(name: str) -> Patches:
    return lambda stack: stack.enter_context(OF_RAFT[name].applied())


async def _no_barrier(self: Router, shard_id: Any, *, deadline_s: float | None = None) -> Position:
    host = self._host(shard_id)
    return Position(0) if host is None else host.machine.position


async def _barrier_of_any_leader(self: GroupHost[Any]) -> Position:
    return Position(self.machine.position)


_apply = StateMachine.apply


def _apply_again(self: StateMachine, position: Position, entry: Any) -> Any:
    self._outcomes = OrderedDict()
    return _apply(self, position, entry)


async def _leave_open(self: Broadcaster, opened: Any, locks: Any) -> None:
    self.settled.set()


_tell = Broadcaster.tell


async def _tell_but_one(self: Broadcaster, shard_id: Any, message: Any, task: Any) -> None:
    if shard_id:
        await _tell(self, shard_id, message, task)


def _forget_who_is_replaced(self: Membership, message: SetMember) -> None:
    self.members[message.replaces] = replace(self.members[message.replaces], state=MemberState.DRAINING)


_targets = planner._targets


def _ignore_zones(view: Any) -> Any:
    members = {name: replace(one, zone="") for name, one in view.membership.members.items()}
    with mock.patch.object(view.membership, "members", members):
        return _targets(view)


def _leave_uneven(view: Any) -> Any:
    wanted = _targets(view)
    placed = view.membership.placements
    return {
        shard: names if set(placed[shard].members) - view.active else placed[shard].members
        for shard, names in wanted.items()
    }


_from_plain = Membership.from_plain


def _reload_without_plans(plain: Any) -> Membership:
    found = _from_plain(plain)
    found.placements = {shard: replace(one, position=Position(0)) for shard, one in found.placements.items()}
    return found


_load_machine = StateMachine.load_machine


def _reload_as_founded(self: StateMachine, data: Any) -> None:
    _load_machine(self, {**data, "generation": (0, (), 0)})


def _every_step(self: Keys, message: KeyedStep, execute: Callable[[Any], Any]) -> Any:
    return {"outcome": execute(message.message)}


MUTATIONS: Final[dict[str, Mutation]] = {
    "acknowledges before fsync": Mutation(
        _replaced(GroupLog, "durable_position", property(lambda self: self.last_position)), ("blackout",), range(10)
    ),
    "followers vouch before fsync": Mutation(_of_raft("acknowledges before fsync"), ("usurp",), range(20)),
    "leader counts itself before fsync": Mutation(
        _of_raft("leader counts itself before fsync"), ("usurp",), range(11, 31)
    ),
    "Strong reads without a barrier": Mutation(_replaced(Router, "barrier", _no_barrier), ("slow",), range(10)),
    "barriers without a round": Mutation(
        _replaced(GroupHost, "barrier", _barrier_of_any_leader), ("cut", "pause"), range(27, 67)
    ),
    "repeats are new writes": Mutation(
        _replaced(StateMachine, "apply", _apply_again), ("crash", "cut", "lead"), range(11, 31)
    ),
    "open changes are left open": Mutation(_replaced(Broadcaster, "_resume", _leave_open), ("die-at-step",), range(10)),
    "a shard is not told": Mutation(_replaced(Broadcaster, "tell", _tell_but_one), (), range(3)),
    "steps under a key are made again": Mutation(
        _replaced(Keys, "step", _every_step), ("crash", "cut", "die-at-step"), range(22, 42)
    ),
    "who is replaced is not removed": Mutation(
        _replaced(Membership, "_drain_replaced", _forget_who_is_replaced), (), range(3), churn=True
    ),
    "zones are ignored": Mutation(
        _replaced(planner, "_targets", _ignore_zones), (), range(3), churn=True, says="full replication"
    ),
    "loads stay uneven": Mutation(_replaced(planner, "_targets", _leave_uneven), (), range(3), churn=True),
    "placements reload by halves": Mutation(
        _replaced(Membership, "from_plain", staticmethod(_reload_without_plans)),
        (),
        range(3),
        churn=True,
        says="I-CT-2",
    ),
    "generations are forgotten": Mutation(
        _replaced(StateMachine, "load_machine", _reload_as_founded), ("crash",), range(3), churn=True
    ),
    "merges miss late deletes": Mutation(
        _replaced(Shard, "_delete_again", staticmethod(lambda *args: None)), (), range(10), says="I-CP-2"
    ),
    "commit without match": Mutation(_of_raft("commit without match"), ("cut", "crash"), range(1, 31)),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        MUTATIONS[name].plant(stack)
        yield


def first_seed(name: str, seeds: range) -> tuple[int, str] | None:
    """Return the first seed that notices a mutation, and only the mutation, and what it says; None if none does."""
    for seed in seeds:
        plan = plan_of(seed, nodes=3, kinds=MUTATIONS[name].kinds, churn=MUTATIONS[name].churn)
        try:
            with planted(name):
                play(plan)
        except Violation as violation:
            play(plan)  # without it all is well
            return seed, str(violation)
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str) -> None:
    """Each of these is noticed within the seeds that are stated for it, and by what is to notice it."""
    found = first_seed(name, MUTATIONS[name].seeds)
    assert found is not None and MUTATIONS[name].says in found[1]


def main() -> None:
    logging.disable(logging.CRITICAL)
    for name in sys.argv[1:] or MUTATIONS:
        found = first_seed(name, MUTATIONS[name].seeds if len(sys.argv) > 1 else range(100))
        print(f"{name:36s} {'not noticed' if found is None else f'seed {found[0]}: {found[1][:200]}'}", flush=True)


if __name__ == "__main__":
    main()
