"""The catalogue: what databases, collections, partitions, aliases and indexes there are.

It is the state machine of the control group. A change that concerns the catalogue alone (a database, an alias, a
rename) is one command. A change that shards must see too is a *task* of two commands with a broadcast between them:

    BeginDdl      checks the request against the catalogue, gives ids, notes the task durably
    ...           the broadcaster appends the task's message to every shard concerned (again after a crash: shards
                  answer repeats with the first outcome, and a message that is applied twice changes nothing)
    AckDdl        notes which shards have applied it; with the last one it applies the change to the catalogue and
                  forgets the task

Invariants
  1. A collection is visible exactly when every shard that holds its rows has its CreateCollection.
  2. A task is forgotten only after every shard concerned has applied its message.
  3. Of two changes that conflict (`cluster.resources`) one ends before the other begins. So what a task checked when
     it began holds until it ends: nothing is named like a collection that is being created, and nothing begins to
     refer to one that is being dropped.
  4. `apply` is total: a command that cannot be applied answers Rejected and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import cbor2

from cluster.message import Message
from cluster.resources import Domain, Hold, Holds, Resource, conflict, of_database, of_names
from index.spec import IndexSpec
from storage.errors import (
    AliasConflict,
    AliasExists,
    AliasNotFound,
    CollectionNotFound,
    Conflict,
    DatabaseLimit,
    DatabaseNotFound,
    IndexNotFound,
    InvalidParameter,
    NameInvalid,
    PartitionNotFound,
)
from storage.filter.indexed import Indexed
from storage.scalar_index import SPEC_KEY, indexed_by
from storage.schema import CollectionSchema, check_name
from storage.types import CollectionId, FieldId, IndexId, PartitionId, ShardId, Tick

DEFAULT_DATABASE: Final = "default"
DEFAULT_PARTITION: Final = "_default"
DATABASES_MAX: Final = 64
COLLECTIONS_MAX: Final = 65_536
PARTITIONS_MAX: Final = 1_024
FIRST_ID: Final = 1_000

LoadedPartitions = frozenset[PartitionId] | None
"""None: all partitions, also later ones; an empty set: none."""


@dataclass(frozen=True)
class Database:
    database_id: int
    name: str
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexDef:
    """An index by name; `spec` is `IndexSpec.to_dict()`, `params` what the client gave, `properties` later changes."""

    index_id: IndexId
    name: str
    field_id: FieldId
    field_name: str
    index_type: str
    metric_type: str
    spec: Mapping[str, Any]
    params: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_scalar(self) -> bool:
        """Whether it is of a scalar field: for filters, see `storage.scalar_index`."""
        return SPEC_KEY in self.spec

    @cached_property
    def resolved(self) -> IndexSpec:
        """The spec of a vector's index, read once."""
        return IndexSpec.from_dict(self.spec)


@dataclass(frozen=True)
class Collection:
    collection_id: CollectionId
    database: str
    name: str
    schema: CollectionSchema
    shards: tuple[ShardId, ...]
    """Virtual channel i is bound to shards[i] for ever."""
    partitions: Mapping[str, PartitionId]
    description: str = ""
    consistency: str = "Bounded"
    properties: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[str, IndexDef] = field(default_factory=dict)
    loaded: LoadedPartitions = frozenset()
    created_tick: Tick = Tick(0)

    @property
    def is_loaded(self) -> bool:
        return self.loaded is None or bool(self.loaded)

    @cached_property
    def indexed_scalars(self) -> frozenset[Indexed]:
        """What has a scalar index."""
        return frozenset(indexed_by(one.field_id, one.spec) for one in self.indexes.values() if one.is_scalar)

    def partition(self, name: str) -> PartitionId:
        found = self.partitions.get(name)
        if found is None:
            raise PartitionNotFound(name)
        return found

    def index(self, name: str) -> IndexDef:
        found = self.indexes.get(name)
        if found is None:
            raise IndexNotFound(name)
        return found

    def index_on(self, field_name: str) -> IndexDef | None:
        return next((one for one in self.indexes.values() if one.field_name == field_name), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "collection_id": self.collection_id, "database": self.database, "name": self.name,
            "schema": self.schema.to_dict(), "shards": list(self.shards), "partitions": dict(self.partitions),
            "description": self.description, "consistency": self.consistency, "properties": dict(self.properties),
            "indexes": {name: asdict(one) for name, one in self.indexes.items()},
            "loaded": None if self.loaded is None else sorted(self.loaded), "created_tick": self.created_tick,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Collection:
        known = dict(data)
        known["schema"] = CollectionSchema.from_dict(known["schema"])
        known["shards"] = tuple(known["shards"])
        known["indexes"] = {name: IndexDef(**one) for name, one in known["indexes"].items()}
        known["loaded"] = None if known["loaded"] is None else frozenset(known["loaded"])
        return cls(**known)


@dataclass(frozen=True)
class Task:
    """An open change that shards must see: its kind (see `cluster.ddl`) and the facts fixed when it began."""

    task_id: int
    kind: str
    collection_id: CollectionId
    """0 if it is not about one collection."""
    facts: Mapping[str, Any]
    holds: Holds = ()
    acked: frozenset[ShardId] = frozenset()
    """Shards that are known to have applied its message. Not all that have: who finds a task goes by this."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "task_id": self.task_id, "kind": self.kind, "collection_id": self.collection_id, "facts": self.facts,
            "holds": [[*resource, alone] for resource, alone in self.holds], "acked": sorted(self.acked),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        known = dict(data)
        known["holds"] = tuple(
            Hold(Resource(Domain(domain), *names), alone) for domain, *names, alone in known["holds"]
        )
        known["acked"] = frozenset(known["acked"])
        return cls(**known)


@dataclass(frozen=True)
class CreateDatabase(Message):
    kind = "create_database"
    name: str
    properties: Mapping[str, str]


@dataclass(frozen=True)
class DropDatabase(Message):
    kind = "drop_database"
    name: str


@dataclass(frozen=True)
class AlterDatabase(Message):
    kind = "alter_database"
    name: str
    changed: Mapping[str, str]
    dropped: Sequence[str]


@dataclass(frozen=True)
class CreateAlias(Message):
    """Point an alias at a collection; `move` lets an existing alias change its collection."""

    kind = "create_alias"
    database: str
    collection: str
    alias: str
    move: bool = False


@dataclass(frozen=True)
class DropAlias(Message):
    kind = "drop_alias"
    database: str
    alias: str


@dataclass(frozen=True)
class RenameCollection(Message):
    kind = "rename_collection"
    database: str
    name: str
    new_database: str
    new_name: str


@dataclass(frozen=True)
class AlterIndex(Message):
    kind = "alter_index"
    database: str
    collection: str
    index_name: str
    changed: Mapping[str, str]
    dropped: Sequence[str]


class Catalog:
    """The catalogue's state and its lookups; commands change it through `cluster.control`."""

    def __init__(self, shard_count: int) -> None:
        self.shard_count = shard_count
        self.next_id = FIRST_ID
        self.databases: dict[str, Database] = {DEFAULT_DATABASE: Database(1, DEFAULT_DATABASE)}
        self.collections: dict[CollectionId, Collection] = {}
        self.names: dict[tuple[str, str], CollectionId] = {}
        self.aliases: dict[tuple[str, str], CollectionId] = {}
        self.tasks: dict[int, Task] = {}

    # lookups

    def database(self, name: str) -> Database:
        found = self.databases.get(name)
        if found is None:
            raise DatabaseNotFound(name)
        return found

    def find(self, database: str, name: str, *, alias: bool = True) -> Collection:
        """Return the collection of this name (or alias). Raises DatabaseNotFound or CollectionNotFound."""
        self.database(database)
        found = self.names.get((database, name))
        if found is None and alias:
            found = self.aliases.get((database, name))
        if found is None:
            raise CollectionNotFound(database, name)
        return self.collections[found]

    def in_database(self, database: str) -> list[Collection]:
        """Return the collections of a database, the oldest first."""
        self.database(database)
        return [one for one in self.collections.values() if one.database == database]

    def aliases_of(self, collection_id: CollectionId) -> list[str]:
        return sorted(alias for (_, alias), found in self.aliases.items() if found == collection_id)

    def check_free(self, wanted: Holds) -> None:
        """Raise Conflict if an open task holds what a change needs."""
        for task in self.tasks.values():
            if conflict(wanted, task.holds):
                what = f"collection {task.facts['name']}" if task.facts["name"] else "the cluster"
                raise Conflict(f"{what} is being changed ({task.kind}); try again")

    # changes that concern the catalogue alone

    def fresh_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def put(self, collection: Collection) -> None:
        self.collections[collection.collection_id] = collection
        self.names[collection.database, collection.name] = collection.collection_id

    def remove(self, collection: Collection) -> None:
        del self.collections[collection.collection_id]
        del self.names[collection.database, collection.name]

    def change(self, message: Message) -> Mapping[str, Any]:
        """Apply a command of the catalogue alone. Raises BadRequest or Conflict, having changed nothing."""
        self.check_free(holds_of(message))
        match message:
            case CreateDatabase(name, properties):
                return self._create_database(name, properties)
            case DropDatabase(name):
                return self._drop_database(name)
            case AlterDatabase(name, changed, dropped):
                known = self.database(name)
                self.databases[name] = replace(known, properties=altered(known.properties, changed, dropped))
            case CreateAlias(database, collection, alias, move):
                self._create_alias(database, collection, alias, move)
            case DropAlias(database, alias):
                if self.aliases.pop((database, alias), None) is None:
                    raise AliasNotFound(database, alias)
            case RenameCollection():
                self._rename(message)
            case AlterIndex(database, collection_name, index_name, changed, dropped):
                owner = self.find(database, collection_name, alias=False)
                index = owner.index(index_name)
                index = replace(index, properties=altered(index.properties, changed, dropped))
                self.put(replace(owner, indexes={**owner.indexes, index_name: index}))
            case _:
                raise InvalidParameter(f"unknown command {message.kind}")
        return {}

    def _create_database(self, name: str, properties: Mapping[str, str]) -> Mapping[str, Any]:
        check_name(name, "database")
        if name in self.databases:
            raise InvalidParameter(f"database already exist: {name}")
        if len(self.databases) >= DATABASES_MAX:
            raise DatabaseLimit(f"exceeded the limit number of database[limit={DATABASES_MAX}]")
        self.databases[name] = Database(self.fresh_id(), name, dict(properties))
        return {}

    def _drop_database(self, name: str) -> Mapping[str, Any]:
        if name == DEFAULT_DATABASE:
            raise InvalidParameter("can not drop default database")
        if name not in self.databases:
            return {}
        if any(owner == name for owner, _ in self.names):
            raise InvalidParameter(f"database:{name} not empty, must drop all collections before drop database")
        del self.databases[name]
        return {}

    def _create_alias(self, database: str, name: str, alias: str, move: bool) -> None:
        check_name(alias, "alias")
        collection = self.find(database, name, alias=False)
        if (database, alias) in self.names:
            raise AliasConflict(f"alias and collection name conflict[database={database}][alias={alias}]")
        known = self.aliases.get((database, alias))
        if move and known is None:
            raise AliasNotFound(database, alias)
        if not move and known is not None and known != collection.collection_id:
            owner = self.collections[known].name
            raise AliasExists(
                f"{alias} is alias to another collection: {owner}: alias already exist[database={database}]"
                f"[alias={alias}]: use aliases/alter to move it"
            )
        self.aliases[database, alias] = collection.collection_id

    def _rename(self, message: RenameCollection) -> None:
        check_name(message.new_name, "collection")
        collection = self.find(message.database, message.name, alias=False)
        self.database(message.new_database)
        target = (message.new_database, message.new_name)
        if target in self.names or target in self.aliases:
            raise InvalidParameter(f"duplicated new collection name {message.new_name} in database {target[0]}")
        if message.new_database != message.database and self.aliases_of(collection.collection_id):
            raise InvalidParameter("fail to rename db name, must drop all aliases of this collection before rename")
        del self.names[message.database, message.name]
        self.put(replace(collection, database=message.new_database, name=message.new_name))

    # checkpoint

    def copy(self) -> Catalog:
        """Return the catalogue as it is now: the values are frozen, so only the maps are copied."""
        copy = Catalog(self.shard_count)
        copy.next_id = self.next_id
        copy.databases, copy.collections = dict(self.databases), dict(self.collections)
        copy.names, copy.aliases, copy.tasks = dict(self.names), dict(self.aliases), dict(self.tasks)
        return copy

    def to_bytes(self) -> bytes:
        data = {
            "shard_count": self.shard_count,
            "next_id": self.next_id,
            "databases": [asdict(one) for one in self.databases.values()],
            "collections": [one.to_dict() for one in self.collections.values()],
            "aliases": [[database, alias, found] for (database, alias), found in self.aliases.items()],
            "tasks": [task.to_dict() for task in self.tasks.values()],
        }
        return cbor2.dumps(data)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Catalog:
        data = cbor2.loads(raw)
        catalog = cls(data["shard_count"])
        catalog.next_id = data["next_id"]
        catalog.databases = {one["name"]: Database(**one) for one in data["databases"]}
        for one in data["collections"]:
            catalog.put(Collection.from_dict(one))
        catalog.aliases = {(database, alias): found for database, alias, found in data["aliases"]}
        catalog.tasks = {one["task_id"]: Task.from_dict(one) for one in data["tasks"]}
        return catalog


def holds_of(message: Message) -> Holds:
    """Return what a command of the catalogue alone holds while it is applied; nothing if it is none of them."""
    match message:
        case CreateDatabase(database) | DropDatabase(database) | AlterDatabase(database):
            return of_database(database)
        case CreateAlias(database, name, alias):
            return of_names((database, name), (database, alias))
        case DropAlias(database, name) | AlterIndex(database, name):
            return of_names((database, name))
        case RenameCollection(database, name, new_database, new_name):
            return of_names((database, name), (new_database, new_name))
    return ()


def altered(known: Mapping[str, str], changed: Mapping[str, str], dropped: Sequence[str]) -> dict[str, str]:
    """Return the properties with some set and some removed."""
    return {name: value for name, value in {**known, **changed}.items() if name not in dropped}


def check_new_collection_name(catalog: Catalog, database: str, name: str) -> None:
    """Raise unless a collection of this name may be created."""
    check_name(name, "collection")
    catalog.database(database)
    if (database, name) in catalog.aliases:
        raise NameInvalid(f"collection name [{name}] conflicts with an existing alias, please choose a unique name")
