"""What was made of whole columns of text, remembered for as long as the columns live.

Evaluation runs on worker threads, and these caches are what they share. They need no lock: a table is never changed in
place but replaced as a whole, so a reader sees one table or the next. Two threads that add at the same moment may lose
one addition, which costs making that again and nothing else.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from storage.strings import StringArray

ROWS_KEPT_MIN: Final = 128
_ENTRY_BYTES: Final = 4096
"""Charged per entry beside its arrays, so that many small columns do not make a long table."""


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


@dataclass(slots=True)
class _Entry(Generic[V]):
    array: weakref.ref[StringArray]
    values: V | None
    """None while only single rows have been looked at, `seen` of them."""
    bytes: int
    used: int
    seen: int = 0
    kept: bool = False
    """It goes with its array, not before, and leaves the room of others alone."""


class ColumnCache(Generic[V]):
    """Remembers what was made of arrays, by the array and a key; the least recently used goes first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._table: dict[tuple[int, Hashable], _Entry[V]] = {}  # never changed in place
        self._uses = itertools.count()

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self._table.values())

    def __len__(self) -> int:
        return len(self._table)

    def get(self, array: StringArray, key: Hashable) -> V | None:
        entry = self._entry(array, key)
        return None if entry is None else entry.values

    def put(self, array: StringArray, key: Hashable, values: V) -> None:
        """Remember the values, unless the array is so short that making them again costs less than the entry."""
        if len(array) >= ROWS_KEPT_MIN:
            self._add(_Entry(weakref.ref(array, self._forget), values, values.nbytes, next(self._uses)), array, key)

    def keep(self, array: StringArray, key: Hashable, values: V) -> None:
        """Remember the values for as long as the array lives."""
        entry = _Entry(weakref.ref(array, self._forget), values, values.nbytes, next(self._uses), kept=True)
        self._add(entry, array, key)

    def keeps(self, array: StringArray, key: Hashable) -> bool:
        """Return whether `keep` has been called."""
        entry = self._entry(array, key)
        return entry is not None and entry.kept

    def defer(self, array: StringArray, key: Hashable, rows: int) -> bool:
        """Return whether to look at only these rows: with all such rows so far they are fewer than the array has."""
        entry = self._entry(array, key)
        if entry is None:
            entry = _Entry(weakref.ref(array, self._forget), None, 0, next(self._uses))
            self._add(entry, array, key)
        entry.seen += rows
        return entry.seen < len(array)

    def _entry(self, array: StringArray, key: Hashable) -> _Entry[V] | None:
        entry = self._table.get((id(array), key))
        if entry is None or entry.array() is not array:  # another array may have had this address
            return None
        entry.used = next(self._uses)
        return entry

    def _add(self, entry: _Entry[V], array: StringArray, key: Hashable) -> None:
        entry.bytes += _ENTRY_BYTES
        table = {known: one for known, one in self._table.items() if one.array() is not None}
        table[id(array), key] = entry
        passing = [known for known, one in table.items() if not one.kept]
        spare = self._bytes_max - sum(table[known].bytes for known in passing)
        if spare < 0:
            for known in sorted(passing, key=lambda known: table[known].used):
                spare += table.pop(known).bytes
                if spare >= 0:
                    break
        self._table = table

    def _forget(self, _: object) -> None:
        self._table = {known: one for known, one in self._table.items() if one.array() is not None}
