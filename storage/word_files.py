"""Word lists on disk: what taking a segment's texts apart gave, so that no start has to do it again.

Each node makes and stores those of its own replicas, as records of LevelDB beside the chunks:

    words       | shard | segment | field           how many pieces, of which rows, and made of what (`mark`)
    words-piece | shard | segment | field | number  1 MiB each

They are not in the log, and no checkpoint names them: whoever finds them missing, damaged or made of something else
makes them anew.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import cbor2

from storage.chunks import ChunkStore
from storage.columns import BatchDamaged
from storage.errors import ChunkDamaged
from storage.filter.words import WordLists
from storage.keys import RecordKey, parse, record_key
from storage.schema import FieldSchema
from storage.segment_files import CHUNK_BYTES, SegmentFiles, digest_of
from storage.types import FieldId, SegmentId, ShardId

_HEAD: Final = "words"
_PIECE: Final = "words-piece"
_PIECES_AT_ONCE: Final = 4
"""Written with one sync."""


@dataclass(frozen=True, slots=True)
class WordsOf:
    """The words of one field of a segment."""

    shard_id: ShardId
    segment_id: SegmentId
    field_id: FieldId

    @property
    def ids(self) -> tuple[int, int, int]:
        return self.shard_id, self.segment_id, self.field_id


def mark_of(files: SegmentFiles, field: FieldSchema) -> bytes:
    """Return a digest of what the lists of a segment's field are made of: its texts, and how they are taken apart."""
    texts = b"".join(ref.digest for ref in files.fields[field.id])
    return digest_of(cbor2.dumps([texts, field.params.get("analyzer_params", ""), field.analyzer_version]))


def write_words(store: ChunkStore, of: WordsOf, mark: bytes, lists: WordLists) -> None:
    """Store the lists. Raises OSError."""
    drop_words(store, of)  # they may have more pieces
    data = lists.to_bytes()
    pieces = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    for first in range(0, len(pieces), _PIECES_AT_ONCE):
        some = pieces[first : first + _PIECES_AT_ONCE]
        store.commit([(record_key(_PIECE, *of.ids, first + i), piece) for i, piece in enumerate(some)])
    store.commit([(record_key(_HEAD, *of.ids), cbor2.dumps([mark, lists.rows, len(pieces)]))])


def read_words(store: ChunkStore, of: WordsOf, mark: bytes) -> WordLists | None:
    """Return the lists with this mark; None if there are none that can be read."""
    try:
        head = _head(store, of)
        if head is None or head[0] != mark:
            return None
        pieces = [store.read(record_key(_PIECE, *of.ids, number)) for number in range(head[2])]
        return None if None in pieces else WordLists.from_bytes(b"".join(one for one in pieces if one), head[1])
    except (ChunkDamaged, BatchDamaged):
        return None


def stored_words(store: ChunkStore, shard_id: ShardId) -> set[WordsOf]:
    """Return of what the store has lists. Raises ChunkDamaged."""
    keys = [parse(key) for key, _ in store.scan(record_key(_HEAD, shard_id))]
    return {WordsOf(shard_id, SegmentId(one.ids[1]), FieldId(one.ids[2])) for one in keys if isinstance(one, RecordKey)}


def drop_words(store: ChunkStore, of: WordsOf) -> None:
    """Remove the lists. Raises OSError."""
    try:
        head = _head(store, of)
    except ChunkDamaged:
        head = None
    count = 0 if head is None else head[2]
    store.commit([], [record_key(_HEAD, *of.ids), *(record_key(_PIECE, *of.ids, i) for i in range(count))])


def drop_all_words(store: ChunkStore, shard_id: ShardId) -> None:
    """Remove the lists of all segments of a shard, but for what comes after one that is damaged. Raises OSError."""
    for name in (_HEAD, _PIECE):
        keys: list[bytes] = []
        with suppress(ChunkDamaged):
            keys.extend(key for key, _ in store.scan(record_key(name, shard_id)))
        if keys:
            store.commit([], keys)


def _head(store: ChunkStore, of: WordsOf) -> tuple[bytes, int, int] | None:
    data = store.read(record_key(_HEAD, *of.ids))
    if data is None:
        return None
    found: Any = cbor2.loads(data)
    mark, rows, pieces = found
    return mark, rows, pieces
