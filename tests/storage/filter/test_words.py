"""text_match and phrase_match find what looking at every text finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.analysis import VERSION, Analyzer, analyzer_of
from storage.candidates import candidates
from storage.columns import Batch, BatchDamaged, ScalarColumn, StringColumn
from storage.errors import FilterError
from storage.filter import compile_filter
from storage.filter.column_cache import ROWS_KEPT_MIN, ColumnCache
from storage.filter.words import WordLists
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.strings import StringArray
from storage.view import Part, PartIndexes

ENGLISH = '{"type": "english"}'


def schema_of(params: str = "", **more: str) -> CollectionSchema:
    match = {"enable_analyzer": "true", "enable_match": "true", "analyzer_params": params, **more}
    return make_schema(
        [
            FieldSchema("id", DataType.INT64, primary=True),
            FieldSchema("t", DataType.VARCHAR, max_bytes=999, nullable=True, params=match, analyzer_version=VERSION),
            FieldSchema("plain", DataType.VARCHAR, max_bytes=999),
            FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
        ],
        dynamic=True,
    )


SCHEMA, IN_ENGLISH = schema_of(), schema_of(ENGLISH)


def batch_of(texts: Sequence[str | None]) -> Batch:
    valid = np.array([one is not None for one in texts], np.bool_)
    column = StringColumn(StringArray.from_strings([one or "" for one in texts]), valid)
    return Batch(
        {SCHEMA.by_name["id"].id: ScalarColumn(np.arange(len(texts))), SCHEMA.by_name["t"].id: column}, len(texts)
    )


def found(text: str, texts: Sequence[str | None], schema: CollectionSchema = SCHEMA) -> list[int]:
    return np.flatnonzero(compile_filter(text, schema).evaluate(batch_of(texts))).tolist()


TEXTS = [
    "machine learning boosts efficiency", "learning machine", "the machine is good at learning", None, "",
    "Machine-Learning!", "deep learning", "a machine", "machine of deep learning", "learning a learning machine",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("text_match(t, 'machine')", [0, 1, 2, 5, 7, 8, 9]),
        ("text_match(t, 'machine deep')", [0, 1, 2, 5, 6, 7, 8, 9]),
        ("TEXT_MATCH(t, 'MACHINE learning', minimum_should_match=2)", [0, 1, 2, 5, 8, 9]),
        ("text_match(t, 'machine machine', minimum_should_match=2)", []),
        ("text_match(t, '?!')", []),
        ("not text_match(t, 'machine')", [4, 6]),
        ("text_match(t, 'deep') or t is null", [3, 6, 8]),
        ("text_match(t, 'machine') and id > 5", [7, 8, 9]),
        ("phrase_match(t, 'machine learning')", [0, 5]),
        ("phrase_match(t, 'machine learning', 1)", [0, 5]),
        ("phrase_match(t, 'machine learning', 2)", [0, 1, 5, 8, 9]),
        ("phrase_match(t, 'machine learning', 3)", [0, 1, 2, 5, 8, 9]),
        ("phrase_match(t, 'learning learning')", []),
        ("phrase_match(t, 'learning learning', 1)", [9]),
        ("phrase_match(t, '')", []),
    ],
)
def test_what_matches(text: str, rows: list[int]) -> None:
    """Words in any order, phrases in theirs; null is never found, nor is its opposite."""
    assert found(text, TEXTS) == rows


def test_texts_are_taken_apart_by_the_fields_analyzer() -> None:
    """Stems match, stop words do not; but they keep their places in a phrase."""
    assert found("text_match(t, 'LEARNS the')", TEXTS, IN_ENGLISH) == [0, 1, 2, 5, 6, 8, 9]
    assert found(
        "phrase_match(t, 'machines of learning')", ["machine learning", "machine for learning"], IN_ENGLISH
    ) == [1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text_match(plain, 'a')", "does not enable match"),
        ("text_match(id, 'a')", "non-string"),
        ("text_match(other, 'a')", "non-string"),
        ("text_match(t, 1)", "second argument of text_match is a text"),
        ("text_match(t, plain)", "second argument of text_match is a text"),
        ("text_match(t)", "text_match takes"),
        ("text_match(t, 'a', 2)", "text_match takes"),
        ("text_match(t, 'a', least=2)", "text_match takes"),
        ("text_match(t, 'a', minimum_should_match=0)", "range"),
        ("text_match(t, 'a', minimum_should_match='2')", "range"),
        ("phrase_match(t, 'a', -1)", "range"),
        ("phrase_match(t, 'a', 1.5)", "range"),
        ("phrase_match(t, 'a', slop=1)", "phrase_match takes"),
        ("text_match(t, 'a') == true", "can not be compared"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    """Fields that cannot match and options that cannot be are named."""
    with pytest.raises(FilterError, match=said):
        compile_filter(text, SCHEMA)


@pytest.mark.parametrize("text", ["text_match(t, 'b a', minimum_should_match=2)", "phrase_match(t, 'a b', 3)"])
def test_printed_and_read_again(text: str) -> None:
    """A filter's own text means the same."""
    compiled = compile_filter(text, SCHEMA)
    assert compile_filter(compiled.text, SCHEMA).predicate == compiled.predicate


def test_templates() -> None:
    """Text and options may come beside the filter."""
    compiled = compile_filter("phrase_match(t, {words}, {slop})", SCHEMA, {"words": "machine learning", "slop": 2})
    assert np.flatnonzero(compiled.evaluate(batch_of(TEXTS))).tolist() == [0, 1, 5, 8, 9]


# against looking at every text


def _phrase(analyzer: Analyzer, text: str, phrase: str, slop: int) -> bool:
    wanted, there = analyzer.placed(phrase), analyzer.placed(text)
    places = [[place for place, term in there if term == one] for _, one in wanted]
    return bool(wanted) and any(
        len(set(chosen)) == len(chosen)
        and max(p - o for p, (o, _) in zip(chosen, wanted, strict=True))
        - min(p - o for p, (o, _) in zip(chosen, wanted, strict=True))
        <= slop
        for chosen in itertools.product(*places)
    )


words = st.lists(st.sampled_from(["a", "b", "c", "the", "runs", "run", "-"]), max_size=7).map(" ".join)
columns = st.lists(st.none() | words, min_size=1, max_size=6)


def _copies(texts: list[str | None]) -> Iterator[tuple[list[str | None], int]]:
    yield texts, 1
    yield texts * 50, 50  # long enough to be kept


@settings(max_examples=150, deadline=None)
@given(columns, words, st.integers(1, 3), st.integers(0, 4), st.booleans())
def test_the_same_as_a_scan(texts: list[str | None], asked: str, least: int, slop: int, english: bool) -> None:
    """Of short columns and of long ones, asked whole or only some rows, once and again."""
    schema, analyzer = (IN_ENGLISH, analyzer_of(ENGLISH)) if english else (SCHEMA, analyzer_of())
    terms = set(analyzer.terms(asked))
    some = [
        i for i, one in enumerate(texts)
        if one is not None and terms and len(terms & set(analyzer.terms(one))) >= least
    ]  # fmt: skip
    phrases = [i for i, one in enumerate(texts) if one is not None and _phrase(analyzer, one, asked, slop)]
    for text, wanted in (
        (f"text_match(t, '{asked}', minimum_should_match={least})", some),
        (f"phrase_match(t, '{asked}', {slop})", phrases),
    ):
        compiled = compile_filter(text, schema)
        for column, times in _copies(texts):
            batch = batch_of(column)
            everywhere = [i + copy * len(texts) for copy in range(times) for i in wanted]
            few = np.arange(0, len(column), 9, dtype=np.int64)
            for _ in range(2):
                assert few[compiled.evaluate(batch, few)].tolist() == [i for i in everywhere if i % 9 == 0]
                assert np.flatnonzero(compiled.evaluate(batch)).tolist() == everywhere
            planned = candidates(compiled.predicate, PartIndexes(Part(batch, 0), frozenset()), 1 << 30)
            assert (planned is None) == (len(column) < ROWS_KEPT_MIN)  # whose lists are not remembered
            if planned is not None:
                offsets = planned.offsets
                if planned.rest is not None:
                    offsets = offsets[compiled.evaluate(batch, offsets, planned.rest)]
                assert offsets.tolist() == everywhere


@settings(max_examples=50, deadline=None)
@given(st.lists(words, max_size=9))
def test_lists_are_read_back_as_they_were(texts: list[str]) -> None:
    """Stored and read, an inverted list answers the same; what is damaged or none is said to be so."""
    lists = WordLists.of(texts, analyzer_of())
    data = lists.to_bytes()
    again = WordLists.from_bytes(data, len(texts))
    assert again.numbers == lists.numbers and again.rows == lists.rows
    for term in [*lists.numbers, "nowhere"]:
        for one, other in zip(again.places(term), lists.places(term), strict=True):
            assert one.tolist() == other.tolist()
    for damaged in (b"", data[: len(data) // 2], batch_of(["x"]).to_bytes()):
        with pytest.raises(BatchDamaged):
            WordLists.from_bytes(damaged, len(texts))


def test_kept_lists_stay_while_the_column_lives() -> None:
    """However many others come; and go with it."""
    cache: ColumnCache[np.ndarray[Any, Any]] = ColumnCache(100_000)
    kept, *others = [StringArray.from_strings(["x"] * 200) for _ in range(9)]
    cache.keep(kept, "k", np.zeros(1_000_000, np.uint8))
    for one in others:
        cache.put(one, "k", np.zeros(30_000, np.uint8))
    assert cache.keeps(kept, "k") and not cache.keeps(others[-1], "k")
    assert 2 <= sum(cache.get(one, "k") is not None for one in others) < len(others)
    del kept
    assert len(cache) <= len(others) and cache.bytes < 200_000


def test_texts_have_bounds() -> None:
    """A text of very many words is refused, not searched for."""
    with pytest.raises(FilterError, match="has 1001 terms, at most 1000"):
        compile_filter("text_match(t, {words})", SCHEMA, {"words": "word " * 1001})
