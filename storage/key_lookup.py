"""From primary keys to the rows that have them: a dictionary while a segment grows, sorted arrays once it is sealed.

Both find every row with a key, dead or alive: who asks for an old tick needs the dead ones too. The caller drops what
is not visible. Neither loses an entry while its segment lives, so a worker may look up while the loop appends, and
ignores offsets that its view does not have yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from storage.columns import Batch, Offsets, ScalarColumn, StringColumn
from storage.strings import StringArray
from storage.types import FieldId

Keys: TypeAlias = npt.NDArray[np.int64] | Sequence[str]
_HASHES: TypeAlias = npt.NDArray[np.uint64]
_NONE: Final = np.empty(0, np.int64)


class KeySet:
    """Keys to look up, each once. Make it before asking many segments: what they all need is computed once."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    @staticmethod
    def of(keys: Keys | KeySet) -> KeySet:
        return keys if isinstance(keys, KeySet) else KeySet(keys)

    @cached_property
    def values(self) -> Sequence[int | str]:
        """The keys as Python values, in the order in which they were first named."""
        return list(dict.fromkeys(key_list(self._keys)))

    @cached_property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Int64 keys, ascending."""
        assert isinstance(self._keys, np.ndarray), "Int64 keys come as an array"
        return np.unique(self._keys) if len(self._keys) > 1 else self._keys

    @cached_property
    def texts(self) -> tuple[StringArray, _HASHES]:
        """VarChar keys and their hashes, by hash ascending: neighbours are looked for in neighbouring places."""
        texts = StringArray.from_strings([str(key) for key in self.values])
        hashes = hash_texts(texts)
        order = np.argsort(hashes, kind="stable")
        return texts.take(order), hashes[order]


class KeyLookup(Protocol):
    """Finds rows by primary key."""

    def find(self, keys: Keys | KeySet) -> Offsets:
        """Return the offsets of all rows with any of the keys, ascending, each once."""
        ...

    @property
    def is_unique(self) -> bool:
        """False unless no two rows have one key, dead ones included."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held beside the key column, an estimate."""
        ...


def batch_keys(batch: Batch, primary: FieldId) -> Keys:
    """Return the primary keys of a batch: an int64 array or a list of str."""
    column = batch.columns[primary]
    if isinstance(column, StringColumn):
        return column.values.to_list()
    assert isinstance(column, ScalarColumn), "a primary key is Int64 or VarChar"
    return column.values


def key_list(keys: Keys) -> list[int | str]:
    """Return the keys as Python values."""
    values: list[int | str] = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
    return values


class KeyDict:
    """Key to offsets; a key that is there once, as most are, costs no list."""

    def __init__(self) -> None:
        self._offsets: dict[int | str, int | list[int]] = {}
        self._rows = 0
        self.is_unique = True

    def add(self, keys: Keys) -> None:
        """Append rows with these keys, in order."""
        added = key_list(keys)
        first = self._rows
        self._rows += len(added)
        if self._offsets.keys().isdisjoint(added) and len(set(added)) == len(added):
            self._offsets.update(zip(added, range(first, self._rows), strict=True))
            return
        self.is_unique = False
        for offset, key in enumerate(added, first):
            known = self._offsets.setdefault(key, offset)
            if isinstance(known, list):
                known.append(offset)
            elif known != offset:
                self._offsets[key] = [known, offset]

    def find(self, keys: Keys | KeySet) -> Offsets:
        found: list[int] = []
        for key in KeySet.of(keys).values:
            known = self._offsets.get(key)
            if isinstance(known, int):
                found.append(known)
            elif known is not None:
                found.extend(known)
        return np.array(sorted(found), np.int64)

    def newest_first(self, key: int | str) -> Sequence[int]:
        """Return the offsets of one key, the newest first."""
        known = self._offsets.get(key)
        if known is None:
            return ()
        return (known,) if isinstance(known, int) else known[::-1]

    @property
    def nbytes(self) -> int:
        return 100 * len(self._offsets)


class SortedIntegers:
    """int64 keys in ascending order beside their offsets."""

    def __init__(self, keys: npt.NDArray[np.int64]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        self.is_unique = _all_differ(self._sorted)

    def find(self, keys: Keys | KeySet) -> Offsets:
        wanted = KeySet.of(keys).numbers
        if len(wanted) == 1:  # as most writes and deletes come
            first, stop = self._sorted.searchsorted(wanted[0], "left"), self._sorted.searchsorted(wanted[0], "right")
            return self._order[first:stop]  # ascending, for the sort that made it was stable
        places, _ = _ranges(self._sorted, wanted)
        return np.sort(self._order[places])

    @property
    def nbytes(self) -> int:
        return self._order.nbytes + self._sorted.nbytes


class SortedTexts:
    """Texts by the order of their hashes; a hit counts only when the text itself is equal."""

    def __init__(self, texts: StringArray) -> None:
        self._texts = texts
        hashes = hash_texts(texts)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self.is_unique = _all_differ(self._sorted)

    def find(self, keys: Keys | KeySet) -> Offsets:
        wanted, hashes = KeySet.of(keys).texts
        places, sources = _ranges(self._sorted, hashes)
        if len(places) == 0:
            return _NONE
        offsets = self._order[places]
        same = self._texts.take(offsets).compare("==", wanted.take(sources))
        return np.sort(offsets[same])

    @property
    def nbytes(self) -> int:
        return self._order.nbytes + self._sorted.nbytes


def sorted_lookup(batch: Batch, primary: FieldId) -> KeyLookup:
    """Return the lookup of rows that will not change. Cost: a sort of the keys."""
    column = batch.columns[primary]
    if isinstance(column, StringColumn):
        return SortedTexts(column.values)
    assert isinstance(column, ScalarColumn), "a primary key is Int64 or VarChar"
    return SortedIntegers(column.values)


_PRIME: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64
_INVERSE: Final = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_BLOCK_BYTES: Final = 1 << 20


def hash_texts(texts: StringArray) -> _HASHES:
    """Return a 64-bit hash of each text, the same in every process: its bytes as a polynomial, plus its length.

    Sums over many texts at once: sum(byte[j] * p^j) over the whole buffer, differences of it at the texts' ends, each
    divided by p^start. Collisions can be forged, and cost only time.
    """
    offsets, data = texts.buffers()
    hashes = np.empty(len(texts), np.uint64)
    raw = np.frombuffer(data, np.uint8)
    first = 0
    with np.errstate(over="ignore"):
        while first < len(texts):
            last = int(np.searchsorted(offsets, offsets[first] + _BLOCK_BYTES, side="right")) - 1
            last = min(max(last, first + 1), len(texts))
            bounds = offsets[first : last + 1] - offsets[first]
            block = raw[offsets[first] : offsets[last]].astype(np.uint64) + np.uint64(1)
            sums = np.zeros(len(block) + 1, np.uint64)
            np.cumsum(block * _powers(_PRIME, len(block)), out=sums[1:])
            unshift = _powers(_INVERSE, len(block) + 1)[bounds[:-1]]
            hashes[first:last] = (sums[bounds[1:]] - sums[bounds[:-1]]) * unshift
            first = last
    return hashes


def _powers(base: np.uint64, count: int) -> _HASHES:
    powers = np.full(count, base, np.uint64)
    if count:
        powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _all_differ(ascending: npt.NDArray[np.generic]) -> bool:
    return bool((ascending[1:] != ascending[:-1]).all())


def _ranges(ascending: npt.NDArray[np.generic], wanted: npt.NDArray[np.generic]) -> tuple[Offsets, Offsets]:
    """Return (places in `ascending` equal to any of `wanted`, for each which of `wanted` it equals)."""
    starts = ascending.searchsorted(wanted, "left")
    counts = ascending.searchsorted(wanted, "right") - starts
    total = int(counts.sum())
    if total == 0:
        return _NONE, _NONE
    sources = np.arange(len(wanted), dtype=np.int64).repeat(counts)
    inside = np.arange(total, dtype=np.int64) - (counts.cumsum() - counts).repeat(counts)
    return starts.repeat(counts) + inside, sources
