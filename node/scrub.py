"""A node reads its own chunks again, slowly, and makes good what is not what it was.

A disk that lies is found by reading: every chunk's name is the digest of its bytes. What is damaged or missing comes
from where it still is, in this order:

    a peer            any replica of the shard that has a chunk of this name: equal names are equal bytes
    this memory       what only this replica has, as its checkpoints wrote it (rows that are still growing, deletes),
                      and rows of a segment whose columns are in memory: equal rows make equal chunks
    work done again   an index that nobody has any more is built anew, by the shard's leader

A segment whose chunk was replaced is used as before, from that moment on: whoever reads a chunk reads it by its name.
What cannot be made good is said, counted, and tried again with every later reading; it is never served.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np

from cluster.checkpoint import manifest_key, unsave
from node.chunk_transfer import ChunkTransfer, TokenBucket
from node.clock import Clock
from node.metrics import Metrics
from node.upkeep import Upkeep
from node.workers import Executor, Lane
from storage.chunks import ChunkFault, ChunkStore, RecordFault
from storage.columns import Batch
from storage.errors import ChunkDamaged
from storage.segment_files import TICK_FIELD, write_segment
from storage.types import FieldId, ShardId
from storage.view import SegmentView

log = logging.getLogger(__name__)

BATCH_CHUNKS: Final = 8
"""Read with one call of a worker: at most about 8 MiB, some 20 ms."""
NAMED_MAX: Final = 100
"""Lost chunks that are named; the rest is only counted."""


class Cure(StrEnum):
    """How a chunk was made good."""

    PEER = "peer"
    MEMORY = "memory"
    REBUILD = "rebuild"
    """Its index is going to be built anew."""
    UNNEEDED = "unneeded"
    """Nothing needs it any more."""
    NONE = "none"

    @property
    def is_there(self) -> bool:
        """Whether the chunk can be read now."""
        return self in (Cure.PEER, Cure.MEMORY)


@dataclass
class Scrub:
    """How far one reading of this node's chunks has come, and what it found."""

    began_ms: int = 0
    ended_ms: int = 0
    """0 while it goes on."""
    chunks_total: int = 0
    chunks_done: int = 0
    bytes_done: int = 0
    damaged: int = 0
    """Chunks, and manifests, that were not what they should be, or not there."""
    cured: int = 0
    lost: list[str] = field(default_factory=list)
    """What could not be made good, some of it: sentences."""

    @property
    def left(self) -> int:
        """How many could not be made good."""
        return self.damaged - self.cured

    def to_plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"left": self.left}


class Scrubber:
    """Reads the chunks of one node's shards. Belongs to the loop."""

    def __init__(
        self,
        store: ChunkStore,
        executor: Executor,
        clock: Clock,
        metrics: Metrics,
        upkeep: Mapping[ShardId, Upkeep],
        transfer: ChunkTransfer | None,
    ) -> None:
        """`upkeep` is of the shards that are here now; `transfer` is None on a node without peers."""
        self._store = store
        self._executor = executor
        self._clock = clock
        self._metrics = metrics
        self._upkeep = upkeep
        self._transfer = transfer

    async def run(
        self, scrub: Scrub, *, bytes_per_s: int, shards: Sequence[ShardId] | None = None, again: Callable[[], bool]
    ) -> None:
        """Read every chunk that is needed when this begins, of these shards or of all, and cure what is damaged.

        again  asked between reads: False ends the reading early
        """
        bucket = TokenBucket(self._clock, bytes_per_s)
        wanted = {
            shard_id: sorted(upkeep.shard.digests)
            for shard_id, upkeep in sorted(self._upkeep.items())
            if shards is None or shard_id in shards
        }
        scrub.began_ms = self._clock.wall_ms()
        scrub.chunks_total = sum(map(len, wanted.values()))
        for shard_id, digests in wanted.items():
            await self._read_manifest(shard_id, scrub)
            for first in range(0, len(digests), BATCH_CHUNKS):
                if not again():
                    return
                batch = digests[first : first + BATCH_CHUNKS]
                nbytes, faults = await self._executor.run(Lane.DISK, self._read, shard_id, batch)
                for fault in faults:
                    await self._cure(fault, scrub)
                scrub.chunks_done += len(batch)
                scrub.bytes_done += nbytes
                self._metrics.chunks_scrubbed(len(batch))
                await bucket.take(nbytes)
        scrub.ended_ms = self._clock.wall_ms()

    def _read(self, shard_id: ShardId, digests: Sequence[bytes]) -> tuple[int, list[ChunkFault]]:
        """Return how many bytes are whole, and what is not."""
        nbytes, faults = 0, []
        for digest in digests:
            try:
                nbytes += len(self._store.get(shard_id, digest))
            except ChunkFault as fault:
                faults.append(fault)
        return nbytes, faults

    async def _read_manifest(self, shard_id: ShardId, scrub: Scrub) -> None:
        """Read the shard's manifest; a damaged one is replaced by that of a checkpoint taken now."""
        try:
            await self._executor.run(Lane.DISK, self._store.read, manifest_key(shard_id))
        except RecordFault as fault:
            log.error("manifest damaged shard=%d, a checkpoint replaces it: %s", shard_id, fault)
            scrub.damaged += 1
            self._metrics.chunk_damaged()
            if (upkeep := self._upkeep.get(shard_id)) is not None:
                await upkeep.checkpoints.write()
            scrub.cured += 1

    async def _cure(self, fault: ChunkFault, scrub: Scrub) -> None:
        cure = await self.cure(fault)
        if cure is Cure.UNNEEDED:
            return
        scrub.damaged += 1
        if cure is not Cure.NONE:
            scrub.cured += 1
        elif len(scrub.lost) < NAMED_MAX:
            scrub.lost.append(fault.message)

    async def cure(self, fault: ChunkFault) -> Cure:
        """Make a damaged or missing chunk good, if that can be done, and say how."""
        upkeep = self._upkeep.get(fault.shard_id)
        if upkeep is None or fault.digest not in upkeep.shard.digests:
            return Cure.UNNEEDED
        self._metrics.chunk_damaged()
        try:
            cure = await self._found_cure(upkeep, fault)
        except OSError as error:
            cure = Cure.NONE
            log.warning("chunk not replaced shard=%d digest=%s: %s", fault.shard_id, fault.digest.hex(), error)
        self._metrics.chunk_cured(cure.value)
        if cure is Cure.NONE:
            log.error("chunk is lost for now shard=%d: %s", fault.shard_id, fault)
        else:
            log.warning("chunk made good shard=%d digest=%s by=%s", fault.shard_id, fault.digest.hex(), cure)
            upkeep.indexes.look_again()
        return cure

    async def _found_cure(self, upkeep: Upkeep, fault: ChunkFault) -> Cure:
        shard_id, digest = fault.shard_id, fault.digest
        async with upkeep.pins.committing:  # no checkpoint may be between what it has frozen and what it notes
            unsaved = unsave(upkeep.shard, digest)
        if unsaved:
            await upkeep.checkpoints.write()
            if not (await self._executor.run(Lane.DISK, self._read, shard_id, [digest]))[1]:
                return Cure.MEMORY
            if digest not in upkeep.shard.digests:
                return Cure.MEMORY  # the same is in other chunks now
        if self._transfer is not None and await self._transfer.repair(shard_id, digest):
            return Cure.PEER
        if (found := _column_of(upkeep, digest)) is not None and await self._executor.run(
            Lane.DISK, self._write_again, shard_id, digest, *found
        ):
            return Cure.MEMORY
        if digest not in upkeep.shard.digests:
            return Cure.UNNEEDED
        return Cure.REBUILD if upkeep.indexes.build_again(digest) else Cure.NONE

    def _write_again(self, shard_id: ShardId, digest: bytes, view: SegmentView, field_id: FieldId) -> bool:
        """Write the chunk from its column, if that is in memory; return whether it was."""
        fields = [] if field_id == TICK_FIELD else [field_id]
        try:
            columns = view.fetch(np.arange(view.rows, dtype=np.int64), fields).columns if fields else {}
        except ChunkDamaged:
            return False
        _, chunks = write_segment(Batch(columns, view.rows), view.ticks)
        made = [one for one in chunks if one[0] == digest]
        self._store.put_many(shard_id, made)
        return bool(made)


def _column_of(upkeep: Upkeep, digest: bytes) -> tuple[SegmentView, FieldId] | None:
    """Return the flushed segment, and the field of it, that a chunk belongs to; None if to none."""
    for state in upkeep.shard.populated():
        for one in state.stored.values():
            if one.segment.files is None:
                continue
            for field_id, refs in one.segment.files.fields.items():
                known = field_id == TICK_FIELD or field_id in one.segment.schema.by_id
                if known and any(ref.digest == digest for ref in refs):
                    return one.segment.view(), field_id
    return None
