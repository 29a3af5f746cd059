"""BM25 scores are the formula's, however rows are spread over segments and shards, as of any tick."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.metric import Metric
from index.protocol import Form
from index.sparse import SparseIndex, SparseRows, nearest_sparse
from index.spec import BadParam, IndexSpec, SearchParams, parse_index_spec
from storage.analysis import VERSION, analyzer_of, term_number
from storage.bm25 import Statistics, statistics, term_rows, weighted, with_computed
from storage.columns import Batch, Column, ScalarColumn, SparseColumn, StringColumn
from storage.errors import InvalidParameter, NameInvalid
from storage.evolution import with_field, without_field
from storage.growing import GrowingSegment
from storage.key_lookup import Keys
from storage.schema import CollectionSchema, DataType, FieldSchema, FunctionSchema, make_schema
from storage.sealed import SealedSegment
from storage.search import VectorQuery, search
from storage.strings import StringArray
from storage.types import FieldId, PartitionId, SegmentId, Tick

ANALYZED = {"enable_analyzer": "true"}
SCHEMA = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("text", DataType.VARCHAR, max_bytes=999, params=ANALYZED, analyzer_version=VERSION),
        FieldSchema("terms", DataType.SPARSE_FLOAT_VECTOR),
    ],
    dynamic=False,
    functions=[FunctionSchema("f", "text", "terms")],
)
ID, TEXT, TERMS = (one.id for one in SCHEMA.fields)


def spec_of(**params: object) -> IndexSpec:
    return parse_index_spec("SPARSE_INVERTED_INDEX", "BM25", params, form=Form.SPARSE)


def batch_of(texts: Mapping[int, str]) -> Batch:
    columns: dict[FieldId, Column] = {
        ID: ScalarColumn(np.array(list(texts), np.int64)),
        TEXT: StringColumn(StringArray.from_strings(list(texts.values()))),
    }
    return with_computed(Batch(columns, len(texts)), SCHEMA)


def reference(texts: Mapping[int, str], question: str, k1: float, b: float) -> dict[int, float]:
    rows = {key: text.split() for key, text in texts.items()}
    average = sum(map(len, rows.values())) / len(rows)
    scores: dict[int, float] = {}
    for term in question.split():
        n = sum(term in words for words in rows.values())
        for key, words in rows.items():
            if tf := words.count(term):
                idf = math.log(1 + (len(rows) - n + 0.5) / (n + 0.5))
                share = tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(words) / average))
                scores[key] = scores.get(key, 0.0) + idf * share
    return scores


words = st.lists(st.sampled_from("a bb c dog cat tree".split()), max_size=9).map(" ".join)
spreads = st.lists(st.tuples(words, st.integers(0, 5), st.booleans()), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(spreads, words, st.sampled_from([0.0, 0.5, 1.2, 3.0]), st.sampled_from([0.0, 0.75, 1.0]))
def test_scores_are_the_formulas(rows: list[tuple[str, int, bool]], question: str, k1: float, b: float) -> None:
    """Rows in six segments of three shards, some deleted: as of before and as of after."""
    segments = [GrowingSegment(SegmentId(i + 1), PartitionId(1), SCHEMA, Tick(1)) for i in range(6)]
    for key, (text, place, _) in enumerate(rows):
        segments[place].append(batch_of({key: text}), Tick(10 + key))
    sealed = [SealedSegment.from_growing(one) if one.rows and i % 2 else one for i, one in enumerate(segments)]
    dead = {key for key, (_, _, dies) in enumerate(rows) if dies}
    keys: Keys = np.array(sorted(dead), np.int64)
    for one in sealed:
        one.delete(keys, Tick(1000))
    spec, views = spec_of(bm25_k1=str(k1), bm25_b=b), [one.view() for one in sealed]
    for tick, gone in ((Tick(999), set[int]()), (Tick(1000), dead)):
        texts = {key: text for key, (text, _, _) in enumerate(rows) if key not in gone}
        if not texts:
            continue
        queries = term_rows([question], analyzer_of())
        terms = np.unique(queries.terms).tolist()
        parts = [statistics(views[i : i + 2], TERMS, terms, tick) for i in (0, 2, 4)]
        known = Statistics(
            sum(one.rows for one in parts),
            sum(one.terms for one in parts),
            np.sum([one.with_term for one in parts], axis=0),
        )
        asked, params = weighted(queries, terms, known, spec, SearchParams())
        found: dict[int, float] = {}
        for view in views:
            hits = search([view], VectorQuery(asked, TERMS, Metric.BM25, 50, tick, params))
            offsets = hits.offsets[0][hits.offsets[0] >= 0]
            ids = view.fetch(offsets, [ID]).columns[ID]
            assert isinstance(ids, ScalarColumn)
            found |= dict(zip(ids.values.tolist(), (-hits.distances[0][: len(offsets)]).tolist(), strict=True))
        assert found == pytest.approx(reference(texts, question, k1, b), rel=1e-5)


def test_terms_of_texts() -> None:
    """Numbers ascend, weights count; a text without terms is an empty row."""
    rows = term_rows(["b a b", "", "?"], analyzer_of())
    assert rows.offsets.tolist() == [0, 2, 2, 2]
    counted = dict(zip(rows.terms.tolist(), rows.weights.tolist(), strict=True))
    assert counted == {term_number("a"): 1.0, term_number("b"): 2.0} and rows.terms[0] < rows.terms[1]


def test_computed_fields_are_computed_again() -> None:
    """What stood there before does not matter."""
    batch = batch_of({1: "a b"})
    changed = Batch({**batch.columns, TEXT: StringColumn(StringArray.from_strings(["c"]))}, 1)
    column = with_computed(changed, SCHEMA).columns[TERMS]
    assert isinstance(column, SparseColumn)
    assert column.values.terms.tolist() == [term_number("c")]


def test_an_index_says_the_same() -> None:
    """With the index and without it the hits are the same."""
    rows = term_rows(["a b", "b b b", "c a", "d"] * 30, analyzer_of())
    queries = SparseRows.of([([term_number("b")], [1.5])])
    params = SearchParams(damping=0.3, damping_per_term=0.2)
    by_index = SparseIndex(spec_of(), rows).search(queries, 40, params=params)
    by_scan = nearest_sparse([rows.slice(0, 50), rows.slice(50, 120)], queries, 40, params=params)
    assert by_index.offsets.tolist() == by_scan.offsets.tolist()
    assert by_index.distances.tolist() == by_scan.distances.tolist()


@pytest.mark.parametrize("params", [{"bm25_k1": -1}, {"bm25_k1": "x"}, {"bm25_b": 1.5}, {"bm25_b": None}])
def test_parameters_have_bounds(params: dict[str, object]) -> None:
    """k1 is from 0 to 3, b from 0 to 1."""
    with pytest.raises(BadParam):
        spec_of(**params)


def test_a_spec_comes_back_from_the_log() -> None:
    """With its parameters."""
    spec = spec_of(bm25_k1=2)
    assert IndexSpec.from_dict(spec.to_dict()) == spec and dict(spec.params) == {"bm25_k1": 2.0, "bm25_b": 0.75}


def test_a_schema_comes_back_from_the_log() -> None:
    """With its functions, and after changes too; what a function needs cannot be dropped."""
    assert CollectionSchema.from_dict(SCHEMA.to_dict()) == SCHEMA
    changed = without_field(with_field(SCHEMA, FieldSchema("more", DataType.INT32, nullable=True)), "more")
    assert changed.functions == SCHEMA.functions
    for name in ("text", "terms"):
        with pytest.raises(InvalidParameter, match="function f reads or computes it"):
            without_field(changed, name)


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ([FunctionSchema("f", "text", "terms"), FunctionSchema("f", "text", "terms")], "duplicate function name"),
        ([FunctionSchema("f", "text", "terms"), FunctionSchema("g", "text", "terms")], "output of two functions"),
        ([FunctionSchema("f", "id", "terms")], "enable_analyzer"),
        ([FunctionSchema("f", "text", "id")], "must be a SparseFloatVector"),
        ([FunctionSchema("", "text", "terms")], "name should not be empty"),
    ],
)
def test_schemas_that_cannot_be(functions: Sequence[FunctionSchema], said: str) -> None:
    """A function that cannot be is refused by what is wrong with it."""
    with pytest.raises((InvalidParameter, NameInvalid), match=said):
        make_schema(list(SCHEMA.fields), dynamic=False, functions=functions)
