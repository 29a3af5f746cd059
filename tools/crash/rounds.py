"""Start, let clients work, end the process at a random moment, look at the directory, start again, compare."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tools.bench.client import Client
from tools.bench.loading import REPOSITORY
from tools.bench.node import NodeDied, NodeProcess, free_address
from tools.crash.api import Answered, Api, Unknown
from tools.crash.clients import World, everybody
from tools.crash.model import Kind, Model
from tools.crash.rows import SUBJECTS, Subject
from tools.crash.trace import Trace
from tools.crash.verify import prepare, verify

SMALL: Final[Mapping[str, str]] = {
    "ANNULUS_SHARDS": "3",
    "ANNULUS_STORAGE_SEGMENT_BYTES_MAX": "64KiB",
    "ANNULUS_STORAGE_GROWING_BYTES_MAX": "512KiB",
    "ANNULUS_STORAGE_SEGMENT_AGE_S_MAX": "2",
    "ANNULUS_STORAGE_SEGMENT_IDLE_S_MAX": "1",
    "ANNULUS_STORAGE_CHECKPOINT_INTERVAL_S": "0.4",
    "ANNULUS_STORAGE_JOURNAL_FILE_BYTES_MAX": "128KiB",
    "ANNULUS_STORAGE_JOURNAL_BYTES_MAX": "1MiB",
    "ANNULUS_COMPACTION_INTERVAL_S": "0.2",
    "ANNULUS_COMPACTION_SEGMENTS_MIN": "2",
    "ANNULUS_INDEX_ROWS_MIN": "32",
}
"""Settings that make a node seal, build, compact and checkpoint all the time."""
LOAD_S = (0.3, 2.5)
STARTUP_S = (0.02, 1.2)
"""When a start is killed: from the imports to the first requests."""
END_S_MAX = 60
CHECK_S_MAX = 120


@dataclass(frozen=True)
class Ending:
    """How a round's process ends."""

    after_s: float
    gently: bool
    """SIGTERM first."""
    cut_short_s: float | None
    """SIGKILL this long after SIGTERM."""
    starts_killed_s: Sequence[float]
    """How long each of the next starts may run before it is killed."""

    @staticmethod
    def drawn(chance: random.Random) -> Ending:
        """Return how a round ends, by chance."""
        how = chance.random()
        starts = [chance.uniform(*STARTUP_S) for _ in range(chance.choice((1, 2, 3)) if chance.random() < 0.25 else 0)]
        return Ending(
            after_s=chance.uniform(*LOAD_S),
            gently=how < 0.25,
            cut_short_s=chance.uniform(0, 0.5) if how < 0.10 else None,
            starts_killed_s=starts,
        )

    def __str__(self) -> str:
        how = "SIGKILL" if not self.gently else "SIGTERM"
        if self.cut_short_s is not None:
            how += f" and SIGKILL {self.cut_short_s:.2f} s later"
        starts = f", {len(self.starts_killed_s)} starts killed" if self.starts_killed_s else ""
        return f"{how} after {self.after_s:.2f} s{starts}"


class Arena:
    """A node on one directory, its clients' memory, and the rounds that they go through."""

    def __init__(
        self,
        folder: str,
        seed: int,
        trace: Trace,
        say: Callable[[str], None],
        *,
        node_module: str = "node",
        subjects: Sequence[Subject] = SUBJECTS,
    ) -> None:
        self.folder = folder
        self.data_dir = os.path.join(folder, "data")
        self.seed = seed
        self.world = World({subject.name: Model(subject) for subject in subjects}, trace)
        self._say = say
        self._node_module = node_module
        log_path = os.path.join(folder, "node.log")
        self.node = NodeProcess(self.data_dir, free_address(), log_path=log_path, environment=SMALL, module=node_module)

    @property
    def sound(self) -> bool:
        """True as long as no promise is broken."""
        return not self.world.violations

    async def run(self, rounds: int) -> None:
        """Go through rounds until one shows a broken promise, then stop with the node ended and the directory kept."""
        try:
            if await self.start(random.Random(f"{self.seed}/start")):
                for number in range(1, rounds + 1):
                    await self.round(number)
                    if not self.sound:
                        return
                await self.end(Ending(0.0, gently=True, cut_short_s=None, starts_killed_s=()))
                self.check()
        finally:
            self.node.kill()

    async def round(self, number: int) -> None:
        """Work, end, check, start, compare."""
        world, chance = self.world, random.Random(f"{self.seed}/{number}")
        world.trace.round = number
        ending = Ending.drawn(chance)
        before, started = world.acknowledged, time.monotonic()
        async with Api(self.node.address) as api:
            clients = everybody(world, api, f"{self.seed}/{number}")
            await self._watch(ending.after_s)
            await self.end(ending)
            for result in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
        self.check()
        for after_s in ending.starts_killed_s:
            await self._killed_start(after_s)
        if not await self.start(chance):
            return
        rows = sum(len(model.rows) for model in world.models.values())
        writes = f"{world.acknowledged - before} writes acknowledged, {rows} rows"
        broken = "" if self.sound else ", BROKEN"
        self._say(f"round {number}: {ending}; {writes}, {time.monotonic() - started:.1f} s{broken}")

    async def start(self, chance: random.Random) -> bool:
        """Start the node and compare everything. Return False if it does not serve."""
        started = time.monotonic()
        try:
            self.node.spawn()
            await asyncio.to_thread(self.node.wait_ready)
        except (NodeDied, TimeoutError) as error:
            self.world.complain(Kind.PROCESS, "start", str(error))
            return False
        self.world.trace.write("ready", after_s=round(time.monotonic() - started, 3))
        return await self.compare(chance)

    async def compare(self, chance: random.Random) -> bool:
        """Hold the running node against the model. Return False if it does not serve."""
        try:
            async with Api(self.node.address) as api:
                await prepare(self.world, api)
                await verify(self.world, api, chance)
        except (Unknown, Answered) as error:
            self.world.complain(Kind.PROCESS, "verification", f"{error}\n{self.node.last_words()}")
            return False
        return True

    async def end(self, ending: Ending) -> None:
        """End the process as planned, and note if it does not go as it should."""
        if not self.node.running:
            return
        self.world.trace.write("end", how=str(ending))
        if not ending.gently:
            self.node.kill()
            return
        self.node.terminate()
        if ending.cut_short_s is not None:
            await asyncio.sleep(ending.cut_short_s)
            self.node.kill()
            return
        try:
            code = await asyncio.to_thread(self.node.wait_ended, END_S_MAX)
        except TimeoutError as error:
            self.world.complain(Kind.PROCESS, "SIGTERM", str(error))
            self.node.kill()
            return
        if code != 0:
            self.world.complain(Kind.PROCESS, "SIGTERM", f"exit code {code}\n{self.node.last_words()}")

    def check(self, data_dir: str | None = None) -> bool:
        """Run `node check` on the directory of the ended node, or a copy; note and return whether it is sound."""
        command = [sys.executable, "-m", self._node_module, "check", data_dir or self.data_dir]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=CHECK_S_MAX, env={**os.environ, **SMALL}
        )
        self.world.trace.write("check", code=done.returncode)
        if done.returncode != 0:
            text = f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
            self.world.complain(Kind.CHECK, data_dir or self.data_dir, text)
        return done.returncode == 0

    async def _watch(self, seconds: float) -> None:
        """Wait, but not longer than the node lives or the promises hold."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.sound:
            await asyncio.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
            if not self.node.running:
                self.world.complain(Kind.PROCESS, "while serving", f"ended by itself:\n{self.node.last_words()}")

    async def _killed_start(self, after_s: float) -> None:
        """Start the node and kill it before it has got far."""
        self.world.trace.write("killed start", after_s=round(after_s, 3))
        self.node.spawn()
        await asyncio.sleep(after_s)
        if not self.node.running:
            self.world.complain(Kind.PROCESS, "start", f"ended by itself:\n{self.node.last_words()}")
        self.node.kill()


def client_of(arena: Arena) -> Client:
    """Return a client that the model knows nothing of."""
    return Client(arena.node.address)
