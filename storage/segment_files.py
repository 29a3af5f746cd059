"""A segment's columns as chunks: each column cut on its own into row ranges of about 1 MiB.

A chunk is a mark of its segment, then one range of one column as a `Batch`. Ticks are a column too, under TICK_FIELD.
Equal rows give equal chunks whatever batches they arrived in, so replicas can compare digests; the cuts depend on
nothing but the values. An index is a blob, cut the same way.

The mark is a digest of the segment's ticks, which no other rows of a shard have. Without it two segments with a
constant column would share chunks, and sweeping up after one could take from the other what was just written for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from storage.columns import (
    ArrayColumn,
    Batch,
    BatchDamaged,
    Column,
    Offsets,
    ScalarColumn,
    SparseColumn,
    StringColumn,
    VectorColumn,
    concat_columns,
)
from storage.deletes import Ticks
from storage.errors import ChunkDamaged
from storage.types import FieldId

CHUNK_BYTES: Final = 1 << 20
DIGEST_BYTES: Final = 16
TICK_FIELD: Final = FieldId(1)
"""Below the user's fields, which begin at 100."""

GetChunk = Callable[[bytes], bytes]
"""Returns the bytes with this digest, verified. Raises ChunkDamaged."""


def digest_of(data: bytes | memoryview) -> bytes:
    """Return the digest by which a chunk is named and verified."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """One chunk: its digest, how many rows and how many bytes it has."""

    digest: bytes
    rows: int
    bytes: int


@dataclass(frozen=True)
class SegmentFiles:
    """Where a segment's columns are: for each field its chunks in row order."""

    rows: int
    fields: Mapping[FieldId, tuple[ChunkRef, ...]]

    @property
    def nbytes(self) -> int:
        return sum(ref.bytes for refs in self.fields.values() for ref in refs)

    @property
    def digests(self) -> list[bytes]:
        """Every chunk, in the order of fields and rows; one that is used twice appears twice."""
        return [ref.digest for refs in self.fields.values() for ref in refs]

    @property
    def sizes(self) -> dict[bytes, int]:
        """Digest -> bytes of every chunk."""
        return {ref.digest: ref.bytes for refs in self.fields.values() for ref in refs}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for CBOR."""
        fields = {int(i): [[r.digest, r.rows, r.bytes] for r in self.fields[i]] for i in sorted(self.fields)}
        return {"rows": self.rows, "fields": fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SegmentFiles:
        fields = {FieldId(i): tuple(ChunkRef(*one) for one in refs) for i, refs in data["fields"].items()}
        return cls(data["rows"], fields)


@dataclass(frozen=True)
class BlobFiles:
    """Where a blob is, such as a dumped index."""

    nbytes: int
    chunks: tuple[ChunkRef, ...]
    version: int = 1
    """Of the code that made it, where a later one makes better ones (`index.engines.version_of`)."""

    @property
    def digests(self) -> list[bytes]:
        return [ref.digest for ref in self.chunks]

    @property
    def sizes(self) -> dict[bytes, int]:
        """Digest -> bytes of every chunk."""
        return {ref.digest: ref.bytes for ref in self.chunks}

    def to_dict(self) -> dict[str, Any]:
        newer = {} if self.version == 1 else {"version": self.version}
        return {"bytes": self.nbytes, "chunks": [[r.digest, r.rows, r.bytes] for r in self.chunks], **newer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlobFiles:
        return cls(data["bytes"], tuple(ChunkRef(*one) for one in data["chunks"]), data.get("version", 1))


Chunks = Iterator[tuple[bytes, bytes]]
"""(digest, bytes) of each chunk; made when asked for, so that a segment's bytes are never all there twice."""


def write_segment(batch: Batch, ticks: Ticks) -> tuple[SegmentFiles, Chunks]:
    """Return where the rows will be and the chunks to put there.

    A large segment is serialised twice, once for the digests and once for the bytes: hashing 1 GB/s beats holding it
    in memory a second time.
    """
    assert len(ticks) == batch.rows, "a tick for each row"
    columns: dict[FieldId, Column] = {TICK_FIELD: ScalarColumn(np.asarray(ticks, np.int64)), **batch.columns}
    columns = {i: _canonical(columns[i]) for i in sorted(columns)}
    cuts = {i: _cuts(column) for i, column in columns.items()}
    mark = digest_of(np.ascontiguousarray(ticks, "<i8").tobytes())
    fields: dict[FieldId, tuple[ChunkRef, ...]] = {}
    kept: dict[bytes, bytes] = {}
    kept_bytes = 0
    for field_id, column in columns.items():
        refs = []
        for start, stop in cuts[field_id]:
            data = mark + _piece(field_id, column, start, stop)
            refs.append(ChunkRef(digest_of(data), stop - start, len(data)))
            if kept_bytes + len(data) <= CHUNK_BYTES:
                kept[refs[-1].digest] = data
                kept_bytes += len(data)
        fields[field_id] = tuple(refs)

    def chunks() -> Chunks:
        for field_id, column in columns.items():
            for (start, stop), ref in zip(cuts[field_id], fields[field_id], strict=True):
                yield ref.digest, kept.get(ref.digest) or mark + _piece(field_id, column, start, stop)

    return SegmentFiles(batch.rows, fields), chunks()


def read_segment(files: SegmentFiles, get: GetChunk, fields: Sequence[FieldId] | None = None) -> tuple[Batch, Ticks]:
    """Return (the rows with these fields (None: all), their insert ticks). Raises ChunkDamaged."""
    wanted = [one for one in files.fields if one != TICK_FIELD] if fields is None else list(fields)
    columns = {one: read_column(files, one, get) for one in wanted}
    ticks = read_column(files, TICK_FIELD, get)
    assert isinstance(ticks, ScalarColumn)
    return Batch(columns, files.rows), ticks.values


def read_column(files: SegmentFiles, field_id: FieldId, get: GetChunk) -> Column:
    """Return a whole column. Raises ChunkDamaged."""
    refs = files.fields[field_id]
    first = _column(refs[0], field_id, get)
    if len(refs) == 1 or not isinstance(first, VectorColumn):
        return concat_columns([first, *(_column(ref, field_id, get) for ref in refs[1:])])
    # Vectors are most of the bytes: each chunk's go to their place while they are in the cache, and are not held twice.
    values = np.empty((sum(ref.rows for ref in refs), *first.values.shape[1:]), first.values.dtype)
    values[: len(first)] = first.values
    start = len(first)
    for ref in refs[1:]:
        piece = _column(ref, field_id, get)
        assert isinstance(piece, VectorColumn), "a column is of one kind"
        values[start : start + ref.rows] = piece.values
        start += ref.rows
    return VectorColumn(values)


def read_rows(files: SegmentFiles, field_id: FieldId, offsets: Offsets, get: GetChunk) -> Column:
    """Return these rows of a column, in the order of the offsets; reads only the chunks that hold them."""
    refs = files.fields[field_id]
    stops = np.cumsum([ref.rows for ref in refs])
    owners = np.searchsorted(stops, offsets, side="right")
    if len(offsets) == 0:
        return _column(refs[0], field_id, get).take(offsets)
    pieces, order = [], []
    for owner in np.unique(owners).tolist():
        mine = np.flatnonzero(owners == owner)
        first = int(stops[owner]) - refs[owner].rows
        pieces.append(_column(refs[owner], field_id, get).take(offsets[mine] - first))
        order.append(mine)
    back = np.empty(len(offsets), np.int64)
    back[np.concatenate(order)] = np.arange(len(offsets), dtype=np.int64)
    return concat_columns(pieces).take(back)


def write_blob(blob: bytes | memoryview, version: int = 1) -> tuple[BlobFiles, Chunks]:
    """Return where the blob will be and the chunks to put there."""
    view = memoryview(blob)
    pieces = [view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES)]
    refs = tuple(ChunkRef(digest_of(piece), 0, len(piece)) for piece in pieces)
    return BlobFiles(len(view), refs, version), ((ref.digest, bytes(p)) for ref, p in zip(refs, pieces, strict=True))


def read_blob(files: BlobFiles, get: GetChunk) -> bytes:
    """Return the blob. Raises ChunkDamaged."""
    return b"".join(get(ref.digest) for ref in files.chunks)


def _column(ref: ChunkRef, field_id: FieldId, get: GetChunk) -> Column:
    try:
        batch = Batch.from_bytes(memoryview(get(ref.digest))[DIGEST_BYTES:])
    except BatchDamaged as error:  # its digest is right, so it was written like this: by a program of another format
        raise ChunkDamaged(
            f"chunk {ref.digest.hex()} is whole but is {error}: start the version that wrote it"
        ) from error
    assert batch.rows == ref.rows, "a chunk with the right digest has the right rows"
    return batch.columns[field_id]


def _piece(field_id: FieldId, column: Column, start: int, stop: int) -> bytes:
    return Batch({field_id: column.slice(start, stop)}, stop - start).to_bytes()


def _canonical(column: Column) -> Column:
    """Return the column without a validity mask that says nothing: whether there is one depends on past merges."""
    if isinstance(column, VectorColumn | SparseColumn) or column.valid is None or not column.valid.all():
        return column
    if isinstance(column, ArrayColumn):
        return ArrayColumn(column.offsets, column.items, None)
    if isinstance(column, StringColumn):
        return StringColumn(column.values, None)
    return ScalarColumn(column.values, None)


def _cuts(column: Column) -> list[tuple[int, int]]:
    """Return the row ranges of the chunks: as many rows as fit CHUNK_BYTES, at least one. No rows make one chunk."""
    rows = len(column)
    ends = _row_ends(column)
    cuts, start = [], 0
    while start < rows:
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + CHUNK_BYTES, side="right"))
        stop = min(max(stop, start + 1), rows)
        cuts.append((start, stop))
        start = stop
    return cuts or [(0, 0)]


def _row_ends(column: Column) -> Offsets:
    """Return how many bytes all rows up to and with each one take, (rows,)."""
    count = np.arange(1, len(column) + 1, dtype=np.int64)
    flags = 0 if column.valid is None else 1
    if isinstance(column, VectorColumn):
        return count * (int(column.values.dtype.itemsize) * int(column.values.shape[1]))
    if isinstance(column, SparseColumn):
        row_ends: Offsets = 8 * column.values.offsets[1:] + 8 * count
        return row_ends
    if isinstance(column, ScalarColumn):
        return count * (int(column.values.dtype.itemsize) + flags)
    if isinstance(column, StringColumn):
        texts, _ = column.values.buffers()
        ends: Offsets = texts[1:] + count * (8 + flags)
        return ends
    inside = np.concatenate([np.zeros(1, np.int64), _row_ends(column.items)])
    nested: Offsets = inside[column.offsets[1:]] + count * (8 + flags)
    return nested
