"""One node: its journal, its chunk store, its groups, and their order of starting and stopping.

    start   chunk store (its lock keeps a second process out) -> journal -> control group and shards from their
            checkpoints -> peers -> background work; a node without peers leads by itself, and returns when its log is
            replayed and open DDL tasks are finished
    stop    leaderships are handed over -> background work ends -> checkpoints -> peers -> journal -> chunk store

Every node holds the control group and the shards that the ring gives it. What only one node may do at a time is a role:
a task that runs while this node leads a group, each of whose steps is a message that the group decides on.

Everything that is not deterministic comes in from outside: disk, store, clock, dice and executor. The process around
it is in `node/app.py`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple

from cluster.catalog import Catalog
from cluster.control import CONTROL_GROUP, Control, FrozenControl
from cluster.membership import group_id, slot_of, voters_of
from cluster.ring import place
from cluster.shard import Shard
from cluster.tick import HybridClock
from node.admission import Admission, Memory
from node.broadcaster import Broadcaster
from node.calls import Mesh
from node.chunk_transfer import ChunkTransfer
from node.clock import Clock
from node.cluster_check import healing_of
from node.cluster_status import ClusterStatus, replica_view
from node.coordinator import Coordinator
from node.crowding import Crowding
from node.forming import Forming, Known, Seat, Standing, closed
from node.group import GroupHost
from node.identity import IDENTITY_KEY, Identity, settle
from node.journaling import JournalWriter
from node.members import Members
from node.metrics import Metrics
from node.network import Network
from node.nodes import Nodes
from node.placing import Placing
from node.pressure import Level
from node.replicas import CATALOG_KEY, Replicas, group_of
from node.route import Router
from node.settings import Settings
from node.slots import Slots
from node.snapshot import Snapshots
from node.upkeep import Upkeep
from node.workers import Executor, Lane
from storage.chunks import ChunkFault, ChunkStore
from storage.disk import Disk
from storage.errors import JournalDamaged, ReadOnly
from storage.journal import Journal
from storage.types import CollectionId, Position, ShardId

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger(__name__)

WATCH_S: Final = 0.5
"""How often disk room, memory and checkpoints are looked at."""
RECLAIM_S: Final = 2.0
STUCK_S: Final = 2.0
"""How long a write may wait for room in the journal before its client is told that the outcome is not known."""
REOPEN_BYTES_MIN: Final = 20 << 20
"""Room without which the chunk store is not opened again: opening writes out what its log holds."""
HAND_OVER_S: Final = 1.0
"""How long a stopping node waits for others to take its leaderships; an election would take about as long."""
BACKGROUND_S: Final = 3.0
"""How long it then waits for what no client waits for; another leader or the next start takes it up again."""
MEND_S: Final = 5.0
"""How long a start waits for peers that have a chunk which is damaged here."""
MEND_RETRY_S: Final = 0.5
STEP_ASIDE_S: Final = 5.0
"""How often a node without room for writes asks others to lead what it leads."""
PLACE_LOOK_S: Final = 0.01
CONTROL_ENTRIES_MAX: Final = 1_000
"""Catalogue changes between two checkpoints of it."""


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
    network: Network | None = None
    """None for a node without peers."""
    reclaim: Callable[[], None] = lambda: None
    """Gives memory that is no longer used back to the system."""
    memory: Memory | None = None
    """None where it is not measured."""


class Node:
    """A running node. `failed` is set when it cannot go on; the process must then end without saying goodbye."""

    def __init__(self, settings: Settings, seams: Seams, metrics: Metrics) -> None:
        self.settings = settings
        self.seams = seams
        self.metrics = metrics
        self.hybrid = HybridClock(seams.clock.wall_ms)
        self.name = settings.node.name
        self.mesh = None
        if seams.network is not None:
            self.mesh = Mesh(seams.network, self.name, self.hybrid, seams.clock, on_refused=metrics.peer_refused)
        self.identity = Identity(self.name, settings.node.shards, settings.node.members, settings.node.copies)
        self._formed: Mapping[ShardId, Sequence[str]] = {}
        """Where shards were placed when the cluster was formed."""
        self.known = Members(self)
        self.replicas = Replicas(self)
        self.placing = Placing(self)
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.read_only_reason = ""
        self._watcher: asyncio.Task[None] | None = None
        self._control_saved = 0
        self._control_saved_at_s = 0.0
        self.is_store_full = False
        self._journal_stuck = ""
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._stepped_aside_at_s = -STEP_ASIDE_S
        self._readers: set[object] = set()
        self._reader_left = asyncio.Event()
        self._changes_reclaimed = -1
        self._reclaimed_at_s = 0.0
        self._journal_end = (0, 0.0)
        """Where the journal ended when it was last seen to have grown, and when that was."""
        self._background: set[asyncio.Task[None]] = set()
        self._remembering = asyncio.Lock()
        self._forming = (
            None
            if self.mesh is None
            else Forming(
                self.mesh,
                settings.node.members,
                others=lambda: self.peer_names,
                silent_max=lambda: None if self.identity.is_newcomer else max(0, self.identity.copies - 2),
                cluster_id=lambda: self.identity.cluster_id,
                standing=self._standing,
                is_new=self._is_new,
                known=self._known_groups,
            )
        )
        self.transfer = (
            None
            if self.mesh is None
            else ChunkTransfer(
                self.name,
                self.mesh,
                seams.store,
                seams.executor,
                seams.clock,
                seams.dice,
                replicas=self.replicas_of,
                pins=lambda shard_id: self.upkeep[shard_id].pins if shard_id in self.upkeep else None,
                bytes_per_s=settings.cluster.transfer_bytes_per_s_max,
                on_store_error=self.note_store_error,
                metrics=metrics,
            )
        )
        self.cluster_status = (
            None if self.mesh is None else ClusterStatus(self.mesh, lambda: self.members, self._replica_views)
        )
        self.snapshots = (
            None
            if self.mesh is None or self.transfer is None
            else Snapshots(
                self.mesh,
                self.transfer,
                seams.store,
                seams.executor,
                seams.dice,
                self.replicas.snapshot_groups,
                on_store_error=self.note_store_error,
            )
        )
        self.slots = Slots(settings.workers.build_threads)
        self.admission = Admission(
            settings,
            seams.clock,
            metrics,
            memory=seams.memory,
            growing_bytes=lambda: sum(
                one.unflushed_bytes() for shard_id, one in self.upkeep.items() if shard_id in self.shards
            ),
            name_of=self._name_of,
            id_of=self._id_of,
        )
        self.crowding = Crowding(self)
        self.healing, self.cluster_check = healing_of(self, self.snapshots)
        self._taking_part: asyncio.Task[None] | None = None
        self.broadcaster = Broadcaster(self)
        self.coordinator = Coordinator(self)

    # start and stop

    async def start(self) -> None:
        """Return when this node takes part; without peers, when its log is replayed and every group leads.

        Raises StorageFault if the data cannot be trusted.
        """
        run = self.seams.executor.run
        self.identity = await run(Lane.DISK, self._identify)
        self._formed = place(self.identity.members, self.identity.shards, self.identity.copies)
        self.router = Router(self)
        self.crowding.begin()
        self.journal = await run(Lane.DISK, self._open_journal)
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
            on_durable=self.replicas.durable,
            on_stuck=self._note_journal,
            on_fatal=self.fail,
        )
        if self.mesh is None:
            await self.replicas.open(self._formed)
            for host in self.replicas.hosts.values():
                await self._unless_failed(host.led.wait())
            await self._unless_failed(self.broadcaster.settled.wait())
            await self._begin_upkeep()
        else:
            self.mesh.on_session(self.replicas.session)
            self.known.begin()
            await self.mesh.start()
            self.known.start()
            if self.identity.is_seated:
                await self.replicas.open(self._formed)  # here, so that damage is told as a start that failed
            self._taking_part = asyncio.get_running_loop().create_task(self._take_part())

    async def _take_part(self) -> None:
        """Find this node's place in its cluster, if it has none yet, then run its groups."""
        try:
            if not self.identity.is_seated:
                await self._find_place()
                await self.replicas.open(self._formed)
            await self._begin_upkeep()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.fail(error)

    async def _find_place(self) -> None:
        """Return when this node, which remembers no votes, may take part in its groups."""
        assert self._forming is not None
        cluster_id = self.identity.cluster_id or await self._forming.find_cluster()
        seats: Mapping[int, Seat] = {}
        if cluster_id:
            await self.remember(lambda identity: identity.learnt(cluster_id))
            formed = {group_of(shard_id): Known(0, tuple(names)) for shard_id, names in self._formed.items()}
            formed[CONTROL_GROUP] = Known(0, voters_of(self.identity.members))
            found = await self._forming.find_seats(formed)
            seats = {group_id(slot, seat.of.generation): seat for slot, seat in sorted(found.items())}
            for group, seat in seats.items():
                if seat.term:
                    self.journal.group(group).set_hard_state(seat.term, seat.leader)
            while self.journal.pending_bytes:
                self._writer.kick()
                await asyncio.sleep(PLACE_LOOK_S)
        abstains = {group: int(seat.abstains) for group, seat in seats.items()}
        later = {group: seat.of.members for group, seat in seats.items() if seat.of.generation}
        await self.remember(lambda identity: identity.seated(abstains, later))

    @property
    def shards(self) -> Mapping[ShardId, GroupHost[Shard]]:
        """The shards of which this node holds a replica."""
        return self.replicas.shards

    @property
    def upkeep(self) -> Mapping[ShardId, Upkeep]:
        return self.replicas.upkeep

    @property
    def placement(self) -> Mapping[ShardId, Sequence[str]]:
        """Every shard of the cluster, and the nodes that hold it, as far as is known here."""
        if self.takes_part and (placements := self.control.machine.membership.placements):
            return {shard_id: placed.members for shard_id, placed in placements.items()}
        return self._formed

    @property
    def peer_names(self) -> Sequence[str]:
        """All other nodes of the cluster, as far as is known here."""
        return [name for name in self.known.names if name != self.name]

    def kick_journal(self) -> None:
        self._writer.kick()

    def control_role(self, leads: bool) -> None:
        self.broadcaster.lead(leads)
        self.coordinator.lead(leads)
        self.placing.wake()

    async def _begin_upkeep(self) -> None:
        await self.replicas.begin_upkeep()
        self.placing.start()
        await self.healing.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Return when everything acknowledged is in a checkpoint and nothing runs any more."""
        for one in (self._watcher, self._taking_part):
            if one is not None:
                one.cancel()
        await self.placing.stop()
        await self.known.stop()
        await asyncio.gather(*(host.hand_over(HAND_OVER_S) for host in self.replicas.hosts.values()))
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=BACKGROUND_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self.cluster_check.stop()
        await self.healing.stop()
        if self.snapshots is not None and self.transfer is not None:
            await self.snapshots.close()
            await self.transfer.close()
        for upkeep in list(self.upkeep.values()):
            await upkeep.stop()
        try:
            await self.checkpoint()
        except OSError as error:
            log.warning("no last checkpoint, the next start replays the journal: %s", error)
        for host in self.replicas.hosts.values():
            host.stop()
        self.broadcaster.lead(False)
        self.coordinator.lead(False)
        if self.mesh is not None:
            await self.mesh.stop()
        self._writer.kick()
        await self._writer.close()
        try:
            self.journal.close()
        except OSError as error:
            log.warning("the end of the journal is not written, nothing of it was promised to anybody: %s", error)

    def fail(self, error: BaseException) -> None:
        """This replica cannot go on: nothing more is acknowledged."""
        if not self.failed.done():
            log.critical("the node stops: %s", error, exc_info=error)
            self.failed.set_result(error)
            self.broadcaster.lead(False)
            self.coordinator.lead(False)
            for host in self.replicas.hosts.values():
                host.stop()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold on to a background task until it ends; a node that stops waits for it a while, then cancels it."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def read(self, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        """Return `function(*args)` from a search thread; until then no chunk that its views need is removed."""
        reader = object()
        self._readers.add(reader)
        cured: set[bytes] = set()
        try:
            while True:
                try:
                    return await self.seams.executor.run(Lane.SEARCH, function, *args)
                except ChunkFault as fault:
                    if fault.digest in cured or not (await self.healing.scrubber.cure(fault)).is_there:
                        raise
                    cured.add(fault.digest)
        finally:
            self._readers.discard(reader)
            self._reader_left.set()

    async def readers_gone(self) -> None:
        """Return when every read that runs now has ended; later ones see nothing that is garbage now."""
        before = set(self._readers)
        while before & self._readers:
            self._reader_left.clear()
            await self._reader_left.wait()

    @property
    def takes_part(self) -> bool:
        """Whether this node has found its place and runs its groups."""
        return CONTROL_GROUP in self.replicas.hosts

    @property
    def control(self) -> GroupHost[Control]:
        """The control group's replica here. Raises NoLeader while this node has yet to find its place."""
        found = self.replicas.hosts.get(CONTROL_GROUP)
        if found is None:
            raise closed(self._forming.why if self._forming is not None else "")
        return found

    def replicas_of(self, shard_id: ShardId) -> Sequence[str]:
        """Return the nodes that hold a shard, the first choice first; none for a shard that there is not."""
        if self.takes_part and (placed := self.control.machine.membership.placements.get(shard_id)) is not None:
            return placed.members
        return self._formed.get(shard_id, ())

    @property
    def groups(self) -> Mapping[int, GroupHost[Any]]:
        """The groups that run here, by id."""
        return self.replicas.hosts

    @property
    def members(self) -> Sequence[str]:
        """Names of all nodes of the cluster, as far as is known here."""
        return self.known.names

    @property
    def replicas_by_group(self) -> Mapping[int, Sequence[str]]:
        """Every group of the cluster, and the nodes that hold it or are about to."""
        placements = self.control.machine.membership.placements if self.takes_part else {}
        holders = {shard_id: one.holders for shard_id, one in placements.items()} or self._formed
        return {CONTROL_GROUP: self.members, **{group_of(shard_id): names for shard_id, names in holders.items()}}

    @property
    def hosts(self) -> Sequence[GroupHost[Any]]:
        """The groups that run here, the control group first."""
        return list(self.replicas.hosts.values())

    @property
    def why_not_ready(self) -> str:
        """What this node waits for before it can do its part; "" when it can."""
        if not self.takes_part:
            return f"not part of the cluster yet: {'' if self._forming is None else self._forming.why}"
        if self.known.why_not_ready:
            return self.known.why_not_ready
        # A shard that is on its way here is still served by those who have it.
        hosts = [host for slot, host in self.groups.items() if slot == CONTROL_GROUP or not host.raft.is_learner]
        leaderless = [host.name for host in hosts if host.leader is None]
        if leaderless:
            return f"no leader: {', '.join(leaderless)}"
        behind = [host.name for host in hosts if not host.is_whole]
        if behind:
            return f"catching up: {len(hosts) - len(behind)} of {len(hosts)} groups are whole"
        ready, total = self.loading
        return "" if ready == total else f"loading segments: {ready} of {total} are in memory"

    def _name_of(self, collection_id: CollectionId) -> str:
        found = self.catalog.collections.get(collection_id) if self.takes_part else None
        return f"collection {collection_id}" if found is None else found.name

    def _id_of(self, database: str, name: str) -> CollectionId | None:
        catalog = self.catalog if self.takes_part else None
        if catalog is None:
            return None
        return catalog.names.get((database, name)) or catalog.aliases.get((database, name))

    async def describe_cluster(self) -> dict[str, Any] | None:
        """Return every group's replicas on all nodes, as far as they answer; None without peers."""
        if self.cluster_status is None:
            return None
        described, moves = await asyncio.gather(self.cluster_status.gather(self.replicas_by_group), Nodes(self).moves())
        return {"id": self.identity.cluster_id, "copies": self.identity.copies, **described, **moves}

    def _replica_views(self) -> dict[str, Any]:
        now_ms = self.seams.clock.wall_ms()
        groups = {}
        for slot, host in self.replicas.hosts.items():
            saved = self._control_saved if slot == CONTROL_GROUP else self._checkpoint_of(ShardId(slot - 1))
            progress = None if self.snapshots is None else self.snapshots.progress.get(slot)
            shown = "" if progress is None else f"{progress.chunks_done} of {progress.chunks_total} chunks"
            groups[slot] = replica_view(host, checkpoint=saved, now_ms=now_ms, progress=shown)
        return {"why_not_ready": self.why_not_ready, "groups": groups, "healing": self.healing.view()}

    def _checkpoint_of(self, shard_id: ShardId) -> Position:
        return self.upkeep[shard_id].checkpoints.position

    @property
    def catalog(self) -> Catalog:
        return self.control.machine.catalog

    @property
    def loading(self) -> tuple[int, int]:
        """Return (segments of loaded collections that are wholly in memory, all of them)."""
        counts = [upkeep.loading for upkeep in self.upkeep.values()]
        return sum(ready for ready, _ in counts), sum(total for _, total in counts)

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
            self.is_store_full = True
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
        if reason:
            self._step_aside()

    def _step_aside(self) -> None:
        """Let others lead while there is no room here: theirs may do. Not too often, as theirs may be short too."""
        now_s = self.seams.clock.monotonic_s()
        if self.mesh is not None and now_s - self._stepped_aside_at_s >= STEP_ASIDE_S:
            self._stepped_aside_at_s = now_s
            for host in self.replicas.hosts.values():
                if host.raft.transfer():
                    log.info("hands over group=%s for want of room", host.name)
                    host.poke()

    def _check_room(self) -> None:
        free_bytes = self.seams.disk.free_bytes(self.settings.node.data)
        reserve_bytes = self.settings.storage.disk_reserve_bytes
        if free_bytes < reserve_bytes:
            self._say_read_only(f"{free_bytes} bytes are free, {reserve_bytes} are kept in reserve")
        elif not self.is_store_full and not self._journal_stuck:
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
            self.is_store_full = False
            self._check_room()

    # checkpoints and limits

    async def checkpoint(self) -> None:
        """Checkpoint every group that has something new."""
        if not self.takes_part:
            return
        for upkeep in list(self.upkeep.values()):
            if upkeep.checkpoints.is_dirty:
                await upkeep.checkpoints.write()
        await self.checkpoint_control()

    async def give_back_space(self) -> None:
        """Let the chunk store return the room of removed chunks to the file system."""
        await self.seams.executor.run(Lane.BUILD, self.seams.store.compact)

    async def checkpoint_control(self) -> None:
        async with self.replicas.control_pins.committing:
            control = self.control.machine
            position = control.position
            if position <= self._control_saved:
                return
            is_in_log = not self.control.is_over and self.control.raft.log.durable_position >= position
            frozen = control.freeze(self.control.applied_term, reset_log=not is_in_log)
            await self.seams.executor.run(Lane.DISK, self._write_catalog, frozen)
            self.note_control_saved(position)
        self.control.trim(self.replicas.control_pins.trimmed_to(position, is_full=self.is_journal_full))

    def note_control_saved(self, position: Position) -> None:
        self._control_saved = position
        self._control_saved_at_s = self.seams.clock.monotonic_s()

    def control_replaced(self, position: Position) -> None:
        self.note_control_saved(position)
        self.control_applied()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                self._check_room()
                if self.is_store_full:
                    await self._reopen_store()
                    continue
                await self.crowding.relieve()
                await self._checkpoint_due()
                await self._reclaim()
            except OSError as error:
                self.note_store_error(error)
            except Exception:
                log.exception("the watcher fails; it goes on")
                await asyncio.sleep(10 * WATCH_S)

    @property
    def is_journal_full(self) -> bool:
        """Whether the journal takes more of the disk than it may, so that logs are cut wherever they can be."""
        return self.journal.bytes_on_disk > self.settings.storage.journal_bytes_max

    async def _checkpoint_due(self) -> None:
        storage = self.settings.storage
        now_s = self.seams.clock.monotonic_s()
        pinned = {slot_of(pin.group_id) for pin in self.journal.pinning()} if self.is_journal_full else set()
        for shard_id, upkeep in list(self.upkeep.items()):
            old = now_s - upkeep.checkpoints.at_s >= storage.checkpoint_interval_s
            if upkeep.checkpoints.is_dirty and (old or group_of(shard_id) in pinned):
                await upkeep.checkpoints.write()
            elif group_of(shard_id) in pinned:
                upkeep.checkpoints.trim_log()
        changes = self.control.machine.position - self._control_saved
        old = now_s - self._control_saved_at_s >= storage.checkpoint_interval_s
        if changes >= CONTROL_ENTRIES_MAX or old or CONTROL_GROUP in pinned:
            await self.checkpoint_control()

    async def _reclaim(self) -> None:
        """Give memory back some seconds after segments were written, indexed or loaded, and while it is short.

        The journal's too, when nothing has been written for as long: who wants an old entry then reads the disk.
        """
        is_short = self.admission.look() is not Level.ACCEPT
        changes = sum(host.machine.changes for host in self.shards.values()) + sum(self.loading)
        now_s = self.seams.clock.monotonic_s()
        if self.journal.end_lsn != self._journal_end[0]:
            self._journal_end = self.journal.end_lsn, now_s
        elif self.journal.cached_bytes and now_s - self._journal_end[1] >= RECLAIM_S:
            self.journal.forget_cached()
            self._changes_reclaimed = -1
        if (is_short or changes != self._changes_reclaimed) and now_s - self._reclaimed_at_s >= RECLAIM_S:
            await self.seams.executor.run(Lane.DISK, self.seams.reclaim)
            self._changes_reclaimed, self._reclaimed_at_s = changes, now_s

    # parts

    def control_applied(self) -> None:
        self.placing.wake()
        self.known.applied(self.control.machine.membership)
        self.coordinator.applied(self.control.machine.membership)
        cluster_id = self.control.machine.cluster_id
        if cluster_id and cluster_id != self.identity.cluster_id:
            self.remember_soon(lambda identity: identity.learnt(cluster_id))

    def remember_soon(self, change: Callable[[Identity], Identity]) -> None:
        """As `remember`, without waiting; a store that is full learns it when there is more to remember."""

        async def remember() -> None:
            try:
                await self.remember(change)
            except OSError as error:
                self.note_store_error(error)

        self.keep(asyncio.get_running_loop().create_task(remember()))

    async def remember(self, change: Callable[[Identity], Identity]) -> None:
        """Write the identity down as changed, and go by it once it is durable."""
        async with self._remembering:
            identity = change(self.identity)
            commit = self.seams.store.commit
            await self.seams.executor.run(Lane.DISK, commit, [(IDENTITY_KEY, identity.to_bytes())])
            self.identity = identity

    def _standing(self, slot: int, generation: int) -> Standing | None:
        host = self.replicas.hosts.get(slot)
        if host is None or host.is_over or host.generation != generation:
            return None
        if not host.raft.remembers or host.raft.is_new:
            return None
        return Standing(host.raft.term, host.raft.leads, host.raft.last_position)

    def _known_groups(self) -> Mapping[int, Known]:
        if not self.takes_part:
            return {}
        placements = self.control.machine.membership.placements
        known = {group_of(shard): Known(one.generation, one.members) for shard, one in placements.items()}
        for slot, host in self.replicas.hosts.items():
            state = host.machine.generation
            if state.number and (slot not in known or state.number > known[slot].generation):
                known[slot] = Known(state.number, state.members)
        return known

    def _is_new(self, group_id: int) -> bool:
        host = self.replicas.hosts.get(group_id)
        if host is None:  # one that is seated has yet to look
            return not self.identity.is_seated and not self.identity.has_forgotten
        return host.raft.is_new

    def _write_catalog(self, frozen: FrozenControl) -> None:
        self.seams.store.commit([(CATALOG_KEY, frozen.to_bytes())])

    def _identify(self) -> Identity:
        """Return whose data directory this is, which is written down when it is first used."""
        node = self.settings.node
        raw = self.seams.store.read(IDENTITY_KEY)
        identity = settle(raw, node)
        if raw is None:
            self.seams.store.commit([(IDENTITY_KEY, identity.to_bytes())])
        elif identity.shards != node.shards:
            log.warning(
                "the data directory was made with shards=%d, which stays; the setting shards=%d is ignored",
                identity.shards, node.shards,
            )  # fmt: skip
        return identity

    def _open_journal(self) -> Journal:
        directory = f"{self.settings.node.data}/journal"
        if self.identity.has_peers and self.identity.is_seated and not self.seams.disk.list(directory):
            # A journal is never without a file once it was opened. A new one would not know how this node voted.
            raise JournalDamaged(f"the journal {directory} is gone, but this node has taken part in its cluster.")
        return Journal.open(self.seams.disk, directory, file_bytes_max=self.settings.storage.journal_file_bytes_max)

    async def _unless_failed(self, waiting: Any) -> None:
        """Wait, but not for ever if the node fails meanwhile."""
        task = asyncio.ensure_future(waiting)
        await asyncio.wait({task, self.failed}, return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done():
            task.cancel()
            raise self.failed.result()
        await task
