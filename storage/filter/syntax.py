"""What the parser makes of the text: frozen nodes that know where they stand, and the complaint that points there.

Nothing here knows a schema. `at` is (start, stop) in characters of the text; `depth` counts nested nodes, so that
the parser can refuse a tree that recursion could not walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Union

DEPTH_MAX: Final = 100
"""Of brackets and of operators within each other; Milvus's own bound for templates."""

Span = tuple[int, int]
Atom = bool | int | float | str
LiteralValue = Union[Atom, tuple["LiteralValue", ...]]  # noqa: UP007 (a recursive alias)


class Complaint(Exception):
    """The expression is wrong between two columns; `hint` says how to help."""

    def __init__(self, message: str, at: Span, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.at, self.hint = message, at, hint


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant; a list of plain numbers or strings is one literal however long it is."""

    value: LiteralValue
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list with an item that is not a plain number or string."""

    items: tuple[Node, ...]
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Template:
    """`{name}`: its value comes beside the text."""

    name: str
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Timed:
    """`ISO '...'` is a point in time, `INTERVAL '...'` what is added to one; `text` stands between the quotes."""

    text: str
    is_interval: bool
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Path:
    """`name`, `name["key"]`, `name[0]`. A key without quotes is kept in `bare`: it names a part of a struct."""

    name: str
    keys: tuple[str | int, ...]
    at: Span
    bare: str = ""
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Unary:
    """`-`, `+`, `~` on a value."""

    op: str
    operand: Node
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Not:
    """`open` until brackets close it: `not a == b` then means `not (a == b)`."""

    operand: Node
    at: Span
    open: bool = True
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Binary:
    """Arithmetic and bits: + - * / % ** << >> & | ^; `op_at` is where the operator stands."""

    op: str
    left: Node
    right: Node
    at: Span
    op_at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Compared:
    """`a < b`, or a chain `a < b <= c`: one operator fewer than operands."""

    ops: tuple[str, ...]
    operands: tuple[Node, ...]
    at: Span
    op_at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Logic:
    """`and` or `or` of two or more."""

    op: str
    items: tuple[Node, ...]
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Member:
    """`operand in options`, `operand not in options`."""

    operand: Node
    options: Node
    negated: bool
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Matched:
    """`operand like pattern`, `=~` or `!~`."""

    op: str
    operand: Node
    pattern: Node
    at: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class NullTest:
    """`operand is null`, `is not null`; `exists operand` is `is not null` of a JSON path."""

    operand: Node
    negated: bool
    at: Span
    exists: bool = False
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Call:
    """`name(arguments)`; `named` are those given as `key=value`."""

    name: str
    arguments: tuple[Node, ...]
    at: Span
    named: tuple[tuple[str, Node], ...] = field(default=())
    depth: int = 1


Node = Union[  # noqa: UP007 (a runtime alias of classes that name it)
    Literal, ListOf, Template, Timed, Path, Unary, Not, Binary, Compared, Logic, Member, Matched, NullTest, Call
]
