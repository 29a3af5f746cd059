"""The description of the API against the routes that are really there."""

from __future__ import annotations

from typing import Any

import jsonschema
import openapi_spec_validator

from node.api.openapi import document
from node.api.requests import Kind, Shape
from node.api.routes import ROUTES
from node.api.server import _HANDLERS
from tests.node.api.fake import Client, serve


def test_the_document_is_valid_openapi() -> None:
    """The description satisfies the specification's own schema."""
    openapi_spec_validator.validate(document())


def test_every_request_schema_is_a_json_schema() -> None:
    """Each body's schema is valid JSON schema, and takes a body that the server takes."""
    for path, item in document()["paths"].items():
        if "requestBody" in item.get("post", {}):
            schema = item["post"]["requestBody"]["content"]["application/json"]["schema"]
            jsonschema.Draft202012Validator.check_schema(schema)
            assert schema["type"] == "object", path


def test_the_document_has_exactly_the_routes() -> None:
    """Every route that the application serves is described, and nothing else."""

    async def script(client: Client) -> None:
        assert client.http.server is not None
        app = client.http.app
        assert app is not None
        served = {
            (route.method.lower(), route.resource.canonical)
            for route in app.router.routes()
            if route.resource is not None and route.method not in ("HEAD", "*")
        }
        async with client.http.get("/openapi.json") as response:
            described = await response.json()
        assert served == {(method, path) for path, item in described["paths"].items() for method in item}

    serve(script)


def test_the_table_of_routes_is_sound() -> None:
    """Paths are unique; each route has a handler or a reason, each handler a route, each field a sound shape."""
    assert len({route.path for route in ROUTES}) == len(ROUTES)
    assert {route.handler for route in ROUTES if route.handler} == set(_HANDLERS)
    assert all(bool(route.handler) != bool(route.unsupported) for route in ROUTES)

    def check(shape: Shape) -> None:
        assert len(shape.folded) + sum(one.kind is Kind.RAW for one in shape.fields) == len(shape.fields), shape.name
        for one in shape.fields:
            assert one.doc
            assert not (one.required and one.default), one.name
            assert (one.kind in (Kind.OBJECT, Kind.OBJECTS)) == (one.shape is not None)
            assert (one.kind is Kind.RAW) == (one.schema is not None)
            if one.shape is not None:
                check(one.shape)

    for route in ROUTES:
        check(route.shape)


def test_bodies_fit_their_described_schemas() -> None:
    """Bodies that clients really send validate against the description."""
    paths = document()["paths"]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/entities/search", {"collectionName": "c", "data": [[1, 2.5]], "limit": 3, "dbName": None}),
        ("/entities/insert", {"collectionName": "c", "data": [{"id": 1, "vector": [1, 2]}]}),
        ("/entities/get", {"collectionName": "c", "id": [1, "2"]}),
        ("/collections/create", {"collectionName": "c", "dimension": 8, "params": {"shardsNum": "2"}}),
        (
            "/collections/create",
            {
                "collectionName": "c",
                "schema": {"autoID": True, "fields": [{"fieldName": "id", "dataType": "Int64", "isPrimary": True}]},
                "indexParams": [{"fieldName": "v", "metricType": "L2", "params": {"M": 16}}],
            },
        ),
    ]
    for path, body in bodies:
        schema = paths[f"/v2/vectordb{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, schema)
