"""One answer out of those of several shards, which share no rows and no primary keys.

The order is that of one shard's answer: hits nearest first, rows by primary key ascending. Hits that are equally far
come by primary key, so that the answer does not depend on who was asked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.columns import Batch, Column, Offsets, ScalarColumn, StringColumn
from storage.types import FieldId


class ScoredRows(NamedTuple):
    """Rows of all queries, one query after the other: `counts[i]` of them belong to query i."""

    counts: Sequence[int]
    scores: npt.NDArray[np.float32]
    """As the API shows them."""
    batch: Batch


def merge_hits(
    parts: Sequence[ScoredRows], primary: FieldId, *, limit: int, offset: int = 0, larger_is_better: bool
) -> ScoredRows:
    """Return the best hits of all parts for each query, without its first `offset` ones, at most `limit`.

    Each part has the best limit + offset hits of its shards; all have the same queries and fields, the primary key
    among them.
    """
    batch = Batch.concat([part.batch for part in parts])
    queries = len(parts[0].counts)
    owners = np.concatenate([np.repeat(np.arange(queries), np.asarray(part.counts, np.int64)) for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    distances = -scores if larger_is_better else scores
    order = np.lexsort((_ranks(batch.columns[primary]), distances, owners))
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=queries))])
    places = np.arange(len(order)) - starts[owners[order]]
    kept = order[(places >= offset) & (places < offset + limit)]
    return ScoredRows(np.bincount(owners[kept], minlength=queries).tolist(), scores[kept], batch.take(kept))


def rounded(scores: npt.NDArray[np.float32], decimals: int) -> npt.NDArray[np.float32]:
    """Return the scores with so many decimals, as they are if that is negative.

    As float32, a large one would become infinite on the way.
    """
    return scores if decimals < 0 else np.round(scores.astype(np.float64), decimals).astype(np.float32)


def merge_rows(parts: Sequence[Batch], primary: FieldId, *, limit: int | None, offset: int = 0) -> Batch:
    """Return the rows of all parts by primary key ascending, without the first `offset` ones, at most `limit`."""
    batch = Batch.concat(parts)
    order = key_order(batch.columns[primary])
    return batch.take(order[offset : None if limit is None else offset + limit])


def key_order(keys: Column) -> Offsets:
    """Return the offsets in the order of these primary keys."""
    if isinstance(keys, StringColumn):
        return keys.values.order()
    assert isinstance(keys, ScalarColumn), "a primary key is Int64 or VarChar"
    return np.argsort(keys.values, kind="stable")


def key_ranks(keys: Column) -> Offsets:
    """Return for each key how many smaller ones there are: equal for equal keys, and ordered as the keys are."""
    if isinstance(keys, ScalarColumn):
        return np.unique(keys.values, return_inverse=True)[1].astype(np.int64, copy=False)
    assert isinstance(keys, StringColumn), "a primary key is Int64 or VarChar"
    order = key_order(keys)
    codes = keys.values.distinct()[1][order]
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.cumsum(np.concatenate([[False], codes[1:] != codes[:-1]])[: len(codes)])
    return ranks


def _ranks(keys: Column) -> Offsets:
    """Return numbers that are ordered as the keys are."""
    return keys.values if isinstance(keys, ScalarColumn) else key_ranks(keys)
