"""A follower that has only the log and its peers: prepared by the provisioner, it ends like the replica that led."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import cluster.shard
from cluster.message import Compacted, Entry, Flushed, Indexed
from cluster.shard import Shard
from node.provision import Provisioner
from storage.keys import chunk_key
from storage.schema import DataType
from storage.types import CollectionId, Position
from tests.cluster.shards import SHARD, Step, World, hold, script, summary, take
from tests.node.wire import Wire, WiredNode, held, simulated
from tests.sim.world import SimLoop, run

PRODUCTS = (Flushed, Indexed, Compacted)


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with simulated() as loop:
        yield loop


class Follower(WiredNode):
    """A replica that is given the log, entry by entry."""

    def __init__(self, name: str, wire: Wire, loop: SimLoop, replicas: Sequence[str], **options: Any) -> None:
        super().__init__(name, wire, loop, replicas, **options)
        self.shard = Shard(SHARD, lambda digest: self.store.get(SHARD, digest))
        transfer = self.transfer if len(replicas) > 1 else None
        self.provision = Provisioner(
            lambda: self.shard, transfer, self.store, self.executor, self.dice, self.pins,
            on_store_error=self.store_errors.append,
        )  # fmt: skip

    async def follow(self, log: Sequence[tuple[Position, bytes]]) -> None:
        for position, payload in log:
            entry = Entry.decode(payload)
            await self.provision(entry.message)
            assert not self.provision.waits_for
            reads = self.store.reads
            self.shard.apply(position, entry)
            if isinstance(entry.message, PRODUCTS):
                assert self.store.reads == reads, "applying reads nothing"
                assert not self.shard._handed_rows, "what was prepared is used"


def steps_of(world: World, steps: Sequence[Step]) -> None:
    for step in steps:
        take(world, step)


def leader(world: World, wire: Wire, loop: SimLoop, replicas: Sequence[str]) -> WiredNode:
    return WiredNode("n1", wire, loop, replicas, store=world.store)


@settings(phases=[Phase.generate], max_examples=30, deadline=None)
@given(pk=st.sampled_from([DataType.INT64, DataType.VARCHAR]), seed=st.integers(0, 1 << 32))
def test_a_follower_ends_like_its_leader(pk: DataType, seed: int) -> None:
    """From the log and what peers give, each message is applied without reading a chunk or preparing rows, and in the
    end the follower has the leader's state, and every chunk that it needs, whole."""

    def follow(steps: Sequence[Step]) -> None:
        world, wire = World(pk, "L2"), Wire()
        steps_of(world, steps)
        with simulated() as loop, pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster.shard, "prepare", None)
            patch.setattr(cluster.shard, "prepare_from_files", None)
            leader(world, wire, loop, ["n1", "n2"])
            follower = Follower("n2", wire, loop, ["n1", "n2"], seed=seed)
            run(loop, follower.follow(world.log))
        assert summary(follower.shard) == summary(world.first)
        assert held(follower.store, SHARD) >= follower.shard.digests.keys()

    hold(script(Random(seed), 80), follow)


FLUSHED: Sequence[Step] = [
    *[("create", 10), ("create_index", 10, 1), ("load", 10, None), ("insert", 10, 1, [1, 2, 3], 0)],
    *[("seal", 10, None), ("flush", 10, 0, True)],
]
INDEXED = [*FLUSHED, ("index", 10, 0, 1, 0, True)]
MERGED = [
    *[*INDEXED, ("insert", 10, 1, [4, 5], 0), ("delete", 10, [2], None), ("seal", 10, None), ("flush", 10, 0, True)],
    *[("compact", 10, 1, 2, [], True)],
]


def test_equal_rows_are_not_fetched(loop: SimLoop) -> None:
    """A flushed segment's chunks are made of the follower's own rows: nothing of them crosses the wire."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, FLUSHED)
    leader(world, wire, loop, ["n1", "n2"])
    follower = Follower("n2", wire, loop, ["n1", "n2"])
    wire.down = {"n1"}
    run(loop, follower.follow(world.log))
    assert summary(follower.shard) == summary(world.first)
    assert held(follower.store, SHARD) == follower.shard.digests.keys() and wire.calls.total() == 0


def test_rows_that_differ_are_taken_from_the_leader(loop: SimLoop, caplog: pytest.LogCaptureFixture) -> None:
    """A replica whose rows are not its leader's takes the leader's, and says so."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, FLUSHED)
    leader(world, wire, loop, ["n1", "n2"])
    follower = Follower("n2", wire, loop, ["n1", "n2"])
    run(loop, follower.follow(world.log[:-1]))
    (stored,) = follower.shard.collections[CollectionId(10)].stored.values()
    stored.segment._ticks = stored.segment._ticks + 1
    stored.segment._view = None
    run(loop, follower.follow(world.log[-1:]))
    assert "differs from its leader" in caplog.text
    assert summary(follower.shard) == summary(world.first)


def test_without_chunks_nothing_is_applied(loop: SimLoop, caplog: pytest.LogCaptureFixture) -> None:
    """While nobody answers who has the chunks, the replica waits, says so once, and goes on when they come."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, INDEXED)
    leader(world, wire, loop, ["n1", "n2"])
    follower = Follower("n2", wire, loop, ["n1", "n2"])
    wire.down = {"n1"}

    async def scenario() -> None:
        following = loop.create_task(follower.follow(world.log))
        await asyncio.sleep(100)
        assert not following.done() and follower.provision.waits_for
        assert follower.shard.position == world.log[-2][0]
        wire.down.clear()
        await following

    with caplog.at_level("INFO"):
        run(loop, scenario())
    assert caplog.text.count("replica lags") == 1 and caplog.text.count("replica goes on") == 1
    assert summary(follower.shard) == summary(world.first)


def test_a_full_disk_only_delays(loop: SimLoop) -> None:
    """A follower without room applies nothing that needs chunks; with room it goes on."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, MERGED)
    leader(world, wire, loop, ["n1", "n2"])
    follower = Follower("n2", wire, loop, ["n1", "n2"])
    follower.store.full = True

    async def scenario() -> None:
        following = loop.create_task(follower.follow(world.log))
        await asyncio.sleep(60)
        assert not following.done() and follower.store_errors
        follower.store.full = False
        follower.store.reopen()
        await following

    run(loop, scenario())
    assert summary(follower.shard) == summary(world.first)


@pytest.mark.parametrize("is_away", [False, True], ids=["all answer", "one is gone for good"])
def test_lost_chunks_do_not_stop_a_shard(loop: SimLoop, is_away: bool) -> None:
    """What every replica that answers lacks is not waited for: merged rows are merged again, an index is left to be
    built anew."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, MERGED)
    WiredNode("n1", wire, loop, ["n1", "n2", "n3"])
    WiredNode("n3", wire, loop, ["n1", "n2", "n3"])
    follower = Follower("n2", wire, loop, ["n1", "n2", "n3"])
    if is_away:
        wire.down = {"n3"}
    run(loop, asyncio.wait_for(follower.follow(world.log), 600))
    assert summary(follower.shard) == summary(world.first)
    index_digests = {
        digest
        for state in follower.shard.collections.values()
        for stored in state.stored.values()
        for blob in stored.indexes.values()
        for digest in blob.digests
    }
    assert held(follower.store, SHARD) >= follower.shard.digests.keys() - index_digests


def test_a_damaged_chunk_is_mended(loop: SimLoop) -> None:
    """A chunk that was shipped and has rotten since is fetched again before its message is applied."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, MERGED)
    leader(world, wire, loop, ["n1", "n2"])
    follower = Follower("n2", wire, loop, ["n1", "n2"])
    run(loop, follower.follow(world.log[:-1]))
    (stored,) = world.first.collections[CollectionId(10)].stored.values()
    assert stored.segment.files is not None
    run(loop, follower.transfer.fetch(SHARD, stored.segment.files.sizes))
    for digest in stored.segment.files.digests:
        follower.store.rot(chunk_key(SHARD, digest))
    run(loop, follower.follow(world.log[-1:]))
    assert summary(follower.shard) == summary(world.first)
    assert held(follower.store, SHARD) >= follower.shard.digests.keys()


def test_the_maker_of_a_product_does_nothing(loop: SimLoop) -> None:
    """What was handed over is not prepared again; other messages are none of its business."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, FLUSHED[:-1])
    follower = Follower("n2", wire, loop, ["n1", "n2"])
    run(loop, follower.follow(world.log))
    (stored,) = follower.shard.collections[CollectionId(10)].stored.values()
    message = Flushed(CollectionId(10), stored.segment.segment_id, {"nonsense": 1})
    follower.shard.hand_over_rows([stored.segment.segment_id], None)  # type: ignore[arg-type]
    run(loop, follower.provision(message))
    assert follower.shard.is_handed_over(message) and follower.store.chunk_digests(SHARD) == []


def test_a_lone_node_prepares_without_touching_chunks(loop: SimLoop) -> None:
    """A node without peers reads what its message names, and puts nothing."""
    world, wire = World(DataType.INT64, "L2"), Wire()
    steps_of(world, MERGED)
    lone = Follower("n1", wire, loop, ["n1"], store=world.store)
    before = set(world.store.chunk_digests(SHARD))
    world.store.full = True
    run(loop, lone.follow(world.log))
    assert summary(lone.shard) == summary(world.first)
    assert set(world.store.chunk_digests(SHARD)) == before
