"""Exact answers by plain numpy, and the two numbers everything is judged by: recall and percentiles.

This is deliberately not the index room's exact search: the oracle must not share a mistake with what it judges.
Scores are larger-is-better here whatever the metric: q . x, or minus the squared distance for L2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tools.bench.data import Mask, Matrix

Ids: TypeAlias = npt.NDArray[np.int64]
Scores: TypeAlias = npt.NDArray[np.float32]

SCORE_SLACK = 1e-5
"""Two float32 scores of one pair may differ by this much, relative to 1, when summed in different orders."""
_BLOCK_QUERIES = 64
_RANK_SLACK = 1e-9
"""99.9 % of 1,000 is 999 values, whatever binary fractions say."""


@dataclass(frozen=True)
class Truth:
    """The exact k best rows of each query, best first."""

    ids: Ids
    """(q, k), padded with -1 where fewer rows match."""
    scores: Scores
    """(q, k), padded with -inf."""

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])


def scores_of(queries: Matrix, rows: Matrix, metric: str) -> Scores:
    """Return (q, n) scores of every row for every query."""
    products: Scores = queries @ rows.T
    if metric != "L2":
        return products
    squares = np.einsum("ij,ij->i", rows, rows)
    scores: Scores = 2 * products - squares[None, :] - np.einsum("ij,ij->i", queries, queries)[:, None]
    return scores


def exact(queries: Matrix, vectors: Matrix, k: int, metric: str, mask: Mask | None = None) -> Truth:
    """Return the k best rows of `vectors` that the mask lets through, for each query."""
    chosen = np.arange(len(vectors)) if mask is None else np.flatnonzero(mask)
    rows = vectors if mask is None else np.ascontiguousarray(vectors[chosen])
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = min(k, len(chosen))
    for start in range(0, len(queries), _BLOCK_QUERIES if found else len(queries) + 1):
        if not found:
            break
        scores = scores_of(queries[start : start + _BLOCK_QUERIES], rows, metric)
        top = np.argpartition(-scores, found - 1, axis=1)[:, :found]
        top_scores = np.take_along_axis(scores, top, axis=1)
        order = np.argsort(-top_scores, axis=1, kind="stable")
        stop = start + len(scores)
        ids[start:stop, :found] = chosen[np.take_along_axis(top, order, axis=1)]
        best[start:stop, :found] = np.take_along_axis(top_scores, order, axis=1)
    return Truth(ids, best)


def recall(
    answers: Sequence[Sequence[int]],
    truth: Truth,
    *,
    queries: Matrix,
    vectors: Matrix,
    metric: str,
    mask: Mask | None = None,
) -> float:
    """Return the mean share of each query's true k best rows that its answer has; 1.0 where nothing matches.

    answers  one list of primary keys per query; what is doubled, unknown or masked out counts for nothing
    """
    shares = [_share(answer, truth.scores[i], queries[i], vectors, metric, mask) for i, answer in enumerate(answers)]
    return float(np.mean(shares)) if shares else 0.0


def _share(
    answer: Sequence[int], best: Scores, query: npt.NDArray[np.float32], vectors: Matrix, metric: str, mask: Mask | None
) -> float:
    wanted = int(np.isfinite(best).sum())
    if wanted == 0:
        return 1.0 if not answer else 0.0
    ids = [i for i in dict.fromkeys(answer) if 0 <= i < len(vectors) and (mask is None or mask[i])]
    if not ids:
        return 0.0
    scores = scores_of(query[None, :], vectors[ids], metric)[0]
    floor = best[wanted - 1]
    good = int((scores >= floor - SCORE_SLACK * max(1.0, abs(float(floor)))).sum())
    return min(good, wanted) / wanted


def percentile(values: npt.NDArray[np.float64] | npt.NDArray[np.int64], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed (nearest rank); nan if none."""
    if len(values) == 0:
        return float("nan")
    rank = math.ceil(percent * len(values) / 100 - _RANK_SLACK)
    return float(np.partition(values, rank - 1)[rank - 1])
