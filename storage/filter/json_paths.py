"""What stands at a JSON path, as typed arrays: parsed once per column and path, then compared like any column.

`json_values(texts, keys)` parses every document of an immutable `StringArray` with orjson, walks the keys and sorts
the values by kind into arrays. The result is remembered for as long as the array lives, up to CACHE_BYTES_MAX over
all arrays, the least recently used going first; so the first filter on a path pays for parsing and the next do not.

Evaluation runs on worker threads, and this cache is the one thing they share. It needs no lock: the table is never
changed in place but replaced as a whole, so a reader sees one table or the next. Two threads that add at the same
moment may lose one addition, which costs parsing that path again and nothing else.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from storage.columns import Offsets
from storage.strings import StringArray

CACHE_BYTES_MAX: Final = 128 << 20
"""One path of 60,000 rows takes about 0.6 MB as numbers, 2 MB as short text."""
_ROWS_AT_ONCE: Final = 2048
"""Documents parsed in one call, which holds the interpreter lock: about a millisecond."""

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


def json_values(texts: StringArray, keys: Keys, offsets: Offsets | None = None) -> JsonValues:
    """Return what stands at the path in each document, or in those at `offsets`.

    A few rows of a column that nothing is known of yet are parsed for themselves; else the whole column is, and kept.
    """
    known = _CACHE.get(texts, keys)
    if known is None:
        if offsets is not None and len(offsets) * 8 < len(texts):
            return extract(texts.take(offsets), keys)
        known = extract(texts, keys)
        _CACHE.put(texts, keys, known)
    return known if offsets is None else known.take(offsets)


class _Missing:
    pass


_MISSING: Final = _Missing()
_KINDS: Final[dict[type, int]] = {
    _Missing: Kind.MISSING, type(None): Kind.NULL, bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT, str: Kind.TEXT,
    list: Kind.LIST, dict: Kind.OBJECT,
}  # fmt: skip


def extract(texts: StringArray, keys: Keys) -> JsonValues:
    """Return what stands at the path in each document; a text that is not JSON, or empty, is null."""
    values: list[Any] = []
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        found = _documents(texts.slice(start, min(start + _ROWS_AT_ONCE, len(texts))).to_list())
        for key in keys:
            if isinstance(key, str):
                found = [one.get(key, _MISSING) if type(one) is dict else _MISSING for one in found]
            else:
                found = [one[key] if type(one) is list and len(one) > key else _MISSING for one in found]
        values += found
    return sorted_by_kind(values, nested=False)


def _documents(texts: list[str]) -> list[Any]:
    try:
        documents: list[Any] = orjson.loads(f"[{','.join([one or 'null' for one in texts])}]")
        if len(documents) == len(texts):
            return documents
    except orjson.JSONDecodeError:
        pass
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


@dataclass(slots=True)
class _Entry:
    array: weakref.ref[StringArray]
    values: JsonValues
    bytes: int
    used: int


class PathCache:
    """Remembers extracted paths while their arrays live."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._table: dict[tuple[int, Keys], _Entry] = {}  # never changed in place
        self._uses = itertools.count()

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self._table.values())

    def __len__(self) -> int:
        return len(self._table)

    def get(self, array: StringArray, keys: Keys) -> JsonValues | None:
        entry = self._table.get((id(array), keys))
        if entry is None or entry.array() is not array:  # another array may have had this address
            return None
        entry.used = next(self._uses)
        return entry.values

    def put(self, array: StringArray, keys: Keys, values: JsonValues) -> None:
        entry = _Entry(weakref.ref(array, self._forget), values, values.nbytes, next(self._uses))
        table = {key: one for key, one in self._table.items() if one.array() is not None}
        table[id(array), keys] = entry
        spare = self._bytes_max - sum(one.bytes for one in table.values())
        for key in _least_used(table):
            if spare >= 0:
                break
            spare += table.pop(key).bytes
        self._table = table

    def _forget(self, _: object) -> None:
        self._table = {key: one for key, one in self._table.items() if one.array() is not None}


def _least_used(table: dict[tuple[int, Keys], _Entry]) -> Iterable[tuple[int, Keys]]:
    return sorted(table, key=lambda key: table[key].used)


_CACHE: Final = PathCache(CACHE_BYTES_MAX)
