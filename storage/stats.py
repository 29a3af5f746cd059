"""What a sealed segment knows about each scalar field, so that a filter that cannot match skips it unread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.columns import Batch, Column, ScalarColumn, StringColumn
from storage.schema import CollectionSchema, DataType
from storage.types import FieldId


@dataclass(frozen=True, slots=True)
class FieldStats:
    """Bounds over the rows of one segment, dead ones included: they may say too much, never too little."""

    rows: int
    nulls: int
    low: bool | int | float | str | None
    """The least value that is neither null nor NaN; None if there is none."""
    high: bool | int | float | str | None
    nans: int = 0


def batch_stats(batch: Batch, schema: CollectionSchema) -> Mapping[FieldId, FieldStats]:
    """Return the statistics of the numbers, booleans and texts of a batch; JSON, arrays and vectors have none."""
    kinds = {one.id: one.type for one in schema.fields}
    found = {}
    for field_id, column in batch.columns.items():
        if kinds.get(field_id) is not DataType.JSON:
            stats = column_stats(column)
            if stats is not None:
                found[field_id] = stats
    return found


def column_stats(column: Column) -> FieldStats | None:
    """Return the statistics of a column of scalars or texts, None for other columns."""
    if not isinstance(column, ScalarColumn | StringColumn):
        return None
    rows = len(column)
    nulls = 0 if column.valid is None else rows - int(np.count_nonzero(column.valid))
    if nulls == rows:
        return FieldStats(rows, nulls, None, None)
    if isinstance(column, StringColumn):
        order = column.values.order()
        live = order if column.valid is None else order[column.valid[order]]
        return FieldStats(rows, nulls, column.values[int(live[0])], column.values[int(live[-1])])
    values = column.values if column.valid is None else column.values[column.valid]
    nans = 0
    if values.dtype.kind == "f":
        numbers = values[~np.isnan(values)]
        nans, values = len(values) - len(numbers), numbers
    if not len(values):
        return FieldStats(rows, nulls, None, None, nans)
    low: Any = values.min()
    high: Any = values.max()
    return FieldStats(rows, nulls, low.item(), high.item(), nans)
