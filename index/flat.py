"""Exact search in numpy: what growing segments use, what every engine falls back to, and the oracle they are held to.

Two passes. The first gives every row an approximate distance by matrix multiplication (for L2 by expansion,
|q|^2 + |x|^2 - 2 q.x), fast but rounded: L2 loses all digits when the rows are near each other and far from zero, and
the last bits depend on where in the matrix a row stands. So it only picks candidates: the k best and all that could be
among them within the error bound. The second computes the candidates' distances anew, row by row in float64, and
orders them by (distance, offset). Hence equal vectors have equal distances, a vector's distance to itself under L2 is
0, and the answer is the same on every processor, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from index.kernels import SEARCH_THREADS, chosen_products
from index.metric import EVERYTHING, Bounds, Metric
from index.protocol import Distances, Hits, IndexDamaged, Mask, Matrix, Offsets, check_search
from index.spec import IndexSpec, SearchParams

_SCRATCH_BYTES: Final = 32 << 20
"""Of approximate distances held at a time; one line of distances is held whole in any case."""
_GATHER_BYTES: Final = 128 << 10
"""Of rows copied out at a time: they are in the cache when they are compared, and no page is new to the process."""
_CACHE_BYTES: Final = 256 << 10
_FEW_QUERIES: Final = 8
"""Up to here, each query by itself with rows that stay in the cache beats OpenBLAS's product of matrices: for two to
four queries in little more than half the time."""
_ROWWISE_QUERIES: Final = SEARCH_THREADS
"""Up to here, chosen rows are compared where they stand; for more queries, copying them out once is cheaper."""
_FEW_ROWS: Final = 64
"""Up to here all are candidates: exact distances of all take less than to choose, half for a lone query."""
_GATHER_FRACTION: Final = 0.5
"""Below this share of survivors, copying them out is cheaper than computing and discarding the others."""
_EPSILON: Final = float(np.finfo(np.float32).eps)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


def nearest(
    queries: Matrix,
    vectors: Matrix,
    k: int,
    *,
    metric: Metric,
    mask: Mask | None = None,
    bounds: Bounds = EVERYTHING,
    squares: Distances | None = None,
) -> Hits:
    """Return the k nearest rows of `vectors` for each query, nearest first.

    queries  (q, dim) float32; unit length if metric is COSINE
    vectors  (n, dim) float32, C-contiguous; unit length if metric is COSINE
    mask     (n,) bool; rows that are False never appear
    bounds   distances outside never appear
    squares  (n,) what `squared_lengths(vectors)` gives, for those who search the same rows often (COSINE needs none)
    returns  min(k, survivors inside the bounds) hits per query

    Ties go to the lower offset, so replicas agree.
    Cost: q * survivors * dim multiply-adds; at most 64 MiB of scratch, or 4 * n bytes if that is more.
    Raises ValueError if the dims differ: the caller has validated, so this is a bug.
    """
    return nearest_in([vectors], queries, k, metric=metric, mask=mask, bounds=bounds, squares=squares)


def nearest_in(
    pieces: Sequence[Matrix],
    queries: Matrix,
    k: int,
    *,
    metric: Metric,
    mask: Mask | None = None,
    chosen: Offsets | None = None,
    bounds: Bounds = EVERYTHING,
    squares: Distances | None = None,
) -> Hits:
    """Return the same of rows in several matrices, one after the other, as if they were one.

    chosen  the only rows that appear, ascending, for who has those in place of a mask: few of them

    Faster than to merge what `nearest` finds in each: for all pieces together there is one selection, and one thread
    that waits for the interpreter the fewer times.
    """
    rows = sum(map(len, pieces))
    for vectors in pieces:
        if queries.shape[1] != vectors.shape[1]:
            raise ValueError(f"queries of dim {queries.shape[1]}, vectors of dim {vectors.shape[1]}")
    if mask is not None:
        survivors = int(np.count_nonzero(mask))
        if survivors < rows:
            chosen = mask.nonzero()[0]
    left = rows if chosen is None else len(chosen)
    hits = Hits.none(len(queries), k)
    if left == 0 or k < 1:
        return hits
    table = _Table(pieces)
    if left <= _FEW_ROWS and bounds.is_open:
        few = np.arange(rows) if chosen is None else chosen
        distances = exact_distances(queries, table.take(few), metric=metric)
        order = distances.argsort(axis=1, kind="stable")[:, :k]
        hits.offsets[:, : order.shape[1]] = few[order]
        hits.distances[:, : order.shape[1]] = np.take_along_axis(distances, order, axis=1)
        return hits
    if mask is not None and chosen is not None and left > _GATHER_FRACTION * rows:
        approximate = _Approximate(table, metric, squares, hidden=~mask)
        chosen = None
    else:
        approximate = _Approximate(table, metric, squares, chosen=chosen)
    step = max(1, _SCRATCH_BYTES // (4 * left))
    for start in range(0, len(queries), step):
        some = queries[start : start + step]
        distances, errors = approximate.distances(some)
        for line, query in enumerate(some):
            candidates = _candidates(distances[line], k, float(errors[line]), bounds)
            offsets = candidates if chosen is None else chosen[candidates]
            refine(query, table.take, offsets, metric, bounds, hits, start + line)
    return hits


def exact_distances(queries: Matrix, rows: Matrix, *, metric: Metric) -> Distances:
    """Return the distance of every query to every row, (q, n) float32, each rounded once from float64.

    The definition that all other distances approximate. The same two vectors give the same bits wherever they stand.
    Cost: q * n * dim multiply-adds in float64, 32 MiB of scratch.
    """
    distances = np.empty((len(queries), len(rows)), dtype=np.float32)
    step = max(1, _SCRATCH_BYTES // (8 * max(1, rows.shape[1])))
    for start in range(0, len(rows), step):
        block = rows[start : start + step].astype(np.float64)
        for line, query in enumerate(queries.astype(np.float64)):
            if metric is Metric.L2:
                difference = block - query
                wide = np.einsum("ij,ij->i", difference, difference)
            else:
                wide = 0.0 - np.einsum("ij,j->i", block, query)  # not unary minus: no -0
            distances[line, start : start + step] = _as_distances(wide)
    return distances


def squared_lengths(vectors: Matrix) -> Distances:
    """Return |x|^2 of each row, (n,) float32."""
    with np.errstate(over="ignore"):
        squares: Distances = np.einsum("ij,ij->i", vectors, vectors)
    return squares


def within(hits: Hits, bounds: Bounds) -> Hits:
    """Return the hits whose distance lies in the bounds, moved to the left and padded; the shape stays."""
    if bounds.is_open:
        return hits
    keep = (hits.offsets >= 0) & (hits.distances >= bounds.low) & (hits.distances < bounds.high)
    order = np.argsort(~keep, axis=1, kind="stable")
    kept = np.take_along_axis(keep, order, axis=1)
    return Hits(
        np.where(kept, np.take_along_axis(hits.offsets, order, axis=1), -1),
        np.where(kept, np.take_along_axis(hits.distances, order, axis=1), np.float32(np.inf)),
    )


class _Table:
    """Rows of several matrices under one numbering."""

    def __init__(self, pieces: Sequence[Matrix]) -> None:
        self.pieces = [piece for piece in pieces if len(piece)] or pieces[:1]
        self.stops = np.array(list(accumulate(map(len, self.pieces))), np.int64)  # faster than numpy's for a few
        self.dim = int(self.pieces[0].shape[1])

    def split(self, offsets: Offsets) -> Iterator[tuple[Matrix, Offsets]]:
        """Yield (matrix, offsets in it) for each piece of which any is asked; the offsets ascend."""
        if len(self.pieces) == 1:
            yield self.pieces[0], offsets
            return
        ends = np.searchsorted(offsets, self.stops)
        for piece, stop, first, last in zip(self.pieces, self.stops, [0, *ends], ends, strict=False):
            if first < last:
                yield piece, offsets[first:last] - (stop - len(piece))

    def take(self, offsets: Offsets) -> Matrix:
        """Return the rows at ascending offsets."""
        taken = [piece[inside] for piece, inside in self.split(offsets)]
        if len(taken) == 1:
            return taken[0]
        return np.concatenate(taken) if taken else np.empty((0, self.dim), np.float32)


class _Approximate:
    """Distances by matrix multiplication over the chosen rows, and how wrong they may be."""

    def __init__(
        self,
        table: _Table,
        metric: Metric,
        squares: Distances | None,
        *,
        chosen: Offsets | None = None,
        hidden: Mask | None = None,
    ) -> None:
        self._metric, self._hidden, self._is_choice = metric, hidden, chosen is not None
        self._chosen: list[tuple[Matrix, Offsets | None]]
        if chosen is None:
            self._chosen = [(piece, None) for piece in table.pieces]
        else:
            self._chosen = list(table.split(chosen))
        self._rows = int(table.stops[-1]) if chosen is None else len(chosen)
        self._block = max(1, (_SCRATCH_BYTES if chosen is None else _GATHER_BYTES) // (4 * max(1, table.dim)))
        size = 0 if chosen is None else min(self._block, self._rows)
        self._scratch = np.empty((size, table.dim), np.float32)
        self._squares: Distances | None = None
        if metric is not Metric.COSINE:
            if squares is None:
                self._squares = np.concatenate([squared_lengths(block) for block in self._blocks()])
            else:
                self._squares = squares if chosen is None else squares[chosen]
        self._longest = 1.0 if self._squares is None else float(self._squares.max())

    def distances(self, queries: Matrix) -> tuple[Distances, npt.NDArray[np.float64]]:
        """Return (q, rows) approximate distances, +inf where hidden, and (q,) the largest possible error.

        The bound is the textbook's for a dot product, dim * eps * |q| |x|, which holds for any order of summation; real
        errors are a hundredth of it. It is infinite where float32 may overflow: then every row is a candidate.
        """
        squares = squared_lengths(queries)
        distances = np.empty((len(queries), self._rows), dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            if len(queries) <= _ROWWISE_QUERIES and self._is_choice:
                self._multiply_chosen(queries, distances)
            else:
                start = 0
                for block in self._blocks():
                    _multiply(block, queries, distances[:, start : start + len(block)])
                    start += len(block)
            if self._metric is Metric.L2:
                assert self._squares is not None, "L2 needs the squared lengths"
                distances *= -2.0
                distances += self._squares
                distances += squares[:, None]
            else:
                np.negative(distances, out=distances)
        scale = squares.astype(np.float64) + self._longest  # above 2 |q| |x|
        errors = (queries.shape[1] + 8) * _EPSILON * scale + np.finfo(np.float32).tiny
        errors[~(scale < _FLOAT32_MAX / 8)] = np.inf
        distances[np.isinf(errors)] = 0.0  # no overflow, no nan: any finite value will do
        if self._hidden is not None:
            distances[:, self._hidden] = np.inf
        return distances, errors

    def _multiply_chosen(self, queries: Matrix, products: Distances) -> None:
        """Write the dot product of each query with each chosen row, (q, rows), without copying rows."""
        start = 0
        for vectors, chosen in self._chosen:
            assert chosen is not None
            for line, query in enumerate(queries):
                chosen_products(vectors, chosen, query, products[line, start : start + len(chosen)])
            start += len(chosen)

    def _blocks(self) -> Iterator[Matrix]:
        """Yield the rows in order; chosen ones are copied out, over those that were yielded before."""
        for vectors, chosen in self._chosen:
            for start in range(0, len(vectors) if chosen is None else len(chosen), self._block):
                if chosen is None:
                    yield vectors[start : start + self._block]
                    continue
                wanted = chosen[start : start + self._block]
                # "clip", as "raise" would fill a copy of `out` first; the offsets are those of rows that are there
                yield np.take(vectors, wanted, axis=0, out=self._scratch[: len(wanted)], mode="clip")


def _multiply(rows: Matrix, queries: Matrix, products: Distances) -> None:
    """Write the dot product of each query with each row, (q, rows)."""
    few, block = len(queries), max(1, _CACHE_BYTES // (4 * max(1, rows.shape[1])))
    whole = len(rows) // block * block
    if not 1 < few <= _FEW_QUERIES or not whole:
        # rows first: for a few queries OpenBLAS is a third slower the other way round
        products[:] = np.matmul(rows, queries.T).T
        return
    # One call, so that a thread gives the interpreter away once. Its loops go as the result lies in memory: a block of
    # rows, and each query with it while it is in the cache.
    blocks = np.empty((whole // block, few, block, 1), np.float32)
    np.matmul(rows[:whole].reshape(-1, 1, block, rows.shape[1]), queries[None, :, :, None], out=blocks)
    products[:, :whole].reshape(few, -1, block)[...] = blocks[..., 0].transpose(1, 0, 2)
    products[:, whole:] = np.matmul(rows[whole:], queries.T).T


def _candidates(distances: Distances, k: int, error: float, bounds: Bounds) -> Offsets:
    """Return the places, ascending, of all rows that may be among the k nearest inside the bounds.

    A true distance lies within `error` of the approximate one. So a row surely inside counts towards the k, a row
    possibly inside is a candidate if it may be nearer than the k-th of the sure ones.
    """
    if not bounds.is_open:
        sure = (distances >= bounds.low + error) & (distances < bounds.high - error)
        threshold = _kth_smallest(np.where(sure, distances, np.float32(np.inf)), k)
        threshold = min(threshold, bounds.high)
        possible = distances >= bounds.low - error
        return np.flatnonzero(possible & (distances <= threshold + 2 * error) & np.isfinite(distances))
    threshold = _kth_smallest(distances, k)
    if not np.isfinite(threshold + error):
        return np.flatnonzero(np.isfinite(distances))
    return np.flatnonzero(distances <= threshold + 2 * error)


def _kth_smallest(distances: Distances, k: int) -> float:
    """Return the k-th smallest value, +inf if there are fewer."""
    return float(np.partition(distances, k - 1)[k - 1]) if k <= len(distances) else float(np.inf)


def refine(
    query: Matrix,
    take: Callable[[Offsets], Matrix],
    offsets: Offsets,
    metric: Metric,
    bounds: Bounds,
    hits: Hits,
    line: int,
) -> None:
    """Write the best candidates by exact distance into one empty line of the hits.

    query    (dim,) float32
    take     gives the rows at ascending offsets
    offsets  the candidates, ascending and each once, so that a stable sort by distance gives ties to the lower
    """
    distances = np.empty(len(offsets), dtype=np.float32)
    step = max(1, _SCRATCH_BYTES // (8 * max(1, len(query))))
    for start in range(0, len(offsets), step):
        rows = take(offsets[start : start + step])
        distances[start : start + step] = exact_distances(query[None, :], rows, metric=metric)[0]
    if not bounds.is_open:
        inside = (distances >= bounds.low) & (distances < bounds.high)
        offsets, distances = offsets[inside], distances[inside]
    order = np.argsort(distances, kind="stable")[: hits.offsets.shape[1]]
    hits.offsets[line, : len(order)] = offsets[order]
    hits.distances[line, : len(order)] = distances[order]


def refine_lines(queries: Matrix, vectors: Matrix, found: Offsets, metric: Metric, hits: Hits) -> None:
    """Do to all lines at once what `refine` does to one, where each line has as many candidates and no range is asked.

    found  (q, width) offsets, each once in its line, none missing
    """
    found = np.sort(found, axis=1)  # so that a stable sort by distance gives ties to the lower
    width, kept = found.shape[1], min(found.shape[1], hits.offsets.shape[1])
    step = max(1, _SCRATCH_BYTES // (8 * max(1, width * vectors.shape[1])))
    for start in range(0, len(found), step):
        offsets = found[start : start + step]
        rows = vectors[offsets].astype(np.float64)
        some = queries[start : start + step].astype(np.float64)
        if metric is Metric.L2:
            rows -= some[:, None, :]
            wide = np.einsum("ijk,ijk->ij", rows, rows)
        else:
            wide = 0.0 - np.einsum("ijk,ik->ij", rows, some)  # not unary minus: no -0
        distances = _as_distances(wide)
        order = distances.argsort(axis=1, kind="stable")[:, :kept]
        lines = np.arange(len(order))[:, None]
        hits.offsets[start : start + step, :kept] = offsets[lines, order]
        hits.distances[start : start + step, :kept] = distances[lines, order]


def _as_distances(wide: npt.NDArray[np.float64]) -> Distances:
    """Return float64 distances rounded to float32; beyond float32 is still a distance, and +inf is padding."""
    np.minimum(wide, _FLOAT32_MAX, out=wide)
    np.maximum(wide, -_FLOAT32_MAX, out=wide)
    return wide.astype(np.float32)


class FlatIndex:
    """Exact search as a `VectorIndex`: holds the matrix it was given and the squared lengths of its rows."""

    def __init__(self, spec: IndexSpec, vectors: Matrix) -> None:
        self._spec = spec
        self._vectors = vectors
        self._squares = None if spec.metric is Metric.COSINE else squared_lengths(vectors)

    @property
    def spec(self) -> IndexSpec:
        return self._spec

    @property
    def rows(self) -> int:
        return len(self._vectors)

    @property
    def dim(self) -> int:
        return int(self._vectors.shape[1])

    @property
    def memory_bytes(self) -> int:
        return 0 if self._squares is None else self._squares.nbytes

    def search(self, queries: Matrix, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        check_search(self, queries, k, mask)
        metric = self._spec.metric
        bounds = params.bounds(metric)
        return nearest(queries, self._vectors, k, metric=metric, mask=mask, bounds=bounds, squares=self._squares)

    def vectors(self) -> Matrix:
        return self._vectors

    def dump(self) -> bytes:
        return _FLAT_BLOB


_FLAT_BLOB: Final = b"annulus flat 1\n"


def load_flat(spec: IndexSpec, blob: bytes, vectors: Matrix) -> FlatIndex:
    """Return the index over `vectors`; there is nothing else to it. Raises IndexDamaged if the blob is another's."""
    if blob != _FLAT_BLOB:
        raise IndexDamaged("not a flat index")
    return FlatIndex(spec, vectors)
