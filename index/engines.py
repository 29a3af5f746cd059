"""From a spec to an index: which engine builds and loads what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from index.binary import build_binary, load_binary
from index.faiss_engine import build_faiss, load_faiss
from index.flat import FlatIndex, load_flat
from index.hnsw import build_nmslib, load_nmslib
from index.protocol import BuildCancelled, Cancelled, Form, Progress, VectorIndex
from index.sparse import SparseIndex, SparseRows, load_sparse
from index.spec import Engine, IndexSpec

VERSIONS: Final[Mapping[Engine, int]] = dict.fromkeys(Engine, 1)
"""Raised when an engine makes better indexes of the same vectors, or its blobs change: older ones are built anew."""


def version_of(spec: IndexSpec) -> int:
    """Return the version of what `build` makes now."""
    return VERSIONS[spec.engine]


def build(spec: IndexSpec, vectors: Any, *, threads: int, progress: Progress, cancelled: Cancelled) -> VectorIndex:
    """Return a new index of the rows. Blocks, without the GIL for most of the time.

    vectors  (n, dim) float32, C-contiguous, unit length if the metric is COSINE, or of the spec's other form; not
             changed later by the caller
    threads  that may work on it at once

    Raises BuildCancelled soon after `cancelled` says so, except that nmslib's graph cannot be stopped once begun.
    """
    _check(spec, vectors)
    if threads < 1:
        raise ValueError(f"{threads} threads")
    if cancelled():
        raise BuildCancelled(0, len(vectors))
    progress(0.0)
    match _engine(spec, vectors):
        case Engine.EXACT:
            progress(1.0)
            return FlatIndex(spec, vectors)
        case Engine.NMSLIB:
            return build_nmslib(spec, vectors, threads=threads, progress=progress, cancelled=cancelled)
        case Engine.FAISS:
            return build_faiss(spec, vectors, threads=threads, progress=progress, cancelled=cancelled)
        case Engine.BINARY:
            return build_binary(spec, vectors, threads=threads, progress=progress, cancelled=cancelled)
        case Engine.SPARSE:
            return SparseIndex(spec, vectors)


def load(spec: IndexSpec, blob: bytes, vectors: Any) -> VectorIndex:
    """Return the index that `dump` gave the blob of, over the same vectors.

    Raises IndexDamaged if the blob is not whole, or not of this spec and of a matrix of this shape. That the vectors
    are the very same the caller must know.
    """
    _check(spec, vectors)
    match _engine(spec, vectors):
        case Engine.EXACT:
            return load_flat(spec, blob, vectors)
        case Engine.NMSLIB:
            return load_nmslib(spec, blob, vectors)
        case Engine.FAISS:
            return load_faiss(spec, blob, vectors)
        case Engine.BINARY:
            return load_binary(spec, blob, vectors)
        case Engine.SPARSE:
            return load_sparse(spec, blob, vectors)


def _engine(spec: IndexSpec, vectors: Any) -> Engine:
    """Return the engine that serves the spec: no rows need none, and the libraries differ in what they make of them."""
    if spec.form is not Form.DENSE:
        return spec.engine
    return spec.engine if len(vectors) > spec.has_product_codes else Engine.EXACT  # one row has no two centroids


def _check(spec: IndexSpec, vectors: Any) -> None:
    if spec.form is Form.SPARSE:
        if not isinstance(vectors, SparseRows):
            raise ValueError(f"vectors are {type(vectors).__name__}, wanted SparseRows")
    elif spec.form is Form.BINARY:
        if vectors.ndim != 2 or vectors.dtype != np.uint8:
            raise ValueError(f"vectors of {vectors.dtype} {vectors.shape}, wanted uint8 (rows, dim / 8)")
    elif vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
        raise ValueError(f"vectors of {vectors.dtype} {vectors.shape}, wanted float32 (rows, dim), C-contiguous")
