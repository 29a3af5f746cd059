"""The planner, held against a cluster that is a table: every plan is carried out, and rules are looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from cluster.membership import (
    FormCluster,
    Member,
    Membership,
    MemberState,
    Moved,
    PauseMoves,
    PlanMove,
    RemoveMember,
    SetMember,
)
from cluster.planner import Decisions, Health, Limits, Transfer, plan, targets
from storage.types import ShardId

LIMITS = Limits(moves_max=2, transfers_max=2)
UP, DEAD, AWAY = Health(True, 60.0), Health(False, 1_000.0), Health(False, 60.0)


def formed(nodes: int, *, shards: int = 8, copies: int = 3) -> Membership:
    membership = Membership()
    names = {f"n{i}": f"host:{i}" for i in range(1, nodes + 1)}
    membership.form(FormCluster("c", names, copies), shards)
    return membership


def add(membership: Membership, name: str, **facts: str) -> None:
    known = membership.members.get(name)
    membership.change(SetMember(name, known.peer if known else name, ticket=known.ticket if known else name, **facts))


@dataclass
class Model:
    """A cluster in which what was planned happens when the test says so."""

    membership: Membership
    health: dict[str, Health] = field(default_factory=dict)
    leaders: dict[ShardId, str] = field(default_factory=dict)
    limits: Limits = LIMITS
    moved: int = 0
    """Copies that were made."""

    def __post_init__(self) -> None:
        self.health = {name: self.health.get(name, UP) for name in self.membership.members} | self.health

    def up(self, name: str) -> bool:
        return self.health.get(name, DEAD).is_up

    def decide(self, loads: Mapping[ShardId, float] | None = None) -> Decisions:
        """Ask the planner, check what it must never do, and propose what it says."""
        before = self.membership.copy()
        decisions = plan(self.membership, self.health, self.leaders, self.limits, loads=loads)
        assert decisions == plan(before, self.health, self.leaders, self.limits, loads=loads), "the same again"
        for name, state in decisions.states:
            add(self.membership, name, state=state)
        for name in decisions.removals:
            self.membership.change(RemoveMember(name))
        for move in decisions.moves:
            placement = self.membership.placements[move.shard]
            living = [name for name in move.members if self.up(name)]
            added = set(move.members) - set(placement.holders)
            assert not placement.following or set(placement.following) != set(move.members), "nothing is said twice"
            assert all(self.up(name) for name in added), "nothing goes to a node that is away"
            if set(move.members) != set(placement.members):
                assert 2 * len(living) > len(move.members), "a majority can take it"
                assert 2 * sum(map(self.up, placement.members)) > len(placement.members), "a majority can give it"
                assert len(living) >= min(sum(map(self.up, placement.members)), len(move.members))
            self.membership.change(move)
        assert self.under_way <= max(
            self.limits.moves_max, sum(1 for one in before.placements.values() if one.following)
        )
        assert len(decisions.transfers) <= self.limits.transfers_max
        return decisions

    @property
    def under_way(self) -> int:
        return sum(1 for one in self.membership.placements.values() if one.following)

    def finish(self, shard: ShardId) -> None:
        """The shard's log hands over, if those concerned are there."""
        placement = self.membership.placements[shard]
        if placement.following and all(map(self.up, placement.following)):
            self.moved += len(set(placement.following) - set(placement.members))
            self.membership.change(Moved(shard, placement.generation + 1, placement.following, 1))
            if shard in self.leaders and self.leaders[shard] not in placement.following:
                self.leaders[shard] = placement.following[0]

    def hand(self, transfer: Transfer) -> None:
        assert self.leaders[transfer.shard] == transfer.giver != transfer.taker
        assert transfer.taker in self.membership.placements[transfer.shard].members and self.up(transfer.taker)
        self.leaders[transfer.shard] = transfer.taker

    def settle(self, rounds: int = 300) -> None:
        """Carry everything out until nothing is left to be done."""
        for _ in range(rounds):
            before, decisions = self.under_way, self.decide()
            for transfer in decisions.transfers:
                self.hand(transfer)
            for shard in list(self.membership.placements):
                self.finish(shard)
            if decisions == Decisions() and self.under_way == before == 0:
                return
        raise AssertionError("it never comes to rest")

    def load(self) -> Counter[str]:
        return Counter(name for one in self.membership.placements.values() for name in one.members)

    def spread(self) -> int:
        load = [self.load()[name] for name, one in self.membership.members.items() if one.state is MemberState.ACTIVE]
        return max(load) - min(load)


@pytest.mark.parametrize("nodes", range(3, 8))
@pytest.mark.parametrize("shards", [8, 64])
def test_a_node_that_joins_takes_its_share_and_nothing_else_moves(nodes: int, shards: int) -> None:
    """From n to n + 1 nodes exactly 1 / (n + 1) of the copies move, rounded down, and all of them to the new node."""
    model = Model(formed(nodes, shards=shards))
    add(model.membership, f"n{nodes + 1}")
    model.health[f"n{nodes + 1}"] = UP
    before = {shard: set(one.members) for shard, one in model.membership.placements.items()}
    model.settle()
    assert model.moved == shards * 3 // (nodes + 1) and model.spread() <= 1
    for shard, one in model.membership.placements.items():
        assert set(one.members) - before[shard] <= {f"n{nodes + 1}"}


def test_growing_and_shrinking_moves_no_more_than_it_must() -> None:
    """3 to 5 to 3 nodes: what comes is taken from all, what goes is given to all, and it ends as even as it began."""
    model = Model(formed(3))
    for name, ideal in (("n4", 6), ("n5", 4)):
        add(model.membership, name)
        model.health[name] = UP
        model.moved = 0
        model.settle()
        assert model.moved == ideal
    for name, ideal in (("n5", 4), ("n4", 6)):
        add(model.membership, name, state=MemberState.DRAINING)
        model.moved = 0
        model.settle()
        assert model.moved == ideal and model.load()[name] == 0 and model.spread() == 0


def test_the_heir_takes_what_the_replaced_node_had_and_nothing_else_moves() -> None:
    """`replace OLD NEW`: only copies of OLD move, all to NEW, and OLD may go."""
    model = Model(formed(5))
    before = {shard: set(one.members) for shard, one in model.membership.placements.items()}
    add(model.membership, "n9", replaces="n2")
    model.health["n9"] = UP
    model.health["n2"] = DEAD
    model.settle()
    for shard, one in model.membership.placements.items():
        assert set(one.members) == {{"n2": "n9"}.get(name, name) for name in before[shard]}
    assert "n2" not in model.membership.members and model.membership.members["n9"].replaces == ""


def test_who_was_to_make_room_is_removed_also_if_the_heir_is_replaced_itself() -> None:
    """OLD's heir is lost before it has anything, and another takes the heir's place: both go, and nothing waits."""
    model = Model(formed(5))
    add(model.membership, "n8", replaces="n2")
    add(model.membership, "n9", replaces="n8")
    model.health |= {"n8": DEAD, "n9": UP}
    model.settle()
    assert set(model.membership.members) == {"n1", "n3", "n4", "n5", "n9"}


def test_who_drains_stays_until_another_may_come() -> None:
    """No copy is given up for a node that has just joined; it is, where there are too few nodes for all copies."""
    model = Model(formed(3))
    add(model.membership, "n9", replaces="n2")
    model.health["n9"] = Health(True, 1.0)
    assert model.decide() == Decisions()
    model.health["n9"] = UP
    model.settle()
    assert all(len(one.members) == 3 for one in model.membership.placements.values())
    add(model.membership, "n1", state=MemberState.DRAINING)
    model.settle()
    assert all(set(one.members) == {"n3", "n9"} for one in model.membership.placements.values())


def test_a_node_that_is_back_in_time_costs_nothing() -> None:
    """Within the grace time nothing is planned for a node that is away; after it, its copies are rebuilt elsewhere."""
    model = Model(formed(4), {"n3": AWAY})
    assert model.decide() == Decisions()
    model.health["n3"] = DEAD
    assert model.decide().states == (("n3", MemberState.GONE),)
    model.settle()
    assert model.load()["n3"] == 0 and sum(model.load().values()) == 24
    model.health["n3"] = Health(True, 1.0)
    assert model.decide() == Decisions(), "not believed yet"
    model.health["n3"] = UP
    model.settle()
    assert model.membership.members["n3"].state is MemberState.ACTIVE and model.spread() == 0


def test_without_another_node_a_lost_copy_keeps_its_place() -> None:
    """Three copies on three nodes: one that is gone stays a member, as a smaller group bears no more."""
    model = Model(formed(3), {"n3": DEAD})
    model.settle()
    assert model.membership.members["n3"].state is MemberState.GONE and model.load()["n3"] == 8 and model.moved == 0


def test_lost_copies_come_before_drained_ones_and_those_before_even_loads() -> None:
    """With room for one move at a time, what is lost is replaced first, then what has to leave."""
    membership = formed(6)
    model = Model(membership, {"n1": DEAD}, limits=replace(LIMITS, moves_max=1))
    add(membership, "n2", state=MemberState.DRAINING)
    add(membership, "n7")
    model.health["n7"] = UP
    kinds = []
    for _ in range(60):
        for move in model.decide().moves:
            now = membership.placements[move.shard].members
            kinds.append(0 if "n1" in now else 1 if "n2" in now else 2)
            model.finish(move.shard)
    assert kinds == sorted(kinds) and set(kinds) >= {0, 1}


def test_a_pause_plans_nothing_and_what_is_planned_goes_on() -> None:
    model = Model(formed(3))
    add(model.membership, "n4")
    model.health["n4"] = UP
    assert len(model.decide().moves) == 2
    model.membership.change(PauseMoves(True))
    shard = next(shard for shard, one in model.membership.placements.items() if one.following)
    model.finish(shard)
    assert model.decide().moves == ()
    model.membership.change(PauseMoves(False))
    assert len(model.decide().moves) == 1


def test_a_copy_whose_node_went_away_is_given_up() -> None:
    """A plan that waits for a node is withdrawn, or goes to another node, when that one stays away."""
    model = Model(formed(3))
    add(model.membership, "n4")
    model.health["n4"] = UP
    planned = [move.shard for move in model.decide().moves]
    model.health["n4"] = Health(False, 5.0)
    assert model.decide() == Decisions(), "it may be back soon"
    model.health["n4"] = AWAY
    model.decide()
    assert not any(model.membership.placements[shard].following for shard in planned)
    model.health["n4"] = UP
    model.settle()
    assert model.load()["n4"] == 6


@pytest.mark.parametrize(
    ("zones", "most"),
    [
        pytest.param("aabbcc", 1, id="three of two"),
        pytest.param("abcd", 1, id="four of one"),
        pytest.param("aaabbc", 1, id="uneven"),
        pytest.param("aaabbb", 2, id="two zones"),
        pytest.param("abbbb", 2, id="two zones, one small"),
        pytest.param("aaaa", 3, id="one zone"),
    ],
)
def test_zones_are_kept_apart_while_there_are_enough(zones: str, most: int) -> None:
    """No zone has more copies of a shard than an even spread must give it, whatever was before the labels came."""
    model = Model(formed(len(zones), shards=16))
    for number, zone in enumerate(zones, 1):
        add(model.membership, f"n{number}", zone=zone)
    model.settle()
    for one in model.membership.placements.values():
        count = Counter(zones[int(name[1:]) - 1] for name in one.members)
        assert len(one.members) == 3 and max(count.values()) <= most


def test_nodes_without_a_zone_are_not_in_the_same_one() -> None:
    """While labels come node by node, nothing has to move."""
    model = Model(formed(4))
    add(model.membership, "n1", zone="a")
    model.settle()
    assert model.moved == 0


@pytest.mark.parametrize("seed", range(30))
def test_from_any_state_it_comes_to_rest_where_everything_is_as_it_should_be(seed: int) -> None:
    """Nodes come, go, die and return while moves are half done; in the end loads are even and nothing is planned."""
    dice = Random(seed)
    model = Model(formed(dice.randint(3, 6), shards=dice.choice((4, 8, 16)), copies=dice.randint(1, 3)))
    model.limits = replace(LIMITS, moves_max=dice.randint(1, 5))
    membership, zoned = model.membership, dice.random() < 0.3
    for step in range(dice.randint(5, 40)):
        names = list(membership.members)
        match dice.randrange(7):
            case 0 if len(names) < 9:
                name = f"m{step}"
                add(membership, name, zone=dice.choice("abc") if zoned else "")
                model.health[name] = Health(True, 0.0)
            case 1:
                add(membership, dice.choice(names), state=dice.choice(("draining", "active")))
            case 2:
                model.health[dice.choice(names)] = dice.choice((UP, AWAY, DEAD, Health(True, 1.0), Health(False, 1.0)))
            case 3:
                old = dice.choice(names)
                if all(one.replaces != old for one in membership.members.values()):
                    add(membership, f"r{step}", replaces=old)
                    model.health[f"r{step}"] = UP
            case _:
                for transfer in model.decide().transfers:
                    if dice.random() < 0.5:
                        model.hand(transfer)
                for shard in list(membership.placements):
                    if dice.random() < 0.3:
                        model.finish(shard)
                    holders = [name for name in membership.placements[shard].members if model.up(name)]
                    if holders and model.leaders.get(shard) not in holders:
                        model.leaders[shard] = dice.choice(holders)
    for name, member in list(membership.members.items()):
        model.health[name] = UP
        if member.state is MemberState.DRAINING and dice.random() < 0.5:
            add(membership, name, state="active")
    for shard, one in membership.placements.items():
        if model.leaders.get(shard) not in one.members:
            model.leaders[shard] = dice.choice(one.members)
    model.settle()
    active = [name for name, one in membership.members.items() if one.state is MemberState.ACTIVE]
    copies = min(membership.copies, len(active))
    wanted = targets(membership, model.health, model.limits)
    for shard, one in membership.placements.items():
        assert set(one.members) == set(wanted[shard]) and len(one.members) == copies
        assert set(one.members) <= set(active)
    if not zoned:
        assert not active or model.spread() <= 1


# leaderships


def leading(*leaders: str) -> dict[ShardId, str]:
    return {ShardId(shard): name for shard, name in enumerate(leaders)}


def test_leaderships_are_spread_evenly() -> None:
    model = Model(formed(3), leaders=leading(*["n1"] * 8))
    model.settle()
    assert sorted(Counter(model.leaders.values()).values()) == [2, 3, 3]


def test_what_is_busy_counts_for_more() -> None:
    """One shard does as much as all others together: its leader leads little else."""
    loads = {ShardId(0): 700.0} | {ShardId(shard): 100.0 for shard in range(1, 8)}
    model = Model(formed(3), leaders=leading(*"n1 n2 n3".split() * 2, "n1", "n2"))
    for _ in range(20):
        for transfer in model.decide(loads).transfers:
            model.hand(transfer)
    counts = Counter(model.leaders.values())
    assert counts[model.leaders[ShardId(0)]] <= 2
    assert model.decide(loads).transfers == ()


def test_what_hardly_does_anything_counts_as_idle() -> None:
    """One entry now and then makes no shard busier than those that have none."""
    loads = {ShardId(shard): 0.01 * (shard % 3 == 0) for shard in range(8)}
    model = Model(formed(3), leaders=leading(*["n1"] * 8))
    for _ in range(20):
        for transfer in model.decide(loads).transfers:
            model.hand(transfer)
    assert sorted(Counter(model.leaders.values()).values()) == [2, 3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_loads_that_fluctuate_move_nothing_to_and_fro(seed: int) -> None:
    """Once spread, loads that go up and down by a seventh move no leadership, and what moves once is not taken back."""
    dice = Random(seed)
    model = Model(formed(5, shards=16), leaders={})
    model.leaders = {shard: dice.choice(one.members) for shard, one in model.membership.placements.items()}
    base = dict.fromkeys(model.leaders, 100.0)
    for _ in range(30):
        for transfer in model.decide(base).transfers:
            model.hand(transfer)
    assert model.decide(base).transfers == ()
    for _ in range(20):
        loads = {shard: load * dice.uniform(0.85, 1.15) for shard, load in base.items()}
        assert model.decide(loads).transfers == ()


@pytest.mark.parametrize("seed", range(30))
def test_leaders_are_as_even_as_places_allow(seed: int) -> None:
    """Equal shards: no chain of transfers could make the fullest node lead less, as a search of all chains finds."""
    dice = Random(seed)
    nodes, shards = dice.randint(3, 7), dice.choice((4, 8, 12))
    model = Model(formed(nodes, shards=shards))
    for name in model.membership.members:
        if dice.random() < 0.2:
            model.health[name] = AWAY
    placements = model.membership.placements
    model.leaders = {
        shard: dice.choice(ups)
        for shard, one in placements.items()
        if (ups := [name for name in one.members if model.up(name)])
    }
    model.settle()
    counts = Counter({name: 0 for name in model.membership.members if model.up(name)})
    counts.update(model.leaders.values())
    for name in counts:
        reached, waiting = {name}, [name]
        while waiting:
            at = waiting.pop()
            for shard, leader in model.leaders.items():
                if leader == at:
                    new = {one for one in placements[shard].members if model.up(one)} - reached
                    reached |= new
                    waiting += new
        assert counts[name] - min(counts[one] for one in reached) <= 1


def test_a_draining_node_gives_its_leaderships_away_first() -> None:
    model = Model(formed(3), leaders=leading(*"n1 n2 n3".split() * 2, "n1", "n2"))
    add(model.membership, "n2", state=MemberState.DRAINING)
    model.membership.change(PauseMoves(True))
    model.settle()
    assert "n2" not in model.leaders.values()


def test_a_shard_on_the_move_or_at_rest_keeps_its_leader() -> None:
    membership = formed(3)
    membership.change(PlanMove(ShardId(0), 0, ("n1", "n2")))
    health = dict.fromkeys(membership.members, UP)
    moved = plan(membership, health, leading("n1", "n1", "n1", "n1"), LIMITS, resting={ShardId(1)}).transfers
    assert {one.shard for one in moved} == {2, 3}


def test_members_and_states_are_what_they_are_called() -> None:
    """The state of a member is what the log says; a plan never changes a membership by itself."""
    membership = formed(3)
    plain = membership.to_plain()
    plan(membership, dict.fromkeys(membership.members, DEAD), {}, LIMITS)
    assert membership.to_plain() == plain
    assert membership.members["n1"] == Member("n1", "host:1")
