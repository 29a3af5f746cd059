"""Messages and their bytes: what is written is read back, and what cannot be read is refused, not guessed at."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import catalog, control, ddl
from cluster.message import TYPES, AlterCollection, Entry, Insert, Message, Seal, from_plain
from storage.columns import Batch, Column, ScalarColumn, VectorColumn
from storage.errors import JournalDamaged
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.types import CollectionId, FieldId, PartitionId, SegmentId, Tick

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return values of a field by its type."""
    simple = {int: st.integers(-(1 << 64), 1 << 64), str: st.text(max_size=8), bool: st.booleans(), bytes: st.binary()}
    if hint in simple:
        return simple[hint]
    if hint is Any:
        return plain
    if hint is NoneType:
        return st.none()
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of([values(one) for one in arguments])
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is Sequence:
        return st.lists(values(arguments[0]), max_size=4)
    if origin is Mapping:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    return values(hint.__supertype__)


def message_of(kind: str) -> st.SearchStrategy[Message]:
    hints = get_type_hints(TYPES[kind])
    return st.builds(TYPES[kind], **{name: values(hint) for name, hint in hints.items() if name != "kind"})


def as_lists(value: Any) -> Any:
    """Return the value as CBOR gives it back: tuples become lists."""
    if isinstance(value, list | tuple):
        return [as_lists(one) for one in value]
    return {key: as_lists(one) for key, one in value.items()} if isinstance(value, dict) else value


def test_all_kinds_are_known() -> None:
    """A kind's name is in logs for ever: this table only grows."""
    assert catalog and control and ddl  # these define the control group's messages
    assert set(TYPES) >= {
        *("create_collection", "drop_collection", "truncate_collection", "alter_collection", "create_partition"),
        *("drop_partition", "create_index", "drop_index", "load", "release", "insert", "delete", "seal", "flushed"),
        *("indexed", "compacted", "create_database", "drop_database", "alter_database", "create_alias", "drop_alias"),
        *("rename_collection", "alter_index", "begin_ddl", "ack_ddl", "open_key", "keyed_step", "close_key"),
        *("begin_compaction", "compacted_shard", "seal_all"),
    }


@pytest.mark.parametrize("kind", sorted(TYPES))
@given(data=st.data())
def test_round_trip(kind: str, data: st.DataObject) -> None:
    """Every message comes back as it was, with who said it, when, and its rows."""
    message, body = data.draw(message_of(kind)), data.draw(st.binary(max_size=20))
    entry = Entry(data.draw(st.text(max_size=9)), data.draw(st.integers(0, 1 << 63)), Tick(5), message, body)
    raw = entry.encode()
    again = Entry.decode(memoryview(raw))
    assert (again.producer, again.sequence, again.stamp, again.body) == (entry.producer, entry.sequence, 5, body)
    assert type(again.message) is type(message)
    assert {k: as_lists(v) for k, v in vars(again.message).items()} == {
        k: as_lists(v) for k, v in vars(message).items()
    }
    assert again.encode() == raw, "equal messages have equal bytes"


def test_logs_from_before_schemas_changed_are_read() -> None:
    """Their inserts name no version, and changes of properties bring no schema."""
    insert = from_plain("insert", [10, 1, False, None, None, []])
    assert isinstance(insert, Insert) and insert.schema_version == 0
    alter = from_plain("alter_collection", [10, {"k": "v"}])
    assert isinstance(alter, AlterCollection) and alter.schema is None
    plain = make_schema(
        [FieldSchema("id", DataType.INT64, primary=True), FieldSchema("v", DataType.FLOAT_VECTOR, dim=2)], dynamic=True
    ).to_dict()
    del plain["next_field_id"]
    assert CollectionSchema.from_dict(plain).fresh_field_id == 103


def test_the_bytes_stay_the_same() -> None:
    """A log written today is read by every later version."""
    entry = Entry("n1/1", 7, Tick(9), Seal(CollectionId(10), [SegmentId(3)]), b"rows")
    assert entry.encode() == bytes.fromhex("01110000008564 7365616c 64 6e312f31 07 09 82 0a 81 03") + b"rows"
    assert Entry.decode(entry.encode()) == entry


@given(rows=st.integers(0, 9), ahead=st.integers(0, 8))
def test_rows_are_written_as_their_bytes(rows: int, ahead: int) -> None:
    """An entry of a batch has the bytes of one of the batch's bytes, and is read back wherever it stands."""
    columns: dict[FieldId, Column] = {
        FieldId(100): ScalarColumn(np.arange(rows)),
        FieldId(101): VectorColumn(np.ones((rows, 3), np.float32)),
    }
    batch, message = Batch(columns, rows), Insert(CollectionId(1), PartitionId(2))
    raw = Entry("p", 1, Tick(5), message, batch).encode()
    assert raw == Entry("p", 1, Tick(5), message, batch.to_bytes()).encode()
    again = Entry.decode(memoryview(bytes(ahead) + raw)[ahead:])
    assert isinstance(again.body, memoryview)
    assert Batch.from_bytes(again.body).to_bytes() == batch.to_bytes()


def sealed(header: Any, version: bytes = b"\x01") -> bytes:
    raw = cbor2.dumps(header)
    return version + struct.pack("<I", len(raw)) + raw


def test_fields_that_are_newer_have_defaults() -> None:
    """A message that was written before a field existed reads as one that says nothing about it."""
    old = Entry.decode(sealed(["insert", "n1", 1, 5, [10, 20]]))
    assert old.message == Insert(CollectionId(10), PartitionId(20))


GOOD = ["seal", "n1", 1, 5, [10, None]]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        pytest.param(b"", "version", id="nothing"),
        pytest.param(sealed(GOOD, b"\x02"), "version .*newer program", id="a newer version"),
        pytest.param(sealed(["paint", *GOOD[1:]]), "type 'paint'.*newer program", id="a newer type"),
        pytest.param(sealed(["seal", "n1", 1, 5, [10, None, 7]]), "seal", id="a field too many"),
        pytest.param(sealed(["seal", "n1", 1, 5, []]), "seal", id="a field too few"),
        pytest.param(sealed([["seal"], *GOOD[1:]]), "cannot be read", id="a kind that is a list"),
        pytest.param(sealed(["seal", "n1", 1, "now", [10]]), "cannot be read", id="a stamp that is text"),
        pytest.param(sealed(["seal", 5, 1, 5, [10]]), "cannot be read", id="a producer that is a number"),
        pytest.param(sealed(["seal", "n1", 1, 5, 10]), "cannot be read", id="fields that are a number"),
        pytest.param(sealed(GOOD[:4]), "cannot be read", id="a short header"),
        pytest.param(sealed({"kind": "seal"}), "cannot be read", id="a header that is a map"),
        pytest.param(sealed(GOOD)[:3], "cannot be read", id="cut in the length"),
        pytest.param(sealed(GOOD)[:9], "cannot be read", id="cut in the header"),
        pytest.param(b"\x01\x02\x00\x00\x00\xff\xff", "cannot be read", id="not CBOR"),
    ],
)
def test_what_cannot_be_read_is_refused(raw: bytes, why: str) -> None:
    """A fault of this replica, with the reason; never a guess, never another kind of error."""
    with pytest.raises(JournalDamaged, match=why):
        Entry.decode(raw)


@given(raw=st.binary(max_size=60), at=st.integers(0, 40), flip=st.integers(1, 255))
def test_any_bytes_are_read_or_refused(raw: bytes, at: int, flip: int) -> None:
    """Bytes that are not a message, and messages with a changed byte, are refused or are a message."""
    damaged = bytearray(Entry("n1", 1, Tick(5), Insert(CollectionId(1), PartitionId(2), True, [1, 2])).encode())
    damaged[at % len(damaged)] ^= flip
    for one in (raw, b"\x01" + raw, bytes(damaged)):
        try:
            assert isinstance(Entry.decode(one), Entry)
        except JournalDamaged as error:
            assert error.message
