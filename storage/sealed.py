"""A segment that takes no more rows.

Its rows never change; its deletes still come. What changes is where the rows are:

    just sealed      the growing segment's parts and key dictionary, taken over as they are: sealing copies nothing,
                     because it happens on the event loop
    flushed          one batch, sorted keys, statistics (`SealedRows`, prepared by a worker), and chunks on disk
    indexed          the vectors of an indexed field live in its index and nowhere else in memory
    released         only primary keys, ticks and deletes are in memory; reads fetch chunks

COSINE indexes hold vectors of length 1. Where the inserted ones were not, `fetch` reads them from chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from index.metric import Metric
from index.protocol import VectorIndex
from index.sparse import SparseRows
from storage.columns import Batch, Column, Offsets
from storage.deletes import DeleteLog, Ticks
from storage.filter import FieldStats
from storage.growing import GrowingSegment
from storage.key_lookup import KeyLookup, Keys, KeySet, sorted_lookup
from storage.schema import CollectionSchema
from storage.segment_files import GetChunk, SegmentFiles, read_column, read_rows, read_segment
from storage.stats import absent_stats, batch_stats
from storage.types import FieldId, PartitionId, SegmentId, Tick
from storage.vectors import dense, stored
from storage.view import Part, ReadColumn, SegmentView, as_unit_rows


@dataclass(frozen=True, eq=False)
class SealedRows:
    """Immutable rows with all that is computed from them once. `prepare` makes it, on a worker thread."""

    batch: Batch
    ticks: Ticks
    keys: KeyLookup
    stats: Mapping[FieldId, FieldStats]
    unit: frozenset[FieldId] = field(default_factory=frozenset)
    """Vector fields all of whose rows have length 1 already."""


def prepare(batch: Batch, ticks: Ticks, schema: CollectionSchema) -> SealedRows:
    """Return the rows ready to be a sealed segment: keys sorted, statistics taken. Pure; milliseconds per MiB."""
    assert len(ticks) == batch.rows and (np.diff(ticks) >= 0).all(), "ticks ascend, one for each row"
    unit = []
    for one in schema.vectors:
        matrix = dense(batch.columns[one.id]) if one.id in batch.columns else None
        if matrix is not None and as_unit_rows(matrix) is matrix:
            unit.append(one.id)
    keys = sorted_lookup(batch, schema.primary.id)
    return SealedRows(batch, ticks, keys, batch_stats(batch, schema), frozenset(unit))


def prepare_from_files(
    files: SegmentFiles, get: GetChunk, schema: CollectionSchema, *, released: bool = False
) -> SealedRows:
    """Return the rows read back from chunks, as far as the schema has their fields; of a released segment the primary
    keys and ticks only.

    Statistics of a released segment are those of its keys. Raises ChunkDamaged.
    """
    wanted = [schema.primary.id] if released else [one.id for one in schema.fields if one.id in files.fields]
    batch, ticks = read_segment(files, get, wanted)
    return prepare(batch, ticks, schema)


class SealedSegment:
    """Rows that stay, deletes that come.

    Invariants
      1. Offsets mean the same rows for ever: flushing, indexing, releasing and loading move data, not rows.
      2. A field that is in no batch in memory is in an index that has the vectors, or in `files`.
    """

    def __init__(
        self,
        segment_id: SegmentId,
        partition_id: PartitionId,
        schema: CollectionSchema,
        *,
        parts: Sequence[Part],
        ticks: Ticks,
        keys: KeyLookup,
        deletes: DeleteLog,
    ) -> None:
        self.segment_id = segment_id
        self.partition_id = partition_id
        self.schema = schema
        self.deletes = deletes
        self.files: SegmentFiles | None = None
        self.indexes: dict[FieldId, VectorIndex] = {}
        self.released = False
        self._parts = tuple(parts)
        self._ticks = ticks
        self._keys = keys
        self._stats: Mapping[FieldId, FieldStats] = {}
        self._unit: frozenset[FieldId] = frozenset()
        self._lacking: Mapping[FieldId, FieldStats] | None = None
        """Statistics of fields of the schema that the rows lack; None until somebody asks."""
        self._get: GetChunk | None = None
        self._view: SegmentView | None = None

    @classmethod
    def from_growing(cls, growing: GrowingSegment) -> SealedSegment:
        """Return the segment sealed. The growing one must not be used again. Copies nothing."""
        view = growing.view()
        return cls(
            growing.segment_id,
            growing.partition_id,
            growing.schema,
            parts=view.parts,
            ticks=view.ticks,
            keys=growing.keys,
            deletes=growing.deletes,
        )

    @classmethod
    def from_rows(
        cls,
        segment_id: SegmentId,
        partition_id: PartitionId,
        schema: CollectionSchema,
        rows: SealedRows,
        *,
        files: SegmentFiles | None = None,
        get: GetChunk | None = None,
        deletes: DeleteLog | None = None,
    ) -> SealedSegment:
        """Return a segment of prepared rows: a compaction's output, or one read back after a restart.

        files, get  where its chunks are and how to read them, once they are written
        deletes     those of a checkpoint; none by default
        """
        log = DeleteLog(len(rows.ticks)) if deletes is None else deletes
        segment = cls(segment_id, partition_id, schema, parts=(), ticks=rows.ticks, keys=rows.keys, deletes=log)
        segment._take_rows(rows)
        segment.files, segment._get = files, get
        segment.released = any(one.id not in rows.batch.columns for one in schema.vectors)  # which every row has
        return segment

    @classmethod
    def from_batch(
        cls,
        segment_id: SegmentId,
        partition_id: PartitionId,
        schema: CollectionSchema,
        batch: Batch,
        ticks: Ticks,
        *,
        files: SegmentFiles | None = None,
        get: GetChunk | None = None,
        deletes: DeleteLog | None = None,
    ) -> SealedSegment:
        """Return a segment of these rows, prepared here and now."""
        rows = prepare(batch, ticks, schema)
        return cls.from_rows(segment_id, partition_id, schema, rows, files=files, get=get, deletes=deletes)

    # facts

    @property
    def rows(self) -> int:
        return len(self._ticks)

    @property
    def live_rows(self) -> int:
        return self.rows - len(self.deletes)

    @property
    def nbytes(self) -> int:
        """Bytes of rows and indexes in memory."""
        held = sum(part.batch.nbytes for part in self._parts) + self._ticks.nbytes + self._keys.nbytes
        return held + sum(index.memory_bytes for index in self.indexes.values())

    @property
    def first_tick(self) -> Tick:
        return Tick(int(self._ticks[0])) if self.rows else Tick(0)

    @property
    def last_tick(self) -> Tick:
        return Tick(int(self._ticks[-1])) if self.rows else Tick(0)

    def ticks_of(self, offsets: Offsets) -> Ticks:
        """Return the insert ticks of these rows."""
        return self._ticks[offsets]

    # deletes

    def delete(self, keys: Keys | KeySet, tick: Tick) -> int:
        """Let the live rows with these primary keys that were inserted before the tick die; return how many died."""
        offsets = self.live_offsets(keys)
        offsets = offsets[self._ticks[offsets] < tick]
        if len(offsets):
            self.deletes.record(offsets, tick)
            self._view = None
        return len(offsets)

    def live_offsets(self, keys: Keys | KeySet) -> Offsets:
        """Return the offsets of the live rows with these primary keys, ascending."""
        offsets = self._keys.find(keys)
        return offsets[~self.deletes.is_dead(offsets)] if len(offsets) else offsets

    # steps of its life

    def flushed(self, rows: SealedRows, files: SegmentFiles, get: GetChunk) -> None:
        """Take the prepared rows in place of the growing parts; they are in these chunks now."""
        assert len(rows.ticks) == self.rows == files.rows, "flushing moves rows, it does not change them"
        self.files, self._get = files, get
        self._view = None
        if not self.released:
            self._take_rows(rows)

    def install_index(self, field_id: FieldId, index: VectorIndex) -> None:
        """Search this field through the index from now on, and let go of the field's own copy of the vectors.

        Where the index holds unit vectors and the inserted ones were not, the copy goes only when chunks have it.
        """
        assert index.rows == self.rows, "an index has every row of its segment"
        self.indexes[field_id] = index
        if self.files is not None or self._holds_originals(field_id):
            self._drop_columns([field_id])
        self._view = None

    def drop_index(self, field_id: FieldId, column: Column | None = None) -> None:
        """Search this field exactly from now on.

        column  the vectors, read back by a worker with `read_original`; needed unless the index holds them
        """
        index = self.indexes.pop(field_id, None)
        self._view = None
        if index is None or self.released or any(field_id in part.batch.columns for part in self._parts):
            return
        if column is None and self._index_holds_originals(field_id, index):
            vectors = index.vectors()
            column = stored(
                self.schema.by_id[field_id], vectors if isinstance(vectors, SparseRows) else np.array(vectors)
            )
        if column is not None:
            (part,) = self._parts
            self._parts = (Part(Batch({**part.batch.columns, field_id: column}, self.rows), 0),)

    def adopt(self, schema: CollectionSchema) -> None:
        """Answer under another version of the collection's schema from now on; rows stay as they are.

        What is in memory of dropped fields goes, unless it is yet to be flushed: replicas write the same chunks
        whenever they do so.
        """
        self.schema = schema
        self._view = self._lacking = None
        for field_id in [one for one in self.indexes if one not in schema.by_id]:
            del self.indexes[field_id]
        if self.files is not None:
            gone = {one for part in self._parts for one in part.batch.columns if one not in schema.by_id}
            if gone:
                self._drop_columns(sorted(gone))

    def release(self) -> None:
        """Keep only primary keys, ticks and deletes in memory. The segment must be flushed."""
        assert self.files is not None, "a segment is flushed before it is released"
        primary = self.schema.primary.id
        self._drop_columns([one.id for one in self.schema.fields if one.id != primary])
        self.indexes = {}
        self.released = True
        self._view = None

    def load(self, rows: SealedRows, indexes: Mapping[FieldId, VectorIndex] | None = None) -> None:
        """Take the columns (from `prepare_from_files`) and indexes back into memory."""
        self.released = False
        self._take_rows(rows)
        for field_id, index in (indexes or {}).items():
            self.install_index(field_id, index)

    def read_original(self, field_id: FieldId, offsets: Offsets | None = None) -> Column:
        """Return a column, or some rows of it, from chunks. Blocks; raises ChunkDamaged. Safe on any thread."""
        return _reader(self.files, self._get)(field_id, offsets)

    def view(self) -> SegmentView:
        """Return what readers may see from now on; the same object until something changes."""
        if self._view is None:
            stored = self._stored()
            if self._lacking is None:
                lacking = [one for one in self.schema.fields if one.id not in stored]
                self._lacking = {one.id: found for one in lacking if (found := absent_stats(one, self.rows))}
            self._view = SegmentView(
                segment_id=self.segment_id,
                partition_id=self.partition_id,
                schema=self.schema,
                parts=self._parts,
                ticks=self._ticks,
                deletes=self.deletes.view(),
                keys=self._keys,
                indexes=dict(self.indexes),
                original=frozenset(i for i in self.indexes if self._holds_originals(i)),
                stats={**self._stats, **self._lacking} if self._lacking and self._stats else self._stats,
                sealed=True,
                read_column=_reader(self.files, self._get) if self.files is not None else None,
                stored=stored,
            )
        return self._view

    def _stored(self) -> Mapping[FieldId, Any]:
        """Return the fields that the rows have."""
        if self.files is not None:
            return self.files.fields
        held = self._parts[0].batch.columns if self._parts else self.schema.by_id
        return {**held, **self.indexes}

    def _take_rows(self, rows: SealedRows) -> None:
        self._ticks, self._keys = rows.ticks, rows.keys
        self._stats, self._unit = rows.stats, rows.unit
        held = [one for one in rows.batch.columns if one in self.schema.by_id]
        part = Part(rows.batch if len(held) == len(rows.batch.columns) else rows.batch.select(held), 0)
        for field_id in rows.unit.intersection(held):
            part.note_unit(field_id)
        self._parts = (part,)
        for field_id in list(self.indexes):
            self.install_index(field_id, self.indexes[field_id])
        self._view = None

    def _drop_columns(self, field_ids: Sequence[FieldId]) -> None:
        kept = []
        for part in self._parts:
            columns = {i: column for i, column in part.batch.columns.items() if i not in field_ids}
            kept.append(Part(Batch(columns, part.batch.rows), part.start))
        self._parts = tuple(kept)

    def _holds_originals(self, field_id: FieldId) -> bool:
        return self._index_holds_originals(field_id, self.indexes[field_id])

    def _index_holds_originals(self, field_id: FieldId, index: VectorIndex) -> bool:
        return index.spec.metric is not Metric.COSINE or field_id in self._unit


def _reader(files: SegmentFiles | None, get: GetChunk | None) -> ReadColumn:
    """Return what reads a column, or rows of one, from the chunks."""
    assert files is not None and get is not None, "only a flushed segment has chunks"

    def read(field_id: FieldId, offsets: Offsets | None) -> Column:
        if offsets is None:
            return read_column(files, field_id, get)
        return read_rows(files, field_id, offsets, get)

    return read
