"""A segment that still takes rows.

Rows stay in the batches in which they came, small neighbours merged like the digits of a binary counter: two of about
equal size become one of twice the size. So a row is copied O(log n) times in all, a view has few parts, and because
nothing merges beyond PART_ROWS_MAX or PART_BYTES_MAX, no single append makes the event loop wait for more than a copy
of 16 MiB (about 5 ms).

A checkpoint writes the rows that are not in files yet and calls `spilled`; a restart gives them back to `restore`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from storage.columns import Batch, Offsets
from storage.deletes import DeleteLog, Ticks
from storage.key_lookup import KeyDict, Keys, KeySet, batch_keys
from storage.schema import CollectionSchema
from storage.segment_files import SegmentFiles
from storage.types import PartitionId, SegmentId, Tick
from storage.view import Part, SegmentView

PART_ROWS_MAX: Final = 16_384
PART_BYTES_MAX: Final = 16 << 20


class GrowingSegment:
    """Rows in the order in which the log brought them, and their deletes.

    Invariants
      1. Rows, ticks and deletes only ever get more; a view is a prefix of all three.
      2. Parts follow one another without gaps from offset 0 and are never empty.
      3. Rows [0, spilled_rows) are in `spilled_files`.
    """

    def __init__(
        self,
        segment_id: SegmentId,
        partition_id: PartitionId,
        schema: CollectionSchema,
        created_tick: Tick,
        created_ms: int = 0,
    ) -> None:
        self.segment_id = segment_id
        self.partition_id = partition_id
        self.schema = schema
        self.created_tick = created_tick
        self.created_ms = created_ms
        self.rows = 0
        self.nbytes = 0
        self.deletes = DeleteLog()
        self.keys = KeyDict()
        self.spilled_files: tuple[SegmentFiles, ...] = ()
        self._parts: list[Part] = []
        self._ticks = np.empty(64, np.int64)
        self._view: SegmentView | None = None

    @property
    def live_rows(self) -> int:
        return self.rows - len(self.deletes)

    @property
    def first_tick(self) -> Tick:
        """The tick of the first row, 0 if there is none."""
        return Tick(int(self._ticks[0])) if self.rows else Tick(0)

    @property
    def last_tick(self) -> Tick:
        """The tick of the last row, 0 if there is none."""
        return Tick(int(self._ticks[self.rows - 1])) if self.rows else Tick(0)

    @property
    def spilled_rows(self) -> int:
        return sum(files.rows for files in self.spilled_files)

    def append(self, batch: Batch, tick: Tick) -> None:
        """Add the rows, all inserted at the tick. Cost: their keys, and the copying described above."""
        self._append(batch, np.full(batch.rows, tick, np.int64))

    def delete(self, keys: Keys | KeySet, tick: Tick) -> int:
        """Let the live rows with these primary keys that were inserted before the tick die; return how many died."""
        dying = []
        for key in KeySet.of(keys).values:
            # A key's live rows are its newest: whatever killed one killed all before it.
            for offset in self.keys.newest_first(key):
                if self.deletes.is_dead_row(offset):
                    break
                if self._ticks[offset] < tick:
                    dying.append(offset)
        if dying:
            self.deletes.record(np.array(sorted(dying), np.int64), tick)
            self._view = None
        return len(dying)

    def live_offsets(self, keys: Keys | KeySet) -> Offsets:
        """Return the offsets of the live rows with these primary keys, ascending."""
        offsets = self.keys.find(keys)
        return offsets[~self.deletes.is_dead(offsets)]

    def ticks_of(self, offsets: Offsets) -> Ticks:
        """Return the insert ticks of these rows."""
        return self._ticks[offsets]

    def view(self) -> SegmentView:
        """Return what readers may see from now on; the same object until something changes."""
        if self._view is None:
            self._view = SegmentView(
                segment_id=self.segment_id,
                partition_id=self.partition_id,
                schema=self.schema,
                parts=tuple(self._parts),
                ticks=self._ticks[: self.rows],
                deletes=self.deletes.view(),
                keys=self.keys,
            )
        return self._view

    # spilling

    def unspilled(self) -> tuple[Batch, Ticks] | None:
        """Return the rows that are in no file yet, to be written by a worker; None if there are none."""
        first = self.spilled_rows
        if first == self.rows:
            return None
        pieces = [part.batch.slice(max(first - part.start, 0), part.batch.rows) for part in self._parts]
        return Batch.concat([piece for piece in pieces if piece.rows]), self._ticks[first : self.rows]

    def spilled(self, files: SegmentFiles) -> None:
        """Note that the rows after those spilled before are in these files."""
        assert self.spilled_rows + files.rows <= self.rows, "more rows spilled than there are"
        self.spilled_files = (*self.spilled_files, files)

    def restore(self, batch: Batch, ticks: Ticks, files: SegmentFiles | None = None) -> None:
        """Add rows read back from files after a restart, before anything else is appended."""
        for start in range(0, batch.rows, PART_ROWS_MAX):
            self._append(batch.slice(start, start + PART_ROWS_MAX), ticks[start : start + PART_ROWS_MAX])
        if files is not None:
            self.spilled(files)

    def restore_deletes(self, data: bytes | memoryview) -> None:
        """Take the deletes of a checkpoint, once all its rows are back. Raises DeletesDamaged."""
        self.deletes = DeleteLog.from_bytes(data, self.rows)
        self._view = None

    def _append(self, batch: Batch, ticks: Ticks) -> None:
        if batch.rows == 0:
            return
        assert int(ticks[0]) >= self.last_tick, f"rows of tick {ticks[0]} after rows of {self.last_tick}"
        first, self.rows = self.rows, self.rows + batch.rows
        if self.rows > len(self._ticks):
            grown = np.empty(max(self.rows, 2 * len(self._ticks)), np.int64)
            grown[:first] = self._ticks[:first]
            self._ticks = grown
        self._ticks[first : self.rows] = ticks
        self.keys.add(batch_keys(batch, self.schema.primary.id))
        self.deletes.reserve(self.rows)
        self.nbytes += batch.nbytes + 8 * batch.rows
        self._parts.append(Part(batch, first))
        self._merge()
        self._view = None

    def _merge(self) -> None:
        """Join the last parts while the one before is no larger than twice the last, up to the limits."""
        take = 1
        rows, nbytes = self._parts[-1].batch.rows, self._parts[-1].batch.nbytes
        while take < len(self._parts):
            before = self._parts[-1 - take].batch
            if before.rows > 2 * rows or before.rows + rows > PART_ROWS_MAX or before.nbytes + nbytes > PART_BYTES_MAX:
                break
            rows, nbytes, take = rows + before.rows, nbytes + before.nbytes, take + 1
        if take > 1:
            joined = self._parts[-take:]
            self._parts[-take:] = [Part.joined(joined)]
