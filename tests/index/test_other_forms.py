"""Sparse rows and rows of bits: exact search and every index against plain arithmetic, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.binary import binary_distances, nearest_binary
from index.engines import build, load
from index.metric import EVERYTHING, Bounds, Metric
from index.protocol import BuildCancelled, Form, Hits, IndexDamaged, Mask
from index.sparse import SparseRows, nearest_sparse
from index.spec import SearchParams, parse_index_spec
from index.topk import smallest

Row = dict[int, float]
row = st.dictionaries(st.sampled_from([0, 1, 2, 7, (1 << 32) - 2]), st.integers(0, 6).map(lambda n: n / 4), max_size=5)


def sparse(rows: list[Row]) -> SparseRows:
    return SparseRows.of([(sorted(one), [one[term] for term in sorted(one)]) for one in rows])


def ranked(distances: list[float | None], mask: list[bool], bounds: Bounds, k: int) -> list[tuple[int, float]]:
    hits = [
        (i, distance)
        for i, (distance, passes) in enumerate(zip(distances, mask, strict=True))
        if distance is not None and passes and bounds.low <= distance < bounds.high
    ]
    return sorted(hits, key=lambda hit: (hit[1], hit[0]))[:k]


def lines(hits: Hits) -> list[list[tuple[int, float]]]:
    return [
        [(offset, distance) for offset, distance in zip(*one, strict=True) if offset >= 0]
        for one in zip(hits.offsets.tolist(), hits.distances.tolist(), strict=True)
    ]


@given(
    st.lists(row, min_size=1, max_size=12),
    st.lists(row, max_size=12),
    st.lists(row, min_size=1, max_size=3),
    st.integers(1, 8),
    st.sampled_from([EVERYTHING, Bounds(-2.0, -0.5)]),
    st.randoms(use_true_random=False),
)
def test_sparse_search_is_the_inner_product(
    first: list[Row], second: list[Row], queries: list[Row], k: int, bounds: Bounds, random: Any
) -> None:
    """Rows in two pieces as in one, under any mask and range; rows that share nothing with the query are no hits."""
    rows = [*first, *second]
    mask = [random.random() < 0.7 for _ in rows]
    pieces = [sparse(first), sparse(second)]
    found = nearest_sparse(pieces, sparse(queries), k, mask=np.array(mask), bounds=bounds)
    for query, line in zip(queries, lines(found), strict=True):
        products = [sum(weight * one.get(term, 0.0) for term, weight in query.items()) for one in rows]
        distances = [-float(np.float32(product)) if product > 0 else None for product in products]
        assert line == ranked(distances, mask, bounds, k)
    spec = parse_index_spec("SPARSE_WAND", None, {}, form=Form.SPARSE)
    whole = SparseRows.concat(pieces)
    index = build(spec, whole, threads=1, progress=lambda _: None, cancelled=lambda: False)
    params = SearchParams() if bounds is EVERYTHING else SearchParams(radius=0.5, range_filter=2.0)
    again = load(spec, index.dump(), whole).search(sparse(queries), k, params=params, mask=np.array(mask))
    assert again.offsets.tolist() == found.offsets.tolist() and again.distances.tolist() == found.distances.tolist()


@given(st.lists(row, min_size=1, max_size=8), st.data())
def test_sparse_rows_are_taken_and_cut(rows: list[Row], data: st.DataObject) -> None:
    """take, slice and concat give the very rows."""
    whole = sparse(rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(rows)), st.integers(0, len(rows)))))

    def shown(some: SparseRows) -> list[Row]:
        return [{int(term): float(weight) for term, weight in zip(*some.row(i), strict=True)} for i in range(len(some))]

    assert shown(whole.take(np.array(chosen, np.int64))) == [rows[i] for i in chosen]
    assert shown(whole.slice(start, stop)) == rows[start:stop]
    assert shown(SparseRows.concat([whole.slice(0, start), whole.slice(start, len(rows))])) == rows


def bit_distance(a: bytes, b: bytes, metric: Metric) -> float:
    x, y = int.from_bytes(a, "big"), int.from_bytes(b, "big")
    if metric is Metric.HAMMING:
        return float((x ^ y).bit_count())
    both, either = (x & y).bit_count(), (x | y).bit_count()
    return float(np.float32(1 - both / either)) if either else 1.0


@pytest.mark.parametrize("metric", [Metric.HAMMING, Metric.JACCARD])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 12, 24])
def test_bits_are_compared_exactly(metric: Metric, width: int) -> None:
    """For every width of words; rows with nothing set are as far from each other as can be by JACCARD."""
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 4, (50, width)).astype(np.uint8)
    rows[0] = 0
    queries = np.concatenate([rows[:3], rng.integers(0, 256, (3, width)).astype(np.uint8)])
    mask: Mask = rng.random(50) < 0.8
    found = nearest_binary([rows[:20], rows[20:]], queries, 10, metric=metric, mask=mask)
    for query, line in zip(queries, lines(found), strict=True):
        distances: list[float | None] = [bit_distance(query.tobytes(), one.tobytes(), metric) for one in rows]
        assert binary_distances(query, rows, metric).tolist() == distances
        assert line == ranked(distances, mask.tolist(), EVERYTHING, 10)


@pytest.mark.parametrize("metric", ["HAMMING", "JACCARD"])
def test_lists_of_bits(metric: str) -> None:
    """All lists looked into find what exact search finds; few survivors are all found; a dump is the index again."""

    rng = np.random.default_rng(3)
    centers = rng.integers(0, 256, (20, 16)).astype(np.uint8)
    flips = np.packbits(rng.random((2000, 128)) < 0.05, axis=1)
    rows = centers[rng.integers(0, 20, 2000)] ^ flips
    spec = parse_index_spec("BIN_IVF_FLAT", metric, {"nlist": 16}, form=Form.BINARY)
    told: list[float] = []
    index = build(spec, rows, threads=1, progress=told.append, cancelled=lambda: False)
    assert told[-1] == 1.0
    queries = rows[:20] ^ flips[100:120]
    exact = nearest_binary([rows], queries, 10, metric=spec.metric)
    for one in (index, load(spec, index.dump(), rows)):
        thorough = one.search(queries, 10, params=SearchParams(nprobe=16))
        assert thorough.offsets.tolist() == exact.offsets.tolist()
        assert thorough.distances.tolist() == exact.distances.tolist()
        quick = one.search(queries, 10, params=SearchParams(nprobe=2))
        shares = [len(set(a) & set(b)) for a, b in zip(quick.offsets.tolist(), exact.offsets.tolist(), strict=True)]
        assert sum(shares) / 200 > 0.7
        mask = np.zeros(2000, np.bool_)
        mask[[5, 900, 1500]] = True
        assert one.search(queries, 10, params=SearchParams(nprobe=1), mask=mask).counts.tolist() == [3] * 20
    with pytest.raises(IndexDamaged):
        load(spec, index.dump()[:-1], rows)
    with pytest.raises(IndexDamaged):
        load(spec, index.dump(), rows[:-1])
    with pytest.raises(BuildCancelled):
        build(spec, rows, threads=1, progress=told.append, cancelled=iter([False, True]).__next__)


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, math.inf]), max_size=20), st.integers(1, 25))
def test_smallest(distances: list[float], k: int) -> None:
    """The first places of the smallest values, ascending."""
    wanted = sorted(range(len(distances)), key=lambda i: (distances[i], i))[:k]
    assert smallest(np.array(distances, np.float32), k).tolist() == wanted
