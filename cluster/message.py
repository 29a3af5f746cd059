"""Log messages: what a shard's log says, as frozen dataclasses, and their bytes.

    "\\x01" version | header length u32 | header CBOR [type, producer, sequence, stamp, fields] | body

Rows travel in the body as a `Batch`'s own bytes (raw little-endian columns), so that reading a message copies none of
them. A message type's fields are its dataclass fields; a new field needs a default, so that old logs stay readable,
and an unknown type or version is refused: an old node must not guess what a new one meant.

`producer` and `sequence` make retries safe: a shard answers a repeat with the first outcome.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Final, Union

import cbor2

from storage.columns import Batch
from storage.errors import JournalDamaged
from storage.types import CollectionId, FieldId, IndexId, PartitionId, SegmentId, Tick

VERSION: Final = b"\x01"
TYPES: Final[dict[str, type[Message]]] = {}
_LENGTH: Final = struct.Struct("<I")

Body = Union[bytes, memoryview, Batch]  # noqa: UP007 (a runtime alias)
"""What a message's rows travel as; those of a `Batch` become bytes only where they are written down."""


@dataclass(frozen=True)
class Message:
    """Base of all messages; a subclass's `kind` is its name in the log, for ever."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        assert cls.kind not in TYPES, cls.kind
        TYPES[cls.kind] = cls


@dataclass(frozen=True)
class CreateCollection(Message):
    """This shard holds rows of the collection from here on. Repeating it changes nothing."""

    kind = "create_collection"
    collection_id: CollectionId
    schema: Mapping[str, Any]
    partitions: Sequence[PartitionId]
    properties: Mapping[str, str]
    indexes: Sequence[tuple[IndexId, FieldId, Mapping[str, Any]]] = ()
    """As in `CreateIndex`."""
    load: bool = False
    """Whether all partitions are loaded from the first."""


@dataclass(frozen=True)
class DropCollection(Message):
    kind = "drop_collection"
    collection_id: CollectionId


@dataclass(frozen=True)
class TruncateCollection(Message):
    """All rows inserted before this message are gone."""

    kind = "truncate_collection"
    collection_id: CollectionId
    number: int = 0
    """Ascends from one truncation to the next: what is told again, however late, removes nothing written since."""


@dataclass(frozen=True)
class AlterCollection(Message):
    """The properties of the collection are these from here on, and so is its schema, if one is given.

    A new version of the schema seals what grows: a segment's rows have the fields of one version. It is
    `CollectionSchema.to_dict()`; one that is no newer than the collection's changes nothing.
    """

    kind = "alter_collection"
    collection_id: CollectionId
    properties: Mapping[str, str]
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CreatePartition(Message):
    kind = "create_partition"
    collection_id: CollectionId
    partition_id: PartitionId


@dataclass(frozen=True)
class DropPartition(Message):
    kind = "drop_partition"
    collection_id: CollectionId
    partition_id: PartitionId


@dataclass(frozen=True)
class CreateIndex(Message):
    """Sealed segments get this vector index; `spec` is `IndexSpec.to_dict()`."""

    kind = "create_index"
    collection_id: CollectionId
    index_id: IndexId
    field_id: FieldId
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class DropIndex(Message):
    kind = "drop_index"
    collection_id: CollectionId
    index_id: IndexId


@dataclass(frozen=True)
class LoadCollection(Message):
    """Keep the columns and indexes of these partitions in memory (None: of all, also later ones)."""

    kind = "load"
    collection_id: CollectionId
    partitions: Sequence[PartitionId] | None = None


@dataclass(frozen=True)
class ReleaseCollection(Message):
    """Stop keeping the columns of these partitions in memory (None: of all)."""

    kind = "release"
    collection_id: CollectionId
    partitions: Sequence[PartitionId] | None = None


@dataclass(frozen=True)
class Insert(Message):
    """Add the rows of the body. With `replace`, rows with the same primary keys die at the same tick (upsert).

    `expected` is a precondition for read-modify-write: per row, the insert tick of the only live row with its key (0:
    no such row). If it does not hold the whole message is refused as a conflict.
    """

    kind = "insert"
    collection_id: CollectionId
    partition_id: PartitionId
    replace: bool = False
    delete_keys: Sequence[int | str] | None = None
    """With `replace`, the keys that die when they are not the body's own (an upsert that gives fresh ids)."""
    expected: Sequence[int] | None = None
    others: Sequence[tuple[PartitionId, int]] = ()
    """More partitions, so that a request is one message a shard: (partition, rows), the body's last rows in order.
    The rows before them belong to `partition_id`."""
    schema_version: int = 0
    """Of the schema whose fields the rows have, which must be the collection's; 0 if an older program does not say."""


@dataclass(frozen=True)
class Delete(Message):
    """Rows with these primary keys die; keys are int64 little-endian bytes or strings."""

    kind = "delete"
    collection_id: CollectionId
    keys: bytes | Sequence[str]
    partitions: Sequence[PartitionId] | None = None


@dataclass(frozen=True)
class Seal(Message):
    """These growing segments take no more rows. Ones that are sealed already stay as they are."""

    kind = "seal"
    collection_id: CollectionId
    segments: Sequence[SegmentId] | None = None
    """None: every growing segment of the collection (flush)."""


@dataclass(frozen=True)
class SealAll(Message):
    """The growing segments of all collections take no more rows."""

    kind = "seal_all"


@dataclass(frozen=True)
class Flushed(Message):
    """A sealed segment's rows are in these chunks; `files` is `SegmentFiles.to_dict()`."""

    kind = "flushed"
    collection_id: CollectionId
    segment_id: SegmentId
    files: Any


@dataclass(frozen=True)
class Indexed(Message):
    """A flushed segment's vector index is in these chunks; `files` is `BlobFiles.to_dict()`."""

    kind = "indexed"
    collection_id: CollectionId
    segment_id: SegmentId
    index_id: IndexId
    files: Any


@dataclass(frozen=True)
class Compacted(Message):
    """The inputs' rows that lived at `as_of` (and were inserted after `expire_before`) are in `files`; inputs end.

    Deletes that reached the inputs after `as_of` are applied to the output again, by primary key.
    """

    kind = "compacted"
    collection_id: CollectionId
    inputs: Sequence[SegmentId]
    as_of: Tick
    expire_before: Tick
    files: Any


@dataclass(frozen=True)
class Handover(Message):
    """The last entry of a generation: from the next position on the group's log is that of these members alone."""

    kind = "handover"
    generation: int
    """The one that begins."""
    members: Sequence[str]
    """The first of them that can leads."""


@dataclass(frozen=True)
class CompareState(Message):
    """Changes nothing: every replica takes a digest of its state here, so that the leader can compare them."""

    kind = "compare_state"


@dataclass(frozen=True)
class Entry:
    """A message as it stands in the log: who said it, when, and its rows."""

    producer: str
    sequence: int
    stamp: Tick
    message: Message
    body: Body = b""

    def encode(self) -> bytes:
        kind, values = to_plain(self.message)
        header = cbor2.dumps([kind, self.producer, self.sequence, self.stamp, values])
        rows = self.body.to_buffers() if isinstance(self.body, Batch) else [self.body]
        return b"".join((VERSION, _LENGTH.pack(len(header)), header, *rows))

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Entry:
        """Return the entry in `data`, whose memory the body shares. It may begin at any byte.

        Raises JournalDamaged if this program cannot read it.
        """
        view = memoryview(data)
        if bytes(view[:1]) != VERSION:
            raise JournalDamaged(
                f"log message of version {bytes(view[:1])!r}: a newer program wrote it; start that one"
            )
        try:
            (length,) = _LENGTH.unpack_from(view, 1)
            kind, producer, sequence, stamp, values = cbor2.loads(view[5 : 5 + length])
            if not (isinstance(kind, str) and isinstance(producer, str) and isinstance(values, list)):
                raise ValueError("its header is not one")
            if not (isinstance(sequence, int) and isinstance(stamp, int)):
                raise ValueError("its header has something else than numbers")
        except (struct.error, cbor2.CBORDecodeError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise JournalDamaged(f"log message that cannot be read: {error}") from error
        return cls(producer, sequence, Tick(stamp), from_plain(kind, values), view[5 + length :])


def to_plain(message: Message) -> tuple[str, list[Any]]:
    """Return the message as plain data for CBOR: its kind and the values of its fields."""
    return message.kind, [getattr(message, one.name) for one in fields(message)]


def from_plain(kind: str, values: Sequence[Any]) -> Message:
    """Return the message that `to_plain` took apart. Raises JournalDamaged if this program does not know it."""
    message_type = TYPES.get(kind)
    if message_type is None:
        raise JournalDamaged(f"log message of type {kind!r}: a newer program wrote it; start that one")
    known = fields(message_type)
    required = sum(one.default is MISSING for one in known)
    if not required <= len(values) <= len(known):
        raise JournalDamaged(
            f"log message {kind} with {len(values)} fields, this program knows {required} to {len(known)}: another "
            "version wrote it; start that one"
        )
    return message_type(*values)
