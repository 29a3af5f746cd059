"""Changes of the catalogue that shards must see too: one class per kind, with its three moments.

`open` checks the request against the catalogue and returns the facts of the task, or None if there is nothing to do
(a repeat of something that is so already succeeds). `message` says what each shard must be told. `end` changes the
catalogue. A task holds its resources (`cluster.resources`), so what it checked still holds when it ends.
Answers that clients compare follow Milvus 2.6.

A request comes from another node, perhaps of another version: what is not as it should be is refused like anything
else that a client may get wrong, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from cluster.catalog import (
    COLLECTIONS_MAX,
    DEFAULT_PARTITION,
    PARTITIONS_MAX,
    Catalog,
    Collection,
    IndexDef,
    Task,
    altered,
    check_new_collection_name,
)
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
    SealAll,
    TruncateCollection,
)
from cluster.parse import asked, check_values, parse_field, parse_index, parse_new_schema
from cluster.resources import WHOLE_CLUSTER, Holds, of_names
from storage.errors import BadRequest, CollectionLimit, FieldNotFound, IndexConflict, IndexNotFound, InvalidParameter
from storage.evolution import (
    DYNAMIC_PROPERTY,
    with_dynamic_field,
    with_field,
    with_field_params,
    with_timezone,
    without_field,
)
from storage.scalar_index import SPEC_KEY, check_spec, indexed_by
from storage.schema import SHARDS_MAX, CollectionSchema, DataType, check_name
from storage.times import TIMEZONE
from storage.types import CollectionId, FieldId, IndexId, PartitionId, ShardId, Tick

Facts = Mapping[str, Any]
TTL_PROPERTY = "collection.ttl.seconds"
STALENESS_PROPERTY = "collection.staleness.seconds"
STALENESS_S_MAX = 86_400.0
PROPERTIES_MAX = 256
"""Of a collection or a database, together with those it had: the catalogue is in every node's memory."""


@dataclass(frozen=True)
class BeginDdl(Message):
    """Open a task of this kind; `request` is what its `open` reads. Answers the task's id, or an empty answer."""

    kind = "begin_ddl"
    ddl: str
    database: str
    collection: str
    request: Mapping[str, Any]

    @property
    def holds(self) -> Holds:
        return KINDS[self.ddl].holds(self.database, self.collection) if self.ddl in KINDS else ()


@dataclass(frozen=True)
class AckDdl(Message):
    """These shards have applied the task's message. With the last one the catalogue changes, and the task is over.

    Repeated, or of a task that is over, it changes nothing.
    """

    kind = "ack_ddl"
    task_id: int
    shards: Sequence[ShardId]


class Ddl:
    """Base: most changes concern an existing collection and tell each of its shards the same message."""

    name: ClassVar[str]

    def holds(self, database: str, name: str) -> Holds:
        return of_names((database, name))

    def open(self, catalog: Catalog, message: BeginDdl, tick: Tick) -> tuple[CollectionId, Facts] | None:
        target = self.target(catalog, message.database, message.collection)
        facts = None if target is None else self.begin(catalog, target, message.request)
        return None if target is None or facts is None else (target.collection_id, facts)

    def target(self, catalog: Catalog, database: str, name: str) -> Collection | None:
        return catalog.find(database, name, alias=False)

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        raise NotImplementedError  # every kind says what it checks

    def shards(self, catalog: Catalog, task: Task) -> Iterable[ShardId]:
        return catalog.collections[task.collection_id].shards

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        raise NotImplementedError  # every kind says what shards are told

    def close(self, catalog: Catalog, task: Task) -> None:
        self.end(catalog, catalog.collections[task.collection_id], task.facts)

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        """Change the catalogue; by default there is nothing to change."""


class _CreateCollection(Ddl):
    """With its indexes, and loaded if that is asked for: it is there as a whole, or not."""

    name = "create_collection"

    def open(self, catalog: Catalog, message: BeginDdl, tick: Tick) -> tuple[CollectionId, Facts] | None:
        database, name, request = message.database, message.collection, message.request
        check_new_collection_name(catalog, database, name)
        schema = parse_new_schema(asked(request, "schema", "Mapping[str, Any]"))
        shards = asked(request, "shards", "int")
        if not 1 <= shards <= SHARDS_MAX:
            raise InvalidParameter(f"invalid shards number: {shards}, should be in range [1, {SHARDS_MAX}]")
        properties = asked(request, "properties", "Mapping[str, str]")
        check_properties(properties)
        partitions = asked(request, "partitions", "Sequence[str]")
        if not 1 <= len(partitions) <= PARTITIONS_MAX:
            raise InvalidParameter(f"there are {len(partitions)} partitions, should be in range [1, {PARTITIONS_MAX}]")
        known = catalog.names.get((database, name))
        if known is not None:
            if _same_parameters(catalog.collections[known], request):
                return None
            raise InvalidParameter(f"create duplicate collection with different parameters, collection: {name}")
        if len(catalog.collections) >= COLLECTIONS_MAX:
            raise CollectionLimit(f"exceeded the limit number of collections[limit={COLLECTIONS_MAX}]")
        collection_id = CollectionId(catalog.fresh_id())
        created = Collection(
            collection_id, database, name, schema,
            tuple(ShardId((collection_id + channel) % catalog.shard_count) for channel in range(shards)),
            {check_name(one, "partition"): PartitionId(catalog.fresh_id()) for one in partitions},
            asked(request, "description", "str"), asked(request, "consistency", "str"), dict(properties),
            created_tick=tick,
        )  # fmt: skip
        for plain in asked(request, "indexes", "Sequence[Mapping[str, Any]]") if "indexes" in request else ():
            index = _new_index(created, plain)
            if index is not None:
                index = replace(index, index_id=IndexId(catalog.fresh_id()))
                created = replace(created, indexes={**created.indexes, index.name: index})
        if "load" in request and asked(request, "load", "bool"):
            check_indexed(created)
            created = replace(created, loaded=None)
        return collection_id, {"collection": created.to_dict()}

    def shards(self, catalog: Catalog, task: Task) -> Iterable[ShardId]:
        shards: Sequence[ShardId] = task.facts["collection"]["shards"]
        return shards

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        created = facts["collection"]
        return CreateCollection(
            collection_id,
            created["schema"],
            sorted(created["partitions"].values()),
            created["properties"],
            [
                (x["index_id"], x["field_id"], x["spec"])
                for x in created["indexes"].values()
                if SPEC_KEY not in x["spec"]
            ],
            created["loaded"] is None,
        )

    def close(self, catalog: Catalog, task: Task) -> None:
        catalog.put(Collection.from_dict(task.facts["collection"]))


class _DropCollection(Ddl):
    name = "drop_collection"

    def target(self, catalog: Catalog, database: str, name: str) -> Collection | None:
        catalog.database(database)
        if (database, name) in catalog.aliases:
            raise InvalidParameter(f"cannot drop the collection via alias = {name}")
        known = catalog.names.get((database, name))
        return None if known is None else catalog.collections[known]

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        aliases = catalog.aliases_of(target.collection_id)
        if aliases:
            raise InvalidParameter(
                f"unable to drop the collection [{target.name}] because it has associated aliases "
                f"[{', '.join(aliases)}], please remove all aliases before dropping the collection"
            )
        return {}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return DropCollection(collection_id)

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        catalog.remove(target)


class _Truncate(Ddl):
    name = "truncate_collection"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        return {"number": catalog.fresh_id()}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return TruncateCollection(collection_id, facts.get("number", 0))


class _Alter(Ddl):
    """Change properties. One of them is none: it switches the dynamic field on."""

    name = "alter_collection"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        changed = dict(asked(request, "changed", "Mapping[str, str]"))
        schema = None
        dynamic = changed.pop(DYNAMIC_PROPERTY, None)
        if dynamic is not None:
            if dynamic.lower() not in ("true", "false"):
                raise InvalidParameter(f"{DYNAMIC_PROPERTY} is true or false, got {dynamic[:80]!r}")
            if dynamic.lower() == "true":
                schema = with_dynamic_field(target.schema)
            elif target.schema.dynamic is not None:
                raise InvalidParameter("dynamic schema cannot supported to be disabled: rows have keys that need it")
        properties = altered(target.properties, changed, asked(request, "dropped", "Sequence[str]"))
        check_properties(properties)
        schema = with_timezone(target.schema if schema is None else schema, properties.get(TIMEZONE, ""))
        facts: dict[str, Any] = {"properties": properties}
        if schema is not target.schema:
            facts["schema"] = schema.to_dict()
        return facts

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return AlterCollection(collection_id, facts["properties"], facts.get("schema"))

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        properties = dict(facts["properties"])
        description = properties.get("collection.description", target.description)
        schema = CollectionSchema.from_dict(facts["schema"]) if "schema" in facts else target.schema
        indexes = {name: one for name, one in target.indexes.items() if one.field_id in schema.by_id}
        catalog.put(replace(target, schema=schema, properties=properties, description=description, indexes=indexes))


class _Evolve(_Alter):
    """Base of the changes of one field: the properties stay, the schema gets its next version."""

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        schema = self.next_schema(target.schema, request)
        if schema is target.schema:
            return None
        return {"properties": dict(target.properties), "schema": schema.to_dict()}

    def next_schema(self, schema: CollectionSchema, request: Facts) -> CollectionSchema:
        raise NotImplementedError  # every kind says what changes


class _AddField(_Evolve):
    name = "add_field"

    def next_schema(self, schema: CollectionSchema, request: Facts) -> CollectionSchema:
        return with_field(schema, parse_field(asked(request, "field", "Mapping[str, Any]")))


class _DropField(_Evolve):
    """With the field goes its index."""

    name = "drop_field"

    def next_schema(self, schema: CollectionSchema, request: Facts) -> CollectionSchema:
        return without_field(schema, asked(request, "field_name", "str"), asked(request, "field_id", "int"))


class _AlterField(_Evolve):
    name = "alter_field"

    def next_schema(self, schema: CollectionSchema, request: Facts) -> CollectionSchema:
        return with_field_params(
            schema, asked(request, "field_name", "str"), asked(request, "params", "Mapping[str, str]")
        )


class _CreatePartition(Ddl):
    name = "create_partition"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        name = check_name(asked(request, "partition", "str"), "partition")
        if target.schema.partition_key is not None:
            raise InvalidParameter("disable create partition if partition key mode is used")
        if name in target.partitions:
            return None
        if len(target.partitions) >= PARTITIONS_MAX:
            raise InvalidParameter(f"partition number ({PARTITIONS_MAX}) exceeds max configuration ({PARTITIONS_MAX})")
        return {"partition": name, "partition_id": catalog.fresh_id()}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return CreatePartition(collection_id, PartitionId(facts["partition_id"]))

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        added = {facts["partition"]: PartitionId(facts["partition_id"])}
        catalog.put(replace(target, partitions={**target.partitions, **added}))


class _DropPartition(Ddl):
    name = "drop_partition"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        name = asked(request, "partition", "str")
        if name == DEFAULT_PARTITION:
            raise InvalidParameter("default partition cannot be deleted")
        if target.schema.partition_key is not None:
            raise InvalidParameter("disable drop partition if partition key mode is used")
        if name not in target.partitions:
            return None
        if target.loaded is None or target.partitions[name] in target.loaded:
            raise InvalidParameter("partition cannot be dropped, partition is loaded, please release it first")
        return {"partition": name, "partition_id": target.partitions[name]}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return DropPartition(collection_id, PartitionId(facts["partition_id"]))

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        kept = {name: found for name, found in target.partitions.items() if name != facts["partition"]}
        catalog.put(replace(target, partitions=kept))


class _CreateIndex(Ddl):
    name = "create_index"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        index = _new_index(target, asked(request, "index", "Mapping[str, Any]"))
        return None if index is None else {"index": asdict(replace(index, index_id=IndexId(catalog.fresh_id())))}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        index = facts["index"]
        return CreateIndex(collection_id, IndexId(index["index_id"]), FieldId(index["field_id"]), index["spec"])

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        index = IndexDef(**facts["index"])
        catalog.put(replace(target, indexes={**target.indexes, index.name: index}))


class _DropIndex(Ddl):
    name = "drop_index"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        index = target.indexes.get(asked(request, "index_name", "str"))
        if index is None:
            raise IndexNotFound(asked(request, "index_name", "str"))
        if target.is_loaded and not index.is_scalar:
            raise InvalidParameter(
                f"vector index cannot be dropped on loaded collection: {target.collection_id}; release it first"
            )
        return {"index_name": index.name, "index_id": index.index_id}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return DropIndex(collection_id, IndexId(facts["index_id"]))

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        kept = {name: one for name, one in target.indexes.items() if name != facts["index_name"]}
        catalog.put(replace(target, indexes=kept))


class _Load(Ddl):
    name = "load"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        check_indexed(target)
        wanted = [target.partition(name) for name in asked(request, "partitions", "Sequence[str]")]
        if target.loaded is None or (wanted and target.loaded.issuperset(wanted)):
            return None
        return {"partitions": wanted or None}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return LoadCollection(collection_id, facts["partitions"])

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        wanted = facts["partitions"]
        loaded = None if wanted is None or target.loaded is None else target.loaded.union(wanted)
        catalog.put(replace(target, loaded=loaded))


class _Release(Ddl):
    name = "release"

    def begin(self, catalog: Catalog, target: Collection, request: Facts) -> Facts | None:
        unwanted = [target.partition(name) for name in asked(request, "partitions", "Sequence[str]")]
        if not target.is_loaded:
            return None
        return {"partitions": unwanted or None}

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return ReleaseCollection(collection_id, facts["partitions"])

    def end(self, catalog: Catalog, target: Collection, facts: Facts) -> None:
        catalog.put(replace(target, loaded=released(target.loaded, target.partitions.values(), facts["partitions"])))


class _FlushAll(Ddl):
    """Seals what grows in every collection, at one position of each shard. Nothing else is changed meanwhile."""

    name = "flush_all"

    def holds(self, database: str, name: str) -> Holds:
        return (WHOLE_CLUSTER,)

    def open(self, catalog: Catalog, message: BeginDdl, tick: Tick) -> tuple[CollectionId, Facts] | None:
        return CollectionId(0), {}

    def shards(self, catalog: Catalog, task: Task) -> Iterable[ShardId]:
        return (ShardId(number) for number in range(catalog.shard_count))

    def message(self, collection_id: CollectionId, facts: Facts) -> Message:
        return SealAll()

    def close(self, catalog: Catalog, task: Task) -> None:
        """There is nothing to change."""


def released(
    loaded: frozenset[PartitionId] | None, known: Sequence[PartitionId] | Any, unwanted: Sequence[PartitionId] | None
) -> frozenset[PartitionId]:
    """Return what stays loaded when some partitions (None: all) of the `known` ones are released."""
    if unwanted is None:
        return frozenset()
    return (frozenset(known) if loaded is None else loaded) - frozenset(unwanted)


KINDS: Mapping[str, Ddl] = {
    one.name: one
    for one in (
        *(_CreateCollection(), _DropCollection(), _Truncate(), _Alter(), _AddField(), _DropField(), _AlterField()),
        *(_CreatePartition(), _DropPartition(), _CreateIndex(), _DropIndex(), _Load(), _Release(), _FlushAll()),
    )
}


def begin(catalog: Catalog, message: BeginDdl, tick: Tick) -> Task | None:
    """Open the task, or return None if nothing is to be done. Raises BadRequest or Conflict, changing nothing."""
    ddl = KINDS.get(message.ddl)
    if ddl is None:
        raise InvalidParameter(f"unknown change of the catalogue: {message.ddl[:80]}")
    catalog.database(message.database)
    catalog.check_free(message.holds)
    first_id = catalog.next_id
    try:
        opened = ddl.open(catalog, message, tick)
    except BadRequest:
        catalog.next_id = first_id
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        catalog.next_id = first_id
        raise InvalidParameter(f"not a request of {message.ddl}: {error!r}") from error
    if opened is None:
        return None
    collection_id, facts = opened
    where = {"database": message.database, "name": message.collection}
    task = Task(catalog.fresh_id(), message.ddl, collection_id, {**facts, **where}, message.holds)
    catalog.tasks[task.task_id] = task
    return task


def messages(catalog: Catalog, task: Task) -> list[tuple[ShardId, Message]]:
    """Return what each shard concerned must be told, one message a shard."""
    ddl = KINDS[task.kind]
    message = ddl.message(task.collection_id, task.facts)
    return [(shard, message) for shard in sorted(set(ddl.shards(catalog, task)))]


def acknowledge(catalog: Catalog, message: AckDdl) -> None:
    """Note which shards are told; when all are, apply the change and forget the task."""
    task = catalog.tasks.get(message.task_id)
    if task is None:
        return
    acked = task.acked.union(message.shards)
    ddl = KINDS[task.kind]
    if acked.issuperset(ddl.shards(catalog, task)):
        del catalog.tasks[task.task_id]
        ddl.close(catalog, task)
    else:
        catalog.tasks[task.task_id] = replace(task, acked=acked)


def check_indexed(target: Collection) -> None:
    """Raise InvalidParameter unless every vector has an index, as a collection that is loaded must."""
    missing = [one.name for one in target.schema.vectors if target.index_on(one.name) is None]
    if missing:
        raise InvalidParameter(
            f"there is no vector index on field: [{', '.join(missing)}], please create index firstly"
        )


def _new_index(target: Collection, plain: Mapping[str, Any]) -> IndexDef | None:
    """Return the index as it is asked for, without an id; None if the collection has it. Raises BadRequest."""
    wanted = IndexDef(IndexId(0), **plain)
    check_values(wanted)
    check_name(wanted.name, "index")
    field = target.schema.by_id.get(wanted.field_id)
    if field is None or field.name != wanted.field_name:
        raise FieldNotFound(f"field {wanted.field_name} not exist: it was dropped")
    if wanted.is_scalar:
        check_spec(wanted.spec, field)
    else:
        parse_index(wanted.spec)
    rivals = [one for one in target.indexes.values() if one.field_id == wanted.field_id]
    if field.type is DataType.JSON:  # which may have one for each path and type
        mine = indexed_by(field.id, wanted.spec)
        rivals = [one for one in rivals if indexed_by(field.id, one.spec) == mine]
    for known in rivals:
        if (known.name, known.spec) == (wanted.name, wanted.spec):
            return None
        raise IndexConflict(
            f"CreateIndex failed: at most one distinct index is allowed per field: {wanted.field_name} has "
            f"{known.name} ({known.index_type}, {known.metric_type}); drop it first"
        )
    if wanted.name in target.indexes:
        raise IndexConflict(f"CreateIndex failed: index name {wanted.name} is used by another field")
    return wanted


def check_properties(properties: Mapping[str, str]) -> None:
    """Raise InvalidParameter if they are too many, or one that means something to us has a value that does not."""
    check_property_count(properties)
    ttl = properties.get(TTL_PROPERTY)
    if ttl is not None:
        try:
            seconds = int(ttl)
        except ValueError:
            seconds = -1
        if not 0 <= seconds < 1 << 40:
            raise InvalidParameter(f"{TTL_PROPERTY} must be a whole number of seconds from 0 (never), got {ttl!r}")
    staleness = properties.get(STALENESS_PROPERTY)
    if staleness is not None and not 0 <= _number(staleness) <= STALENESS_S_MAX:
        raise InvalidParameter(
            f"{STALENESS_PROPERTY} must be a number of seconds from 0 to {STALENESS_S_MAX:.0f}, got {staleness!r}"
        )


def _number(text: str) -> float:
    """Return the number, -1 if it is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def check_property_count(properties: Mapping[str, str]) -> None:
    """Raise InvalidParameter if there are more properties than a collection or a database may have."""
    if len(properties) > PROPERTIES_MAX:
        raise InvalidParameter(f"there would be {len(properties)} properties, at most {PROPERTIES_MAX} are kept")


def _same_parameters(known: Collection, request: Facts) -> bool:
    return (
        known.schema == CollectionSchema.from_dict(request["schema"])
        and len(known.shards) == request["shards"]
        and (known.schema.partition_key is None or sorted(known.partitions) == sorted(request["partitions"]))
        and known.description == request["description"]
        and known.consistency == request["consistency"]
        and sorted(known.properties.items()) == sorted(request["properties"].items())
    )
