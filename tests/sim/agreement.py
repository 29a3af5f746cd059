"""Whether the shards have what the catalogue says that they have: the outcome of every change of it, and no other."""

from __future__ import annotations

from cluster.catalog import Collection
from cluster.shard import CollectionState
from node.node import Node


def disagreements(node: Node) -> list[str]:
    """Return where the shards of a node are not as its catalogue says; both must have applied all there is.

    A collection that is being changed is looked at too: nothing may be left open when all is quiet.
    """
    catalog = node.catalog
    found = [f"task {task.task_id} ({task.kind}) is open" for task in catalog.tasks.values()]
    for shard_id, host in node.shards.items():
        states = host.machine.collections
        wanted = {one.collection_id: one for one in catalog.collections.values() if shard_id in one.shards}
        for collection_id in sorted(states.keys() | wanted.keys()):
            where = f"shard {shard_id} collection {collection_id}"
            if collection_id not in wanted:
                found.append(f"{where} is not in the catalogue")
            elif collection_id not in states:
                found.append(f"{where} is in the catalogue only")
            else:
                found += [f"{where}: {text}" for text in _differences(wanted[collection_id], states[collection_id])]
    return found


def _differences(wanted: Collection, state: CollectionState) -> list[str]:
    said = {
        "schema": wanted.schema,
        "partitions": set(wanted.partitions.values()),
        "properties": dict(wanted.properties),
        # Nothing is built for the others: the catalogue's word is enough.
        "indexes": {one.index_id: one.field_id for one in wanted.indexes.values() if not one.is_scalar},
    }
    is_so = {
        "schema": state.schema,
        "partitions": state.partitions,
        "properties": dict(state.properties),
        "indexes": {one.index_id: one.field_id for one in state.indexes.values()},
    }
    different = [f"{name} is {is_so[name]}, should be {said[name]}" for name in said if is_so[name] != said[name]]
    for name, partition_id in wanted.partitions.items():
        loaded = wanted.loaded is None or partition_id in wanted.loaded
        if state.is_loaded(partition_id) is not loaded:
            different.append(f"partition {name} should {'' if loaded else 'not '}be loaded")
    return different
