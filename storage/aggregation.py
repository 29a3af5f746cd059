"""Counts, sums, means and extremes of rows, in all or by the values of fields.

Shards answer with partial results, which add up whatever shard they came from: for each group its values and for each
aggregate [rows counted, sum, least, greatest], as far as it needs them. Nulls are in no count, sum or extreme of their
field, but are a group of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from storage.columns import Batch, Column, ScalarColumn
from storage.errors import InvalidParameter
from storage.merging import key_ranks
from storage.types import FieldId


class Operator(StrEnum):
    COUNT = "count"
    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True)
class Aggregate:
    name: str
    """As it is shown: `sum(price)`."""
    operator: Operator
    field_id: FieldId | None = None
    """None for `count(*)`."""


@dataclass(frozen=True)
class Aggregation:
    by: tuple[FieldId, ...]
    aggregates: tuple[Aggregate, ...]

    @property
    def field_ids(self) -> list[FieldId]:
        """Return the columns that are looked at."""
        return list(dict.fromkeys([*self.by, *(one.field_id for one in self.aggregates if one.field_id is not None)]))


Partial: TypeAlias = list[Any]
"""[rows counted, their sum, the least, the greatest]; what an aggregate does not need is None."""
Groups: TypeAlias = Sequence[tuple[list[Any], list[Partial]]]
"""(values of the fields grouped by, partial result of each aggregate)."""


def aggregate(batch: Batch, aggregation: Aggregation, most: int | None = None) -> Groups:
    """Return the partial results of these rows; of the first `most` groups, by their values as `finished` has them."""
    if batch.rows == 0:
        return []
    codes = np.zeros((batch.rows, len(aggregation.by) + 1), np.int64)
    for i, field_id in enumerate(aggregation.by):
        column, last = batch.columns[field_id], batch.rows
        codes[:, i] = key_ranks(column) if column.valid is None else np.where(column.valid, key_ranks(column), last)
    _, first, group = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    group, first = group.reshape(-1), first[:most]
    values = [batch.columns[field_id].take(first).to_list() for field_id in aggregation.by]
    if most is not None and aggregation.by:
        kept = np.flatnonzero(group < most)
        batch, group = Batch({key: one.take(kept) for key, one in batch.columns.items()}, len(kept)), group[kept]
    results = [_partials(batch, one, group, len(first)) for one in aggregation.aggregates]
    return [([one[i] for one in values], [one[i] for one in results]) for i in range(len(first))]


def combine(parts: Sequence[Groups]) -> Groups:
    """Return the partial results of all parts as one."""
    found: dict[tuple[Any, ...], list[Partial]] = {}
    for part in parts:
        for values, partials in part:
            known = found.get(tuple(values))
            found[tuple(values)] = (
                partials if known is None else [_added(a, b) for a, b in zip(known, partials, strict=True)]
            )
    return [(list(values), partials) for values, partials in found.items()]


def finished(
    groups: Groups, aggregation: Aggregation, names: Sequence[str], *, limit: int | None, offset: int = 0
) -> list[Mapping[str, Any]]:
    """Return a row for each group, by its values ascending, nulls last. Raises InvalidParameter for a sum too large.

    names  of the fields grouped by
    """
    if not aggregation.by and not groups:
        groups = [([], [[0, None, None, None] for _ in aggregation.aggregates])]
    in_order = sorted(groups, key=lambda one: [(value is None, 0 if value is None else value) for value in one[0]])
    rows: list[Mapping[str, Any]] = []
    for values, partials in in_order[offset : None if limit is None else offset + limit]:
        shown = dict(zip(names, values, strict=True))
        for one, partial in zip(aggregation.aggregates, partials, strict=True):
            shown[one.name] = _result(one.operator, partial)
        rows.append(shown)
    return rows


def _partials(batch: Batch, one: Aggregate, group: npt.NDArray[np.int64], groups: int) -> list[Partial]:
    if one.field_id is None:
        return [[count, None, None, None] for count in np.bincount(group, minlength=groups).tolist()]
    column = batch.columns[one.field_id]
    live = np.arange(batch.rows) if column.valid is None else np.flatnonzero(column.valid)
    mine = group[live]
    counts = np.bincount(mine, minlength=groups).tolist()
    partials: list[Partial] = [[count, None, None, None] for count in counts]
    if one.operator in (Operator.SUM, Operator.AVG):
        for i, total in enumerate(_sums(column, live, mine, groups)):
            partials[i][1] = total if counts[i] else None
    elif one.operator in (Operator.MIN, Operator.MAX):
        place, number = (2, 0) if one.operator is Operator.MIN else (3, -1)
        in_order = live[np.lexsort((key_ranks(column)[live], mine))]
        ends = np.cumsum(counts)
        some = [i for i in range(groups) if counts[i]]
        chosen = [int(in_order[ends[i] - counts[i] if number == 0 else ends[i] - 1]) for i in some]
        for i, value in zip(some, column.take(np.array(chosen, np.int64)).to_list(), strict=True):
            partials[i][place] = value
    return partials


def _sums(column: Column, live: npt.NDArray[np.int64], group: npt.NDArray[np.int64], groups: int) -> list[int | float]:
    assert isinstance(column, ScalarColumn), "numbers are summed"
    values = column.values[live]
    if values.dtype.kind == "f":
        totals: list[int | float] = np.bincount(group, values.astype(np.float64), groups).tolist()
        return totals
    wide = values.astype(np.int64)
    high, low = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    np.add.at(high, group, wide >> 32)  # halves, whose sums have room: that of Int64 values may need more than 64 bits
    np.add.at(low, group, wide & 0xFFFFFFFF)
    return [(a << 32) + b for a, b in zip(high.tolist(), low.tolist(), strict=True)]


def _expressible(total: Any, shown: str) -> Any:
    """Return the sum. Raises InvalidParameter if answers have no place for it: 64 bits, or a Double."""
    if isinstance(total, float) and not math.isfinite(total):
        raise InvalidParameter(f"{shown}: the sum of the values is beyond what a Double can be: invalid parameter")
    if isinstance(total, int) and shown == "sum" and not -(1 << 63) <= total < 1 << 63:
        raise InvalidParameter(
            f"sum: {total} does not fit in 64 bits: narrow the filter, or ask for avg: invalid parameter"
        )
    return total


def _added(a: Partial, b: Partial) -> Partial:
    if a[0] == 0 or b[0] == 0:
        return a if b[0] == 0 else b
    total = None if a[1] is None else a[1] + b[1]
    return [a[0] + b[0], total, None if a[2] is None else min(a[2], b[2]), None if a[3] is None else max(a[3], b[3])]


def _result(operator: Operator, partial: Partial) -> Any:
    count, total, least, greatest = partial
    match operator:
        case Operator.COUNT:
            return count
        case Operator.SUM:
            return _expressible(total, "sum")
        case Operator.AVG:
            return _expressible(total, "avg") / count if count else None
        case Operator.MIN:
            return least
    return greatest
