"""Schemas, indexes and levels: Milvus's messages into what the REST API makes of the same, and descriptions back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from node.api import routes
from node.api.schemas import BM25, collection_request, field_of, index_requests
from node.grpc.calls import pairs, set_pairs
from node.grpc.columns import TYPE_NAMES, TYPES
from node.grpc.protocol import DAMAGED, Message, enum, enum_names, message
from node.service import CollectionInfo, CollectionRequest, Consistency, IndexInfo, IndexRequest, IndexState
from storage.errors import InvalidParameter, UnsupportedOperation
from storage.schema import DataType, FieldSchema
from storage.types import tick_ms

LEVELS: Final = enum("common.ConsistencyLevel")
LEVEL_NAMES: Final = enum_names("common.ConsistencyLevel")
_INDEX_STATES: Final = {
    IndexState.FINISHED: "Finished", IndexState.IN_PROGRESS: "InProgress", IndexState.UNISSUED: "Unissued",
    IndexState.FAILED: "Failed",
}  # fmt: skip
INDEX_STATES: Final = enum("common.IndexState")
_DEFAULTS: Final = {
    DataType.BOOL: "bool_data", DataType.INT8: "int_data", DataType.INT16: "int_data", DataType.INT32: "int_data",
    DataType.INT64: "long_data", DataType.FLOAT: "float_data", DataType.DOUBLE: "double_data",
    DataType.VARCHAR: "string_data",
}  # fmt: skip
MMAP: Final = "mmap.enabled"


def parsed(name: str, data: bytes) -> Message:
    """Return the message in a field of bytes. Raises InvalidParameter."""
    try:
        return message(f"schema.{name}").FromString(data)
    except DAMAGED:
        raise InvalidParameter(f"the schema is no {name}: invalid parameter") from None


def consistency_name(number: int) -> str:
    """Return the level's name. Raises InvalidParameter."""
    name = LEVEL_NAMES.get(number)
    if name is None:
        raise InvalidParameter(f"{number} is not a consistency level: invalid parameter")
    return name


def creation_of(request: Message) -> CollectionRequest:
    """Return what a CreateCollection asks for. Raises errors of bad requests."""
    schema = parsed("CollectionSchema", request.schema)
    if not schema.fields:
        raise InvalidParameter("the schema has no fields: invalid parameter")
    if schema.enable_namespace:
        raise UnsupportedOperation("namespaces are not supported by this server")
    params: dict[str, Any] = {}
    if request.shards_num:
        params["shardsNum"] = request.shards_num
    if request.num_partitions:
        params["partitionsNum"] = request.num_partitions
    return collection_request(
        {
            **routes.CREATE.defaults,
            "collectionName": request.collection_name,
            "description": schema.description,
            "consistencyLevel": consistency_name(request.consistency_level),
            "params": params,
            "properties": pairs(schema.properties) | pairs(request.properties),
            "schema": {
                **routes.SCHEMA.defaults,
                "autoID": schema.autoID or any(one.autoID for one in schema.fields),
                "enableDynamicField": schema.enable_dynamic_field,
                "fields": [_field_values(one) for one in schema.fields if not one.is_dynamic],
                "functions": [_function_values(one) for one in schema.functions],
                "structFields": [one.name for one in schema.struct_array_fields],
                "externalSource": schema.external_source,
            },
        }
    )


def field_in(data: bytes) -> FieldSchema:
    """Return the field that the bytes of a FieldSchema describe. Raises errors of bad requests."""
    return added_field(parsed("FieldSchema", data))


def added_field(given: Message) -> FieldSchema:
    """Return the field that a FieldSchema describes. Raises errors of bad requests."""
    return field_of(_field_values(given))


def _function_values(one: Message) -> dict[str, Any]:
    """Return a function in the words of the REST API."""
    return {
        "name": one.name,
        "type": str(one.type),
        "inputFieldNames": list(one.input_field_names),
        "outputFieldNames": list(one.output_field_names),
        "description": one.description,
        "params": pairs(one.params),
    }


def _field_values(one: Message) -> dict[str, Any]:
    """Return a field in the words of the REST API."""
    params: dict[str, Any] = pairs(one.type_params)
    if "mmap_enabled" in params:
        params[MMAP] = params.pop("mmap_enabled")
    if one.autoID and not one.is_primary_key:
        raise InvalidParameter(f"only the primary key can be generated, field {one.name[:80]} is none")
    return {
        **routes.FIELD_SCHEMA.defaults,
        "fieldName": one.name,
        "dataType": _type_name(one.data_type),
        "elementDataType": _type_name(one.element_type) if one.element_type else "",
        "isPrimary": one.is_primary_key,
        "autoID": one.autoID,
        "isPartitionKey": one.is_partition_key,
        "isClusteringKey": one.is_clustering_key,
        "nullable": one.nullable,
        "defaultValue": _default(one.default_value) if one.HasField("default_value") else None,
        "elementTypeParams": params,
        "description": one.description,
        "externalField": one.external_field,
    }


def _type_name(number: int) -> str:
    return TYPE_NAMES.get(number, str(number))


def _default(value: Message) -> Any:
    which = value.WhichOneof("data")
    return None if which is None else getattr(value, which)


def index_of(request: Message) -> IndexRequest:
    """Return what a CreateIndex asks for. Raises InvalidParameter."""
    params: dict[str, Any] = pairs(request.extra_params)
    nested = params.pop("params", "")
    if nested:
        try:
            inner = orjson.loads(nested)
        except orjson.JSONDecodeError:
            inner = None
        if not isinstance(inner, dict):
            raise InvalidParameter("params of an index should be a JSON object: invalid parameter")
        params = inner | params
    (wanted,) = index_requests(
        [
            {
                **routes.INDEX_PARAM.defaults,
                "fieldName": request.field_name,
                "indexName": request.index_name,
                "params": params,
            }
        ],
        [request.field_name],
    )
    return wanted


# --- descriptions ------------------------------------------------------------------------------------------------


def show_collection(info: CollectionInfo, into: Message) -> None:
    """Fill a DescribeCollectionResponse."""
    into.collection_name, into.db_name = info.name, info.database
    into.collectionID = info.collection_id
    into.shards_num, into.num_partitions = info.shards, len(info.partitions)
    into.consistency_level = LEVELS[str(info.consistency)]
    into.created_timestamp, into.update_timestamp = info.created_tick, schema_timestamp(info)
    into.created_utc_timestamp = tick_ms(info.created_tick)
    into.update_timestamp_str = str(into.update_timestamp)
    into.aliases.extend(info.aliases)
    channels = [f"annulus-dml_{i}_{info.collection_id}v{i}" for i in range(info.shards)]
    into.virtual_channel_names.extend(channels)
    into.physical_channel_names.extend([f"annulus-dml_{i}" for i in range(info.shards)])
    set_pairs(into.properties, info.properties)
    schema = into.schema
    schema.name, schema.description, schema.dbName = info.name, info.description, info.database
    schema.autoID = info.schema.primary.auto_id
    schema.enable_dynamic_field = info.schema.dynamic is not None
    schema.version = info.schema.version - 1
    set_pairs(schema.properties, info.properties)
    for one in info.schema.user_fields:
        show_field(one, schema.fields.add())
        schema.fields[-1].is_function_output = one.id in info.schema.computed
    for function in info.schema.functions:
        shown = schema.functions.add()
        shown.name, shown.id, shown.description = function.name, function.id, function.description
        shown.type = BM25
        shown.input_field_names.append(function.input)
        shown.output_field_names.append(function.output)
        shown.input_field_ids.append(info.schema.field(function.input).id)
        shown.output_field_ids.append(info.schema.field(function.output).id)
        set_pairs(shown.params, function.params)


def schema_timestamp(info: CollectionInfo) -> int:
    """Return what a client that has this schema sends with its rows: another one for every version."""
    return info.created_tick + info.schema.version - 1


def show_field(one: FieldSchema, into: Message) -> None:
    """Fill a FieldSchema."""
    into.fieldID, into.name, into.description = one.id, one.name, one.description
    into.data_type = TYPES[str(one.type)]
    into.is_primary_key, into.autoID, into.nullable = one.primary, one.auto_id, one.nullable
    into.is_partition_key, into.is_clustering_key = one.partition_key, one.clustering_key
    if one.element is not None:
        into.element_type = TYPES[str(one.element)]
    if one.default is not None:
        setattr(into.default_value, _DEFAULTS[one.type], one.default)
    set_pairs(into.type_params, one.params)


def show_index(info: IndexInfo, into: Message) -> None:
    """Fill an IndexDescription."""
    into.index_name, into.field_name = info.index_name, info.field_name
    known: Mapping[str, str] = {"index_type": info.index_type, "metric_type": info.metric_type}
    set_pairs(into.params, {**known, **info.params})
    into.indexed_rows, into.total_rows = info.indexed_rows, info.total_rows
    into.pending_index_rows = info.pending_rows
    into.state = INDEX_STATES[_INDEX_STATES[info.state]]
    into.index_state_fail_reason = info.fail_reason


def state_number(info: IndexInfo) -> int:
    """Return the number of Milvus's `IndexState`."""
    return INDEX_STATES[_INDEX_STATES[info.state]]


def level_of(number: int) -> Consistency:
    """Return the level of this number. Raises InvalidParameter."""
    return Consistency(consistency_name(number))
