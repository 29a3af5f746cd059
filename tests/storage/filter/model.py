"""A second filter language, slow and plain: trees of tuples, a printer, and a three-valued interpreter row by row.

It shares no code with the implementation. A row is a dict of field names to Python values, None for null; the dynamic
field is "$meta". An interpreted condition is True, False or None (unknown).

    conditions  ("and", [c...])  ("or", [c...])  ("not", c)  ("bool", value)  ("cmp", op, value, constant, flipped)
                ("fields", op, value, value)  ("range", low, op, value, op, high)  ("in", value, [k...], negated)
                ("like", value, pattern)  ("regex", value, pattern, negated)  ("null", target, negated)
                ("exists", path)  ("contains", mode, target, constants)
    values      ("field", name)  ("path", name, keys)  ("element", name, i)  ("length", target)
                ("arith", op, value, constant, flipped)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storage.columns import ArrayColumn, Batch, Column, Mask, ScalarColumn, StringColumn
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.strings import StringArray

Row = Mapping[str, Any]
Tree = tuple[Any, ...]

SCHEMA = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("small", DataType.INT8, nullable=True),
        FieldSchema("whole", DataType.INT64, nullable=True),
        FieldSchema("ratio", DataType.FLOAT, nullable=True),
        FieldSchema("amount", DataType.DOUBLE, nullable=True),
        FieldSchema("name", DataType.VARCHAR, max_bytes=100, nullable=True),
        FieldSchema("other", DataType.VARCHAR, max_bytes=100),
        FieldSchema("flag", DataType.BOOL, nullable=True),
        FieldSchema("doc", DataType.JSON, nullable=True),
        FieldSchema("words", DataType.ARRAY, element=DataType.VARCHAR, max_bytes=100, capacity=10, nullable=True),
        FieldSchema("nums", DataType.ARRAY, element=DataType.INT32, capacity=10),
        FieldSchema("marks", DataType.ARRAY, element=DataType.FLOAT, capacity=10),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=2),
    ],
    dynamic=True,
)
STATIC_SCHEMA = CollectionSchema(SCHEMA.user_fields)
NUMPY = {
    DataType.INT8: np.int8, DataType.INT32: np.int32, DataType.INT64: np.int64, DataType.FLOAT: np.float32,
    DataType.DOUBLE: np.float64, DataType.BOOL: np.bool_,
}  # fmt: skip


def batch_of(rows: Sequence[Row]) -> Batch:
    """Return the rows as columns; the vector field has none, because filters do not read it."""
    columns: dict[Any, Column] = {}
    for field in SCHEMA.fields:
        if field.type.is_vector:
            continue
        values = [row.get(field.name) for row in rows]
        valid = np.array([v is not None for v in values], np.bool_) if any(v is None for v in values) else None
        if field.type is DataType.ARRAY:
            assert field.element is not None
            lists = [v or [] for v in values]
            bounds = np.cumsum([0, *map(len, lists)], dtype=np.int64)
            items = _plain_column(field.element, [one for each in lists for one in each], None)
            columns[field.id] = ArrayColumn(bounds, items, valid)
        elif field.type is DataType.JSON:
            texts = ["" if v is None else json.dumps(v, ensure_ascii=False) for v in values]
            columns[field.id] = StringColumn(StringArray.from_strings(texts), valid)
        else:
            columns[field.id] = _plain_column(field.type, values, valid)
    return Batch(columns, len(rows))


def _plain_column(kind: DataType, values: list[Any], valid: Mask | None) -> ScalarColumn | StringColumn:
    if kind is DataType.VARCHAR:
        return StringColumn(StringArray.from_strings([v or "" for v in values]), valid)
    return ScalarColumn(np.array([v or 0 for v in values], NUMPY[kind]), valid)


# --- printing


def show(tree: Tree) -> str:
    """Return the text of a condition."""
    match tree:
        case ("and" | "or" as word, items):
            return f" {word} ".join(f"({show(one)})" for one in items)
        case ("not", item):
            return f"not ({show(item)})"
        case ("bool", value):
            return show_value(value)
        case ("cmp", op, value, constant, flipped):
            if flipped:
                return f"{literal(constant)} {_MIRROR[op]} {show_value(value)}"
            return f"{show_value(value)} {op} {literal(constant)}"
        case ("fields", op, left, right):
            return f"{show_value(left)} {op} {show_value(right)}"
        case ("range", low, op1, value, op2, high):
            return f"{literal(low)} {op1} {show_value(value)} {op2} {literal(high)}"
        case ("in", value, constants, negated):
            return f"{show_value(value)} {'not in' if negated else 'in'} {literal(constants)}"
        case ("like", value, pattern):
            return f"{show_value(value)} like {literal(pattern)}"
        case ("regex", value, pattern, negated):
            return f"{show_value(value)} {'!~' if negated else '=~'} {literal(pattern)}"
        case ("null", target, negated):
            return f"{show_value(target)} is {'not ' if negated else ''}null"
        case ("exists", path):
            return f"exists {show_value(path)}"
        case ("contains", mode, target, constants):
            name = "array_contains" if target[0] == "field" else "json_contains"
            if mode == "one":
                return f"{name}({show_value(target)}, {literal(constants[0])})"
            return f"{name}_{mode}({show_value(target)}, {literal(constants)})"
    raise AssertionError(tree)


def show_value(tree: Tree) -> str:
    match tree:
        case ("field", name):
            return str(name)
        case ("path", name, keys):
            return str(name) + "".join(f"[{literal(key)}]" for key in keys)
        case ("element", name, i):
            return f"{name}[{i}]"
        case ("length", target):
            return f"array_length({show_value(target)})"
        case ("arith", op, value, constant, flipped):
            inner = f"({show_value(value)})" if value[0] == "arith" else show_value(value)
            return f"({literal(constant)} {op} {inner})" if flipped else f"({inner} {op} {literal(constant)})"
    raise AssertionError(tree)


_MIRROR = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        quote = "'" if len(value) % 2 else '"'
        escaped = value.replace("\\", "\\\\").replace(quote, f"\\{quote}").replace("\n", "\\n").replace("\0", "\\0")
        return f"{quote}{escaped}{quote}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value)


# --- meaning


def holds(tree: Tree, row: Row) -> bool | None:
    """Return what the condition says of the row."""
    match tree:
        case ("and", items):
            every = [holds(one, row) for one in items]
            return False if False in every else None if None in every else True
        case ("or", items):
            every = [holds(one, row) for one in items]
            return True if True in every else None if None in every else False
        case ("not", item):
            inner = holds(item, row)
            return None if inner is None else not inner
        case ("bool", value):
            return compare("==", value_of(value, row), True)
        case ("cmp", op, value, constant, _):
            return compare(op, value_of(value, row), _met(value, constant))
        case ("fields", op, left, right):
            return compare(op, value_of(left, row), value_of(right, row))
        case ("range", low, op1, value, op2, high):
            found = value_of(value, row)
            both = [compare(_MIRROR[op1], found, _met(value, low)), compare(op2, found, _met(value, high))]
            return False if False in both else None if None in both else True
        case ("in", value, constants, negated):
            found = value_of(value, row)
            if found is None:
                return None
            equal = [compare("==", found, _met(value, one)) for one in constants]
            if None in equal:
                return None
            return bool((True in equal) != negated)
        case ("like", value, pattern):
            found = value_of(value, row)
            return _like(found, pattern) if isinstance(found, str) else None
        case ("regex", value, pattern, negated):
            found = value_of(value, row)
            if not isinstance(found, str):
                return None
            return bool((re.search(pattern, found, re.DOTALL) is not None) != negated)
        case ("null", target, negated):
            return bool((value_of(target, row) is None) != negated)
        case ("exists", path):
            return value_of(path, row) is not None
        case ("contains", mode, target, constants):
            found = value_of(target, row)
            if not isinstance(found, list):
                return None
            wanted = [_met(target, one) for one in constants]
            hits = [any(compare("==", one, each) is True for one in found) for each in wanted]
            return all(hits) if mode == "all" else any(hits)
    raise AssertionError(tree)


def value_of(tree: Tree, row: Row) -> Any:
    """Return the value in the row, or None where it is unknown."""
    match tree:
        case ("field", name):
            return row[name]
        case ("path", name, keys):
            found = row["$meta"].get(name) if name not in row else row[name]
            for key in keys:
                if isinstance(key, str):
                    found = found.get(key) if isinstance(found, dict) else None
                else:
                    found = found[key] if isinstance(found, list) and key < len(found) else None
            return found
        case ("element", name, i):
            found = row[name]
            return found[i] if found is not None and i < len(found) else None
        case ("length", target):
            found = value_of(target, row)
            return len(found) if isinstance(found, list) else None
        case ("arith", op, value, constant, flipped):
            found = value_of(value, row)
            if isinstance(found, bool) or not isinstance(found, int | float | np.floating):
                return None
            with np.errstate(all="ignore"):
                return _arithmetic(op, found, constant, flipped, single=_is_single(value))
    raise AssertionError(tree)


def compare(op: str, left: Any, right: Any) -> bool | None:
    """Return `left op right`; unknown if either is, or if they are of two kinds."""
    if left is None or right is None or _kind(left) != _kind(right):
        return None
    match _kind(left):
        case "text":
            left, right = left.encode(), right.encode()
        case "list":
            same = len(left) == len(right) and all(
                compare("==", a, b) is True for a, b in zip(left, right, strict=True)
            )
            return {"==": same, "!=": not same}[op]
        case "object":
            return None
        case "number":
            left, right = (float(v) if isinstance(v, np.floating) else v for v in (left, right))
    return bool(
        {
            "==": left == right, "!=": left != right, "<": left < right, "<=": left <= right, ">": left > right,
            ">=": left >= right,
        }[op]
    )  # fmt: skip


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float | np.floating):
        return "number"
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else "object"


def _is_single(value: Tree) -> bool:
    """Return whether the value is a float32."""
    if value[0] == "arith":
        return _is_single(value[2])
    return value[0] in ("field", "element") and value[1] in ("ratio", "marks")


def _met(value: Tree, constant: Any) -> Any:
    """Return the constant as it meets the value: a Float rounds it."""
    if not _is_single(value) or isinstance(constant, bool | str):
        return constant
    with np.errstate(over="ignore"):
        rounded = np.float32(constant)
    return float(rounded) if np.isfinite(rounded) else constant


def _arithmetic(op: str, found: Any, constant: Any, flipped: bool, *, single: bool) -> Any:
    whole = isinstance(found, int) and isinstance(constant, int) and found < 2**63
    if whole and not (op == "**" and constant < 0):
        a, b = (constant, found) if flipped else (found, constant)
        if op in "/%":
            if b == 0:
                return None
            quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            result = quotient if op == "/" else a - quotient * b
        elif op == "**":
            result = pow(a, b, 2**64)
        else:
            result = {
                "+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "&": lambda: a & b, "|": lambda: a | b,
                "^": lambda: a ^ b, "<<": lambda: a << b, ">>": lambda: a >> b,
            }[op]()  # fmt: skip
        return (result + 2**63) % 2**64 - 2**63
    if op in ("%", "&", "|", "^", "<<", ">>"):
        return None
    kind = np.float32 if single else np.float64
    a, b = np.array([found], kind), np.array([constant], kind)
    if flipped:
        a, b = b, a
        if op == "/" and found == 0:
            return None
    result = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "**": np.power}[op](a, b)[0]
    return None if np.isnan(result) else result


def _like(text: str, pattern: str) -> bool:
    """Match by trying every way, one character at a time."""
    if not pattern:
        return not text
    if pattern[0] == "%":
        return any(_like(text[i:], pattern[1:]) for i in range(len(text) + 1))
    if not text:
        return False
    if pattern[0] == "_":
        return _like(text[1:], pattern[1:])
    if pattern[0] == "\\":
        return text[0] == pattern[1] and _like(text[1:], pattern[2:])
    return text[0] == pattern[0] and _like(text[1:], pattern[1:])
