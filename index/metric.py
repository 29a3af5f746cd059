"""How far two vectors are: L2, IP, COSINE of dense ones, IP, BM25 of sparse ones, HAMMING, JACCARD of bits.

Inside Annulus a *distance* is always smaller for the nearer row, so that one top-k, one merge and one interval serve
every metric. A *score* is what Milvus's API returns. The two meet only here:

| metric | distance          | score             | better score |
|--------|-------------------|-------------------|--------------|
| L2     | squared Euclidean | the same          | smaller      |
| IP     | -(q . x)          | q . x             | larger       |
| COSINE | -(q . x), unit rows | q . x in [-1, 1] | larger       |
| BM25   | -(sum over terms, see `index.sparse`) | the sum | larger     |
| HAMMING | bits that differ | the same          | smaller      |
| JACCARD | 1 - both / either | the same         | smaller      |

COSINE is IP on unit vectors: rows are normalised once when they are prepared for an index, queries when they arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np

from index.protocol import Distances, Form, Matrix

_BLOCK_VALUES: Final = 1 << 20
"""Values normalised at a time: 8 MiB of float64 scratch, whatever the size of the matrix."""


class Bounds(NamedTuple):
    """The half-open interval `low <= distance < high`; infinite ends are open."""

    low: float
    high: float

    @property
    def is_open(self) -> bool:
        """True if every distance lies within."""
        return self.low == -math.inf and self.high == math.inf


EVERYTHING: Final = Bounds(-math.inf, math.inf)


class Metric(StrEnum):
    """How the nearness of two vectors is measured; the values are Milvus's names."""

    L2 = "L2"
    IP = "IP"
    COSINE = "COSINE"
    BM25 = "BM25"
    HAMMING = "HAMMING"
    JACCARD = "JACCARD"

    @property
    def is_similarity(self) -> bool:
        """True if the larger score is the better one."""
        return self in _SIMILARITIES

    def normalise(self, matrix: Matrix) -> Matrix:
        """Return the rows as engines of this metric want them: unit length for COSINE, else the matrix itself."""
        return unit_rows(matrix) if self is Metric.COSINE else matrix

    def scores(self, distances: Distances) -> Distances:
        """Return Milvus's scores of internal distances, same shape.

        Padding (+inf) becomes the worst score: +inf for distances, -inf for the similarities. A cosine that rounding
        carried past 1 is brought back, because clients check that.
        """
        if not self.is_similarity:
            return distances
        scores = np.float32(0.0) - distances  # not unary minus: a score of 0 must not print as -0
        if self is Metric.COSINE:
            np.minimum(scores, 1.0, out=scores)
            if (under := scores < -1.0).any():
                scores[under & np.isfinite(scores)] = -1.0
        return scores

    def distance_bounds(self, radius: float | None, range_filter: float | None) -> Bounds:
        """Return the distances that a range search lets through, from its limits on scores.

        Distances keep `range_filter <= score < radius`, the similarities `radius < score <= range_filter`; both become
        `low <= distance < high`. A missing limit is infinite. Limits are rounded to float32 first, as scores are, so
        that a score read from one reply and sent back as a limit means that very score. A COSINE range_filter of 1 or
        more lets everything through at that end: rounding can leave the cosine of a row with itself just above 1.
        """
        if not self.is_similarity:
            return Bounds(
                low=-math.inf if range_filter is None else _as_float32(range_filter),
                high=math.inf if radius is None else _as_float32(radius),
            )
        if self is Metric.COSINE and range_filter is not None and range_filter >= 1.0:
            range_filter = None
        return Bounds(
            low=-math.inf if range_filter is None else -_as_float32(range_filter),
            high=math.inf if radius is None else -_as_float32(radius),
        )


_SIMILARITIES: Final = frozenset({Metric.IP, Metric.COSINE, Metric.BM25})
DENSE_METRICS: Final = (Metric.L2, Metric.IP, Metric.COSINE)
METRICS: Final[Mapping[Form, tuple[Metric, ...]]] = {
    Form.DENSE: DENSE_METRICS,
    Form.BINARY: (Metric.HAMMING, Metric.JACCARD),
    Form.SPARSE: (Metric.IP, Metric.BM25),
}
DEFAULT_METRICS: Final[Mapping[Form, Metric]] = {
    Form.DENSE: Metric.COSINE,
    Form.BINARY: Metric.HAMMING,
    Form.SPARSE: Metric.IP,
}


def unit_rows(matrix: Matrix) -> Matrix:
    """Return the rows scaled to length 1, float32 C-contiguous; a zero row stays zero.

    The arithmetic is float64, so that components near the ends of float32 neither overflow nor vanish.
    """
    unit = np.empty(matrix.shape, dtype=np.float32)
    step = max(1, _BLOCK_VALUES // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        lengths[lengths == 0.0] = 1.0
        np.divide(rows, lengths[:, None], out=rows)
        unit[start : start + step] = rows
    return unit


def _as_float32(limit: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(limit))
