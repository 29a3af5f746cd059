"""Watches every replica apply its log: what all of them must agree on, checked while it happens.

what is promised of every log (invariants.py), among others that the same position holds the same entry on every replica
and in every life; and now and then, that the same position gives the same state
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final
from weakref import WeakKeyDictionary

import cbor2
import numpy as np

from cluster.control import Control
from cluster.machine import Acknowledge, StateMachine
from cluster.message import Entry
from cluster.shard import Shard, StoredSegment
from storage.columns import Column, VectorColumn
from storage.growing import GrowingSegment
from storage.sealed import SealedSegment
from storage.types import Position
from tests.sim.history import Violation
from tests.sim.invariants import Before, Logs, Step

DIGEST_EVERY: Final = 24
"""Positions from one comparison of whole states to the next."""


def digest_of(machine: StateMachine) -> str:
    """Return a digest of what replicas must agree on: not what is in memory only, nor what checkpoints wrote."""
    assert isinstance(machine, Shard | Control)
    plain = _plain_control(machine) if isinstance(machine, Control) else _plain_shard(machine)
    shared = machine.freeze_machine().to_plain()
    whole = [plain, *(shared[name] for name in ("position", "tick", "outcomes"))]
    return blake2b(cbor2.dumps(whole, default=_default), digest_size=8).hexdigest()


@dataclass
class Witness:
    """What has been seen of one world. Used as `with witness.watching(): ...`."""

    logs: Logs = field(default_factory=Logs)
    digests: dict[tuple[str, Position], str] = field(default_factory=dict)
    compared: int = 0
    violation: Violation | None = None
    """The first; also raised where it happens, which is in the middle of a node."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        apply = StateMachine.apply

        @functools.wraps(apply)
        def watched(machine: StateMachine, position: Position, entry: Entry) -> Acknowledge | None:
            if position <= machine.position:
                return apply(machine, position, entry)
            name = _name(machine)
            before = Before.of(machine, entry, is_new=not self.logs.knows(name, position))
            done = apply(machine, position, entry)
            if done is not None:
                if wrong := self.logs.check(name, Step(machine, position, entry, done, before)):
                    self._fail(wrong)
                if position % DIGEST_EVERY == 0:
                    self.compare(machine)
            return done

        StateMachine.apply = watched  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            StateMachine.apply = apply  # type: ignore[method-assign]

    def compare(self, machine: StateMachine, *, anew: bool = False) -> None:
        """Raise Violation if another replica had another state at this machine's position.

        anew  read all rows again, also those that were read when they were new
        """
        if anew:
            _contents.clear()
        where = (_name(machine), machine.position)
        digest = digest_of(machine)
        known = self.digests.setdefault(where, digest)
        self.compared += 1
        if known != digest:
            self._fail(f"I-SH-1: {where[0]}: replicas differ at position {where[1]}: {known} and {digest}")

    def _fail(self, text: str) -> None:
        violation = Violation(text)
        self.violation = self.violation or violation
        raise violation


def _name(machine: StateMachine) -> str:
    return f"shard {machine.shard_id}" if isinstance(machine, Shard) else "control"


def _plain_control(control: Control) -> Any:
    return [control.catalog.to_bytes(), control.membership.to_plain(), control.keys.to_plain(), control.jobs.to_plain()]


def _plain_shard(shard: Shard) -> Any:
    collections = []
    for state in shard.collections.values():
        growing = [[*_rows(one), one.created_tick] for one in state.growing.values()]
        stored = [_stored(one) for one in state.stored.values()]
        loaded = None if state.loaded is None else sorted(state.loaded)
        indexes = [[one.index_id, one.field_id, one.spec.to_dict()] for one in state.indexes.values()]
        facts = [state.collection_id, state.schema.to_dict(), sorted(state.partitions), dict(state.properties), loaded]
        collections.append([*facts, indexes, growing, stored])
    return [collections, shard.next_segment]


def _stored(one: StoredSegment) -> Any:
    files = None if one.segment.files is None else one.segment.files.to_dict()
    return [*_rows(one.segment), files, {str(i): blob.to_dict() for i, blob in sorted(one.indexes.items())}]


_contents: WeakKeyDictionary[Any, tuple[int, int, Any]] = WeakKeyDictionary()
"""Segment -> version of the schema, how many rows were read under it, and what they hash to so far: rows never change,
so each is read once, and again in the end. Row by row, as replicas look at different moments of a segment."""


def _rows(segment: GrowingSegment | SealedSegment) -> list[Any]:
    view = segment.view()
    version, seen, hashed = _contents.get(segment, (-1, 0, blake2b()))
    if version != view.schema.version or seen > view.rows:
        version, seen, hashed = view.schema.version, 0, blake2b(digest_size=16)
    if seen < view.rows:
        fresh = view.fetch(np.arange(seen, view.rows, dtype=np.int64), [one.id for one in view.schema.fields])
        columns = [_values(fresh.columns[field_id]) for field_id in sorted(fresh.columns)]
        for row in zip(*columns, strict=True):
            hashed.update(repr(row).encode())
    _contents[segment] = (version, view.rows, hashed)
    deletes = view.deletes
    return [
        *(view.segment_id, view.partition_id, view.sealed, view.rows, hashed.digest()),
        *(view.ticks.tobytes(), deletes.offsets.tobytes(), deletes.ticks.tobytes()),
    ]


def _values(column: Column) -> list[Any]:
    return [row.tobytes() for row in column.values] if isinstance(column, VectorColumn) else column.to_list()


def _default(encoder: cbor2.CBOREncoder, value: object) -> None:
    encoder.encode(repr(value))
