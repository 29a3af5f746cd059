"""The API's description (OpenAPI 3.1), made from the table of routes, so that it cannot say anything else."""

from __future__ import annotations

from typing import Any, Final

from node.api.collections import VERSION
from node.api.faults import FAULTS
from node.api.requests import CBOR, JSON, Field, Kind, Shape
from node.api.routes import ROUTES, Route

_TYPES: Final[dict[Kind, dict[str, Any]]] = {
    Kind.TEXT: {"type": "string"},
    Kind.BOOL: {"type": "boolean"},
    Kind.INT32: {"type": "integer", "minimum": -(1 << 31), "maximum": (1 << 31) - 1},
    Kind.INT64: {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1},
    Kind.TEXTS: {"type": "array", "items": {"type": "string"}},
    Kind.INTS: {"type": "array", "items": {"type": "integer"}},
    Kind.MAP: {"type": "object", "additionalProperties": True},
}
_HEADERS: Final = (
    ("DB-Name", "string", "database, when the body names none"),
    ("Request-Timeout", "integer", "seconds this request may take"),
    ("Annulus-Session", "string", "what an answer's header of this name said: the read sees at least that much"),
    ("Annulus-Snapshot", "string", "what a read's answer said: the read sees exactly what that one saw, for paging"),
    ("Annulus-Idempotency-Key", "string", "names a change of the catalogue: its repeats are answered, not made again"),
    ("X-Request-Id", "string", "id to find the request by in logs; made up if not given, and always returned"),
    ("Accept-Type-Allow-Int64", "boolean", "false: Int64 values are strings in JSON replies"),
)


def document() -> dict[str, Any]:
    """Return the description of all routes."""
    paths: dict[str, Any] = {route.full_path: {"post": _operation(route)} for route in ROUTES}
    for path, doc, media in (
        ("/healthz", "Whether the process answers.", JSON),
        ("/readyz", "Whether the node serves requests; 503 and the reason if not.", JSON),
        ("/metrics", "Counters, gauges and histograms for Prometheus.", "text/plain"),
        ("/status", "Collections, shards, segments, sizes and log positions of this node.", "application/json"),
        ("/openapi.json", "This description.", JSON),
    ):
        answers: dict[str, Any] = {"200": {"description": doc, "content": {media: {}}}}
        if path == "/readyz":
            answers["503"] = {"description": "Not ready.", "content": {media: {}}}
        paths[path] = {"get": {"operationId": path.strip("/").replace(".", "_"), "summary": doc, "responses": answers}}
    paths["/cluster/check"] = {
        method: {
            "operationId": f"{method}_cluster_check",
            "summary": doc,
            "responses": {
                "200": {
                    "description": "How far it is. `finding` is running, clean, healed (what was wrong was made good), "
                    "damaged (something still is) or incomplete (a node or a replica did not answer); `nodes` has what "
                    "each node has read of its chunks, `groups` what comparing the replicas of each has shown.",
                    "content": {JSON: {}},
                },
                "503": {"description": "The node is not part of its cluster yet.", "content": {JSON: {}}},
            },
        }
        for method, doc in (
            ("post", "Begin a round of healing, or join one: all nodes read their chunks, all replicas are compared."),
            ("get", "How far the round is that was begun at this node, or what the last one found."),
        )
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Annulus",
            "version": VERSION,
            "summary": "A vector database that speaks Milvus's RESTful API v2.",
            "description": (
                "Bodies and replies are JSON or CBOR (Content-Type and Accept: application/cbor), with the same "
                "names. CBOR carries FloatVector values as byte strings of little-endian float32. The reply of a "
                "failure has a `code` other than 0 and a `message`; its HTTP status is 200 unless the server itself "
                "is at fault or the time is up."
            ),
        },
        "paths": paths,
        "components": {
            "parameters": {
                name: {"name": name, "in": "header", "description": doc, "schema": {"type": kind}}
                for name, kind, doc in _HEADERS
            },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["code", "message"],
                    "properties": {
                        "code": {
                            "type": "integer",
                            "description": "Milvus's number: "
                            + ", ".join(f"{fault.code} {kind.code}" for kind, fault in FAULTS.items()),
                        },
                        "message": {"type": "string"},
                    },
                }
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    group, *rest = route.path.strip("/").split("/")
    body = _object(route.shape)
    success = {
        "type": "object",
        "required": ["code", "data"],
        "properties": {"code": {"const": 0}, "data": {"description": route.data}, "cost": {"type": "integer"}},
    }
    answer = {"oneOf": [success, {"$ref": "#/components/schemas/Error"}]}
    operation: dict[str, Any] = {
        "operationId": "_".join([group, *rest]),
        "tags": [group],
        "summary": route.doc,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name, _, _ in _HEADERS],
        "requestBody": {"required": True, "content": {JSON: {"schema": body}, CBOR: {"schema": {}}}},
        "responses": {
            "200": {"description": f"data: {route.data}", "content": {JSON: {"schema": answer}, CBOR: {"schema": {}}}}
        },
    }
    if route.unsupported:
        operation["deprecated"] = True
        operation["description"] = f"Answers 3000: {route.unsupported}."
    return operation


def _object(shape: Shape) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {one.name: _property(one) for one in shape.fields},
        "additionalProperties": True,
    }
    if shape.required:
        schema["required"] = [one.name for one in shape.required]
    return schema


def _property(one: Field) -> dict[str, Any]:
    schema: dict[str, Any]
    if one.kind is Kind.OBJECT and one.shape is not None:
        schema = _object(one.shape)
    elif one.kind is Kind.OBJECTS and one.shape is not None:
        schema = {"type": "array", "items": _object(one.shape)}
    else:
        schema = dict(one.schema or _TYPES.get(one.kind, {}))
    if not one.required and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    if one.default not in (None, "", (), {}):
        schema["default"] = one.default
    return schema | {"description": one.doc}
