"""The checked tree: every name is a field, every constant has the type of what it meets, every node one meaning.

Values answer one thing per row; predicates answer true, false or unknown per row. `check` makes this tree, `evaluate`
runs it, `pruning` reasons about it, `printing` writes it down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Union

from storage.filter.constants import ConstantSet
from storage.filter.patterns import LikePattern
from storage.filter.syntax import LiteralValue
from storage.schema import DataType, FieldSchema
from storage.times import Interval

CompareOp = Literal["==", "!=", "<", "<=", ">", ">="]
ContainsMode = Literal["one", "all", "any"]
MIRRORED: Final[dict[CompareOp, CompareOp]] = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
"""`c op x` is `x MIRRORED[op] c`."""
OPPOSITE: Final[dict[CompareOp, CompareOp]] = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
"""`not (x op y)` is `x OPPOSITE[op] y`, where both are known and not NaN."""


@dataclass(frozen=True, slots=True)
class FieldValue:
    """A scalar field."""

    field: FieldSchema

    @property
    def type(self) -> DataType:
        return self.field.type


@dataclass(frozen=True, slots=True)
class ElementValue:
    """`array[place]`: unknown where the array is shorter."""

    field: FieldSchema
    place: int

    @property
    def type(self) -> DataType:
        assert self.field.element is not None
        return self.field.element


@dataclass(frozen=True, slots=True)
class PathValue:
    """What stands at a path of a JSON field; of any type, or missing. No keys mean the whole document."""

    field: FieldSchema
    keys: tuple[str | int, ...]

    @property
    def type(self) -> DataType:
        return DataType.JSON


@dataclass(frozen=True, slots=True)
class LengthValue:
    """How many elements an array has; unknown for null, and for a JSON value that is no array."""

    of: ArrayValue

    @property
    def type(self) -> DataType:
        return DataType.INT64


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A whole array field, or a JSON path that should hold an array (`keys` is None for an array field)."""

    field: FieldSchema
    keys: tuple[str | int, ...] | None


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`operand op constant`, or `constant op operand` if `flipped`. The type is Int64, Float, Double or JSON.

    Int64 wraps at 64 bits like a processor; `/` and `%` of integers round towards zero, as in C; Float computes in
    float32. What has no value (x / 0 with x in a column) is unknown.
    """

    op: str
    operand: Value
    constant: int | float
    flipped: bool
    type: DataType


@dataclass(frozen=True, slots=True)
class Shifted:
    """A point in time, an interval later."""

    operand: FieldValue
    interval: Interval

    @property
    def type(self) -> DataType:
        return DataType.TIMESTAMPTZ


@dataclass(frozen=True, slots=True)
class Always:
    """The same for every row; None is unknown."""

    truth: bool | None


@dataclass(frozen=True, slots=True)
class AllOf:
    items: tuple[Predicate, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    items: tuple[Predicate, ...]


@dataclass(frozen=True, slots=True)
class Negation:
    item: Predicate


@dataclass(frozen=True, slots=True)
class Comparison:
    """`value op constant`; for a Float value the constant is already rounded to float32."""

    op: CompareOp
    value: Value
    constant: LiteralValue


@dataclass(frozen=True, slots=True)
class FieldComparison:
    """`left op right`, both numeric, both VarChar or both Bool."""

    op: CompareOp
    left: Value
    right: Value


@dataclass(frozen=True, slots=True)
class IsIn:
    value: Value
    constants: ConstantSet


@dataclass(frozen=True, slots=True)
class Like:
    value: Value
    pattern: LikePattern


@dataclass(frozen=True, slots=True)
class Regex:
    value: Value
    pattern: str


@dataclass(frozen=True, slots=True)
class IsNull:
    """Never unknown. A JSON path is null where it is missing or holds null."""

    value: FieldValue | PathValue | ArrayValue


@dataclass(frozen=True, slots=True)
class Contains:
    """The array has the one constant, all of them, or any of them among its elements."""

    value: ArrayValue
    mode: ContainsMode
    constants: tuple[LiteralValue, ...]
    prepared: ConstantSet


@dataclass(frozen=True, slots=True)
class TextMatch:
    """The text has at least so many of the terms of another; false if that has none."""

    value: FieldValue
    text: str
    terms: tuple[str, ...]
    """Each once."""
    least: int


@dataclass(frozen=True, slots=True)
class PhraseMatch:
    """The text has the terms of another in their order, with their distances, or `slop` places apart from it."""

    value: FieldValue
    text: str
    placed: tuple[tuple[int, str], ...]
    """Each term with its distance from the first one."""
    slop: int


Value = Union[FieldValue, ElementValue, PathValue, LengthValue, Arithmetic, Shifted]  # noqa: UP007 (a recursive alias)
Predicate = Union[  # noqa: UP007 (a recursive alias)
    Always, AllOf, AnyOf, Negation, Comparison, FieldComparison, IsIn, Like, Regex, IsNull, Contains,
    TextMatch, PhraseMatch,
]  # fmt: skip
