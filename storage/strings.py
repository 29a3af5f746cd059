"""The door to pyarrow: immutable arrays of text with vectorised comparison, search and selection.

A `StringArray` has no nulls of its own (a column carries a validity mask beside it; a null row holds ""). Everything
here releases the interpreter lock while it works on more than a few rows. Order is by code point, which for UTF-8 is
byte order. Regular expressions are RE2's: linear time, no backtracking.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

pa.set_cpu_count(1)  # queries run beside each other on the executor's threads; arrow's own pool would fight them
pa.set_io_thread_count(1)
pa.set_memory_pool(pa.system_memory_pool())  # arrow's own keeps what is freed

Mask = npt.NDArray[np.bool_]
Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
_COMPARE: dict[str, str] = {
    "==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal",
}  # fmt: skip


def forgo_pandas() -> None:
    """Have arrow not look for pandas, in a process that has no use for it.

    When arrow first meets an array it imports pandas, where that is installed: half a second and 47 MB for nothing.
    """
    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


class _NoPandas(MetaPathFinder):
    """Finds nothing, and pandas least of all."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


class PatternInvalid(ValueError):
    """A regular expression does not compile; the message is RE2's."""


class StringArray:
    """An immutable array of str. Make one with `from_strings` or `from_buffers`."""

    __slots__ = ("__weakref__", "_array")  # caches hold arrays weakly

    def __init__(self, array: Any) -> None:
        self._array = array

    @classmethod
    def from_strings(cls, values: Sequence[str]) -> StringArray:
        return cls(pa.array(values, type=pa.large_string()))

    @classmethod
    def from_buffers(cls, offsets: npt.NDArray[np.int64], data: memoryview | bytes) -> StringArray:
        """Return an array over existing memory, uncopied: `offsets` (n+1,) from 0, `data` UTF-8.

        Raises ValueError if the offsets or the text are not sound: the bytes may come from outside.
        """
        array = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))
        array.validate(full=True)
        return cls(array)

    def buffers(self) -> tuple[npt.NDArray[np.int64], memoryview]:
        """Return (offsets (n+1,) from 0, UTF-8 bytes), uncopied where the array is not a slice."""
        rows = len(self._array)
        _, raw_offsets, raw_data = self._array.buffers()
        if rows == 0 or raw_offsets is None:
            return np.zeros(1, np.int64), memoryview(b"")
        start = self._array.offset
        offsets = np.frombuffer(raw_offsets, np.int64)[start : start + rows + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        data = memoryview(b"") if raw_data is None else memoryview(raw_data)[first:last]
        return (offsets - first if first else offsets), data

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, i: int) -> str:
        return str(self._array[i].as_py())

    @property
    def nbytes(self) -> int:
        return int(self._array.nbytes)

    def to_list(self) -> list[str]:
        values: list[str] = self._array.to_pylist()
        return values

    def take(self, offsets: npt.NDArray[np.int64]) -> StringArray:
        return StringArray(self._array.take(pa.array(offsets, type=pa.int64())))

    def slice(self, start: int, stop: int) -> StringArray:
        return StringArray(self._array.slice(start, max(stop - start, 0)))

    @staticmethod
    def concat(arrays: Sequence[StringArray]) -> StringArray:
        return StringArray(pa.concat_arrays([one._array for one in arrays]))

    def compare(self, op: Comparison, other: str | StringArray) -> Mask:
        """Return where `self op other` holds; `other` is one string or an array of the same length."""
        right = other._array if isinstance(other, StringArray) else pa.scalar(other, pa.large_string())
        return _mask(pc.call_function(_COMPARE[op], [self._array, right]))

    def is_in(self, values: Iterable[str] | StringArray) -> Mask:
        members = values if isinstance(values, StringArray) else StringArray.from_strings(list(values))
        return _mask(pc.is_in(self._array, value_set=members._array))

    def starts_with(self, prefix: str) -> Mask:
        return _mask(pc.starts_with(self._array, prefix))

    def ends_with(self, suffix: str) -> Mask:
        return _mask(pc.ends_with(self._array, suffix))

    def contains(self, part: str) -> Mask:
        return _mask(pc.match_substring(self._array, part))

    def matches(self, pattern: str) -> Mask:
        """Return where the RE2 pattern is found anywhere in the text. Raises PatternInvalid."""
        try:
            return _mask(pc.match_substring_regex(self._array, pattern))
        except pa.ArrowInvalid as error:
            raise PatternInvalid(str(error)) from None

    def order(self) -> npt.NDArray[np.int64]:
        """Return the offsets that sort the array ascending; equal strings keep their order."""
        return np.asarray(pc.array_sort_indices(self._array), dtype=np.int64)

    def distinct(self) -> tuple[StringArray, npt.NDArray[np.int32]]:
        """Return (distinct values in order of first appearance, code of each row)."""
        encoded = self._array.dictionary_encode()
        return StringArray(encoded.dictionary), np.asarray(encoded.indices, dtype=np.int32)


def check_pattern(pattern: str) -> None:
    """Raise PatternInvalid if RE2 does not accept the pattern."""
    StringArray.from_strings([""]).matches(pattern)


def _mask(result: Any) -> Mask:
    return np.asarray(result.to_numpy(zero_copy_only=False), dtype=np.bool_)
