"""Changes of the catalogue that shards must see, on a cluster whose shards are sometimes away."""

from __future__ import annotations

import asyncio

import pytest

from cluster import machine
from cluster.catalog import Task
from cluster.ddl import BeginDdl
from cluster.message import TruncateCollection
from node.service import Consistency
from storage.errors import AnnulusError
from storage.types import ShardId
from tests.node.cluster_of import Site, on_a_cluster


def test_a_change_goes_on_when_a_shard_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client has long been told that the outcome is not known, and nobody asks again or leads anew."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        await site.insert("n1", list(range(8)))
        leader = next(name for name in ("n1", "n2", "n3") if site.node(name).control.is_leader)
        node = site.node(leader)
        refusals = 1

        tell = node.broadcaster.tell

        async def refuse(shard_id: ShardId, message: object, task: Task) -> None:
            nonlocal refusals
            if refusals:
                refusals -= 1
                raise AnnulusError("the shard has no leader")
            await tell(shard_id, message, task)  # type: ignore[arg-type]

        monkeypatch.setattr(node.broadcaster, "tell", refuse)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await node.broadcaster.carry_out(BeginDdl("truncate_collection", "default", "c", {}))
        assert node.catalog.tasks
        async with asyncio.timeout(10):
            while node.catalog.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await site.found("n2", Consistency.STRONG) == {}

    on_a_cluster(script)


def test_a_change_that_another_has_finished_needs_nothing() -> None:
    """Who wants to finish a drop when the collection is gone already finds nothing to do."""

    async def script(site: Site) -> None:
        await site.create()
        node = site.node(next(name for name in ("n1", "n2", "n3") if site.node(name).control.is_leader))
        task = Task(99, "drop_collection", next(iter(node.catalog.collections)), {})
        await node.broadcaster.carry_out(BeginDdl("drop_collection", "default", "c", {}))
        assert not node.catalog.collections
        await node.broadcaster.finish(task)

    on_a_cluster(script)


def test_a_shard_that_has_forgotten_what_it_was_told_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change is finished all the same, and rows that were written meanwhile stay."""
    monkeypatch.setattr(machine, "REMEMBERED_MAX", 2)

    async def script(site: Site) -> None:
        await site.create(shards=1)
        node = site.node("n1")
        collection = next(iter(node.catalog.collections.values()))
        (shard_id,) = collection.shards
        task = Task(99, "truncate_collection", collection.collection_id, {})
        for _ in range(2):
            await node.broadcaster.tell(shard_id, TruncateCollection(collection.collection_id), task)
            for key in range(4):
                await site.insert("n1", [key])
        assert len(await site.found("n1")) == 4

    on_a_cluster(script)
