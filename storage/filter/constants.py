"""A set of constants ready for vectorised membership: sorted arrays by kind, made once when the filter is compiled.

Numbers are held by exact value: 1 and 1.0 are one member, 2**53 + 1 is not in the doubles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.filter.syntax import LiteralValue
from storage.strings import StringArray

Mask = npt.NDArray[np.bool_]
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class ConstantSet:
    """`values` in the order given; `ints`, `uints` (above int64) and `floats` sorted, each every number it can hold."""

    values: tuple[LiteralValue, ...]
    ints: npt.NDArray[np.int64]
    uints: npt.NDArray[np.uint64]
    floats: npt.NDArray[np.float64]
    strings: StringArray | None
    bools: frozenset[bool]
    lists: tuple[tuple[LiteralValue, ...], ...]


def constant_set(values: Iterable[LiteralValue]) -> ConstantSet:
    members = tuple(values)
    kinds = set(map(type, members))
    ints: Any = []
    floats: Any = []
    uints: list[int] = []
    if kinds == {int}:
        ints = np.array(members, np.int64)  # the checker has refused what is beyond int64
        as_floats = ints.astype(np.float64)
        exact = (as_floats < 2.0**63) & (np.where(as_floats < 2.0**63, as_floats, 0).astype(np.int64) == ints)
        floats = as_floats[exact]
    else:
        for one in members:
            if isinstance(one, int) and not isinstance(one, bool):
                ints.append(one)
                if float(one) == one:
                    floats.append(float(one))
            elif isinstance(one, float):
                floats.append(one)
                if one.is_integer():
                    whole = int(one)
                    if INT64_MIN <= whole <= INT64_MAX:
                        ints.append(whole)
                    elif INT64_MAX < whole <= UINT64_MAX:
                        uints.append(whole)
    texts = [one for one in members if isinstance(one, str)] if str in kinds else []
    return ConstantSet(
        members,
        np.unique(np.asarray(ints, np.int64)),
        np.unique(np.array(uints, np.uint64)),
        np.unique(np.asarray(floats, np.float64)),
        StringArray.from_strings(texts) if texts else None,
        frozenset(one for one in members if isinstance(one, bool)) if bool in kinds else frozenset(),
        tuple(one for one in members if isinstance(one, tuple)) if tuple in kinds else (),
    )


def members_of(values: npt.NDArray[Any], members: npt.NDArray[Any]) -> Mask:
    """Return where the values are among the sorted members."""
    if values.dtype.kind == "f" and values.dtype != members.dtype:
        inside = np.abs(members) <= np.finfo(values.dtype).max  # what is outside equals no value of the column
        members = members[inside].astype(values.dtype)  # Float constants are rounded already: nothing is lost
    if not len(members) or not len(values):
        return np.zeros(len(values), np.bool_)
    if len(members) <= 4:
        found: Mask = values == members[0]
        for one in members[1:]:
            found |= values == one
        return found
    return np.isin(values, members)
