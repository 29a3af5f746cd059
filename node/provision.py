"""What a replica needs before it applies `Flushed`, `Indexed` or `Compacted`: the chunks, and the rows made ready.

The replica that did the work has handed its product over. The others get here, once for each such message, while
nothing more is applied. A replica that cannot have the chunks lags: it must not apply past a message whose chunks it
has not, because its next checkpoint would promise them.

    Flushed     the replica has the rows, and equal rows make equal chunks: it writes them itself, which also shows
                that it is like the leader; mostly ahead, as soon as the segment is sealed
    Indexed     fetched, if they were not shipped
    Compacted   the same, then read back, as the rows of the new segment

When every other replica answers that it lacks a chunk, waiting is in vain, and when those that answer do, it is soon
for one that may be gone for good: they are past the message, and what came after it needed the chunk no more. Rows
that were merged are then merged again here; an index is left out, and background work finds it missing and has it built
anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cluster.checkpoint import rows_from
from cluster.message import Compacted, Flushed, Indexed, Message
from cluster.parse import parse_blob_files, parse_segment_files
from cluster.shard import CollectionState, Shard, StoredSegment
from node.chunk_pins import MESSAGE_S, ChunkPins
from node.chunk_transfer import ChunkTransfer, Dice, Progress
from node.workers import Executor, Lane
from storage.chunks import ChunkFault, ChunkStore
from storage.compaction import merge
from storage.errors import InvalidParameter, StorageFault
from storage.sealed import SealedRows, prepare, prepare_from_files
from storage.segment_files import TICK_FIELD, Chunks, SegmentFiles, write_segment
from storage.types import Tick
from storage.view import SegmentView

log = logging.getLogger(__name__)

BACK_OFF_S_MIN: Final = 0.2
BACK_OFF_S_MAX: Final = 5.0
ROUNDS_BEFORE_LOST: Final = 3
"""Fetches in a row in which nobody had a chunk, until it is believed that it is lost."""
ROUNDS_BEFORE_DONE_WITHOUT: Final = 9
"""The same where not all have answered, and what is lost can be made again: after half a minute."""


@dataclass(frozen=True)
class Flush:
    """A sealed segment's rows, prepared and written to chunks, for its `Flushed`."""

    stored: StoredSegment
    rows: SealedRows
    files: SegmentFiles
    lease_id: int


class Provisioner:
    """Prepares messages of one shard; await it before applying one. Belongs to the loop."""

    def __init__(
        self,
        shard: Callable[[], Shard],
        transfer: ChunkTransfer | None,
        store: ChunkStore,
        executor: Executor,
        dice: Dice,
        pins: ChunkPins,
        *,
        on_store_error: Callable[[OSError], None],
    ) -> None:
        """transfer  None on a node without peers: then every chunk is here, or nowhere"""
        self._shard = shard
        self._transfer = transfer
        self._store = store
        self._executor = executor
        self._dice = dice
        self._pins = pins
        self._on_store_error = on_store_error
        self._lease_id = 0
        self._flush: Flush | None = None
        self._writing = asyncio.Lock()
        self.waits_for = ""
        """What keeps this replica from applying its log; empty while nothing does."""

    async def __call__(self, message: Message) -> None:
        """Return when the message can be applied without reading or waiting. Does nothing for other messages."""
        if not isinstance(message, Flushed | Indexed | Compacted) or self._shard().is_handed_over(message):
            return
        try:
            while True:
                try:
                    await self._prepare(message)
                    return
                except OSError as error:
                    self._on_store_error(error)
                    self._lag(f"room in the chunk store: {error.strerror}")
                    await asyncio.sleep(BACK_OFF_S_MAX)
        except InvalidParameter:
            return  # applying it says so
        finally:
            if self.waits_for:
                log.info("replica goes on shard=%d", self._shard().shard_id)
            self.waits_for = ""

    async def write_rows(self, stored: StoredSegment) -> Flush:
        """Return the rows of a sealed segment, prepared, having written them to chunks: once, whoever asks.

        Raises OSError. Whoever is going to rely on the chunks keeps them, then asks whether they are `there`.
        """
        async with self._writing:
            flush = self._flush
            if flush is None or flush.stored is not stored:
                self.forget_flush()
                rows, files, chunks = await self._executor.run(Lane.DISK, _prepare_flush, stored.segment.view())
                lease_id = await self._pins.keep(files.digests, MESSAGE_S)
                await self._executor.run(Lane.DISK, self._store.put_many, self._shard().shard_id, chunks)
                flush = self._flush = Flush(stored, rows, files, lease_id)
            return flush

    def forget_flush(self) -> None:
        """Let go of what `write_rows` returned last; its chunks stay for a while."""
        self._flush = None

    async def there(self, files: SegmentFiles) -> bool:
        """Return whether all these chunks are in the store."""
        missing = self._store.missing
        return not await self._executor.run(Lane.DISK, missing, self._shard().shard_id, files.digests)

    async def _prepare(self, message: Flushed | Indexed | Compacted) -> None:
        match message:
            case Flushed():
                await self._flushed(message)
            case Indexed():
                await self._indexed(message)
            case Compacted():
                await self._compacted(message)

    async def _flushed(self, message: Flushed) -> None:
        shard = self._shard()
        files = parse_segment_files(message.files)
        stored = shard.stored_segment(message.collection_id, message.segment_id)
        if stored is None or stored.is_flushed or files.rows != stored.segment.rows:
            return
        await self._keep(files.sizes)
        async with self._writing:  # it may be written just now
            flush, self._flush = self._flush, None
        if flush is not None and flush.stored is stored and flush.files == files and await self.there(files):
            self._pins.release(flush.lease_id)
            self._hand_over(shard, message, flush.rows)
            return
        view = stored.segment.view()
        rows, is_like_leader = await self._executor.run(Lane.DISK, self._write_own, view, files)
        if not is_like_leader:
            log.error(
                "replica differs from its leader, takes the leader's rows shard=%d segment=%d rows=%d",
                shard.shard_id, message.segment_id, files.rows,
            )  # fmt: skip
            state = shard.collection(message.collection_id)
            theirs = await self._rows_of(files, state, released=False, can_be_made=False)
            if theirs is None:
                raise StorageFault(
                    f"segment {message.segment_id} differs from its leader's, and no replica has the leader's rows"
                )
            rows = theirs
        self._hand_over(shard, message, rows)

    def _write_own(self, view: SegmentView, files: SegmentFiles) -> tuple[SealedRows, bool]:
        """Return the rows, and whether their chunks, which are in the store then, are those of the message."""
        batch, ticks = rows_from(view, 0)
        rows = prepare(batch, ticks, view.schema)
        return rows, self._transfer is None or self._put(rows, files)

    def _put(self, rows: SealedRows, files: SegmentFiles) -> bool:
        """Store those of the rows' chunks that are missing; return False, having stored none, if they are others."""
        own, chunks = write_segment(rows.batch, rows.ticks)
        if own != files:
            return False
        shard_id = self._shard().shard_id
        missing = set(self._store.missing(shard_id, files.digests))
        if missing:
            self._store.put_many(shard_id, (one for one in chunks if one[0] in missing))
        return True

    async def _indexed(self, message: Indexed) -> None:
        shard = self._shard()
        files = parse_blob_files(message.files)
        stored = shard.stored_segment(message.collection_id, message.segment_id)
        if stored is None or message.index_id not in shard.collection(message.collection_id).indexes:
            return
        await self._keep(files.sizes)
        if not await self._have(files.sizes, can_be_made=True):
            log.warning(
                "an index that no replica has is left to be built anew shard=%d segment=%d index=%d",
                shard.shard_id, message.segment_id, message.index_id,
            )  # fmt: skip

    async def _compacted(self, message: Compacted) -> None:
        shard = self._shard()
        files = parse_segment_files(message.files)
        state = shard.collections.get(message.collection_id)
        if state is None or not files.rows or not message.inputs:
            return
        inputs = [state.stored[one].segment for one in message.inputs if one in state.stored]
        if len(inputs) < len(message.inputs):
            return
        await self._keep(files.sizes)
        released = not state.is_loaded(inputs[0].partition_id)
        rows = await self._rows_of(files, state, released=released, can_be_made=True)
        if rows is None:
            views = [one.view() for one in inputs]
            log.warning(
                "rows that no replica has are merged again shard=%d segments=%d rows=%d",
                shard.shard_id, len(views), files.rows,
            )  # fmt: skip
            rows = await self._executor.run(
                Lane.DISK, self._merge_again, views, message.as_of, message.expire_before, files
            )
        self._hand_over(shard, message, rows)

    async def _rows_of(
        self, files: SegmentFiles, state: CollectionState, *, released: bool, can_be_made: bool
    ) -> SealedRows | None:
        """Return the rows that the chunks hold, fetched if need be; None if they are lost."""
        get = self._shard().get_chunk
        while await self._have(files.sizes, can_be_made=can_be_made):
            try:
                return await self._executor.run(Lane.DISK, _read, files, get, state, released)
            except ChunkFault as fault:
                if self._transfer is None:
                    raise
                if not await self._transfer.repair(fault.shard_id, fault.digest):
                    self._lag(f"a peer to repair chunk {fault.digest.hex()}")
                    await asyncio.sleep(BACK_OFF_S_MAX)
        return None

    def _merge_again(
        self, views: list[SegmentView], as_of: Tick, expire_before: Tick, files: SegmentFiles
    ) -> SealedRows:
        field_ids = files.fields.keys() - {TICK_FIELD}  # the schema may have changed since the leader merged
        rows = prepare(*merge(views, as_of, expire_before, field_ids=field_ids), views[0].schema)
        if not self._put(rows, files):
            raise ChunkFault(self._shard().shard_id, files.digests[0], "no replica has it, nor the rows it was made of")
        return rows

    async def _have(self, sizes: Mapping[bytes, int], *, can_be_made: bool) -> bool:
        """Return True when the chunks are here, however long it takes; False if they are nowhere.

        can_be_made  what they hold can be made again here, so that nobody need be waited for who may never come back
        """
        if self._transfer is None:
            return True
        shard_id = self._shard().shard_id
        pause_s, rounds_nowhere, rounds_not_found = BACK_OFF_S_MIN, 0, 0
        while True:
            progress = Progress(shard_id)
            left = await self._transfer.fetch(shard_id, sizes, progress=progress)
            if not left:
                return True
            self._lag(f"{len(left)} of {len(sizes)} chunks, which no peer that answers has")
            rounds_nowhere = rounds_nowhere + 1 if progress.nowhere else 0
            rounds_not_found = rounds_not_found + 1 if progress.not_found and can_be_made else 0
            if rounds_nowhere == ROUNDS_BEFORE_LOST or rounds_not_found == ROUNDS_BEFORE_DONE_WITHOUT:
                return False
            await asyncio.sleep(pause_s * (1 + self._dice.random()))
            pause_s = min(2 * pause_s, BACK_OFF_S_MAX)

    def _lag(self, waits_for: str) -> None:
        if not self.waits_for:
            log.warning("replica lags shard=%d waits for %s", self._shard().shard_id, waits_for)
        self.waits_for = waits_for

    async def _keep(self, sizes: Mapping[bytes, int]) -> None:
        """Keep the chunks until the message is applied, which it is by the time of the next one."""
        lease_id = await self._pins.keep(sizes, MESSAGE_S)
        self._pins.release(self._lease_id)
        self._lease_id = lease_id

    def _hand_over(self, shard: Shard, message: Flushed | Compacted, rows: SealedRows) -> None:
        if shard is self._shard():
            inputs = [message.segment_id] if isinstance(message, Flushed) else message.inputs
            shard.hand_over_rows(inputs, rows)


def _prepare_flush(view: SegmentView) -> tuple[SealedRows, SegmentFiles, Chunks]:
    rows = prepare(*rows_from(view, 0), view.schema)
    return rows, *write_segment(rows.batch, rows.ticks)


def _read(files: SegmentFiles, get: Callable[[bytes], bytes], state: CollectionState, released: bool) -> SealedRows:
    return prepare_from_files(files, get, state.schema, released=released)
