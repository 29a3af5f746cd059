"""What stands at a JSON path, as typed arrays: parsed once per column and path, then compared like any column.

`json_values(texts, keys)` parses every document of an immutable `StringArray` with orjson, walks the keys and sorts
the values by kind into arrays. The result is remembered for as long as the array lives, up to CACHE_BYTES_MAX over
all arrays, the least recently used going first; so the first filter on a path pays for parsing and the next do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from storage.columns import ArrayColumn, Offsets, ScalarColumn, StringColumn
from storage.filter.column_cache import ColumnCache
from storage.filter.indexed import Cast
from storage.strings import StringArray

CACHE_BYTES_MAX: Final = 128 << 20
"""One path of 60,000 rows takes about 0.6 MB as numbers, 2 MB as short text."""
_ROWS_AT_ONCE: Final = 64
"""Documents parsed before any is let go: so few that the garbage collector is not woken, which doubled the time."""

Keys = tuple[str | int, ...]


class Kind(IntEnum):
    """MISSING and NULL are below every kind that is a value."""

    MISSING = 0
    NULL = 1
    BOOL = 2
    INT = 3
    UINT = 4
    """Whole numbers above int64, up to uint64."""
    FLOAT = 5
    TEXT = 6
    LIST = 7
    OBJECT = 8


@dataclass(frozen=True, slots=True, eq=False)
class JsonValues:
    """One value per row; an array is None where no row has its kind, and 0 or "" in rows of other kinds."""

    kinds: npt.NDArray[np.uint8]
    ints: npt.NDArray[np.int64] | None
    """INT, and BOOL as 0 and 1."""
    uints: npt.NDArray[np.uint64] | None
    floats: npt.NDArray[np.float64] | None
    texts: StringArray | None
    """TEXT; for an element of a list that is itself a list, its canonical text."""
    bounds: Offsets | None
    """(n+1,): row i's list is items[bounds[i]:bounds[i + 1]]."""
    items: JsonValues | None

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def nbytes(self) -> int:
        arrays = (self.kinds, self.ints, self.uints, self.floats, self.texts, self.bounds, self.items)
        return sum(one.nbytes for one in arrays if one is not None)

    def take(self, offsets: Offsets) -> JsonValues:
        bounds, items = self.bounds, self.items
        if bounds is not None and items is not None:
            starts, lengths = bounds[offsets], (bounds[1:] - bounds[:-1])[offsets]
            bounds = np.zeros(len(offsets) + 1, np.int64)
            np.cumsum(lengths, out=bounds[1:])
            inside = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths)
            items = items.take(np.repeat(starts, lengths) + inside)
        return JsonValues(
            self.kinds[offsets],
            None if self.ints is None else self.ints[offsets],
            None if self.uints is None else self.uints[offsets],
            None if self.floats is None else self.floats[offsets],
            None if self.texts is None else self.texts.take(offsets),
            bounds,
            items,
        )


def json_values(
    texts: StringArray, keys: Keys, offsets: Offsets | None = None, beside: Sequence[Keys] = ()
) -> JsonValues:
    """Return what stands at the path in each document, or in those at `offsets`.

    beside  other paths that are about to be asked for: if the column is parsed, it is parsed once for all of them

    A few rows of a column that nothing is known of yet are parsed for themselves, until that has cost as much as the
    whole column would have; then the whole column is parsed, and kept.
    """
    known = _CACHE.get(texts, keys)
    if known is None:
        few = offsets is not None and len(offsets) * 8 < len(texts)
        if offsets is not None and few and _CACHE.defer(texts, keys, len(offsets)):
            return extract(texts.take(offsets), keys)
        paths = [keys, *(one for one in beside if one != keys and _CACHE.get(texts, one) is None)]
        found = extract_all(texts, paths)
        for path, values in zip(paths, found, strict=True):
            _CACHE.put(texts, path, values)
        known = found[0]
    return known if offsets is None else known.take(offsets)


_EXACT_MAX: Final = 1 << 53
"""Beyond it doubles leave whole numbers out."""
_ELEMENTS: Final = {
    Cast.ARRAY_BOOL: Cast.BOOL, Cast.ARRAY_DOUBLE: Cast.DOUBLE, Cast.ARRAY_VARCHAR: Cast.VARCHAR,
}  # fmt: skip


def cast_column(values: JsonValues, cast: Cast) -> ScalarColumn | StringColumn | ArrayColumn | None:
    """Return the values of one kind, all others as null; of lists the elements of that kind.

    None if there are whole numbers among them that doubles cannot hold.
    """
    kinds, rows = values.kinds, len(values)
    if cast.is_array:
        bounds, items = np.zeros(rows + 1, np.int64), values.take(np.zeros(0, np.int64))
        if values.bounds is not None and values.items is not None:
            bounds, items = values.bounds, values.items
        column = cast_column(items, _ELEMENTS[cast])
        assert not isinstance(column, ArrayColumn), "elements are scalars"
        return None if column is None else ArrayColumn(bounds, column)
    if cast is Cast.VARCHAR:
        texts = StringArray.from_strings([""] * rows) if values.texts is None else values.texts
        return StringColumn(texts, kinds == Kind.TEXT)
    if cast is Cast.BOOL:
        return ScalarColumn(np.zeros(rows, np.bool_) if values.ints is None else values.ints != 0, kinds == Kind.BOOL)
    doubles = np.zeros(rows, np.float64) if values.floats is None else values.floats
    whole = kinds == Kind.INT
    if values.ints is not None:
        if values.uints is not None or (whole & ((values.ints > _EXACT_MAX) | (values.ints < -_EXACT_MAX))).any():
            return None
        doubles = np.where(whole, values.ints, doubles)
    return ScalarColumn(doubles, whole | (kinds == Kind.FLOAT))


class _Missing:
    pass


_MISSING: Final = _Missing()
_KINDS: Final[dict[type, int]] = {
    _Missing: Kind.MISSING, type(None): Kind.NULL, bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT, str: Kind.TEXT,
    list: Kind.LIST, dict: Kind.OBJECT,
}  # fmt: skip


def extract(texts: StringArray, keys: Keys) -> JsonValues:
    """Return what stands at the path in each document; a text that is not JSON, or empty, is null."""
    return extract_all(texts, [keys])[0]


def extract_all(texts: StringArray, paths: Sequence[Keys]) -> list[JsonValues]:
    """Return what stands at each of the paths, after parsing every document once."""
    values: list[list[Any]] = [[] for _ in paths]
    rows = texts.to_list()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        documents = _documents(rows[start : start + _ROWS_AT_ONCE])
        for keys, found in zip(paths, values, strict=True):
            found += _walked(documents, keys)
    return [sorted_by_kind(found, nested=False) for found in values]


def _walked(found: list[Any], keys: Keys) -> list[Any]:
    for key in keys:
        if isinstance(key, str):
            found = [one.get(key, _MISSING) if type(one) is dict else _MISSING for one in found]
        else:
            found = [one[key] if type(one) is list and len(one) > key else _MISSING for one in found]
    return found


def _documents(texts: list[str]) -> list[Any]:
    try:
        return [orjson.loads(one or "null") for one in texts]
    except orjson.JSONDecodeError:
        return [_document(one) for one in texts]


def _document(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def sorted_by_kind(values: list[Any], *, nested: bool) -> JsonValues:
    """Return Python values as typed arrays; `nested` for the elements of lists."""
    count = len(values)
    kinds = np.fromiter(map(_KINDS.__getitem__, map(type, values)), np.uint8, count)
    seen = set(np.flatnonzero(np.bincount(kinds, minlength=9)).tolist())
    ints = uints = floats = texts = bounds = items = None
    if seen & {Kind.INT, Kind.BOOL}:
        ints, uints = _whole_numbers(values, kinds)
    if Kind.FLOAT in seen:
        floats = np.zeros(count, np.float64)
        rows = np.flatnonzero(kinds == Kind.FLOAT)
        floats[rows] = [values[i] for i in rows.tolist()]
    if Kind.TEXT in seen or (nested and Kind.LIST in seen):
        if seen == {Kind.TEXT}:
            texts = StringArray.from_strings(values)
        elif nested and Kind.LIST in seen:
            texts = StringArray.from_strings([_text_of(one) for one in values])
        else:
            texts = StringArray.from_strings([one if type(one) is str else "" for one in values])
    if Kind.LIST in seen and not nested:
        bounds = np.zeros(count + 1, np.int64)
        rows = np.flatnonzero(kinds == Kind.LIST)
        lists = [values[i] for i in rows.tolist()]
        bounds[rows + 1] = [len(one) for one in lists]
        np.cumsum(bounds, out=bounds)
        items = sorted_by_kind(list(itertools.chain.from_iterable(lists)), nested=True)
    return JsonValues(kinds, ints, uints, floats, texts, bounds, items)


def _whole_numbers(
    values: list[Any], kinds: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64] | None]:
    """Return (ints, uints) and mark the rows above int64 as UINT."""
    ints, uints = np.zeros(len(values), np.int64), None
    rows = np.flatnonzero((kinds == Kind.INT) | (kinds == Kind.BOOL))
    whole = [values[i] for i in rows.tolist()]
    try:
        ints[rows] = np.array(whole, np.int64)
    except OverflowError:
        uints = np.zeros(len(values), np.uint64)
        for i, one in zip(rows.tolist(), whole, strict=True):
            if one >= 1 << 63:
                kinds[i], uints[i] = Kind.UINT, one
            else:
                ints[i] = one
    return ints, uints


def _text_of(value: Any) -> str:
    if type(value) is list:
        return canonical(value)
    return value if type(value) is str else ""


def canonical(value: Any) -> str:
    """Return one text for equal JSON values: keys in order, 1.0 written as 1; "" for what nests beyond any constant."""
    try:
        return orjson.dumps(_plain(value), option=orjson.OPT_SORT_KEYS).decode()
    except (RecursionError, orjson.JSONEncodeError):
        return ""


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**64:
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


_CACHE: Final[ColumnCache[JsonValues]] = ColumnCache(CACHE_BYTES_MAX)
