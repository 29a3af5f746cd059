"""Indexes on scalar fields over REST: made, used, kept over a kill and dropped, with the answers of a scan."""

from __future__ import annotations

from pathlib import Path

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
