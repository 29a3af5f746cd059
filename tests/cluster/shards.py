"""A shard on two replicas beside a model of it: what the property tests of the shard and its checkpoint step through.

`first` is the replica that does the work: what it builds is handed over to it in memory. `second` has the log and the
chunks, never a hand-over and never a checkpoint; `archive` keeps for it every chunk that was ever written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

import numpy as np

from cluster.checkpoint import rows_from
from cluster.ddl import TTL_PROPERTY
from cluster.machine import Outcome, Rejected
from cluster.message import (
    AlterCollection,
    Compacted,
    CreateCollection,
    CreateIndex,
    CreatePartition,
    Delete,
    DropCollection,
    DropIndex,
    DropPartition,
    Entry,
    Flushed,
    Indexed,
    Insert,
    LoadCollection,
    Message,
    ReleaseCollection,
    Seal,
    TruncateCollection,
)
from cluster.shard import Shard, StoredSegment
from cluster.tick import next_tick
from index.engines import build
from index.spec import parse_index_spec
from storage.columns import NUMPY_TYPES, Batch, Column, ScalarColumn, StringColumn
from storage.compaction import merge
from storage.deletes import Ticks
from storage.evolution import with_field, with_field_params, without_field
from storage.filter.compiled import compile_filter
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.sealed import prepare, prepare_from_files
from storage.search import count
from storage.segment_files import Chunks, SegmentFiles, write_blob, write_segment
from storage.strings import StringArray
from storage.types import (
    TICK_MAX,
    CollectionId,
    FieldId,
    IndexId,
    PartitionId,
    Position,
    SegmentId,
    ShardId,
    Tick,
    tick_from_ms,
)
from storage.view import SegmentView
from tests.sim.chunks import SimChunks
from tests.storage.rows import DIM, GROUP, META, NOTE, PK, VECTOR, as_keys, make_batch, make_collection

SHARD: Final = ShardId(3)
KEYS: Final = 6
FIELDS: Final = (PK, GROUP, NOTE, VECTOR, META)

Row = tuple[Any, ...]
"""(partition, its fields in the order of the schema, inserted tick)."""


@dataclass
class ModelRow:
    partition: int
    number: int
    version: int
    inserted: int
    schema: CollectionSchema
    """For which it was inserted."""
    deleted: int = TICK_MAX


@dataclass
class ModelCollection:
    """What a collection's rows are, by scanning a list."""

    schema: CollectionSchema
    partitions: set[int]
    rows: list[ModelRow] = field(default_factory=list)
    ttl_s: int = 0
    floor: int = 0
    """The newest tick as of which rows were compacted: rows dead by then are gone."""

    def live(self, tick: int, expire_before: int = 0) -> list[ModelRow]:
        return [row for row in self.rows if expire_before <= row.inserted <= tick < row.deleted]

    def kill(self, numbers: Sequence[int], tick: int, partitions: Sequence[int] | None = None) -> int:
        dying = [
            row
            for row in self.rows
            if row.number in numbers
            and row.deleted == TICK_MAX
            and row.inserted < tick
            and (partitions is None or row.partition in partitions)
        ]
        for row in dying:
            row.deleted = tick
        return len(dying)


class World:
    """Steps are methods; each applies messages to both replicas and the model, and compares what they answer."""

    def __init__(self, pk: DataType, metric: str, store: SimChunks | None = None) -> None:
        self.schema = make_collection(pk)
        self.spec = parse_index_spec("FLAT", metric, {})
        self.store = SimChunks(Random(0)) if store is None else store
        self.archive: dict[bytes, bytes] = {}
        self.first: Shard = Shard(SHARD, self._get)
        self.second = Shard(SHARD, self.archive.__getitem__)
        self.model: dict[int, ModelCollection] = {}
        self.log: list[tuple[Position, bytes]] = []
        self.ms = 1_000_000
        self.sequence = 0
        self._values: dict[tuple[int, int], Mapping[FieldId, Any]] = {}
        self.busy = False
        """A checkpoint is under way, so nobody writes chunks for messages."""

    def _get(self, digest: bytes) -> bytes:
        return self.store.get(SHARD, digest)

    # the log

    def say(self, message: Message, body: bytes = b"") -> tuple[Outcome, int]:
        """Append the message to the log and apply it everywhere; return (outcome, tick)."""
        self.sequence += 1
        return self.append(Entry("tests", self.sequence, tick_from_ms(self.ms), message, body).encode())

    def append(self, payload: bytes) -> tuple[Outcome, int]:
        position = Position((self.log[-1][0] if self.log else 0) + 1 + self.sequence % 2)  # Raft has entries of its own
        self.log.append((position, payload))
        told, expected = (
            self.first.apply(position, Entry.decode(payload)),
            self.second.apply(position, Entry.decode(payload)),
        )
        assert told is not None and told == expected, "replicas answer alike"
        assert self.first.apply(position, Entry.decode(payload)) is None, "an entry is applied once"
        return told.outcome, told.tick

    def expect(self, wanted: Mapping[str, Any] | str, message: Message, body: bytes = b"") -> int:
        """Say it, and hold the answer, or the code of the refusal, against what is wanted; return the tick."""
        outcome, tick = self.say(message, body)
        assert (outcome.code if isinstance(outcome, Rejected) else outcome) == wanted, message
        return tick

    # steps: catalogue

    def wait(self, ms: int) -> None:
        self.ms = max(0, self.ms + ms)

    def create(self, c: int) -> None:
        schema = self.schema.to_dict()
        self.expect({}, CreateCollection(CollectionId(c), schema, [PartitionId(1)], {}))
        self.model.setdefault(c, ModelCollection(self.schema, {1}))

    def drop(self, c: int) -> None:
        self.expect({}, DropCollection(CollectionId(c)))
        self.model.pop(c, None)

    def truncate(self, c: int) -> None:
        self._known(c, TruncateCollection(CollectionId(c), self.sequence + 1))
        if c in self.model:
            self.model[c].rows.clear()

    def create_partition(self, c: int, p: int) -> None:
        self._known(c, CreatePartition(CollectionId(c), PartitionId(p)))
        if c in self.model:
            self.model[c].partitions.add(p)

    def drop_partition(self, c: int, p: int) -> None:
        self._known(c, DropPartition(CollectionId(c), PartitionId(p)))
        if c in self.model:
            known = self.model[c]
            known.partitions.discard(p)
            known.rows = [row for row in known.rows if row.partition != p]

    def load(self, c: int, partitions: list[int] | None) -> None:
        self._known(c, LoadCollection(CollectionId(c), _ids(partitions)))

    def release(self, c: int, partitions: list[int] | None) -> None:
        self._known(c, ReleaseCollection(CollectionId(c), _ids(partitions)))

    def alter(self, c: int, ttl_s: int) -> None:
        self._known(c, AlterCollection(CollectionId(c), _lifetime(ttl_s)))
        if c in self.model:
            self.model[c].ttl_s = ttl_s

    def evolve(self, c: int, what: str, pick: int) -> None:
        """Add a field, drop one, or let one grow; or tell the shard a schema again that it has."""
        known = self.model.get(c)
        schema = self._schema(c)
        name = f"x{pick % 3}"
        if what == "drop":
            droppable = [one.name for one in schema.fields if one.id not in (PK, VECTOR, META)]
            schema = without_field(schema, droppable[pick % len(droppable)]) if droppable else schema
        elif what == "grow":
            longest = {"max_length": str(2_000 + schema.version)}
            schema = with_field_params(schema, "note", longest) if "note" in schema.by_name else schema
        elif what != "again" and name not in schema.by_name:
            schema = with_field(schema, replace(ADDED[what], name=name))
        self._known(c, AlterCollection(CollectionId(c), _lifetime(known.ttl_s if known else 0), schema.to_dict()))
        if known is not None:
            known.schema = schema

    def create_index(self, c: int, number: int) -> None:
        self._known(c, CreateIndex(CollectionId(c), IndexId(number), VECTOR, self.spec.to_dict()))

    def drop_index(self, c: int, number: int) -> None:
        self._known(c, DropIndex(CollectionId(c), IndexId(number)))

    def _schema(self, c: int) -> CollectionSchema:
        return self.model[c].schema if c in self.model else self.schema

    def _known(self, c: int, message: Message) -> None:
        self.expect({} if c in self.model else "collection_not_found", message)

    # steps: rows

    def insert(self, c: int, p: int, numbers: list[int], version: int) -> None:
        self._insert(c, p, numbers, version, Insert(CollectionId(c), PartitionId(p)), kills=False)

    def insert_late(self, c: int, p: int, numbers: list[int], version: int, by: int) -> None:
        """Insert rows of another version of the schema, as one who has not heard of the change does."""
        known = self.model.get(c)
        body = rows_of(self, numbers, version).to_bytes()
        number = by + (known.schema.version if known else 1)
        refused = "collection_not_found" if known is None else "schema_mismatch"
        if number:
            self.expect(refused, Insert(CollectionId(c), PartitionId(p), schema_version=number), body)

    def insert_both(self, c: int, numbers: list[int], version: int, replace: bool) -> None:
        """Say the rows of two partitions in one message: the last one's in partition 2, all others' in 1."""
        known = self.model.get(c)
        message = Insert(CollectionId(c), PartitionId(1), replace, others=[(PartitionId(2), 1)])
        body = rows_of(self, numbers, version, self._schema(c)).to_bytes()
        if known is None or not known.partitions >= {1, 2}:
            self.expect("collection_not_found" if known is None else "partition_not_found", message, body)
            return
        outcome, tick = self.say(message, body)
        assert outcome == {"rows": len(numbers), "deleted": known.kill(numbers, tick) if replace else 0}
        known.rows += [ModelRow(1, one, version, tick, known.schema) for one in numbers[:-1]]
        known.rows.append(ModelRow(2, numbers[-1], version, tick, known.schema))

    def upsert(self, c: int, p: int, numbers: list[int], version: int) -> None:
        self._insert(c, p, numbers, version, Insert(CollectionId(c), PartitionId(p), True), kills=True)

    def upsert_expecting(self, c: int, p: int, numbers: list[int], version: int, right: bool) -> None:
        """An upsert whose precondition holds, or does not."""
        known = self.model.get(c)
        state = self.first.collections.get(CollectionId(c))
        at = next_tick(self.first.tick, tick_from_ms(self.ms))  # what has expired by then is no row any more
        expire_before = 0 if state is None else state.expire_before(at)
        newest = {row.number: row.inserted for row in known.live(self.first.tick, expire_before)} if known else {}
        expected = [newest.get(one, 0) for one in numbers]
        if not right:
            expected[-1] += 1
        message = Insert(CollectionId(c), PartitionId(p), True, None, expected)
        self._insert(c, p, numbers, version, message, kills=True, refused=None if right else "conflict")

    def _insert(
        self,
        c: int,
        p: int,
        numbers: list[int],
        version: int,
        message: Insert,
        *,
        kills: bool,
        refused: str | None = None,
    ) -> None:
        known = self.model.get(c)
        body = rows_of(self, numbers, version, self._schema(c)).to_bytes()
        if known is None:
            self.expect("collection_not_found", message, body)
            return
        message = replace(message, schema_version=known.schema.version * (version % 2))
        if p not in known.partitions:
            self.expect("partition_not_found", message, body)
            return
        if refused:
            self.expect(refused, message, body)
            return
        outcome, tick = self.say(message, body)
        killed = known.kill(numbers, tick) if kills else 0
        assert outcome == {"rows": len(numbers), "deleted": killed}
        known.rows += [ModelRow(p, number, version, tick, known.schema) for number in numbers]

    def delete(self, c: int, numbers: list[int], partitions: list[int] | None) -> None:
        keys = as_keys(self.schema, numbers)
        plain = keys.astype("<i8").tobytes() if isinstance(keys, np.ndarray) else keys
        message = Delete(CollectionId(c), plain, _ids(partitions))
        if c not in self.model:
            self.expect("collection_not_found", message)
            return
        outcome, tick = self.say(message)
        assert outcome == {"rows": self.model[c].kill(numbers, tick, partitions)}

    # steps: a segment's life

    def seal(self, c: int, pick: int | None) -> None:
        state = self.first.collections.get(CollectionId(c))
        growing = [] if state is None else [one.segment_id for one in state.growing.values()]
        chosen = growing if pick is None else growing[pick : pick + 1]
        message = Seal(CollectionId(c), None if pick is None else [*chosen, SegmentId(999)])
        self.expect("collection_not_found" if state is None else {"segments": chosen}, message)

    def flush(self, c: int, pick: int, handed: bool) -> None:
        one = self._pick(c, pick, lambda one: not one.is_flushed)
        if one is None or self.busy:
            return
        view = one.segment.view()
        rows = prepare(*rows_from(view, 0), view.schema)
        files = self.put_rows(rows.batch, rows.ticks)
        if handed:
            self.first.hand_over_rows((view.segment_id,), rows)
        self.expect({}, Flushed(CollectionId(c), view.segment_id, files.to_dict()))

    def index(self, c: int, pick: int, number: int, salt: int, handed: bool) -> None:
        """Index a segment, perhaps again with other bytes, as after damage; perhaps with an index dropped meanwhile."""
        one = self._pick(c, pick, lambda one: one.is_flushed)
        if one is None or self.busy:
            return
        view = one.segment.view()
        built = build(
            self.spec,
            view.matrix(VECTOR, self.spec.metric),
            threads=1,
            progress=lambda _: None,
            cancelled=lambda: False,
        )
        files, chunks = write_blob(built.dump() + bytes([salt]))
        self.put(chunks)
        if handed:
            self.first.hand_over_index(view.segment_id, IndexId(number), built)
        self.expect({}, Indexed(CollectionId(c), view.segment_id, IndexId(number), files.to_dict()))

    def compact(self, c: int, p: int, count: int, meanwhile: list[tuple[Any, ...]], handed: bool) -> None:
        """Merge the first flushed segments of a partition while other things happen."""
        state = self.first.collections.get(CollectionId(c))
        if state is None or self.busy:
            return
        inputs = [one for one in state.stored.values() if one.is_flushed and one.segment.partition_id == p][:count]
        if not inputs:
            return
        ids = [one.segment.segment_id for one in inputs]
        views = [one.segment.view() for one in inputs]
        as_of, expire_before = self.first.tick, state.expire_before(self.first.tick)
        batch, ticks = merge(views, as_of, expire_before)
        for name, *arguments in meanwhile:
            getattr(self, name)(c, *arguments)
        files = self.put_rows(batch, ticks) if batch.rows else SegmentFiles(0, {})
        if handed:
            self.first.hand_over_rows(ids, prepare(batch, ticks, views[0].schema))
        there = state is self.first.collections.get(CollectionId(c)) and all(one in state.stored for one in ids)
        outcome, _ = self.say(Compacted(CollectionId(c), ids, as_of, expire_before, files.to_dict()))
        assert ("segment" in outcome) == (there and files.rows > 0)  # type: ignore[operator]
        if there:
            known = self.model[c]
            gone = {tick for view in views for tick in view.ticks.tolist() if tick < expire_before}
            known.rows = [row for row in known.rows if row.partition != p or row.inserted not in gone]
            known.floor = max(known.floor, as_of)

    def bring(self, c: int) -> None:
        """Read the columns of loaded partitions back into memory, as background work does."""
        state = self.first.collections.get(CollectionId(c))
        for one in [] if state is None else state.stored.values():
            segment = one.segment
            if state is not None and segment.released and state.is_loaded(segment.partition_id):
                assert segment.files is not None
                segment.load(prepare_from_files(segment.files, self._get, segment.schema))

    def repeat(self, back: int) -> None:
        """Append an entry again that is in the log already, as a retry does: nothing happens twice."""
        if self.log:
            payload = self.log[-1 - back % len(self.log)][1]
            before = summary(self.first, machine=False)
            self.append(payload)
            assert summary(self.first, machine=False) == before

    def _pick(self, c: int, pick: int, wanted: Any) -> StoredSegment | None:
        state = self.first.collections.get(CollectionId(c))
        found = [] if state is None else [one for one in state.stored.values() if wanted(one)]
        return found[pick % len(found)] if found else None

    # chunks

    def put(self, chunks: Chunks) -> None:
        made = list(chunks)
        self.archive.update(made)
        self.store.put_many(SHARD, made)

    def put_rows(self, batch: Batch, ticks: Ticks) -> SegmentFiles:
        files, chunks = write_segment(batch, ticks)
        self.put(chunks)
        return files

    # checks

    def check(self) -> None:
        """Both replicas have the model's rows, each once, at several ticks; their chunks are counted right."""
        assert set(self.first.collections) == set(self.model)
        for c, known in self.model.items():
            state = self.first.collections[CollectionId(c)]
            assert (state.partitions, state.schema) == (known.partitions, known.schema)
            tick = self.first.tick
            live = known.live(tick)
            wanted = sorted((self.expected(row, known.schema) for row in live), key=repr)
            assert sorted(rows_at(self.first.views(CollectionId(c)), tick), key=repr) == wanted
            for one in known.schema.fields:
                if one.id > META:
                    self.check_filter(f"{one.name} is null", c, one)
                    self.check_filter(f"{one.name} == {default_text(one)}", c, one)
            for at, expire_before in (
                (tick, state.expire_before(tick)),
                (max(known.floor, tick - 1), 0),
                ((known.floor + tick) // 2, 0),
            ):
                inserted = sorted(row.inserted for row in known.live(at, expire_before))
                assert sorted(ticks_at(self.first.views(CollectionId(c)), at, expire_before)) == inserted
        for shard in (self.first, self.second):
            assert shard.digests == recount(shard)
            assert not shard.garbage & shard.digests.keys(), "nothing that is needed is garbage"
            there = {one.segment_id for state in shard.collections.values() for one in state.segments()}
            assert shard.saved_deletes.keys() <= there, "a segment's delete log goes with it"
            for state in shard.collections.values():
                assert all(one.rows for one in state.segments()), "no segment is without rows"

    def expected(self, row: ModelRow, schema: CollectionSchema) -> Row:
        """Return the row as the schema shows it: what it was inserted with, else the default or null."""
        what = (row.number, row.version)
        if what not in self._values:
            (values,) = values_of(rows_of(self, [row.number], row.version), FIELDS)
            self._values[what] = dict(zip(FIELDS, values, strict=True))
        return (row.partition, *(self.value(row, one) for one in schema.fields), row.inserted)

    def value(self, row: ModelRow, one: FieldSchema) -> Any:
        if one.id not in row.schema.by_id:
            return one.default
        known = self._values.get((row.number, row.version), {})
        return known[one.id] if one.id <= META else added_value(one, row.number, row.version)

    def check_filter(self, text: str, c: int, one: FieldSchema) -> None:
        """A filter on a field that was added sees what a reader does, in segments of every age."""
        known, tick = self.model[c], self.first.tick
        values = [self.value(row, one) for row in known.live(tick)]
        matching = sum(value is None if "null" in text else value == default_of(one) for value in values)
        row_filter = compile_filter(text, known.schema)
        assert count(self.first.views(CollectionId(c)), row_filter, tick=tick) == matching, text


ADDED: Final = {
    "number": FieldSchema("", DataType.INT64, nullable=True),
    "flag": FieldSchema("", DataType.BOOL, default=True),
    "text": FieldSchema("", DataType.VARCHAR, nullable=True, default="défaut", max_bytes=100),
}


def default_of(one: FieldSchema) -> Any:
    return 7 if one.default is None else one.default


def default_text(one: FieldSchema) -> str:
    return json.dumps(default_of(one), ensure_ascii=False)


def added_value(one: FieldSchema, number: int, version: int) -> Any:
    """Return what a row has in a field that was added: null where that may be, the default, or something else."""
    if (number + one.id) % 3 == 0:
        return None if one.nullable else one.default
    if one.type is DataType.BOOL:
        return bool((number + version) % 2)
    return 7 * (number % 2) + version if one.type is DataType.INT64 else f"{one.id} {number}"


def rows_of(world: World, numbers: Sequence[int], version: int, schema: CollectionSchema | None = None) -> Batch:
    """Return rows made from their numbers and a version, so that equal rows come again in other segments."""
    vectors = np.array([[n, version, *[1] * (DIM - 2)] for n in numbers], np.float32)
    batch = make_batch(world.schema, numbers, [None if n == 2 else n % 2 + version for n in numbers], vectors)
    if schema is None or schema.version == world.schema.version:
        return batch
    columns: dict[FieldId, Column] = {}
    columns |= {one.id: batch.columns[one.id] for one in schema.fields if one.id in batch.columns}
    for one in schema.fields:
        if one.id not in columns:
            values = [added_value(one, number, version) for number in numbers]
            valid = np.array([value is not None for value in values], np.bool_)
            if one.type is DataType.VARCHAR:
                texts = StringArray.from_strings([value or "" for value in values])
                columns[one.id] = StringColumn(texts, None if valid.all() else valid)
            else:
                array = np.array([value or 0 for value in values], NUMPY_TYPES[one.type])
                columns[one.id] = ScalarColumn(array, None if valid.all() else valid)
    return Batch(columns, len(numbers))


def values_of(batch: Batch, fields: Sequence[FieldId]) -> Iterator[Row]:
    for row in zip(*(batch.columns[one].to_list() for one in fields), strict=True):
        yield tuple(tuple(value.tolist()) if isinstance(value, np.ndarray) else value for value in row)


def rows_at(views: Sequence[SegmentView], tick: int) -> Iterator[Row]:
    for view in views:
        offsets = np.flatnonzero(view.visible(Tick(tick)))
        inserted = view.ticks[offsets].tolist()
        fields = [one.id for one in view.schema.fields]
        for row, at in zip(values_of(view.fetch(offsets, fields), fields), inserted, strict=True):
            yield (view.partition_id, *row, at)


def ticks_at(views: Sequence[SegmentView], tick: int, expire_before: int) -> list[int]:
    return [one for view in views for one in view.ticks[view.visible(Tick(tick), Tick(expire_before))].tolist()]


def recount(shard: Shard) -> Counter[bytes]:
    """Count from scratch who needs which chunk."""
    counted: Counter[bytes] = Counter()
    for state in shard.collections.values():
        for growing in state.growing.values():
            for files in growing.spilled_files:
                counted.update(files.digests)
        for stored in state.stored.values():
            for files in (*stored.spills, *([stored.segment.files] if stored.segment.files else [])):
                counted.update(files.digests)
            for blob in stored.indexes.values():
                counted.update(blob.digests)
    for blob in shard.saved_deletes.values():
        counted.update(blob.digests)
    return counted


def summary(shard: Shard, *, machine: bool = True) -> Any:
    """Return what replicas must agree on, as plain data: not what is in memory, nor what checkpoints wrote."""
    collections = []
    for state in shard.collections.values():
        growing = [(_facts(one.view()), one.created_tick) for one in state.growing.values()]
        stored = [
            (
                _facts(one.segment.view()),
                None if one.segment.files is None else one.segment.files.to_dict(),
                {index_id: blob.to_dict() for index_id, blob in one.indexes.items()},
            )
            for one in state.stored.values()
        ]
        collections.append(
            (
                *(state.collection_id, state.schema, state.partitions, dict(state.properties), state.loaded),
                *(state.indexes, state.truncation, growing, stored),
            )
        )
    return collections, shard.next_segment, shard.freeze_machine().to_plain() if machine else None


def _facts(view: SegmentView) -> Any:
    everything = np.arange(view.rows, dtype=np.int64)
    fields = [one.id for one in view.schema.fields]
    rows = list(values_of(view.fetch(everything, fields), fields))
    return (
        *(view.segment_id, view.partition_id, view.sealed, view.schema, view.ticks.tolist()),
        *(view.deletes.offsets.tolist(), view.deletes.ticks.tolist(), rows),
    )


def _lifetime(ttl_s: int) -> dict[str, str]:
    return {TTL_PROPERTY: str(ttl_s)} if ttl_s else {}


def _ids(partitions: list[int] | None) -> list[PartitionId] | None:
    return None if partitions is None else [PartitionId(one) for one in partitions]


# what may happen

Step = tuple[Any, ...]
"""The name of a method of World and its arguments."""

WEIGHTS: Final = {
    "insert": 16, "upsert": 10,
    "insert_both": 4, "upsert_expecting": 3, "delete": 8, "seal": 12, "flush": 16, "index": 8, "compact": 12,
    "evolve": 4, "insert_late": 1,
    "load": 3, "release": 3, "bring": 3, "create_index": 2, "drop_index": 1, "alter": 2, "wait": 5, "repeat": 3,
    "create": 1, "drop": 0.5, "create_partition": 2, "drop_partition": 0.6, "truncate": 1,
}  # fmt: skip
BEGINNING: Final[Sequence[Step]] = (("create", 10), ("create_partition", 10, 2), ("create_index", 10, 1))


def script(dice: Random, length: int, weights: Mapping[str, float] = WEIGHTS) -> list[Step]:
    """Return steps by chance: many that bring a segment on, few that throw rows away."""
    names = dice.choices(list(weights), list(weights.values()), k=length)
    return [*BEGINNING, *((name, *_arguments(dice, name)) for name in names)]


def _arguments(dice: Random, name: str) -> tuple[Any, ...]:
    c, p, handed = 10 + (dice.random() < 0.1), 1 + (dice.random() < 0.3), dice.random() < 0.5
    often = dice.choice([[1, 2, 3], [0, 4]])  # the same rows again make the same chunks
    distinct = often if dice.random() < 0.5 else dice.sample(range(KEYS), dice.randint(1, 4))
    doubled = distinct if dice.random() < 0.5 else [*distinct, distinct[0]]
    some = dice.choice([None, [1], [2], [1, 2]])
    match name:
        case "wait":
            return (dice.choice([-500, 1, 700, 1500]),)
        case "repeat":
            return (dice.randrange(30),)
        case "insert":
            return c, p, doubled, dice.randrange(2)
        case "insert_late":
            return c, p, distinct, dice.randrange(2), dice.choice([-1, 1])
        case "evolve":
            return c, dice.choice([*ADDED, *ADDED, "drop", "drop", "grow", "again"]), dice.randrange(12)
        case "insert_both":
            return c, distinct, dice.randrange(2), handed
        case "upsert":
            return c, p, distinct, dice.randrange(2)
        case "upsert_expecting":
            return c, p, distinct, dice.randrange(2), dice.random() < 0.7
        case "delete":
            return c, doubled, some
        case "seal":
            return c, dice.choice([None, 0, 1])
        case "flush":
            return c, dice.randrange(4), handed
        case "index":
            return c, dice.randrange(4), dice.choice([1, 1, 2]), dice.choice([0, 0, 1]), handed
        case "compact":
            weights = {"delete": 5, "upsert": 4, "alter": 1, "evolve": 2, "drop_partition": 0.2, "truncate": 0.2}
            names = dice.choices(list(weights), list(weights.values()), k=dice.randint(0, 2))
            return c, p, dice.randint(1, 3), [(one, *_arguments(dice, one)[1:]) for one in names], handed
        case "load" | "release":
            return c, some
        case "alter":
            return c, dice.choice([0, 0, 1, 2])
        case "create_index" | "drop_index":
            return c, dice.choice([1, 1, 2])
        case "create_partition" | "drop_partition":
            return c, p
        case _:
            return (c,)


def take(world: World, step: Step) -> None:
    name, *arguments = step
    getattr(world, name)(*arguments)


def hold(steps: list[Step], run: Callable[[Sequence[Step]], None]) -> None:
    """Run the steps; if they fail, take away what does not matter and fail with what is left."""
    if _failure(run, steps) is None:
        return
    size, tried = len(steps) // 2, 0
    while size and tried != len(steps):
        tried = len(steps)
        for start in range(len(steps) - size, -1, -size):
            fewer = steps[:start] + steps[start + size :]
            if _failure(run, fewer) is not None:
                steps = fewer
        if size > 1:
            size, tried = size // 2, 0
    error = _failure(run, steps)
    assert error is not None, "the same steps fail again"
    error.add_note("smallest script:\n" + "\n".join(f"    {one}" for one in steps))
    raise error


def _failure(run: Callable[[Sequence[Step]], None], steps: Sequence[Step]) -> Exception | None:
    try:
        run(steps)
    except Exception as error:
        return error
    return None
