"""Segments against the dumb model: whatever happens to rows, reads at any tick give what a list and a scan give."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.engines import build, load
from index.metric import DENSE_METRICS, Metric
from index.spec import parse_index_spec
from storage.columns import VECTOR_TYPES, Batch, ScalarColumn, VectorColumn
from storage.compaction import merge
from storage.deletes import DeleteLog
from storage.filter import compile_filter
from storage.growing import GrowingSegment
from storage.key_lookup import batch_keys
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.sealed import SealedSegment, prepare, prepare_from_files
from storage.search import VectorQuery, count, fetch, find_keys, query, search
from storage.segment_files import SegmentFiles, read_blob, read_segment, write_blob, write_segment
from storage.types import PartitionId, SegmentId, ShardId, Tick
from storage.view import Part, SegmentView, _keep
from tests.model import ModelRows, nearest_keys
from tests.sim.chunks import SimChunks
from tests.storage.rows import DIM, GROUP, META, NOTE, PK, VECTOR, as_keys, key_of, make_batch, make_collection

SHARD = ShardId(7)
PARTITION = PartitionId(1)
KEYS = 12


@dataclass
class World:
    """One partition of one shard and the model of it, stepped together."""

    schema: CollectionSchema
    metric: Metric
    unit: bool
    rng: np.random.Generator
    model: ModelRows = field(default_factory=ModelRows)
    sealed: list[SealedSegment] = field(default_factory=list)
    blobs: dict[SegmentId, Any] = field(default_factory=dict)
    tick: int = 10
    floor: int = 0
    """The tick of the last compaction: rows dead at it are gone."""
    next_segment: int = 1

    def __post_init__(self) -> None:
        self.chunks = SimChunks(Random(1))
        self.growing = self._fresh()

    def _fresh(self) -> GrowingSegment:
        self.next_segment += 1
        return GrowingSegment(SegmentId(self.next_segment), PARTITION, self.schema, Tick(self.tick))

    def get(self, digest: bytes) -> bytes:
        return self.chunks.get(SHARD, digest)

    @property
    def segments(self) -> list[SealedSegment | GrowingSegment]:
        return [*self.sealed, self.growing]

    def views(self) -> list[SegmentView]:
        return [one.view() for one in self.segments]

    # steps

    def insert(self, numbers: list[int]) -> None:
        vectors = self.rng.integers(-3, 4, (len(numbers), DIM)).astype(np.float32)
        if self.unit:
            vectors = np.eye(DIM, dtype=np.float32)[self.rng.integers(0, DIM, len(numbers))]
        groups = [None if one == 4 else int(one) for one in self.rng.integers(0, 5, len(numbers))]
        self.tick += 1
        self.growing.append(make_batch(self.schema, numbers, groups, vectors), Tick(self.tick))
        for number, group, vector in zip(numbers, groups, vectors.tolist(), strict=True):
            self.model.insert(key_of(self.schema, number), {"group": group, "n": number}, tuple(vector), self.tick)

    def delete(self, numbers: list[int]) -> None:
        self.tick += 1
        self._kill(numbers)

    def upsert(self, numbers: list[int]) -> None:
        self._kill(numbers, tick=self.tick + 1)
        self.insert(numbers)

    def _kill(self, numbers: list[int], tick: int | None = None) -> None:
        at = self.tick if tick is None else tick
        keys = as_keys(self.schema, numbers)
        died = sum(one.delete(keys, Tick(at)) for one in self.segments)
        assert died == self.model.delete({key_of(self.schema, number) for number in numbers}, at)

    def seal(self) -> None:
        if self.growing.rows:
            self.sealed.append(SealedSegment.from_growing(self.growing))
            self.growing = self._fresh()

    def flush(self) -> None:
        for one in self.sealed:
            if one.files is None:
                view = one.view()
                files = self._write(view.whole(), view.ticks)
                one.flushed(prepare(*read_segment(files, self.get), self.schema), files, self.get)

    def _write(self, batch: Batch, ticks: Any) -> SegmentFiles:
        files, chunks = write_segment(batch, ticks)
        self.chunks.put_many(SHARD, chunks)
        return SegmentFiles.from_dict(files.to_dict())

    def index(self, index_type: str) -> None:
        spec = parse_index_spec(index_type, str(self.metric), {})
        for one in self.sealed:
            if one.files is not None and not one.released and VECTOR not in one.indexes:
                matrix = one.view().matrix(VECTOR, self.metric)
                built = build(spec, matrix, threads=1, progress=lambda _: None, cancelled=lambda: False)
                files, chunks = write_blob(built.dump())
                self.chunks.put_many(SHARD, chunks)
                self.blobs[one.segment_id] = spec, files
                one.install_index(VECTOR, built)

    def drop_indexes(self) -> None:
        for one in self.sealed:
            one.drop_index(VECTOR)

    def release(self) -> None:
        for one in self.sealed:
            if one.files is not None:
                one.release()

    def load(self) -> None:
        for one in self.sealed:
            if one.released and one.files is not None:
                rows = prepare_from_files(one.files, self.get, self.schema)
                one.load(rows)
                if one.segment_id in self.blobs:
                    spec, files = self.blobs[one.segment_id]
                    matrix = one.view().matrix(VECTOR, self.metric)
                    one.install_index(VECTOR, load(spec, read_blob(files, self.get), matrix))

    def compact(self, late: list[int]) -> None:
        """Merge what is flushed; the late deletes arrive while the merge is under way."""
        inputs = [one for one in self.sealed if one.files is not None]
        if not inputs:
            return
        as_of = Tick(self.tick)
        frozen = [one.view() for one in inputs]
        self.delete(late)
        batch, ticks = merge(frozen, as_of)
        again, again_ticks = merge(frozen[::-1], as_of)
        assert batch.to_bytes() == again.to_bytes() and ticks.tolist() == again_ticks.tolist()
        self.sealed = [one for one in self.sealed if one not in inputs]
        self.floor = as_of
        files = self._write(batch, ticks)
        self.next_segment += 1
        output = SealedSegment.from_rows(
            SegmentId(self.next_segment), PARTITION, self.schema, prepare(batch, ticks, self.schema),
            files=files, get=self.get,
        )  # fmt: skip
        for one in inputs:
            view = one.view()
            missed = view.deletes.after(as_of)
            if len(missed):
                keys = batch_keys(view.fetch(missed.offsets, [PK]), PK)
                output.delete(keys, Tick(int(missed.ticks[0])))
        if batch.rows:
            self.sealed.append(output)

    def restart(self) -> None:
        """Spill what is not spilled, forget everything in memory, and read it back."""
        rows = self.growing.unspilled()
        if rows is not None:
            self.growing.spilled(self._write(*rows))
        old, self.growing = self.growing, self._fresh()
        for files in old.spilled_files:
            self.growing.restore(*read_segment(files, self.get), files)
        self.growing.restore_deletes(old.deletes.view().to_bytes())
        restored = []
        for one in self.sealed:
            if one.files is None:
                restored.append(one)
                continue
            log = DeleteLog.from_bytes(one.deletes.view().to_bytes(), one.rows)
            rows_back = prepare_from_files(one.files, self.get, self.schema)
            restored.append(
                SealedSegment.from_rows(
                    one.segment_id, PARTITION, self.schema, rows_back, files=one.files, get=self.get, deletes=log
                )
            )
        self.sealed = restored

    # checks

    def check(self, tick: int, expire_before: int) -> None:
        views, at, before = self.views(), Tick(tick), Tick(expire_before)
        live = self.model.live(tick, expire_before)
        for text, matches in (
            ("", lambda row: True),
            ("group == 2", lambda row: row.values["group"] == 2),
            ("group is null", lambda row: row.values["group"] is None),
            ("id in [3, 5, 99] and group >= 2", lambda r: r.values["n"] in (3, 5) and r.values["group"] in (2, 3)),
            ("id > 1000000", lambda row: False),
        ):  # fmt: skip
            if self.schema.primary.type is DataType.VARCHAR:
                text = text.replace("[3, 5, 99]", '["këy 000000003", "këy 000000005", "x"]')
                text = text.replace("id > 1000000", 'id > "z"')
            rows = [row for row in live if matches(row)]
            chosen = compile_filter(text, self.schema)
            assert count(views, chosen, tick=at, expire_before=before) == len(rows)
            refs = query(views, chosen, tick=at, expire_before=before)
            found = fetch(views, refs, [PK, GROUP, NOTE, VECTOR, META])
            keys = found.columns[PK].to_list()
            assert keys == self.model.keys(rows)
            newest = {row.key: row for row in rows}
            assert [(r.values["group"]) for r in map(newest.__getitem__, keys)] == found.columns[GROUP].to_list()
            assert [f"note {newest[key].values['n']}" for key in keys] == found.columns[NOTE].to_list()
            assert [list(newest[key].vector) for key in keys] == found.columns[VECTOR].values.tolist()  # type: ignore
            part = query(views, chosen, tick=at, expire_before=before, limit=2, offset=1)
            assert fetch(views, part, [PK]).columns[PK].to_list() == keys[1:3]
            for limit in (1, 3, 50):
                self.check_search(views, chosen, rows, tick, expire_before, limit)
        wanted = as_keys(self.schema, list(range(KEYS)))
        refs = find_keys(views, wanted, tick=at, expire_before=before)
        assert fetch(views, refs, [PK]).columns[PK].to_list() == self.model.keys(live)

    def check_search(
        self, views: list[SegmentView], chosen: Any, rows: list[Any], tick: int, before: int, limit: int
    ) -> None:
        queries = self.rng.integers(-3, 4, (2, DIM)).astype(np.float32)
        asked = VectorQuery(
            queries, VECTOR, self.metric, limit, Tick(tick), filter=chosen, expire_before=Tick(before), explain=True
        )
        hits = search(views, asked)
        keys = fetch(views, hits.refs(), [PK]).columns[PK].to_list()
        start = 0
        for line, one in enumerate(queries):
            best = nearest_keys(rows, tuple(one.tolist()), self.metric)
            wanted = min(limit, len(best))
            assert hits.counts[line] == wanted
            mine, start = keys[start : start + wanted], start + wanted
            distances = hits.distances[line, :wanted]
            assert len(set(mine)) == wanted, "a key comes once"
            assert np.allclose(distances, [best[key] for key in mine], atol=1e-4)
            assert np.allclose(distances, sorted(best.values())[:wanted], atol=1e-4), "the nearest, in order"


numbers = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), numbers),
        st.tuples(st.just("insert"), numbers),
        st.tuples(st.just("upsert"), numbers.map(lambda some: sorted(set(some)))),
        st.tuples(st.just("delete"), numbers),
        st.tuples(st.just("seal")),
        st.tuples(st.just("flush")),
        st.tuples(st.just("index"), st.sampled_from(["FLAT", "AUTOINDEX"])),
        st.tuples(st.just("drop_indexes")),
        st.tuples(st.just("release")),
        st.tuples(st.just("load")),
        st.tuples(st.just("compact"), numbers),
        st.tuples(st.just("restart")),
    ),
    min_size=3,
    max_size=25,
)


@pytest.mark.parametrize("pk", [DataType.INT64, DataType.VARCHAR])
@given(metric=st.sampled_from(DENSE_METRICS), unit=st.booleans(), seed=st.integers(0, 99), steps=steps)
def test_reads_equal_the_model(pk: DataType, metric: Metric, unit: bool, seed: int, steps: list[Any]) -> None:
    """Search, query, count and lookup at several ticks equal the model after any inserts, upserts, deletes, seals,
    flushes, index builds, releases, loads, compactions (with deletes during them) and restarts."""
    world = World(make_collection(pk), metric, unit, np.random.default_rng(seed))
    for name, *arguments in steps:
        getattr(world, name)(*arguments)
    world.check(world.tick, 0)
    world.check((world.floor + world.tick) // 2 + 1, 0)
    world.check(max(world.floor, world.tick - 3), max(0, world.tick - 6))
    assert sum(one.live_rows for one in world.segments) == len(world.model.live(world.tick))


@given(
    kind=st.sampled_from([DataType.FLOAT_VECTOR, DataType.FLOAT16_VECTOR]),
    metric=st.sampled_from(DENSE_METRICS),
    batches=st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_parts_that_grow_between_searches(
    kind: DataType, metric: Metric, batches: list[tuple[int, bool, bool]], seed: int
) -> None:
    """What searches prepared of parts that were joined since is what would be prepared of them now."""
    key = FieldSchema("id", DataType.INT64, primary=True)
    schema = make_schema([key, FieldSchema("vector", kind, dim=DIM)], dynamic=False)
    rng = np.random.default_rng(seed)
    growing = GrowingSegment(SegmentId(1), PARTITION, schema, Tick(1))
    vector = next(one.id for one in schema.fields if one.type is kind)
    for tick, (rows, is_unit, is_searched) in enumerate(batches, 1):
        vectors = rng.standard_normal((rows, DIM)).astype(np.float32)
        if is_unit:
            vectors = np.eye(DIM, dtype=np.float32)[rng.integers(0, DIM, rows)]
        keys = ScalarColumn(np.arange(growing.rows, growing.rows + rows))
        stored = VectorColumn(vectors.astype(VECTOR_TYPES[kind]))
        growing.append(Batch({schema.primary.id: keys, vector: stored}, rows), Tick(tick))
        if is_searched:
            growing.view().matrices(vector, metric)
    for part in growing.view().parts:
        matrix, squares = part.prepared(vector, metric)
        fresh, lengths = Part(part.batch, part.start).prepared(vector, metric)
        assert isinstance(matrix, np.ndarray) and isinstance(fresh, np.ndarray)
        assert np.array_equal(matrix, fresh)
        assert (squares is None) == (lengths is None)
        assert squares is None or lengths is None or np.array_equal(squares, lengths)
        column = part.batch.columns[vector]
        assert isinstance(column, VectorColumn)
        assert (matrix is column.values) == (fresh is column.values), "nothing is copied that stands"


@given(
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    part_rows=st.integers(4, 64),
    merge_bytes=st.sampled_from([0, 500, 1 << 20]),
)
def test_rows_stay_where_they_are_put(batches: list[int], part_rows: int, merge_bytes: int) -> None:
    """Whatever batches come, and however they are merged, all views have their rows; what they came in is let go."""
    schema = make_collection()
    growing = GrowingSegment(SegmentId(1), PARTITION, schema, Tick(1))
    came: list[np.ndarray] = []
    views: list[SegmentView] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.growing.PART_ROWS_MAX", part_rows)
        patch.setattr("storage.growing.MERGE_BYTES_MAX", merge_bytes)
        for tick, rows in enumerate(batches, 1):
            first = growing.rows
            numbers = list(range(first, first + rows))
            vectors = np.repeat(np.array(numbers, np.float32), DIM).reshape(rows, DIM)
            came.append(vectors)
            growing.append(make_batch(schema, numbers, [0] * rows, vectors), Tick(tick))
            views.append(growing.view())
    for vectors in came:
        vectors[...] = -1  # whoever sent the rows may use the memory for others
    for view, rows in zip(views, accumulate(batches), strict=True):
        assert [part.start for part in view.parts] == [0, *accumulate(part.batch.rows for part in view.parts)][:-1]
        assert all(part.batch.rows <= max(part_rows, *batches) for part in view.parts)
        whole = view.whole()
        column = whole.columns[VECTOR]
        assert isinstance(column, VectorColumn) and column.values.shape == (rows, DIM)
        assert (column.values == np.arange(rows, dtype=np.float32)[:, None]).all()
        assert whole.columns[NOTE].to_list() == [f"note {number}" for number in range(rows)]
    written = growing.unspilled()
    assert written is not None and written[0].to_bytes() == views[-1].whole().to_bytes()


def test_few_parts_whatever_comes() -> None:
    """Where batches are alike, the parts of a segment are few: each search goes through all of them."""
    schema = make_collection()
    growing = GrowingSegment(SegmentId(1), PARTITION, schema, Tick(1))
    for number in range(3000):
        vectors = np.ones((1, DIM), np.float32)
        growing.append(make_batch(schema, [number], [0], vectors), Tick(number + 1))
        assert len(growing.view().parts) <= 2 + number.bit_length()


def test_threads_share_what_is_remembered_of_a_view() -> None:
    """None trips over what another one puts there or drops, wherever the interpreter takes turns."""
    cache: dict[int, int] = {}

    def look(seed: int) -> None:
        dice = Random(seed)
        for _ in range(60_000):
            _keep(cache, dice.randint(1, 40), seed, 4)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(look, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert len(cache) <= 8
