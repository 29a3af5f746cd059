"""Sparse vectors: rows that name their few terms, and exact search among them by inverted lists, in numpy.

A row is a set of terms (numbers below 2^32 - 1), each with a weight that is not negative. The score of a row is the
inner product, the sum over the terms that it shares with the query; a row that shares none is no hit, as in Milvus. So
all there is to find is found by adding up the lists of the query's terms, which is exact, and takes time proportional
to their length. Milvus's index types for sparse vectors differ in which parts of lists they skip; here both are this.

**BM25.** Rows of a text's terms have as weights how often the text has each, whose sum is the row's length. The metric
BM25 lets the weights w of a row count less the more there are: a term adds q * w / (w + damping + damping_per_term *
length). With damping k1 * (1 - b), damping_per_term k1 * b / average length, and q, which the query has for the term,
idf * (k1 + 1), that is the formula of Robertson and Zaragoza (2009). What depends on all rows, idf and average length,
so comes with the query, and rows of different pieces, indexes and machines have comparable scores.

Sums are float64 in the order of the terms, wherever a row stands, and rounded once: equal rows are equally far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from index.metric import EVERYTHING, Bounds
from index.protocol import Distances, Hits, IndexDamaged, Mask, Offsets
from index.spec import IndexSpec, SearchParams
from index.topk import smallest

TERM_MAX: Final = (1 << 32) - 2
"""The greatest number of a term: Milvus keeps 2^32 - 1 for itself."""
_BLOB: Final = b"annulus sparse 1\n"
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
PLAIN: Final = SearchParams()


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Row i has the terms `terms[offsets[i]:offsets[i + 1]]`, ascending, and their weights."""

    offsets: Offsets
    """(rows + 1,) int64, from 0."""
    terms: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return int(self.offsets.nbytes + self.terms.nbytes + self.weights.nbytes)

    def take(self, rows: Offsets) -> SparseRows:
        starts, lengths = self.offsets[rows], (self.offsets[1:] - self.offsets[:-1])[rows]
        bounds = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        places = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths) + np.repeat(starts, lengths)
        return SparseRows(bounds, self.terms[places], self.weights[places])

    def slice(self, start: int, stop: int) -> SparseRows:
        """Return rows start..stop, sharing memory."""
        bounds = self.offsets[start : max(start, stop) + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        return SparseRows(bounds - first, self.terms[first:last], self.weights[first:last])

    def row(self, i: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """Return the terms and weights of a row."""
        first, last = int(self.offsets[i]), int(self.offsets[i + 1])
        return self.terms[first:last], self.weights[first:last]

    @staticmethod
    def concat(parts: Sequence[SparseRows]) -> SparseRows:
        lengths = np.concatenate([part.offsets[1:] - part.offsets[:-1] for part in parts])
        bounds = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        return SparseRows(
            bounds, np.concatenate([part.terms for part in parts]), np.concatenate([part.weights for part in parts])
        )

    @staticmethod
    def of(rows: Sequence[tuple[Sequence[int], Sequence[float]]]) -> SparseRows:
        """Return rows of (terms ascending, weights)."""
        bounds = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(terms) for terms, _ in rows], out=bounds[1:])
        return SparseRows(
            bounds,
            np.array([term for terms, _ in rows for term in terms], np.uint32),
            np.array([weight for _, weights in rows for weight in weights], np.float32),
        )

    @cached_property
    def lists(self) -> Lists:
        """The inverted lists: made when first asked for, which sorts all terms, and kept."""
        owners = np.repeat(np.arange(len(self), dtype=np.int32), self.offsets[1:] - self.offsets[:-1])
        # Terms with their places in one number: numpy sorts those five times as fast as it finds a stable order.
        keys = (self.terms.astype(np.uint64) << np.uint64(32)) | np.arange(len(self.terms), dtype=np.uint64)
        keys.sort()
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        in_order = (keys >> np.uint64(32)).astype(np.uint32)
        starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(in_order)])
        bounds = np.append(starts, len(in_order)).astype(np.int64)
        return Lists(in_order[starts], bounds, owners[order], self.weights[order], len(self))

    @property
    def has_lists(self) -> bool:
        return "lists" in self.__dict__

    @cached_property
    def lengths(self) -> npt.NDArray[np.float64]:
        """The sum of each row's weights, (rows,)."""
        owners = np.repeat(np.arange(len(self)), self.offsets[1:] - self.offsets[:-1])
        return np.asarray(np.bincount(owners, self.weights, len(self)), np.float64)


@dataclass(frozen=True, eq=False)
class Lists:
    """For each term the rows that have it, ascending, and its weights there."""

    terms: npt.NDArray[np.uint32]
    bounds: Offsets
    owners: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    rows: int

    @property
    def nbytes(self) -> int:
        return int(self.terms.nbytes + self.bounds.nbytes + self.owners.nbytes + self.weights.nbytes)

    def rows_with(self, term: int) -> npt.NDArray[np.int32]:
        """Return the rows that have the term, ascending."""
        place = int(np.searchsorted(self.terms, term))
        if place == len(self.terms) or self.terms[place] != term:
            return self.owners[:0]
        return self.owners[self.bounds[place] : self.bounds[place + 1]]

    def scores(
        self,
        terms: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.float32],
        damping: npt.NDArray[np.float64] | None = None,
    ) -> npt.NDArray[np.float64]:
        """Return the inner product of one query with every row, (rows,).

        damping  of each row, if its weights are to count as in BM25
        """
        if not len(self.terms) or not len(terms):
            return np.zeros(self.rows, np.float64)
        places = np.minimum(np.searchsorted(self.terms, terms), len(self.terms) - 1)
        shared = self.terms[places] == terms
        owners, shares = [], []
        for place, weight in zip(places[shared].tolist(), weights[shared].tolist(), strict=True):
            first, last = self.bounds[place], self.bounds[place + 1]
            rows, share = self.owners[first:last], self.weights[first:last].astype(np.float64)
            if damping is not None:
                share /= share + damping[rows]
            owners.append(rows)
            shares.append(share * weight)
        if not owners:
            return np.zeros(self.rows, np.float64)
        return np.asarray(np.bincount(np.concatenate(owners), np.concatenate(shares), self.rows), np.float64)


def nearest_sparse(
    pieces: Sequence[SparseRows],
    queries: SparseRows,
    k: int,
    *,
    mask: Mask | None = None,
    bounds: Bounds = EVERYTHING,
    params: SearchParams = PLAIN,
) -> Hits:
    """Return for each query the k rows of all pieces, one after the other, with the greatest inner products above 0.

    Ties go to the lower offset. Cost: the lists of the query's terms, and 8 bytes of scratch a row.
    """
    hits = Hits.none(len(queries), k)
    dampings: list[npt.NDArray[np.float64] | None] = [None] * len(pieces)
    if params.damping is not None and params.damping_per_term is not None:
        dampings = [params.damping + params.damping_per_term * piece.lengths for piece in pieces]
    for line in range(len(queries)):
        query = queries.row(line)
        found = [piece.lists.scores(*query, damping) for piece, damping in zip(pieces, dampings, strict=True)]
        scores = found[0] if len(found) == 1 else np.concatenate(found)
        passing = scores > 0.0
        if mask is not None:
            passing &= mask
        offsets = passing.nonzero()[0]
        distances: Distances = -np.minimum(scores[offsets], _FLOAT32_MAX).astype(np.float32)
        if not bounds.is_open:
            inside = (distances >= bounds.low) & (distances < bounds.high)
            offsets, distances = offsets[inside], distances[inside]
        best = smallest(distances, k)
        hits.offsets[line, : len(best)] = offsets[best]
        hits.distances[line, : len(best)] = distances[best]
    return hits


class SparseIndex:
    """The inverted lists of rows as a `VectorIndex`; it keeps the rows too, for those who fetch them."""

    def __init__(self, spec: IndexSpec, rows: SparseRows) -> None:
        self._spec = spec
        self._rows = rows
        self._lists = rows.lists

    @property
    def spec(self) -> IndexSpec:
        return self._spec

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def dim(self) -> int:
        """As many as there are terms: a sparse vector has no dimension of its own."""
        return len(self._lists.terms)

    @property
    def memory_bytes(self) -> int:
        return self._lists.nbytes + self._rows.nbytes

    def search(self, queries: SparseRows, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        bounds = params.bounds(self._spec.metric)
        return nearest_sparse([self._rows], queries, k, mask=mask, bounds=bounds, params=params)

    def vectors(self) -> Any:
        return self._rows

    def dump(self) -> bytes:
        return _BLOB


def load_sparse(spec: IndexSpec, blob: bytes, rows: SparseRows) -> SparseIndex:
    """Return the index of these rows. Raises IndexDamaged if the blob is another's."""
    if blob != _BLOB:
        raise IndexDamaged("not a sparse index")
    return SparseIndex(spec, rows)
