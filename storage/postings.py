"""What scalar indexes are made of: for values, or for pieces of text, the rows that have them.

`SortedColumn` holds rows by the order of their values, so that comparisons, ranges and prefixes are spans, found by
bisection. Of arrays it holds the elements, and a row stands in it as often as its array has elements. `GramLists` holds
for each run of a few bytes the rows whose text has it. Both take 4 bytes for each place, and their values once more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from storage.columns import ArrayColumn, Column, ScalarColumn, StringColumn
from storage.filter.tree import CompareOp
from storage.strings import StringArray

Constant = bool | int | float | str
Rows = npt.NDArray[np.int32]
_FENCE: Final = 16
"""Of so many texts in order one is kept as Python's own, between which bisection begins."""
GRAM_BYTES_MAX: Final = 8
_GRAM_LISTS: Final = 4
"""Of a text's grams so many, those in the fewest rows, are met with each other; what is left is looked at."""


class Postings(Protocol):
    """Rows of an index."""

    def __len__(self) -> int:
        """At least as many as the rows."""
        ...

    @property
    def rows(self) -> npt.NDArray[Any]: ...

    @property
    def order(self) -> Order:
        """How the rows come."""
        ...


class Order(Enum):
    ASCENDING = "each once, ascending"
    ONCE = "each once"
    NONE = "in any order, perhaps several times"


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Rows as they are."""

    rows: npt.NDArray[Any]
    order: Order = Order.NONE

    def __len__(self) -> int:
        return len(self.rows)


class Span:
    """Rows whose values follow one another: places `first` to `last` of an index, without the last."""

    __slots__ = ("first", "index", "last", "order")

    def __init__(self, index: SortedColumn, first: int, last: int, *, is_one_value: bool = False) -> None:
        self.index, self.first, self.last = index, first, max(first, last)
        self.order = Order.NONE if not index.is_single else Order.ASCENDING if is_one_value else Order.ONCE

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def rows(self) -> Rows:
        return self.index.rows[self.first : self.last]


class _Values(Protocol):
    """Values in ascending order, of one kind."""

    def place_of(self, value: Any, *, after: bool, begin: int = 0) -> int | None:
        """Return how many are below the value, or if `after` not above it; None if they are of other kinds.

        begin  of which it is known that the place is not before it
        """
        ...


class SortedColumn:
    """The rows of a column that are neither null nor NaN, by value."""

    def __init__(self, column: Column) -> None:
        owners: npt.NDArray[Any] | None = None
        self.is_single = not isinstance(column, ArrayColumn)
        """Whether each row has one value at most."""
        if isinstance(column, ArrayColumn):
            owners = np.repeat(np.arange(len(column), dtype=np.int32), np.diff(column.offsets))
            if column.valid is not None:
                owners = np.where(column.valid[owners], owners, -1).astype(np.int32)
            column = column.items
        assert isinstance(column, ScalarColumn | StringColumn), "of scalars and texts"
        if isinstance(column, StringColumn):
            order = column.values.order()
        else:
            order = np.argsort(column.values, kind="stable")
            if column.values.dtype.kind == "f":
                order = order[: len(order) - int(np.count_nonzero(np.isnan(column.values)))]
        if column.valid is not None:
            order = order[column.valid[order]]
        if owners is not None:
            order = order[owners[order] >= 0]
        self._values: _Values
        if isinstance(column, StringColumn):
            self._values = _Texts(column.values.take(order))
        else:
            self._values = _Numbers(column.values[order])
        self.rows: Rows = (order if owners is None else owners[order]).astype(np.int32)
        """In the order of their values; of rows with one value ascending."""

    def __len__(self) -> int:
        return len(self.rows)

    def compared(self, op: CompareOp, value: Constant) -> Span | None:
        """Return where the values are of which `op value` is true; None if that is no span, or of another kind."""
        if op == "!=":
            return None
        first = 0 if op in ("<", "<=") else self._values.place_of(value, after=op == ">")
        if first is None:
            return None
        last = len(self) if op in (">", ">=") else self._values.place_of(value, after=op != "<", begin=first)
        return None if last is None else Span(self, first, last, is_one_value=op == "==")

    def with_prefix(self, prefix: str) -> Span | None:
        """Return where the texts are that begin so."""
        return Span(self, *self._values.prefixed(prefix)) if isinstance(self._values, _Texts) else None


class _Numbers:
    """Compared as Python does: integers and doubles by what they are, never by a rounded copy."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = memoryview(values)  # type: ignore[arg-type]

    def place_of(self, value: Any, *, after: bool, begin: int = 0) -> int | None:
        if isinstance(value, str):
            return None
        return (bisect_right if after else bisect_left)(self._values, value, begin)


class _Texts:
    """Compared by their bytes, which for UTF-8 is by code point."""

    def __init__(self, values: StringArray) -> None:
        ends, self._data = values.buffers()
        self._ends = memoryview(ends)  # type: ignore[arg-type]
        self._fences = [self._text(place) for place in range(0, len(values), _FENCE)]
        self._count = len(values)

    def place_of(self, value: Any, *, after: bool, begin: int = 0) -> int | None:
        return self._place_of(value.encode(), after=after) if isinstance(value, str) else None

    def prefixed(self, prefix: str) -> tuple[int, int]:
        start = prefix.encode()
        if not start:
            return 0, self._count
        behind = start[:-1] + bytes([start[-1] + 1])  # no byte of UTF-8 is the greatest there is
        return self._place_of(start, after=False), self._place_of(behind, after=False)

    def _place_of(self, value: bytes, *, after: bool) -> int:
        bisect = bisect_right if after else bisect_left
        fence = bisect(self._fences, value)
        first, last = max(0, (fence - 1) * _FENCE), min(self._count, fence * _FENCE)
        while first < last:
            middle = (first + last) // 2
            text = self._text(middle)
            if text < value or (after and text == value):
                first = middle + 1
            else:
                last = middle
        return first

    def _text(self, place: int) -> bytes:
        return bytes(self._data[self._ends[place] : self._ends[place + 1]])


class GramLists:
    """For each run of `size` bytes that occurs in a column's texts the rows that have it; null rows are in no list."""

    def __init__(self, column: StringColumn, size: int) -> None:
        assert 1 <= size <= GRAM_BYTES_MAX, "a gram fits 64 bits"
        self._size = size
        ends, data = column.values.buffers()
        letters = np.frombuffer(data, np.uint8)
        lengths = np.diff(ends)
        if column.valid is not None:
            lengths = np.where(column.valid, lengths, 0)
        counts = np.maximum(lengths - (size - 1), 0)
        owners = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)[:-1]]) if len(counts) else counts
        places = np.arange(len(owners), dtype=np.int64) - np.repeat(before - ends[:-1], counts)
        codes = np.zeros(len(owners), np.uint64)
        for i in range(size):
            codes = (codes << np.uint64(8)) | letters[places + i]
        order = np.argsort(codes, kind="stable")  # rows ascend among equal ones
        codes, owners = codes[order], owners[order]
        fresh = np.ones(len(codes), np.bool_)
        fresh[1:] = (codes[1:] != codes[:-1]) | (owners[1:] != owners[:-1])
        codes, self._owners = codes[fresh], owners[fresh]
        kinds, starts = np.unique(codes, return_index=True)
        self._codes = memoryview(kinds)  # type: ignore[arg-type]
        self._starts = memoryview(np.append(starts, len(codes)))  # type: ignore[arg-type]

    def containing(self, texts: Sequence[str]) -> GramRows | None:
        """Return rows among which are all whose text has these parts somewhere; None if they are too short to tell."""
        grams = [gram for text in texts for gram in _grams(text.encode(), self._size)]
        return GramRows([self._rows(gram) for gram in dict.fromkeys(grams)]) if grams else None

    def _rows(self, gram: int) -> Rows:
        place = bisect_left(self._codes, gram)
        if place == len(self._codes) or self._codes[place] != gram:
            return self._owners[:0]
        return self._owners[self._starts[place] : self._starts[place + 1]]


class GramRows:
    """The rows that have several grams, met with each other when they are asked for."""

    __slots__ = ("_lists",)
    order: Final = Order.ASCENDING

    def __init__(self, lists: Sequence[Rows]) -> None:
        self._lists = sorted(lists, key=len)[:_GRAM_LISTS]

    def __len__(self) -> int:
        return len(self._lists[0])

    @property
    def rows(self) -> Rows:
        rows = self._lists[0]
        for one in self._lists[1:]:
            rows = rows[_are_in(rows, one)]
        return rows


def _are_in(rows: Rows, others: Rows) -> npt.NDArray[np.bool_]:
    """Return which of the rows are among the others; both ascend."""
    places = others.searchsorted(rows)
    places[places == len(others)] = 0
    found: npt.NDArray[np.bool_] = others[places] == rows if len(others) else np.zeros(len(rows), np.bool_)
    return found


def _grams(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[i : i + size], "big") for i in range(len(data) - size + 1)]
