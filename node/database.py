"""The service of a node: names to ids, requests to changes of the catalogue, to writes and to reads.

Implements `node.service.Service` on a running `Node`. Every client protocol calls this and nothing below it.

Names are looked up in this node's copy of the catalogue, which may be a moment behind. What it does not know, and what
a shard has under another id, is looked up again in the newest one before the client hears of it. Descriptions and lists
are of the newest one, if it can be had.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
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
    IndexDef,
    RenameCollection,
    altered,
)
from cluster.ddl import check_property_count
from cluster.idempotency import CloseKey, OpenKey
from cluster.jobs import BeginCompaction
from cluster.message import Seal
from cluster.shard import CollectionState, Shard
from index.metric import Metric
from index.protocol import Form
from index.spec import IndexSpec, SpecError, UnsupportedIndexType, UnsupportedMetric, parse_index_spec
from node.access import AccessService
from node.broadcaster import COMPACT_METHOD
from node.bulk.jobs import ImportJobs
from node.bulk.jobs_anywhere import JobsAnywhere
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
    IndexState,
    LoadState,
    ReadOptions,
    Rows,
    SearchRequest,
    SearchResult,
    WriteResult,
)
from node.upkeep import Upkeep
from node.write import Writer
from storage.columns import Batch
from storage.errors import (
    AliasNotFound,
    AnnulusError,
    BadRequest,
    CollectionLimit,
    CollectionNotFound,
    CollectionNotLoaded,
    Conflict,
    FieldNotFound,
    FilterError,
    IndexNotFound,
    InvalidParameter,
    MissingParameter,
    NoLeader,
    PartitionNotFound,
    PartitionNotLoaded,
    SchemaMismatch,
    Unavailable,
    error_from,
)
from storage.evolution import in_timezone
from storage.filter.compiled import compile_filter
from storage.scalar_index import SPEC_KEY, parse_scalar_index
from storage.schema import SHARDS_MAX, CollectionSchema, FieldSchema, check_name, make_schema
from storage.times import TIMEZONE, zone_of
from storage.types import CollectionId, IndexId, PartitionId, ShardId

PARTITION_KEY_PARTITIONS_MAX: Final = 1_024
FACTS_METHOD: Final = "shard/facts"
FLUSH_METHOD: Final = "shard/flush"
ASK_S: Final = 2.0
"""How long a look at the state of a shard waits for its leader."""
LOOK_S: Final = 0.5
SURE_S: Final = 3.0
"""For how long an answer that must be sure waits for the newest catalogue: longer than an election takes."""
NO_CATALOGUE: Final = "the newest catalogue cannot be had: try again soon"
GONE: Final = (CollectionNotFound, PartitionNotFound)
MAY_BE_OLD: Final = (*GONE, CollectionNotLoaded, PartitionNotLoaded, FieldNotFound)
"""What an old copy of the catalogue says of what has come to be since."""
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
        for method, function in (
            (FACTS_METHOD, self._facts_here),
            (FLUSH_METHOD, self._flush_here),
            (COMPACT_METHOD, self._compact_here),
        ):
            self._router.on_leader(method, function)

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
        indexes = [self._index_def(schema, one) for one in request.indexes]
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
                "indexes": [_plain_index(one) for one in indexes],
                "load": request.load,
            },
        )
        if made:
            return
        for index in indexes:  # there was one like it
            await self._router.ddl("create_index", database, request.name, {"index": _plain_index(index)})
        if request.load:
            await self.load(database, request.name)

    async def list_collections(self, database: str) -> list[str]:
        await self._router.refresh_catalog()
        return [one.name for one in self._node.catalog.in_database(database) if _is_shown(database, one.name)]

    async def has_collection(self, database: str, name: str) -> bool:
        if not await self._router.refresh_catalog(patience_s=SURE_S):
            raise NoLeader(f"whether collection {name} exists cannot be told: {NO_CATALOGUE}")
        catalog = self._node.catalog
        catalog.database(database)
        return (database, name) in catalog.names or (database, name) in catalog.aliases

    async def describe_collection(self, database: str, name: str) -> CollectionInfo:
        found = await self._newest(database, name)
        state, percent = await self._load_state(found, ())
        facts = await self._facts(found)
        return CollectionInfo(
            database=found.database,
            name=found.name,
            collection_id=found.collection_id,
            schema=found.schema,
            description=found.description,
            shards=len(found.shards),
            partitions=list(found.partitions),
            aliases=self._node.catalog.aliases_of(found.collection_id),
            indexes=[_index_info(one, facts) for one in found.indexes.values()],
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
        await self._router.ddl("truncate_collection", database, (await self._find(database, name)).name, {})

    async def load(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        await self._router.ddl(
            "load", database, (await self._find(database, name)).name, {"partitions": list(partitions)}
        )

    async def release(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        await self._router.ddl(
            "release", database, (await self._find(database, name)).name, {"partitions": list(partitions)}
        )

    async def load_state(self, database: str, name: str, partitions: Sequence[str] = ()) -> tuple[LoadState, int]:
        return await self._load_state(await self._newest(database, name), partitions)

    async def _load_state(self, found: Collection, partitions: Sequence[str]) -> tuple[LoadState, int]:
        wanted = [found.partition(one) for one in partitions]
        if not found.is_loaded or (found.loaded is not None and not found.loaded.issuperset(wanted)):
            return LoadState.NOT_LOADED, 0
        ready = total = 0
        for facts in await self._facts(found, here_first=True):
            for partition_id, ready_here, total_here in facts["loading"]:
                if not wanted or partition_id in wanted:
                    ready += ready_here
                    total += total_here
        if ready == total:
            return LoadState.LOADED, 100
        return LoadState.LOADING, ready * 100 // total

    async def row_count(self, database: str, name: str, partition: str = "") -> int:
        async def count(found: Collection) -> int:
            chosen = frozenset({found.partition(partition)}) if partition else None
            return await self._reader.row_count(found, chosen)

        return await self._with(database, name, count)

    async def flush(self, database: str, name: str) -> None:
        found = await self._find(database, name)
        await self._flush_shards(sorted(set(found.shards)), {"collection": found.collection_id})

    async def flush_all(self) -> None:
        self._node.check_writable()
        await self._router.ddl("flush_all", DEFAULT_DATABASE, "", {})
        shards = range(self._node.catalog.shard_count)
        await self._flush_shards([ShardId(one) for one in shards], {"collection": None})

    async def _flush_shards(self, shards: Sequence[ShardId], asked: Mapping[str, Any]) -> None:
        await asyncio.gather(*(self._router.ask_leader(FLUSH_METHOD, one, asked) for one in shards))

    async def _flush_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Seal a collection in a shard that this node leads; return when all that is sealed of it is in chunks.

        Without a collection: seal nothing more, and wait for all of them.
        """
        self._node.check_writable()
        host = self._node.shards[shard_id]
        collection_id = asked["collection"]
        waiting = _unflushed(host.machine, collection_id)
        if collection_id is not None:
            outcome = await host.change(Seal(collection_id, None))
            waiting |= set(_ids(outcome["segments"]))

        def is_over() -> bool:
            return not host.is_leader or not waiting & _unflushed(host.machine, collection_id)

        while not is_over():
            with contextlib.suppress(TimeoutError):  # losing the lead changes no segment, and wakes nobody
                async with asyncio.timeout(LOOK_S):
                    await self._node.upkeep[shard_id].until(is_over)
        if not host.is_leader:
            raise NoLeader(f"shard {shard_id} changed its leader while it was flushed")
        return {}

    async def compact(self, database: str, name: str) -> int:
        found = await self._find(database, name)
        outcome = await self._router.broadcast(BeginCompaction(found.collection_id))
        return int(outcome["job"])

    async def _compact_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Compact the collection in a shard that this node leads, and give the room back."""
        try:
            await self._node.upkeep[shard_id].compactions.compact_now(CollectionId(asked["collection"]))
            await self._node.checkpoint()
            await self._node.give_back_space()
        except OSError as error:
            self._node.note_store_error(error)
        return {}

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
        await self._router.ddl("alter_collection", database, (await self._find(database, name)).name, request)

    async def add_field(self, database: str, name: str, field: FieldSchema) -> None:
        target = await self._find(database, name)
        field = in_timezone(field, target.properties.get(TIMEZONE, ""))
        await self._router.ddl("add_field", database, target.name, {"field": field.to_dict()})

    async def drop_field(self, database: str, name: str, field_name: str, field_id: int = 0) -> None:
        asked = {"field_name": field_name, "field_id": field_id}
        await self._router.ddl("drop_field", database, (await self._find(database, name)).name, asked)

    async def alter_field(self, database: str, name: str, field_name: str, params: Mapping[str, str]) -> None:
        asked = {"field_name": field_name, "params": dict(params)}
        await self._router.ddl("alter_field", database, (await self._find(database, name)).name, asked)

    async def describe_segments(self, collection_id: int, segment_ids: Sequence[int]) -> list[Mapping[str, Any]]:
        await self._router.refresh_catalog()
        found = self._node.catalog.collections.get(CollectionId(collection_id))
        if found is None:
            return []
        return [
            segment
            for facts in await self._facts(found, segments=True)
            for segment in facts["segments"]
            if not segment_ids or segment["segmentID"] in segment_ids
        ]

    # partitions

    async def create_partition(self, database: str, collection: str, partition: str) -> None:
        name = (await self._find(database, collection)).name
        await self._router.ddl("create_partition", database, name, {"partition": partition})

    async def drop_partition(self, database: str, collection: str, partition: str) -> None:
        name = (await self._find(database, collection)).name
        await self._router.ddl("drop_partition", database, name, {"partition": partition})

    async def has_partition(self, database: str, collection: str, partition: str) -> bool:
        return partition in (await self._newest(database, collection)).partitions

    async def list_partitions(self, database: str, collection: str) -> list[str]:
        return list((await self._newest(database, collection)).partitions)

    # indexes

    async def create_index(self, database: str, collection: str, request: IndexRequest) -> None:
        found = await self._find(database, collection)
        index = self._index_def(found.schema, request)
        await self._router.ddl("create_index", database, found.name, {"index": _plain_index(index)})

    async def drop_index(self, database: str, collection: str, index_name: str) -> None:
        name = (await self._find(database, collection)).name
        await self._router.ddl("drop_index", database, name, {"index_name": index_name})

    async def describe_index(self, database: str, collection: str, index_name: str) -> IndexInfo:
        found = await self._newest(database, collection)
        return _index_info(found.index(index_name), await self._facts(found))

    async def list_indexes(self, database: str, collection: str) -> list[str]:
        return list((await self._newest(database, collection)).indexes)

    async def alter_index(
        self, database: str, collection: str, index_name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        found = await self._newest(database, collection)
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
        return (await (self._newest if newest else self._find)(database, collection)).schema

    async def insert(
        self, database: str, collection: str, batch: Batch, partition: str = "", *, schema_version: int = 0
    ) -> WriteResult:
        async def insert(found: Collection) -> WriteResult:
            _check_version(found, schema_version)
            return await self._writer.insert(found, batch, partition, again=schema_version > 0)

        cost = await self._node.admission.take_request(database, collection, batch.nbytes)
        try:
            return await self._with(database, collection, insert, GONE)
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
            return await self._with(database, collection, upsert, GONE)
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

        return await self._with(database, collection, delete, (*GONE, SchemaMismatch))  # it reads before it writes

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
        """As `_with`, when it is the collection's turn to read."""
        reads, key = self._node.admission.reads, (database, name)
        if not reads.enter(key):
            await reads.wait(key)
        try:
            return await self._with(database, name, work)
        finally:
            reads.leave(key)

    # operations

    async def status(self) -> Mapping[str, Any]:
        node = self._node
        name, why = node.settings.node.name, node.why_not_ready
        if not node.takes_part:
            return {"node": name, "state": "not ready", "reason": why}
        catalog = node.catalog
        ready, total = node.loading
        return {
            "node": name,
            "state": "not ready" if why else "ready",
            "reason": why,
            "cluster": await node.describe_cluster(),
            "healing": node.healing.view(),
            "read_only": node.read_only_reason,
            "admission": {**node.admission.view(), "sealed_early": node.crowding.sealed},
            "segments_in_memory": [ready, total],
            "journal": {"bytes": node.journal.bytes_on_disk, "files": node.journal.files},
            "chunks": {"bytes": node.seams.disk.used_bytes(f"{node.settings.node.data}/chunks")},
            "changes": node.broadcaster.view(),
            "collections": [self._collection_status(one) for one in catalog.collections.values()],
            "shards": [
                {
                    "shard": shard_id,
                    "leader": host.leader,
                    "replicas": list(node.replicas_of(shard_id)),
                    "term": host.raft.term,
                    "position": host.machine.position,
                    "checkpoint": node.upkeep[shard_id].checkpoints.position,
                    "tick": host.machine.tick,
                    "segments": sum(1 for state in host.machine.collections.values() for _ in state.segments()),
                    "rows": sum(s.live_rows for state in host.machine.collections.values() for s in state.segments()),
                }
                for shard_id, host in node.shards.items()
            ],
        }

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

    def _collection_status(self, one: Collection) -> Mapping[str, Any]:
        states = [state for _, state in self._states(one)]
        facts = [
            {
                "indexes": [_index_facts(state, index_id, self._node.upkeep[shard_id]) for index_id in state.indexes],
                "rows": _sealed_rows(state),
            }
            for shard_id, state in self._states(one)
        ]
        segments = [segment for state in states for segment in state.segments()]
        return {
            "database": one.database,
            "name": one.name,
            "id": one.collection_id,
            "loaded": one.is_loaded,
            "rows": sum(segment.live_rows for segment in segments),
            "deleted_rows": sum(len(segment.deletes) for segment in segments),
            "growing_segments": sum(len(state.growing) for state in states),
            "sealed_segments": sum(len(state.stored) for state in states),
            "memory_bytes": sum(segment.nbytes for segment in segments),
            "chunk_bytes": sum(
                (stored.segment.files.nbytes if stored.segment.files else 0)
                + sum(blob.nbytes for blob in stored.indexes.values())
                for state in states
                for stored in state.stored.values()
            ),
            "indexes": [_index_status(_index_info(index, facts)) for index in one.indexes.values()],
        }

    # names

    async def _find(self, database: str, name: str) -> Collection:
        """Return the collection of this name; one that is not known here is looked up in the newest catalogue.

        Raises NoLeader rather than say of a name that it is not there when this copy of the catalogue may be old.
        """
        try:
            return self._node.catalog.find(database, name)
        except BadRequest as unknown:
            if self._node.mesh is None:
                raise
            if not await self._router.refresh_catalog():
                raise _unsure(unknown) from None
            return self._node.catalog.find(database, name)

    async def _newest(self, database: str, name: str) -> Collection:
        """Return the collection as the newest catalogue that can be had knows it. Raises NoLeader like `_find`."""
        is_newest = await self._router.refresh_catalog()
        try:
            return self._node.catalog.find(database, name)
        except BadRequest as unknown:
            if is_newest:
                raise
            raise _unsure(unknown) from None

    async def _with(
        self,
        database: str,
        name: str,
        work: Callable[[Collection], Awaitable[T]],
        refused: tuple[type[AnnulusError], ...] = (BadRequest, SchemaMismatch),
    ) -> T:
        """Return `work(collection)`; what is refused once is tried again if the newest catalogue says otherwise.

        refused  what may come of an old copy of the catalogue; for writes only what says that nothing was written
        """
        found = await self._find(database, name)
        try:
            return await work(found)
        except refused as error:
            if self._node.mesh is None and not isinstance(error, SchemaMismatch):
                raise
            if not await self._router.refresh_catalog():
                if isinstance(error, MAY_BE_OLD):
                    raise _unsure(error) from None
                raise
            again = self._node.catalog.find(database, name)
            if again == found:
                raise
            replaced = again.collection_id != found.collection_id
            if refused is GONE and replaced and again.schema != found.schema:  # for which the rows were decoded
                raise Conflict(f"collection {name} was replaced by another one meanwhile; try again") from None
            return await work(again)

    # what a shard knows of a collection

    async def _facts(
        self, collection: Collection, *, segments: bool = False, here_first: bool = False
    ) -> list[dict[str, Any]]:
        """Return what the shards know of the collection: their leaders, or the replicas here if they do not answer."""
        asked = {"collection": collection.collection_id, "segments": segments}
        deadline_s = min(self._router.deadline_s(), self._node.seams.clock.monotonic_s() + ASK_S)

        async def one(shard_id: ShardId) -> dict[str, Any]:
            if here_first and shard_id in self._node.shards:
                return await self._facts_here(shard_id, asked)
            try:
                return await self._router.ask_leader(FACTS_METHOD, shard_id, asked, deadline_s=deadline_s)
            except Unavailable:
                if shard_id not in self._node.shards:
                    raise
                return await self._facts_here(shard_id, asked)

        return await asyncio.gather(*(one(shard_id) for shard_id in sorted(set(collection.shards))))

    async def _facts_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain facts of a collection in the replica here: loading, indexes, and its segments if asked."""
        shard, upkeep = self._node.shards[shard_id].machine, self._node.upkeep[shard_id]
        state = shard.collections.get(CollectionId(asked["collection"]))
        if state is None:
            return {"loading": [], "indexes": [], "segments": [], "rows": 0}
        loading: dict[PartitionId, list[int]] = {}
        for one in state.stored.values():
            if state.is_loaded(one.segment.partition_id):
                counts = loading.setdefault(one.segment.partition_id, [0, 0])
                counts[0] += not one.segment.released
                counts[1] += 1
        return {
            "loading": [[partition_id, *counts] for partition_id, counts in loading.items()],
            "indexes": [_index_facts(state, index_id, upkeep) for index_id in state.indexes],
            "segments": _segments_of(shard, state) if asked["segments"] else [],
            "rows": _sealed_rows(state),
        }

    def _states(self, collection: Collection) -> list[tuple[ShardId, CollectionState]]:
        """Return the collection's shards that are here, as they have it."""
        found = []
        for shard_id in sorted(set(collection.shards)):
            host = self._node.shards.get(shard_id)
            state = None if host is None else host.machine.collections.get(collection.collection_id)
            if state is not None:
                found.append((shard_id, state))
        return found

    @staticmethod
    def _index_def(schema: CollectionSchema, request: IndexRequest) -> IndexDef:
        target: FieldSchema | None = schema.by_name.get(request.field_name)
        if target is None and schema.dynamic is not None and "json_cast_type" in request.params:
            target = schema.dynamic  # of which the name is a key
            request = replace(request, params={"json_path": request.field_name, **request.params})
        if target is None:
            raise MissingParameter(
                f"missing required parameters, error: `{request.field_name}` hasn't defined in schema"
            )
        if not target.type.is_vector:
            scalar = parse_scalar_index(request.index_type, target, request.params)
            return IndexDef(
                IndexId(0), _index_name(request), target.id, target.name, scalar[SPEC_KEY], "", scalar, _shown(request)
            )
        try:
            form = target.type.form
            default = Metric.BM25 if target.id in schema.computed else None
            spec: IndexSpec = parse_index_spec(
                request.index_type, request.metric_type, request.params, default_metric=default, form=form
            )
        except UnsupportedMetric as error:
            words = f"{form} vector index does not support metric type"
            if form is Form.SPARSE:
                words = "only IP&BM25 is the supported metric type for sparse index"
            raise InvalidParameter(f"{words}: {error}, field {target.name}") from error
        except UnsupportedIndexType as error:
            raise InvalidParameter(f"field {target.name} of type {target.type}: {error}") from error
        except SpecError as error:
            raise InvalidParameter(f"invalid index params: {error}") from error
        if (spec.metric is Metric.BM25) != (target.id in schema.computed):
            raise InvalidParameter(
                f"index metric type {spec.metric} does not go with field {target.name}: only BM25 metric type is "
                "supported for BM25 function output field, and for no other"
            )
        if target.dim % int(spec.params.get("m", 1)):
            raise InvalidParameter(
                f"dimension must be able to be divided by `m`, dimension: {target.dim}, m: {spec.params['m']}, "
                f"field {target.name}: invalid parameter"
            )
        name = _index_name(request)
        params = _shown(request)
        return IndexDef(
            IndexId(0), name, target.id, target.name, str(spec.index_type), str(spec.metric), spec.to_dict(), params
        )


def _shown(request: IndexRequest) -> dict[str, str]:
    """Return the parameters as they were given, for who asks about the index."""
    return {key: str(value) for key, value in request.params.items() if key not in ("index_type", "metric_type")}


def _index_name(request: IndexRequest) -> str:
    name = request.index_name or request.field_name
    check_name(name, "index")
    return name


def _index_facts(state: CollectionState, index_id: IndexId, upkeep: Upkeep) -> list[Any]:
    """Return [index id, rows, rows indexed, whether it is building, why it failed] of the sealed segments here."""
    total = indexed = 0
    building = False
    failure = ""
    wanted = state.indexes[index_id]
    for stored in state.stored.values():
        rows = stored.segment.rows
        total += rows
        key = (stored.segment.segment_id, index_id)
        failure = failure or upkeep.indexes.failures.get(key, "")
        if not stored.is_flushed or wanted in upkeep.indexes.wanted(state, stored):
            building = True
            progress = upkeep.indexes.builds.get(key)
            indexed += int(rows * progress.fraction) if progress else 0
        elif key not in upkeep.indexes.failures:
            indexed += rows
    return [index_id, total, indexed, building, failure]


def _sealed_rows(state: CollectionState) -> int:
    return sum(stored.segment.rows for stored in state.stored.values())


def _index_info(index: IndexDef, shards: Sequence[Mapping[str, Any]]) -> IndexInfo:
    """Return the index with its progress over sealed segments; growing rows are not counted, as in Milvus."""
    mine = [facts for shard in shards for facts in shard["indexes"] if facts[0] == index.index_id]
    total, indexed = sum(facts[1] for facts in mine), sum(facts[2] for facts in mine)
    failure = next((facts[4] for facts in mine if facts[4]), "")
    building = any(facts[3] for facts in mine)
    if index.is_scalar:  # each segment makes it when a filter asks for it
        total = indexed = sum(shard["rows"] for shard in shards)
    return IndexInfo(
        index_name=index.name,
        field_name=index.field_name,
        index_type=index.index_type,
        metric_type=index.metric_type,
        params={**index.params, **index.properties},
        state=IndexState.FAILED if failure else IndexState.IN_PROGRESS if building else IndexState.FINISHED,
        total_rows=total,
        indexed_rows=indexed,
        pending_rows=total - indexed,
        fail_reason=failure,
    )


def _unflushed(shard: Shard, collection_id: CollectionId | None) -> set[int]:
    """Return the sealed segments of a collection, or of all, that are not in chunks yet."""
    states = [one for one in shard.populated() if collection_id in (None, one.collection_id)]
    return {segment_id for state in states for segment_id, one in state.stored.items() if not one.is_flushed}


def _plain_index(index: IndexDef) -> dict[str, Any]:
    plain = asdict(index)
    del plain["index_id"]
    return plain


def _is_shown(database: str, collection: str = "") -> bool:
    """Return whether a list shows whoever asks a database, or a collection in it."""
    scope = current.get()
    return scope is None or scope.sees is None or scope.sees(database, collection)


def _ids(found: Any) -> list[int]:
    return [int(one) for one in found]


def _check_version(found: Collection, schema_version: int) -> None:
    """Raise SchemaMismatch if rows were decoded for a schema that the collection has no longer."""
    if schema_version not in (0, found.schema.version):
        raise SchemaMismatch(
            f"the rows are of version {schema_version} of the schema of collection {found.name}, which has version "
            f"{found.schema.version}: try again"
        )


def _unsure(unknown: BadRequest) -> NoLeader:
    """Return what to say of a name that this node does not know while nobody can tell it whether that is still so."""
    return NoLeader(f"{unknown.message} as far as this node knows; {NO_CATALOGUE}")


def _index_status(info: IndexInfo) -> dict[str, Any]:
    return {
        "name": info.index_name,
        "type": info.index_type,
        "metric": info.metric_type,
        "state": str(info.state),
        "indexed_rows": info.indexed_rows,
        "total_rows": info.total_rows,
    }


def _segments_of(shard: Shard, state: CollectionState) -> list[Mapping[str, Any]]:
    def facts(segment_id: int, partition_id: PartitionId, rows: int, name: str) -> Mapping[str, Any]:
        return {
            "segmentID": segment_id,
            "collectionID": state.collection_id,
            "partitionID": partition_id,
            "vChannel": f"annulus-dml_{shard.shard_id}_{state.collection_id}v0",
            "numRows": rows,
            "state": name,
            "level": "L1",
            "isSorted": False,
            "insertLogs": [],
            "deltaLogs": [],
            "statsLogs": [],
        }

    growing = [facts(one.segment_id, one.partition_id, one.rows, "Growing") for one in state.growing.values()]
    stored = [
        facts(i, one.segment.partition_id, one.segment.rows, "Flushed" if one.is_flushed else "Sealed")
        for i, one in state.stored.items()
    ]
    return [*growing, *stored]
