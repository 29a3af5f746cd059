"""A chunk store in memory that forgets like a disk: implements `storage.chunks.ChunkStore`.

Unsynced changes (chunks deleted, chunks being put) are durable only after the next sync. `crash` keeps a prefix of
them, of a length that the dice give, and forgets the rest. A commit is all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from errno import EIO, ENOSPC
from random import Random

from storage.chunks import MISSING, ChunkFault, open_record, seal_record
from storage.keys import chunk_key, chunk_prefix, is_record
from storage.segment_files import digest_of
from storage.types import ShardId

Change = tuple[bytes, bytes | None]
"""(key, bytes), or (key, None) for a removal."""


class SimChunks:
    """Everything by chance comes from `rng`. Fields marked (test) are switches for tests."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._seen: dict[bytes, bytes] = {}
        self._durable: dict[bytes, bytes] = {}
        self._unsynced: list[Change] = []
        self._refusing = self._was_full = False
        self.full = False
        """(test) No write finds room."""
        self.failing_commits = 0
        """(test) So many of the next commits fail in their sync."""
        self.lost: set[bytes] = set()
        """Keys of what `lose` has taken and nobody has put back."""
        self.commits = 0
        self.reads = 0

    def get(self, shard_id: ShardId, digest: bytes) -> bytes:
        self.reads += 1
        data = self._seen.get(chunk_key(shard_id, digest))
        if data is None:
            raise ChunkFault(shard_id, digest, MISSING)
        if digest_of(data) != digest:
            raise ChunkFault(shard_id, digest, "its bytes have another digest")
        return data

    def put_many(self, shard_id: ShardId, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        for digest, data in chunks:
            self.step()
            self._change([(chunk_key(shard_id, digest), bytes(data))])
        self._sync()

    def commit(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        deletes: Sequence[bytes] = (),
        chunk_deletes: Sequence[tuple[ShardId, bytes]] = (),
    ) -> None:
        assert all(is_record(key) for key, _ in puts) and all(map(is_record, deletes))
        if self.failing_commits and not self._refusing:
            self.failing_commits -= 1
            self._refusing = True
            raise OSError(EIO, "Input/output error")
        changes: list[Change] = [(key, seal_record(key, data)) for key, data in puts]
        changes += [(key, None) for key in deletes]
        changes += [(chunk_key(shard_id, digest), None) for shard_id, digest in chunk_deletes]
        self.step()
        self._change(changes)
        self._sync()
        self.commits += 1

    def read(self, key: bytes) -> bytes | None:
        stored = self._seen.get(key)
        return None if stored is None else open_record(key, stored)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        assert is_record(prefix)
        for key in sorted(self._seen):
            if key.startswith(prefix):
                yield key, open_record(key, self._seen[key])

    def delete_chunks(self, shard_id: ShardId, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self._change([(chunk_key(shard_id, digest), None)])

    def chunk_digests(self, shard_id: ShardId) -> list[bytes]:
        prefix = chunk_prefix(shard_id)
        return sorted(key[len(prefix) :] for key in self._seen if key.startswith(prefix))

    def missing(self, shard_id: ShardId, digests: Iterable[bytes]) -> list[bytes]:
        return [digest for digest in digests if chunk_key(shard_id, digest) not in self._seen]

    def stored_keys(self) -> list[bytes]:
        """Return every key, of chunks and of records."""
        return sorted(self._seen)

    def compact(self) -> None: ...

    def reopen(self) -> None:
        self._refuse_if_full()
        self._refusing = self._was_full = False

    def close(self) -> None: ...

    def crash(self) -> None:
        """Lose the process and what was not durable, but for a prefix of it."""
        survivors = self._unsynced[: self._rng.randint(0, len(self._unsynced))]
        self._seen = dict(self._durable)
        _apply(self._seen, survivors)
        self._durable = dict(self._seen)
        self._unsynced.clear()
        self._refusing = self._was_full = False

    def step(self) -> None:
        """Count a call that changes something; a test may let the power go before it."""

    def _sync(self) -> None:
        self._durable = dict(self._seen)
        self._unsynced.clear()

    def rot(self, key: bytes) -> None:
        """Flip one bit of the value under the key, seen and durable."""
        data = bytearray(self._seen[key])
        bit = self._rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        self._seen[key] = self._durable[key] = bytes(data)

    def lose(self, key: bytes) -> None:
        """Forget what is under the key, seen and durable."""
        del self._seen[key]
        self._durable.pop(key, None)
        self.lost.add(key)

    def _change(self, changes: Sequence[Change]) -> None:
        self._refuse_if_full()
        if self._was_full:
            raise OSError(ENOSPC, "the disk was full")
        if self._refusing:
            raise OSError(EIO, "an earlier write failed")
        _apply(self._seen, changes)
        self.lost.difference_update(key for key, _ in changes)
        self._unsynced += changes

    def _refuse_if_full(self) -> None:
        if self.full:
            self._was_full = True
            raise OSError(ENOSPC, "No space left on device")


def _apply(state: dict[bytes, bytes], changes: Iterable[Change]) -> None:
    for key, data in changes:
        if data is None:
            state.pop(key, None)
        else:
            state[key] = data
