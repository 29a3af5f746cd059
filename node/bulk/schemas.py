"""Schemas: a described collection as the request that makes it again, and one that fits a sample of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson

from node.api.requests import values_of_cbor
from node.api.routes import CREATE
from node.api.schemas import collection_request
from node.bulk.parquet import Values
from node.bulk.partitions import PARTITION_NAME, PARTITIONS
from node.bulk.sources import Chunk
from storage.errors import InvalidParameter
from storage.schema import DYNAMIC_NAME, VARCHAR_BYTES_MAX, CollectionSchema, DataType, make_schema

KEY_NAMES: Final = ("id", "_id", "pk", "key")
GENERATED_NAME: Final = "auto_id"
LENGTH_MIN: Final = 64
HEADROOM: Final = 4
"""Times the longest text of a sample; twice of a whole file."""
_NUMPY_TYPES: Final = {
    "b1": DataType.BOOL, "i1": DataType.INT8, "i2": DataType.INT16, "i4": DataType.INT32, "i8": DataType.INT64,
    "u1": DataType.INT16, "u2": DataType.INT32, "u4": DataType.INT64, "u8": DataType.INT64,
    "f2": DataType.FLOAT, "f4": DataType.FLOAT, "f8": DataType.DOUBLE,
}  # fmt: skip


def create_request(
    described: Mapping[str, Any], indexes: Sequence[Mapping[str, Any]], partitions: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the body of `collections/create` that makes a collection like one that was described.

    indexes     what `indexes/describe` says of each
    partitions  names that are kept beside; making those is the caller's
    """
    fields = []
    for one in described["fields"]:
        made: dict[str, Any] = {
            "fieldName": one["name"],
            "dataType": one["type"],
            "isPrimary": one["primaryKey"],
            "isPartitionKey": one["partitionKey"],
            "isClusteringKey": one["clusteringKey"],
            "nullable": one["nullable"],
            "description": one["description"],
            "elementTypeParams": _map(one["params"]),
        }
        if "elementType" in one:
            made["elementDataType"] = one["elementType"]
        if "defaultValue" in one:
            made["defaultValue"] = next(iter(one["defaultValue"]["Data"].values()))
        fields.append(made)
    body: dict[str, Any] = {
        "collectionName": described["collectionName"],
        "description": described["description"],
        "consistencyLevel": described["consistencyLevel"],
        "properties": _map(described["properties"]),
        "params": {"shardsNum": described["shardsNum"]},
        "schema": {
            "autoID": described["autoId"],
            "enableDynamicField": described["enableDynamicField"],
            "fields": fields,
            "functions": [
                {
                    "name": one["name"],
                    "type": str(one["type"]),
                    "description": one["description"],
                    "inputFieldNames": one["inputFieldNames"],
                    "outputFieldNames": one["outputFieldNames"],
                    "params": _map(one["params"]),
                }
                for one in described.get("functions") or ()
            ],
        },
        "indexParams": [
            {
                "fieldName": one["fieldName"],
                "indexName": one["indexName"],
                "indexType": one["indexType"],
                "metricType": one["metricType"],
                "params": {
                    key: value
                    for key, value in _map(one["indexParams"]).items()
                    if key not in ("index_type", "metric_type")
                },
            }
            for one in indexes
        ],
    }
    if any(one["partitionKey"] for one in described["fields"]):
        body["params"]["partitionsNum"] = described["partitionsNum"]
    return body | ({PARTITIONS: list(partitions)} if partitions else {})


def schema_of(body: Mapping[str, Any]) -> CollectionSchema:
    """Return the schema that a `collections/create` asks for. Raises errors of bad requests."""
    request = collection_request(values_of_cbor(dict(body), CREATE))
    return make_schema(list(request.fields), dynamic=request.dynamic, functions=request.functions)


def inferred(
    name: str, sample: Chunk, *, whole: bool, primary: str = "", auto_id: bool = False, metric: str = ""
) -> dict[str, Any]:
    """Return the body of `collections/create` for a collection that takes rows like these.

    whole    whether there are no others: what lacks no value here may lack it further on
    primary  the field that is the primary key; without one `id` or alike if each row has another, else keys are given

    Raises InvalidParameter if a column's type can not be told, or there is no vector.
    """
    if not sample.rows:
        raise InvalidParameter("there are no rows to tell the schema from: make the collection first, or give --schema")
    fields: dict[str, dict[str, Any]] = {}
    for column, given in sample.columns.items():
        if column not in (DYNAMIC_NAME, PARTITION_NAME):
            fields[column] = {"fieldName": column, **_type_of(column, _read(given, sample.is_text), whole)}
    if primary and primary not in fields:
        raise InvalidParameter(f"there is no column {primary} to be the primary key; columns: {', '.join(fields)}")
    if not primary and not auto_id:
        primary = next((one for one in KEY_NAMES if one in fields and _is_key(sample, one, fields[one])), "")
    if not primary:
        primary, auto_id = GENERATED_NAME, True
        fields = {primary: {"fieldName": primary, "dataType": "Int64"}, **fields}
    key = fields[primary]
    key["isPrimary"] = True
    key.pop("nullable", None)
    if key["dataType"] in ("Int8", "Int16", "Int32"):
        key["dataType"] = "Int64"
    vectors = [one for one, made in fields.items() if DataType(made["dataType"]).is_vector]
    if not vectors:
        raise InvalidParameter(
            f"none of the columns {', '.join(fields)} holds vectors: a collection needs a vector field"
        )
    body = {
        "collectionName": name,
        "schema": {
            "autoID": auto_id,
            "enableDynamicField": DYNAMIC_NAME in sample.columns,
            "fields": list(fields.values()),
        },
        "indexParams": [
            {"fieldName": one, "indexName": one, "indexType": "AUTOINDEX"}
            | ({"metricType": metric} if metric and fields[one]["dataType"] == "FloatVector" else {})
            for one in vectors
        ],
    }
    schema_of(body)
    return body


def _map(listed: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {one["key"]: one["value"] for one in listed}


def _is_key(sample: Chunk, name: str, made: Mapping[str, Any]) -> bool:
    values = sample.columns[name]
    values = values.tolist() if isinstance(values, np.ndarray) else values
    return made["dataType"] in ("Int8", "Int16", "Int32", "Int64", "VarChar") and len({*values} - {None, ""}) == len(
        values
    )


def _read(values: Values, is_text: bool) -> Values:
    """Return text as what it may stand for: numbers, truth values, or lists and objects; else as it is."""
    if not is_text:
        return values
    given = [one for one in values if one != ""]

    def as_value(text: str) -> Any:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        return orjson.loads(text)

    try:
        read = [as_value(one) for one in given]
    except orjson.JSONDecodeError:
        return [one or None for one in values]
    if any(isinstance(one, str) for one in read):
        return [one or None for one in values]
    found = iter(read)
    return [None if one == "" else next(found) for one in values]


def _type_of(name: str, values: Values, whole: bool) -> dict[str, Any]:
    if isinstance(values, np.ndarray):
        if values.ndim == 2:
            return _vector(values) or {
                "dataType": "Array",
                "elementDataType": str(_NUMPY_TYPES[values.dtype.str[1:]]),
                "elementTypeParams": {"max_capacity": _room(values.shape[1], whole, 4096)},
            } | ({} if whole else {"nullable": True})
        made: dict[str, Any] = {"dataType": str(_NUMPY_TYPES[values.dtype.str[1:]])}
        return made if whole else made | {"nullable": True}
    given = [one for one in values if one is not None]
    kinds = set(map(type, given))
    if not given:
        raise InvalidParameter(f"column {name} has no value in the rows that were looked at: its type can not be told")
    if kinds <= {int, float} and kinds:
        made = {"dataType": "Int64" if kinds == {int} else "Double"}
    elif kinds == {bool}:
        made = {"dataType": "Bool"}
    elif kinds == {str}:
        longest = max(len(one.encode()) for one in given)
        made = {"dataType": "VarChar", "elementTypeParams": {"max_length": _room(longest, whole, VARCHAR_BYTES_MAX)}}
    elif kinds == {list}:
        vector = _list_vector(given, len(given) == len(values))
        if vector is not None:
            return vector
        made = _list_type(given, whole)
    elif kinds == {dict}:
        if len(given) == len(values) and all(map(_is_sparse, given)):
            return {"dataType": "SparseFloatVector"}
        made = {"dataType": "JSON"}
    elif bytes in kinds:
        raise InvalidParameter(
            f"column {name} holds bytes, of which type can not be told: make the collection first, or give --schema"
        )
    else:
        made = {"dataType": "JSON"}
    return made if whole and len(given) == len(values) else made | {"nullable": True}


def _vector(values: Any) -> dict[str, Any] | None:
    width = values.shape[1]
    if width < 2:
        return None
    match values.dtype.str[1:]:
        case "f2" | "f4" | "f8":
            return {"dataType": "FloatVector", "elementTypeParams": {"dim": width}}
        case "u1":
            return {"dataType": "BinaryVector", "elementTypeParams": {"dim": 8 * width}}
        case "i1":
            return {"dataType": "Int8Vector", "elementTypeParams": {"dim": width}}
    return None


def _list_vector(given: Sequence[list[Any]], everywhere: bool) -> dict[str, Any] | None:
    """Return the vector field of lists of equally many numbers, some of which are not whole."""
    width = len(given[0])
    if not everywhere or width < 2 or any(len(one) != width for one in given):
        return None
    kinds = {type(value) for one in given for value in one}
    if not kinds <= {int, float} or float not in kinds:
        return None
    return {"dataType": "FloatVector", "elementTypeParams": {"dim": width}}


def _list_type(given: Sequence[list[Any]], whole: bool) -> dict[str, Any]:
    kinds = {type(value) for one in given for value in one}
    element = {
        frozenset({int}): "Int64", frozenset({float}): "Double", frozenset({int, float}): "Double",
        frozenset({bool}): "Bool", frozenset({str}): "VarChar",
    }.get(frozenset(kinds))  # fmt: skip
    longest = max(map(len, given))
    if element is None or longest > 4096:
        return {"dataType": "JSON"}
    params = {"max_capacity": _room(longest, whole, 4096)}
    if element == "VarChar":
        longest = max(len(value.encode()) for one in given for value in one)
        params["max_length"] = _room(longest, whole, VARCHAR_BYTES_MAX)
    return {"dataType": "Array", "elementDataType": element, "elementTypeParams": params}


def _is_sparse(value: Mapping[str, Any]) -> bool:
    if value.keys() == {"indices", "values"}:
        return True
    return bool(value) and all(str(key).isdigit() and type(weight) in (int, float) for key, weight in value.items())


def _room(longest: int, whole: bool, most: int) -> int:
    wanted = longest * (2 if whole else HEADROOM)
    return min(most, max(LENGTH_MIN, 1 << max(0, wanted - 1).bit_length()))
