"""Matrices to search: clustered like real embeddings, with twins, and far from zero on request."""

from __future__ import annotations

import numpy as np

from index.engines import build, load
from index.flat import exact_distances
from index.metric import Metric
from index.protocol import Hits, Mask, Matrix, VectorIndex
from index.spec import IndexSpec, SearchParams, parse_index_spec

PLAIN = SearchParams()


def clustered(seed: int, rows: int, dim: int, metric: Metric, *, clusters: int = 20) -> Matrix:
    """Return rows scattered around a few centres, as `metric` wants them."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(dim).normal(size=(clusters, dim))
    scattered = centres[rng.integers(0, clusters, rows)] + 0.7 * rng.normal(size=(rows, dim))
    return metric.normalise(np.ascontiguousarray(scattered, dtype=np.float32))


def make(index_type: str, metric: Metric, vectors: Matrix, **params: object) -> VectorIndex:
    """Return an index of the rows, built by one thread."""
    return build_quietly(parse_index_spec(index_type, metric, params), vectors)


def build_quietly(spec: IndexSpec, vectors: Matrix, *, threads: int = 1) -> VectorIndex:
    """Return an index of the rows, telling nobody."""
    return build(spec, vectors, threads=threads, progress=lambda _: None, cancelled=lambda: False)


def reloaded(index: VectorIndex) -> VectorIndex:
    """Return the index as another node gets it: from its dump and the same rows in other memory."""
    return load(index.spec, index.dump(), index.vectors().copy())


def dumb_nearest(queries: Matrix, vectors: Matrix, k: int, metric: Metric, mask: Mask | None = None) -> Hits:
    """Return the k nearest rows by sorting all of them: obviously right, and slow."""
    hits = Hits.none(len(queries), k)
    for line, query in enumerate(queries.astype(np.float64)):
        if metric is Metric.L2:
            wide = ((vectors - query) ** 2).sum(axis=1)
        else:
            wide = 0.0 - (vectors * query).sum(axis=1)
        order = [
            int(offset) for offset in np.argsort(wide.astype(np.float32), kind="stable") if mask is None or mask[offset]
        ][:k]
        hits.offsets[line, : len(order)] = order
        hits.distances[line, : len(order)] = wide[order]
    return hits


def recall(found: Hits, truth: Hits) -> float:
    """Return the share of the true hits that were found; all of none is 1."""
    pairs = zip(found.offsets, truth.offsets, strict=True)
    common = sum(len(np.intersect1d(line[line >= 0], true[true >= 0])) for line, true in pairs)
    total = int(truth.counts.sum())
    return common / total if total else 1.0


def assert_sound(hits: Hits, queries: Matrix, vectors: Matrix, metric: Metric, mask: Mask | None) -> None:
    """Assert what holds for every answer: each row once, allowed, in order, at its exact distance, then padding."""
    for query, offsets, distances in zip(queries, hits.offsets, hits.distances, strict=True):
        count = int((offsets >= 0).sum())
        assert (offsets[count:] == -1).all() and np.isposinf(distances[count:]).all(), "padding comes last"
        offsets, distances = offsets[:count], distances[:count]
        assert len(set(offsets.tolist())) == count, "each row once"
        assert mask is None or mask[offsets].all(), "only rows that pass"
        assert sorted(zip(distances, offsets, strict=True)) == list(zip(distances, offsets, strict=True))
        np.testing.assert_array_equal(distances, exact_distances(query[None, :], vectors[offsets], metric=metric)[0])
