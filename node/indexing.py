"""The indexes of one shard's segments: built by the leader for all replicas, loaded by each.

Builds run on threads that nobody waits for, one after the other in the slots that all shards share. What cannot be used
(damaged, or of an older program) is built anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.message import Compacted, Indexed
from cluster.parse import parse_blob_files
from cluster.shard import CollectionState, ShardIndex, StoredSegment
from index.engines import build, load, version_of
from index.protocol import BuildCancelled, IndexDamaged, VectorIndex
from node.clock import Clock
from node.making import Maker
from node.metrics import Metrics
from node.settings import Settings
from node.slots import Slots
from node.workers import Executor, Lane
from storage.chunks import ChunkFault
from storage.errors import ChunkDamaged, NoLeader, OutcomeUnknown
from storage.segment_files import BlobFiles, read_blob, write_blob
from storage.types import IndexId, SegmentId
from storage.view import SegmentView

log = logging.getLogger(__name__)

MEND_AGAIN_S: Final = 30.0


@dataclass
class BuildProgress:
    """An index build under way; `fraction` is written by the thread that builds."""

    segment_id: SegmentId
    index_id: IndexId
    rows: int
    fraction: float = 0.0
    cancelled: bool = False


class IndexKeeper:
    """The work of one shard; belongs to the loop."""

    def __init__(
        self,
        maker: Maker,
        executor: Executor,
        clock: Clock,
        settings: Settings,
        metrics: Metrics,
        slots: Slots,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called when there may be something to do that was not."""
        self._maker = maker
        self._executor = executor
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._slots = slots
        self._wake = wake
        self._unusable: dict[tuple[SegmentId, IndexId], BlobFiles] = {}
        """Indexes whose chunks do not make one, and which chunks: newer ones are tried again."""
        self._mend_at_s: dict[tuple[SegmentId, IndexId], float] = {}
        """When to ask again for chunks that no peer gave."""
        self.builds: dict[tuple[SegmentId, IndexId], BuildProgress] = {}
        self.failures: dict[tuple[SegmentId, IndexId], str] = {}

    async def step(self) -> bool:
        """Build one index that a flushed segment lacks."""
        if self._next() is None:
            return False
        if await self._maker.inherit(self.takes):
            return True
        async with self._slots.take(self._settings.index.priority):
            found = self._next()
            if found is not None and self._maker.leads:
                await self._build(*found)
        return True

    def _next(self) -> tuple[CollectionState, StoredSegment, ShardIndex] | None:
        """Return the index to build next: that of the largest segment, where searches gain most."""
        for state in self._maker.shard.populated():
            for stored in sorted(state.stored.values(), key=lambda one: -one.segment.rows):
                for index in self.wanted(state, stored):
                    if stored.segment.segment_id not in self._maker.busy:
                        return state, stored, index
        return None

    def wanted(self, state: CollectionState, stored: StoredSegment) -> list[ShardIndex]:
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

    def takes(self, message: Indexed | Compacted) -> Sequence[SegmentId]:
        """Return the segments that the message is of, if it would change something now."""
        state = self._maker.shard.collections.get(message.collection_id)
        inputs = [message.segment_id] if isinstance(message, Indexed) else list(message.inputs)
        if state is None or any(one not in state.stored or one in self._maker.busy for one in inputs):
            return ()
        if isinstance(message, Compacted):
            return inputs
        stored = state.stored[message.segment_id]
        wanted = {one.index_id: one for one in self.wanted(state, stored)}.get(message.index_id)
        files = parse_blob_files(message.files)
        known_bad = self._unusable.get((message.segment_id, message.index_id)) == files
        return inputs if wanted and not known_bad and files.version >= version_of(wanted.spec) else ()

    async def _build(self, state: CollectionState, stored: StoredSegment, index: ShardIndex) -> None:
        segment = stored.segment
        key = (segment.segment_id, index.index_id)
        progress = self.builds[key] = BuildProgress(*key, segment.rows)
        self._maker.busy.add(segment.segment_id)
        self._metrics.build_begun()
        began_s, result = self._clock.monotonic_s(), "failed"
        try:
            built, blob = await self._executor.run(Lane.BUILD, self._build_here, segment.view(), index, progress)
            files, chunks = await self._executor.run(Lane.DISK, write_blob, blob, version_of(index.spec))
            del blob
            await self._maker.make(
                Indexed(state.collection_id, *key, files.to_dict()),
                files,
                chunks,
                hand_over=lambda shard: shard.hand_over_index(*key, built),
                take_back=lambda shard: shard.take_back_index(*key),
            )
            self._unusable.pop(key, None)
            result = "ok"
        except (BuildCancelled, NoLeader, OutcomeUnknown):
            result = "cancelled"
        except (MemoryError, RuntimeError, ValueError) as error:
            self.failures[key] = f"{type(error).__name__}: {error}"
            log.exception("index build fails shard=%s segment=%d index=%d", self._maker.name, *key)
        finally:
            seconds = self._clock.monotonic_s() - began_s
            self._metrics.build_ended(seconds, result=result)
            self._maker.busy.discard(segment.segment_id)
            self.builds.pop(key, None)
            self._wake()
        log.info(
            "index built shard=%s segment=%d index=%d rows=%d result=%s seconds=%.1f",
            self._maker.name, *key, segment.rows, result, seconds,
        )  # fmt: skip

    def _build_here(self, view: SegmentView, index: ShardIndex, progress: BuildProgress) -> tuple[VectorIndex, bytes]:
        def note(fraction: float) -> None:
            progress.fraction = fraction

        built = build(
            index.spec,
            view.matrix(index.field_id, index.spec.metric),
            threads=self._settings.index.build_threads or os.cpu_count() or 1,
            progress=note,
            cancelled=lambda: progress.cancelled or not self._maker.leads,
        )
        return built, built.dump()

    def cancel_unwanted(self) -> None:
        """Cancel builds whose segment or index is gone."""
        for progress in self.builds.values():
            progress.cancelled = progress.cancelled or not self._still_wanted(progress)

    def cancel(self) -> None:
        for progress in self.builds.values():
            progress.cancelled = True

    def _still_wanted(self, progress: BuildProgress) -> bool:
        return any(
            progress.segment_id in state.stored and progress.index_id in state.indexes
            for state in self._maker.shard.populated()
        )

    # loading

    def missing(self, state: CollectionState, stored: StoredSegment) -> list[tuple[ShardIndex, BlobFiles]]:
        """Return the stored indexes of a segment that are not in memory and can be loaded."""
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

    async def load_index(self, stored: StoredSegment, index: ShardIndex, files: BlobFiles) -> None:
        """Bring an index into memory; what is damaged is mended or built anew."""
        segment = stored.segment
        try:
            built = await self._executor.run(Lane.DISK, self._read, segment.view(), index, files)
        except (IndexDamaged, ChunkDamaged) as error:
            if not await self._maker.mend(error):
                self._give_up((segment.segment_id, index.index_id), files, error)
            return
        if not segment.released and stored.indexes.get(index.index_id) is files:
            segment.install_index(index.field_id, built)
            stored.outdated.discard(index.index_id)

    def _read(self, view: SegmentView, index: ShardIndex, files: BlobFiles) -> VectorIndex:
        return load(
            index.spec, read_blob(files, self._maker.shard.get_chunk), view.matrix(index.field_id, index.spec.metric)
        )

    def _give_up(self, key: tuple[SegmentId, IndexId], files: BlobFiles, error: Exception) -> None:
        """A leader builds the index anew; another replica asks for its chunks again later, or gets the new one."""
        rebuild = self._maker.leads or not isinstance(error, ChunkFault)
        log.log(
            logging.ERROR if rebuild else logging.WARNING,
            "index damaged, %s shard=%s segment=%d index=%d: %s",
            "rebuilding" if rebuild else "no peer mends it now", self._maker.name, *key, error,
        )  # fmt: skip
        if rebuild:
            self._unusable[key] = files
            self._wake()
        else:
            self._mend_at_s[key] = self._clock.monotonic_s() + MEND_AGAIN_S

    def build_again(self, digest: bytes) -> bool:
        """Have the index built anew that this chunk is of; False if that is not for this replica to do."""
        found = [
            ((segment_id, index_id), files)
            for state in self._maker.shard.populated()
            for segment_id, stored in state.stored.items()
            for index_id, files in stored.indexes.items()
            if digest in files.digests
        ]
        if found and self._maker.leads:
            self._unusable.update(found)
            self._wake()
        return bool(found) and self._maker.leads

    def look_again(self) -> None:
        """Chunks are there that were not: what waits for one need wait no longer."""
        self._mend_at_s.clear()
        self._wake()

    def forget_faults(self) -> None:
        """The shard is another one: what was wrong with indexes of this one says nothing of it."""
        self._unusable.clear()
        self._mend_at_s.clear()
