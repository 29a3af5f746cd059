"""`annulus check DIR`: is a data directory whole? Reads everything, changes nothing, needs no running node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cbor2

from cluster.checkpoint import manifest_key, referenced
from cluster.control import Control
from node.disk import OsDisk
from node.node import CATALOG_KEY, IDENTITY_KEY
from storage.chunks import LevelDbChunks
from storage.errors import ChunkDamaged
from storage.journal_recovery import Severity, verify
from storage.types import ShardId


def check(data: str) -> Iterator[tuple[bool, str]]:
    """Yield (is it damage, sentence) for everything worth knowing, ending with a summary.

    Raises DirectoryInUse while a node runs on the directory, FileNotFoundError if it is no data directory.
    """
    for part in ("journal", "chunks"):
        if not (Path(data) / part).is_dir():
            raise FileNotFoundError(f"{data} is no data directory: it has no {part}/")
    store = LevelDbChunks.open(f"{data}/chunks")
    try:
        yield from _check_journal(data)
        yield from _check_chunks(store)
    finally:
        store.close()


def _check_journal(data: str) -> Iterator[tuple[bool, str]]:
    count = 0
    for finding in verify(OsDisk(), f"{data}/journal"):
        count += 1
        yield finding.severity is Severity.DAMAGED, f"journal {finding.file} offset {finding.offset}: {finding.what}"
    if count == 0:
        yield False, "journal: every record is whole"


def _check_chunks(store: LevelDbChunks) -> Iterator[tuple[bool, str]]:
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
        yield False, "no node has used this directory yet"
        return
    for number in range(cbor2.loads(identity)["shards"]):
        yield from _check_shard(store, ShardId(number))


def _check_shard(store: LevelDbChunks, shard_id: ShardId) -> Iterator[tuple[bool, str]]:
    try:
        manifest = store.read(manifest_key(shard_id))
    except ChunkDamaged as error:
        yield True, str(error)
        return
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
