"""Scenarios of searching a collection that is indexed and at rest, plain and filtered."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np

from tools.bench import goals
from tools.bench.data import BUCKETS, Dataset, Mask, Matrix
from tools.bench.engine import time_queries
from tools.bench.loading import Replies, run_load
from tools.bench.run import MAIN, Bench, K
from tools.bench.truth import Truth, exact, recall, scores_of
from tools.bench.wire import Codec, Form, search_hits, search_requests

Passing: TypeAlias = Callable[[], Mask]
"""Evaluates a filter over the column that it is about, and returns which rows pass."""
CONNECTIONS = (1, 8)
WARM_UP_REQUESTS = 200
FLOOR_S = 0.5
EXACT_QUERIES = 50


@dataclass
class Passes:
    """The same measurement made several times."""

    values: list[dict[str, float]] = field(default_factory=list)

    def median(self) -> dict[str, float]:
        """Return the median of each number."""
        return {name: statistics.median(one[name] for one in self.values) for name in self.values[0]}


def search(bench: Bench) -> None:
    """Search at each ef with 1 and 8 connections in both codecs, and the engine alone in between."""
    assert bench.indexed_s is not None
    alone: dict[int, Passes] = {ef: Passes() for ef in bench.plan.efs}
    served = {(codec, n, ef): Passes() for codec in Codec for n in CONNECTIONS for ef in bench.plan.efs}
    for turn in range(bench.plan.repeats):
        for ef in bench.plan.efs:
            bench.say(f"search ef {ef}, pass {turn + 1} of {bench.plan.repeats}")
            alone[ef].values.append(_engine_values(bench, ef))
            for (codec, connections, its_ef), passes in served.items():
                if its_ef == ef:
                    passes.values.append(_search_values(bench, codec, ef, connections))
    for ef, passes in alone.items():
        bench.results.add("search", f"engine alone, 1 thread, ef {ef}", **passes.median())
    for (codec, connections, ef), passes in served.items():
        values = passes.median()
        ratio = values["per_s"] / alone[ef].median()["per_s"]
        bench.results.add("search", f"{codec}, {connections} connections, ef {ef}", **values, of_engine=ratio)
    for codec in Codec:
        _add_best(bench, codec)


def filtered(bench: Bench) -> None:
    """Filtered search, beside numpy that finds the rows that pass and searches them exactly."""
    assert bench.indexed_s is not None
    with bench.collection("bench_floor") as floor:
        bench.insert(floor, bench.data.head(1), Form.JSON)
        for name, text, passing in _filters(bench.data):
            bench.say(f"filter {text}")
            _filter_row(bench, name, text, passing, floor)


def natural_filters(data: Dataset) -> list[tuple[str, str]]:
    """Return (field, value) of the data's own that near 10 % and 1 % of the rows have: such rows lie together."""
    if "category" not in (data.scalars[0] if data.rows else {}):
        return []
    values, counts = np.unique(data.column("category"), return_counts=True)
    chosen = [int(np.argmin(np.abs(np.log(counts / data.rows / share)))) for share in (0.1, 0.01)]
    return [("category", str(values[i])) for i in dict.fromkeys(chosen)]


def exact_on_survivors(data: Dataset, passing: Passing) -> Callable[[Matrix], Sequence[int]]:
    """Return a search as a careful numpy user would write it.

    Each query finds the survivors first, as a request with a filter does: the predicate is evaluated over the field's
    whole column, which is there as an array. Then the rows that pass are gathered, compared, and the best K ordered.
    """

    def nearest(query: Matrix) -> Sequence[int]:
        chosen = np.flatnonzero(passing())
        scores = scores_of(query, data.vectors[chosen], data.metric)[0]
        found = min(K, len(chosen))
        if not found:
            return []
        top = np.argpartition(-scores, found - 1)[:found]
        return [int(i) for i in chosen[top[np.argsort(-scores[top])]]]

    return nearest


def _filters(data: Dataset) -> list[tuple[str, str, Passing]]:
    """Return (row's name, filter, the same in numpy): a field independent of the vectors, then fields of the data."""
    named: list[tuple[str, str, Passing]] = []
    for share in goals.SELECTIVITIES:
        below = round(BUCKETS * share)
        named.append((goals.selectivity_name(share), f"bucket < {below}", partial(np.less, data.buckets, below)))
    for field_name, value in natural_filters(data):
        passing = partial(np.equal, data.column(field_name), value)
        share = float(passing().mean())
        named.append((f"{field_name} {value}, {share * 100:.2g} % pass", f'{field_name} == "{value}"', passing))
    return named


def _filter_row(bench: Bench, name: str, text: str, passing: Passing, floor: str) -> None:
    """Compare filtered searches with the sum of two: exact search in numpy, the finding of survivors included, and the
    floor, a search among one row: HTTP, parsing, planning, and no distances to speak of.
    """
    data, address, mask = bench.data, bench.client.address, passing()
    truth = exact(data.queries, data.vectors, K, data.metric, mask)
    requests = search_requests(address, MAIN, data.queries, Codec.JSON, k=K, filter_text=text)
    floor_requests = search_requests(address, floor, data.queries, Codec.JSON, k=K, filter_text="bucket >= 0")
    passes, answers = Passes(), dict[int, list[int]]()
    for _ in range(bench.plan.repeats):
        least = run_load(address, floor_requests, connections=1, seconds=FLOOR_S, cycle=True)
        exactly = exact_on_survivors(data, passing)
        pause_s = least.latency_ms(50) / 1e3
        beside = time_queries(exactly, data.queries[:EXACT_QUERIES], FLOOR_S, pause_s=pause_s)
        run_load(address, requests[:EXACT_QUERIES], connections=1)
        replies = run_load(address, requests, connections=1, seconds=bench.plan.seconds, cycle=True)
        answers |= answers_of(replies, Codec.JSON)
        floor_ms = least.latency_ms(50)
        values = {"p50_ms": replies.latency_ms(50), "p99_ms": replies.latency_ms(99), "floor_ms": floor_ms}
        values |= {"exact_p50_ms": beside.p50_ms, "of_exact": values["p50_ms"] / (beside.p50_ms + floor_ms)}
        passes.values.append({**values, "failures": replies.failures})
    short = sum(len(answer) < min(K, int(mask.sum())) for answer in answers.values())
    bench.results.add(
        "filter", name, recall=recall_of(data, answers, truth, mask), **passes.median(), short_answers=short
    )


def recall_of(data: Dataset, answers: Mapping[int, Sequence[int]], truth: Truth, mask: Mask | None = None) -> float:
    """Return the mean recall of the queries that were answered, by query number."""
    asked = list(answers)
    return recall(
        list(answers.values()),
        Truth(truth.ids[asked], truth.scores[asked]),
        queries=data.queries[asked],
        vectors=data.vectors,
        metric=data.metric,
        mask=mask,
    )


def _engine_values(bench: Bench, ef: int) -> dict[str, float]:
    speed = bench.engine.search(ef)
    share = recall_of(bench.data, dict(enumerate(speed.answers)), bench.truth)
    return {"recall": share, "per_s": speed.per_s, "p50_ms": speed.p50_ms, "p99_ms": speed.p99_ms}


def _search_values(bench: Bench, codec: Codec, ef: int, connections: int) -> dict[str, float]:
    address, data = bench.client.address, bench.data
    requests = search_requests(address, MAIN, data.queries, codec, k=K, ef=ef)
    run_load(address, requests[:WARM_UP_REQUESTS], connections=connections)
    replies = run_load(address, requests, connections=connections, seconds=bench.plan.seconds, cycle=True)
    return {
        "recall": recall_of(data, answers_of(replies, codec), bench.truth),
        "per_s": replies.per_s,
        "p50_ms": replies.latency_ms(50),
        "p99_ms": replies.latency_ms(99),
        "failures": replies.failures,
    }


def _add_best(bench: Bench, codec: Codec) -> None:
    """Repeat the row of the least effort that finds enough, 8 connections: what the goals are about."""
    for ef in bench.plan.efs:
        row = next(row for row in bench.results.rows if row.name == f"{codec}, 8 connections, ef {ef}")
        if row.values["recall@10"] >= goals.RECALL_MIN:
            bench.results.repeat(row, goals.best_search(codec), ef=ef)
            return


def answers_of(replies: Replies, codec: Codec) -> dict[int, list[int]]:
    """Return the first answer to each query, by query number. Raises Refused if one is an error."""
    return {number: search_hits(body, codec)[0] for number, body in sorted(replies.first_bodies().items())}
