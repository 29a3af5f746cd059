"""Rows as immutable columns: what an insert carries, what a segment keeps, what a filter reads.

A `Batch` maps field ids to columns of equal length. Its bytes are a versioned CBOR header and raw little-endian
buffers, each on an 8-byte boundary, so that reading it back copies nothing:

    "ANB1" | header length u32 | header CBOR {rows, columns: [[field id, kind, detail, valid?, [lengths]]]} | buffers

Equal batches give equal bytes, so a digest of the bytes is a digest of the rows. Arrays handed out are read-only.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Union

import cbor2
import numpy as np
import numpy.typing as npt

from index.sparse import SparseRows
from storage.schema import DataType, FieldSchema
from storage.strings import StringArray
from storage.types import FieldId

Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float32]

MAGIC: Final = b"ANB1"
_PREFIX: Final = struct.Struct("<4sI")
NUMPY_TYPES: Final[Mapping[DataType, np.dtype[Any]]] = {
    DataType.BOOL: np.dtype(np.bool_), DataType.INT8: np.dtype("<i1"), DataType.INT16: np.dtype("<i2"),
    DataType.INT32: np.dtype("<i4"), DataType.INT64: np.dtype("<i8"), DataType.FLOAT: np.dtype("<f4"),
    DataType.DOUBLE: np.dtype("<f8"), DataType.TIMESTAMPTZ: np.dtype("<i8"),
}  # fmt: skip
VECTOR_TYPES: Final[Mapping[DataType, np.dtype[Any]]] = {
    DataType.FLOAT_VECTOR: np.dtype("<f4"), DataType.FLOAT16_VECTOR: np.dtype("<f2"),
    DataType.BFLOAT16_VECTOR: np.dtype("<u2"), DataType.INT8_VECTOR: np.dtype("<i1"),
    DataType.BINARY_VECTOR: np.dtype("<u1"),
}  # fmt: skip
"""Of a `VectorColumn` of these fields."""
_VECTOR_CODES: Final = {"": np.dtype("<f4")} | {
    f"{d.kind}{d.itemsize}": d for t, d in VECTOR_TYPES.items() if t is not DataType.FLOAT_VECTOR
}
_SCALAR_CODES: Final = {"b1": np.dtype(np.bool_)} | {
    f"{d.kind}{d.itemsize}": d for t, d in NUMPY_TYPES.items() if t is not DataType.BOOL
}


_DAMAGE: Final = (
    *(struct.error, cbor2.CBORDecodeError, UnicodeDecodeError, ValueError),
    *(KeyError, TypeError, IndexError, AssertionError, OverflowError, MemoryError),
)


class BatchDamaged(ValueError):
    """The bytes are not a batch."""


@dataclass(frozen=True, slots=True)
class ScalarColumn:
    """Bool, integers and floats. `valid` is None when no row is null; a null row's value is 0."""

    values: npt.NDArray[Any]
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + _nbytes(self.valid)

    def take(self, offsets: Offsets) -> ScalarColumn:
        return ScalarColumn(self.values[offsets], _take(self.valid, offsets))

    def slice(self, start: int, stop: int) -> ScalarColumn:
        return ScalarColumn(self.values[start:stop], None if self.valid is None else self.valid[start:stop])

    def to_list(self) -> list[Any]:
        values: list[Any] = self.values.tolist()
        if self.valid is None:
            return values
        return [value if live else None for value, live in zip(values, self.valid.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class StringColumn:
    """VarChar, or JSON as text. A null row holds ""."""

    values: StringArray
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + _nbytes(self.valid)

    def take(self, offsets: Offsets) -> StringColumn:
        return StringColumn(self.values.take(offsets), _take(self.valid, offsets))

    def slice(self, start: int, stop: int) -> StringColumn:
        return StringColumn(self.values.slice(start, stop), None if self.valid is None else self.valid[start:stop])

    def to_list(self) -> list[Any]:
        values = self.values.to_list()
        if self.valid is None:
            return values
        return [value if live else None for value, live in zip(values, self.valid.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class ArrayColumn:
    """Arrays of scalars: row i is items[offsets[i]:offsets[i + 1]]; offsets (n+1,) int64 start at 0."""

    offsets: Offsets
    items: ScalarColumn | StringColumn
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.items.nbytes + _nbytes(self.valid)

    def take(self, offsets: Offsets) -> ArrayColumn:
        starts, lengths = self.offsets[offsets], (self.offsets[1:] - self.offsets[:-1])[offsets]
        bounds = np.zeros(len(offsets) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        inside = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths)
        return ArrayColumn(bounds, self.items.take(np.repeat(starts, lengths) + inside), _take(self.valid, offsets))

    def slice(self, start: int, stop: int) -> ArrayColumn:
        bounds = self.offsets[start : max(stop, start) + 1]
        items = self.items.slice(int(bounds[0]), int(bounds[-1]))
        return ArrayColumn(bounds - bounds[0], items, None if self.valid is None else self.valid[start:stop])

    def to_list(self) -> list[Any]:
        items, bounds = self.items.to_list(), self.offsets.tolist()
        rows: list[Any] = [items[a:b] for a, b in itertools.pairwise(bounds)]
        if self.valid is None:
            return rows
        return [row if live else None for row, live in zip(rows, self.valid.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """Dense or binary vectors, (n, width), C-contiguous; never null. The dtype is that of the field's type.

    float32, float16, int8, uint16 (the upper halves of float32: BFloat16Vector), uint8 (8 bits each: BinaryVector)
    """

    values: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def valid(self) -> Mask | None:
        return None

    def take(self, offsets: Offsets) -> VectorColumn:
        return VectorColumn(self.values[offsets])

    def slice(self, start: int, stop: int) -> VectorColumn:
        return VectorColumn(self.values[start:stop])

    def to_list(self) -> list[Any]:
        return list(self.values)


@dataclass(frozen=True, slots=True)
class SparseColumn:
    """Sparse vectors; never null."""

    values: SparseRows

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def valid(self) -> Mask | None:
        return None

    def take(self, offsets: Offsets) -> SparseColumn:
        return SparseColumn(self.values.take(offsets))

    def slice(self, start: int, stop: int) -> SparseColumn:
        return SparseColumn(self.values.slice(start, stop))

    def to_list(self) -> list[Any]:
        """Return each row as a dict of term -> weight."""
        found = []
        for i in range(len(self.values)):
            terms, weights = self.values.row(i)
            found.append(dict(zip(terms.tolist(), weights.tolist(), strict=True)))
        return found


Column = Union[ScalarColumn, StringColumn, ArrayColumn, VectorColumn, SparseColumn]  # noqa: UP007 (a runtime alias)


@dataclass(frozen=True)
class Batch:
    """Rows as columns; all columns have `rows` entries."""

    columns: Mapping[FieldId, Column]
    rows: int

    def __post_init__(self) -> None:
        for field_id, column in self.columns.items():
            assert len(column) == self.rows, f"column {field_id} has {len(column)} rows, not {self.rows}"

    @cached_property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    def take(self, offsets: Offsets) -> Batch:
        return Batch({i: column.take(offsets) for i, column in self.columns.items()}, len(offsets))

    def slice(self, start: int, stop: int) -> Batch:
        """Return rows start..stop, sharing memory."""
        start, stop, _ = slice(start, stop).indices(self.rows)
        stop = max(stop, start)
        if stop - start == self.rows:
            return self
        return Batch({i: column.slice(start, stop) for i, column in self.columns.items()}, stop - start)

    def select(self, field_ids: Sequence[FieldId]) -> Batch:
        return Batch({i: self.columns[i] for i in field_ids}, self.rows)

    def to_buffers(self) -> list[bytes | memoryview]:
        """Return the serialised batch as buffers, so that large columns are written without being joined."""
        heads, body = [], _Body()
        for field_id in sorted(self.columns):
            kind, detail, valid, buffers = _dump(self.columns[field_id])
            heads.append([field_id, kind, detail, valid, [len(buffer) for buffer in buffers]])
            body.extend(buffers)
        header = cbor2.dumps({"rows": self.rows, "columns": heads}, canonical=True)
        at = _PREFIX.size + len(header)
        return [_PREFIX.pack(MAGIC, len(header)) + header + bytes(-at % 8), *body.buffers]

    def to_bytes(self) -> bytes:
        return b"".join(self.to_buffers())

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, shared: bool = True) -> Batch:
        """Return the batch in `data`, whose memory it shares. Raises BatchDamaged if the bytes are not sound.

        shared  if False, dense vectors alone do: who copies them keeps nothing of `data`
        """
        try:
            return _load(memoryview(data), shared)
        except BatchDamaged:
            raise
        except _DAMAGE as error:
            raise BatchDamaged(f"not a batch of rows: {error}") from error

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Return the rows of all batches, in order; they have the same fields."""
        if len(batches) == 1:
            return batches[0]
        first = batches[0]
        columns = {i: concat_columns([one.columns[i] for one in batches]) for i in first.columns}
        return Batch(columns, sum(one.rows for one in batches))


def vector_width(one: FieldSchema) -> int:
    """Return how many values a row of a `VectorColumn` of this field has."""
    return one.dim // 8 if one.type is DataType.BINARY_VECTOR else one.dim


def concat_columns(columns: Sequence[Column]) -> Column:
    """Return one column with the rows of all, which are of one kind."""
    first = columns[0]
    if isinstance(first, VectorColumn):
        together = stand_together(columns)
        if together is not None:
            return together
        return VectorColumn(np.concatenate([c.values for c in columns if isinstance(c, VectorColumn)]))
    if isinstance(first, SparseColumn):
        return SparseColumn(SparseRows.concat([c.values for c in columns if isinstance(c, SparseColumn)]))
    valid = None
    if any(column.valid is not None for column in columns):
        valid = np.concatenate([np.ones(len(c), np.bool_) if c.valid is None else c.valid for c in columns])
    if isinstance(first, ScalarColumn):
        return ScalarColumn(np.concatenate([c.values for c in columns if isinstance(c, ScalarColumn)]), valid)
    if isinstance(first, StringColumn):
        return StringColumn(StringArray.concat([c.values for c in columns if isinstance(c, StringColumn)]), valid)
    arrays = [c for c in columns if isinstance(c, ArrayColumn)]
    lengths = np.concatenate([c.offsets[1:] - c.offsets[:-1] for c in arrays])
    bounds = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    items = concat_columns([c.items for c in arrays])
    assert isinstance(items, ScalarColumn | StringColumn)
    return ArrayColumn(bounds, items, valid)


def stand_together(columns: Sequence[Column]) -> VectorColumn | None:
    """Return one column with the rows of all, uncopied, if they are dense and stand in one array one after the other,
    and None if not.
    """
    arrays = [column.values for column in columns if isinstance(column, VectorColumn)]
    found = side_by_side(arrays) if len(arrays) == len(columns) else []
    return VectorColumn(found[0]) if len(found) == 1 else None


def side_by_side(arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return the same rows in fewer arrays, none of them copied: those that are views of one array and stand in it one
    after the other are one.
    """
    found: list[npt.NDArray[Any]] = []
    stop = 0
    for one in arrays:
        start = _address(one)
        if found and start == stop and (joined := _joined(found[-1], one)) is not None:
            found[-1] = joined
        else:
            found.append(one)
        stop = start + one.nbytes
    return found


def _joined(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Return one view of the rows of two of which the second begins where the first ends, if they are of one array."""
    whole = first.base
    if not isinstance(whole, np.ndarray) or second.base is not whole or not whole.flags.c_contiguous:
        return None
    for one in (first, second):
        if one.dtype != whole.dtype or one.shape[1:] != whole.shape[1:] or not one.flags.c_contiguous:
            return None
    skipped = (_address(first) - _address(whole)) // whole[:1].nbytes
    joined = whole[skipped : skipped + len(first) + len(second)]
    joined.flags.writeable = False
    return joined


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class _Body:
    """Buffers with the padding that keeps each on an 8-byte boundary."""

    def __init__(self) -> None:
        self.buffers: list[bytes | memoryview] = []

    def extend(self, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            self.buffers.append(buffer)
            if len(buffer) % 8:
                self.buffers.append(bytes(-len(buffer) % 8))


def _dump(column: Column) -> tuple[str, str | int, bool, list[memoryview]]:
    """Return (kind, detail, has validity, buffers); the validity, as bytes of 0 and 1, comes first."""
    buffers = [] if column.valid is None else [_raw(column.valid)]
    if isinstance(column, ScalarColumn):
        code = f"{column.values.dtype.kind}{column.values.dtype.itemsize}"
        return "scalar", code, column.valid is not None, [*buffers, _raw(column.values)]
    if isinstance(column, StringColumn):
        offsets, data = column.values.buffers()
        return "string", "", column.valid is not None, [*buffers, _raw(offsets), data]
    if isinstance(column, ArrayColumn):
        inner, element, inner_valid, items = _dump(column.items)
        assert not inner_valid, "an array's element is never null"
        return (
            "array",
            element if inner == "scalar" else "string",
            column.valid is not None,
            [*buffers, _raw(column.offsets), *items],
        )
    if isinstance(column, SparseColumn):
        rows = column.values
        return "sparse", "", False, [_raw(rows.offsets), _raw(rows.terms), _raw(rows.weights)]
    width: str | int = column.values.shape[1]
    if column.values.dtype != np.float32:
        width = f"{column.values.dtype.kind}{column.values.dtype.itemsize}:{width}"
    return "vector", width, False, [_raw(column.values)]


def _raw(array: npt.NDArray[Any]) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data if flat.size else memoryview(b"")


def _load(data: memoryview, shared: bool) -> Batch:
    magic, header_length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise BatchDamaged(f"not a batch of rows: starts with {bytes(magic)!r}")
    at = _PREFIX.size + header_length
    header = cbor2.loads(data[_PREFIX.size : at])
    at += -at % 8
    rows = header["rows"]
    columns: dict[FieldId, Column] = {}
    for field_id, kind, detail, has_valid, lengths in header["columns"]:
        buffers = []
        for length in lengths:
            if length < 0 or at + length > len(data):
                raise BatchDamaged("not a batch of rows: cut short")
            buffer = data[at : at + length]
            buffers.append(buffer if shared or kind == "vector" else memoryview(bytes(buffer)))
            at += length + -length % 8
        valid = _array(buffers.pop(0), np.dtype(np.bool_)) if has_valid else None
        columns[FieldId(field_id)] = _load_column(kind, detail, valid, buffers, rows)
    return Batch(columns, rows)


def _load_column(kind: str, detail: str | int, valid: Mask | None, buffers: list[memoryview], rows: int) -> Column:
    if kind == "scalar":
        return ScalarColumn(_array(buffers[0], _SCALAR_CODES[str(detail)]), valid)
    if kind == "string":
        return StringColumn(StringArray.from_buffers(_array(buffers[0], np.dtype("<i8")), buffers[1]), valid)
    if kind == "array":
        offsets = _array(buffers[0], np.dtype("<i8"))
        items = _load_column("string" if detail == "string" else "scalar", detail, None, buffers[1:], -1)
        assert isinstance(items, ScalarColumn | StringColumn)
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(items) or (lengths.size and lengths.min() < 0):
            raise BatchDamaged("not a batch of rows: array offsets do not fit their items")
        return ArrayColumn(offsets, items, valid)
    if kind == "vector":
        code, _, width = str(detail).rpartition(":")
        return VectorColumn(_array(buffers[0], _VECTOR_CODES[code]).reshape(rows, int(width)))
    if kind == "sparse":
        offsets, terms = _array(buffers[0], np.dtype("<i8")), _array(buffers[1], np.dtype("<u4"))
        weights = _array(buffers[2], np.dtype("<f4"))
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(terms) or len(weights) != len(terms) or lengths.min(initial=0) < 0:
            raise BatchDamaged("not a batch of rows: sparse rows do not fit their terms")
        return SparseColumn(SparseRows(offsets, terms, weights))
    raise BatchDamaged(f"not a batch of rows: unknown kind of column {kind!r}")


def _array(buffer: memoryview, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    array = np.frombuffer(buffer, dtype)
    array.flags.writeable = False
    return array


def _take(valid: Mask | None, offsets: Offsets) -> Mask | None:
    return None if valid is None else valid[offsets]


def _nbytes(valid: Mask | None) -> int:
    return 0 if valid is None else valid.nbytes
