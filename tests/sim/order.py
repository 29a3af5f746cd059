"""What stands in a shard's log, and in which order: the rules of changes that a broadcast brings to several shards.

I-MS-3  a collection's creation comes first and its drop last; rows come to live partitions of live collections only,
        at every prefix of the log
I-MS-4  a task says the same to every shard, and is executed once on each
I-MS-6  rows that say their schema's version are taken only while the collection has it
I-CO-3  of two changes of one collection the earlier one comes first on every shard, as in the catalogue
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.machine import Outcome, Rejected
from cluster.message import (
    AlterCollection,
    CreateCollection,
    CreatePartition,
    Delete,
    DropCollection,
    DropPartition,
    Entry,
    Insert,
    Message,
    Seal,
    to_plain,
)
from storage.types import Position

TASK = "task/"


@dataclass
class _Seen:
    """What a shard's log has said of a collection."""

    partitions: set[int] = field(default_factory=set)
    version: int = 0
    dropped: bool = False
    last_task: int = 0


@dataclass
class _Log:
    position: Position = Position(0)
    collections: dict[int, _Seen] = field(default_factory=dict)
    executed: set[tuple[str, int]] = field(default_factory=set)


class Order:
    """Follows the logs of all shards, each entry once, when the first replica applies it."""

    def __init__(self) -> None:
        self._logs: dict[str, _Log] = {}
        self._said: dict[str, tuple[str, list[Any]]] = {}

    def saw(self, shard: str, position: Position, entry: Entry, outcome: Outcome) -> str:
        """Return what is wrong with the entry, "" if nothing is."""
        log = self._logs.setdefault(shard, _Log())
        if position <= log.position:
            return ""  # a replica that is behind; it is compared with the one before it
        log.position = position
        if (entry.producer, entry.sequence) in log.executed:
            return ""  # a repeat, which gets the first outcome
        log.executed.add((entry.producer, entry.sequence))
        message = entry.message
        collection_id = getattr(message, "collection_id", None)
        seen = None if collection_id is None else log.collections.get(collection_id)
        if entry.producer.startswith(TASK):
            said = self._said.setdefault(entry.producer, to_plain(message))
            if said != to_plain(message):
                return f"I-MS-4: {entry.producer} says {to_plain(message)} here, and {said} elsewhere"
            task_id = int(entry.producer.removeprefix(TASK))
            if seen is not None and task_id < seen.last_task:
                return f"I-CO-3: {entry.producer} comes after task/{seen.last_task} of the same collection"
            if seen is not None:
                seen.last_task = task_id
        if isinstance(outcome, Rejected) or collection_id is None:
            return ""
        return self._follow(log, message, collection_id, seen)

    def _follow(self, log: _Log, message: Message, collection_id: int, seen: _Seen | None) -> str:
        if isinstance(message, CreateCollection):
            if seen is not None:
                return f"I-MS-3: collection {collection_id} is created twice"
            log.collections[collection_id] = _Seen({*message.partitions}, message.schema["version"])
            return ""
        if not isinstance(message, Insert | Delete | Seal | CreatePartition | DropPartition | AlterCollection):
            if seen is not None and isinstance(message, DropCollection):
                seen.dropped = True
            return ""
        what = f"{message.kind} of collection {collection_id}"
        if seen is None or seen.dropped:
            return f"I-MS-3: {what}, which is {'not created' if seen is None else 'dropped'}"
        match message:
            case Insert(partition_id=partition_id, others=others, schema_version=version):
                strange = {partition_id, *(one for one, _ in others)} - seen.partitions
                if strange:
                    return f"I-MS-3: {what} into partitions {strange}, which are not there"
                if version not in (0, seen.version):
                    return f"I-MS-6: {what} with version {version} of the schema, which has version {seen.version}"
            case CreatePartition(partition_id=partition_id):
                seen.partitions.add(partition_id)
            case DropPartition(partition_id=partition_id):
                seen.partitions.discard(partition_id)
            case AlterCollection(schema=schema) if schema is not None:
                seen.version = max(seen.version, schema["version"])
        return ""
