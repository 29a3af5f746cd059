"""A shard's checkpoint: what a replica needs to restart without the beginning of its log.

    freeze      on the loop: an immutable picture of the shard at one position, and what of it is in no chunk yet
    write       on a worker: the missing chunks, then ONE synced batch with the manifest and the removal of garbage
    install     on the loop: the shard notes what is in chunks now; the journal may be cut up to the position
    restore     on a worker, at start: manifest and chunks to a shard, to which the log's tail is then applied

A manifest is also what another replica starts from when the log no longer reaches back to where it stands: it takes
the manifest, then the chunks that it lacks, and commits the manifest as its own (`node/snapshot.py`).

The commit point is the synced batch. A crash before it leaves the old manifest with all its chunks, because garbage
is removed only together with a manifest that does not need it; chunks written before such a crash are orphans, which
the next start removes. (Spec: recovery storage, "the checkpoint is written last and only moves forward".)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import cbor2

from cluster.machine import FrozenMachine
from cluster.shard import CollectionState, Shard, ShardIndex, StoredSegment
from index.spec import IndexSpec
from storage.chunks import ChunkStore
from storage.columns import Batch
from storage.deletes import DeleteLog, Ticks
from storage.errors import ChunkDamaged
from storage.growing import GrowingSegment
from storage.journal import GroupLog
from storage.keys import record_key
from storage.schema import CollectionSchema
from storage.sealed import SealedSegment, prepare_from_files
from storage.segment_files import BlobFiles, GetChunk, SegmentFiles, read_blob, read_segment, write_blob, write_segment
from storage.types import CollectionId, FieldId, IndexId, PartitionId, Position, SegmentId, ShardId, Tick
from storage.view import SegmentView

VERSION: Final = 1


@dataclass(frozen=True)
class FrozenSegment:
    """One segment at the checkpoint's position; `files` is None while its rows are not all in chunks of their own."""

    view: SegmentView
    sealed: bool
    created_tick: Tick
    created_ms: int
    spills: tuple[SegmentFiles, ...]
    files: SegmentFiles | None
    indexes: Mapping[IndexId, BlobFiles]
    saved_deletes: BlobFiles | None
    """The delete log as it was last written; still right if it has as many bytes as now."""


@dataclass(frozen=True)
class FrozenCollection:
    state: CollectionState
    """A copy without its segments."""
    segments: Sequence[FrozenSegment]


@dataclass(frozen=True)
class FrozenShard:
    shard_id: ShardId
    position: Position
    machine: FrozenMachine
    next_segment: int
    collections: Sequence[FrozenCollection]
    garbage: frozenset[bytes]


@dataclass
class Written:
    """What `write` put into chunks."""

    position: Position
    garbage: frozenset[bytes]
    spills: dict[SegmentId, SegmentFiles] = field(default_factory=dict)
    deletes: dict[SegmentId, BlobFiles] = field(default_factory=dict)


def manifest_key(shard_id: ShardId) -> bytes:
    """Return the key of a shard's manifest."""
    return record_key("manifest", shard_id)


def incoming_key(shard_id: ShardId) -> bytes:
    """Return the key of a manifest whose chunks are being fetched: the start-up sweep leaves them alone."""
    return record_key("incoming", shard_id)


def freeze(
    shard: Shard, *, term: int | None = None, reset_log: bool = False, garbage: frozenset[bytes] | None = None
) -> FrozenShard:
    """Return the shard as it is now, in time proportional to its segments.

    term, reset_log  see FrozenMachine
    garbage          those of the shard's chunks without use that this checkpoint is to remove; all by default
    """
    collections = []
    for state in shard.collections.values():
        segments = [
            FrozenSegment(
                one.view(), False, one.created_tick, one.created_ms, one.spilled_files, None, {},
                shard.saved_deletes.get(one.segment_id),
            )
            for one in state.growing.values()
        ]  # fmt: skip
        for stored in state.stored.values():
            one_sealed = stored.segment
            saved = shard.saved_deletes.get(one_sealed.segment_id)
            view = one_sealed.view()
            segments.append(
                FrozenSegment(view, True, Tick(0), 0, stored.spills, one_sealed.files, dict(stored.indexes), saved)
            )
        # The schema, the properties and each index are replaced when they change, never changed themselves.
        copy = replace(state, partitions=set(state.partitions), indexes=dict(state.indexes), growing={}, stored={})
        collections.append(FrozenCollection(copy, segments))
    garbage = frozenset(shard.garbage) if garbage is None else garbage
    machine = shard.freeze_machine(term, reset_log=reset_log)
    return FrozenShard(shard.shard_id, shard.position, machine, shard.next_segment, collections, garbage)


def write(frozen: FrozenShard, store: ChunkStore) -> Written:
    """Write the missing chunks and commit the manifest. Raises OSError (a full disk changes nothing)."""
    written = Written(frozen.position, frozen.garbage)
    collections = []
    for collection in frozen.collections:
        segments = [_write_segment(frozen.shard_id, one, written, store) for one in collection.segments]
        collections.append({**collection_facts(collection.state), "segments": segments})
    manifest = {
        "version": VERSION,
        "machine": frozen.machine.to_plain(),
        "next_segment": frozen.next_segment,
        "collections": collections,
    }
    # Bytes that were garbage may have been written anew just now: a chunk is named by its bytes alone.
    again: set[bytes] = set()
    again.update(*(files.digests for files in written.spills.values()))
    again.update(*(blob.digests for blob in written.deletes.values()))
    written.garbage = frozen.garbage - again
    store.commit(
        [(manifest_key(frozen.shard_id), cbor2.dumps(manifest))],
        chunk_deletes=[(frozen.shard_id, digest) for digest in sorted(written.garbage)],
    )
    return written


def install(shard: Shard, written: Written) -> None:
    """Note on the loop what the checkpoint wrote. Segments that went away meanwhile leave their chunks as garbage."""
    shard.garbage -= written.garbage
    growing: dict[SegmentId, GrowingSegment] = {}
    stored: dict[SegmentId, StoredSegment] = {}
    for state in shard.collections.values():
        growing.update((one.segment_id, one) for one in state.growing.values())
        stored.update(state.stored)
    for segment_id, files in written.spills.items():
        shard.remember(files.digests)
        if segment_id in growing:
            growing[segment_id].spilled(files)
        elif segment_id in stored and not stored[segment_id].is_flushed:
            stored[segment_id].spills += (files,)
        else:
            shard.forget(files.digests)
    for segment_id, blob in written.deletes.items():
        shard.remember(blob.digests)
        if segment_id in growing or segment_id in stored:
            old = shard.saved_deletes.get(segment_id)
            shard.saved_deletes[segment_id] = blob
        else:
            old = blob
        if old is not None:
            shard.forget(old.digests)


def unsave(shard: Shard, digest: bytes) -> bool:
    """Forget what checkpoints wrote of their own with this chunk, so that the next one writes it anew.

    These are rows of segments that are not flushed, and deletes: no other replica need have the same chunks of them.
    Returns False if this chunk is not one of those. No checkpoint may be under way.
    """
    before = shard.digests[digest]
    for segment_id, blob in list(shard.saved_deletes.items()):
        if digest in blob.digests:
            del shard.saved_deletes[segment_id]
            shard.forget(blob.digests)
    for state in shard.collections.values():
        for growing in state.growing.values():
            if any(digest in files.digests for files in growing.spilled_files):
                for files in growing.spilled_files:
                    shard.forget(files.digests)
                growing.spilled_files = ()
        for stored in state.stored.values():
            if any(digest in files.digests for files in stored.spills):
                for files in stored.spills:
                    shard.forget(files.digests)
                stored.spills = ()
    return shard.digests[digest] < before


def restore(shard_id: ShardId, store: ChunkStore) -> Shard:
    """Return the shard as its last checkpoint has it, or an empty one. Raises ChunkDamaged."""
    raw = store.read(manifest_key(shard_id))
    if raw is None:
        return Shard(shard_id, partial(store.get, shard_id))
    return restore_from(raw, shard_id, store)


def restore_from(raw: bytes, shard_id: ShardId, store: ChunkStore) -> Shard:
    """Return the shard as a manifest has it; all its chunks but those of indexes are read. Raises ChunkDamaged."""
    get = partial(store.get, shard_id)
    shard = Shard(shard_id, get)
    manifest = cbor2.loads(raw)
    if manifest["version"] != VERSION:
        raise ChunkDamaged(
            f"the manifest of shard {shard_id} has version {manifest['version']}, this program {VERSION}"
        )
    shard.load_machine(manifest["machine"])
    shard.next_segment = manifest["next_segment"]
    for facts in manifest["collections"]:
        state = CollectionState(
            CollectionId(facts["collection_id"]),
            CollectionSchema.from_dict(facts["schema"]),
            {PartitionId(one) for one in facts["partitions"]},
            facts["properties"],
            {
                IndexId(i): ShardIndex(IndexId(i), FieldId(f), IndexSpec.from_dict(spec))
                for i, f, spec in facts["indexes"]
            },
            None if facts["loaded"] is None else frozenset(facts["loaded"]),
            truncation=facts.get("truncation", 0),
            history_from=Tick(facts.get("history_from", shard.tick)),
        )
        shard.collections[state.collection_id] = state
        for one in facts["segments"]:
            _restore_segment(shard, state, one, get)
    return shard


def referenced(manifest_raw: bytes) -> Iterable[tuple[str, bytes]]:
    """Yield (what for, digest) for every chunk that a manifest needs: what an offline check verifies."""
    for facts in cbor2.loads(manifest_raw)["collections"]:
        for one in facts["segments"]:
            where = f"collection {facts['collection_id']} segment {one['segment_id']}"
            for data in [*one["spills"], *([one["files"]] if one["files"] else [])]:
                for field_id, refs in data["fields"].items():
                    yield from ((f"{where} field {field_id}", ref[0]) for ref in refs)
            for index_id, blob in one["indexes"]:
                yield from ((f"{where} index {index_id}", ref[0]) for ref in blob["chunks"])
            if one["deletes"]:
                yield from ((f"{where} deletes", ref[0]) for ref in one["deletes"]["chunks"])


def covered(manifest_raw: bytes) -> Position:
    """Return the position up to which a manifest holds everything; the journal must have what follows."""
    return Position(_machine(cbor2.loads(manifest_raw))["position"])


def covered_term(raw: bytes) -> int | None:
    """Return the Raft term of the entry at `covered`; None if an older program wrote the checkpoint."""
    term = _machine(cbor2.loads(raw)).get("term")
    return None if term is None else int(term)


def generation_in(raw: bytes) -> tuple[int, tuple[str, ...]]:
    """Return the generation that a checkpoint is of, and its members; none are named of the first."""
    number, members, _ = _machine(cbor2.loads(raw)).get("generation", (0, (), 0))
    return int(number), tuple(members)


def as_installed(raw: bytes, term: int) -> bytes:
    """Return the checkpoint as a replica commits it that took it from another: with the mark that its own log is to
    begin there. `term` is that of the entry at `covered`."""
    data = cbor2.loads(raw)
    _machine(data).update(term=term, reset_log=True)
    return cbor2.dumps(data)


def resets_log(raw: bytes) -> bool:
    """Return whether the checkpoint came from another replica, and the log may not begin where it ends yet."""
    return bool(_machine(cbor2.loads(raw)).get("reset_log"))


def begin_log(log: GroupLog, raw: bytes | None) -> bool:
    """Finish what a crash interrupted: let the log begin where a checkpoint that came from another replica ends.

    Does nothing, and returns False, if the checkpoint was taken here, or the log has that entry. Call it before Raft
    looks at the log, and write the journal before anything is said to anybody.
    """
    if raw is None or not resets_log(raw):
        return False
    machine = _machine(cbor2.loads(raw))
    number, members, begun = machine.get("generation", (0, (), 0))
    heir = members[0] if number and begun == machine["position"] else ""
    return begin_log_at(log, int(machine["position"]), int(machine["term"]), heir)


def begin_log_at(log: GroupLog, position: int, term: int, heir: str = "") -> bool:
    """Let the log begin behind the entry of `term` at `position`; False if it has that entry and stays as it is.

    heir  if the entry is the handover to the generation whose log this is: who alone may lead in its first term, the
          one after `term`. Whoever opens the generation has voted in that term, and for this one.
    """
    begins = position > log.last_position or (position >= log.base_position and log.term_at(position) != term)
    known = term + 1 if heir else term
    if log.hard_state.term < known and (begins or (heir and position == log.base_position)):
        log.set_hard_state(known, heir or None)
    if begins:
        log.reset(position, term)
    return begins


def chunk_sizes(manifest_raw: bytes) -> dict[bytes, int]:
    """Return digest -> bytes of every chunk that a manifest needs."""
    sizes: dict[bytes, int] = {}
    for facts in cbor2.loads(manifest_raw)["collections"]:
        for one in facts["segments"]:
            for data in [*one["spills"], *([one["files"]] if one["files"] else [])]:
                sizes |= SegmentFiles.from_dict(data).sizes
            for blob in [*(blob for _, blob in one["indexes"]), *([one["deletes"]] if one["deletes"] else [])]:
                sizes |= BlobFiles.from_dict(blob).sizes
    return sizes


def rows_from(view: SegmentView, first: int) -> tuple[Batch, Ticks]:
    """Return the rows of a segment in memory from offset `first` on."""
    pieces = [part.batch.slice(max(first - part.start, 0), part.batch.rows) for part in view.parts]
    return Batch.concat([piece for piece in pieces if piece.rows]), view.ticks[first:]


def _machine(data: dict[str, Any]) -> dict[str, Any]:
    """Return what all state machines keep: a shard's manifest has it apart, the catalogue's record among the rest."""
    found: dict[str, Any] = data.get("machine", data)
    return found


def collection_facts(state: CollectionState) -> dict[str, Any]:
    """Return what a collection is on this shard, without its segments, as plain data."""
    return {
        "collection_id": state.collection_id,
        "schema": state.schema.to_dict(),
        "partitions": sorted(state.partitions),
        "properties": dict(state.properties),
        "indexes": [[one.index_id, one.field_id, one.spec.to_dict()] for one in state.indexes.values()],
        "loaded": None if state.loaded is None else sorted(state.loaded),
        "truncation": state.truncation,
        "history_from": state.history_from,
    }


def _write_segment(shard_id: ShardId, one: FrozenSegment, written: Written, store: ChunkStore) -> dict[str, Any]:
    view = one.view
    spills = list(one.spills)
    spilled_rows = sum(files.rows for files in spills)
    if one.files is None and view.rows > spilled_rows:
        files, chunks = write_segment(*rows_from(view, spilled_rows))
        store.put_many(shard_id, chunks)
        written.spills[view.segment_id] = files
        spills.append(files)
    deletes = one.saved_deletes
    if len(view.deletes):
        data = view.deletes.to_bytes()
        if deletes is None or deletes.nbytes != len(data):  # a delete log only grows
            deletes, chunks = write_blob(data)
            store.put_many(shard_id, chunks)
            written.deletes[view.segment_id] = deletes
    return {
        "segment_id": view.segment_id,
        "partition_id": view.partition_id,
        "rows": view.rows,
        "sealed": one.sealed,
        "created_tick": one.created_tick,
        "created_ms": one.created_ms,
        "spills": [files.to_dict() for files in spills],
        "files": None if one.files is None else one.files.to_dict(),
        "indexes": [[index_id, blob.to_dict()] for index_id, blob in one.indexes.items()],
        "deletes": None if deletes is None else deletes.to_dict(),
    }


def _restore_segment(shard: Shard, state: CollectionState, facts: Mapping[str, Any], get: GetChunk) -> None:
    segment_id, partition_id = SegmentId(facts["segment_id"]), PartitionId(facts["partition_id"])
    spills = tuple(SegmentFiles.from_dict(one) for one in facts["spills"])
    deletes_blob = None if facts["deletes"] is None else BlobFiles.from_dict(facts["deletes"])
    deletes = None if deletes_blob is None else read_blob(deletes_blob, get)
    if deletes_blob is not None:
        shard.saved_deletes[segment_id] = deletes_blob
        shard.remember(deletes_blob.digests)
    if facts["files"] is None:
        growing = GrowingSegment(
            segment_id, partition_id, state.schema, Tick(facts["created_tick"]), facts["created_ms"]
        )
        for files in spills:
            shard.remember(files.digests)
            growing.restore(*read_segment(files, get), files)
        if deletes is not None:
            growing.restore_deletes(deletes)
        if facts["sealed"]:
            state.stored[segment_id] = StoredSegment(SealedSegment.from_growing(growing), spills)
        else:
            state.growing[partition_id] = growing
        return
    files = SegmentFiles.from_dict(facts["files"])
    shard.remember(files.digests)
    log = DeleteLog(files.rows) if deletes is None else DeleteLog.from_bytes(deletes, files.rows)
    rows = prepare_from_files(files, get, state.schema, released=not state.is_loaded(partition_id))
    segment = SealedSegment.from_rows(segment_id, partition_id, state.schema, rows, files=files, get=get, deletes=log)
    indexes = {IndexId(index_id): BlobFiles.from_dict(blob) for index_id, blob in facts["indexes"]}
    for blob in indexes.values():
        shard.remember(blob.digests)
    state.stored[segment_id] = StoredSegment(segment, (), indexes)
