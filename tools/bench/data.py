"""Rows and queries to measure with: vectors, scalar fields, and a field made for filters of known selectivity."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Matrix: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]

BUCKETS = 1000
"""`bucket` is uniform over 0..999 and independent of the vectors: `bucket < 10` lets 1 % through."""
QUERY_SHARE_MAX = 0.1
"""Without a file of queries, at most this share of the base is set aside to ask with, and is not inserted."""


@dataclass(frozen=True)
class Dataset:
    """What is inserted and what is asked; row i has primary key i everywhere."""

    name: str
    vectors: Matrix
    """(rows, dim), unit length if the metric is COSINE."""
    queries: Matrix
    """(q, dim), none of them among the rows."""
    scalars: Sequence[Mapping[str, Any]]
    """One mapping per row; empty mappings when the source has vectors only."""
    buckets: npt.NDArray[np.int32]
    metric: str

    @property
    def rows(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def raw_bytes(self) -> int:
        """Bytes of the vectors alone, as float32."""
        return self.vectors.nbytes

    def head(self, rows: int) -> Dataset:
        """Return the same data with only the first `rows` rows."""
        return Dataset(
            self.name, self.vectors[:rows], self.queries, self.scalars[:rows], self.buckets[:rows], self.metric
        )

    def column(self, field: str) -> npt.NDArray[Any]:
        """Return the values of a scalar field."""
        return np.array([row[field] for row in self.scalars])


def load_dataset(path: str, *, queries_path: str | None, rows: int, queries: int, seed: int, metric: str) -> Dataset:
    """Return a seeded sample of `rows` rows and up to `queries` queries.

    path  a folder with wordnet_vectors.npy, wordnet_queries.npy and wordnet_rows.jsonl, or any 2-d .npy
    """
    lines: list[dict[str, Any]] | None = None
    if os.path.isdir(path):
        base = np.load(os.path.join(path, "wordnet_vectors.npy"), mmap_mode="r")
        queries_path = queries_path or os.path.join(path, "wordnet_queries.npy")
        with open(os.path.join(path, "wordnet_rows.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    else:
        base = np.load(path, mmap_mode="r")
    if base.ndim != 2:
        raise ValueError(f"{path} has shape {base.shape}, wanted (rows, dim)")
    random = np.random.default_rng(seed)
    order = random.permutation(len(base))
    if queries_path:
        asked = np.load(queries_path, mmap_mode="r")[:queries]
    else:
        held_out = min(queries, max(1, int(len(base) * QUERY_SHARE_MAX)))
        asked, order = base[np.sort(order[:held_out])], order[held_out:]
    chosen = order[:rows]
    scalars = [_scalars(lines[i]) for i in chosen.tolist()] if lines else [{}] * len(chosen)
    return Dataset(
        name=os.path.basename(os.path.normpath(path)),
        vectors=_prepared(base[chosen], metric),
        queries=_prepared(asked, metric),
        scalars=scalars,
        buckets=random.integers(0, BUCKETS, len(chosen), dtype=np.int32),
        metric=metric,
    )


def _scalars(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "id"}


def _prepared(vectors: npt.NDArray[Any], metric: str) -> Matrix:
    matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    if metric == "COSINE":
        lengths = np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)
        matrix = (matrix / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return np.ascontiguousarray(matrix)
