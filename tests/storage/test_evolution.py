"""Segments whose rows are of another version of the schema than the one by which they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from index.engines import build
from index.metric import Metric
from index.spec import parse_index_spec
from storage.columns import Batch
from storage.compaction import CompactionSettings, choose, facts_of, merge
from storage.deletes import DeleteLog
from storage.errors import SchemaMismatch
from storage.evolution import with_dynamic_field, with_field, without_field
from storage.filter import compile_filter
from storage.growing import GrowingSegment
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.sealed import SealedSegment, prepare, prepare_from_files
from storage.search import count, fetch, find_keys, query
from storage.segment_files import SegmentFiles, write_segment
from storage.types import FieldId, PartitionId, SegmentId, Tick
from storage.view import SegmentView, absent_column
from tests.storage.rows import GROUP, NOTE, PK, VECTOR, make_collection, numbered

ROWS = 9
OLD = make_collection()
TICK, P = Tick(20), PartitionId(1)
ADDED = {
    "bool": (FieldSchema("x", DataType.BOOL, default=True), True, "x == true"),
    "int8": (FieldSchema("x", DataType.INT8, default=-7), -7, "x == -7"),
    "int64": (FieldSchema("x", DataType.INT64, default=1 << 40), 1 << 40, f"x in [{1 << 40}]"),
    "float": (FieldSchema("x", DataType.FLOAT, default=0.5), 0.5, "x > 0.4 and x < 0.6"),
    "double": (FieldSchema("x", DataType.DOUBLE, nullable=True, default=2), 2.0, "x == 2"),
    "text": (FieldSchema("x", DataType.VARCHAR, default="dé", max_bytes=9), "dé", 'x like "d%"'),
    "empty text": (FieldSchema("x", DataType.VARCHAR, default="", max_bytes=9), "", 'x == ""'),
    "no int32": (FieldSchema("x", DataType.INT32, nullable=True), None, "x is null"),
    "no text": (FieldSchema("x", DataType.VARCHAR, nullable=True, max_bytes=9), None, "x is null"),
    "no json": (FieldSchema("x", DataType.JSON, nullable=True), None, "x is null"),
    "no array": (
        FieldSchema("x", DataType.ARRAY, element=DataType.INT64, capacity=3, nullable=True), None, "x is null"
    ),
    "no texts": (
        FieldSchema("x", DataType.ARRAY, element=DataType.VARCHAR, max_bytes=9, capacity=3, nullable=True), None,
        "x is null",
    ),
}  # fmt: skip


class Chunks:
    """Written rows, and how often they are read."""

    def __init__(self, batch: Batch, ticks: Any) -> None:
        files, chunks = write_segment(batch, ticks)
        self.files = SegmentFiles.from_dict(files.to_dict())
        self._chunks = dict(chunks)
        self.reads = 0

    def get(self, digest: bytes) -> bytes:
        self.reads += 1
        return self._chunks[digest]


def rows_of(schema: CollectionSchema) -> tuple[Batch, Any]:
    return numbered(schema, range(ROWS)), np.arange(10, 10 + ROWS)


def growing(schema: CollectionSchema) -> GrowingSegment:
    segment = GrowingSegment(SegmentId(1), P, schema, Tick(10))
    batch, ticks = rows_of(schema)
    for i, tick in enumerate(ticks.tolist()):
        segment.append(batch.slice(i, i + 1), Tick(tick))
    return segment


def flushed(schema: CollectionSchema) -> tuple[SealedSegment, Chunks]:
    batch, ticks = rows_of(schema)
    chunks = Chunks(batch, ticks)
    rows = prepare(batch, ticks, schema)
    return SealedSegment.from_rows(SegmentId(1), P, schema, rows, files=chunks.files, get=chunks.get), chunks


def sealed_view(new: CollectionSchema) -> SegmentView:
    segment = SealedSegment.from_growing(growing(OLD))
    segment.adopt(new)
    return segment.view()


def flushed_view(new: CollectionSchema) -> SegmentView:
    segment, _ = flushed(OLD)
    segment.view()
    segment.adopt(new)
    return segment.view()


def released_view(new: CollectionSchema) -> SegmentView:
    segment, _ = flushed(OLD)
    segment.adopt(new)
    segment.release()
    return segment.view()


def read_again_view(new: CollectionSchema) -> SegmentView:
    batch, ticks = rows_of(OLD)
    chunks = Chunks(batch, ticks)
    rows = prepare_from_files(chunks.files, chunks.get, new)
    log = DeleteLog(ROWS)
    segment = SealedSegment.from_rows(SegmentId(1), P, new, rows, files=chunks.files, get=chunks.get, deletes=log)
    assert not segment.released
    return segment.view()


VIEWS: dict[str, Callable[[CollectionSchema], SegmentView]] = {
    "growing": lambda new: growing(OLD).view().under(new),
    "sealed": sealed_view,
    "flushed": flushed_view,
    "released": released_view,
    "read again": read_again_view,
}


@pytest.mark.parametrize("state", VIEWS)
@pytest.mark.parametrize("kind", ADDED)
def test_rows_lack_a_field_that_came_later(kind: str, state: str) -> None:
    """They have null or its default: in rows, whole columns, filters alone and beside others, merges and statistics."""
    field, value, text = ADDED[kind]
    new = with_field(OLD, field)
    added = new.field("x").id
    view = VIEWS[state](new)
    assert view.column(added).to_list() == [value] * ROWS
    batch = fetch([view], query([view], None, tick=TICK), [PK, added, GROUP])
    assert batch.columns[added].to_list() == [value] * ROWS
    assert (
        fetch([view], find_keys([view], np.array([3, 5]), tick=TICK), [added]).columns[added].to_list() == [value] * 2
    )
    for _ in range(2):  # the second time from what is kept
        assert count([view], compile_filter(text, new), tick=TICK) == ROWS
        assert count([view], compile_filter(f"not ({text})", new), tick=TICK) == 0
        assert count([view], compile_filter(f"{text} and group == 1", new), tick=TICK) == 2
        assert count([view], compile_filter(f"{text} and id in [1, 2, 99]", new), tick=TICK) == 2
    if view.sealed:
        merged, ticks = merge([view], TICK)
        assert merged.columns[added].to_list() == [value] * ROWS and len(ticks) == ROWS
        assert sorted(merged.columns) == sorted(new.by_id)
        assert merged.columns[NOTE].to_list() == rows_of(OLD)[0].columns[NOTE].to_list()


@pytest.mark.parametrize("state", VIEWS)
def test_a_dropped_field_is_not_merged(state: str) -> None:
    """What is left of it stays readable to who reads by the old schema; merging leaves it out."""
    new = without_field(OLD, "group")
    view = VIEWS[state](new)
    old_reader = view.under(OLD)
    assert count([old_reader], compile_filter("group == 1", OLD), tick=TICK) == 2
    assert old_reader.column(GROUP).to_list() == [i % 5 for i in range(ROWS)]
    merged, ticks = merge([view], TICK)
    assert sorted(merged.columns) == sorted(new.by_id)
    rows = prepare(merged, ticks, new)
    gone = SealedSegment.from_rows(SegmentId(2), P, new, rows).view().under(OLD)
    assert gone.column(GROUP).to_list() == [None] * ROWS


def test_statistics_of_fields_that_rows_lack() -> None:
    """A filter that cannot match the default skips the segment, unread."""
    new = with_field(
        with_field(OLD, FieldSchema("x", DataType.INT32, default=5)), FieldSchema("y", DataType.BOOL, nullable=True)
    )
    view = flushed_view(new)
    for text, may in (("x == 5", True), ("x > 5", False), ("y == true", False), ("y is null", True), ("x < 9", True)):
        assert compile_filter(text, new).may_match(view.stats) is may, text


def test_memory_of_dropped_fields_is_given_back_and_chunks_are_not_read() -> None:
    """Of flushed segments at once. One that is not flushed keeps all until it is: replicas write the same chunks,
    whether they do it before or after the change. Afterwards it has the schema's fields only."""
    new = without_field(OLD, "note")
    segment, chunks = flushed(OLD)
    before = segment.nbytes
    segment.adopt(new)
    assert segment.nbytes < before and NOTE not in segment.view().parts[0].batch.columns
    segment.adopt(with_field(new, FieldSchema("x", DataType.INT32, nullable=True)))
    assert segment.view().holds(FieldId(105)) and chunks.reads == 0
    late = SealedSegment.from_growing(growing(OLD))
    late.adopt(new)
    batch = Batch.concat([part.batch for part in late.view().parts])
    assert sorted(batch.columns) == sorted(OLD.by_id)
    written = Chunks(batch, late.view().ticks)
    assert written.files == chunks.files
    late.flushed(prepare(batch, late.view().ticks, new), written.files, written.get)
    assert sorted(late.view().parts[0].batch.columns) == sorted(new.by_id)


def test_a_dropped_vector_goes_with_its_index() -> None:
    """Also out of a released segment and one that is read again; who asks for it by the old schema is told."""
    more = FieldSchema("more", DataType.FLOAT_VECTOR, dim=4)
    old = make_schema([*make_collection().user_fields, more], dynamic=False)
    new = without_field(old, "more")
    batch, ticks = rows_of(OLD)
    field_id = old.field("more").id
    batch = Batch({**batch.select([PK, GROUP, NOTE, VECTOR]).columns, field_id: batch.columns[VECTOR]}, ROWS)
    chunks = Chunks(batch, ticks)
    rows = prepare(batch, ticks, old)
    segment = SealedSegment.from_rows(SegmentId(1), P, old, rows, files=chunks.files, get=chunks.get)
    spec = parse_index_spec("FLAT", "L2", {})
    matrix = segment.view().matrix(field_id, Metric.L2)
    segment.install_index(field_id, build(spec, matrix, threads=1, progress=lambda _: None, cancelled=lambda: False))
    segment.adopt(new)
    segment.drop_index(field_id)
    assert not segment.indexes and not segment.view().indexes
    segment.release()
    segment.load(prepare_from_files(chunks.files, chunks.get, new))
    assert sorted(segment.view().parts[0].batch.columns) == sorted(new.by_id)
    merged, _ = merge([segment.view()], TICK)
    after = SealedSegment.from_batch(SegmentId(2), P, new, merged, ticks).view().under(old)
    with pytest.raises(SchemaMismatch, match="field more was dropped"):
        after.column(field_id)


def test_a_compaction_that_is_asked_for_rewrites_old_segments() -> None:
    """Those that lack fields or have some too many, once; of its own accord it does not."""
    settings = CompactionSettings(segment_bytes_max=100, small_ratio_max=0.1)
    eager = CompactionSettings(segment_bytes_max=100, small_ratio_max=0.1, renew=True)
    for new in (without_field(OLD, "note"), with_field(OLD, FieldSchema("x", DataType.INT8, nullable=True))):
        facts = facts_of(flushed_view(new), 90, tick=TICK)
        assert facts.outdated and choose([facts], settings) == []
        (plan,) = choose([facts], eager)
        assert plan.inputs == (1,) and "other fields" in plan.why
    segment, _ = flushed(OLD)
    assert not facts_of(segment.view(), 90, tick=TICK).outdated


def test_absent_columns_are_like_those_that_rows_bring() -> None:
    """A column of the default has the type of a given one; long texts and many rows take no row's work."""
    column = absent_column(FieldSchema("x", DataType.VARCHAR, default="ab", max_bytes=9), 3)
    assert column.to_list() == ["ab"] * 3 and column.take(np.array([2, 0])).to_list() == ["ab"] * 2
    assert absent_column(FieldSchema("x", DataType.FLOAT, default=1), 2).to_list() == [1.0, 1.0]
    no_dynamic = make_schema(list(OLD.user_fields), dynamic=False)
    dynamic = with_dynamic_field(no_dynamic).dynamic
    assert dynamic is not None and absent_column(dynamic, 2).to_list() == [None, None]
