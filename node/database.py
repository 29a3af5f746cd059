"""The service of a node: names to ids, requests to changes of the catalogue, to writes and to reads.

Implements `node.service.Service` on a running `Node`. Every client protocol calls this and nothing below it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from cluster.catalog import (
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
from cluster.message import Seal
from cluster.ring import place
from cluster.shard import CollectionState, Shard
from index.spec import IndexSpec, SpecError, UnsupportedIndexType, UnsupportedMetric, parse_index_spec
from node.node import Node
from node.read import Reader
from node.service import (
    CollectionInfo,
    CollectionRequest,
    Consistency,
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
    CollectionLimit,
    FilterError,
    IndexNotFound,
    InvalidParameter,
    MetricNotFound,
    MissingParameter,
    UnsupportedOperation,
)
from storage.filter.compiled import compile_filter
from storage.schema import SHARDS_MAX, CollectionSchema, FieldSchema, check_name, make_schema
from storage.types import IndexId, PartitionId

PARTITION_KEY_PARTITIONS_MAX: Final = 1_024
ALTERABLE_INDEX_PROPERTIES: Final = frozenset({"mmap.enabled", "indexoffsetcache.enabled", "warmup"})


log = logging.getLogger(__name__)


class Database:
    """See `node.service.Service`, whose docstrings hold here."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._writer = Writer(node)
        self._reader = Reader(node)
        self._compactions: dict[int, asyncio.Task[None]] = {}

    # databases

    async def create_database(self, name: str, properties: Mapping[str, str]) -> None:
        await self._node.control.change(CreateDatabase(name, dict(properties)))

    async def drop_database(self, name: str) -> None:
        await self._node.control.change(DropDatabase(name))

    async def list_databases(self) -> list[str]:
        return list(self._node.catalog.databases)

    async def describe_database(self, name: str) -> tuple[int, Mapping[str, str]]:
        found = self._node.catalog.database(name)
        return found.database_id, found.properties

    async def alter_database(self, name: str, changed: Mapping[str, str], dropped: Sequence[str]) -> None:
        check_property_count(altered(self._node.catalog.database(name).properties, changed, dropped))
        await self._node.control.change(AlterDatabase(name, dict(changed), list(dropped)))

    # collections

    async def create_collection(self, database: str, request: CollectionRequest) -> None:
        self._node.check_writable()
        if len(self._node.catalog.collections) >= self._node.settings.api.collections_max:
            raise CollectionLimit(
                f"exceeded the limit number of collections[limit={self._node.settings.api.collections_max}]"
            )
        if not 1 <= request.shards <= SHARDS_MAX:
            raise InvalidParameter(f"invalid shards number: {request.shards}, should be in range [1, {SHARDS_MAX}]")
        schema = make_schema(list(request.fields), dynamic=request.dynamic)
        indexes = [self._index_def(schema, one) for one in request.indexes]
        partitions = [DEFAULT_PARTITION]
        if schema.partition_key is not None:
            if not 1 <= request.partitions <= PARTITION_KEY_PARTITIONS_MAX:
                raise InvalidParameter(
                    f"the specified partitions should be in range [1, {PARTITION_KEY_PARTITIONS_MAX}], "
                    f"got {request.partitions}"
                )
            partitions = [f"{DEFAULT_PARTITION}_{i}" for i in range(request.partitions)]
        await self._node.ddl(
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
            },
        )
        for index in indexes:
            await self._node.ddl("create_index", database, request.name, {"index": _plain_index(index)})
        if request.load:
            await self.load(database, request.name)

    async def list_collections(self, database: str) -> list[str]:
        return [one.name for one in self._node.catalog.in_database(database)]

    async def has_collection(self, database: str, name: str) -> bool:
        catalog = self._node.catalog
        catalog.database(database)
        return (database, name) in catalog.names or (database, name) in catalog.aliases

    async def describe_collection(self, database: str, name: str) -> CollectionInfo:
        found = self._find(database, name)
        state, percent = await self.load_state(database, name)
        return CollectionInfo(
            database=found.database,
            name=found.name,
            collection_id=found.collection_id,
            schema=found.schema,
            description=found.description,
            shards=len(found.shards),
            partitions=list(found.partitions),
            aliases=self._node.catalog.aliases_of(found.collection_id),
            indexes=[self._index_info(found, one) for one in found.indexes.values()],
            consistency=Consistency(found.consistency),
            properties=found.properties,
            load_state=state,
            load_percent=percent,
            created_tick=found.created_tick,
        )

    async def rename_collection(self, database: str, name: str, new_name: str, new_database: str) -> None:
        await self._node.control.change(RenameCollection(database, name, new_database or database, new_name))

    async def drop_collection(self, database: str, name: str) -> None:
        await self._node.ddl("drop_collection", database, name, {})

    async def truncate_collection(self, database: str, name: str) -> None:
        await self._node.ddl("truncate_collection", database, self._find(database, name).name, {})

    async def load(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        await self._node.ddl("load", database, self._find(database, name).name, {"partitions": list(partitions)})

    async def release(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        await self._node.ddl("release", database, self._find(database, name).name, {"partitions": list(partitions)})

    async def load_state(self, database: str, name: str, partitions: Sequence[str] = ()) -> tuple[LoadState, int]:
        found = self._find(database, name)
        wanted = [found.partition(one) for one in partitions]
        if not found.is_loaded or (found.loaded is not None and not found.loaded.issuperset(wanted)):
            return LoadState.NOT_LOADED, 0
        segments = [
            one.segment
            for _, state, _ in self._states(found)
            for one in state.stored.values()
            if state.is_loaded(one.segment.partition_id) and (not wanted or one.segment.partition_id in wanted)
        ]
        ready = sum(not one.released for one in segments)
        if ready == len(segments):
            return LoadState.LOADED, 100
        return LoadState.LOADING, ready * 100 // len(segments)

    async def row_count(self, database: str, name: str, partition: str = "") -> int:
        found = self._find(database, name)
        chosen = frozenset({found.partition(partition)}) if partition else None
        return await self._reader.row_count(found, chosen)

    async def flush(self, database: str, name: str) -> None:
        self._node.check_writable()
        found = self._find(database, name)
        for shard_id in sorted(set(found.shards)):
            host = self._node.shards[shard_id]
            waiting = self._unflushed(host.machine, found)
            outcome = await host.change(Seal(found.collection_id, None))
            waiting |= set(_ids(outcome["segments"]))

            def flushed(shard: Shard = host.machine, waiting: frozenset[int] = frozenset(waiting)) -> bool:
                return not waiting & self._unflushed(shard, found)

            await self._node.upkeep[shard_id].until(flushed)

    @staticmethod
    def _unflushed(shard: Shard, collection: Collection) -> set[int]:
        state = shard.collections.get(collection.collection_id)
        if state is None:
            return set()
        return {segment_id for segment_id, one in state.stored.items() if not one.is_flushed}

    async def compact(self, database: str, name: str) -> int:
        found = self._find(database, name)
        job_id = self._node.hybrid.stamp()
        upkeeps = [self._node.upkeep[shard_id] for shard_id in sorted(set(found.shards))]

        async def run() -> None:
            try:
                for upkeep in upkeeps:
                    await upkeep.compact_now(found.collection_id)
                await self._node.checkpoint()
                await self._node.give_back_space()
            except OSError as error:
                self._node.note_store_error(error)
            except AnnulusError as error:
                log.warning("compaction ends early collection=%s: %s", name, error)

        task = asyncio.get_running_loop().create_task(run())
        self._compactions[job_id] = task
        while len(self._compactions) > 1_000:
            self._compactions.pop(next(iter(self._compactions)))
        self._node.keep(task)
        return job_id

    async def compaction_state(self, job_id: int) -> tuple[str, int, int]:
        task = self._compactions.get(job_id)
        if task is None:
            return "UndefiedState", 0, 0
        if task.done():
            return "Completed", 0, 1
        return "Executing", 1, 0

    async def alter_collection(
        self, database: str, name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        request = {"changed": dict(changed), "dropped": list(dropped)}
        await self._node.ddl("alter_collection", database, self._find(database, name).name, request)

    async def describe_segments(self, collection_id: int, segment_ids: Sequence[int]) -> list[Mapping[str, Any]]:
        found = []
        for host in self._node.shards.values():
            for state in host.machine.collections.values():
                if state.collection_id == collection_id:
                    found += [
                        one
                        for one in _segments_of(host.machine, state)
                        if not segment_ids or one["segmentID"] in segment_ids
                    ]
        return found

    # partitions

    async def create_partition(self, database: str, collection: str, partition: str) -> None:
        name = self._find(database, collection).name
        await self._node.ddl("create_partition", database, name, {"partition": partition})

    async def drop_partition(self, database: str, collection: str, partition: str) -> None:
        name = self._find(database, collection).name
        await self._node.ddl("drop_partition", database, name, {"partition": partition})

    async def has_partition(self, database: str, collection: str, partition: str) -> bool:
        return partition in self._find(database, collection).partitions

    async def list_partitions(self, database: str, collection: str) -> list[str]:
        return list(self._find(database, collection).partitions)

    # indexes

    async def create_index(self, database: str, collection: str, request: IndexRequest) -> None:
        found = self._find(database, collection)
        index = self._index_def(found.schema, request)
        await self._node.ddl("create_index", database, found.name, {"index": _plain_index(index)})

    async def drop_index(self, database: str, collection: str, index_name: str) -> None:
        name = self._find(database, collection).name
        await self._node.ddl("drop_index", database, name, {"index_name": index_name})

    async def describe_index(self, database: str, collection: str, index_name: str) -> IndexInfo:
        found = self._find(database, collection)
        index = found.indexes.get(index_name)
        if index is None:
            raise IndexNotFound(index_name)
        return self._index_info(found, index)

    async def list_indexes(self, database: str, collection: str) -> list[str]:
        return list(self._find(database, collection).indexes)

    async def alter_index(
        self, database: str, collection: str, index_name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        found = self._find(database, collection)
        if index_name not in found.indexes:
            raise IndexNotFound(index_name)
        for name in (*changed, *dropped):
            if name not in ALTERABLE_INDEX_PROPERTIES:
                raise InvalidParameter(
                    f"{name} is not configable index property; these are: "
                    f"{', '.join(sorted(ALTERABLE_INDEX_PROPERTIES))}"
                )
        await self._node.control.change(AlterIndex(database, found.name, index_name, dict(changed), list(dropped)))

    # aliases

    async def create_alias(self, database: str, collection: str, alias: str) -> None:
        await self._node.control.change(CreateAlias(database, collection, alias))

    async def alter_alias(self, database: str, collection: str, alias: str) -> None:
        await self._node.control.change(CreateAlias(database, collection, alias, True))

    async def drop_alias(self, database: str, alias: str) -> None:
        await self._node.control.change(DropAlias(database, alias))

    async def describe_alias(self, database: str, alias: str) -> str:
        catalog = self._node.catalog
        catalog.database(database)
        found = catalog.aliases.get((database, alias))
        if found is None:
            raise AliasNotFound(database, alias)
        return catalog.collections[found].name

    async def list_aliases(self, database: str, collection: str = "") -> list[str]:
        catalog = self._node.catalog
        catalog.database(database)
        if collection:
            return catalog.aliases_of(catalog.find(database, collection).collection_id)
        return sorted(alias for owner, alias in catalog.aliases if owner == database)

    # rows

    async def collection_schema(self, database: str, collection: str) -> CollectionSchema:
        return self._find(database, collection).schema

    async def insert(self, database: str, collection: str, batch: Batch, partition: str = "") -> WriteResult:
        return await self._writer.insert(self._find(database, collection), batch, partition)

    async def upsert(
        self, database: str, collection: str, batch: Batch, partition: str = "", *, partial: bool = False
    ) -> WriteResult:
        return await self._writer.upsert(self._find(database, collection), batch, partition, partial=partial)

    async def delete(
        self, database: str, collection: str, filter: str, params: Mapping[str, Any], partition: str = ""
    ) -> int:
        found = self._find(database, collection)
        row_filter = compile_filter(filter, found.schema, params)
        if row_filter.always_true:
            raise FilterError("delete needs a filter; to remove all rows use collections/truncate")
        chosen = frozenset({found.partition(partition)}) if partition else None
        keys = await self._reader.matching_keys(found, row_filter, chosen)
        if len(keys) == 0:
            return 0
        return await self._writer.delete_keys(found, keys, None if chosen is None else sorted(chosen))

    async def get(self, database: str, collection: str, ids: Sequence[int | str], options: ReadOptions) -> Rows:
        return await self._reader.get(self._find(database, collection), ids, options)

    async def query(self, database: str, collection: str, options: ReadOptions, *, limit: int, offset: int) -> Rows:
        return await self._reader.query(self._find(database, collection), options, limit=limit, offset=offset)

    async def search(
        self, database: str, collection: str, request: SearchRequest, options: ReadOptions
    ) -> SearchResult:
        return await self._reader.search(self._find(database, collection), request, options)

    # operations

    async def status(self) -> Mapping[str, Any]:
        node = self._node
        catalog = node.catalog
        ready, total = node.loading
        placement = place([node.settings.node.name], len(node.shards), 1)
        return {
            "node": node.settings.node.name,
            "read_only": node.read_only_reason,
            "segments_in_memory": [ready, total],
            "journal": {"bytes": node.journal.bytes_on_disk, "files": node.journal.files},
            "chunks": {"bytes": node.seams.disk.used_bytes(f"{node.settings.node.data}/chunks")},
            "collections": [self._collection_status(one) for one in catalog.collections.values()],
            "shards": [
                {
                    "shard": shard_id,
                    "leader": host.raft.leader,
                    "replicas": list(placement[shard_id]),
                    "term": host.raft.term,
                    "position": host.machine.position,
                    "checkpoint": node.upkeep[shard_id].checkpoint_position,
                    "tick": host.machine.tick,
                    "segments": sum(1 for state in host.machine.collections.values() for _ in state.segments()),
                    "rows": sum(s.live_rows for state in host.machine.collections.values() for s in state.segments()),
                }
                for shard_id, host in node.shards.items()
            ],
        }

    def _collection_status(self, one: Collection) -> Mapping[str, Any]:
        states = [state for _, state, _ in self._states(one)]
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
            "indexes": [_index_status(self._index_info(one, index)) for index in one.indexes.values()],
        }

    def _find(self, database: str, name: str) -> Collection:
        return self._node.catalog.find(database, name)

    def _states(self, collection: Collection) -> list[tuple[Shard, CollectionState, Upkeep]]:
        found = []
        for shard_id in sorted(set(collection.shards)):
            shard = self._node.shards[shard_id].machine
            state = shard.collections.get(collection.collection_id)
            if state is not None:
                found.append((shard, state, self._node.upkeep[shard_id]))
        return found

    def _index_info(self, collection: Collection, index: IndexDef) -> IndexInfo:
        """Return the index with its progress over sealed segments; growing rows are not counted, as in Milvus."""
        total = indexed = 0
        building = False
        failure = ""
        for _, state, upkeep in self._states(collection):
            wanted = state.indexes.get(index.index_id)
            for stored in state.stored.values():
                rows = stored.segment.rows
                total += rows
                key = (stored.segment.segment_id, index.index_id)
                failure = failure or upkeep.failures.get(key, "")
                if not stored.is_flushed or (wanted and wanted in upkeep.wanted_indexes(state, stored)):
                    building = True
                    progress = upkeep.builds.get(key)
                    indexed += int(rows * progress.fraction) if progress else 0
                elif key not in upkeep.failures:
                    indexed += rows
        state_name = IndexState.FAILED if failure else IndexState.IN_PROGRESS if building else IndexState.FINISHED
        return IndexInfo(
            index_name=index.name,
            field_name=index.field_name,
            index_type=index.index_type,
            metric_type=index.metric_type,
            params={**index.params, **index.properties},
            state=state_name,
            total_rows=total,
            indexed_rows=indexed,
            pending_rows=total - indexed,
            fail_reason=failure,
        )

    @staticmethod
    def _index_def(schema: CollectionSchema, request: IndexRequest) -> IndexDef:
        target: FieldSchema | None = schema.by_name.get(request.field_name)
        if target is None:
            raise MissingParameter(
                f"missing required parameters, error: `{request.field_name}` hasn't defined in schema"
            )
        if not target.type.is_vector:
            raise UnsupportedOperation(
                f"an index on field {target.name} of type {target.type} is not supported by this server; filters on it "
                "work without one"
            )
        try:
            spec: IndexSpec = parse_index_spec(request.index_type, request.metric_type, request.params)
        except UnsupportedMetric as error:
            raise MetricNotFound(f"float vector index does not support metric type: {error}") from error
        except UnsupportedIndexType as error:
            raise InvalidParameter(str(error)) from error
        except SpecError as error:
            raise InvalidParameter(f"invalid index params: {error}") from error
        name = request.index_name or target.name
        check_name(name, "index")
        params = {key: str(value) for key, value in request.params.items() if key not in ("index_type", "metric_type")}
        return IndexDef(
            IndexId(0), name, target.id, target.name, str(spec.index_type), str(spec.metric), spec.to_dict(), params
        )


def _plain_index(index: IndexDef) -> dict[str, Any]:
    plain = asdict(index)
    del plain["index_id"]
    return plain


def _ids(found: Any) -> list[int]:
    return [int(one) for one in found]


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
