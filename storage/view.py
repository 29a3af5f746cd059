"""What a reader sees of one segment: a frozen value that no later insert, delete or compaction touches.

A view is made on the event loop in time proportional to the number of parts, not of rows, and read by any number of
worker threads. A row is visible at tick T exactly when

    expire_before <= inserted tick <= T < deleted tick

Ticks of rows ascend within a segment (appends do, and compaction sorts), so the first half is a range of offsets.

What is computed from a view and worth keeping (unit vectors of a part, the visible mask of a segment) is kept beside
the immutable thing it belongs to. Two threads may both compute it; they get the same.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from index.flat import squared_lengths
from index.metric import Metric
from index.protocol import Distances, VectorIndex
from index.sparse import SparseRows
from storage.candidates import ROWS_MIN, SHARE_MAX, Candidates, candidates
from storage.columns import (
    NUMPY_TYPES,
    VECTOR_TYPES,
    ArrayColumn,
    Batch,
    Column,
    Mask,
    Matrix,
    Offsets,
    ScalarColumn,
    SparseColumn,
    StringColumn,
    VectorColumn,
    concat_columns,
    vector_width,
)
from storage.deletes import Deletes, Ticks
from storage.errors import SchemaMismatch
from storage.filter import CompiledFilter, FieldStats
from storage.filter.indexed import Indexed
from storage.filter.json_paths import cast_column, json_values
from storage.filter.reads import fields_of
from storage.filter.words import WordLists, known_lists
from storage.key_lookup import KeyLookup, Keys, KeySet
from storage.postings import GramLists, SortedColumn
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.strings import StringArray
from storage.types import FieldId, PartitionId, SegmentId, Tick
from storage.vectors import Vectors, concat, dense, searchable, stored, take

UNIT_TOLERANCE: Final = 1e-6
"""A vector whose squared length is this near to 1 is a unit vector: what float32 arithmetic leaves of normalising."""
_MASKS_KEPT: Final = 4
"""Of the rows visible at a moment, for each view."""
_FILTER_MASKS_KEPT: Final = 8
"""For each part: 8 bytes a row, as much as its ticks take."""
_WIDENED_KEPT: Final = 4
"""Of the rows with fields that they lack, for each view."""
_WHOLE_ROWS_FACTOR: Final = 2
"""Who wants as many of a segment's rows as one in this many gets them of all of them joined: one copy more, no sort."""
_BLOCK_VALUES: Final = 1 << 18
"""Components taken to float64 at once: 2 MiB. With fewer, a thread gives the interpreter away more often, and each time
waits to have it back."""
NEVER: Final = Tick(0)
"""As `expire_before`: before every tick, so that no row has expired."""

_SPARE: Final[deque[npt.NDArray[np.float64]]] = deque(maxlen=4)
"""Memory to work in, for one thread each: what is new to the process each time takes longer than the work."""

Moment = tuple[int, int, int]
K = TypeVar("K")
V = TypeVar("V")
ReadColumn = Callable[[FieldId, Offsets | None], Column]
"""Reads a column that is not in memory, or some of its rows, from chunks. Blocks."""


def _keep(cache: dict[K, V], key: K, value: V, most: int) -> None:
    """Put a value into a small cache that threads share, in the place of the oldest if there are so many."""
    for oldest in list(cache)[: max(0, len(cache) - most + 1)]:  # a list: others may put something there meanwhile
        cache.pop(oldest, None)
    cache[key] = value


def as_unit_rows(matrix: Matrix) -> Matrix:
    """Return the rows at length 1: the matrix itself if they all are, within UNIT_TOLERANCE, else a copy.

    Row by row, so that a row's cosine does not depend on which rows are stored beside it.
    """
    unit: Matrix | None = None
    step = max(1, _BLOCK_VALUES // max(1, matrix.shape[1]))
    shape = min(step, len(matrix)), matrix.shape[1]
    size = shape[0] * shape[1]
    try:
        spare = _SPARE.pop()
    except IndexError:
        spare = np.empty(size)
    if len(spare) < size:
        spare = np.empty(size)
    block = spare[:size].reshape(shape)
    for start in range(0, len(matrix), step):
        rows = block[: len(matrix) - start]
        rows[...] = matrix[start : start + step]
        squares = np.einsum("ij,ij->i", rows, rows)
        far = (np.abs(squares - 1.0) > UNIT_TOLERANCE) & (squares > 0.0)
        if unit is None:
            if not far.any():
                continue
            unit = np.empty_like(matrix)
            unit[:start] = matrix[:start]
        np.divide(rows, np.where(far, np.sqrt(squares), 1.0)[:, None], out=rows)
        unit[start : start + step] = rows
    _SPARE.append(spare)
    return matrix if unit is None else unit


def empty_column(one: FieldSchema) -> Column:
    """Return a column of this field with no rows."""
    nothing = StringArray.from_strings([])
    match one.type:
        case DataType.SPARSE_FLOAT_VECTOR:
            return SparseColumn(SparseRows.of([]))
        case kind if kind in VECTOR_TYPES:
            return VectorColumn(np.empty((0, vector_width(one)), VECTOR_TYPES[kind]))
        case DataType.VARCHAR | DataType.JSON:
            return StringColumn(nothing)
        case DataType.ARRAY:
            assert one.element is not None, "an array has an element type"
            is_text = one.element is DataType.VARCHAR
            items = StringColumn(nothing) if is_text else ScalarColumn(np.empty(0, NUMPY_TYPES[one.element]))
            return ArrayColumn(np.zeros(1, np.int64), items)
        case _:
            return ScalarColumn(np.empty(0, NUMPY_TYPES[one.type]))


def absent_column(one: FieldSchema, rows: int) -> Column:
    """Return a column of rows that say nothing about a field: its default, or null.

    Raises SchemaMismatch for vectors, which every row has: whoever asks does not know yet that the field was dropped.
    """
    if one.type.is_vector:
        raise SchemaMismatch(f"field {one.name} was dropped, and rows have been rewritten without it; try again")
    valid = None if one.default is not None else np.zeros(rows, np.bool_)
    if one.type in (DataType.VARCHAR, DataType.JSON):
        text = b"" if one.default is None else str(one.default).encode()
        ends = np.arange(rows + 1, dtype=np.int64) * len(text)
        return StringColumn(StringArray.from_buffers(ends, text * rows), valid)
    if one.type is DataType.ARRAY:
        empty = empty_column(one)
        assert isinstance(empty, ArrayColumn)
        return ArrayColumn(np.zeros(rows + 1, np.int64), empty.items, valid)
    return ScalarColumn(np.full(rows, 0 if one.default is None else one.default, NUMPY_TYPES[one.type]), valid)


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """What is prepared of so many first rows of a part."""

    rows: int = 0
    matrix: Matrix | None = None
    """None: they are as they are stored."""
    squares: Distances | None = None
    stored: Any = None
    """All rows of the part, as they are stored."""

    @classmethod
    def joined(cls, firsts: Sequence[_Begun]) -> _Begun:
        """Return the same of consecutive parts that have become one, whose stored rows it does not have."""
        count = next((i for i, one in enumerate(firsts, 1) if one.rows < len(one.stored)), len(firsts))
        firsts = [one for one in firsts[:count] if one.rows]
        pieces = [one.stored[: one.rows] if one.matrix is None else one.matrix for one in firsts]
        squares = [one.squares for one in firsts if one.squares is not None]
        return cls(
            sum(one.rows for one in firsts),
            np.concatenate(pieces) if any(one.matrix is not None for one in firsts) else None,
            np.concatenate(squares) if squares else None,
        )

    def completed(self, matrix: Matrix, metric: Metric) -> tuple[Matrix, Distances | None]:
        """Return what `Part.prepared` does, of which these first rows are known."""
        rest = matrix[self.rows :]
        if metric is not Metric.COSINE:
            squares = squared_lengths(rest)
            return matrix, squares if self.squares is None else np.concatenate([self.squares, squares])
        unit = as_unit_rows(rest)
        if self.matrix is None and (unit is rest or self.rows == 0):
            return matrix if unit is rest else unit, None
        return np.concatenate([matrix[: self.rows] if self.matrix is None else self.matrix, unit]), None


_NOTHING: Final = _Begun()


class Part:
    """Some consecutive rows of a segment in one batch, from offset `start` on."""

    __slots__ = ("_begun", "_grams", "_passing", "_prepared", "_sorted", "batch", "start")

    def __init__(self, batch: Batch, start: int) -> None:
        self.batch = batch
        self.start = start
        self._prepared: dict[tuple[FieldId, Metric], tuple[Vectors, Distances | None]] = {}
        self._begun: dict[tuple[FieldId, Metric], _Begun] = {}
        # by the filter itself, whose text may have templates; and not to keep it alive, as it may hold many constants
        self._passing: dict[weakref.ref[CompiledFilter], tuple[Mask, Offsets | None]] = {}
        self._sorted: dict[Indexed, SortedColumn | None] = {}
        self._grams: dict[Indexed, GramLists] = {}

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Return the rows of consecutive parts as one, with what the first of them have prepared.

        The last has come just now, so that nobody has searched it, and the others have most of the rows.
        """
        part = cls(Batch.concat([one.batch for one in parts]), parts[0].start)
        for key in [*parts[0]._prepared, *parts[0]._begun]:
            if dense(part.batch.columns[key[0]]) is not None:
                part._begun[key] = _Begun.joined([one._known(key) for one in parts])
        return part

    @property
    def stop(self) -> int:
        return self.start + self.batch.rows

    def prepared(self, field_id: FieldId, metric: Metric) -> tuple[Vectors, Distances | None]:
        """Return (the vectors as exact search wants them, their squared lengths; COSINE needs none)."""
        key = field_id, metric
        known = self._prepared.get(key)
        if known is None:
            column = self.batch.columns[field_id]
            matrix = dense(column)
            if matrix is None:
                known = (searchable(column), None)
            else:
                known = self._begun.get(key, _NOTHING).completed(matrix, metric)
            self._prepared[key] = known
            self._begun.pop(key, None)
        return known

    def _known(self, key: tuple[FieldId, Metric]) -> _Begun:
        """Return what is prepared of a dense field."""
        column = self.batch.columns[key[0]]
        assert isinstance(column, VectorColumn), "the field is dense"
        whole = self._prepared.get(key)
        if whole is None:
            return replace(self._begun.get(key, _NOTHING), stored=column.values)
        assert isinstance(whole[0], np.ndarray), "the field is dense"
        stands = key[1] is not Metric.COSINE or whole[0] is column.values
        return _Begun(len(column), None if stands else whole[0], whole[1], column.values)

    def note_unit(self, field_id: FieldId) -> None:
        """Note that all rows of a dense field have length 1 already."""
        column = self.batch.columns[field_id]
        if isinstance(column, VectorColumn) and column.values.dtype == np.float32:  # else they take memory of their own
            self._prepared[field_id, Metric.COSINE] = column.values, None

    def candidates(self, row_filter: CompiledFilter) -> Candidates | None:
        """Return the rows, visible or not, that indexes leave to look at, if they are few."""
        return candidates(row_filter.predicate, PartIndexes(self, row_filter.indexed), int(SHARE_MAX * self.batch.rows))

    def sorted(self, what: Indexed) -> SortedColumn | None:
        """Return the index on a value; None where its column is not in memory, or cannot be indexed."""
        if what not in self._sorted:
            column = self.batch.columns.get(what.field_id)
            if column is not None and what.keys is not None and what.cast is not None:
                assert isinstance(column, StringColumn), "a path is one of JSON"
                column = cast_column(json_values(column.values, what.keys), what.cast)
            self._sorted[what] = None if column is None else SortedColumn(column)
        return self._sorted[what]

    def grams(self, what: Indexed) -> GramLists | None:
        """Return the index on the pieces of a text; None where its column is not in memory."""
        known = self._grams.get(what)
        if known is None and (column := self.batch.columns.get(what.field_id)) is not None:
            if what.keys is not None and what.cast is not None:
                assert isinstance(column, StringColumn), "a path is one of JSON"
                found = cast_column(json_values(column.values, what.keys), what.cast)
                assert found is not None, "any text can be indexed"
                column = found
            assert isinstance(column, StringColumn), "grams are of text"
            known = self._grams[what] = GramLists(column, what.gram)
        return known

    def knows(self, row_filter: CompiledFilter) -> bool:
        """Return whether `passing` has the answer already."""
        return weakref.ref(row_filter) in self._passing

    def passing(self, row_filter: CompiledFilter) -> tuple[Mask, Offsets | None]:
        """Return which rows pass the filter, visible or not, (rows,) bool, not to be changed, and their offsets if they
        are few.
        """
        key = weakref.ref(row_filter)
        known = self._passing.get(key)
        if known is None:
            mask = row_filter.evaluate(self.batch)
            mask.flags.writeable = False
            is_few = np.count_nonzero(mask) <= SHARE_MAX * len(mask)
            known = mask, mask.nonzero()[0] if is_few else None
            _keep(self._passing, key, known, _FILTER_MASKS_KEPT)
        return known


class PartIndexes:
    """The indexes of a part that a collection asks for."""

    __slots__ = ("_indexed", "_part")

    def __init__(self, part: Part, indexed: Collection[Indexed]) -> None:
        self._part, self._indexed = part, indexed

    def sorted(self, what: Indexed) -> SortedColumn | None:
        return self._part.sorted(what) if what in self._indexed else None

    def grams(self, field: FieldSchema, keys: tuple[str | int, ...] | None) -> GramLists | None:
        for one in self._indexed:
            if one.gram and one.field_id == field.id and one.keys == keys:
                return self._part.grams(one)
        return None

    def words(self, field: FieldSchema) -> WordLists | None:
        column = self._part.batch.columns.get(field.id)
        return known_lists(column, field) if isinstance(column, StringColumn) else None


@dataclass(frozen=True, eq=False)
class SegmentView:
    """One segment at one moment."""

    segment_id: SegmentId
    partition_id: PartitionId
    schema: CollectionSchema
    parts: Sequence[Part]
    """Ascending, without gaps; a sealed segment has one as a rule."""
    ticks: Ticks
    """(rows,) the tick at which each row was inserted, ascending."""
    deletes: Deletes
    keys: KeyLookup
    indexes: Mapping[FieldId, VectorIndex] = field(default_factory=dict)
    original: frozenset[FieldId] = frozenset()
    """Indexed fields whose index holds the vectors as they were inserted, not scaled to length 1."""
    stats: Mapping[FieldId, FieldStats] = field(default_factory=dict)
    """Of sealed segments."""
    sealed: bool = False
    read_column: ReadColumn | None = None
    stored: Collection[FieldId] | None = None
    """The fields that its rows have, None for all of the schema: of one that was added later they have null or its
    default."""
    _masks: dict[Moment, tuple[Mask, int]] = field(default_factory=dict, repr=False)
    _remembered: dict[tuple[weakref.ref[CompiledFilter], Moment], Any] = field(default_factory=dict, repr=False)
    _widened: dict[tuple[FieldId, ...], Sequence[Part]] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return len(self.ticks)

    # visibility

    def visible(self, tick: Tick, expire_before: Tick = NEVER) -> Mask:
        """Return which rows are visible at the tick, (rows,) bool, not to be changed.

        expire_before  rows inserted before it have expired; NEVER if rows do not expire
        """
        return self.visibility(tick, expire_before)[0]

    def visible_count(self, tick: Tick, expire_before: Tick = NEVER) -> int:
        """Return how many rows are visible at the tick."""
        return self.visibility(tick, expire_before)[1]

    def visibility(self, tick: Tick, expire_before: Tick = NEVER) -> tuple[Mask, int]:
        """Return what `visible` and `visible_count` do."""
        return self.visibility_of(self.moment(tick, expire_before), tick)

    def moment(self, tick: Tick, expire_before: Tick = NEVER) -> Moment:
        """Return what tells the rows that are visible at one tick from those at others: equal where they are the same.

        The first offset and the one behind the last, of what has been inserted and not expired, and how many deletes.
        """
        first = 0 if expire_before == NEVER else int(self.ticks.searchsorted(expire_before, side="left"))
        last = int(self.ticks.searchsorted(tick, side="right"))
        return first, last, self.deletes.count_at(tick)

    def visibility_of(self, key: Moment, tick: Tick) -> tuple[Mask, int]:
        """Return what `visibility` does, of the moment that the tick is in."""
        first, last, _ = key
        known = self._masks.get(key)
        if known is None:
            mask = np.zeros(self.rows, np.bool_)
            mask[first:last] = True
            mask[self.deletes.dead_at(tick)] = False
            mask.flags.writeable = False
            known = mask, int(np.count_nonzero(mask))
            _keep(self._masks, key, known, _MASKS_KEPT)
        return known

    def remembered(self, row_filter: CompiledFilter, moment: Moment) -> Any:
        """Return what was given to `remember`; None if nothing was, or not lately."""
        return self._remembered.get((weakref.ref(row_filter), moment))

    def remember(self, row_filter: CompiledFilter, moment: Moment, found: Any) -> None:
        """Keep what was found out about the rows that pass a filter at a moment, for the next read of this kind."""
        key = weakref.ref(row_filter), moment  # so as not to keep the filter alive
        _keep(self._remembered, key, found, _MASKS_KEPT)

    def find(self, keys: Keys | KeySet, tick: Tick, expire_before: Tick = NEVER) -> Offsets:
        """Return the offsets of the visible rows with these primary keys, ascending. Scans nothing."""
        offsets = self.keys.find(keys)
        offsets = offsets[offsets < self.rows]
        if len(offsets):
            offsets = offsets[self.visible(tick, expire_before)[offsets]]
        return offsets

    def chosen(self, row_filter: CompiledFilter) -> Offsets | None:
        """Return the rows that pass the filter, visible or not, ascending, if indexes tell them and they are few."""
        if not self.sealed or self.rows < ROWS_MIN or not (row_filter.indexed or row_filter.has_words):
            return None
        if all(part.knows(row_filter) for part in self.parts):
            return None
        found: list[Offsets] = []
        for part in self.parts:
            some = part.candidates(row_filter)
            if some is None:
                return None
            found.append(self._passing(part, some, row_filter))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _passing(self, part: Part, some: Candidates, row_filter: CompiledFilter) -> Offsets:
        offsets, rest = some.offsets, some.rest
        if rest is not None and len(offsets):
            fields = fields_of(rest)
            if all(one in part.batch.columns for one in fields):
                offsets = offsets[row_filter.evaluate(part.batch, offsets, rest)]
            else:
                rows = self.fetch(offsets + part.start, sorted(fields))
                offsets = offsets[row_filter.evaluate(rows, part=rest)]
        return offsets + part.start if part.start else offsets

    # rows

    def fetch(self, offsets: Offsets, field_ids: Sequence[FieldId]) -> Batch:
        """Return these fields of these rows, in the order of the offsets, as they were inserted.

        Reads chunks for what is not in memory: a released collection, and vectors of which the index keeps the
        direction only. Raises ChunkDamaged.
        """
        return Batch({one: self._take(one, offsets) for one in field_ids}, len(offsets))

    def whole(self) -> Batch:
        """Return all rows with all fields of the schema."""
        return Batch({one.id: self.column(one.id) for one in self.schema.fields}, self.rows)

    def take(self, field_id: FieldId, offsets: Offsets) -> Column:
        """Return one field of these rows, see `fetch`."""
        return self._take(field_id, offsets)

    def column(self, field_id: FieldId) -> Column:
        """Return a whole column, as it was inserted."""
        return self._take(field_id, None)

    def holds(self, field_id: FieldId) -> bool:
        """Return whether this field is in memory as it was inserted: whether reading rows of it reads no chunk."""
        if all(field_id in part.batch.columns for part in self.parts) or self.lacks(field_id):
            return True
        return field_id in self.original and field_id in self.indexes

    def lacks(self, field_id: FieldId) -> bool:
        """Return whether the field was added to the schema after these rows."""
        return self.stored is not None and field_id not in self.stored

    def under(self, schema: CollectionSchema) -> SegmentView:
        """Return the view as another version of the collection's schema has it."""
        stored = self.schema.by_id if self.stored is None else self.stored
        return replace(self, schema=schema, stored=stored, _widened={})

    def columns(self, field_ids: Sequence[FieldId]) -> Sequence[Part]:
        """Return the parts with these fields in memory, reading what is not: what a filter evaluates."""
        if all(one in part.batch.columns for part in self.parts for one in field_ids):
            return self.parts
        known = self._widened.get(tuple(field_ids))
        if known is None:
            known = (Part(Batch({one: self.column(one) for one in field_ids}, self.rows), 0),)
            if all(self.lacks(one) or all(one in part.batch.columns for part in self.parts) for one in field_ids):
                _keep(self._widened, tuple(field_ids), known, _WIDENED_KEPT)
        return known

    def _take(self, field_id: FieldId, offsets: Offsets | None) -> Column:
        if self.rows == 0:
            return empty_column(self.schema.by_id[field_id])
        if all(field_id in part.batch.columns for part in self.parts) and self.parts:
            return _gather([part.batch.columns[field_id] for part in self.parts], self.parts, offsets)
        index = self.indexes.get(field_id)
        if index is not None and field_id in self.original:
            vectors = index.vectors()
            return stored(self.schema.by_id[field_id], vectors if offsets is None else take(vectors, offsets))
        if self.lacks(field_id):
            return absent_column(self.schema.by_id[field_id], self.rows if offsets is None else len(offsets))
        assert self.read_column is not None, f"field {field_id} of segment {self.segment_id} is nowhere"
        return self.read_column(field_id, offsets)

    # vectors

    def matrix(self, field_id: FieldId, metric: Metric) -> Vectors:
        """Return all vectors of a field as an index of this metric wants them: what to build from."""
        return concat([matrix for _, matrix, _ in self.matrices(field_id, metric)])

    def matrices(self, field_id: FieldId, metric: Metric) -> list[tuple[int, Any, Distances | None]]:
        """Return (first offset, vectors ready for exact search, squared lengths or None) for all rows, in order."""
        if all(field_id in part.batch.columns for part in self.parts) and self.parts:
            return [(part.start, *part.prepared(field_id, metric)) for part in self.parts]
        index = self.indexes.get(field_id)
        if index is not None and metric is Metric.COSINE and index.spec.metric is Metric.COSINE:
            return [(0, index.vectors(), None)]
        held = index if field_id in self.original else None
        vectors = searchable(self._take(field_id, None)) if held is None else held.vectors()
        if metric is Metric.COSINE:
            assert not isinstance(vectors, SparseRows), "COSINE is of dense vectors"
            vectors = as_unit_rows(vectors)
        return [(0, vectors, None)]


def _gather(columns: list[Column], parts: Sequence[Part], offsets: Offsets | None) -> Column:
    """Return the rows at the offsets (None: all) of columns that follow one another."""
    if len(columns) == 1:
        return columns[0] if offsets is None else columns[0].take(offsets)
    if offsets is None:
        return concat_columns(columns)
    if parts[-1].stop <= _WHOLE_ROWS_FACTOR * len(offsets):
        return concat_columns(columns).take(offsets)
    starts = np.array([part.start for part in parts], np.int64)
    owners = np.searchsorted(starts, offsets, side="right") - 1
    order = np.argsort(owners, kind="stable")
    pieces = []
    for owner in np.unique(owners).tolist():
        mine = offsets[order[owners[order] == owner]]
        pieces.append(columns[owner].take(mine - starts[owner]))
    if not pieces:
        return columns[0].take(offsets)
    joined = pieces[0] if len(pieces) == 1 else concat_columns(pieces)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order), dtype=np.int64)
    return joined.take(back)
