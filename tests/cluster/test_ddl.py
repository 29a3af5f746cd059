"""Changes of the catalogue that shards must see: what each checks, tells the shards and leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.catalog import PARTITIONS_MAX, AlterIndex, CreateAlias, Task
from cluster.control import Control
from cluster.ddl import KINDS, BeginDdl
from cluster.ddl import messages as messages_of
from cluster.machine import Rejected
from cluster.message import (
    AlterCollection,
    CreateCollection,
    CreateIndex,
    CreatePartition,
    DropCollection,
    DropIndex,
    DropPartition,
    Entry,
    Insert,
    LoadCollection,
    Message,
    ReleaseCollection,
    TruncateCollection,
)
from cluster.shard import Shard
from storage.columns import Batch, Column, ScalarColumn, VectorColumn
from storage.errors import AnnulusError
from storage.schema import FIELDS_MAX, CollectionSchema, DataType, FieldSchema
from storage.types import FieldId, IndexId, PartitionId, Position, Tick
from storage.view import SegmentView, absent_column
from tests.cluster.controls import (
    KEYED,
    SCHEMA,
    SHARDS,
    TWO_VECTORS,
    driver,
    new_collection,
    new_index,
    refused,
    restored,
)

A = ("create_collection", "a", new_collection())
INDEX = ("create_index", "a", new_index())
PARTITION = ("create_partition", "a", {"partition": "p"})
LOAD: Sequence[Any] = ("load", "a", {"partitions": []})
LOAD_P = ("load", "a", {"partitions": ["p"]})
DYNAMIC = {"changed": {"dynamicfield.enabled": "true"}, "dropped": []}


def adding(name: str, kind: DataType, **more: Any) -> Any:
    """Return the request that adds a field."""
    return "add_field", "a", {"field": FieldSchema(name, kind, **more).to_dict()}


def dropping(name: str = "", field_id: int = 0) -> Any:
    return "drop_field", "a", {"field_name": name, "field_id": field_id}


def altering(name: str, **params: Any) -> Any:
    return "alter_field", "a", {"field_name": name, "params": {k.replace("__", "."): v for k, v in params.items()}}


def longer(length: int) -> Any:
    return altering("text", max_length=str(length))


NUMBER, DROP_NUMBER = adding("number", DataType.INT32, nullable=True), dropping("number")
TEXT = adding("text", DataType.VARCHAR, default="x", max_bytes=8, params={"max_length": "8"})
TEXTS = adding(
    "texts", DataType.ARRAY, element=DataType.VARCHAR, nullable=True, max_bytes=8, capacity=4,
    params={"max_length": "8", "max_capacity": "4"},
)  # fmt: skip
TWO = ("create_collection", "a", new_collection(schema=TWO_VECTORS.to_dict()))
KEYED_A = ("create_collection", "a", new_collection(schema=KEYED.to_dict()))


@pytest.mark.parametrize(
    ("before", "change", "told"),
    [
        pytest.param([], A, CreateCollection, id="create a collection"),
        pytest.param([A], ("truncate_collection", "a"), TruncateCollection, id="truncate"),
        pytest.param([A], ("drop_collection", "a"), DropCollection, id="drop a collection"),
        pytest.param(
            [A], ("alter_collection", "a", {"changed": {"k": "v"}, "dropped": []}), AlterCollection, id="alter"
        ),
        pytest.param([A], ("alter_collection", "a", DYNAMIC), AlterCollection, id="switch the dynamic field on"),
        pytest.param([A], NUMBER, AlterCollection, id="add a field"),
        pytest.param([A, NUMBER], DROP_NUMBER, AlterCollection, id="drop a field"),
        pytest.param([A, TEXT], longer(9), AlterCollection, id="alter a field"),
        pytest.param([A], PARTITION, CreatePartition, id="create a partition"),
        pytest.param([A, PARTITION], ("drop_partition", "a", {"partition": "p"}), DropPartition, id="drop a partition"),
        pytest.param([A], INDEX, CreateIndex, id="create an index"),
        pytest.param([A, INDEX], ("drop_index", "a", {"index_name": "v"}), DropIndex, id="drop an index"),
        pytest.param([A, INDEX], LOAD, LoadCollection, id="load"),
        pytest.param([A, INDEX, LOAD], ("release", "a", {"partitions": []}), ReleaseCollection, id="release"),
    ],
)
def test_every_shard_is_told_once(before: list[Any], change: Any, told: type[Message]) -> None:
    """Every shard that has the collection's rows gets one message; the task survives a restart with the same messages,
    is forgotten when it ends, and ending it again does nothing."""
    one = driver(*before)
    task = one.begin(*change)
    assert isinstance(task, Task) and list(one.control.catalog.tasks) == [task.task_id]
    messages = one.told(task)
    shards = [shard for shard, _ in messages]
    assert len(shards) == 2 and shards == sorted(set(shards)) and set(shards) <= set(range(SHARDS))
    assert {type(message) for _, message in messages} == {told}
    again = restored(one.control)
    assert again.catalog.tasks == one.control.catalog.tasks
    assert messages_of(again.catalog, again.catalog.tasks[task.task_id]) == messages
    refused(one.begin("truncate_collection", "a"), "conflict", "collection a is being changed")
    one.end(task)
    state = one.control.catalog.to_bytes()
    one.end(task)
    assert not one.control.catalog.tasks and one.control.catalog.to_bytes() == state


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ([], A), ([A], ("truncate_collection", "a", {})), ([A], ("drop_collection", "a", {})), ([A], NUMBER),
        ([A], ("alter_collection", "a", {"changed": {"k": "v"}, "dropped": []})),
        ([A], ("alter_collection", "a", DYNAMIC)),
        ([A, NUMBER], DROP_NUMBER), ([A, TEXT], longer(9)), ([A], PARTITION), ([A], INDEX),
        ([A], ("flush_all", "", {})),
        ([A, PARTITION], ("drop_partition", "a", {"partition": "p"})),
        ([A, INDEX], ("drop_index", "a", {"index_name": "v"})),
        ([A, INDEX], LOAD), ([A, INDEX, LOAD], ("release", "a", {"partitions": []})),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_shard_that_is_told_again_changes_nothing(before: list[Any], change: Any) -> None:
    """I-CO-2: a shard that has forgotten that it was told, and is told again at any time before the task is over, has
    the same collections, with the same rows: also those that were written in between."""
    one = driver()
    told = [message for ddl in before for _, message in one.carry(*ddl)[:1]]
    task = one.begin(*change)
    told += [message for _, message in one.told(task)[:1]]

    def shard_after(repeats: int) -> Any:
        shard = Shard(one.told(task)[0][0], lambda digest: b"")
        messages: list[Any] = [*told]
        (collection_id, *_) = [message.collection_id for message in told if hasattr(message, "collection_id")]
        for number in range(4):
            messages.append((collection_id, number))
            messages += told[-1:] * repeats
        for position, message in enumerate(messages, 1):
            body, said = b"", message
            state = shard.collections.get(collection_id)
            if isinstance(message, tuple):
                if state is None:
                    continue
                said = Insert(collection_id, min(state.partitions), replace=True)
                body = small_rows(state.schema, message[1] % 3).to_bytes()
            shard.apply(Position(position), Entry(f"p{position}", 1, Tick(position << 18), said, body))
        return {
            i: (
                state.schema, state.partitions, state.properties, state.loaded, sorted(state.indexes),
                sorted(key for view in shard.views(i) for key in live_keys(view)),
            )
            for i, state in shard.collections.items()
        }  # fmt: skip

    assert shard_after(0) == shard_after(1) == shard_after(3)


def test_all_kinds_are_in_the_table_above() -> None:
    """A new kind of change comes with its row."""
    assert set(KINDS) == {
        *("create_collection", "truncate_collection", "drop_collection", "alter_collection", "create_partition"),
        *(
            "drop_partition",
            "create_index",
            "drop_index",
            "load",
            "release",
            "flush_all",
            "add_field",
            "drop_field",
            "alter_field",
        ),
    }


@pytest.mark.parametrize(
    ("before", "change"),
    [
        pytest.param([], ("drop_collection", "a"), id="drop a collection that does not exist"),
        pytest.param([A], A, id="create the same collection again"),
        pytest.param([A, PARTITION], PARTITION, id="create a partition again"),
        pytest.param([A], ("drop_partition", "a", {"partition": "p"}), id="drop a partition that does not exist"),
        pytest.param([A, TEXT], longer(8), id="alter a field to what it is"),
        pytest.param([A, INDEX], INDEX, id="create the same index again"),
        pytest.param([A, INDEX, LOAD], LOAD, id="load what is loaded"),
        pytest.param([A, INDEX, PARTITION, LOAD_P], LOAD_P, id="load a loaded partition"),
        pytest.param([A, INDEX, PARTITION, LOAD], LOAD_P, id="load a partition of a loaded collection"),
        pytest.param([A], ("release", "a", {"partitions": []}), id="release what is not loaded"),
        pytest.param([A, PARTITION], ("release", "a", {"partitions": ["p"]}), id="release a released partition"),
    ],
)
def test_a_repeat_succeeds_and_does_nothing(before: list[Any], change: Any) -> None:
    """Clients repeat these, and are told that all is well."""
    one = driver(*before)
    state = one.control.catalog.to_bytes()
    assert one.begin(*change) is None
    assert one.control.catalog.to_bytes() == state


@pytest.mark.parametrize(
    ("before", "change", "code", "text"),
    [
        *(
            pytest.param(
                [A],
                ("create_collection", "a", new_collection(**{key: value})),
                "invalid_parameter",
                "create duplicate collection with different parameters, collection: a",
                id=f"create again with another {key}",
            )
            for key, value in {
                "schema": TWO_VECTORS.to_dict(),
                "shards": 1,
                "description": "other",
                "consistency": "Strong",
                "properties": {"k": "v"},
            }.items()
        ),
        pytest.param(
            [("create_collection", "a", new_collection(schema=KEYED.to_dict(), partitions=["_default_0"]))],
            ("create_collection", "a", new_collection(schema=KEYED.to_dict(), partitions=["_default_0", "_default_1"])),
            "invalid_parameter",
            "create duplicate collection",
            id="create again with more partitions of the key",
        ),
        pytest.param(
            [], ("create_collection", "1", new_collection()), "name_invalid", "Invalid collection name", id="name"
        ),
        pytest.param(
            [A, CreateAlias("default", "a", "x")],
            ("create_collection", "x", new_collection()),
            "name_invalid",
            "conflicts with an existing alias",
            id="a collection named like an alias",
        ),
        pytest.param(
            [], ("create_collection", "a", new_collection(), "none"), "database_not_found", "none", id="no database"
        ),
        pytest.param(
            [],
            ("create_collection", "a", new_collection(properties={"collection.ttl.seconds": "-1"})),
            "invalid_parameter",
            "collection.ttl.seconds must be a whole number",
            id="a TTL that is none",
        ),
        pytest.param(
            [], ("truncate_collection", "a"), "collection_not_found", "can't find collection", id="truncate none"
        ),
        pytest.param(
            [A, CreateAlias("default", "a", "x")],
            ("drop_collection", "x"),
            "invalid_parameter",
            "cannot drop the collection via alias = x",
            id="drop by alias",
        ),
        pytest.param(
            [A, CreateAlias("default", "a", "x")],
            ("drop_collection", "a"),
            "invalid_parameter",
            "associated aliases [x]",
            id="drop what has an alias",
        ),
        pytest.param(
            [A],
            ("alter_collection", "a", {"changed": {"collection.ttl.seconds": "soon"}, "dropped": []}),
            "invalid_parameter",
            "collection.ttl.seconds",
            id="alter to a TTL that is none",
        ),
        pytest.param(
            [A],
            ("create_partition", "a", {"partition": "not ok"}),
            "name_invalid",
            "Invalid partition name",
            id="partition",
        ),
        *(
            pytest.param(
                [("create_collection", "a", new_collection(schema=KEYED.to_dict(), partitions=["_default_0"]))],
                (kind, "a", {"partition": "p"}),
                "invalid_parameter",
                "partition key mode",
                id=f"{kind} with a key",
            )
            for kind in ("create_partition", "drop_partition")
        ),
        pytest.param(
            [A],
            ("drop_partition", "a", {"partition": "_default"}),
            "invalid_parameter",
            "default partition cannot be deleted",
            id="drop the default partition",
        ),
        *(
            pytest.param(
                [A, INDEX, PARTITION, loaded],
                ("drop_partition", "a", {"partition": "p"}),
                "invalid_parameter",
                "partition cannot be dropped, partition is loaded, please release it first",
                id=f"drop it while {what}",
            )
            for what, loaded in {"all is loaded": LOAD, "it is loaded": LOAD_P}.items()
        ),
        pytest.param(
            [A, INDEX],
            ("create_index", "a", new_index(metric="IP")),
            "index_conflict",
            "at most one distinct index is allowed per field",
            id="another index on the field",
        ),
        pytest.param(
            [A, INDEX],
            ("create_index", "a", new_index("other")),
            "index_conflict",
            "at most one distinct index is allowed per field",
            id="the same index by another name",
        ),
        pytest.param(
            [("create_collection", "a", new_collection(schema=TWO_VECTORS.to_dict())), INDEX],
            ("create_index", "a", new_index("v", "w")),
            "index_conflict",
            "used by another field",
            id="a taken index name",
        ),
        pytest.param(
            [A], ("drop_index", "a", {"index_name": "v"}), "index_not_found", "indexName=v", id="drop no index"
        ),
        pytest.param(
            [A, INDEX, LOAD],
            ("drop_index", "a", {"index_name": "v"}),
            "invalid_parameter",
            "vector index cannot be dropped on loaded collection: 1001",
            id="drop the index of what is loaded",
        ),
        pytest.param(
            [A], LOAD, "invalid_parameter", "there is no vector index on field: [v]", id="load without an index"
        ),
        pytest.param(
            [("create_collection", "a", new_collection(schema=TWO_VECTORS.to_dict())), INDEX],
            LOAD,
            "invalid_parameter",
            "no vector index on field: [w]",
            id="load with one index of two",
        ),
        pytest.param([A, INDEX], LOAD_P, "partition_not_found", "partition=p", id="load no partition"),
        pytest.param(
            [A],
            ("release", "a", {"partitions": ["p"]}),
            "partition_not_found",
            "partition=p",
            id="release no partition",
        ),
        pytest.param([A], ("paint", "a", {}), "invalid_parameter", "paint", id="a kind that there is not"),
        pytest.param([], NUMBER, "collection_not_found", "can't find collection", id="add a field to none"),
        *(
            pytest.param([A], adding("n", kind, **more), code, text, id=f"add a field: {text}")
            for kind, more, code, text in (
                (DataType.INT64, {}, "invalid_parameter", "added field must be nullable or have a default value"),
                (DataType.INT64, {"primary": True}, "invalid_parameter", "not support to add pk field"),
                (DataType.INT64, {"partition_key": True}, "invalid_parameter", "not support to add partition key"),
                (DataType.INT64, {"nullable": True, "auto_id": True}, "invalid_parameter", "AutoID"),
                (DataType.FLOAT_VECTOR, {"dim": 2}, "invalid_parameter", "not support to add vector field"),
                (DataType.VARCHAR, {"nullable": True}, "invalid_parameter", "max_length"),
                (DataType.INT8, {"default": 128}, "invalid_parameter", "does not take 128"),
            )
        ),
        pytest.param(
            [A], adding("not ok", DataType.BOOL, nullable=True), "name_invalid", "Invalid field name", id="add: name"
        ),
        pytest.param(
            [A], adding("$meta", DataType.JSON, nullable=True), "name_invalid", "Invalid field name", id="add $meta"
        ),
        pytest.param([A, NUMBER], NUMBER, "invalid_parameter", "duplicate field name: number", id="add it again"),
        pytest.param([A], DROP_NUMBER, "field_not_found", "field number not exist; fields: id, v", id="drop no field"),
        pytest.param([A], dropping(field_id=9), "field_not_found", "id 9 not exist", id="drop no field by id"),
        pytest.param([A, NUMBER, DROP_NUMBER], DROP_NUMBER, "field_not_found", "number not exist", id="drop it again"),
        pytest.param([A], dropping("id"), "invalid_parameter", "it is the primary key", id="drop the primary key"),
        pytest.param([A], dropping("v"), "invalid_parameter", "it is the only vector field", id="drop the only vector"),
        pytest.param([A], dropping("$meta"), "invalid_parameter", "it is the dynamic field", id="drop $meta"),
        pytest.param([KEYED_A], dropping("owner"), "invalid_parameter", "the partition key", id="drop the owner"),
        *(
            pytest.param([A, TEXT, TEXTS], change, "invalid_parameter", text, id=f"alter a field: {text}")
            for change, text in (
                (longer(7), "max_length of field text can only grow: it is 8"),
                (longer(65_536), "should be in (0, 65535], got 65536"),
                (altering("text", max_length="x"), "is a whole number, got 'x'"),
                (altering("text", max_length="-9"), "is a whole number"),
                (altering("text", max_capacity="9"), "max_capacity of field text, which is VarChar, can not be"),
                (altering("texts", max_capacity="3"), "max_capacity of field texts can only grow"),
                (altering("texts", max_capacity="4097"), "should be in (0, 4096]"),
                (altering("v", dim="4"), "dim of field v, which is FloatVector, can not be altered"),
                (altering("id", max_length="4"), "max_length of field id, which is Int64, can not be altered"),
                (altering("v", mmap__enabled="perhaps"), "mmap.enabled of field v is true or false"),
            )
        ),
        pytest.param([A], longer(9), "field_not_found", "field text not exist", id="alter no field"),
        pytest.param(
            [A],
            ("alter_collection", "a", {"changed": {"dynamicfield.enabled": "false"}, "dropped": []}),
            "invalid_parameter",
            "dynamic schema cannot supported to be disabled",
            id="switch the dynamic field off",
        ),
        pytest.param(
            [A],
            ("alter_collection", "a", {"changed": {"dynamicfield.enabled": "1"}, "dropped": []}),
            "invalid_parameter",
            "dynamicfield.enabled is true or false, got '1'",
            id="switch the dynamic field somewhere",
        ),
        pytest.param(
            [TWO, dropping("w")],
            ("create_index", "a", new_index("w", "w")),
            "field_not_found",
            "field w not exist: it was dropped",
            id="an index on a dropped field",
        ),
    ],
)
def test_it_is_refused(before: list[Any], change: Any, code: str, text: str) -> None:
    """What must fail fails before any shard hears of it, with the code and the words that clients look for."""
    one = driver(*before)
    state = one.control.catalog.to_bytes()
    refused(one.begin(*change), code, text)
    assert one.control.catalog.to_bytes() == state


def test_each_change_of_a_field_is_the_next_version() -> None:
    """Shards are told the schema that the catalogue has in the end. Ids of dropped fields are not given again, nor
    after a restart; a dropped vector takes its index along; nothing else of the collection changes."""
    one = driver(TWO, ("create_index", "a", new_index("v", "v")), ("create_index", "a", new_index("w", "w")), LOAD)
    before = one.find("a")
    ids = []
    for version, change in enumerate((NUMBER, DROP_NUMBER, NUMBER, TEXT, longer(64), TEXTS, dropping("w")), 2):
        told = one.carry(*change)
        one.control = restored(one.control)
        found = one.find("a")
        assert found.schema.version == version
        assert [message.schema for _, message in told] == [found.schema.to_dict()] * 2
        assert CollectionSchema.from_dict(found.schema.to_dict()) == found.schema
        ids.append([known.id for known in found.schema.fields])
    assert ids[1:4] == [[100, 101, 102], [100, 101, 102, 104], [100, 101, 102, 104, 105]]
    assert ids[-1] == [100, 101, 104, 105, 106]
    assert (found.schema.field("text").max_bytes, found.schema.field("text").params) == (64, {"max_length": "64"})
    assert list(found.indexes) == ["v"] and found.indexes["v"] == before.indexes["v"]
    assert (found.loaded, found.properties, found.partitions) == (None, before.properties, before.partitions)
    one.carry(*altering("texts", max_capacity="5", max_length="9", mmap__enabled="true"))
    texts = one.find("a").schema.field("texts")
    assert (texts.capacity, texts.max_bytes) == (5, 9)
    assert texts.params == {"max_length": "9", "max_capacity": "5", "mmap.enabled": "true"}
    by_id = one.carry(*dropping(field_id=texts.id))
    assert by_id and "texts" not in one.find("a").schema.by_name


def test_the_dynamic_field_is_switched_on_once() -> None:
    """As a property that is none: it is the schema that tells, and asking again changes no schema."""
    one = driver(TWO)
    for schema_told in (True, False):
        ((_, message), _) = one.carry("alter_collection", "a", DYNAMIC)
        assert (message.schema is not None, message.properties) == (schema_told, {})
    found = one.find("a")
    assert found.schema.version == 2 and found.schema.dynamic is not None and found.schema.dynamic.id == 103
    assert one.carry("alter_collection", "a", {"changed": {"k": "v", **DYNAMIC["changed"]}, "dropped": []})  # type: ignore
    assert one.find("a").properties == {"k": "v"} and one.find("a").schema == found.schema


def test_there_are_only_so_many_fields() -> None:
    """The limit is that of a new collection; dropping one makes room."""
    one = driver(A)
    for i in range(FIELDS_MAX - 2):
        assert one.carry(*adding(f"f{i}", DataType.BOOL, nullable=True))
    refused(one.begin(*NUMBER), "invalid_parameter", "reached the maximum value 256")
    one.carry(*dropping("f7"))
    assert one.carry(*NUMBER)


def test_there_are_only_so_many_partitions() -> None:
    """The limit counts the default partition."""
    names = ["_default", *(f"p{i}" for i in range(PARTITIONS_MAX - 1))]
    one = driver(("create_collection", "a", new_collection(partitions=names)))
    refused(one.begin(*PARTITION), "invalid_parameter", "exceeds max configuration (1024)")


def test_a_collection_is_visible_when_its_shards_have_it() -> None:
    """Until the task ends no client sees the collection; from then on it is as it was asked for."""
    one = driver()
    task = one.begin("create_collection", "a", new_collection(description="text", properties={"k": "v"}))
    assert not one.control.catalog.names
    one.end(task)
    found = one.find("a")
    assert (found.schema, found.description, found.properties) == (SCHEMA, "text", {"k": "v"})
    assert found.loaded == frozenset() and not found.is_loaded and 0 < found.created_tick <= one.control.tick


def test_more_channels_than_shards() -> None:
    """Virtual channels may share a shard, which is then told once."""
    one = driver()
    task = one.begin("create_collection", "a", new_collection(shards=2 * SHARDS + 1))
    assert [shard for shard, _ in one.told(task)] == list(range(SHARDS))
    one.end(task)
    assert len(one.find("a").shards) == 2 * SHARDS + 1


def test_what_shards_are_told() -> None:
    """Messages name things by id and carry all that a shard needs."""
    one = driver(A, INDEX, PARTITION)
    found = one.find("a")
    (_, create), *_ = driver().carry(*A)
    assert create == CreateCollection(
        found.collection_id, SCHEMA.to_dict(), list(found.partitions.values())[:1], {}, []
    )
    index = found.indexes["v"]
    assert index.index_id > 0 and index.spec == new_index()["index"]["spec"]
    p = found.partitions["p"]
    assert one.carry(*LOAD_P)[0][1] == LoadCollection(found.collection_id, [PartitionId(p)])
    assert one.find("a").loaded == frozenset({p})
    assert one.carry(*LOAD)[0][1] == LoadCollection(found.collection_id, None)
    assert one.find("a").loaded is None
    assert one.carry("release", "a", {"partitions": ["p"]})[0][1] == ReleaseCollection(found.collection_id, [p])
    assert one.find("a").loaded == frozenset({found.partitions["_default"]})
    assert one.carry("release", "a", {"partitions": []})[0][1] == ReleaseCollection(found.collection_id, None)
    assert not one.find("a").is_loaded
    again = one.carry("drop_index", "a", {"index_name": "v"})
    assert again[0][1] == DropIndex(found.collection_id, IndexId(index.index_id))
    told = one.carry(*INDEX)[0][1]
    assert told.index_id > index.index_id and (told.field_id, told.spec) == (FieldId(101), index.spec)


def test_properties_come_and_go() -> None:
    """Altering sets some and drops some; shards are told all that are left; the description is one of them."""
    one = driver(("create_collection", "a", new_collection(properties={"k": "v", "old": "1"})), INDEX)
    changed = {"collection.ttl.seconds": "60", "collection.description": "new"}
    told = one.carry("alter_collection", "a", {"changed": changed, "dropped": ["old", "none"]})
    assert told[0][1].properties == {"k": "v", **changed}
    assert one.find("a").properties == {"k": "v", **changed} and one.find("a").description == "new"
    one.say(AlterIndex("default", "a", "v", {"mmap.enabled": "true"}, []))
    assert one.find("a").indexes["v"].properties == {"mmap.enabled": "true"}


def test_properties_are_bounded_in_total() -> None:
    """A collection has at most 256 properties, however many changes they came in."""
    one = driver(("create_collection", "a", new_collection(properties={"k": "v"})))
    one.carry("alter_collection", "a", {"changed": {f"k{i}": "v" for i in range(255)}, "dropped": []})
    again = one.carry("alter_collection", "a", {"changed": {"one": "more"}, "dropped": []})
    refused(again, "invalid_parameter", "257 properties, at most 256")


REQUESTS: Sequence[Any] = [
    A, ("truncate_collection", "a", {}), ("drop_collection", "a", {}),
    ("alter_collection", "a", {"changed": {"k": "v"}, "dropped": ["l"]}), ("alter_collection", "a", DYNAMIC), NUMBER,
    DROP_NUMBER, longer(9), PARTITION, ("drop_partition", "a", {"partition": "p"}), INDEX,
    ("drop_index", "a", {"index_name": "v"}), LOAD, ("release", "a", {"partitions": []}), ("flush_all", "", {}),
    ("create_collection", "b", new_collection(indexes=[new_index()["index"]], load=True)),
]  # fmt: skip
JUNK: Sequence[Any] = [
    None,
    True,
    -1,
    1 << 62,
    1 << 70,
    1.5,
    "",
    "x",
    "\x00",
    b"x",
    [],
    [[]],
    {},
    {"a": {}},
    {1: 2},
    ["x", 1],
]


def small_rows(schema: CollectionSchema, key: int) -> Batch:
    """Return a row of this key and a vector, with nothing or the default in all other fields."""
    columns: dict[FieldId, Column] = {}
    for one in schema.fields:
        if one.primary:
            columns[one.id] = ScalarColumn(np.array([key], np.int64))
        elif one.type.is_vector:
            columns[one.id] = VectorColumn(np.zeros((1, one.dim), np.float32))
        else:
            columns[one.id] = absent_column(one, 1)
    return Batch(columns, 1)


def live_keys(view: SegmentView) -> list[int]:
    offsets = np.flatnonzero(~np.isin(np.arange(view.rows), view.deletes.offsets))
    primary = view.schema.primary.id
    return list(view.fetch(offsets, [primary]).columns[primary].to_list())


def state_of(control: Control) -> list[Any]:
    return [control.catalog.to_bytes(), control.keys.to_plain(), control.jobs.to_plain()]


def spoiled(dice: Random, plain: Any) -> Any:
    """Return plain data with something in it that is gone, another, or too much."""
    if isinstance(plain, dict) and plain and dice.random() < 0.9:
        name = dice.choice(list(plain))
        rest = {key: value for key, value in plain.items() if key != name}
        how = dice.random()
        if how < 0.2:
            return rest
        return {**plain, "more": dice.choice(JUNK)} if how < 0.3 else {**plain, name: spoiled(dice, plain[name])}
    if isinstance(plain, list) and plain and dice.random() < 0.9:
        place = dice.randrange(len(plain))
        return [*plain[:place], spoiled(dice, plain[place]), *plain[place + 1 :]]
    return dice.choice(JUNK)


@settings(phases=[Phase.generate], max_examples=400)
@given(seed=st.integers(0, 1 << 32))
def test_requests_that_are_none(seed: int) -> None:
    """Whatever another node sends as a request is answered. A refusal changes nothing; and what is accepted can be
    carried through, told to shards, and written in a checkpoint."""
    dice = Random(seed)
    one = driver(*dice.choice([[], [A], [A, TEXT, NUMBER, INDEX, PARTITION]]))
    kind, name, request = dice.choice(REQUESTS)
    values: list[Any] = [kind, "default", name, dict(request)]
    place = dice.choice([0, 1, 2, 3, 3, 3, 3, 3, 3])
    values[place] = spoiled(dice, values[place])
    before = state_of(one.control)
    outcome = one.say(BeginDdl(*values))
    if isinstance(outcome, Rejected):
        assert isinstance(outcome.error(), AnnulusError)
        assert state_of(one.control) == before
    elif outcome:
        task = one.control.catalog.tasks[outcome["task"]]
        for shard_id, message in one.told(task):
            told = Entry.decode(Entry("tests", 1, Tick(1), message).encode())
            Shard(shard_id, lambda digest: b"").apply(Position(1), told)
        one.end(task)
    assert restored(one.control).checkpoint() == one.control.checkpoint()
