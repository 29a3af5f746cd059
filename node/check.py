"""`annulus check DIR`: is a data directory whole? Reads everything, changes nothing, needs no running node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import cbor2

from cluster.checkpoint import covered, generation_in, manifest_key, referenced, resets_log
from cluster.control import CONTROL_GROUP, Control
from cluster.membership import group_id
from cluster.raft_wire import ROOT
from node.disk import OsDisk
from node.identity import IDENTITY_KEY
from node.replicas import CATALOG_KEY, group_of
from storage.chunks import LevelDbChunks
from storage.errors import ChunkDamaged
from storage.journal_recovery import Severity, Survey
from storage.journal_state import GroupState
from storage.types import Position, ShardId


def check(data: str) -> Iterator[tuple[bool, str]]:
    """Yield (is it damage, sentence) for everything worth knowing, ending with a summary.

    Raises DirectoryInUse while a node runs on the directory, FileNotFoundError if it is no data directory.
    """
    for part in ("journal", "chunks"):
        if not (Path(data) / part).is_dir():
            raise FileNotFoundError(f"{data} is no data directory: it has no {part}/")
    store = LevelDbChunks.open(f"{data}/chunks")
    logs: dict[int, GroupState] = {}
    try:
        yield from _check_journal(data, logs)
        yield from _check_chunks(store, logs)
    finally:
        store.close()


def _check_journal(data: str, logs: dict[int, GroupState]) -> Iterator[tuple[bool, str]]:
    """Yield what is wrong with the journal; put into `logs` which entries of each group it has."""
    survey = Survey(OsDisk(), f"{data}/journal")
    count = 0
    try:
        for finding in survey.run():
            count += 1
            where = f"journal {finding.file} offset {finding.offset}"
            yield finding.severity is Severity.DAMAGED, f"{where}: {finding.what}"
    finally:
        survey.close()
    if count == 0:
        yield False, "journal: every record is whole"
    logs.update(survey.states)


def _check_chunks(store: LevelDbChunks, logs: Mapping[int, GroupState]) -> Iterator[tuple[bool, str]]:
    try:
        identity = store.read(IDENTITY_KEY)
        catalog = store.read(CATALOG_KEY)
        if catalog is not None:
            control = Control.restore(catalog)
            yield False, f"catalogue: {len(control.catalog.collections)} collections at position {control.position}"
    except ChunkDamaged as error:
        yield True, str(error)
        return
    if identity is None:
        if logs:
            yield True, "the chunk store is empty, but a node has written to the journal"
        else:
            yield False, "no node has used this directory yet"
        return
    facts = cbor2.loads(identity)
    yield from _check_meeting(logs, CONTROL_GROUP, catalog, facts["node"])
    for number in range(facts["shards"]):
        yield from _check_shard(store, ShardId(number), logs, facts["node"])


def _check_meeting(
    logs: Mapping[int, GroupState], slot: int, checkpoint: bytes | None, name: str
) -> Iterator[tuple[bool, str]]:
    """Yield damage if entries are missing between a group's checkpoint and its log of the same generation.

    This is all that shows the loss of a whole record of LevelDB's own log, which it drops without a word. A node that
    is no member of the generation needs no log of it: it keeps what others may still fetch.
    """
    number, members = (0, ()) if checkpoint is None else generation_in(checkpoint)
    group = group_id(slot, number)
    log = logs.get(group)
    if log is None and number and name not in members:
        return
    first, last = (ROOT, Position(0)) if log is None else (log.base, log.last)
    covered_position = Position(0) if checkpoint is None else covered(checkpoint)
    if checkpoint is not None and resets_log(checkpoint):
        yield False, f"group {slot}: its checkpoint came from another node; the next start lets the log begin there"
        return
    if max(covered_position, ROOT) < first:
        yield True, f"group {slot}: its log begins after {first}, its checkpoint covers only {covered_position}"
    if covered_position > last:
        yield True, f"group {slot}: its log ends at {last}, its checkpoint covers {covered_position}"


def _check_shard(
    store: LevelDbChunks, shard_id: ShardId, logs: Mapping[int, GroupState], name: str
) -> Iterator[tuple[bool, str]]:
    try:
        manifest = store.read(manifest_key(shard_id))
    except ChunkDamaged as error:
        yield True, str(error)
        return
    yield from _check_meeting(logs, group_of(shard_id), manifest, name)
    needed: set[bytes] = set()
    for where, digest in [] if manifest is None else referenced(manifest):
        if digest in needed:
            continue
        needed.add(digest)
        try:
            store.get(shard_id, digest)
        except ChunkDamaged as error:
            yield True, f"shard {shard_id} {where}: {error}"
    orphans = sum(digest not in needed for digest in store.chunk_digests(shard_id))
    if needed or orphans:
        yield (
            False,
            f"shard {shard_id}: {len(needed)} chunks read and verified"
            + (
                f", {orphans} of no checkpoint (the log may need them; else the next start removes them)"
                if orphans
                else ""
            ),
        )
