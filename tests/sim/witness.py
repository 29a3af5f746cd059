"""Watches every replica apply its log: what all of them must agree on, checked while it happens.

the same position holds the same entry, with the same tick and the same outcome, on every replica and in every life
ticks ascend strictly
what a broadcast brings to several shards is in order on each (order.py)
now and then, the same position gives the same state
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
from tests.sim.order import Order

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

    entries: dict[tuple[str, Position], tuple[Any, ...]] = field(default_factory=dict)
    digests: dict[tuple[str, Position], str] = field(default_factory=dict)
    order: Order = field(default_factory=Order)
    compared: int = 0
    violation: Violation | None = None
    """The first; also raised where it happens, which is in the middle of a node."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        apply = StateMachine.apply

        @functools.wraps(apply)
        def watched(machine: StateMachine, position: Position, entry: Entry) -> Acknowledge | None:
            before = machine.tick
            done = apply(machine, position, entry)
            if done is not None:
                self._saw(machine, position, entry, done, before)
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
            self._fail(f"{where[0]}: replicas differ at position {where[1]}: {known} and {digest}")

    def _saw(self, machine: StateMachine, position: Position, entry: Entry, done: Acknowledge, before: int) -> None:
        name = _name(machine)
        if done.tick <= before:
            self._fail(f"{name}: tick {done.tick} at position {position} after {before}")
        fact = (entry.producer, entry.sequence, entry.stamp, entry.message.kind, done.tick, done.outcome)
        known = self.entries.setdefault((name, position), fact)
        wrong = "" if isinstance(machine, Control) else self.order.saw(name, position, entry, done.outcome)
        if wrong:
            self._fail(f"{name}: position {position}: {wrong}")
        if known != fact:
            self._fail(f"{name}: position {position} is {known} on one replica and {fact} on another")
        if position % DIGEST_EVERY == 0:
            self.compare(machine)

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
