"""What every engine promises: shapes, padding, sign, and the protocol itself. The engines are in `index/engines.py`.

Shapes. `Matrix` is float32 (rows, dim), C-contiguous. `Mask` is bool (rows,): a row that is False never appears.
`Hits` has one line per query, nearest first, ties to the lower offset, padded with offset -1 and distance +inf.

What is not dense floats has a `Form` of its own, and engines of its own.

Promises of every `VectorIndex`, held by the differential test in `tests/index/test_engines.py`:
  1. A search returns min(k, rows that the mask lets through) hits, each row at most once, however few pass the mask;
     with a range, as many of these as the engine finds inside it.
  2. Returned distances are those of exact search up to float32 rounding, also where the engine stores less than the
     vectors; so hits of several indexes can be merged.
  3. Hits are in ascending (distance, offset). Which of several equally distant rows are among the last hits is exact
     search's choice (the lower offsets) only in exact search: an approximate engine may have overlooked one.
  4. An index is immutable. Any number of threads may search it at once, each with its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from index.spec import IndexSpec, SearchParams

Matrix: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Offsets: TypeAlias = npt.NDArray[np.int64]
Distances: TypeAlias = npt.NDArray[np.float32]

Progress: TypeAlias = Callable[[float], None]
"""Told the fraction done, 0.0 to 1.0, ascending, on the thread that builds."""
Cancelled: TypeAlias = Callable[[], bool]
"""Asked between slices of a build, on the thread that builds."""


class Form(StrEnum):
    """What vectors are to engines; an engine takes one of them."""

    DENSE = "float"
    """`Matrix`; halves and bytes are made it before they come here."""
    BINARY = "binary"
    """(rows, dim / 8) uint8."""
    SPARSE = "sparse"
    """`index.sparse.SparseRows`."""


class BuildCancelled(Exception):
    """The build was told to stop, and left nothing behind."""

    def __init__(self, rows_done: int, rows: int) -> None:
        super().__init__(f"index build cancelled after {rows_done} of {rows} rows")
        self.rows_done = rows_done
        self.rows = rows


class IndexDamaged(ValueError):
    """The bytes of an index are not an index of these vectors: rebuild it, or fetch it from a replica."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"damaged index: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The answer to q queries: the rows found, nearest first."""

    offsets: Offsets
    """(q, k) int64, -1 where there is no further hit."""
    distances: Distances
    """(q, k) float32, +inf where there is no further hit."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(q,) how many hits each query has."""
        counts: npt.NDArray[np.int64] = (self.offsets >= 0).sum(axis=1, dtype=np.int64)
        return counts

    @staticmethod
    def none(queries: int, k: int) -> Hits:
        """Return the answer of q queries that found nothing."""
        return Hits(np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), np.inf, dtype=np.float32))


class VectorIndex(Protocol):
    """Rows that can be searched for the nearest to a query."""

    @property
    def spec(self) -> IndexSpec:
        """What it was built as."""
        ...

    @property
    def rows(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def memory_bytes(self) -> int:
        """Bytes held, an estimate; those of `vectors()` count only if the index holds them itself."""
        ...

    def search(self, queries: Any, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        """Return the k nearest rows for each query.

        queries  in the form of the rows; (q, dim) float32 if that is dense, unit length if the metric is COSINE
        mask     (rows,) bool; rows that are False never appear
        params   ef, nprobe, level as far as the engine has them; radius and range_filter for all

        Releases the GIL for most of its time. Raises ValueError if dims or lengths differ: the caller has validated,
        so this is a bug.
        """
        ...

    def vectors(self) -> Any:
        """Return the exact vectors, in their form: the engine's own copy where it holds one, else what it was given."""
        ...

    def dump(self) -> bytes:
        """Return what `index.engines.load` needs beside the vectors to have this index again."""
        ...


def check_search(index: VectorIndex, queries: Matrix, k: int, mask: Mask | None) -> None:
    """Raise ValueError if the arguments of a search do not fit the index or each other."""
    if queries.ndim != 2 or queries.shape[1] != index.dim:
        raise ValueError(f"queries of shape {queries.shape} for an index of dim {index.dim}")
    if queries.dtype != np.float32:
        raise ValueError(f"queries of {queries.dtype}, wanted float32")
    if k < 1:
        raise ValueError(f"k is {k}, wanted 1 or more")
    if mask is not None and (mask.shape != (index.rows,) or mask.dtype != np.bool_):
        raise ValueError(f"mask of {mask.dtype} {mask.shape}, wanted bool ({index.rows},)")
