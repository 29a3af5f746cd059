"""The checked tree as text."""

from __future__ import annotations

from storage.filter.literals import printed
from storage.filter.tree import (
    AllOf,
    Always,
    AnyOf,
    Arithmetic,
    ArrayValue,
    Comparison,
    Contains,
    ElementValue,
    FieldComparison,
    FieldValue,
    IsIn,
    IsNull,
    LengthValue,
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
from storage.times import show_interval


def print_predicate(node: Predicate) -> str:
    """Return text that compiles to this tree. What is unknown everywhere has no text of its own: it prints as false."""
    match node:
        case Always(truth):
            return "true" if truth else "false"
        case AllOf(items):
            return " and ".join(_inside(one) for one in items)
        case AnyOf(items):
            return " or ".join(_inside(one) for one in items)
        case Negation(Regex(value, pattern)):
            return f"{_value(value)} !~ {printed(pattern)}"
        case Negation(IsIn(value, constants)):
            return f"{_value(value)} not in {printed(constants.values)}"
        case Negation(IsNull(value)):
            return f"{_value(value)} is not null"
        case Negation(item):
            return f"not ({print_predicate(item)})"
        case Comparison(op, value, constant):
            return f"{_value(value)} {op} {printed(constant)}"
        case FieldComparison(op, left, right):
            return f"{_value(left)} {op} {_value(right)}"
        case IsIn(value, constants):
            return f"{_value(value)} in {printed(constants.values)}"
        case Like(value, pattern):
            return f"{_value(value)} like {printed(pattern.text)}"
        case Regex(value, pattern):
            return f"{_value(value)} =~ {printed(pattern)}"
        case IsNull(value):
            return f"{_value(value)} is null"
        case Contains(value, mode, constants):
            name = "array_contains" if value.keys is None else "json_contains"
            if mode == "one":
                return f"{name}({_value(value)}, {printed(constants[0])})"
            return f"{name}_{mode}({_value(value)}, {printed(constants)})"
        case TextMatch(value, wanted, _, least):
            more = f", minimum_should_match={least}" if least > 1 else ""
            return f"text_match({_value(value)}, {printed(wanted)}{more})"
        case PhraseMatch(value, wanted, _, slop):
            return f"phrase_match({_value(value)}, {printed(wanted)}{f', {slop}' if slop else ''})"


def _inside(node: Predicate) -> str:
    text = print_predicate(node)
    return f"({text})" if isinstance(node, AllOf | AnyOf) else text


def _value(value: Value | ArrayValue) -> str:
    match value:
        case FieldValue(field) | ArrayValue(field, None):
            return field.name
        case ElementValue(field, place):
            return f"{field.name}[{place}]"
        case PathValue(field, keys) | ArrayValue(field, tuple(keys)):
            return field.name + "".join(f"[{printed(key)}]" for key in keys)
        case Shifted(operand, interval):
            return f"{_value(operand)} + INTERVAL '{show_interval(interval)}'"
        case LengthValue(of):
            return f"array_length({_value(of)})"
        case Arithmetic(op, operand, constant, flipped):
            inner = _value(operand)
            text = f"{printed(constant)} {op} {inner}" if flipped else f"{inner} {op} {printed(constant)}"
            return f"({text})"
    raise AssertionError(value)
