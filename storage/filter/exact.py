"""Comparing numbers by value, never by a rounded copy: int64 with doubles, columns with constants and with columns.

A double beside an integer is compared as the real numbers they are: 9007199254740993 == 9007199254740992.0 is false.
A Float column is the exception that Milvus makes: constants meet it as float32, so a stored 0.1 equals 0.1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.filter.tree import CompareOp

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[Any]
COMPARE: Final[Mapping[CompareOp, Callable[[Any, Any], Any]]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def compare_constant(op: CompareOp, values: Numbers, constant: float) -> Mask:
    """Return where `values op constant`; values are Bool, integers, float32 or float64."""
    if values.dtype.kind == "f":
        if values.dtype == np.float32:
            with np.errstate(over="ignore"):
                rounded = np.float32(constant)
            found: Mask = COMPARE[op](values, rounded if np.isfinite(rounded) else np.float64(constant))
            return found
        if isinstance(constant, int):
            return _doubles_with_int(op, values, constant)
    elif isinstance(constant, float):
        return _ints_with_double(op, values, constant)
    result: Mask = COMPARE[op](values, constant)
    return result


def _ints_with_double(op: CompareOp, values: Numbers, constant: float) -> Mask:
    if op in ("==", "!="):
        if not constant.is_integer():
            return np.full(len(values), op == "!=")
        bound = int(constant)
    else:
        bound = math.floor(constant) if op in ("<=", ">") else math.ceil(constant)
    result: Mask = COMPARE[op](values, bound)
    return result


def _doubles_with_int(op: CompareOp, values: Numbers, constant: int) -> Mask:
    near = float(constant)
    if int(near) != constant:
        # no double lies between the constant and the double nearest to it, on whichever side that is
        if op in ("==", "!="):
            return np.full(len(values), op == "!=")
        above = int(near) > constant
        op = ("<" if above else "<=") if op in ("<", "<=") else (">=" if above else ">")
    result: Mask = COMPARE[op](values, near)
    return result


def compare_columns(op: CompareOp, left: Numbers, right: Numbers) -> Mask:
    """Return where `left op right`, row by row."""
    if (left.dtype.kind == "f") == (right.dtype.kind == "f"):
        result: Mask = COMPARE[op](left, right)
        return result
    sign = _signs(left, right) if left.dtype.kind != "f" else -_signs(right, left)
    result = COMPARE[op](sign, 0)
    if op != "!=":
        return result & ~np.isnan(left if left.dtype.kind == "f" else right)
    return result


def _signs(ints: Numbers, floats: Numbers) -> npt.NDArray[np.int8]:
    """Return -1, 0 or 1 as the integer is below, at or above the double."""
    doubles, near = floats.astype(np.float64), ints.astype(np.float64)
    signs = (near > doubles).astype(np.int8) - (near < doubles).astype(np.int8)
    tied = near == doubles  # only here may the rounding of the integer hide a difference
    if tied.any():
        whole = np.where(tied & (doubles < 2.0**63), doubles, 0).astype(np.int64)
        tied_signs = (ints > whole).astype(np.int8) - (ints < whole).astype(np.int8)
        tied_signs[tied & (doubles >= 2.0**63)] = -1
        signs = np.where(tied, tied_signs, signs)
    return signs
