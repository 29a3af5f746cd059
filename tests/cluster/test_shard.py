"""The shard's state machine against a list of rows: whatever is said, in whatever order, and on every replica."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.catalog import CreateDatabase
from cluster.checkpoint import freeze
from cluster.message import (
    AlterCollection,
    Compacted,
    CreateCollection,
    CreateIndex,
    Delete,
    Entry,
    Flushed,
    Indexed,
    Insert,
    Message,
    Seal,
    TruncateCollection,
)
from storage.columns import Batch
from storage.errors import ChunkDamaged, StorageFault
from storage.schema import DataType
from storage.segment_files import ChunkRef, SegmentFiles
from storage.types import CollectionId, FieldId, IndexId, PartitionId, Position, SegmentId, Tick
from tests.cluster.shards import SHARD, Step, World, hold, rows_of, script, summary, take
from tests.storage.rows import GROUP, PK, VECTOR

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


NUMBERS = np.array([1, 2], "<i8").tobytes()
SPEC: dict[str, Any] = World(DataType.INT64, "L2").spec.to_dict()


def rows(**changed: Any) -> bytes:
    """Return the bytes of two rows, some of whose columns are missing (None) or of another field's kind."""
    batch = rows_of(World(DataType.INT64, "L2"), [1, 2], 0)
    columns = dict(batch.columns)
    for name, source in changed.items():
        field = {"pk": PK, "group": GROUP, "vector": VECTOR, "extra": FieldId(250)}[name]
        if source is None:
            del columns[field]
        else:
            columns[field] = batch.columns[source]
    return Batch(columns, 2).to_bytes()


@pytest.mark.parametrize(
    ("message", "body", "code"),
    [
        pytest.param(Insert(C, P), b"", "bad_row", id="no rows at all"),
        pytest.param(Insert(C, P), rows()[:-8], "bad_row", id="rows cut short"),
        pytest.param(Insert(C, P), rows(pk=None), "bad_row", id="no primary keys"),
        pytest.param(Insert(C, P), rows(vector=None), "bad_row", id="a column is missing"),
        pytest.param(Insert(C, P), rows(extra=GROUP), "bad_row", id="a column too many"),
        pytest.param(Insert(C, P), rows(group=PK), "bad_row", id="a column of another width"),
        pytest.param(Insert(C, P), rows(group=VECTOR), "bad_row", id="vectors for numbers"),
        pytest.param(Insert(C, P, True, None, [0]), rows(), "bad_row", id="fewer preconditions than rows"),
        pytest.param(Insert(C, P, others=[(P, 3)]), rows(), "bad_row", id="more rows of another partition than rows"),
        pytest.param(Insert(C, P, others=[(P, -1)]), rows(), "bad_row", id="fewer rows than none"),
        pytest.param(Insert(C, P, others=[P]), rows(), "bad_row", id="no rows of another partition"),  # type: ignore
        pytest.param(Insert(C, P, schema_version=2), rows(), "schema_mismatch", id="rows of another schema"),
        pytest.param(AlterCollection(C, {}, {"fields": 1}), b"", "invalid_parameter", id="no schema to change to"),
        pytest.param(Insert(C, P, True, ["a"]), rows(), "bad_primary_key", id="text for integer keys of an upsert"),
        pytest.param(Insert(C, P, True, [1 << 63]), rows(), "bad_primary_key", id="a key beyond int64"),
        pytest.param(Delete(C, ["a"]), b"", "bad_primary_key", id="text for integer keys"),
        pytest.param(Delete(C, NUMBERS[:-1]), b"", "bad_primary_key", id="keys cut short"),
        pytest.param(CreateIndex(C, IndexId(9), VECTOR, {**SPEC, "engine": "x"}), b"", "invalid_parameter", id="spec"),
        pytest.param(CreateCollection(CollectionId(9), {}, [], {}), b"", "invalid_parameter", id="schema"),
        pytest.param(Flushed(C, S1, {"rows": 3}), b"", "invalid_parameter", id="flushed without fields"),
        pytest.param(Flushed(C, S1, SegmentFiles(2, {}).to_dict()), b"", "invalid_parameter", id="flushed other rows"),
        pytest.param(Indexed(C, S1, IndexId(1), []), b"", "invalid_parameter", id="index without files"),
        pytest.param(Compacted(C, [], Tick(0), Tick(0), SegmentFiles(0, {}).to_dict()), b"", {}, id="no inputs"),
        pytest.param(CreateDatabase("a", {}), b"", "bad_row", id="a message for another group"),
    ],
)
def test_a_malformed_message_is_refused(message: Message, body: bytes, code: Any) -> None:
    """Whatever a message says, applying it answers: one that raised would stop every replica for ever."""
    world = world_with(("insert", 10, 1, [1, 2, 3], 0), ("seal", 10, None))
    world.expect(code, message, body)
    world.check()
    text = world_with(("insert", 10, 1, [1, 2, 3], 0), ("seal", 10, None), ("flush", 10, 0, True), pk=DataType.VARCHAR)
    text.expect("bad_primary_key", Delete(C, NUMBERS))
    text.expect("bad_primary_key", Delete(C, [1]))  # type: ignore[list-item]
    text.check()


def test_a_compaction_that_leaves_no_rows_leaves_no_segment() -> None:
    """Not even where chunks of no rows were written for it."""
    world = world_with(("load", 10, None), *FLUSHED, ("delete", 10, [1, 2, 3], None))
    files = world.put_rows(rows_of(world, [1], 0).slice(0, 0), np.empty(0, np.int64))
    tick = world.first.tick
    world.expect({}, Compacted(C, [S1], tick, Tick(0), files.to_dict()))
    assert not world.first.collections[C].stored and not world.first.digests
    assert world.first.garbage >= set(files.digests)
    world.check()


def test_a_truncation_told_again_removes_nothing_that_came_since() -> None:
    """Its first outcome may be forgotten: by then a repeat counts as a message of its own. The next one counts."""
    world = world_with(*FLUSHED)
    world.expect({}, TruncateCollection(C, 7))
    world.model[C].rows.clear()
    take(world, ("insert", 10, 1, [4], 0))
    world.expect({}, TruncateCollection(C, 7))
    world.check()
    world.expect({}, TruncateCollection(C, 8))
    world.model[C].rows.clear()
    world.check()


def test_an_index_built_anew_takes_the_place_of_a_damaged_one() -> None:
    """The newest `Indexed` of a segment counts: otherwise a damaged index would be rebuilt for ever."""
    world = world_with(("load", 10, None), *FLUSHED, ("index", 10, 0, 1, 0, True))
    before = set(world.first.digests)
    world.index(10, 0, 1, salt=1, handed=True)
    stored = world.first.collections[C].stored[S1]
    assert not set(stored.indexes[IndexId(1)].digests) & before
    assert len(before - world.first.digests.keys()) == 1 and before - world.first.digests.keys() <= world.first.garbage
    world.check()
    world.index(10, 0, 1, salt=1, handed=False)  # the same bytes again
    assert set(stored.indexes[IndexId(1)].digests) <= world.first.digests.keys()
    world.check()


def test_a_fault_while_applying_is_not_forgotten() -> None:
    """A replica that met a fault applies nothing more and makes no checkpoint: its state is half of something. What it
    had before the message that it could not apply is untouched."""
    world = world_with(*FLUSHED)
    before = summary(world.first, machine=False)
    files = SegmentFiles(3, {PK: (ChunkRef(b"x" * 16, 3, 100),)})
    message = Compacted(C, [S1], world.first.tick, Tick(0), files.to_dict())
    position = Position(world.first.position + 5)
    entry = Entry("p", 1, Tick(0), message)
    with pytest.raises(ChunkDamaged):
        world.first.apply(position, entry)
    assert summary(world.first, machine=False) == before
    with pytest.raises(StorageFault, match="not applied"):
        world.first.apply(Position(position + 1), entry)
    with pytest.raises(StorageFault, match="not applied"):
        freeze(world.first)
