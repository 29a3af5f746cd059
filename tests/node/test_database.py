"""The service on a whole node in a simulated world: what a client may rely on beside the log's promises."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from node.database import Database
from node.metrics import Metrics
from node.node import Node, Seams
from node.scope import Scope, current
from node.service import CollectionRequest, Consistency, IndexRequest, LoadState, ReadOptions, SearchRequest
from node.settings import IndexSettings, NodeSettings, Settings, StorageSettings
from storage.columns import Batch, ScalarColumn, StringColumn, VectorColumn
from storage.errors import (
    BadRow,
    CollectionNotFound,
    CollectionNotLoaded,
    FilterError,
    NoLeader,
    NotFresh,
    PartitionNotLoaded,
)
from storage.schema import DataType, FieldSchema
from storage.strings import StringArray
from storage.types import LOGICAL_BITS, FieldId, Tick
from tests.sim.chunks import SimChunks
from tests.sim.disk import SimDisk
from tests.sim.world import SimClock, SimExecutor, SimLoop, close, run

ID, VECTOR, NUMBER, META = (FieldId(number) for number in range(100, 104))
SETTINGS = Settings(
    node=NodeSettings(data="/data", shards=2),
    storage=StorageSettings(disk_reserve_bytes=0),
    index=IndexSettings(build_threads=1, rows_min=1),
)
EVERYTHING = ReadOptions(output_fields=["*"])


def fields(**primary: Any) -> list[FieldSchema]:
    return [
        FieldSchema("id", DataType.INT64, primary=True, **primary),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=2),
        FieldSchema("number", DataType.INT64, nullable=True),
    ]


def request(name: str = "c", *, load: bool = True, shards: int = 1, **more: Any) -> CollectionRequest:
    index = IndexRequest("vector", "vector", "FLAT", "L2")
    made = CollectionRequest(name, fields(), dynamic=True, indexes=[index], load=load, shards=shards)
    return replace(made, **more)


def rows(ids: list[int], *, number: int = 1, meta: str = "{}") -> Batch:
    return Batch(
        {
            ID: ScalarColumn(np.array(ids, np.int64)),
            VECTOR: VectorColumn(np.array([[i, 0] for i in ids], np.float32)),
            NUMBER: ScalarColumn(np.full(len(ids), number, np.int64)),
            META: StringColumn(StringArray.from_strings([meta] * len(ids))),
        },
        len(ids),
    )


def on_a_node(script: Callable[[Database, SimClock], Awaitable[None]]) -> None:
    """Run the script against the service of a fresh node."""
    loop = SimLoop()
    clock, executor = SimClock(loop), SimExecutor(Random(1))

    async def main() -> None:
        node = Node(SETTINGS, Seams(SimDisk(Random(2)), SimChunks(Random(3)), executor, clock, Random(4)), Metrics())
        await node.start()
        await script(Database(node), clock)
        await node.stop()

    try:
        run(loop, main())
    finally:
        close(loop)


async def found(
    database: Database, filter: str = "", collection: str = "c", consistency: Consistency | None = None
) -> dict[int, tuple[Any, Any]]:
    """Return id -> (number, dynamic keys) of the rows that match."""
    options = replace(EVERYTHING, filter=filter, consistency=consistency)
    result = await database.query("default", collection, options, limit=0, offset=0)
    ids, numbers, metas = (result.batch.columns[one].to_list() for one in (ID, NUMBER, META))
    return {key: (number, meta) for key, number, meta in zip(ids, numbers, metas, strict=True)}


@pytest.mark.parametrize("shards", [1, 3])
def test_partial_upsert_merges_fields_and_dynamic_keys(shards: int) -> None:
    """Fields that are not given stay, dynamic keys merge, a null clears one, and a new row must be whole."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request(shards=shards))
        await database.insert("default", "c", rows([1, 2], number=7, meta='{"a":1,"b":2}'))
        part = rows([1], meta='{"b":null,"c":3}').select([ID, META])
        await database.upsert("default", "c", part, partial=True)
        assert await found(database) == {1: (7, '{"a":1,"c":3}'), 2: (7, '{"a":1,"b":2}')}
        with pytest.raises(BadRow, match="row 9 does not exist, so every field must be given: vector missing"):
            await database.upsert("default", "c", rows([9]).select([ID]), partial=True)
        assert set(await found(database)) == {1, 2}

    on_a_node(script)


def test_brief_searches_run_on_the_loop_and_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first search of a kind runs on a thread; those after it, which are known to be brief, on the loop. They find
    the same, see each write acknowledged before, and go back to a thread where far more is to be looked at."""

    async def script(database: Database, clock: SimClock) -> None:
        threads: list[str] = []
        node, read = database._node, database._node.read

        async def noted(function: Any, *args: Any) -> Any:
            threads.append(function.__name__)
            return await read(function, *args)

        monkeypatch.setattr(node, "read", noted)

        async def nearest(count: int = 1, filter: str = "") -> tuple[list[int], list[float], bool]:
            threads.clear()
            asked = SearchRequest(vectors=np.array([[7.2, 0]] * count, np.float32), limit=3)
            result = await database.search("default", "c", asked, ReadOptions(filter=filter, output_fields=["number"]))
            return result.rows.batch.columns[ID].to_list(), np.round(result.scores, 4).tolist(), bool(threads)

        await database.create_collection("default", request())
        await database.insert("default", "c", rows(list(range(20))))
        for filter in ("", "number == 1"):
            keys, scores, _ = await nearest(filter=filter)
            assert keys == [7, 8, 6]
            assert await nearest(filter=filter) == (keys, scores, False)
        await database.upsert("default", "c", rows([8], number=2))
        await database.delete("default", "c", "id == 7", {})
        assert await nearest() == ([8, 6, 9], np.round(np.array([0.64, 1.44, 3.24], np.float32), 4).tolist(), False)
        keys, _, threaded = await nearest(filter="number == 1")
        assert keys == [6, 9, 5] and not threaded
        monkeypatch.setattr("storage.search.COMPONENTS_BRIEF_MAX", 100)
        assert (await nearest())[2] is False
        assert (await nearest(count=5))[2] is True

    on_a_node(script)


def test_racing_partial_upserts_lose_nothing() -> None:
    """Twenty writers that each set a key of their own in one row all succeed, and all keys are there."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        await database.insert("default", "c", rows([1]))
        parts = [rows([1], meta=f'{{"k{i}":{i}}}').select([ID, META]) for i in range(8)]
        await asyncio.gather(*(database.upsert("default", "c", part, partial=True) for part in parts))
        ((_, meta),) = (await found(database)).values()
        assert all(f'"k{i}":{i}' in meta for i in range(8))

    on_a_node(script)


@pytest.mark.parametrize("shards", [1, 3])
def test_upsert_of_generated_keys_replaces_under_fresh_ones(shards: int) -> None:
    """On an autoID collection the old row goes and the new one gets another key, as in Milvus."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request(fields=fields(auto_id=True), shards=shards))
        first = await database.insert("default", "c", rows([0, 0, 0]).select([VECTOR, NUMBER, META]))
        keys = [int(key) for key in first.primary_keys]
        assert len(set(keys)) == 3
        second = await database.upsert("default", "c", rows([keys[1]], number=5))
        (fresh,) = (int(key) for key in second.primary_keys)
        assert set(await found(database)) == {keys[0], keys[2], fresh} and fresh not in keys

    on_a_node(script)


def test_partition_key_spreads_one_request_that_stays_whole() -> None:
    """Rows go to hidden partitions by the hash of the key; one request is one message a shard."""

    async def script(database: Database, clock: SimClock) -> None:
        key = FieldSchema("tenant", DataType.INT64, partition_key=True)
        await database.create_collection("default", request(fields=[*fields()[:2], key], partitions=4))
        batch = rows(list(range(40)))
        tenants = ScalarColumn(np.arange(40, dtype=np.int64) % 10)
        batch = Batch({**batch.columns, NUMBER: tenants}, 40)
        result = await database.insert("default", "c", batch)
        assert result.rows == 40 and len(await found(database, "tenant == 3")) == 4
        assert await database.list_partitions("default", "c") == [f"_default_{i}" for i in range(4)]
        status = await database.status()
        assert sum(shard["position"] > 10 for shard in status["shards"]) == 0  # no message a partition

    on_a_node(script)


def test_rows_expire_and_their_room_comes_back() -> None:
    """With collection.ttl.seconds a row is gone for readers when its time is up, and for the disk after compaction."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request(properties={"collection.ttl.seconds": "100"}))
        await database.insert("default", "c", rows([1, 2]))
        await asyncio.sleep(60)
        await database.insert("default", "c", rows([3]))
        assert set(await found(database)) == {1, 2, 3}
        await asyncio.sleep(50)
        assert set(await found(database)) == {3}
        hits = await database.search("default", "c", SearchRequest(np.zeros((1, 2), np.float32)), ReadOptions())
        assert hits.rows.batch.columns[ID].to_list() == [3]
        part = rows([1], meta="{}").select([ID, META])
        with pytest.raises(BadRow, match="row 1 does not exist"):
            await database.upsert("default", "c", part, partial=True)
        await database.flush("default", "c")
        await database.compact("default", "c")
        await asyncio.sleep(20)
        (collection,) = (await database.status())["collections"]
        assert collection["rows"] == 1

    on_a_node(script)


def test_release_frees_and_load_brings_back() -> None:
    """A released collection refuses reads, takes writes and deletes, and after loading answers as if nothing was."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        await database.insert("default", "c", rows([1, 2, 3]))
        await database.flush("default", "c")
        await database.release("default", "c")
        assert await database.load_state("default", "c") == (LoadState.NOT_LOADED, 0)
        with pytest.raises(CollectionNotLoaded):
            await found(database)
        assert await database.delete("default", "c", "id == 2", {}) == 1
        await database.insert("default", "c", rows([4]))
        assert await database.row_count("default", "c") == 3
        await database.load("default", "c")
        assert set(await found(database)) == {1, 3, 4}
        await asyncio.sleep(5)
        assert await database.load_state("default", "c") == (LoadState.LOADED, 100)

    on_a_node(script)


def test_partitions_are_loaded_and_read_on_their_own() -> None:
    """Reading a partition that is not loaded is refused by name; without names the loaded ones are read."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request(load=False))
        await database.create_partition("default", "c", "p")
        await database.insert("default", "c", rows([1]))
        await database.insert("default", "c", rows([2]), "p")
        await database.load("default", "c", ["p"])
        assert set(await found(database)) == {2}
        with pytest.raises(PartitionNotLoaded, match="_default"):
            options = replace(EVERYTHING, partitions=["_default"])
            await database.query("default", "c", options, limit=10, offset=0)
        assert await database.row_count("default", "c", "_default") == 1

    on_a_node(script)


def test_ten_creators_at_once_all_succeed() -> None:
    """The same collection created by ten callers at once is created once; another one of the name is refused."""

    async def script(database: Database, clock: SimClock) -> None:
        await asyncio.gather(*(database.create_collection("default", request()) for _ in range(10)))
        assert await database.list_collections("default") == ["c"]

    on_a_node(script)


def test_explain_says_what_was_done() -> None:
    """Each segment appears with its plan and the reason, only if asked for."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        await database.insert("default", "c", rows(list(range(10))))
        await database.flush("default", "c")
        asked = SearchRequest(np.zeros((1, 2), np.float32), limit=3)
        plain = await database.search("default", "c", asked, ReadOptions(filter="id > 4"))
        told = await database.search("default", "c", asked, ReadOptions(filter="id > 4", explain=True))
        assert plain.rows.explain == ()
        (step,) = told.rows.explain
        assert (step["rows"], step["survivors"], step["plan"]) == (10, 5, "exact") and step["why"]
        assert told.rows.batch.columns[ID].to_list() == [5, 6, 7]

    on_a_node(script)


def test_delete_without_a_filter_is_refused() -> None:
    """An empty filter would delete everything: the error names what to use instead."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        with pytest.raises(FilterError, match="collections/truncate"):
            await database.delete("default", "c", " ", {})

    on_a_node(script)


def test_concurrent_searches_share_a_call_and_not_their_answers() -> None:
    """Searches gathered into one call of the engine each get their own rows, also with several vectors and offsets."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        await database.insert("default", "c", rows(list(range(50))))

        async def one(start: int, count: int, offset: int) -> None:
            vectors = np.array([[start + i, 0] for i in range(count)], np.float32)
            result = await database.search(
                "default", "c", SearchRequest(vectors, limit=2, offset=offset), ReadOptions(output_fields=["number"])
            )
            assert list(result.topks) == [2] * count and len(result.scores) == 2 * count
            ids = result.rows.batch.columns[ID].to_list()
            if offset == 0:
                assert ids[::2] == [start + i for i in range(count)]
            else:
                assert all(abs(key - start - i // 2) <= 2 for i, key in enumerate(ids))

        await asyncio.gather(*(one(start, 1 + start % 3, start % 2) for start in range(5, 40)))

    on_a_node(script)


def test_a_name_is_not_denied_by_who_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off from who leads the catalogue, a node says of a name that it does not know that it cannot tell; one that
    it knows it describes, and does not say whether it is still there."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request("known"))
        node: Any = database._node
        monkeypatch.setattr(node, "mesh", object())
        monkeypatch.setattr(node.router, "refresh_catalog", _cut_off)
        assert (await database.describe_collection("default", "known")).name == "known"
        with pytest.raises(NoLeader, match="whether collection known exists cannot be told"):
            await database.has_collection("default", "known")
        for asked in (database.has_collection, database.describe_collection, database.collection_schema):
            with pytest.raises(NoLeader, match="cannot be had"):
                await asked("default", "unknown")
        monkeypatch.undo()
        assert not await database.has_collection("default", "unknown")
        with pytest.raises(CollectionNotFound):
            await database.collection_schema("default", "unknown")

    on_a_node(script)


async def _cut_off(**_: float) -> bool:
    return False


def test_a_node_that_stops_does_not_wait_for_ever() -> None:
    """What goes on in the background and no client waits for is cancelled when it outlasts the stop."""
    tasks: list[asyncio.Task[None]] = []

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    async def script(database: Database, clock: SimClock) -> None:
        tasks.append(asyncio.get_running_loop().create_task(never()))
        database._node.keep(tasks[0])

    on_a_node(script)
    assert tasks[0].cancelled()


def test_a_token_of_another_cluster_is_refused_and_one_of_this_node_is_not() -> None:
    """On a node alone too: what it gave it takes back; what is ahead of its clock it cannot have given."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        scope = Scope(clock.monotonic_s() + 5)
        current.set(scope)
        await database.insert("default", "c", rows([1, 2]))
        assert set(await found(database)) == {1, 2}
        assert list(scope.read_at) == list(scope.seen) and scope.seen
        shard_id, tick = next(iter(scope.seen.items()))
        scope.seen[shard_id] = Tick(tick + (3_600_000 << LOGICAL_BITS))
        with pytest.raises(NotFresh, match="of another cluster"):
            await found(database)
        scope.seen[shard_id] = Tick(tick + (30_000 << LOGICAL_BITS))
        with pytest.raises(NotFresh, match=r"no replica of shard . answers that is as fresh as asked for"):
            await found(database)
        assert set(await found(database, consistency=Consistency.EVENTUALLY)) == {1, 2}

    on_a_node(script)
