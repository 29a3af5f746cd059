"""Requests to any node of a cluster: what is written through one is read through another, at the level asked for."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from node.node import Node
from node.scope import from_token, to_token
from node.service import HybridRequest, IndexState, ReadOptions, SearchRequest, SubSearch
from storage.errors import (
    ChunkDamaged,
    CollectionNotFound,
    InvalidParameter,
    NoLeader,
    NotFresh,
    OutcomeUnknown,
    SnapshotGone,
)
from storage.fusion import ReciprocalRank
from storage.types import ShardId
from tests.node.cluster_of import BOUNDED, EVENTUALLY, SESSION, STRONG, Site, on_a_cluster
from tests.node.test_database import ID, META, fields, request, rows

S0 = ShardId(0)


@pytest.mark.parametrize(("nodes", "shards"), [(3, 2), (5, 3)])
def test_a_write_through_any_node_is_read_strongly_through_any(nodes: int, shards: int) -> None:
    """Also where neither node holds the shard."""

    async def script(site: Site) -> None:
        await site.create("n2", shards=shards)
        ids: list[int] = []
        for i, writer in enumerate(site.world.machines):
            mine = list(range(100 * i, 100 * i + 20))
            assert await site.insert(writer, mine) == 20
            ids += mine
            for reader in site.world.machines:
                assert sorted(await site.found(reader, STRONG)) == ids

    on_a_cluster(script, nodes=nodes, shards=shards)


def test_every_kind_of_request_through_a_node_without_the_shard() -> None:
    """Searches, queries, gets, counts, deletes, upserts and partial upserts give what a replica's node gives."""

    async def script(site: Site) -> None:
        await site.create(shards=3)
        many = list(range(60))
        await site.insert("n1", many)
        for name in site.world.machines:
            one = await site.ask(name, lambda db: db.delete("default", "c", "id in {some}", {"some": [3, 4]}))
            assert one == (2 if name == "n1" else 0)
        await site.ask("n5", lambda db: db.upsert("default", "c", rows([7, 8], number=9)))
        part = rows([9, 10], meta='{"k":1}').select([ID, META])
        await site.ask("n4", lambda db: db.upsert("default", "c", part, partial=True))
        options = ReadOptions(output_fields=["*"], consistency=STRONG)
        near = SearchRequest(np.array([[6.2, 0], [50.4, 0]], np.float32), limit=5, offset=1)
        evens = SubSearch(replace(near, limit=4, offset=0), "id % 2 == 0")
        both = HybridRequest([SubSearch(near, "id > {least}", {"least": 7}), evens], ReciprocalRank(), 3)
        counting = replace(options, output_fields=["count(*)"], filter="number == 9")
        answers = []
        for name in site.world.machines:
            found = await site.ask(name, lambda db: db.search("default", "c", near, options))
            page = await site.ask(name, lambda db: db.query("default", "c", options, limit=5, offset=4))
            got = await site.ask(name, lambda db: db.get("default", "c", [10, 3, 9, 0], options))
            count = await site.ask(name, lambda db: db.query("default", "c", counting, limit=0, offset=0))
            total = await site.ask(name, lambda db: db.row_count("default", "c"))
            assert found.rows.batch.columns[ID].to_list() == [7, 5, 8, 9, 10, 51, 49, 52, 48, 53]
            assert found.topks == [5, 5]
            hybrid = await site.ask(name, lambda db: db.hybrid_search("default", "c", both, options))
            assert hybrid.rows.batch.columns[ID].to_list() == [10, 6, 9, 52, 48, 50]
            assert hybrid.topks == [3, 3]
            assert page.batch.columns[ID].to_list() == [6, 7, 8, 9, 10]
            assert got.batch.columns[ID].to_list() == [0, 9, 10]
            assert got.batch.columns[META].to_list() == ["{}", '{"k":1}', '{"k":1}']
            assert (count.count, total) == (2, 58)
            answers.append((found.rows.batch.to_bytes(), found.scores.tolist(), page.batch.to_bytes()))
        assert all(one == answers[0] for one in answers)

    on_a_cluster(script, nodes=5, shards=3)


def test_a_session_token_lets_another_node_show_what_was_written() -> None:
    """A replica that lags does not answer a reader who has seen more; to one that does not care it answers at once."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", [1])
        leader = site.leader_of(site.node("n1").catalog.find("default", "c").shards[0])
        late, writer = site.others(leader)
        assert sorted(await site.found(late, STRONG)) == [1]
        site.world.wire.cut(leader, late)
        scope = site.scope(writer)
        await site.insert(writer, [2], scope=scope)
        token = to_token(scope.seen)
        reading = site.scope(late)
        reading.seen = from_token(token, "token")
        began_s = site.world.loop.now_s
        assert sorted(await site.found(late, EVENTUALLY)) == [1]
        assert sorted(await site.found(late, BOUNDED)) == [1]
        assert site.world.loop.now_s - began_s < 0.1
        assert sorted(await site.found(late, SESSION, scope=reading)) == [1, 2]
        assert sorted(await site.found(late, None, scope=reading)) == [1, 2]
        assert site.world.loop.now_s - began_s < 1.5
        assert reading.seen == scope.seen

    on_a_cluster(script)


def test_a_session_never_reads_backwards() -> None:
    """Reads on different nodes with one token see at least what the ones before them saw, while rows come in."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        rng, done = Random(5), asyncio.Event()

        async def write() -> None:
            for i in range(40):
                await site.insert(rng.choice(["n1", "n2", "n3"]), [i])
            done.set()

        writing = asyncio.ensure_future(write())
        seen = 0
        scope = site.scope("n1")
        while not done.is_set():
            now = len(await site.found(rng.choice(["n1", "n2", "n3"]), SESSION, scope=scope))
            assert now >= seen
            seen = now
        await writing

    on_a_cluster(script)


def test_bounded_reads_go_on_without_the_leader_and_strong_ones_soon_after() -> None:
    """Whoever has a replica answers a Bounded read at once; a Strong one waits for the next leader."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", [1, 2])
        await asyncio.sleep(0.5)
        leader = site.leader_of(site.node("n1").catalog.find("default", "c").shards[0])
        site.kill(leader)
        began_s = site.world.loop.now_s
        for name in site.others(leader):
            assert sorted(await site.found(name, BOUNDED)) == [1, 2]
        assert site.world.loop.now_s - began_s < 0.2
        assert sorted(await site.found(site.others(leader)[0], STRONG)) == [1, 2]
        assert site.world.loop.now_s - began_s < 4

    on_a_cluster(script)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_writes_across_a_change_of_leader_are_made_once(seed: int) -> None:
    """Every acknowledged row is there once, also those whose leader died before it answered."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        leader = site.leader_of(site.node("n1").catalog.find("default", "c").shards[0])
        writers = site.others(leader)
        acknowledged: list[int] = []

        async def write(number: int) -> None:
            for i in range(30):
                key = 1_000 * number + i
                await site.insert(writers[number % 2], [key])
                acknowledged.append(key)

        writing = asyncio.gather(*(write(number) for number in range(6)))
        while len(acknowledged) < 40:  # noqa: ASYNC110  (time is virtual)
            await asyncio.sleep(0.001)
        site.kill(leader)
        await writing
        assert sorted(await site.found(writers[0], STRONG)) == sorted(acknowledged)
        options = ReadOptions(output_fields=["count(*)"], consistency=STRONG)
        counted = await site.ask(writers[1], lambda db: db.query("default", "c", options, limit=0, offset=0))
        assert counted.count == len(acknowledged) == 180

    on_a_cluster(script, seed=seed)


def test_without_a_majority_the_client_hears_which_shard_and_whether_something_was_done() -> None:
    """Writes and Strong reads name the shard; Eventually answers; Bounded answers as long as it can keep its word."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", [1])
        await asyncio.sleep(0.5)
        shard = site.node("n1").catalog.find("default", "c").shards[0]
        leader = site.leader_of(shard)
        alone = site.others(leader)[0]
        for name in site.others(alone):
            site.kill(name)
        assert sorted(await site.found(alone, BOUNDED)) == [1]
        with pytest.raises((NoLeader, OutcomeUnknown), match=f"shard {shard}"):
            await site.insert(alone, [2])
        with pytest.raises(NoLeader, match=f"shard {shard} has no leader .* which a Strong read needs"):
            await site.found(alone, STRONG, within_s=3)
        with pytest.raises(NotFresh, match=f"no replica of shard {shard} answers that is as fresh"):
            await site.found(alone, BOUNDED, within_s=3)
        assert sorted(await site.found(alone, BOUNDED, staleness_s=3600.0)) == [1]
        assert sorted(await site.found(alone, EVENTUALLY)) == [1]

    on_a_cluster(script)


def test_a_leader_that_is_cut_off_neither_answers_strongly_nor_keeps_a_write_to_itself() -> None:
    """Its clients hear that the outcome is not known; once it is back it shows what the others have decided."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", [1])
        leader = site.leader_of(site.node("n1").catalog.find("default", "c").shards[0])
        others = site.others(leader)
        site.world.wire.cut_apart([leader], others)
        writing = asyncio.ensure_future(site.ask(leader, lambda db: db.insert("default", "c", rows([2])), within_s=3))
        await asyncio.sleep(2)  # past its lease
        await site.insert(others[0], [3])
        with pytest.raises(OutcomeUnknown):
            await writing
        with pytest.raises(NoLeader):
            await site.found(leader, STRONG, within_s=3)
        site.world.wire.mend()
        await asyncio.sleep(3)
        found = sorted(await site.found(leader, STRONG))
        assert found in ([1, 3], [1, 2, 3])

    on_a_cluster(script)


def test_a_slow_replica_is_hedged() -> None:
    """A node without the shard does not wait for a replica whose answers have become slow."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", [1])
        shard = site.node("n1").catalog.find("default", "c").shards[0]
        replicas = site.node("n1").replicas_of(shard)
        outside = site.others(*replicas)[0]
        for _ in range(6):
            await site.found(outside, EVENTUALLY)
        site.world.wire.path(replicas[0], outside).delay_s = 20.0
        for _ in range(6):
            began_s = site.world.loop.now_s
            assert sorted(await site.found(outside, EVENTUALLY)) == [1]
            assert site.world.loop.now_s - began_s < 0.5

    on_a_cluster(script, nodes=5)


def test_pages_with_a_snapshot_token_fit_together() -> None:
    """Rows that come, change or go between two pages do not show; once compaction has removed them it says so."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        await site.insert("n1", list(range(20)))
        everything = ReadOptions(output_fields=["id"], consistency=STRONG)
        scope = site.scope("n2")

        async def page(name: str, offset: int) -> list[int]:
            scope.deadline_s = site.scope(name).deadline_s
            found = await site.ask(
                name, lambda db: db.query("default", "c", everything, limit=5, offset=offset), scope=scope
            )
            keys: list[int] = found.batch.columns[ID].to_list()
            return keys

        assert await page("n2", 0) == [0, 1, 2, 3, 4]
        scope.at = from_token(to_token(scope.read_at), "token")
        await site.ask("n1", lambda db: db.delete("default", "c", "id < 10", {}))
        await site.insert("n3", [-1, 100])
        for name in site.world.machines:
            assert await page(name, 5) == [5, 6, 7, 8, 9]
        assert await page("n1", 15) == [15, 16, 17, 18, 19]
        assert sorted(await site.found("n1", STRONG)) == [-1, *range(10, 20), 100]
        await site.ask("n3", lambda db: db.flush("default", "c"))
        job = await site.ask("n3", lambda db: db.compact("default", "c"))
        for _ in range(300):
            if (await site.ask("n1", lambda db: db.compaction_state(job)))[0] == "Completed":
                break
            await asyncio.sleep(0.1)
        with pytest.raises(SnapshotGone, match="begin again without the snapshot token"):
            await page("n1", 5)
        scope.at = {}
        with pytest.raises(InvalidParameter, match="says nothing about shard"):
            await page("n1", 5)

    on_a_cluster(script)


def test_the_catalogue_is_the_same_at_every_node() -> None:
    """What one node was told about collections, every other node knows when the answer is out; a repeat is harmless."""

    async def script(site: Site) -> None:
        for i, name in enumerate(site.world.machines):
            await site.create(name, name=f"c{i}")
            for other in site.world.machines:
                names = await site.ask(other, lambda db: db.list_collections("default"))
                assert sorted(names) == [f"c{j}" for j in range(i + 1)]
        await site.create("n5", name="c0")
        await site.ask("n3", lambda db: db.insert("default", "c0", rows([1, 2])))
        await site.ask("n4", lambda db: db.flush("default", "c0"))
        collection_id = site.node("n1").catalog.find("default", "c0").collection_id
        for name in site.world.machines:
            info = await site.ask(name, lambda db: db.describe_collection("default", "c0"))
            (index,) = info.indexes
            assert (index.total_rows, info.load_percent) == (2, 100)
            assert index.state in (IndexState.FINISHED, IndexState.IN_PROGRESS)
            segments = await site.ask(name, lambda db: db.describe_segments(collection_id, []))
            assert [one["numRows"] for one in segments] == [2]
        await site.ask("n2", lambda db: db.drop_collection("default", "c0"))
        for name in site.world.machines:
            with pytest.raises(CollectionNotFound):
                await site.ask(name, lambda db: db.insert("default", "c0", rows([1])))
        await site.ask("n1", lambda db: db.create_database("d", {}))
        assert all(["d" in await site.ask(name, lambda db: db.list_databases()) for name in site.world.machines])

    on_a_cluster(script, nodes=5)


def test_generated_keys_of_different_nodes_differ() -> None:
    """Rows inserted at the same moment through all nodes get keys that no other row has."""

    async def script(site: Site) -> None:
        made = replace(request(), fields=fields(auto_id=True))
        await site.ask("n1", lambda db: db.create_collection("default", made))
        batch = rows([0] * 50)
        without = batch.select([one for one in batch.columns if one != ID])
        results = await asyncio.gather(
            *(
                site.ask(name, lambda db: db.insert("default", "c", without))
                for name in site.world.machines
                for _ in "123"
            )
        )
        keys = [key for one in results for key in np.asarray(one.primary_keys).tolist()]
        assert len(set(keys)) == len(keys) == 450
        assert len(await site.found("n2", STRONG)) == 450

    on_a_cluster(script)


def test_partial_upserts_through_different_nodes_lose_nothing() -> None:
    """Writers that each set a key of their own in one row, through all nodes, all succeed, and all keys are there."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        await site.insert("n1", [1])

        async def upsert(i: int, name: str) -> None:
            part = rows([1], meta=f'{{"k{i}":{i}}}').select([ID, META])
            await site.ask(name, lambda db: db.upsert("default", "c", part, partial=True))

        await asyncio.gather(*(upsert(i, name) for i, name in enumerate(["n1", "n2", "n3"] * 2)))
        options = ReadOptions(output_fields=["*"], consistency=STRONG)
        found = await site.ask("n2", lambda db: db.get("default", "c", [1], options))
        (meta,) = found.batch.columns[META].to_list()
        assert all(f'"k{i}":{i}' in meta for i in range(6))

    on_a_cluster(script)


def test_a_damaged_replica_lets_another_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one node cannot read from its disk it does not deny its clients while another has it."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        await site.insert("n1", list(range(10)))
        real = Node.read

        async def broken(node: Node, function: Any, *args: Any) -> Any:
            if node.name == "n2":
                raise ChunkDamaged("a chunk is not what its digest says")
            return await real(node, function, *args)

        monkeypatch.setattr(Node, "read", broken)
        assert sorted(await site.found("n2", STRONG)) == list(range(10))
        assert sorted(await site.found("n2", EVENTUALLY)) == list(range(10))

    on_a_cluster(script)
