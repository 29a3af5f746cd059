"""DOOR to faiss: the library itself, its threads, and inner products with rows where they stand.

Threads. faiss counts its threads by OpenMP, whose number is kept for each calling thread; so whoever calls sets it for
the time of the call. A search of several queries is shared out to the cores, as is one of many rows; a lone query of
few runs on the calling thread. faiss releases the GIL in every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import faiss as _faiss
import numpy as np

from index.protocol import Distances, Matrix, Offsets

faiss: Any = _faiss  # the stubs it ships lack half of what it exports

SEARCH_THREADS: Final = min(8, int(faiss.omp_get_max_threads()))
"""At most so many share a search: beyond, waking them costs more than a batch of queries has to give."""
_SHARED_ROWS_MIN: Final = 1_024
"""Rows that are worth waking a thread for: 0.2 ms of 384 components that lie anywhere in memory."""


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let faiss use so many threads in calls from this one."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def chosen_products(vectors: Matrix, chosen: Offsets, query: Matrix, products: Distances) -> None:
    """Write the dot product of a query with each of the chosen rows, which are read where they stand.

    vectors   (n, dim) float32, C-contiguous
    chosen    (m,) int64, each below n
    query     (dim,) float32
    products  (m,) float32

    Copying 500 of 50,000 x 384 rows out of cold memory first, to multiply them by OpenBLAS, takes 1.6 times as long;
    5,000 of them 1.3 times, on one thread.
    """
    parts = max(1, min(SEARCH_THREADS, len(chosen) // _SHARED_ROWS_MIN))
    each = len(chosen) // parts
    _products(vectors, chosen[: parts * each], np.repeat(query[None, :], parts, axis=0), products)
    if parts * each < len(chosen):
        _products(vectors, chosen[parts * each :], query[None, :], products[parts * each :])


def _products(vectors: Matrix, chosen: Offsets, queries: Matrix, products: Distances) -> None:
    """Write the products of each query with its share of the rows: the queries are what faiss shares out."""
    count = len(queries)
    arrays = (products, np.ascontiguousarray(queries), vectors, np.ascontiguousarray(chosen, np.int64))
    with thread_count(count):
        faiss.fvec_inner_products_by_idx(*map(faiss.swig_ptr, arrays), vectors.shape[1], count, len(chosen) // count)
