"""DOOR to faiss: the library itself, its threads, and inner products with rows where they stand.

Threads. faiss counts its threads by OpenMP, whose number is kept for each calling thread; so every call says how many
it wants. A search of several queries is shared out to the cores, as is one of many rows; a lone query of few runs on
the calling thread. faiss releases the GIL in every call.
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
    chosen    (m,) int64, contiguous, each below n
    query     (dim,) float32, contiguous
    products  (m,) float32

    Copying 500 of 50,000 x 384 rows out of cold memory first, to multiply them by OpenBLAS, takes 1.6 times as long;
    5,000 of them 1.3 times, on one thread.
    """
    parts = min(SEARCH_THREADS, len(chosen) // _SHARED_ROWS_MIN)
    if parts <= 1:
        faiss.omp_set_num_threads(1)
        _products(vectors, chosen, query, 1, products)
        return
    each = len(chosen) // parts
    with thread_count(parts):  # what faiss shares out are the queries, each with its own rows
        _products(vectors, chosen[: parts * each], np.repeat(query[None, :], parts, axis=0), parts, products)
        if parts * each < len(chosen):
            _products(vectors, chosen[parts * each :], query, 1, products[parts * each :])


def _products(vectors: Matrix, chosen: Offsets, queries: Matrix, count: int, products: Distances) -> None:
    """Write the products of each query with its share of the rows, as many for each."""
    faiss.fvec_inner_products_by_idx(
        faiss.swig_ptr(products),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(chosen),
        vectors.shape[1],
        count,
        len(chosen) // count,
    )
