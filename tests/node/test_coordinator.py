"""The coordinator in a simulated world: nodes join, die, drain and return, and the shards end up where they should."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random

import cbor2
import pytest

from cluster.control import CONTROL_GROUP
from cluster.membership import Membership, MemberState, PlanMove, group_id
from node.nodes import Nodes
from node.replicas import Replicas, group_of
from storage.errors import Conflict, InvalidParameter, Unavailable
from storage.keys import record_key
from storage.types import ShardId
from storage.word_files import stored_words
from tests.node.cluster_of import EVENTUALLY, Site, on_a_cluster
from tests.sim.cluster import NoAnswer, Refused

KEYS = list(range(60))


def membership(site: Site, name: str = "n1") -> Membership:
    found: Membership = site.node(name).control.machine.membership
    return found


def held(site: Site, name: str = "n1") -> Counter[str]:
    return Counter(one for placed in membership(site, name).placements.values() for one in placed.members)


def is_at_rest(site: Site, name: str = "n1") -> bool:
    return not any(placed.following for placed in membership(site, name).placements.values())


async def until(site: Site, holds: Callable[[], bool], within_s: float = 60.0) -> None:
    """Return when something is so in the simulated world."""
    end_s = site.world.loop.now_s + within_s
    while not holds():
        assert site.world.loop.now_s < end_s, f"not so after {within_s} s: {dict(held(site))}"
        await asyncio.sleep(0.2)


async def change(site: Site, work: Callable[[Nodes], object], by: str = "n1") -> None:
    await site.ask(by, lambda database: work(database.nodes))  # type: ignore[arg-type, return-value]


async def move(site: Site, shard: int, *to: str) -> None:
    """Have a shard go to these nodes; return when it is there."""
    shard_id = ShardId(shard)
    placed = membership(site).placements[shard_id]
    await site.node("n1").router.control_change(PlanMove(shard_id, placed.generation, list(to)))
    await until(site, lambda: set(membership(site).placements[shard_id].members) == set(to) and is_at_rest(site))


def test_a_shard_comes_back_to_who_once_had_a_seat_there() -> None:
    """The seat that a node was given in a generation, as its disk was new, says nothing of the ones after it."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        await site.insert("n2", KEYS)
        for shard in (0, 1):
            await move(site, shard, "n2", "n3", "n4")
            await move(site, shard, "n1", "n2", "n3")
        site.kill("n2")
        site.world.machines["n2"].lose_disk()
        site.world.start("n2")
        await site.ready()
        await move(site, 0, "n1", "n3", "n4")
        await move(site, 0, "n1", "n2", "n4")
        assert sorted(await site.found("n2")) == KEYS
        site.kill("n2")
        site.world.start("n2")
        await site.ready()
        assert sorted(await site.found("n2", EVENTUALLY)) == KEYS

    on_a_cluster(script, nodes=4)


def test_a_node_joins_and_takes_its_share_of_everything() -> None:
    """Rows that were there are there, from the newcomer too; it holds, leads and votes like any other."""

    async def script(site: Site) -> None:
        await site.create(shards=4)
        await site.insert("n2", KEYS)
        await site.world.join("n4", "n2", zone="z")
        await site.ready("n4")
        await until(site, lambda: held(site) == dict.fromkeys(("n1", "n2", "n3", "n4"), 3) and is_at_rest(site))
        assert sorted(await site.found("n4")) == KEYS
        await until(site, lambda: any(host.is_leader for host in site.node("n4").shards.values()), 120)
        assert "n4" in site.node("n1").placing.control_voters and membership(site).members["n4"].zone == "z"
        site.kill("n4")
        await asyncio.sleep(1.0)
        site.world.start("n4")
        await site.ready("n4")
        await site.insert("n4", [1000])
        assert sorted(await site.found("n1")) == [*KEYS, 1000]

    on_a_cluster(script, shards=4)


def test_a_node_that_forgot_comes_back_to_those_who_came_since() -> None:
    """None of those that formed the cluster is left to ask, or the node was never one: the others tell it, and it keeps
    from elections where it may have voted."""

    async def script(site: Site) -> None:
        await site.create(shards=4)
        await site.insert("n1", KEYS)
        for guest in ("n4", "n5"):
            await site.world.join(guest, "n3")
        await site.ready()
        for leaver in ("n1", "n2"):
            await change(site, lambda nodes, one=leaver: nodes.drain(one), by="n3")  # type: ignore[misc]
        await until(site, lambda: held(site, "n3").keys() == {"n3", "n4", "n5"} and is_at_rest(site, "n3"))
        for leaver in ("n1", "n2"):
            while True:
                with contextlib.suppress(Conflict, InvalidParameter):
                    await change(site, lambda nodes, one=leaver: nodes.remove(one), by="n3")  # type: ignore[misc]
                    break
                await asyncio.sleep(0.5)
            site.kill(leaver)
        await asyncio.sleep(5.0)
        for name in ("n3", "n4"):
            machine = site.world.machines[name]
            site.kill(name)
            machine.set_aside(site.world.settings(name), remembers=True)
            site.world.start(name)
            await site.ready(name)
            assert site.node(name).identity.abstains and sorted(await site.found(name)) == KEYS

    on_a_cluster(script, shards=4)


def test_newcomers_need_nobody_who_is_away() -> None:
    """Who never voted anywhere takes its share without asking those that are down, however many they are."""

    async def script(site: Site) -> None:
        await site.create(shards=4)
        await site.insert("n1", KEYS)
        for guest in ("n4", "n5"):
            await site.world.join(guest, "n1")
        await site.ready()
        for leaver in ("n4", "n5"):
            await change(site, lambda nodes, one=leaver: nodes.drain(one))  # type: ignore[misc]
        await until(site, lambda: held(site).keys() == {"n1", "n2", "n3"} and is_at_rest(site))
        for leaver in ("n4", "n5"):
            site.kill(leaver)
        await site.world.join("n6", "n1")
        await site.ready("n6")
        assert sorted(await site.found("n6")) == KEYS

    on_a_cluster(script, shards=4)


def test_who_may_not_join_changes_nothing() -> None:
    """A name that is taken, an address that is taken, a node to replace that there is not."""

    async def script(site: Site) -> None:
        await until(site, lambda: bool(membership(site).members))
        await asyncio.sleep(5.0)
        before = membership(site).to_plain()["members"]
        for name, replaces, kind in (("n2", "", Conflict), ("n4", "n9", InvalidParameter)):
            with pytest.raises(kind):
                await site.world.join(name, "n1", replaces=replaces)
        assert membership(site).to_plain()["members"] == before

    on_a_cluster(script, shards=1)


@pytest.mark.parametrize("coordinator_dies", [False, True])
def test_a_dead_node_s_copies_are_rebuilt_after_its_time(coordinator_dies: bool) -> None:
    """Not before; also if it is the coordinator that dies; and when it is back it takes its share again."""

    async def script(site: Site) -> None:
        await site.create(shards=4)
        await site.insert("n1", KEYS)
        leader = site.node("n1").control.leader
        assert leader is not None
        dead = leader if coordinator_dies else next(name for name in site.others(leader) if name != "n1")
        by = next(name for name in site.others(dead))
        await asyncio.sleep(6.0)
        site.kill(dead)
        await asyncio.sleep(15.0)
        assert held(site, by)[dead] == 3 and membership(site, by).members[dead].state is MemberState.ACTIVE
        await until(site, lambda: held(site, by)[dead] == 0 and is_at_rest(site, by), 60)
        assert membership(site, by).members[dead].state is MemberState.GONE
        assert sorted(await site.found(by)) == KEYS
        site.world.start(dead)
        await until(site, lambda: held(site, by)[dead] == 3 and is_at_rest(site, by), 60)
        await site.ready(dead)
        assert sorted(await site.found(dead)) == KEYS

    on_a_cluster(script, nodes=4, copies=3, shards=4, dead_after_s=20.0)


def test_draining_refuses_what_leaves_too_little_and_moves_the_rest() -> None:
    """A drained node holds and leads nothing, and only then it can be removed; too few nodes are refused."""

    async def script(site: Site) -> None:
        await site.create(shards=4)
        await site.insert("n1", KEYS)
        with pytest.raises(InvalidParameter, match="there is no node n9"):
            await change(site, lambda nodes: nodes.remove("n9"))
        with pytest.raises((Unavailable, Conflict), match="drain it first"):
            await change(site, lambda nodes: nodes.remove("n2"))
        await change(site, lambda nodes: nodes.drain("n2"))
        with pytest.raises(InvalidParameter, match="join another node first"):
            await change(site, lambda nodes: nodes.drain("n3"))
        await until(site, lambda: held(site)["n2"] == 0 and is_at_rest(site), 60)
        await until(site, lambda: "n2" not in site.node("n1").placing.control_voters)
        assert sorted(await site.found("n2")) == KEYS, "it still answers"
        await change(site, lambda nodes: nodes.remove("n2"))
        assert list(membership(site).members) == ["n1", "n3", "n4"]
        assert sorted(await site.found("n3")) == KEYS

    on_a_cluster(script, nodes=4, copies=3, shards=4)


def test_a_replica_that_missed_a_generation_takes_it_from_whom_it_began_with() -> None:
    """It asked those of the generation that it knew, and they have died since: others who came have what it needs."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", KEYS)
        stays, leaves, late = membership(site).placements[ShardId(0)].members
        comes, other = (name for name in membership(site).members if name not in (stays, leaves, late))
        site.world.wire.cut_apart([late], [stays, leaves, comes, other])
        placed = membership(site, comes).placements[ShardId(0)]
        await site.node(comes).router.control_change(PlanMove(ShardId(0), placed.generation, [stays, comes, late]))
        await until(site, lambda: membership(site, comes).placements[ShardId(0)].generation == 1)
        await until(site, lambda: ShardId(0) in site.node(comes).shards)
        behind, snapshots = site.node(late).shards[ShardId(0)], site.node(late).snapshots
        assert snapshots is not None
        for name in (stays, leaves):
            site.kill(name)
        await asyncio.sleep(20.0)
        snapshots.begin(group_of(ShardId(0)), behind.machine.position + 1, stays)
        await asyncio.sleep(1.0)
        site.world.wire.mend()
        await site.ready(late)
        assert sorted(await site.found(late)) == KEYS

    on_a_cluster(script, nodes=5, copies=3, shards=1)


def test_a_crash_while_a_shard_is_dropped_leaves_no_word_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go before the manifest, without which no later start would look for them."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", KEYS)
        leaver = next(iter(membership(site).placements[ShardId(0)].members))
        other = next(name for name in ("n1", "n2", "n3", "n4") if name != leaver)
        machine = site.world.machines[leaver]
        machine.store.commit([(record_key("words", 0, 1, 1), cbor2.dumps([b"of this", 1, 0]))])

        def crash(*args: object) -> None:
            site.kill(leaver)

        monkeypatch.setattr("node.replicas.drop_all_words", crash)
        await change(site, lambda nodes: nodes.drain(leaver), by=other)
        await until(site, lambda: not machine.is_up)
        monkeypatch.undo()
        site.world.start(leaver)
        await site.ready(leaver)
        await until(site, lambda: not stored_words(machine.store, ShardId(0)))

    on_a_cluster(script, nodes=4, copies=3, shards=1)


def test_new_voters_that_missed_their_election_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All voters of the control group leave at once, cut off as they do: later the new ones learn that they vote."""
    go_on = Replicas._go_on

    async def script(site: Site) -> None:
        old, new = ["n1", "n2", "n3"], ["n4", "n5", "n6"]
        await until(site, lambda: bool(membership(site).members))
        for name in new:
            await site.world.join(name, "n1")
            await site.ready(name)
        await until(site, lambda: set(site.node("n1").placing.control_voters) == {*old, "n4", "n5"})

        def cut_off(self: Replicas, slot: int) -> None:
            if slot == CONTROL_GROUP and set(self.hosts[slot].machine.generation.members) == set(new):
                site.world.wire.cut_apart(old, new)
            go_on(self, slot)

        monkeypatch.setattr(Replicas, "_go_on", cut_off)
        await asyncio.gather(*(change(site, partial(Nodes.drain, name=name, force=True), "n2") for name in old))
        await asyncio.sleep(20.0)
        monkeypatch.undo()
        site.world.wire.mend()
        await until(site, lambda: set(site.node("n6").placing.control_voters) == set(new))
        await until(site, lambda: not any(held(site, "n6")[name] for name in old) and is_at_rest(site, "n6"), 120)

    on_a_cluster(script, shards=1)


def test_what_is_said_too_early_is_kept_of_one_generation() -> None:
    """However many generations others speak in that are not open here, the newest is kept, and of it the last words."""

    async def script(site: Site) -> None:
        replicas = site.node("n1").replicas
        for generation in (*range(1, 200), 7, *[199] * 100):
            replicas._not_open(group_id(1, generation), "n2", {"type": generation}, ())
        assert [(slot, group) for slot, (group, _) in replicas._early.items()] == [(1, group_id(1, 199))]
        assert 1 < len(replicas._early[1][1]) < 100

    on_a_cluster(script, shards=1)


def test_leaderships_come_back_to_a_node_that_was_away() -> None:
    """After a restart a node leads nothing; a while later all lead the same again, or one more."""

    async def script(site: Site) -> None:
        await asyncio.sleep(70)
        for _ in range(2):
            site.kill("n2")
            await asyncio.sleep(3)
            site.world.start("n2")
            await site.ready("n2")

        def is_even() -> bool:
            return all(sum(host.is_leader for host in node.shards.values()) == 2 for _, node in site.world.nodes())

        await asyncio.sleep(1.0)
        await until(site, is_even, 240)
        await asyncio.sleep(60)
        assert is_even()

    on_a_cluster(script, shards=6)


@pytest.mark.parametrize("is_down", [True, False], ids=["down", "cut off"])
def test_a_node_that_was_away_finds_a_cluster_that_has_changed(is_down: bool) -> None:
    """Meanwhile nodes came, and one of them leads: it learns from whom it still knows, and comes back whole."""

    async def script(site: Site) -> None:
        await site.create(shards=4)
        await site.insert("n2", KEYS)
        await asyncio.sleep(5.0)
        if is_down:
            site.kill("n1")
        else:
            site.world.wire.cut_apart(["n1"], ["n2", "n3", "n4", "n5"])
        await until(site, lambda: membership(site, "n2").members["n1"].state is MemberState.GONE)
        for name in ("n4", "n5"):
            await site.world.join(name, "n2")
            await site.ready(name)
        await until(site, lambda: set(site.node("n2").placing.control_voters) == {"n2", "n3", "n4", "n5"})
        leader = site.node("n2").control.leader
        assert leader is not None
        if leader != "n5":
            site.node(leader).control.raft.transfer("n5")
            site.node(leader).control.poke()
        await until(site, lambda: site.node("n2").control.leader == "n5")
        if is_down:
            site.world.start("n1")
        else:
            site.world.wire.mend()
        await site.ready("n1")
        assert sorted(await site.found("n1")) == KEYS
        assert list(site.node("n1").members) == ["n1", "n2", "n3", "n4", "n5"]
        await until(site, lambda: membership(site).members["n1"].state is MemberState.ACTIVE and held(site)["n1"] >= 2)

    on_a_cluster(script, shards=4, dead_after_s=20.0)


@pytest.mark.parametrize("seed", [1, 4])
def test_coming_and_going_under_writes_ends_even_and_whole(seed: int) -> None:
    """Nodes join, drain, stay after all, die and return; every answered row is there, and all hold the same."""
    dice = Random(seed)

    async def script(site: Site) -> None:
        await site.create(shards=4)
        answered: set[int] = set()
        asked: set[int] = set()

        async def write() -> None:
            for key in itertools.count():
                if ready := site.world.ready():
                    asked.add(key)
                    with contextlib.suppress(NoAnswer, Refused, Unavailable):
                        await site.insert(dice.choice(ready), [key])
                        answered.add(key)
                await asyncio.sleep(0.3)

        writing = asyncio.ensure_future(write())
        for _ in range(10):
            await asyncio.sleep(dice.uniform(2, 12))
            with contextlib.suppress(NoAnswer, Refused, Unavailable, InvalidParameter):
                await disturb(site, dice)
        for name in site.world.machines:
            site.world.start_if_down(name)
        await site.ready()
        writing.cancel()

        def is_even() -> bool:
            members = membership(site).members.values()
            load = [held(site)[one.name] for one in members if one.state is MemberState.ACTIVE]
            leaving = [held(site)[one.name] for one in members if one.state is MemberState.DRAINING]
            return is_at_rest(site) and not any(leaving) and max(load) - min(load) <= 1

        await until(site, is_even, 200)
        for name in site.world.machines:
            assert answered <= set(await site.found(name)) <= asked

    on_a_cluster(script, shards=4, seed=seed)


async def disturb(site: Site, dice: Random) -> None:
    """Have one node come, go, or die for a while."""
    by, count = dice.choice(site.world.ready()), len(site.world.machines)
    members = membership(site, by).members
    what = dice.choice(("join", "drain", "kill", "stay"))
    if what == "join" and count < 6:
        await site.world.join(f"n{count + 1}", by)
    elif what == "drain":
        await change(site, lambda nodes: nodes.drain(dice.choice(list(members))), by)
    elif what == "kill":
        site.kill(by)
        await asyncio.sleep(dice.uniform(0.5, 8))
        site.world.start_if_down(by)
    elif what == "stay":
        for one in [name for name, one in members.items() if one.state is MemberState.DRAINING]:
            await change(site, partial(Nodes.drain, name=one, undo=True), by)
