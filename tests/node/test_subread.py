"""Questions and answers cross the wire unchanged, and bytes that are neither are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from index.metric import Metric
from index.spec import SearchParams
from node.freshness import Need
from node.subread import Answer, Kind, Nearness, Question, SubQuestion, merge_answers
from storage.aggregation import Aggregate, Aggregation, Operator
from storage.errors import AnnulusError, InvalidParameter
from storage.grouping import Grouping
from storage.ordering import OrderBy
from storage.search import Step
from storage.types import CollectionId, PartitionId, SegmentId, ShardId, Tick
from tests.storage.rows import DIM, PK, make_batch, make_collection

SCHEMA = make_collection()
NEEDS = {ShardId(3): Need(strong=True), ShardId(5): Need(at_least=Tick(7), at=Tick(7))}
NEAR = Nearness(np.arange(8, dtype=np.float32).reshape(2, 4), PK, Metric.IP, SearchParams(ef=7, radius=0.5))


@pytest.mark.parametrize(
    "question",
    [
        Question(Kind.SEARCH, CollectionId(9), limit=3, offset=1, field_ids=(PK,), near=NEAR),
        Question(Kind.QUERY, CollectionId(9), frozenset({PartitionId(2)}), False, "a in {b}", {"b": [1, "x"]}, (PK,)),
        Question(Kind.GET, CollectionId(9), keys=np.array([1, -(1 << 63)], np.int64), field_ids=(PK,), inserted=True),
        Question(Kind.GET, CollectionId(9), keys=["a", "ü"], field_ids=(PK,)),
        Question(Kind.COUNT, CollectionId(9)),
        Question(Kind.SEARCH, CollectionId(9), limit=3, field_ids=(PK,), near=NEAR, grouping=Grouping(PK, 4)),
        Question(Kind.QUERY, CollectionId(9), field_ids=(PK,), orders=(OrderBy(PK, True), OrderBy(PK, False, True))),
        Question(
            Kind.QUERY,
            CollectionId(9),
            aggregation=Aggregation((PK,), (Aggregate("count(*)", Operator.COUNT), Aggregate("m", Operator.MIN, PK))),
        ),
        Question(
            Kind.HYBRID, CollectionId(9), field_ids=(PK,), searches=(SubQuestion(NEAR, 3, 1, "a == {b}", {"b": 2}),) * 2
        ),
    ],
)
def test_a_question_arrives_as_it_was_asked(question: Question) -> None:
    """With all that it needs of each shard."""
    blobs = [memoryview(bytes(one)) for one in question.to_blobs(NEEDS)]
    found, needs = Question.from_blobs(blobs)
    assert needs == NEEDS
    for name in (
        "kind",
        "collection_id",
        "partitions",
        "growing",
        "filter",
        "templates",
        "field_ids",
        "limit",
        "offset",
        "grouping",
        "orders",
        "aggregation",
    ):
        assert getattr(found, name) == getattr(question, name)
    assert list(found.keys if found.keys is not None else []) == list(
        question.keys if question.keys is not None else []
    )
    assert (found.near is None) == (question.near is None)
    assert found.queries == question.queries
    for one, asked in zip(found.searches, question.searches, strict=True):
        assert _plain(one.near.vectors) == _plain(asked.near.vectors) and one.near.params == asked.near.params
        assert (one.limit, one.offset, one.filter, one.templates) == (3, 1, "a == {b}", {"b": 2})
    if found.near is not None and question.near is not None:
        assert _plain(found.near.vectors) == _plain(question.near.vectors)
        assert (found.near.field_id, found.near.metric, found.near.params) == (PK, Metric.IP, NEAR.params)


def test_an_answer_arrives_as_it_was_found() -> None:
    """Rows, scores, steps and ticks."""
    batch = make_batch(SCHEMA, [1, 2, 3], [1, None, 3], np.ones((3, DIM), np.float32))
    step = Step(SegmentId(1), 5, 3, "exact", "no index")
    ticks = {ShardId(3): Tick(11)}
    answer = Answer([2, 1], np.array([1, 2, 3], np.float32), batch, [step], ticks, 8, np.array([4, 5, 6]))
    found = Answer.from_blobs([memoryview(bytes(one)) for one in answer.to_blobs()])
    assert found.batch.to_bytes() == batch.to_bytes()
    assert (list(found.counts), found.scores.tolist(), list(found.steps)) == ([2, 1], [1.0, 2.0, 3.0], [step])
    assert (found.ticks, found.count, found.inserted.tolist(), found.is_known) == (ticks, 8, [4, 5, 6], True)


def test_what_is_no_question_and_no_answer_is_refused() -> None:
    """Whatever another version may send."""
    question = Question(Kind.SEARCH, CollectionId(9), limit=3, near=NEAR).to_blobs(NEEDS)
    answer = Answer.nothing(Question(Kind.COUNT, CollectionId(9)), SCHEMA, {}).to_blobs()
    for bad in ([], [b"x", b""], [b"\xa0", b""], [question[0], b"123"], [question[0][:-3], question[1]]):
        with pytest.raises(InvalidParameter, match="cannot be read"):
            Question.from_blobs([memoryview(bytes(one)) for one in bad])
    for bad in ([], [b"x"] * 4, [answer[0], b"x", *answer[2:]], answer[:2]):
        with pytest.raises(AnnulusError, match="cannot be read"):
            Answer.from_blobs([memoryview(bytes(one)) for one in bad])


def test_shards_that_do_not_know_the_collection_add_nothing() -> None:
    """All together know it if one does."""
    question = Question(Kind.COUNT, CollectionId(9))
    nothing = Answer.nothing(question, None, {ShardId(1): Tick(4)})
    some = Answer((), np.empty(0, np.float32), nothing.batch, ticks={ShardId(2): Tick(5)}, count=3)
    merged = merge_answers(question, SCHEMA, [nothing, some])
    assert (merged.count, merged.is_known, merged.ticks) == (3, True, {ShardId(1): 4, ShardId(2): 5})
    assert not merge_answers(question, SCHEMA, [nothing, nothing]).is_known


def _plain(vectors: Any) -> Any:
    assert isinstance(vectors, np.ndarray)
    return vectors.tolist()
