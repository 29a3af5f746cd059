"""Admission on a simulated loop: budgets, refusals with their words, memory, and that all of it passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest

from node.admission import Admission, Memory
from node.api.faults import refusal
from node.metrics import COLLECTIONS_NAMED, Metrics
from node.pressure import CALM_S, Level
from node.scope import Scope, current
from node.settings import MIB, AdmissionSettings, Settings, SettingsError, StorageSettings
from storage.errors import MemoryShort, Overloaded
from storage.types import CollectionId
from tests.sim.world import SimClock, SimLoop, close, run

FLOOD, OTHER = CollectionId(1), CollectionId(2)
SETTINGS = Settings(
    admission=AdmissionSettings(
        memory_bytes_max=1024 * MIB, log_bytes_max=4 * MIB, request_bytes_max=8 * MIB, reads_max=8, wait_s_max=2.0,
        standing_wait_s_max=0.5,
    ),
    storage=StorageSettings(growing_bytes_max=64 * MIB, segment_bytes_max=32 * MIB),
)  # fmt: skip


class World:
    """An admission whose memory is what was written and not flushed yet."""

    def __init__(self, loop: SimLoop, settings: Settings = SETTINGS) -> None:
        self.growing = 0
        self.resident = 100 * MIB
        self.metrics = Metrics()
        self.admission = Admission(
            settings,
            SimClock(loop),
            self.metrics,
            memory=Memory(64 << 30, lambda: self.resident),
            growing_bytes=lambda: self.growing,
            name_of=lambda one: {FLOOD: "flood", OTHER: "other"}.get(one, str(one)),
        )

    async def write(self, key: CollectionId, nbytes: int, *, takes_s: float = 0.1) -> None:
        async with self.rows(key, nbytes):
            await asyncio.sleep(takes_s)
            self.growing += nbytes

    @asynccontextmanager
    async def rows(self, collection_id: CollectionId, nbytes: int, **more: bool) -> AsyncIterator[None]:
        key = await self.admission.take_rows(collection_id, nbytes, **more)
        try:
            yield
        finally:
            self.admission.give_rows(key, nbytes)


def simulated(script: Callable[[World, SimLoop], Awaitable[None]], settings: Settings = SETTINGS) -> None:
    loop = SimLoop()

    async def main() -> None:
        await script(World(loop, settings), loop)

    try:
        run(loop, main())
    finally:
        close(loop)


def test_reads_wait_for_their_turn_and_are_refused_in_words() -> None:
    """More reads than there may be wait; one that has waited too long hears which budget, and what raises it."""

    async def script(world: World, loop: SimLoop) -> None:
        reads = world.admission.reads
        taken = [reads.enter(("default", "flood")) for _ in range(8)]
        assert sum(taken) == 6
        assert reads.enter(("default", "other"))
        with pytest.raises(Overloaded, match=r"flood has 6 and all have 7 of at most 8 reads .*reads_max raises it"):
            await reads.wait(("default", "flood"))
        assert loop.now_s == pytest.approx(2.0)
        waiting = asyncio.ensure_future(reads.wait(("default", "flood")))
        await asyncio.sleep(0.1)
        reads.leave(("default", "flood"))
        await asyncio.wait_for(waiting, 0.01)
        assert reads.view() == {"held": 7, "limit": 8, "waiting": 0, "delayed": 1, "refused": 1}
        shown = world.metrics.render().decode()
        assert 'refused_total{budget="reads",collection="flood",reason="late"} 1.0' in shown

    simulated(script)


def test_who_leaves_while_waiting_leaves_nothing_behind() -> None:
    """A client that goes away while it waits, or just when its turn comes, takes nothing with it."""

    async def script(world: World, loop: SimLoop) -> None:
        reads, key = world.admission.reads, ("default", "c")
        for _ in range(6):
            assert reads.enter(key)
        for gives_room in (False, True):
            waiting = asyncio.ensure_future(reads.wait(key))
            await asyncio.sleep(0.1)
            if gives_room:
                reads.leave(key)
            waiting.cancel()
            await asyncio.wait({waiting})
        for _ in range(5):
            reads.leave(key)
        assert reads.queue.used == reads.queue.waiting == 0

    simulated(script)


def test_nobody_waits_longer_than_his_client() -> None:
    """A request whose client has little time is refused, with nothing done, before that time is up."""

    async def script(world: World, loop: SimLoop) -> None:
        current.set(Scope(deadline_s=0.3))
        async with world.rows(OTHER, 4 * MIB):
            with pytest.raises(Overloaded):
                await world.write(FLOOD, MIB)
        assert loop.now_s == pytest.approx(0.3)

    simulated(script)


def test_a_request_holds_its_room_once() -> None:
    """What the HTTP server has admitted is not admitted again below it."""

    async def script(world: World, loop: SimLoop) -> None:
        current.set(Scope(deadline_s=10))
        admission = world.admission
        cost = await admission.take_request("default", "c", MIB)
        again = await admission.take_request("default", "c", 8 * MIB)
        assert (cost, again, admission.requests.queue.used) == (MIB, 0, MIB)
        admission.give_request("default", "c", again)
        assert admission.requests.queue.used == MIB
        admission.give_request("default", "c", cost)
        assert world.admission.requests.queue.used == 0

    simulated(script)


def test_memory_slows_then_refuses_then_recovers() -> None:
    """A flood is slowed above the first mark, refused above the second with code 9 and Retry-After, and when rows have
    been flushed everything is accepted again, at once."""

    async def script(world: World, loop: SimLoop) -> None:
        for _ in range(17):
            await world.write(FLOOD, 4 * MIB, takes_s=0.3)
        assert world.admission.look() is Level.DELAY
        began_s, refused = loop.now_s, 0
        while not refused:
            try:
                await world.write(FLOOD, 4 * MIB, takes_s=0.0)
            except MemoryShort as error:
                refused, shown = 1, refusal(error)
        assert loop.now_s - began_s > 1 and 120 * MIB <= world.growing <= 132 * MIB
        assert shown.code == 9 and shown.headers["Retry-After"] == "2"
        assert "growing" in shown.message and "storage.growing_bytes_max" in shown.message
        world.growing = 130 * MIB
        await asyncio.sleep(0.1)
        for _ in range(3):  # who writes little goes on
            await world.write(OTHER, 1000)
        assert world.admission.view()["memory"]["level"] == "refuse"
        world.growing = 0
        await asyncio.sleep(0.1)
        for _ in range(10):
            began_s = loop.now_s
            await world.write(FLOOD, MIB, takes_s=0.0)
            assert loop.now_s == began_s
        assert world.admission.view()["why"] == ""

    simulated(script)


def test_the_rest_of_a_request_is_not_refused_for_memory() -> None:
    """What other shards have taken parts of is written, however short memory is."""

    async def script(world: World, loop: SimLoop) -> None:
        world.resident = 1024 * MIB
        with pytest.raises(MemoryShort):
            await world.write(FLOOD, 1000)
        async with world.rows(FLOOD, 1000, is_rest=True):
            pass

    simulated(script)


def test_another_nodes_rows_wait_briefly() -> None:
    """They hold a place between two nodes, so they go back to be sent again."""

    async def script(world: World, loop: SimLoop) -> None:
        async with world.rows(OTHER, 4 * MIB):
            with pytest.raises(Overloaded):
                async with world.rows(FLOOD, MIB, is_forwarded=True):
                    pass
        assert loop.now_s == pytest.approx(0.1)

    simulated(script)


@pytest.mark.parametrize("seed", range(20))
def test_a_flood_and_a_good_tenant(seed: int) -> None:
    """Twenty clients write to one collection as fast as they may, into a node that flushes slowly; one client writes
    little to another. None of the latter's writes is refused or takes longer than those that were under way before
    it; memory stays within its marks; and when the flood ends, all is accepted."""
    dice = Random(seed)

    async def script(world: World, loop: SimLoop) -> None:
        worst_growing = refused = written = 0
        until_s = 60.0

        async def flush() -> None:
            while True:
                await asyncio.sleep(0.5)
                world.growing = max(0, world.growing - dice.randrange(2 * MIB, 8 * MIB))

        async def flood() -> None:
            nonlocal refused, written, worst_growing
            while loop.now_s < until_s:
                try:
                    await world.write(FLOOD, dice.randrange(MIB // 4, 3 * MIB), takes_s=dice.uniform(0.02, 0.2))
                    written += 1
                except Overloaded:
                    refused += 1
                    await asyncio.sleep(dice.uniform(0.1, 1))
                worst_growing = max(worst_growing, world.growing)

        async def good() -> float:
            worst_s = 0.0
            while loop.now_s < until_s + 20:
                began_s = loop.now_s
                await world.write(OTHER, 20_000, takes_s=0.01)
                worst_s = max(worst_s, loop.now_s - began_s)
                await asyncio.sleep(dice.uniform(0.01, 0.2))
            return worst_s

        flushing = asyncio.ensure_future(flush())
        floods = [asyncio.ensure_future(flood()) for _ in range(20)]
        worst_s = await good()
        await asyncio.gather(*floods)
        flushing.cancel()
        assert worst_s <= 0.22 and refused > 0 and written > 100
        high = world.admission.pressure.growing
        assert worst_growing <= high.high + 4 * MIB
        assert world.admission.look() is Level.ACCEPT
        await world.write(FLOOD, 3 * MIB)

    simulated(script)


def test_refusing_for_resident_memory_ends_with_a_calm() -> None:
    """Memory that does not fall below its low mark, as after fragmentation, does not lock inserts out for ever."""

    async def script(world: World, loop: SimLoop) -> None:
        world.resident = 950 * MIB
        with pytest.raises(MemoryShort, match="resident 950 MiB"):
            await world.write(FLOOD, 1000)
        world.resident = 900 * MIB
        for _ in range(int(CALM_S) + 1):
            await asyncio.sleep(1)
            world.admission.look()
        await world.write(FLOOD, 1000)

    simulated(script)


def test_labels_are_bounded() -> None:
    """Refusals of thousands of collections are counted under few names."""
    metrics = Metrics()
    for number in range(5_000):
        metrics.refused("log", "memory", f"c{number}")
    lines = [one for one in metrics.render().decode().splitlines() if one.startswith("annulus_admission_refused_total")]
    assert len(lines) == COLLECTIONS_NAMED + 1
    assert any("(others)" in one and one.endswith(f" {5_000 - COLLECTIONS_NAMED:.1f}") for one in lines)


def test_limits_follow_from_memory() -> None:
    """A small machine has small budgets: growing rows and bodies get a sixteenth, whatever the settings say."""

    async def script(world: World, loop: SimLoop) -> None:
        clock, metrics = SimClock(loop), Metrics()
        small = Admission(Settings(), clock, metrics, memory=Memory(1 << 30, lambda: 0))
        assert small.memory_bytes_max == 768 * MIB and small.growing_bytes_max == 48 * MIB
        assert small.requests.queue.limit == 64 * MIB == small.bodies.queue.limit
        assert small.log.queue.limit == 24 * MIB
        large = Admission(Settings(), clock, metrics, memory=Memory(1 << 40, lambda: 0))
        assert large.growing_bytes_max == 1 << 30 and large.requests.queue.limit == 256 * MIB
        unknown = Admission(Settings(), clock, metrics)
        assert unknown.memory_bytes_max == 0 and unknown.pressure.resident is None

    simulated(script)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"memory_low_ratio": 0.83}, "admission.memory_low_ratio: must be below admission.memory_slow_ratio"),
        ({"memory_slow_ratio": 0.9}, "admission.memory_slow_ratio: must be below admission.memory_high_ratio"),
        ({"memory_bytes_max": 1 << 20}, "admission.memory_bytes_max: is less than a node without rows needs"),
        ({"share_ratio": 1.5}, "admission.share_ratio: 1.5 is above the most allowed"),
        ({"wait_s_max": 0.0}, "admission.wait_s_max: 0 is below the least allowed"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, float], words: str) -> None:
    """Marks in the wrong order, and a limit below what an empty node takes, are refused with the reason."""
    with pytest.raises(SettingsError) as caught:
        Settings(admission=replace(AdmissionSettings(), **wrong))  # type: ignore[arg-type]
    assert words in str(caught.value)
