"""From a spec to an index: which engine builds and loads what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from index.faiss_engine import build_faiss, load_faiss
from index.flat import FlatIndex, load_flat
from index.hnsw import build_nmslib, load_nmslib
from index.protocol import BuildCancelled, Cancelled, Matrix, Progress, VectorIndex
from index.spec import Engine, IndexSpec

VERSIONS: Final[Mapping[Engine, int]] = {Engine.EXACT: 1, Engine.NMSLIB: 1, Engine.FAISS: 1}
"""Raised when an engine makes better indexes of the same vectors, or its blobs change: older ones are built anew."""


def version_of(spec: IndexSpec) -> int:
    """Return the version of what `build` makes now."""
    return VERSIONS[spec.engine]


def build(spec: IndexSpec, vectors: Matrix, *, threads: int, progress: Progress, cancelled: Cancelled) -> VectorIndex:
    """Return a new index of the rows. Blocks, without the GIL for most of the time.

    vectors  (n, dim) float32, C-contiguous, unit length if the metric is COSINE; not changed later by the caller
    threads  that may work on it at once

    Raises BuildCancelled soon after `cancelled` says so, except that nmslib's graph cannot be stopped once begun.
    """
    _check(vectors)
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


def load(spec: IndexSpec, blob: bytes, vectors: Matrix) -> VectorIndex:
    """Return the index that `dump` gave the blob of, over the same vectors.

    Raises IndexDamaged if the blob is not whole, or not of this spec and of a matrix of this shape. That the vectors
    are the very same the caller must know.
    """
    _check(vectors)
    match _engine(spec, vectors):
        case Engine.EXACT:
            return load_flat(spec, blob, vectors)
        case Engine.NMSLIB:
            return load_nmslib(spec, blob, vectors)
        case Engine.FAISS:
            return load_faiss(spec, blob, vectors)


def _engine(spec: IndexSpec, vectors: Matrix) -> Engine:
    """Return the engine that serves the spec: no rows need none, and the libraries differ in what they make of them."""
    return spec.engine if len(vectors) else Engine.EXACT


def _check(vectors: Matrix) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
        raise ValueError(f"vectors of {vectors.dtype} {vectors.shape}, wanted float32 (rows, dim), C-contiguous")
