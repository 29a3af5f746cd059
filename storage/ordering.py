"""Rows by the values of their fields instead of by primary key or distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.columns import Batch
from storage.merging import key_ranks
from storage.types import FieldId


@dataclass(frozen=True)
class OrderBy:
    field_id: FieldId
    descending: bool = False
    nulls_first: bool = False


def sort_keys(batch: Batch, orders: Sequence[OrderBy]) -> list[npt.NDArray[Any]]:
    """Return the keys by which numpy's lexsort, whose last key counts most, puts the rows in this order."""
    keys: list[npt.NDArray[Any]] = []
    for order in reversed(orders):
        column = batch.columns[order.field_id]
        ranks = key_ranks(column)
        if order.descending:
            ranks = -ranks
        if column.valid is None:
            keys.append(ranks)
        else:
            keys += [np.where(column.valid, ranks, 0), column.valid if order.nulls_first else ~column.valid]
    return keys


def ordered(
    batch: Batch, primary: FieldId, orders: Sequence[OrderBy], *, limit: int | None, offset: int = 0
) -> npt.NDArray[np.int64]:
    """Return the offsets of the rows in this order, ties by primary key, without the first ones, at most `limit`."""
    order = np.lexsort([key_ranks(batch.columns[primary]), *sort_keys(batch, orders)])
    return np.asarray(order[offset : None if limit is None else offset + limit], np.int64)
