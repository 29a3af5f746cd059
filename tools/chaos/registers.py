"""A few keys that everybody writes and reads at once, and every answer noted: what the consistency levels promise.

The crash test's keys have one writer each, so that what must be there is known. Here several clients replace, delete
and read the same keys; what they may see follows from the history (`tests/sim/history.py`, as in the simulation).

Each round has keys of its own, so that a history ends with its round.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from node.service import Consistency
from tests.sim.history import History, Violation, Write
from tools.chaos.faults import CLOCK_JUMP_S_MAX
from tools.chaos.fleet import Attempt, Fleet, Outcome, Session, Watch
from tools.crash.api import NOT_LOADED_CODES, REFUSED_CODES, Answered, Unknown
from tools.crash.clients import World
from tools.crash.model import Kind
from tools.crash.rows import Key, Subject, Version, differences, row

SUBJECT = Subject("chaos_registers", shards=2, index_types=("AUTOINDEX",))
CLIENTS = 4
KEYS = 8
"""Of a round."""
LEVELS: Mapping[Consistency, float] = {
    Consistency.STRONG: 0.4,
    Consistency.SESSION: 0.2,
    Consistency.BOUNDED: 0.2,
    Consistency.EVENTUALLY: 0.2,
}
"""How often each is asked for."""
SLACK_S = 0.1
"""What a stamp may be behind the moment it stands for."""


class Registers:
    """The keys of one round and what was seen of them."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self.keys = range(number * KEYS, (number + 1) * KEYS)
        channels = {SUBJECT.name: SUBJECT.shards}
        self.history = History(channels, clock_error_s=2 * CLOCK_JUMP_S_MAX + SLACK_S)

    async def client(self, name: str, fleet: Fleet, chance: random.Random) -> None:
        """Write and read until cancelled."""
        session = Session()
        while True:
            await asyncio.sleep(chance.uniform(0, 0.03))
            try:
                if chance.random() < 0.4:
                    await self._write(name, fleet, chance, session)
                else:
                    (level,) = chance.choices(list(LEVELS), list(LEVELS.values()))
                    await self.read(name, fleet, level, session)
            except Unknown:
                continue
            except Answered as answered:
                if answered.code not in REFUSED_CODES | NOT_LOADED_CODES:
                    self._world.complain(Kind.REFUSED, SUBJECT.name, str(answered))
            except Violation as violation:
                self._world.complain(Kind.READ, SUBJECT.name, str(violation))

    async def read(self, name: str, fleet: Fleet, level: Consistency, session: Session | None = None) -> None:
        """Read all keys. Raises Violation if the answer cannot be."""
        called_s = self.history.moment(time.monotonic())

        def begun() -> Callable[[Attempt], None]:
            nonlocal called_s
            called_s = self.history.moment(time.monotonic())
            return lambda attempt: None

        rows = await fleet.ask("/entities/query", _query(self.keys, level), watch=begun, session=session)
        found = self._versions(rows)
        self.history.read(name, SUBJECT.name, level, found, called_s, time.monotonic())
        self._world.reads += 1

    def judge(self) -> None:
        """Complain of what only the whole history shows."""
        try:
            self.history.check()
        except Violation as violation:
            self._world.complain(Kind.READ, SUBJECT.name, str(violation))

    async def _write(self, name: str, fleet: Fleet, chance: random.Random, session: Session) -> None:
        keys = chance.sample(self.keys, chance.choice((1, 1, 2, 5)))
        number = next(self._world.numbers)
        body: dict[str, Any]
        if chance.random() < 0.25:
            path, body = "/entities/delete", {"filter": SUBJECT.filter_of(keys)}
            wanted: dict[Key, Version | None] = dict.fromkeys(keys)
        else:
            path, body = "/entities/upsert", {"data": [row(SUBJECT, key, number) for key in keys]}
            wanted = dict.fromkeys(keys, number)
        again = chance.random() < 0.5
        for _ in range(3):
            try:
                whole = {"collectionName": SUBJECT.name, **body}
                await fleet.ask(path, whole, watch=self._watched(name, wanted), session=session)
            except Unknown:
                if again:
                    continue  # the same once more is as good, and a write of its own in the history
                raise
            self._world.acknowledged += 1
            return

    def _watched(self, name: str, wanted: Mapping[Key, Version | None]) -> Watch:
        def begun() -> Callable[[Attempt], None]:
            write = self.history.write(name, SUBJECT.name, wanted, time.monotonic())
            return lambda attempt: self._ended(write, attempt)

        return begun

    def _ended(self, write: Write, attempt: Attempt) -> None:
        if attempt.outcome is Outcome.OK:
            self.history.acknowledge(write, attempt.ended_s)
        elif attempt.outcome is Outcome.REFUSED:
            self.history.refuse(write)

    def _versions(self, rows: Sequence[Mapping[str, Any]]) -> dict[Key, Version | None]:
        found: dict[Key, Version | None] = dict.fromkeys(self.keys)
        for read in rows:
            key, version = SUBJECT.key_of(read["key"]), int(read["version"])
            if found[key] is not None:
                self._world.complain(Kind.DOUBLED, SUBJECT.name, f"key {key} as {found[key]} and {version}")
            if wrong := differences(row(SUBJECT, key, version), read):
                self._world.complain(Kind.DAMAGED, SUBJECT.name, f"key {key}: {'; '.join(wrong)[:400]}")
            found[key] = version
        return found


def _query(keys: Sequence[Key], level: Consistency) -> dict[str, Any]:
    return {
        "collectionName": SUBJECT.name,
        "filter": SUBJECT.filter_of(keys),
        "outputFields": ["*"],
        "limit": 1000,
        "consistencyLevel": str(level),
    }
