"""Worker threads: results and exceptions come back, nothing is lost, close leaves no thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import pytest

from node.workers import Lane, Workers, WorkersClosed


def with_workers(body: Callable[[Workers], Awaitable[None]], *, search_threads: int = 1) -> None:
    async def main() -> None:
        workers = Workers(disk_threads=1, search_threads=search_threads, build_threads=1)
        try:
            async with asyncio.timeout(10):
                await body(workers)
        finally:
            await workers.close()
        assert not [t.name for t in threading.enumerate() if t.name.startswith("annulus-")]

    asyncio.run(main())


def fail(text: str) -> None:
    raise ValueError(text)


def test_results_come_from_named_threads() -> None:
    """Each lane runs on threads of its own, named after it, and hands the result back."""

    async def body(workers: Workers) -> None:
        for lane in Lane:
            name = await workers.run(lane, lambda: threading.current_thread().name)
            assert name.startswith(f"annulus-{lane}")
            assert workers.pending(lane) == 0
        assert await workers.run(Lane.SEARCH, divmod, 7, 2) == (3, 1)

    with_workers(body)


def test_exceptions_reach_the_caller() -> None:
    """What the function raises, run raises."""

    async def body(workers: Workers) -> None:
        with pytest.raises(ValueError, match="broken disk"):
            await workers.run(Lane.DISK, fail, "broken disk")

    with_workers(body)


def test_lanes_do_not_wait_for_each_other() -> None:
    """A long build does not stand in front of an fsync."""

    async def body(workers: Workers) -> None:
        gate = threading.Event()
        build = asyncio.create_task(workers.run(Lane.BUILD, gate.wait, 10))
        assert await workers.run(Lane.DISK, lambda: "synced") == "synced"
        assert workers.pending(Lane.BUILD) == 1
        gate.set()
        assert await build

    with_workers(body)


def test_cancelled_before_it_began() -> None:
    """Queued work whose caller is cancelled never runs, and is no longer pending."""

    async def body(workers: Workers) -> None:
        gate = threading.Event()
        ran: list[int] = []
        first = asyncio.create_task(workers.run(Lane.SEARCH, gate.wait, 10))
        second = asyncio.create_task(workers.run(Lane.SEARCH, ran.append, 1))
        await asyncio.sleep(0.01)
        assert workers.pending(Lane.SEARCH) == 2
        second.cancel()
        await asyncio.wait([second])
        await asyncio.sleep(0)
        assert workers.pending(Lane.SEARCH) == 1
        gate.set()
        await first
        assert ran == []

    with_workers(body)


def test_no_exception_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Work that began before its caller was cancelled runs on, counts as pending, and its exception is logged."""

    async def body(workers: Workers) -> None:
        begun, gate = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            gate.wait(10)
            raise OSError("disk on fire")

        task = asyncio.create_task(workers.run(Lane.DISK, work))
        await workers.run(Lane.SEARCH, begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert workers.pending(Lane.DISK) == 1
        gate.set()
        await workers.close()
        assert workers.pending(Lane.DISK) == 0

    with caplog.at_level(logging.ERROR):
        with_workers(body)
    (line,) = [each for each in caplog.records if each.name == "node.workers"]
    assert line.exc_info is not None
    assert "disk on fire" in str(line.exc_info[1])


def test_passed_waits_for_what_nobody_waits_for() -> None:
    """A write whose caller has gone away is waited for, and what comes after the question is not."""

    async def body(workers: Workers) -> None:
        gate, later, begun = threading.Event(), threading.Event(), threading.Event()
        written: list[str] = []

        def write() -> None:
            begun.set()
            gate.wait(5)
            written.append("late")

        caller = asyncio.create_task(workers.run(Lane.DISK, write))
        await asyncio.to_thread(begun.wait, 5)
        caller.cancel()
        passed = asyncio.create_task(workers.passed(Lane.DISK))
        await asyncio.sleep(0)
        after = asyncio.create_task(workers.run(Lane.DISK, later.wait, 5))
        await asyncio.wait({passed}, timeout=0.05)
        assert not passed.done()
        gate.set()
        await passed
        assert written == ["late"] and not after.done()
        later.set()
        await after
        await workers.passed(Lane.DISK)

    with_workers(body)


def test_close_finishes_what_matters() -> None:
    """close runs queued disk work to its end, cancels queued builds, and refuses new work."""

    async def body(workers: Workers) -> None:
        gate = threading.Event()
        done: list[str] = []
        waiting = asyncio.create_task(workers.run(Lane.DISK, gate.wait, 10))
        writing = asyncio.create_task(workers.run(Lane.DISK, done.append, "written"))
        running = asyncio.create_task(workers.run(Lane.BUILD, gate.wait, 10))
        queued = asyncio.create_task(workers.run(Lane.BUILD, done.append, "built"))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(workers.close())
        await asyncio.sleep(0.01)
        with pytest.raises(WorkersClosed):
            await workers.run(Lane.SEARCH, len, "")
        assert not closing.done()
        gate.set()
        await closing
        await asyncio.gather(waiting, writing, running)
        assert done == ["written"]
        with pytest.raises(asyncio.CancelledError):
            await queued
        await workers.close()

    with_workers(body)


def test_context_goes_along() -> None:
    """A context variable (the request id) set by the caller is seen on the thread."""
    variable: ContextVar[str] = ContextVar("variable", default="-")

    async def body(workers: Workers) -> None:
        variable.set("r1")
        assert await workers.run(Lane.SEARCH, variable.get) == "r1"

    with_workers(body)
