"""What goes with a request on its way through the node: until when its client waits, and what it has seen.

A token is a map shard -> tick as short text that is safe in a header and a URL: `3-18c2f00000_5-18c2f00001`, both
numbers hexadecimal. A *session* token says "whatever I read must be at least this new"; a *snapshot* token says "read
exactly as of these ticks". Clients send back what they got and look at nothing in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from node.keyed import InsertKey
from storage.errors import InvalidParameter
from storage.types import TICK_MAX, ShardId, Tick

Ticks = Mapping[ShardId, Tick]

ENTRIES_MAX: Final = 64
"""Shards in a token; a session that has seen more is told the newest of their ticks for every shard."""
EVERY_SHARD: Final = ShardId(-1)
_TOKEN: Final = re.compile(r"(?:[0-9a-f]{1,4}|every)-[0-9a-f]{1,16}(?:_[0-9a-f]{1,4}-[0-9a-f]{1,16})*", re.ASCII)
_CHARS_MAX: Final = (ENTRIES_MAX + 1) * 22


@dataclass
class Scope:
    """One request's company. Made by whoever speaks to the client, found by whoever does the work."""

    deadline_s: float
    """On the clock's monotonic time: then the client must have an answer."""
    seen: dict[ShardId, Tick] = field(default_factory=dict)
    """The session: what the client had seen before, raised by what this request wrote and read."""
    at: Ticks | None = None
    """Read as of these ticks and no others."""
    read_at: dict[ShardId, Tick] = field(default_factory=dict)
    """As of which ticks the request has read."""

    is_admitted: bool = False
    """Whether the request holds room for its rows (`node/admission.py`)."""
    key: str = ""
    """Names the request, so that its changes of the catalogue are made once however often it comes."""
    insert_key: InsertKey | None = None
    """Names the insert, so that its rows are written once however often it comes."""
    steps: int = 0
    """How many of them it has asked for."""
    is_repeat: bool = False
    """Whether the answer is that to an earlier request of the same key."""
    who: str = ""
    """The user that asks; nobody in particular while authentication is off."""
    sees: Callable[[str, str], bool] | None = None
    """Whether lists show the user a database ("" for its collection) or a collection; None: they show all."""
    database: str = ""
    objects: tuple[str, ...] = ()
    """What the request is about, for the audit log."""

    def saw(self, shard_id: ShardId, tick: Tick) -> None:
        """Note what the client now knows of a shard."""
        if tick > self.seen.get(shard_id, 0):
            self.seen[shard_id] = tick

    def noted_read(self, ticks: Ticks) -> None:
        """Note as of which ticks the shards were read."""
        for shard_id, tick in ticks.items():
            self.read_at[shard_id] = tick
            self.saw(shard_id, tick)


current: ContextVar[Scope | None] = ContextVar("scope", default=None)
"""The scope of the request that is being served here; None for work that no client waits for."""


def to_token(ticks: Ticks) -> str:
    """Return the ticks as a token, "" for none."""
    if len(ticks) == 1 and EVERY_SHARD not in ticks:  # as most are
        ((shard, tick),) = ticks.items()
        return f"{shard:x}-{tick:x}"
    if len(ticks) > ENTRIES_MAX:
        return f"every-{max(ticks.values()):x}"
    every = ticks.get(EVERY_SHARD)
    known = "_".join(f"{shard:x}-{tick:x}" for shard, tick in ticks.items() if shard >= 0)
    if every is None:
        return known
    return f"every-{every:x}" + (f"_{known}" if known else "")


def from_token(token: str, what: str) -> dict[ShardId, Tick]:
    """Return the ticks of a token, none for "". `what` names it to the client. Raises InvalidParameter."""
    if not token:
        return {}
    if len(token) > _CHARS_MAX or not _TOKEN.fullmatch(token):
        raise InvalidParameter(f"{what} {token[:40]!r} is no token of this server: send back what an answer gave")
    ticks = {}
    for one in token.split("_"):
        shard, _, tick = one.partition("-")
        ticks[EVERY_SHARD if shard == "every" else ShardId(int(shard, 16))] = Tick(min(int(tick, 16), TICK_MAX))
    return ticks


def tick_of(ticks: Ticks, shard_id: ShardId) -> Tick:
    """Return the tick that a session has for a shard, 0 if it knows nothing of it."""
    return max(ticks.get(shard_id, Tick(0)), ticks.get(EVERY_SHARD, Tick(0)))
