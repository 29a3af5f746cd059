"""Ends what takes too long, with one timer for all of it: a timer for each request costs more than many a handler."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

LOOK_S: Final = 0.05
"""How late a request may learn that its time is up."""


class Deadlines:
    """What runs under a deadline now. `with deadlines.within(seconds):` is `async with asyncio.timeout(seconds):`."""

    def __init__(self) -> None:
        self.running: set[_Deadline] = set()
        self._timer: asyncio.TimerHandle | None = None

    def within(self, seconds: float) -> _Deadline:
        """Return a context that raises TimeoutError, up to LOOK_S late, if what is in it takes longer."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(LOOK_S, self._look, loop)
        return _Deadline(self, loop.time() + seconds)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        for one in self.running:
            one.look(now_s)
        self._timer = loop.call_later(LOOK_S, self._look, loop) if self.running else None


class _Deadline:
    __slots__ = ("_cancelling", "_deadlines", "_is_over", "_task", "_until_s")

    def __init__(self, deadlines: Deadlines, until_s: float) -> None:
        self._deadlines = deadlines
        self._until_s = until_s
        self._is_over = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a deadline is for what a task does"
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.running.add(self)

    def look(self, now_s: float) -> None:
        if now_s >= self._until_s and not self._is_over:
            self._is_over = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.running.discard(self)
        # Whoever else cancels the task goes before us, and what ended in time after all has ended well.
        if self._is_over and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
