"""Binary vectors: rows of bits, compared by HAMMING or JACCARD, in numpy; and inverted lists of them.

A row is `dim / 8` bytes. HAMMING is the number of bits that differ. JACCARD is 1 - |both| / |either|, and 1 where
nothing is set in both, as in Milvus. Distances are whole numbers, or quotients of them rounded once: exact everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from index.blob import pack, unpack
from index.faiss_engine import binary_centroids
from index.metric import EVERYTHING, Bounds, Metric
from index.protocol import BuildCancelled, Cancelled, Distances, Hits, IndexDamaged, Mask, Offsets, Progress
from index.spec import IndexSpec, SearchParams
from index.topk import smallest

Bits: TypeAlias = npt.NDArray[np.uint8]
"""(rows, dim / 8)."""

_BLOCK_BYTES: Final = 1 << 20
"""Of rows compared at a time: they and what is computed of them stay in the cache."""
_WORDS_FEW: Final = 32
"""Rows of so many words are counted word by word: adding up a short line for each row takes longer than all else."""
_ROWS_PER_LIST_MIN: Final = 39
_FLAT_BLOB: Final = b"annulus binary 1\n"
_KIND: Final = "BIN_IVF_FLAT"


def binary_distances(query: Bits, rows: Bits, metric: Metric) -> Distances:
    """Return the distance of one query (dim / 8,) to each row, (rows,) float32."""
    distances = np.empty(len(rows), np.float32)
    step = max(1, _BLOCK_BYTES // max(1, rows.shape[1]))
    wide, asked = _words(rows), _words(query[None])[0]
    for start in range(0, len(rows), step):
        block = wide[start : start + step]
        if metric is Metric.HAMMING:
            distances[start : start + step] = _counted(block, asked, np.bitwise_xor)
            continue
        both = _counted(block, asked, np.bitwise_and)
        either = _counted(block, asked, np.bitwise_or)
        distances[start : start + step] = 1.0 - both / np.maximum(either, 1)
    return distances


def _counted(block: npt.NDArray[Any], asked: npt.NDArray[Any], operation: np.ufunc) -> npt.NDArray[np.int32]:
    """Return how many bits are set in the operation of each row with the query, (rows,)."""
    if block.shape[1] > _WORDS_FEW:
        return np.asarray(np.bitwise_count(operation(block, asked)).sum(axis=1, dtype=np.int32))
    total = np.zeros(len(block), np.int32)
    for i in range(block.shape[1]):
        total += np.bitwise_count(operation(block[:, i], asked[i]))
    return total


def nearest_binary(
    pieces: Sequence[Bits],
    queries: Bits,
    k: int,
    *,
    metric: Metric,
    mask: Mask | None = None,
    bounds: Bounds = EVERYTHING,
) -> Hits:
    """Return the k nearest rows of all pieces, one after the other, for each query. Ties go to the lower offset."""
    rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    hits = Hits.none(len(queries), k)
    offsets = None if mask is None or mask.all() else mask.nonzero()[0]
    if offsets is not None:
        rows = rows[offsets]
    for line, query in enumerate(queries):
        _write(hits, line, binary_distances(query, rows, metric), offsets, bounds)
    return hits


class BinaryFlat:
    """Exact search as a `VectorIndex`: holds the rows that it was given."""

    def __init__(self, spec: IndexSpec, rows: Bits) -> None:
        self._spec = spec
        self._rows = rows

    @property
    def spec(self) -> IndexSpec:
        return self._spec

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def dim(self) -> int:
        return 8 * int(self._rows.shape[1])

    @property
    def memory_bytes(self) -> int:
        return int(self._rows.nbytes)

    def search(self, queries: Bits, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        metric = self._spec.metric
        return nearest_binary([self._rows], queries, k, metric=metric, mask=mask, bounds=params.bounds(metric))

    def vectors(self) -> Any:
        return self._rows

    def dump(self) -> bytes:
        return _FLAT_BLOB


class BinaryLists(BinaryFlat):
    """Rows in lists around centroids, which are near by HAMMING; the lists nearest to a query are searched exactly."""

    def __init__(self, spec: IndexSpec, rows: Bits, centroids: Bits, list_of_row: npt.NDArray[np.int32]) -> None:
        super().__init__(spec, rows)
        self._centroids = centroids
        self._list_of_row = list_of_row
        self._members = np.argsort(list_of_row, kind="stable")
        self._bounds = np.searchsorted(list_of_row[self._members], np.arange(len(centroids) + 1))

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + int(self._centroids.nbytes + self._list_of_row.nbytes + self._members.nbytes)

    def search(self, queries: Bits, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        survivors = self.rows if mask is None else int(np.count_nonzero(mask))
        hits = Hits.none(len(queries), k)
        if survivors == 0:
            return hits
        metric = self._spec.metric
        bounds = params.bounds(metric)
        probed = params.nprobe_for(len(self._centroids), survivors / self.rows)
        for line, query in enumerate(queries):
            chosen = smallest(binary_distances(query, self._centroids, Metric.HAMMING), probed)
            lists = [self._members[self._bounds[one] : self._bounds[one + 1]] for one in chosen.tolist()]
            offsets = np.sort(np.concatenate(lists))
            if mask is not None:
                offsets = offsets[mask[offsets]]
            if len(offsets) < min(k, survivors):
                offsets = np.arange(self.rows) if mask is None else mask.nonzero()[0]
            _write(hits, line, binary_distances(query, self._rows[offsets], metric), offsets, bounds)
        return hits

    def dump(self) -> bytes:
        parts = [self._centroids.tobytes(), self._list_of_row.astype("<i4").tobytes()]
        return pack(_KIND, self._spec.metric, rows=self.rows, dim=self.dim, parts=parts)


def build_binary(
    spec: IndexSpec, rows: Bits, *, threads: int, progress: Progress, cancelled: Cancelled
) -> BinaryFlat | BinaryLists:
    """Return a new index. Raises BuildCancelled."""
    if "nlist" not in spec.params or not len(rows):
        progress(1.0)
        return BinaryFlat(spec, rows)
    nlist = max(1, min(int(spec.params["nlist"]), len(rows) // _ROWS_PER_LIST_MIN))
    centroids = binary_centroids(rows, nlist, threads=threads)
    list_of_row = np.empty(len(rows), np.int32)
    step = max(1, _BLOCK_BYTES // max(1, nlist))
    for start in range(0, len(rows), step):
        if cancelled():
            raise BuildCancelled(start, len(rows))
        some = rows[start : start + step]
        near = np.full(len(some), np.inf, np.float32)
        for number, centroid in enumerate(centroids):
            distances = binary_distances(centroid, some, Metric.HAMMING)
            nearer = distances < near
            near[nearer] = distances[nearer]
            list_of_row[start : start + step][nearer] = number
        progress(min(1.0, (start + step) / len(rows)))
    return BinaryLists(spec, rows, centroids, list_of_row)


def load_binary(spec: IndexSpec, blob: bytes, rows: Bits) -> BinaryFlat | BinaryLists:
    """Return the index that was dumped, of the same rows. Raises IndexDamaged."""
    if "nlist" not in spec.params or not len(rows):
        if blob != _FLAT_BLOB:
            raise IndexDamaged("not a flat binary index")
        return BinaryFlat(spec, rows)
    width = rows.shape[1]
    parts = unpack(blob, _KIND, spec.metric, rows=len(rows), dim=8 * width, parts=2)
    centroids = np.frombuffer(parts[0], np.uint8).reshape(-1, width)
    list_of_row = np.frombuffer(parts[1], "<i4")
    if len(list_of_row) != len(rows) or list_of_row.min() < 0 or list_of_row.max() >= len(centroids):
        raise IndexDamaged("rows in lists that do not exist")
    return BinaryLists(spec, rows, centroids, list_of_row)


def _words(rows: Bits) -> npt.NDArray[Any]:
    """Return the rows as the widest words that they are made of."""
    width = rows.shape[1]
    word = next(size for size in (8, 4, 2, 1) if width % size == 0)
    return np.ascontiguousarray(rows).view(f"<u{word}")


def _write(hits: Hits, line: int, distances: Distances, offsets: Offsets | None, bounds: Bounds) -> None:
    """Write the nearest rows of one query into its line; `offsets` are those of the distances, ascending."""
    if not bounds.is_open:
        inside = np.flatnonzero((distances >= bounds.low) & (distances < bounds.high))
        distances = distances[inside]
        offsets = inside if offsets is None else offsets[inside]
    best = smallest(distances, hits.offsets.shape[1])
    hits.offsets[line, : len(best)] = best if offsets is None else offsets[best]
    hits.distances[line, : len(best)] = distances[best]
