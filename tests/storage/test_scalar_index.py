"""Scalar indexes tell of every row that a filter may be true of, and change no answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from storage.columns import ScalarColumn, StringColumn
from storage.deletes import Ticks
from storage.errors import InvalidParameter
from storage.filter import compile_filter
from storage.scalar_index import SortedColumn, candidates, parse_scalar_index
from storage.schema import DataType, FieldSchema
from storage.sealed import SealedSegment
from storage.search import count, query
from storage.types import PartitionId, SegmentId, Tick
from tests.storage.filter.model import SCHEMA as WIDE
from tests.storage.filter.model import Row, Tree, batch_of, show
from tests.storage.filter.test_property import rows_strategy, trees
from tests.storage.rows import GROUP, NOTE, make_batch, make_collection

SCHEMA = make_collection()
ROWS = 6_000
NOW = Tick(1 << 40)
SCALARS = frozenset(
    one.id for one in WIDE.fields if one.type not in (DataType.JSON, DataType.ARRAY) and not one.type.is_vector
)


@settings(max_examples=300, deadline=None)
@given(trees, rows_strategy())
def test_no_row_that_passes_is_missed(tree: Tree, rows: list[Row]) -> None:
    """Whatever the filter, rows and nulls: what passes is among the candidates, or is they where that is said."""
    compiled, batch = compile_filter(show(tree), WIDE), batch_of(rows)
    known = {
        one: SortedColumn(column)
        for one, column in batch.columns.items()
        if one in SCALARS and isinstance(column, ScalarColumn | StringColumn)
    }
    found = candidates(compiled.predicate, known.get, rows_max=1_000)
    if found is not None:
        assert (np.diff(found.offsets) > 0).all()
        passing, left = np.flatnonzero(compiled.evaluate(batch)).tolist(), found.offsets.tolist()
        assert passing == left if found.exact else set(passing) <= set(left), compiled.text


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
    compiled = compile_filter(text, SCHEMA, indexed=frozenset({GROUP, NOTE}))
    found = _segment().view().candidates(compiled)
    assert found is not None
    assert len(found.offsets) <= most


@pytest.mark.parametrize(
    "text", ["group != 3", "not (group == 3)", "note like '%7'", "group + 1 == 3", "group == 3 or id > 5", "group > 3"]
)
def test_where_an_index_tells_nothing_all_rows_are_looked_at(text: str) -> None:
    """What no span holds, or only spans of many rows, is left to a scan."""
    compiled = compile_filter(text, SCHEMA, indexed=frozenset({GROUP, NOTE}))
    assert _segment().view().candidates(compiled) is None


@pytest.mark.parametrize("text", ["group == 7", "note like 'note 12%'", "group in [3, 5] and note > 'note 3'"])
def test_answers_are_the_same_as_without(text: str) -> None:
    """With deleted and expired rows, at any tick."""
    view, seen = _segment().view(), 0
    for tick, expire_before in ((NOW, Tick(0)), (Tick(30), Tick(0)), (NOW, Tick(20)), (Tick(40), Tick(10))):
        plain, quick = (compile_filter(text, SCHEMA, indexed=some) for some in (frozenset(), frozenset({GROUP, NOTE})))
        one = query([view], plain, tick=tick, expire_before=expire_before)
        other = query([view], quick, tick=tick, expire_before=expire_before)
        assert one.offsets.tolist() == other.offsets.tolist()
        assert len(other) == count([view], quick, tick=tick, expire_before=expire_before)
        seen += len(other)
    assert seen > 0


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        (DataType.JSON, "INVERTED", "of type JSON can have no index"),
        (DataType.DOUBLE, "BITMAP", "use AUTOINDEX or INVERTED or STL_SORT"),
        (DataType.INT64, "Trie", "use AUTOINDEX or INVERTED or BITMAP or STL_SORT"),
        (DataType.VARCHAR, "NGRAM", "index type NGRAM cannot be built on field f of type VarChar"),
        (DataType.VARCHAR, "HNSW", "index type HNSW cannot be built"),
    ],
)
def test_a_type_that_does_not_fit_says_which_do(kind: DataType, name: str, says: str) -> None:
    with pytest.raises(InvalidParameter, match=says):
        parse_scalar_index(name, FieldSchema("f", kind, max_bytes=9))


@pytest.mark.parametrize(("name", "found"), [("", "AUTOINDEX"), ("inverted", "INVERTED"), ("TRIE", "Trie")])
def test_names_are_read_in_any_case(name: str, found: str) -> None:
    assert str(parse_scalar_index(name, FieldSchema("f", DataType.VARCHAR, max_bytes=9))) == found


def _segment() -> SealedSegment:
    numbers = list(range(ROWS))
    groups = [None if number % 17 == 0 else number % 1_000 for number in numbers]
    batch = make_batch(SCHEMA, numbers, groups, np.zeros((ROWS, 4), np.float32))
    ticks: Ticks = np.arange(ROWS, dtype=np.int64) // 100
    segment = SealedSegment.from_batch(SegmentId(1), PartitionId(1), SCHEMA, batch, ticks)
    segment.delete(np.arange(0, ROWS, 7, dtype=np.int64), Tick(35))
    return segment
