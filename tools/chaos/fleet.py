"""All nodes as one good client sees them: any node for any request, another after a failure, and a record of it all.

A request is repeated while it certainly was not done: there was no connection, or the answer says when to ask again. A
read is repeated after any failure. A write whose outcome nobody told is not: that is for whoever knows what a second
time would do.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from tools.bench.wire import Address
from tools.crash.api import REFUSED_CODES, Answered, Api, Unknown, Unreachable

ATTEMPT_S_MAX = 5.0
"""A request's time limit, told to the node too."""
PATIENCE_S = 12.0
"""How long a request is repeated; an attempt that has begun is awaited."""
ELSEWHERE_S = 0.02
"""Before another node is asked after one that did not listen."""
PAUSE_S_MAX = 0.5
"""Once all nodes were asked, the pauses grow up to this."""
AVOIDED_S = 1.0
"""How long a node that did not listen is left out, if others are there."""


SESSION = "Annulus-Session"
"""The header that says what a client has seen."""


@dataclass
class Session:
    """What one client has seen, as the last answer told it; goes with each of its requests."""

    token: str = ""


class Kind(StrEnum):
    """What a request is, for the figures."""

    WRITE = "write"
    STRONG = "strong read"
    RELAXED = "relaxed read"
    """Bounded, Session or Eventually."""
    OTHER = "other"


class Outcome(StrEnum):
    OK = "ok"
    """Answered, if only that what was asked for is not there."""
    REFUSED = "refused"
    """Certainly not done."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One exchange with one node; times are of `time.monotonic`."""

    node: str
    began_s: float
    ended_s: float
    outcome: Outcome
    data: Any = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What became of a request in all its attempts."""

    kind: Kind
    collection: str
    began_s: float
    ended_s: float
    outcome: Outcome
    attempts: int
    why: str


Watch: TypeAlias = Callable[[], Callable[[Attempt], None]]


class Fleet:
    """Carries calls; a `Caller` as the crash test's clients want one. `requests` keeps what became of each."""

    def __init__(
        self,
        addresses: Mapping[str, Address],
        chance: random.Random,
        *,
        attempt_s_max: float = ATTEMPT_S_MAX,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.requests: list[Request] = []
        self._chance = chance
        self._apis = {name: Api(address, request_s_max=attempt_s_max) for name, address in addresses.items()}
        self._former: list[Api] = []
        self._attempt_s_max = attempt_s_max
        self._patience_s = patience_s
        self._avoided_until_s: dict[str, float] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._under_way = 0

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Hold connections while the block lasts."""
        for api in self._apis.values():
            await api.__aenter__()
        try:
            yield
        finally:
            for api in (*self._apis.values(), *self._former):
                await api.__aexit__(None, None, None)

    async def add(self, name: str, address: Address) -> None:
        """Send requests to this node too."""
        api = Api(address, request_s_max=self._attempt_s_max)
        self._apis[name] = await api.__aenter__()

    def forget(self, name: str) -> None:
        """Send nothing more to a node; what is under way there may still be answered."""
        self._former.append(self._apis.pop(name))

    async def pause(self) -> None:
        """Hold new requests back and return when none is under way."""
        self._open.clear()
        while self._under_way:  # noqa: ASYNC110  seldom, and for a second or two
            await asyncio.sleep(0.05)

    def go_on(self) -> None:
        self._open.set()

    async def call(self, path: str, **body: Any) -> Any:
        """Return the reply's data. Raises Answered if no attempt was accepted, Unknown if one may have been."""
        return await self.ask(path, body)

    async def ask(
        self, path: str, body: Mapping[str, Any], *, watch: Watch | None = None, session: Session | None = None
    ) -> Any:
        """Do the same. `watch` is told that an attempt begins, and what it gives back is told how it ended."""
        await self._open.wait()
        kind = kind_of(path, body)
        began_s = time.monotonic()
        attempts, last, error = 0, None, None
        self._under_way += 1
        try:
            while last is None or time.monotonic() < began_s + self._patience_s:
                node = self._another(last.node if last else None)
                ended = watch() if watch is not None else None
                last, error = await self._attempt(node, path, body, session or Session())
                attempts += 1
                if ended is not None:
                    ended(last)
                if error is None:
                    return last.data
                if last.outcome is Outcome.UNKNOWN and kind not in (Kind.STRONG, Kind.RELAXED):
                    raise error
                if isinstance(error, Answered) and error.code not in REFUSED_CODES:
                    raise error
                await asyncio.sleep(self._pause_s(error, attempts))
            assert error is not None
            raise error
        finally:
            self._under_way -= 1
            if last is not None:
                name = str(body.get("collectionName", ""))
                answered = isinstance(error, Answered) and error.code not in REFUSED_CODES
                outcome = Outcome.OK if answered else last.outcome
                self.requests.append(Request(kind, name, began_s, time.monotonic(), outcome, attempts, last.why[:200]))

    async def _attempt(
        self, node: str, path: str, body: Mapping[str, Any], session: Session
    ) -> tuple[Attempt, Answered | Unknown | None]:
        began_s = time.monotonic()
        try:
            headers = {SESSION: session.token} if session.token else {}
            data, told = await self._apis[node].exchange(path, body, headers)
            session.token = told.get(SESSION, session.token)
        except (Answered, Unreachable) as error:
            if isinstance(error, Unreachable):
                self._avoided_until_s[node] = time.monotonic() + AVOIDED_S
            return Attempt(node, began_s, time.monotonic(), Outcome.REFUSED, why=str(error)), error
        except Unknown as error:
            return Attempt(node, began_s, time.monotonic(), Outcome.UNKNOWN, why=str(error)), error
        return Attempt(node, began_s, time.monotonic(), Outcome.OK, data), None

    def _pause_s(self, error: Answered | Unknown, attempts: int) -> float:
        if isinstance(error, Answered) and error.retry_after_s is not None:
            return error.retry_after_s
        untried = attempts < len(self._apis)
        return ELSEWHERE_S if untried else min(ELSEWHERE_S * 2 ** (attempts - len(self._apis)), PAUSE_S_MAX)

    def _another(self, last: str | None) -> str:
        others = [name for name in self._apis if name != last] or list(self._apis)
        now_s = time.monotonic()
        listening = [name for name in others if self._avoided_until_s.get(name, 0.0) <= now_s]
        return self._chance.choice(listening or others)


def kind_of(path: str, body: Mapping[str, Any]) -> Kind:
    """Return what a request is."""
    op = path.rpartition("/")[2]
    if path.startswith("/entities/"):
        if op in ("insert", "upsert", "delete"):
            return Kind.WRITE
        return Kind.STRONG if body.get("consistencyLevel") == "Strong" else Kind.RELAXED
    return Kind.OTHER
