"""Indexes on scalar fields over REST: made, used, kept over a kill and dropped, with the answers of a scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.process.running import Running

ROWS = 3_000
FILTERS = {
    "n == 7": [*range(7, ROWS, 1_000)],
    "word == 'word 0012'": [12],
    "word like 'word 001%' and n < 15": [*range(10, 15)],
    "n in [1, 2] or word == 'word 0000'": sorted([*range(1, ROWS, 1_000), *range(2, ROWS, 1_000), 0]),
}


def test_scalar_indexes(tmp_path: Path) -> None:
    """With the collection or later; filters find the same with and without; one goes while the collection is loaded."""
    with Running(tmp_path / "data") as node:
        texts = {"elementTypeParams": {"max_length": "50"}}
        fields = [
            {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
            {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
            {"fieldName": "n", "dataType": "Int32"},
            {"fieldName": "word", "dataType": "VarChar", **texts},
        ]
        wanted = [
            {"fieldName": "v", "indexName": "v", "metricType": "L2", "indexType": "FLAT"},
            {"fieldName": "n", "indexName": "by_n", "indexType": "STL_SORT"},
        ]
        node.ask("/collections/create", collectionName="c", schema={"fields": fields}, indexParams=wanted)
        rows = [{"id": i, "v": [i, 0], "n": i % 1_000, "word": f"word {i:04d}"} for i in range(ROWS)]
        node.ask("/entities/insert", collectionName="c", data=rows)
        node.ask("/collections/flush", collectionName="c")
        before = {text: _found(node, text) for text in FILTERS}
        trie = [{"fieldName": "word", "indexName": "by_word", "indexType": "Trie"}]
        node.ask("/indexes/create", collectionName="c", indexParams=trie)
        for kills in range(2):
            for text, expected in FILTERS.items():
                assert before[text] == _found(node, text) == expected, text
            shown = node.ask("/indexes/describe", collectionName="c", indexName="by_word")[0]
            facts = ("indexType", "fieldName", "indexState", "totalRows", "indexedRows", "pendingRows", "metricType")
            assert [shown[key] for key in facts] == ["Trie", "word", "Finished", ROWS, ROWS, 0, ""], kills
            node.restart(kill=True)
        assert sorted(node.ask("/indexes/list", collectionName="c")) == ["by_n", "by_word", "v"]
        node.ask("/indexes/drop", collectionName="c", indexName="by_word")
        assert _found(node, "word == 'word 0012'") == [12]
        refused = node.call("/indexes/create", collectionName="c", indexParams=[trie[0] | {"fieldName": "n"}])
        assert refused["code"] != 0 and "Trie cannot be built on field n of type Int32" in refused["message"]


def _found(node: Running, text: str) -> list[int]:
    rows = node.ask("/entities/query", collectionName="c", filter=text, outputFields=["id"], limit=ROWS)
    return [row["id"] for row in rows]


PARTS = {
    'doc["a"]["n"] == 7': [*range(7, ROWS, 1_000)],
    'doc["a"]["n"] in [1, 2.0] and doc["tags"][0] != 5': sorted([*range(1, ROWS, 1_000), *range(2, ROWS, 1_000)]),
    'json_contains(doc["tags"], 2999)': [2998, 2999],
    "array_contains_all(words, ['w12', 'w13'])": [12],
    "array_contains_any(words, ['w12', 'none'])": [11, 12],
    "title like '%r 0012%'": [12],
    "colour == 'c17' and title like 'chapter%'": [*range(17, ROWS, 1_000)],
}


def test_indexes_on_parts_of_values(tmp_path: Path) -> None:
    """Paths of JSON, keys of the dynamic field, elements of arrays, pieces of text: the same answers with and without,
    through a kill; several paths of a field may have one each, one path of one type only one."""
    with Running(tmp_path / "data") as node:
        fields = [
            {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
            {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
            {"fieldName": "doc", "dataType": "JSON"},
            {"fieldName": "title", "dataType": "VarChar", "elementTypeParams": {"max_length": 99}},
            {
                "fieldName": "words", "dataType": "Array", "elementDataType": "VarChar",
                "elementTypeParams": {"max_length": "9", "max_capacity": 4},
            },
        ]  # fmt: skip
        schema = {"fields": fields, "enableDynamicField": True}
        wanted = [{"fieldName": "v", "indexName": "v", "metricType": "L2", "indexType": "FLAT"}]
        node.ask("/collections/create", collectionName="c", schema=schema, indexParams=wanted)
        rows = [
            {
                "id": i, "v": [i, 0], "doc": {"a": {"n": i % 1_000}, "tags": [i, i + 1, "x"]},
                "colour": f"c{i % 1_000}", "title": f"chapter {i:04d} of all", "words": [f"w{i}", f"w{i + 1}"],
            }
            for i in range(ROWS)
        ]  # fmt: skip
        node.ask("/entities/insert", collectionName="c", data=rows)
        node.ask("/collections/flush", collectionName="c")
        before = {text: _found(node, text) for text in PARTS}
        path = {"json_path": 'doc["a"]["n"]', "json_cast_type": "double"}
        new: list[dict[str, Any]] = [
            {"fieldName": "doc", "indexName": "n", "indexType": "INVERTED", "params": path},
            {
                "fieldName": "doc", "indexName": "tags", "indexType": "AUTOINDEX",
                "params": {"json_path": 'doc["tags"]', "json_cast_type": "ARRAY_DOUBLE"},
            },
            {
                "fieldName": "colour", "indexName": "colour", "indexType": "INVERTED",
                "params": {"json_cast_type": "varchar"},
            },
            {"fieldName": "words", "indexName": "words", "indexType": "INVERTED"},
            {
                "fieldName": "title", "indexName": "title", "indexType": "NGRAM",
                "params": {"min_gram": 2, "max_gram": 3},
            },
        ]  # fmt: skip
        for one in new:
            node.ask("/indexes/create", collectionName="c", indexParams=[one])
        for _ in range(2):
            for text, expected in PARTS.items():
                assert before[text] == _found(node, text) == expected, text
            node.restart(kill=True)
        assert sorted(node.ask("/indexes/list", collectionName="c")) == ["colour", "n", "tags", "title", "v", "words"]
        shown = node.ask("/indexes/describe", collectionName="c", indexName="n")[0]
        assert shown["fieldName"] == "doc" and shown["indexType"] == "INVERTED"
        refused = node.call("/indexes/create", collectionName="c", indexParams=[new[0] | {"indexName": "other"}])
        assert refused["code"] != 0 and "at most one distinct index is allowed" in refused["message"]
        for name in ("n", "words"):
            node.ask("/indexes/drop", collectionName="c", indexName=name)
        assert _found(node, 'doc["a"]["n"] == 7') == before['doc["a"]["n"] == 7']
