"""LevelDB's keys: what kinds there are, their order, and how a person reads them.

    "c" | shard u32 | digest 16 bytes             a chunk
    "r" | name, ASCII | 0 | id u64 | id u64 ...   a record: a small named value, such as a shard's manifest

Numbers are big-endian, so keys sort by them and a prefix never cuts one: record ("segment", 2001) is no prefix of
("segment", 20010).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from storage.segment_files import DIGEST_BYTES
from storage.types import ShardId

_CHUNK: Final = b"c"
_RECORD: Final = b"r"
_SHARD: Final = struct.Struct(">cI")
_ID: Final = struct.Struct(">Q")
_NAME: Final = re.compile(r"[a-z][a-z0-9_.-]*\Z")


@dataclass(frozen=True, slots=True)
class ChunkKey:
    shard_id: ShardId
    digest: bytes

    def __str__(self) -> str:
        return f"chunk shard={self.shard_id} digest={self.digest.hex()}"


@dataclass(frozen=True, slots=True)
class RecordKey:
    name: str
    ids: tuple[int, ...]

    def __str__(self) -> str:
        return "record " + "/".join((self.name, *map(str, self.ids)))


def chunk_key(shard_id: ShardId, digest: bytes) -> bytes:
    """Return the key of a chunk."""
    assert len(digest) == DIGEST_BYTES, f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}"
    return _SHARD.pack(_CHUNK, shard_id) + digest


def chunk_prefix(shard_id: ShardId) -> bytes:
    """Return what the keys of all chunks of a shard begin with."""
    return _SHARD.pack(_CHUNK, shard_id)


def record_key(name: str, *ids: int) -> bytes:
    """Return the key of a record; it is also the prefix of the records with more ids."""
    assert _NAME.match(name), f"not a record's name: {name!r}"
    return _RECORD + name.encode() + b"\0" + b"".join(_ID.pack(one) for one in ids)


def is_record(key: bytes) -> bool:
    return key.startswith(_RECORD)


def parse(key: bytes) -> ChunkKey | RecordKey:
    """Return what the key names. Raises ValueError if no key looks like this."""
    if key[:1] == _CHUNK and len(key) == _SHARD.size + DIGEST_BYTES:
        _, shard_id = _SHARD.unpack_from(key)
        return ChunkKey(ShardId(shard_id), key[_SHARD.size :])
    name, zero, ids = key[1:].partition(b"\0")
    if key[:1] != _RECORD or not zero or len(ids) % _ID.size or not _NAME.match(name.decode("ascii", "replace")):
        raise ValueError(f"not a key: {key!r}")
    return RecordKey(name.decode(), tuple(one for (one,) in _ID.iter_unpack(ids)))


def describe(key: bytes) -> str:
    """Return the key as a person wants to read it, whatever it is."""
    try:
        return str(parse(key))
    except ValueError:
        return f"unknown key {key.hex()}"


def manifest_key(shard_id: ShardId) -> bytes:
    """Return the key of the record that says what a shard's checkpoint holds."""
    return record_key("manifest", shard_id)
