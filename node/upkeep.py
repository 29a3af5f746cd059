"""What a replica does besides applying its log: seal, flush, index, merge while it leads; load and checkpoint always.

Each kind of work is a loop of its own that looks at the shard's state, does the most useful piece that is left, and
proposes the outcome as a message; so nothing is remembered outside the log, and a restart or a new leader goes on
where the state says. Work is done on frozen views in worker threads.

Chunks come before their message: they are written here under a lease (`chunk_pins.py`), so that no checkpoint takes
one of them for garbage, and shipped to the other replicas, which then apply the message without waiting. Only the
rows of a flush are not shipped: every replica has them, and writes them itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import cbor2

from cluster.checkpoint import chunk_sizes, freeze, incoming_key, install, write
from cluster.message import Compacted, Flushed, Indexed, Message, Seal, from_plain, to_plain
from cluster.parse import parse_blob_files, parse_segment_files
from cluster.shard import CollectionState, Shard, ShardIndex, StoredSegment
from cluster.tick import HybridClock
from index.engines import build, load, version_of
from index.protocol import BuildCancelled, IndexDamaged, VectorIndex
from node.chunk_pins import MESSAGE_S, ChunkPins
from node.chunk_transfer import ChunkTransfer, Dice
from node.clock import Clock
from node.group import GroupHost
from node.metrics import Metrics
from node.provision import Provisioner
from node.settings import Settings
from node.slots import Slots
from node.words import WordKeeper
from node.workers import Executor, Lane, carry_through
from storage.chunks import ChunkFault, ChunkStore
from storage.compaction import CompactionSettings, Plan, choose, facts_of, merge
from storage.errors import AnnulusError, ChunkDamaged, NoLeader, OutcomeUnknown
from storage.sealed import SealedRows, prepare, prepare_from_files
from storage.segment_files import BlobFiles, Chunks, SegmentFiles, read_blob, write_blob, write_segment
from storage.types import CollectionId, IndexId, Position, SegmentId, Tick, tick_ms
from storage.view import SegmentView

log = logging.getLogger(__name__)

IDLE_S: Final = 1.0
"""How often a loop with nothing to do looks again, besides after every change."""
BACK_OFF_S: Final = 1.0
MEND_AGAIN_S: Final = 30.0
SWEEP_AFTER_S: Final = 60.0
"""After the start of a node with peers: longer than between the coming of chunks and that of their message."""


@dataclass
class BuildProgress:
    """An index build under way; `fraction` is written by the thread that builds."""

    segment_id: SegmentId
    index_id: IndexId
    rows: int
    fraction: float = 0.0
    cancelled: bool = False


class Upkeep:
    """The background work of one shard on this node."""

    def __init__(
        self,
        host: GroupHost[Shard],
        store: ChunkStore,
        executor: Executor,
        hybrid: HybridClock,
        clock: Clock,
        settings: Settings,
        metrics: Metrics,
        *,
        dice: Dice,
        transfer: ChunkTransfer | None = None,
        on_store_error: Callable[[OSError], None],
        readers_gone: Callable[[], Awaitable[None]],
        store_full: Callable[[], bool],
        journal_full: Callable[[], bool] = lambda: False,
        memory_short: Callable[[], bool] = lambda: False,
        merge_bytes_max: int | None = None,
        slots: Slots | None = None,
    ) -> None:
        """
        transfer         None on a node without peers
        memory_short     whether compactions are to wait: they take memory before they give any back
        merge_bytes_max  of a merged segment, beside storage.segment_bytes_max
        slots            shared by all shards of the node; left out, this shard has its own
        """
        self._slots = slots or Slots(settings.workers.build_threads)
        self._host = host
        self._store = store
        self._executor = executor
        self._hybrid = hybrid
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._on_store_error = on_store_error
        self._readers_gone = readers_gone
        self._store_full = store_full
        self._journal_full = journal_full
        self._memory_short = memory_short
        self._merge_bytes_max = min(settings.storage.segment_bytes_max, merge_bytes_max or 1 << 62)
        self._transfer = transfer
        self.pins = ChunkPins(clock)
        self.provision = Provisioner(
            lambda: self.shard, transfer, store, executor, dice, self.pins, on_store_error=on_store_error
        )
        """To be awaited before a message is applied."""
        self._words = WordKeeper(lambda: self.shard, store, executor)
        self._tasks: list[asyncio.Task[None]] = []
        self._wakers: list[asyncio.Event] = []
        self._changed = asyncio.Event()
        self._changes_seen = 0
        self._busy: set[SegmentId] = set()
        self._unusable: dict[tuple[SegmentId, IndexId], BlobFiles] = {}
        """Indexes whose chunks do not make one, and which chunks: newer ones are tried again."""
        self._mend_at_s: dict[tuple[SegmentId, IndexId], float] = {}
        """When to ask again for chunks that no peer gave."""
        self._inherited = 0
        """The term in which this replica last asked what the leaders before it had left."""
        self._inheriting = asyncio.Lock()
        self.builds: dict[tuple[SegmentId, IndexId], BuildProgress] = {}
        self.failures: dict[tuple[SegmentId, IndexId], str] = {}
        self.compactions_running = 0
        self.compactions_done = 0
        self.checkpoint_position = host.machine.position
        self.checkpoint_at_s = clock.monotonic_s()
        self.installing = False
        """Another replica's checkpoint is being fetched for this shard."""
        self.swept = False
        self.is_dropped = False
        """The shard is no longer on this node, and must not come back by a checkpoint."""

    @property
    def shard(self) -> Shard:
        return self._host.machine

    @property
    def leads(self) -> bool:
        return self._host.led.is_set()

    def start(self) -> None:
        for step, idle_s in (
            (self._seal_step, IDLE_S),
            (self._index_step, IDLE_S),
            (self._compact_step, self._settings.compaction.interval_s),
        ):
            self._begin(self._forever(step, self._waker(), idle_s, leading=True))
        for step in (self._flush_step, self._load_step, self._words_step):
            self._begin(self._forever(step, self._waker(), IDLE_S, leading=False))
        if not self.swept:
            self._begin(self._sweep_later())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _waker(self) -> asyncio.Event:
        self._wakers.append(asyncio.Event())
        return self._wakers[-1]

    def wake(self) -> None:
        """Something was applied: look again, unless it was only rows coming and going."""
        if self.shard.changes == self._changes_seen:
            return
        self._changes_seen = self.shard.changes
        for progress in self.builds.values():
            progress.cancelled = progress.cancelled or not self._still_wanted(progress)
        self._wake_all()

    def _wake_all(self) -> None:
        for waker in self._wakers:
            waker.set()
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Return when this is so of the shard's segments."""
        while not wanted():
            await self._changed.wait()

    async def stop(self) -> None:
        """Return when nothing is worked on any more. Chunks whose messages are under way stay for them."""
        for progress in self.builds.values():
            progress.cancelled = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _forever(
        self, step: Callable[[], Awaitable[bool]], waker: asyncio.Event, idle_s: float, *, leading: bool
    ) -> None:
        """Take the step whenever there may be something to do; one that only leaders take, while this replica leads."""
        while True:
            if leading:
                await self._host.led.wait()
            waker.clear()
            try:
                if await step():
                    continue
                delay_s = idle_s
            except (NoLeader, OutcomeUnknown) as error:  # the message may be applied yet, or the new leader begins anew
                log.debug("leadership lost in the middle shard=%s step=%s: %s", self._host.name, step.__name__, error)
                delay_s = BACK_OFF_S
            except (AnnulusError, OSError) as error:
                delay_s = BACK_OFF_S
                if isinstance(error, OSError):
                    self._on_store_error(error)
                else:
                    log.warning("upkeep fails shard=%s step=%s: %s", self._host.name, step.__name__, error)
            except Exception as error:  # a bug in one piece of work must not end the work of this shard in silence
                log.exception("upkeep fails shard=%s step=%s", self._host.name, step.__name__)
                delay_s = 10 * BACK_OFF_S
                del error
            try:
                async with asyncio.timeout(delay_s):  # `wait_for` would lose a cancellation that comes with the waking
                    await waker.wait()
            except TimeoutError:
                continue

    @asynccontextmanager
    async def _kept(self, digests: Sequence[bytes]) -> AsyncIterator[int]:
        """Keep chunks that are about to be written. Who has seen their message applied releases the lease; else the
        message may still come, and they stay for a while."""
        lease_id = await self.pins.keep(digests, inf)
        try:
            yield lease_id
        finally:
            self.pins.renew(lease_id, MESSAGE_S)

    async def _ship(self, sizes: Mapping[bytes, int], message: Message) -> None:
        """Return when a majority has the chunks that the message names. Raises Unavailable."""
        if self._transfer is not None:
            await self._transfer.ship(self.shard.shard_id, sizes, cbor2.dumps(to_plain(message)))

    async def _mend(self, error: Exception) -> bool:
        """Fetch the chunk that a read found damaged or missing; return whether the read may be tried again."""
        if self._transfer is None or not isinstance(error, ChunkFault):
            return False
        return await self._transfer.repair(error.shard_id, error.digest)

    async def _propose(self, message: Message) -> None:
        await self._host.change(message)

    # sealing

    async def _seal_step(self) -> bool:
        """Seal what is full, old or idle."""
        now_ms = tick_ms(self._hybrid.stamp())
        storage = self._settings.storage
        for state in self.shard.populated():
            due = [
                one.segment_id
                for one in state.growing.values()
                if one.rows
                and (
                    one.nbytes >= storage.segment_bytes_max
                    or now_ms - tick_ms(one.first_tick) >= storage.segment_age_s_max * 1000
                    or now_ms - tick_ms(one.last_tick) >= storage.segment_idle_s_max * 1000
                )
            ]
            if due:
                await self._propose(Seal(state.collection_id, due))
                return True
        return False

    def growing_bytes(self) -> int:
        return sum(one.nbytes for state in self.shard.populated() for one in state.growing.values())

    def unflushed_bytes(self) -> int:
        """Return the bytes of rows that are in no chunk yet, growing or sealed."""
        sealed = (
            one.segment for state in self.shard.populated() for one in state.stored.values() if not one.is_flushed
        )
        return self.growing_bytes() + sum(one.nbytes for one in sealed)

    @property
    def largest_growing_bytes(self) -> int:
        return max((one.nbytes for state in self.shard.populated() for one in state.growing.values()), default=0)

    async def seal_largest(self) -> None:
        """Seal the largest growing segment of this shard: memory is short. Raises NoLeader."""
        growing = [(state, one) for state in self.shard.populated() for one in state.growing.values()]
        if growing:
            state, largest = max(growing, key=lambda one: one[1].nbytes)
            await self._propose(Seal(state.collection_id, [largest.segment_id]))

    # flushing

    async def _flush_step(self) -> bool:
        """Write the rows of one sealed segment to chunks. Replicas that do not lead do so for when the leader has."""
        found = None if self._store_full() else self._first(lambda state, one: not one.is_flushed)
        if found is None or not (self.leads or self._transfer):
            self.provision.forget_flush()
            return False
        state, stored = found
        segment_id = stored.segment.segment_id
        flush = await self.provision.write_rows(stored)
        files = flush.files
        if not self.leads:
            return False
        async with self._kept(files.digests) as lease_id:
            if stored is not state.stored.get(segment_id) or not await self.provision.there(files):
                self.provision.forget_flush()
                return True
            shard = self.shard
            shard.hand_over_rows((segment_id,), flush.rows)
            try:
                await self._propose(Flushed(state.collection_id, segment_id, files.to_dict()))
                self.pins.release(lease_id)
                self.pins.release(flush.lease_id)
                self.provision.forget_flush()
            finally:
                shard.take_back((segment_id,))
        log.info(
            "segment flushed shard=%s collection=%d segment=%d rows=%d bytes=%d",
            self._host.name, state.collection_id, segment_id, files.rows, files.nbytes,
        )  # fmt: skip
        return True

    async def _put(self, chunks: Chunks) -> None:
        await self._executor.run(Lane.DISK, self._store.put_many, self.shard.shard_id, chunks)

    # loading

    async def _load_step(self) -> bool:
        """Bring the columns or an index of one segment of a loaded collection into memory."""
        released = self._first(lambda state, one: one.segment.released and state.is_loaded(one.segment.partition_id))
        if released is not None:
            state, stored = released
            segment = stored.segment
            assert segment.files is not None
            try:
                rows = await self._executor.run(
                    Lane.DISK, prepare_from_files, segment.files, self.shard.get_chunk, segment.schema
                )
            except ChunkDamaged as error:
                if await self._mend(error):
                    return True
                raise
            if segment.released and state.is_loaded(segment.partition_id):
                segment.load(rows)
            return True
        for state in self.shard.populated():
            for stored in list(state.stored.values()):
                for index, files in self._missing_indexes(state, stored):
                    await self._load_index(stored, index, files)
                    return True
        return False

    def _missing_indexes(self, state: CollectionState, stored: StoredSegment) -> list[tuple[ShardIndex, BlobFiles]]:
        if stored.segment.released:
            return []
        segment_id, now_s = stored.segment.segment_id, self._clock.monotonic_s()
        return [
            (state.indexes[index_id], files)
            for index_id, files in stored.indexes.items()
            if (state.indexes[index_id].field_id not in stored.segment.indexes or index_id in stored.outdated)
            and self._unusable.get((segment_id, index_id)) is not files
            and self._mend_at_s.get((segment_id, index_id), 0.0) <= now_s
        ]

    async def _load_index(self, stored: StoredSegment, index: ShardIndex, files: BlobFiles) -> None:
        segment = stored.segment
        try:
            built = await self._executor.run(Lane.DISK, self._read_index, segment.view(), index, files)
        except (IndexDamaged, ChunkDamaged) as error:
            if not await self._mend(error):
                self._give_index_up((segment.segment_id, index.index_id), files, error)
            return
        if not segment.released and stored.indexes.get(index.index_id) is files:
            segment.install_index(index.field_id, built)
            stored.outdated.discard(index.index_id)

    def _give_index_up(self, key: tuple[SegmentId, IndexId], files: BlobFiles, error: Exception) -> None:
        """A leader builds the index anew; another replica asks for its chunks again later, or gets the new one."""
        rebuild = self.leads or not isinstance(error, ChunkFault)
        log.error(
            "index damaged, %s shard=%s segment=%d index=%d: %s",
            "rebuilding" if rebuild else "no peer mends it now", self._host.name, *key, error,
        )  # fmt: skip
        if rebuild:
            self._unusable[key] = files
            self._wake_all()
        else:
            self._mend_at_s[key] = self._clock.monotonic_s() + MEND_AGAIN_S

    def build_again(self, digest: bytes) -> bool:
        """Have the index built anew that this chunk is of; False if that is not for this replica to do."""
        found = [
            ((segment_id, index_id), files)
            for state in self.shard.populated()
            for segment_id, stored in state.stored.items()
            for index_id, files in stored.indexes.items()
            if digest in files.digests
        ]
        if found and self.leads:
            self._unusable.update(found)
            self._wake_all()
        return bool(found) and self.leads

    def look_again(self) -> None:
        """Chunks are there that were not: what waits for one need wait no longer."""
        self._mend_at_s.clear()
        self._wake_all()

    def _read_index(self, view: SegmentView, index: ShardIndex, files: BlobFiles) -> VectorIndex:
        return load(index.spec, read_blob(files, self.shard.get_chunk), view.matrix(index.field_id, index.spec.metric))

    async def _words_step(self) -> bool:
        """Bring the word lists of one segment into memory, or make and store them."""
        return not self._store_full() and await self._words.step()

    @property
    def loading(self) -> tuple[int, int]:
        """Return (segments of loaded collections whose rows and indexes are in memory, all of them)."""
        ready = total = 0
        for state in self.shard.populated():
            for one in state.stored.values():
                if state.is_loaded(one.segment.partition_id):
                    total += 1
                    ready += not one.segment.released and not self._missing_indexes(state, one)
        return ready, total

    # indexing

    async def _index_step(self) -> bool:
        """Build one index that a flushed segment lacks."""
        if self._store_full():
            return False
        if self._next_index() is None:
            return False
        if await self._inherit():
            return True
        async with self._slots.take(self._settings.index.priority):
            found = self._next_index()
            if found is not None and self.leads:
                await self._build_index(*found)
        return True

    def _next_index(self) -> tuple[CollectionState, StoredSegment, ShardIndex] | None:
        """Return the index to build next: that of the largest segment, where searches gain most."""
        for state in self.shard.populated():
            for stored in sorted(state.stored.values(), key=lambda one: -one.segment.rows):
                for index in self.wanted_indexes(state, stored):
                    if stored.segment.segment_id not in self._busy:
                        return state, stored, index
        return None

    def wanted_indexes(self, state: CollectionState, stored: StoredSegment) -> list[ShardIndex]:
        """Return the indexes that the segment should have and lacks."""
        segment_id = stored.segment.segment_id
        if not stored.is_flushed or stored.segment.rows < self._settings.index.rows_min:
            return []
        return [
            one
            for one in state.indexes.values()
            if self._lacks(stored, one) and (segment_id, one.index_id) not in self.failures
        ]

    def _lacks(self, stored: StoredSegment, index: ShardIndex) -> bool:
        """Return whether there is no index, none that can be used, or only one that an older program made."""
        files = stored.indexes.get(index.index_id)
        if files is None or self._unusable.get((stored.segment.segment_id, index.index_id)) is files:
            return True
        return self._settings.index.upgrade and files.version < version_of(index.spec)

    async def _build_index(self, state: CollectionState, stored: StoredSegment, index: ShardIndex) -> None:
        segment = stored.segment
        key = (segment.segment_id, index.index_id)
        progress = self.builds[key] = BuildProgress(*key, segment.rows)
        self._busy.add(segment.segment_id)
        self._metrics.build_begun()
        began_s, result = self._clock.monotonic_s(), "failed"
        try:
            built, blob = await self._executor.run(Lane.BUILD, self._build, segment.view(), index, progress)
            files, chunks = await self._executor.run(Lane.DISK, write_blob, blob, version_of(index.spec))
            message = Indexed(state.collection_id, *key, files.to_dict())
            async with self._kept(files.digests) as lease_id:
                await self._put(chunks)
                del blob, chunks
                await self._ship(files.sizes, message)
                shard = self.shard
                shard.hand_over_index(*key, built)
                try:
                    await self._propose(message)
                    self.pins.release(lease_id)
                finally:
                    shard.take_back_index(*key)
            self._unusable.pop(key, None)
            result = "ok"
        except (BuildCancelled, NoLeader, OutcomeUnknown):
            result = "cancelled"
        except (MemoryError, RuntimeError, ValueError) as error:
            self.failures[key] = f"{type(error).__name__}: {error}"
            log.exception("index build fails shard=%s segment=%d index=%d", self._host.name, *key)
        finally:
            seconds = self._clock.monotonic_s() - began_s
            self._metrics.build_ended(seconds, result=result)
            self._busy.discard(segment.segment_id)
            self.builds.pop(key, None)
            self._wake_all()
        log.info(
            "index built shard=%s segment=%d index=%d rows=%d result=%s seconds=%.1f",
            self._host.name, *key, segment.rows, result, seconds,
        )  # fmt: skip

    def _build(self, view: SegmentView, index: ShardIndex, progress: BuildProgress) -> tuple[VectorIndex, bytes]:
        def note(fraction: float) -> None:
            progress.fraction = fraction

        built = build(
            index.spec,
            view.matrix(index.field_id, index.spec.metric),
            threads=self._settings.index.build_threads or os.cpu_count() or 1,
            progress=note,
            cancelled=lambda: progress.cancelled or not self.leads,
        )
        return built, built.dump()

    def _still_wanted(self, progress: BuildProgress) -> bool:
        return any(
            progress.segment_id in state.stored and progress.index_id in state.indexes
            for state in self.shard.populated()
        )

    # what another leader has left

    async def _inherit(self) -> bool:
        """Propose what earlier leaders made and shipped but did not come to propose; once in each leadership.

        Returns whether that was done now, so that whoever is about to make something looks again.
        """
        async with self._inheriting:
            term = self._host.raft.term
            if self._transfer is None or self._inherited == term:
                return False
            for offer in await self._transfer.offers(self.shard.shard_id):
                message = _offered(offer)
                if message is not None and (inputs := self._takes(message)):
                    await self._propose_offered(message, inputs)
            self._inherited = term
            return True

    def _takes(self, message: Indexed | Compacted) -> Sequence[SegmentId]:
        """Return the segments that the message is of, if it would change something now."""
        state = self.shard.collections.get(message.collection_id)
        inputs = [message.segment_id] if isinstance(message, Indexed) else list(message.inputs)
        if state is None or any(one not in state.stored or one in self._busy for one in inputs):
            return ()
        if isinstance(message, Compacted):
            return inputs
        stored = state.stored[message.segment_id]
        wanted = {one.index_id: one for one in self.wanted_indexes(state, stored)}.get(message.index_id)
        files = parse_blob_files(message.files)
        known_bad = self._unusable.get((message.segment_id, message.index_id)) == files
        return inputs if wanted and not known_bad and files.version >= version_of(wanted.spec) else ()

    async def _propose_offered(self, message: Indexed | Compacted, inputs: Sequence[SegmentId]) -> None:
        assert self._transfer is not None
        files = (parse_blob_files if isinstance(message, Indexed) else parse_segment_files)(message.files)
        self._busy.update(inputs)
        try:
            async with self._kept(files.digests) as lease_id:
                if await self._transfer.fetch(self.shard.shard_id, files.sizes):
                    return  # not all of it is anywhere: it is made again
                await self._ship(files.sizes, message)
                await self._propose(message)
                self.pins.release(lease_id)
        finally:
            self._busy.difference_update(inputs)
        log.info("proposed what another leader had made shard=%s kind=%s", self._host.name, message.kind)

    # compaction

    async def _compact_step(self) -> bool:
        """Merge small segments, or rewrite one that is full of dead rows."""
        if self._store_full() or self._memory_short():
            return False
        if self._next_plan() is None:
            return False
        if await self._inherit():
            return True
        async with self._slots.take(self._settings.compaction.priority):
            found = self._next_plan()
            if found is not None and self.leads:
                await self._compact(*found)
        return True

    def _next_plan(self) -> tuple[CollectionState, Plan] | None:
        for state in self.shard.populated():
            if state.properties.get("collection.autocompaction.enabled", "true").lower() == "false":
                continue
            for plan in self._plans(state, self._compaction_settings()):
                return state, plan
        return None

    async def compact_now(self, collection_id: CollectionId) -> None:
        """Merge and rewrite whatever can shrink, whether or not it is due."""
        eager = CompactionSettings(
            segment_bytes_max=self._merge_bytes_max,
            small_ratio_max=0.99,
            full_ratio_min=1.0,
            garbage_ratio_min=1e-9,
            inputs_min=2,
            renew=True,
        )
        while (state := self.shard.collections.get(collection_id)) and (plans := self._plans(state, eager)):
            if not self.leads:
                raise NoLeader(f"this node does not lead {self._host.name} any more")
            async with self._slots.take(self._settings.compaction.priority):
                if state is self.shard.collections.get(collection_id) and plans == self._plans(state, eager):
                    await self._compact(state, plans[0])

    def _compaction_settings(self) -> CompactionSettings:
        chosen = self._settings.compaction
        return CompactionSettings(
            segment_bytes_max=self._merge_bytes_max,
            small_ratio_max=chosen.small_segment_fill_ratio,
            garbage_ratio_min=chosen.deleted_ratio,
            inputs_min=chosen.segments_min,
        )

    def _plans(self, state: CollectionState, settings: CompactionSettings) -> Sequence[Plan]:
        expire_before = state.expire_before(self._hybrid.stamp())
        facts = [
            facts_of(one.segment.view(), one.segment.files.nbytes, tick=self.shard.tick, expire_before=expire_before)
            for one in state.stored.values()
            if one.segment.files is not None and one.segment.segment_id not in self._busy
        ]
        return choose(facts, settings)

    async def _compact(self, state: CollectionState, plan: Plan) -> None:
        inputs = [state.stored[one] for one in plan.inputs]
        views = [one.segment.view() for one in inputs]
        as_of = self.shard.tick
        expire_before = state.expire_before(self._hybrid.stamp())
        self._busy.update(plan.inputs)
        self.compactions_running += 1
        try:
            rows, files, chunks = await self._executor.run(Lane.BUILD, _merge, views, as_of, expire_before)
            message = Compacted(state.collection_id, plan.inputs, as_of, expire_before, files.to_dict())
            async with self._kept(files.digests) as lease_id:
                await self._put(chunks)
                await self._ship(files.sizes, message)
                shard = self.shard
                shard.hand_over_rows(plan.inputs, rows)
                try:
                    await self._propose(message)
                    self.pins.release(lease_id)
                finally:
                    shard.take_back(plan.inputs)
        except ChunkDamaged as error:
            if not await self._mend(error):
                raise
            return
        finally:
            self._busy.difference_update(plan.inputs)
            self.compactions_running -= 1
        self.compactions_done += 1
        self._metrics.compacted(plan.kind.value, sum(view.rows for view in views), files.rows)
        log.info(
            "segments compacted shard=%s collection=%d inputs=%d rows_before=%d rows_after=%d why=%s",
            self._host.name, state.collection_id, len(views), sum(v.rows for v in views), files.rows, plan.why,
        )  # fmt: skip

    # checkpoints

    @property
    def is_dirty(self) -> bool:
        return self.shard.position > self.checkpoint_position or not self.shard.garbage <= self.pins.kept

    async def checkpoint(self) -> None:
        """Make everything applied so far durable outside the journal, and let go of the journal below it.

        Once begun it is carried through even if the caller goes away: what a worker writes cannot be called back.
        """
        await carry_through(self._checkpoint())

    async def _checkpoint(self) -> None:
        async with self.pins.committing:
            if self.is_dropped:
                return
            shard, position = self.shard, self.shard.position
            frozen = freeze(
                shard,
                term=self._host.applied_term,
                # Of a generation that is about to begin, the log may not be there yet.
                reset_log=self._host.is_over or self._host.raft.log.durable_position < position,
                garbage=self.pins.doom(shard, self._host.raft.log.last_position),
            )
            try:
                if frozen.garbage:
                    await self._readers_gone()
                written = await self._executor.run(Lane.DISK, write, frozen, self._store)
                install(shard, written)
            finally:
                self.pins.spare()
            self._note_checkpoint(position)
        self.trim_log()

    def trim_log(self) -> None:
        """Let go of the journal below the checkpoint, but for what others will want next while there is room."""
        self._host.trim(self.pins.trimmed_to(self.checkpoint_position, is_full=self._journal_full()))

    def _note_checkpoint(self, position: Position) -> None:
        self.checkpoint_position = position
        self.checkpoint_at_s = self._clock.monotonic_s()

    def note_installing(self, installing: bool) -> None:
        self.installing = installing

    def replaced(self, position: Position) -> None:
        """The shard is now another replica's, as of a checkpoint at this position."""
        self._changes_seen = -1
        self._unusable.clear()
        self._mend_at_s.clear()
        self._note_checkpoint(position)
        self.wake()

    async def sweep(self) -> int:
        """Remove chunks that nothing needs: what a crash left. Returns how many.

        Call it when all of the log that was here at the start is applied: its messages name chunks too.
        """
        shard = self.shard
        async with self.pins.committing:
            present = set(await self._executor.run(Lane.DISK, self._store.chunk_digests, shard.shard_id))
            incoming = await self._executor.run(Lane.DISK, self._store.read, incoming_key(shard.shard_id))
            if incoming is not None and self.installing:
                present -= chunk_sizes(incoming).keys()
            orphans = present - shard.digests.keys() - shard.garbage
            try:
                shard.garbage |= orphans
                orphans &= self.pins.doom(shard, self._host.raft.log.last_position)
                removal = [incoming_key(shard.shard_id)] if incoming is not None and not self.installing else []
                if orphans or removal:
                    chunks = [(shard.shard_id, digest) for digest in sorted(orphans)]
                    await self._executor.run(Lane.DISK, self._store.commit, [], removal, chunks)
                shard.garbage -= orphans
            finally:
                self.pins.spare()
        self.swept = True
        return len(orphans)

    async def _sweep_later(self) -> None:
        """Sweep when no message can be under way any more whose chunks came before this process began.

        Those that came since have leases.
        """
        await asyncio.sleep(SWEEP_AFTER_S)
        log_end = self._host.raft.log.last_position
        while self.shard.position < log_end or self.installing:  # noqa: ASYNC110  # nobody waits for this
            await asyncio.sleep(SWEEP_AFTER_S / 10)
        try:
            removed = await carry_through(self.sweep())
        except OSError as error:
            self._on_store_error(error)
            return
        if removed:
            log.info("removed chunks that a crash had left shard=%s chunks=%d", self._host.name, removed)

    def _first(
        self, wanted: Callable[[CollectionState, StoredSegment], bool]
    ) -> tuple[CollectionState, StoredSegment] | None:
        for state in self.shard.populated():
            for one in state.stored.values():
                if wanted(state, one):
                    return state, one
        return None


def _offered(offer: bytes) -> Indexed | Compacted | None:
    """Return the message that came with chunks; None if this program does not know it."""
    try:
        message = from_plain(*cbor2.loads(offer))
        if isinstance(message, Indexed):
            parse_blob_files(message.files)
            return message
        if isinstance(message, Compacted):
            parse_segment_files(message.files)
            return message
    except (cbor2.CBORDecodeError, ValueError, TypeError, AnnulusError) as error:
        log.warning("an offer that cannot be read: %s", error)
    return None


def _merge(views: Sequence[SegmentView], as_of: Tick, expire_before: Tick) -> tuple[SealedRows, SegmentFiles, Chunks]:
    rows = prepare(*merge(views, as_of, expire_before), views[0].schema)
    return (rows, *write_segment(rows.batch, rows.ticks)) if rows.batch.rows else (rows, SegmentFiles(0, {}), iter(()))
