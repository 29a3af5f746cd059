"""Deadlines by one timer behave as asyncio's own timeouts do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from node.api.deadlines import Deadlines


def run(script: Callable[[Deadlines], Awaitable[Any]]) -> None:
    async def main() -> None:
        deadlines = Deadlines()
        await script(deadlines)
        assert not deadlines.running

    asyncio.run(main())


def test_what_takes_too_long_ends_in_a_timeout_and_its_task_goes_on() -> None:
    async def script(deadlines: Deadlines) -> None:
        for _ in range(2):  # with a timer that runs still, and with a new one
            with pytest.raises(TimeoutError), deadlines.within(0.01):
                await asyncio.sleep(60)
            await asyncio.sleep(0.2)
        with deadlines.within(60):
            with pytest.raises(TimeoutError), deadlines.within(0):
                await asyncio.sleep(60)
            await asyncio.sleep(0)

    run(script)


def test_what_ends_in_time_or_fails_is_left_alone() -> None:
    async def script(deadlines: Deadlines) -> None:
        with deadlines.within(60):
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="its own"), deadlines.within(60):
            raise ValueError("its own")
        await asyncio.sleep(0.1)

    run(script)


def test_a_cancellation_from_outside_stays_one() -> None:
    """Also when the time is up at that moment."""

    async def script(deadlines: Deadlines) -> None:
        async def work(seconds: float) -> None:
            with deadlines.within(seconds):
                await asyncio.sleep(60)

        for seconds in (60, 0):
            task = asyncio.ensure_future(work(seconds))
            await asyncio.sleep(0)
            task.cancel()
            deadlines._look(asyncio.get_running_loop())
            with pytest.raises(asyncio.CancelledError):
                await task

    run(script)
