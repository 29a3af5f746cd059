"""Scalar indexes: the rows of a sealed segment in the order of a field's values, for filters that let few rows through.

Milvus has a structure for each kind of field (inverted lists, bitmaps, a sorted list, a trie). Here one serves all: the
rows' offsets sorted by value, in which comparisons, ranges, `in` and prefixes are spans found by bisection. A filter
asks for the spans in which every row that it is true of must lie, and if they hold others too is evaluated on the rows
of these alone; where they are many, it is evaluated on all rows, in order, which is faster then.

An index takes 4 bytes a row, and its values once more if they are numbers. It is not stored: a segment makes it when a
filter first asks for it, which takes 5 ms for 60,000 numbers and 60 ms for as many texts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from storage.columns import Column, Offsets, ScalarColumn, StringColumn
from storage.errors import InvalidParameter
from storage.filter.patterns import LikePattern
from storage.filter.tree import AllOf, Always, AnyOf, CompareOp, Comparison, FieldValue, IsIn, Like, Predicate
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
        """Return how many are below the value, or if `after` not above it. None if they cannot be compared exactly."""
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

    def compared(self, op: CompareOp, value: Constant) -> Span | None:
        """Return where the values are of which `op value` is true; None if that is no span, or not known exactly."""
        if op == "!=":
            return None
        first = 0 if op in ("<", "<=") else self._values.place_of(value, after=op == ">")
        last = len(self) if op in (">", ">=") else self._values.place_of(value, after=op != "<")
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
        kind = self._values.dtype.type
        with np.errstate(over="ignore"):
            if isinstance(value, str | bool) or kind(value) != value:
                return None
        return int(self._values.searchsorted(kind(value), "right" if after else "left"))


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


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows, ascending, among which are all that a filter is true of; all of them are if `exact`."""

    offsets: Offsets
    exact: bool


@dataclass(frozen=True, slots=True)
class _Found:
    spans: Sequence[Span]
    exact: bool

    def __len__(self) -> int:
        return sum(map(len, self.spans))


def candidates(predicate: Predicate, index_on: IndexOn, rows_max: int) -> Candidates | None:
    """Return the rows that indexes leave; None if that may be more than so many.

    index_on  gives the index of a field, or None
    """
    found = _find(predicate, index_on)
    if found is None or len(found) > rows_max:
        return None
    if not found.spans:
        return Candidates(np.empty(0, np.int64), found.exact)
    if len(found.spans) == 1:
        return Candidates(np.sort(found.spans[0].offsets), found.exact)
    return Candidates(np.unique(np.concatenate([one.offsets for one in found.spans])), found.exact)


def _find(node: Predicate, index_on: IndexOn) -> _Found | None:
    """Return spans that together hold every row that the predicate is true of; None if no index tells."""
    match node:
        case Always(truth) if truth is not True:
            return _Found((), True)
        case Comparison(op, FieldValue(field), constant) if isinstance(constant, Constant):
            index = index_on(field.id)
            return None if index is None else _all([index.compared(op, constant)])
        case IsIn(FieldValue(field), constants) if len(constants.values) <= CONSTANTS_MAX:
            index = index_on(field.id)
            if index is None:
                return None
            return _all([index.compared("==", one) for one in constants.values if isinstance(one, Constant)])
        case Like(FieldValue(field), LikePattern(how="equal" | "prefix" as how, literal=literal)):
            index = index_on(field.id)
            if index is None:
                return None
            return _all([index.compared("==", literal) if how == "equal" else index.with_prefix(literal)])
        case AllOf(items):
            every = [_find(one, index_on) for one in items]
            return _fewest([one for one in every if one is not None], all_known=None not in every)
        case AnyOf(items):
            every = [_find(one, index_on) for one in items]
            known = [one for one in every if one is not None]
            if len(known) < len(every):
                return None
            return _Found([span for one in known for span in one.spans], all(one.exact for one in known))
    return None


def _all(spans: Sequence[Span | None]) -> _Found | None:
    known = [one for one in spans if one is not None]
    return _Found(known, True) if len(known) == len(spans) else None


def _fewest(every: Sequence[_Found], *, all_known: bool) -> _Found | None:
    """Return what the one condition leaves that leaves the fewest rows, bounds of the same field taken together."""
    joined: dict[int, Span] = {}
    choices: list[_Found] = []
    for found in every:
        if len(found.spans) != 1 or not found.exact:
            choices.append(_Found(found.spans, False))
            continue
        one = found.spans[0]
        known = joined.get(id(one.index), one)
        joined[id(one.index)] = Span(one.index, max(known.first, one.first), min(known.last, one.last))
    is_alone = all_known and not choices and len(joined) == 1
    choices += [_Found([one], is_alone) for one in joined.values()]
    return min(choices, key=len, default=None)
