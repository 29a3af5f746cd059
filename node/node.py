"""One node: its journal, its chunk store, its groups, and their order of starting and stopping.

    start   chunk store (its lock keeps a second process out) -> journal -> control group and shards from their
            checkpoints -> replay of the log's tail -> open DDL tasks are finished -> background work -> ready
    stop    background work ends -> checkpoints -> journal -> chunk store

Everything that is not deterministic comes in from outside: disk, store, clock, dice and executor. The process around
it is in `node/app.py`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import cbor2

from cluster.catalog import Catalog, Task
from cluster.checkpoint import restore
from cluster.control import Control, FrozenControl
from cluster.ddl import BeginDdl, EndDdl, messages
from cluster.machine import StateMachine
from cluster.raft import RaftGroup
from cluster.shard import Shard
from cluster.tick import HybridClock
from node.clock import Clock
from node.group import GroupHost, Producer
from node.journaling import JournalWriter
from node.metrics import Metrics
from node.settings import Settings
from node.upkeep import Upkeep
from node.workers import Executor, Lane
from storage.chunks import ChunkStore
from storage.disk import Disk
from storage.errors import ReadOnly, StorageFault
from storage.journal import Journal
from storage.keys import record_key
from storage.types import ShardId

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger(__name__)

CONTROL_GROUP: Final = 0
FORMAT: Final = 1
WATCH_S: Final = 0.5
"""How often disk room, memory and checkpoints are looked at."""
RECLAIM_S: Final = 2.0
STUCK_S: Final = 2.0
"""How long a write may wait for room in the journal before its client is told that the outcome is not known."""
REOPEN_BYTES_MIN: Final = 20 << 20
"""Room without which the chunk store is not opened again: opening writes out what its log holds."""
CONTROL_ENTRIES_MAX: Final = 1_000
"""Catalogue changes between two checkpoints of it."""

IDENTITY_KEY: Final = record_key("identity")
CATALOG_KEY: Final = record_key("catalog")


class Dice(Protocol):
    """The part of random.Random that a node needs."""

    def random(self) -> float: ...
    def getrandbits(self, k: int, /) -> int: ...


@dataclass(frozen=True)
class Seams:
    """All that is not deterministic, and the store behind the door to LevelDB."""

    disk: Disk
    store: ChunkStore
    executor: Executor
    clock: Clock
    dice: Dice
    reclaim: Callable[[], None] = lambda: None
    """Gives memory that is no longer used back to the system."""


def group_of(shard_id: ShardId) -> int:
    """Return the Raft group of a shard; group 0 is the control group."""
    return shard_id + 1


class Node:
    """A running node. `failed` is set when it cannot go on; the process must then end without saying goodbye."""

    def __init__(self, settings: Settings, seams: Seams, metrics: Metrics) -> None:
        self.settings = settings
        self.seams = seams
        self.metrics = metrics
        self.hybrid = HybridClock(seams.clock.wall_ms)
        self.control: GroupHost[Control]
        self.shards: dict[ShardId, GroupHost[Shard]] = {}
        self.upkeep: dict[ShardId, Upkeep] = {}
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.read_only_reason = ""
        self._ddl_locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._watcher: asyncio.Task[None] | None = None
        self._control_saved = 0
        self._control_saved_at_s = 0.0
        self._store_full = False
        self._journal_stuck = ""
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._readers: set[object] = set()
        self._reader_left = asyncio.Event()
        self._changes_reclaimed = -1
        self._reclaimed_at_s = 0.0
        self._background: set[asyncio.Task[None]] = set()

    # start and stop

    async def start(self) -> None:
        """Return when every group leads and the log is replayed. Raises StorageFault if the data cannot be trusted."""
        run, disk_lane = self.seams.executor.run, Lane.DISK
        shard_count = await run(disk_lane, self._identify)
        storage = self.settings.storage
        directory = f"{self.settings.node.data}/journal"
        self.journal = await run(disk_lane, self._open_journal, directory, storage.journal_file_bytes_max)
        report = self.journal.report
        log.info("journal opened files=%d records=%d torn_bytes=%d", report.files, report.records, report.torn_bytes)
        if report.torn_bytes:
            log.warning(
                "cut a torn end that was never acknowledged file=%s bytes=%d", report.torn_file, report.torn_bytes
            )
        self._writer = JournalWriter(
            self.journal,
            self.seams.executor,
            self.seams.clock,
            self.metrics,
            on_durable=lambda group_id: self._groups[group_id].on_durable(),
            on_stuck=self._note_journal,
            on_fatal=self.fail,
        )
        producer = Producer(f"{self.settings.node.name}/{self.seams.dice.getrandbits(64):016x}")
        raw = await run(disk_lane, self.seams.store.read, CATALOG_KEY)
        control = Control(shard_count) if raw is None else await run(disk_lane, Control.restore, raw)
        self.control = self._host("control", CONTROL_GROUP, control, producer, lambda: None)
        self._control_saved = control.position
        for number in range(shard_count):
            shard_id = ShardId(number)
            shard = await run(disk_lane, restore, shard_id, self.seams.store)
            self.hybrid.observe(shard.tick)
            host = self._host(f"s{number}", group_of(shard_id), shard, producer, self._waker(shard_id))
            self.shards[shard_id] = host
            self.upkeep[shard_id] = Upkeep(
                host,
                self.seams.store,
                self.seams.executor,
                self.hybrid,
                self.seams.clock,
                self.settings,
                self.metrics,
                raft_log=self.journal.group(group_of(shard_id)),
                dice=self.seams.dice,
                on_store_error=self.note_store_error,
                readers_gone=self._readers_gone,
                store_full=lambda: self._store_full,
            )
        self._groups: Mapping[int, GroupHost[Any]] = {
            CONTROL_GROUP: self.control,
            **{group_of(shard_id): host for shard_id, host in self.shards.items()},
        }
        for host in self._groups.values():
            host.start()
        for host in self._groups.values():
            await self._unless_failed(host.led.wait())
        for task in list(self.catalog.tasks.values()):
            log.info("finishing an interrupted change task=%d kind=%s", task.task_id, task.kind)
            await self._unless_failed(self._finish(task))
        for shard_id, upkeep in self.upkeep.items():
            removed = await upkeep.sweep()
            if removed:
                log.info("removed chunks that a crash had left shard=%d chunks=%d", shard_id, removed)
            upkeep.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Return when everything acknowledged is in a checkpoint and nothing runs any more."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._background:
            await asyncio.wait(self._background)
        for upkeep in self.upkeep.values():
            await upkeep.stop()
        try:
            await self.checkpoint()
        except OSError as error:
            log.warning("no last checkpoint, the next start replays the journal: %s", error)
        for host in self._groups.values():
            host.stop()
        self._writer.kick()
        await self._writer.close()
        self.journal.close()

    def fail(self, error: BaseException) -> None:
        """This replica cannot go on: nothing more is acknowledged."""
        if not self.failed.done():
            log.critical("the node stops: %s", error, exc_info=error)
            self.failed.set_result(error)
            for host in self._groups.values():
                host.stop()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold on to a background task until it ends, and wait for it when the node stops."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def read(self, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        """Return `function(*args)` from a search thread; until then no chunk that its views need is removed."""
        reader = object()
        self._readers.add(reader)
        try:
            return await self.seams.executor.run(Lane.SEARCH, function, *args)
        finally:
            self._readers.discard(reader)
            self._reader_left.set()

    async def _readers_gone(self) -> None:
        """Return when every read that runs now has ended; later ones see nothing that is garbage now."""
        before = set(self._readers)
        while before & self._readers:
            self._reader_left.clear()
            await self._reader_left.wait()

    @property
    def catalog(self) -> Catalog:
        return self.control.machine.catalog

    @property
    def loading(self) -> tuple[int, int]:
        """Return (segments of loaded collections that are wholly in memory, all of them)."""
        counts = [upkeep.loading for upkeep in self.upkeep.values()]
        return sum(ready for ready, _ in counts), sum(total for _, total in counts)

    # changes of the catalogue that shards must see

    async def ddl(self, kind: str, database: str, collection: str, request: Mapping[str, Any]) -> None:
        """Carry a change through: begun in the catalogue, told to every shard, ended in the catalogue.

        Once begun it is carried through even if the caller goes away. Raises what `begin` refuses.
        """
        self.check_journal()
        # Held by whoever waits for it, so it is the same one for all who want to change this collection.
        lock = self._ddl_locks.setdefault((database, collection), asyncio.Lock())
        async with lock:
            outcome = await self.control.change(BeginDdl(kind, database, collection, request))
            if "task" in outcome:
                task: Any = outcome["task"]
                finishing = asyncio.get_running_loop().create_task(self._finish(Task(**task)))
                self.keep(finishing)
                await asyncio.shield(finishing)

    async def _finish(self, task: Task) -> None:
        told = messages(self.catalog, task)
        await asyncio.gather(
            *(
                self.shards[shard_id].change(message, producer=f"task/{task.task_id}", sequence=shard_id)
                for shard_id, message in told
            )
        )
        await self.control.change(EndDdl(task.task_id))

    # room on the disk

    def check_writable(self) -> None:
        """Raise ReadOnly while there is no room for new rows. Deletes, drops and reads need not ask."""
        self.check_journal()
        if self.read_only_reason:
            raise ReadOnly(
                f"quota exceeded[reason=disk quota exceeded]: {self.read_only_reason}; writes are refused until there "
                "is room again, reads and deletes go on"
            )

    def check_journal(self) -> None:
        """Raise ReadOnly while the journal has no room for a single record: then deletes and drops wait in vain too."""
        if self._journal_stuck:
            raise ReadOnly(
                f"quota exceeded[reason=disk quota exceeded]: {self._journal_stuck}; nothing can be changed until "
                "there is room again, reads go on"
            )

    def _note_journal(self, why: str) -> None:
        self._journal_stuck = why
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
        if why:
            self._stuck_timer = asyncio.get_running_loop().call_later(STUCK_S, self._answer_unknown)
            self._say_read_only(why)
        else:
            self._check_room()

    def _answer_unknown(self) -> None:
        """What waits for a journal that waits for room is answered soon, rather than when its client's time is up."""
        for host in self.shards.values():
            host.answer_unknown(f"request timeout: {self._journal_stuck}")
        self._stuck_timer = asyncio.get_running_loop().call_later(STUCK_S, self._answer_unknown)

    def note_store_error(self, error: OSError) -> None:
        """A full disk passes, once the store is opened again; anything else is fatal."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            self._store_full = True
            self._say_read_only(f"the chunk store cannot be written: {error.strerror}")
        else:
            self.fail(error)

    def _say_read_only(self, reason: str) -> None:
        if bool(reason) != bool(self.read_only_reason):
            if reason:
                log.error("read-only: %s", reason)
            else:
                log.info("writable again")
            self.metrics.read_only(bool(reason))
        self.read_only_reason = reason

    def _check_room(self) -> None:
        free_bytes = self.seams.disk.free_bytes(self.settings.node.data)
        reserve_bytes = self.settings.storage.disk_reserve_bytes
        if free_bytes < reserve_bytes:
            self._say_read_only(f"{free_bytes} bytes are free, {reserve_bytes} are kept in reserve")
        elif not self._store_full and not self._journal_stuck:
            self._say_read_only("")

    async def _reopen_store(self) -> None:
        """Make the chunk store writable again once there is room."""
        needed_bytes = max(self.settings.storage.disk_reserve_bytes, REOPEN_BYTES_MIN)
        if self.seams.disk.free_bytes(self.settings.node.data) < needed_bytes:
            return
        try:
            await self.seams.executor.run(Lane.DISK, self.seams.store.reopen)
        except OSError as error:
            log.warning("the chunk store cannot be written yet: %s", error)
        else:
            self._store_full = False
            self._check_room()

    # checkpoints and limits

    async def checkpoint(self) -> None:
        """Checkpoint every group that has something new."""
        for upkeep in self.upkeep.values():
            if upkeep.is_dirty:
                await upkeep.checkpoint()
        await self._checkpoint_control()

    async def give_back_space(self) -> None:
        """Let the chunk store return the room of removed chunks to the file system."""
        await self.seams.executor.run(Lane.BUILD, self.seams.store.compact)

    async def _checkpoint_control(self) -> None:
        control = self.control.machine
        if control.position > self._control_saved:
            position, frozen = control.position, control.freeze()
            await self.seams.executor.run(Lane.DISK, self._write_catalog, frozen)
            self._control_saved = position
            self._control_saved_at_s = self.seams.clock.monotonic_s()
            self.control.trim(position)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                self._check_room()
                if self._store_full:
                    await self._reopen_store()
                    continue
                await self._bound_growing()
                await self._checkpoint_due()
                await self._reclaim()
            except OSError as error:
                self.note_store_error(error)
            except Exception:
                log.exception("the watcher fails; it goes on")
                await asyncio.sleep(10 * WATCH_S)

    async def _bound_growing(self) -> None:
        while sum(one.growing_bytes() for one in self.upkeep.values()) > self.settings.storage.growing_bytes_max:
            await max(self.upkeep.values(), key=Upkeep.growing_bytes).seal_largest()

    async def _checkpoint_due(self) -> None:
        storage = self.settings.storage
        now_s = self.seams.clock.monotonic_s()
        large = self.journal.bytes_on_disk > storage.journal_bytes_max
        pinned = {pin.group_id for pin in self.journal.pinning()} if large else set()
        for shard_id, upkeep in self.upkeep.items():
            old = now_s - upkeep.checkpoint_at_s >= storage.checkpoint_interval_s
            if upkeep.is_dirty and (old or group_of(shard_id) in pinned):
                await upkeep.checkpoint()
        changes = self.control.machine.position - self._control_saved
        old = now_s - self._control_saved_at_s >= storage.checkpoint_interval_s
        if changes >= CONTROL_ENTRIES_MAX or old or CONTROL_GROUP in pinned:
            await self._checkpoint_control()

    async def _reclaim(self) -> None:
        """Give memory back some seconds after segments were written, indexed or loaded."""
        changes = sum(host.machine.changes for host in self.shards.values()) + sum(self.loading)
        now_s = self.seams.clock.monotonic_s()
        if changes != self._changes_reclaimed and now_s - self._reclaimed_at_s >= RECLAIM_S:
            await self.seams.executor.run(Lane.DISK, self.seams.reclaim)
            self._changes_reclaimed, self._reclaimed_at_s = changes, now_s

    # parts

    def _write_catalog(self, frozen: FrozenControl) -> None:
        self.seams.store.commit([(CATALOG_KEY, frozen.to_bytes())])

    def _identify(self) -> int:
        """Return the number of shards of this data directory, made when it is first used."""
        node = self.settings.node
        raw = self.seams.store.read(IDENTITY_KEY)
        if raw is None:
            identity = {"format": FORMAT, "node": node.name, "shards": node.shards}
            self.seams.store.commit([(IDENTITY_KEY, cbor2.dumps(identity))])
            return node.shards
        identity = cbor2.loads(raw)
        if identity["format"] != FORMAT:
            raise StorageFault(
                f"the data directory {node.data} has format {identity['format']}, this program reads {FORMAT}: "
                "start the version that wrote it"
            )
        if identity["node"] != node.name:
            raise StorageFault(
                f"the data directory {node.data} belongs to node {identity['node']}, not to {node.name}: "
                f"start with --name {identity['node']}, or give another --data"
            )
        if identity["shards"] != node.shards:
            log.warning(
                "the data directory was made with shards=%d, which stays; the setting shards=%d is ignored",
                identity["shards"], node.shards,
            )  # fmt: skip
        return int(identity["shards"])

    def _open_journal(self, directory: str, file_bytes_max: int) -> Journal:
        return Journal.open(self.seams.disk, directory, file_bytes_max=file_bytes_max)

    def _host(self, name: str, group_id: int, machine: Any, producer: Producer, on_applied: Any) -> GroupHost[Any]:
        assert isinstance(machine, StateMachine)
        raft = RaftGroup(
            group_id,
            self.settings.node.name,
            [],
            self.journal.group(group_id),
            applied=machine.position,
            clock=self.seams.clock.monotonic_s,
            rng=self.seams.dice,
        )
        return GroupHost(
            name,
            raft,
            machine,
            producer=producer,
            hybrid=self.hybrid,
            clock=self.seams.clock,
            kick_journal=lambda: self._writer.kick(),
            on_applied=on_applied,
            on_fatal=self.fail,
        )

    def _waker(self, shard_id: ShardId) -> Any:
        return lambda: self.upkeep[shard_id].wake()

    async def _unless_failed(self, waiting: Any) -> None:
        """Wait, but not for ever if the node fails meanwhile."""
        task = asyncio.ensure_future(waiting)
        await asyncio.wait({task, self.failed}, return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done():
            task.cancel()
            raise self.failed.result()
        await task
