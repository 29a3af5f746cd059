"""Reads as they travel between nodes: a question to a replica, and what it found.

Everything that may be large is in blobs: a filter may name a hundred thousand keys, an answer holds rows.

    question   CBOR head | query vectors or Int64 keys
    answer     CBOR head | rows as a `Batch` | scores | ticks at which the rows were inserted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, Final

import cbor2
import numpy as np
import numpy.typing as npt

from index.metric import METRICS, Metric
from index.protocol import Form
from index.sparse import SparseRows
from index.spec import SearchParams
from node.freshness import Need, Needs
from node.network import Blob
from node.scope import Ticks
from storage.aggregation import Aggregate, Aggregation, Groups, Operator, combine
from storage.columns import Batch, SparseColumn
from storage.errors import AnnulusError, InvalidParameter
from storage.grouping import Grouping, merge_groups
from storage.key_lookup import Keys
from storage.merging import ScoredRows, key_order, merge_hits, merge_rows
from storage.ordering import OrderBy, ordered
from storage.schema import CollectionSchema
from storage.search import Step
from storage.types import CollectionId, FieldId, PartitionId, ShardId, Tick
from storage.vectors import Vectors, searchable
from storage.view import empty_column

_NO_SCORES: Final = np.empty(0, np.float32)
NO_TICKS: Final = np.empty(0, np.int64)
_VECTORS: Final = FieldId(1)
_UNREADABLE: Final = (cbor2.CBORDecodeError, ValueError, KeyError, TypeError, IndexError, OverflowError)


class Kind(StrEnum):
    SEARCH = "search"
    QUERY = "query"
    GET = "get"
    COUNT = "count"
    TERMS = "terms"
    """How many rows there are, and how many of them have each of the terms that are its keys: `bm25.Statistics`."""
    HYBRID = "hybrid"


@dataclass(frozen=True)
class Nearness:
    """What a search adds to a question."""

    vectors: Vectors
    """As engines take them, and as the client gave them: not normalised."""
    field_id: FieldId
    metric: Metric
    params: SearchParams

    def to_plain(self) -> list[Any]:
        """Return all but the vectors."""
        dim = 0 if isinstance(self.vectors, SparseRows) else self.vectors.shape[1]
        return [dim, self.field_id, str(self.metric), list(astuple(self.params))]

    def body(self) -> Blob:
        """Return the vectors: float32 as they are, others as rows."""
        vectors = self.vectors
        if isinstance(vectors, SparseRows):
            return Batch({_VECTORS: SparseColumn(vectors)}, len(vectors)).to_bytes()
        if vectors.dtype == np.uint8:
            return vectors.tobytes()
        vectors = np.ascontiguousarray(vectors, "<f4")
        return vectors.data.cast("B") if vectors.size else b""

    @classmethod
    def from_plain(cls, plain: Sequence[Any], body: memoryview) -> Nearness:
        dim, field_id, name, params = plain
        metric = Metric(name)
        vectors: Vectors
        if dim == 0:
            vectors = searchable(Batch.from_bytes(body).columns[_VECTORS])
        else:
            dtype = "<u1" if metric in METRICS[Form.BINARY] else "<f4"
            vectors = np.frombuffer(body, dtype).reshape(-1, dim)
        return cls(vectors, FieldId(field_id), metric, SearchParams(*params))


@dataclass(frozen=True)
class SubQuestion:
    """One of the searches of a hybrid search."""

    near: Nearness
    limit: int
    offset: int = 0
    filter: str = ""
    templates: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A read of one collection, for any of its shards."""

    kind: Kind
    collection_id: CollectionId
    partitions: frozenset[PartitionId] | None = None
    growing: bool = True
    filter: str = ""
    templates: Mapping[str, Any] = field(default_factory=dict)
    field_ids: tuple[FieldId, ...] = ()
    limit: int | None = None
    offset: int = 0
    keys: Keys | None = None
    """Of a get."""
    inserted: bool = False
    """Of a get: whether the ticks at which the rows were inserted are wanted too."""
    near: Nearness | None = None
    """Of a search."""
    searches: tuple[SubQuestion, ...] = ()
    """Of a hybrid search, whose hits are answered one search after the other."""
    grouping: Grouping | None = None
    """Of a search for groups, or a hybrid one; limit and offset count them."""
    orders: tuple[OrderBy, ...] = ()
    """Of a query; the fields are among those to fetch."""
    aggregation: Aggregation | None = None
    """Of a query that wants no rows."""
    schema_version: int = 0
    """Of the schema by which fields and filter are meant; set where the question leaves its node."""
    any_schema: bool = False
    """Whether replicas may answer by that schema although they have a newer one."""

    def part(self) -> Question:
        """Return the question for some of the shards: what is skipped is known only when all have answered."""
        searches = tuple(replace(one, limit=one.limit + one.offset, offset=0) for one in self.searches)
        limit = None if self.limit is None else self.limit + self.offset
        return replace(self, limit=limit, offset=0, searches=searches)

    @property
    def queries(self) -> int:
        """Query vectors, those of all searches of a hybrid one."""
        nears = [one.near for one in self.searches] if self.near is None else [self.near]
        return sum(len(near.vectors) for near in nears)

    def to_blobs(self, needs: Needs) -> list[Blob]:
        head: dict[str, Any] = {
            "kind": str(self.kind), "collection": self.collection_id,
            "partitions": None if self.partitions is None else sorted(self.partitions), "growing": self.growing,
            "filter": self.filter, "templates": dict(self.templates), "fields": list(self.field_ids),
            "limit": self.limit, "offset": self.offset, "inserted": self.inserted,
            "schema": [self.schema_version, self.any_schema],
            "needs": [[shard_id, need.to_plain()] for shard_id, need in needs.items()],
            "grouping": None if self.grouping is None else list(astuple(self.grouping)),
            "orders": [list(astuple(one)) for one in self.orders],
            "aggregation": None if self.aggregation is None else [
                list(self.aggregation.by),
                [[one.name, str(one.operator), one.field_id] for one in self.aggregation.aggregates],
            ],
            "searches": [
                [one.near.to_plain(), one.limit, one.offset, one.filter, dict(one.templates)] for one in self.searches
            ],
        }  # fmt: skip
        body: Blob = b""
        if self.near is not None:
            body = self.near.body()
            head["near"] = self.near.to_plain()
        elif isinstance(self.keys, np.ndarray):
            body = self.keys.astype("<i8").tobytes()
            head["keys"] = None
        elif self.keys is not None:
            head["keys"] = list(self.keys)
        return [cbor2.dumps(head), body, *(one.near.body() for one in self.searches)]

    @classmethod
    def from_blobs(cls, blobs: Sequence[memoryview]) -> tuple[Question, dict[ShardId, Need]]:
        """Return the question and what it needs of which shards. Raises InvalidParameter if the bytes are neither."""
        try:
            head = cbor2.loads(blobs[0])
            near = keys = None
            if "near" in head:
                near = Nearness.from_plain(head["near"], blobs[1])
            elif "keys" in head:
                keys = np.frombuffer(blobs[1], "<i8") if head["keys"] is None else head["keys"]
            searches = tuple(
                SubQuestion(Nearness.from_plain(plain, body), *rest)
                for (plain, *rest), body in zip(head["searches"], blobs[2:], strict=True)
            )
            grouping = None if head["grouping"] is None else Grouping(*head["grouping"])
            aggregation = None
            if head["aggregation"] is not None:
                by, aggregates = head["aggregation"]
                named = (Aggregate(name, Operator(operator), field_id) for name, operator, field_id in aggregates)
                aggregation = Aggregation(tuple(by), tuple(named))
            partitions = head["partitions"]
            question = cls(
                Kind(head["kind"]),
                CollectionId(head["collection"]),
                None if partitions is None else frozenset(partitions),
                head["growing"],
                head["filter"],
                head["templates"],
                tuple(head["fields"]),
                head["limit"],
                head["offset"],
                keys,
                head["inserted"],
                near,
                searches,
                grouping,
                tuple(OrderBy(*one) for one in head["orders"]),
                aggregation,
                *head["schema"],
            )
            needs = {ShardId(shard_id): Need.from_plain(plain) for shard_id, plain in head["needs"]}
        except _UNREADABLE as error:
            raise InvalidParameter(f"a read from another node cannot be read: {error}") from None
        return question, needs


@dataclass(frozen=True)
class Answer:
    """What a replica, or all together, found. Of a search `counts[i]` rows and scores belong to query i."""

    counts: Sequence[int]
    scores: npt.NDArray[np.float32]
    batch: Batch
    steps: Sequence[Step] = ()
    ticks: Ticks = field(default_factory=dict)
    """As of which tick each shard was read."""
    count: int = 0
    """Of a count."""
    inserted: npt.NDArray[np.int64] = field(default_factory=lambda: NO_TICKS)
    """Of a get: the tick at which each row was inserted. Of terms: how many there are, and each one's rows."""
    groups: Groups = ()
    """Of an aggregation."""
    is_known: bool = True
    """False if none of the replicas has the collection."""

    @classmethod
    def of_rows(cls, batch: Batch, ticks: Ticks, inserted: npt.NDArray[np.int64] = NO_TICKS) -> Answer:
        return cls((), _NO_SCORES, batch, ticks=ticks, inserted=inserted)

    @classmethod
    def nothing(cls, question: Question, schema: CollectionSchema | None, ticks: Ticks) -> Answer:
        """Return the answer of replicas that have no rows; without a schema they do not have the collection."""
        columns = {} if schema is None else {one: empty_column(schema.by_id[one]) for one in question.field_ids}
        return cls([0] * question.queries, _NO_SCORES, Batch(columns, 0), ticks=ticks, is_known=schema is not None)

    @classmethod
    def of_searches(cls, parts: Sequence[ScoredRows], steps: Sequence[Step], ticks: Ticks) -> Answer:
        """Return the answer to a hybrid search: the hits of each, one after the other."""
        counts = [count for part in parts for count in part.counts]
        batch = Batch.concat([part.batch for part in parts])
        return cls(counts, np.concatenate([part.scores for part in parts]), batch, steps, ticks)

    def by_search(self, question: Question) -> list[ScoredRows]:
        """Return what `of_searches` was given."""
        parts, first, row = [], 0, 0
        for sub in question.searches:
            counts = self.counts[first : first + len(sub.near.vectors)]
            first, stop = first + len(counts), row + sum(counts)
            parts.append(ScoredRows(counts, self.scores[row:stop], self.batch.slice(row, stop)))
            row = stop
        return parts

    def to_blobs(self) -> list[Blob]:
        head = {
            "counts": list(self.counts), "ticks": [list(one) for one in self.ticks.items()], "count": self.count,
            "steps": [[one.segment_id, one.rows, one.survivors, one.plan, one.why] for one in self.steps],
            "known": self.is_known, "groups": [list(one) for one in self.groups],
        }  # fmt: skip
        inserted = self.inserted.astype("<i8").tobytes()
        return [cbor2.dumps(head), self.batch.to_bytes(), self.scores.astype("<f4").tobytes(), inserted]

    @classmethod
    def from_blobs(cls, blobs: Sequence[memoryview]) -> Answer:
        """Return the answer of another node. Raises AnnulusError if the bytes are none."""
        try:
            head = cbor2.loads(blobs[0])
            return cls(
                head["counts"],
                np.frombuffer(blobs[2], "<f4"),
                Batch.from_bytes(blobs[1]),
                [Step(*one) for one in head["steps"]],
                {ShardId(shard_id): Tick(tick) for shard_id, tick in head["ticks"]},
                head["count"],
                np.frombuffer(blobs[3], "<i8"),
                [(values, partials) for values, partials in head["groups"]],
                head["known"],
            )
        except _UNREADABLE as error:
            raise AnnulusError(f"the answer of another node cannot be read: {error}") from None


def merge_answers(question: Question, schema: CollectionSchema, answers: Sequence[Answer]) -> Answer:
    """Return one answer out of those of different shards to `question.part()`."""
    ticks = {shard_id: tick for one in answers for shard_id, tick in one.ticks.items()}
    some = [one for one in answers if one.is_known]
    if not some:
        return Answer.nothing(question, None, ticks)
    primary = schema.primary.id
    if question.kind in (Kind.COUNT, Kind.TERMS):
        numbers = np.asarray(np.sum([one.inserted for one in some], axis=0), np.int64)
        rows = sum(one.count for one in some)
        return Answer((), _NO_SCORES, some[0].batch, ticks=ticks, count=rows, inserted=numbers)
    if question.near is not None:
        assert question.limit is not None, "a search has a limit"
        if question.grouping is not None:
            grouped = merge_groups(
                [ScoredRows(one.counts, one.scores, one.batch) for one in some],
                primary,
                question.grouping,
                limit=question.limit,
                offset=question.offset,
                larger_is_better=question.near.metric.is_similarity,
            )
            return Answer(*grouped, ticks=ticks)
        merged = merge_hits(
            [ScoredRows(one.counts, one.scores, one.batch) for one in some],
            primary,
            limit=question.limit,
            offset=question.offset,
            larger_is_better=question.near.metric.is_similarity,
        )
        return Answer(*merged, [step for one in some for step in one.steps], ticks)
    if question.searches:
        found = [one.by_search(question) for one in some]
        merge = merge_hits if question.grouping is None else partial(merge_groups, grouping=question.grouping)
        joined = [
            merge(
                [hits[number] for hits in found],
                primary,
                limit=sub.limit,
                offset=sub.offset,
                larger_is_better=sub.near.metric.is_similarity,
            )
            for number, sub in enumerate(question.searches)
        ]
        return Answer.of_searches(joined, [step for one in some for step in one.steps], ticks)
    if question.kind is Kind.GET:
        batch = Batch.concat([one.batch for one in some])
        order = key_order(batch.columns[primary])
        inserted = np.concatenate([one.inserted for one in some])
        return Answer.of_rows(batch.take(order), ticks, inserted[order] if len(inserted) else inserted)
    if question.aggregation is not None:
        return Answer((), _NO_SCORES, some[0].batch, ticks=ticks, groups=combine([one.groups for one in some]))
    if question.orders:
        batch = Batch.concat([one.batch for one in some])
        order = ordered(batch, primary, question.orders, limit=question.limit, offset=question.offset)
        return Answer.of_rows(batch.take(order), ticks)
    batch = merge_rows([one.batch for one in some], primary, limit=question.limit, offset=question.offset)
    return Answer.of_rows(batch, ticks)
