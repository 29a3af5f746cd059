"""The door to lark: text becomes a tree of `syntax` nodes by an LALR grammar, or a `Complaint` with its column.

LALR keeps its own stack, so no text makes it recurse, and takes time linear in the text. Three bounds keep that time
small: TEXT_CHARS_MAX, TOKENS_MAX, and DEPTH_MAX for brackets and for operators within each other. A list of plain
numbers or plain strings is one token, read in C, so the bound on tokens leaves room for lists of 100,000 keys.

`not` is read loosely: where Milvus binds it tighter than a comparison, `not a == b` here means `not (a == b)`. No
sensible expression tells the two apart, because the tight reading only has a meaning for Bool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, Final, TypeGuard

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError
from lark.lark import PostLex

from storage.filter.literals import number_of, numbers_of, strings_of, text_of
from storage.filter.syntax import (
    DEPTH_MAX,
    Binary,
    Call,
    Compared,
    Complaint,
    ListOf,
    Literal,
    Logic,
    Matched,
    Member,
    Node,
    Not,
    NullTest,
    Path,
    Span,
    Template,
    Timed,
    Unary,
)

TEXT_CHARS_MAX: Final = 4 << 20
"""A list of 100,000 keys of 19 digits is 2.1 MB."""
TOKENS_MAX: Final = 20_000
"""A machine-made filter of 3,000 comparisons is 12,000 tokens; 20,000 take about 0.2 s."""

GRAMMAR: Final = r"""
?start: disjunction
?disjunction: conjunction (_or conjunction)*
?conjunction: bit_or (_and bit_or)*
?bit_or: bit_xor | bit_or BAR bit_xor -> binary
?bit_xor: bit_and | bit_xor HAT bit_and -> binary
?bit_and: equality | bit_and AMPERSAND equality -> binary
?equality: ordered | equality EQUALITY ordered
?ordered: membership (ORDER membership)*
?membership: shifted
    | shifted _in shifted -> is_in
    | shifted _not_word _in shifted -> not_in
?shifted: sum | shifted SHIFT sum -> binary
?sum: product | sum (PLUS | MINUS) product -> binary
?product: unary | product FACTOR unary -> binary
?unary: power
    | (PLUS | MINUS | TILDE) unary -> signed
    | _not unary -> negation
?power: matched | matched POWER unary -> binary
?matched: alike | alike REGEX alike -> regex
?alike: primary | primary _like primary -> like
?primary: path
    | path (IS_NULL | IS_NOT_NULL) -> null_test
    | ("exists" | "EXISTS") primary -> exists
    | NUMBER -> number
    | STRING -> string
    | ISO_TIME -> iso_time
    | INTERVAL -> interval
    | (TRUE_LOWER | TRUE_TITLE | TRUE_UPPER) -> true
    | (FALSE_LOWER | FALSE_TITLE | FALSE_UPPER) -> false
    | NUMBERS -> numbers
    | STRINGS -> strings
    | LBRACE NAME RBRACE -> template
    | LPAR disjunction RPAR -> group
    | LSQB [disjunction ("," disjunction)* [","]] RSQB -> list_of
    | NAME LPAR [argument ("," argument)* [","]] RPAR -> call
?argument: disjunction | NAME "=" disjunction -> named
path: NAME subscript*
?subscript: LSQB (STRING | NUMBER | NAME) RSQB

_or: "or" | "OR" | "||"
_and: "and" | "AND" | "&&"
_not: "not" | "NOT" | "!"
_not_word: "not" | "NOT"
_in: "in" | "IN"
_like: "like" | "LIKE"

TRUE_LOWER: "true"
TRUE_TITLE: "True"
TRUE_UPPER: "TRUE"
FALSE_LOWER: "false"
FALSE_TITLE: "False"
FALSE_UPPER: "FALSE"
EQUALITY: "==" | "!="
ORDER: "<=" | ">=" | "<" | ">"
SHIFT.1: "<<" | ">>"
POWER.1: "**"
FACTOR: "*" | "/" | "%"
REGEX.1: "=~" | "!~"
BAR: "|"
HAT: "^"
AMPERSAND: "&"
PLUS: "+"
MINUS: "-"
TILDE: "~"
LPAR: "("
RPAR: ")"
LSQB: "["
RSQB: "]"
LBRACE: "{"
RBRACE: "}"
IS_NULL.3: /is\s+null\b|IS\s+NULL\b/
IS_NOT_NULL.3: /is\s+not\s+null\b|IS\s+NOT\s+NULL\b/
NAME: /\$meta\b|\$|[A-Za-z_][A-Za-z0-9_]*/
NUMBER.1: /0[xX](?:[0-9A-Fa-f]+\.?[0-9A-Fa-f]*|\.[0-9A-Fa-f]+)(?:[pP][+-]?[0-9]+)?|0[bB][01]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?/
STRING.2: /[rR]?(?:"(?:[^"\\]|\\[\s\S])*+"|'(?:[^'\\]|\\[\s\S])*+')/
ISO_TIME.4: /(?:ISO|iso)\s*(?:"[^"\\]*+"|'[^'\\]*+')/
INTERVAL.4: /(?:INTERVAL|interval)\s*(?:"[^"\\]*+"|'[^'\\]*+')/
NUMBERS.2: /\[\s*+-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?(?:\s*+,\s*+-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)++\s*+,?\s*+\]/
STRINGS.2: /\[\s*+(?:"[^"\\]*+"|'[^'\\]*+')(?:\s*+,\s*+(?:"[^"\\]*+"|'[^'\\]*+'))++\s*+,?\s*+\]/
%ignore /[ \t\r\n\f\v]+/
"""  # noqa: E501 (a token is one regular expression)


def parse(text: str) -> Node:
    """Return the tree of a filter's text. Raises Complaint."""
    if len(text) > TEXT_CHARS_MAX:
        raise Complaint(f"the expression has {len(text)} characters, at most {TEXT_CHARS_MAX} are read", (0, 0))
    return _parse_remembered(text) if len(text) <= 4096 else _parse(text)


@lru_cache(maxsize=512)
def _parse_remembered(text: str) -> Node:
    return _parse(text)


def _parse(text: str) -> Node:
    try:
        tree: Any = _lark().parse(text)
    except VisitError as error:
        if isinstance(error.orig_exc, Complaint):
            raise error.orig_exc from None
        raise
    except UnexpectedInput as error:
        raise _explained(text, error) from None
    node: Node = tree
    return node


class _Bounds(PostLex):
    """Counts tokens and open brackets on their way into the parser."""

    always_accept = ()

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        opened: list[Token] = []
        for count, token in enumerate(stream):
            if count >= TOKENS_MAX:
                raise Complaint(
                    f"the expression has more than {TOKENS_MAX} words", _span(token),
                    "use `in [...]` with plain values, or a template with a list",
                )  # fmt: skip
            if token.type in ("LPAR", "LSQB"):
                opened.append(token)
                if len(opened) > DEPTH_MAX:
                    raise Complaint(f"brackets nest deeper than {DEPTH_MAX}", _span(token))
            elif token.type in ("RPAR", "RSQB") and opened:
                opened.pop()
            yield token


def _span(token: Token) -> Span:
    start = token.start_pos or 0
    return start, token.end_pos or start + len(token)


class _Builder(Transformer[Token, Node]):
    """Builds nodes while the parser reduces; each method is named after its rule."""

    def disjunction(self, items: list[Node]) -> Node:
        return Logic("or", tuple(items), _around(items), _deeper(items))

    def conjunction(self, items: list[Node]) -> Node:
        return Logic("and", tuple(items), _around(items), _deeper(items))

    def binary(self, items: list[Any]) -> Node:
        left, op, right = items
        both = [left, right]
        return _hoisted(left, lambda one: Binary(str(op), one, right, _around(both), _span(op), _deeper(both)))

    def equality(self, items: list[Any]) -> Node:
        left, op, right = items
        both = [left, right]
        return _hoisted(left, lambda one: Compared((str(op),), (one, right), _around(both), _span(op), _deeper(both)))

    def ordered(self, items: list[Any]) -> Node:
        operands: list[Node] = items[::2]
        ops = tuple(str(op) for op in items[1::2])
        at, depth, op_at = _around(operands), _deeper(operands), _span(items[1])
        if len(ops) > 2:
            raise Complaint("a range has one lower and one upper bound", _span(items[5]), "join comparisons with `and`")
        return _hoisted(operands[0], lambda one: Compared(ops, (one, *operands[1:]), at, op_at, depth))

    def is_in(self, items: list[Node]) -> Node:
        return self._member(items, negated=False)

    def not_in(self, items: list[Node]) -> Node:
        return self._member(items, negated=True)

    def _member(self, items: list[Node], *, negated: bool) -> Node:
        left, right = items
        return _hoisted(left, lambda one: Member(one, right, negated, _around(items), _deeper(items)))

    def signed(self, items: list[Any]) -> Node:
        op, operand = items
        at = (_span(op)[0], operand.at[1])
        if op == "-" and isinstance(operand, Literal) and _is_number(operand.value):
            return Literal(-operand.value, at)
        return Unary(str(op), operand, at, _deeper([operand]))

    def negation(self, items: list[Node]) -> Node:
        return Not(items[0], items[0].at, True, _deeper(items))

    def regex(self, items: list[Any]) -> Node:
        left, op, right = items
        return Matched(str(op), left, right, _around([left, right]), _deeper([left, right]))

    def like(self, items: list[Node]) -> Node:
        return Matched("like", items[0], items[1], _around(items), _deeper(items))

    def null_test(self, items: list[Any]) -> Node:
        path, word = items
        return NullTest(path, word.type == "IS_NOT_NULL", (path.at[0], _span(word)[1]))

    def exists(self, items: list[Node]) -> Node:
        return NullTest(items[0], True, items[0].at, True, _deeper(items))

    def number(self, items: list[Token]) -> Node:
        return Literal(number_of(items[0], _span(items[0])), _span(items[0]))

    def string(self, items: list[Token]) -> Node:
        return Literal(text_of(items[0], _span(items[0])[0]), _span(items[0]))

    def iso_time(self, items: list[Token]) -> Node:
        return _timed(items[0], is_interval=False)

    def interval(self, items: list[Token]) -> Node:
        return _timed(items[0], is_interval=True)

    def true(self, items: list[Token]) -> Node:
        return Literal(True, _span(items[0]))

    def false(self, items: list[Token]) -> Node:
        return Literal(False, _span(items[0]))

    def numbers(self, items: list[Token]) -> Node:
        return Literal(numbers_of(items[0], _span(items[0])), _span(items[0]))

    def strings(self, items: list[Token]) -> Node:
        return Literal(strings_of(items[0]), _span(items[0]))

    def template(self, items: list[Token]) -> Node:
        return Template(str(items[1]), (_span(items[0])[0], _span(items[2])[1]))

    def group(self, items: list[Any]) -> Node:
        first, inner, last = items
        at = (_span(first)[0], _span(last)[1])
        return replace(inner, at=at, open=False) if isinstance(inner, Not) else replace(inner, at=at)

    def list_of(self, items: list[Any]) -> Node:
        inside = [one for one in items[1:-1] if one is not None]
        at = (_span(items[0])[0], _span(items[-1])[1])
        return ListOf(tuple(inside), at, _deeper(inside))

    def call(self, items: list[Any]) -> Node:
        name, _, *rest, last = items
        inside = [one for one in rest if one is not None]
        arguments = [one for one in inside if not isinstance(one, _Named)]
        named = [one for one in inside if isinstance(one, _Named)]
        depth = _deeper([*arguments, *(one.value for one in named)])
        at = (_span(name)[0], _span(last)[1])
        return Call(str(name), tuple(arguments), at, tuple((one.name, one.value) for one in named), depth)

    def named(self, items: list[Any]) -> _Named:
        return _Named(str(items[0]), items[1])

    def subscript(self, items: list[Token]) -> list[Token]:
        return items

    def path(self, items: list[Any]) -> Node:
        name, *subscripts = items
        keys: list[str | int] = []
        bare = ""
        for _, key, _ in subscripts:
            if key.type == "NAME":
                bare = bare or str(key)
            elif key.type == "STRING":
                keys.append(text_of(key, _span(key)[0]))
            else:
                number = number_of(key, _span(key))
                if not isinstance(number, int) or number > 2**31:
                    raise Complaint("a place in an array is a whole number from 0", _span(key))
                keys.append(number)
        end = _span(subscripts[-1][2] if subscripts else name)[1]
        return Path(str(name), tuple(keys), (_span(name)[0], end), bare)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _timed(token: Token, *, is_interval: bool) -> Timed:
    quoted = str(token)
    return Timed(quoted[quoted.index(quoted[-1]) + 1 : -1], is_interval, _span(token))


class _Named:
    def __init__(self, name: str, value: Node) -> None:
        self.name, self.value = name, value


def _around(items: Sequence[Node]) -> Span:
    return items[0].at[0], items[-1].at[1]


def _deeper(items: Sequence[Node]) -> int:
    depth = 1 + max((one.depth for one in items), default=0)
    if depth > DEPTH_MAX:
        raise Complaint(
            f"operators nest deeper than {DEPTH_MAX}", (items[0].at[0], items[0].at[0]), "work the constants out first"
        )
    return depth


def _hoisted(left: Node, make: Any) -> Node:
    """Return `not (x op y)` where the text says `not x op y`, else what `make` makes of the left operand."""
    if isinstance(left, Not) and left.open:
        inner: Node = make(left.operand)
        return Not(inner, inner.at, True, inner.depth + 1)
    node: Node = make(left)
    return node


_WORDS: Final = {"And": "and", "Or": "or", "Not": "not", "In": "in", "Like": "like", "Is": "is", "Null": "null"}


def _explained(text: str, error: UnexpectedInput) -> Complaint:
    """Return what a person would say about a text that the grammar refuses."""
    start = error.pos_in_stream if error.pos_in_stream is not None else len(text)
    if isinstance(error, UnexpectedCharacters):
        at = (start, start + 1)
        character = text[start]
        if character in "\"'":
            return Complaint("the string is not closed", (start, len(text)), f"end it with {character}")
        return Complaint(f"unexpected character {character!r}", at, _CHARACTER_HINTS.get(character, ""))
    assert isinstance(error, UnexpectedToken)
    token = error.token
    if token.type == "$END":
        end = len(text.rstrip())
        return Complaint("the expression ends too early", (end, end), _missing(text))
    at = _span(token)
    before = text[: at[0]].split()[-1:] or [""]
    if before[0] in ("interval", "INTERVAL", "iso", "ISO"):
        return Complaint(f"{before[0]} stands before a text in quotes", at)
    if token.type == "EQUAL":
        return Complaint("unexpected '='", at, "comparison is written `==`")
    if token.type == "NAME" and str(token).capitalize() in _WORDS:
        word = _WORDS[str(token).capitalize()]
        return Complaint(f"unexpected {str(token)!r}", at, f"keywords are written {word} or {word.upper()}")
    shown = str(token) if len(token) <= 40 else f"{token[:40]}..."
    hint = "text goes in quotes" if token.type == "NAME" else ""
    if token.type in ("RPAR", "RSQB"):
        hint = "a bracket too many, or a value is missing before it"
    return Complaint(f"unexpected {shown!r}", at, hint)


_CHARACTER_HINTS: Final = {
    "=": "comparison is written `==`",
    **dict.fromkeys("\u201c\u201d\u2018\u2019", "use plain quotes"),
    ";": "a filter is one expression: join conditions with `and`",
    "}": "a template is written {name}",
    "`": "names are written without quotes, text in \" or '",
}


def _missing(text: str) -> str:
    for opening, closing in ("()", "[]"):
        if text.count(opening) > text.count(closing):
            return f"a {closing!r} is missing"
    return "a value is missing after the last operator"


@cache
def _lark() -> Lark:
    return Lark(
        GRAMMAR, parser="lalr", lexer="basic", transformer=_Builder(), postlex=_Bounds(), maybe_placeholders=False
    )


def make_ready() -> None:
    """Make the parser's tables: 0.15 s, for which a start need not wait, nor the first filter."""
    _lark()
