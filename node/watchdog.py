"""Tells what blocked the event loop.

The loop beats: a callback comes back every half threshold and notes when. A beat that comes late by more than the
threshold is a stall; its length is measured by the loop itself. What blocked it is seen by a thread that looks at the
loop's stack while the beat is overdue. Native code that holds the GIL also holds that thread up; then the place shown
is where the loop was when the GIL came free, usually the line after.

Cost: two wake-ups per threshold on each side, about 1 % of a core at 20 ms.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from os.path import relpath
from types import FrameType

from node.clock import Clock, SystemClock, thread_cpu_s

QUIET_S = 10.0
"""One line is logged in this time, about the longest stall of it; the metric counts every stall."""

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
        self._beat_cpu_s = 0.0
        self._seen: tuple[str, tuple[str, ...]] | None = None
        self._logged_s = -QUIET_S
        self._unlogged = 0
        self._longest: Stall | None = None  # of those unlogged
        self._timer: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._loop_thread_id = 0

    def start(self) -> None:
        """Begin to watch the loop this is called on."""
        assert self._thread is None, "started twice"
        self._loop_thread_id = threading.get_ident()
        self._beat_s, self._beat_cpu_s = self._clock.monotonic_s(), thread_cpu_s()
        self._schedule()
        self._thread = threading.Thread(target=self._watch, name="annulus-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; safe to call twice."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._beat_period_s, self._beat)

    def _beat(self) -> None:
        now_s, cpu_s = self._clock.monotonic_s(), thread_cpu_s()
        late_s = now_s - self._beat_s - self._beat_period_s
        seen, self._seen = self._seen, None
        if late_s > self._threshold_s:
            self._stalled(Stall(late_s, cpu_s - self._beat_cpu_s, *(seen or ("unknown", ()))))
        if self._longest is not None and now_s - self._logged_s >= QUIET_S:
            self._log(self._longest)
            self._logged_s, self._unlogged, self._longest = now_s, 0, None
        self._beat_s, self._beat_cpu_s = now_s, cpu_s
        self._schedule()

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

    def _watch(self) -> None:
        """Runs on the watchdog's own thread: note where the loop is whenever its beat is overdue."""
        while not self._stopped.wait(self._beat_period_s):
            overdue_s = self._clock.monotonic_s() - self._beat_s - self._beat_period_s
            if overdue_s > self._threshold_s / 2 and self._seen is None:
                frames = sys._current_frames()
                frames.pop(threading.get_ident(), None)
                loop_frame = frames.pop(self._loop_thread_id, None)
                threads = [describe(frame) for frame in frames.values() if _own(frame) is not None]
                self._seen = (describe(loop_frame) if loop_frame else "unknown", tuple(threads))


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
