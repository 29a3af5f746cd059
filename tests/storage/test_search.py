"""The planner: whichever plan it takes, a search gives min(limit, matches) rows, and says what it did."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.engines import build
from index.metric import DENSE_METRICS, Metric
from index.protocol import Matrix
from index.spec import SearchParams, parse_index_spec
from storage.columns import Batch, VectorColumn
from storage.filter import CompiledFilter, compile_filter
from storage.growing import GrowingSegment
from storage.schema import DataType
from storage.sealed import SealedSegment
from storage.search import SearchHits, VectorQuery, count, fetch, may_take_long, query, search
from storage.types import PartitionId, SegmentId, Tick
from storage.view import Part, SegmentView, as_unit_rows
from tests.storage.rows import GROUP, PK, VECTOR, make_batch, make_collection, numbered

SCHEMA = make_collection(dim=16)
ROWS = 4_000
NOW = Tick(1_000)


def vectors(rows: int, seed: int) -> Matrix:
    return np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)


def rows_of(first: int, rows: int) -> Batch:
    """Return rows whose group is their number modulo 1000."""
    numbers = list(range(first, first + rows))
    return make_batch(SCHEMA, numbers, [number % 1000 for number in numbers], vectors(rows, first))


def sealed(
    segment_id: int, batch: Batch, index_type: str | None = None, metric: Metric = Metric.COSINE
) -> SealedSegment:
    ticks = np.arange(1, batch.rows + 1, dtype=np.int64) // 100
    segment = SealedSegment.from_batch(SegmentId(segment_id), PartitionId(1), SCHEMA, batch, ticks)
    if index_type is not None:
        spec = parse_index_spec(index_type, str(metric), {"nlist": 16})
        matrix = segment.view().matrix(VECTOR, metric)
        built = build(spec, matrix, threads=1, progress=lambda _: None, cancelled=lambda: False)
        segment.install_index(VECTOR, built)
    return segment


def ask(
    views: Sequence[SegmentView],
    text: str = "",
    *,
    limit: int = 10,
    metric: Metric = Metric.COSINE,
    queries: Matrix | None = None,
    params: SearchParams = SearchParams(),  # noqa: B008 (frozen)
) -> SearchHits:
    chosen: CompiledFilter | None = compile_filter(text, SCHEMA) if text else None
    some = vectors(5, 77) if queries is None else queries
    return search(views, VectorQuery(some, VECTOR, metric, limit, NOW, params=params, filter=chosen, explain=True))


def plain(views: Sequence[SegmentView]) -> list[SegmentView]:
    """Return the views without their indexes, so that everything is searched exactly."""
    found = []
    for view in views:
        if view.indexes:
            columns = {**view.parts[0].batch.columns, VECTOR: VectorColumn(view.indexes[VECTOR].vectors())}
            view = replace(view, indexes={}, parts=(Part(Batch(columns, view.rows), 0),))
        found.append(view)
    return found


@pytest.mark.parametrize("metric", DENSE_METRICS)
@pytest.mark.parametrize("index_type", ["FLAT", "AUTOINDEX", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8"])
def test_every_index_and_filter_gives_what_exact_search_gives(index_type: str, metric: Metric) -> None:
    """Over two indexed segments and a growing one, filters that pass all, half, a tenth, a thousandth or none give
    min(limit, matches) hits with the distances of exact search, and nearly all of its rows."""
    segments = [sealed(1, rows_of(0, ROWS), index_type, metric), sealed(2, rows_of(ROWS, 1_500), index_type, metric)]
    growing = GrowingSegment(SegmentId(3), PartitionId(1), SCHEMA, Tick(0))
    growing.append(rows_of(9_000, 300), Tick(50))
    everything: list[SealedSegment | GrowingSegment] = [*segments, growing]
    for one in everything:
        one.delete(np.arange(0, 9_300, 7, dtype=np.int64), Tick(500))
    views = [one.view() for one in everything]
    for text in ("", "group < 500", "group < 100", "group == 1", "group == 7 and id == 7", "group > 5000"):
        for limit in (1, 10, 300):
            hits = ask(views, text, limit=limit, metric=metric)
            exact = ask(plain(views), text, limit=limit, metric=metric)
            assert hits.counts.tolist() == exact.counts.tolist()
            assert (np.diff(hits.distances[:, : hits.counts[0]]) >= 0).all()
            found, true = (fetch(views, answer.refs(), [PK]).columns[PK].to_list() for answer in (hits, exact))
            if text and limit <= 10 and len(true):
                assert len(set(found) & set(true)) / len(set(true)) >= (
                    0.97 if not index_type.startswith("IVF") else 0.5
                )


def test_deletes_never_shorten_an_answer() -> None:
    """With all but twenty rows of an indexed segment dead, a search finds twenty; at an older tick, what lived then."""
    segment = sealed(1, rows_of(0, ROWS), "AUTOINDEX")
    before = segment.view()
    segment.delete(np.arange(20, ROWS, dtype=np.int64), Tick(500))
    assert ask([segment.view()], limit=50).counts.tolist() == [20] * 5
    assert ask([before], limit=50).counts.tolist() == [50] * 5
    old = VectorQuery(vectors(1, 5), VECTOR, Metric.COSINE, 50, Tick(499))
    assert search([segment.view()], old).counts.tolist() == [50]


@pytest.fixture(scope="module")
def indexed() -> SealedSegment:
    return sealed(1, rows_of(0, 12_000), "AUTOINDEX")


@pytest.mark.parametrize(
    ("text", "plan", "why"),
    [
        ("", "index", "rows' worth"),
        ("group == 3", "exact", "rows' worth"),
        ("group > 5000", "skip", "statistics rule the filter out"),
        ('note == "note 1x"', "skip", "the filter lets no row through"),
    ],
)
def test_the_plan_says_why(indexed: SealedSegment, text: str, plan: str, why: str) -> None:
    """The plan follows the number of survivors, and the explanation tells it."""
    (step,) = ask([indexed.view()], text).steps
    assert step.plan == plan and why in step.why
    assert step.to_dict()["rows"] == 12_000
    assert ask([], text).counts.tolist() == [0] * 5


def test_ranges_are_complete() -> None:
    """A range search gives every row inside the range up to the limit, also through an approximate index."""
    for metric in DENSE_METRICS:
        batch = rows_of(0, ROWS)
        view = sealed(1, batch, "AUTOINDEX", metric).view()
        query_vector = vectors(1, 123)
        order = ask(plain([view]), limit=ROWS, metric=metric, queries=query_vector)
        scores = metric.scores(order.distances[0])
        inner, outer = (float(np.mean(scores[i : i + 2])) for i in (4, 39))  # between two scores each
        params = SearchParams(radius=outer, range_filter=inner)
        hits = ask([view], limit=100, metric=metric, queries=query_vector, params=params)
        assert hits.offsets[0, :35].tolist() == order.offsets[0, 5:40].tolist()
        assert hits.counts.tolist() == [35]
        few = ask([view], limit=10, metric=metric, queries=query_vector, params=params)
        assert few.offsets[0].tolist() == order.offsets[0, 5:15].tolist()


def test_a_key_comes_once_and_the_answer_stays_full() -> None:
    """Rows with one key, in one segment or several, give its nearest row; the places they leave are filled."""
    same = make_batch(SCHEMA, [5] * 60 + list(range(100, 130)), [1] * 90, vectors(90, 1))
    growing = GrowingSegment(SegmentId(9), PartitionId(1), SCHEMA, Tick(0))
    growing.append(same, Tick(1))
    views = [sealed(2, same).view(), growing.view()]
    hits = ask(views, limit=25)
    assert hits.counts.tolist() == [25] * 5
    keys = np.array(fetch(views, hits.refs(), [PK]).columns[PK].to_list()).reshape(5, 25)
    assert all(len(set(line)) == 25 for line in keys.tolist())
    assert ask(views, limit=200).counts.tolist() == [31] * 5


def test_equal_distances_go_by_segment_and_offset() -> None:
    """Ties go to the lower segment id, then to the lower offset, in whatever order the views are given."""
    flat = np.ones((4, 16), np.float32)
    views = [
        sealed(8, make_batch(SCHEMA, [1, 2, 3, 4], [1] * 4, flat)).view(),
        sealed(4, make_batch(SCHEMA, [5, 6, 7, 8], [1] * 4, flat)).view(),
    ]
    hits = ask(views, limit=6)
    assert fetch(views, hits.refs(), [PK]).columns[PK].to_list()[:6] == [5, 6, 7, 8, 1, 2]
    hits = ask(views[::-1], limit=6)
    assert fetch(views[::-1], hits.refs(), [PK]).columns[PK].to_list()[:6] == [5, 6, 7, 8, 1, 2]


def test_searches_together_equal_searches_alone() -> None:
    """Queries gathered into one call get the answers that they would get by themselves."""
    views = [sealed(1, rows_of(0, ROWS), "AUTOINDEX").view()]
    several = [vectors(n, n) for n in (1, 3, 2)]
    together = search(views, VectorQuery(np.concatenate(several), VECTOR, Metric.COSINE, 5, NOW)).offsets.tolist()
    alone = [search(views, VectorQuery(one, VECTOR, Metric.COSINE, 5, NOW)).offsets.tolist() for one in several]
    assert together == [line for lines in alone for line in lines]


@pytest.mark.parametrize("index_type", [None, "AUTOINDEX"])
def test_a_filter_asked_again_sees_what_happened_meanwhile(index_type: str | None) -> None:
    """One compiled filter, asked again and again, answers as one compiled anew: rows that came, that died, that an
    upsert replaced, that expired or that were not there yet at an older tick are told apart as always."""
    texts = ("group < 400", "group % 2 == 0 and id > 100", 'note like "note 1%"', "not (group < 400)")
    known = {text: compile_filter(text, SCHEMA) for text in texts}
    growing = GrowingSegment(SegmentId(3), PartitionId(1), SCHEMA, Tick(0))
    segment, queries = sealed(1, rows_of(0, 2_000), index_type), vectors(3, 77)

    def answers(one: CompiledFilter, tick: Tick, expire_before: Tick) -> list[object]:
        views = [segment.view(), growing.view()]
        asked = VectorQuery(queries, VECTOR, Metric.COSINE, 10, tick, filter=one, expire_before=expire_before)
        hits, rows = search(views, asked), query(views, one, tick=tick, expire_before=expire_before)
        found: list[object] = [hits.views.tolist(), hits.offsets.tolist(), hits.distances.tolist()]
        found += [rows.views.tolist(), rows.offsets.tolist()]
        return [*found, count(views, one, tick=tick, expire_before=expire_before)]

    for turn in range(12):
        now = Tick(100 + 10 * turn)
        growing.append(rows_of(5_000 + 40 * turn, 40), now)
        dying = np.array([*range(turn, 2_000, 97), 5_000 + 30 * turn], np.int64)
        for one in (segment, growing):
            one.delete(dying, Tick(now + 1))
        growing.append(rows_of(20 * turn, 5), Tick(now + 1))
        segment.delete(np.arange(20 * turn, 20 * turn + 5, dtype=np.int64), Tick(now + 2))
        for text in texts:
            for tick, expire_before in (
                (NOW, Tick(0)),
                (NOW, Tick(turn)),
                (Tick(now - 5), Tick(0)),
                (Tick(9), Tick(3)),
            ):
                anew = compile_filter(text, SCHEMA)
                assert answers(known[text], tick, expire_before) == answers(anew, tick, expire_before)


def test_masks_of_filters_are_bounded_and_keep_no_filter_alive() -> None:
    """Of a few filters at most masks and survivors are kept, and a filter that nobody else has goes away."""
    view = sealed(1, rows_of(0, 500)).view()
    filters = [compile_filter(f"group < {limit}", SCHEMA) for limit in range(100)]
    gone = weakref.ref(filters[-1])
    for turn in range(2):
        assert [count([view], one, tick=NOW) for one in filters] == list(range(100)), turn
    assert len(view.parts[0]._passing) == 8 and len(view._remembered) == 4
    filters.clear()
    assert gone() is None
    assert count([view], compile_filter("group < 3", SCHEMA), tick=NOW) == 3


def test_what_may_take_long_is_known_before() -> None:
    """Many rows without an index, a filter that has not seen many rows yet, and rows in chunks are announced."""
    many, indexed = sealed(1, rows_of(0, 3_000)), sealed(2, rows_of(3_000, 3_000), "AUTOINDEX")
    growing = GrowingSegment(SegmentId(3), PartitionId(1), SCHEMA, Tick(0))
    growing.append(rows_of(9_000, 300), Tick(50))
    views = [indexed.view(), growing.view()]
    asked = VectorQuery(vectors(1, 1), VECTOR, Metric.COSINE, 10, NOW)
    assert not may_take_long(views, asked, 8, [PK, GROUP])
    assert may_take_long(views, replace(asked, metric=Metric.L2), 80, [PK])
    assert not may_take_long([many.view()], asked, 8, [PK])
    assert may_take_long([many.view()], asked, 800, [PK])
    filtered = replace(asked, filter=compile_filter("group < 400", SCHEMA))
    assert may_take_long(views, filtered, 1, [PK])
    search(views, filtered)
    assert not may_take_long(views, filtered, 1, [PK])
    by_key = replace(asked, filter=compile_filter("id in [1, 2, 3]", SCHEMA))
    assert not may_take_long(views, by_key, 1, [PK])
    bare = replace(views[0], parts=(Part(views[0].parts[0].batch.select([PK, GROUP]), 0),))
    assert not may_take_long([bare], asked, 1, [PK])
    assert may_take_long([bare], asked, 1, [VECTOR])  # scaled in the index, so the inserted ones are in chunks


def test_unit_vectors_are_not_copied_and_others_come_back_unscaled() -> None:
    """COSINE search leaves unit rows where they are; what was inserted is what is fetched, also through an index."""
    raw = vectors(50, 3)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert as_unit_rows(unit) is unit
    mixed = np.concatenate([unit[:25], raw[25:]])
    scaled = as_unit_rows(mixed)
    assert (scaled[:25] == mixed[:25]).all() and np.allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)
    batch = make_batch(SCHEMA, list(range(50)), [0] * 50, raw)
    view = sealed(1, batch, "FLAT").view()
    assert (fetch([view], query([view], None, tick=NOW), [VECTOR]).columns[VECTOR].to_list()[3] == raw[3]).all()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=5), st.integers(1, 50))
def test_rows_come_to_length_one_by_themselves(shapes: list[tuple[int, int]], block: int) -> None:
    """A row's unit vector depends on no other row, however many are worked on at once, and stays when others follow."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.view._BLOCK_VALUES", block)
        for rows, dim in shapes:
            raw = np.random.default_rng(rows).standard_normal((rows, dim)).astype(np.float32)
            found.append((raw, as_unit_rows(raw)))
    for raw, unit in found:
        alone = [as_unit_rows(raw[i : i + 1]) for i in range(len(raw))]
        assert np.array_equal(unit, np.concatenate([raw[:0], *alone]))


def test_queries_page_by_key_without_gaps() -> None:
    """Pages of a query are slices of the whole answer, which is in key order over all segments."""
    schema = make_collection(DataType.VARCHAR)
    growing = GrowingSegment(SegmentId(1), PartitionId(1), schema, Tick(0))
    growing.append(numbered(schema, [9, 3, 5, 1]), Tick(1))
    segment = SealedSegment.from_batch(
        SegmentId(2), PartitionId(1), schema, numbered(schema, [8, 2, 4, 5]), np.full(4, 2, np.int64)
    )
    views = [growing.view(), segment.view()]
    whole = fetch(views, query(views, None, tick=NOW), [PK, GROUP]).columns
    assert whole[GROUP].to_list() == [1, 2, 3, 4, 0, 3, 4]
    pages = [query(views, None, tick=NOW, limit=3, offset=at) for at in (0, 3, 6, 9)]
    assert [key for page in pages for key in fetch(views, page, [PK]).columns[PK].to_list()] == whole[PK].to_list()
