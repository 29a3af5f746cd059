"""The catalogue: what clients' existing programs expect of each command, and what stays true whatever is commanded."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.catalog import (
    DATABASES_MAX,
    AlterDatabase,
    AlterIndex,
    Catalog,
    CreateAlias,
    CreateDatabase,
    DropAlias,
    DropDatabase,
    RenameCollection,
)
from cluster.control import Control
from cluster.ddl import KINDS, AckDdl, BeginDdl, messages
from cluster.machine import Rejected
from cluster.membership import FormCluster
from cluster.message import Entry, Message, Seal
from cluster.resources import conflict
from storage.errors import AnnulusError
from storage.schema import DataType, FieldSchema
from storage.types import CollectionId, ShardId
from tests.cluster.controls import SHARDS, Driver, driver, new_collection, new_index, refused, restored

A = ("create_collection", "a", new_collection())
B = ("create_collection", "b", new_collection())
D = CreateDatabase("d", {})


def alias(name: str, collection: str = "a", move: bool = False) -> CreateAlias:
    return CreateAlias("default", collection, name, move)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        pytest.param([], DropDatabase("none"), id="drop a database that does not exist"),
        pytest.param([A, alias("x")], alias("x"), id="create an alias again"),
        pytest.param([A, B, alias("x")], alias("x", "b", True), id="move an alias"),
        pytest.param([A, alias("x")], RenameCollection("default", "a", "default", "c"), id="rename what has an alias"),
        pytest.param([D, A], RenameCollection("default", "a", "d", "a"), id="move to another database"),
        pytest.param([D], AlterDatabase("d", {"k": "v"}, ["none"]), id="alter a database"),
        pytest.param([A, ("drop_collection", "a"), D, DropDatabase("d")], D, id="create a dropped database again"),
    ],
)
def test_it_succeeds(before: list[Any], message: Message) -> None:
    """Commands that clients repeat, or that look odd, and are right."""
    assert driver(*before).say(message) == {}


@pytest.mark.parametrize(
    ("before", "message", "code", "text"),
    [
        pytest.param([D], D, "invalid_parameter", "database already exist: d", id="a database twice"),
        pytest.param([], CreateDatabase("1", {}), "name_invalid", "Invalid database name", id="a bad name"),
        pytest.param([], DropDatabase("default"), "invalid_parameter", "can not drop default database", id="default"),
        pytest.param(
            [D, A, RenameCollection("default", "a", "d", "a")],
            *(DropDatabase("d"), "invalid_parameter", "not empty"),
            id="a database with collections",
        ),
        pytest.param([], AlterDatabase("d", {}, []), "database_not_found", "database=d", id="alter no database"),
        pytest.param([A], alias("1"), "name_invalid", "Invalid alias name", id="a bad alias"),
        pytest.param([], alias("x"), "collection_not_found", "can't find collection", id="an alias of nothing"),
        pytest.param([A, B], alias("b"), "alias_conflict", "conflict", id="an alias that is a collection"),
        pytest.param([A, B, alias("x")], alias("x", "b"), "alias_exists", "another collection: a", id="taken alias"),
        pytest.param([A], alias("x", "a", True), "alias_not_found", "x", id="move no alias"),
        pytest.param([A, alias("x")], alias("y", "x"), "collection_not_found", "x", id="an alias of an alias"),
        pytest.param([], DropAlias("default", "x"), "alias_not_found", "x", id="drop no alias"),
        pytest.param(
            [A, B],
            *(RenameCollection("default", "a", "default", "b"), "invalid_parameter", "duplicated new collection name"),
            id="rename onto a collection",
        ),
        pytest.param(
            [A, B, alias("x", "b")],
            *(RenameCollection("default", "a", "default", "x"), "invalid_parameter", "duplicated new collection name"),
            id="rename onto an alias",
        ),
        pytest.param(
            [D, A, alias("x")],
            *(RenameCollection("default", "a", "d", "a"), "invalid_parameter", "must drop all aliases"),
            id="move what has an alias",
        ),
        pytest.param(
            [A], RenameCollection("default", "a", "none", "a"), "database_not_found", "none", id="move to nowhere"
        ),
        pytest.param(
            [A],
            AlterIndex("default", "a", "v", {}, []),
            "index_not_found",
            "indexName=v",
            id="alter an index just dropped",
        ),
        pytest.param([], Seal(CollectionId(1)), "invalid_parameter", "unknown command seal", id="a shard's message"),
    ],
)
def test_it_is_refused(before: list[Any], message: Message, code: str, text: str) -> None:
    """What must fail fails with the code and the words that clients look for, and changes nothing."""
    one = driver(*before)
    state = one.control.catalog.to_bytes()
    refused(one.say(message), code, text)
    assert one.control.catalog.to_bytes() == state


def test_there_are_only_so_many_databases() -> None:
    """The limit counts the default database."""
    one = driver(*(CreateDatabase(f"d{i}", {}) for i in range(DATABASES_MAX - 1)))
    refused(one.say(CreateDatabase("more", {})), "database_limit", "limit=64")


@pytest.mark.parametrize(
    ("before", "opened", "message"),
    [
        pytest.param([A], ("drop_collection", "a"), alias("x"), id="an alias of what is being dropped"),
        pytest.param([A, B, alias("x")], ("drop_collection", "b"), alias("x", "b", True), id="an alias moved to it"),
        pytest.param([A], B, alias("b"), id="an alias named like what is being created"),
        pytest.param([A], B, RenameCollection("default", "a", "default", "b"), id="a rename onto it"),
        pytest.param(
            [A], ("truncate_collection", "a"), RenameCollection("default", "a", "default", "c"),
            id="a rename of what is being changed",
        ),
        pytest.param([D], (*A, "d"), DropDatabase("d"), id="dropping the database of a creation"),
    ],
)  # fmt: skip
def test_an_open_task_is_not_pulled_from_under(before: list[Any], opened: Any, message: Message) -> None:
    """What a task checked when it began still holds when it ends, so what would change that is refused meanwhile."""
    one = driver(*before)
    task = one.begin(*opened)
    refused(one.say(message), "conflict", "try again")
    one.end(task)
    assert_sound(one.control.catalog)


def test_listing_keeps_its_order_over_a_restart() -> None:
    """Collections are listed in the order of their creation, also after a rename and a restart."""
    one = driver(A, B, RenameCollection("default", "a", "default", "z"))
    again = restored(one.control).catalog
    assert [c.name for c in one.control.catalog.in_database("default")] == ["z", "b"]
    assert [c.name for c in again.in_database("default")] == ["z", "b"]


def assert_sound(catalog: Catalog) -> None:
    """Assert what is true of every catalogue."""
    assert sorted(catalog.names.values()) == sorted(catalog.collections)
    for (database, name), collection_id in catalog.names.items():
        one = catalog.collections[collection_id]
        assert (one.database, one.name) == (database, name) and database in catalog.databases
        assert set(one.loaded or ()) <= set(one.partitions.values())
        assert len({index.field_name for index in one.indexes.values()}) == len(one.indexes)
        assert all(0 <= shard < SHARDS for shard in one.shards)
    for (database, _), collection_id in catalog.aliases.items():
        assert catalog.collections[collection_id].database == database
    assert not catalog.names.keys() & catalog.aliases.keys(), "a name is a collection or an alias"
    changing = [task.collection_id for task in catalog.tasks.values()]
    assert len(set(changing)) == len(changing), "one change of a collection at a time"
    for task in catalog.tasks.values():
        if task.collection_id:
            assert (task.kind == "create_collection") != (task.collection_id in catalog.collections)
        others = [other for other in catalog.tasks.values() if other is not task]
        assert not any(conflict(task.holds, other.holds) for other in others), "I-CO-5"
    ids = [*catalog.collections, *(p for c in catalog.collections.values() for p in c.partitions.values())]
    assert len(set(ids)) == len(ids) and max(ids, default=0) <= catalog.next_id


NAMES = ("a", "b", "x")
DATABASES = ("default", "d", "e")


def anything(dice: Random, catalog: Catalog) -> Message:
    """Return a command by chance, about few names, so that most collide with something."""
    database, other = dice.choices(DATABASES, [6, 2, 1], k=2)
    name, second = dice.choice(NAMES), dice.choice(NAMES)
    partition = dice.choice(["_default", "p", "q"])
    chosen = dice.choice([[], ["p"], ["_default", "p"], ["none"]])
    requests: dict[str, Any] = {
        "create_collection": new_collection(shards=dice.randint(1, 2)),
        "alter_collection": {"changed": {"collection.ttl.seconds": dice.choice(["5", "x"])}, "dropped": ["k"]},
        "create_partition": {"partition": partition}, "drop_partition": {"partition": partition},
        "create_index": new_index(dice.choice("vw"), "v", dice.choice(["L2", "IP"])),
        "drop_index": {"index_name": dice.choice("vw")},
        "load": {"partitions": chosen}, "release": {"partitions": chosen},
        "add_field": {"field": FieldSchema(f"f{second}", DataType.VARCHAR, max_bytes=8, nullable=True).to_dict()},
        "drop_field": {"field_name": f"f{second}", "field_id": 0},
        "alter_field": {"field_name": f"f{second}", "params": {"max_length": str(dice.randint(4, 12))}},
    }  # fmt: skip
    kind = dice.choice([*KINDS, "create_collection", "create_collection", "create_index", "load", "nonsense"])
    tasks = [*catalog.tasks, 1]
    return dice.choices(
        [
            BeginDdl(kind, database, name, requests.get(kind, {})),
            AckDdl(dice.choice(tasks), dice.sample([ShardId(one) for one in range(SHARDS)], dice.randint(1, SHARDS))),
            CreateDatabase(database, {"k": name}),
            DropDatabase(database),
            AlterDatabase(database, {"k": second}, [second]),
            CreateAlias(database, name, second, dice.random() < 0.5),
            DropAlias(database, name),
            RenameCollection(database, name, other, second),
            AlterIndex(database, name, dice.choice("vw"), {"k": second}, [name]),
        ],
        [24, 16, 2, 2, 1, 6, 2, 5, 3],
    )[0]


class Model:
    """What names mean, kept by the plainest means: told what was accepted, it follows."""

    def __init__(self) -> None:
        self.databases = {"default"}
        self.collections: dict[tuple[str, str], dict[str, Any]] = {}
        self.aliases: dict[tuple[str, str], dict[str, Any]] = {}
        self.open: dict[int, BeginDdl] = {}
        self.untold: dict[int, set[ShardId]] = {}

    def follow(self, message: Message, outcome: Any, catalog: Catalog) -> None:
        match message:
            case CreateDatabase(name):
                self.databases.add(name)
            case DropDatabase(name):
                self.databases.discard(name)
            case CreateAlias(database, collection, name):
                self.aliases[database, name] = self.collections[database, collection]
            case DropAlias(database, name):
                del self.aliases[database, name]
            case RenameCollection(database, name, new_database, new_name):
                self.collections[new_database, new_name] = self.collections.pop((database, name))
            case BeginDdl():
                if outcome:
                    self.open[outcome["task"]] = message
                    self.untold[outcome["task"]] = {
                        shard for shard, _ in messages(catalog, catalog.tasks[outcome["task"]])
                    }
            case AckDdl(task_id, shards) if task_id in self.open:
                self.untold[task_id] -= set(shards)
                if not self.untold[task_id]:
                    self._end(self.open.pop(task_id))

    def _end(self, task: BeginDdl) -> None:
        where = (task.database, task.collection)
        if task.ddl == "flush_all":
            return
        if task.ddl == "create_collection":
            self.collections[where] = {"partitions": {"_default"}, "indexes": set(), "loaded": set()}
            return
        one = self.collections[where]
        if task.ddl == "drop_collection":
            del self.collections[where]
        elif task.ddl == "create_partition":
            one["partitions"].add(task.request["partition"])
        elif task.ddl == "drop_partition":
            one["partitions"].discard(task.request["partition"])
        elif task.ddl == "create_index":
            one["indexes"].add(task.request["index"]["name"])
        elif task.ddl == "drop_index":
            one["indexes"].discard(task.request["index_name"])
        elif task.ddl == "load" and one["loaded"] != {"all"}:
            one["loaded"] = (
                {"all"} if not task.request["partitions"] else one["loaded"] | set(task.request["partitions"])
            )
        elif task.ddl == "release":
            loaded = set(one["partitions"]) if one["loaded"] == {"all"} else one["loaded"]
            one["loaded"] = loaded - set(task.request["partitions"] or one["partitions"])

    def check(self, catalog: Catalog) -> None:
        assert set(catalog.databases) == self.databases and set(catalog.tasks) == set(self.open)
        assert set(catalog.names) == set(self.collections) and set(catalog.aliases) == set(self.aliases)
        for where, wanted in self.collections.items():
            one = catalog.find(*where)
            assert (set(one.partitions), set(one.indexes)) == (wanted["partitions"], wanted["indexes"])
            known = {number: name for name, number in one.partitions.items()}
            assert wanted["loaded"] == ({"all"} if one.loaded is None else {known[i] for i in one.loaded})
        for where, wanted in self.aliases.items():
            found = catalog.find(*where)
            assert self.collections[found.database, found.name] is wanted


@settings(phases=[Phase.generate])
@given(seed=st.integers(0, 1 << 32))
def test_any_commands(seed: int) -> None:
    """Every command is answered; a refused one changes nothing; names mean what the model says; and a replica that
    starts from any checkpoint goes on to the very same bytes."""
    dice, one, model = Random(seed), Driver(), Model()
    second = Control(0)
    for count in range(150):
        catalog = one.control.catalog
        message, before = anything(dice, catalog), catalog.to_bytes()
        if count % 40 == 0:
            second = restored(one.control)
        outcome = one.say(message)
        second.apply(one.log[-1][0], Entry.decode(one.log[-1][1]))
        if isinstance(outcome, Rejected):
            assert catalog.to_bytes() == before, message
            assert isinstance(outcome.error(), AnnulusError) and outcome.message
        else:
            model.follow(message, outcome, catalog)
        assert_sound(catalog)
        model.check(catalog)
        if count % 5 == 0:
            assert second.checkpoint() == one.control.checkpoint()
    for position, payload in one.log:
        assert one.control.apply(position, Entry.decode(payload)) is None, "an entry is applied once"


def test_the_first_cluster_id_stays() -> None:
    """Every leader without one proposes an id; all replicas take the first, and a checkpoint keeps it."""
    one = driver()
    assert one.control.cluster_id == ""
    for proposed in ("first", "second"):
        assert one.say(FormCluster(proposed, {"n1": "h:1"}, 1)) == {"cluster_id": "first"}
    assert restored(one.control).cluster_id == one.control.cluster_id == "first"
