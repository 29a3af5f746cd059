"""What is done to a cluster: one recipe each, begun, kept up for a while, taken back.

A recipe is a context manager: entering it does the damage and gives a line that says to whom, leaving it mends. A node
is held meanwhile, so that two faults never work on one process; those of the network add up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tools.chaos.machines import Machines, is_listed
from tools.chaos.proxy import Rule, Way
from tools.chaos.shim import Disk
from tools.environment import Failure

Recipe = Callable[[Machines, random.Random], AbstractAsyncContextManager[str]]

CLOCK_JUMP_S_MAX = 0.2
"""The drift that a cluster must bear."""
CUT = Rule(cut=True)
ENDING_S = 1.5
"""How long a node that ends because of its disk may take to be gone."""


NODES_MIN, NODES_MAX = 3, 5
"""Between them churn keeps the number of nodes."""
MOVES_WITHIN_S = 3.0
"""How long a kill of the coordinator waits for shards to move."""


class Needs(Enum):
    """Without what a recipe cannot be followed."""

    NOTHING = ""
    PEERS = "one node has no peers"
    THREE = "with fewer than three nodes no shard has three copies"
    ZONES = "nodes have no zones, which they have in a run with churn"
    SHIM = "needs a C compiler (cc), for the library that stands before a node's disk and clock"


@dataclass(frozen=True)
class Fault:
    """A recipe, what it does in a sentence, and how long it is kept up."""

    name: str
    sentence: str
    recipe: Recipe
    lasts_s: tuple[float, float]
    needs: Needs
    churns: bool = False
    """Nodes come and go: only where that is asked for."""

    def missing(self, machines: Machines) -> str:
        """Return why the recipe cannot be followed here, "" if it can."""
        lacks = {
            Needs.PEERS: machines.proxies is None,
            Needs.THREE: len(machines.names) < NODES_MIN,
            Needs.ZONES: not machines.zones,
            Needs.SHIM: not machines.controls,
        }
        return self.needs.value if lacks.get(self.needs, False) else ""


FAULTS: dict[str, Fault] = {}


def fault(
    name: str,
    sentence: str,
    *,
    lasts_s: tuple[float, float] = (1.0, 6.0),
    needs: Needs = Needs.NOTHING,
    churns: bool = False,
) -> Callable[[Callable[[Machines, random.Random], AsyncIterator[str]]], Recipe]:
    """Enter a generator into `FAULTS`: up to its yield it breaks, after it mends, whatever happens."""

    def enter(generator: Callable[[Machines, random.Random], AsyncIterator[str]]) -> Recipe:
        recipe = contextlib.asynccontextmanager(generator)
        FAULTS[name] = Fault(name, sentence, recipe, lasts_s, needs, churns)
        return recipe

    return enter


# --- processes ---------------------------------------------------------------------------------------------------


@fault("kill-leader", "kill -9 of a node that leads a shard; it starts again after a while", lasts_s=(0.2, 6.0))
async def kill_leader(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with _killed(machines, chance, leader=True) as told:
        yield told


@fault("kill-follower", "kill -9 of the node that leads the fewest shards; it starts again after a while",
       lasts_s=(0.2, 6.0))  # fmt: skip
async def kill_follower(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with _killed(machines, chance, leader=False) as told:
        yield told


@fault("kill-all", "kill -9 of all nodes at the same moment, as when a room loses its power", lasts_s=(0.1, 1.5))
async def kill_all(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.all_held():
        await asyncio.gather(*(machines.kill(name) for name in machines.names))
        try:
            yield "all nodes"
        finally:
            for name in chance.sample(machines.names, len(machines.names)):
                machines.revive(name)
                await asyncio.sleep(chance.uniform(0, 0.5))


@fault("pause-leader", "SIGSTOP of a node that leads a shard, SIGCONT after a while: it wakes up thinking it leads",
       lasts_s=(0.2, 8.0))  # fmt: skip
async def pause_leader(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with _paused(machines, chance, leader=True) as told:
        yield told


@fault("pause-any", "SIGSTOP of any node, SIGCONT after a while", lasts_s=(0.2, 8.0))
async def pause_any(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with _paused(machines, chance, leader=None) as told:
        yield told


@fault("stutter", "SIGSTOP and SIGCONT of a node again and again, as on a machine that swaps", lasts_s=(2.0, 8.0))
async def stutter(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance) as victim:

        async def stop_and_go() -> None:
            while True:
                machines.signal(victim, signal.SIGSTOP)
                await asyncio.sleep(chance.uniform(0.05, 0.9))
                machines.signal(victim, signal.SIGCONT)
                await asyncio.sleep(chance.uniform(0.05, 0.5))

        async with _meanwhile(stop_and_go()):
            try:
                yield victim
            finally:
                machines.signal(victim, signal.SIGCONT)
        machines.signal(victim, signal.SIGCONT)


@fault("stop-leader", "SIGTERM of a node that leads a shard: it hands over, drains and ends, and is started again",
       lasts_s=(0.2, 4.0))  # fmt: skip
async def stop_leader(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance, leader=True) as victim:
        led = _led(machines, victim)
        await machines.terminate(victim)
        try:
            yield led
        finally:
            machines.revive(victim)


@fault("rolling-restart", "SIGTERM of one node after the other, each started and ready before the next",
       lasts_s=(0.0, 0.5))  # fmt: skip
async def rolling_restart(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.all_held():
        order = chance.sample(machines.names, len(machines.names))
        for name in order:
            await machines.terminate(name)
            machines.revive(name)
            await machines.ready(name)
        yield ", ".join(order)


@fault("lost-disk", "kill -9 of a node whose data directory is then empty: it comes back without a memory",
       lasts_s=(0.0, 3.0), needs=Needs.PEERS)  # fmt: skip
async def lost_disk(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.all_held():  # a majority must keep its disks until this one is whole again
        founders = [name for name in machines.names if name in machines.cluster.founders]
        if len(founders) < 2:  # its list names nobody else who is there: `replace` is what happens to it
            yield "spared: no other node is left of those that formed the cluster"
            return
        victim = chance.choice(founders)
        led = _led(machines, victim)
        await machines.ready_all()
        await machines.kill(victim)
        machines.wipe(victim)
        try:
            yield led
        finally:
            machines.revive(victim)
        await machines.ready_all()


@fault("bit-rot", "kill -9 of a node in whose journal a byte then changes: it takes everything from the others",
       lasts_s=(0.0, 3.0), needs=Needs.PEERS)  # fmt: skip
async def bit_rot(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.all_held():
        victim = chance.choice(machines.names)
        led = _led(machines, victim)
        await machines.ready_all()
        await machines.kill(victim)
        damaged = machines.flip(victim, chance)
        try:
            yield f"{led}, {damaged}"
        finally:
            machines.revive(victim)
        await machines.ready_all()


@fault("chunk-rot", "bytes of a running node's chunks change: it takes them from the others, whoever reads meanwhile",
       lasts_s=(0.5, 4.0), needs=Needs.PEERS)  # fmt: skip
async def chunk_rot(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.all_held():  # the others must have what this one loses
        victim = next(iter(machines.rotten), chance.choice(machines.names))  # never two that may lose everything
        await machines.ready_all()
        machines.rotten.add(victim)
        damaged = machines.rot(victim, chance)
        try:
            yield f"{_led(machines, victim)}, {damaged}"
        finally:
            finding = await machines.healed(chance.choice([one for one in machines.names if one != victim]))
            machines.notice()
        await machines.ready_all()
        if finding == "damaged":
            machines.complain(victim, f"chunks stay damaged after a check of the cluster: {damaged}")


# --- nodes that come and go --------------------------------------------------------------------------------------


@fault("join", "a blank node joins and takes its share of the shards, while there are fewer than five", churns=True,
       lasts_s=(1.0, 8.0), needs=Needs.THREE)  # fmt: skip
async def join(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.churning:
        if len(machines.names) >= NODES_MAX:
            yield f"not done: there are {NODES_MAX} nodes"
            return
        yield await _joined(machines, chance)


@fault("drain-remove", "a node is drained, removed when it holds nothing, and stopped; of three once a fourth joined",
       churns=True, lasts_s=(1.0, 5.0), needs=Needs.THREE)  # fmt: skip
async def drain_remove(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.churning:
        victim = chance.choice(machines.names)
        come = ""
        if len(machines.names) <= NODES_MIN:
            come = f", after {await _joined(machines, chance)} came"
        led = _led(machines, victim)
        await machines.asked("drain", nodeName=victim)
        try:
            yield led + come
        finally:
            await machines.until(f"{victim} is drained", lambda found: _is_empty(found, victim))
            await machines.removed(victim)
            async with machines.held_here([victim]):
                await machines.terminate(victim)
                await machines.part(victim)


@fault("replace", "kill -9 of a node whose disk is lost for good; a blank node of another name takes its place",
       churns=True, lasts_s=(0.5, 5.0), needs=Needs.THREE)  # fmt: skip
async def replace(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.all_held():  # a majority must keep its disks until this one's copies are made again
        victim = chance.choice(machines.names)
        led = _led(machines, victim)
        await machines.ready_all()
        await machines.whole()
        await machines.kill(victim)
        machines.wipe(victim)
        await machines.part(victim)
        heir = await machines.join(chance.choice(machines.names), replaces=victim)
        try:
            yield f"{led}, by {heir}"
        finally:
            await machines.until(f"{heir} instead of {victim}", lambda found: not is_listed(found, victim))
            await machines.whole()


@fault("zone-loss", "kill -9 of all nodes of a zone; they start again after a while", churns=True, lasts_s=(0.5, 6.0),
       needs=Needs.ZONES)  # fmt: skip
async def zone_loss(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    zone = chance.choice(sorted({machines.zone_of(name) for name in machines.names}))
    async with machines.churning:
        victims = [name for name in machines.names if machines.zone_of(name) == zone]
        async with machines.held_here(victims):
            await asyncio.gather(*map(machines.kill, victims))
            try:
                yield f"{zone}: {', '.join(victims)}"
            finally:
                for name in victims:
                    machines.revive(name)


@fault("coordinator", "kill -9 of the node that leads the control group, if that is possible while shards move",
       churns=True, lasts_s=(0.2, 5.0), needs=Needs.THREE)  # fmt: skip
async def coordinator(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    with contextlib.suppress(Failure):
        await machines.until("moves", lambda found: bool(found["moves"]), within_s=MOVES_WITHIN_S)
    victim = await machines.control_leader() or chance.choice(machines.names)
    async with machines.held_here([victim]):
        if victim not in machines.names:
            yield "not done: it has gone meanwhile"
            return
        await machines.kill(victim)
        try:
            yield victim
        finally:
            machines.revive(victim)


@fault("pause-moves", "an operator pauses moves of shards, and lets them go on after a while", churns=True,
       needs=Needs.THREE)  # fmt: skip
async def pause_moves(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    await machines.asked("pause_moves")
    try:
        yield "paused"
    finally:
        await machines.asked("resume_moves")


# --- the network -------------------------------------------------------------------------------------------------


@fault("isolate-leader", "a node that leads a shard hears nobody and is heard by nobody", needs=Needs.PEERS,
       lasts_s=(1.0, 10.0))  # fmt: skip
async def isolate_leader(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance, leader=True) as victim:
        with machines.disturbed(_around(machines, victim), CUT):
            yield _led(machines, victim)


@fault("isolate-any", "a node hears nobody and is heard by nobody", needs=Needs.PEERS, lasts_s=(1.0, 10.0))
async def isolate_any(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance) as victim:
        with machines.disturbed(_around(machines, victim), CUT):
            yield victim


@fault("deaf", "a node that leads a shard is heard and hears nobody: a partition of one direction", needs=Needs.PEERS)
async def deaf(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance, leader=True) as victim:
        with machines.disturbed(machines.ways(machines.names, [victim]), CUT):
            yield _led(machines, victim)


@fault("mute", "a node that leads a shard hears and is heard by nobody: the other direction", needs=Needs.PEERS)
async def mute(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance, leader=True) as victim:
        with machines.disturbed(machines.ways([victim], machines.names), CUT):
            yield _led(machines, victim)


@fault("bridge", "two nodes do not hear each other, while the others hear both", needs=Needs.PEERS, lasts_s=(1.0, 10.0))
async def bridge(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    pair = chance.sample(machines.names, 2)
    with machines.disturbed(machines.ways(pair, pair), CUT):
        yield " | ".join(pair)


@fault("halves", "the nodes fall into two groups that do not hear each other", needs=Needs.PEERS, lasts_s=(1.0, 10.0))
async def halves(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    order = chance.sample(machines.names, len(machines.names))
    here, there = order[: len(order) // 2], order[len(order) // 2 :]
    with machines.disturbed(machines.ways(here, there) + machines.ways(there, here), CUT):
        yield f"{', '.join(here)} | {', '.join(there)}"


@fault("flapping", "a node is cut off and back again, several times a second", needs=Needs.PEERS, lasts_s=(2.0, 8.0))
async def flapping(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance) as victim:

        async def flap() -> None:
            while True:
                with machines.disturbed(_around(machines, victim), CUT):
                    await asyncio.sleep(chance.uniform(0.05, 1.2))
                await asyncio.sleep(chance.uniform(0.05, 0.6))

        async with _meanwhile(flap()):
            yield victim


@fault("delay", "what goes between nodes arrives 20 to 250 ms late", needs=Needs.PEERS, lasts_s=(2.0, 8.0))
async def delay(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    rule = Rule(delay_s=chance.uniform(0.02, 0.25))
    with machines.disturbed(machines.ways(machines.names, machines.names), rule):
        yield f"{rule.delay_s * 1000:.0f} ms between all"


@fault("throttle", "one node has a thin line: 20 to 500 kB/s each way", needs=Needs.PEERS, lasts_s=(2.0, 8.0))
async def throttle(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance) as victim:
        rule = Rule(bytes_per_s=chance.uniform(20_000, 500_000))
        with machines.disturbed(_around(machines, victim), rule):
            yield f"{victim}, {rule.bytes_per_s / 1000:.0f} kB/s"


@fault("reset", "connections between nodes break again and again, with what was under way on them", needs=Needs.PEERS,
       lasts_s=(2.0, 8.0))  # fmt: skip
async def reset(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async def break_them() -> None:
        ways = machines.ways(machines.names, machines.names)
        while True:
            assert machines.proxies is not None
            machines.proxies.reset(chance.sample(ways, chance.randint(1, len(ways))))
            await asyncio.sleep(chance.uniform(0.05, 1.5))

    async with _meanwhile(break_them()):
        yield "between all"


# --- disk and clock ----------------------------------------------------------------------------------------------


@fault("full-disk", "a node's disk has no room left: writes fail with ENOSPC", needs=Needs.SHIM, lasts_s=(2.0, 8.0))
async def full_disk(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with _disk(machines, chance, Disk.FULL) as told:
        yield told


@fault("failing-disk", "a node's fsync fails with EIO: it must end or stand aside, never acknowledge", needs=Needs.SHIM,
       lasts_s=(1.0, 5.0))  # fmt: skip
async def failing_disk(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with _disk(machines, chance, Disk.SYNC_FAILS) as told:
        yield told


@fault("slow-disk", "each fsync of a node takes 20 to 400 ms more", needs=Needs.SHIM, lasts_s=(2.0, 8.0))
async def slow_disk(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance, leader=chance.choice((True, None))) as victim:
        delay_ms = chance.randrange(20, 400)
        machines.controls[victim].set(sync_delay_ms=delay_ms)
        try:
            yield f"{victim}, {delay_ms} ms"
        finally:
            machines.controls[victim].set(sync_delay_ms=0)


@fault("clock-jump", "a node's wall clock jumps by up to 200 ms, forth or back, and later back again", needs=Needs.SHIM)
async def clock_jump(machines: Machines, chance: random.Random) -> AsyncIterator[str]:
    async with machines.held(chance, leader=chance.choice((True, None))) as victim:
        jump_s = chance.uniform(-CLOCK_JUMP_S_MAX, CLOCK_JUMP_S_MAX)
        machines.controls[victim].set(clock_s=jump_s)
        try:
            yield f"{victim}, {jump_s * 1000:+.0f} ms"
        finally:
            machines.controls[victim].set(clock_s=0.0)


# --- parts -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _killed(machines: Machines, chance: random.Random, *, leader: bool | None) -> AsyncIterator[str]:
    async with machines.held(chance, leader=leader) as victim:
        led = _led(machines, victim)
        await machines.kill(victim)
        try:
            yield led
        finally:
            machines.revive(victim)


@contextlib.asynccontextmanager
async def _paused(machines: Machines, chance: random.Random, *, leader: bool | None) -> AsyncIterator[str]:
    async with machines.held(chance, leader=leader) as victim:
        led = _led(machines, victim)
        machines.signal(victim, signal.SIGSTOP)
        try:
            yield led
        finally:
            machines.signal(victim, signal.SIGCONT)


@contextlib.asynccontextmanager
async def _disk(machines: Machines, chance: random.Random, disk: Disk) -> AsyncIterator[str]:
    async with machines.held(chance, leader=chance.choice((True, None))) as victim:
        led = _led(machines, victim)
        machines.mortal.add(victim)
        machines.controls[victim].set(disk=disk)
        try:
            yield led
        finally:
            machines.controls[victim].set(disk=Disk.FINE)
            await asyncio.sleep(ENDING_S)
            machines.notice()
            machines.revive(victim)
            machines.mortal.discard(victim)


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Let something go on until the block is left."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _joined(machines: Machines, chance: random.Random) -> str:
    """Have a blank node join; the one that it asks is spared meanwhile, else it is right to give up."""
    async with machines.held(chance) as by:
        return await machines.join(by)


def _is_empty(found: Any, name: str) -> bool:
    """Return whether a node holds nothing, and no longer votes in the control group."""
    return not any(one["shards"] or one["coming"] or one["votes"] for one in found["nodes"] if one["name"] == name)


def _around(machines: Machines, victim: str) -> list[Way]:
    return machines.ways([victim], machines.names) + machines.ways(machines.names, [victim])


def _led(machines: Machines, victim: str) -> str:
    shards = machines.led_by(victim)
    return f"{victim}, leads {', '.join(map(str, shards))}" if shards else victim


# --- which, and when ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A fault to come: when it begins, in seconds from the start of its round, and how long it lasts."""

    at_s: float
    lasts_s: float
    name: str
    seed: str
    """Chooses its victim and how bad it is."""


CALM_S = (1.0, 4.0)
"""Between faults: from half healed to quiet."""
SECOND_CHANCE = 0.3


def plan(seed: str, seconds: float, names: Sequence[str], table: Mapping[str, Fault] = FAULTS) -> list[Planned]:
    """Return the faults of a round in order of their beginnings: a function of these arguments.

    They come one after the other with some calm between; where several names are given, now and then a second one
    begins while the first lasts.
    """
    chance = random.Random(seed)
    planned: list[Planned] = []
    at_s = chance.uniform(*CALM_S)
    while names and at_s < seconds - CALM_S[0]:
        count = 2 if len(names) > 1 and chance.random() < SECOND_CHANCE else 1
        end_s = at_s
        begin_s = at_s
        for name in chance.sample(list(names), count):
            lasts_s = chance.uniform(*table[name].lasts_s)
            planned.append(Planned(begin_s, lasts_s, name, f"{seed}/{len(planned)}"))
            end_s = max(end_s, begin_s + lasts_s)
            begin_s += chance.uniform(0, lasts_s)
        at_s = end_s + chance.uniform(*CALM_S)
    return planned
