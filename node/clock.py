"""The clock seam: the only place in a node that reads time.

Everything else is given a `Clock`, so that a simulation can run a day in a second and jump the wall clock at will.
Stamping log entries (the hybrid clock) builds on this and lives with the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol


class Clock(Protocol):
    """What a node may know about time."""

    def monotonic_s(self) -> float:
        """Return seconds since some fixed moment; never goes back, not even when the wall clock does."""
        ...

    def wall_ms(self) -> int:
        """Return milliseconds since the Unix epoch; may jump either way."""
        ...


_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        # While a machine is suspended its CLOCK_MONOTONIC stands still: a lease would outlive the sleep.
        return time.clock_gettime(_CLOCK)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


def cpu_clock_of(thread_id: int) -> Callable[[], float]:
    """Return what any thread may ask for the CPU seconds that a living one has used; 0 where the system cannot tell.

    That tells work from waiting. For reports, never for decisions.
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        return lambda: 0.0
    clock_id = time.pthread_getcpuclockid(thread_id)
    return lambda: time.clock_gettime(clock_id)
