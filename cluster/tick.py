"""Hybrid timestamps: how a shard's log gets ticks that are unique and ascend, whatever the wall clocks do.

A proposer stamps its message with its hybrid clock. Applying the message gives

    tick = max(previous tick + 1, stamp)

so ticks ascend strictly per shard by construction, through leader changes and clock jumps, and nothing is allocated,
confirmed or released. The hybrid clock never runs backwards and never behind a tick that it has seen.
(Kulkarni et al., "Logical Physical Clocks", 2014.)
"""

from __future__ import annotations

from collections.abc import Callable

from storage.types import Tick, tick_from_ms


def next_tick(previous: Tick, stamp: Tick) -> Tick:
    """Return the tick of the message stamped `stamp` that follows one of tick `previous`."""
    return Tick(max(previous + 1, stamp))


class HybridClock:
    """One per node. `wall_ms` is the clock seam's wall time; it may jump either way."""

    def __init__(self, wall_ms: Callable[[], int]) -> None:
        self._wall_ms = wall_ms
        self._last = Tick(0)

    def stamp(self, count: int = 1) -> Tick:
        """Return the first of `count` fresh ticks, above all returned or observed so far and not behind wall time."""
        first = Tick(max(self._last + 1, tick_from_ms(self._wall_ms())))
        self._last = Tick(first + count - 1)
        return first

    def observe(self, tick: Tick) -> None:
        """Never again return a tick at or below this one."""
        self._last = max(self._last, tick)
