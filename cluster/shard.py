"""One replica's copy of one shard: the rows of its collections, driven by the shard's log.

A segment's life is in the log, so every replica takes each step at the same position:

    Insert -> growing --Seal--> sealed --Flushed--> flushed --Indexed--> indexed --Compacted / drops--> gone

Invariants
  1. Equal prefixes of the log give equal rows, deletes and segments on every replica (indexes are built once and
     shipped).
  2. Every live row of a collection is in exactly one segment.
  3. A row is visible at tick T exactly when inserted tick <= T < deleted tick.
  4. `digests` counts, for every chunk, the segments that need it; a chunk that none needs is garbage once a
     checkpoint without it is durable.

What takes time (writing chunks, building indexes, merging rows) is done elsewhere on frozen views, and comes back
as a message; its product is handed over in memory (`hand_over`) to the replica that made it, and read from chunks by
the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from cluster.ddl import TTL_PROPERTY, released
from cluster.machine import StateMachine
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
    Flushed,
    Indexed,
    Insert,
    LoadCollection,
    Message,
    ReleaseCollection,
    Seal,
    SealAll,
    TruncateCollection,
)
from cluster.parse import (
    parse_blob_files,
    parse_index,
    parse_keys,
    parse_parts,
    parse_rows,
    parse_schema,
    parse_segment_files,
)
from index.protocol import VectorIndex
from index.spec import IndexSpec
from storage.columns import Batch
from storage.errors import BadRow, CollectionNotFound, Conflict, InvalidParameter, PartitionNotFound, SchemaMismatch
from storage.growing import GrowingSegment
from storage.key_lookup import Keys, KeySet, batch_keys
from storage.scalar_index import SPEC_KEY
from storage.schema import CollectionSchema
from storage.sealed import SealedRows, SealedSegment, prepare, prepare_from_files
from storage.segment_files import BlobFiles, GetChunk, SegmentFiles
from storage.types import CollectionId, FieldId, IndexId, PartitionId, SegmentId, ShardId, Tick, tick_from_ms, tick_ms
from storage.view import SegmentView

SEGMENT_BITS: Final = 40
"""A segment id is shard << 40 | number: unique in the cluster, given without asking anybody."""


@dataclass(frozen=True)
class ShardIndex:
    """A vector index that sealed segments of a collection are to have."""

    index_id: IndexId
    field_id: FieldId
    spec: IndexSpec


@dataclass
class StoredSegment:
    """A sealed segment and what of it is in chunks; its rows are in `segment.files` once it is flushed."""

    segment: SealedSegment
    spills: tuple[SegmentFiles, ...] = ()
    """The first rows, as checkpoints wrote them before it was flushed."""
    indexes: dict[IndexId, BlobFiles] = field(default_factory=dict)
    outdated: set[IndexId] = field(default_factory=set)
    """Indexes of which memory may hold an earlier one than chunks do. Not part of what replicas agree on."""

    @property
    def is_flushed(self) -> bool:
        return self.segment.files is not None


@dataclass
class CollectionState:
    """A collection as this shard has it."""

    collection_id: CollectionId
    schema: CollectionSchema
    partitions: set[PartitionId]
    properties: Mapping[str, str]
    indexes: dict[IndexId, ShardIndex] = field(default_factory=dict)
    loaded: frozenset[PartitionId] | None = frozenset()
    growing: dict[PartitionId, GrowingSegment] = field(default_factory=dict)
    stored: dict[SegmentId, StoredSegment] = field(default_factory=dict)
    truncation: int = 0
    """Number of the last truncation."""
    history_from: Tick = Tick(0)
    """Reads as of this tick or later find everything; of earlier ones, rows that died since are gone for good."""

    @property
    def ttl_ms(self) -> int:
        """Milliseconds after which a row expires; 0 for never."""
        return int(self.properties.get(TTL_PROPERTY, 0)) * 1000

    def is_loaded(self, partition_id: PartitionId) -> bool:
        return self.loaded is None or partition_id in self.loaded

    def segments(self) -> Iterable[GrowingSegment | SealedSegment]:
        yield from self.growing.values()
        for one in self.stored.values():
            yield one.segment

    def expire_before(self, now: Tick) -> Tick:
        """Return the tick before which rows have expired at `now`; 0 if they never do."""
        return tick_from_ms(max(0, tick_ms(now) - self.ttl_ms)) if self.ttl_ms else Tick(0)


class Shard(StateMachine):
    """The state machine of a shard. `get_chunk` reads a chunk, blocking, where a product was not handed over."""

    def __init__(self, shard_id: ShardId, get_chunk: GetChunk) -> None:
        super().__init__()
        self.shard_id = shard_id
        self.collections: dict[CollectionId, CollectionState] = {}
        self.digests: Counter[bytes] = Counter()
        self.garbage: set[bytes] = set()
        """Chunks that no segment needs any more, to be removed with the next checkpoint."""
        self.saved_deletes: dict[SegmentId, BlobFiles] = {}
        """Delete logs as the last checkpoint wrote them."""
        self.next_segment = 1
        self.changes = 0
        """Counts what may give background work something to do: everything but rows coming and going."""
        self.get_chunk = get_chunk
        self._handed_indexes: dict[tuple[SegmentId, IndexId], VectorIndex] = {}
        self._handed_rows: dict[tuple[SegmentId, ...], SealedRows] = {}

    # what readers and background work ask for

    def collection(self, collection_id: CollectionId) -> CollectionState:
        found = self.collections.get(collection_id)
        if found is None:
            raise CollectionNotFound("", f"id {collection_id}")
        return found

    def populated(self) -> list[CollectionState]:
        """Return the collections that have rows: the only ones for which there may be work."""
        return [state for state in self.collections.values() if state.stored or state.growing]

    def views(
        self,
        collection_id: CollectionId,
        partitions: Sequence[PartitionId] | None = None,
        *,
        growing: bool = True,
    ) -> list[SegmentView]:
        """Return what a reader sees now, by segment id; of these partitions only if any are named."""
        state = self.collections.get(collection_id)
        if state is None:
            return []
        found = [one.segment.view() for one in state.stored.values()]
        if growing:
            found += [one.view() for one in state.growing.values()]
        wanted = None if partitions is None else set(partitions)
        found = [one for one in found if wanted is None or one.partition_id in wanted]
        return sorted(found, key=lambda one: one.segment_id)

    def hand_over_index(self, segment_id: SegmentId, index_id: IndexId, index: VectorIndex) -> None:
        """Keep an index that was built here until its `Indexed` is applied."""
        self._handed_indexes[segment_id, index_id] = index

    def take_back_index(self, segment_id: SegmentId, index_id: IndexId) -> None:
        """Forget an index that was handed over: its message was not proposed after all, or is applied."""
        self._handed_indexes.pop((segment_id, index_id), None)

    def hand_over_rows(self, inputs: Sequence[SegmentId], rows: SealedRows) -> None:
        """Keep rows that were prepared here until the `Flushed` or `Compacted` of these segments is applied."""
        self._handed_rows[tuple(inputs)] = rows

    def take_back(self, inputs: Sequence[SegmentId]) -> None:
        """Forget rows that were handed over: their message was not proposed after all."""
        self._handed_rows.pop(tuple(inputs), None)

    def stored_segment(self, collection_id: CollectionId, segment_id: SegmentId) -> StoredSegment | None:
        """Return a sealed segment; None if it has gone, or never was."""
        return self._stored(collection_id, segment_id)

    def is_handed_over(self, message: Flushed | Indexed | Compacted) -> bool:
        """Return whether the product of which the message tells was handed over here."""
        match message:
            case Flushed():
                return (message.segment_id,) in self._handed_rows
            case Indexed():
                return (message.segment_id, message.index_id) in self._handed_indexes
            case Compacted():
                return tuple(message.inputs) in self._handed_rows

    # applying

    def _execute(self, message: Message, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        if not isinstance(message, Insert | Delete):
            self.changes += 1
        match message:
            case Insert():
                return self._insert(message, body, tick)
            case Delete(collection_id, keys, partitions):
                state = self.collection(collection_id)
                return {"rows": self._delete(state, parse_keys(keys, state.schema), tick, partitions)}
            case Seal(collection_id, segments):
                return self._seal(collection_id, segments)
            case SealAll():
                for collection_id in self.collections:
                    self._seal(collection_id, None)
            case Flushed(collection_id, segment_id, files):
                return self._flushed(collection_id, segment_id, files)
            case Indexed():
                return self._indexed(message)
            case Compacted():
                return self._compacted(message)
            case CreateCollection():
                if message.collection_id not in self.collections:
                    self.collections[message.collection_id] = _new_state(message)
            case DropCollection(collection_id):
                dropped = self.collections.pop(collection_id, None)
                if dropped is not None:
                    self._drop_rows(dropped)
            case TruncateCollection(collection_id, number):
                self._truncate(self.collection(collection_id), number, tick)
            case AlterCollection(collection_id, properties, schema):
                state = self.collection(collection_id)
                if schema is not None:
                    self._evolve(state, parse_schema(schema))
                state.properties = dict(properties)
            case CreatePartition(collection_id, partition_id):
                self.collection(collection_id).partitions.add(partition_id)
            case DropPartition(collection_id, partition_id):
                state = self.collection(collection_id)
                state.partitions.discard(partition_id)
                self._drop_rows(state, partition_id)
                state.history_from = tick
            case CreateIndex(spec=spec) if SPEC_KEY in spec:
                pass  # each node makes those of scalars by itself
            case CreateIndex(collection_id, index_id, field_id, spec):
                one = ShardIndex(index_id, field_id, parse_index(spec))
                self.collection(collection_id).indexes[index_id] = one
            case DropIndex(collection_id, index_id):
                self._drop_index(self.collection(collection_id), index_id)
            case LoadCollection(collection_id, wanted_partitions):
                state = self.collection(collection_id)
                if wanted_partitions is None or state.loaded is None:
                    state.loaded = None
                else:
                    state.loaded = state.loaded.union(wanted_partitions)
            case ReleaseCollection(collection_id, unwanted):
                self._release(self.collection(collection_id), unwanted)
            case _:
                raise BadRow(f"a shard does not know the message {message.kind}")
        return {}

    def _insert(self, message: Insert, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        state = self.collection(message.collection_id)
        if message.schema_version not in (0, state.schema.version):
            raise SchemaMismatch(
                f"the rows are of version {message.schema_version} of the schema of collection "
                f"{message.collection_id}, which has version {state.schema.version}: try again"
            )
        batch = parse_rows(body, state.schema)
        parts = parse_parts(message.partition_id, message.others, batch.rows)
        for partition_id, _ in parts:
            if partition_id not in state.partitions:
                raise PartitionNotFound(f"id {partition_id}")
        keys = batch_keys(batch, state.schema.primary.id)
        if message.expected is not None:
            self._check_expected(state, keys, message.expected, tick)
        dying = keys if message.delete_keys is None else parse_keys(message.delete_keys, state.schema)
        deleted = self._delete(state, dying, tick, None) if message.replace else 0
        start = 0
        for partition_id, rows in parts:
            if rows:
                self._growing(state, partition_id, tick).append(batch.slice(start, start + rows), tick)
            start += rows
        return {"rows": batch.rows, "deleted": deleted}

    def _growing(self, state: CollectionState, partition_id: PartitionId, tick: Tick) -> GrowingSegment:
        """Return the growing segment of a partition, which exists only from its first rows on."""
        growing = state.growing.get(partition_id)
        if growing is None:
            growing = GrowingSegment(self._fresh_segment(), partition_id, state.schema, tick)
            state.growing[partition_id] = growing
        return growing

    def _check_expected(self, state: CollectionState, keys: Keys, expected: Sequence[int], tick: Tick) -> None:
        if len(expected) != len(keys):
            raise BadRow(f"{len(expected)} preconditions for {len(keys)} rows")
        views = [one.view() for one in state.segments()]
        expire_before = state.expire_before(tick)  # from the log's own time, so that all replicas agree
        for i, key in enumerate(keys):
            one: Keys = np.array([key], np.int64) if isinstance(keys, np.ndarray) else [str(key)]
            ticks = [t for view in views for t in view.ticks[view.find(one, tick, expire_before)].tolist()]
            if max(ticks, default=0) != expected[i]:
                raise Conflict(f"row {key} was changed meanwhile; read it again and repeat")

    @staticmethod
    def _delete(state: CollectionState, keys: Keys, tick: Tick, partitions: Sequence[PartitionId] | None) -> int:
        prepared = KeySet.of(keys)  # once for all segments
        return sum(
            one.delete(prepared, tick)
            for one in state.segments()
            if partitions is None or one.partition_id in partitions
        )

    def _fresh_segment(self) -> SegmentId:
        number = self.next_segment
        self.next_segment += 1
        return SegmentId((self.shard_id << SEGMENT_BITS) | number)

    def _seal(self, collection_id: CollectionId, segments: Sequence[SegmentId] | None) -> Mapping[str, Any]:
        state = self.collection(collection_id)
        chosen = [one for one in state.growing.values() if segments is None or one.segment_id in segments]
        for one in chosen:
            del state.growing[one.partition_id]
            state.stored[one.segment_id] = StoredSegment(SealedSegment.from_growing(one), one.spilled_files)
        return {"segments": [one.segment_id for one in chosen]}

    def _evolve(self, state: CollectionState, schema: CollectionSchema) -> None:
        """Go on with another version of the schema: what grows is sealed, and indexes of dropped fields go."""
        if schema.version <= state.schema.version:
            return
        self._seal(state.collection_id, None)
        state.schema = schema
        for one in state.stored.values():
            one.segment.adopt(schema)
        for index in list(state.indexes.values()):
            if index.field_id not in schema.by_id:
                self._drop_index(state, index.index_id)

    def _flushed(self, collection_id: CollectionId, segment_id: SegmentId, data: Any) -> Mapping[str, Any]:
        rows = self._handed_rows.pop((segment_id,), None)
        files = parse_segment_files(data)
        stored = self._stored(collection_id, segment_id)
        if stored is None or stored.is_flushed:
            self._give_up(files.digests)  # dropped or truncated meanwhile
            return {}
        segment = stored.segment
        if files.rows != segment.rows:
            raise InvalidParameter(f"segment {segment_id} has {segment.rows} rows, not {files.rows}")
        if rows is None:
            view = segment.view()
            rows = prepare(Batch.concat([part.batch for part in view.parts]), view.ticks, segment.schema)
        self.remember(files.digests)
        segment.flushed(rows, files, self.get_chunk)
        for spill in stored.spills:
            self.forget(spill.digests)
        stored.spills = ()
        if not self.collections[collection_id].is_loaded(segment.partition_id):
            segment.release()
        return {}

    def _indexed(self, message: Indexed) -> Mapping[str, Any]:
        built = self._handed_indexes.pop((message.segment_id, message.index_id), None)
        stored = self._stored(message.collection_id, message.segment_id)
        wanted = stored and self.collections[message.collection_id].indexes.get(message.index_id)
        files = parse_blob_files(message.files)
        if not stored or not wanted:
            self._give_up(files.digests)
            return {}
        self.remember(files.digests)
        damaged = stored.indexes.get(message.index_id)  # the newest counts: nobody builds an index again without reason
        if damaged is not None:
            self.forget(damaged.digests)
        stored.indexes[message.index_id] = files
        if built is not None and not stored.segment.released:
            stored.segment.install_index(wanted.field_id, built)
            stored.outdated.discard(message.index_id)
        elif damaged is not None:
            stored.outdated.add(message.index_id)
        return {}

    def _compacted(self, message: Compacted) -> Mapping[str, Any]:
        rows = self._handed_rows.pop(tuple(message.inputs), None)
        files = parse_segment_files(message.files)
        state = self.collections.get(message.collection_id)
        if state is None or not message.inputs or any(one not in state.stored for one in message.inputs):
            self._give_up(files.digests)  # dropped or truncated meanwhile
            return {}
        inputs = [state.stored[one] for one in message.inputs]
        output = None
        if files.rows:
            if rows is None:  # chunks may be damaged: read them before anything is changed
                released = not state.is_loaded(inputs[0].segment.partition_id)
                rows = prepare_from_files(files, self.get_chunk, state.schema, released=released)
            output = self._compacted_segment(state, inputs, rows, files, message.as_of)
            self.remember(files.digests)  # before the inputs let go of theirs, which may be the same
        state.history_from = max(state.history_from, message.as_of)
        for one in inputs:
            self._forget_segment(one)
            del state.stored[one.segment.segment_id]
        if output is None:
            self._give_up(files.digests)
            return {}
        state.stored[output.segment_id] = StoredSegment(output)
        return {"segment": output.segment_id}

    def _compacted_segment(
        self,
        state: CollectionState,
        inputs: Sequence[StoredSegment],
        rows: SealedRows,
        files: SegmentFiles,
        as_of: Tick,
    ) -> SealedSegment:
        partition_id = inputs[0].segment.partition_id
        output = SealedSegment.from_rows(
            self._fresh_segment(), partition_id, state.schema, rows, files=files, get=self.get_chunk
        )
        self._delete_again(state, output, inputs, as_of)
        if not state.is_loaded(partition_id) and not output.released:
            output.release()
        return output

    @staticmethod
    def _delete_again(
        state: CollectionState, output: SealedSegment, inputs: Sequence[StoredSegment], as_of: Tick
    ) -> None:
        """Apply the deletes that reached the inputs after the merge had looked at them."""
        later: dict[int, list[Keys]] = {}
        for one in inputs:
            view = one.segment.view()
            missed = view.deletes.after(as_of)
            for tick in np.unique(missed.ticks).tolist():
                column = view.fetch(missed.offsets[missed.ticks == tick], [state.schema.primary.id])
                later.setdefault(tick, []).append(batch_keys(column, state.schema.primary.id))
        for tick in sorted(later):
            for keys in later[tick]:
                output.delete(keys, Tick(tick))

    def _release(self, state: CollectionState, unwanted: Sequence[PartitionId] | None) -> None:
        state.loaded = released(state.loaded, state.partitions, unwanted)
        for one in state.stored.values():
            if one.is_flushed and not state.is_loaded(one.segment.partition_id):
                one.segment.release()

    def _drop_index(self, state: CollectionState, index_id: IndexId) -> None:
        dropped = state.indexes.pop(index_id, None)
        for one in state.stored.values():
            files = one.indexes.pop(index_id, None)
            if files is not None:
                self.forget(files.digests)
            if dropped is not None:
                one.segment.drop_index(dropped.field_id)

    def _truncate(self, state: CollectionState, number: int, tick: Tick) -> None:
        """Remove all rows, unless this very truncation has done so: its outcome may be forgotten by now."""
        if 0 < number <= state.truncation:
            return
        state.truncation = number
        self._drop_rows(state)
        state.history_from = tick

    def _drop_rows(self, state: CollectionState, partition_id: PartitionId | None = None) -> None:
        for growing in list(state.growing.values()):
            if partition_id in (None, growing.partition_id):
                self._forget_rows(growing.segment_id, growing.spilled_files)
                del state.growing[growing.partition_id]
        for segment_id, one in list(state.stored.items()):
            if partition_id in (None, one.segment.partition_id):
                self._forget_segment(one)
                del state.stored[segment_id]

    def _stored(self, collection_id: CollectionId, segment_id: SegmentId) -> StoredSegment | None:
        state = self.collections.get(collection_id)
        return None if state is None else state.stored.get(segment_id)

    # chunks

    def remember(self, digests: Iterable[bytes]) -> None:
        """Count one more need of each of these chunks. One that was garbage may be needed again: equal bytes are one
        chunk, such as rows that a merge leaves as they were, or indexes that hold nothing of their own."""
        for digest in digests:
            self.digests[digest] += 1
            self.garbage.discard(digest)

    def forget(self, digests: Iterable[bytes]) -> None:
        """Count one need less of each; one that is needed no more is garbage."""
        for digest in digests:
            self.digests[digest] -= 1
            if self.digests[digest] <= 0:
                del self.digests[digest]
                self.garbage.add(digest)

    def _give_up(self, digests: Iterable[bytes]) -> None:
        """Chunks were written for a message that came too late to change anything."""
        self.garbage.update(digest for digest in digests if digest not in self.digests)

    def _forget_segment(self, one: StoredSegment) -> None:
        self._forget_rows(one.segment.segment_id, one.spills)
        if one.segment.files is not None:
            self.forget(one.segment.files.digests)
        for files in one.indexes.values():
            self.forget(files.digests)

    def _forget_rows(self, segment_id: SegmentId, spills: Iterable[SegmentFiles]) -> None:
        for spill in spills:
            self.forget(spill.digests)
        saved = self.saved_deletes.pop(segment_id, None)
        if saved is not None:
            self.forget(saved.digests)


def _new_state(message: CreateCollection) -> CollectionState:
    """Return a collection that has just come to be."""
    indexes = [ShardIndex(index_id, field_id, parse_index(spec)) for index_id, field_id, spec in message.indexes]
    return CollectionState(
        message.collection_id,
        parse_schema(message.schema),
        set(message.partitions),
        dict(message.properties),
        {one.index_id: one for one in indexes},
        None if message.load else frozenset(),
    )
