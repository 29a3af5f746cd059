"""The digest of a state: equal where replicas are equal, however they came there, and different where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.catalog import CreateDatabase
from cluster.checkpoint import freeze, install, restore, unsave, write
from cluster.control import Control
from cluster.digest import state_digest
from cluster.message import CompareState, Entry, Message
from cluster.shard import Shard
from storage.schema import DataType
from storage.types import CollectionId, Position, Tick
from tests.cluster.shards import SHARD, Step, World, hold, script, take

C = CollectionId(10)


def digest(shard: Shard) -> bytes:
    return state_digest(freeze(shard))


@settings(phases=[Phase.generate], deadline=None, max_examples=40)
@given(
    pk=st.sampled_from([DataType.INT64, DataType.VARCHAR]),
    metric=st.sampled_from(["L2", "COSINE"]),
    seed=st.integers(0, 1 << 32),
)
def test_equal_logs_give_equal_digests(pk: DataType, metric: str, seed: int) -> None:
    """Whether a replica was handed products or read chunks, has taken checkpoints or was restored from one."""

    def run(steps: Sequence[Step]) -> None:
        world = World(pk, metric)
        for number, step in enumerate(steps):
            take(world, step)
            if number % 5 == 0:
                assert digest(world.first) == digest(world.second)
                install(world.first, write(freeze(world.first), world.store))
                assert digest(world.first) == digest(world.second) == digest(restore(SHARD, world.store))

    hold(script(Random(seed), 60), run)


def forget_a_row(shard: Shard) -> None:
    next(iter(shard.collections[C].segments())).delete(np.array([1, 4], np.int64), Tick(shard.tick + 1))


def lose_a_segment(shard: Shard) -> None:
    shard.collections[C].stored.popitem()


def miss_a_property(shard: Shard) -> None:
    shard.collections[C].properties = {"collection.ttl.seconds": "1"}


def release(shard: Shard) -> None:
    shard.collections[C].loaded = frozenset()


def be_elsewhere(shard: Shard) -> None:
    shard.position = Position(shard.position + 1)


def forget_an_outcome(shard: Shard) -> None:
    shard._outcomes.popitem()


def count_on(shard: Shard) -> None:
    shard.next_segment += 1


@pytest.mark.parametrize(
    "change",
    [forget_a_row, lose_a_segment, miss_a_property, release, be_elsewhere, forget_an_outcome, count_on],
)
def test_every_difference_shows(change: Callable[[Shard], None]) -> None:
    """One row, one property, one outcome is enough."""
    world = World(DataType.INT64, "L2")
    for step in [
        ("create", 10), ("insert", 10, 1, [1, 2, 3], 0), ("load", 10, None), ("seal", 10, None), ("flush", 10, 0, True),
        ("insert", 10, 1, [4, 5], 0),
    ]:  # fmt: skip
        take(world, step)
    before = digest(world.first)
    assert before == digest(world.first) == digest(world.second)
    change(world.second)
    assert digest(world.second) != before


def test_the_catalogue_has_a_digest_too() -> None:
    """Equal logs of the control group give equal digests; a database more does not."""

    def control(*messages: Message) -> Control:
        made = Control(2)
        for number, message in enumerate(messages, 1):
            made.apply(Position(number), Entry("p", number, Tick(1000 + number), message))
        return made

    first, second = (control(CreateDatabase("a", {}), CompareState()) for _ in range(2))
    assert state_digest(first.freeze()) == state_digest(second.freeze())
    assert state_digest(Control.restore(first.checkpoint()).freeze()) == state_digest(first.freeze())
    assert state_digest(control(CreateDatabase("b", {}), CompareState()).freeze()) != state_digest(first.freeze())


def test_comparing_changes_nothing_but_the_position() -> None:
    """A `CompareState` is answered, and leaves rows, segments and background work as they are."""
    world = World(DataType.INT64, "L2")
    for step in [("create", 10), ("insert", 10, 1, [1, 2, 3], 0)]:
        take(world, step)
    changes, segments = world.first.changes, world.first.next_segment
    assert world.say(CompareState())[0] == {}
    assert (world.first.changes, world.first.next_segment) == (changes, segments)
    assert digest(world.first) == digest(world.second)


def test_what_a_checkpoint_wrote_of_its_own_is_written_anew() -> None:
    """When a chunk of growing rows or of deletes is forgotten, the next checkpoint has all of them again."""
    world = World(DataType.INT64, "L2")
    for step in [("create", 10), ("insert", 10, 1, [1, 2, 3], 0)]:
        take(world, step)
    shard, store = world.first, world.store
    install(shard, write(freeze(shard), store))
    take(world, ("insert", 10, 1, [4, 5], 0))
    take(world, ("delete", 10, [1], None))
    install(shard, write(freeze(shard), store))
    known = sorted(shard.digests)
    assert len(known) > 2
    for one in known:
        if one not in shard.digests:
            continue
        store.delete_chunks(SHARD, [one])
        assert unsave(shard, one)
        install(shard, write(freeze(shard), store))
        assert digest(restore(SHARD, store)) == digest(shard)
        assert not shard.garbage & shard.digests.keys()
    assert not unsave(shard, b"\0" * 16)
