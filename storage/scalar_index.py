"""Scalar indexes: the rows of a sealed segment in the order of a field's values, for filters that let few rows through.

Milvus has a structure for each kind of field (inverted lists, bitmaps, a sorted list, a trie). Here one serves all: the
rows' offsets sorted by value, in which comparisons, ranges, `in` and prefixes are spans found by bisection. A filter
asks for the spans in which every row that it is true of must lie, and is evaluated on the rows of these alone; where
they are many, it is evaluated on all rows, in order, which is faster then.

An index takes 4 bytes a row, and its values once more if they are numbers. It is not stored: a segment makes it when a
filter first asks for it, which takes 5 ms for 60,000 numbers and 60 ms for as many texts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from storage.columns import Column, Offsets, ScalarColumn, StringColumn
from storage.errors import InvalidParameter
from storage.filter.tree import AllOf, Always, AnyOf, Comparison, FieldValue, IsIn, Like, Predicate
from storage.schema import DataType, FieldSchema
from storage.strings import StringArray
from storage.types import FieldId

ROWS_MIN: Final = 2_048
"""A segment with fewer is looked through as fast."""
SHARE_MAX: Final = 1 / 16
"""Of a segment's rows: to pick out more costs as much as looking at all."""
CONSTANTS_MAX: Final = 1_024
"""Values of an `in` that are looked up one by one."""
SPEC_KEY: Final = "scalar"
"""The spec of a scalar index is `{SPEC_KEY: its type}`."""

Constant = bool | int | float | str


class ScalarIndexType(StrEnum):
    """Milvus's names; what they are built of is the same."""

    AUTOINDEX = "AUTOINDEX"
    INVERTED = "INVERTED"
    BITMAP = "BITMAP"
    STL_SORT = "STL_SORT"
    TRIE = "Trie"


_INTEGERS: Final = (DataType.INT8, DataType.INT16, DataType.INT32, DataType.INT64)
_NUMBERS: Final = (*_INTEGERS, DataType.FLOAT, DataType.DOUBLE)
_TYPES: Final = {
    ScalarIndexType.AUTOINDEX: (DataType.BOOL, *_NUMBERS, DataType.VARCHAR),
    ScalarIndexType.INVERTED: (DataType.BOOL, *_NUMBERS, DataType.VARCHAR),
    ScalarIndexType.BITMAP: (DataType.BOOL, *_INTEGERS, DataType.VARCHAR),
    ScalarIndexType.STL_SORT: (*_NUMBERS, DataType.VARCHAR),
    ScalarIndexType.TRIE: (DataType.VARCHAR,),
}


def parse_scalar_index(name: str, field: FieldSchema) -> ScalarIndexType:
    """Return the type of this name for a scalar field; none is AUTOINDEX. Raises InvalidParameter."""
    wanted = name.upper() or ScalarIndexType.AUTOINDEX
    found = next((one for one in ScalarIndexType if one.upper() == wanted), None)
    possible = [str(one) for one, types in _TYPES.items() if field.type in types]
    if not possible:
        raise InvalidParameter(
            f"field {field.name} of type {field.type} can have no index in this server; filters on it work without one"
        )
    if found is None or str(found) not in possible or (found is ScalarIndexType.BITMAP and field.primary):
        raise InvalidParameter(
            f"index type {name} cannot be built on field {field.name} of type {field.type}"
            f"{', the primary key' if field.primary else ''}; use {' or '.join(possible)}"
        )
    return found


@dataclass(frozen=True, slots=True)
class Span:
    """Rows whose values follow one another: places `first` to `last` of an index, without the last."""

    index: SortedColumn
    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    @property
    def offsets(self) -> Offsets:
        return self.index.offsets(self.first, self.last)


class _Values(Protocol):
    """Values in ascending order, of one kind."""

    def place_of(self, value: Any, *, after: bool) -> int | None:
        """Return how many are below the value, or not above it; a few more or fewer if it is rounded.

        None if they cannot be compared.
        """
        ...


class SortedColumn:
    """The rows of a column that are neither null nor NaN, by value."""

    def __init__(self, column: Column) -> None:
        assert isinstance(column, ScalarColumn | StringColumn), "of scalars and texts"
        values: _Values
        if isinstance(column, StringColumn):
            order = column.values.order()
        else:
            order = np.argsort(column.values, kind="stable")
            if column.values.dtype.kind == "f":
                order = order[: len(order) - int(np.count_nonzero(np.isnan(column.values)))]
        if column.valid is not None:
            order = order[column.valid[order]]
        self._order = order.astype(np.int32)
        if isinstance(column, StringColumn):
            values = _Texts(column.values, self._order)
        elif column.values.dtype.kind == "f":
            values = _Floats(column.values[order])
        else:
            values = _Integers(column.values[order])
        self._values = values

    def __len__(self) -> int:
        return len(self._order)

    def offsets(self, first: int, last: int) -> Offsets:
        """Return the rows at these places, in the order of their values."""
        return self._order[first:last].astype(np.int64)

    def between(self, low: Constant | None, high: Constant | None) -> Span | None:
        """Return where all values from `low` to `high` are, both included, None for no bound; None if unknown."""
        first = 0 if low is None else self._values.place_of(low, after=False)
        last = len(self) if high is None else self._values.place_of(high, after=True)
        return None if first is None or last is None else Span(self, first, last)

    def with_prefix(self, prefix: str) -> Span | None:
        """Return where the texts are that begin so."""
        return Span(self, *self._values.prefixed(prefix)) if isinstance(self._values, _Texts) else None


class _Integers:
    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values.view(np.uint8) if values.dtype == np.bool_ else values
        info = np.iinfo(self._values.dtype)
        self._least, self._greatest = int(info.min), int(info.max)

    def place_of(self, value: Any, *, after: bool) -> int | None:
        if isinstance(value, str) or value != value:
            return None
        if isinstance(value, float) and math.isfinite(value):
            value = math.floor(value) if after else math.ceil(value)
        if value > self._greatest:
            return len(self._values)
        if value < self._least:
            return 0
        return int(self._values.searchsorted(self._values.dtype.type(value), "right" if after else "left"))


class _Floats:
    def __init__(self, values: npt.NDArray[np.floating[Any]]) -> None:
        self._values = values

    def place_of(self, value: Any, *, after: bool) -> int | None:
        if isinstance(value, str | bool) or value != value:
            return None
        kind = self._values.dtype.type
        with np.errstate(over="ignore"):
            near = np.nextafter(kind(value), kind(math.inf if after else -math.inf))
        return int(self._values.searchsorted(near, "right" if after else "left"))


class _Texts:
    def __init__(self, values: StringArray, order: npt.NDArray[np.int32]) -> None:
        self._values, self._order = values, order

    def place_of(self, value: Any, *, after: bool) -> int | None:
        if not isinstance(value, str):
            return None
        return (bisect_right if after else bisect_left)(range(len(self._order)), value, key=self._text)

    def prefixed(self, prefix: str) -> tuple[int, int]:
        places, head = range(len(self._order)), len(prefix)
        first = bisect_left(places, prefix, key=self._text)
        return first, bisect_right(places, prefix, lo=first, key=lambda place: self._text(place)[:head])

    def _text(self, place: int) -> str:
        return self._values[int(self._order[place])]


IndexOn = Callable[[FieldId], SortedColumn | None]


def candidates(predicate: Predicate, index_on: IndexOn, rows_max: int) -> Offsets | None:
    """Return rows, ascending, among which are all that the predicate is true of; None if that may be more than so many.

    index_on  gives the index of a field, or None
    """
    spans = _spans(predicate, index_on)
    if spans is None or sum(map(len, spans)) > rows_max:
        return None
    if not spans:
        return np.empty(0, np.int64)
    if len(spans) == 1:
        return np.sort(spans[0].offsets)
    return np.unique(np.concatenate([one.offsets for one in spans]))


def _spans(node: Predicate, index_on: IndexOn) -> Sequence[Span] | None:
    """Return spans that together hold every row that the predicate is true of; None if no index tells."""
    match node:
        case Always(truth) if truth is not True:
            return ()
        case Comparison(op, FieldValue(field), constant) if op != "!=":
            index = index_on(field.id)
            if index is None or isinstance(constant, list | tuple) or constant is None:
                return None
            bounds = (constant if op in ("==", ">", ">=") else None, constant if op in ("==", "<", "<=") else None)
            return _known([index.between(*bounds)])
        case IsIn(FieldValue(field), constants) if len(constants.values) <= CONSTANTS_MAX:
            index = index_on(field.id)
            if index is None:
                return None
            return _known(index.between(one, one) for one in constants.values if isinstance(one, Constant))
        case Like(FieldValue(field), pattern) if pattern.how in ("equal", "prefix"):
            index = index_on(field.id)
            if index is None:
                return None
            whole = pattern.how == "equal"
            return _known(
                [index.between(pattern.literal, pattern.literal) if whole else index.with_prefix(pattern.literal)]
            )
        case AllOf(items):
            return _fewest([spans for one in items if (spans := _spans(one, index_on)) is not None])
        case AnyOf(items):
            every = [_spans(one, index_on) for one in items]
            known = [spans for spans in every if spans is not None]
            return [span for spans in known for span in spans] if len(known) == len(every) else None
    return None


def _known(spans: Iterable[Span | None]) -> Sequence[Span] | None:
    found = list(spans)
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else None


def _fewest(every: Sequence[Sequence[Span]]) -> Sequence[Span] | None:
    """Return the spans of the one condition that leaves the fewest rows, bounds of the same field taken together."""
    joined: dict[int, Span] = {}
    choices: list[Sequence[Span]] = []
    for spans in every:
        if len(spans) != 1:
            choices.append(spans)
            continue
        one = spans[0]
        known = joined.get(id(one.index), one)
        joined[id(one.index)] = Span(one.index, max(known.first, one.first), min(known.last, one.last))
    choices += [[one] for one in joined.values()]
    return min(choices, key=lambda spans: sum(map(len, spans)), default=None)
