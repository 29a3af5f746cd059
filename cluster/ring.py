"""Which nodes shall hold which shard: the first nodes clockwise that have room, and then as few changes as can be.

The door to uhashring. A shard's replicas belong to the first distinct nodes clockwise from its point on a
consistent-hash ring. With as few shards as a cluster has that alone would be uneven (of 8 shards on 5 nodes one node
may get twice what another gets), so loads are bounded: a node that has its share is passed over. What a node holds
already it keeps, as long as it may and no other node has less by two. So all nodes hold the same number or one less, a
node that comes takes its share and nothing else moves, and what a node leaves goes to the others alone.

Two replicas of a shard are in different zones while there are enough zones, and else as evenly spread as can be; a node
without a zone is a zone of its own. Zones of different sizes may keep loads from being even.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from uhashring import HashRing

from storage.types import ShardId

VNODES: Final = 160
"""Points per node: the order of nodes is then about even over all shards, whatever the nodes are called."""

Placed = dict[ShardId, tuple[str, ...]]


def place(
    nodes: Collection[str],
    shards: int,
    copies: int,
    *,
    zones: Mapping[str, str] | None = None,
    held: Mapping[ShardId, Sequence[str]] | None = None,
    closed: Collection[str] = (),
    spare: Collection[str] = (),
    heirs: Mapping[str, str] | None = None,
    fixed: Collection[ShardId] = (),
) -> Placed:
    """Return, for each shard, the nodes that shall hold it, its ring's first choice first.

    nodes   who may hold replicas; with fewer than `copies` all of them do
    zones   node -> its zone, for those that have one
    held    who holds a shard now
    closed  which of the nodes keep what they hold and get nothing new
    spare   further nodes that keep what they hold of shards for which there are not enough others
    heirs   node -> who shall get what leaves it
    fixed   shards that are not moved for the sake of even loads

    Every node computes the same from the same arguments, in any order. What was placed stays when placed again.
    """
    return _Placing(nodes, shards, copies, zones or {}, held or {}, closed, spare, heirs or {}, fixed).placed()


class _Placing:
    def __init__(
        self,
        nodes: Collection[str],
        shards: int,
        copies: int,
        zones: Mapping[str, str],
        held: Mapping[ShardId, Sequence[str]],
        closed: Collection[str],
        spare: Collection[str],
        heirs: Mapping[str, str],
        fixed: Collection[ShardId],
    ) -> None:
        self._nodes = tuple(sorted(set(nodes)))
        self._open = frozenset(self._nodes) - set(closed)
        self._copies = copies
        self._zone = {name: zones.get(name) or f"\0{name}" for name in self._nodes}
        self._is_zoned = len(set(self._zone.values())) < len(self._nodes)
        self._zone_max = _evenest(Counter(self._zone.values()), copies)
        self._held = [held.get(ShardId(shard), ()) for shard in range(shards)]
        self._spare, self._heirs = frozenset(spare), heirs
        self._movable = [shard for shard in range(shards) if shard not in set(fixed)]
        self._ranks = _ring_order(self._nodes, shards) if self._nodes else [{}] * shards
        self._sets: list[set[str]] = []
        self._load = dict.fromkeys(self._nodes, 0)
        self._fresh: dict[str, set[int]] = {name: set() for name in self._nodes}
        """Node -> shards that it shall hold and does not yet."""
        self._share = -(-shards * min(copies, len(self._nodes)) // max(1, len(self._nodes)))
        """What an even spread gives to a node at most."""

    def placed(self) -> Placed:
        for shard in range(len(self._ranks)):
            self._keep(shard)
        for shard in range(len(self._ranks)):
            self._fill(shard)
        while self._even_out():
            pass
        return {ShardId(shard): self._ordered(shard) for shard in range(len(self._ranks))}

    def _keep(self, shard: int) -> None:
        """Begin with who holds the shard, as far as they still may."""
        self._sets.append(set())
        for name in self._held[shard]:
            if name in self._load:
                self._put_on(shard, name)
        while crowded := self._crowded(shard):
            leaving = max(crowded, key=lambda name: (self._load[name], self._ranks[shard][name]))
            self._take_off(shard, leaving)

    def _crowded(self, shard: int) -> list[str]:
        """Return nodes of which one has to go: there are too many of them, or too many of one zone."""
        chosen = sorted(self._sets[shard])
        count = Counter(self._zone[name] for name in chosen)
        crowded = [name for name in chosen if count[self._zone[name]] > self._zone_max]
        return crowded or (chosen if len(chosen) > self._copies else [])

    def _fill(self, shard: int) -> None:
        chosen, ranks = self._sets[shard], self._ranks[shard]
        heirs = {self._heirs.get(name, "") for name in self._held[shard] if name not in chosen}
        while len(chosen) < self._copies:
            able = [name for name in sorted(self._open - chosen) if self._has_zone(shard, name)]
            if not able:
                return
            # An heir first; then the first clockwise that has room; without any, the one with the least.
            taken = min(
                able, key=lambda name: (name not in heirs, max(0, self._load[name] + 1 - self._share), ranks[name])
            )
            self._put_on(shard, taken)

    def _even_out(self) -> bool:
        """Let a node have one replica less and one that has less by two or more one more; False if none can."""
        by_load = sorted(self._nodes, key=lambda name: (self._load[name], name))
        # Rather what has yet to be copied anyway, were it by way of others, than what is there.
        return any(map(self._pass_on, reversed(by_load))) or any(
            self._load[giver] - self._load[taker] >= 2 and self._give(giver, taker, self._movable)
            for giver in reversed(by_load)
            for taker in by_load
        )

    def _pass_on(self, giver: str) -> bool:
        """Have a node give a replica that is not there yet, and its taker another one, until one has room for it."""
        came_from = {giver: ""}
        waiting = deque([giver])
        while waiting:
            name = waiting.popleft()
            for taker in self._nodes:
                if taker in came_from or not any(self._may_give(name, taker, shard) for shard in self._fresh[name]):
                    continue
                came_from[taker] = name
                waiting.append(taker)
                if self._load[giver] - self._load[taker] >= 2:
                    while source := came_from[taker]:  # the last one first: each step is possible as things are then
                        if not self._give(source, taker, self._fresh[source]):
                            return False
                        taker = source
                    return True
        return False

    def _give(self, giver: str, taker: str, shards: Iterable[int]) -> bool:
        """Move one of these shards' replicas, where the taker comes early on the ring; False if there is none."""
        able = [shard for shard in shards if self._may_give(giver, taker, shard)]
        if not able:
            return False
        shard = min(able, key=lambda one: (self._ranks[one][taker], one))
        self._take_off(shard, giver)
        self._put_on(shard, taker)
        return True

    def _put_on(self, shard: int, name: str) -> None:
        self._sets[shard].add(name)
        self._load[name] += 1
        if name not in self._held[shard]:
            self._fresh[name].add(shard)

    def _take_off(self, shard: int, name: str) -> None:
        self._sets[shard].remove(name)
        self._load[name] -= 1
        self._fresh[name].discard(shard)

    def _may_give(self, giver: str, taker: str, shard: int) -> bool:
        chosen = self._sets[shard]
        return (
            giver in chosen
            and taker not in chosen
            and (taker in self._open or taker in self._held[shard])
            and self._has_zone(shard, taker, without=giver)
        )

    def _has_zone(self, shard: int, name: str, *, without: str = "") -> bool:
        if not self._is_zoned:
            return True
        zone = self._zone[name]
        return sum(self._zone[one] == zone for one in self._sets[shard] if one != without) < self._zone_max

    def _ordered(self, shard: int) -> tuple[str, ...]:
        chosen = sorted(self._sets[shard], key=self._ranks[shard].__getitem__)
        others = sorted(name for name in self._held[shard] if name in self._spare and name not in self._load)
        return (*chosen, *others[: max(0, self._copies - len(chosen))])


def _evenest(zone_sizes: Mapping[str, int], copies: int) -> int:
    """Return how many copies of a shard a zone must take at least, if zones take as evenly as their sizes allow."""
    most = 1
    while sum(min(size, most) for size in zone_sizes.values()) < min(copies, sum(zone_sizes.values())):
        most += 1
    return most


@lru_cache(maxsize=8)
def _ring_order(nodes: tuple[str, ...], shards: int) -> Sequence[Mapping[str, int]]:
    """Return, for each shard, node -> how many nodes come before it, clockwise from the shard's point."""
    ring = HashRing(nodes=list(nodes), hash_fn="ketama", vnodes=VNODES)
    return [_ranks(one["nodename"] for one in ring.range(f"shard-{shard}", size=len(nodes))) for shard in range(shards)]


def _ranks(names: Iterable[str]) -> Mapping[str, int]:
    return {name: rank for rank, name in enumerate(names)}
