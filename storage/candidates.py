"""Which rows of a segment a filter can be true of, as its indexes tell: the planner of filters.

Each condition of a filter that an index knows is turned into postings; of conditions joined by `and` those with the
fewest rows are taken, and what the others say is asked of these rows alone (`rest`). So nothing as long as the segment
is made, unless the rows are many: then the filter is evaluated on all, in order, which is faster.

What indexes there are does not change what a filter finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from storage.columns import Offsets
from storage.filter.indexed import Cast, Indexed
from storage.filter.patterns import literal_runs
from storage.filter.tree import (
    AllOf,
    Always,
    AnyOf,
    ArrayValue,
    CompareOp,
    Comparison,
    Contains,
    FieldValue,
    IsIn,
    Like,
    PathValue,
    PhraseMatch,
    Predicate,
    TextMatch,
    Value,
)
from storage.filter.words import WordLists
from storage.postings import Constant, GramLists, Order, Postings, SomeRows, SortedColumn, Span
from storage.schema import DataType, FieldSchema

ROWS_MIN: Final = 2_048
"""A segment with fewer is looked through as fast."""
SHARE_MAX: Final = 1 / 16
"""Of a segment's rows: to pick out more costs as much as looking at all."""
CONSTANTS_MAX: Final = 1_024
"""Values of an `in` that are looked up one by one."""
_GRAMS_OF: Final = (DataType.VARCHAR, DataType.JSON)


class Indexes(Protocol):
    """What a segment has."""

    def sorted(self, what: Indexed) -> SortedColumn | None: ...

    def grams(self, field: FieldSchema, keys: tuple[str | int, ...] | None) -> GramLists | None: ...

    def words(self, field: FieldSchema) -> WordLists | None: ...


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows, ascending, among which are all that a filter is true of: those that `rest` is true of, all without one."""

    offsets: Offsets
    rest: Predicate | None


class _Found:
    """Postings that together hold every row that a condition is true of, and what to ask of these rows."""

    __slots__ = ("lists", "rest")

    def __init__(self, lists: Sequence[Postings], rest: Predicate | None) -> None:
        self.lists, self.rest = lists, rest

    def __len__(self) -> int:
        return sum(map(len, self.lists))


_NOTHING: Final = np.empty(0, np.int64)


def candidates(predicate: Predicate, indexes: Indexes, rows_max: int) -> Candidates | None:
    """Return the rows that indexes leave; None if that may be more than so many."""
    found = _find(predicate, indexes)
    if found is None or len(found) > rows_max:
        return None
    if not found.lists:
        return Candidates(_NOTHING, None)
    if len(found.lists) == 1:
        (one,) = found.lists
        rows = one.rows.astype(np.int64)
        if one.order is Order.ASCENDING:
            return Candidates(rows, found.rest)
        rows.sort()
        if one.order is Order.ONCE:
            return Candidates(rows, found.rest)
    else:
        rows = np.concatenate([one.rows for one in found.lists]).astype(np.int64)
        rows.sort()
    if len(rows) > 1:
        rows = rows[np.append(True, rows[1:] != rows[:-1])]
    return Candidates(rows, found.rest)


def _find(node: Predicate, indexes: Indexes) -> _Found | None:
    """Return postings that together hold every row that the predicate is true of; None if no index tells."""
    if isinstance(node, Comparison):
        return _compared(node.value, node.op, [node.constant], indexes)
    if isinstance(node, AllOf):
        return _fewest(node.items, indexes)
    if isinstance(node, IsIn):
        if len(node.constants.values) > CONSTANTS_MAX:
            return None
        return _compared(node.value, "==", node.constants.values, indexes)
    if isinstance(node, AnyOf):
        known = []
        for one in node.items:
            found = _find(one, indexes)
            if found is None:
                return None
            known.append(found)
        is_exact = all(one.rest is None for one in known)
        return _Found([some for one in known for some in one.lists], None if is_exact else node)
    if isinstance(node, Like):
        return _like(node, indexes)
    if isinstance(node, Contains):
        return _contains(node, indexes)
    if isinstance(node, TextMatch | PhraseMatch):
        return _worded(node, indexes)
    if isinstance(node, Always) and node.truth is not True:
        return _Found((), None)
    return None


def _compared(value: Value, op: CompareOp, constants: Sequence[object], indexes: Indexes) -> _Found | None:
    """Return where the comparison with one of the constants is true."""
    if isinstance(value, FieldValue):
        index = indexes.sorted(Indexed(value.field.id))
        return None if index is None else _spans(index, op, constants)
    if isinstance(value, PathValue):
        return _cast(value.field, value.keys, op, constants, indexes)
    return None


def _spans(index: SortedColumn, op: CompareOp, constants: Sequence[object]) -> _Found | None:
    spans: list[Span] = []
    for one in constants:
        span = index.compared(op, one) if isinstance(one, Constant) else None
        if span is None:
            return None
        spans.append(span)
    return _Found(spans, None)


def _cast(
    field: FieldSchema,
    keys: tuple[str | int, ...],
    op: CompareOp,
    constants: Sequence[object],
    indexes: Indexes,
    *,
    in_lists: bool = False,
) -> _Found | None:
    """Return the same of what stands at a path, or of the elements of lists that do."""
    casts = {_CASTS.get(type(one)) for one in constants}
    if len(casts) != 1:
        return None
    (cast,) = casts
    if cast is None:
        return None
    index = indexes.sorted(Indexed(field.id, keys, Cast(f"ARRAY_{cast}") if in_lists else cast))
    return None if index is None else _spans(index, op, constants)


_CASTS: Final = {bool: Cast.BOOL, int: Cast.DOUBLE, float: Cast.DOUBLE, str: Cast.VARCHAR}


def _like(node: Like, indexes: Indexes) -> _Found | None:
    value, pattern = node.value, node.pattern
    if not isinstance(value, FieldValue | PathValue):
        return None
    keys = value.keys if isinstance(value, PathValue) else None
    if pattern.how in ("equal", "prefix"):
        what = Indexed(value.field.id) if keys is None else Indexed(value.field.id, keys, Cast.VARCHAR)
        index = indexes.sorted(what)
        if index is not None:
            is_equal = pattern.how == "equal"
            span = index.compared("==", pattern.literal) if is_equal else index.with_prefix(pattern.literal)
            return None if span is None else _Found([span], None)
    grams = indexes.grams(value.field, keys) if value.field.type in _GRAMS_OF else None
    rows = None if grams is None else grams.containing(literal_runs(pattern.text))
    return None if rows is None else _Found([rows], node)


def _contains(node: Contains, indexes: Indexes) -> _Found | None:
    if not node.constants or len(node.constants) > CONSTANTS_MAX:
        return None
    if node.mode != "all":
        return _with_element(node.value, node.constants, indexes)
    every = []
    for one in node.constants:
        found = _with_element(node.value, [one], indexes)
        if found is None:
            return None
        every.append(found)
    least = min(every, key=len)
    return _Found(least.lists, None if len(every) == 1 else node)


def _with_element(array: ArrayValue, constants: Sequence[object], indexes: Indexes) -> _Found | None:
    if array.keys is not None:
        return _cast(array.field, array.keys, "==", constants, indexes, in_lists=True)
    index = indexes.sorted(Indexed(array.field.id))
    return None if index is None else _spans(index, "==", constants)


def _worded(node: TextMatch | PhraseMatch, indexes: Indexes) -> _Found | None:
    lists = indexes.words(node.value.field)
    if lists is None:
        return None
    terms = node.terms if isinstance(node, TextMatch) else list(dict.fromkeys(term for _, term in node.placed))
    known = [SomeRows(lists.rows_with(term)) for term in terms]
    if isinstance(node, TextMatch):
        return _Found(known, None if node.least == 1 else node)
    least = min(known, key=len, default=None)
    return _Found((), None) if least is None else _Found([least], node)


def _fewest(items: Sequence[Predicate], indexes: Indexes) -> _Found | None:
    """Return what one condition leaves that leaves the fewest rows, bounds of the same values taken together."""
    joined: dict[SortedColumn, tuple[Span, list[Predicate]]] = {}
    best: tuple[Sequence[Postings], Sequence[Predicate]] | None = None
    fewest = 0
    for item in items:
        found = _find(item, indexes)
        if found is None:
            continue
        one = found.lists[0] if len(found.lists) == 1 and found.rest is None else None
        if isinstance(one, Span) and one.index.is_single:
            known, told = joined.get(one.index, (None, []))
            if known is not None:
                one = Span(one.index, max(known.first, one.first), min(known.last, one.last))
            joined[one.index] = one, [*told, item]
        elif best is None or len(found) < fewest:
            best, fewest = (found.lists, [item] if found.rest is None else []), len(found)
    for span, told in joined.values():
        if best is None or len(span) < fewest:
            best, fewest = ([span], told), len(span)
    if best is None:
        return None
    lists, settled = best
    left = tuple(one for one in items if not any(one is other for other in settled))
    return _Found(lists, None if not left else left[0] if len(left) == 1 else AllOf(left))
