"""What a checked tree reads: its fields, and the JSON paths of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from storage.filter.json_paths import Keys
from storage.filter.tree import (
    AllOf,
    Always,
    AnyOf,
    Arithmetic,
    ArrayValue,
    ElementValue,
    FieldComparison,
    FieldValue,
    LengthValue,
    Negation,
    PathValue,
    Predicate,
    Value,
)
from storage.types import FieldId

_Leaf = FieldValue | ElementValue | PathValue | ArrayValue


def fields_of(node: Predicate) -> frozenset[FieldId]:
    """Return the fields whose columns evaluating reads."""
    return frozenset(one.field.id for one in _leaves(node))


def paths_of(node: Predicate) -> Mapping[FieldId, tuple[Keys, ...]]:
    """Return the paths that evaluating asks of each JSON field, so that one pass over the documents finds them all."""
    found: dict[FieldId, dict[Keys, None]] = {}
    for one in _leaves(node):
        if isinstance(one, PathValue | ArrayValue) and one.keys is not None:
            found.setdefault(one.field.id, {})[one.keys] = None
    return {field_id: tuple(keys) for field_id, keys in found.items()}


def _leaves(node: Predicate) -> Iterator[_Leaf]:
    match node:
        case Always():
            return
        case AllOf(items) | AnyOf(items):
            for one in items:
                yield from _leaves(one)
        case Negation(item):
            yield from _leaves(item)
        case FieldComparison(left=left, right=right):
            yield _leaf(left)
            yield _leaf(right)
        case _:
            yield _leaf(node.value)


def _leaf(value: Value | ArrayValue) -> _Leaf:
    while isinstance(value, Arithmetic):
        value = value.operand
    return value.of if isinstance(value, LengthValue) else value
