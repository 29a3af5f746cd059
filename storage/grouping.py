"""Searching for groups: the best rows of each of the best groups, a group being the rows with one value of a field.

A group is as near as its nearest row. The hits of a search, taken in their order until enough values have come up, give
the groups exactly; rows that a group still lacks are searched for among its own. So each group has its best rows, and
fewer than were asked for only if it has no more: Milvus's strict group size, always.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from storage.columns import Batch
from storage.filter import CompiledFilter
from storage.merging import ScoredRows, key_ranks
from storage.search import Refs, VectorQuery, fetch, search
from storage.types import FieldId
from storage.vectors import take
from storage.view import SegmentView

_WIDER: Final = 4
"""How many times more hits are looked at where there were too few values among them."""


@dataclass(frozen=True)
class Grouping:
    field_id: FieldId
    size: int = 1
    """Rows of each group."""


def search_groups(
    views: Sequence[SegmentView],
    query: VectorQuery,
    grouping: Grouping,
    within: Callable[[Any], CompiledFilter],
    field_ids: Sequence[FieldId],
) -> ScoredRows:
    """Return the best rows of the `query.limit` best groups of each query, one group after the other.

    within     the query's filter for rows with this value of the field, null if it is None
    field_ids  to fetch, the grouping's field among them
    """
    query = replace(query, explain=False)
    possible = sum(view.rows for view in views)
    fetched = min(possible, query.limit * grouping.size)
    while True:
        hits = search(views, replace(query, limit=fetched)) if fetched else search(views, query)
        refs = hits.refs()
        values = _values(fetch(views, refs, [grouping.field_id]) if len(refs) else None, grouping.field_id)
        counts = hits.counts.tolist()
        ends = np.cumsum([0, *counts]).tolist()
        lines = [values[a:b] for a, b in itertools.pairwise(ends)]
        if fetched >= possible or all(
            count < fetched or len(set(line)) >= query.limit for line, count in zip(lines, counts, strict=True)
        ):
            break
        fetched = min(possible, _WIDER * fetched)
    found: list[tuple[list[int], list[int], list[float]]] = []
    for line, mine in enumerate(lines):
        first = ends[line]
        distances = hits.distances[line]
        groups: dict[Hashable, list[int]] = {}
        for place, value in enumerate(mine):
            if value in groups or len(groups) < query.limit:
                groups.setdefault(value, []).append(place)
        numbers: list[int] = []
        offsets: list[int] = []
        scores: list[float] = []
        for value, places in groups.items():
            if len(places) < grouping.size and counts[line] == fetched < possible:
                more = search(
                    views,
                    replace(
                        query, queries=take(query.queries, np.array([line])), limit=grouping.size, filter=within(value)
                    ),
                )
                rows = more.refs()
                numbers += rows.views.tolist()
                offsets += rows.offsets.tolist()
                scores += more.distances[0][: len(rows)].tolist()
            else:
                chosen = places[: grouping.size]
                numbers += [int(refs.views[first + place]) for place in chosen]
                offsets += [int(refs.offsets[first + place]) for place in chosen]
                scores += [float(distances[place]) for place in chosen]
        found.append((numbers, offsets, scores))
    rows = Refs(
        np.array([one for numbers, _, _ in found for one in numbers], np.int64),
        np.array([one for _, offsets, _ in found for one in offsets], np.int64),
    )
    distances = np.array([one for _, _, some in found for one in some], np.float32)
    return ScoredRows(
        [len(numbers) for numbers, _, _ in found],
        query.metric.scores(distances).astype(np.float32, copy=False),
        fetch(views, rows, field_ids),
    )


def merge_groups(
    parts: Sequence[ScoredRows],
    primary: FieldId,
    grouping: Grouping,
    *,
    limit: int,
    offset: int = 0,
    larger_is_better: bool,
) -> ScoredRows:
    """Return the best groups of all parts for each query, without the first `offset` ones, at most `limit`.

    Each part has the best limit + offset groups of its shards.
    """
    batch = Batch.concat([part.batch for part in parts])
    queries = len(parts[0].counts)
    owners = np.concatenate([np.repeat(np.arange(queries), np.asarray(part.counts, np.int64)) for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    order = np.lexsort((key_ranks(batch.columns[primary]), -scores if larger_is_better else scores, owners))
    values = _values(batch, grouping.field_id)
    groups: list[dict[Hashable, list[int]]] = [{} for _ in range(queries)]
    for place in order.tolist():
        mine = groups[int(owners[place])].setdefault(values[place], [])
        if len(mine) < grouping.size:
            mine.append(place)
    kept = [[one for rows in list(line.values())[offset : offset + limit] for one in rows] for line in groups]
    chosen = np.array([one for line in kept for one in line], np.int64)
    return ScoredRows([len(line) for line in kept], scores[chosen], batch.take(chosen))


def _values(batch: Batch | None, field_id: FieldId) -> list[Any]:
    return [] if batch is None else batch.columns[field_id].to_list()
