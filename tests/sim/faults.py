"""What the world does to its nodes: each fault of a plan, until it is over.

Faults that make a replica forget or doubt what it has promised (`DAMAGE`) hit a minority of the nodes at a time: with
more, data is lost, and rightly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from node.broadcaster import Step as BroadcastStep
from node.scrub import Scrub
from storage.errors import JournalDamaged
from storage.journal import Journal
from storage.keys import is_record
from tests.sim.cluster import Cluster, Machine
from tests.sim.plan import ROT, Plan, Step

STOP_S: Final = 12.0
"""A graceful stop takes no longer, whatever is the matter with the others."""
DAMAGE: Final = frozenset({"rot-journal", "rot-chunk", ROT, "lose-disk"})


class Faults:
    """Carries out the faults of one plan on its cluster."""

    def __init__(self, cluster: Cluster, plan: Plan) -> None:
        self._cluster, self._plan = cluster, plan
        self._cut: list[tuple[str, str]] = []
        self.done = 0

    def start(self, steps: Sequence[Step]) -> list[asyncio.Task[None]]:
        return [self._cluster.loop.create_task(self._carry_out(one)) for one in steps if one.who == "fault"]

    async def _carry_out(self, step: Step) -> None:
        await asyncio.sleep(step.at_s)
        name = step.text("node") if "node" in step.facts else ""
        if name and (name not in self._cluster.names or self._cluster.machines[name].is_lost):
            return  # not there yet, or not any more
        machine = self._cluster.machines[name] if name else None
        if step.what in DAMAGE and not self._cluster.may_lose([name]):
            return
        rng, for_s = Random(step.dice), step.number("for") if "for" in step.facts else 0.0
        self.done += 1
        match step.what:
            case "blackout":
                await self._blackout(rng, for_s)
            case "cut":
                names = step.names("order")
                for guest in sorted(set(self._cluster.names) - set(names)):
                    names.insert(rng.randint(0, len(names)), guest)
                await self._cut_off(step.text("shape"), names, rng, for_s)
            case "reset":
                self._cluster.wire.reset(*step.names("pair"))
            case "reset-bulk":
                self._cluster.wire.reset_bulk(*step.names("pair"))
            case "die-at-step":
                await self._die_at_step(BroadcastStep[step.text("step")], int(step.number("after")), for_s)
            case "slow":
                await self._slow(step.names("order"), step.number("delay"), step.number("bytes_per_s"), for_s)
            case _:
                assert machine is not None, f"the fault {step.what} is of one node"
                await self._hit(machine, step, rng, for_s)

    async def _hit(self, machine: Machine, step: Step, rng: Random, for_s: float) -> None:
        name = machine.name
        match step.what:
            case "crash":
                await self._crash(machine, step.text("how"), rng, for_s)
            case "stop":
                if machine.database is not None:
                    await self._cluster.stop(name, within_s=STOP_S)
                    await self._start_after(name, for_s)
            case "jump":
                machine.clock.jump(int(step.number("ms")))
            case "usurp":
                await self._usurp(name, rng, for_s)
            case "pause":
                if (life := machine.life) is not None and not life.paused:
                    life.pause()
                    await asyncio.sleep(for_s)
                    life.resume()
            case "slow-disk":
                if (executor := machine.executor) is not None:
                    executor.slow_disk_s = 0.5
                    await asyncio.sleep(for_s)
                    executor.slow_disk_s = 0.0
            case "full":
                machine.store.full = True
                machine.disk.capacity_bytes = machine.disk.total_bytes + rng.randrange(2_000)
                await asyncio.sleep(for_s)
                machine.store.full, machine.disk.capacity_bytes = False, None
            case "lead":
                if machine.database is not None and machine.node is not None:
                    for host in machine.node.shards.values():
                        if host.raft.leads and machine.life is not None:
                            machine.life.start(host.hand_over(1.0))
            case "bad-sync":
                excuse = f"bad sync {step.dice}"  # another may come before this one is over
                machine.excuses.add(excuse)
                machine.disk.failing_syncs = 1
                await asyncio.sleep(for_s)
                machine.disk.failing_syncs = 0
                await asyncio.sleep(2.0)
                machine.excuses.discard(excuse)
            case "rot-journal":
                await self._while_down(machine, rng, for_s, _rot_journal)
            case "rot-chunk":
                await self._while_down(machine, rng, for_s, _rot_chunk)
            case "rot-live":
                await self._rot_meanwhile(machine, rng, for_s)
            case "lose-disk" if self._cluster.is_guest(name):  # which could not join again under its name
                self._cluster.damaged.add(name)
                self._cluster.lose(name)
            case "lose-disk":
                await self._while_down(machine, rng, for_s, lambda hurt, _: hurt.lose_disk())
            case other:
                raise ValueError(f"there is no fault {other}")

    async def _crash(self, machine: Machine, how: str, rng: Random, for_s: float) -> None:
        name, life = machine.name, machine.life
        if life is None:
            return
        if how == "mid-call":
            self._cluster.kill_in_a_call(name, rng.randint(0, 400))
            await asyncio.wait({life.ended}, timeout=2.0)
        if machine.life is life:
            self._cluster.kill(name, power=how != "kill")
        await self._start_after(name, for_s)

    async def _die_at_step(self, step: BroadcastStep, after: int, for_s: float) -> None:
        """Whoever comes to this step of a change of the catalogue next loses its power."""
        lives = {name: machine.life for name, machine in self._cluster.machines.items()}
        for name in lives:
            self._cluster.kill_at_step(name, step, after)
        ends = {life.ended for life in lives.values() if life is not None}
        if ends:
            await asyncio.wait(ends, timeout=3.0, return_when=asyncio.FIRST_COMPLETED)
        for machine in self._cluster.machines.values():
            machine.dies_at = None
        await asyncio.sleep(for_s)
        for name, life in lives.items():
            if life is None or life.is_over:  # one that was down may have come back meanwhile, and died of this
                self._cluster.start_if_down(name)

    async def _blackout(self, rng: Random, for_s: float) -> None:
        names = list(self._cluster.names)
        for name in names:
            self._cluster.kill(name, power=True)
        await asyncio.sleep(for_s)
        names = rng.sample(names, len(names))
        late_s = rng.choice((0.0, 0.5, 4.0))  # long enough for the others to go on without the last one
        for name in names[:-1]:
            await self._start_after(name, rng.choice((0.0, rng.uniform(0, 0.5))))
        await self._start_after(names[-1], rng.uniform(0.0, late_s))

    async def _usurp(self, name: str, rng: Random, for_s: float) -> None:
        """Let only one node have what is written now on its disk; then a power cut, from which it returns last."""
        everybody = list(self._cluster.names)
        others = [one for one in everybody if one != name]
        for one in others:
            if (executor := self._cluster.machines[one].executor) is not None:
                executor.slow_disk_s = 1.0
        await asyncio.sleep(for_s)
        for one in everybody:
            self._cluster.kill(one, power=True)
        for one in others:
            self._cluster.start_if_down(one)
        await self._start_after(name, rng.choice((0.0, 4.0)))

    async def _start_after(self, name: str, for_s: float) -> None:
        await asyncio.sleep(for_s)
        self._cluster.start_if_down(name)

    async def _while_down(
        self, machine: Machine, rng: Random, for_s: float, hurt: Callable[[Machine, Random], object]
    ) -> None:
        """Crash the machine, hurt its disk, start it again."""
        if not machine.is_up:
            return
        self._cluster.damaged.add(machine.name)
        machine.excuses.add("damage")
        self._cluster.kill(machine.name, power=True)
        hurt(machine, rng)
        await self._start_after(machine.name, for_s)

    async def _rot_meanwhile(self, machine: Machine, rng: Random, for_s: float) -> None:
        """Change chunks, or remove them, under a node that runs; it reads all of them after a while."""
        life, node = machine.life, machine.node
        if life is None or node is None or machine.database is None:
            return
        self._cluster.damaged.add(machine.name)
        machine.excuses.add("damage")
        for _ in range(rng.randint(1, 4)):
            chunks = [key for key in machine.store.stored_keys() if not is_record(key)]
            if chunks and rng.random() < 0.7:
                machine.store.rot(rng.choice(chunks))
            elif chunks:
                machine.store.lose(rng.choice(chunks))
        await asyncio.sleep(for_s)
        if machine.life is life:
            scrubbed = life.start(node.healing.scrubber.run(Scrub(), bytes_per_s=0, again=lambda: True))
            await asyncio.wait({scrubbed, life.ended}, return_when=asyncio.FIRST_COMPLETED)

    async def _cut_off(self, shape: str, names: Sequence[str], rng: Random, for_s: float) -> None:
        wire, first, rest = self._cluster.wire, names[0], names[1:]
        half = len(names) // 2
        pairs: list[tuple[str, str]] = []
        match shape:
            case "halves":
                pairs = [(a, b) for a in names[:half] for b in names[half:]]
            case "alone" | "flapping":
                pairs = [(first, b) for b in rest]
            case "bridge":  # the first is heard by all, who do not hear each other
                pairs = [(a, b) for i, a in enumerate(rest) for b in rest[i + 1 :]]
        ways = [*pairs, *((b, a) for a, b in pairs)]
        if shape == "one-way":
            ways = [(first, b) for b in rest] if rng.random() < 0.5 else [(b, first) for b in rest]
        until_s = self._cluster.loop.now_s + for_s
        while True:
            for a, b in ways:
                wire.cut(a, b)
            lasts_s = until_s - self._cluster.loop.now_s
            await asyncio.sleep(min(lasts_s, rng.uniform(0.1, 3.0)) if shape == "flapping" else lasts_s)
            for a, b in ways:
                wire.mend_path(a, b)
            if self._cluster.loop.now_s >= until_s - 1e-6:
                return
            await asyncio.sleep(rng.uniform(0.1, 1.0))

    async def _slow(self, names: Sequence[str], delay_s: float, bytes_per_s: float, for_s: float) -> None:
        path = self._cluster.wire.path(*names)
        before = (path.delay_s, path.bytes_per_s)
        path.delay_s, path.bytes_per_s = delay_s, bytes_per_s
        await asyncio.sleep(for_s)
        path.delay_s, path.bytes_per_s = before


def _rot_journal(machine: Machine, rng: Random) -> None:
    files = [name for name in machine.disk.list("/data/journal") if len(machine.disk.contents(f"/data/journal/{name}"))]
    if not files:
        return
    path = f"/data/journal/{rng.choice(files)}"
    whole = machine.disk.contents(path)
    machine.disk.rot(path, rng.randrange(len(whole)), flip=1 << rng.randrange(8))
    try:
        Journal.open(machine.disk.clone(), "/data/journal", file_bytes_max=65536)
    except JournalDamaged:
        return
    # The last record of all looks like the torn end of a write that nobody was told about.
    machine.disk.overwrite(path, whole)


def _rot_chunk(machine: Machine, rng: Random) -> None:
    chunks = [key for key in machine.store.stored_keys() if not is_record(key)]
    if chunks:
        machine.store.rot(rng.choice(chunks))
