"""Reading over many segments: nearest rows, matching rows, counts, rows by key. Pure functions for worker threads.

Every read begins with the survivors of each segment: rows that are visible at the tick and pass the filter, as one mask
that is exact. So a search never loses hits to deletes or filters afterwards, and returns min(limit, matches) rows
always; and the planner knows the selectivity instead of guessing it. It chooses for each segment

    skip      its statistics say that the filter cannot match, or nothing survives
    exact     compare the survivors: no index, or so few survivors that walking the index past the others costs more
    index     search the index under the mask of survivors

and `explain` says which and why. A range search through an index that comes back short is repeated exactly, because
only then is it known that nothing was overlooked.

Order: nearest first, ties by (segment id, offset); of a query, primary key ascending. Keys are unique in results, as in
Milvus: of several rows with one key a search gives the nearest, a query the newest. A count counts rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from index.binary import nearest_binary
from index.complete import exact_cost
from index.flat import nearest_in
from index.metric import Metric
from index.protocol import Distances, Hits, VectorIndex
from index.sparse import SparseRows, nearest_sparse
from index.spec import EF_DEFAULT, SearchParams
from index.topk import merge
from storage.columns import Batch, Column, Mask, Offsets, ScalarColumn, StringColumn, concat_columns, side_by_side
from storage.deletes import Ticks
from storage.filter import CompiledFilter
from storage.key_lookup import Keys, KeySet
from storage.schema import DataType
from storage.types import FieldId, SegmentId, Tick
from storage.vectors import Vectors, take
from storage.view import NEVER, SegmentView, empty_column


@dataclass(frozen=True)
class Costs:
    """What searching costs, in rows compared where they stand by exact search.

    Measured on 50,000 x 384 real vectors, one thread, two-core x86-64 machine: such a row takes 0.1 us, a search of
    the graph (M 16, ef 64) 300 us. What copying rows out costs exact search is `index.complete.exact_cost`.
    """

    graph_step: float = 1.5
    """Per link followed: 2 * M links for each of ef candidates make 300 us at M 16 and ef 64."""


COSTS: Final = Costs()
COMPONENTS_BRIEF_MAX: Final = 4_000_000
"""Components compared where they stand: 2 ms, or 10 ms where they are seen to be unit vectors for the first time."""
_TERMS_COUNTED: Final = 32
"""What a row counts for where it is sparse: some of a query's terms are in it."""
NO_ROW_VISIBLE: Final = "no row is visible"
NO_ROW_PASSES: Final = "the filter lets no row through"
UNSEEN_BRIEF_MAX: Final = 2_048
"""Rows a filter has not looked at yet, of which each takes microseconds where it has to parse JSON."""


@dataclass(frozen=True, eq=False)
class VectorQuery:
    """What is searched for."""

    queries: Vectors
    """As engines take them, (nq, dim) float32 if they are dense; as the client gave them: not normalised."""
    field_id: FieldId
    metric: Metric
    limit: int
    """Hits wanted per query, the ones that a paging offset will skip included."""
    tick: Tick
    params: SearchParams = SearchParams()
    filter: CompiledFilter | None = None
    expire_before: Tick = NEVER
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What was done with one segment."""

    segment_id: SegmentId
    rows: int
    survivors: int
    plan: str
    """skip, exact or index."""
    why: str

    @property
    def selectivity(self) -> float:
        return self.survivors / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "segment": self.segment_id, "rows": self.rows, "survivors": self.survivors,
            "selectivity": self.selectivity, "plan": self.plan, "why": self.why,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Refs:
    """Rows of several segments, in result order."""

    views: Offsets
    """(n,) number of the view, in the sequence that was searched."""
    offsets: Offsets
    """(n,) offset in its segment."""

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, eq=False)
class SearchHits:
    """The answer to nq queries, nearest first, padded with -1 and +inf."""

    views: Offsets
    """(nq, limit) number of the view, in the sequence that was searched."""
    offsets: Offsets
    distances: Distances
    steps: tuple[Step, ...] = ()
    """One for each segment if the query asked for an explanation."""

    @property
    def counts(self) -> Offsets:
        """(nq,) hits of each query."""
        counts: Offsets = (self.offsets >= 0).sum(axis=1, dtype=np.int64)
        return counts

    def refs(self) -> Refs:
        """Return the rows of all queries, one query after the other."""
        found = self.offsets >= 0
        return Refs(self.views[found], self.offsets[found])


# nearest rows


def search(views: Sequence[SegmentView], query: VectorQuery) -> SearchHits:
    """Return min(limit, matching keys) hits for each query.

    Cost: per segment that of its plan, once for all queries together. Raises ChunkDamaged where a segment's rows have
    to be read.
    """
    order = sorted(range(len(views)), key=lambda i: views[i].segment_id)
    ordered = [views[i] for i in order]
    prepared = query.queries
    if not isinstance(prepared, SparseRows) and prepared.dtype != np.uint8:
        prepared = np.ascontiguousarray(query.metric.normalise(prepared), np.float32)
    found = [_survivors(view, query.filter, query.tick, query.expire_before) for view in ordered]
    possible = sum(one.count for one in found)
    wanted = fetched = min(query.limit, possible)
    while True:
        steps, parts = [], []
        for view, survivors in zip(ordered, found, strict=True):
            step, hits = _search_segment(view, survivors, query, prepared, fetched)
            steps.append(step)
            parts.append(hits)
        full, sources, offsets, distances = _merged(ordered, parts, fetched, len(prepared))
        # Keys that are there twice leave a line short; there may be more rows behind it only if it was full before.
        if fetched >= possible or not (full & (offsets[:, wanted - 1] < 0)).any():
            break
        fetched = min(2 * fetched, possible)
    numbers = np.array([*order, -1], np.int64)
    return SearchHits(
        _widened(numbers[sources], query.limit, -1),
        _widened(offsets, query.limit, -1),
        _widened(distances, query.limit, np.inf),
        tuple(steps) if query.explain else (),
    )


def may_take_long(views: Sequence[SegmentView], query: VectorQuery, queries: int, field_ids: Sequence[FieldId]) -> bool:
    """Return whether so many queries, and a fetch of these fields, may take far longer than others like them just took.

    So it is where chunks are to be read, where many rows have no index, or where a filter has yet to look at many rows.
    """
    components, unseen = 0, 0
    row_filter = query.filter
    for view in views:
        if not all(map(view.holds, field_ids)):
            return True
        index = view.indexes.get(query.field_id)
        if index is None or index.spec.metric is not query.metric:
            if not view.holds(query.field_id):
                return True
            if isinstance(query.queries, SparseRows):
                if not all(rows.has_lists for _, rows, _ in view.matrices(query.field_id, query.metric)):
                    return True
                components += view.rows * _TERMS_COUNTED
            else:
                components += view.rows * query.queries.shape[1]
        if row_filter is not None and not row_filter.always_true:
            if not all(map(view.holds, row_filter.field_ids)):
                return True
            if view.remembered(row_filter, view.moment(query.tick, query.expire_before)) is not None:
                continue
            keys = row_filter.primary_keys()
            if keys is not None:
                unseen += len(keys.values)
            else:
                unseen += sum(part.batch.rows for part in view.parts if not part.knows(row_filter))
    return components * queries > COMPONENTS_BRIEF_MAX or unseen > UNSEEN_BRIEF_MAX


# matching rows


def query(
    views: Sequence[SegmentView],
    row_filter: CompiledFilter | None,
    *,
    tick: Tick,
    expire_before: Tick = NEVER,
    limit: int | None = None,
    offset: int = 0,
) -> Refs:
    """Return the rows that match, by primary key ascending; of rows with one key the newest that matches."""
    refs = _concat((i, _survivors(view, row_filter, tick, expire_before).offsets) for i, view in enumerate(views))
    return _slice(_newest_by_key(views, refs), offset, limit)


def count(
    views: Sequence[SegmentView], row_filter: CompiledFilter | None, *, tick: Tick, expire_before: Tick = NEVER
) -> int:
    """Return how many rows match."""
    return sum(_survivors(view, row_filter, tick, expire_before).count for view in views)


def find_keys(views: Sequence[SegmentView], keys: Keys | KeySet, *, tick: Tick, expire_before: Tick = NEVER) -> Refs:
    """Return the newest visible row of each primary key that has one, by key ascending. Scans nothing."""
    wanted = KeySet.of(keys)
    refs = _concat((i, view.find(wanted, tick, expire_before)) for i, view in enumerate(views) if view.rows)
    return _newest_by_key(views, refs)


def fetch(views: Sequence[SegmentView], refs: Refs, field_ids: Sequence[FieldId]) -> Batch:
    """Return these fields of the rows, in the order of the refs; there is at least one view. Raises ChunkDamaged."""
    places = _places(refs)
    return Batch({one: _take(views, refs, one, places) for one in field_ids}, len(refs))


def inserted_ticks(views: Sequence[SegmentView], refs: Refs) -> Ticks:
    """Return the tick at which each of the rows was inserted."""
    ticks = np.empty(len(refs), np.int64)
    for number, mine in _places(refs).by_view:
        ticks[mine] = views[number].ticks[refs.offsets[mine]]
    return ticks


# survivors


@dataclass(frozen=True, eq=False)
class _Survivors:
    """Rows of a segment, as offsets where they are few and these are known, else as a mask."""

    rows: int
    count: int
    given: Mask | None = None
    few: Offsets | None = None
    """Ascending."""
    why_none: str = ""

    @cached_property
    def mask(self) -> Mask:
        if self.given is not None:
            return self.given
        mask = np.zeros(self.rows, np.bool_)
        if self.few is not None:
            mask[self.few] = True
        return mask

    @property
    def offsets(self) -> Offsets:
        return self.mask.nonzero()[0] if self.few is None else self.few


def _survivors(view: SegmentView, row_filter: CompiledFilter | None, tick: Tick, expire_before: Tick) -> _Survivors:
    """Return which rows are visible and pass the filter: what was found for the same filter lately, if nothing that
    was inserted or deleted since is visible.
    """
    moment = view.moment(tick, expire_before)
    if row_filter is None or row_filter.always_true:
        visible, visible_count = view.visibility_of(moment, tick)
        return _Survivors(view.rows, visible_count, visible, why_none=NO_ROW_VISIBLE)
    known: _Survivors | None = view.remembered(row_filter, moment)
    if known is None:
        known = _passing(view, row_filter, *view.visibility_of(moment, tick), tick, expire_before)
        view.remember(row_filter, moment, known)
    return known


def _passing(
    view: SegmentView, row_filter: CompiledFilter, visible: Mask, visible_count: int, tick: Tick, expire_before: Tick
) -> _Survivors:
    """Return which of the visible rows pass the filter."""
    rows = view.rows
    if visible_count == 0:
        return _Survivors(rows, 0, visible, why_none=NO_ROW_VISIBLE)
    if view.stats and not row_filter.may_match(view.stats):
        return _Survivors(rows, 0, few=_NO_ROWS, why_none="statistics rule the filter out")
    keys = row_filter.primary_keys()
    if keys is not None:
        offsets = view.find(_typed(view, keys.values), tick, expire_before)
        if len(offsets) and not keys.exact:
            offsets = offsets[row_filter.evaluate(view.fetch(offsets, sorted(row_filter.field_ids)))]
        return _Survivors(rows, len(offsets), few=offsets, why_none=NO_ROW_PASSES)
    chosen, masks = view.chosen(row_filter), []
    if chosen is None:
        found = [part.passing(row_filter) for part in view.columns(sorted(row_filter.field_ids))]
        masks = [mask for mask, _ in found]
        chosen = found[0][1] if len(found) == 1 else None
    if chosen is not None:
        if visible_count < rows:
            chosen = chosen[visible[chosen]]
        return _Survivors(rows, len(chosen), few=chosen, why_none=NO_ROW_PASSES)
    passing = masks[0] if len(masks) == 1 else np.concatenate(masks)
    if visible_count < rows:
        passing = passing & visible
    return _Survivors(rows, int(np.count_nonzero(passing)), passing, why_none=NO_ROW_PASSES)


_NO_ROWS: Final[Offsets] = np.empty(0, np.int64)


def _typed(view: SegmentView, keys: Sequence[int | str]) -> Keys:
    if view.schema.primary.type is DataType.INT64:
        return np.array(keys, np.int64)
    return [str(key) for key in keys]


# one segment


def _search_segment(
    view: SegmentView, survivors: _Survivors, query: VectorQuery, prepared: Vectors, k: int
) -> tuple[Step, Hits]:
    def step(plan: str, why: str) -> Step:
        return Step(view.segment_id, view.rows, survivors.count, plan, why)

    k = min(k, survivors.count)
    if k == 0:
        return step("skip", survivors.why_none), Hits.none(len(prepared), 0)
    index = view.indexes.get(query.field_id)
    if index is None or index.spec.metric is not query.metric:
        why = "no index of this metric" if index else "no index"
        return step("exact", why), _exact(view, survivors, query, prepared, k)
    by_scan = exact_cost(view.rows, survivors.count)
    by_index = index_cost(index, query.params, k, survivors.count / view.rows)
    why = f"exact {by_scan:.0f}, index {by_index:.0f} rows' worth"
    if by_scan <= by_index:
        return step("exact", why), _exact(view, survivors, query, prepared, k)
    mask = None if survivors.count == view.rows else survivors.mask
    hits = index.search(prepared, k, params=query.params, mask=mask)
    if not query.params.bounds(query.metric).is_open:
        # What lies inside the range but was overlooked is found only by looking at everything.
        short = np.flatnonzero(hits.counts < k)
        if len(short):
            again = _exact(view, survivors, query, take(prepared, short), k)
            hits.offsets[short], hits.distances[short] = again.offsets, again.distances
            why += f"; {len(short)} ranges completed exactly"
    return step("index", why), hits


def index_cost(index: VectorIndex, params: SearchParams, k: int, share: float) -> float:
    """Return what a search of the index costs a query when this share of its rows survives, see `Costs`."""
    if index.spec.is_graph:
        ef = max(params.ef_for(index.spec, k), EF_DEFAULT)
        return COSTS.graph_step * 2 * index.spec.graph_degree * ef / share
    nlist = int(index.spec.params.get("nlist", 0))
    if nlist:
        return nlist + index.rows * params.nprobe_for(nlist, share) / nlist
    return float(index.rows)


def _exact(view: SegmentView, survivors: _Survivors, query: VectorQuery, prepared: Vectors, k: int) -> Hits:
    """Return the k nearest survivors by comparing them all."""
    bounds = query.params.bounds(query.metric)
    if isinstance(prepared, SparseRows):
        rows = [piece for _, piece, _ in view.matrices(query.field_id, query.metric)]
        return nearest_sparse(rows, prepared, k, mask=survivors.mask, bounds=bounds, params=query.params)
    if prepared.dtype == np.uint8:
        bits = [piece for _, piece, _ in view.matrices(query.field_id, query.metric)]
        return nearest_binary(bits, prepared, k, metric=query.metric, mask=survivors.mask, bounds=bounds)
    pieces, lengths = [], []
    for _, matrix, squares in view.matrices(query.field_id, query.metric):
        pieces.append(matrix)
        lengths.append(squares)
    known = [one for one in lengths if one is not None]
    squares = None
    if len(known) == len(pieces):
        squares = known[0] if len(known) == 1 else np.concatenate(known)
    pieces = side_by_side(pieces)  # for each a thread gives the interpreter away once, and waits to have it back
    # Where nobody keeps squared lengths, those of the survivors alone are computed.
    some = {"mask": survivors.mask} if survivors.few is None else {"chosen": survivors.few}
    return nearest_in(pieces, prepared, k, metric=query.metric, bounds=bounds, squares=squares, **some)


# rows of many segments


def _merged(
    views: Sequence[SegmentView], parts: Sequence[Hits], k: int, queries: int
) -> tuple[Mask, Offsets, Offsets, Distances]:
    """Return (lines that had k hits, sources, offsets, distances) of the k nearest hits of all segments.

    Keys are unique in each line, so a line that had k hits may have fewer.
    """
    some = [number for number, hits in enumerate(parts) if hits.offsets.shape[1]]
    if len(some) == 1:
        offsets, distances = parts[some[0]].offsets, parts[some[0]].distances
        sources = np.full(offsets.shape, some[0], np.int64)
        if not (offsets[:, -1] >= 0).all():
            sources[offsets < 0] = -1
    else:
        merged = merge([(hits.offsets, hits.distances) for hits in parts], k, queries=queries)
        offsets, distances, sources = merged.ids, merged.distances, merged.sources
    if offsets.shape[1] == 0:
        return np.zeros(queries, np.bool_), sources, offsets, distances
    if len(some) == 1 and views[some[0]].keys.is_unique:
        return offsets[:, -1] >= 0, sources, offsets, distances
    return offsets[:, -1] >= 0, *_distinct(views, sources, offsets, distances)


def _distinct(
    views: Sequence[SegmentView], sources: Offsets, offsets: Offsets, distances: Distances
) -> tuple[Offsets, Offsets, Distances]:
    """Return the hits without those whose key came nearer before in the same line; lines keep their order."""
    found = offsets >= 0
    if offsets.shape[1] < 2:
        return sources, offsets, distances
    codes = np.broadcast_to(-np.arange(1, offsets.shape[1] + 1), offsets.shape).copy()  # padding differs
    refs = Refs(sources[found], offsets[found])
    codes[found] = _codes(_take(views, refs, views[0].schema.primary.id, _places(refs)))
    alike = np.sort(codes, axis=1)
    if not (alike[:, 1:] == alike[:, :-1]).any():
        return sources, offsets, distances
    order = np.lexsort((codes, ~found), axis=1)  # stable: equal keys stay nearest first
    in_order = np.take_along_axis(codes, order, axis=1)
    again = np.zeros(offsets.shape, np.bool_)
    again[:, 1:] = (in_order[:, 1:] == in_order[:, :-1]) & np.take_along_axis(found, order, axis=1)[:, 1:]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=1)
    keep = np.argsort(repeated | ~found, axis=1, kind="stable")
    gone = np.take_along_axis(repeated | ~found, keep, axis=1)
    return (
        np.where(gone, -1, np.take_along_axis(sources, keep, axis=1)),
        np.where(gone, -1, np.take_along_axis(offsets, keep, axis=1)),
        np.where(gone, np.float32(np.inf), np.take_along_axis(distances, keep, axis=1)),
    )


def _widened(lines: npt.NDArray[Any], width: int, padding: float) -> npt.NDArray[Any]:
    """Return the lines cut or padded to a width."""
    if lines.shape[1] >= width:
        return lines[:, :width]
    wide = np.full((len(lines), width), padding, lines.dtype)
    wide[:, : lines.shape[1]] = lines
    return wide


def _newest_by_key(views: Sequence[SegmentView], refs: Refs) -> Refs:
    """Return the rows by key ascending, the newest of each key."""
    if len(refs) == 0:
        return refs
    newest_first = np.lexsort((refs.offsets, refs.views, inserted_ticks(views, refs)))[::-1]
    refs = Refs(refs.views[newest_first], refs.offsets[newest_first])
    keys = _take(views, refs, views[0].schema.primary.id, _places(refs))
    codes = _codes(keys)
    if isinstance(keys, StringColumn):
        order = keys.values.order()
    else:
        order = np.argsort(codes, kind="stable")
    in_order = codes[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = in_order[1:] != in_order[:-1]
    order = order[first]
    return Refs(refs.views[order], refs.offsets[order])


def _codes(keys: Column) -> npt.NDArray[np.int64]:
    """Return a number for each key, equal for equal keys only."""
    if isinstance(keys, StringColumn):
        return keys.values.distinct()[1].astype(np.int64)
    assert isinstance(keys, ScalarColumn)
    return keys.values.astype(np.int64, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where the rows of some refs are: the same for all their fields."""

    by_view: Sequence[tuple[int, Offsets]]
    """(number of a view, places of its rows among the refs), ascending."""
    back: Offsets | None
    """For each ref, which of the rows in the order of `by_view` it is; None if they are in order."""


def _places(refs: Refs) -> _Places:
    numbers = np.bincount(refs.views).nonzero()[0].tolist() if len(refs) else []
    if len(numbers) <= 1:
        return _Places([(number, np.arange(len(refs), dtype=np.int64)) for number in numbers], None)
    by_view = [(number, (refs.views == number).nonzero()[0]) for number in numbers]
    back = np.empty(len(refs), np.int64)
    back[np.concatenate([mine for _, mine in by_view])] = np.arange(len(refs), dtype=np.int64)
    return _Places(by_view, back)


def _take(views: Sequence[SegmentView], refs: Refs, field_id: FieldId, places: _Places) -> Column:
    """Return one field of the rows, in the order of the refs."""
    if not places.by_view:
        return empty_column(views[0].schema.by_id[field_id])
    if places.back is None:
        return views[places.by_view[0][0]].take(field_id, refs.offsets)
    pieces = [views[number].take(field_id, refs.offsets[mine]) for number, mine in places.by_view]
    rows: Column = concat_columns(pieces).take(places.back)
    return rows


def _concat(found: Iterable[tuple[int, Offsets]]) -> Refs:
    numbers, offsets = [], []
    for number, some in found:
        numbers.append(np.full(len(some), number, np.int64))
        offsets.append(some)
    if not offsets:
        return Refs(np.empty(0, np.int64), np.empty(0, np.int64))
    return Refs(np.concatenate(numbers), np.concatenate(offsets))


def _slice(refs: Refs, offset: int, limit: int | None) -> Refs:
    stop = None if limit is None else offset + limit
    return Refs(refs.views[offset:stop], refs.offsets[offset:stop])
