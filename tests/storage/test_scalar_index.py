"""Scalar indexes tell of every row that a filter may be true of, and change no answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from storage.candidates import candidates
from storage.columns import Batch, Offsets
from storage.deletes import Ticks
from storage.errors import InvalidParameter
from storage.filter import CompiledFilter, compile_filter
from storage.filter.indexed import Cast, Indexed
from storage.filter.reads import leaves_of
from storage.filter.tree import ArrayValue, PathValue
from storage.scalar_index import check_spec, indexed_by, parse_scalar_index
from storage.schema import DataType, FieldSchema
from storage.sealed import SealedSegment
from storage.search import count, query
from storage.types import PartitionId, SegmentId, Tick
from storage.view import Part, PartIndexes
from tests.storage.filter.model import SCHEMA as WIDE
from tests.storage.filter.model import Row, Tree, batch_of, show
from tests.storage.filter.test_property import rows_strategy, trees
from tests.storage.rows import GROUP, NOTE, make_batch, make_collection

SCHEMA = make_collection()
ROWS = 6_000
NOW = Tick(1 << 40)
INDEXED = frozenset({Indexed(GROUP), Indexed(NOTE)})


def _everything_indexed(compiled: CompiledFilter) -> frozenset[Indexed]:
    """Return an index of every kind on everything that the filter reads."""
    found: set[Indexed] = set()
    for leaf in leaves_of(compiled.predicate):
        field = leaf.field
        if isinstance(leaf, PathValue | ArrayValue) and leaf.keys is not None:
            found.update(Indexed(field.id, leaf.keys, cast) for cast in Cast)
            found.add(Indexed(field.id, leaf.keys, Cast.VARCHAR, 1))
        elif field.type is not DataType.JSON:
            found.add(Indexed(field.id))
        if field.name == "other":  # which then has no index of its values
            found -= {Indexed(field.id)}
            found.add(Indexed(field.id, gram=1))
    return frozenset(found)


@settings(max_examples=200, deadline=None)
@given(trees, rows_strategy())
def test_no_row_that_passes_is_missed(tree: Tree, rows: list[Row]) -> None:
    """Whatever the filter, rows, nulls and kinds in JSON: the candidates of which the rest is true are what passes."""
    batch = batch_of(rows)
    compiled = compile_filter(show(tree), WIDE)
    compiled = compile_filter(show(tree), WIDE, indexed=_everything_indexed(compiled))
    found = _candidates(compiled, batch)
    if found is not None:
        assert (np.diff(found) > 0).all()
        assert found.tolist() == np.flatnonzero(compiled.evaluate(batch)).tolist(), compiled.text


def _candidates(compiled: CompiledFilter, batch: Batch) -> Offsets | None:
    found = candidates(compiled.predicate, PartIndexes(Part(batch, 0), compiled.indexed), rows_max=1_000)
    if found is None or found.rest is None:
        return None if found is None else found.offsets
    return found.offsets[compiled.evaluate(batch, found.offsets, found.rest)]


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("group == 7", 6),
        ("group in [1, 2, 2, 9]", 18),
        ("group > 10 and group < 13", 12),
        ("10 < group <= 12", 12),
        ("group >= 998", 12),
        ("group < 1.5", 12),
        ("note == 'note 17'", 1),
        ("note like 'note 59%'", 111),
        ("note >= 'note 5998' and note < 'note 5999'", 2),
        ("group == 3 or note == 'note 17'", 7),
        ("group == 3 and note like '%7'", 6),
        ("group == 3 and not (note == 'x')", 6),
        ("group == 99999999999", 0),
        ("group == 0.5", 0),
    ],
)
def test_few_rows_are_looked_at(text: str, most: int) -> None:
    """Comparisons, ranges, `in`, prefixes, and what is joined by `and` and `or` leave few candidates."""
    compiled = compile_filter(text, SCHEMA, indexed=INDEXED)
    (part,) = _segment().view().parts
    found = part.candidates(compiled)
    assert found is not None
    assert len(found.offsets) <= most


@pytest.mark.parametrize(
    "text", ["group != 3", "not (group == 3)", "note like '%7'", "group + 1 == 3", "group == 3 or id > 5", "group > 3"]
)
def test_where_an_index_tells_nothing_all_rows_are_looked_at(text: str) -> None:
    """What no span holds, or only spans of many rows, is left to a scan."""
    compiled = compile_filter(text, SCHEMA, indexed=INDEXED)
    assert _segment().view().chosen(compiled) is None


@pytest.mark.parametrize("text", ["group == 7", "note like 'note 12%'", "group in [3, 5] and note > 'note 3'"])
def test_answers_are_the_same_as_without(text: str) -> None:
    """With deleted and expired rows, at any tick."""
    view, seen = _segment().view(), 0
    for tick, expire_before in ((NOW, Tick(0)), (Tick(30), Tick(0)), (NOW, Tick(20)), (Tick(40), Tick(10))):
        plain, quick = (compile_filter(text, SCHEMA, indexed=some) for some in (frozenset(), INDEXED))
        one = query([view], plain, tick=tick, expire_before=expire_before)
        other = query([view], quick, tick=tick, expire_before=expire_before)
        assert one.offsets.tolist() == other.offsets.tolist()
        assert len(other) == count([view], quick, tick=tick, expire_before=expire_before)
        seen += len(other)
    assert seen > 0


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("note like '%e 59%9%'", 111),
        ("note like '%te 5998'", 1),
        ("note like '%5998%' or note like '%e 1__'", 4_000),
        ("note like '%zzz%'", 0),
    ],
)
def test_parts_of_texts_are_found_by_their_grams(text: str, most: int) -> None:
    """Patterns with runs of at least a gram leave the texts that have the run's rarest grams."""
    compiled = compile_filter(text, SCHEMA, indexed=frozenset({Indexed(NOTE, gram=3)}))
    view = _segment().view()
    found = candidates(compiled.predicate, PartIndexes(view.parts[0], compiled.indexed), ROWS)
    assert found is not None and len(found.offsets) <= most
    plain = compile_filter(text, SCHEMA)
    assert query([view], compiled, tick=NOW).offsets.tolist() == query([view], plain, tick=NOW).offsets.tolist()


def test_a_run_shorter_than_a_gram_is_looked_for_in_all_texts() -> None:
    compiled = compile_filter("note like '%7%'", SCHEMA, indexed=frozenset({Indexed(NOTE, gram=3)}))
    assert _segment().view().chosen(compiled) is None


@pytest.mark.parametrize(
    ("field", "name", "params", "says"),
    [
        (DataType.JSON, "INVERTED", {}, "json_cast_type is missing"),
        (DataType.JSON, "INVERTED", {"json_cast_type": "JSON"}, "json_cast_type JSON is not supported; use BOOL or"),
        (DataType.JSON, "INVERTED", {"json_cast_type": "DOUBLE", "json_path": "g['a']"}, "not begin with its field, f"),
        (DataType.JSON, "INVERTED", {"json_cast_type": "DOUBLE", "json_path": "f["}, "is no path"),
        (DataType.JSON, "INVERTED", {"json_cast_type": "DOUBLE", "json_path": "f['a'] > 1"}, "is no path"),
        (DataType.JSON, "BITMAP", {"json_cast_type": "DOUBLE"}, "use AUTOINDEX or INVERTED or NGRAM"),
        (DataType.JSON, "NGRAM", {"json_cast_type": "DOUBLE"}, "needs json_cast_type VARCHAR, got DOUBLE"),
        (DataType.DOUBLE, "BITMAP", {}, "use AUTOINDEX or INVERTED or STL_SORT"),
        (DataType.INT64, "Trie", {}, "use AUTOINDEX or INVERTED or BITMAP or STL_SORT"),
        (DataType.INT64, "NGRAM", {}, "index type NGRAM cannot be built on field f of type Int64"),
        (DataType.ARRAY, "Trie", {}, "use AUTOINDEX or INVERTED"),
        (DataType.VARCHAR, "NGRAM", {"max_gram": 3}, "min_gram is missing or no whole number"),
        (DataType.VARCHAR, "NGRAM", {"min_gram": 4, "max_gram": 3}, "max_gram no less, got 4 and 3"),
        (DataType.VARCHAR, "HNSW", {}, "index type HNSW cannot be built"),
    ],
)
def test_what_does_not_fit_says_what_does(field: DataType, name: str, params: dict[str, Any], says: str) -> None:
    element = DataType.DOUBLE if field is DataType.ARRAY else None
    with pytest.raises(InvalidParameter, match=says):
        parse_scalar_index(name, FieldSchema("f", field, max_bytes=9, element=element), params)


@pytest.mark.parametrize(
    ("name", "field", "params", "kind", "of"),
    [
        ("", FieldSchema("f", DataType.VARCHAR), {}, "AUTOINDEX", (None, None, 0)),
        ("TRIE", FieldSchema("f", DataType.VARCHAR), {}, "Trie", (None, None, 0)),
        ("ngram", FieldSchema("f", DataType.VARCHAR), {"min_gram": "2", "max_gram": 3}, "NGRAM", (None, None, 2)),
        ("bitmap", FieldSchema("f", DataType.ARRAY, element=DataType.INT8), {}, "BITMAP", (None, None, 0)),
        (
            "inverted", FieldSchema("f", DataType.JSON), {"json_path": "f['a'][0]", "json_cast_type": "array_double"},
            "INVERTED", (("a", 0), Cast.ARRAY_DOUBLE, 0),
        ),
        (
            "", FieldSchema("$meta", DataType.JSON, dynamic=True), {"json_path": "a['b']", "json_cast_type": "bool"},
            "AUTOINDEX", (("a", "b"), Cast.BOOL, 0),
        ),
    ],
)  # fmt: skip
def test_names_and_parameters_are_read_in_any_case(
    name: str, field: FieldSchema, params: dict[str, Any], kind: str, of: tuple[Any, ...]
) -> None:
    spec = parse_scalar_index(name, field, params)
    check_spec(spec, field)
    assert spec["scalar"] == kind and indexed_by(field.id, spec) == (field.id, *of)


def _segment() -> SealedSegment:
    numbers = list(range(ROWS))
    groups = [None if number % 17 == 0 else number % 1_000 for number in numbers]
    batch = make_batch(SCHEMA, numbers, groups, np.zeros((ROWS, 4), np.float32))
    ticks: Ticks = np.arange(ROWS, dtype=np.int64) // 100
    segment = SealedSegment.from_batch(SegmentId(1), PartitionId(1), SCHEMA, batch, ticks)
    segment.delete(np.arange(0, ROWS, 7, dtype=np.int64), Tick(35))
    return segment
