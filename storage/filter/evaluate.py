"""The checked tree over the rows of a batch: where it is true, and where it is unknown.

Three-valued logic: a null, a missing key or a value of another kind makes a comparison unknown; `not` of unknown is
unknown, `false and unknown` is false, `true or unknown` is true. A filter keeps the rows where it is true.

In `and`, cheap conditions go first, and once few rows are left the dear ones are asked about those alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from storage.columns import Offsets
from storage.filter.constants import ConstantSet, members_of
from storage.filter.exact import compare_columns, compare_constant
from storage.filter.json_paths import JsonValues, Kind, canonical
from storage.filter.patterns import like_mask
from storage.filter.syntax import LiteralValue
from storage.filter.tree import (
    AllOf,
    Always,
    AnyOf,
    Arithmetic,
    CompareOp,
    Comparison,
    Contains,
    FieldComparison,
    FieldValue,
    IsIn,
    IsNull,
    Like,
    Negation,
    PathValue,
    PhraseMatch,
    Predicate,
    Regex,
    Shifted,
    TextMatch,
    Value,
)
from storage.filter.values import Lists, Numbers, Rows, Texts, Values, both, lists_of, value_of
from storage.filter.words import matched
from storage.schema import DataType

Mask = npt.NDArray[np.bool_]
NARROW_BELOW: Final = 1 / 8
"""Share of rows below which taking them out is cheaper than testing all."""


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """`yes` is never set where `unknown` is; None means that all rows are known."""

    yes: Mask
    unknown: Mask | None = None

    def possible(self) -> Mask:
        return self.yes if self.unknown is None else self.yes | self.unknown


def truth(node: Predicate, rows: Rows) -> Truth:
    """Return what the predicate says of each row."""
    match node:
        case Always(value):
            return Truth(np.full(rows.count, value is True), None if value is not None else np.ones(rows.count, bool))
        case AllOf(items):
            return _all_of(sorted(items, key=_cost), rows)
        case AnyOf(items):
            return _any_of(items, rows)
        case Negation(item):
            inner = truth(item, rows)
            return Truth(~inner.possible(), inner.unknown)
        case Comparison(op, value, constant):
            return _compared(op, value_of(value, rows), constant)
        case FieldComparison(op, left, right):
            return _fields_compared(op, value_of(left, rows), value_of(right, rows))
        case IsIn(value, constants):
            return _is_in(value_of(value, rows), constants)
        case Like(value, pattern):
            return _on_texts(value_of(value, rows), lambda texts: like_mask(pattern, texts))
        case Regex(value, text):
            return _on_texts(value_of(value, rows), lambda texts: texts.matches(f"(?s){text}"))
        case IsNull():
            return Truth(_is_null(node, rows))
        case Contains():
            return _contains(node, lists_of(node.value, rows))
        case TextMatch() | PhraseMatch():
            return _known(matched(node, rows), rows.known(node.value.field))


def _cost(node: Predicate) -> int:
    """Rank predicates by how dear a row is."""
    match node:
        case AllOf(items) | AnyOf(items):
            return max(map(_cost, items))
        case Negation(item):
            return _cost(item)
        case Comparison(value=value) | IsIn(value=value):
            return _value_cost(value)
        case FieldComparison(left=left):
            return _value_cost(left)
        case Contains(value=array):
            return 3 if array.keys is None else 4
        case Like() | Regex() | TextMatch() | PhraseMatch():
            return 5
    return 0


def _value_cost(value: Value) -> int:
    if isinstance(value, Arithmetic | Shifted):
        return _value_cost(value.operand)
    if isinstance(value, FieldValue):
        return 1 if value.type is DataType.VARCHAR else 0
    return 4 if isinstance(value, PathValue) else 2


def _all_of(items: list[Predicate], rows: Rows) -> Truth:
    found = truth(items[0], rows)
    for i, item in enumerate(items[1:], 1):
        possible = found.possible()
        left = int(np.count_nonzero(possible))
        if left == 0:
            return Truth(np.zeros(rows.count, np.bool_))
        if left < rows.count * NARROW_BELOW:
            return _spread(found, _all_of(items[i:], rows.narrowed(np.flatnonzero(possible))), possible)
        found = _and(found, truth(item, rows))
    return found


def _spread(found: Truth, rest: Truth, possible: Mask) -> Truth:
    """Return `found and rest`, where `rest` is known only of the rows that `found` leaves possible."""
    inside: Offsets = np.flatnonzero(possible)
    joined = _and(Truth(found.yes[inside], None if found.unknown is None else found.unknown[inside]), rest)
    yes = np.zeros(len(possible), np.bool_)
    yes[inside] = joined.yes
    if joined.unknown is None:
        return Truth(yes)
    unknown = np.zeros(len(possible), np.bool_)
    unknown[inside] = joined.unknown
    return Truth(yes, unknown)


def _and(left: Truth, right: Truth) -> Truth:
    yes = left.yes & right.yes
    if left.unknown is None and right.unknown is None:
        return Truth(yes)
    return Truth(yes, left.possible() & right.possible() & ~yes)


def _any_of(items: tuple[Predicate, ...], rows: Rows) -> Truth:
    first = truth(items[0], rows)
    yes, unknown = first.yes, first.unknown
    for item in items[1:]:
        found = truth(item, rows)
        yes = yes | found.yes
        if found.unknown is not None:
            unknown = found.unknown if unknown is None else unknown | found.unknown
    return Truth(yes, None if unknown is None else unknown & ~yes)


def _known(yes: Mask, known: Mask | None) -> Truth:
    return Truth(yes) if known is None else Truth(yes & known, ~known)


def _compared(op: CompareOp, values: Values, constant: LiteralValue) -> Truth:
    if isinstance(values, JsonValues):
        yes, known = compare_json(op, values, constant)
        return Truth(yes, ~known)
    if isinstance(values, Texts):
        assert isinstance(constant, str)
        return _known(values.values.compare(op, constant), values.known)
    return _known(compare_constant(op, values.values, cast(float, constant)), values.known)


def _fields_compared(op: CompareOp, left: Values, right: Values) -> Truth:
    if isinstance(left, Texts):
        assert isinstance(right, Texts)
        return _known(left.values.compare(op, right.values), both(left.known, right.known))
    assert isinstance(left, Numbers) and isinstance(right, Numbers)
    return _known(compare_columns(op, left.values, right.values), both(left.known, right.known))


def compare_json(op: CompareOp, values: JsonValues, constant: LiteralValue) -> tuple[Mask, Mask]:
    """Return (where the comparison holds, where it is known: the value is of the constant's kind)."""
    kinds = values.kinds
    if isinstance(constant, bool):
        return _of_kind(kinds, Kind.BOOL, values.ints, lambda ints: compare_constant(op, ints, int(constant)))
    if isinstance(constant, str):
        return _of_kind(kinds, Kind.TEXT, values.texts, lambda texts: texts.compare(op, constant))
    if isinstance(constant, tuple):
        yes, known = _equals_list(values, constant), kinds == Kind.LIST
        return yes if op == "==" else known & ~yes, known
    yes, known = np.zeros(len(kinds), np.bool_), np.zeros(len(kinds), np.bool_)
    numbers = ((Kind.INT, values.ints), (Kind.UINT, values.uints), (Kind.FLOAT, values.floats))
    for kind, numbered in numbers:
        if numbered is not None:
            yes_of_kind, of_kind = _of_kind(kinds, kind, numbered, lambda array: compare_constant(op, array, constant))
            yes, known = yes | yes_of_kind, known | of_kind
    return yes, known


def _of_kind(kinds: npt.NDArray[np.uint8], kind: Kind, values: Any, test: Any) -> tuple[Mask, Mask]:
    of_kind = kinds == kind
    if values is None:
        return np.zeros(len(kinds), np.bool_), of_kind
    yes: Mask = test(values) & of_kind
    return yes, of_kind


def _equals_list(values: JsonValues, constant: tuple[LiteralValue, ...]) -> Mask:
    """Return where the value is a list equal to the constant, element by element."""
    yes: Mask = values.kinds == Kind.LIST
    if values.bounds is None or values.items is None:
        if values.texts is not None:  # an element that is itself a list is kept as text
            yes &= values.texts.compare("==", canonical(constant))
            return yes
        return np.zeros(len(values), np.bool_)
    yes &= np.diff(values.bounds) == len(constant)
    for i, one in enumerate(constant):
        rows = np.flatnonzero(yes)
        if not len(rows):
            break
        yes[rows] = compare_json("==", values.items.take(values.bounds[rows] + i), one)[0]
    return yes


def _is_in(values: Values, constants: ConstantSet) -> Truth:
    if isinstance(values, Texts):
        yes = np.zeros(len(values.values), np.bool_)
        if constants.strings is not None:
            yes = values.values.is_in(constants.strings)
        return _known(yes, values.known)
    if isinstance(values, Numbers):
        if values.values.dtype.kind == "b":
            return _known(_bools_in(values.values, constants), values.known)
        numbers = constants.floats if values.values.dtype.kind == "f" else constants.ints
        return _known(members_of(values.values, numbers), values.known)
    kinds = values.kinds
    if not constants.values:
        return Truth(np.zeros(len(kinds), np.bool_), kinds <= Kind.NULL)
    if constants.strings is not None:
        known = kinds == Kind.TEXT
    elif constants.bools:
        known = kinds == Kind.BOOL
    else:
        known = (kinds >= Kind.INT) & (kinds <= Kind.FLOAT)
    return Truth(json_in(values, constants), ~known)


def _bools_in(values: npt.NDArray[Any], constants: ConstantSet) -> Mask:
    yes = np.zeros(len(values), np.bool_)
    for one in constants.bools:
        yes |= values == one
    return yes


def json_in(values: JsonValues, constants: ConstantSet) -> Mask:
    """Return where the value equals a member, of whatever kind."""
    kinds = values.kinds
    yes: Mask = np.zeros(len(kinds), np.bool_)
    if values.ints is not None:
        if len(constants.ints):
            yes |= (kinds == Kind.INT) & members_of(values.ints, constants.ints)
        for truth_value in constants.bools:
            yes |= (kinds == Kind.BOOL) & (values.ints == int(truth_value))
    if values.uints is not None and len(constants.uints):
        yes |= (kinds == Kind.UINT) & members_of(values.uints, constants.uints)
    if values.floats is not None and len(constants.floats):
        yes |= (kinds == Kind.FLOAT) & members_of(values.floats, constants.floats)
    if values.texts is not None and constants.strings is not None:
        yes |= (kinds == Kind.TEXT) & values.texts.is_in(constants.strings)
    for one in constants.lists:
        yes |= _equals_list(values, one)
    return yes


def _on_texts(values: Values, test: Any) -> Truth:
    if isinstance(values, JsonValues):
        yes, known = _of_kind(values.kinds, Kind.TEXT, values.texts, test)
        return Truth(yes, ~known)
    assert isinstance(values, Texts)
    return _known(test(values.values), values.known)


def _is_null(node: IsNull, rows: Rows) -> Mask:
    value = node.value
    if isinstance(value, PathValue) and value.keys:
        return rows.json(value.field, value.keys).kinds <= Kind.NULL
    known = rows.known(value.field)
    return np.zeros(rows.count, np.bool_) if known is None else ~known


def _contains(node: Contains, lists: Lists) -> Truth:
    if node.mode == "all":
        yes = np.ones(len(lists.bounds) - 1, np.bool_)
        for one in node.constants:
            yes &= _any_element(lists.bounds, _elements_equal(lists, one))
    else:
        yes = _any_element(lists.bounds, _elements_in(lists, node.prepared))
    return _known(yes, lists.known)


def _elements_equal(lists: Lists, constant: LiteralValue) -> Mask:
    if isinstance(lists.items, JsonValues):
        return compare_json("==", lists.items, constant)[0]
    return _compared("==", lists.items, constant).yes


def _elements_in(lists: Lists, constants: ConstantSet) -> Mask:
    return (
        json_in(lists.items, constants) if isinstance(lists.items, JsonValues) else _is_in(lists.items, constants).yes
    )


def _any_element(bounds: Offsets, hits: Mask) -> Mask:
    """Return per row whether any of its elements is a hit."""
    before = np.zeros(len(hits) + 1, np.int64)
    np.cumsum(hits, out=before[1:])
    return before[bounds[1:]] > before[bounds[:-1]]
