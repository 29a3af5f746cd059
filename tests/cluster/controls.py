"""A control group driven by hand: requests in, outcomes out, tasks carried through or left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.catalog import Collection, IndexDef, Task
from cluster.control import Control
from cluster.ddl import AckDdl, BeginDdl, messages
from cluster.machine import Outcome, Rejected
from cluster.message import Entry, Message
from index.spec import parse_index_spec
from storage.schema import DataType, FieldSchema, make_schema
from storage.types import FieldId, IndexId, Position, ShardId, tick_from_ms

SHARDS = 4
SCHEMA = make_schema(
    [FieldSchema("id", DataType.INT64, primary=True), FieldSchema("v", DataType.FLOAT_VECTOR, dim=2)], dynamic=True
)
TWO_VECTORS = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
        FieldSchema("w", DataType.FLOAT_VECTOR, dim=2),
    ],
    dynamic=False,
)
KEYED = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("owner", DataType.INT64, partition_key=True),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
    ],
    dynamic=False,
)


def new_collection(**changed: Any) -> dict[str, Any]:
    """Return the request of a create_collection."""
    request = {
        "schema": SCHEMA.to_dict(), "shards": 2, "partitions": ["_default"], "description": "",
        "consistency": "Bounded", "properties": {},
    }  # fmt: skip
    return {**request, **changed}


def new_index(name: str = "v", field: str = "v", metric: str = "L2") -> dict[str, Any]:
    """Return the request of a create_index."""
    spec = parse_index_spec("FLAT", metric, {}).to_dict()
    one = IndexDef(IndexId(0), name, FieldId(101 if field == "v" else 102), field, "FLAT", metric, spec)
    plain = {key: getattr(one, key) for key in one.__dataclass_fields__ if key != "index_id"}
    return {"index": plain}


class Driver:
    """Gives each message its place in the log; `log` has the bytes."""

    def __init__(self) -> None:
        self.control = Control(SHARDS)
        self.log: list[tuple[Position, bytes]] = []

    def say(self, message: Message) -> Outcome:
        position = Position(len(self.log) + 1)
        payload = Entry("tests", position, tick_from_ms(1_000 + position), message).encode()
        self.log.append((position, payload))
        told = self.control.apply(position, Entry.decode(payload))
        assert told is not None
        return told.outcome

    def begin(self, kind: str, name: str, request: Mapping[str, Any] | None = None, database: str = "default") -> Any:
        """Return the task, None if there is nothing to do, or the refusal."""
        outcome = self.say(BeginDdl(kind, database, name, request or {}))
        if isinstance(outcome, Rejected):
            return outcome
        return self.control.catalog.tasks[outcome["task"]] if outcome else None

    def told(self, task: Task) -> list[tuple[ShardId, Message]]:
        return messages(self.control.catalog, task)

    def end(self, task: Task) -> None:
        assert self.say(AckDdl(task.task_id, [shard for shard, _ in self._shards_of(task)])) == {}

    def _shards_of(self, task: Task) -> list[tuple[ShardId, Message]]:
        return self.told(task) if task.task_id in self.control.catalog.tasks else []

    def carry(self, kind: str, name: str, request: Mapping[str, Any] | None = None, database: str = "default") -> Any:
        """Carry the change through; return what shards were told, or None, or the refusal."""
        task = self.begin(kind, name, request, database)
        if not isinstance(task, Task):
            return task
        told = self.told(task)
        self.end(task)
        return told

    def find(self, name: str, database: str = "default") -> Collection:
        return self.control.catalog.find(database, name)


def refused(outcome: Any, code: str, text: str) -> bool:
    """Say that an outcome is a refusal of this code whose sentence has this text."""
    assert isinstance(outcome, Rejected), outcome
    assert (outcome.code, text in outcome.message) == (code, True), outcome
    return True


def driver(*changes: Any) -> Driver:
    """Return a driver after these changes were carried through: (kind, name, request) or a message."""
    one = Driver()
    for change in changes:
        outcome = one.say(change) if isinstance(change, Message) else one.carry(*change)
        assert not isinstance(outcome, Rejected), outcome
    return one


def restored(control: Control) -> Control:
    return Control.restore(control.checkpoint())
