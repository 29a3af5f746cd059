"""Requests to create a collection, quick or with a schema, and the description of one, in Milvus's words both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from index.metric import DEFAULT_METRICS
from node.api.limits import check_properties
from node.api.requests import as_text, parse_bool, parse_int
from node.service import CollectionInfo, CollectionRequest, Consistency, IndexInfo, IndexRequest, IndexState
from storage import analysis
from storage.errors import InvalidParameter, MissingParameter, UnsupportedOperation
from storage.evolution import in_timezone
from storage.schema import SHARDS_MAX, DataType, FieldSchema, FunctionSchema, data_type, is_on
from storage.times import TIMEZONE, zone_of

PARTITIONS_MAX: Final = 1024
DESCRIPTION_BYTES_MAX: Final = 1024
TTL_KEY: Final = "collection.ttl.seconds"
_VECTOR_TYPES: Final = tuple(kind for kind in DataType if kind.is_vector)
_DENSE_METRICS: Final = frozenset({"L2", "IP", "COSINE"})
_BINARY_METRICS: Final = frozenset({"HAMMING", "JACCARD", "SUBSTRUCTURE", "SUPERSTRUCTURE", "MHJACCARD"})
_SPARSE_METRICS: Final = frozenset({"IP", "BM25"})
_PARAM_PROPERTIES: Final = {"partitionkeyisolation": "partitionkey.isolation", "mmap.enabled": "mmap.enabled"}
BM25: Final = 1
"""The number of the type of function."""
_DATA_KINDS: Final = {
    DataType.BOOL: "Bool", DataType.INT8: "Int", DataType.INT16: "Int", DataType.INT32: "Int", DataType.INT64: "Long",
    DataType.FLOAT: "Float", DataType.DOUBLE: "Double", DataType.VARCHAR: "String",
}  # fmt: skip


def consistency(text: str | None) -> Consistency | None:
    """Return the level of this name, None for none given. Raises InvalidParameter in Milvus's words."""
    if not text:
        return None
    try:
        return Consistency(text)
    except ValueError:
        raise InvalidParameter(
            f"consistencyLevel can only be [{', '.join(Consistency)}], default: {Consistency.BOUNDED}, "
            f"err:{text[:80]} is not a consistency level: invalid parameter"
        ) from None


def collection_request(given: Mapping[str, Any]) -> CollectionRequest:
    """Return the collection that a `collections/create` asks for, in either mode. Raises errors of bad requests."""
    schema = given["schema"] or {}
    params = {key.lower(): value for key, value in (given["params"] or {}).items()}
    quick = not schema.get("fields")
    if schema.get("structFields"):
        raise UnsupportedOperation("structFields in a schema are not supported by this server")
    if schema.get("externalSource"):
        raise UnsupportedOperation("external collections are not supported by this server")
    if len(given["description"].encode()) > DESCRIPTION_BYTES_MAX:
        raise InvalidParameter(f"the description is longer than {DESCRIPTION_BYTES_MAX} bytes: invalid parameter")
    functions = [] if quick else [function_of(one) for one in schema["functions"] or ()]
    if quick:
        fields, indexes = _quick(given, params)
        dynamic = parse_bool(params.get("enabledynamicfield", True), "params.enableDynamicField")
    else:
        fields = _with_auto_id([field_of(one) for one in schema["fields"]], bool(schema["autoID"]))
        indexes = index_requests(given["indexParams"] or [], [one.name for one in fields])
        dynamic = bool(schema["enableDynamicField"])
    properties = _properties(given, params)
    if TIMEZONE in properties:
        zone_of(properties[TIMEZONE])
        fields = [in_timezone(one, properties[TIMEZONE]) for one in fields]
    keyed = any(one.partition_key for one in fields)
    if "partitionsnum" in params and not keyed:
        raise InvalidParameter(
            "num_partitions should only be specified with partition key field enabled: invalid parameter"
        )
    return CollectionRequest(
        name=given["collectionName"],
        fields=fields,
        functions=functions,
        dynamic=dynamic,
        description=given["description"],
        shards=_within(params.get("shardsnum", 1), 1, SHARDS_MAX, "shardsNum"),
        partitions=_within(params.get("partitionsnum", 16), 1, PARTITIONS_MAX, "partitionsNum"),
        consistency=_level(given, params),
        properties=properties,
        indexes=indexes,
        load=quick or bool(indexes),
    )


def index_requests(given: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[IndexRequest]:
    """Return the indexes asked for; each must be on one of the `fields` (1802 otherwise, as in Milvus).

    One with a type of JSON values may be on a key of the dynamic field, of which nothing is known here.
    """
    requests = []
    for one in given:
        name = one["fieldName"]
        params = dict(one["params"] or {})
        if name not in fields and "json_cast_type" not in params:
            raise MissingParameter(f"missing required parameters, error: `{name}` hasn't defined in schema")
        check_properties("indexParams.params", params)
        index_type = one["indexType"] or as_text(params.pop("index_type", "")) or "AUTOINDEX"
        metric = one["metricType"] or as_text(params.pop("metric_type", ""))
        params.pop("index_type", None)
        params.pop("metric_type", None)
        requests.append(IndexRequest(name, one["indexName"] or "", index_type, metric, params))
    return requests


def _quick(given: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[list[FieldSchema], list[IndexRequest]]:
    vector_type, metric = given["vectorFieldType"] or "FloatVector", given["metricType"] or ""
    if vector_type not in _VECTOR_TYPES:
        raise InvalidParameter(
            f"vectorFieldType can only be [{', '.join(_VECTOR_TYPES)}], default: FloatVector, got {vector_type[:80]}: "
            "invalid parameter"
        )
    dim = given["dimension"]
    if vector_type == "SparseFloatVector":
        if metric and metric not in _SPARSE_METRICS:
            raise InvalidParameter("only IP&BM25 is the supported metric type for sparse index: invalid parameter")
        if dim:
            raise InvalidParameter(
                "dimension should not be specified for SparseFloatVector quick create: invalid parameter"
            )
    elif vector_type == "BinaryVector":
        if metric and metric not in _BINARY_METRICS:
            raise InvalidParameter(f"binary vector index does not support metric type: {metric}: invalid parameter")
    elif metric and metric not in _DENSE_METRICS:
        raise InvalidParameter(f"float vector index does not support metric type: {metric}: invalid parameter")
    kind = data_type(vector_type)
    if not dim and kind is not DataType.SPARSE_FLOAT_VECTOR:
        raise MissingParameter(
            "missing required parameters, error: dimension is required for quickly create collection"
            "(default metric type: COSINE)"
        )
    id_type = given["idType"] or "Int64"
    pk_params: dict[str, str] = {}
    pk_bytes = 0
    if id_type in ("VarChar", "Varchar"):
        pk_type = DataType.VARCHAR
        if "max_length" in params:
            pk_bytes = parse_int(params["max_length"], "params.max_length")
            pk_params = {"max_length": as_text(params["max_length"])}
    elif id_type in ("Int64", "int64"):
        pk_type = DataType.INT64
    else:
        raise InvalidParameter(
            f"idType can only be [Int64, VarChar], default: Int64, got {id_type[:80]}: invalid parameter"
        )
    pk_name, vector_name = given["primaryFieldName"] or "id", given["vectorFieldName"] or "vector"
    fields = [
        FieldSchema(
            pk_name, pk_type, primary=True, auto_id=bool(given["autoID"]), max_bytes=pk_bytes, params=pk_params
        ),
        FieldSchema(vector_name, kind, dim=dim, params={"dim": str(dim)} if dim else {}),
    ]
    return fields, [IndexRequest(vector_name, vector_name, "AUTOINDEX", metric or DEFAULT_METRICS[kind.form])]


def field_of(given: Mapping[str, Any]) -> FieldSchema:
    """Return the field that a `FieldSchema` of a request describes. Raises errors of bad requests."""
    name = given["fieldName"] or ""
    kind = data_type(given["dataType"] or "")
    element = None
    if kind is DataType.ARRAY:
        element = data_type(given["elementDataType"] or "", what=f"element data type of field {name[:80]}")
    if given["externalField"] or given["fields"]:
        raise UnsupportedOperation(f"field {name[:80]}: external and struct fields are not supported by this server")
    params = dict(given["typeParams"] or {}) | dict(given["elementTypeParams"] or {})
    kept = texts(f"elementTypeParams of field {name[:80]}", params)
    return FieldSchema(
        name=name,
        type=kind,
        element=element,
        primary=given["isPrimary"],
        nullable=given["nullable"],
        default=_default(name, kind, given["defaultValue"]),
        partition_key=given["isPartitionKey"],
        clustering_key=given["isClusteringKey"],
        dim=_param(name, params, "dim") if kind.is_vector else 0,
        max_bytes=_param(name, params, "max_length") if DataType.VARCHAR in (kind, element) else 0,
        capacity=_param(name, params, "max_capacity") if kind is DataType.ARRAY else 0,
        description=given["description"],
        params=kept,
        analyzer_version=analysis.VERSION if is_on(kept, "enable_analyzer") else 0,
    )


def function_of(given: Mapping[str, Any]) -> FunctionSchema:
    """Return the function that a schema of a request describes. Raises errors of bad requests."""
    name, kind = given["name"] or "", given["type"] or ""
    where = f"function {name[:80]}"
    if kind.upper() not in ("BM25", "1"):
        raise UnsupportedOperation(f"{where}: type {kind[:80]} is not supported by this server; BM25 is")
    inputs, outputs = given["inputFieldNames"] or [], given["outputFieldNames"] or []
    for what, names in (("input", inputs), ("output", outputs)):
        if len(names) != 1:
            raise InvalidParameter(f"{where}: BM25 function should have exactly one {what} field, got {len(names)}")
    params = texts(f"params of {where}", given["params"] or {})
    return FunctionSchema(name, inputs[0], outputs[0], description=given["description"] or "", params=params)


def _with_auto_id(fields: list[FieldSchema], auto_id: bool) -> list[FieldSchema]:
    """Return the fields with autoID, which a request has per schema, on the primary key."""
    if not auto_id:
        return fields
    return [FieldSchema.from_dict(one.to_dict() | {"auto_id": True}) if one.primary else one for one in fields]


def _param(field: str, params: Mapping[str, Any], name: str) -> int:
    return parse_int(params[name], f"field {field[:80]}: {name}") if name in params else 0


def _default(field: str, kind: DataType, value: Any) -> bool | int | float | str | None:
    if value is None:
        return None
    fault = f"convert defaultValue fail, err:field {field[:80]} of type {kind}"
    if isinstance(value, dict | list) or kind in (DataType.JSON, DataType.ARRAY) or kind.is_vector:
        raise InvalidParameter(f"{fault} can not have such a default value: invalid parameter")
    if kind.is_integer and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind.is_float and isinstance(value, int | float):
        edge = 3.4028234663852886e38 if kind is DataType.FLOAT else math.inf
        if not -edge <= value <= edge or math.isinf(value):
            raise InvalidParameter(f"{fault} does not take {value}: out of range: invalid parameter")
    assert isinstance(value, bool | int | float | str)
    return value


def _within(value: Any, least: int, most: int, what: str) -> int:
    number = parse_int(value, what)
    if not least <= number <= most:
        raise InvalidParameter(f"{what} should be in range [{least}, {most}], but got {number}: invalid parameter")
    return number


def _level(given: Mapping[str, Any], params: Mapping[str, Any]) -> Consistency:
    outer = consistency(given["consistencyLevel"])
    inner = consistency(as_text(params["consistencylevel"]) if params.get("consistencylevel") is not None else None)
    if outer is not None and inner is not None and outer is not inner:
        raise InvalidParameter(
            f"consistencyLevel is given twice, as {outer} and in params as {inner}: invalid parameter"
        )
    return outer or inner or Consistency.BOUNDED


def texts(what: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return properties as the text that is kept. Raises InvalidParameter if they are too many or too long."""
    check_properties(what, given)
    kept = {key: as_text(value) for key, value in given.items()}
    check_properties(what, kept)
    return kept


def _properties(given: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, str]:
    properties = texts("properties", given["properties"] or {})
    lifetimes = [properties.pop(key) for key in (TTL_KEY, "ttl.seconds") if key in properties]
    if "ttlseconds" in params:
        lifetimes.append(as_text(params["ttlseconds"]))
    if "ttlfield" in params:
        raise UnsupportedOperation("params.ttlField: rows that name their own lifetime are not supported")
    if len(lifetimes) > 1:
        raise InvalidParameter("the collection's TTL is given more than once: invalid parameter")
    if lifetimes:
        properties[TTL_KEY] = str(parse_int(lifetimes[0], "collection TTL"))
    for key, value in params.items():
        if key in _PARAM_PROPERTIES:
            properties[_PARAM_PROPERTIES[key]] = str(parse_bool(value, f"params.{key}")).lower()
        elif key.startswith("warmup."):
            properties[key] = as_text(value)
    check_properties("properties", properties)
    return properties


# --- descriptions ------------------------------------------------------------------------------------------------


def pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Return a map as Milvus lists it."""
    return [{"key": key, "value": value} for key, value in values.items()]


def describe_collection(info: CollectionInfo) -> dict[str, Any]:
    schema = info.schema
    return {
        "collectionName": info.name,
        "collectionID": info.collection_id,
        "description": info.description,
        "autoId": schema.primary.auto_id,
        "fields": [_describe_field(one, one.id in schema.computed) for one in schema.user_fields],
        "structFields": [],
        "functions": [
            {
                "name": one.name,
                "description": one.description,
                "type": BM25,
                "id": one.id,
                "inputFieldNames": [one.input],
                "outputFieldNames": [one.output],
                "params": pairs(one.params),
            }
            for one in schema.functions
        ],
        "aliases": list(info.aliases),
        "indexes": [
            {"indexName": one.index_name, "fieldName": one.field_name, "metricType": one.metric_type or "COSINE"}
            for one in info.indexes
        ],
        "load": str(info.load_state),
        "shardsNum": info.shards,
        "partitionsNum": len(info.partitions),
        "consistencyLevel": str(info.consistency),
        "enableDynamicField": schema.dynamic is not None,
        "externalSource": "",
        "externalSpec": "",
        "properties": pairs(info.properties),
    }


def _describe_field(one: FieldSchema, computed: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": one.name,
        "id": one.id,
        "type": str(one.type),
        "primaryKey": one.primary,
        "partitionKey": one.partition_key,
        "clusteringKey": one.clustering_key,
        "autoId": one.auto_id,
        "description": one.description,
        "nullable": one.nullable,
        "params": pairs(one.params),
    }
    if computed:
        shown["isFunctionOutput"] = True
    if one.element is not None:
        shown["elementType"] = str(one.element)
    if one.default is not None:
        shown["defaultValue"] = {"Data": {f"{_DATA_KINDS[one.type]}Data": one.default}}
    return shown


def describe_index(info: IndexInfo) -> dict[str, Any]:
    params = dict(info.params)
    known = {"index_type": info.index_type, "metric_type": info.metric_type}
    return {
        "indexName": info.index_name,
        "fieldName": info.field_name,
        "indexType": info.index_type,
        "metricType": info.metric_type,
        "mmap.enabled": params.get("mmap.enabled", ""),
        "indexoffsetcache.enabled": params.get("indexoffsetcache.enabled", ""),
        "warmup": params.get("warmup", ""),
        "totalRows": info.total_rows,
        "pendingRows": info.pending_rows,
        "indexedRows": info.indexed_rows,
        "indexState": str(info.state),
        "failReason": info.fail_reason if info.state is IndexState.FAILED else "",
        "minIndexVersion": 0,
        "maxIndexVersion": 0,
        "indexParams": pairs(known | params),
    }
