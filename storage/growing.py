"""A segment that still takes rows.

Rows stay in the batches in which they came, small neighbours merged like the digits of a binary counter: two of about
equal size become one of twice the size. So a row is copied O(log n) times in all, and a view has few parts.

Dense vectors, which are most of a row, are copied once: each batch's to behind those of the batch before it, in a room
with space for many. Neighbours in one room are merged without a copy; those in different rooms, and all other columns,
only while that is less than MERGE_BYTES_MAX. So no append makes the event loop wait for more than a copy of those
and of what it brings; memory that is new to the process, which is what takes the time of a copy, comes with the rows.

A checkpoint writes the rows that are not in files yet and calls `spilled`; a restart gives them back to `restore`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.columns import Batch, Column, Offsets, VectorColumn, stand_together
from storage.deletes import DeleteLog, Ticks
from storage.key_lookup import KeyDict, Keys, KeySet, batch_keys
from storage.schema import CollectionSchema
from storage.segment_files import SegmentFiles
from storage.types import FieldId, PartitionId, SegmentId, Tick
from storage.view import Part, SegmentView

PART_ROWS_MAX: Final = 16_384
PART_BYTES_MAX: Final = 16 << 20
MERGE_BYTES_MAX: Final = 4 << 20
"""Copied to merge parts: 3 ms, where all memory for it is new to the process."""
ROOM_BATCHES: Final = 16
"""The first room has space for so many batches like the first, each later one for as many rows as came before it.
Space that no rows have come to is no memory yet."""
ROOM_BYTES_MAX: Final = 64 << 20
"""More than a part may have: searches go through a room as a whole, whatever parts are in it."""


class _Room:
    """Memory for the vectors of consecutive batches. Rows that are in it stay as they are."""

    def __init__(self, rows: int, like: npt.NDArray[Any]) -> None:
        self._vectors = np.empty((rows, like.shape[1]), like.dtype)
        self._filled = 0

    def has_space(self, rows: int) -> bool:
        return self._filled + rows <= len(self._vectors)

    def add(self, vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the same vectors, copied to behind the last ones."""
        first, self._filled = self._filled, self._filled + len(vectors)
        mine = self._vectors[first : self._filled]
        mine.view(np.uint8)[...] = vectors.view(np.uint8)  # as bytes: they may be anywhere in what came in
        mine.flags.writeable = False
        return mine


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
        self._rooms: dict[FieldId, _Room] = {}
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
        """Add the rows, all inserted at the tick. Dense vectors are copied: they may share memory with much else.

        Cost: their keys, and the copying described above.
        """
        self._append(self._housed(batch), np.full(batch.rows, tick, np.int64))

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

    def _housed(self, batch: Batch) -> Batch:
        """Return the rows with their dense vectors in rooms."""
        columns: dict[FieldId, Column] = {}
        for field_id, column in batch.columns.items():
            columns[field_id] = column
            if isinstance(column, VectorColumn) and batch.rows:
                room = self._rooms.get(field_id)
                if room is None or not room.has_space(batch.rows):
                    room = self._rooms[field_id] = _Room(self._room_rows(batch, column), column.values)
                columns[field_id] = VectorColumn(room.add(column.values))
        return Batch(columns, batch.rows)

    def _room_rows(self, batch: Batch, column: VectorColumn) -> int:
        """Return how many rows the next room has space for."""
        rows = max(self.rows, ROOM_BATCHES * batch.rows)
        return max(batch.rows, min(rows, ROOM_BYTES_MAX // max(1, column.nbytes // batch.rows)))

    def _merge(self) -> None:
        """Join the last parts while the one before is no larger than twice the last, up to the limits."""
        take = 1
        rows, nbytes = self._parts[-1].batch.rows, self._parts[-1].batch.nbytes
        while take < len(self._parts):
            before = self._parts[-1 - take].batch
            if before.rows > 2 * rows or before.rows + rows > PART_ROWS_MAX or before.nbytes + nbytes > PART_BYTES_MAX:
                break
            rows, nbytes, take = rows + before.rows, nbytes + before.nbytes, take + 1
            if self._copied_bytes(take) > MERGE_BYTES_MAX:
                take -= 1
                break
        if take > 1:
            joined = self._parts[-take:]
            self._parts[-take:] = [Part.joined(joined)]

    def _copied_bytes(self, take: int) -> int:
        """Return how many bytes are copied to join so many last parts."""
        batches = [part.batch for part in self._parts[-take:]]
        copied = sum(one.nbytes for one in batches)
        for field_id, column in batches[0].columns.items():
            columns = [one.columns[field_id] for one in batches]
            if isinstance(column, VectorColumn) and stand_together(columns) is not None:
                copied -= sum(one.nbytes for one in columns)
        return copied
