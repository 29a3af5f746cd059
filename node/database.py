"""The service of a node: names to ids, requests to changes of the catalogue, to writes and to reads.

Implements `node.service.Service` on a running `Node`. Every client protocol calls this and nothing below it.

Names are looked up in this node's copy of the catalogue, or in the newest one (`names.py`); descriptions and lists are
of the newest one, if it can be had. What shards know of a collection comes from their leaders (`facts.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from cluster.catalog import (
    DEFAULT_DATABASE,
    DEFAULT_PARTITION,
    AlterDatabase,
    AlterIndex,
    Collection,
    CreateAlias,
    CreateDatabase,
    DropAlias,
    DropDatabase,
    RenameCollection,
    altered,
)
from cluster.ddl import check_property_count
from cluster.idempotency import CloseKey, OpenKey
from cluster.jobs import BeginCompaction
from node.access import AccessService
from node.bulk.jobs import ImportJobs
from node.bulk.jobs_anywhere import JobsAnywhere
from node.chores import Chores
from node.facts import Facts, index_info
from node.index_request import index_def, plain_index
from node.names import GONE, Names
from node.node import Node
from node.nodes import Nodes
from node.read import Reader
from node.scope import current
from node.service import (
    CollectionInfo,
    CollectionRequest,
    Consistency,
    HybridRequest,
    IndexInfo,
    IndexRequest,
    LoadState,
    ReadOptions,
    Rows,
    SearchRequest,
    SearchResult,
    WriteResult,
)
from node.status import status_of
from node.write import Writer
from storage.columns import Batch
from storage.errors import (
    AliasNotFound,
    BadRequest,
    CollectionLimit,
    FilterError,
    IndexNotFound,
    InvalidParameter,
    SchemaMismatch,
    error_from,
)
from storage.evolution import in_timezone
from storage.filter.compiled import compile_filter
from storage.schema import SHARDS_MAX, CollectionSchema, FieldSchema, make_schema
from storage.times import TIMEZONE, zone_of
from storage.types import CollectionId, ShardId

PARTITION_KEY_PARTITIONS_MAX: Final = 1_024
UNKNOWN_JOB: Final = ("UndefiedState", 0, 0)
ALTERABLE_INDEX_PROPERTIES: Final = frozenset({"mmap.enabled", "indexoffsetcache.enabled", "warmup"})

T = TypeVar("T")
log = logging.getLogger(__name__)


class Database:
    """See `node.service.Service`, whose docstrings hold here."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._router = node.router
        jobs = ImportJobs(
            self,
            node.seams.executor,
            node.seams.clock,
            data=node.settings.node.data,
            directory=node.settings.imports.directory,
            number=lambda: node.known.number,
        )
        self._imports = JobsAnywhere(jobs, node.mesh, node.known)
        self._reader = Reader(node)
        self._writer = Writer(node, self._reader)
        self._access = AccessService(node)
        self._names = Names(node)
        self._facts = Facts(node)
        self._chores = Chores(node)

    # requests with a key

    async def once(self, key: str, request: str, work: Callable[[], Awaitable[object]]) -> bool:
        scope = current.get()
        assert scope is not None, "who names a request waits for its answer"
        known = (await self._router.control_change(OpenKey(key, request))).get("outcome")
        if known is not None:
            outcome = known
        else:
            scope.key = key
            outcome = []
            try:
                await work()
            except BadRequest as error:
                outcome = [error.code, error.message]
            outcome = (await self._router.control_change(CloseKey(key, outcome)))["outcome"]
        if outcome:
            raise error_from(*outcome)
        return known is not None

    # databases

    async def create_database(self, name: str, properties: Mapping[str, str]) -> None:
        await self._router.broadcast(CreateDatabase(name, dict(properties)))

    async def drop_database(self, name: str) -> None:
        await self._router.broadcast(DropDatabase(name))

    async def list_databases(self) -> list[str]:
        await self._router.refresh_catalog()
        return [one for one in self._node.catalog.databases if _is_shown(one)]

    async def describe_database(self, name: str) -> tuple[int, Mapping[str, str]]:
        await self._router.refresh_catalog()
        found = self._node.catalog.database(name)
        return found.database_id, found.properties

    async def alter_database(self, name: str, changed: Mapping[str, str], dropped: Sequence[str]) -> None:
        await self._router.refresh_catalog()
        check_property_count(altered(self._node.catalog.database(name).properties, changed, dropped))
        await self._router.broadcast(AlterDatabase(name, dict(changed), list(dropped)))

    # collections

    async def create_collection(self, database: str, request: CollectionRequest) -> None:
        if len(self._node.catalog.collections) >= self._node.settings.api.collections_max:
            raise CollectionLimit(
                f"exceeded the limit number of collections[limit={self._node.settings.api.collections_max}]"
            )
        if not 1 <= request.shards <= SHARDS_MAX:
            raise InvalidParameter(f"invalid shards number: {request.shards}, should be in range [1, {SHARDS_MAX}]")
        schema = make_schema(list(request.fields), dynamic=request.dynamic, functions=request.functions)
        indexes = [index_def(schema, one) for one in request.indexes]
        partitions = [DEFAULT_PARTITION]
        if schema.partition_key is not None:
            if not 1 <= request.partitions <= PARTITION_KEY_PARTITIONS_MAX:
                raise InvalidParameter(
                    f"the specified partitions should be in range [1, {PARTITION_KEY_PARTITIONS_MAX}], "
                    f"got {request.partitions}"
                )
            partitions = [f"{DEFAULT_PARTITION}_{i}" for i in range(request.partitions)]
        made = await self._router.ddl(
            "create_collection",
            database,
            request.name,
            {
                "schema": schema.to_dict(),
                "shards": request.shards,
                "partitions": partitions,
                "description": request.description,
                "consistency": str(request.consistency),
                "properties": dict(request.properties),
                "indexes": [plain_index(one) for one in indexes],
                "load": request.load,
            },
        )
        if made:
            return
        for index in indexes:  # there was one like it
            await self._router.ddl("create_index", database, request.name, {"index": plain_index(index)})
        if request.load:
            await self.load(database, request.name)

    async def list_collections(self, database: str) -> list[str]:
        await self._router.refresh_catalog()
        return [one.name for one in self._node.catalog.in_database(database) if _is_shown(database, one.name)]

    async def has_collection(self, database: str, name: str) -> bool:
        return await self._names.exists(database, name)

    async def describe_collection(self, database: str, name: str) -> CollectionInfo:
        found = await self._names.newest(database, name)
        state, percent = await self._facts.load_state(found, ())
        facts = await self._facts.of(found)
        return CollectionInfo(
            database=found.database,
            name=found.name,
            collection_id=found.collection_id,
            schema=found.schema,
            description=found.description,
            shards=len(found.shards),
            partitions=list(found.partitions),
            aliases=self._node.catalog.aliases_of(found.collection_id),
            indexes=[index_info(one, facts) for one in found.indexes.values()],
            consistency=Consistency(found.consistency),
            properties=found.properties,
            load_state=state,
            load_percent=percent,
            created_tick=found.created_tick,
        )

    async def rename_collection(self, database: str, name: str, new_name: str, new_database: str) -> None:
        await self._router.broadcast(RenameCollection(database, name, new_database or database, new_name))

    async def drop_collection(self, database: str, name: str) -> None:
        await self._router.ddl("drop_collection", database, name, {})

    async def truncate_collection(self, database: str, name: str) -> None:
        await self._router.ddl("truncate_collection", database, (await self._names.find(database, name)).name, {})

    async def load(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        await self._router.ddl(
            "load", database, (await self._names.find(database, name)).name, {"partitions": list(partitions)}
        )

    async def release(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        await self._router.ddl(
            "release", database, (await self._names.find(database, name)).name, {"partitions": list(partitions)}
        )

    async def load_state(self, database: str, name: str, partitions: Sequence[str] = ()) -> tuple[LoadState, int]:
        return await self._facts.load_state(await self._names.newest(database, name), partitions)

    async def row_count(self, database: str, name: str, partition: str = "") -> int:
        async def count(found: Collection) -> int:
            chosen = frozenset({found.partition(partition)}) if partition else None
            return await self._reader.row_count(found, chosen)

        return await self._names.use(database, name, count)

    async def flush(self, database: str, name: str) -> None:
        found = await self._names.find(database, name)
        await self._chores.flush(sorted(set(found.shards)), found.collection_id)

    async def flush_all(self) -> None:
        self._node.check_writable()
        await self._router.ddl("flush_all", DEFAULT_DATABASE, "", {})
        shards = range(self._node.catalog.shard_count)
        await self._chores.flush([ShardId(one) for one in shards], None)

    async def compact(self, database: str, name: str) -> int:
        found = await self._names.find(database, name)
        outcome = await self._router.broadcast(BeginCompaction(found.collection_id))
        return int(outcome["job"])

    async def compaction_state(self, job_id: int) -> tuple[str, int, int]:
        await self._router.refresh_catalog()
        job = self._node.control.machine.jobs.known.get(job_id)
        if job is None:
            return UNKNOWN_JOB
        return ("Executing", 1, 0) if job.left else ("Completed", 0, 1)

    async def alter_collection(
        self, database: str, name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        zone_of(changed.get(TIMEZONE, ""))
        request = {"changed": dict(changed), "dropped": list(dropped)}
        await self._router.ddl("alter_collection", database, (await self._names.find(database, name)).name, request)

    async def add_field(self, database: str, name: str, field: FieldSchema) -> None:
        target = await self._names.find(database, name)
        field = in_timezone(field, target.properties.get(TIMEZONE, ""))
        await self._router.ddl("add_field", database, target.name, {"field": field.to_dict()})

    async def drop_field(self, database: str, name: str, field_name: str, field_id: int = 0) -> None:
        asked = {"field_name": field_name, "field_id": field_id}
        await self._router.ddl("drop_field", database, (await self._names.find(database, name)).name, asked)

    async def alter_field(self, database: str, name: str, field_name: str, params: Mapping[str, str]) -> None:
        asked = {"field_name": field_name, "params": dict(params)}
        await self._router.ddl("alter_field", database, (await self._names.find(database, name)).name, asked)

    async def describe_segments(self, collection_id: int, segment_ids: Sequence[int]) -> list[Mapping[str, Any]]:
        await self._router.refresh_catalog()
        found = self._node.catalog.collections.get(CollectionId(collection_id))
        if found is None:
            return []
        return [
            segment
            for facts in await self._facts.of(found, segments=True)
            for segment in facts["segments"]
            if not segment_ids or segment["segmentID"] in segment_ids
        ]

    # partitions

    async def create_partition(self, database: str, collection: str, partition: str) -> None:
        name = (await self._names.find(database, collection)).name
        await self._router.ddl("create_partition", database, name, {"partition": partition})

    async def drop_partition(self, database: str, collection: str, partition: str) -> None:
        name = (await self._names.find(database, collection)).name
        await self._router.ddl("drop_partition", database, name, {"partition": partition})

    async def has_partition(self, database: str, collection: str, partition: str) -> bool:
        return partition in (await self._names.newest(database, collection)).partitions

    async def list_partitions(self, database: str, collection: str) -> list[str]:
        return list((await self._names.newest(database, collection)).partitions)

    # indexes

    async def create_index(self, database: str, collection: str, request: IndexRequest) -> None:
        found = await self._names.find(database, collection)
        index = index_def(found.schema, request)
        await self._router.ddl("create_index", database, found.name, {"index": plain_index(index)})

    async def drop_index(self, database: str, collection: str, index_name: str) -> None:
        name = (await self._names.find(database, collection)).name
        await self._router.ddl("drop_index", database, name, {"index_name": index_name})

    async def describe_index(self, database: str, collection: str, index_name: str) -> IndexInfo:
        found = await self._names.newest(database, collection)
        return index_info(found.index(index_name), await self._facts.of(found))

    async def list_indexes(self, database: str, collection: str) -> list[str]:
        return list((await self._names.newest(database, collection)).indexes)

    async def alter_index(
        self, database: str, collection: str, index_name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        found = await self._names.newest(database, collection)
        if index_name not in found.indexes:
            raise IndexNotFound(index_name)
        for name in (*changed, *dropped):
            if name not in ALTERABLE_INDEX_PROPERTIES:
                raise InvalidParameter(
                    f"{name} is not configable index property; these are: "
                    f"{', '.join(sorted(ALTERABLE_INDEX_PROPERTIES))}"
                )
        await self._router.broadcast(AlterIndex(database, found.name, index_name, dict(changed), list(dropped)))

    # aliases

    async def create_alias(self, database: str, collection: str, alias: str) -> None:
        await self._router.broadcast(CreateAlias(database, collection, alias))

    async def alter_alias(self, database: str, collection: str, alias: str) -> None:
        await self._router.broadcast(CreateAlias(database, collection, alias, True))

    async def drop_alias(self, database: str, alias: str) -> None:
        await self._router.broadcast(DropAlias(database, alias))

    async def describe_alias(self, database: str, alias: str) -> str:
        await self._router.refresh_catalog()
        catalog = self._node.catalog
        catalog.database(database)
        found = catalog.aliases.get((database, alias))
        if found is None:
            raise AliasNotFound(database, alias)
        return catalog.collections[found].name

    async def list_aliases(self, database: str, collection: str = "") -> list[str]:
        await self._router.refresh_catalog()
        catalog = self._node.catalog
        catalog.database(database)
        if collection:
            return catalog.aliases_of(catalog.find(database, collection).collection_id)
        return sorted(alias for owner, alias in catalog.aliases if owner == database)

    # rows

    async def collection_schema(self, database: str, collection: str, *, newest: bool = False) -> CollectionSchema:
        return (await (self._names.newest if newest else self._names.find)(database, collection)).schema

    async def insert(
        self, database: str, collection: str, batch: Batch, partition: str = "", *, schema_version: int = 0
    ) -> WriteResult:
        async def insert(found: Collection) -> WriteResult:
            _check_version(found, schema_version)
            return await self._writer.insert(found, batch, partition, again=schema_version > 0)

        cost = await self._node.admission.take_request(database, collection, batch.nbytes)
        try:
            return await self._names.use(database, collection, insert, GONE)
        finally:
            self._node.admission.give_request(database, collection, cost)

    async def upsert(
        self,
        database: str,
        collection: str,
        batch: Batch,
        partition: str = "",
        *,
        partial: bool = False,
        schema_version: int = 0,
    ) -> WriteResult:
        async def upsert(found: Collection) -> WriteResult:
            _check_version(found, schema_version)
            return await self._writer.upsert(found, batch, partition, partial=partial, again=schema_version > 0)

        cost = await self._node.admission.take_request(database, collection, batch.nbytes)
        try:
            return await self._names.use(database, collection, upsert, GONE)
        finally:
            self._node.admission.give_request(database, collection, cost)

    async def delete(
        self, database: str, collection: str, filter: str, params: Mapping[str, Any], partition: str = ""
    ) -> int:
        options = ReadOptions(filter=filter, params=params)

        async def delete(found: Collection) -> int:
            row_filter = compile_filter(filter, found.schema, params)
            if row_filter.always_true:
                raise FilterError("delete needs a filter; to remove all rows use collections/truncate")
            chosen = frozenset({found.partition(partition)}) if partition else None
            keys = await self._reader.matching_keys(found, row_filter, options, chosen)
            if len(keys) == 0:
                return 0
            return await self._writer.delete_keys(found, keys, None if chosen is None else sorted(chosen))

        return await self._names.use(database, collection, delete, (*GONE, SchemaMismatch))  # it reads before it writes

    async def get(self, database: str, collection: str, ids: Sequence[int | str], options: ReadOptions) -> Rows:
        return await self._read(database, collection, lambda found: self._reader.get(found, ids, options))

    async def query(self, database: str, collection: str, options: ReadOptions, *, limit: int, offset: int) -> Rows:
        async def query(found: Collection) -> Rows:
            return await self._reader.query(found, options, limit=limit, offset=offset)

        return await self._read(database, collection, query)

    async def search(
        self, database: str, collection: str, request: SearchRequest, options: ReadOptions
    ) -> SearchResult:
        return await self._read(database, collection, lambda found: self._reader.search(found, request, options))

    async def hybrid_search(
        self, database: str, collection: str, request: HybridRequest, options: ReadOptions
    ) -> SearchResult:
        return await self._read(database, collection, lambda found: self._reader.hybrid(found, request, options))

    async def _read(self, database: str, name: str, work: Callable[[Collection], Awaitable[T]]) -> T:
        """As `Names.use`, when it is the collection's turn to read."""
        reads, key = self._node.admission.reads, (database, name)
        if not reads.enter(key):
            await reads.wait(key)
        try:
            return await self._names.use(database, name, work)
        finally:
            reads.leave(key)

    # operations

    async def status(self) -> Mapping[str, Any]:
        return await status_of(self._node)

    @property
    def imports(self) -> JobsAnywhere:
        return self._imports

    @property
    def nodes(self) -> Nodes:
        return Nodes(self._node)

    @property
    def access(self) -> AccessService:
        return self._access

    async def check_cluster(self, *, begin: bool) -> Mapping[str, Any]:
        assert self._node.control is not None, "or it has said that the node has yet to find its place"
        check = self._node.cluster_check
        return check.begin() if begin else check.view()


def _is_shown(database: str, collection: str = "") -> bool:
    """Return whether a list shows whoever asks a database, or a collection in it."""
    scope = current.get()
    return scope is None or scope.sees is None or scope.sees(database, collection)


def _check_version(found: Collection, schema_version: int) -> None:
    """Raise SchemaMismatch if rows were decoded for a schema that the collection has no longer."""
    if schema_version not in (0, found.schema.version):
        raise SchemaMismatch(
            f"the rows are of version {schema_version} of the schema of collection {found.name}, which has version "
            f"{found.schema.version}: try again"
        )
