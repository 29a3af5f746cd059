"""The shard's state machine against a list of rows: whatever is said, in whatever order, and on every replica."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from storage.schema import DataType
from tests.cluster.shards import Step, World, hold, script, summary, take


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
