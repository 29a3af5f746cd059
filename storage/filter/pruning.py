"""What can be said of a filter without reading rows: the keys it allows, and whether a segment can hold a match.

Both err on one side only: keys that are missing from the answer never match, and a segment is skipped only if no row
of it can match.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.filter.constants import ConstantSet
from storage.filter.tree import (
    OPPOSITE,
    AllOf,
    Always,
    AnyOf,
    CompareOp,
    Comparison,
    FieldValue,
    IsIn,
    IsNull,
    Like,
    Negation,
    PathValue,
    Predicate,
    Value,
)
from storage.schema import DataType, FieldSchema
from storage.types import FieldId

Bound = bool | int | float | str


@dataclass(frozen=True, slots=True)
class FieldStats:
    """The least and greatest value of a field among its non-null rows (None if there is none such), and the nulls.

    A column that holds a NaN has no bounds: give it no statistics.
    """

    min: Bound | None
    max: Bound | None
    null_count: int
    rows: int


@dataclass(frozen=True, slots=True)
class PrimaryKeys:
    """`exact` if the filter is true of every row with one of these keys, so that it need not be evaluated again."""

    values: tuple[int | str, ...]
    exact: bool


def primary_keys(node: Predicate, primary: FieldSchema) -> PrimaryKeys | None:
    """Return the keys that a row must have one of for the predicate to be true, each once; None if unbounded."""
    match node:
        case Always(truth) if not truth:
            return PrimaryKeys((), True)
        case Comparison("==", FieldValue(field), constant) if field.id == primary.id:
            return PrimaryKeys(_as_keys((constant,), primary), True)
        case IsIn(FieldValue(field), constants) if field.id == primary.id:
            return PrimaryKeys(_as_keys(constants.values, primary), True)
        case AllOf(items):
            return _intersection([primary_keys(one, primary) for one in items])
        case AnyOf(items):
            every = [primary_keys(one, primary) for one in items]
            if any(one is None for one in every):
                return None
            known = [one for one in every if one is not None]
            merged = dict.fromkeys(value for one in known for value in one.values)
            return PrimaryKeys(tuple(merged), all(one.exact for one in known))
    return None


def _as_keys(constants: tuple[object, ...], primary: FieldSchema) -> tuple[int | str, ...]:
    """Return the constants that a key can equal, in the key's own type, each once."""
    if primary.type is DataType.VARCHAR:
        return tuple(dict.fromkeys(one for one in constants if isinstance(one, str)))
    whole = (int(one) for one in constants if isinstance(one, int | float) and one == int(one))
    return tuple(dict.fromkeys(whole))


def _intersection(every: list[PrimaryKeys | None]) -> PrimaryKeys | None:
    known = [one for one in every if one is not None]
    if not known:
        return None
    kept = dict.fromkeys(known[0].values)
    for one in known[1:]:
        allowed = frozenset(one.values)
        kept = {value: None for value in kept if value in allowed}
    return PrimaryKeys(tuple(kept), all(one is not None and one.exact for one in every))


def may_be_true(node: Predicate, stats: Mapping[FieldId, FieldStats]) -> bool:
    """Return whether some row of a segment with these statistics might satisfy the predicate."""
    match node:
        case Always(truth):
            return truth is True
        case AllOf(items):
            return all(may_be_true(one, stats) for one in items)
        case AnyOf(items):
            return any(may_be_true(one, stats) for one in items)
        case Negation(item):
            return _may_be_false(item, stats)
        case Comparison(op, value, constant):
            return _may_compare(op, value, constant, stats)
        case IsIn(value, constants):
            return _may_be_in(value, constants, stats)
        case Like(value, pattern) if pattern.how in ("equal", "prefix"):
            bounds = _bounds(value, stats)
            if bounds is None or not (isinstance(bounds.min, str) and isinstance(bounds.max, str)):
                return bounds is None or bounds.null_count < bounds.rows
            size = len(pattern.literal)
            if pattern.how == "equal":
                return bounds.min.encode() <= pattern.literal.encode() <= bounds.max.encode()
            return bounds.min[:size].encode() <= pattern.literal.encode() <= bounds.max[:size].encode()
        case IsNull(value) if not (isinstance(value, PathValue) and value.keys):
            known = stats.get(value.field.id)
            return known is None or known.null_count > 0
    return True


def _may_be_false(node: Predicate, stats: Mapping[FieldId, FieldStats]) -> bool:
    match node:
        case Always(truth):
            return truth is False
        case AllOf(items):
            return any(_may_be_false(one, stats) for one in items)
        case AnyOf(items):
            return all(_may_be_false(one, stats) for one in items)
        case Negation(item):
            return may_be_true(item, stats)
        case Comparison(op, value, constant):
            return _may_compare(OPPOSITE[op], value, constant, stats)
        case IsNull(value) if not (isinstance(value, PathValue) and value.keys):
            known = stats.get(value.field.id)
            return known is None or known.null_count < known.rows
    return True


def _bounds(value: Value, stats: Mapping[FieldId, FieldStats]) -> FieldStats | None:
    return stats.get(value.field.id) if isinstance(value, FieldValue) else None


def _may_compare(op: CompareOp, value: Value, constant: object, stats: Mapping[FieldId, FieldStats]) -> bool:
    known = _bounds(value, stats)
    if known is None:
        return True
    if known.min is None or known.max is None:
        return known.null_count < known.rows
    low, high, sought = _ordered(known.min), _ordered(known.max), _ordered(constant)
    match op:
        case "==":
            return bool(low <= sought <= high)
        case "!=":
            return not low == sought == high
        case "<":
            return bool(low < sought)
        case "<=":
            return bool(low <= sought)
        case ">":
            return bool(high > sought)
        case ">=":
            return bool(high >= sought)


def _may_be_in(value: Value, constants: ConstantSet, stats: Mapping[FieldId, FieldStats]) -> bool:
    known = _bounds(value, stats)
    if not constants.values:
        return False
    if known is None:
        return True
    if known.min is None or known.max is None:
        return known.null_count < known.rows
    low, high = _ordered(known.min), _ordered(known.max)
    return any(low <= _ordered(one) <= high for one in constants.values)


def _ordered(value: object) -> Any:
    """Return the value as columns order it: text by its bytes; Python compares int with float exactly."""
    if isinstance(value, str):
        return value.encode()
    assert isinstance(value, int | float)
    return value
