"""What shards know of a collection: its segments, how far they are indexed and loaded. Their leaders are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cluster.catalog import Collection, IndexDef
from cluster.shard import CollectionState, Shard
from node.node import Node
from node.service import IndexInfo, IndexState, LoadState
from node.upkeep import Upkeep
from storage.errors import Unavailable
from storage.types import CollectionId, IndexId, PartitionId, ShardId

FACTS_METHOD: Final = "shard/facts"
ASK_S: Final = 2.0
"""How long a look at the state of a shard waits for its leader."""


class Facts:
    """Asks, and answers for the shards that this node leads."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._router = node.router
        self._router.on_leader(FACTS_METHOD, self._facts_here)

    async def of(
        self, collection: Collection, *, segments: bool = False, here_first: bool = False
    ) -> list[dict[str, Any]]:
        """Return what the shards know of the collection: their leaders, or the replicas here if they do not answer."""
        asked = {"collection": collection.collection_id, "segments": segments}
        deadline_s = min(self._router.deadline_s(), self._node.seams.clock.monotonic_s() + ASK_S)

        async def one(shard_id: ShardId) -> dict[str, Any]:
            if here_first and shard_id in self._node.shards:
                return await self._facts_here(shard_id, asked)
            try:
                return await self._router.ask_leader(FACTS_METHOD, shard_id, asked, deadline_s=deadline_s)
            except Unavailable:
                if shard_id not in self._node.shards:
                    raise
                return await self._facts_here(shard_id, asked)

        return await asyncio.gather(*(one(shard_id) for shard_id in sorted(set(collection.shards))))

    async def _facts_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain facts of a collection in the replica here: loading, indexes, and its segments if asked."""
        shard, upkeep = self._node.shards[shard_id].machine, self._node.upkeep[shard_id]
        state = shard.collections.get(CollectionId(asked["collection"]))
        if state is None:
            return {"loading": [], "indexes": [], "segments": [], "rows": 0}
        loading: dict[PartitionId, list[int]] = {}
        for one in state.stored.values():
            if state.is_loaded(one.segment.partition_id):
                counts = loading.setdefault(one.segment.partition_id, [0, 0])
                counts[0] += not one.segment.released
                counts[1] += 1
        return {
            "loading": [[partition_id, *counts] for partition_id, counts in loading.items()],
            "indexes": [index_facts(state, index_id, upkeep) for index_id in state.indexes],
            "segments": _segments_of(shard, state) if asked["segments"] else [],
            "rows": sealed_rows(state),
        }

    async def load_state(self, found: Collection, partitions: Sequence[str]) -> tuple[LoadState, int]:
        """Return how far partitions of a collection, or all that are to be, are in memory, with the percentage."""
        wanted = [found.partition(one) for one in partitions]
        if not found.is_loaded or (found.loaded is not None and not found.loaded.issuperset(wanted)):
            return LoadState.NOT_LOADED, 0
        ready = total = 0
        for facts in await self.of(found, here_first=True):
            for partition_id, ready_here, total_here in facts["loading"]:
                if not wanted or partition_id in wanted:
                    ready += ready_here
                    total += total_here
        if ready == total:
            return LoadState.LOADED, 100
        return LoadState.LOADING, ready * 100 // total


def states_of(node: Node, collection: Collection) -> list[tuple[ShardId, CollectionState]]:
    """Return the collection's shards that are here, as they have it."""
    found = []
    for shard_id in sorted(set(collection.shards)):
        host = node.shards.get(shard_id)
        state = None if host is None else host.machine.collections.get(collection.collection_id)
        if state is not None:
            found.append((shard_id, state))
    return found


def index_facts(state: CollectionState, index_id: IndexId, upkeep: Upkeep) -> list[Any]:
    """Return [index id, rows, rows indexed, whether it is building, why it failed] of the sealed segments here."""
    total = indexed = 0
    building = False
    failure = ""
    wanted = state.indexes[index_id]
    for stored in state.stored.values():
        rows = stored.segment.rows
        total += rows
        key = (stored.segment.segment_id, index_id)
        failure = failure or upkeep.indexes.failures.get(key, "")
        if not stored.is_flushed or wanted in upkeep.indexes.wanted(state, stored):
            building = True
            progress = upkeep.indexes.builds.get(key)
            indexed += int(rows * progress.fraction) if progress else 0
        elif key not in upkeep.indexes.failures:
            indexed += rows
    return [index_id, total, indexed, building, failure]


def sealed_rows(state: CollectionState) -> int:
    return sum(stored.segment.rows for stored in state.stored.values())


def index_info(index: IndexDef, shards: Sequence[Mapping[str, Any]]) -> IndexInfo:
    """Return the index with its progress over sealed segments; growing rows are not counted, as in Milvus."""
    mine = [facts for shard in shards for facts in shard["indexes"] if facts[0] == index.index_id]
    total, indexed = sum(facts[1] for facts in mine), sum(facts[2] for facts in mine)
    failure = next((facts[4] for facts in mine if facts[4]), "")
    building = any(facts[3] for facts in mine)
    if index.is_scalar:  # each segment makes it when a filter asks for it
        total = indexed = sum(shard["rows"] for shard in shards)
    return IndexInfo(
        index_name=index.name,
        field_name=index.field_name,
        index_type=index.index_type,
        metric_type=index.metric_type,
        params={**index.params, **index.properties},
        state=IndexState.FAILED if failure else IndexState.IN_PROGRESS if building else IndexState.FINISHED,
        total_rows=total,
        indexed_rows=indexed,
        pending_rows=total - indexed,
        fail_reason=failure,
    )


def _segments_of(shard: Shard, state: CollectionState) -> list[Mapping[str, Any]]:
    def facts(segment_id: int, partition_id: PartitionId, rows: int, name: str) -> Mapping[str, Any]:
        return {
            "segmentID": segment_id,
            "collectionID": state.collection_id,
            "partitionID": partition_id,
            "vChannel": f"annulus-dml_{shard.shard_id}_{state.collection_id}v0",
            "numRows": rows,
            "state": name,
            "level": "L1",
            "isSorted": False,
            "insertLogs": [],
            "deltaLogs": [],
            "statsLogs": [],
        }

    growing = [facts(one.segment_id, one.partition_id, one.rows, "Growing") for one in state.growing.values()]
    stored = [
        facts(i, one.segment.partition_id, one.segment.rows, "Flushed" if one.is_flushed else "Sealed")
        for i, one in state.stored.items()
    ]
    return [*growing, *stored]
