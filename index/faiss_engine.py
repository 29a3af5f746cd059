"""Engines of faiss: HNSW graphs, inverted lists, and both over rows of 8 bits a component, or coded part by part.

Memory. A flat graph's storage is the one copy of the rows: `vectors()` is a view of it, and whoever gave the matrix may
drop it. The other kinds rank what they find by the given matrix, which they keep: their codes are lossy, or (IVF_FLAT)
ordered by list.

Disk. A dump holds what cannot be computed from the rows: the links of a graph, the centroids and the list of each row,
the ranges of the 8-bit codes, the centroids of parts. Loading copies or encodes the rows again, which takes a
thousandth of building.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from index.blob import pack, unpack
from index.complete import complete
from index.flat import squared_lengths
from index.kernels import SEARCH_THREADS, faiss, thread_count
from index.metric import Metric
from index.pages import ask_for_huge_pages
from index.protocol import (
    BuildCancelled,
    Cancelled,
    Distances,
    Hits,
    IndexDamaged,
    Mask,
    Matrix,
    Offsets,
    Progress,
)
from index.spec import SQ, SQ_CODES, SQ_DEFAULT, IndexSpec, IndexType, SearchParams

_METRICS: Final = {
    Metric.L2: faiss.METRIC_L2,
    Metric.IP: faiss.METRIC_INNER_PRODUCT,
    Metric.COSINE: faiss.METRIC_INNER_PRODUCT,
}
_UNOWNED: Final = faiss.MaybeOwnedVectorUInt8()
"""Its owner is nobody, as of rows that faiss only looks at: the index here keeps them."""
_SLICE_ROWS: Final = 2_000
"""Rows that one thread adds between two looks at `cancelled`: a second or so of work. Slices cost it nothing."""
_PARALLEL_SLICE: Final = 2
"""How many times more each of several threads adds. At the end of a slice they wait for the last one, and its few rows
of the upper levels occupy only some: two threads lose 10 % to slices of 1,000 rows a thread, 5 % to 2,500."""
_LIST_SLICE_ROWS: Final = 32_768
_TRAINING_ROUNDS: Final = 10
"""Of k-means, as many as faiss itself makes for inverted lists."""
_TRAINING_ROWS_PER_LIST_MIN: Final = 39
"""faiss warns below this many training rows for each list: its centroids would follow single rows."""
_TRAINING_ROWS_PER_LIST_MAX: Final = 256
_SEED: Final = 1234
_REFINED: Final = 2
"""How many times k candidates of a lossy engine are ranked by exact distance."""
_REFINED_PRODUCT: Final = 10
"""The same where codes are those of parts of vectors, which lose more."""
_SCANN_BITS: Final = 4
_SCALAR_TYPES: Final = {
    SQ_CODES["SQ6"]: faiss.ScalarQuantizer.QT_6bit,
    SQ_CODES["SQ8"]: faiss.ScalarQuantizer.QT_8bit,
    SQ_CODES["FP16"]: faiss.ScalarQuantizer.QT_fp16,
    SQ_CODES["BF16"]: faiss.ScalarQuantizer.QT_bf16,
}
_LOSSY: Final = frozenset({IndexType.HNSW_SQ, IndexType.HNSW_PQ, IndexType.IVF_SQ8, IndexType.IVF_PQ, IndexType.SCANN})
_LINK_COST: Final = 1.5
"""Cost of following one link of a graph, in rows compared by exact search, which reads memory in order."""


def build_faiss(
    spec: IndexSpec, vectors: Matrix, *, threads: int, progress: Progress, cancelled: Cancelled
) -> GraphIndex | ListsIndex:
    """Return a new index of one row or more. Raises BuildCancelled."""
    with thread_count(threads):
        if spec.is_graph:
            return _build_graph(spec, vectors, threads, progress, cancelled)
        return _build_lists(spec, vectors, progress, cancelled)


def load_faiss(spec: IndexSpec, blob: bytes, vectors: Matrix) -> GraphIndex | ListsIndex:
    """Return the index that was dumped. Raises IndexDamaged if the blob is not one of these vectors."""
    with thread_count(1):
        try:
            return _load_graph(spec, blob, vectors) if spec.is_graph else _load_lists(spec, blob, vectors)
        except RuntimeError as error:  # what faiss raises for bytes that make no sense
            raise IndexDamaged(str(error)) from error


class GraphIndex:
    """An HNSW graph over float32 rows (AUTOINDEX, HNSW) or 8-bit rows (HNSW_SQ)."""

    def __init__(self, spec: IndexSpec, graph: Any, given: Matrix, *, borrows: bool = False) -> None:
        """`borrows`: the graph has no rows of its own, but looks at those given."""
        self._spec = spec
        self._graph = graph
        self._is_lossy = spec.index_type in _LOSSY
        self._vectors = given if self._is_lossy or borrows else _storage_view(graph)
        links = graph.hnsw.neighbors
        ask_for_huge_pages(int(links.data()), int(links.byte_size()))
        codes = faiss.downcast_index(graph.storage).codes
        ask_for_huge_pages(int(codes.data()), int(codes.byte_size()))
        self._squares = _squares(spec.metric, self._vectors)

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
        hnsw = self._graph.hnsw
        codes = self.rows * int(self._graph.storage.sa_code_size())
        # links, level and first link of each row
        return codes + int(hnsw.neighbors.byte_size()) + self.rows * 12 + _nbytes(self._squares)

    def search(self, queries: Matrix, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        ef = params.ef_for(self._spec, k)
        degree = 2 * self._spec.graph_degree

        def find(some: Matrix, wanted: int, passing: Mask | None, share: float) -> Offsets:
            # The walk stops after `ef` rows, of which only a share passes.
            kept = min(self.rows, int(ef / share))
            fetched = min(_refined(self._spec) * wanted, kept, int(share * self.rows)) if self._is_lossy else wanted
            return _search(self._graph, some, max(wanted, fetched), passing, faiss.SearchParametersHNSW(efSearch=kept))

        return complete(
            self,
            find,
            queries,
            k,
            params=params,
            mask=mask,
            cost=lambda share: _LINK_COST * degree * ef / share,
            squares=self._squares,
        )

    def vectors(self) -> Matrix:
        return self._vectors

    def dump(self) -> bytes:
        if self._spec.has_product_codes:  # which faiss does not read without the codes
            parts = [_serialised(self._graph)]
            return pack(_kind(self._spec), self._spec.metric, rows=self.rows, dim=self.dim, parts=parts)
        parts = [_serialised(self._graph, faiss.IO_FLAG_SKIP_STORAGE)]
        if self._is_lossy:
            parts.append(_trained(self._spec, faiss.downcast_index(self._graph.storage)))
        return pack(_kind(self._spec), self._spec.metric, rows=self.rows, dim=self.dim, parts=parts)


class ListsIndex:
    """Inverted lists of float32 rows (IVF_FLAT) or 8-bit rows (IVF_SQ8)."""

    def __init__(self, spec: IndexSpec, lists: Any, list_of_row: npt.NDArray[np.int32], given: Matrix) -> None:
        self._spec = spec
        self._lists = lists
        self._list_of_row = list_of_row
        self._is_lossy = spec.index_type in _LOSSY
        self._vectors = given
        self._squares = _squares(spec.metric, given)

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
        per_row = int(self._lists.code_size) + 8 + 4  # its code, its offset, its list
        return self.rows * per_row + int(self._lists.nlist) * self.dim * 4 + _nbytes(self._squares)

    def search(self, queries: Matrix, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        nlist = int(self._lists.nlist)

        def find(some: Matrix, wanted: int, passing: Mask | None, share: float) -> Offsets:
            nprobe = params.nprobe_for(nlist, share)
            fetched = min(_refined(self._spec) * wanted, int(share * self.rows)) if self._is_lossy else wanted
            return _search(self._lists, some, max(wanted, fetched), passing, faiss.SearchParametersIVF(nprobe=nprobe))

        return complete(
            self,
            find,
            queries,
            k,
            params=params,
            mask=mask,
            cost=lambda share: nlist + self.rows * params.nprobe_for(nlist, share) / nlist,
            squares=self._squares,
        )

    def vectors(self) -> Matrix:
        return self._vectors

    def dump(self) -> bytes:
        parts = [_serialised(self._lists.quantizer), self._list_of_row.tobytes()]
        if self._is_lossy:
            parts.append(_trained(self._spec, self._lists))
        return pack(_kind(self._spec), self._spec.metric, rows=self.rows, dim=self.dim, parts=parts)


def _build_graph(
    spec: IndexSpec, vectors: Matrix, threads: int, progress: Progress, cancelled: Cancelled
) -> GraphIndex:
    rows, dim = vectors.shape
    degree, metric = spec.graph_degree, _METRICS[spec.metric]
    if spec.index_type is IndexType.HNSW_SQ:
        graph = faiss.IndexHNSWSQ(dim, _scalar_type(spec), degree, metric)
        graph.train(vectors)
    elif spec.index_type is IndexType.HNSW_PQ:
        parts, bits = _codes(spec, rows, dim)
        graph = faiss.IndexHNSWPQ(dim, parts, degree, bits, metric)
        _calm(faiss.downcast_index(graph.storage).pq)
        graph.train(vectors)
    else:
        graph = faiss.IndexHNSWFlat(dim, degree, metric)
    # More candidates than rows there are none, and faiss allots room for as many as it is told.
    graph.hnsw.efConstruction = min(int(spec.params["efConstruction"]), max(rows, degree))
    _reserve(graph, rows)
    step = _SLICE_ROWS if threads == 1 else _SLICE_ROWS * threads * _PARALLEL_SLICE
    for start in _slices(rows, step, progress, cancelled):
        graph.add(vectors[start : start + step])
    return GraphIndex(spec, graph, vectors)


def _load_graph(spec: IndexSpec, blob: bytes, vectors: Matrix) -> GraphIndex:
    rows, dim = vectors.shape
    is_lossy = spec.index_type in _LOSSY
    has_ranges = is_lossy and not spec.has_product_codes
    parts = unpack(blob, _kind(spec), spec.metric, rows=rows, dim=dim, parts=2 if has_ranges else 1)
    graph = faiss.deserialize_index(np.frombuffer(parts[0], dtype=np.uint8))
    wanted = {IndexType.HNSW_SQ: faiss.IndexHNSWSQ, IndexType.HNSW_PQ: faiss.IndexHNSWPQ}
    if not isinstance(graph, wanted.get(spec.index_type, faiss.IndexHNSWFlat)):
        raise IndexDamaged(f"a {type(graph).__name__}")
    _check_graph(graph, rows, dim, _METRICS[spec.metric])
    if spec.has_product_codes:
        return GraphIndex(spec, graph, vectors)
    if is_lossy:
        storage = faiss.IndexScalarQuantizer(dim, _scalar_type(spec), _METRICS[spec.metric])
        _train(spec, storage, parts[1])
        storage.add(vectors)
    else:
        storage = faiss.IndexFlat(dim, _METRICS[spec.metric])
        storage.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(vectors), vectors.nbytes, _UNOWNED.owner)
        storage.ntotal = rows
    graph.storage = storage
    graph.own_fields = True  # the graph frees it, so Python must not
    storage.this.disown()
    return GraphIndex(spec, graph, vectors, borrows=not is_lossy)


def _check_graph(graph: Any, rows: int, dim: int, metric: int) -> None:
    hnsw = graph.hnsw
    if (graph.ntotal, graph.d, graph.metric_type) != (rows, dim, metric):
        raise IndexDamaged(f"a graph of {graph.ntotal} x {graph.d}, metric {graph.metric_type}")
    links = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
    if hnsw.levels.size() != rows or not 0 <= hnsw.entry_point < rows or links.min() < -1 or links.max() >= rows:
        raise IndexDamaged("a graph with links to nowhere")


def _build_lists(spec: IndexSpec, vectors: Matrix, progress: Progress, cancelled: Cancelled) -> ListsIndex:
    rows = len(vectors)
    nlist = max(1, min(int(spec.params["nlist"]), rows // _TRAINING_ROWS_PER_LIST_MIN))
    quantizer = _trained_quantizer(spec.metric, vectors, nlist, cancelled)
    lists = _empty_lists(spec, quantizer, nlist, rows)
    lists.train(vectors)  # the quantizer is trained already; this fits the ranges of the 8-bit codes, if any
    list_of_row = np.empty(rows, dtype=np.int32)
    for start in _slices(rows, _LIST_SLICE_ROWS, progress, cancelled):
        some = vectors[start : start + _LIST_SLICE_ROWS]
        assigned = np.ascontiguousarray(quantizer.search(some, 1)[1].reshape(-1), dtype=np.int64)
        _add(lists, some, start, assigned)
        list_of_row[start : start + len(some)] = assigned
    return ListsIndex(spec, lists, list_of_row, vectors)


def _load_lists(spec: IndexSpec, blob: bytes, vectors: Matrix) -> ListsIndex:
    rows, dim = vectors.shape
    is_lossy = spec.index_type in _LOSSY
    parts = unpack(blob, _kind(spec), spec.metric, rows=rows, dim=dim, parts=3 if is_lossy else 2)
    quantizer = faiss.deserialize_index(np.frombuffer(parts[0], dtype=np.uint8))
    list_of_row = np.frombuffer(parts[1], dtype=np.int32)
    nlist = int(quantizer.ntotal)
    if quantizer.d != dim or len(list_of_row) != rows or list_of_row.min() < 0 or list_of_row.max() >= nlist:
        raise IndexDamaged("rows in lists that do not exist")
    lists = _empty_lists(spec, quantizer, nlist, rows)
    if is_lossy:
        _train(spec, lists, parts[2])
    lists.is_trained = True
    for start in range(0, rows, _LIST_SLICE_ROWS):
        stop = start + _LIST_SLICE_ROWS
        _add(lists, vectors[start:stop], start, list_of_row[start:stop].astype(np.int64))
    return ListsIndex(spec, lists, list_of_row, vectors)


def _trained_quantizer(metric: Metric, vectors: Matrix, nlist: int, cancelled: Cancelled) -> Any:
    """Return the centroids of the lists, by k-means on a sample; round by round, so that it can be cancelled."""
    rows, dim = vectors.shape
    quantizer = faiss.IndexFlat(dim, _METRICS[metric])
    parameters = faiss.ClusteringParameters()
    parameters.niter = 1
    parameters.seed = _SEED
    parameters.spherical = metric.is_similarity  # centroids of unequal length would draw rows by their length
    parameters.min_points_per_centroid = 1  # a lone list of few rows needs no warning on stderr
    parameters.max_points_per_centroid = _TRAINING_ROWS_PER_LIST_MAX
    clustering = faiss.Clustering(dim, nlist, parameters)
    for _ in range(_TRAINING_ROUNDS):  # each goes on from the centroids of the one before
        if cancelled():
            raise BuildCancelled(0, rows)
        clustering.train(vectors, quantizer)
    return quantizer


def binary_centroids(rows: npt.NDArray[np.uint8], count: int, *, threads: int) -> npt.NDArray[np.uint8]:
    """Return so many centroids of rows of bits, (count, bytes), by k-means."""
    width = rows.shape[1]
    quantizer = faiss.IndexBinaryFlat(8 * width)
    lists = faiss.IndexBinaryIVF(quantizer, 8 * width, count)
    lists.cp.niter, lists.cp.seed, lists.cp.min_points_per_centroid = _TRAINING_ROUNDS, _SEED, 1
    lists.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST_MAX
    with thread_count(threads):
        lists.train(np.ascontiguousarray(rows))
    centroids: npt.NDArray[np.uint8] = faiss.vector_to_array(quantizer.xb).reshape(count, width)
    return centroids.copy()


def _empty_lists(spec: IndexSpec, quantizer: Any, nlist: int, rows: int) -> Any:
    dim, metric = quantizer.d, _METRICS[spec.metric]
    if spec.index_type is IndexType.IVF_SQ8:
        lists = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, faiss.ScalarQuantizer.QT_8bit, metric)
    elif spec.has_product_codes:
        lists = faiss.IndexIVFPQ(quantizer, dim, nlist, *_codes(spec, rows, dim), metric)
        _calm(lists.pq)
    else:
        lists = faiss.IndexIVFFlat(quantizer, dim, nlist, metric)
    return lists


def _add(lists: Any, some: Matrix, first: int, assigned: npt.NDArray[np.int64]) -> None:
    offsets = np.arange(first, first + len(some), dtype=np.int64)
    lists.add_core(len(some), *(faiss.swig_ptr(array) for array in (some, offsets, assigned)))


def _search(index: Any, queries: Matrix, k: int, mask: Mask | None, parameters: Any) -> Offsets:
    """Return (q, k) offsets found, -1 for none."""
    if mask is not None:
        bits = np.packbits(mask, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        parameters.sel = selector
    with thread_count(min(len(queries), SEARCH_THREADS)):
        offsets: Offsets = index.search(queries, k, params=parameters)[1]
    return offsets


def _slices(rows: int, step: int, progress: Progress, cancelled: Cancelled) -> Iterator[int]:
    """Yield the first row of each slice, telling the progress after it and asking before it whether to go on."""
    for start in range(0, rows, step):
        if cancelled():
            raise BuildCancelled(start, rows)
        yield start
        progress(min(1.0, (start + step) / rows))


def _reserve(graph: Any, rows: int) -> None:
    """Allot the storage at once: growing by doubling leaves up to half of it unused, and never gives that back."""
    codes = faiss.downcast_index(graph.storage).codes
    codes.resize(rows * int(graph.storage.sa_code_size()))
    codes.resize(0)


class _Borrowed:
    """Memory of a faiss index as numpy may see it; the array made of this keeps the index alive."""

    def __init__(self, owner: Any, address: int, shape: tuple[int, int]) -> None:
        self.owner = owner
        self.__array_interface__ = {"data": (address, True), "shape": shape, "typestr": "<f4", "version": 3}


def _storage_view(graph: Any) -> Matrix:
    address = int(faiss.downcast_index(graph.storage).get_xb())
    view: Matrix = np.asarray(_Borrowed(graph, address, (graph.ntotal, graph.d)))
    return view


def _serialised(index: Any, flags: int = 0) -> bytes:
    plain: npt.NDArray[np.uint8] = faiss.serialize_index(index, flags)
    return plain.tobytes()


def _trained(spec: IndexSpec, index: Any) -> bytes:
    """Return what encodes rows: the centroids of their parts, or the ranges of their components."""
    learnt: Matrix = faiss.vector_to_array(index.pq.centroids if spec.has_product_codes else index.sq.trained)
    return learnt.tobytes()


def _train(spec: IndexSpec, index: Any, trained: memoryview) -> None:
    learnt = np.frombuffer(trained, dtype=np.float32) if len(trained) else np.empty(0, np.float32)
    expected = int(index.pq.ksub) * index.d if spec.has_product_codes else _ranges(spec) * index.d
    if len(learnt) != expected:
        raise IndexDamaged(f"{len(learnt)} values of the codes for {index.d} dimensions")
    faiss.copy_array_to_vector(learnt, index.pq.centroids if spec.has_product_codes else index.sq.trained)
    index.is_trained = True
    if isinstance(index, faiss.IndexIVFPQ):
        index.precompute_table()


def _codes(spec: IndexSpec, rows: int, dim: int) -> tuple[int, int]:
    """Return (parts of a vector, bits of the code of each), as far as there are rows to learn centroids from.

    A dimension that is no multiple of the parts has as many as divide both.
    """
    is_scann = spec.index_type is IndexType.SCANN
    parts = max(1, dim // 2) if is_scann else int(spec.params["m"])
    bits = _SCANN_BITS if is_scann else int(spec.params["nbits"])
    return math.gcd(parts, dim), max(1, min(bits, rows.bit_length() - 1))


def _scalar_type(spec: IndexSpec) -> int:
    code: int = _SCALAR_TYPES[int(spec.params.get(SQ, SQ_DEFAULT))]
    return code


def _ranges(spec: IndexSpec) -> int:
    """Return how many numbers of each dimension a scalar code is made with: halves need none."""
    return 0 if spec.params.get(SQ) in (SQ_CODES["FP16"], SQ_CODES["BF16"]) else 2


def _calm(product: Any) -> None:
    """Let few rows be learnt from without a warning on stderr."""
    product.cp.min_points_per_centroid = 1


def _refined(spec: IndexSpec) -> int:
    return _REFINED_PRODUCT if spec.has_product_codes else _REFINED


def _squares(metric: Metric, vectors: Matrix) -> Distances | None:
    return None if metric is Metric.COSINE else squared_lengths(vectors)


def _nbytes(squares: Distances | None) -> int:
    return 0 if squares is None else squares.nbytes


def _kind(spec: IndexSpec) -> str:
    return f"faiss {IndexType.HNSW if spec.index_type is IndexType.AUTOINDEX else spec.index_type}"
