"""What one snapshot answers to searches, queries and counts: on a worker thread, or on the loop if brief."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from node.clock import Clock
from node.resolve import with_fields
from node.scope import Ticks
from node.subread import NO_TICKS, Answer, Nearness, Question, SubQuestion
from storage.aggregation import Aggregation, Groups, aggregate
from storage.bm25 import statistics
from storage.columns import Batch
from storage.filter.compiled import CompiledFilter, compile_filter
from storage.grouping import Grouping, Narrowed, merge_groups, search_groups
from storage.key_lookup import Keys
from storage.merging import ScoredRows
from storage.ordering import ordered
from storage.schema import CollectionSchema
from storage.search import (
    Refs,
    Step,
    VectorQuery,
    count,
    fetch,
    find_keys,
    inserted_ticks,
    query,
    search,
)
from storage.types import FieldId, Tick
from storage.vectors import Vectors, concat
from storage.view import SegmentView, empty_column

_GROUP_VALUE: Final = "annulus_group_value"


@dataclass(frozen=True)
class Snapshot:
    """What a read sees."""

    schema: CollectionSchema
    views: Sequence[SegmentView]
    tick: Tick
    expire_before: Tick
    ticks: Ticks
    """As of which tick each shard is seen."""
    is_known: bool = True
    """Whether a shard has the collection at all."""

    def fetch(self, refs: Refs, field_ids: Sequence[FieldId]) -> Batch:
        """Return these fields of rows that were found in this snapshot."""
        if len(refs) == 0:
            return Batch({one: empty_column(self.schema.by_id[one]) for one in field_ids}, 0)
        return fetch(self.views, refs, field_ids)


def vector_query(
    question: Question, row_filter: CompiledFilter | None, seen: Snapshot, vectors: Sequence[Vectors]
) -> VectorQuery:
    """Return the search of these vectors that is asked for, as of a snapshot."""
    near = question.near
    assert near is not None and question.limit is not None, "a search has vectors and a limit"
    return _asked(near, concat(vectors), question.limit + question.offset, row_filter, seen)


def _asked(
    near: Nearness, queries: Vectors, limit: int, row_filter: CompiledFilter | None, seen: Snapshot
) -> VectorQuery:
    return VectorQuery(
        queries,
        near.field_id,
        near.metric,
        limit,
        seen.tick,
        near.params,
        None if row_filter is None or row_filter.always_true else row_filter,
        seen.expire_before,
        explain=True,
    )


def search_and_fetch(
    clock: Clock, seen: Snapshot, asked: VectorQuery, question: Question, sizes: Sequence[int]
) -> tuple[list[Answer], float]:
    """Return the answers to searches of so many queries each, one call of the engine and one fetch for all, and the
    seconds.
    """
    began_s = clock.monotonic_s()
    found, steps = _found(seen, asked, question.offset, question.field_ids)
    answers, first, row = [], 0, 0
    for size in sizes:
        mine = found.counts[first : first + size]
        first, stop = first + size, row + sum(mine)
        answers.append(Answer(mine, found.scores[row:stop], found.batch.slice(row, stop), steps, seen.ticks))
        row = stop
    return answers, clock.monotonic_s() - began_s


def _found(
    seen: Snapshot, asked: VectorQuery, offset: int, field_ids: Sequence[FieldId]
) -> tuple[ScoredRows, tuple[Step, ...]]:
    """Return the rows that a search finds, from this place of each query's hits on, and how it went about it."""
    hits = search(seen.views, asked)
    views, offsets = hits.views[:, offset:], hits.offsets[:, offset:]
    found = offsets >= 0
    rows = seen.fetch(Refs(views[found], offsets[found]), field_ids)
    scores = asked.metric.scores(hits.distances[:, offset:][found]).astype(np.float32, copy=False)
    return ScoredRows(found.sum(axis=1).tolist(), scores, rows), hits.steps


def search_all(
    seen: Snapshot,
    question: Question,
    filters: Sequence[CompiledFilter],
    narrowing: Sequence[Narrowed | None],
) -> Answer:
    """Return the answer to the searches of a hybrid search, each by itself."""
    parts: list[ScoredRows] = []
    steps: list[Step] = []
    for sub, row_filter, narrowed in zip(question.searches, filters, narrowing, strict=True):
        asked = _asked(sub.near, sub.near.vectors, sub.limit + sub.offset, row_filter, seen)
        if question.grouping is not None and narrowed is not None and seen.views:
            parts.append(_groups(seen, asked, question.grouping, narrowed, question.field_ids, sub.limit, sub.offset))
            continue
        found, mine = _found(seen, asked, sub.offset, question.field_ids)
        parts.append(found)
        steps += mine
    return Answer.of_searches(parts, steps, seen.ticks)


def _within(text: str, templates: Mapping[str, Any], name: str, schema: CollectionSchema, value: Any) -> CompiledFilter:
    """Return the filter for rows that pass this one and have the value in the field of this name."""
    mine = f"{name} is null" if value is None else f"{name} == {{{_GROUP_VALUE}}}"
    both = f"({text}) and {mine}" if text.strip() else mine
    return compile_filter(both, schema, templates if value is None else {**templates, _GROUP_VALUE: value})


def _without(
    text: str, templates: Mapping[str, Any], name: str, schema: CollectionSchema, values: Sequence[Any]
) -> CompiledFilter:
    """Return the filter for rows that pass this one and have none of the values in the field of this name."""
    live = [value for value in values if value is not None]
    others = f"{name} not in {{{_GROUP_VALUE}}}"
    mine = f"{name} is not null and {others}" if len(live) < len(values) else f"({name} is null or {others})"
    return compile_filter(f"({text}) and {mine}" if text.strip() else mine, schema, {**templates, _GROUP_VALUE: live})


def search_grouped(seen: Snapshot, question: Question, row_filter: CompiledFilter | None, narrowed: Narrowed) -> Answer:
    """Return the answer to a search for groups, all queries at once."""
    near, grouping = question.near, question.grouping
    assert near is not None and grouping is not None and question.limit is not None, "what a search for groups has"
    asked = _asked(near, near.vectors, question.limit + question.offset, row_filter, seen)
    if not seen.views:
        return Answer.nothing(question, seen.schema, seen.ticks)
    best = _groups(seen, asked, grouping, narrowed, question.field_ids, question.limit, question.offset)
    return Answer(*best, ticks=seen.ticks)


def _groups(
    seen: Snapshot,
    asked: VectorQuery,
    grouping: Grouping,
    narrowed: Narrowed,
    field_ids: Sequence[FieldId],
    limit: int,
    offset: int,
) -> ScoredRows:
    return merge_groups(
        [search_groups(seen.views, asked, grouping, narrowed, field_ids)],
        seen.schema.primary.id,
        grouping,
        limit=limit,
        offset=offset,
        larger_is_better=asked.metric.is_similarity,
    )


def narrowed_by(asked: Question | SubQuestion, grouping: Grouping, schema: CollectionSchema) -> Narrowed:
    """Return how the filter of a search is narrowed to a group, or to the rows of none of some."""
    facts = asked.filter, asked.templates, schema.by_id[grouping.field_id].name, schema
    return Narrowed(partial(_within, *facts), partial(_without, *facts))


def query_ordered(seen: Snapshot, row_filter: CompiledFilter | None, question: Question) -> Batch:
    """Return the rows that match, in the order that is asked for."""
    refs = query(seen.views, row_filter, tick=seen.tick, expire_before=seen.expire_before)
    primary = seen.schema.primary.id
    looked_at = seen.fetch(refs, with_fields((primary,), [one.field_id for one in question.orders]))
    order = ordered(looked_at, primary, question.orders, limit=question.limit, offset=question.offset)
    return seen.fetch(Refs(refs.views[order], refs.offsets[order]), question.field_ids)


def aggregate_rows(
    seen: Snapshot, row_filter: CompiledFilter | None, aggregation: Aggregation, most: int | None
) -> Groups:
    """Return what is aggregated of the rows that match, for so many groups at most."""
    refs = query(seen.views, row_filter, tick=seen.tick, expire_before=seen.expire_before)
    batch = seen.fetch(refs, aggregation.field_ids)
    return aggregate(Batch(batch.columns, len(refs)), aggregation, most)


def query_and_fetch(
    seen: Snapshot, row_filter: CompiledFilter | None, limit: int | None, offset: int, field_ids: Sequence[FieldId]
) -> Batch:
    """Return the rows that match, by primary key."""
    refs = query(seen.views, row_filter, tick=seen.tick, expire_before=seen.expire_before, limit=limit, offset=offset)
    return seen.fetch(refs, field_ids)


def find_and_fetch(
    seen: Snapshot, keys: Keys, field_ids: Sequence[FieldId], inserted: bool
) -> tuple[Batch, npt.NDArray[np.int64]]:
    """Return the rows with these keys, and if wanted the ticks at which they were inserted."""
    refs = find_keys(seen.views, keys, tick=seen.tick, expire_before=seen.expire_before)
    return seen.fetch(refs, field_ids), inserted_ticks(seen.views, refs) if inserted else NO_TICKS


def count_terms(seen: Snapshot, question: Question) -> Answer:
    """Return how many rows there are, how many terms they have, and in how many each of the terms is."""
    assert isinstance(question.keys, np.ndarray), "terms are numbers"
    terms = question.keys.tolist()
    found = statistics(seen.views, question.field_ids[0], terms, seen.tick, seen.expire_before)
    numbers = np.concatenate([np.array([found.terms], np.int64), found.with_term])
    return replace(Answer.of_rows(Batch({}, 0), seen.ticks, numbers), count=found.rows)


def count_rows(seen: Snapshot, row_filter: CompiledFilter | None) -> int:
    """Return how many rows match."""
    return count(seen.views, row_filter, tick=seen.tick, expire_before=seen.expire_before)
