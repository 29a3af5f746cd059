"""Answers of several shards become the one that all rows together would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.columns import Batch
from storage.merging import ScoredRows, merge_hits, merge_rows, rounded
from storage.schema import DataType
from tests.storage.rows import DIM, GROUP, PK, key_of, make_batch, make_collection

KEYS = st.lists(st.integers(0, 200), unique=True, max_size=30)


def batch_of(kind: DataType, numbers: list[int]) -> Batch:
    schema = make_collection(kind)
    vectors = np.zeros((len(numbers), DIM), np.float32)
    return make_batch(schema, numbers, [number % 7 for number in numbers], vectors).select([PK, GROUP])


@pytest.mark.parametrize("kind", [DataType.INT64, DataType.VARCHAR])
@given(numbers=KEYS, ways=st.integers(1, 4), limit=st.none() | st.integers(1, 12), offset=st.integers(0, 5))
def test_rows_are_those_of_one_shard(
    kind: DataType, numbers: list[int], ways: int, limit: int | None, offset: int
) -> None:
    """By primary key, the same rows are skipped and kept, each with its own fields."""
    schema = make_collection(kind)
    parts = [batch_of(kind, [one for one in numbers if one % ways == way]) for way in range(ways)]
    merged = merge_rows(parts, PK, limit=limit, offset=offset)
    wanted = sorted(numbers)[offset : None if limit is None else offset + limit]
    assert merged.columns[PK].to_list() == [key_of(schema, number) for number in wanted]
    assert merged.columns[GROUP].to_list() == [number % 7 for number in wanted]


@pytest.mark.parametrize("kind", [DataType.INT64, DataType.VARCHAR])
@pytest.mark.parametrize("larger_is_better", [False, True])
@given(
    hits=st.lists(st.dictionaries(st.integers(0, 200), st.integers(0, 9), max_size=20), min_size=1, max_size=3),
    ways=st.integers(1, 4),
    limit=st.integers(1, 10),
    offset=st.integers(0, 4),
)
def test_hits_are_the_best_of_all(
    kind: DataType, larger_is_better: bool, hits: list[dict[int, int]], ways: int, limit: int, offset: int
) -> None:
    """For each query on its own, nearest first, equally near ones by primary key."""
    schema = make_collection(kind)
    sign = -1 if larger_is_better else 1

    def best(some: dict[int, int]) -> list[tuple[int, int]]:
        return sorted(some.items(), key=lambda one: (sign * one[1], one[0]))

    parts = []
    for way in range(ways):
        mine = [best({k: v for k, v in query.items() if k % ways == way})[: limit + offset] for query in hits]
        flat = [one for query in mine for one in query]
        scores = np.array([score for _, score in flat], np.float32)
        parts.append(ScoredRows([len(one) for one in mine], scores, batch_of(kind, [key for key, _ in flat])))
    counts, scores, batch = merge_hits(parts, PK, limit=limit, offset=offset, larger_is_better=larger_is_better)
    wanted = [best(query)[offset : offset + limit] for query in hits]
    assert list(counts) == [len(one) for one in wanted]
    assert scores.tolist() == [score for query in wanted for _, score in query]
    assert batch.columns[PK].to_list() == [key_of(schema, key) for query in wanted for key, _ in query]


@given(st.floats(-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max), width=32), st.integers(-1, 6))
def test_rounded_scores_stay_near(score: float, decimals: int) -> None:
    """No score becomes infinite, however large it is, and none moves further than half of the last decimal."""
    (found,) = rounded(np.array([score], np.float32), decimals).tolist()
    assert abs(found - score) <= (0 if decimals < 0 else 0.5 * 10.0**-decimals + 1e-6 * abs(score))
