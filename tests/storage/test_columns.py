"""Batches: what goes in comes out, whatever is cut, taken, joined or damaged on the way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.columns import (
    ArrayColumn,
    Batch,
    BatchDamaged,
    Column,
    Mask,
    ScalarColumn,
    StringColumn,
    VectorColumn,
    side_by_side,
    stand_together,
)
from storage.strings import StringArray
from storage.types import FieldId

Row = tuple[Any, Any, Any, Any, Any]
rows_strategy = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        st.one_of(st.none(), st.text(max_size=9)),
        st.lists(st.integers(-128, 127), max_size=4),
        st.one_of(st.none(), st.lists(st.text(max_size=3), max_size=3)),
        st.tuples(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False)),
    ),
    max_size=12,
)


def live(values: Sequence[object]) -> Mask:
    return np.array([value is not None for value in values], np.bool_)


def make(rows: list[Row]) -> Batch:
    """Return the batch that holds these rows."""
    ints, texts, small, lists, vectors = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    columns: dict[FieldId, Column] = {
        FieldId(100): ScalarColumn(np.array([v or 0 for v in ints], np.int64), live(ints)),
        FieldId(101): StringColumn(StringArray.from_strings([v or "" for v in texts]), live(texts)),
        FieldId(102): ArrayColumn(
            np.cumsum([0, *map(len, small)], dtype=np.int64),
            ScalarColumn(np.array([v for one in small for v in one], np.int8)),
        ),
        FieldId(103): ArrayColumn(
            np.cumsum([0, *[len(one or []) for one in lists]], dtype=np.int64),
            StringColumn(StringArray.from_strings([v for one in lists for v in one or []])),
            live(lists),
        ),
        FieldId(104): VectorColumn(np.array(vectors, np.float32).reshape(len(rows), 2)),
    }  # fmt: skip
    return Batch(columns, len(rows))


def rows_of(batch: Batch) -> list[Row]:
    lists = [batch.columns[FieldId(i)].to_list() for i in range(100, 105)]
    return [(a, b, c, d, tuple(v.tolist())) for a, b, c, d, v in zip(*lists, strict=True)]


@given(rows_strategy)
def test_bytes_round_trip(rows: list[Row]) -> None:
    """Every value survives serialisation, and equal rows give equal bytes."""
    batch = make(rows)
    data = batch.to_bytes()
    assert rows_of(Batch.from_bytes(data)) == rows_of(batch) == rows
    assert Batch.from_bytes(data).to_bytes() == data


@given(rows_strategy, st.data())
def test_take_slice_and_concat_agree_with_lists(rows: list[Row], data: st.DataObject) -> None:
    """take, slice and concat do to batches what indexing, slicing and + do to lists; slices serialise like copies."""
    batch = make(rows)
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    assert rows_of(batch.take(np.array(picks, np.int64))) == [rows[i] for i in picks]
    start, stop = data.draw(st.integers(0, 13)), data.draw(st.integers(0, 13))
    piece = batch.slice(start, stop)
    assert rows_of(piece) == rows[start:stop]
    assert piece.to_bytes() == make(rows[start:stop]).to_bytes()
    assert rows_of(Batch.concat([piece, batch, piece])) == rows[start:stop] + rows + rows[start:stop]


@given(rows_strategy, st.integers(0, 8))
def test_only_vectors_share_memory_where_that_is_asked_for(rows: list[Row], ahead: int) -> None:
    """Of a batch that is to be copied by its reader, what is not dense vectors stays though its bytes change; and its
    bytes may begin anywhere.
    """
    data = bytes(ahead) + make(rows).to_bytes()
    changing = bytearray(data)
    batch = Batch.from_bytes(memoryview(changing)[ahead:], shared=False)
    assert rows_of(batch) == rows
    batch = Batch.from_bytes(memoryview(changing)[ahead:], shared=False)
    changing[:] = bytes(len(changing))
    assert [one[:4] for one in rows_of(batch)] == [one[:4] for one in rows]
    assert not any(any(one[4]) for one in rows_of(batch))


_WHOLE = np.arange(24, dtype=np.float32).reshape(8, 3).copy()
_OTHER = _WHOLE.copy()


@pytest.mark.parametrize(
    ("arrays", "is_together"),
    [
        ([_WHOLE[1:3], _WHOLE[3:4], _WHOLE[4:7]], True),
        ([_WHOLE[:8]], True),
        ([_WHOLE[2:2], _WHOLE[2:5]], False),
        ([_WHOLE[1:3], _WHOLE[4:7]], False),
        ([_WHOLE[3:4], _WHOLE[1:3]], False),
        ([_WHOLE[1:3], _OTHER[3:4]], False),
        ([_WHOLE, _OTHER], False),
        ([_WHOLE[1:3], _WHOLE[3:7:2]], False),
        ([_WHOLE[1:3, :2], _WHOLE[3:4, :2]], False),
        ([_WHOLE[1:3].view(np.uint32), _WHOLE[3:4].view(np.uint32)], False),
        ([], False),
    ],
)
def test_vectors_that_stand_together(arrays: list[Any], is_together: bool) -> None:
    """Vectors that follow one another in one array are joined without a copy, and others are not taken for such."""
    found = stand_together([VectorColumn(one) for one in arrays])
    assert (found is not None) == is_together
    if found is not None:
        assert np.array_equal(found.values, np.concatenate(arrays))
        assert np.shares_memory(found.values, _WHOLE)
        assert len(arrays) == 1 or not found.values.flags.writeable


@given(st.lists(st.integers(0, 24), max_size=6), st.data())
def test_rows_stay_in_order_in_fewer_arrays(cuts: list[int], data: st.DataObject) -> None:
    """However two arrays are cut and mixed, the rows are the same, and no two neighbours are left that could be one."""
    wholes = [np.arange(72, dtype=np.float32).reshape(24, 3).copy() + 100 * i for i in range(2)]
    bounds = [0, *sorted(set(cuts) - {0, 24}), 24]
    pieces = [wholes[data.draw(st.integers(0, 1))][a:b] for a, b in itertools.pairwise(bounds)]
    found = side_by_side(pieces)
    assert np.array_equal(np.concatenate(found), np.concatenate(pieces))
    changes = sum(a.base is not b.base for a, b in itertools.pairwise(pieces))
    assert len(found) == 1 + changes


def test_damage_is_refused_or_harmless() -> None:
    """No cut and no flipped byte makes reading a batch do anything but succeed or raise BatchDamaged."""
    data = make([(1, "one", [1, 2], ["a"], (1.0, 2.0)), (None, None, [], None, (3.0, 4.0))]).to_bytes()
    for cut in range(len(data)):
        try:
            Batch.from_bytes(data[:cut])
        except BatchDamaged:
            continue
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 0xFF
        try:
            Batch.from_bytes(bytes(broken))
        except BatchDamaged:
            continue
    with pytest.raises(BatchDamaged, match="starts with"):
        Batch.from_bytes(b"nonsense, and long enough")


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("==", [False, True, False]),
        ("<", [True, False, False]),
        (">=", [False, True, True]),
        ("!=", [True, False, True]),
    ],
)
def test_text_compares_by_code_point(op: Any, expected: list[bool]) -> None:
    """Comparison of text is by code point, for a constant and for an array."""
    array = StringArray.from_strings(["Zebra", "apple", "äpfel"])
    assert array.compare(op, "apple").tolist() == expected
    assert array.compare(op, StringArray.from_strings(["apple"] * 3)).tolist() == expected
