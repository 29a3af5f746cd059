"""Taking another replica's checkpoint: whenever the power goes, what is on the disk is the old state or the new one,
and its log begins where it ends; and in the end nothing is left over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, Final

import cbor2
import pytest

from cluster.checkpoint import (
    begin_log,
    covered,
    covered_term,
    freeze,
    incoming_key,
    install,
    manifest_key,
    referenced,
    restore,
    write,
)
from cluster.control import Control
from cluster.message import Entry
from cluster.shard import Shard
from node.snapshot import SnapshotGroup, Snapshots, of_control, of_shard
from node.workers import Lane
from storage.errors import InvalidParameter, PeerUnreachable, Unavailable
from storage.journal import Journal
from storage.keys import chunk_key, record_key
from storage.schema import DataType
from storage.types import Position, Tick
from tests.cluster.shards import SHARD, Step, World, script, summary, take
from tests.node.wire import Answer, Wire, WiredNode, held, simulated
from tests.sim.chunks import SimChunks
from tests.sim.disk import PowerLoss, SimDisk
from tests.sim.world import SimLoop, run

GROUP: Final = SHARD + 1
OLD_TERM, NEW_TERM = 2, 5
NAMES = ("n1", "n2", "n3")


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with simulated() as loop:
        yield loop


class DiskChunks(SimChunks):
    """A chunk store on the power line of a disk."""

    def __init__(self, rng: Random, disk: SimDisk) -> None:
        super().__init__(rng)
        self._disk = disk

    def step(self) -> None:
        self._disk.step("chunk store")


class Replica(WiredNode):
    """A node that holds one shard, with a journal; it does not run Raft, but has its log."""

    def __init__(
        self, name: str, wire: Wire, loop: SimLoop, disk: SimDisk, store: SimChunks, replicas: Sequence[str] = NAMES
    ) -> None:
        super().__init__(name, wire, loop, replicas, store=store)
        self.journal = Journal.open(disk, "/journal")
        self.raft_log = self.journal.group(GROUP)
        begin_log(self.raft_log, store.read(manifest_key(SHARD)))
        self.journal.write_now()
        self.shard = restore(SHARD, store)
        self.installing: list[bool] = []
        self.replaced: list[Position] = []
        self.group = SnapshotGroup(
            group_id=GROUP, record=of_shard(SHARD, store),
            raft_log=lambda: self.raft_log, pins=self.pins, peers=lambda: replicas, machine=lambda: self.shard,
            install=self._install, note_installing=self.installing.append, replaced=self.replaced.append,
            checkpoint=self._checkpoint,
        )  # fmt: skip
        self.snapshots = Snapshots(
            self.mesh,
            self.transfer,
            store,
            self.executor,
            self.dice,
            {GROUP: self.group},
            on_store_error=self.store_errors.append,
        )

    def _install(self, machine: Shard, position: Position, term: int) -> None:
        """What a host does: a machine in place of the other, the log reset, and the journal told to write."""
        self.shard = machine
        if not self.has_entry(position, term):
            self.raft_log.set_hard_state(max(term, self.raft_log.hard_state.term), None)
            self.raft_log.reset(position, term)
        self.writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while (batch := self.journal.take_batch()) is not None:
            await self.executor.run(Lane.LOG, batch.write)
            self.journal.batch_done(batch)

    def has_entry(self, position: int, term: int) -> bool:
        log = self.raft_log
        return log.base_position <= position <= log.last_position and log.term_at(position) == term

    def append(self, count: int, term: int) -> None:
        """Write entries to the log that nobody applies."""
        if self.raft_log.last_position == 0:
            self.raft_log.reset(1, 0)
        self.raft_log.set_hard_state(term, None)
        for _ in range(count):
            self.raft_log.append(b"an entry", self.raft_log.last_position + 1, term)
        self.journal.write_now()

    async def _checkpoint(self) -> None:
        self.checkpoint(NEW_TERM)

    def checkpoint(self, term: int) -> None:
        written = write(freeze(self.shard, term=term), self.store)
        install(self.shard, written)


OLD: Sequence[Step] = [
    *[("create", 10), ("create_index", 10, 1), ("load", 10, None), ("insert", 10, 1, [1, 2, 3], 0)],
    *[("seal", 10, None), ("flush", 10, 0, True), ("delete", 10, [2], None)],
]
NEW: Sequence[Step] = [
    *[("index", 10, 0, 1, 0, True), ("insert", 10, 1, [4, 5], 1), ("seal", 10, None), ("flush", 10, 0, True)],
    *[("compact", 10, 1, 2, [], True), ("insert", 10, 1, [0, 1], 1), ("upsert", 10, 1, [4], 0)],
    ("delete", 10, [3], None),
]


class Scene:
    """n1 leads and has a checkpoint of all that happened; n2 stopped long ago, with another tail in its log."""

    def __init__(self, old: Sequence[Step] = OLD, new: Sequence[Step] = NEW, seed: int = 0) -> None:
        self.world = World(DataType.INT64, "L2")
        for step in old:
            take(self.world, step)
        self.old_log = list(self.world.log)
        self.old = summary(self.world.first)
        for step in new:
            take(self.world, step)
        write(freeze(self.world.first, term=NEW_TERM), self.world.store)
        self.new = summary(self.world.first)
        self.position = self.world.first.position
        self.disk = SimDisk(Random(seed))
        self.store = DiskChunks(Random(seed + 1), self.disk)

    def start(self, wire: Wire, loop: SimLoop) -> Replica:
        """Start n2 on its disk and store."""
        return Replica("n2", wire, loop, self.disk, self.store)

    def leader(self, wire: Wire, loop: SimLoop, name: str = "n1") -> Replica:
        store = SimChunks(Random(7))
        store._seen = dict(self.world.store._seen)
        one = Replica(name, wire, loop, SimDisk(Random(9)), store)
        one.append(self.position + 5, NEW_TERM)
        return one

    def live_long_ago(self, wire: Wire, loop: SimLoop, *, tail: int) -> None:
        """Let n2 have the beginning of the log, a checkpoint, and entries that nobody else has."""
        self.store.put_many(SHARD, self.world.archive.items())
        lagging = self.start(wire, loop)
        for position, payload in self.old_log:
            lagging.shard.apply(position, Entry.decode(payload))
        lagging.append(max(0, lagging.shard.position - 1) + tail, OLD_TERM)
        lagging.checkpoint(OLD_TERM)
        extra = set(held(self.store, SHARD)) - lagging.shard.digests.keys()
        self.store.delete_chunks(SHARD, extra)
        self.store.put_many(SHARD, [])
        lagging.journal.close()

    def check_disk(self, wire: Wire, loop: SimLoop) -> bool:
        """Start n2 again after a crash: it is the old or the new one, with all its chunks; return whether it is new."""
        raw = self.store.read(manifest_key(SHARD))
        needed = set() if raw is None else {digest for _, digest in referenced(raw)}
        assert needed <= held(self.store, SHARD), "a committed manifest has all its chunks"
        again = self.start(wire, loop)
        is_new = again.shard.position == self.position
        assert summary(again.shard) == (self.new if is_new else self.old)
        log = again.raft_log
        assert log.base_position <= max(again.shard.position, 1)
        if again.shard.position:
            assert again.shard.position <= log.last_position, "log and checkpoint meet"
        if is_new:
            assert again.has_entry(self.position, NEW_TERM) and log.hard_state.term >= NEW_TERM
        again.journal.close()
        return is_new


@pytest.mark.parametrize("tail", [0, 3, 40], ids=["no tail", "a short tail", "a tail beyond the snapshot"])
def test_a_crash_at_any_step_leaves_old_or_new(tail: int) -> None:
    """The power goes before each change of disk or store in turn. The replica starts again as the old one before the
    commit, as the new one after it, in both cases with a log that fits; a second attempt then ends as the new one and
    fetches nothing that the first had stored."""
    outcomes = []
    for fuse in range(1000):
        scene, wire = Scene(seed=fuse), Wire()
        with simulated() as loop:
            scene.leader(wire, loop)
            scene.live_long_ago(wire, loop, tail=tail)
            lagging = scene.start(wire, loop)
            scene.disk.power_loss_at = scene.disk.steps + fuse
            lost = False
            try:
                run(loop, _install_and_write(lagging, scene.position))
            except PowerLoss:
                lost = True
            scene.disk.power_loss_at = None
            loop.failures.clear()
        scene.disk.crash()
        scene.store.crash()
        with simulated() as loop:
            wire = Wire()
            leader = scene.leader(wire, loop)
            outcomes.append(scene.check_disk(wire, loop))
            there = held(scene.store, SHARD)
            again = scene.start(wire, loop)
            run(loop, _install_and_write(again, scene.position))
            assert summary(again.shard) == scene.new
            fetched = held(scene.store, SHARD) - there
            assert leader.transfer.bytes_served == sum(len(again.store.get(SHARD, one)) for one in fetched)
            assert scene.store.read(incoming_key(SHARD)) is None
            again.journal.close()
            assert scene.check_disk(wire, loop)
        if not lost:
            break
    assert outcomes == sorted(outcomes) and False in outcomes and True in outcomes[:-1], "crashes came on both sides"


async def _install_and_write(replica: Replica, at_least: int) -> None:
    await replica.snapshots.install_snapshot(GROUP, at_least, "n1")
    if hasattr(replica, "writing"):
        await replica.writing


@pytest.mark.parametrize("seed", range(20))
def test_any_shard_is_taken_whole(seed: int) -> None:
    """Whatever happened to the shard before, an empty replica and one that has an old part of it take it as it is; what
    the old state alone needed is removed by the next checkpoint."""
    dice = Random(seed)
    steps = script(dice, 70)
    for cut in (0, len(steps) // 2):
        scene, wire = Scene(steps[:cut], steps[cut:], seed), Wire()
        with simulated() as loop:
            scene.leader(wire, loop)
            if cut:
                scene.live_long_ago(wire, loop, tail=2)
            replica = scene.start(wire, loop)
            if replica.shard.position >= scene.position:
                continue
            run(loop, _install_and_write(replica, scene.position))
            assert summary(replica.shard) == scene.new
            assert replica.installing == [True, False] and replica.replaced == [scene.position]
            run(loop, asyncio.sleep(0))
            doomed = replica.pins.doom(replica.shard, scene.position)
            written = write(freeze(replica.shard, term=NEW_TERM, garbage=doomed), scene.store)
            install(replica.shard, written)
            assert held(scene.store, SHARD) == replica.shard.digests.keys()


def test_the_best_checkpoint_is_found(loop: SimLoop) -> None:
    """A source that is down, or too old, is no reason to stop: another replica has one, or the source comes back."""
    scene, wire = Scene(), Wire()
    scene.leader(wire, loop)
    empty = Replica("n3", wire, loop, SimDisk(Random(1)), SimChunks(Random(1)))
    lagging = scene.start(wire, loop)
    wire.down = {"n1"}

    async def scenario() -> None:
        lagging.snapshots.begin(GROUP, scene.position, "n3")
        lagging.snapshots.begin(GROUP, scene.position, "n3")
        await asyncio.sleep(30)
        assert lagging.shard.position == 0 and lagging.installing == [True]
        wire.down.clear()
        await asyncio.sleep(30)

    run(loop, scenario())
    assert summary(lagging.shard) == scene.new and lagging.installing == [True, False]
    assert empty.shard.position == 0


def test_a_state_as_new_as_wanted_becomes_a_checkpoint(loop: SimLoop) -> None:
    """Whoever has applied what is wanted, but has an older checkpoint, takes one for the asking."""
    scene, wire = Scene(), Wire()
    leader = scene.leader(wire, loop)
    leader.shard.position = Position(scene.position + 3)
    lagging = scene.start(wire, loop)
    run(loop, lagging.snapshots._install_from(lagging.group, "n1", scene.position + 3))
    assert lagging.shard.position == scene.position + 3
    with pytest.raises(Unavailable, match=r"at \d+ only"):
        run(loop, lagging.snapshots._install_from(lagging.group, "n1", scene.position + 4))
    assert not leader.pins.is_copied, "who is refused keeps nothing there"


def test_a_full_disk_gives_no_checkpoint(loop: SimLoop) -> None:
    """Whoever cannot take one says why, and its node is told; the old one can still be had."""
    scene, wire = Scene(), Wire()
    leader = scene.leader(wire, loop)
    leader.shard.position = Position(scene.position + 3)
    leader.store.full = True
    lagging = scene.start(wire, loop)
    with pytest.raises(Unavailable, match="no checkpoint can be taken there now: No space"):
        run(loop, lagging.snapshots._install_from(lagging.group, "n1", scene.position + 3))
    assert leader.store_errors and lagging.shard.position == 0
    run(loop, lagging.snapshots._install_from(lagging.group, "n1", scene.position))
    assert lagging.shard.position == scene.position


def test_a_source_that_says_nothing_is_left_for_the_leader(loop: SimLoop) -> None:
    """A node that hangs may have been asked; once another leads, that one is asked at once."""
    scene, wire = Scene(), Wire()
    scene.leader(wire, loop)
    hung = Replica("n3", wire, loop, SimDisk(Random(1)), SimChunks(Random(1)))

    async def never(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Any:
        await asyncio.Event().wait()

    hung.mesh.serve("snapshot/manifest", never)
    lagging = scene.start(wire, loop)

    async def scenario() -> None:
        lagging.snapshots.begin(GROUP, scene.position, "n3")
        await asyncio.sleep(1)
        for _ in range(2):
            lagging.snapshots.begin(GROUP, scene.position, "n1")
        await asyncio.sleep(5)

    run(loop, scenario())
    assert summary(lagging.shard) == scene.new and lagging.installing == [True, False, True, False]


def test_an_interrupted_copy_goes_on(loop: SimLoop) -> None:
    """The source dies in the middle; what came by then is not fetched again, and the rest comes from another."""
    scene, wire = Scene(), Wire()
    scene.leader(wire, loop)
    other = scene.leader(wire, loop, "n3")
    lagging = scene.start(wire, loop)
    manifest = scene.world.store.read(manifest_key(SHARD))
    assert manifest is not None
    total = len({digest for _, digest in referenced(manifest)})

    async def one_chunk_then_gone(caller: str, callee: str, method: str, answer: Answer) -> Answer:
        if method == "chunks/get":
            if callee == "n3" and callee not in wire.down:
                raise PeerUnreachable("n3 is busy")
            if held(lagging.store, SHARD):
                wire.down.add("n1")
            plain, blobs = answer
            return {**plain, "sent": plain["sent"][:1]}, blobs[:1]
        return answer

    wire.fault = one_chunk_then_gone

    async def scenario() -> None:
        lagging.snapshots.begin(GROUP, scene.position, "n1")
        await asyncio.sleep(5)
        assert 0 < len(held(lagging.store, SHARD)) < total

        async def no_fault(caller: str, callee: str, method: str, answer: Answer) -> Answer:
            return answer

        wire.fault = no_fault
        before = held(lagging.store, SHARD)
        await asyncio.sleep(60)
        fetched = held(lagging.store, SHARD) - before
        assert other.transfer.bytes_served >= sum(len(lagging.store.get(SHARD, one)) for one in fetched)

    run(loop, scenario())
    assert summary(lagging.shard) == scene.new


def test_a_replica_that_caught_up_keeps_its_state(loop: SimLoop) -> None:
    """If the log brought it further than the checkpoint meanwhile, nothing is put in its place."""
    scene, wire = Scene(), Wire()
    scene.leader(wire, loop)
    lagging = scene.start(wire, loop)
    wire.down = {"n3"}

    async def scenario() -> None:
        installing = loop.create_task(lagging.snapshots.install_snapshot(GROUP, scene.position, "n1"))
        while lagging.store.read(incoming_key(SHARD)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        lagging.shard.position = Position(scene.position + 3)
        kept = lagging.shard
        await installing
        assert lagging.shard is kept and lagging.store.read(incoming_key(SHARD)) is None
        assert lagging.store.read(manifest_key(SHARD)) is None

    run(loop, scenario())


def test_chunks_stay_while_they_are_copied(loop: SimLoop) -> None:
    """What the source throws away meanwhile stays until the copy is done, and goes then; a copier that died holds it
    for a minute."""
    scene, wire = Scene(), Wire()
    leader = scene.leader(wire, loop)
    lagging = scene.start(wire, loop)
    needed = set(leader.shard.digests)

    async def slow(caller: str, callee: str, method: str, answer: Answer) -> Answer:
        if method == "chunks/get":
            await asyncio.sleep(25)
            plain, blobs = answer
            return {**plain, "sent": plain["sent"][:1]}, blobs[:1]
        return answer

    async def scenario() -> None:
        wire.fault = slow
        lagging.snapshots.begin(GROUP, scene.position, "n1")
        await asyncio.sleep(1)
        leader.shard.garbage = set(needed)
        leader.shard.digests.clear()
        while lagging.shard.position == 0:
            assert leader.pins.copied_from == scene.position
            assert leader.pins.doom(leader.shard, 0) == set()
            leader.pins.spare()
            await asyncio.sleep(7)
        await asyncio.sleep(1)
        assert leader.pins.copied_from is None
        assert leader.pins.doom(leader.shard, 0) == needed
        leader.pins.spare()
        await leader.mesh.call("n1", "snapshot/manifest", {"group": GROUP}, timeout_s=9)
        await asyncio.sleep(59)
        assert leader.pins.doom(leader.shard, 0) == set()
        leader.pins.spare()
        await asyncio.sleep(2)
        assert leader.pins.doom(leader.shard, 0) == needed

    run(loop, scenario())


def test_a_damaged_chunk_of_its_own_is_mended(loop: SimLoop) -> None:
    """A chunk that was here before, and is not what it was, is fetched when the new state cannot be read."""
    scene, wire = Scene(), Wire()
    scene.leader(wire, loop)
    lagging = scene.start(wire, loop)
    manifest = scene.world.store.read(manifest_key(SHARD))
    assert manifest is not None
    digest = next(digest for what, digest in referenced(manifest) if " field " in what)
    lagging.store.put_many(SHARD, [(digest, scene.world.store.get(SHARD, digest))])
    lagging.store.rot(chunk_key(SHARD, digest))
    run(loop, _install_and_write(lagging, scene.position))
    assert summary(lagging.shard) == scene.new and digest in held(lagging.store, SHARD)


@pytest.mark.parametrize("is_away", [False, True], ids=["all answer", "one is gone for good"])
@pytest.mark.parametrize("what", ["index", "field"])
def test_only_indexes_may_be_lost(loop: SimLoop, what: str, is_away: bool) -> None:
    """A checkpoint with an index whose chunks no replica has that answers is installed, and the index built anew later;
    one with rows that nobody has is not."""
    scene, wire = Scene([*OLD, ("index", 10, 0, 1, 0, True)], [("insert", 10, 1, [4], 0)]), Wire()
    manifest = scene.world.store.read(manifest_key(SHARD))
    assert manifest is not None
    lost = {digest for where, digest in referenced(manifest) if f" {what} " in where}
    for name in ("n1", "n3"):
        scene.leader(wire, loop, name).store.delete_chunks(SHARD, lost)
    if is_away:
        wire.down = {"n3"}
    lagging = scene.start(wire, loop)

    async def scenario() -> None:
        lagging.snapshots.begin(GROUP, scene.position, "n1")
        await asyncio.sleep(60)

    run(loop, scenario())
    if what == "index":
        assert summary(lagging.shard) == scene.new
    else:
        assert lagging.shard.position == 0 and lagging.store.read(manifest_key(SHARD)) is None


@pytest.mark.parametrize("what", ["nonsense", "truncated", "another version", "too old"])
def test_a_bad_manifest_changes_nothing(loop: SimLoop, what: str) -> None:
    """A manifest that cannot be read, or is too old, is refused, and the old state goes on."""
    scene, wire = Scene(), Wire()
    scene.leader(wire, loop)
    lagging = scene.start(wire, loop)

    async def bad(caller: str, callee: str, method: str, answer: Answer) -> Answer:
        plain, blobs = answer
        if method != "snapshot/manifest":
            return answer
        raw = bytes(blobs[0])
        match what:
            case "nonsense":
                raw = b"nonsense"
            case "truncated":
                raw = raw[:-5]
            case "another version":
                raw = cbor2.dumps({**cbor2.loads(raw), "version": 99})
            case _:
                raw = cbor2.dumps({**cbor2.loads(raw), "machine": {**cbor2.loads(raw)["machine"], "position": 2}})
        return plain, [memoryview(raw)]

    wire.fault = bad

    async def scenario() -> None:
        lagging.snapshots.begin(GROUP, scene.position, "n1")
        await asyncio.sleep(20)
        await lagging.snapshots.close()

    run(loop, scenario())
    assert lagging.shard.position == 0 and lagging.store.read(manifest_key(SHARD)) is None


def test_bad_calls_are_refused(loop: SimLoop) -> None:
    """Unknown groups and leases that are no numbers are errors of the caller; no checkpoint yet is one that passes."""
    scene, wire = Scene(), Wire()
    lagging = scene.start(wire, loop)
    empty = Replica("n3", wire, loop, SimDisk(Random(1)), SimChunks(Random(1)))
    assert empty.shard.position == 0
    for arguments in ({}, {"group": "1"}, {"group": 99}, {"group": GROUP, "at_least": "9"}):
        with pytest.raises(InvalidParameter):
            run(loop, lagging.mesh.call("n3", "snapshot/manifest", arguments, timeout_s=9))
    with pytest.raises(InvalidParameter):
        run(loop, lagging.mesh.call("n3", "snapshot/keep", {"group": GROUP, "lease": None}, timeout_s=9))
    with pytest.raises(Unavailable, match="no checkpoint yet"):
        run(loop, lagging.mesh.call("n3", "snapshot/manifest", {"group": GROUP}, timeout_s=9))


def test_an_old_checkpoint_has_its_term_from_the_log(loop: SimLoop) -> None:
    """A manifest without a term, as older programs wrote it, is given with the log's; without that it is not given."""
    scene, wire = Scene(), Wire()
    leader = scene.leader(wire, loop)
    raw = leader.store.read(manifest_key(SHARD))
    assert raw is not None and covered_term(raw) == NEW_TERM and covered(raw) == scene.position
    plain = cbor2.loads(raw)
    del plain["machine"]["term"], plain["machine"]["reset_log"]
    leader.store.commit([(manifest_key(SHARD), cbor2.dumps(plain))])
    lagging = scene.start(wire, loop)
    run(loop, _install_and_write(lagging, scene.position))
    assert lagging.has_entry(scene.position, NEW_TERM)
    leader.raft_log.reset(scene.position + 1, NEW_TERM)
    with pytest.raises(Unavailable, match="older program"):
        run(loop, lagging.mesh.call("n1", "snapshot/manifest", {"group": GROUP}, timeout_s=9))


CATALOG = record_key("catalog")


def test_the_catalogue_is_taken_the_same_way(loop: SimLoop) -> None:
    """The control group's snapshot is its record: committed, marked, and put in place."""
    wire = Wire()
    nodes: dict[str, WiredNode] = {}
    machines: dict[str, Control] = {}
    logs = {}
    for name in ("n1", "n2"):
        node = nodes[name] = WiredNode(name, wire, loop, ["n1", "n2"])
        journal = Journal.open(SimDisk(Random(0)), "/journal")
        logs[name] = journal.group(0)
        machines[name] = Control(4)

        def put(machine: Control, position: Position, term: int, name: str = name) -> None:
            machines[name] = machine

        group = SnapshotGroup(
            group_id=0, record=of_control(CATALOG), raft_log=partial(logs.__getitem__, name), pins=node.pins,
            peers=lambda: ["n1", "n2"], machine=partial(machines.__getitem__, name),
            install=put, note_installing=lambda installing: None, replaced=lambda position: None,
        )  # fmt: skip
        snapshots = Snapshots(
            node.mesh,
            node.transfer,
            node.store,
            node.executor,
            node.dice,
            {0: group},
            on_store_error=node.store_errors.append,
        )
    leader = Control(4)
    leader.position, leader.tick = Position(70), Tick(1000)
    nodes["n1"].store.commit([(CATALOG, leader.freeze(NEW_TERM).to_bytes())])
    run(loop, snapshots.install_snapshot(0, 60, "n1"))
    assert machines["n2"].position == 70 and machines["n2"].tick == 1000
    raw = nodes["n2"].store.read(CATALOG)
    assert raw is not None and Control.restore(raw).position == 70
    assert begin_log(logs["n2"], raw) and logs["n2"].base_position == 70 and logs["n2"].last_term == NEW_TERM
    assert not begin_log(logs["n2"], raw), "once is enough"
    assert not begin_log(logs["n1"], nodes["n1"].store.read(CATALOG)), "its own checkpoint resets nothing"
