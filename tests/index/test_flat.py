"""Exact search against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import index.flat
from index.flat import FlatIndex, exact_distances, load_flat, nearest, nearest_in, squared_lengths, within
from index.metric import DENSE_METRICS, EVERYTHING, Bounds, Metric
from index.protocol import Hits, IndexDamaged, Matrix
from index.spec import parse_index_spec
from tests.index.strategies import assert_sound, clustered, dumb_nearest

METRICS = DENSE_METRICS


def small_integers(seed: int, rows: int, dim: int) -> Matrix:
    """Return rows of few different values: plenty of ties, and no rounding at all."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, dim)).astype(np.float32)


@given(
    seed=st.integers(0, 1 << 32),
    rows=st.integers(0, 300),
    dim=st.integers(1, 9),
    queries=st.integers(1, 4),
    k=st.integers(1, 40),
    metric=st.sampled_from([Metric.L2, Metric.IP]),
    share=st.sampled_from([None, 0.0, 0.02, 0.2, 0.6, 1.0]),
    scratch=st.sampled_from([256, 4096, 1 << 25]),
)
@settings(max_examples=200, deadline=None)
def test_equals_sorting_everything(
    seed: int, rows: int, dim: int, queries: int, k: int, metric: Metric, share: float | None, scratch: int
) -> None:
    """Offsets, ties and distances are exactly those of a full sort, for any mask and any size of blocks."""
    vectors, asked = small_integers(seed, rows, dim), small_integers(seed + 1, queries, dim)
    mask = None if share is None else np.random.default_rng(seed).random(rows) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index.flat, "_SCRATCH_BYTES", scratch)
        patch.setattr(index.flat, "_GATHER_BYTES", scratch // 16)
        patch.setattr(index.flat, "_CACHE_BYTES", scratch // 8)
        hits = nearest(asked, vectors, k, metric=metric, mask=mask)
    truth = dumb_nearest(asked, vectors, k, metric, mask)
    np.testing.assert_array_equal(hits.offsets, truth.offsets)
    np.testing.assert_array_equal(hits.distances, truth.distances)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("known_squares", [False, True])
def test_equals_sorting_everything_on_real_numbers(metric: Metric, known_squares: bool) -> None:
    """Rounding in the first pass never changes the answer."""
    vectors, queries = clustered(1, 3000, 24, metric), clustered(2, 5, 24, metric)
    mask = np.random.default_rng(3).random(3000) < 0.5
    squares = squared_lengths(vectors) if known_squares else None
    for passing in (None, mask, mask & (np.arange(3000) % 7 == 0)):
        hits = nearest(queries, vectors, 30, metric=metric, mask=passing, squares=squares)
        np.testing.assert_array_equal(hits.offsets, dumb_nearest(queries, vectors, 30, metric, passing).offsets)
        assert_sound(hits, queries, vectors, metric, passing)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_copied_out_compare_as_where_they_stand(metric: Metric) -> None:
    """Survivors taken in blocks, the whole matrix with the others hidden, and a matrix of survivors alone give the
    same hits to the last bit."""
    vectors, queries = clustered(1, 4_000, 96, metric), clustered(2, 7, 96, metric)
    for share in (0.003, 0.05, 0.3, 0.45, 0.55):
        mask = np.random.default_rng(3).random(4_000) < share
        alone = nearest(queries, np.ascontiguousarray(vectors[mask]), 20, metric=metric)
        offsets = np.append(np.flatnonzero(mask), -1)[alone.offsets]
        for fraction in (0.0, 1.0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(index.flat, "_GATHER_FRACTION", fraction)
                hits = nearest(queries, vectors, 20, metric=metric, mask=mask)
            np.testing.assert_array_equal(hits.offsets, offsets)
            np.testing.assert_array_equal(hits.distances, alone.distances)


@given(
    seed=st.integers(0, 1 << 32),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    k=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    share=st.sampled_from([None, 0.0, 0.02, 0.3, 0.7, 1.0]),
    known_squares=st.booleans(),
    bounded=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_pieces_are_searched_as_one(
    seed: int, cuts: list[int], k: int, metric: Metric, share: float | None, known_squares: bool, bounded: bool
) -> None:
    """Rows in any number of pieces, empty ones included, give the hits of one matrix to the last bit, ties and all."""
    make = clustered(seed, 200, 9, metric) if metric is Metric.COSINE else small_integers(seed, 200, 9)
    pieces = [np.ascontiguousarray(piece) for piece in np.split(make, sorted(cuts))]
    mask = None if share is None else np.random.default_rng(seed).random(200) < share
    squares = squared_lengths(make) if known_squares and metric is not Metric.COSINE else None
    bounds = Bounds(-0.5, 8.0) if bounded else EVERYTHING
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index.flat, "_GATHER_BYTES", 256)
        found = nearest_in(pieces, make[3:6], k, metric=metric, mask=mask, bounds=bounds, squares=squares)
    whole = nearest(make[3:6], make, k, metric=metric, mask=mask, bounds=bounds, squares=squares)
    np.testing.assert_array_equal(found.offsets, whole.offsets)
    np.testing.assert_array_equal(found.distances, whole.distances)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_come_in_order_of_offset(metric: Metric) -> None:
    """Rows equal bit for bit are equally far wherever they stand, so the lowest offsets win."""
    row = clustered(5, 1, 37, metric)
    others = clustered(6, 1003, 37, metric)
    twins = np.array([1, 17, 64, 65, 500, 777, 1001, 1002])
    others[twins] = row
    hits = nearest(row, others, 5, metric=Metric.L2)
    assert hits.offsets[0].tolist() == twins[:5].tolist()
    assert len(set(hits.distances[0].tolist())) == 1


def test_near_zero_distances_survive_far_from_the_origin() -> None:
    """|a - b|^2 by expansion loses every digit out there; the answer does not, with bounds or without."""
    rng = np.random.default_rng(8)
    vectors = (1e4 + rng.normal(size=(2000, 16))).astype(np.float32)
    hits = nearest(vectors[:3], vectors, 4, metric=Metric.L2)
    assert hits.offsets[:, 0].tolist() == [0, 1, 2]
    assert hits.distances[:, 0].tolist() == [0.0, 0.0, 0.0]
    queries = vectors[:20] + np.float32(0.01)
    everything = dumb_nearest(queries, vectors, 2000, Metric.L2)
    for bounds in (EVERYTHING, Bounds(15.0, np.inf), Bounds(-np.inf, 12.0), Bounds(10.0, 25.0)):
        hits = nearest(queries, vectors, 4, metric=Metric.L2, bounds=bounds)
        np.testing.assert_array_equal(hits.offsets, within(everything, bounds).offsets[:, :4])


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e18, 1e20, 3e38])
@pytest.mark.parametrize("metric", METRICS)
def test_every_finite_component_can_be_searched(scale: float, metric: Metric) -> None:
    """Neither overflow nor underflow costs a hit, makes a nan, or warns."""
    with np.errstate(over="ignore"):
        vectors = np.clip(clustered(1, 200, 8, Metric.COSINE) * np.float32(scale), -3.4e38, 3.4e38).astype(np.float32)
    vectors = metric.normalise(vectors)
    hits = nearest(vectors[:3], vectors, 10, metric=metric)
    assert hits.counts.tolist() == [10, 10, 10]
    assert np.isfinite(hits.distances).all()


@given(
    seed=st.integers(0, 1 << 32),
    k=st.integers(1, 30),
    metric=st.sampled_from([Metric.L2, Metric.IP]),
    low=st.one_of(st.none(), st.integers(-10, 30)),
    high=st.one_of(st.none(), st.integers(-10, 60)),
)
@settings(max_examples=150, deadline=None)
def test_bounds_keep_the_nearest_inside_them(
    seed: int, k: int, metric: Metric, low: int | None, high: int | None
) -> None:
    """A search with bounds gives the k nearest of the rows inside, low end included, high end not."""
    vectors, queries = small_integers(seed, 200, 5), small_integers(seed + 1, 3, 5)
    bounds = Bounds(-np.inf if low is None else low, np.inf if high is None else high)
    everything = dumb_nearest(queries, vectors, 200, metric)
    truth = within(everything, bounds)
    hits = nearest(queries, vectors, k, metric=metric, bounds=bounds)
    np.testing.assert_array_equal(hits.offsets, truth.offsets[:, :k])
    np.testing.assert_array_equal(hits.distances, truth.distances[:, :k])


def test_within_moves_what_stays_to_the_left() -> None:
    """Dropped hits leave no holes, and the rest keeps its order."""
    hits = Hits(np.array([[4, 2, 9, -1]]), np.array([[1.0, 2.0, 3.0, np.inf]], dtype=np.float32))
    kept = within(hits, Bounds(2.0, 3.5))
    assert kept.offsets.tolist() == [[2, 9, -1, -1]]
    assert kept.distances.tolist() == [[2.0, 3.0, np.inf, np.inf]]


def test_a_distance_does_not_depend_on_the_neighbours() -> None:
    """The same two vectors are equally far whether asked alone, in a batch, or among other rows."""
    vectors, queries = clustered(1, 500, 33, Metric.L2), clustered(2, 4, 33, Metric.L2)
    together = exact_distances(queries, vectors, metric=Metric.IP)
    alone = [
        [exact_distances(query[None, :], row[None, :], metric=Metric.IP)[0, 0] for row in vectors[490:]]
        for query in queries
    ]
    np.testing.assert_array_equal(together[:, 490:], alone)


def test_wrong_dims_are_a_bug() -> None:
    """A query of another dim is refused, not broadcast."""
    with pytest.raises(ValueError, match="dim 3"):
        nearest(np.zeros((1, 3), np.float32), np.zeros((5, 4), np.float32), 1, metric=Metric.L2)


def test_flat_index_loads_from_its_dump_only() -> None:
    """A flat dump says what it is; anything else is damaged."""
    vectors = clustered(1, 10, 4, Metric.L2)
    spec = parse_index_spec("FLAT", "L2", {})
    assert load_flat(spec, FlatIndex(spec, vectors).dump(), vectors).rows == 10
    with pytest.raises(IndexDamaged):
        load_flat(spec, b"annulus", vectors)
