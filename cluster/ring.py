"""Which nodes hold which shard: the first distinct nodes clockwise from the shard's point on a consistent-hash ring.

The door to uhashring. A table of all shards is built once per membership, so looking one up costs nothing; and a node
that comes or goes moves only the replicas that it takes or leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from uhashring import HashRing

from storage.types import ShardId

VNODES: Final = 160
"""Points per node: with 3 to 10 nodes and 1,000 shards the fullest node has about 1.2 times its share."""


def place(nodes: Sequence[str], shards: int, replication_factor: int) -> Mapping[ShardId, tuple[str, ...]]:
    """Return, for each shard, the nodes that hold it, the first choice first.

    Every node computes the same from the same names, in any order. With fewer nodes than the factor, all hold it.
    """
    ring = HashRing(nodes=sorted(nodes), hash_fn="ketama", vnodes=VNODES)
    count = min(replication_factor, len(nodes))
    return {
        ShardId(shard): tuple(one["nodename"] for one in ring.range(f"shard-{shard}", size=count))
        for shard in range(shards)
    }
