"""The executor seam: worker threads for what releases the GIL, so that the event loop never waits for it.

A function given to a lane gets immutable inputs and returns a new object; the loop installs the result. Lanes keep
kinds of work apart: an index build of a minute must not stand in front of an fsync of a millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, TypeVar, TypeVarTuple

from storage.errors import BadRequest

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger(__name__)


class Lane(StrEnum):
    """Which threads do the work."""

    LOG = "log"
    """The journal's writes and fsyncs, one after the other: every write waits for them, so nothing else is here."""
    DISK = "disk"
    """Chunks and checkpoints: LevelDB, reading and writing."""
    SEARCH = "search"
    """Searches and queries over segments: short, a client waits."""
    PARSE = "parse"
    """Large request bodies and replies. It holds the interpreter, so more than one thread would only slow searches."""
    CREDENTIALS = "credentials"
    """Passwords made into what is kept of them: a good part of a second each, one after the other."""
    BUILD = "build"
    """Index builds and compactions: long, nobody waits; they yield the cores to everything else."""


class Executor(Protocol):
    """What the loop may ask of threads; the simulation runs the work at once or later, as its seed says."""

    async def run(self, lane: Lane, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        """Return `function(*args)` computed on a thread of the lane, or raise what it raised.

        Cancelling the caller takes work that has not begun out of the queue. Work that has begun cannot be stopped:
        it runs on, its result is dropped, and an exception of it is logged.
        """
        ...

    def pending(self, lane: Lane) -> int:
        """Return how many calls are queued or running: what overload refusals look at."""
        ...

    async def passed(self, lane: Lane) -> None:
        """Return when every call that is queued or running now is done, also those whose callers have gone away."""
        ...


async def carry_through(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; once begun it goes on even if the caller is cancelled.

    For what must not be left between a worker's write and what the loop notes of it: the write cannot be called back.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_log_unseen)
        raise


def _log_unseen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("work that its caller left has failed: %s", error)


class WorkersClosed(RuntimeError):
    """Work was given to a lane after close: the caller outlived its room, which is a bug in the order of stopping."""


class Workers:
    """Real threads.

    Invariants
      1. Every call that was accepted is counted in `pending` until its thread is done with it, also when its caller
         has gone away.
      2. After `close` returns no thread of a lane runs.
    """

    def __init__(
        self, *, disk_threads: int = 2, search_threads: int = 2, build_threads: int = 1, build_nice: int = 10
    ) -> None:
        threads: Mapping[Lane, int] = {
            Lane.LOG: 1,
            Lane.PARSE: 1,
            Lane.CREDENTIALS: 1,
            Lane.DISK: disk_threads,
            Lane.SEARCH: search_threads,
            Lane.BUILD: build_threads,
        }
        self._pools = {
            lane: ThreadPoolExecutor(
                max_workers=count,
                thread_name_prefix=f"annulus-{lane}",
                initializer=partial(_yield_cores, build_nice) if lane is Lane.BUILD else None,
            )
            for lane, count in threads.items()
        }
        self._unfinished: dict[Lane, set[Future[Any]]] = {lane: set() for lane in Lane}
        self._closed = False

    async def run(self, lane: Lane, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        if self._closed:
            raise WorkersClosed(f"lane {lane} is closed")
        loop = asyncio.get_running_loop()
        # The context goes along so that what a thread logs carries the request id of its caller.
        work = self._pools[lane].submit(copy_context().run, partial(function, *args))
        unfinished = self._unfinished[lane]
        unfinished.add(work)
        waiter = asyncio.wrap_future(work, loop=loop)
        work.add_done_callback(lambda done: _call_on(loop, unfinished.discard, done))
        try:
            return await waiter
        except asyncio.CancelledError:
            work.add_done_callback(_report_unseen)
            raise

    def pending(self, lane: Lane) -> int:
        return len(self._unfinished[lane])

    async def passed(self, lane: Lane) -> None:
        await _finished(self._unfinished[lane])

    async def close(self) -> None:
        """Return when no work is left: queued builds are cancelled, everything else is finished first."""
        self._closed = True
        for work in list(self._unfinished[Lane.BUILD]):
            work.cancel()
        while left := set().union(*self._unfinished.values()):
            await _finished(left)
        for pool in self._pools.values():
            pool.shutdown(wait=True)  # instant: the threads are idle


def _yield_cores(nice: int) -> None:
    """Give this thread, and the native threads it starts, a lower priority (on Linux, nice is per thread)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


async def _finished(works: Iterable[Future[Any]]) -> None:
    waiters = [asyncio.wrap_future(work) for work in works]
    if waiters:
        await asyncio.wait(waiters)
    for waiter in waiters:  # its caller has it too; looked at here so that asyncio does not call it unseen
        _ = waiter.cancelled() or waiter.exception()


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Call on the loop, which owns the books; a loop that is already closed has no books left to keep."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _report_unseen(work: Future[T]) -> None:
    """Log the exception of work whose caller was cancelled: no one else will ever see it."""
    if work.cancelled():
        return
    error = work.exception()
    if isinstance(error, BadRequest):
        log.info("abandoned request was refused: %s", error.message)
    elif error is not None:
        log.error("abandoned work failed", exc_info=error)
