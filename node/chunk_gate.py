"""A gate before the chunk store: `reopen` and `close` wait until no call is under way, and calls wait for them.

The store may be used from any thread but must not be closed under a call. Every call but the two is short, so what
waits does not wait long; and it works however busy the node is, because whoever wants in alone is let in first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from storage.chunks import ChunkStore
from storage.types import ShardId


class GatedChunks:
    """The store behind the gate; see `storage.chunks.ChunkStore` for what the calls mean."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._gate = threading.Condition()
        self._inside = 0
        self._closing = 0

    def get(self, shard_id: ShardId, digest: bytes) -> bytes:
        with self._shared():
            return self._store.get(shard_id, digest)

    def put_many(self, shard_id: ShardId, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        with self._shared():
            self._store.put_many(shard_id, chunks)

    def commit(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        deletes: Sequence[bytes] = (),
        chunk_deletes: Sequence[tuple[ShardId, bytes]] = (),
    ) -> None:
        with self._shared():
            self._store.commit(puts, deletes, chunk_deletes)

    def read(self, key: bytes) -> bytes | None:
        with self._shared():
            return self._store.read(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._shared():
            found = list(self._store.scan(prefix))  # an iterator that stays open would keep the gate from closing
        return iter(found)

    def delete_chunks(self, shard_id: ShardId, digests: Iterable[bytes]) -> None:
        with self._shared():
            self._store.delete_chunks(shard_id, digests)

    def chunk_digests(self, shard_id: ShardId) -> list[bytes]:
        with self._shared():
            return self._store.chunk_digests(shard_id)

    def missing(self, shard_id: ShardId, digests: Iterable[bytes]) -> list[bytes]:
        with self._shared():
            return self._store.missing(shard_id, digests)

    def compact(self) -> None:
        with self._shared():
            self._store.compact()

    def reopen(self) -> None:
        with self._alone():
            self._store.reopen()

    def close(self) -> None:
        with self._alone():
            self._store.close()

    @contextmanager
    def _shared(self) -> Iterator[None]:
        with self._gate:
            while self._closing:
                self._gate.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._gate:
                self._inside -= 1
                self._gate.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._gate:
            self._closing += 1  # from here on nobody else comes in
            try:
                while self._inside:
                    self._gate.wait()
                yield
            finally:
                self._closing -= 1
                self._gate.notify_all()
