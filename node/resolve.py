"""What the names in a read mean in its collection: fields to show, to group and order by, keys, partitions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cluster.catalog import Collection
from cluster.route import by_number, split
from index.protocol import Form
from index.sparse import SparseRows
from node.service import Order, ReadOptions
from storage.aggregation import Aggregate, Aggregation, Operator
from storage.errors import (
    BadJson,
    BadPrimaryKey,
    CollectionNotLoaded,
    FieldNotFound,
    InvalidParameter,
    PartitionNotLoaded,
)
from storage.filter.compiled import CompiledFilter
from storage.key_lookup import Keys
from storage.ordering import OrderBy
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.types import FieldId, PartitionId
from storage.vectors import Vectors

COUNT: Final = "count(*)"
ISOLATION: Final = "partitionkey.isolation"
"""Property of a collection: each search is of the rows with one value of the partition key."""
_AGGREGATE: Final = re.compile(r"(count|sum|avg|min|max)\s*\(\s*(\*|[A-Za-z_][A-Za-z0-9_]*)\s*\)", re.I)


@dataclass(frozen=True)
class Output:
    """Which fields an answer shows; `dynamic_keys` as in `Rows`."""

    fields: tuple[FieldSchema, ...]
    dynamic_keys: tuple[str, ...] | None = ()

    def field_ids(self, schema: CollectionSchema) -> list[FieldId]:
        """Return the columns to fetch: what is shown, and `$meta` if any of its keys is."""
        ids = [one.id for one in self.fields]
        if self.dynamic_keys != () and schema.dynamic is not None:
            ids.append(schema.dynamic.id)
        return ids


def typed_keys(primary: FieldSchema, ids: Sequence[int | str]) -> Keys:
    """Return the primary keys as the field has them. Raises BadPrimaryKey."""
    if primary.type is DataType.VARCHAR:
        return [str(one) for one in ids]
    try:
        return np.array([int(one) for one in ids], np.int64)
    except (ValueError, OverflowError) as error:
        raise BadPrimaryKey(f"please check the primary key and its' type can only in [int, string]: {error}") from error


def resolve_output(schema: CollectionSchema, names: Sequence[str]) -> Output:
    """Return the fields to show for these names: declared ones, "*", dynamic keys. The primary key always is."""
    chosen: dict[str, FieldSchema] = {}
    dynamic: list[str] | None = []
    for name in names:
        if name == "*":
            chosen.update((one.name, one) for one in schema.user_fields if one.id not in schema.computed)
            dynamic = None
        elif name in schema.by_name and schema.by_name[name].id in schema.computed:
            raise InvalidParameter(
                f"not allowed to retrieve raw data of field {name}, which a function computes: ask for its input, "
                f"{schema.computed[schema.by_name[name].id].name}: invalid parameter"
            )
        elif name in schema.by_name and not schema.by_name[name].dynamic:
            chosen[name] = schema.by_name[name]
        elif schema.dynamic is None:
            raise FieldNotFound(f"field {name} not exist; fields: {', '.join(one.name for one in schema.user_fields)}")
        elif name == schema.dynamic.name:
            dynamic = None
        elif dynamic is not None:
            dynamic.append(name)
    chosen.setdefault(schema.primary.name, schema.primary)
    if schema.dynamic is None:
        dynamic = []
    return Output(tuple(chosen.values()), None if dynamic is None else tuple(dict.fromkeys(dynamic)))


def with_fields(some: Sequence[FieldId], more: Sequence[FieldId]) -> tuple[FieldId, ...]:
    """Return the fields of both, each once."""
    return tuple(dict.fromkeys([*some, *more]))


def group_field(schema: CollectionSchema, name: str) -> FieldSchema:
    """Return the field of this name if rows can be grouped by it. Raises InvalidParameter."""
    one = schema.by_name.get(name)
    if one is None:
        raise InvalidParameter(
            f"group by field {name[:80]} does not exist in the collection's schema: invalid parameter"
        )
    if not (one.type.is_integer or one.type in (DataType.BOOL, DataType.VARCHAR)):
        raise InvalidParameter(
            f"group by field {name} of type {one.type} is not supported: group by Bool, an integer or VarChar: "
            "invalid parameter"
        )
    return one


def orders_of(schema: CollectionSchema, orders: Sequence[Order]) -> tuple[OrderBy, ...]:
    """Return the fields to order by. Raises InvalidParameter."""
    found = []
    for order in orders:
        one = schema.by_name.get(order.field_name)
        if one is None or one.dynamic:
            raise InvalidParameter(f"orderBy field {order.field_name[:80]} does not exist: invalid parameter")
        if not (one.type.is_numeric or one.type in (DataType.BOOL, DataType.VARCHAR, DataType.TIMESTAMPTZ)):
            raise InvalidParameter(
                f"orderBy field {one.name} of type {one.type} is not sortable: order by Bool, a number or VarChar: "
                "invalid parameter"
            )
        nulls_first = order.descending if order.nulls_first is None else order.nulls_first
        found.append(OrderBy(one.id, order.descending, nulls_first))
    return tuple(found)


def aggregation_of(schema: CollectionSchema, options: ReadOptions) -> Aggregation | None:
    """Return what a query aggregates, None if it wants rows or `count(*)` alone. Raises InvalidParameter."""
    named = [(name, _AGGREGATE.fullmatch(name.strip())) for name in options.output_fields]
    aggregates = [(name, found) for name, found in named if found is not None and name not in schema.by_name]
    if not options.group_by and (not aggregates or [name.replace(" ", "").lower() for name, _ in named] == [COUNT]):
        return None
    by = tuple(group_field(schema, name).id for name in dict.fromkeys(options.group_by))
    if options.order_by:
        raise InvalidParameter(
            "orderByFields do not go with aggregates: groups come by their values: invalid parameter"
        )
    for name, found in named:
        if (found is None or name in schema.by_name) and name not in options.group_by:
            raise InvalidParameter(
                f"output field {name[:80]} is neither an aggregate (count, sum, avg, min, max) nor among "
                "groupByFields: invalid parameter"
            )
    made = []
    for name, found in aggregates:
        assert found is not None
        made.append(_aggregate_of(schema, name, Operator(found[1].lower()), found[2]))
    return Aggregation(by, tuple(made))


def _aggregate_of(schema: CollectionSchema, shown: str, operator: Operator, name: str) -> Aggregate:
    if name == "*":
        if operator is not Operator.COUNT:
            raise InvalidParameter(f"{shown[:80]}: only count takes a *: invalid parameter")
        return Aggregate(shown, operator)
    one = schema.by_name.get(name)
    if one is None:
        raise InvalidParameter(f"{shown[:80]}: field {name[:80]} does not exist: invalid parameter")
    is_extreme = operator in (Operator.MIN, Operator.MAX)
    if operator is not Operator.COUNT and not (one.type.is_numeric or (is_extreme and one.type is DataType.VARCHAR)):
        raise InvalidParameter(f"{shown[:80]}: {operator} is not supported for type {one.type}: invalid parameter")
    return Aggregate(shown, operator, one.id)


def vector_field(schema: CollectionSchema, name: str) -> FieldSchema:
    if not name:
        if len(schema.vectors) > 1:
            names = ", ".join(one.name for one in schema.vectors)
            raise BadJson(
                f"can only accept json format request, error: multiple vector fields ({names}): set annsField to one"
            )
        return schema.vectors[0]
    found = schema.by_name.get(name)
    if found is None or not found.type.is_vector:
        names = ", ".join(one.name for one in schema.vectors)
        raise BadJson(f"can only accept json format request, error: no vector field {name}; vector fields: {names}")
    return found


def check_form(field: FieldSchema, vectors: Vectors) -> None:
    """Raise BadJson unless these are query vectors of a sparse or binary field."""
    is_sparse = isinstance(vectors, SparseRows)
    if is_sparse != (field.type.form is Form.SPARSE):
        raise BadJson(
            f"field {field.name} is {field.type}, and the query vectors are {'' if is_sparse else 'not '}sparse"
        )
    if not isinstance(vectors, SparseRows) and (vectors.dtype != np.uint8 or vectors.shape[1:] != (field.dim // 8,)):
        raise BadJson(
            f"can only accept json format request, error: dimension: {field.dim}, but length of []byte: "
            f"{vectors.shape[-1]}: field {field.name} has vectors of {field.dim} bits"
        )


def readable_partitions(collection: Collection, names: Sequence[str]) -> frozenset[PartitionId] | None:
    """Return the partitions to read, None for all. Raises if any of them is not loaded."""
    if not collection.is_loaded:
        raise CollectionNotLoaded(collection.name)
    if not names:
        return collection.loaded
    chosen = frozenset(collection.partition(name) for name in names)
    if collection.loaded is not None:
        for name in names:
            if collection.partition(name) not in collection.loaded:
                raise PartitionNotLoaded(name)
    return chosen


def partitions_of_key(
    collection: Collection,
    row_filter: CompiledFilter,
    partitions: frozenset[PartitionId] | None,
    *,
    isolated: bool = False,
) -> frozenset[PartitionId] | None:
    """Return which of the partitions can have rows that match: a filter may say which values of the partition key.

    isolated  raise InvalidParameter if it must name one value, as the collection's property says, and does not
    """
    key = collection.schema.partition_key
    if key is None:
        return partitions
    found = row_filter.keys_of(key)
    is_one = found is not None and len(found.values) == 1
    if isolated and not is_one and collection.properties.get(ISOLATION, "").lower() == "true":
        raise InvalidParameter(
            "partition key not found in expr or the expr is invalid when validating partition key isolation: "
            f"the filter should say {key.name} == one value, and more with `and`"
        )
    if found is None:
        return partitions
    ids = by_number(collection.partitions)
    owners = [ids[i] for i, rows in enumerate(split(typed_keys(key, found.values), len(ids))) if len(rows)]
    chosen = frozenset(owners or ids[:1])
    return chosen if partitions is None else partitions & chosen
