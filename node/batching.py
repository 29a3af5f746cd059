"""Searches that wait at the same moment, answered together.

Those that differ only in their vectors are answered by one call of the engine: while batches of them run, the next one
gathers. A batch takes its views when it starts, which is after each of its requests was found to be, or had waited
until it was, answerable by the replicas here; so each sees what it must. What searches of a kind took so far says
whether the next batch is brief enough to run on the loop itself.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

from node.answering import Snapshot, search_and_fetch, vector_query
from node.node import Node
from node.subread import Answer, Question
from storage.filter.compiled import CompiledFilter
from storage.schema import CollectionSchema
from storage.search import VectorQuery, may_take_long
from storage.types import CollectionId, ShardId, Tick
from storage.vectors import Vectors

BATCHES_MAX: Final = 1
"""Batches of one kind at the same time. Two were measured slower, with a longer tail: they and the loop contend for the
interpreter, and each engine call has fewer queries."""
BRIEF_S: Final = 0.004
"""A batch that takes no longer, as the ones before it tell, runs on the loop. To wake a thread, and to take turns
with it for the interpreter, costs 0.2 to 0.4 ms a batch, and whoever waits for the loop would wait for the thread."""
TURNS_MAX: Final = 4
"""Turns of the loop for which a batch waits, as long as each brings more searches that it can answer."""
KINDS_KEPT: Final = 256


@dataclass(frozen=True)
class Target:
    """What is read here: a collection's shards, as they are or as of a tick."""

    collection_id: CollectionId
    schema: CollectionSchema
    shards: tuple[ShardId, ...]
    at: Tick | None = None
    any_schema: bool = False
    """Whether the replicas may have a newer schema than this one."""


@dataclass(slots=True)
class _Gathering:
    """Searches of one kind, which differ in their vectors only: those that wait for a batch."""

    waiting: list[tuple[Vectors, asyncio.Future[Answer]]] = field(default_factory=list)
    running: int = 0
    query_s: float | None = None
    """What a query takes, as those that were asked last tell."""


class Batching:
    """One per node. Belongs to the loop."""

    def __init__(self, node: Node, snapshot: Callable[..., Snapshot]) -> None:
        """`snapshot` is `Reader.snapshot`."""
        self._node = node
        self._snapshot = snapshot
        self._kinds: OrderedDict[Hashable, _Gathering] = OrderedDict()

    async def answer(self, target: Target, question: Question, row_filter: CompiledFilter | None) -> Answer:
        """Return the answer of the replicas here to a search. Raises what `snapshot` does."""
        near = question.near
        assert near is not None and question.limit is not None, "a search has vectors and a limit"
        kind = (
            target.collection_id, target.schema.version, target.any_schema, target.shards, target.at,
            question.partitions, near.field_id, near.metric,
            near.params, question.limit, question.offset, question.filter, question.growing,
            repr(question.templates) if question.templates else "", question.field_ids,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Answer] = loop.create_future()
        gathering = self._kinds.get(kind)
        if gathering is None:
            gathering = self._kinds[kind] = _Gathering()
            if len(self._kinds) > KINDS_KEPT:
                self._kinds.popitem(last=False)  # those that it has will be answered, and no others come
        else:
            self._kinds.move_to_end(kind)
        gathering.waiting.append((near.vectors, waiter))
        if gathering.running < BATCHES_MAX:
            gathering.running += 1
            self._node.keep(loop.create_task(self._run(gathering, target, question, row_filter)))
        return await waiter

    async def _run(
        self, gathering: _Gathering, target: Target, question: Question, row_filter: CompiledFilter | None
    ) -> None:
        try:
            while gathering.waiting:
                for _ in range(TURNS_MAX):
                    before = len(gathering.waiting)
                    await asyncio.sleep(0)
                    if len(gathering.waiting) == before:
                        break
                batch, gathering.waiting = gathering.waiting, []
                batch = [one for one in batch if not one[1].done()]  # whose client has gone
                if not batch:
                    continue
                try:
                    seen = self._snapshot(target, question.partitions, growing=question.growing)
                    if seen.is_known:
                        asked = vector_query(question, row_filter, seen, [one for one, _ in batch])
                        answers = await self._ask(gathering, seen, asked, question, [len(one) for one, _ in batch])
                    else:
                        answers = [Answer.nothing(question, None, seen.ticks)] * len(batch)
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

    async def _ask(
        self, gathering: _Gathering, seen: Snapshot, asked: VectorQuery, question: Question, sizes: Sequence[int]
    ) -> list[Answer]:
        """Search here or on a thread, and remember how long it took."""
        queries, clock, known_s = len(asked.queries), self._node.seams.clock, gathering.query_s
        is_brief = known_s is not None and known_s * queries <= BRIEF_S
        if is_brief and not may_take_long(seen.views, asked, queries, question.field_ids):
            answers, took_s = search_and_fetch(clock, seen, asked, question, sizes)
        else:
            answers, took_s = await self._node.read(search_and_fetch, clock, seen, asked, question, sizes)
        query_s = took_s / queries
        # A long time may be that of others on a busy machine: what is remembered falls at once and rises slowly.
        gathering.query_s = query_s if known_s is None else min(query_s, 1.05 * known_s)
        return answers
