"""Replicas that differ, and chunks that are not what they were: found, told, and made good from the others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cluster.machine import StateMachine
from cluster.shard import Shard
from node.cluster_check import Finding, finding_of
from node.healing import Verdict, judge, mark_key
from node.replicas import group_of
from node.scrub import Scrub
from storage.keys import chunk_key
from storage.types import CollectionId, ShardId, Tick
from tests.node.cluster_of import Site, on_a_cluster
from tests.sim.witness import digest_of as witness_digest

S0 = ShardId(0)
A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize(
    ("digests", "verdict", "right", "wrong", "silent"),
    [
        pytest.param({"n1": A}, "alone", "n1", "", "", id="nobody to compare with"),
        pytest.param({"n1": A, "n2": A, "n3": A}, "equal", "n1 n2 n3", "", "", id="all are equal"),
        pytest.param({"n1": A, "n2": A, "n3": None}, "equal", "n1 n2", "", "n3", id="one says nothing"),
        pytest.param({"n1": A, "n2": None, "n3": None}, "equal", "n1", "", "n2 n3", id="only the leader is there"),
        pytest.param({"n1": A, "n2": A, "n3": B}, "diverged", "n1 n2", "n3", "", id="a follower is wrong"),
        pytest.param({"n1": B, "n2": A, "n3": A}, "diverged", "n2 n3", "n1", "", id="the leader is wrong"),
        pytest.param({"n1": A, "n2": B, "n3": C}, "undecided", "", "n1 n2 n3", "", id="all differ"),
        pytest.param({"n1": A, "n2": B, "n3": None}, "undecided", "", "n1 n2", "n3", id="half is no majority"),
        pytest.param({"n1": A, "n2": B}, "tied", "n1", "n2", "", id="two differ"),
        pytest.param({"n1": A, "n2": None}, "equal", "n1", "", "n2", id="one of two says nothing"),
        pytest.param(dict.fromkeys("pqrs", A) | {"n1": B}, "diverged", "p q r s", "n1", "", id="four of five"),
        pytest.param({"n1": A, "p": A, "q": B, "r": B}, "undecided", "", "n1 p q r", "", id="two against two"),
        pytest.param({"n1": A, "n2": A, "n3": B, "n4": None, "n5": None}, "undecided", "", "n1 n2 n3", "n4 n5",
                     id="a majority counts all replicas, also silent ones"),
    ],
)  # fmt: skip
def test_who_is_right(digests: Mapping[str, bytes | None], verdict: str, right: str, wrong: str, silent: str) -> None:
    """More than half of all replicas are right; of two, the leader; else nobody knows. n1 leads."""
    judged = judge(digests, "n1")
    assert judged.verdict == verdict
    assert (" ".join(judged.right), " ".join(judged.wrong), " ".join(judged.silent)) == (right, wrong, silent)


def node_facts(**facts: object) -> dict[str, object]:
    return {"state": "read", "damaged": 0, "left": 0, **facts}


def group_facts(**facts: object) -> dict[str, object]:
    return {"verdict": "equal", "wrong": [], "rebuilt": [], "silent": [], **facts}


@pytest.mark.parametrize(
    ("node", "group", "expected"),
    [
        pytest.param({}, {}, Finding.CLEAN, id="all is well"),
        pytest.param({}, {"verdict": "alone"}, Finding.CLEAN, id="one node"),
        pytest.param({"damaged": 2}, {}, Finding.HEALED, id="chunks were made good"),
        pytest.param({"damaged": 2, "left": 1}, {}, Finding.DAMAGED, id="a chunk is lost"),
        pytest.param({"state": "silent"}, {}, Finding.INCOMPLETE, id="a node did not answer"),
        pytest.param({"state": "silent", "left": 1}, {}, Finding.DAMAGED, id="damage is worse than silence"),
        pytest.param({}, {"silent": ["n3"]}, Finding.INCOMPLETE, id="a replica gave no digest"),
        pytest.param({}, {"verdict": "undecided"}, Finding.CLEAN, id="no replica differed"),
        pytest.param({}, {"verdict": "undecided", "wrong": ["n1", "n2"]}, Finding.DAMAGED, id="nobody knows"),
        pytest.param({}, {"verdict": "diverged", "wrong": ["n3"]}, Finding.DAMAGED, id="a replica is wrong"),
        pytest.param({}, {"verdict": "diverged", "wrong": ["n3"], "rebuilt": ["n3"], "again": "equal"}, Finding.HEALED,
                     id="a replica was rebuilt"),
        pytest.param({}, {"verdict": "tied", "wrong": ["n2"], "rebuilt": ["n2"], "again": "tied"}, Finding.DAMAGED,
                     id="and differs again"),
    ],
)  # fmt: skip
def test_what_a_round_comes_to(node: dict[str, object], group: dict[str, object], expected: Finding) -> None:
    """The worst of what was found decides."""
    assert finding_of({"nodes": {"n1": node_facts(**node)}, "groups": {"s0": group_facts(**group)}}) is expected


# on clusters


async def filled(site: Site, *, flushed: bool = True) -> None:
    """Make a collection of one shard whose rows are partly in chunks, some deleted, some still growing."""
    await site.create(shards=1)
    await site.insert("n1", list(range(40)))
    if flushed:
        await site.ask("n1", lambda database: database.flush("default", "c"))
    await site.ask("n1", lambda database: database.delete("default", "c", "id in [3, 4]", {}))
    await site.insert("n1", [100, 101])
    await until(lambda: all(one.position == where(site) for one in shards(site).values()))


def where(site: Site) -> int:
    return max(one.position for one in shards(site).values())


async def until(wanted: object, *, within_s: float = 60.0) -> None:
    assert callable(wanted)
    for _ in range(int(within_s / 0.05)):
        if wanted():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it does not come to pass")


def shards(site: Site) -> dict[str, Shard]:
    return {
        machine.name: node.shards[S0].machine for machine, node in site.world.nodes() if S0 in node.shards
    }  # fmt: skip


def excuse(site: Site) -> None:
    """What nodes say of damage that the test did is no fault of theirs."""
    for machine in site.world.machines.values():
        machine.excuses.add("damage")


def tamper(shard: Shard) -> None:
    """Let a replica forget rows, as no log has told it."""
    state = next(iter(shard.collections.values()))
    for one in state.segments():
        one.delete(np.array([7, 8, 101], np.int64), Tick(shard.tick))


async def compared(site: Site, *, leader: str = "") -> Mapping[str, Any]:
    name = leader or site.leader_of(0)
    return await site.node(name).healing.compare(group_of(S0))


def agree(site: Site) -> bool:
    machines: list[StateMachine] = [*shards(site).values()]
    positions = {one.position for one in machines}
    return len(positions) == 1 and len({witness_digest(one) for one in machines}) == 1


def test_replicas_that_went_different_ways_are_equal() -> None:
    """Restarted from checkpoints or not, leading or not, replicas of equal logs have equal digests."""

    async def script(site: Site) -> None:
        await filled(site)
        leader = site.leader_of(0)
        follower = site.others(leader)[0]
        site.kill(follower)
        await site.insert(leader, [200])
        site.world.start(follower)
        await site.ready()
        found = await compared(site)
        assert found["verdict"] == Verdict.EQUAL and found["silent"] == [] and len(found["right"]) == 3
        control = next(name for name in site.world.machines if site.node(name).control.is_leader)
        assert (await site.node(control).healing.compare(0))["verdict"] == Verdict.EQUAL

    on_a_cluster(script, shards=1)


@pytest.mark.parametrize("leads", [False, True], ids=["a follower", "the leader"])
def test_a_replica_that_differs_is_rebuilt(leads: bool) -> None:
    """It answers nobody from the moment on that this is known, and has what the others have after that."""

    async def script(site: Site) -> None:
        await filled(site)
        excuse(site)
        leader = site.leader_of(0)
        victim = leader if leads else site.others(leader)[0]
        tamper(shards(site)[victim])
        asked = asyncio.ensure_future(compared(site, leader=leader))
        await until(lambda: site.node(victim).healing.rebuilding)
        assert not site.node(victim).shards[S0].is_whole
        found = await asked
        assert (found["verdict"], found["wrong"], found["rebuilt"]) == (Verdict.DIVERGED, [victim], [victim])
        await site.ready()
        await site.insert("n1", [300])
        await until(lambda: agree(site))
        for name in site.world.machines:
            assert {7, 8, 101, 300} <= (await site.found(name)).keys()
        assert site.world.machines[victim].store.read(mark_key(1)) is None
        assert (await compared(site))["verdict"] == Verdict.EQUAL

    on_a_cluster(script, shards=1)


def test_a_crash_in_the_middle_of_a_rebuild_is_gone_on_with() -> None:
    """A replica that knows that it is wrong knows it after a crash too, and answers nobody until it is right."""

    async def script(site: Site) -> None:
        await filled(site)
        excuse(site)
        victim = site.others(site.leader_of(0))[0]
        tamper(shards(site)[victim])
        await site.node(victim).checkpoint()
        others = site.others(victim)
        for other in others:
            site.world.wire.cut(victim, other)
        site.node(victim).healing._begin_rebuild(1, others)
        await asyncio.sleep(1.0)
        site.kill(victim)
        for other in others:
            site.world.wire.mend_path(victim, other)
        site.world.start(victim)
        await until(lambda: site.world.machines[victim].database is not None)
        await until(lambda: site.world.machines[victim].store.read(mark_key(1)) is None)
        await site.ready()
        await until(lambda: agree(site))

    on_a_cluster(script, shards=1)


def test_of_two_that_differ_the_leader_is_right_if_its_chunks_are() -> None:
    """With two replicas there is no majority: the leader's state is taken, unless it has lost chunks itself."""

    async def script(site: Site) -> None:
        await filled(site)
        excuse(site)
        leader = site.leader_of(0)
        (victim,) = site.others(leader)
        tamper(shards(site)[victim])
        found = await compared(site, leader=leader)
        assert (found["verdict"], found["rebuilt"]) == (Verdict.TIED, [victim])
        await until(lambda: agree(site))

    on_a_cluster(script, shards=1, nodes=2, copies=2)


@pytest.mark.parametrize("how", ["rotten", "missing"])
@pytest.mark.parametrize("nodes", [1, 3])
def test_chunks_are_made_good(how: str, nodes: int) -> None:
    """Whatever chunk of a replica is damaged or gone, reading finds it, and it is whole again without a restart."""

    async def script(site: Site) -> None:
        await filled(site)
        excuse(site)
        name = site.leader_of(0) if nodes == 1 else site.others(site.leader_of(0))[0]
        node, store = site.node(name), site.world.machines[name].store
        await node.checkpoint()
        digests = sorted(shards(site)[name].digests)
        assert len(digests) > 5
        for digest in digests:
            if how == "rotten":
                store.rot(chunk_key(S0, digest))
            else:
                store.delete_chunks(S0, [digest])
        scrub = Scrub()
        await node.healing.scrubber.run(scrub, bytes_per_s=0, again=lambda: True)
        assert scrub.damaged == scrub.cured > 5 and not scrub.lost, scrub  # one checkpoint makes several good
        again = Scrub()
        await node.healing.scrubber.run(again, bytes_per_s=0, again=lambda: True)
        assert again.damaged == 0 and again.chunks_done
        site.kill(name)
        site.world.start(name)
        await site.ready()
        assert len(await site.found(name)) == 40

    on_a_cluster(script, shards=1, nodes=nodes, copies=nodes)


def test_reads_heal_what_they_meet() -> None:
    """A read of rows whose chunk is damaged is answered from a peer's chunk; the client sees nothing of it."""

    async def script(site: Site) -> None:
        await filled(site)
        excuse(site)
        await site.ask("n1", lambda database: database.release("default", "c"))
        await site.ask("n1", lambda database: database.load("default", "c"))
        await until(lambda: all(one.loading[0] == one.loading[1] for _, one in site.world.nodes()))
        store = site.world.machines["n2"].store
        for digest in sorted(shards(site)["n2"].digests):
            store.rot(chunk_key(S0, digest))
        found = await site.found("n2")
        assert len(found) == 40

    on_a_cluster(script, shards=1)


def test_a_round_that_is_asked_for() -> None:
    """Any node has all chunks read and all replicas compared, tells how far it is, and what was wrong is right then."""

    async def script(site: Site) -> None:
        await filled(site)
        assert (await round_on(site, "n1"))["finding"] == Finding.CLEAN
        excuse(site)
        victim = site.others(site.leader_of(0))[0]
        tamper(shards(site)[victim])
        store = site.world.machines["n1"].store
        store.rot(chunk_key(S0, sorted(shards(site)["n1"].digests)[0]))
        found = await round_on(site, "n3")
        assert found["finding"] == Finding.HEALED
        assert found["groups"]["s0"]["rebuilt"] == [victim] and found["groups"]["s0"]["again"] == Verdict.EQUAL
        assert found["nodes"]["n1"]["damaged"] >= 1
        site.kill("n2")
        found = await round_on(site, "n1")
        assert found["finding"] == Finding.INCOMPLETE
        assert found["nodes"]["n2"]["state"] == "silent" and "n2" in found["groups"]["s0"]["silent"]

    on_a_cluster(script, shards=1)


async def round_on(site: Site, name: str) -> Mapping[str, Any]:
    check = site.node(name).cluster_check
    check.begin()
    await until(lambda: check.view()["finding"] != Finding.RUNNING, within_s=120.0)
    return check.view()


def test_collections_are_of_no_concern() -> None:
    """An empty group is compared like any other."""

    async def script(site: Site) -> None:
        assert CollectionId(1) not in shards(site)["n1"].collections
        assert (await compared(site))["verdict"] == Verdict.EQUAL

    on_a_cluster(script, shards=1)
