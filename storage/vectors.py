"""Between vectors as they are stored and vectors as engines take them (`index.protocol.Form`).

Halves and bytes become float32, which holds each of them exactly; so they come back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from index.sparse import SparseRows
from storage.columns import VECTOR_TYPES, Column, Matrix, Offsets, SparseColumn, VectorColumn
from storage.schema import DataType, FieldSchema

Vectors: TypeAlias = npt.NDArray[Any] | SparseRows
"""(rows, dim) float32, (rows, dim / 8) uint8, or sparse rows."""


def searchable(column: Column) -> Vectors:
    """Return a column's vectors as engines take them."""
    if isinstance(column, SparseColumn):
        return column.values
    assert isinstance(column, VectorColumn), "the field holds no vectors"
    values = column.values
    if values.dtype == np.float32 or values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def dense(column: Column) -> Matrix | None:
    """Return the same of dense vectors, None of others."""
    vectors = searchable(column)
    return None if isinstance(vectors, SparseRows) or vectors.dtype == np.uint8 else vectors


def stored(one: FieldSchema, vectors: Vectors) -> Column:
    """Return what `searchable` was given."""
    if isinstance(vectors, SparseRows):
        return SparseColumn(vectors)
    if one.type is DataType.BFLOAT16_VECTOR:
        return VectorColumn(bfloat16(vectors))
    return VectorColumn(vectors.astype(VECTOR_TYPES[one.type], copy=False))


def bfloat16(matrix: Matrix) -> npt.NDArray[np.uint16]:
    """Return the upper halves of float32 values, rounded to nearest, ties to even; finite ones may become infinite."""
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def take(vectors: Vectors, rows: Offsets) -> Vectors:
    return vectors.take(rows) if isinstance(vectors, SparseRows) else vectors[rows]


def concat(parts: Sequence[Vectors]) -> Vectors:
    if len(parts) == 1:
        return parts[0]
    sparse = [part for part in parts if isinstance(part, SparseRows)]
    if sparse:
        return SparseRows.concat(sparse)
    return np.concatenate([part for part in parts if not isinstance(part, SparseRows)])
