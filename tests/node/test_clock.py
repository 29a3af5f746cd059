"""The system clock and what watches the event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import threading
import time

import pytest

from node.clock import SystemClock, cpu_clock_of
from node.watchdog import QUIET_S, Stall, Watchdog


def test_system_clock() -> None:
    """Monotonic time does not go back; wall time is milliseconds since the epoch; CPU time stands still in a sleep."""
    clock = SystemClock()
    cpu_s = cpu_clock_of(threading.get_ident())
    before_s, before_cpu_s = clock.monotonic_s(), cpu_s()
    time.sleep(0.05)
    assert clock.monotonic_s() - before_s >= 0.05
    assert cpu_s() - before_cpu_s < 0.04
    assert abs(clock.wall_ms() - time.time() * 1000) < 1000


def block_the_loop(length_s: float) -> None:
    time.sleep(length_s)


def watch(lengths_s: list[float]) -> list[Stall]:
    """Return the stalls seen while the loop is blocked for each of the lengths."""
    stalls: list[Stall] = []

    async def main() -> None:
        watchdog = Watchdog(threshold_s=0.05, report=stalls.append)
        watchdog.start()
        try:
            for length_s in lengths_s:
                await asyncio.sleep(0.1)
                block_the_loop(length_s)
            await asyncio.sleep(0.1)
        finally:
            watchdog.stop()
            watchdog.stop()

    asyncio.run(main())
    return stalls


def test_a_stall_names_its_place(caplog: pytest.LogCaptureFixture) -> None:
    """Each stall is counted with its length; a line with our own place in it is logged at once, then now and then."""
    with caplog.at_level(logging.WARNING):
        stalls = [stall for stall in watch([0.3, 0.3]) if "block_the_loop" in stall.place]
    assert len(stalls) == 2
    assert all(stall.length_s >= 0.2 and stall.cpu_s < 0.15 for stall in stalls)
    assert "tests/node/test_clock.py" in stalls[0].place
    lines = [each.getMessage() for each in caplog.records if "block_the_loop" in each.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("event loop stalled stall_ms=")


class SetClock(SystemClock):
    """Stands where it is put."""

    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


def test_a_line_is_about_the_longest_stall(caplog: pytest.LogCaptureFixture) -> None:
    """On a machine that is too busy, every place stalls: one line tells of the worst, and how many there were."""
    clock = SetClock()

    async def main() -> None:
        watchdog = Watchdog(threshold_s=0.02, clock=clock)
        for late_s in (0.1, 0.2, 3.0, 0.4, 0.0, 7.0, 0.0):
            clock.now_s += 0.01 + late_s
            watchdog._beat()
        clock.now_s += QUIET_S
        watchdog._beat()
        watchdog._beat()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    found = [re.findall(r"_ms=(\d+) .*stalls=(\d+)", each.getMessage())[0] for each in caplog.records]
    assert found == [("100", "1"), ("7000", "4"), ("9990", "1")]


def test_a_loop_that_rests_is_asked_less_often() -> None:
    """One that has used the CPU since the last look is asked for a beat; one that has not, at every third look."""
    watchdog = Watchdog(threshold_s=0.02)
    cpu_s = itertools.accumulate([0.0, 0.0, 0.0, 0.0005, 0.002, 0.005])
    watchdog._cpu_s = lambda: next(cpu_s)
    assert [watchdog._rests() for _ in range(3)] == [True, True, False]
    watchdog._looks = 0
    assert [watchdog._rests() for _ in range(3)] == [True, False, False]


def test_a_stall_names_the_threads_in_our_code() -> None:
    """When the loop waited, the threads that may have held the GIL are named; idle ones are not."""
    gate = threading.Event()
    busy = threading.Thread(target=hold, args=(gate,))
    idle = threading.Thread(target=gate.wait)
    for thread in (busy, idle):
        thread.start()
    try:
        stalls = [stall for stall in watch([0.3]) if "block_the_loop" in stall.place]
    finally:
        gate.set()
        busy.join()
        idle.join()
    assert ["hold" in place for place in stalls[0].threads] == [True]


def hold(gate: threading.Event) -> None:
    gate.wait()
