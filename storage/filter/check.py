"""Names and types against the schema: a tree of `syntax` becomes a tree of `tree`, or a complaint with its place.

Every constant is folded and cast here once, so that evaluating meets no type it did not expect.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard, Union, cast

import numpy as np

from storage.filter.constants import INT64_MAX, INT64_MIN, constant_set
from storage.filter.folding import BIT_OPS, FoldError, fold, fold_unary
from storage.filter.literals import is_unicode
from storage.filter.patterns import like_pattern, regex_pattern
from storage.filter.syntax import (
    DEPTH_MAX,
    Binary,
    Call,
    Compared,
    Complaint,
    ListOf,
    Literal,
    LiteralValue,
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
from storage.filter.tree import (
    MIRRORED,
    AllOf,
    Always,
    AnyOf,
    Arithmetic,
    ArrayValue,
    CompareOp,
    Comparison,
    Contains,
    ContainsMode,
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
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.strings import PatternInvalid
from storage.times import (
    OUT_OF_RANGE,
    TIMEZONE,
    Interval,
    Moment,
    is_in_range,
    parse_interval,
    parse_time,
    shifted,
    zone_of,
)

_CONTAINS: Final[Mapping[str, ContainsMode]] = {
    f"{kind}_contains{suffix}": mode
    for kind in ("json", "array")
    for suffix, mode in cast(Sequence[tuple[str, ContainsMode]], (("", "one"), ("_all", "all"), ("_any", "any")))
}
_MATCHES: Final = ("text_match", "phrase_match")
FUNCTIONS: Final = (*_CONTAINS, "array_length", *_MATCHES)
TERMS_WANTED_MAX: Final = 1000
"""Milvus's bound of minimum_should_match; here also of the terms that a text or phrase has."""
UNSUPPORTED: Final = frozenset(
    "text_match_fuzzy random_sample element_filter membership_match match_all match_any "
    "match_least match_most match_exact st_equals st_touches st_overlaps st_crosses st_contains st_intersects "
    "st_within st_dwithin st_isvalid".split()
)
_PREDICATES: Final = (
    Always, AllOf, AnyOf, Negation, Comparison, FieldComparison, IsIn, Like, Regex, IsNull, Contains,
    TextMatch, PhraseMatch,
)  # fmt: skip
_VALUES: Final = (FieldValue, ElementValue, PathValue, LengthValue, Arithmetic, Shifted)
Resolved = Union[Literal, Value, ArrayValue, Predicate]  # noqa: UP007 (a runtime alias)


def check(node: Node, schema: CollectionSchema, params: Mapping[str, object]) -> Predicate:
    """Return the checked tree of a whole filter. Raises Complaint."""
    return _Checker(schema, params).predicate(node)


class _Checker:
    def __init__(self, schema: CollectionSchema, params: Mapping[str, object]) -> None:
        self.schema, self.params = schema, params

    def predicate(self, node: Node) -> Predicate:
        """Return the node as a condition; a Bool alone asks whether it is true."""
        found = self.resolve(node)
        if isinstance(found, _PREDICATES):
            return found
        if isinstance(found, Literal) and isinstance(found.value, bool):
            return Always(found.value)
        if isinstance(found, _VALUES) and found.type is DataType.BOOL:
            return Comparison("==", found, True)
        hint = "compare it with a value, as in `== true`" if not isinstance(found, Literal) else ""
        raise Complaint(f"predicate is not a boolean expression, its type is {_type_name(found)}", node.at, hint)

    def resolve(self, node: Node) -> Resolved:
        match node:
            case Literal():
                self.check_range(node.value, node.at)
                return node
            case ListOf():
                return Literal(tuple(self.constant(one, "a list holds constants").value for one in node.items), node.at)
            case Timed():
                return self.timed(node)
            case Template():
                return Literal(self.template(node), node.at)
            case Path():
                return self.path(node)
            case Unary():
                return self.unary(node)
            case Binary():
                return self.binary(node)
            case Not():
                return _negated(self.predicate(node.operand))
            case Logic():
                return self.logic(node)
            case Compared():
                return self.compared(node)
            case Member():
                return self.member(node)
            case Matched():
                return self.matched(node)
            case NullTest():
                return self.null_test(node)
            case Call():
                return self.call(node)

    def timed(self, node: Timed) -> Literal:
        times = [one for one in self.schema.fields if one.type is DataType.TIMESTAMPTZ]
        zone = times[0].params.get(TIMEZONE, "") if times else ""
        try:
            if node.is_interval:
                return Literal(cast(Any, parse_interval(node.text)), node.at)
            return Literal(parse_time(node.text, zone_of(zone)), node.at)
        except ValueError as error:
            what = "interval" if node.is_interval else "time"
            hint = "as INTERVAL 'P1DT12H'" if node.is_interval else "as ISO '2025-01-31T23:59:59+08:00'"
            raise Complaint(f"{node.text[:40]!r} is no ISO 8601 {what}: {error}", node.at, hint) from None

    def shifted(self, node: Binary, left: Resolved, interval: Interval) -> Literal | Value:
        """Return a point in time with an interval added or taken away."""
        if node.op not in ("+", "-"):
            raise Complaint(f"{node.op} can not be used on Interval", node.op_at, "add it to a time or take it away")
        interval = interval.negated() if node.op == "-" else interval
        if isinstance(left, Literal) and isinstance(left.value, Moment):
            moment = int(shifted(np.array([left.value], np.int64), interval)[0])
            if not is_in_range(moment):
                raise Complaint(f"the time is {OUT_OF_RANGE}", node.at)
            return Literal(Moment(moment), node.at)
        if isinstance(left, FieldValue) and left.type is DataType.TIMESTAMPTZ:
            return Shifted(left, interval)
        raise Complaint("an INTERVAL is added to a field of type Timestamptz, one to each", node.left.at)

    def constant(self, node: Node, rule: str) -> Literal:
        found = self.resolve(node)
        if isinstance(found, Literal):
            return found
        hint = f'text goes in quotes: "{node.name}"' if isinstance(node, Path) and not node.keys else ""
        raise Complaint(rule, node.at, hint)

    def check_range(self, value: LiteralValue, at: Span) -> None:
        if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
            raise Complaint("the integer does not fit 64 bits", at)
        if isinstance(value, tuple) and value and set(map(type, value)) & {int}:
            whole = [one for one in value if isinstance(one, int)]
            if min(whole) < INT64_MIN or max(whole) > INT64_MAX:
                raise Complaint("an integer of the list does not fit 64 bits", at)

    def template(self, node: Template) -> LiteralValue:
        if node.name not in self.params:
            raise Complaint(
                f"the value of expression template variable name {{{node.name}}} is not found", node.at,
                _did_you_mean(node.name, self.params) or "give it in exprParams",
            )  # fmt: skip
        return self.template_value(self.params[node.name], node, 1)

    def template_value(self, value: object, node: Template, depth: int) -> LiteralValue:
        where = f"the value of expression template variable name {{{node.name}}}"
        if isinstance(value, bool):
            return value
        if isinstance(value, str):
            self.check_unicode(value, where, node.at)
            return value
        if isinstance(value, int):
            self.check_range(value, node.at)
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise Complaint(f"{where} is not a finite number", node.at)
            return value
        if isinstance(value, list | tuple):
            if not value:
                raise Complaint(f"{where} is an empty list", node.at)
            if depth > DEPTH_MAX:
                raise Complaint(f"{where} nests deeper than {DEPTH_MAX}", node.at)
            kinds = set(map(type, value))
            if kinds <= {int, str, bool}:
                if str in kinds:
                    self.check_unicode("".join([one for one in value if isinstance(one, str)]), where, node.at)
                self.check_range(tuple(value), node.at)
                return tuple(value)
            return tuple([self.template_value(one, node, depth + 1) for one in value])
        kind = "null" if value is None else type(value).__name__
        raise Complaint(f"{where} is {kind}: only numbers, text, booleans and lists of them can be given", node.at)

    def check_unicode(self, text: str, where: str, at: Span) -> None:
        if not is_unicode(text):
            raise Complaint(f"{where} has half of a surrogate pair", at)

    def path(self, node: Path) -> Value | ArrayValue:
        if node.bare or node.name == "$":
            raise Complaint("the struct form of a field is not supported by this server", node.at, _KEY_HINT)
        field = self.schema.by_name.get(node.name)
        keys = node.keys
        if field is None:
            field, keys = self.schema.dynamic, (node.name, *node.keys)
            if field is None or node.name == "$meta":
                hint = _did_you_mean(node.name, [one.name for one in self.schema.user_fields])
                raise Complaint(f"field {node.name} not exist", node.at, hint or "text goes in quotes")
        if field.type is DataType.JSON:
            return PathValue(field, keys)
        if field.type is DataType.ARRAY:
            if not keys:
                return ArrayValue(field, None)
            if len(keys) == 1 and isinstance(keys[0], int):
                return ElementValue(field, keys[0])
            raise Complaint(f"field {field.name} is an Array: one whole number goes in its brackets", node.at)
        if field.type.is_vector:
            raise Complaint(f"filter on vector field {field.name} is not supported", node.at, "search by it instead")
        if keys:
            raise Complaint(f"field {field.name} is {field.type}: only JSON and Array fields take brackets", node.at)
        return FieldValue(field)

    def unary(self, node: Unary) -> Literal | Value:
        found = self.resolve(node.operand)
        if isinstance(found, Literal) and _is_number(found.value):
            try:
                folded = fold_unary(node.op, found.value)
            except FoldError as error:
                raise Complaint(str(error), node.at) from None
            self.check_range(folded, node.at)
            return Literal(folded, node.at)
        value = self.numeric(found, node.op, node.operand.at)
        if node.op == "+":
            return value
        if node.op == "-":
            return self.arithmetic("*", value, -1, flipped=False, at=node.at)
        return self.arithmetic("^", value, -1, flipped=False, at=node.at)

    def binary(self, node: Binary) -> Literal | Value:
        left, right = self.resolve(node.left), self.resolve(node.right)
        if isinstance(left, _PREDICATES) or isinstance(right, _PREDICATES):
            word = {"&": "`and` or `&&`", "|": "`or` or `||`"}.get(node.op)
            hint = f"join conditions with {word}; for bits use brackets: (a {node.op} 1) == 1" if word else ""
            raise Complaint(f"{node.op} can not be used on conditions", node.op_at, hint)
        if _interval(left) is not None and node.op == "+":
            left, right = right, left
        if (interval := _interval(right)) is not None:
            return self.shifted(node, left, interval)
        if isinstance(left, Literal) and isinstance(right, Literal):
            for one in (left, right):
                if not _is_number(one.value):
                    raise Complaint(f"{node.op} can not be used on {_type_name(one)}", one.at)
            try:
                return Literal(fold(node.op, cast(Any, left.value), cast(Any, right.value)), node.at)
            except FoldError as error:
                raise Complaint(str(error), node.at) from None
        if isinstance(left, Literal):
            value, constant = self.numeric(right, node.op, node.right.at), left
        elif isinstance(right, Literal):
            value, constant = self.numeric(left, node.op, node.left.at), right
        else:
            raise Complaint("arithmetic between two fields is not supported: one side must be a constant", node.op_at)
        if not _is_number(constant.value):
            raise Complaint(f"{node.op} can not be used on {_type_name(constant)}", constant.at)
        return self.arithmetic(node.op, value, constant.value, flipped=constant is left, at=node.at)

    def numeric(self, found: Resolved, op: str, at: Span) -> Value:
        if isinstance(found, _VALUES) and (found.type.is_numeric or found.type is DataType.JSON):
            return found
        if isinstance(found, ArrayValue):
            raise Complaint(f"{op} can not be used on Array", at, "on one element it can: field[0]")
        raise Complaint(f"{op} can not be used on {_type_name(found)}", at)

    def arithmetic(self, op: str, value: Value, constant: Any, *, flipped: bool, at: Span) -> Value:
        if flipped and op in ("**", "<<", ">>"):
            raise Complaint(f"{op} takes the field on its left and a constant on its right", at)
        if (op == "%" or op in BIT_OPS) and (isinstance(constant, float) or value.type.is_float):
            rule = "modulo can only apply on integer types" if op == "%" else f"{op} works on the bits of integers"
            raise Complaint(rule, at)
        if op in ("/", "%") and constant == 0 and not flipped:
            raise Complaint("division or modulus by zero", at)
        if op in ("<<", ">>") and not 0 <= constant < 64:
            raise Complaint("a shift goes by 0 to 63 bits", at)
        kind: DataType
        if value.type in (DataType.JSON, DataType.DOUBLE):
            kind = value.type
        elif value.type is DataType.FLOAT:
            kind, constant = DataType.FLOAT, _float32(constant)
        elif isinstance(constant, float) or (op == "**" and constant < 0):
            kind = DataType.DOUBLE
        else:
            kind = DataType.INT64
        if kind is DataType.DOUBLE:
            constant = float(constant)
        return Arithmetic(op, value, constant, flipped, kind)

    def logic(self, node: Logic) -> Predicate:
        kind: type[AllOf | AnyOf] = AllOf if node.op == "and" else AnyOf
        decisive = node.op == "or"
        items: list[Predicate] = []
        for one in node.items:
            found = self.predicate(one)
            items.extend(found.items if isinstance(found, kind) else [found])
        if Always(decisive) in items:
            return Always(decisive)
        kept = [one for one in items if one != Always(not decisive)]
        if not kept:
            return Always(not decisive)
        return kept[0] if len(kept) == 1 else kind(tuple(kept))

    def compared(self, node: Compared) -> Predicate:
        operands = [(self.resolve(one), one) for one in node.operands]
        ops = cast(tuple[CompareOp, ...], node.ops)
        if len(ops) == 1:
            return self.compare(ops[0], operands[0], operands[1], node.op_at)
        low, middle, high = operands
        if ops[0][0] != ops[1][0]:
            raise Complaint("both signs of a range point the same way", node.op_at, "as in 1 < a <= 5")
        if isinstance(middle[0], Literal) or not (isinstance(low[0], Literal) and isinstance(high[0], Literal)):
            raise Complaint("a range is a field between two constants", node.op_at, "join comparisons with `and`")
        both = (self.compare(ops[0], low, middle, node.op_at), self.compare(ops[1], middle, high, node.op_at))
        return AllOf(both)

    def compare(
        self, op: CompareOp, left: tuple[Resolved, Node], right: tuple[Resolved, Node], op_at: Span
    ) -> Predicate:
        for found, node in (left, right):
            if isinstance(found, _PREDICATES):
                raise Complaint("a condition can not be compared", node.at, "join conditions with `and` or `or`")
        if isinstance(left[0], Literal) and isinstance(right[0], Literal):
            return Always(self.compare_constants(op, left[0].value, right[0].value, op_at))
        if isinstance(left[0], Literal):
            op, left, right = MIRRORED[op], right, left
        value, other = left[0], right[0]
        array = next((one for one in (value, other) if isinstance(one, ArrayValue)), None)
        if array is not None:
            raise Complaint(
                "can not comparisons array fields directly", op_at,
                f"compare an element, {array.field.name}[0], or use array_contains",
            )  # fmt: skip
        assert isinstance(value, _VALUES)
        if isinstance(other, Literal):
            constant = self.comparable(op, value, other, op_at)
            if isinstance(value, Shifted) and not value.interval.months and isinstance(constant, Moment):
                moment = Moment(constant - value.interval.microseconds)
                if is_in_range(moment):
                    return Comparison(op, value.operand, moment)
            return Comparison(op, value, constant)
        assert isinstance(other, _VALUES)
        if DataType.JSON in (value.type, other.type):
            raise Complaint("two column comparison with JSON type is not supported", op_at, self.quote_hint(right[1]))
        if _family(value.type) != _family(other.type):
            raise _incomparable(_type_name(value), _type_name(other), op_at)
        self.check_order(op, value.type, op_at)
        return FieldComparison(op, value, other)

    def quote_hint(self, node: Node) -> str:
        if isinstance(node, Path) and node.name not in self.schema.by_name:
            return f'{node.name} is no field; text goes in quotes: "{node.name}"'
        return "compare with a constant"

    def compare_constants(self, op: CompareOp, left: LiteralValue, right: LiteralValue, at: Span) -> bool:
        kinds = [_constant_family(one) for one in (left, right)]
        if kinds[0] != kinds[1] or "list" in kinds:
            raise _incomparable(_type_name(Literal(left, at)), _type_name(Literal(right, at)), at)
        if kinds[0] == "bool" and op not in ("==", "!="):
            raise _unordered("Bool", op, at)
        a, b = cast(Any, left), cast(Any, right)
        if isinstance(a, str):
            a, b = a.encode(), b.encode()
        result: bool = {
            "==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b,
        }[op]  # fmt: skip
        return result

    def comparable(self, op: CompareOp, value: Value, other: Literal, at: Span) -> LiteralValue:
        """Return the constant as it is compared with the value."""
        constant = other.value
        if value.type is DataType.JSON:
            _refuse_times((constant,), at)
            if isinstance(constant, bool | tuple) and op not in ("==", "!="):
                raise _unordered("Bool" if isinstance(constant, bool) else "a list", op, at)
            return constant
        if _family(value.type) != _constant_family(constant):
            raise _incomparable(_type_name(value), _type_name(other), at)
        self.check_order(op, value.type, at)
        if value.type is DataType.FLOAT:
            return _float32(constant)
        return constant

    def check_order(self, op: CompareOp, kind: DataType, at: Span) -> None:
        if kind is DataType.BOOL and op not in ("==", "!="):
            raise _unordered("Bool", op, at)

    def member(self, node: Member) -> Predicate:
        value = self.resolve(node.operand)
        options = self.constant(node.options, "right of `in` stands a list of constants")
        if not isinstance(options.value, tuple):
            raise Complaint("right of `in` stands a list", options.at, "write [...] around the values")
        if isinstance(value, ArrayValue):
            raise Complaint("can not comparisons array fields directly", node.operand.at, "use array_contains_any")
        if isinstance(value, Literal):
            raise Complaint("left of `in` stands a field", node.operand.at)
        if not isinstance(value, _VALUES):
            raise Complaint("left of `in` stands a field, not a condition", node.operand.at)
        found = IsIn(value, constant_set(self.members(value, options)))
        return Negation(found) if node.negated else found

    def members(self, value: Value, options: Literal) -> tuple[LiteralValue, ...]:
        constants = cast(tuple[LiteralValue, ...], options.value)
        kinds = set(map(type, constants))
        families = {_constant_family_of(kind) for kind in kinds}
        if "list" in families:
            raise Complaint("a list in the list of `in` is not supported", options.at)
        if len(families) > 1:
            raise Complaint("the list of `in` mixes types", options.at, "all of its values have one type")
        if value.type is DataType.JSON or not constants:
            _refuse_times(constants, options.at)
            return constants
        wanted = _family(value.type)
        odd: object = None
        if families != {wanted}:
            odd = constants[0]
        elif value.type.is_integer and float in kinds:
            odd = next(one for one in constants if isinstance(one, float))
        if odd is not None:
            raise Complaint(f"value '{_shown(odd)}' in list cannot be casted to {_type_name(value)}", options.at)
        if value.type.is_float:
            cast_to = _float32 if value.type is DataType.FLOAT else float
            return tuple([cast_to(cast(Any, one)) for one in constants])
        return constants

    def matched(self, node: Matched) -> Predicate:
        value = self.resolve(node.operand)
        textual = isinstance(value, FieldValue | ElementValue | PathValue) and value.type in (
            DataType.VARCHAR, DataType.JSON,
        )  # fmt: skip
        if not textual:
            raise Complaint(
                "like operation on non-string or no-json field is unsupported"
                if node.op == "like" else "regex match on non-string or non-json field", node.operand.at,
            )  # fmt: skip
        assert isinstance(value, _VALUES)
        rule = f"the right operand of {node.op} must be a string literal or template variable"
        pattern = self.constant(node.pattern, rule)
        if not isinstance(pattern.value, str):
            raise Complaint(rule, pattern.at)
        try:
            if node.op == "like":
                return Like(value, like_pattern(pattern.value))
            regex_pattern(pattern.value)
        except PatternInvalid as error:
            what = "like" if node.op == "like" else "regex"
            raise Complaint(f"invalid {what} pattern: {error}", pattern.at) from None
        found = Regex(value, pattern.value)
        return Negation(found) if node.op == "!~" else found

    def null_test(self, node: NullTest) -> Predicate:
        value = self.resolve(node.operand)
        if node.exists and not (isinstance(value, PathValue) and value.keys):
            raise Complaint(
                "exists operation are only supported on json keys and dynamic fields", node.operand.at,
                "for a field use `is not null`",
            )  # fmt: skip
        if not isinstance(value, FieldValue | PathValue | ArrayValue):
            raise Complaint("`is null` asks about a field or a JSON path", node.operand.at)
        found = IsNull(value)
        return Negation(found) if node.negated else found

    def call(self, node: Call) -> Value | Predicate:
        name = node.name.lower()
        if node.name not in (name, name.upper()):
            name = node.name
        if name in UNSUPPORTED:
            raise Complaint(f"function {name} is not supported by this server", node.at)
        if name not in FUNCTIONS:
            raise Complaint(f"function {node.name} is not found", node.at, _did_you_mean(name, FUNCTIONS))
        if name in _MATCHES:
            return self.text_or_phrase(name, node)
        wanted = 1 if name == "array_length" else 2
        if len(node.arguments) != wanted or node.named:
            raise Complaint(f"{name} takes {wanted} argument{'s' if wanted > 1 else ''}", node.at)
        array = self.array(node.arguments[0], name)
        if name == "array_length":
            return LengthValue(array)
        mode = _CONTAINS[name]
        constant = self.constant(node.arguments[1], f"the second argument of {name} is a constant")
        if mode == "one":
            wanted_values: tuple[LiteralValue, ...] = (constant.value,)
        elif isinstance(constant.value, tuple):
            wanted_values = constant.value
        else:
            raise Complaint(f"contains_{mode} operation element must be an array", constant.at, "write [...] around it")
        if array.keys is None:
            element = cast(DataType, array.field.element)
            wanted_values = tuple([self.element(one, element, array.field, constant.at) for one in wanted_values])
        _refuse_times(wanted_values, constant.at)
        return Contains(array, mode, wanted_values, constant_set(wanted_values))

    def text_or_phrase(self, name: str, node: Call) -> Predicate:
        if name == "text_match":
            options = [value for key, value in node.named if key == "minimum_should_match"]
            if len(node.arguments) != 2 or len(options) != len(node.named) or len(options) > 1:
                raise Complaint("text_match takes a field, a text, and minimum_should_match=... if need be", node.at)
        else:
            options = list(node.arguments[2:])
            if not 2 <= len(node.arguments) <= 3 or node.named:
                raise Complaint("phrase_match takes a field, a text, and a slop if need be", node.at)
        value = self.resolve(node.arguments[0])
        if not isinstance(value, FieldValue) or value.type is not DataType.VARCHAR:
            raise Complaint(f"{name} operation on non-string is unsupported", node.arguments[0].at)
        if not value.field.has_match:
            raise Complaint(
                f"field {value.field.name} does not enable match", node.arguments[0].at,
                "set enable_analyzer and enable_match where the field is made",
            )  # fmt: skip
        text = self.constant(node.arguments[1], f"the second argument of {name} is a text")
        if not isinstance(text.value, str):
            raise Complaint(f"the second argument of {name} is a text", text.at)
        analyzer = value.field.analyzer
        placed = analyzer.placed(text.value)
        if len(placed) > TERMS_WANTED_MAX:
            raise Complaint(f"the text of {name} has {len(placed)} terms, at most {TERMS_WANTED_MAX}", text.at)
        if name == "text_match":
            least = self.whole(options, 1, 1, TERMS_WANTED_MAX, "minimum_should_match")
            return TextMatch(value, text.value, tuple(sorted({term for _, term in placed})), least)
        slop = self.whole(options, 0, 0, (1 << 31) - 1, "slop")
        first = placed[0][0] if placed else 0
        return PhraseMatch(value, text.value, tuple([(place - first, term) for place, term in placed]), slop)

    def whole(self, given: Sequence[Node], default: int, least: int, most: int, what: str) -> int:
        """Return the number of an option that may be left out."""
        if not given:
            return default
        rule = f"{what} is a whole number in range [{least}, {most}]"
        found = self.constant(given[0], rule)
        if not isinstance(found.value, int) or isinstance(found.value, bool) or not least <= found.value <= most:
            raise Complaint(rule, found.at)
        return found.value

    def array(self, node: Node, name: str) -> ArrayValue:
        found = self.resolve(node)
        if isinstance(found, ArrayValue):
            return found
        if isinstance(found, PathValue):
            return ArrayValue(found.field, found.keys)
        raise Complaint(f"{name} operation are only supported on json or array fields", node.at)

    def element(self, value: LiteralValue, kind: DataType, field: FieldSchema, at: Span) -> LiteralValue:
        """Return the constant as it is compared with the elements of an array."""
        fits = _constant_family(value) == _family(kind) and not (kind.is_integer and isinstance(value, float))
        if not fits:
            raise Complaint(f"value '{_shown(value)}' cannot be casted to {kind}, an element of {field.name}", at)
        if kind is DataType.FLOAT:
            return _float32(value)
        return float(cast(Any, value)) if kind is DataType.DOUBLE else value


_KEY_HINT: Final = 'a key of a JSON field goes in quotes: field["key"]'


def _negated(found: Predicate) -> Predicate:
    if isinstance(found, Always):
        return Always(None if found.truth is None else not found.truth)
    return found.item if isinstance(found, Negation) else Negation(found)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool | Moment)


def _interval(found: Resolved) -> Interval | None:
    value: object = found.value if isinstance(found, Literal) else None
    return value if isinstance(value, Interval) else None


def _refuse_times(constants: Sequence[object], at: Span) -> None:
    if any(isinstance(one, Moment | Interval) for one in constants):
        raise Complaint("comparisons between JSON and Timestamptz are not supported", at, "compare with a text")


def _float32(value: Any) -> float:
    """Return the constant as a Float column holds it; beyond float32's range it stays as it is."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return rounded if math.isfinite(rounded) else float(value)


def _family(kind: DataType) -> str:
    if kind.is_numeric:
        return "number"
    return {DataType.BOOL: "bool", DataType.VARCHAR: "text", DataType.TIMESTAMPTZ: "time"}.get(kind, "other")


def _constant_family(value: object) -> str:
    return _constant_family_of(type(value))


def _constant_family_of(kind: type) -> str:
    return {bool: "bool", int: "number", float: "number", str: "text", Moment: "time"}.get(kind, "list")


def _type_name(found: Resolved) -> str:
    if isinstance(found, Literal):
        names: dict[type, str] = {bool: "Bool", int: "Int64", float: "Double", str: "VarChar"}
        names |= {Moment: "Timestamptz", Interval: "Interval"}
        return names.get(type(found.value), "Array")
    if isinstance(found, _VALUES):
        return str(found.type)
    return "Array" if isinstance(found, ArrayValue) else "Bool"


def _incomparable(left: str, right: str, at: Span) -> Complaint:
    hint = "text goes in quotes, numbers do not" if {left, right} & {"VarChar"} else ""
    hint = "a time is written ISO '2025-01-31T23:59:59Z'" if "Timestamptz" in (left, right) else hint
    return Complaint(f"comparisons between {left} and {right} are not supported", at, hint)


def _unordered(what: str, op: str, at: Span) -> Complaint:
    return Complaint(f"{what} has no order: {op} is not supported", at, "use == or !=")


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _did_you_mean(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name[:255], [str(one) for one in known], n=1)
    return f"did you mean {close[0]}?" if close else ""
