"""Values of the checked tree over the rows of a batch: numbers, text or JSON, and which rows they are known in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from storage.columns import (
    NUMPY_TYPES,
    ArrayColumn,
    Batch,
    Column,
    Offsets,
    ScalarColumn,
    StringColumn,
)
from storage.filter.json_paths import JsonValues, Keys, Kind, json_values
from storage.filter.tree import (
    Arithmetic,
    ArrayValue,
    ElementValue,
    FieldValue,
    LengthValue,
    PathValue,
    Shifted,
    Value,
)
from storage.schema import DataType, FieldSchema
from storage.strings import StringArray
from storage.times import shifted
from storage.types import FieldId

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Bool, integers or floats; `known` is None when all rows are."""

    values: npt.NDArray[Any]
    known: Mask | None


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    values: StringArray
    known: Mask | None


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """Row i is items[bounds[i]:bounds[i + 1]]."""

    bounds: Offsets
    items: Numbers | Texts | JsonValues
    known: Mask | None


Values = Union[Numbers, Texts, JsonValues]  # noqa: UP007 (a runtime alias)


class Rows:
    """The rows under test: a batch, or those at `offsets`; columns are taken once each."""

    def __init__(
        self, batch: Batch, offsets: Offsets | None, paths: Mapping[FieldId, tuple[Keys, ...]] = MappingProxyType({})
    ) -> None:
        self.batch, self.offsets, self.paths = batch, offsets, paths
        self.count = batch.rows if offsets is None else len(offsets)
        self._taken: dict[FieldId, Column] = {}

    def narrowed(self, inside: Offsets) -> Rows:
        """Return only the rows at these places among the rows under test."""
        return Rows(self.batch, inside if self.offsets is None else self.offsets[inside], self.paths)

    def column(self, field: FieldSchema) -> Column:
        column = self.batch.columns.get(field.id)
        if column is None:
            return self._absent(field)
        if self.offsets is None:
            return column
        if field.id not in self._taken:
            self._taken[field.id] = column.take(self.offsets)
        return self._taken[field.id]

    def _absent(self, field: FieldSchema) -> Column:
        """Rows written before a field existed have no column for it: null everywhere."""
        assert field.nullable, f"the batch has no column for field {field.name}"
        unknown = np.zeros(self.count, np.bool_)
        kind = field.element if field.type is DataType.ARRAY else field.type
        items = 0 if field.type is DataType.ARRAY else self.count
        column: ScalarColumn | StringColumn
        if kind is not None and kind in NUMPY_TYPES:
            column = ScalarColumn(np.zeros(items, NUMPY_TYPES[kind]), None if items != self.count else unknown)
        else:
            column = StringColumn(StringArray.from_strings([""] * items), None if items != self.count else unknown)
        if field.type is not DataType.ARRAY:
            return column
        return ArrayColumn(np.zeros(self.count + 1, np.int64), column, unknown)

    def json(self, field: FieldSchema, keys: Keys) -> JsonValues:
        column = self.batch.columns.get(field.id)
        if column is None:
            column, offsets = self._absent(field), None
        else:
            offsets = self.offsets
        assert isinstance(column, StringColumn)
        return json_values(column.values, keys, offsets, self.paths.get(field.id, ()))

    def known(self, field: FieldSchema) -> Mask | None:
        """Return the field's validity mask without taking its values; None if no row is null."""
        column = self.batch.columns.get(field.id)
        if column is None:
            return self._absent(field).valid
        if column.valid is None or self.offsets is None:
            return column.valid
        return column.valid[self.offsets]


def value_of(value: Value, rows: Rows) -> Values:
    """Return the value in each row."""
    match value:
        case FieldValue(field):
            return _plain(rows.column(field))
        case PathValue(field, keys):
            return rows.json(field, keys)
        case ElementValue(field, place):
            return _elements(rows.column(field), place)
        case LengthValue(of):
            lists = lists_of(of, rows)
            return Numbers(np.diff(lists.bounds), lists.known)
        case Shifted(operand, interval):
            times = value_of(operand, rows)
            assert isinstance(times, Numbers), "times are numbers"
            return Numbers(shifted(times.values, interval), times.known)
        case Arithmetic():
            return _arithmetic(value, value_of(value.operand, rows))


def lists_of(value: ArrayValue, rows: Rows) -> Lists:
    """Return the array in each row; of JSON, unknown where the value is no array."""
    if value.keys is None:
        column = rows.column(value.field)
        assert isinstance(column, ArrayColumn)
        return Lists(column.offsets, _plain(column.items), column.valid)
    found = rows.json(value.field, value.keys)
    bounds = np.zeros(rows.count + 1, np.int64) if found.bounds is None else found.bounds
    items = found.take(np.zeros(0, np.int64)) if found.items is None else found.items
    return Lists(bounds, items, found.kinds == Kind.LIST)


def both(left: Mask | None, right: Mask | None) -> Mask | None:
    if left is None or right is None:
        return right if left is None else left
    return left & right


def _plain(column: Column) -> Numbers | Texts:
    if isinstance(column, ScalarColumn):
        return Numbers(column.values, column.valid)
    assert isinstance(column, StringColumn)
    return Texts(column.values, column.valid)


def _elements(column: Column, place: int) -> Numbers | Texts:
    assert isinstance(column, ArrayColumn)
    known = np.diff(column.offsets) > place
    if column.valid is not None:
        known &= column.valid
    if not len(column.items):
        items: ScalarColumn | StringColumn
        if isinstance(column.items, ScalarColumn):
            items = ScalarColumn(np.zeros(len(column), column.items.values.dtype), known)
        else:
            items = StringColumn(StringArray.from_strings([""] * len(column)), known)
        return _plain(items)
    places = np.where(known, column.offsets[:-1] + place, 0)
    taken = _plain(column.items.take(places))
    if isinstance(taken, Numbers):
        return Numbers(taken.values, known)
    return Texts(taken.values, known)


def _arithmetic(node: Arithmetic, operand: Values) -> Values:
    if isinstance(operand, JsonValues):
        return _json_arithmetic(node, operand)
    assert isinstance(operand, Numbers)
    with np.errstate(all="ignore"):
        if node.type is DataType.INT64:
            result, defined = _ints(node.op, operand.values.astype(np.int64), int(node.constant), node.flipped)
        else:
            kind = np.float32 if node.type is DataType.FLOAT else np.float64
            result, defined = _floats(node.op, operand.values.astype(kind), kind(node.constant), node.flipped)
    return Numbers(result, both(operand.known, defined))


def _json_arithmetic(node: Arithmetic, operand: JsonValues) -> JsonValues:
    """Whole numbers with a whole constant stay whole; all other numbers become doubles; the rest goes missing."""
    kinds = np.zeros(len(operand), np.uint8)
    ints = floats = None
    whole = operand.kinds == Kind.INT
    constant = node.constant
    doubles = operand.kinds == Kind.FLOAT
    only_ints = node.op in ("%", "&", "|", "^", "<<", ">>")
    with np.errstate(all="ignore"):
        if isinstance(constant, int) and not (node.op == "**" and constant < 0):
            if operand.ints is not None:
                ints, defined = _ints(node.op, operand.ints, constant, node.flipped)
                kinds[whole if defined is None else whole & defined] = Kind.INT
        else:
            doubles = doubles | whole
        if not only_ints:
            doubles = doubles | (operand.kinds == Kind.UINT)
            if doubles.any():
                floats, defined = _floats(node.op, _as_doubles(operand), np.float64(constant), node.flipped)
                kinds[doubles if defined is None else doubles & defined] = Kind.FLOAT
    return JsonValues(kinds, ints, None, floats, None, None, None)


def _as_doubles(operand: JsonValues) -> npt.NDArray[np.float64]:
    doubles = np.zeros(len(operand), np.float64) if operand.floats is None else operand.floats
    if operand.ints is not None:
        doubles = np.where(operand.kinds == Kind.INT, operand.ints, doubles)
    if operand.uints is not None:
        doubles = np.where(operand.kinds == Kind.UINT, operand.uints.astype(np.float64), doubles)
    return doubles


def _ints(op: str, x: npt.NDArray[np.int64], c: int, flipped: bool) -> tuple[npt.NDArray[Any], Mask | None]:
    """Return (x op c or c op x, where it is defined); 64 bits wrap."""
    k = np.int64(c)
    match op:
        case "+":
            return x + k, None
        case "-":
            return (k - x if flipped else x - k), None
        case "*":
            return x * k, None
        case "&":
            return x & k, None
        case "|":
            return x | k, None
        case "^":
            return x ^ k, None
        case "<<":
            return x << k, None
        case ">>":
            return x >> k, None
        case "**":
            return x**k, None
    if not flipped:
        return _divided(op, x, np.full(1, k)), None
    defined = x != 0
    return _divided(op, np.full(1, k), np.where(defined, x, 1)), defined


def _divided(op: str, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the quotient or remainder, rounded towards zero; dividing by -1 wraps and leaves nothing over."""
    safe = np.where(b == -1, 1, b)
    remainder = np.where(b == -1, 0, np.fmod(a, safe))
    if op == "%":
        return remainder
    quotient: npt.NDArray[np.int64] = np.where(b == -1, np.negative(a), (a - remainder) // safe)
    return quotient


def _floats(op: str, x: npt.NDArray[Any], c: Any, flipped: bool) -> tuple[npt.NDArray[Any], Mask | None]:
    """Return (x op c or c op x, where it is defined), in the float type of both."""
    match op:
        case "+":
            result = x + c
        case "-":
            result = c - x if flipped else x - c
        case "*":
            result = x * c
        case "/":
            result = c / x if flipped else x / c
        case _:
            assert op == "**"
            result = x**c
    defined = ~np.isnan(result)
    if op == "/" and flipped:
        defined &= x != 0
    return result, defined
