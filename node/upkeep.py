"""What a shard's leader does besides taking writes: seal, flush, index, merge, load, checkpoint.

Each kind of work is a loop of its own that looks at the shard's state, does the most useful piece that is left, and
proposes the outcome as a message; so nothing is remembered outside the log, and a restart or a new leader goes on
where the state says. Work is done on frozen views in worker threads. While chunks are being written for a message
that is not applied yet, no checkpoint of the shard is taken (`_chunks`): it might remove one of them as garbage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.checkpoint import freeze, install, rows_from, write
from cluster.message import Compacted, Flushed, Indexed, Message, Seal
from cluster.shard import CollectionState, Shard, ShardIndex, StoredSegment
from cluster.tick import HybridClock
from index.engines import build, load
from index.protocol import BuildCancelled, IndexDamaged, VectorIndex
from node.clock import Clock
from node.group import GroupHost
from node.metrics import Metrics
from node.settings import Settings
from node.workers import Executor, Lane
from storage.chunks import ChunkStore
from storage.compaction import CompactionSettings, Plan, choose, facts_of, merge
from storage.errors import AnnulusError, ChunkDamaged
from storage.growing import GrowingSegment
from storage.sealed import SealedRows, prepare, prepare_from_files
from storage.segment_files import BlobFiles, SegmentFiles, read_blob, write_blob, write_segment
from storage.types import CollectionId, IndexId, SegmentId, Tick, tick_ms
from storage.view import SegmentView

log = logging.getLogger(__name__)

IDLE_S: Final = 1.0
"""How often a loop with nothing to do looks again, besides after every change."""
BACK_OFF_S: Final = 1.0
STOP_S_MAX: Final = 5.0


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
        on_store_error: Callable[[OSError], None],
        readers_gone: Callable[[], Awaitable[None]],
        store_full: Callable[[], bool],
    ) -> None:
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
        self._chunks = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._wakers: list[asyncio.Event] = []
        self._changed = asyncio.Event()
        self._changes_seen = 0
        self._busy: set[SegmentId] = set()
        self._unusable: set[tuple[SegmentId, IndexId]] = set()
        self.builds: dict[tuple[SegmentId, IndexId], BuildProgress] = {}
        self.failures: dict[tuple[SegmentId, IndexId], str] = {}
        self.compactions_running = 0
        self.compactions_done = 0
        self.checkpoint_position = host.machine.position
        self.checkpoint_at_s = clock.monotonic_s()
        self.swept = False

    @property
    def shard(self) -> Shard:
        return self._host.machine

    def start(self) -> None:
        for step, idle_s in (
            (self._seal_step, IDLE_S),
            (self._flush_step, IDLE_S),
            (self._load_step, IDLE_S),
            (self._index_step, IDLE_S),
            (self._compact_step, self._settings.compaction.interval_s),
        ):
            waker = asyncio.Event()
            self._wakers.append(waker)
            self._tasks.append(asyncio.get_running_loop().create_task(self._forever(step, waker, idle_s)))

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
        for progress in self.builds.values():
            progress.cancelled = True
        with contextlib.suppress(TimeoutError):
            # What has written chunks gets to see its message applied: a message that comes after the last checkpoint
            # might name chunks which that has removed.
            await asyncio.wait_for(self._chunks.acquire(), STOP_S_MAX)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._chunks.locked():
            self._chunks.release()

    async def _forever(self, step: Callable[[], Awaitable[bool]], waker: asyncio.Event, idle_s: float) -> None:
        await self._host.led.wait()
        while True:
            waker.clear()
            try:
                if await step():
                    continue
                delay_s = idle_s
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
                await asyncio.wait_for(waker.wait(), delay_s)
            except TimeoutError:
                continue

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

    async def seal_largest(self) -> None:
        """Seal the largest growing segment of this shard: memory is short."""
        largest: tuple[CollectionState, GrowingSegment] | None = None
        for state in self.shard.populated():
            for one in state.growing.values():
                if largest is None or one.nbytes > largest[1].nbytes:
                    largest = (state, one)
        if largest is not None:
            await self._propose(Seal(largest[0].collection_id, [largest[1].segment_id]))

    # flushing

    async def _flush_step(self) -> bool:
        """Write the rows of one sealed segment to chunks."""
        if self._store_full():
            return False
        found = self._first(lambda state, one: not one.is_flushed)
        if found is None:
            return False
        state, stored = found
        segment_id = stored.segment.segment_id
        view = stored.segment.view()
        async with self._chunks:
            rows, files = await self._executor.run(Lane.DISK, self._write_rows, view)
            if stored is not state.stored.get(segment_id):
                return True
            self.shard.hand_over_rows((segment_id,), rows)
            try:
                await self._propose(Flushed(state.collection_id, segment_id, files.to_dict()))
            finally:
                self.shard.take_back((segment_id,))
        log.info(
            "segment flushed shard=%s collection=%d segment=%d rows=%d bytes=%d",
            self._host.name, state.collection_id, segment_id, files.rows, files.nbytes,
        )  # fmt: skip
        return True

    def _write_rows(self, view: SegmentView) -> tuple[SealedRows, SegmentFiles]:
        batch, ticks = rows_from(view, 0)
        rows = prepare(batch, ticks, view.schema)
        return rows, self._write_prepared(rows)

    def _write_prepared(self, rows: SealedRows) -> SegmentFiles:
        files, chunks = write_segment(rows.batch, rows.ticks)
        self._store.put_many(self.shard.shard_id, chunks)
        return files

    # loading

    async def _load_step(self) -> bool:
        """Bring the columns or an index of one segment of a loaded collection into memory."""
        released = self._first(lambda state, one: one.segment.released and state.is_loaded(one.segment.partition_id))
        if released is not None:
            state, stored = released
            segment = stored.segment
            assert segment.files is not None
            rows = await self._executor.run(
                Lane.DISK, prepare_from_files, segment.files, self.shard.get_chunk, segment.schema
            )
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
        segment_id = stored.segment.segment_id
        return [
            (state.indexes[index_id], files)
            for index_id, files in stored.indexes.items()
            if state.indexes[index_id].field_id not in stored.segment.indexes
            and (segment_id, index_id) not in self._unusable
        ]

    async def _load_index(self, stored: StoredSegment, index: ShardIndex, files: BlobFiles) -> None:
        segment = stored.segment
        try:
            built = await self._executor.run(Lane.DISK, self._read_index, segment.view(), index, files)
        except (IndexDamaged, ChunkDamaged) as error:
            log.error(
                "index damaged, rebuilding shard=%s segment=%d index=%d: %s",
                self._host.name, segment.segment_id, index.index_id, error,
            )  # fmt: skip
            self._unusable.add((segment.segment_id, index.index_id))
            self._wake_all()
            return
        if not segment.released and stored.indexes.get(index.index_id) is files:
            segment.install_index(index.field_id, built)

    def _read_index(self, view: SegmentView, index: ShardIndex, files: BlobFiles) -> VectorIndex:
        return load(index.spec, read_blob(files, self.shard.get_chunk), view.matrix(index.field_id, index.spec.metric))

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
        for state in self.shard.populated():
            for stored in sorted(state.stored.values(), key=lambda one: -one.segment.rows):
                for index in self.wanted_indexes(state, stored):
                    if stored.segment.segment_id not in self._busy:
                        await self._build_index(state, stored, index)
                        return True
        return False

    def wanted_indexes(self, state: CollectionState, stored: StoredSegment) -> list[ShardIndex]:
        """Return the indexes that the segment should have and lacks."""
        segment_id = stored.segment.segment_id
        if not stored.is_flushed or stored.segment.rows < self._settings.index.rows_min:
            return []
        return [
            one
            for one in state.indexes.values()
            if (one.index_id not in stored.indexes or (segment_id, one.index_id) in self._unusable)
            and (segment_id, one.index_id) not in self.failures
        ]

    async def _build_index(self, state: CollectionState, stored: StoredSegment, index: ShardIndex) -> None:
        segment = stored.segment
        key = (segment.segment_id, index.index_id)
        progress = self.builds[key] = BuildProgress(*key, segment.rows)
        self._busy.add(segment.segment_id)
        self._metrics.build_begun()
        began_s, result = self._clock.monotonic_s(), "failed"
        try:
            built, blob = await self._executor.run(Lane.BUILD, self._build, segment.view(), index, progress)
            async with self._chunks:
                files = await self._executor.run(Lane.DISK, self._write_index, blob)
                del blob
                self.shard.hand_over_index(*key, built)
                try:
                    await self._propose(Indexed(state.collection_id, *key, files.to_dict()))
                finally:
                    self.shard.take_back_index(*key)
            self._unusable.discard(key)
            result = "ok"
        except BuildCancelled:
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
            cancelled=lambda: progress.cancelled,
        )
        return built, built.dump()

    def _still_wanted(self, progress: BuildProgress) -> bool:
        return any(
            progress.segment_id in state.stored and progress.index_id in state.indexes
            for state in self.shard.populated()
        )

    def _write_index(self, blob: bytes) -> BlobFiles:
        files, chunks = write_blob(blob)
        self._store.put_many(self.shard.shard_id, chunks)
        return files

    # compaction

    async def _compact_step(self) -> bool:
        """Merge small segments, or rewrite one that is full of dead rows."""
        if self._store_full():
            return False
        for state in self.shard.populated():
            if state.properties.get("collection.autocompaction.enabled", "true").lower() == "false":
                continue
            for plan in self._plans(state, self._compaction_settings()):
                await self._compact(state, plan)
                return True
        return False

    async def compact_now(self, collection_id: CollectionId) -> None:
        """Merge and rewrite whatever can shrink, whether or not it is due."""
        eager = CompactionSettings(
            segment_bytes_max=self._settings.storage.segment_bytes_max,
            small_ratio_max=0.99,
            full_ratio_min=1.0,
            garbage_ratio_min=1e-9,
            inputs_min=2,
        )
        state = self.shard.collections.get(collection_id)
        while state is not None and (plans := self._plans(state, eager)):
            await self._compact(state, plans[0])

    def _compaction_settings(self) -> CompactionSettings:
        chosen = self._settings.compaction
        return CompactionSettings(
            segment_bytes_max=self._settings.storage.segment_bytes_max,
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
            rows = await self._executor.run(Lane.BUILD, _merge, views, as_of, expire_before)
            async with self._chunks:
                files = SegmentFiles(0, {})
                if rows.batch.rows:
                    files = await self._executor.run(Lane.DISK, self._write_prepared, rows)
                self.shard.hand_over_rows(plan.inputs, rows)
                try:
                    await self._propose(
                        Compacted(state.collection_id, plan.inputs, as_of, expire_before, files.to_dict())
                    )
                finally:
                    self.shard.take_back(plan.inputs)
        finally:
            self._busy.difference_update(plan.inputs)
            self.compactions_running -= 1
        self.compactions_done += 1
        log.info(
            "segments compacted shard=%s collection=%d inputs=%d rows_before=%d rows_after=%d why=%s",
            self._host.name, state.collection_id, len(views), sum(v.rows for v in views), files.rows, plan.why,
        )  # fmt: skip

    # checkpoints

    @property
    def is_dirty(self) -> bool:
        return self.shard.position > self.checkpoint_position

    async def checkpoint(self) -> None:
        """Make everything applied so far durable outside the journal, and let go of the journal below it."""
        async with self._chunks:
            frozen = freeze(self.shard)
            if frozen.garbage:
                await self._readers_gone()
            written = await self._executor.run(Lane.DISK, write, frozen, self._store)
            install(self.shard, written)
        self.checkpoint_position = written.position
        self.checkpoint_at_s = self._clock.monotonic_s()
        self._host.trim(written.position)

    async def sweep(self) -> int:
        """Remove chunks that nothing needs: what a crash left. Returns how many."""
        async with self._chunks:
            present = await self._executor.run(Lane.DISK, self._store.chunk_digests, self.shard.shard_id)
            orphans = [one for one in present if one not in self.shard.digests and one not in self.shard.garbage]
            if orphans:
                await self._executor.run(Lane.DISK, self._store.delete_chunks, self.shard.shard_id, orphans)
        self.swept = True
        return len(orphans)

    def _first(
        self, wanted: Callable[[CollectionState, StoredSegment], bool]
    ) -> tuple[CollectionState, StoredSegment] | None:
        for state in self.shard.populated():
            for one in state.stored.values():
                if wanted(state, one):
                    return state, one
        return None


def _merge(views: Sequence[SegmentView], as_of: Tick, expire_before: Tick) -> SealedRows:
    batch, ticks = merge(views, as_of, expire_before)
    return prepare(batch, ticks, views[0].schema)
