"""Background work on several replicas: leaders do it, all have its products, and chunks are neither lost nor left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.checkpoint import manifest_key, referenced, restore
from cluster.message import (
    Compacted,
    CreateCollection,
    CreateIndex,
    Entry,
    Flushed,
    Indexed,
    Insert,
    LoadCollection,
    Message,
    ReleaseCollection,
)
from cluster.shard import CollectionState, Shard
from cluster.tick import HybridClock
from index.spec import parse_index_spec
from node.chunk_pins import COPY_S
from node.metrics import Metrics
from node.settings import CompactionSettings, IndexSettings, Settings, StorageSettings
from node.upkeep import Upkeep
from storage.errors import NoLeader
from storage.journal import Journal
from storage.keys import chunk_key
from storage.schema import DataType
from storage.segment_files import digest_of
from storage.types import CollectionId, IndexId, PartitionId, Position
from tests.cluster.shards import SHARD, summary
from tests.node.wire import Wire, WiredNode, held, simulated
from tests.sim.disk import SimDisk
from tests.sim.world import SimLoop, run
from tests.storage.rows import VECTOR, make_collection, numbered

COLLECTION, PARTITION, INDEX = CollectionId(10), PartitionId(1), IndexId(1)
SETTINGS = Settings(
    storage=StorageSettings(segment_idle_s_max=1.0),
    index=IndexSettings(build_threads=1, rows_min=1),
    compaction=CompactionSettings(segments_min=2, interval_s=1.0),
)


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with simulated() as loop:
        yield loop


class Host:
    """A replica's host as upkeep sees it; the log is the team's."""

    def __init__(self, name: str, team: Team, machine: Shard) -> None:
        self.name, self.machine, self._team = name, machine, team
        self.led = asyncio.Event()
        self.raft = self
        self.leader = "n1"
        self.trimmed = 0

    async def change(self, message: Message, body: bytes = b"") -> dict[str, Any]:
        if not self.led.is_set():
            raise NoLeader(f"{self.name} does not lead")
        return await self._team.say(self, message, body)

    def trim(self, position: int) -> None:
        self.trimmed = position


class Member(WiredNode):
    """A replica with its upkeep."""

    def __init__(self, name: str, team: Team, loop: SimLoop, names: list[str]) -> None:
        super().__init__(name, team.wire, loop, names)
        self.host = Host(name, team, Shard(SHARD, lambda digest: self.store.get(SHARD, digest)))
        self.journal = Journal.open(SimDisk(Random(0)), "/journal")
        self.raft_log = self.journal.group(1)
        self.raft_log.reset(1, 0)
        host: Any = self.host
        host.raft, host.applied_term, host.is_over = SimpleNamespace(log=self.raft_log, term=1), 0, False
        self.upkeep = Upkeep(
            host, self.store, self.executor, HybridClock(self.clock.wall_ms), self.clock, SETTINGS, Metrics(),
            dice=self.dice, transfer=self.transfer if len(names) > 1 else None,
            on_store_error=self.store_errors.append, readers_gone=_nothing, store_full=lambda: False,
        )  # fmt: skip
        self.pins = self.upkeep.pins
        self.applied = asyncio.Event()

    @property
    def shard(self) -> Shard:
        return self.host.machine

    async def apply(self, position: Position, payload: bytes) -> Any:
        entry = Entry.decode(payload)
        await self.upkeep.provision(entry.message)
        done = self.shard.apply(position, entry)
        self.upkeep.wake()
        return done

    @property
    def state(self) -> CollectionState:
        return self.shard.collections[COLLECTION]


async def _nothing() -> None:
    pass


class Team:
    """Replicas of one shard; the first leads."""

    def __init__(self, loop: SimLoop, count: int) -> None:
        self.loop, self.wire = loop, Wire()
        names = [f"n{i + 1}" for i in range(count)]
        self.members = [Member(name, self, loop, names) for name in names]
        self.log: list[tuple[Position, bytes]] = []
        self.said: list[Message] = []
        self.on_say: Callable[[Message], None] = lambda message: None
        self._followers = [loop.create_task(self._follow(member)) for member in self.members[1:]]
        self._more = asyncio.Event()

    async def say(self, host: Host, message: Message, body: bytes) -> dict[str, Any]:
        self.on_say(message)
        entry = Entry("tests", len(self.log) + 1, self.members[0].upkeep._hybrid.stamp(), message, body)
        position = Position(len(self.log) + 2)
        self.log.append((position, entry.encode()))
        self.said.append(message)
        for member in self.members:
            member.raft_log.append(b"x", position, 1)
            member.journal.write_now()
        self._more.set()
        self._more = asyncio.Event()
        done = await self.members[0].apply(position, entry.encode())
        while host.machine.position < position:  # noqa: ASYNC110  # who proposes hears of it when it has applied it
            await asyncio.sleep(0.001)
        return dict(done.outcome)

    async def _follow(self, member: Member) -> None:
        done = 0
        while True:
            while done < len(self.log):
                await member.apply(*self.log[done])
                done += 1
            await self._more.wait()

    async def begin(self) -> None:
        """Make a loaded collection with an index, on all replicas; the first leads and all do their upkeep."""
        leader = self.members[0]
        leader.host.led.set()
        schema = make_collection(DataType.INT64).to_dict()
        await leader.host.change(CreateCollection(COLLECTION, schema, [PARTITION], {}))
        spec = parse_index_spec("FLAT", "L2", {}).to_dict()
        await leader.host.change(CreateIndex(COLLECTION, INDEX, VECTOR, spec))
        await leader.host.change(LoadCollection(COLLECTION))
        for member in self.members:
            member.upkeep.start()

    async def insert(self, *numbers: int) -> None:
        body = numbered(make_collection(DataType.INT64), numbers).to_bytes()
        await self.members[0].host.change(Insert(COLLECTION, PARTITION), body)

    async def end(self) -> None:
        for member in self.members:
            await member.upkeep.stop()


def kinds(team: Team) -> list[str]:
    return [message.kind for message in team.said]


def test_the_leader_works_and_all_have_its_products(loop: SimLoop) -> None:
    """Rows are sealed, flushed, indexed and merged by the leader alone; what it proposes a majority has by then; every
    replica ends in the same state, its indexes loaded, and with all chunks."""

    def check(message: Message) -> None:
        if isinstance(message, Indexed | Compacted):
            digests = {ref[0] for ref in _refs(message.files)}
            having = [member for member in team.members if digests <= held(member.store, SHARD)]
            assert len(having) == 3, "shipped before it is proposed"
        if isinstance(message, Flushed):
            flushes.append(message)

    def fetched() -> int:
        return sum(member.transfer.bytes_fetched for member in team.members)

    async def scenario() -> None:
        await team.begin()
        team.on_say = check
        for number in range(3):
            await team.insert(3 * number, 3 * number + 1, 3 * number + 2)
            before = fetched()
            while len(flushes) == number:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert fetched() == before, "rows are written by each replica itself"
            await asyncio.sleep(5)
        await asyncio.sleep(30)
        await team.end()

    flushes: list[Flushed] = []
    team = Team(loop, 3)
    run(loop, scenario())
    assert {"seal", "flushed", "indexed", "compacted"} <= set(kinds(team))
    for member in team.members:
        assert summary(member.shard, machine=False)[0][0][-1] == summary(team.members[0].shard, machine=False)[0][0][-1]
        assert held(member.store, SHARD) >= member.shard.digests.keys()
        assert all(one.segment.indexes for one in member.state.stored.values())
        assert member.upkeep.loading == (len(member.state.stored),) * 2
        assert not member.shard._handed_rows and not member.shard._handed_indexes
        assert not member.store_errors


def _refs(files: Any) -> list[Any]:
    return list(files["chunks"]) if "chunks" in files else [ref for refs in files["fields"].values() for ref in refs]


def test_without_a_majority_nothing_is_proposed(loop: SimLoop) -> None:
    """While no other replica can take chunks no index is proposed; when one can, it is."""

    async def scenario() -> None:
        await team.begin()
        team.wire.down = {"n2", "n3"}
        await team.insert(1, 2, 3)
        await asyncio.sleep(60)
        assert "flushed" in kinds(team) and "indexed" not in kinds(team)
        team.wire.down = {"n3"}
        await asyncio.sleep(30)
        await team.end()

    team = Team(loop, 3)
    run(loop, scenario())
    assert "indexed" in kinds(team)


def test_who_does_not_lead_proposes_nothing(loop: SimLoop) -> None:
    """A replica that lost its leadership stops in the middle, quietly, and goes on when it leads again. Chunks whose
    message may still come are kept; in the end they are needed or garbage."""

    def lose(message: Message) -> None:
        if isinstance(message, Indexed) and not lost:
            lost.append(message)
            leader.host.led.clear()
            raise NoLeader("lost in the middle")

    async def scenario() -> None:
        await team.begin()
        team.on_say = lose
        await team.insert(1, 2, 3)
        await asyncio.sleep(10)
        assert lost and not leader.upkeep.indexes.failures
        digests = {ref[0] for ref in _refs(lost[0].files)}
        assert digests <= held(leader.store, SHARD) and leader.pins.kept >= digests
        said = len(team.said)
        await asyncio.sleep(30)
        assert len(team.said) == said
        await leader.upkeep.checkpoints.write()
        assert digests <= held(leader.store, SHARD)
        await asyncio.sleep(700)
        for member in team.members:
            await member.upkeep.checkpoints.write()
            assert not digests & held(member.store, SHARD), "nobody waits for ever"
        leader.host.led.set()
        await asyncio.sleep(10)
        await team.end()

    lost: list[Indexed] = []
    team = Team(loop, 3)
    leader = team.members[0]
    run(loop, scenario())
    assert "indexed" in kinds(team)


@pytest.mark.parametrize("member_number", [0, 1], ids=["leader", "follower"])
def test_damaged_chunks_are_fetched_not_rebuilt(loop: SimLoop, member_number: int) -> None:
    """Chunks of an index or of rows that have rotten are taken from a peer when they are read in the background."""

    async def scenario() -> None:
        await team.begin()
        await team.insert(1, 2, 3)
        await asyncio.sleep(10)
        (stored,) = member.state.stored.values()
        assert stored.segment.files is not None and stored.segment.indexes
        before = kinds(team)
        await team.members[0].host.change(ReleaseCollection(COLLECTION))
        for digest in {*stored.segment.files.digests, *stored.indexes[INDEX].digests}:
            member.store.rot(chunk_key(SHARD, digest))
        await team.members[0].host.change(LoadCollection(COLLECTION))
        await asyncio.sleep(30)
        assert not stored.segment.released and stored.segment.indexes
        assert held(member.store, SHARD) >= member.shard.digests.keys()
        assert kinds(team)[len(before) :] == ["release", "load"], "nothing was built again"
        await team.end()

    team = Team(loop, 2)
    member = team.members[member_number]
    run(loop, scenario())


def test_an_index_that_nobody_has_is_built_anew(loop: SimLoop) -> None:
    """When every replica has lost an index's chunks, the leader builds it again; then all load it."""

    async def scenario() -> None:
        await team.begin()
        await team.insert(1, 2, 3)
        await asyncio.sleep(10)
        await team.members[0].host.change(ReleaseCollection(COLLECTION))
        (stored,) = team.members[0].state.stored.values()
        for member in team.members:
            member.store.delete_chunks(SHARD, stored.indexes[INDEX].digests)
        await team.members[0].host.change(LoadCollection(COLLECTION))
        await asyncio.sleep(120)
        await team.end()

    team = Team(loop, 3)
    run(loop, scenario())
    assert kinds(team).count("indexed") == 2
    for member in team.members:
        assert member.upkeep.loading == (1, 1)
        assert held(member.store, SHARD) >= member.shard.digests.keys()


def test_a_checkpoint_leaves_chunks_of_messages_to_come(loop: SimLoop) -> None:
    """Chunks that were garbage, and are written again for a message that is not applied yet, survive a checkpoint; what
    a crash left is swept a minute after the start, and what has come since is not."""

    async def scenario() -> None:
        await team.begin()
        await team.insert(1, 2, 3)
        await asyncio.sleep(10)
        follower = team.members[1]
        (stored,) = follower.state.stored.values()
        digests = set(stored.indexes[INDEX].digests)
        follower.shard.forget(digests)
        assert follower.shard.garbage >= digests
        await follower.pins.keep(digests, 600)
        await follower.upkeep.checkpoints.write()
        assert held(follower.store, SHARD) >= digests
        orphan, wanted = b"an orphan of a crash", b"shipped for a message to come"
        follower.store.put_many(SHARD, [(digest_of(orphan), orphan), (digest_of(wanted), wanted)])
        await follower.pins.keep([digest_of(wanted)], 600)
        await asyncio.sleep(70)
        assert follower.upkeep.checkpoints.swept
        assert digest_of(orphan) not in held(follower.store, SHARD)
        assert digest_of(wanted) in held(follower.store, SHARD)
        await team.end()

    team = Team(loop, 2)
    run(loop, scenario())


def test_checkpoints_of_followers_restore(loop: SimLoop) -> None:
    """Every replica's checkpoint has all its chunks and gives its state back, with the term of its last entry."""

    async def scenario() -> None:
        await team.begin()
        await team.insert(*range(6))
        await asyncio.sleep(10)
        await team.insert(7, 8)
        await asyncio.sleep(0.1)
        for member in team.members:
            await member.upkeep.checkpoints.write()
            assert member.host.trimmed == member.shard.position and not member.upkeep.checkpoints.is_dirty
            raw = member.store.read(manifest_key(SHARD))
            assert raw is not None
            assert {digest for _, digest in referenced(raw)} <= held(member.store, SHARD)
            assert summary(restore(SHARD, member.store)) == summary(member.shard)
        await team.end()

    team = Team(loop, 3)
    run(loop, scenario())
    assert "indexed" in kinds(team)


def test_the_log_after_a_manifest_that_is_copied_stays(loop: SimLoop) -> None:
    """Checkpoints cut no log that a replica which copies an older one wants next, until it has it or falls silent."""

    async def scenario() -> None:
        await team.begin()
        leader = team.members[0]
        await team.insert(*range(6))
        given = leader.shard.position
        pins = leader.upkeep.pins
        lease = await pins.keep((), COPY_S, loose=False, position=given)
        later = await pins.keep((), COPY_S, loose=False, position=Position(given + 1))
        await pins.keep((b"of a message",), 2 * COPY_S)
        for number in (7, 8):
            await team.insert(number)
            await leader.upkeep.checkpoints.write()
            assert leader.host.trimmed == given < leader.upkeep.checkpoints.position
        pins.release(lease)
        leader.upkeep.checkpoints.trim_log()
        assert leader.host.trimmed == given + 1
        assert pins.renew(later, COPY_S)
        await asyncio.sleep(COPY_S + 1)
        leader.upkeep.checkpoints.trim_log()
        assert leader.host.trimmed == leader.upkeep.checkpoints.position
        await team.end()

    team = Team(loop, 1)
    run(loop, scenario())


def test_a_cancellation_is_not_lost_to_a_waking(loop: SimLoop) -> None:
    """Work that is told to end in the very moment in which it is woken ends."""

    async def script() -> None:
        woken = asyncio.Event()

        async def step() -> bool:
            return False

        work = loop.create_task(Upkeep._forever(NobodyLeads, step, woken, 60.0, leading=False))
        await asyncio.sleep(1.0)
        woken.set()
        await asyncio.sleep(0)  # what waits for the event is done, who waits for that does not know yet
        work.cancel()
        done, _ = await asyncio.wait({work}, timeout=10.0)
        assert done

    run(loop, script())


NobodyLeads: Any = object()
