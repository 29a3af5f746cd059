"""A run: rounds of load and faults, each ended by calm, in which every node is held against what was acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from node.service import Consistency
from tools.bench.loading import REPOSITORY
from tools.bench.wire import Address
from tools.chaos.faults import FAULTS, Planned, plan
from tools.chaos.fleet import ATTEMPT_S_MAX, PATIENCE_S, Fleet, Outcome
from tools.chaos.machines import Machines
from tools.chaos.registers import CLIENTS, SUBJECT, Registers
from tools.crash.api import NOT_LOADED_CODES, REFUSED_CODES, Answered, Caller, Unknown
from tools.crash.clients import WRITERS, World, keeper, reader, scratch_keeper, writer
from tools.crash.model import Kind, Model
from tools.crash.rows import SUBJECTS, Subject, vector
from tools.crash.trace import Trace
from tools.crash.verify import SCORE_ERROR_MAX, prepare, verify
from tools.environment import Failure

ROUND_S = 45.0
SETTINGS: Final[Mapping[str, str]] = {
    "shards": "3",
    "storage.segment_bytes_max": "64KiB",
    "storage.growing_bytes_max": "1MiB",
    "storage.segment_age_s_max": "5",
    "storage.segment_idle_s_max": "2",
    "storage.checkpoint_interval_s": "2",
    "storage.journal_file_bytes_max": "128KiB",
    "storage.journal_bytes_max": "1MiB",
    "compaction.interval_s": "1",
    "compaction.segments_min": "2",
    "index.rows_min": "64",
}
"""Nodes seal, build, compact, checkpoint and cut their journals all the time."""
ZONES = 3
"""Of a run with churn."""
HEAL_S_MAX = 60.0
"""After the last fault every node must answer Strong reads within this time."""
VERIFY_S_MAX = 30.0
"""An attempt of a verifying read: scans are long."""
CHECK_S_MAX = 120.0


LEDGERS: Final[Sequence[Subject]] = tuple(one for one in SUBJECTS if one.name in ("crash_two", "crash_auto"))
"""Given and generated keys, two shards and one. More collections would find nothing more and slow three nodes down."""


@dataclass
class Happening:
    """A fault as it happened; times are of `time.monotonic`."""

    name: str
    began_s: float
    ended_s: float = 0.0
    note: str = ""


@dataclass
class Record:
    """What a run leaves for its report."""

    began_s: float
    seed: int
    nodes: int
    happenings: list[Happening] = field(default_factory=list)
    calm: list[tuple[float, float]] = field(default_factory=list)
    """When clients were held back to verify: nothing can be told of availability then."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Faults that were asked for and could not be, and why."""
    rounds: int = 0


class Run:
    """One cluster, its clients' memory, and what happened to both."""

    def __init__(
        self,
        folder: str,
        *,
        seed: int,
        nodes: int,
        names: Sequence[str],
        trace: Trace,
        say: Callable[[str], None],
        python: str = sys.executable,
        zones: int = 0,
        patience: float = 1.0,
        subjects: Sequence[Subject] = LEDGERS,
        settings: Mapping[str, str] = SETTINGS,
    ) -> None:
        self.world = World({subject.name: Model(subject) for subject in subjects}, trace)
        self._everything = replace(self.world, models={**self.world.models, SUBJECT.name: Model(SUBJECT)})
        """The same world with the collection that has no model of its own: the registers."""
        self.say = say
        self._chance = random.Random(f"{seed}/fleet")
        repairing = {"cluster.repair_from_peers": "true"} if nodes > 1 else {}
        settings = {**settings, **repairing}
        self.machines = Machines(
            folder,
            nodes=nodes,
            settings=settings,
            complain=self._died,
            python=python,
            zones=zones,
            patience=patience,
        )
        self.machines.watchers.append(self._came_or_went)
        self.fleet = Fleet(self.machines.addresses, self._chance)
        self._ones = {name: self._one(name, address) for name, address in self.machines.addresses.items()}
        self.record = Record(time.monotonic(), seed, nodes)
        missing = {name: FAULTS[name].missing(self.machines) for name in names}
        self.record.skipped = {name: why for name, why in missing.items() if why}
        self.names = [name for name, why in missing.items() if not why]

    @property
    def sound(self) -> bool:
        """True as long as no promise is broken."""
        return not self.world.violations

    async def go(self, seconds: float) -> None:
        """Run rounds with load for so long in all, verification not counted; stop at the first broken promise."""
        async with self._surroundings():
            rounds = max(1, round(seconds / ROUND_S))
            while self.sound and self.record.rounds < rounds:
                self.record.rounds += 1
                await self._round(seconds / rounds)
            if self.sound:
                await self.machines.stop()
                for name in list(self.machines.names):
                    await self._check(name)

    @contextlib.asynccontextmanager
    async def _surroundings(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.machines.abandon)
            try:
                await self.machines.start()
                self._stack = stack
                for one in (self.fleet, *self._ones.values()):
                    await stack.enter_async_context(one.connected())
                stack.push_async_callback(_cancelled, asyncio.create_task(self.machines.watch()))
                await prepare(self._everything, next(iter(self._ones.values())))
                self.record.began_s = time.monotonic()
                yield
            except Failure as failure:
                self.world.complain(Kind.PROCESS, "cluster", str(failure))
            except (Answered, Unknown) as error:
                self.world.complain(Kind.PROCESS, "cluster", f"not usable: {error}")

    # one round

    async def _round(self, seconds: float) -> None:
        number = self.record.rounds
        self.world.trace.round = number
        seed = f"{self.record.seed}/{number}"
        began_s = time.monotonic()
        registers = Registers(self.world, number)
        clients = self._everybody(registers, seed)
        faults = [asyncio.create_task(self._follow(one, began_s)) for one in plan(seed, seconds, self.names)]
        while time.monotonic() < began_s + seconds and self.sound:  # noqa: ASYNC110  anybody may complain
            await asyncio.sleep(0.05)
        for fault in faults:
            if not self.sound:
                fault.cancel()
        _raise_all(await asyncio.gather(*faults, return_exceptions=True))
        calm_s = time.monotonic()
        await self.fleet.pause()
        for client in clients:
            client.cancel()
        _raise_all(await asyncio.gather(*clients, return_exceptions=True))
        if self.sound:
            await self._verify(registers, random.Random(f"{seed}/verify"))
        self.fleet.go_on()
        self.record.calm.append((calm_s, time.monotonic()))

    def _everybody(self, registers: Registers, seed: str) -> list[asyncio.Task[None]]:
        world, fleet = self.world, self.fleet
        work: list[Callable[[], Coroutine[None, None, None]]] = []

        def add(client: Callable[..., Coroutine[None, None, None]], *arguments: Any) -> None:
            work.append(lambda: client(*arguments))

        add(scratch_keeper, world, fleet, random.Random(f"{seed}/scratch"))
        for model in self.world.models.values():
            name = model.subject.name
            for w in range(WRITERS):
                add(writer, world, model, fleet, random.Random(f"{seed}/{name}/writer{w}"), w)
            add(reader, world, model, fleet, random.Random(f"{seed}/{name}/reader"))
            add(keeper, world, model, fleet, random.Random(f"{seed}/{name}/keeper"))
            add(browser, world, model, fleet, random.Random(f"{seed}/{name}/browser"))
        for c in range(CLIENTS):
            add(registers.client, f"c{c}", fleet, random.Random(f"{seed}/register{c}"))
        return [asyncio.create_task(_for_ever(one)) for one in work]

    async def _follow(self, planned: Planned, began_s: float) -> None:
        """Let one fault happen."""
        await asyncio.sleep(max(0.0, began_s + planned.at_s - time.monotonic()))
        happening = Happening(planned.name, time.monotonic())
        self.record.happenings.append(happening)
        try:
            async with FAULTS[planned.name].recipe(self.machines, random.Random(planned.seed)) as note:
                happening.note = note
                happening.began_s = self.machines.held_since_s() or happening.began_s
                self.say(f"{planned.name}: {note}, {planned.lasts_s:.1f} s")
                self.world.trace.write("fault", name=planned.name, note=note, lasts_s=planned.lasts_s)
                await asyncio.sleep(planned.lasts_s)
        except Failure as failure:
            self.world.complain(Kind.PROCESS, planned.name, str(failure))
        finally:
            happening.ended_s = time.monotonic()
            self.world.trace.write("healed", name=planned.name)

    # holding it to its word

    async def _verify(self, registers: Registers, chance: random.Random) -> None:
        """Let everything heal, then compare each node with the models, and the nodes through them with each other."""
        unsure = [one.ended_s for one in self.fleet.requests[-2000:] if one.outcome is Outcome.UNKNOWN]
        faults = [one.ended_s for one in self.record.happenings]
        # What a node began to do for a client that has gone, it does within the request's time limit.
        late_s = max([*unsure, *faults], default=0.0) + ATTEMPT_S_MAX + 1.0 - time.monotonic()
        await asyncio.sleep(max(0.0, late_s))
        heal_s_max = HEAL_S_MAX * self.machines.patience
        try:
            await self.machines.ready_all()
            if self.machines.proxies is not None:
                await self.machines.whole()
            await asyncio.wait_for(self._whole(), heal_s_max)
            for number, (name, node) in enumerate(self._ones.items()):
                if number == 0:
                    await prepare(self._everything, node)
                self.say(f"verifying {name}")
                before = len(self.world.violations)
                await verify(self.world, node, chance)
                self._name_node(before, name)
                await registers.read(f"verifier of {name}", node, Consistency.STRONG)
        except Failure as failure:
            self.world.complain(Kind.PROCESS, "healing", str(failure))
        except TimeoutError:
            self.world.complain(Kind.PROCESS, "healing", f"not all nodes serve {heal_s_max:.0f} s after the last fault")
        except (Answered, Unknown) as error:
            self.world.complain(Kind.PROCESS, "verification", str(error))
        registers.judge()

    async def _whole(self) -> None:
        """Return when every node answers a Strong count of every collection."""
        for node in self._ones.values():
            for name in self._everything.models:
                await _until_answered(lambda node=node, name=name: _count(node, name))  # type: ignore[misc]

    def _name_node(self, first: int, name: str) -> None:
        """Say in violations from the `first` on which node showed them."""
        found = self.world.violations[first:]
        self.world.violations[first:] = [type(one)(one.kind, f"{one.where} on {name}", one.text) for one in found]

    async def _check(self, name: str) -> None:
        """Run `annulus check` on the directory of an ended node."""
        command = [str(self.machines.cluster.python), "-m", "node", "check", self.machines.data_dir(name)]
        done = await asyncio.to_thread(
            subprocess.run, command, cwd=REPOSITORY, capture_output=True, text=True, timeout=CHECK_S_MAX,
            env=self.machines.cluster.environment,
        )  # fmt: skip
        self.world.trace.write("check", node=name, code=done.returncode)
        if done.returncode != 0:
            self.world.complain(Kind.CHECK, name, f"exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")

    async def _came_or_went(self, name: str, address: Address | None) -> None:
        if address is None:
            self.fleet.forget(name)
            del self._ones[name]
        else:
            await self.fleet.add(name, address)
            self._ones[name] = self._one(name, address)
            await self._stack.enter_async_context(self._ones[name].connected())

    def _one(self, name: str, address: Address) -> Fleet:
        """Return a client of one node alone."""
        patience = self.machines.patience
        return Fleet(
            {name: address},
            self._chance,
            attempt_s_max=VERIFY_S_MAX * patience,
            patience_s=PATIENCE_S * patience,
        )

    def _died(self, name: str, text: str) -> None:
        self.world.complain(Kind.PROCESS, name, text)


async def browser(world: World, model: Model, api: Caller, chance: random.Random) -> None:
    """Search at the weaker levels until there is no answer: what is found was written, and has its true score."""
    subject = model.subject
    while True:
        await asyncio.sleep(chance.uniform(0, 0.06))
        known = sorted(model.rows.items() | model.gone.items())
        if not known:
            continue
        query = vector(subject, *chance.choice(known))
        level = chance.choice((Consistency.BOUNDED, Consistency.BOUNDED, Consistency.EVENTUALLY))
        try:
            hits = await api.call(
                "/entities/search",
                collectionName=subject.name,
                data=[query],
                annsField="vector",
                limit=10,
                outputFields=["key", "version"],
                consistencyLevel=str(level),
            )
        except Unknown:
            return
        except Answered as answered:
            if answered.code not in REFUSED_CODES | NOT_LOADED_CODES:
                world.complain(Kind.REFUSED, subject.name, f"search at {level}: {answered}")
            continue
        world.reads += 1
        shown = [subject.key_of(hit["key"]) for hit in hits]
        if len(set(shown)) < len(shown):
            world.complain(Kind.SEARCH, subject.name, f"a key is shown twice at {level}: {shown}")
        for key, hit in zip(shown, hits, strict=True):
            there = np.array(vector(subject, key, int(hit["version"])), dtype=np.float64)
            true = float(((there - np.array(query)) ** 2).sum())
            if abs(true - hit["distance"]) > SCORE_ERROR_MAX * max(1.0, true):
                text = f"key {key} in version {hit['version']} scored {hit['distance']} at {level}, is {true}"
                world.complain(Kind.SEARCH, subject.name, text)


async def _for_ever(client: Callable[[], Coroutine[None, None, None]]) -> None:
    """Clients end when an answer is missing; here another begins in their place."""
    while True:
        await client()
        await asyncio.sleep(0.05)


async def _count(node: Fleet, name: str) -> Any:
    return await node.call(
        "/entities/query", collectionName=name, filter="", outputFields=["count(*)"], consistencyLevel="Strong"
    )


async def _until_answered(ask: Callable[[], Awaitable[Any]]) -> None:
    while True:
        try:
            await ask()
            return
        except Unknown:
            await asyncio.sleep(0.2)
        except Answered as answered:
            if answered.code in NOT_LOADED_CODES:
                return  # `prepare` sees to that
            if answered.code not in REFUSED_CODES:
                raise
            await asyncio.sleep(0.2)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _raise_all(results: Sequence[object]) -> None:
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


def folder_of(folder: str) -> str:
    """Return the folder as an absolute path, made if missing."""
    whole = os.path.abspath(folder)
    os.makedirs(whole, exist_ok=True)
    return whole
