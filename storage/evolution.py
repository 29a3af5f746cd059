"""Changes of a collection's schema: from one version to the next, or a refusal.

A field's id is given once and never again, so rows stay as they are: a segment that lacks a field of the schema answers
null or the default for it, and what it has of a dropped one is not looked at any more (`view.SegmentView.stored`). For
that a field that is added takes null or has a default, and is no vector; a field's type never changes, and its limits
only grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from storage.errors import FieldNotFound, InvalidParameter
from storage.schema import (
    DYNAMIC_NAME,
    FIELDS_MAX,
    CollectionSchema,
    DataType,
    FieldSchema,
    check_field,
)
from storage.times import TIMEZONE
from storage.types import FieldId

DYNAMIC_PROPERTY: Final = "dynamicfield.enabled"
"""Of a collection: turns the dynamic field on."""
_LIMITS: Final = {"max_length": "max_bytes", "max_capacity": "capacity"}
_MMAP: Final = "mmap.enabled"


def with_field(schema: CollectionSchema, one: FieldSchema) -> CollectionSchema:
    """Return the schema with one more field. Raises InvalidParameter or NameInvalid."""
    where = f"field name = {one.name[:80]}"
    if one.primary:
        raise InvalidParameter(f"not support to add pk field, {where}")
    if one.partition_key:
        raise InvalidParameter(f"not support to add partition key field, {where}")
    if one.auto_id:
        raise InvalidParameter(f"only primary field can speficy AutoID with true, {where}")
    if one.type.is_vector:
        raise InvalidParameter(f"not support to add vector field, {where}: rows that are there have no vector for it")
    if not one.nullable and one.default is None:
        raise InvalidParameter(f"added field must be nullable or have a default value, please check it, {where}")
    check_field(one)
    if one.name in schema.by_name:
        raise InvalidParameter(f"duplicate field name: {one.name}")
    if one.clustering_key and any(known.clustering_key for known in schema.fields):
        raise InvalidParameter(f"there is a clustering key already, {where}")
    if len(schema.user_fields) >= FIELDS_MAX:
        raise InvalidParameter(f"The number of fields has reached the maximum value {FIELDS_MAX}")
    return _with_new(schema, one)


def with_dynamic_field(schema: CollectionSchema) -> CollectionSchema:
    """Return the schema with the dynamic field switched on; the same one if it is."""
    if schema.dynamic is not None:
        return schema
    return _with_new(schema, FieldSchema(DYNAMIC_NAME, DataType.JSON, dynamic=True, nullable=True))


def without_field(schema: CollectionSchema, name: str, field_id: int = 0) -> CollectionSchema:
    """Return the schema without the field of this name, or if that is empty of this id.

    Raises InvalidParameter if the collection cannot do without it, FieldNotFound if there is no such field.
    """
    one = schema.field(name) if name else schema.by_id.get(FieldId(field_id))
    if one is None:
        raise FieldNotFound(f"field with id {field_id} not exist")
    where = f"cannot drop field {one.name}"
    if one.dynamic:
        raise InvalidParameter(f"{where}: it is the dynamic field, which stays once it is switched on")
    if one.primary:
        raise InvalidParameter(f"{where}: it is the primary key")
    if one.partition_key:
        raise InvalidParameter(f"{where}: it is the partition key")
    if one.clustering_key:
        raise InvalidParameter(f"{where}: it is the clustering key")
    function = next((known for known in schema.functions if one.name in (known.input, known.output)), None)
    if function is not None:
        raise InvalidParameter(f"{where}: function {function.name} reads or computes it")
    if schema.vectors == (one,):
        raise InvalidParameter(f"{where}: it is the only vector field")
    kept = tuple(known for known in schema.fields if known is not one)
    return CollectionSchema(kept, schema.version + 1, schema.fresh_field_id, schema.functions)


def with_field_params(schema: CollectionSchema, name: str, params: Mapping[str, str]) -> CollectionSchema:
    """Return the schema with other parameters of a field; the same one if nothing changes.

    Lengths and capacities only grow: rows that are there may need what they have.
    """
    old = schema.field(name)
    changed: dict[str, Any] = {}
    for key, text in params.items():
        if key == _MMAP:
            if text.lower() not in ("true", "false"):
                raise InvalidParameter(f"{key} of field {name} is true or false, got {text[:80]!r}")
        elif key in _LIMITS and getattr(old, _LIMITS[key]):
            changed[_LIMITS[key]] = _grown(old, key, text)
        else:
            raise InvalidParameter(
                f"{key[:80]} of field {name}, which is {old.type}, can not be altered; these can: max_length of "
                f"VarChar, max_capacity of Array, {_MMAP}"
            )
    new = replace(old, **changed, params={**old.params, **params})
    check_field(new)
    if new == old:
        return schema
    fields = tuple(new if known is old else known for known in schema.fields)
    return CollectionSchema(fields, schema.version + 1, schema.fresh_field_id, schema.functions)


def with_timezone(schema: CollectionSchema, zone: str) -> CollectionSchema:
    """Return the schema with another time zone, in which its times without an offset are; the same one if it has no
    field for times. What is stored stays."""
    if all(one.type is not DataType.TIMESTAMPTZ or one.params.get(TIMEZONE, "") == zone for one in schema.fields):
        return schema
    fields = tuple(in_timezone(one, zone) for one in schema.fields)
    return CollectionSchema(fields, schema.version + 1, schema.fresh_field_id, schema.functions)


def in_timezone(one: FieldSchema, zone: str) -> FieldSchema:
    """Return the field with the zone of its collection, if it is for times."""
    if one.type is not DataType.TIMESTAMPTZ or not (zone or TIMEZONE in one.params):
        return one
    return replace(one, params={**one.params, TIMEZONE: zone})


def _grown(old: FieldSchema, key: str, text: str) -> int:
    known: int = getattr(old, _LIMITS[key])
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidParameter(f"{key} of field {old.name} is a whole number, got {text[:80]!r}")
    if int(text) < known:
        raise InvalidParameter(
            f"{key} of field {old.name} can only grow: it is {known}, and rows may need it; {text} was asked for"
        )
    return int(text)


def _with_new(schema: CollectionSchema, one: FieldSchema) -> CollectionSchema:
    field_id = schema.fresh_field_id
    fields = (*schema.fields, replace(one, id=field_id))
    return CollectionSchema(fields, schema.version + 1, FieldId(field_id + 1), schema.functions)
