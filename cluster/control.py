"""The control group's state machine: cluster id, nodes, placements, catalogue and its open tasks, driven by its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import cbor2

from cluster.catalog import Catalog
from cluster.ddl import BeginDdl, EndDdl, begin, end
from cluster.machine import FrozenMachine, StateMachine
from cluster.membership import FormCluster, Membership
from cluster.message import Message
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

    def to_bytes(self) -> bytes:
        plain: dict[str, Any] = {"catalog": self.catalog.to_bytes(), "cluster_id": self.cluster_id}
        plain["membership"] = self.membership.to_plain()
        return cbor2.dumps({**self.machine.to_plain(), **plain})


class Control(StateMachine):
    """One replica's copy of the catalogue."""

    def __init__(self, shard_count: int) -> None:
        super().__init__()
        self.catalog = Catalog(shard_count)
        self.cluster_id = ""
        """Empty until the first leader has given one; a node without peers needs none."""
        self.membership = Membership()

    def _execute(self, message: Message, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        match message:
            case BeginDdl():
                task = begin(self.catalog, message, tick)
                return {} if task is None else {"task": asdict(task)}
            case EndDdl(task_id):
                end(self.catalog, task_id)
                return {}
            case FormCluster():
                if not self.cluster_id:  # the first one stays
                    self.membership.form(message, self.catalog.shard_count)
                    self.cluster_id = message.cluster_id
                return {"cluster_id": self.cluster_id}
            case _:
                changed = self.membership.change(message)
                return self.catalog.change(message) if changed is None else changed

    def freeze(self, term: int | None = None, *, reset_log: bool = False) -> FrozenControl:
        """Return the whole state as it is now, in time proportional to the number of collections, not of fields.

        term, reset_log  see FrozenMachine
        """
        return FrozenControl(
            self.freeze_machine(term, reset_log=reset_log), self.catalog.copy(), self.cluster_id, self.membership.copy()
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
        control.membership = Membership.from_plain(data["membership"])
        return control
