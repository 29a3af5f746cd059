"""A simulated world: an event loop whose time is virtual, clocks, and an executor, all driven by one seed.

Nothing waits: when no callback is ready, time jumps to the next timer. So a simulated minute costs what its callbacks
cost, and the same seed gives the same run, callback for callback. A node is given these in place of the real seams.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeVar, TypeVarTuple

from node.workers import Lane

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class SimLoop(asyncio.BaseEventLoop):
    """An event loop without sockets or threads, whose clock is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.callbacks = 0
        self._clock_resolution = 1e-9
        self.failures: list[BaseException] = []
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        return self.now_s

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(context.get("exception") or RuntimeError(context["message"]))

    def _process_events(self, event_list: object) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """There are no other threads to be woken by."""

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]
        scheduled: Any = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise RuntimeError(f"nothing will ever happen again at {self.now_s:.3f} s: a deadlock")
            self.now_s = max(self.now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self.now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                self.callbacks += 1
                handle._run()


class SimClock:
    """Time as the loop has it, and a wall clock that tests may push either way."""

    def __init__(self, loop: SimLoop, *, epoch_ms: int = 1_700_000_000_000) -> None:
        self._loop = loop
        self._epoch_ms = epoch_ms

    def monotonic_s(self) -> float:
        return self._loop.now_s

    def wall_ms(self) -> int:
        return self._epoch_ms + int(self._loop.now_s * 1000)

    def jump(self, by_ms: int) -> None:
        self._epoch_ms += by_ms


class SimExecutor:
    """Runs the work on the loop's own thread, after a delay that the seed chooses."""

    DELAY_S_MAX: ClassVar = {Lane.LOG: 0.02, Lane.DISK: 0.02, Lane.SEARCH: 0.005, Lane.PARSE: 0.005, Lane.BUILD: 0.5}

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pending = dict.fromkeys(Lane, 0)
        self.dead = False
        """The process was killed: no work is done any more."""

    async def run(self, lane: Lane, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        self._pending[lane] += 1
        try:
            await asyncio.sleep(self._rng.random() * self.DELAY_S_MAX[lane])
            if self.dead:
                raise asyncio.CancelledError
            result = function(*args)
            await asyncio.sleep(self._rng.random() * self.DELAY_S_MAX[lane])
            return result
        finally:
            self._pending[lane] -= 1

    def pending(self, lane: Lane) -> int:
        return self._pending[lane]

    async def close(self) -> None:
        """There are no threads."""


def run(loop: SimLoop, main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on the loop until it ends; a failure of any callback fails the run."""
    asyncio.set_event_loop(loop)
    try:
        result = loop.run_until_complete(main)
    finally:
        asyncio.set_event_loop(None)
    if loop.failures:
        raise loop.failures[0]
    return result


def kill(loop: SimLoop, executor: SimExecutor) -> None:
    """End every task at once, as kill -9 does: nothing that they still do reaches a disk."""
    executor.dead = True
    asyncio.set_event_loop(loop)
    try:
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
    finally:
        asyncio.set_event_loop(None)
    loop.close()
