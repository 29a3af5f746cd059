"""The control group's state machine: cluster id, nodes, placements, catalogue and its open tasks, driven by its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import cbor2

from cluster.access import Access
from cluster.catalog import Catalog, DropDatabase, RenameCollection
from cluster.ddl import AckDdl, BeginDdl, acknowledge, begin
from cluster.idempotency import CloseKey, KeyedStep, Keys, OpenKey
from cluster.jobs import BeginCompaction, CompactedShard, Jobs
from cluster.machine import FrozenMachine, StateMachine
from cluster.membership import FormCluster, Membership
from cluster.message import Message
from cluster.parse import check_values
from storage.types import Tick

CONTROL_GROUP: Final = 0
"""The Raft group of all nodes. Nothing is promised to a client but on the ground of what it has decided."""


@dataclass(frozen=True)
class FrozenControl:
    """The control group's state at one position, to be written by a worker."""

    machine: FrozenMachine
    catalog: Catalog
    cluster_id: str
    membership: Membership
    keys: Keys
    jobs: Jobs
    access: Access

    def to_bytes(self) -> bytes:
        plain: dict[str, Any] = {"catalog": self.catalog.to_bytes(), "cluster_id": self.cluster_id}
        plain["membership"] = self.membership.to_plain()
        plain["keys"], plain["jobs"] = self.keys.to_plain(), self.jobs.to_plain()
        plain["access"] = self.access.to_plain()
        return cbor2.dumps({**self.machine.to_plain(), **plain})


class Control(StateMachine):
    """One replica's copy of the catalogue."""

    def __init__(self, shard_count: int) -> None:
        super().__init__()
        self.catalog = Catalog(shard_count)
        self.cluster_id = ""
        """Empty until the first leader has given one; a node without peers needs none."""
        self.membership = Membership()
        self.keys = Keys()
        self.jobs = Jobs()
        self.access = Access()

    def _execute(self, message: Message, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        check_values(message, message.kind)
        match message:
            case BeginDdl():
                task = begin(self.catalog, message, tick)
                return {} if task is None else {"task": task.task_id}
            case AckDdl():
                self._acknowledge(message)
                return {}
            case FormCluster():
                if not self.cluster_id:  # the first one stays
                    self.membership.form(message, self.catalog.shard_count)
                    self.cluster_id = message.cluster_id
                return {"cluster_id": self.cluster_id}
            case OpenKey():
                return self.keys.open(message, tick)
            case KeyedStep():
                return self.keys.step(message, lambda command: self._execute(command, b"", tick))
            case CloseKey():
                return self.keys.close(message)
            case RenameCollection(database, name, new_database, new_name):
                answer = self.catalog.change(message)
                self.access.follow(database, name, (new_database, new_name))
                return answer
            case DropDatabase(name):
                answer = self.catalog.change(message)
                self.access.forget_database(name)
                return answer
            case BeginCompaction():
                return self.jobs.begin(self.catalog, message)
            case CompactedShard():
                self.jobs.done(message)
                return {}
            case _:
                changed = self.membership.change(message)
                if changed is None:
                    changed = self.access.change(message, tick)
                return self.catalog.change(message) if changed is None else changed

    def _acknowledge(self, message: AckDdl) -> None:
        """Note who is told of a change; a collection that is gone with it takes its grants along, as in Milvus."""
        catalog = self.catalog
        task = catalog.tasks.get(message.task_id)
        owner = None if task is None else catalog.collections.get(task.collection_id)
        acknowledge(catalog, message)
        if owner is not None and owner.collection_id not in catalog.collections:
            self.access.forget(owner.database, owner.name)

    def freeze(self, term: int | None = None, *, reset_log: bool = False) -> FrozenControl:
        """Return the whole state as it is now, in time proportional to the number of collections, not of fields.

        term, reset_log  see FrozenMachine
        """
        return FrozenControl(
            self.freeze_machine(term, reset_log=reset_log),
            self.catalog.copy(),
            self.cluster_id,
            self.membership.copy(),
            self.keys.copy(),
            self.jobs.copy(),
            self.access.copy(),
        )

    def checkpoint(self) -> bytes:
        """Return the whole state as bytes; `restore` takes them back."""
        return self.freeze().to_bytes()

    @classmethod
    def restore(cls, raw: bytes) -> Control:
        data = cbor2.loads(raw)
        control = cls(0)
        control.load_machine(data)
        control.catalog = Catalog.from_bytes(data["catalog"])
        control.cluster_id = data["cluster_id"]
        control.membership = Membership.from_plain(data["membership"]) if "membership" in data else Membership()
        control.keys, control.jobs = Keys.from_plain(data["keys"]), Jobs.from_plain(data["jobs"])
        control.access = Access.from_plain(data["access"]) if "access" in data else Access()
        return control
