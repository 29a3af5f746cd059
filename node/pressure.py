"""How short of memory a node is: from which mark on writes are slowed, from which on refused, and whose.

Pure: it is told what was measured, and the time. Three things are looked at, and the worst counts:

    growing    rows that are in no chunk yet, of all shards here, led or followed: sealing and flushing lower it
    resident   what the process holds, against its limit: deletes, drops and releases lower it
    replicas   what another node that follows a shard led here says of itself

Between `slow` and `high` writes are slowed, the more the higher; at `high` they are refused, until the value is below
`low`, or has been below `high` for a while: then they go on, slowly. Both are about those who write most: whoever asked
for less than half the mean lately goes on as ever until `last`, beyond which nothing more is taken.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Final

RATE_BYTES_MAX: Final = 64 << 20
"""A second, of one collection, where slowing begins."""
RATE_BYTES_MIN: Final = 1 << 20
"""A second, where it ends and refusing begins."""
HALF_LIFE_S: Final = 10.0
"""After which what a collection asked for counts half."""
ASKED_BYTES_MIN: Final = 1 << 10
"""Less than this, a collection is forgotten."""
COPIES: Final = 3
"""How many times rows that come take their size, as body, batch and entry of the log, until they are applied."""
SMALL_RATIO: Final = 0.5
"""Of the mean: who asked for less is not among those who write most."""
ACTIVE_RATIO_MIN: Final = 0.01
"""Of all that was asked for, what a collection must have to count as one of those who share."""
CALM_S: Final = 5.0
"""How long a value must be below `high` for refusing to end above `low`."""
WORD_S: Final = 3.0
"""How long another node's word counts."""


class Level(StrEnum):
    ACCEPT = "accept"
    DELAY = "delay"
    REFUSE = "refuse"


@dataclass
class Mark:
    """One thing that is measured, in bytes."""

    name: str
    low: int
    slow: int
    high: int
    last: int
    setting: str
    """What raises the marks."""
    value: int = 0
    is_refusing: bool = False
    calm_since_s: float = 0.0

    def observe(self, value: int, now_s: float) -> None:
        self.value = value
        if value >= self.high:
            self.is_refusing = True
            self.calm_since_s = now_s
        elif self.is_refusing and (value < self.low or now_s - self.calm_since_s >= CALM_S):
            self.is_refusing = False

    @property
    def fraction(self) -> float:
        """Where the value is between `slow` (0) and `high` (1)."""
        return min(1.0, max(0.0, (self.value - self.slow) / (self.high - self.slow)))


@dataclass(frozen=True)
class Word:
    """What another node said of itself."""

    fraction: float
    is_refusing: bool
    until_s: float


class Pressure:
    """Invariants
    1. The rate of a collection falls when a value rises, and is without bound when all are below `slow`.
    2. When values stay below `high`, refusing ends within CALM_S; when they stay below `low`, at once.
    """

    def __init__(self, growing: Mark, resident: Mark | None) -> None:
        """`resident` is None where memory cannot be measured."""
        self.growing = growing
        self.resident = resident
        self.words: dict[str, Word] = {}
        self._asked: dict[Hashable, tuple[float, float]] = {}
        """Collection -> (bytes that it asked for lately, as of when)."""
        self._fresh: dict[Hashable, int] = {}
        """What was asked for since the last observation."""
        self._mean = 0.0
        self._taken = 0
        self._room = 0
        """So much may be taken before anybody is slowed, until the next observation."""
        self._heard: Word | None = None

    @property
    def marks(self) -> list[Mark]:
        return [self.growing] if self.resident is None else [self.growing, self.resident]

    def observe(self, *, growing: int, resident: int, now_s: float) -> None:
        """Note what was measured just now."""
        self._taken = 0
        self.growing.observe(growing, now_s)
        if self.resident is not None:
            self.resident.observe(resident, now_s)
        self.words = {name: word for name, word in self.words.items() if word.until_s > now_s}
        self._heard = max(self.words.values(), key=lambda one: (one.is_refusing, one.fraction), default=None)
        self._room = -1
        if self._heard is None and not self.is_refusing:
            self._room = min(one.slow - one.value for one in self.marks) // COPIES
        for key, nbytes in self._fresh.items():
            self._asked[key] = (self._lately(key, now_s) + nbytes, now_s)
        self._fresh.clear()
        known = {key: lately for key in self._asked if (lately := self._lately(key, now_s)) >= ASKED_BYTES_MIN}
        self._asked = {key: (lately, now_s) for key, lately in known.items()}
        total = sum(known.values())
        active = sum(1 for lately in known.values() if lately >= ACTIVE_RATIO_MIN * total)
        self._mean = total / active if active else 0.0

    def hear(self, node: str, fraction: float, is_refusing: bool, now_s: float) -> None:
        """Note what another node said of itself; it counts from the next observation on."""
        self.words[node] = Word(min(1.0, max(0.0, fraction)), is_refusing, now_s + WORD_S)

    def ask(self, key: Hashable, nbytes: int) -> None:
        """Note that a collection wants to write, whether it may or not; it counts from the next observation on."""
        self._fresh[key] = self._fresh.get(key, 0) + nbytes

    def take(self, nbytes: int) -> None:
        """Note that so much was admitted: until the next observation it counts on top of what was measured."""
        self._taken += nbytes

    def rate(self, key: Hashable) -> float:
        """Return how many bytes a second the collection may write now: inf for any, 0 for none."""
        if self._taken <= self._room:
            return inf
        marks, heard, taken = self.marks, self._heard, COPIES * self._taken
        if any(one.value + taken >= one.last for one in marks):
            return 0.0
        asked, _ = self._asked.get(key, (0.0, 0.0))
        if asked < SMALL_RATIO * self._mean:
            return inf
        if any(one.is_refusing for one in marks) or (heard is not None and heard.is_refusing):
            return 0.0
        fraction = self.fraction if heard is None else max(self.fraction, heard.fraction)
        return inf if fraction <= 0 else RATE_BYTES_MAX * math.pow(RATE_BYTES_MIN / RATE_BYTES_MAX, fraction)

    @property
    def fraction(self) -> float:
        """How near refusing this node is by what it measures itself."""
        return max(one.fraction for one in self.marks)

    @property
    def is_refusing(self) -> bool:
        return any(one.is_refusing for one in self.marks)

    @property
    def level(self) -> Level:
        """What those who write most meet."""
        if self.is_refusing or (self._heard is not None and self._heard.is_refusing):
            return Level.REFUSE
        return Level.DELAY if self.fraction > 0 or self._heard is not None else Level.ACCEPT

    def why(self) -> str:
        """Return which limit it is that slows or refuses, its value, and what raises it."""
        worst = max(self.marks, key=lambda one: (one.is_refusing, one.value / one.high))
        if not worst.is_refusing and worst.fraction <= 0 and self.words:
            node = max(self.words, key=lambda one: self.words[one].fraction)
            return f"node {node}, which holds a copy of the rows, is short of memory"
        return (
            f"{worst.name} {worst.value >> 20} MiB, slowed from {worst.slow >> 20} MiB, refused from "
            f"{worst.high >> 20} MiB until below {worst.low >> 20} MiB ({worst.setting} raises it)"
        )

    def view(self) -> Mapping[str, object]:
        """Return the state as plain data."""
        return {
            "level": str(self.level),
            **{
                one.name: {"bytes": one.value, "low": one.low, "slow": one.slow, "high": one.high, "last": one.last}
                for one in self.marks
            },
            "replicas": {
                name: {"fraction": one.fraction, "refuses": one.is_refusing} for name, one in self.words.items()
            },
        }

    def _lately(self, key: Hashable, now_s: float) -> float:
        lately, at_s = self._asked.get(key, (0.0, now_s))
        return lately * math.exp2((at_s - now_s) / HALF_LIFE_S)
