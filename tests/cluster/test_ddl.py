"""Changes of the catalogue that shards must see: what each checks, tells the shards and leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.catalog import PARTITIONS_MAX, AlterIndex, CreateAlias, Task
from cluster.ddl import KINDS
from cluster.ddl import messages as messages_of
from cluster.message import (
    AlterCollection,
    CreateCollection,
    CreateIndex,
    CreatePartition,
    DropCollection,
    DropIndex,
    DropPartition,
    LoadCollection,
    Message,
    ReleaseCollection,
    TruncateCollection,
)
from storage.types import FieldId, IndexId, PartitionId
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


@pytest.mark.parametrize(
    ("before", "change", "told"),
    [
        pytest.param([], A, CreateCollection, id="create a collection"),
        pytest.param([A], ("truncate_collection", "a"), TruncateCollection, id="truncate"),
        pytest.param([A], ("drop_collection", "a"), DropCollection, id="drop a collection"),
        pytest.param(
            [A], ("alter_collection", "a", {"changed": {"k": "v"}, "dropped": []}), AlterCollection, id="alter"
        ),
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


def test_all_kinds_are_in_the_table_above() -> None:
    """A new kind of change comes with its row."""
    assert set(KINDS) == {
        *("create_collection", "truncate_collection", "drop_collection", "alter_collection", "create_partition"),
        *("drop_partition", "create_index", "drop_index", "load", "release"),
    }


@pytest.mark.parametrize(
    ("before", "change"),
    [
        pytest.param([], ("drop_collection", "a"), id="drop a collection that does not exist"),
        pytest.param([A], A, id="create the same collection again"),
        pytest.param([A, PARTITION], PARTITION, id="create a partition again"),
        pytest.param([A], ("drop_partition", "a", {"partition": "p"}), id="drop a partition that does not exist"),
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
    ],
)
def test_it_is_refused(before: list[Any], change: Any, code: str, text: str) -> None:
    """What must fail fails before any shard hears of it, with the code and the words that clients look for."""
    one = driver(*before)
    state = one.control.catalog.to_bytes()
    refused(one.begin(*change), code, text)
    assert one.control.catalog.to_bytes() == state


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
    assert create == CreateCollection(found.collection_id, SCHEMA.to_dict(), list(found.partitions.values())[:1], {})
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
