"""Full text on three nodes, by Milvus's own client: any node has the scores of all shards together."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from pymilvus import AnnSearchRequest, DataType, Function, FunctionType, MilvusClient, RRFRanker

from storage.analysis import analyzer_of
from tests.process.clusters import Trio

NOUNS, DOINGS = ["cat", "dog", "tree", "river", "stone", "cloud"], ["runs", "sleeping", "grows", "falls"]
TEXTS = [
    " and ".join(f"the {NOUNS[(i * k) % 6]} {DOINGS[(i + k) % 4]}" for k in range(1, 2 + i % 5)) for i in range(300)
]
ENGLISH = {"type": "english"}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with Trio(tmp_path_factory.mktemp("words"), settings={"shards": "6", "index.rows_min": "1"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def clients(trio: Trio) -> Iterator[list[MilvusClient]]:
    made = [MilvusClient(uri=f"http://127.0.0.1:{node.port}") for node in trio]
    first = made[0]
    schema = first.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field(
        "text", DataType.VARCHAR, max_length=999, enable_analyzer=True, enable_match=True, analyzer_params=ENGLISH
    )
    schema.add_field("terms", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["terms"]))
    indexes = first.prepare_index_params()
    indexes.add_index("terms", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    indexes.add_index("vector", index_type="FLAT", metric_type="L2")
    first.create_collection("t", schema=schema, index_params=indexes, num_shards=3, consistency_level="Strong")
    for some in (range(150), range(150, 300)):
        first.insert("t", [{"id": i, "text": TEXTS[i], "vector": [float(i), 1.0]} for i in some])
        if some.start == 0:
            first.flush("t")
    first.delete("t", ids=list(range(0, 300, 7)))
    yield made
    for one in made:
        one.close()


def reference(question: str) -> dict[int, float]:
    terms = analyzer_of(json.dumps(ENGLISH)).terms
    counts = {i: Counter(terms(text)) for i, text in enumerate(TEXTS) if i % 7}
    average = sum(sum(one.values()) for one in counts.values()) / len(counts)
    scores: dict[int, float] = {}
    for term in terms(question):
        n = sum(term in one for one in counts.values())
        idf = math.log(1 + (len(counts) - n + 0.5) / (n + 0.5))
        for key, one in counts.items():
            if tf := one[term]:
                length = sum(one.values())
                scores[key] = scores.get(key, 0.0) + idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / average))
    return scores


def test_every_node_has_the_scores_of_all_shards(clients: list[MilvusClient]) -> None:
    """Rows of different shards and nodes are compared by statistics of all of them."""
    for question in ("a sleeping dog", "rivers and stones", "the", "clouds run cloud"):
        wanted = reference(question)
        for client in clients:
            (hits,) = client.search("t", [question], anns_field="terms", limit=300)
            assert {one["id"] for one in hits} == set(wanted)
            scores = [one["distance"] for one in hits]
            np.testing.assert_allclose(scores, [wanted[one["id"]] for one in hits], rtol=1e-5)
            assert scores == sorted(scores, reverse=True)


def test_words_and_vectors(clients: list[MilvusClient]) -> None:
    """A hybrid search of a text and a vector, with words in its filter."""
    filter = "text_match(text, 'river stone', minimum_should_match=2) and not phrase_match(text, 'river runs')"
    searches = [
        AnnSearchRequest(["river stone"], "terms", {}, 20, expr=filter),
        AnnSearchRequest([[5.0, 1.0]], "vector", {}, 20, expr=filter),
    ]
    found = [client.hybrid_search("t", searches, RRFRanker(), limit=10, output_fields=["text"]) for client in clients]
    assert (
        [one["id"] for one in found[0][0]] == [one["id"] for one in found[1][0]] == [one["id"] for one in found[2][0]]
    )
    assert len(found[0][0]) == 10
    for hit in found[0][0]:
        text = hit["entity"]["text"]
        assert "river" in text and "stone" in text and "river runs" not in text


def test_upserts_compute_anew(clients: list[MilvusClient]) -> None:
    """A row that is replaced, whole or in part, is found by its new words and not by its old ones."""
    client = clients[1]
    client.insert("t", {"id": 1000, "text": "a zebra", "vector": [0.0, 0.0]})
    assert [one["id"] for one in client.search("t", ["zebras"], anns_field="terms")[0]] == [1000]
    client.upsert("t", {"id": 1000, "text": "a giraffe", "vector": [0.0, 0.0]})
    assert client.search("t", ["zebras"], anns_field="terms")[0] == []
    client.upsert("t", {"id": 1000, "text": "a walrus"}, partial_update=True)
    assert client.search("t", ["giraffes"], anns_field="terms")[0] == []
    assert [one["id"] for one in clients[2].search("t", ["walrus"], anns_field="terms")[0]] == [1000]
    client.upsert("t", {"id": 1000, "vector": [9.0, 9.0]}, partial_update=True)
    assert [one["id"] for one in clients[0].search("t", ["walrus"], anns_field="terms")[0]] == [1000]
    client.delete("t", ids=[1000])


def test_the_client_sees_the_function(clients: list[MilvusClient]) -> None:
    """Its description of the collection names the function, and the field that rows do not give."""
    told = clients[2].describe_collection("t")
    (function,) = told["functions"]
    assert (function["name"], function["input_field_names"], function["output_field_names"]) == (
        "bm25", ["text"], ["terms"],
    )  # fmt: skip
    assert [one["name"] for one in told["fields"] if one.get("is_function_output")] == ["terms"]
