"""Tells what blocked the event loop.

A thread looks every half threshold how much CPU time the loop's thread has used. When it was some, or when the looking
thread was held up itself, and every so often in any case, it asks for a beat: a callback that notes when it came. A
beat that comes late by more than the threshold is a stall; its length is measured by the loop itself. What blocked it
is seen by the thread, which looks at the loop's stack while the beat is overdue. Native code that holds the GIL also
holds that thread up; then the place shown is where the loop was when the GIL came free, usually the line after.

A stall of a loop that rested before, and that waits for a disk without using the CPU or holding the GIL, is surely
found if it lasts two and a half thresholds. Stacks are looked at during stalls only: CPython 3.11 may crash when the
frames of a thread are read that goes on meanwhile.

Cost: two wake-ups of the thread per threshold, and of the loop as many while it works, a third of them while it rests.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from os.path import relpath
from types import FrameType
from typing import Final

from node.clock import Clock, SystemClock, cpu_clock_of

QUIET_S = 10.0
"""One line is logged in this time, about the longest stall of it; the metric counts every stall."""

RESTING_RATIO: Final = 0.1
"""A loop whose thread has used less of the CPU than this since the last look, rests."""
LOOKS_MAX: Final = 3
"""A loop that rests is asked for a beat at every so many looks."""
OWN_ROOMS = ("node", "cluster", "storage", "index", "tools", "tests")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stall:
    """One stall of the loop.

    `cpu_s` much below `length_s` means that the loop waited: for the disk, for the GIL, which one of `threads` may have
    held, or for a busy machine.
    """

    length_s: float
    cpu_s: float
    place: str
    threads: tuple[str, ...] = ()
    """Where the threads were that were in our code too."""


class Watchdog:
    """Watches the running loop from `start` to `stop`; both are called on the loop's thread."""

    def __init__(
        self,
        *,
        threshold_s: float = 0.020,
        report: Callable[[Stall], None] = lambda stall: None,
        clock: Clock | None = None,
    ) -> None:
        self._threshold_s = threshold_s
        self._beat_period_s = threshold_s / 2
        self._report = report
        self._clock = clock or SystemClock()
        self._beat_s = 0.0
        """A period before the beat that is due."""
        self._beat_cpu_s = 0.0
        self._looks, self._looked_cpu_s = 0, 0.0
        """Looks since the last beat was asked for; the loop's CPU time at the last one."""
        self._is_asked = False
        """Whether a beat is due. Set by the thread, reset by the loop."""
        self._seen: tuple[str, tuple[str, ...]] | None = None
        self._logged_s = -QUIET_S
        self._unlogged = 0
        self._longest: Stall | None = None  # of those unlogged
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._loop_thread_id = threading.get_ident()
        self._cpu_s = cpu_clock_of(self._loop_thread_id)

    def start(self) -> None:
        """Begin to watch the loop this is called on."""
        assert self._thread is None, "started twice"
        self._thread = threading.Thread(
            target=self._watch, args=(asyncio.get_running_loop(),), name="annulus-watchdog", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the watch; safe to call twice."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _beat(self) -> None:
        now_s, cpu_s = self._clock.monotonic_s(), self._cpu_s()
        late_s = now_s - self._beat_s - self._beat_period_s
        seen, self._seen = self._seen, None
        if late_s > self._threshold_s:
            self._stalled(Stall(late_s, cpu_s - self._beat_cpu_s, *(seen or ("unknown", ()))))
        if self._longest is not None and now_s - self._logged_s >= QUIET_S:
            self._log(self._longest)
            self._logged_s, self._unlogged, self._longest = now_s, 0, None
        self._beat_s, self._beat_cpu_s = now_s, cpu_s
        self._is_asked = False

    def _stalled(self, stall: Stall) -> None:
        self._report(stall)
        self._unlogged += 1
        if self._longest is None or stall.length_s > self._longest.length_s:
            self._longest = stall

    def _log(self, longest: Stall) -> None:
        log.warning(
            "event loop stalled stall_ms=%.0f cpu_ms=%.0f stalls=%d place=%s threads=%s",
            longest.length_s * 1000,
            longest.cpu_s * 1000,
            self._unlogged,
            longest.place,
            ",".join(longest.threads) or "-",
        )

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs on the watchdog's own thread: ask for beats, and note where the loop is whenever one is overdue."""
        looked_s = self._clock.monotonic_s()
        while not self._stopped.is_set():
            time.sleep(self._beat_period_s)  # half the cost of an event's wait, which a stop need not cut short
            before_s, looked_s = looked_s, self._clock.monotonic_s()
            if self._is_asked:
                if self._is_late(looked_s - self._beat_s) and self._seen is None:
                    self._seen = self._see()
            elif self._is_late(looked_s - before_s) or not self._rests() or self._owes_a_line(looked_s):
                self._beat_s, self._beat_cpu_s, self._is_asked, self._looks = before_s, self._cpu_s(), True, 0
                loop.call_soon_threadsafe(self._beat)

    def _is_late(self, length_s: float) -> bool:
        """Whether something that takes a period has taken so long that a stall may be why."""
        return length_s - self._beat_period_s > self._threshold_s / 2

    def _owes_a_line(self, now_s: float) -> bool:
        return self._longest is not None and now_s - self._logged_s >= QUIET_S

    def _rests(self) -> bool:
        """Whether the loop seems to wait for something to do, and was asked not long ago."""
        cpu_s = self._cpu_s()
        used_s, self._looked_cpu_s = cpu_s - self._looked_cpu_s, cpu_s
        self._looks += 1
        return used_s < RESTING_RATIO * self._beat_period_s and self._looks < LOOKS_MAX

    def _see(self) -> tuple[str, tuple[str, ...]]:
        """Return where the loop is, and the threads that are in our code too."""
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        loop_frame = frames.pop(self._loop_thread_id, None)
        threads = [describe(frame) for frame in frames.values() if _own(frame) is not None]
        return describe(loop_frame) if loop_frame else "unknown", tuple(threads)


def describe(frame: FrameType) -> str:
    """Return the innermost line of our own code and, when it called out, the innermost line of all."""
    own = _own(frame)
    return _line(frame) if own is None or own is frame else f"{_line(own)}>{_line(frame)}"


def _own(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of our own code, if any."""
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] not in OWN_ROOMS:
        frame = frame.f_back
    return frame


def _line(frame: FrameType) -> str:
    path = relpath(frame.f_code.co_filename)
    if path.startswith(".."):
        path = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{path}:{frame.f_lineno}:{frame.f_code.co_name}"
