"""How fresh a read is, and when the replica here is: the consistency levels.

    Strong       the leader gives a position after the request came; a replica that has applied it may answer
    Bounded      every write older than the bound is there: the replica's service time is at most that far behind
    Session      what the client has written and read is there: the ticks of its token
    Eventually   whatever the replica has
    Customized   the ticks of the token and nothing else, at the client's own risk

A token that a client sends counts at every level but Eventually. A snapshot token is more than a level: it says
exactly which ticks are read, so that pages of one query fit together. (Spec: streaming 3.6.)

A replica's service time T says that it has applied everything with a tick up to T. What is waited for here never comes
from this node's own guess at the time of others: service times are the leaders', and ticks are the log's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.catalog import Collection
from cluster.ddl import STALENESS_PROPERTY
from node.node import Node
from node.route import name_of
from node.scope import EVERY_SHARD, current, tick_of
from node.service import Consistency, ReadOptions
from storage.errors import InvalidParameter, NoLeader, NotFresh, PeerUnreachable
from storage.types import ShardId, Tick, tick_from_ms, tick_ms

STALENESS_S: Final = 5.0
"""How far behind a Bounded read may be, where neither request nor collection says; Milvus's default."""
CATCH_UP_S: Final = 0.25
"""How long the replica here may need to be fresh enough before another one is asked."""
AHEAD_MS_MAX: Final = 60_000
"""A token further ahead of this node's time than clocks may be apart is of another cluster, or made up."""


@dataclass(frozen=True, slots=True)
class Need:
    """How fresh a replica of one shard must be to answer a read."""

    strong: bool = False
    at_least: Tick = Tick(0)
    """The service time that it must have reached."""
    at: Tick | None = None
    """Read as of this tick; without it, what is there."""

    def to_plain(self) -> list[Any]:
        return [self.strong, self.at_least, self.at]

    @classmethod
    def from_plain(cls, plain: list[Any]) -> Need:
        strong, at_least, at = plain
        return cls(bool(strong), Tick(int(at_least)), None if at is None else Tick(int(at)))


Needs = Mapping[ShardId, Need]


class Freshness:
    """Knows what reads need, and lets them wait for it. One per node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def needs(self, collection: Collection, options: ReadOptions, level: Consistency | None = None) -> Needs:
        """Return what a read of the collection needs of each of its shards; `level` goes before the request's.

        Raises InvalidParameter if a snapshot token does not fit the collection.
        """
        shards = sorted(set(collection.shards))
        scope = current.get()
        if scope is not None and scope.at is not None and level is None:
            every = scope.at.get(EVERY_SHARD)
            return {shard_id: self._exactly(scope.at.get(shard_id, every), shard_id) for shard_id in shards}
        level = level or options.consistency or Consistency(collection.consistency)
        strong = level is Consistency.STRONG
        oldest = Tick(0)
        if level is Consistency.BOUNDED and self._node.mesh is not None:
            oldest = self._ago(_staleness_s(collection, options))
        if scope is None or not scope.seen or level is Consistency.EVENTUALLY:
            need = Need(strong, oldest)
            return dict.fromkeys(shards, need)
        return {shard_id: Need(strong, max(oldest, tick_of(scope.seen, shard_id))) for shard_id in shards}

    def is_ready(self, shard_id: ShardId, need: Need) -> bool:
        """Return whether the replica here may answer at once."""
        host = self._node.shards.get(shard_id)
        if host is None or not host.is_whole:
            return False
        if need.strong and self._node.mesh is not None:
            return False
        return need.at_least == 0 or need.at_least <= host.service_tick

    async def reach(self, shard_id: ShardId, need: Need, *, deadline_s: float) -> bool:
        """Return whether the replica here may answer, after a little waiting if that helps.

        Raises NoLeader if the read is Strong and nobody leads, NotFresh if the token cannot be of this cluster.
        """
        host = self._node.shards.get(shard_id)
        if tick_ms(need.at_least) - tick_ms(self._node.hybrid.stamp()) > AHEAD_MS_MAX:
            raise NotFresh(
                f"the token is ahead of {name_of(shard_id)} by more than clocks can be: it is of another cluster"
            )
        if host is None or not host.is_whole:
            return False
        if need.strong:
            position = await self._barrier(shard_id, deadline_s)
            if not await self._soon(host.wait_applied(position), shard_id, deadline_s):
                return False
        late = need.at_least > host.service_tick
        if late and not await self._soon(host.wait_service(need.at_least), shard_id, deadline_s):
            return False
        return host.is_whole

    async def _barrier(self, shard_id: ShardId, deadline_s: float) -> Any:
        try:
            return await self._node.router.barrier(shard_id, deadline_s=deadline_s)
        except NoLeader:
            raise NoLeader(
                f"{name_of(shard_id)} has no leader that can be reached, which a Strong read needs: try again soon, or "
                "read with another consistencyLevel"
            ) from None

    async def _soon(self, waiting: Awaitable[None], shard_id: ShardId, deadline_s: float) -> bool:
        """Wait; not long if there is another replica to ask. Return whether it came."""
        left_s = deadline_s - self._node.seams.clock.monotonic_s()
        others = any(self._node.router.hedging.is_up(one) for one in self._node.router.replicas_elsewhere(shard_id))
        try:
            async with asyncio.timeout(max(0.0, min(left_s, CATCH_UP_S) if others else left_s)):
                await waiting
        except (TimeoutError, NoLeader, PeerUnreachable):
            return False
        return True

    def _ago(self, seconds: float) -> Tick:
        return tick_from_ms(max(0, tick_ms(self._node.hybrid.stamp()) - int(seconds * 1000)))

    @staticmethod
    def _exactly(tick: Tick | None, shard_id: ShardId) -> Need:
        if tick is None:
            raise InvalidParameter(
                f"the snapshot token says nothing about {name_of(shard_id)}: take one from an answer of this collection"
            )
        return Need(at_least=tick, at=tick)


def _staleness_s(collection: Collection, options: ReadOptions) -> float:
    if options.staleness_s is not None:
        return options.staleness_s
    return float(collection.properties.get(STALENESS_PROPERTY, STALENESS_S))
