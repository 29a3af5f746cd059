"""What a sealed segment knows about its fields, so that a filter that cannot match skips it unread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage.columns import Batch, Column, ScalarColumn, StringColumn
from storage.filter import FieldStats
from storage.schema import CollectionSchema, DataType
from storage.types import FieldId


def batch_stats(batch: Batch, schema: CollectionSchema) -> Mapping[FieldId, FieldStats]:
    """Return the statistics of the numbers, booleans and texts of a batch; JSON, arrays and vectors have none.

    They are of all rows, dead ones included: they may say too much, never too little.
    """
    kinds = {one.id: one.type for one in schema.fields}
    found = {}
    for field_id, column in batch.columns.items():
        if kinds.get(field_id) is not DataType.JSON:
            stats = column_stats(column)
            if stats is not None:
                found[field_id] = stats
    return found


def column_stats(column: Column) -> FieldStats | None:
    """Return the statistics of a column, None if it has none: a NaN is in no range, so its column has no bounds."""
    if not isinstance(column, ScalarColumn | StringColumn):
        return None
    rows = len(column)
    nulls = 0 if column.valid is None else rows - int(np.count_nonzero(column.valid))
    if nulls == rows:
        return FieldStats(None, None, nulls, rows)
    if isinstance(column, StringColumn):
        order = column.values.order()
        live = order if column.valid is None else order[column.valid[order]]
        return FieldStats(column.values[int(live[0])], column.values[int(live[-1])], nulls, rows)
    values = column.values if column.valid is None else column.values[column.valid]
    low: Any = values.min().item()
    high: Any = values.max().item()
    return None if low != low else FieldStats(low, high, nulls, rows)
