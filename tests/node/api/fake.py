"""A service in memory, just enough to hold the API against: exact search, no filters but `id == N` and `bad`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, TypeVarTuple

import aiohttp
import cbor2
import numpy as np
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from node.admission import Admission
from node.api.server import make_app
from node.clock import SystemClock
from node.edge import Edge
from node.guard import Guard
from node.metrics import Metrics
from node.service import (
    CollectionInfo,
    CollectionRequest,
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
from node.settings import ApiSettings, Settings
from node.workers import Executor, Lane
from storage.columns import Batch, ScalarColumn, StringColumn, VectorColumn
from storage.errors import (
    AliasNotFound,
    CollectionNotFound,
    DatabaseNotFound,
    FilterError,
    IndexNotFound,
    InvalidParameter,
    PartitionNotFound,
    SchemaMismatch,
)
from storage.evolution import with_field, with_field_params, without_field
from storage.schema import CollectionSchema, FieldSchema, make_schema
from storage.types import Tick

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


@dataclass
class Kept:
    request: CollectionRequest
    schema: CollectionSchema
    rows: list[Batch] = field(default_factory=list)
    partial: list[Batch] = field(default_factory=list)
    indexes: list[IndexRequest] = field(default_factory=list)
    partitions: list[str] = field(default_factory=lambda: ["_default"])
    properties: dict[str, str] = field(default_factory=dict)
    loaded: bool = False
    generated: int = 1000


@dataclass
class FakeNodes:
    """Writes down what operators ask."""

    service: FakeService

    async def entry(self) -> Mapping[str, str]:
        return {"node": "n1", "peer": "127.0.0.1:1"}

    async def describe(self) -> Mapping[str, Any]:
        return {"nodes": [], "moves": [], "movesPaused": False, "copies": 3}

    async def drain(self, name: str, *, undo: bool = False, force: bool = False) -> None:
        self.service.operations.append(("drain", name, undo, force))

    async def remove(self, name: str) -> None:
        raise InvalidParameter(f"there is no node {name}")

    async def replace(self, old: str, new: str) -> None:
        self.service.operations.append(("replace", old, new))

    async def pause(self, paused: bool) -> None:
        self.service.operations.append(("pause", paused))


class FakeAccess:
    """Knows root and nobody else; every change is answered as if it were made."""

    async def list_users(self) -> list[str]:
        return ["root"]

    async def describe_user(self, name: str) -> tuple[Sequence[str], str]:
        return ["admin"], ""

    async def list_roles(self) -> list[str]:
        return ["admin", "public"]

    async def describe_role(self, name: str) -> tuple[Sequence[Any], str, Sequence[str]]:
        return [], "", ["root"]

    async def list_groups(self) -> dict[str, list[str]]:
        return {}

    async def list_keys(self, user: str = "") -> list[Mapping[str, Any]]:
        return []

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Mapping[str, Any]]]:
        async def done(*_: Any, **__: Any) -> Mapping[str, Any]:
            return {}

        return done


class FakeService:
    """Holds what it is given; `before` runs first in every read and write of rows, to fail or to wait."""

    def __init__(self) -> None:
        self.operations: list[tuple[object, ...]] = []
        self.databases: dict[str, dict[str, str]] = {"default": {}}
        self.collections: dict[tuple[str, str], Kept] = {}
        self.aliases: dict[tuple[str, str], str] = {}
        self.before: Callable[[], Awaitable[None]] | None = None
        self.searched: list[tuple[SearchRequest, ReadOptions]] = []
        self.queried: list[tuple[ReadOptions, int, int]] = []
        self.finished = 0
        self.keys: dict[str, str] = {}
        self.access: Any = FakeAccess()

    def find(self, database: str, name: str) -> Kept:
        if database not in self.databases:
            raise DatabaseNotFound(database)
        name = self.aliases.get((database, name), name)
        if (database, name) not in self.collections:
            raise CollectionNotFound(database, name)
        return self.collections[database, name]

    async def step(self) -> None:
        if self.before is not None:
            await self.before()

    # databases
    async def create_database(self, name: str, properties: Mapping[str, str]) -> None:
        if name in self.databases:
            raise InvalidParameter(f"database already exist: {name}")
        self.databases[name] = dict(properties)

    async def drop_database(self, name: str) -> None:
        if self.databases.pop(name, None) is None:
            raise DatabaseNotFound(name)

    async def list_databases(self) -> list[str]:
        return list(self.databases)

    async def describe_database(self, name: str) -> tuple[int, Mapping[str, str]]:
        if name not in self.databases:
            raise DatabaseNotFound(name)
        return 1, self.databases[name]

    async def alter_database(self, name: str, changed: Mapping[str, str], dropped: Sequence[str]) -> None:
        self.databases[name] |= changed
        for key in dropped:
            self.databases[name].pop(key, None)

    # collections
    async def create_collection(self, database: str, request: CollectionRequest) -> None:
        if database not in self.databases:
            raise DatabaseNotFound(database)
        schema = make_schema(list(request.fields), dynamic=request.dynamic)
        kept = Kept(request, schema, indexes=list(request.indexes), properties=dict(request.properties))
        kept.loaded = request.load
        self.collections[database, request.name] = kept

    async def list_collections(self, database: str) -> list[str]:
        if database not in self.databases:
            raise DatabaseNotFound(database)
        return [name for base, name in self.collections if base == database]

    async def has_collection(self, database: str, name: str) -> bool:
        return (database, name) in self.collections

    async def describe_collection(self, database: str, name: str) -> CollectionInfo:
        kept = self.find(database, name)
        return CollectionInfo(
            database=database,
            name=kept.request.name,
            collection_id=7,
            schema=kept.schema,
            description=kept.request.description,
            shards=kept.request.shards,
            partitions=kept.partitions,
            aliases=[alias for (base, alias), target in self.aliases.items() if target == name and base == database],
            indexes=[self.info(one) for one in kept.indexes],
            consistency=kept.request.consistency,
            properties=kept.properties,
            load_state=LoadState.LOADED if kept.loaded else LoadState.NOT_LOADED,
            load_percent=100,
            created_tick=Tick(1),
        )

    def info(self, one: IndexRequest) -> IndexInfo:
        params = {key: str(value) for key, value in one.params.items()}
        name = one.index_name or one.field_name
        return IndexInfo(name, one.field_name, one.index_type, one.metric_type, params, IndexState.FINISHED, 5, 5, 0)

    async def rename_collection(self, database: str, name: str, new_name: str, new_database: str) -> None:
        kept = self.find(database, name)
        del self.collections[database, name]
        self.collections[new_database, new_name] = replace(kept, request=replace(kept.request, name=new_name))

    async def drop_collection(self, database: str, name: str) -> None:
        self.find(database, name)
        del self.collections[database, name]

    async def truncate_collection(self, database: str, name: str) -> None:
        self.find(database, name).rows.clear()

    async def load(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        self.find(database, name).loaded = True

    async def release(self, database: str, name: str, partitions: Sequence[str] = ()) -> None:
        self.find(database, name).loaded = False

    async def load_state(self, database: str, name: str, partitions: Sequence[str] = ()) -> tuple[LoadState, int]:
        return (LoadState.LOADED, 100) if self.find(database, name).loaded else (LoadState.NOT_LOADED, 0)

    async def row_count(self, database: str, name: str, partition: str = "") -> int:
        return sum(batch.rows for batch in self.find(database, name).rows)

    async def flush(self, database: str, name: str) -> None:
        self.find(database, name)

    async def flush_all(self) -> None:
        """Everything is where it belongs."""

    async def once(self, key: str, request: str, work: Callable[[], Awaitable[object]]) -> bool:
        if key in self.keys:
            if self.keys[key] != request:
                raise InvalidParameter(f"the idempotency key {key} was used for another request")
            return True
        self.keys[key] = request
        await work()
        return False

    async def compact(self, database: str, name: str) -> int:
        self.find(database, name)
        return 5

    async def compaction_state(self, job_id: int) -> tuple[str, int, int]:
        return "Completed", 0, 1

    async def alter_collection(
        self, database: str, name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        kept = self.find(database, name)
        kept.properties |= changed
        for key in dropped:
            kept.properties.pop(key, None)

    async def add_field(self, database: str, name: str, field: FieldSchema) -> None:
        kept = self.find(database, name)
        kept.schema = with_field(kept.schema, field)

    async def drop_field(self, database: str, name: str, field_name: str, field_id: int = 0) -> None:
        kept = self.find(database, name)
        kept.schema = without_field(kept.schema, field_name, field_id)

    async def alter_field(self, database: str, name: str, field_name: str, params: Mapping[str, str]) -> None:
        kept = self.find(database, name)
        kept.schema = with_field_params(kept.schema, field_name, params)

    async def describe_segments(self, collection_id: int, segment_ids: Sequence[int]) -> list[Mapping[str, Any]]:
        return [{"segmentID": one, "collectionID": collection_id} for one in segment_ids]

    # partitions
    async def create_partition(self, database: str, collection: str, partition: str) -> None:
        self.find(database, collection).partitions.append(partition)

    async def drop_partition(self, database: str, collection: str, partition: str) -> None:
        if partition not in self.find(database, collection).partitions:
            raise PartitionNotFound(partition)
        self.find(database, collection).partitions.remove(partition)

    async def has_partition(self, database: str, collection: str, partition: str) -> bool:
        return partition in self.find(database, collection).partitions

    async def list_partitions(self, database: str, collection: str) -> list[str]:
        return self.find(database, collection).partitions

    # indexes
    async def create_index(self, database: str, collection: str, request: IndexRequest) -> None:
        self.find(database, collection).indexes.append(request)

    async def drop_index(self, database: str, collection: str, index_name: str) -> None:
        await self.describe_index(database, collection, index_name)
        kept = self.find(database, collection)
        kept.indexes = [one for one in kept.indexes if self.info(one).index_name != index_name]

    async def describe_index(self, database: str, collection: str, index_name: str) -> IndexInfo:
        for one in self.find(database, collection).indexes:
            if self.info(one).index_name == index_name:
                return self.info(one)
        raise IndexNotFound(index_name)

    async def list_indexes(self, database: str, collection: str) -> list[str]:
        return [self.info(one).index_name for one in self.find(database, collection).indexes]

    async def alter_index(
        self, database: str, collection: str, index_name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None:
        await self.describe_index(database, collection, index_name)

    # aliases
    async def create_alias(self, database: str, collection: str, alias: str) -> None:
        self.find(database, collection)
        self.aliases[database, alias] = collection

    async def alter_alias(self, database: str, collection: str, alias: str) -> None:
        await self.create_alias(database, collection, alias)

    async def drop_alias(self, database: str, alias: str) -> None:
        self.aliases.pop((database, alias), None)

    async def describe_alias(self, database: str, alias: str) -> str:
        if (database, alias) not in self.aliases:
            raise AliasNotFound(database, alias)
        return self.aliases[database, alias]

    async def list_aliases(self, database: str, collection: str = "") -> list[str]:
        return [one for (base, one), target in self.aliases.items() if base == database and collection in ("", target)]

    # rows
    async def collection_schema(self, database: str, collection: str, *, newest: bool = False) -> CollectionSchema:
        return self.find(database, collection).schema

    async def insert(
        self, database: str, collection: str, batch: Batch, partition: str = "", *, schema_version: int = 0
    ) -> WriteResult:
        await self.step()
        kept = self.find(database, collection)
        if schema_version not in (0, kept.schema.version):
            raise SchemaMismatch(f"rows of version {schema_version}")
        primary = kept.schema.primary
        if primary.auto_id:
            ids = np.arange(kept.generated, kept.generated + batch.rows)
            kept.generated += batch.rows
            batch = Batch({**batch.columns, primary.id: ScalarColumn(ids)}, batch.rows)
        Batch.from_bytes(batch.to_bytes())  # what the log will do with it
        kept.rows.append(batch)
        self.finished += 1
        return WriteResult(batch.rows, _keys(batch, kept.schema))

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
        kept = self.find(database, collection)
        if not partial:
            return await self.insert(database, collection, batch, partition, schema_version=schema_version)
        kept.partial.append(batch)
        return WriteResult(batch.rows, _keys(batch, kept.schema))

    async def delete(
        self, database: str, collection: str, filter: str, params: Mapping[str, Any], partition: str = ""
    ) -> int:
        kept = self.find(database, collection)
        self.matching(kept, filter)
        return 1

    def matching(self, kept: Kept, filter: str) -> Batch | None:
        if filter == "bad":
            raise FilterError("cannot parse expression: bad, error: field bad not exist")
        if not kept.rows:
            return None
        rows = Batch.concat(kept.rows)
        if filter.startswith("id == "):
            keys = rows.columns[kept.schema.primary.id].to_list()
            rows = rows.take(np.array([i for i, key in enumerate(keys) if str(key) == filter[6:]], np.int64))
        return rows

    def rows(self, kept: Kept, batch: Batch | None, options: ReadOptions) -> Rows:
        every = "*" in options.output_fields
        names = [one.name for one in kept.schema.user_fields if every or one.name in options.output_fields]
        dynamic = None if every else [one for one in options.output_fields if one not in kept.schema.by_name]
        if options.output_fields == ["count(*)"]:
            return Rows(kept.schema, Batch({}, 0), (), count=batch.rows if batch else 0)
        return Rows(kept.schema, batch or Batch({}, 0), names, dynamic)

    async def get(self, database: str, collection: str, ids: Sequence[int | str], options: ReadOptions) -> Rows:
        kept = self.find(database, collection)
        batch = self.matching(kept, "")
        if batch is not None:
            keys = batch.columns[kept.schema.primary.id].to_list()
            batch = batch.take(np.array([keys.index(one) for one in ids if one in keys], np.int64))
        return self.rows(kept, batch, options)

    async def query(self, database: str, collection: str, options: ReadOptions, *, limit: int, offset: int) -> Rows:
        await self.step()
        kept = self.find(database, collection)
        self.queried.append((options, limit, offset))
        batch = self.matching(kept, options.filter)
        return self.rows(kept, batch.slice(offset, offset + (limit or batch.rows)) if batch else None, options)

    async def hybrid_search(
        self, database: str, collection: str, request: HybridRequest, options: ReadOptions
    ) -> SearchResult:
        return await self.search(database, collection, request.searches[0].request, options)

    async def search(
        self, database: str, collection: str, request: SearchRequest, options: ReadOptions
    ) -> SearchResult:
        await self.step()
        kept = self.find(database, collection)
        self.searched.append((request, options))
        batch = self.matching(kept, options.filter)
        if batch is None or request.vectors is None:
            return SearchResult(self.rows(kept, None, options), np.zeros(0, np.float32), [])
        column = batch.columns[kept.schema.vectors[0].id]
        assert isinstance(column, VectorColumn)
        found, scores = [], []
        assert isinstance(request.vectors, np.ndarray)
        for vector in request.vectors:
            distances = ((column.values - vector) ** 2).sum(axis=1)
            order = np.argsort(distances, kind="stable")[request.offset : request.offset + request.limit]
            found.append(order)
            scores.append(distances[order])
        rows = self.rows(kept, batch.take(np.concatenate(found)), options)
        return SearchResult(rows, np.concatenate(scores).astype(np.float32), [len(one) for one in found])

    async def check_cluster(self, *, begin: bool) -> Mapping[str, Any]:
        return {"finding": "running" if begin else "clean"}

    @property
    def imports(self) -> Any:
        raise InvalidParameter("no imports here")

    @property
    def nodes(self) -> FakeNodes:
        return FakeNodes(self)

    async def status(self) -> Mapping[str, Any]:
        return {}


def _keys(batch: Batch, schema: CollectionSchema) -> Any:
    column = batch.columns[schema.primary.id]
    if isinstance(column, StringColumn):
        return column.to_list()
    assert isinstance(column, ScalarColumn)
    return column.values


class Inline:
    """An executor that runs everything at once, on the loop, and counts it."""

    def __init__(self) -> None:
        self.runs = 0

    async def run(self, lane: Lane, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        self.runs += 1
        return function(*args)

    def pending(self, lane: Lane) -> int:
        return 0

    async def passed(self, lane: Lane) -> None: ...


class Client:
    """A client of an application over the fake service; `post` returns (status, decoded reply)."""

    def __init__(self, http: TestClient[web.Request, web.Application], service: FakeService, executor: Inline) -> None:
        self.http = http
        self.service = service
        self.executor = executor

    async def post(self, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        status, reply = await self.send(path, json.dumps({} if body is None else body).encode(), headers)
        assert status == 200, (status, reply)
        return reply

    async def post_cbor(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        headers = {"Content-Type": "application/cbor"} | headers
        _, reply = await self.send(path, cbor2.dumps(body), headers)
        return reply

    async def send(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        named = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        async with self.http.post(
            path if path.startswith("/v2/") else f"/v2/vectordb{path}", data=body, headers=named
        ) as response:
            raw = await response.read()
            if response.content_type == "application/cbor":
                return response.status, cbor2.loads(raw)
            assert response.content_type == "application/json", raw
            reply: dict[str, Any] = json.loads(raw)
            return response.status, reply


def edge_of(executor: Executor, *, guard: Guard | None = None, ready: Callable[[], str] = str, **settings: Any) -> Edge:
    """Return the edge of a node with these settings of the API."""
    api, clock, metrics = ApiSettings(**settings), SystemClock(), Metrics()
    admission = Admission(Settings(api=api), clock, metrics)
    return Edge(api, metrics, clock=clock, executor=executor, admission=admission, ready=ready, guard=guard)


def serve(script: Callable[[Client], Awaitable[None]], **settings: Any) -> None:
    """Run a script of requests against a fresh application; it must end within 20 s."""
    standard_status = settings.pop("standard_status", False)
    ready = settings.pop("ready", lambda: "")

    async def main() -> None:
        service, executor = FakeService(), Inline()
        edge = edge_of(executor, ready=ready, **settings)
        app = make_app(service, edge, standard_status=standard_status)
        async with TestClient(TestServer(app), timeout=aiohttp.ClientTimeout(20)) as http:
            await script(Client(http, service, executor))

    asyncio.run(asyncio.wait_for(main(), 20))
