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
    PhraseMatch,
    Predicate,
    Shifted,
    TextMatch,
    Value,
)
from storage.types import FieldId

_Leaf = FieldValue | ElementValue | PathValue | ArrayValue


def fields_of(node: Predicate) -> frozenset[FieldId]:
    """Return the fields whose columns evaluating reads."""
    return frozenset(one.field.id for one in leaves_of(node))


def paths_of(node: Predicate) -> Mapping[FieldId, tuple[Keys, ...]]:
    """Return the paths that evaluating asks of each JSON field, so that one pass over the documents finds them all."""
    found: dict[FieldId, dict[Keys, None]] = {}
    for one in leaves_of(node):
        if isinstance(one, PathValue | ArrayValue) and one.keys is not None:
            found.setdefault(one.field.id, {})[one.keys] = None
    return {field_id: tuple(keys) for field_id, keys in found.items()}


def has_words(node: Predicate) -> bool:
    """Return whether some condition asks for words of texts."""
    if isinstance(node, AllOf | AnyOf):
        return any(map(has_words, node.items))
    return isinstance(node, TextMatch | PhraseMatch)


def leaves_of(node: Predicate) -> Iterator[_Leaf]:
    """Return what stands in its conditions."""
    match node:
        case Always():
            return
        case AllOf(items) | AnyOf(items):
            for one in items:
                yield from leaves_of(one)
        case Negation(item):
            yield from leaves_of(item)
        case FieldComparison(left=left, right=right):
            yield _leaf(left)
            yield _leaf(right)
        case _:
            yield _leaf(node.value)


def _leaf(value: Value | ArrayValue) -> _Leaf:
    while isinstance(value, Arithmetic | Shifted):
        value = value.operand
    return value.of if isinstance(value, LengthValue) else value
