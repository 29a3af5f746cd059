"""Milvus's RESTful API v2 as its clients know it: codes, texts, defaults and limits.

Sections in the claims are those of the public documentation: collection operations, data operations, limits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from node.service import Consistency
from storage.schema import DataType, FieldSchema
from storage.types import FieldId
from tests.node.api.fake import Client, serve

QUICK = {"collectionName": "c", "dimension": 2}


def field(name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"fieldName": name, "dataType": kind, **more}


ID = field("id", "Int64", isPrimary=True)
VECTOR = field("v", "FloatVector", elementTypeParams={"dim": "4"})


def schema(*fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"collectionName": "c", "schema": {"fields": [ID, VECTOR, *fields], **more}}


async def described(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    reply = await client.post("/collections/create", body)
    assert reply == {"code": 0, "data": {}}, reply
    reply = await client.post("/collections/describe", {"collectionName": "c"})
    assert reply["code"] == 0 and reply["message"] == ""
    data: dict[str, Any] = reply["data"]
    return data


# --- collections -------------------------------------------------------------------------------------------------


def test_quick_create() -> None:
    """A dimension is enough: id, vector, COSINE AUTOINDEX named like the vector, dynamic field on, loaded."""

    async def script(client: Client) -> None:
        data = await described(client, QUICK)
        assert [(one["name"], one["type"], one["id"], one["primaryKey"]) for one in data["fields"]] == [
            ("id", "Int64", 100, True),
            ("vector", "FloatVector", 101, False),
        ]
        assert data["fields"][1]["params"] == [{"key": "dim", "value": "2"}]
        assert data["indexes"] == [{"indexName": "vector", "fieldName": "vector", "metricType": "COSINE"}]
        assert (data["enableDynamicField"], data["load"], data["autoId"]) == (True, "LoadStateLoaded", False)
        assert (data["shardsNum"], data["consistencyLevel"]) == (1, "Bounded")
        assert set(data) == set(
            "collectionName collectionID description autoId fields structFields functions aliases indexes load "
            "shardsNum partitionsNum consistencyLevel enableDynamicField externalSource externalSpec properties".split()
        )

    serve(script)


def test_quick_create_options() -> None:
    """Names, key type, metric, autoID (also spelled autoId), shards, TTL and consistency are taken."""

    async def script(client: Client) -> None:
        data = await described(
            client,
            QUICK
            | {
                "idType": "Varchar",
                "autoId": True,
                "primaryFieldName": "pk",
                "vectorFieldName": "emb",
                "metricType": "L2",
                "description": "words",
                "params": {
                    "max_length": 64,
                    "enableDynamicField": "False",
                    "shardsNum": "2",
                    "ttlSeconds": 60,
                    "consistencyLevel": "Strong",
                    "partitionKeyIsolation": True,
                },
            },
        )
        assert [(one["name"], one["type"]) for one in data["fields"]] == [("pk", "VarChar"), ("emb", "FloatVector")]
        assert data["fields"][0]["params"] == [{"key": "max_length", "value": "64"}]
        assert data["indexes"] == [{"indexName": "emb", "fieldName": "emb", "metricType": "L2"}]
        assert (data["autoId"], data["enableDynamicField"], data["shardsNum"]) == (True, False, 2)
        assert (data["description"], data["consistencyLevel"]) == ("words", "Strong")
        assert {one["key"]: one["value"] for one in data["properties"]} == {
            "collection.ttl.seconds": "60",
            "partitionkey.isolation": "true",
        }

    serve(script)


QUICK_REFUSED = [
    ({"dimension": None}, 1802, "dimension is required"),
    ({"vectorFieldType": "Vector"}, 1100, "vectorFieldType can only be"),
    ({"vectorFieldType": "SparseFloatVector"}, 1100, "dimension should not be specified for SparseFloatVector quick"),
    ({"vectorFieldType": "SparseFloatVector", "metricType": "L2"}, 1100, "only IP&BM25 is the supported metric type"),
    ({"vectorFieldType": "BinaryVector", "metricType": "L2"}, 1100, "binary vector index does not support metric type"),
    ({"vectorFieldType": "BinaryVector"}, 1100, "should be in range 8 ~"),
    ({"metricType": "HAMMING"}, 1100, "float vector index does not support metric type"),
    ({"idType": "Float"}, 1100, "idType can only be"),
    ({"idType": "VarChar"}, 1100, "max_length"),
    ({"idType": "VarChar", "params": {"max_length": "x"}}, 1100, "max_length should be an integer"),
    ({"dimension": 1}, 1100, "invalid dimension: 1"),
    ({"dimension": "2"}, 1801, "cannot unmarshal string into Go struct field CollectionReq.dimension of type int32"),
    ({"autoID": 1}, 1801, "CollectionReq.autoID of type bool"),
    ({"consistencyLevel": "strong"}, 1100, "consistencyLevel can only be [Strong, Session, Bounded, Eventually, Cust"),
    ({"consistencyLevel": "Strong", "params": {"consistencyLevel": "Bounded"}}, 1100, "consistencyLevel"),
    ({"params": {"enableDynamicField": "maybe"}}, 1100, "enableDynamicField"),
    ({"params": {"shardsNum": 17}}, 1100, "shardsNum"),
    ({"params": {"partitionsNum": 4}}, 1100, "partition key"),
    ({"params": {"ttlSeconds": 5}, "properties": {"ttl.seconds": 5}}, 1100, "TTL"),
    ({"properties": {"ttl.seconds": 5, "collection.ttl.seconds": 5}}, 1100, "TTL"),
    ({"params": {"ttlField": "t"}}, 3000, "ttlField"),
    ({"description": "x" * 1025}, 1100, "description"),
]


@pytest.mark.parametrize(("more", "code", "words"), QUICK_REFUSED)
def test_quick_create_refusals(more: dict[str, Any], code: int, words: str) -> None:
    """What quick create cannot make is refused with the words that clients look for."""

    async def script(client: Client) -> None:
        reply = await client.post("/collections/create", QUICK | more)
        assert reply["code"] == code, reply
        assert words in reply["message"]
        assert "data" not in reply

    serve(script)


def test_create_with_a_schema() -> None:
    """Fields, defaults, nullability, arrays, keys and indexes; with indexes it is loaded, without it is not."""

    async def script(client: Client) -> None:
        body = schema(
            field("user", "VarChar", isPartitionKey=True, elementTypeParams={"max_length": 20}),
            field("book", "VarChar", nullable=True, defaultValue="8888", elementTypeParams={"max_length": "20"}),
            field("n", "Int32", defaultValue=5.0, isClusteringKey=True),
            field("tags", "Array", elementDataType="Int8", elementTypeParams={"max_capacity": 5, "mmap.enabled": True}),
            autoID=True,
        )
        data = await described(client, body | {"params": {"partitionsNum": 8}})
        by_name = {one["name"]: one for one in data["fields"]}
        assert [one["id"] for one in data["fields"]] == [100, 101, 102, 103, 104, 105]
        assert by_name["id"]["autoId"] and data["autoId"]
        assert by_name["user"]["partitionKey"] and by_name["n"]["clusteringKey"] and by_name["book"]["nullable"]
        assert by_name["book"]["defaultValue"] == {"Data": {"StringData": "8888"}}
        assert by_name["n"]["defaultValue"] == {"Data": {"IntData": 5}}
        assert by_name["tags"]["elementType"] == "Int8"
        assert {"key": "mmap.enabled", "value": "true"} in by_name["tags"]["params"]
        assert (data["enableDynamicField"], data["load"], data["indexes"]) == (False, "LoadStateNotLoad", [])
        index = {"fieldName": "v", "params": {"index_type": "HNSW", "metric_type": "L2", "M": 16}}
        data = await described(client, body | {"indexParams": [index]})
        assert data["load"] == "LoadStateLoaded"
        reply = await client.post("/indexes/describe", {"collectionName": "c", "indexName": "v"})
        (shown,) = reply["data"]
        assert (shown["indexType"], shown["metricType"], shown["indexState"]) == ("HNSW", "L2", "Finished")
        assert {"key": "M", "value": "16"} in shown["indexParams"]
        assert (shown["totalRows"], shown["pendingRows"], shown["indexedRows"]) == (5, 0, 5)

    serve(script)


SCHEMA_REFUSED = [
    (schema(field("a", "Json")), 1100, "data type Json is invalid(case sensitive)"),
    (schema({"fieldName": "a"}), 1100, "data type  is invalid(case sensitive)"),
    (schema(field("a", "BinaryVector")), 1100, "invalid dimension: 0"),
    (schema(field("a", "Geometry")), 1100, "not supported"),
    (schema(field("a", "VarChar")), 1100, "max_length"),
    (schema(field("a", "VarChar", elementTypeParams={"max_length": 65536})), 1100, "maximum length"),
    (schema(field("a", "Array", elementDataType="JSON", elementTypeParams={"max_capacity": 1})), 1100, "element"),
    (schema(field("a", "Array", elementTypeParams={"max_capacity": 1})), 1100, "is invalid"),
    (schema(field("a", "Int64", isPrimary=True)), 1100, "primary key"),
    (schema(field("a", "JSON", defaultValue={})), 1100, "convert defaultValue fail"),
    (schema(field("a", "Array", elementDataType="Int8", defaultValue=[1])), 1100, "convert defaultValue fail"),
    (schema(field("a", "Int8", defaultValue=300)), 1100, "convert defaultValue fail"),
    (schema(field("a", "Float", defaultValue=1e39)), 1100, "convert defaultValue fail"),
    (schema(field("a b", "Int8")), 1100, "Invalid field name"),
    (schema(field("$meta", "Int8")), 1100, "Invalid field name"),
    (schema(field("a", "Int64", isPartitionKey=True, nullable=True)), 1100, "partition key field not support nullable"),
    (schema(enableDynamicField=1), 1801, "CollectionReq.schema.enableDynamicField of type bool"),
    (schema(field("a", "Int8", nullable="x")), 1801, "CollectionReq.schema.fields.nullable of type bool"),
    (schema(functions=[{"name": "f", "type": "MinHash"}]), 3000, "function f: type MinHash"),
    (schema() | {"indexParams": [{"fieldName": "x"}]}, 1802, "`x` hasn't defined in schema"),
    (schema() | {"indexParams": {}}, 1801, "indexParams"),
    ({"collectionName": "c", "schema": {"fields": [ID]}}, 1100, "vector field"),
    ({"collectionName": "c", "schema": {"fields": [ID | {"defaultValue": 5}, VECTOR]}}, 1100, "default_value"),
    ({"collectionName": "c", "schema": []}, 1801, "cannot unmarshal array into Go struct field CollectionReq.schema"),
    (
        {"schema": {"fields": [ID, VECTOR]}},
        1802,
        "Key: 'CollectionReq.CollectionName' Error:Field validation for 'Coll",
    ),
]


@pytest.mark.parametrize(("body", "code", "words"), SCHEMA_REFUSED)
def test_schema_refusals(body: dict[str, Any], code: int, words: str) -> None:
    """A schema at fault is refused with the field and the words that clients look for; nothing is created."""

    async def script(client: Client) -> None:
        reply = await client.post("/collections/create", body)
        assert reply["code"] == code, reply
        assert words in reply["message"]
        assert (await client.post("/collections/list", {}))["data"] == []

    serve(script)


def test_fields_come_and_go() -> None:
    """A field that is added shows with the next id; a dropped one does not show, and its id is not given again; lengths
    and capacities grow, with numbers as well as text (collections/fields)."""

    async def script(client: Client) -> None:
        await described(client, schema(field("t", "VarChar", elementTypeParams={"max_length": 8})))
        names = {"collectionName": "c"}
        texts = field(
            "tags", "Array", elementDataType="VarChar", nullable=True,
            elementTypeParams={"max_length": "8", "max_capacity": 2},
        )  # fmt: skip
        for path, body in (
            ("add", {"schema": field("year", "Int32", nullable=True)}),
            ("add", {"schema": field("lent", "Bool", defaultValue=False, description="words")}),
            ("drop", {"fieldName": "year"}),
            ("add", {"schema": field("year", "Float", nullable=True, defaultValue=1.5)}),
            ("add", {"schema": texts}),
            ("drop", {"fieldId": 104}),
            ("alter_properties", {"fieldName": "t", "fieldParams": {"max_length": 9}}),
            ("alter_properties", {"fieldName": "tags", "fieldParams": {"max_capacity": "3", "mmap.enabled": True}}),
        ):
            reply = await client.post(f"/collections/fields/{path}", names | body)
            assert reply == {"code": 0, "data": {}}, (path, body, reply)
        data = (await client.post("/collections/describe", names))["data"]
        shown = {one["name"]: one for one in data["fields"]}
        assert {name: one["id"] for name, one in shown.items()} == {
            "id": 100,
            "v": 101,
            "t": 102,
            "year": 105,
            "tags": 106,
        }
        assert shown["t"]["params"] == [{"key": "max_length", "value": "9"}]
        assert {one["key"]: one["value"] for one in shown["tags"]["params"]} == {
            "max_length": "8",
            "max_capacity": "3",
            "mmap.enabled": "true",
        }
        assert (shown["year"]["type"], shown["year"]["nullable"]) == ("Float", True)
        assert shown["year"]["defaultValue"] == {"Data": {"FloatData": 1.5}}

    serve(script)


@pytest.mark.parametrize("route", ["insert", "upsert"])
def test_rows_are_decoded_again_when_a_key_becomes_a_field(route: str) -> None:
    """A row that was on its way when the schema changed has its value in the field, checked, not among the dynamic
    keys; one that does not fit is refused then."""

    async def script(client: Client) -> None:
        assert (await client.post("/collections/create", QUICK))["code"] == 0
        service, row = client.service, {"id": 1, "vector": [1, 2], "year": 7}

        async def change() -> None:
            service.before = None
            await service.add_field("default", "c", FieldSchema("year", DataType.INT8, nullable=True))

        service.before = change
        reply = await client.post(f"/entities/{route}", {"collectionName": "c", "data": [row]})
        assert reply["code"] == 0 and reply["data"][f"{route}Count"] == 1
        (batch,) = service.find("default", "c").rows
        assert batch.columns[FieldId(103)].to_list() == [7] and batch.columns[FieldId(102)].to_list() == ["{}"]

        async def change_again() -> None:
            service.before = None
            await service.add_field("default", "c", FieldSchema("more", DataType.INT8, nullable=True))

        service.before = change_again
        reply = await client.post(f"/entities/{route}", {"collectionName": "c", "data": [row | {"more": "text"}]})
        assert reply["code"] == 1804 and "field 'more'" in reply["message"]
        assert len(service.find("default", "c").rows) == 1

    serve(script)


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("add", {}, 1802, "Schema"),
        ("add", {"schema": {"dataType": "Int64", "nullable": True}}, 1802, "FieldName"),
        ("add", {"schema": {"fieldName": "n", "nullable": True}}, 1802, "DataType"),
        ("add", {"schema": field("n", "int64", nullable=True)}, 1100, "invalid(case sensitive)"),
        ("add", {"schema": field("n", "Int64")}, 1100, "added field must be nullable"),
        ("add", {"schema": field("n", "FloatVector", elementTypeParams={"dim": 2})}, 1100, "add vector field"),
        ("add", {"schema": field("n", "Int64", isPrimary=True)}, 1100, "add pk field"),
        ("add", {"schema": field("n", "Int8", defaultValue=128)}, 1100, "does not take 128"),
        ("add", {"schema": field("t", "Int64", nullable=True)}, 1100, "duplicate field name: t"),
        ("add", {"schema": field("n", "VarChar", nullable=True)}, 1100, "max_length"),
        ("drop", {}, 1802, "exactly one of fieldName and fieldId"),
        ("drop", {"fieldName": "t", "fieldId": 102}, 1802, "exactly one of fieldName and fieldId"),
        ("drop", {"fieldId": -1}, 1802, "exactly one of fieldName and fieldId"),
        ("drop", {"fieldName": "n"}, 1700, "field n not exist"),
        ("drop", {"fieldId": 999}, 1700, "id 999 not exist"),
        ("drop", {"fieldName": "id"}, 1100, "the primary key"),
        ("drop", {"fieldName": "v"}, 1100, "the only vector field"),
        ("alter_properties", {"fieldParams": {"max_length": 9}}, 1802, "FieldName"),
        ("alter_properties", {"fieldName": "t"}, 1802, "fieldParams"),
        ("alter_properties", {"fieldName": "t", "fieldParams": {"max_length": 7}}, 1100, "can only grow"),
        ("alter_properties", {"fieldName": "t", "fieldParams": {"nullable": True}}, 1100, "can not be altered"),
        ("alter_properties", {"fieldName": "n", "fieldParams": {"max_length": 9}}, 1700, "field n not exist"),
    ],
)
def test_fields_refused(path: str, body: dict[str, Any], code: int, words: str) -> None:
    """What cannot be changed is refused with Milvus's codes, and the collection stays as it was."""

    async def script(client: Client) -> None:
        before = await described(client, schema(field("t", "VarChar", elementTypeParams={"max_length": 8})))
        reply = await client.post(f"/collections/fields/{path}", {"collectionName": "c", **body})
        assert reply["code"] == code and words in reply["message"], reply
        assert (await client.post("/collections/describe", {"collectionName": "c"}))["data"] == before

    serve(script)


def test_administration() -> None:
    """Each route of databases, collections, partitions, indexes and aliases answers in its shape."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", QUICK)
        c = {"collectionName": "c"}
        ok: dict[str, Any] = {}
        steps: list[tuple[str, dict[str, Any], Any]] = [
            ("/collections/has", c, {"has": True}),
            ("/collections/has", {"collectionName": "none"}, {"has": False}),
            ("/collections/list", {}, ["c"]),
            ("/collections/get_stats", c, {"rowCount": 0}),
            ("/collections/get_load_state", c, {"loadState": "LoadStateLoaded", "loadProgress": 100}),
            ("/collections/release", c, ok),
            ("/collections/get_load_state", c, {"loadState": "LoadStateNotLoad"}),
            ("/collections/load", c, ok),
            ("/collections/refresh_load", c, ok),
            ("/collections/flush", c, ok),
            ("/collections/compact", c, {"compactionID": 5}),
            (
                "/collections/get_compaction_state",
                {"jobID": 5},
                {
                    "compactionID": 5,
                    "state": "Completed",
                    "executingPlanNumber": 0,
                    "timeoutPlanNumber": 0,
                    "completedPlanNumber": 1,
                },
            ),
            ("/collections/alter_properties", c | {"properties": {"mmap.enabled": True}}, ok),
            ("/collections/drop_properties", c | {"propertyKeys": ["mmap.enabled"]}, ok),
            ("/collections/truncate", c, ok),
            ("/partitions/create", c | {"partitionName": "p"}, ok),
            ("/partitions/list", c, ["_default", "p"]),
            ("/partitions/has", c | {"partitionName": "p"}, {"has": True}),
            ("/partitions/get_stats", c | {"partitionName": "p"}, {"rowCount": 0}),
            ("/partitions/load", c | {"partitionNames": ["p"]}, ok),
            ("/partitions/release", c | {"partitionNames": ["p"]}, ok),
            ("/partitions/drop", c | {"partitionName": "p"}, ok),
            ("/indexes/list", c, ["vector"]),
            ("/indexes/alter_properties", c | {"indexName": "vector", "properties": {"mmap.enabled": True}}, ok),
            ("/indexes/drop_properties", c | {"indexName": "vector", "propertyKeys": ["mmap.enabled"]}, ok),
            ("/indexes/drop", c | {"indexName": "vector"}, ok),
            ("/indexes/list", c, []),
            ("/indexes/create", c | {"indexParams": [{"fieldName": "vector", "indexName": "i"}]}, ok),
            ("/indexes/list", c, ["i"]),
            ("/aliases/create", c | {"aliasName": "a"}, ok),
            ("/aliases/list", {}, ["a"]),
            ("/aliases/describe", {"aliasName": "a"}, {"dbName": "default", "collectionName": "c", "aliasName": "a"}),
            ("/aliases/alter", c | {"aliasName": "a"}, ok),
            ("/aliases/drop", {"aliasName": "a"}, ok),
            ("/collections/rename", c | {"newCollectionName": "d"}, ok),
            ("/collections/list", {}, ["d"]),
            ("/collections/drop", {"collectionName": "d"}, ok),
            ("/collections/drop", {"collectionName": "d"}, ok),
            ("/databases/create", {"dbName": "b", "properties": {"x": 1}}, ok),
            ("/databases/list", {}, ["default", "b"]),
            ("/databases/alter", {"dbName": "b", "properties": {"y": "z"}}, ok),
            ("/databases/drop_properties", {"dbName": "b", "propertyKeys": ["x"]}, ok),
            (
                "/databases/describe",
                {"dbName": "b"},
                {"dbName": "b", "dbID": 1, "properties": [{"key": "y", "value": "z"}]},
            ),
            ("/databases/drop", {"dbName": "b"}, ok),
            ("/databases/drop", {"dbName": "b"}, ok),
            ("/segments/describe", {"collectionID": 7, "segmentIDs": [1]}, None),
            ("/server/version", {}, None),
        ]
        for path, body, expected in steps:
            reply = await client.post(path, body)
            assert reply["code"] == 0, (path, reply)
            assert expected is None or reply["data"] == expected, path

    serve(script)


NOT_FOUND = [
    ("/collections/describe", {}, 100, "can't find collection[database=default][collection=none]"),
    ("/entities/insert", {"data": [{}]}, 100, "can't find collection[database=default][collection=none]"),
    ("/entities/upsert", {"data": [{}]}, 100, "can't find collection"),
    ("/entities/delete", {"filter": "id == 1"}, 100, "can't find collection"),
    ("/entities/search", {"data": [[1]]}, 100, "can't find collection"),
    ("/entities/query", {}, 100, "can't find collection"),
    ("/entities/get", {"id": 1}, 100, "can't find collection"),
    ("/collections/get_load_state", {}, 100, "can't find collection"),
    ("/entities/insert", {"data": [{}], "dbName": "none"}, 800, "database not found"),
    ("/aliases/describe", {"aliasName": "none"}, 1600, "alias not found"),
    ("/partitions/load", {"partitionNames": None}, 1802, "'PartitionNames' failed on the 'required' tag"),
    ("/indexes/create", {"indexParams": None}, 1802, "'IndexParams' failed on the 'required' tag"),
    ("/collections/alter_properties", {}, 1802, "properties"),
]


@pytest.mark.parametrize(("path", "body", "code", "words"), NOT_FOUND)
def test_what_is_not_there(path: str, body: dict[str, Any], code: int, words: str) -> None:
    """Each route says with its code what it did not find."""

    async def script(client: Client) -> None:
        reply = await client.post(path, {"collectionName": "none"} | body)
        assert (reply["code"], words in reply["message"]) == (code, True), reply

    serve(script)


# --- rows --------------------------------------------------------------------------------------------------------


async def filled(client: Client) -> None:
    await client.post("/collections/create", QUICK)
    rows = [{"id": i, "vector": [i, 0], "word": f"w{i}"} for i in range(5)]
    reply = await client.post("/entities/insert", {"collectionName": "c", "data": rows})
    assert reply == {"code": 0, "cost": 0, "data": {"insertCount": 5, "insertIds": [0, 1, 2, 3, 4]}}


WRITES_REFUSED = [
    ("/entities/insert", {}, 1802, "'Data' failed on the 'required' tag"),
    ("/entities/insert", {"data": None}, 1802, "required"),
    ("/entities/insert", {"data": []}, 1804, "missing required parameters"),
    ("/entities/insert", {"data": "x"}, 1801, "json format"),
    ("/entities/insert", {"DATA": [{"id": 1, "vector": [1, 2]}]}, 1802, "required"),
    ("/entities/insert", {"data": [{"id": 1, "vector": [1]}]}, 1804, "fail to deal the insert data, error: row 0"),
    ("/entities/insert", {"data": [{"id": 1}]}, 1804, "field 'vector'"),
    ("/entities/insert", {"data": [{"id": 1.5, "vector": [1, 2]}]}, 1804, "1.5 is not a whole number"),
    ("/entities/insert", {"data": [{"id": 1, "vector": [1, 2], "$meta": {}}]}, 1804, "$meta"),
    ("/entities/upsert", {"data": [{"vector": [1, 2]}]}, 1804, "field 'id'"),
    ("/entities/upsert", {"data": [{"id": 1}], "fieldOps": [{"fieldName": "x", "op": "ARRAY_APPEND"}]}, 3000, "ARRAY"),
    ("/entities/delete", {}, 1802, "'Filter' failed on the 'required' tag"),
    ("/entities/delete", {"id": [1]}, 1802, "'Filter' failed on the 'required' tag"),
    ("/entities/delete", {"filter": "bad"}, 1100, "failed to create delete plan: cannot parse expression"),
    ("/entities/query", {"filter": "bad"}, 1100, "failed to create query plan: cannot parse expression"),
    ("/entities/query", {"limit": 0}, 1100, "empty expression should be used with limit"),
    ("/entities/query", {"limit": 16385}, 1100, "invalid max query result window"),
    ("/entities/query", {"limit": 16384, "offset": 1}, 1100, "should be in range [1, 16384], but got 16385"),
    ("/entities/query", {"limit": -1}, 1100, "invalid max query result window"),
    ("/entities/query", {"orderByFields": ["id:up"]}, 1100, "invalid order direction"),
    ("/entities/query", {"consistencyLevel": "x"}, 1100, "consistencyLevel can only be"),
    ("/entities/get", {}, 1802, "required"),
    ("/entities/get", {"id": "abc"}, 1806, "please check the primary key and its' type can only in [int, string]"),
    ("/entities/get", {"id": [1.5]}, 1806, "please check the primary key"),
    ("/entities/get", {"id": [True]}, 1806, "please check the primary key"),
    ("/entities/get", {"id": {}}, 1806, "please check the primary key"),
    ("/entities/get", {"id": [None]}, 1806, "please check the primary key"),
    ("/entities/get", {"id": 9223372036854775808}, 1806, "please check the primary key"),
]


@pytest.mark.parametrize(("path", "body", "code", "words"), WRITES_REFUSED)
def test_rows_refused(path: str, body: dict[str, Any], code: int, words: str) -> None:
    """Requests at fault have their code and words, and change nothing."""

    async def script(client: Client) -> None:
        await filled(client)
        reply = await client.post(path, {"collectionName": "c"} | body)
        assert (reply["code"], words in reply["message"]) == (code, True), reply
        count = await client.post("/entities/query", {"collectionName": "c", "outputFields": ["count(*)"]})
        assert count["data"] == [{"count(*)": 5}]

    serve(script)


def test_reading_rows() -> None:
    """get and query give whole rows by default, keys always, dynamic keys flattened, Int64 as text when asked."""

    async def script(client: Client) -> None:
        await filled(client)
        c = {"collectionName": "c"}
        row = {"id": 3, "vector": [3, 0], "word": "w3"}
        for key in (3, "3", [3], ["3", 99]):
            assert (await client.post("/entities/get", c | {"id": key}))["data"] == [row]
        assert (await client.post("/entities/get", c | {"id": []}))["data"] == []
        reply = await client.post("/entities/query", c | {"filter": "id == 3"})
        assert reply == {"code": 0, "cost": 0, "data": [row]}
        reply = await client.post("/entities/query", c | {"filter": "id == 3", "outputFields": ["word"]})
        assert reply["data"] == [{"id": 3, "word": "w3"}]
        reply = await client.post("/entities/query", c | {"filter": "id == 3"}, Accept_Type_Allow_Int64="false")
        assert reply["data"] == [row | {"id": "3"}]
        reply = await client.post("/entities/query", c | {"filter": "id == 3"}, Accept_Type_Allow_Int64="perhaps")
        assert reply["data"] == [row]
        await client.post("/entities/query", c | {"filter": "x", "limit": 0, "consistencyLevel": "Strong"})
        options, limit, offset = client.service.queried[-1]
        assert (limit, offset, options.consistency) == (0, 0, Consistency.STRONG)
        await client.post("/entities/query", c)
        options, limit, offset = client.service.queried[-1]
        assert (limit, offset, options.consistency, options.output_fields) == (100, 0, None, ("*",))

    serve(script)


def test_upsert_and_delete() -> None:
    """Their counts have their own names."""

    async def script(client: Client) -> None:
        await filled(client)
        body = {"collectionName": "c", "data": {"id": 7, "vector": [1, 2]}}
        reply = await client.post("/entities/upsert", body)
        assert reply == {"code": 0, "cost": 0, "data": {"upsertCount": 1, "upsertIds": [7]}}
        partial = {"collectionName": "c", "data": [{"id": 7, "x": None}], "partialUpdate": True}
        assert (await client.post("/entities/upsert", partial))["code"] == 0
        kept = client.service.collections["default", "c"]
        assert set(kept.partial[-1].columns) == {100, 102}
        reply = await client.post("/entities/delete", {"collectionName": "c", "filter": "id == 7"})
        assert reply == {"code": 0, "cost": 0, "data": {"deleteCount": 1}}

    serve(script)


# --- search ------------------------------------------------------------------------------------------------------


def test_search() -> None:
    """Hits of all queries in order with their distances; only key and distance unless fields are asked for."""

    async def script(client: Client) -> None:
        await filled(client)
        body = {"collectionName": "c", "data": [[0, 0], [4, 0]], "limit": 2}
        reply = await client.post("/entities/search", body)
        assert reply == {
            "code": 0,
            "cost": 0,
            "data": [
                {"id": 0, "distance": 0.0},
                {"id": 1, "distance": 1.0},
                {"id": 4, "distance": 0.0},
                {"id": 3, "distance": 1.0},
            ],
            "topks": [2, 2],
        }
        reply = await client.post("/entities/search", body | {"data": [[0, 0]], "outputFields": ["*"], "offset": 1})
        assert reply["data"][0] == {"id": 1, "vector": [1, 0], "word": "w1", "distance": 1.0}
        assert (await client.post("/entities/search", body | {"data": [[0, 0]], "offset": 9}))["data"] == []

    serve(script)


def test_search_with_many_vectors() -> None:
    """Up to 16384 query vectors are one search; more, or one of them unfit, are refused."""

    async def script(client: Client) -> None:
        await filled(client)
        body: dict[str, Any] = {"collectionName": "c", "limit": 1, "data": [[i % 5, 0.25] for i in range(16384)]}
        reply = await client.post("/entities/search", body)
        assert [row["id"] for row in reply["data"]] == [i % 5 for i in range(16384)]
        assert reply["topks"] == [1] * 16384
        reply = await client.post("/entities/search", body | {"data": [*body["data"], [1, 2]]})
        assert (reply["code"], "nq [16385] is invalid" in reply["message"]) == (1100, True)
        for unfit in ([1], [1, None], "x", [1, 1e39]):
            reply = await client.post("/entities/search", body | {"data": [*body["data"][:16383], unfit]})
            assert reply["code"] == 1801

    serve(script)


def test_search_parameters() -> None:
    """Flat and nested parameters mean the same; the server's own ones are taken out; the rest goes on as given."""

    async def script(client: Client) -> None:
        await filled(client)
        body = {"collectionName": "c", "data": [[0, 0]]}
        for params in (
            {"metricType": "L2", "ef": 64, "ignoreGrowing": True, "round_decimal": 3, "radius": 1.5, "hints": "x"},
            {"params": {"metric_type": "L2", "ef": 64, "ignore_growing": "true", "round_decimal": "3", "radius": 1.5}},
            {
                "ef": 64,
                "metricType": "L2",
                "params": {"ef": 64, "ignore_growing": 1, "round_decimal": 3, "radius": 1.5},
            },
        ):
            assert (await client.post("/entities/search", body | {"searchParams": params}))["code"] == 0
            request, options = client.service.searched[-1]
            assert (request.metric_type, request.params, request.round_decimal) == ("L2", {"ef": 64, "radius": 1.5}, 3)
            assert options.ignore_growing
        await client.post("/entities/search", body | {"params": {"ef": 7}, "annsField": "vector", "limit": 5})
        request, options = client.service.searched[-1]
        assert (request.params, request.limit, request.anns_field) == ({"ef": 7}, 5, "vector")
        assert (options.output_fields, options.ignore_growing) == ((), False)
        await client.post("/entities/search", {"collectionName": "c", "ids": [1, "2"]})
        request, _ = client.service.searched[-1]
        assert (request.ids, request.vectors, request.limit) == ([1, 2], None, 100)

    serve(script)


SEARCH_REFUSED = [
    ({"limit": 0}, 1100, "topk [0] is invalid, it should be in range [1, 16384], but got 0"),
    ({"limit": 16385}, 1100, "topk [16385] is invalid, it should be in range [1, 16384], but got 16385"),
    ({"offset": -1}, 1100, "offset [-1] is invalid"),
    ({"offset": 16385}, 1100, "offset [16385] is invalid"),
    ({"limit": 16000, "offset": 1000}, 1100, "offset+topk [17000] is invalid"),
    ({"data": None}, 1802, "data or ids"),
    ({"data": []}, 1802, "data"),
    ({"data": [1, 2]}, 1801, "list of vectors"),
    ({"data": [[1]]}, 1801, "dimension: 2, but length of []float: 1"),
    ({"data": [[1, 2], [1, 2, 3]]}, 1801, "dimension: 2"),
    ({"data": ["text"]}, 1801, "list of vectors"),
    ({"data": [[1, None]]}, 1801, "list of vectors"),
    ({"data": [None]}, 1801, "list of vectors"),
    ({"data": [[1, True]]}, 1801, "list of vectors"),
    ({"data": [[1, 1e39]]}, 1801, "float32"),
    ({"data": {}}, 1801, "list of vectors"),
    ({"annsField": "word"}, 1801, "cannot find a vector field named: word"),
    ({"ids": [1]}, 1100, "mutually exclusive"),
    ({"data": None, "ids": []}, 1802, "ids"),
    ({"data": None, "ids": [1.5]}, 1100, "1.5"),
    ({"data": None, "ids": [True]}, 1100, "True"),
    ({"data": None, "ids": ["abc"]}, 1100, "abc"),
    ({"data": None, "ids": [""]}, 1100, "ids"),
    ({"data": None, "ids": 7}, 1100, "ids"),
    ({"filter": "bad"}, 1100, "failed to create query plan: cannot parse expression"),
    ({"searchParams": {"params": [1]}}, 1100, "searchParams.params must be an object"),
    ({"searchParams": {"ef": 1, "params": {"ef": 2}}}, 1100, "ambiguous parameter"),
    ({"searchParams": {"metricType": "L2", "metric_type": "IP"}}, 1100, "ambiguous parameter"),
    ({"searchParams": {"round_decimal": 7}}, 1100, "round_decimal"),
    ({"searchParams": {"ignoreGrowing": "maybe"}}, 1100, "ignoreGrowing"),
    ({"searchParams": []}, 1801, "SearchReqV2.searchParams"),
    ({"consistencyLevel": "x"}, 1100, "consistencyLevel can only be"),
    ({"groupingField": "word", "groupSize": 11}, 1100, "group size"),
    ({"functionScore": {"functions": []}}, 3000, "functionScore"),
    ({"limit": "10"}, 1801, "SearchReqV2.limit of type int32"),
]


@pytest.mark.parametrize(("more", "code", "words"), SEARCH_REFUSED)
def test_search_refusals(more: dict[str, Any], code: int, words: str) -> None:
    """A search at fault is refused before it reaches any segment, with the words that clients look for."""

    async def script(client: Client) -> None:
        await filled(client)
        reply = await client.post("/entities/search", {"collectionName": "c", "data": [[1, 2]]} | more)
        assert (reply["code"], words in reply["message"]) == (code, True), reply

    serve(script)


def test_several_vector_fields_need_annsfield() -> None:
    """With two vector fields a search without annsField is 1801, with one it is not needed."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", schema(field("w", "FloatVector", elementTypeParams={"dim": 2})))
        body = {"collectionName": "c", "data": [[1, 2]]}
        reply = await client.post("/entities/search", body)
        assert (reply["code"], "[v, w]" in reply["message"]) == (1801, True)
        assert (await client.post("/entities/search", body | {"annsField": "w"}))["code"] == 0

    serve(script)


def test_values_round_trip() -> None:
    """What is inserted comes back through HTTP to the bit, with the exact profile's conversions."""

    async def script(client: Client) -> None:
        fields = [
            field("i8", "Int8"),
            field("f", "Float"),
            field("d", "Double"),
            field("s", "VarChar", elementTypeParams={"max_length": 20}),
            field("b", "Bool", nullable=True),
            field("j", "JSON"),
            field("a", "Array", elementDataType="VarChar", elementTypeParams={"max_capacity": 3, "max_length": 5}),
            field("z", "Int64", nullable=True),
        ]
        await client.post("/collections/create", schema(*fields, enableDynamicField=True))
        body = (
            b'{"collectionName": "c", "data": [{"id": 9007199254740993, "v": [0.1, -0.0, 1e-40, 3.4028235e38], '
            b'"i8": -128.0, "f": 16777217, "d": 0.30000000000000004, "s": 1.50, "b": "true", '
            b'"j": {"k": [1.50, 18446744073709551615, null]}, "a": ["x", 2.50], "z": null, '
            b'"free": {"deep": [9007199254740993]}, "gone": null}]}'
        )
        _, reply = await client.send("/entities/insert", body)
        assert reply["code"] == 0, reply
        (row,) = (await client.post("/entities/get", {"collectionName": "c", "id": 9007199254740993}))["data"]
        vector = row.pop("v")
        assert np.array_equal(np.array(vector, np.float32), np.array([0.1, -0.0, 1e-40, 3.4028235e38], np.float32))
        assert row == {
            "id": 9007199254740993,
            "i8": -128,
            "f": 16777216.0,
            "d": 0.30000000000000004,
            "s": "1.50",
            "b": True,
            "j": {"k": [1.5, 18446744073709551615, None]},
            "a": ["x", "2.50"],
            "z": None,
            "free": {"deep": [9007199254740993]},
        }

    serve(script)
