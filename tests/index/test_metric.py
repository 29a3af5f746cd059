"""Scores, distances, and the interval between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.metric import Metric, unit_rows

FLOATS = st.floats(-100, 100, width=32)


@given(
    metric=st.sampled_from([Metric.L2, Metric.IP]),
    scores=st.lists(FLOATS, min_size=1, max_size=20),
    radius=st.one_of(st.none(), FLOATS),
    inner=st.one_of(st.none(), FLOATS),
)
def test_range_limits_mean_what_milvus_says(
    metric: Metric, scores: list[float], radius: float | None, inner: float | None
) -> None:
    """L2: range_filter <= score < radius. IP: radius < score <= range_filter."""
    bounds = metric.distance_bounds(radius, inner)
    for score in scores:
        if metric is Metric.L2:
            wanted = (inner is None or inner <= score) and (radius is None or score < radius)
            distance = score
        else:
            wanted = (radius is None or radius < score) and (inner is None or score <= inner)
            distance = -score
        assert (bounds.low <= distance < bounds.high) == wanted


def test_limits_are_rounded_as_scores_are() -> None:
    """A score that a reply printed as 0.7 is excluded by radius 0.7, though 0.7 is no float32."""
    distance = float(-np.float32(0.7))
    assert not Metric.IP.distance_bounds(0.7, None).low <= distance < Metric.IP.distance_bounds(0.7, None).high
    assert Metric.IP.distance_bounds(None, 0.7).low <= distance
    assert Metric.L2.distance_bounds(1e300, None).high == np.inf


def test_cosine_range_filter_of_one_keeps_the_row_itself() -> None:
    """Rounding may leave a row's cosine with itself at 1.0000001; the customary limit of 1 must not lose it."""
    assert Metric.COSINE.distance_bounds(0.5, 1.0).low == -np.inf


@pytest.mark.parametrize(
    ("metric", "distances", "scores"),
    [
        pytest.param(Metric.L2, [0.0, 2.5, np.inf], [0.0, 2.5, np.inf], id="L2 is itself"),
        pytest.param(Metric.IP, [-3.0, 0.0, np.inf], [3.0, 0.0, -np.inf], id="IP is negated back"),
        pytest.param(Metric.COSINE, [-1.0000001, 0.5, np.inf], [1.0, -0.5, -np.inf], id="COSINE stays in [-1, 1]"),
    ],
)
def test_scores(metric: Metric, distances: list[float], scores: list[float]) -> None:
    """Each metric's scores, padding included."""
    assert metric.scores(np.array([distances], dtype=np.float32)).tolist() == [scores]


def test_a_score_of_zero_has_no_sign() -> None:
    """-0.0 would be printed as such."""
    assert not np.signbit(Metric.IP.scores(np.zeros((1, 1), np.float32)))[0, 0]


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20, 1e38])
def test_unit_rows(scale: float) -> None:
    """Rows of any finite length become 1 long, zero rows stay, and the input is left alone."""
    matrix = (np.random.default_rng(0).uniform(0.5, 1, (50, 300)) * scale).astype(np.float32)
    matrix[7] = 0
    before = matrix.copy()
    unit = unit_rows(matrix)
    lengths = np.linalg.norm(unit.astype(np.float64), axis=1)
    np.testing.assert_allclose(np.delete(lengths, 7), 1, rtol=1e-6)
    assert not unit[7].any()
    assert unit.dtype == np.float32 and unit.flags.c_contiguous
    np.testing.assert_array_equal(matrix, before)


def test_only_cosine_normalises() -> None:
    """L2 and IP take rows as they are, without a copy."""
    matrix = np.array([[3.0, 4.0]], dtype=np.float32)
    assert Metric.L2.normalise(matrix) is matrix
    assert Metric.IP.normalise(matrix) is matrix
    np.testing.assert_allclose(Metric.COSINE.normalise(matrix), [[0.6, 0.8]], rtol=1e-6)
