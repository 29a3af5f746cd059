"""A small collection for the tests of segments: its schema, its keys, and batches of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage.columns import Batch, Column, ScalarColumn, StringColumn, VectorColumn
from storage.key_lookup import Keys
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.strings import StringArray
from storage.types import FieldId

PK, GROUP, NOTE, VECTOR, META = (FieldId(i) for i in range(100, 105))
DIM = 4


def make_collection(pk: DataType = DataType.INT64, dim: int = DIM) -> CollectionSchema:
    return make_schema(
        [
            FieldSchema("id", pk, primary=True, max_bytes=64 if pk is DataType.VARCHAR else 0),
            FieldSchema("group", DataType.INT32, nullable=True),
            FieldSchema("note", DataType.VARCHAR, max_bytes=1000),
            FieldSchema("vector", DataType.FLOAT_VECTOR, dim=dim),
        ],
        dynamic=True,
    )


def key_of(schema: CollectionSchema, number: int) -> int | str:
    """Return the key with this number: numbers in order make keys in order."""
    return number if schema.primary.type is DataType.INT64 else f"këy {number:09d}"


def as_keys(schema: CollectionSchema, numbers: Sequence[int]) -> Keys:
    if schema.primary.type is DataType.INT64:
        return np.array(numbers, np.int64)
    return [str(key_of(schema, number)) for number in numbers]


def make_batch(
    schema: CollectionSchema, numbers: Sequence[int], groups: Sequence[int | None], vectors: np.ndarray
) -> Batch:
    """Return rows with these keys; the note is made from the number, `$meta` is null in every other row."""
    rows = len(numbers)
    keys = as_keys(schema, numbers)
    key_column: Column
    if isinstance(keys, np.ndarray):
        key_column = ScalarColumn(keys)
    else:
        key_column = StringColumn(StringArray.from_strings(keys))
    valid = np.array([one is not None for one in groups], np.bool_) if None in groups else None
    has_meta = np.array([number % 2 == 0 for number in numbers], np.bool_)
    metas = [f'{{"n":{number}}}' if number % 2 == 0 else "" for number in numbers]
    columns: dict[FieldId, Column] = {
        PK: key_column,
        GROUP: ScalarColumn(np.array([one or 0 for one in groups], np.int32), valid),
        NOTE: StringColumn(StringArray.from_strings([f"note {number}" for number in numbers])),
        VECTOR: VectorColumn(np.ascontiguousarray(vectors, np.float32)),
        META: StringColumn(StringArray.from_strings(metas), has_meta),
    }
    return Batch(columns, rows)


def numbered(schema: CollectionSchema, numbers: Sequence[int], seed: int = 0) -> Batch:
    """Return rows whose group is the number modulo 5 and whose vectors are drawn from a seed."""
    dim = schema.vectors[0].dim
    vectors = np.random.default_rng(seed).normal(size=(len(numbers), dim)).astype(np.float32)
    return make_batch(schema, numbers, [number % 5 for number in numbers], vectors)
