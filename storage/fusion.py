"""One ranking out of several: what a hybrid search makes of the hits of its searches.

Every search gives its own hits, nearest first. A row that several searches found is one row of the result. Formulas are
Milvus's (reranking page of its documentation):

    reciprocal rank   sum of 1 / (k + rank), rank from 1
    weighted          sum of weight * score. Scores that mean different things are made alike first: where asked for,
                      each is put between 0 and 1, larger being better; where distances meet similarities, distances
                      are. Where all are distances and nothing is asked for, the smallest sum is the best
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from index.metric import Metric
from storage.columns import Batch, Offsets
from storage.grouping import Grouping
from storage.merging import ScoredRows, key_ranks
from storage.types import FieldId

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ReciprocalRank:
    k: float = 60.0


@dataclass(frozen=True)
class Weighted:
    weights: tuple[float, ...]
    """One for each search."""
    normalised: bool = False


Ranker: TypeAlias = ReciprocalRank | Weighted


class GroupScorer(StrEnum):
    """What a group counts for, of the scores of its rows."""

    MAX = "max"
    """That of its best row, which is the smallest where small scores are good."""
    SUM = "sum"
    AVG = "avg"


@dataclass(frozen=True)
class FusedGroups:
    """The rows with one value of a field are a group, of the best of which its best rows are wanted."""

    grouping: Grouping
    scorer: GroupScorer = GroupScorer.MAX


def fuse(
    parts: Sequence[ScoredRows],
    metrics: Sequence[Metric],
    ranker: Ranker,
    primary: FieldId,
    *,
    limit: int,
    offset: int = 0,
    groups: FusedGroups | None = None,
) -> ScoredRows:
    """Return the best rows of all searches for each query, best first, without its first `offset` ones.

    parts    the hits of each search, of the same queries and fields, the primary key among them
    metrics  of each search: what its scores are
    groups   if given, limit and offset count groups, whose rows come together

    Rows with equal scores come by primary key ascending, groups by their best rows.
    """
    queries = len(parts[0].counts)
    batch = Batch.concat([part.batch for part in parts])
    owners = np.concatenate([np.repeat(np.arange(queries), np.asarray(part.counts, np.int64)) for part in parts])
    ranks = key_ranks(batch.columns[primary])
    shares, smaller_is_better = _shares(parts, metrics, ranker)
    _, first, member = np.unique(owners * (len(ranks) + 1) + ranks, return_index=True, return_inverse=True)
    scores = np.bincount(member, shares, len(first)).astype(np.float32)
    owners = owners[first]
    order = np.lexsort((ranks[first], scores if smaller_is_better else -scores, owners))
    if groups is not None:
        lines = _grouped(order, owners, scores, batch.take(first), queries, groups, smaller_is_better)
        kept = np.array([row for line in lines for group in line[offset : offset + limit] for row in group], np.int64)
        return ScoredRows(np.bincount(owners[kept], minlength=queries).tolist(), scores[kept], batch.take(first[kept]))
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=queries))])
    places = np.arange(len(order)) - starts[owners[order]]
    kept = order[(places >= offset) & (places < offset + limit)]
    return ScoredRows(np.bincount(owners[kept], minlength=queries).tolist(), scores[kept], batch.take(first[kept]))


def _grouped(
    order: Offsets,
    owners: Offsets,
    scores: npt.NDArray[np.float32],
    rows: Batch,
    queries: int,
    groups: FusedGroups,
    smaller_is_better: bool,
) -> list[list[list[int]]]:
    """Return the groups of each query, the best first, each as its best rows; `order` has all rows, best first."""
    values = rows.columns[groups.grouping.field_id].to_list()
    found: list[dict[Any, list[int]]] = [{} for _ in range(queries)]
    for row in order.tolist():
        mine = found[int(owners[row])].setdefault(values[row], [])
        if len(mine) < groups.grouping.size:
            mine.append(row)
    sign = 1 if smaller_is_better else -1

    def worth(group: list[int]) -> float:
        if groups.scorer is GroupScorer.MAX:
            return sign * float(scores[group[0]])
        total = sign * float(scores[group].astype(np.float64).sum())
        return total / len(group) if groups.scorer is GroupScorer.AVG else total

    return [sorted(line.values(), key=worth) for line in found]


def normalised(scores: Floats, metric: Metric) -> Floats:
    """Return scores of this metric between 0 and 1, larger being better, as Milvus makes them."""
    if not metric.is_similarity:
        return np.asarray(1.0 - 2.0 * np.arctan(scores) / np.pi)
    if metric is Metric.COSINE:
        return np.asarray((1.0 + scores) / 2.0)
    if metric is Metric.BM25:
        return np.asarray(2.0 * np.arctan(scores) / np.pi)
    return np.asarray(0.5 + np.arctan(scores) / np.pi)


def _shares(parts: Sequence[ScoredRows], metrics: Sequence[Metric], ranker: Ranker) -> tuple[Floats, bool]:
    """Return (what each hit adds to the score of its row, whether the smaller score is the better one)."""
    if isinstance(ranker, ReciprocalRank):
        ranks = [np.arange(1, count + 1) for part in parts for count in part.counts]
        return np.asarray(1.0 / (ranker.k + np.concatenate(ranks)), np.float64), False
    smaller_is_better = not ranker.normalised and not any(metric.is_similarity for metric in metrics)
    found = []
    for part, metric, weight in zip(parts, metrics, ranker.weights, strict=True):
        scores = part.scores.astype(np.float64)
        if ranker.normalised or (not metric.is_similarity and not smaller_is_better):
            scores = normalised(scores, metric)
        found.append(weight * scores)
    return np.concatenate(found), smaller_is_better
