"""What a sealed segment knows about its fields, so that a filter that cannot match skips it unread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from storage.columns import Batch, Column, ScalarColumn, StringColumn
from storage.filter import FieldStats
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.types import FieldId
from storage.view import absent_column


def batch_stats(batch: Batch, schema: CollectionSchema) -> Mapping[FieldId, FieldStats]:
    """Return the statistics of the numbers, booleans and texts of a batch; JSON, arrays and vectors have none, nor what
    is not in the schema.

    They are of all rows, dead ones included: they may say too much, never too little.
    """
    kinds = {one.id: one.type for one in schema.fields}
    found = {}
    for field_id, column in batch.columns.items():
        if kinds.get(field_id, DataType.JSON) is not DataType.JSON:
            stats = column_stats(column)
            if stats is not None:
                found[field_id] = stats
    return found


def absent_stats(one: FieldSchema, rows: int) -> FieldStats | None:
    """Return the statistics of a field in rows that lack it."""
    if one.type is DataType.JSON or one.type.is_vector:
        return None
    stats = column_stats(absent_column(one, 1))
    return None if stats is None else replace(stats, null_count=rows * stats.null_count, rows=rows)


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
