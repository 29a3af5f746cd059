"""Sums and means are exact where single values are near the ends of their type; of many groups the first are made."""

from __future__ import annotations

import numpy as np
import pytest

from storage.aggregation import Aggregate, Aggregation, Operator, aggregate, combine, finished
from storage.columns import Batch, ScalarColumn
from storage.errors import InvalidParameter
from storage.types import FieldId

FIELD = FieldId(100)
MOST = (1 << 63) - 1


def results(values: np.ndarray, *operators: Operator, parts: int = 2) -> list[object]:
    """Return what the operators give for these values, which lie on so many shards."""
    asked = Aggregation((), tuple(Aggregate(one.value, one, FIELD) for one in operators))
    shards = [aggregate(Batch({FIELD: ScalarColumn(some)}, len(some)), asked) for some in np.array_split(values, parts)]
    (row,) = finished(combine(shards), asked, [], limit=None)
    return [row[one.value] for one in operators]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("value", [MOST, -MOST - 1, 5, -5])
def test_the_mean_of_equal_values_is_their_value(value: int, parts: int) -> None:
    """Also where their sum is beyond 64 bits; nothing wraps."""
    assert results(np.full(20, value, np.int64), Operator.AVG, parts=parts) == [float(value)]


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_integers_are_exact(seed: int) -> None:
    """Random values that nearly cancel each other, whatever they wrap to on the way."""
    rng = np.random.default_rng(seed)
    half = rng.integers(-MOST - 1, MOST, 50)
    values = np.concatenate([half, -(half + 1), rng.integers(-9, 9, 3)])
    rng.shuffle(values)
    assert results(values, Operator.SUM, Operator.COUNT) == [sum(values.tolist()), len(values)]


@pytest.mark.parametrize("values", [np.full(3, MOST), np.full(3, -MOST), np.full(3, 1.7e308)])
def test_a_sum_without_a_place_in_the_answer_is_refused(values: np.ndarray) -> None:
    """Neither a wrapped number nor an infinity."""
    with pytest.raises(InvalidParameter, match="sum"):
        results(values, Operator.SUM)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("most", [1, 3, 50])
def test_the_first_groups_of_all_shards(seed: int, most: int) -> None:
    """What shards make of their first groups gives the first groups of all, nulls last, as if each had made all."""
    rng = np.random.default_rng(seed)
    by = FieldId(101), FieldId(102)
    asked = Aggregation(by, (Aggregate("sum", Operator.SUM, FIELD), Aggregate("count(*)", Operator.COUNT)))
    shards = []
    for rows in (7, 40, 0, 23):
        small = [ScalarColumn(rng.integers(0, 4, rows), rng.random(rows) < 0.8) for _ in by]
        batch = Batch(dict(zip(by, small, strict=True)) | {FIELD: ScalarColumn(rng.integers(0, 99, rows))}, rows)
        shards.append(batch)
    found, wanted = (
        finished(combine([aggregate(one, asked, some) for one in shards]), asked, ["a", "b"], limit=most)
        for some in (most, None)
    )
    assert found == wanted
    assert all(len(aggregate(one, asked, most)) <= most for one in shards)
