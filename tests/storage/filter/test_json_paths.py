"""JSON paths: values keep their kinds, and what was parsed is remembered while its column lives."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from storage.columns import Batch, StringColumn
from storage.filter import compile_filter
from storage.filter.column_cache import ColumnCache
from storage.filter.json_paths import JsonValues, Keys, Kind, extract, extract_all, json_values
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


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Keys]]]:
    """Return the growing list of (documents, paths) that were parsed."""
    calls: list[tuple[int, list[Keys]]] = []

    def counted(texts: StringArray, paths: Sequence[Keys]) -> list[JsonValues]:
        calls.append((len(texts), list(paths)))
        return extract_all(texts, paths)

    monkeypatch.setattr("storage.filter.json_paths.extract_all", counted)
    return calls


def ints_of(values: JsonValues) -> list[int]:
    assert values.ints is not None
    return list(values.ints.tolist())


def test_parsed_once(parsed: list[tuple[int, list[Keys]]]) -> None:
    """The second filter on a path of the same column parses nothing; other columns are not mixed up with it."""
    texts, others = texts_of(*range(200)), texts_of(*range(200, 400))
    for _ in range(3):
        assert ints_of(json_values(texts, ("a",))) == list(range(200))
        assert ints_of(json_values(others, ("a",))) == list(range(200, 400))
    assert parsed == [(200, [("a",)])] * 2
    json_values(texts, ("b",))
    assert len(parsed) == 3


def test_all_paths_of_a_filter_are_parsed_together(parsed: list[tuple[int, list[Keys]]]) -> None:
    """One pass over the documents serves every path of the field that the filter names."""
    batch = batch_of([{"id": i, "other": "", "doc": {"x": i}, "$meta": {"k": i % 3, "s": [i]}} for i in range(300)])
    compiled = compile_filter('(k == 1 or k + 1 == 3) and s[0] > 10 or array_length(s) == 2 or doc["x"] == 5', SCHEMA)
    for _ in range(2):
        assert np.count_nonzero(compiled.evaluate(batch)) == 194
    assert sorted(parsed, key=repr) == sorted([(300, [("k",), ("s", 0), ("s",)]), (300, [("x",)])], key=repr)


def test_few_rows_of_an_unknown_column_are_parsed_alone(parsed: list[tuple[int, list[Keys]]]) -> None:
    """They are not worth the whole column, until they have cost as much."""
    texts, few = texts_of(*range(400)), np.array([399, 3])
    for _ in range(250):
        assert ints_of(json_values(texts, ("a",), few)) == [399, 3]
    assert [rows for rows, _ in parsed] == [2] * 199 + [400]


def test_the_cache_forgets_dead_columns_and_the_least_used() -> None:
    """It holds columns weakly, and no more bytes than it may."""
    texts = [texts_of(*range(i, i + 1000)) for i in range(4)]
    values = [extract(one, ("a",)) for one in texts]
    cache: ColumnCache[JsonValues] = ColumnCache(3 * values[0].nbytes + 15_000)
    for one, found in zip(texts[:3], values, strict=False):
        cache.put(one, ("a",), found)
    assert cache.get(texts[0], ("a",)) is values[0]
    cache.put(texts[3], ("a",), values[3])
    assert cache.get(texts[1], ("a",)) is None, "the least recently used went"
    assert cache.get(texts[0], ("a",)) is values[0] and len(cache) == 3
    assert 3 * values[0].nbytes <= cache.bytes <= 3 * values[0].nbytes + 15_000
    del texts, one
    gc.collect()
    assert len(cache) == 0


def test_what_the_cache_does_not_keep() -> None:
    """A column larger than all of it, or one that is parsed in no time."""
    large, small = texts_of(*range(10_000)), texts_of(1, 2)
    cache: ColumnCache[JsonValues] = ColumnCache(50_000)
    for texts in (small, large):
        cache.put(texts, ("a",), extract(texts, ("a",)))
        assert cache.get(texts, ("a",)) is None and cache.bytes == 0


def test_threads_share_it() -> None:
    """Many threads on many columns all get right answers."""
    batches = [
        batch_of([{"id": i, "other": "", "$meta": {"k": i, "s": f"{i}"}} for i in range(j, j + 150)]) for j in range(20)
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
