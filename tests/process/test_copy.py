"""`annulus copy` from another server by its gRPC: here another Annulus, which answers as Milvus does."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.process.running import Running, until
from tests.process.test_import import TYPES, a_row, annulus, run


def test_a_copy_is_as_its_origin_also_after_a_break(tmp_path: Path) -> None:
    """All types, schema and indexes; killed half way and resumed, each row is there once."""
    with Running(tmp_path / "n1") as old, Running(tmp_path / "n2") as new:
        dice = random.Random(3)
        primary = {"fieldName": "id", "dataType": "VarChar", "isPrimary": True, "elementTypeParams": {"max_length": 40}}
        fields = [one for one in TYPES if one["fieldName"] != "terms"]
        indexes = [{"fieldName": one["fieldName"]} for one in fields if one["dataType"].endswith("Vector")]
        schema = {"enableDynamicField": True, "fields": [primary, *fields]}
        old.ask("/collections/create", collectionName="all", schema=schema, indexParams=indexes)
        old.ask("/entities/insert", collectionName="all", data=[a_row(f"k{i}", dice) for i in range(300)])
        old.ask("/collections/create", collectionName="big", dimension=4, autoID=True)
        for first in range(0, 40_000, 5_000):
            rows = [{"vector": [1, 2, 3, i % 10], "number": i} for i in range(first, first + 5_000)]
            old.ask("/entities/insert", collectionName="big", data=rows)
        words = ["copy", "--from", f"http://127.0.0.1:{old.port}"]
        process = annulus(tmp_path, new, *words)
        state = tmp_path / "big.copy.json"
        until(lambda: state.exists() and json.loads(state.read_text())["rows"] > 0, what="half a copy")
        process.kill()
        process.communicate()
        run(tmp_path, new, *words, "--resume")

        def rows_of(node: Running, name: str, filter_text: str, *fields: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = node.ask(
                "/entities/query", collectionName=name, filter=filter_text, limit=16_384, outputFields=list(fields)
            )
            return found

        assert rows_of(new, "all", "", "*") == rows_of(old, "all", "", "*")
        assert new.count("big") == 40_000
        numbers = []
        for low in range(0, 40_000, 10_000):
            found = rows_of(new, "big", f"{low} <= number < {low + 10_000}", "number")
            numbers += [row["number"] for row in found]
        assert sorted(numbers) == list(range(40_000))


@dataclass(frozen=True)
class Kept:
    """A collection that a copy is to keep as it is."""

    fields: tuple[Mapping[str, Any], ...] = ()
    """Beside the primary key and a vector."""
    rows: tuple[Mapping[str, Any], ...] = ({},)
    schema: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    """On the vector."""
    indexes: tuple[Mapping[str, Any], ...] = ()
    body: Mapping[str, Any] = field(default_factory=dict)
    key: str = "Int64"
    partitions: Mapping[str, int] = field(default_factory=dict)
    """How many rows each gets more."""
    aliases: tuple[str, ...] = ()


def scalar(kind: str, *values: Any, **more: Any) -> Kept:
    """Return a collection with a field of the type; None is a row that leaves it out."""
    params = {"max_length": 40} if "VarChar" in (kind, more.get("elementDataType")) else {}
    params |= {"max_capacity": 5} if kind == "Array" else {}
    rows = tuple({} if value is None else {"value": value} for value in values)
    return Kept(({"fieldName": "value", "dataType": kind, "elementTypeParams": params, **more},), rows)


def vector(kind: str, metric: str, *values: Any, dim: int = 8, **index: Any) -> Kept:
    params = {} if kind == "SparseFloatVector" else {"dim": dim}
    one = {"fieldName": "value", "dataType": kind, "elementTypeParams": params}
    made = {"fieldName": "value", "indexName": "of_value", "metricType": metric, **index}
    return Kept((one,), tuple({"value": value} for value in values), indexes=(made,))


BITS: Final = [base64.b64encode(bytes([one])).decode() for one in (0, 200)]
HALVES: Final = [base64.b64encode(bytes(range(first, first + 16))).decode() for first in (0, 32)]
TEXT: Final = {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {"max_length": 99}}
CASES: Final = {
    "bool": scalar("Bool", True, False),
    "int8, null": scalar("Int8", -128, None, 127, nullable=True),
    "int16, default": scalar("Int16", -5, None, defaultValue=7),
    "int32, default or null": scalar("Int32", 5, None, defaultValue=-7, nullable=True),
    "int64": scalar("Int64", -(1 << 63), (1 << 63) - 1),
    "float, null": scalar("Float", 0.1, None, -1e30, nullable=True),
    "double, default": scalar("Double", 5e-324, None, 1e300, defaultValue=0.1),
    "bool, default": scalar("Bool", False, None, defaultValue=True),
    "text, null": scalar("VarChar", "", None, 'a "\\\n☃', nullable=True),
    "text, default": scalar("VarChar", "", None, defaultValue="none"),
    "json, null": scalar("JSON", {"a": [1, None]}, None, "123", 1.5, [], "null", False, nullable=True),
    "array of text, null": scalar("Array", ["a", ""], None, [], nullable=True, elementDataType="VarChar"),
    "array of int8": scalar("Array", [1, -128], [], elementDataType="Int8"),
    "array of double": scalar("Array", [0.1, 1e300], elementDataType="Double"),
    "array of bool": scalar("Array", [True, False], elementDataType="Bool"),
    "dynamic": Kept(
        rows=({"a": 1, "b": None}, {}, {"a": "1", "deep": {"x": [1, {}]}, "id2": 1.5}),
        schema={"enableDynamicField": True},
    ),
    "halves": vector("Float16Vector", "L2", *HALVES, indexType="HNSW", params={"M": 9, "efConstruction": 50}),
    "brain halves": vector("BFloat16Vector", "IP", *HALVES),
    "bytes": vector("Int8Vector", "COSINE", [1, -128, 127, 0, 5, 6, 7, 8]),
    "bits": vector("BinaryVector", "JACCARD", *BITS, indexType="BIN_FLAT"),
    "sparse": vector("SparseFloatVector", "IP", {"1": 0.5, "70000": 2}, {"3": 0.25}, indexType="SPARSE_WAND"),
    "hnsw": Kept(index={"indexType": "HNSW", "metricType": "L2", "params": {"M": 9, "efConstruction": 55}}),
    "quantised": Kept(index={"indexType": "HNSW_SQ", "metricType": "IP", "params": {"M": 9, "sq_type": "SQ8"}}),
    "bm25": Kept(
        (
            {**TEXT, "elementTypeParams": {
                "max_length": 99, "enable_analyzer": True, "enable_match": True, "analyzer_params": '{"type":"english"}'
            }},
            {"fieldName": "terms", "dataType": "SparseFloatVector"},
        ),
        ({"text": "wild horses run"}, {"text": "cats"}),
        {"functions": [
            {"name": "score", "type": "BM25", "description": "of text", "inputFieldNames": ["text"],
             "outputFieldNames": ["terms"]}
        ]},
        indexes=(
            {"fieldName": "terms", "indexType": "SPARSE_INVERTED_INDEX", "metricType": "BM25",
             "params": {"bm25_k1": 1.3, "bm25_b": 0.6}},
        ),
    ),
    "scalar indexes": Kept(
        (TEXT, {"fieldName": "n", "dataType": "Int32"}),
        ({"text": "a", "n": 1}, {"text": "b", "n": 2}),
        indexes=(
            {"fieldName": "text", "indexName": "by_text", "indexType": "INVERTED"},
            {"fieldName": "n", "indexName": "by_n", "indexType": "STL_SORT"},
        ),
    ),
    "text keys": Kept(rows=({}, {}, {}), key="VarChar"),
    "given keys": Kept((TEXT,), ({"text": "a"}, {"text": "b"}), {"autoID": True}),
    "partitions": Kept(rows=({}, {}), partitions={"north": 3, "empty": 0, "south": 2}),
    "partitions, given keys": Kept((TEXT,), (), {"autoID": True}, partitions={"north": 3, "south": 2}),
    "partition key": Kept(
        ({**TEXT, "isPartitionKey": True},),
        tuple({"text": f"t{one}"} for one in range(9)),
        body={"params": {"partitionsNum": 7, "shardsNum": 3}},
    ),
    "clustering key": Kept(({"fieldName": "n", "dataType": "Int32", "isClusteringKey": True},), ({"n": 1},)),
    "properties": Kept(
        body={"properties": {"collection.ttl.seconds": 86400, "own": "text"}, "description": "as it was",
              "consistencyLevel": "Session"},
        aliases=("first_alias", "second_alias"),
    ),
}  # fmt: skip


def name_of(case: str) -> str:
    return "".join(one if one.isalnum() else "_" for one in case)


def make(node: Running, name: str, case: Kept) -> None:
    """Make the collection and its rows."""
    primary = {"fieldName": "id", "dataType": case.key, "isPrimary": True, "elementTypeParams": {"max_length": 20}}
    place = {"fieldName": "place", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}}
    indexes = [{"fieldName": "place", "indexName": "of_place", "metricType": "COSINE", **case.index}, *case.indexes]
    schema = {**case.schema, "fields": [{**primary, "description": "the key"}, place, *case.fields]}
    node.ask("/collections/create", collectionName=name, schema=schema, indexParams=indexes, **case.body)
    auto_id = bool(case.schema.get("autoID"))
    parts: dict[str, list[Mapping[str, Any]]] = {"": list(case.rows)}
    parts |= {one: [{"text": "t"} if auto_id else {}] * count for one, count in case.partitions.items()}
    for number, (partition, rows) in enumerate(parts.items()):
        if partition:
            node.ask("/partitions/create", collectionName=name, partitionName=partition)
        first = 100 * number
        made = [{"place": [i, first], **row} for i, row in enumerate(rows)]
        if not auto_id:
            made = [
                {"id": f"k{first + i}" if case.key == "VarChar" else first + i, **row} for i, row in enumerate(made)
            ]
        if made:
            node.ask("/entities/insert", collectionName=name, data=made, partitionName=partition or None)
    for alias in case.aliases:
        node.ask("/aliases/create", collectionName=name, aliasName=alias)


def facts(node: Running, name: str) -> dict[str, Any]:
    """Return all that there is to know of a collection, but its number and the keys that the database gives."""
    described = node.ask("/collections/describe", collectionName=name)
    del described["collectionID"]
    parts = ("indexName", "fieldName", "indexType", "metricType", "indexParams")
    indexes = [
        {part: node.ask("/indexes/describe", collectionName=name, indexName=one)[0][part] for part in parts}
        for one in sorted(node.ask("/indexes/list", collectionName=name))
    ]
    rows = {}
    partitions = sorted(node.ask("/partitions/list", collectionName=name))
    keyed = any(one["partitionKey"] for one in described["fields"])
    for partition in [""] if keyed else partitions:
        rows[partition] = node.ask(
            "/entities/query", collectionName=name, limit=100, outputFields=["*"], consistencyLevel="Strong",
            **({"partitionNames": [partition]} if partition else {}),
        )  # fmt: skip
        if described["autoId"]:
            rows[partition] = sorted(json.dumps({**row, "id": 0}) for row in rows[partition])
    return {"described": described, "indexes": indexes, "partitions": partitions, "rows": rows}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    """Two nodes: all CASES, and the copy of it."""
    folder = tmp_path_factory.mktemp("copy")
    with Running(folder / "n1") as old, Running(folder / "n2") as new:
        for name, case in CASES.items():
            make(old, name_of(name), case)
        run(folder, new, "copy", "--from", f"http://127.0.0.1:{old.port}")
        yield old, new


@pytest.mark.parametrize("case", CASES)
def test_a_copy_keeps(both: tuple[Running, Running], case: str) -> None:
    """Each type of field, nulls, defaults, dynamic keys, functions, indexes, partitions, aliases and properties."""
    old, new = both
    assert facts(new, name_of(case)) == facts(old, name_of(case))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("case", ["partitions", "partitions, given keys", "partition key", "text keys"])
def test_files_keep_the_partitions(both: tuple[Running, Running], tmp_path: Path, case: str, form: str) -> None:
    """Rows come back into the partitions that they were in, also where one file has those of several."""
    old, _ = both
    name = name_of(case)
    run(tmp_path, old, "export", "out", "--collection", name, "--format", form)
    files = sorted(str(one.relative_to(tmp_path)) for one in (tmp_path / "out").glob("part-*"))
    schema = ["--schema", "out/collection.json"] if form == "jsonl" else []
    back = f"{name}_{form}"
    run(tmp_path, old, "import", *files, "--collection", back, "--batch-rows", 4, *schema)
    expected, found = facts(old, name), facts(old, back)
    assert found["described"].pop("collectionName") == back
    del expected["described"]["collectionName"]
    assert found == expected
