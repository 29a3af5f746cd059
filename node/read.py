"""Reads: views of the segments concerned, one call of a worker thread, rows out.

Searches that differ only in their vectors and wait at the same moment are answered by one call of the engine: while
batches of them run, the next one gathers. A batch takes its views when it starts, which is after each of its requests
came in, so each sees every write that was acknowledged before it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cluster.catalog import Collection
from index.spec import IndexSpec, SpecError, parse_search_params
from node.metrics import PlanKind
from node.node import Node
from node.service import ReadOptions, Rows, SearchRequest, SearchResult
from storage.columns import Batch, VectorColumn
from storage.errors import (
    BadJson,
    BadPrimaryKey,
    CollectionNotLoaded,
    FieldNotFound,
    InvalidParameter,
    MissingParameter,
    PartitionNotLoaded,
)
from storage.filter.compiled import CompiledFilter, compile_filter
from storage.key_lookup import Keys, batch_keys, key_list
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.search import (
    Refs,
    Step,
    VectorQuery,
    count,
    fetch,
    find_keys,
    query,
    search,
)
from storage.types import CollectionId, FieldId, PartitionId, Tick
from storage.view import SegmentView, empty_column

BATCHES_MAX: Final = 1
"""Batches of one kind at the same time. Two were measured slower, with a longer tail: they and the loop contend for the
interpreter, and each engine call has fewer queries."""
FILTERS_KEPT: Final = 256
FILTER_CHARS_KEPT_MAX: Final = 4_096
COUNT: Final = "count(*)"


@dataclass(frozen=True)
class Output:
    """Which fields an answer shows; `dynamic_keys` as in `Rows`."""

    fields: tuple[FieldSchema, ...]
    dynamic_keys: tuple[str, ...] | None = ()

    def field_ids(self, schema: CollectionSchema) -> list[FieldId]:
        """Return the columns to fetch: what is shown, and `$meta` if any of its keys is."""
        ids = [one.id for one in self.fields]
        if self.dynamic_keys != () and schema.dynamic is not None:
            ids.append(schema.dynamic.id)
        return ids


@dataclass(frozen=True)
class Snapshot:
    """What a read sees."""

    schema: CollectionSchema
    views: Sequence[SegmentView]
    tick: Tick
    expire_before: Tick

    def fetch(self, refs: Refs, field_ids: Sequence[FieldId]) -> Batch:
        """Return these fields of rows that were found in this snapshot."""
        if len(refs) == 0:
            return Batch({one: empty_column(self.schema.by_id[one]) for one in field_ids}, 0)
        return fetch(self.views, refs, field_ids)


@dataclass(frozen=True)
class Answer:
    """What one search found: `counts[i]` rows of query i, all rows and their scores one query after the other."""

    counts: Sequence[int]
    scores: npt.NDArray[np.float32]
    batch: Batch
    steps: Sequence[Step]


@dataclass
class _Gathering:
    """Searches of one kind, which differ in their vectors only, that wait for a batch before them."""

    asked: VectorQuery
    field_ids: Sequence[FieldId]
    offset: int
    waiting: list[tuple[npt.NDArray[np.float32], asyncio.Future[Answer]]] = field(default_factory=list)
    running: int = 0


class Reader:
    """Answers queries and searches of this node's shards. One per node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._filters: OrderedDict[tuple[CollectionId, int, str], CompiledFilter] = OrderedDict()
        self._gathering: dict[Hashable, _Gathering] = {}

    # searches

    async def search(self, collection: Collection, request: SearchRequest, options: ReadOptions) -> SearchResult:
        """Return the nearest rows of each query vector."""
        partitions = _readable_partitions(collection, options.partitions)
        anns_field = _anns_field(collection.schema, request.anns_field)
        spec = self._index_spec(collection, anns_field, request.metric_type)
        output = resolve_output(collection.schema, options.output_fields)
        wanted = request.limit + request.offset
        try:
            params = parse_search_params(request.params, spec, k=wanted)
        except SpecError as error:
            raise InvalidParameter(str(error)) from error
        row_filter = self.compile(collection, options)
        vectors = await self._query_vectors(collection, anns_field, request, options)
        asked = VectorQuery(
            queries=vectors,
            field_id=anns_field.id,
            metric=spec.metric,
            limit=wanted,
            tick=Tick(0),
            params=params,
            filter=None if row_filter.always_true else row_filter,
            explain=True,
        )
        kind = (
            collection.collection_id, partitions, anns_field.id, wanted, params, options.filter, options.ignore_growing,
            repr(options.params) if options.params else "", tuple(output.field_ids(collection.schema)), request.offset,
        )  # fmt: skip
        answer = await self._gather(kind, collection, partitions, options, asked, output, request.offset)
        for step in answer.steps:
            self._node.metrics.searched(PlanKind(step.plan))
        scores = answer.scores
        if request.round_decimal >= 0:
            scores = np.round(scores, request.round_decimal)
        explain = [step.to_dict() for step in answer.steps] if options.explain else ()
        return SearchResult(self._rows(collection.schema, answer.batch, output, explain=explain), scores, answer.counts)

    async def _gather(
        self,
        kind: Hashable,
        collection: Collection,
        partitions: frozenset[PartitionId] | None,
        options: ReadOptions,
        asked: VectorQuery,
        output: Output,
        offset: int,
    ) -> Answer:
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        gathering = self._gathering.get(kind)
        if gathering is None:
            gathering = self._gathering[kind] = _Gathering(asked, output.field_ids(collection.schema), offset)
        gathering.waiting.append((asked.queries, waiter))
        if gathering.running < BATCHES_MAX:
            gathering.running += 1
            task = asyncio.get_running_loop().create_task(
                self._run_gathered(kind, gathering, collection, partitions, options.ignore_growing)
            )
            self._node.keep(task)
        return await waiter

    async def _run_gathered(
        self,
        kind: Hashable,
        gathering: _Gathering,
        collection: Collection,
        partitions: frozenset[PartitionId] | None,
        ignore_growing: bool,
    ) -> None:
        try:
            while gathering.waiting:
                batch, gathering.waiting = gathering.waiting, []
                batch = [one for one in batch if not one[1].done()]  # whose client has gone
                if not batch:
                    continue
                try:
                    seen = self.snapshot(collection, partitions, growing=not ignore_growing)
                    answers = await self._node.read(_search_and_fetch, seen, gathering, [one for one, _ in batch])
                except Exception as error:  # whatever it is, those who wait must hear of it
                    for _, waiter in batch:
                        if not waiter.done():
                            waiter.set_exception(error)
                else:
                    for (_, waiter), answer in zip(batch, answers, strict=True):
                        if not waiter.done():
                            waiter.set_result(answer)
        finally:
            gathering.running -= 1
            if not gathering.running and self._gathering.get(kind) is gathering:
                del self._gathering[kind]

    async def _query_vectors(
        self, collection: Collection, anns_field: FieldSchema, request: SearchRequest, options: ReadOptions
    ) -> npt.NDArray[np.float32]:
        if request.ids is not None:
            return await self._stored_vectors(collection, anns_field, request.ids)
        vectors = request.vectors
        if vectors is None or len(vectors) == 0:
            raise MissingParameter("missing required parameters, error: either data or ids must be given")
        if vectors.ndim != 2 or vectors.shape[1] != anns_field.dim:
            raise BadJson(
                f"can only accept json format request, error: dimension: {anns_field.dim}, but length of []float: "
                f"{vectors.shape[-1]}: field {anns_field.name} has vectors of {anns_field.dim} components"
            )
        return vectors

    async def _stored_vectors(
        self, collection: Collection, anns_field: FieldSchema, ids: Sequence[int | str]
    ) -> npt.NDArray[np.float32]:
        keys = typed_keys(collection.schema.primary, ids)
        seen = self.snapshot(collection, None)
        found = await self._node.read(_find_and_fetch, seen, keys, [collection.schema.primary.id, anns_field.id])
        at = {key: i for i, key in enumerate(key_list(batch_keys(found, collection.schema.primary.id)))}
        missing = [key for key in key_list(keys) if key not in at]
        if missing:
            raise InvalidParameter(f"primary keys not found: {', '.join(map(str, missing[:10]))}")
        column = found.columns[anns_field.id]
        assert isinstance(column, VectorColumn)
        return column.values[[at[key] for key in key_list(keys)]]

    # rows

    async def query(self, collection: Collection, options: ReadOptions, *, limit: int, offset: int) -> Rows:
        """Return the rows that match, by primary key ascending; limit 0 means all."""
        partitions = _readable_partitions(collection, options.partitions)
        row_filter = self.compile(collection, options)
        growing = not options.ignore_growing
        seen = self.snapshot(collection, partitions, growing=growing)
        if [name.replace(" ", "").lower() for name in options.output_fields] == [COUNT]:
            rows = await self._node.read(_count, seen, row_filter)
            return Rows(collection.schema, Batch({}, 0), (), count=rows)
        output = resolve_output(collection.schema, options.output_fields)
        batch = await self._node.read(
            _query_and_fetch, seen, row_filter, limit or None, offset, self._columns(collection, output)
        )
        return self._rows(collection.schema, batch, output)

    async def get(self, collection: Collection, ids: Sequence[int | str], options: ReadOptions) -> Rows:
        """Return the rows with these primary keys; keys without a row are skipped."""
        partitions = _readable_partitions(collection, options.partitions)
        keys = typed_keys(collection.schema.primary, ids)
        output = resolve_output(collection.schema, options.output_fields)
        seen = self.snapshot(collection, partitions)
        batch = await self._node.read(_find_and_fetch, seen, keys, self._columns(collection, output))
        return self._rows(collection.schema, batch, output)

    async def matching_keys(
        self, collection: Collection, row_filter: CompiledFilter, partitions: frozenset[PartitionId] | None
    ) -> Keys:
        """Return the primary keys of the rows that match: what a delete by filter deletes."""
        seen = self.snapshot(collection, partitions)
        primary = collection.schema.primary.id
        batch = await self._node.read(_query_and_fetch, seen, row_filter, None, 0, [primary])
        return batch_keys(batch, primary)

    async def row_count(self, collection: Collection, partitions: frozenset[PartitionId] | None) -> int:
        """Return the number of live rows."""
        seen = self.snapshot(collection, partitions)
        return await self._node.read(_count, seen, None)

    def snapshot(
        self, collection: Collection, partitions: frozenset[PartitionId] | None, *, growing: bool = True
    ) -> Snapshot:
        """Return what a read that begins now sees: everything acknowledged before."""
        views: list[SegmentView] = []
        tick = Tick(0)
        expire_before = Tick(0)
        chosen = None if partitions is None else sorted(partitions)
        for shard_id in sorted(set(collection.shards)):
            shard = self._node.shards[shard_id].machine
            views += shard.views(collection.collection_id, chosen, growing=growing)
            tick = max(tick, shard.tick)
            state = shard.collections.get(collection.collection_id)
            if state is not None:
                expire_before = state.expire_before(self._node.hybrid.stamp())
        return Snapshot(collection.schema, views, tick, expire_before)

    def compile(self, collection: Collection, options: ReadOptions) -> CompiledFilter:
        """Return the compiled filter of a request; texts without templates are remembered."""
        key = (collection.collection_id, collection.schema.version, options.filter)
        known = None if options.params else self._filters.get(key)
        if known is None:
            known = compile_filter(options.filter, collection.schema, options.params)
            if not options.params and len(options.filter) <= FILTER_CHARS_KEPT_MAX:
                self._filters[key] = known
                if len(self._filters) > FILTERS_KEPT:
                    self._filters.popitem(last=False)
        else:
            self._filters.move_to_end(key)
        return known

    def _index_spec(self, collection: Collection, anns_field: FieldSchema, metric_type: str) -> IndexSpec:
        index = collection.index_on(anns_field.name)
        if index is None:
            raise InvalidParameter(
                f"there is no vector index on field: [{anns_field.name}], please create index firstly"
            )
        if metric_type and metric_type.upper() != index.metric_type:
            raise InvalidParameter(
                f"metric type not match: invalid parameter[expected={index.metric_type}][actual={metric_type}]"
            )
        return IndexSpec.from_dict(index.spec)

    @staticmethod
    def _columns(collection: Collection, output: Output) -> list[FieldId]:
        return output.field_ids(collection.schema)

    @staticmethod
    def _rows(
        schema: CollectionSchema, batch: Batch, output: Output, *, explain: Sequence[Mapping[str, Any]] = ()
    ) -> Rows:
        return Rows(schema, batch, [one.name for one in output.fields], output.dynamic_keys, explain=explain)


# in worker threads


def _search_and_fetch(
    seen: Snapshot, gathering: _Gathering, vectors: Sequence[npt.NDArray[np.float32]]
) -> list[Answer]:
    """Return the answers to searches of one kind: one call of the engine, one fetch for all their rows."""
    matrix = vectors[0] if len(vectors) == 1 else np.concatenate(vectors)
    asked = replace(gathering.asked, queries=matrix, tick=seen.tick, expire_before=seen.expire_before)
    hits = search(seen.views, asked)
    views, offsets = hits.views[:, gathering.offset :], hits.offsets[:, gathering.offset :]
    found = offsets >= 0
    rows = seen.fetch(Refs(views[found], offsets[found]), gathering.field_ids)
    scores = asked.metric.scores(hits.distances[:, gathering.offset :][found]).astype(np.float32, copy=False)
    counts = found.sum(axis=1).tolist()
    answers, first, row = [], 0, 0
    for one in vectors:
        mine = counts[first : first + len(one)]
        first, stop = first + len(one), row + sum(mine)
        answers.append(Answer(mine, scores[row:stop], rows.slice(row, stop), hits.steps))
        row = stop
    return answers


def _query_and_fetch(
    seen: Snapshot, row_filter: CompiledFilter, limit: int | None, offset: int, field_ids: Sequence[FieldId]
) -> Batch:
    refs = query(seen.views, row_filter, tick=seen.tick, expire_before=seen.expire_before, limit=limit, offset=offset)
    return seen.fetch(refs, field_ids)


def _find_and_fetch(seen: Snapshot, keys: Keys, field_ids: Sequence[FieldId]) -> Batch:
    refs = find_keys(seen.views, keys, tick=seen.tick, expire_before=seen.expire_before)
    return seen.fetch(refs, field_ids)


def _count(seen: Snapshot, row_filter: CompiledFilter | None) -> int:
    return count(seen.views, row_filter, tick=seen.tick, expire_before=seen.expire_before)


# what a request names


def typed_keys(primary: FieldSchema, ids: Sequence[int | str]) -> Keys:
    """Return the primary keys as the field has them. Raises BadPrimaryKey."""
    if primary.type is DataType.VARCHAR:
        return [str(one) for one in ids]
    try:
        return np.array([int(one) for one in ids], np.int64)
    except (ValueError, OverflowError) as error:
        raise BadPrimaryKey(f"please check the primary key and its' type can only in [int, string]: {error}") from error


def resolve_output(schema: CollectionSchema, names: Sequence[str]) -> Output:
    """Return the fields to show for these names: declared ones, "*", dynamic keys. The primary key always is."""
    chosen: dict[str, FieldSchema] = {}
    dynamic: list[str] | None = []
    for name in names:
        if name == "*":
            chosen.update((one.name, one) for one in schema.user_fields)
            dynamic = None
        elif name in schema.by_name and not schema.by_name[name].dynamic:
            chosen[name] = schema.by_name[name]
        elif schema.dynamic is None:
            raise FieldNotFound(f"field {name} not exist; fields: {', '.join(one.name for one in schema.user_fields)}")
        elif name == schema.dynamic.name:
            dynamic = None
        elif dynamic is not None:
            dynamic.append(name)
    chosen.setdefault(schema.primary.name, schema.primary)
    if schema.dynamic is None:
        dynamic = []
    return Output(tuple(chosen.values()), None if dynamic is None else tuple(dict.fromkeys(dynamic)))


def _anns_field(schema: CollectionSchema, name: str) -> FieldSchema:
    if not name:
        if len(schema.vectors) > 1:
            names = ", ".join(one.name for one in schema.vectors)
            raise BadJson(
                f"can only accept json format request, error: multiple vector fields ({names}): set annsField to one"
            )
        return schema.vectors[0]
    found = schema.by_name.get(name)
    if found is None or not found.type.is_vector:
        names = ", ".join(one.name for one in schema.vectors)
        raise BadJson(f"can only accept json format request, error: no vector field {name}; vector fields: {names}")
    return found


def _readable_partitions(collection: Collection, names: Sequence[str]) -> frozenset[PartitionId] | None:
    """Return the partitions to read, None for all. Raises if any of them is not loaded."""
    if not collection.is_loaded:
        raise CollectionNotLoaded(collection.name)
    if not names:
        return collection.loaded
    chosen = frozenset(collection.partition(name) for name in names)
    if collection.loaded is not None:
        for name in names:
            if collection.partition(name) not in collection.loaded:
                raise PartitionNotLoaded(name)
    return chosen
