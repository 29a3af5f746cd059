"""What a node says of itself: its state, its collections and shards as they are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.catalog import Collection
from node.facts import index_facts, index_info, sealed_rows, states_of
from node.node import Node
from node.service import IndexInfo


async def status_of(node: Node) -> Mapping[str, Any]:
    """Return what `GET /status` and `annulus status` show."""
    name, why = node.settings.node.name, node.why_not_ready
    if not node.takes_part:
        return {"node": name, "state": "not ready", "reason": why}
    catalog = node.catalog
    ready, total = node.loading
    return {
        "node": name,
        "state": "not ready" if why else "ready",
        "reason": why,
        "cluster": await node.describe_cluster(),
        "healing": node.healing.view(),
        "read_only": node.read_only_reason,
        "admission": {**node.admission.view(), "sealed_early": node.crowding.sealed},
        "segments_in_memory": [ready, total],
        "journal": {"bytes": node.journal.bytes_on_disk, "files": node.journal.files},
        "chunks": {"bytes": node.seams.disk.used_bytes(f"{node.settings.node.data}/chunks")},
        "changes": node.broadcaster.view(),
        "collections": [_collection_status(node, one) for one in catalog.collections.values()],
        "shards": [
            {
                "shard": shard_id,
                "leader": host.leader,
                "replicas": list(node.replicas_of(shard_id)),
                "term": host.raft.term,
                "position": host.machine.position,
                "checkpoint": node.upkeep[shard_id].checkpoints.position,
                "tick": host.machine.tick,
                "segments": sum(1 for state in host.machine.collections.values() for _ in state.segments()),
                "rows": sum(s.live_rows for state in host.machine.collections.values() for s in state.segments()),
            }
            for shard_id, host in node.shards.items()
        ],
    }


def _collection_status(node: Node, one: Collection) -> Mapping[str, Any]:
    states = [state for _, state in states_of(node, one)]
    facts = [
        {
            "indexes": [index_facts(state, index_id, node.upkeep[shard_id]) for index_id in state.indexes],
            "rows": sealed_rows(state),
        }
        for shard_id, state in states_of(node, one)
    ]
    segments = [segment for state in states for segment in state.segments()]
    return {
        "database": one.database,
        "name": one.name,
        "id": one.collection_id,
        "loaded": one.is_loaded,
        "rows": sum(segment.live_rows for segment in segments),
        "deleted_rows": sum(len(segment.deletes) for segment in segments),
        "growing_segments": sum(len(state.growing) for state in states),
        "sealed_segments": sum(len(state.stored) for state in states),
        "memory_bytes": sum(segment.nbytes for segment in segments),
        "chunk_bytes": sum(
            (stored.segment.files.nbytes if stored.segment.files else 0)
            + sum(blob.nbytes for blob in stored.indexes.values())
            for state in states
            for stored in state.stored.values()
        ),
        "indexes": [_index_status(index_info(index, facts)) for index in one.indexes.values()],
    }


def _index_status(info: IndexInfo) -> dict[str, Any]:
    return {
        "name": info.index_name,
        "type": info.index_type,
        "metric": info.metric_type,
        "state": str(info.state),
        "indexed_rows": info.indexed_rows,
        "total_rows": info.total_rows,
    }
