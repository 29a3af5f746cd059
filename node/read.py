"""Reads: views of the segments concerned, one call of a worker thread, rows out.

A read is answered here as far as the replicas here are fresh enough (`node/freshness.py`), and by other nodes for the
other shards (`node/subread.py`); what comes back becomes one answer. Where every shard is here and fresh, which is the
rule, there is one snapshot, one call of the engine, which searches that wait at the same moment share (`batching.py`),
and nothing to merge.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from cluster.catalog import Collection
from index.metric import Metric
from index.protocol import Form
from index.sparse import SparseRows
from index.spec import IndexSpec, SearchParams, SpecError, parse_search_params
from node.answering import (
    Snapshot,
    aggregate_rows,
    count_rows,
    count_terms,
    find_and_fetch,
    narrowed_by,
    query_and_fetch,
    query_ordered,
    search_all,
    search_grouped,
)
from node.batching import Batching, Target
from node.calls import Answer as Reply
from node.freshness import Freshness, Need, Needs
from node.metrics import PlanKind, Routed
from node.network import Link
from node.node import Node
from node.resolve import (
    COUNT,
    Output,
    aggregation_of,
    check_form,
    group_field,
    orders_of,
    partitions_of_key,
    readable_partitions,
    resolve_output,
    typed_keys,
    vector_field,
    with_fields,
)
from node.route import PATIENCE_S, name_of, one_error
from node.scope import current
from node.service import Consistency, HybridRequest, ReadOptions, Rows, SearchRequest, SearchResult
from node.subread import Answer, Kind, Nearness, Question, SubQuestion, merge_answers
from storage.aggregation import finished
from storage.bm25 import Statistics, weighted
from storage.columns import Batch
from storage.errors import (
    BadJson,
    CollectionNotFound,
    InvalidParameter,
    MissingParameter,
    NotFresh,
    SchemaMismatch,
    SnapshotGone,
    StorageFault,
    Unavailable,
)
from storage.filter.compiled import CompiledFilter, compile_filter
from storage.filter.indexed import Indexed
from storage.fusion import FusedGroups, fuse
from storage.grouping import Grouping, Narrowed
from storage.key_lookup import Keys, batch_keys, key_list
from storage.merging import rounded
from storage.ordering import sort_keys
from storage.schema import CollectionSchema, FieldSchema
from storage.search import (
    Step,
)
from storage.types import CollectionId, FieldId, PartitionId, ShardId, Tick
from storage.vectors import Vectors, searchable
from storage.view import SegmentView

FILTERS_KEPT: Final = 256
FILTER_CHARS_KEPT_MAX: Final = 4_096
PLANS_KEPT: Final = 256
PLAN_CHARS_KEPT_MAX: Final = 4_096
GROUPS_MAX: Final = 16_384
"""Of a query that aggregates and names no limit."""
READ_METHOD: Final = "shard/read"
SMALL_ROWS_MAX: Final = 256
"""Answers of at most so many rows without vectors travel with the small calls, not behind chunks."""
STRONG: Final = Consistency.STRONG
NO_OPTIONS: Final = ReadOptions()
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What a search of a collection asks for beside its vectors, found out once for all that differ in these only."""

    collection: Collection
    """As it was then: a change of the catalogue makes another object of it."""
    anns_field: FieldSchema
    spec: IndexSpec
    output: Output
    params: SearchParams
    row_filter: CompiledFilter
    partitions: frozenset[PartitionId] | None
    field_ids: tuple[FieldId, ...]


class Reader:
    """Answers queries and searches, for the clients of this node and for other nodes. One per node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._fresh = Freshness(node)
        self._filters: OrderedDict[Hashable, CompiledFilter] = OrderedDict()
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._batching = Batching(node, self.snapshot)
        if node.mesh is not None:
            node.mesh.serve(READ_METHOD, self._serve)

    # searches

    async def search(self, collection: Collection, request: SearchRequest, options: ReadOptions) -> SearchResult:
        """Return the nearest rows of each query vector."""
        plan = self._plan(collection, request, options)
        near = await self._near(collection, plan, request, options)
        grouping, orders, columns = None, orders_of(collection.schema, options.order_by), plan.field_ids
        if request.group_by_field:
            grouping = Grouping(group_field(collection.schema, request.group_by_field).id, request.group_size)
            columns = with_fields(columns, [grouping.field_id])
        if orders:
            columns = with_fields(columns, [one.field_id for one in orders])
        question = Question(
            Kind.SEARCH,
            collection.collection_id,
            plan.partitions,
            not options.ignore_growing,
            options.filter,
            options.params,
            columns,
            request.limit,
            request.offset,
            near=near,
            grouping=grouping,
        )
        answer = await self._ask(collection, question, plan.row_filter, options)
        scores, batch = rounded(answer.scores, request.round_decimal), answer.batch
        if orders and batch.rows:
            owners = np.repeat(np.arange(len(answer.counts)), np.asarray(answer.counts, np.int64))
            order = np.lexsort([*sort_keys(batch, orders), owners])
            scores, batch = scores[order], batch.take(order)
        rows = self._rows(collection.schema, batch, plan.output, explain=self._explained(answer.steps, options))
        return SearchResult(rows, scores, answer.counts)

    async def hybrid(self, collection: Collection, request: HybridRequest, options: ReadOptions) -> SearchResult:
        """Return the best rows of several searches, all of one snapshot, ranked anew."""
        searches, plan, groups = [], None, None
        if request.group_by_field:
            field = group_field(collection.schema, request.group_by_field)
            groups = FusedGroups(Grouping(field.id, request.group_size), request.group_scorer)
        for one in request.searches:
            mine = replace(options, filter=one.filter, params=one.params)
            plan = self._plan(collection, one.request, mine)
            near = await self._near(collection, plan, one.request, mine)
            searches.append(SubQuestion(near, one.request.limit, one.request.offset, one.filter, one.params))
        if plan is None:
            raise MissingParameter("missing required parameters, error: a hybrid search has one search or more")
        counts = [len(one.near.vectors) for one in searches]
        if len(set(counts)) > 1:
            raise InvalidParameter(f"nq of all searches of a hybrid search must be the same, got {counts}")
        question = Question(
            Kind.HYBRID,
            collection.collection_id,
            plan.partitions,
            not options.ignore_growing,
            field_ids=plan.field_ids if groups is None else with_fields(plan.field_ids, [groups.grouping.field_id]),
            searches=tuple(searches),
            grouping=None if groups is None else groups.grouping,
        )
        answer = await self._ask(collection, question, None, options)
        found = fuse(
            answer.by_search(question),
            [one.near.metric for one in searches],
            request.ranker,
            collection.schema.primary.id,
            limit=request.limit,
            offset=request.offset,
            groups=groups,
        )
        scores = rounded(found.scores, request.round_decimal)
        rows = self._rows(collection.schema, found.batch, plan.output, explain=self._explained(answer.steps, options))
        return SearchResult(rows, scores, found.counts)

    def _explained(self, steps: Sequence[Step], options: ReadOptions) -> Sequence[Mapping[str, Any]]:
        """Count how the segments were searched, and return it if that is asked for."""
        for step in steps:
            self._node.metrics.searched(PlanKind(step.plan))
        return [step.to_dict() for step in steps] if options.explain else ()

    def _plan(self, collection: Collection, request: SearchRequest, options: ReadOptions) -> _Plan:
        key = (
            collection.collection_id, request.anns_field, request.limit + request.offset, request.metric_type,
            repr(request.params), options.filter, tuple(options.output_fields), tuple(options.partitions),
        )  # fmt: skip
        known = self._plans.get(key)
        if known is not None and known.collection is collection and not options.params:
            self._plans.move_to_end(key)
            return known
        partitions = readable_partitions(collection, options.partitions)
        anns_field = vector_field(collection.schema, request.anns_field)
        spec = self._index_spec(collection, anns_field, request.metric_type)
        output = resolve_output(collection.schema, options.output_fields)
        try:
            params = parse_search_params(request.params, spec, k=request.limit + request.offset)
        except SpecError as error:
            raise InvalidParameter(str(error)) from error
        row_filter = self.compile(collection, options)
        partitions = partitions_of_key(collection, row_filter, partitions, isolated=True)
        columns = tuple(output.field_ids(collection.schema))
        plan = _Plan(collection, anns_field, spec, output, params, row_filter, partitions, columns)
        if not options.params and sum(map(len, (key[4], key[5], *key[6], *key[7]))) <= PLAN_CHARS_KEPT_MAX:
            self._plans[key] = plan
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        return plan

    async def _near(
        self, collection: Collection, plan: _Plan, request: SearchRequest, options: ReadOptions
    ) -> Nearness:
        """Return what is searched for, weighted by the statistics of all rows where the metric wants that."""
        vectors, params = await self._query_vectors(collection, plan.anns_field, request, options), plan.params
        if plan.spec.metric is Metric.BM25:
            assert isinstance(vectors, SparseRows), "BM25 is of sparse vectors"
            terms = np.unique(vectors.terms).astype(np.int64)
            question = Question(
                Kind.TERMS,
                collection.collection_id,
                collection.loaded,
                not options.ignore_growing,
                field_ids=(plan.anns_field.id,),
                keys=terms,
            )
            answer = await self._ask(collection, question, None, options)
            total, *with_term = answer.inserted.tolist() or [0] * (1 + len(terms))
            known = Statistics(answer.count, total, np.array(with_term, np.int64))
            vectors, params = weighted(vectors, terms.tolist(), known, plan.spec, params)
        return Nearness(vectors, plan.anns_field.id, plan.spec.metric, params)

    async def _query_vectors(
        self, collection: Collection, anns_field: FieldSchema, request: SearchRequest, options: ReadOptions
    ) -> Vectors:
        if request.ids is not None:
            return await self._stored_vectors(collection, anns_field, request.ids, options)
        vectors = request.vectors
        if vectors is None or len(vectors) == 0:
            raise MissingParameter("missing required parameters, error: either data or ids must be given")
        if anns_field.type.form is not Form.DENSE:
            check_form(anns_field, vectors)
        elif isinstance(vectors, SparseRows) or vectors.ndim != 2 or vectors.shape[1] != anns_field.dim:
            if isinstance(vectors, SparseRows):
                raise BadJson(f"field {anns_field.name} is {anns_field.type}, the query vectors are sparse")
            raise BadJson(
                f"can only accept json format request, error: dimension: {anns_field.dim}, but length of []float: "
                f"{vectors.shape[-1]}: field {anns_field.name} has vectors of {anns_field.dim} components"
            )
        return vectors

    async def _stored_vectors(
        self, collection: Collection, anns_field: FieldSchema, ids: Sequence[int | str], options: ReadOptions
    ) -> Vectors:
        keys = typed_keys(collection.schema.primary, ids)
        primary = collection.schema.primary.id
        question = Question(Kind.GET, collection.collection_id, field_ids=(primary, anns_field.id), keys=keys)
        found = (await self._ask(collection, question, None, options)).batch
        at = {key: i for i, key in enumerate(key_list(batch_keys(found, primary)))}
        missing = [key for key in key_list(keys) if key not in at]
        if missing:
            raise InvalidParameter(f"primary keys not found: {', '.join(map(str, missing[:10]))}")
        rows = np.array([at[key] for key in key_list(keys)], np.int64)
        return searchable(found.columns[anns_field.id].take(rows))

    # rows

    async def query(self, collection: Collection, options: ReadOptions, *, limit: int, offset: int) -> Rows:
        """Return the rows that match, by primary key ascending; limit 0 means all."""
        partitions = readable_partitions(collection, options.partitions)
        row_filter = self.compile(collection, options)
        partitions = partitions_of_key(collection, row_filter, partitions)
        asked = (collection.collection_id, partitions, not options.ignore_growing, options.filter, options.params)
        aggregation = aggregation_of(collection.schema, options)
        if aggregation is not None:
            columns, most = with_fields((), aggregation.field_ids), limit + offset if limit else GROUPS_MAX + 1
            question = Question(Kind.QUERY, *asked, columns, most, aggregation=aggregation)
            answer = await self._ask(collection, question, row_filter, options)
            if not limit and len(answer.groups) > GROUPS_MAX:
                raise InvalidParameter(f"there are more than {GROUPS_MAX} groups: give a limit: invalid parameter")
            names = [collection.schema.by_id[one].name for one in aggregation.by]
            groups = finished(answer.groups, aggregation, names, limit=limit or None, offset=offset)
            return Rows(collection.schema, Batch({}, 0), (), groups=groups)
        if [name.replace(" ", "").lower() for name in options.output_fields] == [COUNT]:
            answer = await self._ask(collection, Question(Kind.COUNT, *asked), row_filter, options)
            return Rows(collection.schema, Batch({}, 0), (), count=answer.count)
        output = resolve_output(collection.schema, options.output_fields)
        orders = orders_of(collection.schema, options.order_by)
        columns = with_fields(output.field_ids(collection.schema), [one.field_id for one in orders])
        question = Question(Kind.QUERY, *asked, columns, limit or None, offset, orders=orders)
        answer = await self._ask(collection, question, row_filter, options)
        return self._rows(collection.schema, answer.batch, output)

    async def get(self, collection: Collection, ids: Sequence[int | str], options: ReadOptions) -> Rows:
        """Return the rows with these primary keys; keys without a row are skipped."""
        partitions = readable_partitions(collection, options.partitions)
        keys = typed_keys(collection.schema.primary, ids)
        output = resolve_output(collection.schema, options.output_fields)
        columns = tuple(output.field_ids(collection.schema))
        question = Question(Kind.GET, collection.collection_id, partitions, field_ids=columns, keys=keys)
        answer = await self._ask(collection, question, None, options)
        return self._rows(collection.schema, answer.batch, output)

    async def matching_keys(
        self,
        collection: Collection,
        row_filter: CompiledFilter,
        options: ReadOptions,
        partitions: frozenset[PartitionId] | None,
    ) -> Keys:
        """Return the primary keys of the rows that match now: what a delete by filter deletes."""
        primary = collection.schema.primary.id
        question = Question(
            Kind.QUERY, collection.collection_id, partitions, True, options.filter, options.params, (primary,)
        )
        return batch_keys((await self._ask(collection, question, row_filter, options, STRONG)).batch, primary)

    async def stored_rows(self, collection: Collection, keys: Keys) -> tuple[Batch, npt.NDArray[np.int64]]:
        """Return the rows with these primary keys that are there now, all their fields, and their insert ticks."""
        columns = tuple(one.id for one in collection.schema.fields)
        question = Question(Kind.GET, collection.collection_id, field_ids=columns, keys=keys, inserted=True)
        answer = await self._ask(collection, question, None, NO_OPTIONS, STRONG)
        return answer.batch, answer.inserted

    async def row_count(self, collection: Collection, partitions: frozenset[PartitionId] | None) -> int:
        """Return the number of live rows."""
        question = Question(Kind.COUNT, collection.collection_id, partitions)
        return (await self._ask(collection, question, None, NO_OPTIONS, STRONG)).count

    # here and elsewhere

    async def _ask(
        self,
        collection: Collection,
        question: Question,
        row_filter: CompiledFilter | None,
        options: ReadOptions,
        level: Consistency | None = None,
    ) -> Answer:
        """Return the answer of the collection's shards at the request's level, or this one.

        Raises SchemaMismatch if this node's catalogue has a newer version of the schema by now. Until a change of it
        has come to its end, reads are by the schema from before, also on replicas that have the new one.
        """
        try:
            return await self._answer(collection, question, row_filter, options, level)
        except SchemaMismatch:
            await self._node.router.refresh_catalog()
            found = self._node.catalog.collections.get(collection.collection_id)
            if found is None or found.schema.version != collection.schema.version:
                raise
            question = replace(question, any_schema=True)
            return await self._answer(collection, question, row_filter, options, level)

    async def _answer(
        self,
        collection: Collection,
        question: Question,
        row_filter: CompiledFilter | None,
        options: ReadOptions,
        level: Consistency | None,
    ) -> Answer:
        needs = self._fresh.needs(collection, options, level)
        deadline_s = self._node.router.deadline_s()
        answer = None
        if all(self._fresh.is_ready(shard_id, need) for shard_id, need in needs.items()):
            try:
                answer = await self._here(question, collection.schema, row_filter, needs)
            except (NotFresh, StorageFault):  # the replica here is being replaced, or is damaged
                if self._node.mesh is None:
                    raise
        if answer is None:
            answer = await self._anywhere(question, collection.schema, row_filter, needs, deadline_s)
        if not answer.is_known:
            if level is STRONG or any(need.strong for need in needs.values()):
                raise CollectionNotFound(collection.database, collection.name)
            answer = Answer.nothing(question, collection.schema, answer.ticks)
        scope = current.get()
        if scope is not None:
            scope.noted_read(answer.ticks)
        return answer

    async def _anywhere(
        self,
        question: Question,
        schema: CollectionSchema,
        row_filter: CompiledFilter | None,
        needs: Needs,
        deadline_s: float,
    ) -> Answer:
        """Let the replicas here that become fresh soon answer, and other nodes for the other shards."""
        reached = await _all(self._fresh.reach(one, need, deadline_s=deadline_s) for one, need in needs.items())
        here = {one: need for (one, need), is_fresh in zip(needs.items(), reached, strict=True) if is_fresh}
        away: dict[tuple[str, ...] | None, dict[ShardId, Need]] = {}
        for shard_id, need in needs.items():
            if shard_id not in here:
                peers = self._node.router.replicas_elsewhere(shard_id, leader_first=need.strong)
                away.setdefault(peers, {})[shard_id] = need
        groups = [*([(None, here)] if here else []), *away.items()]
        part = question if len(groups) == 1 else question.part()
        answers = await _all(
            self._here_or_away(part, schema, row_filter, some, peers, deadline_s) for peers, some in groups
        )
        return answers[0] if len(groups) == 1 else merge_answers(question, schema, answers)

    async def _here_or_away(
        self,
        question: Question,
        schema: CollectionSchema,
        row_filter: CompiledFilter | None,
        needs: Needs,
        peers: tuple[str, ...] | None,
        deadline_s: float,
    ) -> Answer:
        """Ask these peers, or the replicas here: they are fresh enough (None), or have become so meanwhile."""
        router = self._node.router
        give_up_s = min(deadline_s, self._node.seams.clock.monotonic_s() + PATIENCE_S)
        damaged = False
        attempt = 0
        while True:
            try:
                if peers is not None:
                    asked = replace(question, schema_version=schema.version)
                    return await self._away(asked, needs, peers, deadline_s)
                return await self._here(question, schema, row_filter, needs)
            except StorageFault as fault:  # only the replicas here raise it
                if len(needs) > 1:
                    apart = ({shard_id: need} for shard_id, need in needs.items())
                    part = question.part()
                    answers = await _all(
                        self._here_or_away(part, schema, row_filter, one, None, deadline_s) for one in apart
                    )
                    return merge_answers(question, schema, answers)
                if not any(router.hedging.is_up(one) for one in router.replicas_elsewhere(next(iter(needs)))):
                    raise
                log.warning("another replica is asked, the one here is damaged shard=%s: %s", next(iter(needs)), fault)
                damaged = True
            except SchemaMismatch:
                raise
            except Unavailable as error:
                attempt += 1
                if not await router.pause(attempt, give_up_s):
                    names = ", ".join(name_of(one) for one in needs)
                    raise NotFresh(
                        f"no replica of {names} answers that is as fresh as asked for: try again soon, or read with "
                        f"consistencyLevel Eventually ({error})"
                    ) from None
                if len(needs) > 1:  # no node may have all of them any more: shards move one by one
                    part = question.part()
                    ways = {
                        one: router.replicas_elsewhere(one, leader_first=need.strong) for one, need in needs.items()
                    }
                    answers = await _all(
                        self._here_or_away(part, schema, row_filter, {one: needs[one]}, ways[one], deadline_s)
                        for one in needs
                    )
                    return merge_answers(question, schema, answers)
            ready = (self._fresh.reach(one, need, deadline_s=deadline_s) for one, need in needs.items())
            if not damaged and all(await _all(ready)):
                peers = None
            else:
                first = next(iter(needs))
                peers = router.replicas_elsewhere(first, leader_first=needs[first].strong)

    async def _away(self, question: Question, needs: Needs, peers: tuple[str, ...], deadline_s: float) -> Answer:
        """Return the answer of other nodes' replicas."""
        blobs = question.to_blobs(needs)
        rows = (question.limit or SMALL_ROWS_MAX + 1) * (question.queries or 1)
        is_few = question.kind in (Kind.COUNT, Kind.TERMS) or rows <= SMALL_ROWS_MAX
        small = is_few and sum(map(len, blobs)) < 64 << 10
        _, found = await self._node.router.hedging.ask_any(
            peers, READ_METHOD, {}, blobs, deadline_s=deadline_s, link=Link.SMALL if small else Link.BULK
        )
        self._node.metrics.routed(Routed.READ)
        return Answer.from_blobs(found)

    async def _serve(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Reply:
        """Answer another node from the replicas here, which it has chosen for being fresh, or nearly so."""
        question, needs = Question.from_blobs(blobs)
        deadline_s = self._node.router.deadline_s()
        for shard_id, need in needs.items():
            is_fresh = self._fresh.is_ready(shard_id, need)
            if not is_fresh and not await self._fresh.reach(shard_id, need, deadline_s=deadline_s):
                raise NotFresh(f"the replica of {name_of(shard_id)} is behind what is asked for")
        gone = [shard_id for shard_id in needs if shard_id not in self._node.shards]  # while others were waited for
        if gone:
            raise NotFresh(f"node {self._node.name} does not hold {name_of(gone[0])} any more")
        machines = [self._node.shards[shard_id].machine for shard_id in needs]
        states = (machine.collections.get(question.collection_id) for machine in machines)
        schemas = [state.schema for state in states if state is not None]
        if not schemas:
            ticks = {shard_id: self._node.shards[shard_id].machine.tick for shard_id in needs}
            return {}, Answer.nothing(question, None, ticks).to_blobs()
        schema = self._schema_of(question, schemas)
        row_filter = self._compiled(question.collection_id, schema, question.filter, question.templates)
        return {}, (await self._here(question, schema, row_filter, needs)).to_blobs()

    def _schema_of(self, question: Question, schemas: Sequence[CollectionSchema]) -> CollectionSchema:
        """Return the version of the schema by which another node asks, out of those that replicas here have.

        Raises NotFresh if it is newer, SchemaMismatch if it is older than what this node knows.
        """
        found = self._node.catalog.collections.get(question.collection_id)
        known = [*schemas, *([found.schema] if found is not None else [])]
        asked = question.schema_version
        schema = next((one for one in known if one.version == asked), None)
        if schema is not None:
            return schema
        if all(one.version < asked for one in known):
            raise NotFresh(f"version {asked} of the collection's schema is not known here yet")
        raise SchemaMismatch(f"version {asked} of the collection's schema is an old one: try again")

    # here

    async def _here(
        self, question: Question, schema: CollectionSchema, row_filter: CompiledFilter | None, needs: Needs
    ) -> Answer:
        """Return the answer of the replicas here, which are fresh enough. Raises NotFresh if one has gone."""
        exactly = {shard_id: need.at for shard_id, need in needs.items() if need.at is not None}
        if len(exactly) > 1:  # each shard has ticks of its own
            part = question.part()
            answers = await _all(self._here(part, schema, row_filter, {one: needs[one]}) for one in needs)
            return merge_answers(question, schema, answers)
        at = next(iter(exactly.values()), None)
        target = Target(question.collection_id, schema, tuple(needs), at, question.any_schema)
        if question.near is not None and question.grouping is None:
            return await self._batching.answer(target, question, row_filter)
        seen = self.snapshot(target, question.partitions, growing=question.growing)
        if not seen.is_known:
            return Answer.nothing(question, None, seen.ticks)
        if question.kind is Kind.COUNT:
            counted = await self._node.read(count_rows, seen, row_filter)
            return replace(Answer.of_rows(Batch({}, 0), seen.ticks), count=counted)
        if question.kind is Kind.TERMS:
            return await self._node.read(count_terms, seen, question)
        columns: Sequence[FieldId] = question.field_ids
        if question.grouping is not None and question.near is not None:
            narrowed = narrowed_by(question, question.grouping, schema)
            return await self._node.read(search_grouped, seen, question, row_filter, narrowed)
        if question.aggregation is not None:
            groups = await self._node.read(aggregate_rows, seen, row_filter, question.aggregation, question.limit)
            return replace(Answer.of_rows(Batch({}, 0), seen.ticks), groups=groups)
        if question.orders:
            batch = await self._node.read(query_ordered, seen, row_filter, question)
            return Answer.of_rows(batch, seen.ticks)
        if question.searches:
            filters = [
                self._compiled(question.collection_id, schema, one.filter, one.templates) for one in question.searches
            ]
            narrowing: Sequence[Narrowed | None] = [None] * len(filters)
            if question.grouping is not None:
                narrowing = [narrowed_by(one, question.grouping, schema) for one in question.searches]
            return await self._node.read(search_all, seen, question, filters, narrowing)
        if question.kind is Kind.GET:
            assert question.keys is not None, "a get has keys"
            batch, inserted = await self._node.read(find_and_fetch, seen, question.keys, columns, question.inserted)
            return Answer.of_rows(batch, seen.ticks, inserted)
        batch = await self._node.read(query_and_fetch, seen, row_filter, question.limit, question.offset, columns)
        return Answer.of_rows(batch, seen.ticks)

    def snapshot(self, target: Target, partitions: frozenset[PartitionId] | None, *, growing: bool = True) -> Snapshot:
        """Return what a read that begins now sees: everything that the replicas here have applied, or as of a tick.

        Raises NotFresh if a replica is not here any more, SnapshotGone if it no longer has what was there at the tick,
        SchemaMismatch if it has a newer schema and that matters.
        """
        views: list[SegmentView] = []
        ticks: dict[ShardId, Tick] = {}
        is_known = False
        expire_before = Tick(0)
        chosen = None if partitions is None else sorted(partitions)
        for shard_id in target.shards:
            host = self._node.shards.get(shard_id)
            if host is None or not host.is_whole:
                raise NotFresh(f"the replica of {name_of(shard_id)} is being replaced")
            shard = host.machine
            ticks[shard_id] = shard.tick if target.at is None else target.at
            state = shard.collections.get(target.collection_id)
            if state is None:
                continue
            if target.at is not None and target.at < state.history_from:
                raise SnapshotGone(
                    f"the snapshot of {name_of(shard_id)} is no longer there: rows that were deleted after it have "
                    "been removed for good; begin again without the snapshot token"
                )
            is_known = True
            found = shard.views(target.collection_id, chosen, growing=growing)
            if state.schema.version != target.schema.version:
                if state.schema.version > target.schema.version and not target.any_schema:
                    raise SchemaMismatch(
                        f"the schema of collection {target.collection_id} has version {state.schema.version}, the read "
                        f"is of version {target.schema.version}: try again"
                    )
                found = [one.under(target.schema) for one in found]
            views += found
            expire_before = state.expire_before(target.at or self._node.hybrid.stamp())
        tick = max(ticks.values())
        return Snapshot(target.schema, views, tick, expire_before, ticks, is_known)

    def compile(self, collection: Collection, options: ReadOptions) -> CompiledFilter:
        """Return the compiled filter of a request; texts without templates are remembered."""
        return self._compiled(collection.collection_id, collection.schema, options.filter, options.params)

    def _compiled(
        self, collection_id: CollectionId, schema: CollectionSchema, text: str, templates: Mapping[str, Any]
    ) -> CompiledFilter:
        owner = self._node.catalog.collections.get(collection_id)
        indexed = frozenset[Indexed]() if owner is None else owner.indexed_scalars
        key = (collection_id, schema.version, text, indexed)
        known = None if templates else self._filters.get(key)
        if known is None:
            known = compile_filter(text, schema, templates, indexed)
            if not templates and len(text) <= FILTER_CHARS_KEPT_MAX:
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
        return index.resolved

    @staticmethod
    def _rows(
        schema: CollectionSchema, batch: Batch, output: Output, *, explain: Sequence[Mapping[str, Any]] = ()
    ) -> Rows:
        return Rows(schema, batch, [one.name for one in output.fields], output.dynamic_keys, explain=explain)


async def _all(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results; raises one error for those that failed, when all have ended."""
    waiting = list(parts)
    if len(waiting) == 1:
        return [await waiting[0]]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    failed = [one for one in results if isinstance(one, BaseException)]
    if failed:
        raise one_error(failed)
    return [one for one in results if not isinstance(one, BaseException)]
