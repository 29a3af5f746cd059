"""Requests that a client names with a key of its own: however often one comes, through any node, it is made once.

A request may take several commands of the control group, its *steps*. Each is noted under the key with its outcome, and
in the end the outcome of the whole:

    OpenKey       the key is that of this request from now on; another request under it is refused
    KeyedStep     a command in it: executed once, then answered from memory, be it a refusal
    CloseKey      how the request ended; the first one counts

Until it is closed a repeat goes on where the one before it was lost. After that it is answered with the first outcome.
A request that failed for a passing reason (no leader, no room) is not closed: its repeat is another attempt.

Keys are forgotten `KEEP_MS` after their request began, by the ticks of the log, and the oldest sooner if there are more
than `KEYS_MAX`. (Spec: streaming, R-CO-12.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cluster.message import Message, from_plain
from storage.errors import BadRequest, InvalidParameter, JournalDamaged
from storage.types import Tick, tick_ms

KEYS_MAX: Final = 8_192
KEEP_MS: Final = 24 * 3_600_000
KEY_CHARS_MAX: Final = 128
STEPS_MAX: Final = 64


@dataclass(frozen=True)
class OpenKey(Message):
    """Answers {} for a new key or one whose request is not over, {"outcome": [code, message]} for one that is.

    `outcome` is empty if the request succeeded. `request` is a digest of all that the client asked.
    """

    kind = "open_key"
    key: str
    request: str


@dataclass(frozen=True)
class KeyedStep(Message):
    """The command `command` with these values (`cluster.message.to_plain`) is step `number` of the key's request."""

    kind = "keyed_step"
    key: str
    number: int
    command: str
    values: Sequence[Any]

    @property
    def message(self) -> Message:
        """The command. Raises InvalidParameter if it is none."""
        try:
            return from_plain(self.command, self.values)
        except JournalDamaged as error:
            raise InvalidParameter(f"step {self.number} of {self.key}: {error}") from error


@dataclass(frozen=True)
class CloseKey(Message):
    """The key's request is over; `outcome` as in `OpenKey`. Answers the outcome that counts."""

    kind = "close_key"
    key: str
    outcome: Sequence[str]


@dataclass(frozen=True)
class Request:
    """What is remembered of a key."""

    request: str
    tick: Tick
    """When it began."""
    steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """What each answered, while the request is not over."""
    outcome: tuple[str, ...] | None = None


class Keys:
    """The keys that the control group remembers, the oldest first. Values are frozen; `copy` copies the map."""

    def __init__(self, known: Iterable[tuple[str, Request]] = ()) -> None:
        self.known: dict[str, Request] = dict(known)

    def open(self, message: OpenKey, tick: Tick) -> Mapping[str, Any]:
        """Raises InvalidParameter if the key is another request's."""
        self._forget_old(tick)
        if not 1 <= len(message.key) <= KEY_CHARS_MAX:
            raise InvalidParameter(f"an idempotency key has 1 to {KEY_CHARS_MAX} characters")
        known = self.known.get(message.key)
        if known is None:
            if len(self.known) >= KEYS_MAX:
                del self.known[next(iter(self.known))]
            self.known[message.key] = Request(message.request, tick)
            return {}
        if known.request != message.request:
            raise InvalidParameter(
                f"the idempotency key {message.key} was used for another request: give each request a key of its own"
            )
        return {} if known.outcome is None else {"outcome": list(known.outcome)}

    def step(self, message: KeyedStep, execute: Callable[[Message], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Answer {"outcome": what `execute` returned} or {"refused": [code, message]}, the first time or again.

        Raises InvalidParameter if the key's request is over or forgotten, and what passes (Conflict), unnoted.
        """
        known = self.known.get(message.key)
        if known is None or known.outcome is not None:
            raise InvalidParameter(f"the request with the idempotency key {message.key} is over, or forgotten")
        answer = known.steps.get(message.number)
        if answer is None:
            if len(known.steps) >= STEPS_MAX:
                raise InvalidParameter(f"a request has at most {STEPS_MAX} steps")
            command = message.message
            if isinstance(command, KeyedStep | OpenKey | CloseKey):
                raise InvalidParameter(f"a step is no {command.kind}")
            try:
                answer = {"outcome": execute(command)}
            except BadRequest as error:
                answer = {"refused": [error.code, error.message]}
            self.known[message.key] = replace(known, steps={**known.steps, message.number: answer})
        return answer

    def close(self, message: CloseKey) -> Mapping[str, Any]:
        known = self.known.get(message.key)
        if known is None:
            return {"outcome": list(message.outcome)}
        if known.outcome is None:
            known = self.known[message.key] = replace(known, steps={}, outcome=tuple(message.outcome))
        return {"outcome": list(known.outcome or ())}

    def copy(self) -> Keys:
        return Keys(self.known.items())

    def to_plain(self) -> list[Any]:
        return [[key, one.request, one.tick, dict(one.steps), one.outcome] for key, one in self.known.items()]

    @classmethod
    def from_plain(cls, plain: Iterable[Sequence[Any]]) -> Keys:
        return cls(
            (key, Request(request, Tick(tick), steps, None if outcome is None else tuple(outcome)))
            for key, request, tick, steps, outcome in plain
        )

    def _forget_old(self, tick: Tick) -> None:
        before_ms = tick_ms(tick) - KEEP_MS
        while self.known:
            oldest = next(iter(self.known))
            if tick_ms(self.known[oldest].tick) >= before_ms:
                return
            del self.known[oldest]
