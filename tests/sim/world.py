"""A simulated world: an event loop whose time is virtual, clocks, and executors, all driven by one seed.

Nothing waits: when no callback is ready, time jumps to the next timer. So a simulated minute costs what its callbacks
cost, and the same seed gives the same run, callback for callback. A node is given these in place of the real seams.

All processes of a world share one loop. Each has a `Life`, which travels in the context of every task, timer and
callback that the process starts: when the life ends, nothing of it ever runs again, as after kill -9; while it is
paused, everything of it waits, as after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Final, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

from node.workers import Lane

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

CALLBACKS_MAX: Final = 20_000
"""At one moment; with more, something turns in a circle."""
LIFE: Final[contextvars.ContextVar[Life]] = contextvars.ContextVar("life")
"""The process that the code which runs now belongs to; unset for the world itself."""


class Life:
    """One process from its start to its end."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.name = name
        self.loop = loop
        self.is_over = False
        self.paused = False
        self.ended: asyncio.Future[None] = loop.create_future()
        self._deferred: list[_Call] = []
        self._remains: list[Any] = []
        """Tasks that will never go on. They are kept, so that nothing of them ends in the life of another."""
        self._context = contextvars.copy_context()
        self._context.run(LIFE.set, self)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something as part of this process."""
        task: asyncio.Task[T] = self.loop.create_task(work, context=self._context.copy())
        return task

    def call_at(self, when_s: float, function: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Call something at that time as part of this process, unless it is over."""
        timer: asyncio.TimerHandle = self.loop.call_at(when_s, function, *args, context=self._context.copy())
        return timer

    def end(self) -> None:
        """Kill the process: nothing of it runs again from now on."""
        self.is_over = True
        self._deferred.clear()
        self._remains = [task for task in asyncio.all_tasks(self.loop) if self.loop.owners.get(task) is self]
        for task in self._remains:
            task._log_destroy_pending = False
        self.loop.dead.append(self)
        if not self.ended.done():
            self.ended.set_result(None)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """Go on: what became due meanwhile happens now, in order."""
        self.paused = False
        self.loop.ready.extend(self._deferred)
        self._deferred = []

    def defer(self, call: _Call) -> None:
        self._deferred.append(call)


class _Call:
    """What the loop is to call, in place of asyncio.Handle, which knows more and costs more."""

    __slots__ = ("args", "context", "function", "is_cancelled")

    def __init__(
        self, function: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.function, self.args = function, args
        self.context = contextvars.copy_context() if context is None else context
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled


class _Timer(float):
    """The time of a call, so that the heap of timers compares plain numbers; in place of asyncio.TimerHandle."""

    __slots__ = ("call",)
    call: _Call

    def cancel(self) -> None:
        self.call.is_cancelled = True

    def cancelled(self) -> bool:
        return self.call.is_cancelled

    def when(self) -> float:
        return float(self)


class SimLoop(asyncio.BaseEventLoop):
    """An event loop without sockets or threads, whose clock is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.ready: deque[_Call] = deque()
        self._timers: list[_Timer] = []
        self.callbacks = 0
        self._callbacks_before = 0
        """How many there had been when time moved last."""
        self.failures: list[BaseException] = []
        self.closing = False
        """Set at the very end: what fails then, fails unheard."""
        self.owners: WeakKeyDictionary[asyncio.Task[Any], Life] = WeakKeyDictionary()
        self.dead: list[Life] = []
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        return self.now_s

    def create_task(self, coro: Any, *, name: Any = None, context: contextvars.Context | None = None) -> Any:
        life = LIFE.get(None) if context is None else context.get(LIFE)
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        if life is not None:
            self.owners[task] = life
        return task

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self.closing:
            self.failures.append(context.get("exception") or RuntimeError(context["message"]))

    def _process_events(self, event_list: object) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """There are no other threads to be woken by."""

    def call_soon(  # type: ignore[override]  # what is returned can be cancelled, and is no asyncio.Handle
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        call = _Call(callback, args, context)
        self.ready.append(call)
        return call

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        timer = _Timer(when)
        timer.call = _Call(callback, args, context)
        heapq.heappush(self._timers, timer)
        return timer

    def _run_once(self) -> None:
        ready, timers = self.ready, self._timers
        while timers and timers[0].call.is_cancelled:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise RuntimeError(f"nothing will ever happen again at {self.now_s:.3f} s: a deadlock")
            if timers[0] > self.now_s:
                self.now_s, self._callbacks_before = float(timers[0]), self.callbacks
        while timers and timers[0] <= self.now_s:
            call = heapq.heappop(timers).call
            if not call.is_cancelled:
                ready.append(call)
        for _ in range(len(ready)):
            call = ready.popleft()
            if call.is_cancelled:
                continue
            life = call.context.get(LIFE)
            if life is not None:
                if life.is_over:
                    continue
                if life.paused:
                    life.defer(call)
                    continue
            self.callbacks += 1
            if self.callbacks - self._callbacks_before > CALLBACKS_MAX:
                what = f"{call.function!r}{call.args!r}"
                raise RuntimeError(f"time stands still at {self.now_s:.6f} s for {CALLBACKS_MAX} callbacks: {what}")
            try:
                call.context.run(call.function, *call.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": f"exception in {call.function!r}", "exception": error})


async def nap(delay_s: float) -> None:
    """Sleep in a simulated world; for what does so all the time, as asyncio.sleep costs twice as much."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    timer = loop.call_later(delay_s, _wake, woken)
    try:
        await woken
    except BaseException:
        timer.cancel()
        raise


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


class SimClock:
    """Time as the loop has it, and a wall clock that tests may push either way.

    `rate` is how fast this machine's own clock runs: 1.0005 gains half a second in 1,000 s.
    """

    def __init__(self, loop: SimLoop, *, epoch_ms: int = 1_700_000_000_000, rate: float = 1.0) -> None:
        self._loop = loop
        self._epoch_ms = epoch_ms
        self._rate = rate

    def monotonic_s(self) -> float:
        return self._loop.now_s * self._rate

    def wall_ms(self) -> int:
        return self._epoch_ms + int(self._loop.now_s * self._rate * 1000)

    def jump(self, by_ms: int) -> None:
        self._epoch_ms += by_ms


class SimExecutor:
    """Runs the work on the loop's own thread, after a delay that the seed chooses."""

    DELAY_S_MAX: ClassVar = {Lane.LOG: 0.02, Lane.DISK: 0.02, Lane.SEARCH: 0.005, Lane.PARSE: 0.005, Lane.BUILD: 0.5}

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._running: dict[Lane, set[asyncio.Future[None]]] = {lane: set() for lane in Lane}
        self.dead = False
        """The process was killed: no work is done any more."""
        self.slow_disk_s = 0.0
        """Added to whatever goes to the disk."""

    async def run(self, lane: Lane, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[lane].add(done)
        try:
            await nap(self._delay_s(lane))
            if self.dead:
                raise asyncio.CancelledError
            result = function(*args)
            await nap(self._rng.random() * self.DELAY_S_MAX[lane])
            return result
        finally:
            self._running[lane].discard(done)
            done.set_result(None)

    def _delay_s(self, lane: Lane) -> float:
        slow_s = self.slow_disk_s if lane in (Lane.LOG, Lane.DISK) else 0.0
        return self._rng.random() * (self.DELAY_S_MAX[lane] + slow_s)

    def pending(self, lane: Lane) -> int:
        return len(self._running[lane])

    async def passed(self, lane: Lane) -> None:
        if self._running[lane]:
            await asyncio.wait(self._running[lane])

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


def close(loop: SimLoop) -> None:
    """Drop every task that is left, of the living and of the dead, and the loop."""
    loop.closing = True
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    tasks: list[Any] = list(asyncio.all_tasks(loop))
    for task in tasks:
        task._log_destroy_pending = False
        with contextlib.suppress(BaseException):  # whatever its last words are, nobody listens
            task.get_coro().close()
    loop.close()
    logging.disable(quiet)
