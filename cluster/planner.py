"""What the coordinator does next: which nodes count as gone, which shards move, and which leaderships.

A pure function of what is known: the control group's membership, who is up, who leads. It plans little at a time, and
is asked again when something has changed; a plan that was made is part of the membership, so the next coordinator goes
on where this one ended.

    gone        a node that is away for longer than the grace time; when it is back, it is active again
    moves       first shards that have lost a copy for good, then those on draining nodes, then what evens out loads.
                A shard is only moved while a majority of its copies is up, to nodes that are up, and never to fewer
                living copies than it has
    removals    a node that was to make room for another, and that holds nothing any more
    transfers   away from draining nodes, then from nodes whose leaderships weigh more than those of others. Each one,
                or the chain that it is part of, evens the loads out by more than what they fluctuate by, so none is
                taken back
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cluster.membership import Membership, MemberState, Placement, PlanMove
from cluster.ring import place
from storage.types import ShardId

GAIN_MIN: Final = 1.5
"""By how much a transfer must lower the sum of the squares of loads, in squares of the mean weight of a shard. One of
equal shards from a node with two more lowers it by 2; what fluctuates by a seventh moves nothing."""


class Health(NamedTuple):
    """What the coordinator sees of a node."""

    is_up: bool
    for_s: float
    """How long it has been so."""


@dataclass(frozen=True)
class Limits:
    """How much is done at a time, and how long is waited before something is believed."""

    moves_max: int = 4
    """Shards on the move at the same time."""
    transfers_max: int = 2
    """Leaderships handed over at once."""
    dead_after_s: float = 600.0
    steady_s: float = 5.0
    """A node that has just come is not given anything yet."""
    load_min: float = 10.0
    """A shard that does less than this is idle, and as idle as others that do less."""
    patience_s: float = 30.0
    """A planned copy is given up when its node is away for this long."""


class Transfer(NamedTuple):
    shard: ShardId
    giver: str
    taker: str


@dataclass(frozen=True)
class Decisions:
    """What to propose and to ask for, in this order."""

    states: tuple[tuple[str, MemberState], ...] = ()
    moves: tuple[PlanMove, ...] = ()
    removals: tuple[str, ...] = ()
    transfers: tuple[Transfer, ...] = ()


@dataclass
class _View:
    """Who may do what, as the planner sees it."""

    membership: Membership
    health: Mapping[str, Health]
    limits: Limits
    active: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    steady: set[str] = field(default_factory=set)
    """Active, and up for long enough to be given something."""

    def __post_init__(self) -> None:
        for name, member in self.membership.members.items():
            is_up, for_s = self.health.get(name, Health(False, 0.0))
            state = _state(member.state, self.health.get(name), self.limits)
            if state is MemberState.GONE:
                self.gone.add(name)
            elif state is MemberState.ACTIVE:
                self.active.add(name)
                if is_up and for_s >= self.limits.steady_s:
                    self.steady.add(name)

    def is_up(self, name: str) -> bool:
        return name in self.health and self.health[name].is_up and name not in self.gone

    def living(self, names: Collection[str]) -> int:
        return sum(self.is_up(name) for name in names)

    def intended(self, placement: Placement) -> tuple[str, ...]:
        """Return who shall hold the shard as planned, or as it is where the plan waits for a node for too long."""
        late = [
            name
            for name in placement.following
            if name not in placement.members
            and not self.is_up(name)
            and self.health.get(name, Health(False, 0.0)).for_s >= self.limits.patience_s
        ]
        return placement.members if late else placement.following or placement.members


def plan(
    membership: Membership,
    health: Mapping[str, Health],
    leaders: Mapping[ShardId, str],
    limits: Limits,
    *,
    loads: Mapping[ShardId, float] | None = None,
    resting: Collection[ShardId] = (),
) -> Decisions:
    """Return what to do next.

    health   of each node that was looked at; one that was not is not up
    leaders  of each shard that has one, as far as known
    loads    what each shard's leader has to do, in the unit of `Limits.load_min`; equal if not given
    resting  shards whose leadership was moved a short while ago, and stays where it is
    """
    view = _View(membership, health, limits)
    states = [
        (name, state)
        for name, member in membership.members.items()
        if (state := _state(member.state, health.get(name), limits)) is not member.state
    ]
    moves = [] if membership.moves_paused else _moves(view)
    held = {name for placed in membership.placements.values() for name in placed.holders}
    removals = [
        name
        for name, member in membership.members.items()
        if member.is_replaced and name not in held and member.state is not MemberState.ACTIVE
    ]
    transfers = _transfers(view, leaders, loads or {}, resting)
    return Decisions(tuple(states), tuple(moves), tuple(removals), tuple(transfers))


def targets(membership: Membership, health: Mapping[str, Health], limits: Limits) -> Mapping[ShardId, tuple[str, ...]]:
    """Return who shall hold each shard in the end, if nothing else changes."""
    return _targets(_View(membership, health, limits))


def _state(state: MemberState, health: Health | None, limits: Limits) -> MemberState:
    """Return the state that a node is in by what is seen of it; draining is an operator's word, and stays."""
    if health is None or state is MemberState.DRAINING:
        return state
    if state is MemberState.ACTIVE and not health.is_up and health.for_s >= limits.dead_after_s:
        return MemberState.GONE
    if state is MemberState.GONE and health.is_up and health.for_s >= limits.steady_s:
        return MemberState.ACTIVE
    return state


# moves


def _targets(view: _View) -> Mapping[ShardId, tuple[str, ...]]:
    """Return who shall hold each shard.

    Who drains leaves when another has come in its place; only where there are too few nodes for all copies, which an
    operator has then said is well, it leaves all the same.
    """
    members = view.membership.members
    return place(
        view.active,
        len(view.membership.placements),
        view.membership.copies,
        zones={name: one.zone for name, one in members.items()},
        held={shard: view.intended(one) for shard, one in view.membership.placements.items()},
        closed=view.active - view.steady,
        spare=view.gone if len(view.active) < view.membership.copies else members.keys() - view.active,
        heirs={one.replaces: name for name, one in members.items() if one.replaces},
        fixed=[shard for shard, one in view.membership.placements.items() if one.following],
    )


def _moves(view: _View) -> list[PlanMove]:
    placements = view.membership.placements
    if not view.steady:
        return []
    wanted = _targets(view)
    room = view.limits.moves_max - sum(1 for one in placements.values() if one.following)
    changed: list[tuple[int, int, ShardId]] = []
    moves: list[PlanMove] = []
    for shard, placement in sorted(placements.items()):
        target = wanted[shard]
        if set(target) == set(placement.following or placement.members):
            continue
        if placement.following:  # that plan cannot be carried out: another in its place, or none
            if set(target) == set(placement.members) or _may_move(view, placement, target):
                moves.append(PlanMove(shard, placement.generation, target))
            elif view.intended(placement) == placement.members:
                moves.append(PlanMove(shard, placement.generation, placement.members))
        elif _may_move(view, placement, target):
            lost = sum(name in view.gone for name in placement.members)
            leaving = sum(name not in view.active for name in placement.members)
            changed.append((-lost, -leaving, shard))
    for _, _, shard in sorted(changed)[: max(0, room)]:
        moves.append(PlanMove(shard, placements[shard].generation, wanted[shard]))
    return moves


def _may_move(view: _View, placement: Placement, target: Sequence[str]) -> bool:
    """Whether a majority can hand the shard over, and can take it, with no fewer living copies than before."""
    now, then = placement.members, tuple(target)
    living_now, living_then = view.living(now), view.living(then)
    if not then or not _is_majority(living_now, now) or not _is_majority(living_then, then):
        return False
    if living_then < min(living_now, len(then)):
        return False
    # Where nobody has to leave, what is away may be back soon: loads are evened out later.
    return living_now == len(now) or any(name not in view.active for name in now)


def _is_majority(count: int, names: Sequence[str]) -> bool:
    return 2 * count > len(names)


# leaderships


def _transfers(
    view: _View, leaders: Mapping[ShardId, str], loads: Mapping[ShardId, float], resting: Collection[ShardId]
) -> list[Transfer]:
    board = _Board(view, leaders, loads, resting)
    while len(board.transfers) < view.limits.transfers_max and board.leave_draining():
        pass
    while len(board.transfers) < view.limits.transfers_max and board.improve():
        pass
    return board.transfers[: view.limits.transfers_max]


class _Board:
    """Who leads what, and what would be if leaderships were moved."""

    def __init__(
        self, view: _View, leaders: Mapping[ShardId, str], loads: Mapping[ShardId, float], resting: Collection[ShardId]
    ) -> None:
        placements = view.membership.placements
        self.transfers: list[Transfer] = []
        self._view = view
        self._leader = {shard: name for shard, name in sorted(leaders.items()) if shard in placements}
        mean = sum(loads.get(shard, 0.0) for shard in placements) / max(1, len(placements))
        # Every shard costs something, and one under load more.
        unit = max(mean, view.limits.load_min)
        self._weight = {shard: 1.0 + loads.get(shard, 0.0) / unit for shard in placements}
        self._gain_min = GAIN_MIN * (sum(self._weight.values()) / max(1, len(placements))) ** 2
        self._load = dict.fromkeys(sorted(view.membership.members), 0.0)
        for shard, name in self._leader.items():
            if name in self._load:
                self._load[name] += self._weight[shard]
        self._takers = {
            shard: [name for name in sorted(placements[shard].members) if name in view.steady and name != leader]
            for shard, leader in self._leader.items()
            if not placements[shard].following and shard not in resting
        }

    def leave_draining(self) -> bool:
        """Move a leadership off a node that is to have none."""
        for shard, takers in self._takers.items():
            giver = self._leader[shard]
            member = self._view.membership.members.get(giver)
            if takers and member is not None and member.state is MemberState.DRAINING and self._view.is_up(giver):
                self._move(shard, min(takers, key=lambda name: (self._load[name], name)))
                return True
        return False

    def improve(self) -> bool:
        """Make the chain of transfers that evens loads out most, from its end; False if none is worth it."""
        best: tuple[float, list[tuple[ShardId, str]]] = (self._gain_min, [])
        for giver in sorted(self._load, key=lambda name: (-self._load[name], name)):
            if self._view.is_up(giver):
                for chain in self._chains(giver):
                    gain = self._gain(chain)
                    if gain > best[0] + 1e-9:
                        best = (gain, chain)
        for shard, taker in reversed(best[1]):  # the last first: nobody has more meanwhile
            self._move(shard, taker)
        return bool(best[1])

    def _chains(self, giver: str) -> list[list[tuple[ShardId, str]]]:
        """Return chains that begin with a leadership of the giver; each further one makes room for the one before."""
        edges: dict[str, dict[str, list[ShardId]]] = {}
        for shard, takers in self._takers.items():
            for taker in takers:
                edges.setdefault(self._leader[shard], {}).setdefault(taker, []).append(shard)
        chains = [[(shard, taker)] for taker, shards in edges.get(giver, {}).items() for shard in shards]
        reached: dict[str, list[tuple[ShardId, str]]] = {giver: []}
        waiting = deque([giver])
        while waiting:
            name = waiting.popleft()
            for taker, shards in sorted(edges.get(name, {}).items()):
                if taker not in reached:
                    lightest = min(shards, key=lambda shard: (self._weight[shard], shard))
                    reached[taker] = [*reached[name], (lightest, taker)]
                    chains.append(reached[taker])
                    waiting.append(taker)
        return chains

    def _gain(self, chain: list[tuple[ShardId, str]]) -> float:
        """Return by how much the chain would lower the sum of the squares of loads."""
        change: dict[str, float] = {}
        for shard, taker in chain:
            giver = self._leader[shard]
            change[giver] = change.get(giver, 0.0) - self._weight[shard]
            change[taker] = change.get(taker, 0.0) + self._weight[shard]
        return sum(self._load[name] ** 2 - (self._load[name] + by) ** 2 for name, by in change.items())

    def _move(self, shard: ShardId, taker: str) -> None:
        giver = self._leader[shard]
        self.transfers.append(Transfer(shard, giver, taker))
        self._load[giver] -= self._weight[shard]
        self._load[taker] += self._weight[shard]
        self._leader[shard] = taker
        del self._takers[shard]  # moved once is enough for now
