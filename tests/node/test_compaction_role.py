"""Merging and indexing as a role of the shard's leader: done once, gone on with by the next leader, and it ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import node.compacting
import node.indexing
from cluster.ddl import TTL_PROPERTY
from cluster.message import AlterCollection, Compacted, Delete, Indexed, Message, Seal, to_plain
from node.slots import Slots
from storage.errors import NoLeader, PeerUnreachable
from tests.cluster.shards import SHARD
from tests.node.test_upkeep import COLLECTION, INDEX, Member, Team, kinds
from tests.node.wire import Answer, held, simulated
from tests.sim.world import SimLoop, run


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with simulated() as loop:
        yield loop


class Works:
    """Counts what is built and merged on all members of a team."""

    def __init__(self, team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: Counter[tuple[int, int]] = Counter()
        self.merged: Counter[tuple[int, ...]] = Counter()
        build, merge = node.indexing.IndexKeeper._build_here, node.compacting._merge

        def counted_build(keeper: Any, view: Any, index: Any, progress: Any) -> Any:
            self.built[view.segment_id, index.index_id] += 1
            return build(keeper, view, index, progress)

        def counted_merge(views: Any, as_of: Any, expire_before: Any) -> Any:
            self.merged[tuple(view.segment_id for view in views)] += 1
            return merge(views, as_of, expire_before)

        monkeypatch.setattr(node.indexing.IndexKeeper, "_build_here", counted_build)
        monkeypatch.setattr(node.compacting, "_merge", counted_merge)


def lead(team: Team, member: Member) -> None:
    """Let this member lead from now on, in a new term."""
    for one in team.members:
        one.host.led.clear()
    raft: Any = member.host.raft
    raft.term += 1
    member.host.led.set()


@pytest.mark.parametrize("kind", [Indexed, Compacted])
@pytest.mark.parametrize("knows", [True, False], ids=["which has the chunks", "which asks for them"])
def test_the_next_leader_does_not_do_it_again(
    loop: SimLoop,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Message],
    knows: bool,
) -> None:
    """A leader dies after it has shipped its product and before it proposed it: the next one proposes it, as it is."""

    def lose(message: Message) -> None:
        if isinstance(message, kind) and not lost:
            lost.append(message)
            team.wire.down = {"n1"}
            lead(team, team.members[1])
            raise NoLeader("it died")

    async def not_to_n2(caller: str, callee: str, method: str, answer: Answer) -> Answer:
        if method == "chunks/want" and callee == "n2" and not lost:
            raise PeerUnreachable("too slow")
        return answer

    async def scenario() -> None:
        await team.begin()
        team.on_say = lose
        if not knows:
            team.wire.fault = not_to_n2
        for first in (1, 11, 21):  # a merge wants some
            if not lost:
                await team.insert(first, first + 1, first + 2)
                await asyncio.sleep(15)
        assert lost
        team.wire.down = set()
        await asyncio.sleep(60)
        await team.end()

    lost: list[Message] = []
    team = Team(loop, 3)
    works = Works(team, monkeypatch)
    run(loop, scenario())
    said = [cbor2.dumps(to_plain(message)) for message in team.said]
    assert cbor2.dumps(to_plain(lost[0])) in said, "it was proposed after all"
    if kind is Indexed:
        first = lost[0]
        assert isinstance(first, Indexed)
        assert works.built[first.segment_id, first.index_id] == 1
    else:
        assert set(works.merged.values()) == {1}
    for member in team.members:
        assert held(member.store, SHARD) >= member.shard.digests.keys()
        assert all(one.segment.indexes for one in member.state.stored.values())


def test_an_offer_that_is_of_no_use_any_more_is_left(loop: SimLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was proposed, or whose segments are gone, is not proposed again; nonsense is no message."""

    async def scenario() -> None:
        await team.begin()
        await team.insert(1, 2, 3)
        await asyncio.sleep(30)
        said = kinds(team)
        team.members[1].transfer._note_offer(SHARD, b"\xff nonsense")
        team.members[1].transfer._note_offer(SHARD, b"\x82\x67indexed\x80")
        lead(team, team.members[1])
        await team.members[1].upkeep.compactions._inherit()
        await asyncio.sleep(30)
        assert kinds(team) == said
        await team.end()

    team = Team(loop, 3)
    run(loop, scenario())


@pytest.mark.parametrize("upgrade", [True, False])
def test_indexes_of_an_older_engine_are_built_anew(
    loop: SimLoop,
    monkeypatch: pytest.MonkeyPatch,
    upgrade: bool,
) -> None:
    """Once, in the background, if the settings say so; all replicas search the new one then, the old one until then."""

    async def scenario() -> None:
        await team.begin()
        await team.insert(1, 2, 3)
        await asyncio.sleep(10)
        before = {member.name: stored_of(member).segment.indexes for member in team.members}
        old = {name: next(iter(indexes.values())) for name, indexes in before.items()}
        assert kinds(team).count("indexed") == 1
        monkeypatch.setattr(node.indexing, "version_of", lambda spec: 2)
        for member in team.members:
            object.__setattr__(member.upkeep._settings.index, "upgrade", upgrade)
        await asyncio.sleep(60)
        assert kinds(team).count("indexed") == 1 + upgrade
        for member in team.members:
            stored = stored_of(member)
            assert stored.indexes[INDEX].version == 1 + upgrade and not stored.outdated
            (now,) = stored.segment.indexes.values()
            assert (now is old[member.name]) != upgrade
        await team.end()
        for member in team.members:
            object.__setattr__(member.upkeep._settings.index, "upgrade", True)

    def stored_of(member: Member) -> Any:
        (stored,) = member.state.stored.values()
        return stored

    team = Team(loop, 3)
    run(loop, scenario())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_work_comes_to_rest_from_any_state(seed: int) -> None:
    """Whatever was written, deleted and left to expire, after a while nothing is planned any more and nothing is said;
    rows that are dead or expired are gone from the chunks where they were many (I-CP-5, I-CP-6), the others are there
    (I-CP-1)."""
    random = Random(seed)

    async def scenario() -> None:
        await team.begin()
        (leader,) = team.members
        ttl_s = random.choice([0, 0, 300])
        await leader.host.change(AlterCollection(COLLECTION, {TTL_PROPERTY: str(ttl_s)}))
        alive: dict[int, float] = {}
        for _ in range(random.randint(1, 12)):
            what = random.random()
            if what < 0.6:
                numbers = random.sample(range(200), random.randint(1, 40))
                numbers = [one for one in numbers if one not in alive]
                if numbers:
                    await team.insert(*numbers)
                    alive |= dict.fromkeys(numbers, loop.now_s)
            elif what < 0.85 and alive:
                dying = random.sample(sorted(alive), random.randint(1, len(alive)))
                await leader.host.change(Delete(COLLECTION, np.array(dying, "<i8").tobytes()))
                for one in dying:
                    del alive[one]
            else:
                await leader.host.change(Seal(COLLECTION))
            await asyncio.sleep(random.choice([0.0, 0.5, 5.0, 60.0]))
        await asyncio.sleep(700)
        said = len(team.said)
        await asyncio.sleep(100)
        assert len(team.said) == said, kinds(team)[said:]
        assert leader.upkeep.compactions._next() is None and leader.upkeep.indexes._next() is None
        now = leader.upkeep._hybrid.stamp()
        expire_before = leader.state.expire_before(now)
        views = [one.view() for one in leader.state.segments()]
        live = sum(view.visible_count(leader.shard.tick, expire_before) for view in views)
        assert live == (0 if ttl_s else len(alive))
        assert sum(view.rows for view in views) <= live / 0.8 + len(views)
        await team.end()

    with simulated() as loop:
        team = Team(loop, 1)
        run(loop, scenario())


def test_slots_go_to_the_most_urgent_first(loop: SimLoop) -> None:
    """So many at a time; smaller numbers before larger ones, those who came first before others; who leaves is
    forgotten, and what was about to be given to it is given to the next."""

    async def script() -> None:
        slots, order, most = Slots(2), [], 0
        holders = 0

        async def hold(name: str, priority: int) -> None:
            nonlocal holders, most
            async with slots.take(priority):
                holders += 1
                most = max(most, holders)
                order.append(name)
                await asyncio.sleep(1.0)
                holders -= 1

        names = ["a5", "b5", "c5", "d1", "e3", "f1", "g5"]
        tasks = {name: loop.create_task(hold(name, int(name[1]))) for name in names}
        await asyncio.sleep(0.5)
        tasks["f1"].cancel()
        await asyncio.sleep(0.5)
        for name in ("e3",):  # its turn has come at this very moment, or is about to
            tasks[name].cancel()
        await asyncio.wait(tasks.values())
        assert order[:3] == ["a5", "b5", "d1"] and order[-2:] == ["c5", "g5"]
        assert "f1" not in order and most == 2 and slots.free == 2

    run(loop, script())
