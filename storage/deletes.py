"""The deletes of one segment: which row died at which tick, in the order of the log.

A delete log only grows, so a reader holds a prefix of it (`Deletes`) and needs no copy: whatever is recorded later
lies behind the prefix. A row dies once, because a dead row is not looked at again; so the number of deletes is the
number of dead rows, and ticks ascend because the log's do.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.columns import Mask, Offsets
from storage.types import Tick

Ticks = npt.NDArray[np.int64]
_MAGIC: Final = b"AND1"
_HEAD: Final = struct.Struct("<4sIQ")  # magic, nothing, number of deletes


class DeletesDamaged(ValueError):
    """The bytes are not a delete log."""


@dataclass(frozen=True, slots=True, eq=False)
class Deletes:
    """What a reader sees: the first deletes of a segment."""

    offsets: Offsets
    ticks: Ticks
    """Ascending."""

    def __len__(self) -> int:
        return len(self.offsets)

    def count_at(self, tick: Tick) -> int:
        """Return how many rows were dead at the tick: a delete counts from its own tick on."""
        return int(self.ticks.searchsorted(tick, side="right")) if len(self.ticks) else 0

    def dead_at(self, tick: Tick) -> Offsets:
        """Return the offsets that were dead at the tick, in the order in which they died."""
        return self.offsets[: self.count_at(tick)]

    def after(self, tick: Tick) -> Deletes:
        """Return the deletes later than the tick: what a compaction as of that tick did not see."""
        first = self.count_at(tick)
        return Deletes(self.offsets[first:], self.ticks[first:])

    def to_bytes(self) -> bytes:
        """Return the log for a checkpoint; equal logs give equal bytes."""
        return _HEAD.pack(_MAGIC, 0, len(self)) + self.offsets.astype("<i8").tobytes() + self.ticks.tobytes()


NO_DELETES: Final = Deletes(np.empty(0, np.int64), np.empty(0, np.int64))


class DeleteLog:
    """Deletes as they arrive. `dead` is the current mask, for the owner alone: readers take `view()`.

    Invariants
      1. Entries are never changed nor removed; growing moves them to a larger array and leaves the old one to readers.
      2. No offset appears twice; ticks ascend.
    """

    def __init__(self, rows: int = 0) -> None:
        self._offsets = np.empty(16, np.int64)
        self._ticks = np.empty(16, np.int64)
        self._count = 0
        self._dead = np.zeros(max(rows, 16), np.bool_)

    def __len__(self) -> int:
        return self._count

    @property
    def last_tick(self) -> Tick:
        """The tick of the newest delete, 0 if there is none."""
        return Tick(int(self._ticks[self._count - 1])) if self._count else Tick(0)

    def reserve(self, rows: int) -> None:
        """Make room for a segment of this many rows."""
        if rows > len(self._dead):
            grown = np.zeros(max(rows, 2 * len(self._dead)), np.bool_)
            grown[: len(self._dead)] = self._dead
            self._dead = grown

    def is_dead(self, offsets: Offsets) -> Mask:
        return self._dead[offsets]

    def is_dead_row(self, offset: int) -> bool:
        return bool(self._dead[offset])

    def record(self, offsets: Offsets, tick: Tick) -> None:
        """Let these rows, which live, die at the tick."""
        added = len(offsets)
        if added == 0:
            return
        assert tick >= self.last_tick, f"delete at tick {tick} after one at {self.last_tick}"
        assert not self._dead[offsets].any(), "a row dies once"
        if self._count + added > len(self._offsets):
            size = max(self._count + added, 2 * len(self._offsets))
            self._offsets = _grown(self._offsets[: self._count], size)
            self._ticks = _grown(self._ticks[: self._count], size)
        self._offsets[self._count : self._count + added] = offsets
        self._ticks[self._count : self._count + added] = tick
        self._count += added
        self._dead[offsets] = True

    def view(self) -> Deletes:
        """Return the deletes so far; later ones do not show in it."""
        return Deletes(self._offsets[: self._count], self._ticks[: self._count])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, rows: int) -> DeleteLog:
        """Return the log of a segment of this many rows. Raises DeletesDamaged if the bytes are not one of it."""
        try:
            magic, _, count = _HEAD.unpack_from(data)
        except struct.error as error:
            raise DeletesDamaged(f"not a delete log: {error}") from error
        if magic != _MAGIC or len(data) != _HEAD.size + 16 * count:
            raise DeletesDamaged("not a delete log: wrong start or length")
        numbers = np.frombuffer(data, "<i8", offset=_HEAD.size)
        offsets, ticks = numbers[:count], numbers[count:]
        if count and (
            offsets.min() < 0 or offsets.max() >= rows or len(np.unique(offsets)) != count or (np.diff(ticks) < 0).any()
        ):
            raise DeletesDamaged(f"not a delete log of {rows} rows")
        log = cls(rows)
        log._offsets, log._ticks, log._count = offsets.astype(np.int64), ticks.astype(np.int64), int(count)
        log._dead[offsets] = True
        return log


def _grown(array: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    grown = np.empty(size, np.int64)
    grown[: len(array)] = array
    return grown
