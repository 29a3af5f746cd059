"""Arithmetic on constants: exact on integers, an error where a 64-bit machine would overflow.

`/` and `%` of integers round towards zero, as in C and as columns do, so `-7 / 2` is -3 and `-7 % 2` is -1.
"""

from __future__ import annotations

import math
from typing import Final

from storage.filter.constants import INT64_MAX, INT64_MIN

BIT_OPS: Final = frozenset({"&", "|", "^", "<<", ">>", "~"})
Number = int | float


class FoldError(ValueError):
    """The constants have no such result."""


def fold_unary(op: str, value: Number) -> Number:
    """Return `op value`. Raises FoldError."""
    if op == "~":
        if isinstance(value, float):
            raise FoldError("~ works on the bits of integers")
        return ~value
    return -value if op == "-" else value


def fold(op: str, left: Number, right: Number) -> Number:
    """Return `left op right`. Raises FoldError."""
    if isinstance(left, int) and isinstance(right, int):
        result = _fold_ints(op, left, right)
    else:
        result = _fold_floats(op, float(left), float(right))
    if isinstance(result, int) and not INT64_MIN <= result <= INT64_MAX:
        raise FoldError("the result does not fit 64 bits")
    if isinstance(result, float) and not math.isfinite(result):
        raise FoldError("the result is too large for a double")
    return result


def _fold_ints(op: str, left: int, right: int) -> Number:
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/" | "%":
            if right == 0:
                raise FoldError("division or modulus by zero")
            quotient = abs(left) // abs(right) * (-1 if (left < 0) != (right < 0) else 1)
            return quotient if op == "/" else left - quotient * right
        case "**":
            if right < 0:
                return _fold_floats(op, float(left), float(right))
            if abs(left) > 1 and right > 64:
                raise FoldError("the result does not fit 64 bits")
            power: int = left ** min(right, 64 + right % 2)  # beyond 64 only the sign of -1 depends on the exponent
            return power
        case "<<" | ">>":
            if not 0 <= right < 64:
                raise FoldError("a shift goes by 0 to 63 bits")
            return left << right if op == "<<" else left >> right
        case "&":
            return left & right
        case "|":
            return left | right
        case _:
            assert op == "^"
            return left ^ right


def _fold_floats(op: str, left: float, right: float) -> float:
    if op in BIT_OPS:
        raise FoldError(f"{op} works on the bits of integers")
    if op == "%":
        raise FoldError("modulo can only apply on integer types")
    if op == "/" and right == 0:
        raise FoldError("division or modulus by zero")
    try:
        match op:
            case "+":
                return left + right
            case "-":
                return left - right
            case "*":
                return left * right
            case "/":
                return left / right
            case _:
                assert op == "**"
                return math.pow(left, right)
    except OverflowError:
        raise FoldError("the result is too large for a double") from None
    except ValueError:
        raise FoldError("the power has no real value") from None
