"""Merging partial answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.topk import merge

PART = st.lists(st.integers(0, 5), max_size=8)


@given(lines=st.lists(st.lists(PART, min_size=3, max_size=3), min_size=1, max_size=4), k=st.integers(1, 20))
@settings(deadline=None)
def test_equals_sorting_everything(lines: list[list[list[int]]], k: int) -> None:
    """For every query: the k smallest of all parts, ties to the earlier part and then the earlier hit."""
    parts = []
    for number in range(3):
        width = max(len(line[number]) for line in lines)
        ids = np.full((len(lines), width), -1, dtype=np.int64)
        distances = np.full((len(lines), width), np.inf, dtype=np.float32)
        for row, line in enumerate(lines):
            hits = sorted(line[number])
            ids[row, : len(hits)] = np.arange(len(hits)) + 100 * number
            distances[row, : len(hits)] = hits
        parts.append((ids, distances))
    merged = merge(parts, k)
    assert merged.ids.shape == merged.distances.shape == merged.sources.shape == (len(lines), k)
    for row, line in enumerate(lines):
        every = [(d, part, i + 100 * part) for part, hits in enumerate(line) for i, d in enumerate(sorted(hits))]
        wanted = sorted(every)[:k]
        pad = [-1] * (k - len(wanted))
        assert merged.ids[row].tolist() == [ident for _, _, ident in wanted] + pad
        assert merged.sources[row].tolist() == [part for _, part, _ in wanted] + pad
        assert merged.distances[row].tolist() == [d for d, _, _ in wanted] + [np.inf] * len(pad)


def test_no_parts() -> None:
    """Nothing to merge is an answer of padding, if it is known for how many queries."""
    assert merge([], 3, queries=2).ids.tolist() == [[-1] * 3] * 2
    with pytest.raises(ValueError, match="number of queries"):
        merge([], 3)
