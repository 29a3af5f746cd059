"""JSON paths: values keep their kinds, and what was parsed is remembered while its column lives."""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from storage.columns import Batch, StringColumn
from storage.filter import compile_filter
from storage.filter.json_paths import JsonValues, Kind, PathCache, extract, json_values
from storage.strings import StringArray
from tests.storage.filter.model import SCHEMA, batch_of


def texts_of(*values: Any) -> StringArray:
    return StringArray.from_strings([json.dumps({"a": value}) for value in values])


def test_kinds() -> None:
    """Whole numbers up to uint64 stay whole, beyond that they are doubles; a null row has no value."""
    kinds = extract(
        StringArray.from_strings(
            [
                *(f'{{"a": {v}}}' for v in ("1", "-1", "18446744073709551615", "1e19", "1.0", "true", "null", '"x"')),
                *('{"a": [1]}', '{"a": {}}', "{}", "[1]", "", "not json"),
            ]
        ),
        ("a",),
    ).kinds.tolist()
    assert kinds == [
        *(Kind.INT, Kind.INT, Kind.UINT, Kind.FLOAT, Kind.FLOAT, Kind.BOOL, Kind.NULL, Kind.TEXT),
        *(Kind.LIST, Kind.OBJECT, Kind.MISSING, Kind.MISSING, Kind.MISSING, Kind.MISSING),
    ]


def test_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second filter on a path of the same column parses nothing; other columns are not mixed up with it."""
    calls = []

    def counted(texts: StringArray, keys: tuple[str | int, ...]) -> JsonValues:
        calls.append(keys)
        return extract(texts, keys)

    monkeypatch.setattr("storage.filter.json_paths.extract", counted)
    texts, others = texts_of(1, 2), texts_of(2, 1)
    for _ in range(3):
        found = [json_values(array, ("a",)).ints for array in (texts, others)]
        assert [None if one is None else one.tolist() for one in found] == [[1, 2], [2, 1]]
    assert len(calls) == 2
    json_values(texts, ("b",))
    assert len(calls) == 3


def test_few_rows_of_an_unknown_column_are_parsed_alone() -> None:
    """They are not worth the whole column."""
    texts = texts_of(*range(100))
    found = json_values(texts, ("a",), np.array([99, 3]))
    assert found.ints is not None and found.ints.tolist() == [99, 3]


def test_the_cache_forgets_dead_columns_and_the_least_used() -> None:
    """It holds columns weakly, and no more bytes than it may."""
    texts = [texts_of(*range(i, i + 100)) for i in range(4)]
    values = [extract(one, ("a",)) for one in texts]
    cache = PathCache(3 * values[0].nbytes)
    for one, found in zip(texts[:3], values, strict=False):
        cache.put(one, ("a",), found)
    assert cache.get(texts[0], ("a",)) is values[0]
    cache.put(texts[3], ("a",), values[3])
    assert cache.get(texts[1], ("a",)) is None, "the least recently used went"
    assert cache.get(texts[0], ("a",)) is values[0] and len(cache) == 3
    assert cache.bytes <= 3 * values[0].nbytes
    del texts, one
    gc.collect()
    assert len(cache) == 0
    cache = PathCache(8)
    lone = texts_of(1)
    cache.put(lone, ("a",), extract(lone, ("a",)))
    assert cache.get(lone, ("a",)) is None, "what is larger than the cache is not kept"


def test_threads_share_it() -> None:
    """Many threads on many columns all get right answers."""
    batches = [
        batch_of([{"id": i, "other": "", "$meta": {"k": i, "s": f"{i}"}} for i in range(j, j + 50)]) for j in range(20)
    ]
    filters = [compile_filter(text, SCHEMA) for text in ("k >= 30", 's == "33"', "k % 2 == 0", 'k > 1 and s like "%3"')]
    expected = [[one.evaluate(batch).tolist() for one in filters] for batch in batches]

    def work(turn: int) -> bool:
        fresh = [batch.take(np.arange(batch.rows)) for batch in batches] if turn % 2 else batches
        return all(
            one.evaluate(batch).tolist() == right
            for batch, rights in zip(fresh, expected, strict=True)
            for one, right in zip(filters, rights, strict=True)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


def test_documents_that_nest_deep() -> None:
    """A document deeper than any constant is compared without harm."""
    deep = "[" * 900 + "]" * 900
    texts = StringArray.from_strings([f'{{"a": {deep}}}', '{"a": [[1]]}'])
    batch = batch_of([{"id": i, "other": "", "$meta": {}} for i in range(2)])
    columns = {**batch.columns, SCHEMA.by_name["doc"].id: StringColumn(texts)}
    rows = Batch(columns, 2)
    assert compile_filter('json_contains(doc["a"], [1])', SCHEMA).evaluate(rows).tolist() == [False, True]
    assert compile_filter('doc["a"] == [[]]', SCHEMA).evaluate(rows).tolist() == [False, False]
