"""The door to LevelDB: chunks by digest, small records by name, and the one write that makes a change real.

Who stores a segment puts its chunks first (`put_many`) and then commits the manifest that names them (`commit`). The
commit is one synced write batch and the commit point: before it the chunks are orphans, which a sweep removes; after it
they are all there. So `commit` promises that every chunk put before it is durable too. LevelDB does not give that for
free: it syncs only the log file at hand, and one that it has just left may still lose its end. Therefore chunks are
synced as they are put, some at a time.

Nothing read is believed. LevelDB's own checksums are asked for on each read, and our digest is compared: a chunk's is
its name, a record's stands before its bytes and covers its key as well. What does not fit is `ChunkFault`, and is never
served.

A full disk is `OSError` with ENOSPC, any other failed write an `OSError` without it. After a failed write LevelDB
refuses all others for good, and a store that was full says ENOSPC to each of them: `reopen` once there is room. Reads
go on meanwhile. A process without a free descriptor is the same with EMFILE. While reopening does not succeed, reads
are Unavailable.

LevelDB moves what it holds from table to table, and refuses all writes when it cannot read a table of its own. That is
EIO too, but no reopening helps: the directory is marked, and opening it is ChunkDamaged from then on. It seldom comes
to that, because nothing is compressed (vectors would not become smaller): a bit that flips in a chunk is moved with it,
and found by its digest.

All calls block and may be made from any thread; `reopen` and `close` only while no other call is under way.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import plyvel

from storage.errors import ChunkDamaged, DirectoryInUse, Unavailable
from storage.keys import chunk_key, chunk_prefix, describe, is_record
from storage.segment_files import DIGEST_BYTES, digest_of
from storage.types import ShardId

_SYNC_BYTES: Final = 4 << 20
"""Chunks written with one sync: 4 ms of it to 30 ms of writing."""
_WRITE_BUFFER_BYTES: Final = 16 << 20
_TABLE_BYTES: Final = 16 << 20
"""Of LevelDB's files: a thousand for 16 GB."""
_BLOCK_CACHE_BYTES: Final = 32 << 20
_MARK: Final = "DAMAGED"
"""A file in LevelDB's directory that says what it could not read of its own; LevelDB leaves such names alone."""
_FIRST: Final = b"\x00"
_LAST: Final = b"\xff"


MISSING: Final = "it is missing"
"""The reason of a ChunkFault for a chunk that is not there at all."""


class ChunkFault(ChunkDamaged):
    """A chunk is missing or is not what it was; fetch it from another replica."""

    def __init__(self, shard_id: ShardId, digest: bytes, reason: str) -> None:
        super().__init__(f"chunk {digest.hex()} of shard {shard_id} is damaged ({reason}): this copy is not served.")
        self.shard_id = shard_id
        self.digest = digest
        self.is_missing = reason == MISSING


class RecordFault(ChunkDamaged):
    """A record is not what was written."""

    def __init__(self, key: bytes, reason: str) -> None:
        super().__init__(f"{describe(key)} is damaged ({reason}).")
        self.key = key


class ChunkStore(Protocol):
    """What a node keeps beside its journal."""

    def get(self, shard_id: ShardId, digest: bytes) -> bytes:
        """Return the chunk with this digest. Raises ChunkFault if it is missing or damaged."""
        ...

    def put_many(self, shard_id: ShardId, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        """Store (digest, bytes); all are durable when this returns. Putting one again is fine."""
        ...

    def commit(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        deletes: Sequence[bytes] = (),
        chunk_deletes: Sequence[tuple[ShardId, bytes]] = (),
    ) -> None:
        """Write and remove records (by key) and remove chunks, all or nothing, durably: the commit point."""
        ...

    def read(self, key: bytes) -> bytes | None:
        """Return the record, None if there is none. Raises RecordFault."""
        ...

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, bytes) of the records whose keys begin with the prefix, ascending. Raises RecordFault."""
        ...

    def delete_chunks(self, shard_id: ShardId, digests: Iterable[bytes]) -> None:
        """Remove chunks; absent ones are fine. May come undone by a crash."""
        ...

    def chunk_digests(self, shard_id: ShardId) -> list[bytes]:
        """Return the digests of all chunks of a shard, ascending, without reading them."""
        ...

    def missing(self, shard_id: ShardId, digests: Iterable[bytes]) -> list[bytes]:
        """Return those that are not there, in their order; reads none, so damage is not seen."""
        ...

    def compact(self) -> None:
        """Give the room of what was removed back to the file system. Takes as long as rewriting what is left."""
        ...

    def reopen(self) -> None:
        """Make writing possible again after a failed write. Raises OSError while it is not: call it again then."""
        ...

    def close(self) -> None: ...


class LevelDbChunks:
    """One LevelDB directory. Make it with `open`."""

    def __init__(self, path: str, db: Any) -> None:
        self.path = path
        self._opened = db
        """None after LevelDB could not be opened again: its lock forbids opening the new one before closing the old."""
        self._stuck = 0
        """The errno of the write that failed, until the store is opened again."""

    @classmethod
    def open(cls, path: str) -> LevelDbChunks:
        """Open or create the directory; its parent must exist.

        Raises DirectoryInUse if another process has it, ChunkDamaged if LevelDB cannot read its own files, OSError.
        """
        return cls(path, _open(path))

    def get(self, shard_id: ShardId, digest: bytes) -> bytes:
        try:
            data: bytes | None = self._db.get(chunk_key(shard_id, digest), verify_checksums=True, fill_cache=False)
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            _refuse_for_now(error)
            raise ChunkFault(shard_id, digest, _text(error)) from error
        if data is None:
            raise ChunkFault(shard_id, digest, MISSING)
        if digest_of(data) != digest:
            raise ChunkFault(shard_id, digest, "its bytes have another digest")
        return data

    def put_many(self, shard_id: ShardId, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        waiting: list[tuple[bytes, bytes]] = []
        waiting_bytes = 0
        for digest, data in chunks:
            waiting.append((chunk_key(shard_id, digest), data))
            waiting_bytes += len(data)
            if waiting_bytes >= _SYNC_BYTES:
                self._write(waiting, ())
                waiting, waiting_bytes = [], 0
        if waiting:
            self._write(waiting, ())

    def commit(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        deletes: Sequence[bytes] = (),
        chunk_deletes: Sequence[tuple[ShardId, bytes]] = (),
    ) -> None:
        assert all(is_record(key) for key, _ in puts) and all(map(is_record, deletes)), "chunks have put_many"
        removed = [*deletes, *(chunk_key(shard_id, digest) for shard_id, digest in chunk_deletes)]
        self._write([(key, seal_record(key, data)) for key, data in puts], removed)

    def read(self, key: bytes) -> bytes | None:
        try:
            stored: bytes | None = self._db.get(key, verify_checksums=True)
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            _refuse_for_now(error)
            raise RecordFault(key, _text(error)) from error
        return None if stored is None else open_record(key, stored)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        assert is_record(prefix), "chunks have chunk_digests"
        try:
            with self._db.iterator(prefix=prefix, verify_checksums=True) as found:
                for key, stored in found:
                    yield key, open_record(key, stored)
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            _refuse_for_now(error)
            raise RecordFault(prefix, _text(error)) from error

    def delete_chunks(self, shard_id: ShardId, digests: Iterable[bytes]) -> None:
        self._write((), [chunk_key(shard_id, digest) for digest in digests], sync=False)

    def chunk_digests(self, shard_id: ShardId) -> list[bytes]:
        prefix = chunk_prefix(shard_id)
        try:
            with self._db.iterator(prefix=prefix, include_value=False, fill_cache=False) as found:
                return [key[len(prefix) :] for key in found]
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            _refuse_for_now(error)
            raise ChunkDamaged(f"the chunks of shard {shard_id} cannot be listed: {_text(error)}") from error

    def missing(self, shard_id: ShardId, digests: Iterable[bytes]) -> list[bytes]:
        found = self._db.raw_iterator(fill_cache=False)
        try:
            absent = []
            for digest in digests:
                key = chunk_key(shard_id, digest)
                found.seek(key)
                if not (found.valid() and found.key() == key):
                    absent.append(digest)
            return absent
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            _refuse_for_now(error)
            raise ChunkDamaged(f"the chunks of shard {shard_id} cannot be looked up: {_text(error)}") from error
        finally:
            found.close()

    def compact(self) -> None:
        try:
            self._db.compact_range(start=_FIRST, stop=_LAST)  # without bounds plyvel compacts nothing
        except plyvel.Error as error:
            raise _os_error(error) from error

    def reopen(self) -> None:
        self._stuck = self._stuck or errno.EIO
        self.close()
        self._opened = _open(self.path)
        self._stuck = 0

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _db(self) -> Any:
        if self._opened is None:
            raise Unavailable("the chunk store is being opened again after its disk was full; try again soon")
        return self._opened

    def _write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes], *, sync: bool = True) -> None:
        if self._stuck:
            raise OSError(self._stuck, "a write has failed, and the chunk store has not been opened again since")
        try:
            with self._db.write_batch(transaction=True, sync=sync) as batch:
                for key, data in puts:
                    batch.put(key, data)
                for key in deletes:
                    batch.delete(key)
        except plyvel.Error as error:
            failure = _os_error(error)
            if isinstance(error, plyvel.CorruptionError):
                (Path(self.path) / _MARK).write_text(_text(error) + "\n", encoding="utf-8")
            if failure.errno in (errno.ENOSPC, errno.EMFILE):
                self._stuck = failure.errno
            raise failure from error


def seal_record(key: bytes, data: bytes) -> bytes:
    """Return what is stored for a record: a digest of key and bytes, then the bytes."""
    return digest_of(key + data) + data


def open_record(key: bytes, stored: bytes) -> bytes:
    """Return a record's bytes. Raises RecordFault if they are not those that were sealed under this key."""
    if len(stored) < DIGEST_BYTES or digest_of(key + stored[DIGEST_BYTES:]) != stored[:DIGEST_BYTES]:
        raise RecordFault(key, "its bytes have another digest")
    return stored[DIGEST_BYTES:]


def _open(path: str) -> Any:
    _refuse_headless(path)
    _refuse_marked(path)
    try:
        return plyvel.DB(
            path,
            create_if_missing=True,
            write_buffer_size=_WRITE_BUFFER_BYTES,
            max_file_size=_TABLE_BYTES,
            lru_cache_size=_BLOCK_CACHE_BYTES,
            bloom_filter_bits=10,
            compression=None,
        )
    except plyvel.CorruptionError as error:
        raise ChunkDamaged(f"the chunk store {path} cannot be opened ({_text(error)}).") from error
    except plyvel.Error as error:
        passes = _os_error(error).errno != errno.EIO
        if "LOCK" in _text(error) and "No such file" not in _text(error) and not passes:
            raise DirectoryInUse(
                f"the data directory is in use: another process has {path} open; stop that one, or start this one "
                "with another --data"
            ) from error
        raise _os_error(error) from error


def _refuse_headless(path: str) -> None:
    """Raise ChunkDamaged for tables without CURRENT: LevelDB would take the directory for new and remove them."""
    directory = Path(path)
    if not (directory / "CURRENT").exists() and [*directory.glob("*.ldb"), *directory.glob("*.log")]:
        raise ChunkDamaged(f"the chunk store {path} has lost its file CURRENT.")


def _refuse_marked(path: str) -> None:
    """Raise ChunkDamaged if LevelDB could not go on writing because of what it read."""
    mark = Path(path) / _MARK
    if mark.exists():
        why = mark.read_text(encoding="utf-8", errors="replace").strip()
        raise ChunkDamaged(f"the chunk store {path} has tables that it cannot read ({why}), and cannot be written.")


def _os_error(error: Exception) -> OSError:
    """Return the failure as an OSError that says whether it passes; LevelDB has only text for it."""
    text = _text(error)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return OSError(errno.ENOSPC, text)
    if _is_without_descriptor(error):
        return OSError(errno.EMFILE, text)
    return OSError(errno.EIO, text)


def _refuse_for_now(error: Exception) -> None:
    """Raise Unavailable if the read failed for want of a descriptor: then nothing is damaged."""
    if _is_without_descriptor(error):
        raise Unavailable("too many files and connections are open; try again soon") from error


def _is_without_descriptor(error: Exception) -> bool:
    return "Too many open files" in _text(error)


def _text(error: Exception) -> str:
    first = error.args[0] if error.args else ""
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
