"""Full text, over REST: BM25 scores are those of the formula, on real definitions, whatever happened to the rows."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.analysis import analyzer_of
from tests.process.running import Running

DEFINITIONS = Path("/work/shared/data/wordnet_rows.jsonl")
SAMPLE = Path(__file__).parents[2] / "node" / "sample" / "rows.jsonl"
ROWS = 2_000
QUESTIONS = [
    "a small carnivorous mammal with short legs", "the branch of science that studies light", "to the and of",
    "American novelist who wrote about the sea", "chemical element", "zzzz qqqq", "water water water",
]  # fmt: skip
ENGLISH = {"type": "english"}


def definitions() -> list[str]:
    source = DEFINITIONS if DEFINITIONS.exists() else SAMPLE
    with source.open(encoding="utf-8") as lines:
        return [json.loads(line)["definition"] for line, _ in zip(lines, range(ROWS), strict=False)]


TEXTS = definitions()


def reference(texts: Mapping[int, str], question: str, k1: float = 1.2, b: float = 0.75) -> dict[int, float]:
    """Return the BM25 score of every text that has a term of the question, term by term as the formula says."""
    terms = analyzer_of(json.dumps(ENGLISH)).terms
    counts = {key: Counter(terms(text)) for key, text in texts.items()}
    average = sum(sum(one.values()) for one in counts.values()) / len(counts)
    scores: dict[int, float] = {}
    for term in terms(question):
        n = sum(term in one for one in counts.values())
        idf = math.log(1 + (len(counts) - n + 0.5) / (n + 0.5))
        for key, one in counts.items():
            if tf := one[term]:
                length = sum(one.values())
                share = idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / average))
                scores[key] = scores.get(key, 0.0) + share
    return scores


def created(node: Running, name: str, shards: int, **params: Any) -> None:
    answer = node.call(
        "/collections/create",
        collectionName=name,
        consistencyLevel="Strong",
        params={"shardsNum": shards},
        schema={
            "fields": [
                {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                {"fieldName": "year", "dataType": "Int32", "nullable": True},
                {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {
                    "max_length": 2000, "enable_analyzer": True, "enable_match": True, "analyzer_params": ENGLISH}},
                {"fieldName": "terms", "dataType": "SparseFloatVector"},
                {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": 4}},
            ],
            "functions": [
                {"name": "bm25", "type": "BM25", "inputFieldNames": ["text"], "outputFieldNames": ["terms"]}
            ],
        },
        indexParams=[
            {"fieldName": "terms", "indexType": "SPARSE_INVERTED_INDEX", "metricType": "BM25", "params": params},
            {"fieldName": "vector", "indexType": "AUTOINDEX", "metricType": "L2"},
        ],
    )  # fmt: skip
    assert answer == {"code": 0, "data": {}}


def vector(i: int) -> list[float]:
    return [float(i % 7), float(i % 11), float(i % 13), 1.0]


def filled(node: Running, name: str) -> dict[int, str]:
    """Insert all texts, flush some, delete and replace others; return what there is then."""
    for start in range(0, len(TEXTS), 500):
        rows = [
            {"id": i, "year": i % 50, "text": TEXTS[i], "vector": vector(i)}
            for i in range(start, min(start + 500, len(TEXTS)))
        ]
        assert node.call("/entities/insert", collectionName=name, data=rows)["code"] == 0
        if start == 1000:
            assert node.call("/collections/flush", collectionName=name)["code"] == 0
    texts = dict(enumerate(TEXTS))
    assert node.call("/entities/delete", collectionName=name, filter="id % 10 == 3")["code"] == 0
    texts = {key: text for key, text in texts.items() if key % 10 != 3}
    changed: list[dict[str, Any]] = [
        {"id": i, "text": f"water of chemical number {i}"} for i in range(0, 300, 30) if i in texts
    ]
    partial = node.call("/entities/upsert", collectionName=name, data=changed, partialUpdate=True)
    assert partial["code"] == 0, partial
    texts |= {one["id"]: one["text"] for one in changed}
    whole = [{"id": i, "text": "", "vector": vector(i)} for i in (1, 1501)]
    assert node.call("/entities/upsert", collectionName=name, data=whole)["code"] == 0
    return texts | {1: "", 1501: ""}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("full_text")
    with Running(folder / "data", settings={"shards": "3", "index.rows_min": "1"}) as running:
        created(running, "one", 1)
        created(running, "three", 3, bm25_k1=1.5, bm25_b=0.5)
        yield running


@pytest.fixture(scope="module")
def texts(node: Running) -> dict[int, str]:
    found = filled(node, "one")
    assert filled(node, "three") == found
    return found


def assert_same(found: list[dict[str, Any]], wanted: Mapping[int, float], limit: int) -> None:
    """Hits have the reference's scores, and none of those left out has a better one."""
    assert len(found) == min(limit, len(wanted))
    np.testing.assert_allclose([one["distance"] for one in found], [wanted[one["id"]] for one in found], rtol=1e-5)
    best = sorted(wanted.values(), reverse=True)[:limit]
    np.testing.assert_allclose([one["distance"] for one in found], best, rtol=1e-5)


@pytest.mark.parametrize(("name", "k1", "b"), [("one", 1.2, 0.75), ("three", 1.5, 0.5)])
def test_scores_are_the_formulas(node: Running, texts: dict[int, str], name: str, k1: float, b: float) -> None:
    """With one shard and with several, flushed or not, after deletes, upserts and partial upserts."""
    for question in QUESTIONS:
        answer = node.call("/entities/search", collectionName=name, data=[question], annsField="terms", limit=50)
        assert answer["code"] == 0, answer
        assert_same(answer["data"], reference(texts, question, k1, b), 50)


def test_several_texts_at_once(node: Running, texts: dict[int, str]) -> None:
    """Each text of a search has hits of its own; one without known terms has none."""
    answer = node.call("/entities/search", collectionName="one", data=QUESTIONS, annsField="terms", limit=3)
    assert answer["topks"] == [min(3, len(reference(texts, one))) for one in QUESTIONS]


def test_filters_change_no_score(node: Running, texts: dict[int, str]) -> None:
    """A filter leaves rows out; the scores of the others stay as they were."""
    question = QUESTIONS[0]
    wanted = {key: score for key, score in reference(texts, question).items() if key < 200}
    body = {"collectionName": "one", "data": [question], "annsField": "terms", "filter": "id < 200", "limit": 20}
    assert_same(node.call("/entities/search", **body)["data"], wanted, 20)


def test_ranges_are_of_scores(node: Running, texts: dict[int, str]) -> None:
    """A range search keeps the rows whose score lies within."""
    scores = reference(texts, QUESTIONS[4])
    low, high = np.quantile(list(scores.values()), [0.2, 0.7]).tolist()
    body = {"collectionName": "one", "data": [QUESTIONS[4]], "annsField": "terms", "limit": 1000}
    answer = node.call("/entities/search", **body, searchParams={"params": {"radius": low, "range_filter": high}})
    found = {one["id"] for one in answer["data"]}
    assert {key for key, one in scores.items() if low * 1.0001 < one < high * 0.9999} <= found
    assert found <= {key for key, one in scores.items() if low * 0.9999 < one < high * 1.0001}


def test_text_and_vectors_together(node: Running, texts: dict[int, str]) -> None:
    """A hybrid search ranks the hits of a text and of a vector, those of both first."""
    question = QUESTIONS[0]
    searches = [
        {"data": [question], "annsField": "terms", "limit": 30},
        {"data": [vector(7)], "annsField": "vector", "limit": 30},
    ]
    ranks: dict[int, float] = {}
    for one in searches:
        hits = node.call("/entities/search", collectionName="three", **one)["data"]
        for rank, hit in enumerate(hits, 1):
            ranks[hit["id"]] = ranks.get(hit["id"], 0.0) + 1 / (60 + rank)
    body = {"collectionName": "three", "search": searches, "rerank": {"strategy": "rrf"}, "limit": 10}
    answer = node.call("/entities/hybrid_search", **body)
    assert answer["code"] == 0, answer
    best = sorted(ranks.values(), reverse=True)[:10]
    np.testing.assert_allclose([one["distance"] for one in answer["data"]], best, rtol=1e-5)


def test_the_computed_field_is_nobodys(node: Running, texts: dict[int, str]) -> None:
    """It cannot be given nor read, and `*` leaves it out."""
    row = {"id": 1, "text": "a", "vector": vector(1), "terms": {"1": 1.0}}
    answer = node.call("/entities/insert", collectionName="one", data=[row])
    assert answer["code"] == 1804 and "a function computes this field of text" in answer["message"]
    body = {"collectionName": "one", "filter": "id == 7"}
    assert set(node.call("/entities/query", **body, outputFields=["*"])["data"][0]) == {"id", "year", "text", "vector"}
    answer = node.call("/entities/query", **body, outputFields=["terms"])
    assert answer["code"] == 1100 and "not allowed to retrieve raw data of field terms" in answer["message"]
    answer = node.call("/entities/search", collectionName="one", data=[{"1": 1.0}], annsField="terms", limit=3)
    assert answer["code"] != 0 and "please provide text" in answer["message"]


def test_the_description_tells_functions(node: Running) -> None:
    """As Milvus tells them."""
    told = node.call("/collections/describe", collectionName="one")["data"]
    assert told["functions"] == [{
        "name": "bm25", "description": "", "type": 1, "id": 100, "inputFieldNames": ["text"],
        "outputFieldNames": ["terms"], "params": [],
    }]  # fmt: skip
    assert {one["name"]: one.get("isFunctionOutput", False) for one in told["fields"]}["terms"] is True
    answer = node.call("/collections/fields/drop", collectionName="one", fieldName="text")
    assert answer["code"] != 0 and "function bm25 reads or computes it" in answer["message"]


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    """After a crash scores are as they were: the terms are in the log."""
    with Running(tmp_path / "data", settings={"index.rows_min": "1"}) as running:
        created(running, "c", 1)
        texts = filled(running, "c")
        running.kill()
    with Running(tmp_path / "data", settings={"index.rows_min": "1"}) as running:
        for question in QUESTIONS[:3]:
            answer = running.call("/entities/search", collectionName="c", data=[question], annsField="terms", limit=20)
            assert_same(answer["data"], reference(texts, question), 20)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ({"type": "TextEmbedding"}, "type TextEmbedding is not supported"),
        ({"inputFieldNames": []}, "exactly one input field"),
        ({"inputFieldNames": ["nowhere"]}, "input field nowhere is not in the schema"),
        ({"inputFieldNames": ["plain"]}, "enable_analyzer"),
        ({"outputFieldNames": ["text"]}, "must be a SparseFloatVector field"),
    ],
)
def test_functions_that_cannot_be(node: Running, function: dict[str, Any], said: str) -> None:
    """A schema with a function that cannot be is refused by what is wrong."""
    fields = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "plain", "dataType": "VarChar", "elementTypeParams": {"max_length": 20}},
        {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {"max_length": 20, "enable_analyzer": True}},
        {"fieldName": "terms", "dataType": "SparseFloatVector"},
    ]
    whole = {"name": "f", "type": "BM25", "inputFieldNames": ["text"], "outputFieldNames": ["terms"], **function}
    answer = node.call("/collections/create", collectionName="no", schema={"fields": fields, "functions": [whole]})
    assert answer["code"] != 0 and said in answer["message"]


def test_run_analyzer(node: Running) -> None:
    """Tokens of an analyzer that is described, or that a field has; with offsets and numbers if wanted."""
    body: dict[str, Any] = {"text": ["The running dogs", "é"], "analyzerParams": json.dumps(ENGLISH)}
    plain = node.call("/common/run_analyzer", **body)["data"]
    assert plain == {"results": [{"tokens": [{"token": "run"}, {"token": "dog"}]}, {"tokens": [{"token": "é"}]}]}
    detailed = node.call("/common/run_analyzer", **body, withDetail=True, withHash=True)["data"]["results"]
    assert detailed[0]["tokens"][0] == {
        "token": "run", "startOffset": 4, "endOffset": 11, "position": 1, "positionLength": 1, "hash": 1349952704,
    }  # fmt: skip
    of_field = {"text": body["text"], "collectionName": "one", "fieldName": "text"}
    assert node.call("/common/run_analyzer", **of_field)["data"] == plain
    assert "no analyzer" in node.call("/common/run_analyzer", **{**of_field, "fieldName": "year"})["message"]
    assert "is unknown" in node.call("/common/run_analyzer", text=["a"], analyzerParams='{"type": "x"}')["message"]


def test_words_in_filters(node: Running, texts: dict[int, str]) -> None:
    """text_match and phrase_match keep what they should, in queries, searches and deletes, flushed or not."""
    terms = analyzer_of(json.dumps(ENGLISH)).terms
    for words, least in (("water chemical", 1), ("water chemical", 2), ("the small mammals", 2)):
        wanted = [key for key, text in texts.items() if len(set(terms(text)) & set(terms(words))) >= least]
        for name in ("one", "three"):
            filter = f'text_match(text, "{words}", minimum_should_match={least})'
            found = node.call("/entities/query", collectionName=name, filter=filter, limit=5000, outputFields=["id"])
            assert [one["id"] for one in found["data"]] == sorted(wanted)
    for phrase in ("water of chemical", "of something"):
        wanted = [key for key, text in texts.items() if phrase in text.lower()]
        body = {"collectionName": "three", "filter": f'phrase_match(text, "{phrase}")', "limit": 5000}
        assert len(wanted) > 0 and {one["id"] for one in node.call("/entities/query", **body)["data"]} >= set(wanted)
    body = {"data": ["water"], "annsField": "terms", "filter": 'text_match(text, "chemical")', "limit": 1000}
    answer = node.call("/entities/search", collectionName="one", **body)
    chemical = {key: text for key, text in texts.items() if "chemic" in terms(text)}
    wanted_scores = {key: score for key, score in reference(texts, "water").items() if key in chemical}
    assert_same(answer["data"], wanted_scores, 1000)


def test_texts_are_taken_apart_once(tmp_path: Path) -> None:
    """Word lists are made when rows are flushed, and read at the next start; answers stay; a merge makes new ones."""
    text = {"max_length": 99, "enable_analyzer": True, "enable_match": True}
    fields = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": text},
        {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
    ]
    index = [{"fieldName": "v", "indexName": "v", "metricType": "L2", "indexType": "FLAT"}]
    with Running(tmp_path / "data") as node:
        node.ask("/collections/create", collectionName="c", schema={"fields": fields}, indexParams=index)
        rows = [{"id": i, "text": f"common word{i % 50} text{i}", "v": [0, i]} for i in range(3_000)]
        node.ask("/entities/insert", collectionName="c", data=rows)
        node.ask("/collections/flush", collectionName="c")
        _until_said(node, "words listed")
        node.kill()
        node.start()
        for words, wanted in (("word7", [*range(7, 3_000, 50)]), ("text12 text1700", [12, 1700])):
            for filter in (f"text_match(text, '{words}')", f"text_match(text, '{words}') and id >= 0"):
                found = node.ask("/entities/query", collectionName="c", filter=filter, limit=999, outputFields=["id"])
                assert [one["id"] for one in found] == wanted
        time.sleep(1)
        assert "words listed" not in node.said()
        assert node.stop() == 0


def _until_said(node: Running, words: str) -> None:
    until_s = time.monotonic() + 30
    while words not in node.said():
        assert time.monotonic() < until_s, node.said()
        time.sleep(0.05)
