"""Hybrid ranking: Milvus's formulas, held against a dumb model."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.metric import Metric
from storage.columns import Batch, Column, ScalarColumn, StringColumn
from storage.fusion import FusedGroups, GroupScorer, Ranker, ReciprocalRank, Weighted, fuse
from storage.grouping import Grouping
from storage.merging import ScoredRows, key_ranks
from storage.strings import StringArray
from storage.types import FieldId

PK, COLOR = FieldId(100), FieldId(101)
Hits = list[tuple[int, float]]


def keys_of(numbers: list[int], text: bool) -> Column:
    if text:
        return StringColumn(StringArray.from_strings([f"k{number:03d}" for number in numbers]))
    return ScalarColumn(np.array(numbers, np.int64))


def part(lines: list[Hits], text: bool) -> ScoredRows:
    hits = [hit for line in lines for hit in line]
    batch = Batch({PK: keys_of([key for key, _ in hits], text)}, len(hits))
    return ScoredRows([len(line) for line in lines], np.array([score for _, score in hits], np.float32), batch)


def dumb(searches: list[Hits], metrics: list[Metric], ranker: Ranker, limit: int, offset: int) -> Hits:
    """Return the fused ranking of one query, in plain Python."""
    scores: dict[int, float] = defaultdict(float)
    raw = isinstance(ranker, Weighted) and not ranker.normalised and not any(m.is_similarity for m in metrics)
    for number, (hits, metric) in enumerate(zip(searches, metrics, strict=True)):
        for rank, (key, score) in enumerate(hits, start=1):
            if isinstance(ranker, ReciprocalRank):
                scores[key] += 1 / (ranker.k + rank)
                continue
            value = float(np.float32(score))
            if metric is Metric.L2 and not raw:
                value = 1 - 2 * math.atan(value) / math.pi
            elif ranker.normalised and metric is Metric.IP:
                value = 0.5 + math.atan(value) / math.pi
            elif ranker.normalised and metric is Metric.COSINE:
                value = (1 + value) / 2
            scores[key] += ranker.weights[number] * value
    rounded = {key: float(np.float32(score)) for key, score in scores.items()}
    order = sorted(rounded.items(), key=lambda one: (one[1] if raw else -one[1], one[0]))
    return order[offset : offset + limit]


line = st.lists(
    st.tuples(st.integers(0, 12), st.integers(-4, 8).map(lambda n: n / 4)), max_size=8, unique_by=lambda h: h[0]
)


@given(
    st.lists(st.tuples(line, line, st.sampled_from([Metric.L2, Metric.IP, Metric.COSINE])), min_size=1, max_size=3),
    st.sampled_from(["rrf", "weighted", "normalised"]),
    st.integers(1, 10),
    st.integers(0, 3),
    st.booleans(),
)
def test_fusion_is_the_formula(
    searches: list[tuple[Hits, Hits, Metric]], kind: str, limit: int, offset: int, text: bool
) -> None:
    """For both strategies, any mix of metrics, two queries at once, numbers and texts as keys, ties by key."""
    weights = tuple(0.25 * (1 + i) for i in range(len(searches)))
    ranker: Ranker = ReciprocalRank(60) if kind == "rrf" else Weighted(weights, kind == "normalised")
    metrics = [metric for *_, metric in searches]
    found = fuse([part([a, b], text) for a, b, _ in searches], metrics, ranker, PK, limit=limit, offset=offset)
    keys = found.batch.columns[PK].to_list()
    row = 0
    for query in range(2):
        wanted = dumb([one[0] if query == 0 else one[1] for one in searches], metrics, ranker, limit, offset)
        assert found.counts[query] == len(wanted)
        mine = slice(row, row + len(wanted))
        assert keys[mine] == [f"k{key:03d}" if text else key for key, _ in wanted]
        assert found.scores[mine].tolist() == pytest.approx([score for _, score in wanted], rel=1e-6)
        row += len(wanted)


@given(
    st.lists(st.tuples(line, st.sampled_from([Metric.L2, Metric.IP])), min_size=1, max_size=3),
    st.sampled_from(["rrf", "weighted", "normalised"]),
    st.sampled_from(list(GroupScorer)),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_groups_of_the_ranking(
    searches: list[tuple[Hits, Metric]], kind: str, scorer: GroupScorer, limit: int, offset: int, size: int
) -> None:
    """Each group has its best rows; groups come by their best row, their sum or their mean, ties by their best row."""
    weights = tuple(0.25 * (1 + i) for i in range(len(searches)))
    ranker: Ranker = ReciprocalRank(60) if kind == "rrf" else Weighted(weights, kind == "normalised")
    metrics = [metric for _, metric in searches]
    raw = kind == "weighted" and all(metric is Metric.L2 for metric in metrics)

    def value_of(key: int) -> int | None:
        return None if key % 4 == 0 else key % 4

    parts = []
    for hits, _ in searches:
        plain = part([hits], False)
        values = [value_of(key) for key, _ in hits]
        valid = np.array([one is not None for one in values], np.bool_)
        column = ScalarColumn(np.array([one or 0 for one in values], np.int64), valid)
        parts.append(plain._replace(batch=Batch({**plain.batch.columns, COLOR: column}, len(hits))))
    groups: dict[int | None, Hits] = defaultdict(list)
    for key, score in dumb([hits for hits, _ in searches], metrics, ranker, 99, 0):
        if len(groups[value_of(key)]) < size:
            groups[value_of(key)].append((key, score))

    def worth(rows: Hits) -> float:
        total = math.fsum(score for _, score in rows)
        best = rows[0][1]
        return {GroupScorer.MAX: best, GroupScorer.SUM: total, GroupScorer.AVG: total / len(rows)}[scorer]

    wanted = sorted(groups.values(), key=lambda rows: round(worth(rows) if raw else -worth(rows), 9))
    wanted_keys = [key for rows in wanted[offset : offset + limit] for key, _ in rows]
    made = FusedGroups(Grouping(COLOR, size), scorer)
    found = fuse(parts, metrics, ranker, PK, limit=limit, offset=offset, groups=made)
    assert found.batch.columns[PK].to_list() == wanted_keys and found.counts == [len(wanted_keys)]


@given(st.lists(st.integers(0, 5)), st.booleans())
def test_ranks_of_keys(numbers: list[int], text: bool) -> None:
    """Equal for equal keys only, and in their order."""
    ranks = key_ranks(keys_of(numbers, text)).tolist()
    assert ranks == [sorted(set(numbers)).index(number) for number in numbers]
