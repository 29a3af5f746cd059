"""The shard's state machine against a list of rows: whatever is said, in whatever order, and on every replica."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.message import (
    Insert,
    Seal,
)
from storage.schema import DataType
from storage.types import CollectionId, PartitionId, SegmentId
from tests.cluster.shards import SHARD, Step, World, hold, rows_of, script, summary, take

C, P = CollectionId(10), PartitionId(1)
S1 = SegmentId(SHARD << 40 | 1)


def world_with(*steps: Step, pk: DataType = DataType.INT64) -> World:
    world = World(pk, "L2")
    for step in [("create", 10), ("create_partition", 10, 2), ("create_index", 10, 1), *steps]:
        take(world, step)
    return world


FLUSHED: Sequence[Step] = (("insert", 10, 1, [1, 2, 3], 0), ("seal", 10, None), ("flush", 10, 0, True))


@settings(phases=[Phase.generate])
@given(
    pk=st.sampled_from([DataType.INT64, DataType.VARCHAR]),
    metric=st.sampled_from(["L2", "COSINE"]),
    seed=st.integers(0, 1 << 32),
)
def test_rows_equal_the_model(pk: DataType, metric: str, seed: int) -> None:
    """After every message each live row is in exactly one segment with its values and tick, no dead one shows, chunks
    are counted right, and the replica that was handed everything equals the one that read chunks."""

    def run(steps: Sequence[Step]) -> None:
        world = World(pk, metric)
        for step in steps:
            take(world, step)
            world.check()
            assert summary(world.first) == summary(world.second)
            assert world.first.digests == world.second.digests
            assert world.first.garbage == world.second.garbage

    hold(script(Random(seed), 80), run)


def test_an_insert_of_no_rows_makes_no_segment() -> None:
    """No segment is without rows: there would be nothing to seal, flush or merge."""
    world = world_with()
    empty = rows_of(world, [1], 0).slice(0, 0).to_bytes()
    world.expect({"rows": 0, "deleted": 0}, Insert(C, P), empty)
    world.expect({"segments": []}, Seal(C))
    world.check()
