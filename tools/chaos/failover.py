"""How long writes wait for a new leader, and what the change costs readers: kills and stops of leaders under load.

The collection has one virtual channel for each shard. Writers insert single rows into each channel, so that whatever
group loses its leader, somebody waits for just that one; readers search at Bounded meanwhile. A channel's outage is the
longest time without an acknowledgement after the leader was told to go: a kill costs what passes until its end, a stop,
during which the old leader still serves, the time itself. Clients send to any node and know of a dead one only that it
refuses connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cluster.route import split
from tools.chaos.figures import percentile
from tools.chaos.fleet import Fleet, Kind, Outcome
from tools.chaos.machines import Machines
from tools.crash.api import Answered, Unknown
from tools.environment import Failure

NAME = "failover"
SHARDS = 4
DIM = 16
WRITERS = 3
"""Of a channel: one may hang at a node that waits itself."""
READERS = 4
PAUSE_S = 0.01
CALM_S = (0.5, 1.5)
DOWN_S = (0.5, 1.5)
WINDOW_S = 12.0
"""In which an outage must have ended; a longer one is shown as so long."""
PAGE_ROWS = 10_000
KEYS = 1_000_000
"""More than a run writes."""


@dataclass
class Outages:
    """What was measured, in seconds."""

    kills_s: list[float] = field(default_factory=list)
    stops_s: list[float] = field(default_factory=list)
    reads: int = 0
    read_repeats: dict[int, int] = field(default_factory=dict)
    """Attempts -> Bounded reads that needed so many."""
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    """Broken promises."""

    def lines(self) -> list[str]:
        """Return the figures for people."""

        def told(what: str, values: Sequence[float], then: str) -> str:
            shares = ", ".join(f"{label} {percentile(values, share):.2f} s" for label, share in SHARES)
            return f"{what}: {len(values)} times, {then} {shares}"

        more = sum(count for attempts, count in self.read_repeats.items() if attempts > 2)
        return [
            told("kill -9 of a leader", self.kills_s, "writes resumed after"),
            told("SIGTERM of a leader", self.stops_s, "writes paused for"),
            f"Bounded reads: {self.reads}, attempts needed {self.read_repeats}, {more} more than one repeat",
            f"{self.acknowledged} rows acknowledged, {', '.join(self.lost) or 'each there once, on every node'}",
        ]

    def within_goals(self) -> bool:
        """Writes resume within 2 s after a kill (p99), 0.3 s after a stop; no read needs a second repeat."""
        return (
            percentile(self.kills_s, 0.99) <= KILL_S_MAX
            and percentile(self.stops_s, 0.99) <= STOP_S_MAX
            and not any(attempts > 2 for attempts in self.read_repeats)
        )


SHARES = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
KILL_S_MAX = 2.0
STOP_S_MAX = 0.3


class Failover:
    """A cluster without proxies, its load, and what becomes of it."""

    def __init__(self, folder: str, *, seed: int, nodes: int, say: Callable[[str], None], python: str) -> None:
        self.found = Outages()
        self._say = say
        self._chance = random.Random(f"{seed}/failover")
        settings = {"shards": str(SHARDS)}
        self._machines = Machines(
            folder, nodes=nodes, settings=settings, complain=self._died, proxied=False, shimmed=False, python=python
        )
        self._fleet = Fleet(self._machines.addresses, self._chance)
        self._acknowledged: list[list[float]] = [[] for _ in range(SHARDS)]
        """When rows of each channel were acknowledged."""
        self._keys = [iter(channel) for channel in _channels()]
        self._rows: set[int] = set()
        self._unsure: set[int] = set()

    async def go(self, *, kills: int, stops: int) -> None:
        """End leaders so often; the figures are in `found`."""
        async with self._load():
            for number in range(kills):
                _, resumed_s = await self._outage(self._machines.kill)
                self.found.kills_s.append(resumed_s)
                self._say(f"kill {number + 1}: writes resumed after {resumed_s:.2f} s")
            for number in range(stops):
                paused_s, resumed_s = await self._outage(self._machines.terminate)
                self.found.stops_s.append(paused_s)
                self._say(
                    f"stop {number + 1}: writes paused for {paused_s:.2f} s, until {resumed_s:.2f} s after SIGTERM"
                )

    async def _outage(self, end: Callable[[str], Coroutine[None, None, None]]) -> tuple[float, float]:
        """End a node that leads a shard, start it again, and return the `outage` of the unluckiest channel."""
        machines = self._machines
        await machines.ready_all()
        await asyncio.sleep(self._chance.uniform(*CALM_S))
        async with machines.held(self._chance, leader=True) as victim:
            ended_s = time.monotonic()
            ending = asyncio.create_task(end(victim))
            await asyncio.sleep(self._chance.uniform(*DOWN_S))
            while not all(times and times[-1] > ended_s + 0.2 for times in self._acknowledged):
                if time.monotonic() > ended_s + WINDOW_S:
                    break
                await asyncio.sleep(0.02)
            await ending
            worst = max(outage(times, ended_s, time.monotonic()) for times in self._acknowledged)
            machines.revive(victim)
        return worst

    @contextlib.asynccontextmanager
    async def _load(self) -> AsyncIterator[None]:
        machines, fleet = self._machines, self._fleet
        tasks: list[asyncio.Task[None]] = []
        try:
            await machines.start()
            async with fleet.connected():
                tasks.append(asyncio.create_task(machines.watch()))
                await fleet.call(
                    "/collections/create", collectionName=NAME, dimension=DIM, params={"shardsNum": SHARDS}
                )
                tasks += [asyncio.create_task(self._write(c)) for c in range(SHARDS) for _ in range(WRITERS)]
                tasks += [asyncio.create_task(self._read()) for _ in range(READERS)]
                yield
                await fleet.pause()
                await machines.ready_all()
                for name in machines.names:
                    await self._look(name)
            await _ended(tasks)
            await machines.stop()
        except Failure as failure:
            self.found.lost.append(str(failure))
        except (Answered, Unknown) as error:
            self.found.lost.append(f"not usable: {error}")
        finally:
            await _ended(tasks)
            await machines.abandon()
            reads = [one for one in fleet.requests if one.kind is Kind.RELAXED]
            self.found.reads = len(reads)
            for read in reads:
                attempts = read.attempts if read.outcome is Outcome.OK else read.attempts + 1
                self.found.read_repeats[attempts] = self.found.read_repeats.get(attempts, 0) + 1
            self.found.acknowledged = len(self._rows)

    async def _write(self, channel: int) -> None:
        while True:
            key = next(self._keys[channel])
            rows = [{"id": key, "vector": [self._chance.random() for _ in range(DIM)]}]
            try:
                await self._fleet.call("/entities/insert", collectionName=NAME, data=rows)
            except Unknown:
                self._unsure.add(key)
            except Answered:
                pass
            else:
                self._rows.add(key)
                self._acknowledged[channel].append(time.monotonic())
            await asyncio.sleep(PAUSE_S)

    async def _read(self) -> None:
        while True:
            query = [self._chance.random() for _ in range(DIM)]
            with contextlib.suppress(Answered, Unknown):
                await self._fleet.call(
                    "/entities/search", collectionName=NAME, data=[query], limit=5, consistencyLevel="Bounded"
                )
            await asyncio.sleep(PAUSE_S)

    async def _look(self, name: str) -> None:
        """Compare what one node has with what was acknowledged."""
        found: list[int] = []
        most = max(self._rows | self._unsure, default=0)
        fleet = Fleet({name: self._machines.addresses[name]}, self._chance, attempt_s_max=30.0)
        async with fleet.connected():
            for first in range(0, most + 1, PAGE_ROWS):
                rows = await fleet.call(
                    "/entities/query",
                    collectionName=NAME,
                    filter=f"{first} <= id < {first + PAGE_ROWS}",
                    outputFields=["id"],
                    limit=16_384,
                    consistencyLevel="Strong",
                )
                found += [int(row["id"]) for row in rows]
        there = set(found)
        for what, keys in (("missing", self._rows - there), ("never written", there - self._rows - self._unsure)):
            if keys:
                self.found.lost.append(f"{len(keys)} rows {what} on {name}: {sorted(keys)[:5]}")
        if len(found) > len(there):
            self.found.lost.append(f"{len(found) - len(there)} rows twice on {name}")

    def _died(self, name: str, text: str) -> None:
        self.found.lost.append(f"{name}: {text}")


def _channels() -> list[list[int]]:
    """Return keys by the virtual channel that they go to."""
    keys = np.arange(KEYS, dtype=np.int64)
    return [part.tolist() for part in split(keys, SHARDS)]


def outage(times: Sequence[float], ended_s: float, now_s: float) -> tuple[float, float]:
    """Return the longest time without an acknowledgement since `ended_s`, and when it was over, from there."""
    moments = [ended_s, *(at_s for at_s in times if at_s > ended_s), now_s]
    paused_s, until_s = max((b - a, b) for a, b in pairwise(moments))
    return paused_s, until_s - ended_s


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
