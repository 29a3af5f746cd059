"""Searching for groups: the best rows of each of the best groups, a group being the rows with one value of a field.

A group is as near as its nearest row. The hits of a search, taken in their order until enough values have come up, give
the groups exactly. Where a few values have so many rows that the others are far behind them, the next groups are
searched for among the rows with other values; and rows that a group still lacks among its own. So each group has its
best rows, and fewer than were asked for only if it has no more: Milvus's strict group size, always.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

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
_HITS_MAX: Final = 1 << 16
"""Of all queries together, to which that goes on. Each costs memory, and a value may have all rows of a collection."""

_Hit: TypeAlias = tuple[int, int, float]
"""(view, offset, distance)."""
_ValuedHit: TypeAlias = tuple[Hashable, _Hit]
"""What the row has in the field, then the hit."""


@dataclass(frozen=True)
class Grouping:
    field_id: FieldId
    size: int = 1
    """Rows of each group."""


@dataclass(frozen=True)
class Narrowed:
    """Makes filters for those rows of a query's that have certain values in the field; None stands for null."""

    within: Callable[[Any], CompiledFilter]
    """This value."""
    without: Callable[[Sequence[Any]], CompiledFilter]
    """None of these."""


def search_groups(
    views: Sequence[SegmentView],
    query: VectorQuery,
    grouping: Grouping,
    narrowed: Narrowed,
    field_ids: Sequence[FieldId],
) -> ScoredRows:
    """Return the best rows of the `query.limit` best groups of each query, one group after the other.

    narrowed   of the query's filter and the grouping's field
    field_ids  to fetch, the grouping's field among them
    """
    query = replace(query, explain=False)
    possible = sum(view.rows for view in views)
    fetched = min(possible, query.limit * grouping.size)
    while True:
        lines = _hits(views, replace(query, limit=fetched) if fetched else query, grouping.field_id)
        wider = min(possible, _WIDER * fetched)
        if wider * len(lines) > max(_HITS_MAX, fetched * len(lines)) or not any(
            len(line) == fetched < possible and len({value for value, _ in line}) < query.limit for line in lines
        ):
            break
        fetched = wider
    every = fetched >= possible
    states = [_Line(query.limit, line, is_all=every or len(line) < fetched) for line in lines]
    wanted = max(1, fetched)
    while short := [i for i, state in enumerate(states) if not state.has_all_groups]:
        for members in _alike(short, lambda i: frozenset(states[i].groups)):
            others = narrowed.without(list(states[members[0]].groups))
            asked = replace(query, limit=wanted, filter=others)
            for i, line in _each(views, asked, members, grouping.field_id):
                states[i].add(line, is_all=len(line) < wanted)
        wanted = min(_WIDER * wanted, max(wanted, _HITS_MAX))
    lacking: dict[Hashable, list[int]] = {}
    for i, state in enumerate(states):
        for value in state.lacking(grouping.size):
            lacking.setdefault(value, []).append(i)
    for value, members in lacking.items():
        asked = replace(query, limit=grouping.size, filter=narrowed.within(value))
        for i, line in _each(views, asked, members, grouping.field_id):
            states[i].groups[value] = [hit for _, hit in line]
    found = [[hit for rows in state.groups.values() for hit in rows[: grouping.size]] for state in states]
    rows = Refs(
        np.array([view for line in found for view, _, _ in line], np.int64),
        np.array([offset for line in found for _, offset, _ in line], np.int64),
    )
    distances = np.array([distance for line in found for _, _, distance in line], np.float32)
    return ScoredRows(
        [len(line) for line in found],
        query.metric.scores(distances).astype(np.float32, copy=False),
        fetch(views, rows, field_ids),
    )


class _Line:
    """The groups of one query, the best first, as far as they have come up.

    most  so many are wanted
    """

    def __init__(self, most: int, hits: Sequence[_ValuedHit], *, is_all: bool) -> None:
        self.groups: dict[Hashable, list[_Hit]] = {}
        self.has_all_groups = False
        self._most = most
        self._whole: set[Hashable] = set()
        """Groups of which all rows have come up."""
        self.add(hits, is_all=is_all)

    def add(self, hits: Sequence[_ValuedHit], *, is_all: bool) -> None:
        """Take the nearest rows of groups that have not come up; `is_all` if there are no others."""
        known = set(self.groups)
        for value, hit in hits:
            if value in self.groups or len(self.groups) < self._most:
                self.groups.setdefault(value, []).append(hit)
        if is_all:
            self._whole |= self.groups.keys() - known
        self.has_all_groups = is_all or len(self.groups) >= self._most

    def lacking(self, size: int) -> list[Hashable]:
        """Return the groups that may have more rows than came up, of which so many are wanted."""
        return [value for value, hits in self.groups.items() if len(hits) < size and value not in self._whole]


def _alike(members: Sequence[int], key: Callable[[int], Hashable]) -> Iterable[list[int]]:
    """Return the members with equal keys together."""
    found: dict[Hashable, list[int]] = {}
    for one in members:
        found.setdefault(key(one), []).append(one)
    return found.values()


def _each(
    views: Sequence[SegmentView], query: VectorQuery, members: Sequence[int], field_id: FieldId
) -> Iterator[tuple[int, list[_ValuedHit]]]:
    """Yield (number, hits) of these of the queries, so many of them searched for at once as memory allows."""
    step = max(1, _HITS_MAX // query.limit)
    for first in range(0, len(members), step):
        some = members[first : first + step]
        yield from zip(
            some, _hits(views, replace(query, queries=take(query.queries, np.array(some))), field_id), strict=True
        )


def _hits(views: Sequence[SegmentView], query: VectorQuery, field_id: FieldId) -> list[list[_ValuedHit]]:
    """Return the hits of each query with the values that they have in the field."""
    hits = search(views, query)
    refs = hits.refs()
    values = _values(fetch(views, refs, [field_id]) if len(refs) else None, field_id)
    rows = zip(refs.views.tolist(), refs.offsets.tolist(), hits.distances[hits.offsets >= 0].tolist(), strict=True)
    pairs = list(zip(values, rows, strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(np.cumsum([0, *hits.counts.tolist()]).tolist())]


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
