"""From what a message says to values that fit, or a refusal.

Whoever proposes a message has checked it, so a refusal here is a bug at work, or a program of another version. It must
still be an answer: applying an entry that raises would stop every replica of the shard, and again after each restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

import numpy as np

from index.spec import IndexSpec
from storage.columns import (
    NUMPY_TYPES,
    VECTOR_TYPES,
    ArrayColumn,
    Batch,
    BatchDamaged,
    Column,
    ScalarColumn,
    SparseColumn,
    StringColumn,
    vector_width,
)
from storage.errors import BadPrimaryKey, BadRow, InvalidParameter
from storage.key_lookup import Keys
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.segment_files import BlobFiles, SegmentFiles
from storage.types import FieldId, PartitionId

T = TypeVar("T")


def parse_rows(body: bytes | memoryview, schema: CollectionSchema) -> Batch:
    """Return the rows of an insert, of which dense vectors share the memory of the body.

    Raises BadRow unless they have exactly the schema's fields, each of its kind.
    """
    try:
        batch = Batch.from_bytes(body, shared=False)
    except BatchDamaged as error:
        raise BadRow(str(error)) from error
    for one in schema.fields:
        column = batch.columns.get(one.id)
        if column is None:
            raise BadRow(f"the rows have no field {one.name}")
        if _kind_of(column) != _kind_for(one):
            raise BadRow(f"the rows have something else than {one.type} in field {one.name}")
    if len(batch.columns) != len(schema.fields):
        raise BadRow("the rows have fields that the schema has not")
    return batch


def parse_parts(
    first: PartitionId, others: Sequence[tuple[PartitionId, int]], rows: int
) -> list[tuple[PartitionId, int]]:
    """Return (partition, how many of the rows) in the order of the rows. Raises BadRow unless they add up."""
    try:
        parts = [(first, rows - sum(count for _, count in others)), *((one, count) for one, count in others)]
    except (TypeError, ValueError) as error:
        raise BadRow(f"not a list of partitions and their rows: {error}") from error
    if any(count < 0 for _, count in parts):
        raise BadRow(f"{rows} rows do not make {parts}")
    return parts


def parse_keys(keys: bytes | Sequence[int | str], schema: CollectionSchema) -> Keys:
    """Return primary keys, given as int64 bytes or as a list. Raises BadPrimaryKey if they are not of the schema's."""
    primary = schema.primary
    if isinstance(keys, bytes):
        if primary.type is DataType.INT64 and len(keys) % 8 == 0:
            return np.frombuffer(keys, "<i8")
    elif primary.type is DataType.VARCHAR:
        texts = [key for key in keys if isinstance(key, str)]
        if len(texts) == len(keys):
            return texts
    elif all(isinstance(key, int) and -(1 << 63) <= key < 1 << 63 for key in keys):
        return np.array(keys, np.int64)
    raise BadPrimaryKey(f"these are not keys of field {primary.name}, which is {primary.type}")


def parse_schema(plain: Mapping[str, Any]) -> CollectionSchema:
    """Return the schema of which this is `to_dict()`. Raises InvalidParameter."""
    return _parse("schema", CollectionSchema.from_dict, plain)


def parse_index(plain: Mapping[str, Any]) -> IndexSpec:
    """Return the index spec of which this is `to_dict()`. Raises InvalidParameter."""
    return _parse("index spec", IndexSpec.from_dict, plain)


def parse_segment_files(plain: Any) -> SegmentFiles:
    """Return the files of which this is `to_dict()`. Raises InvalidParameter."""
    return _parse("list of a segment's chunks", SegmentFiles.from_dict, plain)


def parse_blob_files(plain: Any) -> BlobFiles:
    """Return the files of which this is `to_dict()`. Raises InvalidParameter."""
    return _parse("list of an index's chunks", BlobFiles.from_dict, plain)


def parse_field(plain: Any) -> FieldSchema:
    """Return the field of which this is `to_dict()`. Raises InvalidParameter."""
    found = _parse("field", FieldSchema.from_dict, plain)
    check_values(found)
    return found


def parse_new_schema(plain: Any) -> CollectionSchema:
    """Return the schema like `parse_schema`, checked in all its values: nothing has been made of it yet."""
    found = parse_schema(plain)
    check_values(found)
    for one in found.fields:
        check_values(one)
    given = [replace(one, id=FieldId(0)) for one in found.fields if not one.dynamic]
    for function in found.functions:
        check_values(function)
    functions = [replace(one, id=0) for one in found.functions]
    if make_schema(given, dynamic=found.dynamic is not None, functions=functions) != found:
        raise InvalidParameter("the schema of a new collection is as it was made: version 1, ids in order")
    return found


def check_values(one: Any, what: str = "") -> None:
    """Raise InvalidParameter, naming the field, unless a dataclass's values are of the kinds that it declares."""
    for declared in fields(one):
        _checked(what or type(one).__name__, declared.name, getattr(one, declared.name), str(declared.type))


def asked(request: Mapping[str, Any], name: str, kind: str) -> Any:
    """Return what a request says under a name. Raises InvalidParameter unless it is of this kind."""
    if name not in request:
        raise InvalidParameter(f"the request says nothing of {name}")
    return _checked("the request", name, request[name], kind)


def _checked(what: str, name: str, value: Any, kind: str) -> Any:
    if kind in _KINDS and not _KINDS[kind](value):
        raise InvalidParameter(f"{what}: {name} is {str(value)[:80]!r}, which is no {kind}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(check(one) for one in value)


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


_KINDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "str": _is_text,
    "bool": _is_truth,
    **dict.fromkeys(("int", "Position", "ShardId", "CollectionId", "FieldId", "PartitionId", "IndexId"), _is_number),
    "Sequence[str]": _all(_is_text),
    "Sequence[Any]": _all(lambda value: True),
    **dict.fromkeys(("Sequence[int]", "Sequence[ShardId]"), _all(_is_number)),
    "Mapping[str, Any]": _is_map,
    "Mapping[str, str]": lambda value: _is_map(value) and all(_is_text(one) for one in value.values()),
    "Sequence[Mapping[str, Any]]": _all(_is_map),
    "bool | int | float | str | None": lambda value: value is None or isinstance(value, bool | int | float | str),
}
"""A declaration -> whether a value, as it comes out of the log, is of that kind. Others are not looked at."""


def _parse(what: str, read: Callable[[Any], T], plain: Any) -> T:
    try:
        return read(plain)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidParameter(f"not a {what}: {error}") from error


def _kind_of(column: Column) -> object:
    if isinstance(column, ScalarColumn):
        return column.values.dtype
    if isinstance(column, StringColumn):
        return DataType.VARCHAR
    if isinstance(column, ArrayColumn):
        return DataType.ARRAY, _kind_of(column.items)
    if isinstance(column, SparseColumn):
        return DataType.SPARSE_FLOAT_VECTOR
    return column.values.dtype, column.values.shape[1]


def _kind_for(one: FieldSchema) -> object:
    if one.type is DataType.ARRAY:
        return DataType.ARRAY, DataType.VARCHAR if one.element is DataType.VARCHAR else _numpy(one.element)
    if one.type is DataType.SPARSE_FLOAT_VECTOR:
        return DataType.SPARSE_FLOAT_VECTOR
    if one.type in VECTOR_TYPES:
        return VECTOR_TYPES[one.type], vector_width(one)
    return DataType.VARCHAR if one.type in (DataType.VARCHAR, DataType.JSON) else _numpy(one.type)


def _numpy(scalar: DataType | None) -> object:
    assert scalar is not None, "an array has an element type"
    return NUMPY_TYPES[scalar]
