"""What is measured, one function a scenario. Each adds rows to the run's results.

insert   every form of rows into an empty collection; acknowledged rows per second
mixed    the same while searches arrive at a fixed rate: their latency, and whether they were right
index    from the last insert to fully indexed, beside the engine's own build
size     memory at rest, disk before and after compaction
search   ef, connections, codec, beside the engine alone
filter   selectivities, beside exact search on the survivors
restart  from start to the first right answer, after SIGTERM and after SIGKILL
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tools.bench import freshness, goals
from tools.bench.client import Client, wait_until
from tools.bench.data import BUCKETS, Dataset, Mask, Matrix
from tools.bench.engine import EngineFigures, Task, measure_engine, time_queries
from tools.bench.loading import Load, Replies, run_load
from tools.bench.node import NodeProcess
from tools.bench.results import Results
from tools.bench.truth import Truth, exact, recall, scores_of
from tools.bench.wire import (
    BATCH_ROWS,
    Codec,
    Form,
    Refused,
    insert_requests,
    schema_body,
    search_hits,
    search_requests,
)

K = 10
MAIN = "bench_main"
MIXED_QUERIES = 200
INDEXED_S_MAX = 1800


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    efs: Sequence[int]
    seconds: float
    insert_connections: int
    search_rate: float
    index_type: str
    index_params: Mapping[str, Any]
    shards: int
    restart_rows: int
    build_threads: int
    settle_s: float
    """Idle time before memory is read, for allocators and the page cache to calm down."""


@dataclass
class Bench:
    """One run: a node, the data, and what was found so far."""

    client: Client
    node: NodeProcess | None
    """None when somebody else's node is driven; then it is neither weighed nor restarted."""
    everything: Dataset
    """All rows there are; `data` are those that the other scenarios use."""
    data: Dataset
    plan: Plan
    say: Callable[[str], None]
    results: Results = field(default_factory=Results)

    @cached_property
    def truth(self) -> Truth:
        return exact(self.data.queries, self.data.vectors, K, self.data.metric)

    @cached_property
    def engine(self) -> EngineFigures:
        """The engine alone, measured once a run, while the node is idle."""
        self.say("engine alone: build and search")
        plan = self.plan
        task = Task(plan.index_type, self.data.metric, plan.index_params, plan.build_threads, plan.efs, K, plan.seconds)
        return measure_engine(self.data, task)

    @cached_property
    def indexed_s(self) -> float:
        """Fill the main collection and return the seconds from the last acknowledgement to fully indexed."""
        self.say(f"main collection: {self.data.rows} rows, then wait for its index")
        self.create(MAIN)
        self.insert(MAIN, self.data, Form.COLUMNS)
        started = time.monotonic()
        self.client.call("/collections/flush", collectionName=MAIN)
        self.wait_indexed(MAIN, self.data.rows)
        return time.monotonic() - started

    @cached_property
    def floor_ms(self) -> float:
        """p50 of a search among one row: HTTP, parsing, planning, and hardly any distances."""
        with self.collection("bench_floor") as name:
            one = self.data.head(1)
            self.insert(name, one, Form.JSON)
            requests = search_requests(self.client.address, name, self.data.queries, Codec.JSON, k=K)
            return run_load(self.client.address, requests, connections=1, seconds=1.0, cycle=True).latency_ms(50)

    def create(self, name: str) -> None:
        index: dict[str, Any] = {"fieldName": "vector", "indexName": "vector", "indexType": self.plan.index_type}
        index |= {"metricType": self.data.metric, "params": dict(self.plan.index_params)}
        self.client.call("/collections/drop", collectionName=name)
        self.client.call(
            "/collections/create",
            collectionName=name,
            schema=schema_body(self.data),
            indexParams=[index],
            params={"shardsNum": self.plan.shards},
        )

    @contextmanager
    def collection(self, name: str) -> Iterator[str]:
        """Create a collection for the time of a scenario."""
        self.create(name)
        try:
            yield name
        finally:
            self.client.call("/collections/drop", collectionName=name)

    def insert(self, name: str, data: Dataset, form: Form, *, first: int = 0) -> Replies:
        """Insert rows from `first` on. Raises Refused if any was not acknowledged."""
        requests = insert_requests(self.client.address, name, data, form, first=first)
        replies = run_load(self.client.address, requests, connections=self.plan.insert_connections)
        check_inserts(replies, form.codec, data.rows - first)
        return replies

    def wait_indexed(self, name: str, rows: int) -> None:
        def finished() -> bool:
            state = self.client.call("/indexes/describe", collectionName=name, indexName="vector")[0]
            if state["indexState"] == "Failed":
                raise RuntimeError(f"index build failed: {state.get('failReason')}")
            return bool(
                state["indexState"] == "Finished" and state["pendingRows"] == 0 and state["indexedRows"] >= rows
            )

        wait_until(finished, timeout_s=INDEXED_S_MAX, what=f"{rows} rows of {name} indexed")

    def count(self, name: str) -> int:
        rows = self.client.call(
            "/entities/query", collectionName=name, filter="", outputFields=["count(*)"], consistencyLevel="Strong"
        )
        return int(rows[0]["count(*)"])


def check_inserts(replies: Replies, codec: Codec, rows: int) -> None:
    """Raise unless every insert was acknowledged and they add up to `rows`."""
    acknowledged = 0
    for status, body in zip(replies.statuses, replies.bodies, strict=True):
        if status != 200:
            raise Refused("/entities/insert", -1, f"HTTP status {status}: {body[:200]!r}")
        reply = codec.loads(body)
        if reply["code"] != 0:
            raise Refused("/entities/insert", reply["code"], reply.get("message", ""))
        acknowledged += reply["data"]["insertCount"]
    if acknowledged != rows:
        raise RuntimeError(f"{acknowledged} rows acknowledged of {rows}")


def insert(bench: Bench) -> None:
    """Insert everything in 1,000-row batches, once in each form."""
    for form in Form:
        bench.say(f"insert {bench.data.rows} rows, {form}")
        with bench.collection("bench_insert") as name:
            replies = bench.insert(name, bench.data, form)
            counted = bench.count(name)
        bench.results.add(
            "insert", str(form),
            rows_per_s=bench.data.rows / replies.wall_s, p50_ms=replies.latency_ms(50), p99_ms=replies.latency_ms(99),
            connections=bench.plan.insert_connections, missing_rows=bench.data.rows - counted,
        )  # fmt: skip


def mixed(bench: Bench) -> None:
    """Search at a fixed rate while rows are inserted."""
    data, address = bench.data, bench.client.address
    queries = min(MIXED_QUERIES, len(data.queries))
    for form in (Form.JSON, Form.COLUMNS):
        codec = form.codec
        bench.say(f"insert {data.rows} rows, {form}, under {bench.plan.search_rate:g} searches/s")
        with bench.collection("bench_mixed") as name:
            asked = search_requests(address, name, data.queries[:queries], codec, k=K, consistency="Strong")
            with Load(address, asked, connections=4, rate=bench.plan.search_rate, cycle=True) as load:
                inserts = bench.insert(name, data, form)
                searches = load.stop()
        during = _until(searches, int(inserts.done_ns.max()))
        found = freshness.judge(during, inserts, data, queries=queries, batch_rows=BATCH_ROWS, codec=codec, k=K)
        bench.results.add(
            "mixed", str(form),
            rows_per_s=data.rows / inserts.wall_s, searches=len(during), search_p50_ms=during.latency_ms(50),
            search_p99_ms=during.latency_ms(99), recall=found.recall, wrong=found.wrong,
        )  # fmt: skip


def index(bench: Bench) -> None:
    """Time from the last insert to fully indexed, beside the engine's build of one index over the same rows."""
    indexed_s, engine = bench.indexed_s, bench.engine
    bench.results.add(
        "index", "build",
        indexed_s=indexed_s, engine_build_s=engine.build_s, of_engine=indexed_s / engine.build_s,
        threads=bench.plan.build_threads, engine_memory_of_raw=engine.memory_bytes / bench.data.raw_bytes,
        engine_dump_of_raw=engine.dump_bytes / bench.data.raw_bytes,
    )  # fmt: skip


def size(bench: Bench) -> None:
    """Memory at rest, disk before and after compaction."""
    assert bench.indexed_s is not None
    if bench.node is None:
        return
    raw = bench.data.raw_bytes
    before = bench.node.disk_bytes()
    bench.say("compact")
    compact(bench, MAIN)
    time.sleep(bench.plan.settle_s)
    after, memory = bench.node.disk_bytes(), bench.node.memory_bytes()
    allowance = goals.MEMORY_RAW_RATIO_MAX * raw + goals.MEMORY_FIXED_BYTES
    bench.results.add("size", "raw vectors", mb=raw / 1e6)
    bench.results.add(
        "size", "memory", mb=memory["rss"] / 1e6, anonymous_mb=memory["anonymous"] / 1e6,
        of_raw=memory["rss"] / raw, of_allowance=memory["rss"] / allowance,
    )  # fmt: skip
    bench.results.add("size", "disk before compaction", mb=before / 1e6, of_raw=before / raw)
    bench.results.add("size", "disk after compaction", mb=after / 1e6, of_raw=after / raw)


def search(bench: Bench) -> None:
    """Search at each ef with 1 and 8 connections in both codecs, beside the engine alone."""
    assert bench.indexed_s is not None
    bench.results.add("search", "one row (floor)", p50_ms=bench.floor_ms)
    for ef, alone in bench.engine.searches.items():
        bench.results.add(
            "search", f"engine alone, 1 thread, ef {ef}",
            recall=_recall(bench, alone.answers), per_s=alone.per_s, p50_ms=alone.p50_ms, p99_ms=alone.p99_ms,
        )  # fmt: skip
    for codec in Codec:
        best: tuple[int, dict[str, float]] | None = None
        for ef in bench.plan.efs:
            for connections in (1, 8):
                bench.say(f"search ef {ef}, {connections} connections, {codec}")
                values = _search_values(bench, codec, ef, connections)
                bench.results.add("search", f"{codec}, {connections} connections, ef {ef}", **values)
                if connections == 8 and values["recall"] >= goals.RECALL_MIN and not best:
                    best = ef, values
        if best:
            bench.results.add("search", goals.best_search(codec), ef=best[0], **best[1])


def filtered(bench: Bench) -> None:
    """Filtered search, beside exact search in numpy on the rows that pass."""
    assert bench.indexed_s is not None
    data = bench.data
    named: list[tuple[str, str, Mask]] = [
        (goals.selectivity_name(share), f"bucket < {round(BUCKETS * share)}", data.buckets < round(BUCKETS * share))
        for share in goals.SELECTIVITIES
    ]
    for field_name, value in natural_filters(data):
        mask = data.column(field_name) == value
        named.append((f"{field_name} {value}, {mask.mean() * 100:.2g} % pass", f'{field_name} == "{value}"', mask))
    for name, text, mask in named:
        bench.say(f"filter {text}")
        _filter_row(bench, name, text, mask)


def restart(bench: Bench) -> None:
    """Stop, start, and wait for the first right answer, with all rows indexed."""
    assert bench.indexed_s is not None
    if bench.node is None:
        return
    full = bench.everything.head(max(bench.plan.restart_rows, bench.data.rows))
    if full.rows > bench.data.rows:
        bench.say(f"fill up to {full.rows} rows")
        bench.insert(MAIN, full, Form.COLUMNS, first=bench.data.rows)
        bench.client.call("/collections/flush", collectionName=MAIN)
    bench.wait_indexed(MAIN, full.rows)
    truth = exact(full.queries[:1], full.vectors, K, full.metric)
    for how in ("SIGTERM", "SIGKILL"):
        bench.say(f"restart after {how}")
        if how == "SIGTERM":
            stopping = time.monotonic()
            bench.node.stop()
            stop_s = time.monotonic() - stopping
        else:
            bench.node.kill()
            stop_s = 0.0
        started = time.monotonic()
        bench.node.spawn()
        wait_until(lambda: _right(bench, full, truth), timeout_s=120, what="first right answer", poll_s=0.01)
        first_s = time.monotonic() - started
        bench.wait_indexed(MAIN, full.rows)
        indexed_s = time.monotonic() - started
        time.sleep(bench.plan.settle_s)
        bench.results.add(
            "restart", how, rows=full.rows, stop_s=stop_s, first_answer_s=first_s, indexed_s=indexed_s,
            memory_mb=bench.node.memory_bytes()["rss"] / 1e6,
        )  # fmt: skip


SCENARIOS: Mapping[str, Callable[[Bench], None]] = {
    "insert": insert,
    "mixed": mixed,
    "index": index,
    "size": size,
    "search": search,
    "filter": filtered,
    "restart": restart,
}


def compact(bench: Bench, name: str) -> None:
    """Compact a collection and wait until it is done and indexed again."""
    job = bench.client.call("/collections/compact", collectionName=name)["compactionID"]
    wait_until(
        lambda: bench.client.call("/collections/get_compaction_state", jobID=job)["state"] == "Completed",
        timeout_s=INDEXED_S_MAX, what="compaction",
    )  # fmt: skip
    bench.wait_indexed(name, bench.data.rows)


def natural_filters(data: Dataset) -> list[tuple[str, str]]:
    """Return filters on fields of the data itself, with near 10 % and 1 % of the rows: these gather in places."""
    if "category" not in (data.scalars[0] if data.rows else {}):
        return []
    values, counts = np.unique(data.column("category"), return_counts=True)
    chosen = [int(np.argmin(np.abs(np.log(counts / data.rows / share)))) for share in (0.1, 0.01)]
    return [("category", str(values[i])) for i in dict.fromkeys(chosen)]


def exact_on_survivors(data: Dataset, mask: Mask) -> Callable[[Matrix], Sequence[int]]:
    """Return a search as a careful numpy user would write it: the mask is there, the rows are gathered per query."""

    def nearest(query: Matrix) -> Sequence[int]:
        chosen = np.flatnonzero(mask)
        scores = scores_of(query, data.vectors[chosen], data.metric)[0]
        found = min(K, len(chosen))
        if not found:
            return []
        top = np.argpartition(-scores, found - 1)[:found]
        return [int(i) for i in chosen[top[np.argsort(-scores[top])]]]

    return nearest


def _filter_row(bench: Bench, name: str, text: str, mask: Mask) -> None:
    data, address = bench.data, bench.client.address
    truth = exact(data.queries, data.vectors, K, data.metric, mask)
    beside = time_queries(exact_on_survivors(data, mask), data.queries[:50], min(1.0, bench.plan.seconds))
    requests = search_requests(address, MAIN, data.queries, Codec.JSON, k=K, filter_text=text)
    run_load(address, requests[:50], connections=1)
    replies = run_load(address, requests, connections=1, seconds=bench.plan.seconds, cycle=True)
    answers = _answers(replies, Codec.JSON)
    asked = list(answers)
    found = recall(
        list(answers.values()), Truth(truth.ids[asked], truth.scores[asked]),
        queries=data.queries[asked], vectors=data.vectors, metric=data.metric, mask=mask,
    )  # fmt: skip
    short = sum(len(answers[i]) < min(K, int(mask.sum())) for i in asked)
    bench.results.add(
        "filter", name,
        recall=found, p50_ms=replies.latency_ms(50), p99_ms=replies.latency_ms(99), exact_p50_ms=beside.p50_ms,
        floor_ms=bench.floor_ms, of_exact=replies.latency_ms(50) / (beside.p50_ms + bench.floor_ms),
        short_answers=short, failures=replies.failures,
    )  # fmt: skip


def _search_values(bench: Bench, codec: Codec, ef: int, connections: int) -> dict[str, float]:
    address, data = bench.client.address, bench.data
    requests = search_requests(address, MAIN, data.queries, codec, k=K, ef=ef)
    run_load(address, requests[: min(200, len(requests))], connections=connections)
    replies = run_load(address, requests, connections=connections, seconds=bench.plan.seconds, cycle=True)
    answers = _answers(replies, codec)
    asked = list(answers)
    return {
        "recall": recall(
            list(answers.values()), Truth(bench.truth.ids[asked], bench.truth.scores[asked]),
            queries=data.queries[asked], vectors=data.vectors, metric=data.metric,
        ),
        "per_s": replies.per_s,
        "p50_ms": replies.latency_ms(50),
        "p99_ms": replies.latency_ms(99),
        "of_engine": replies.per_s / bench.engine.searches[ef].per_s,
        "failures": replies.failures,
    }  # fmt: skip


def _answers(replies: Replies, codec: Codec) -> dict[int, list[int]]:
    """Return the first answer to each query, by query number. Raises Refused if one is an error."""
    return {number: search_hits(body, codec)[0] for number, body in sorted(replies.first_bodies().items())}


def _recall(bench: Bench, answers: Sequence[Sequence[int]]) -> float:
    data = bench.data
    return recall(answers, bench.truth, queries=data.queries, vectors=data.vectors, metric=data.metric)


def _right(bench: Bench, full: Dataset, truth: Truth) -> bool:
    """Return whether the node answers one search well, from all rows."""
    body = {"collectionName": MAIN, "annsField": "vector", "limit": K, "searchParams": {"params": {"ef": 256}}}
    try:
        rows = bench.client.call("/entities/search", **body, data=[full.queries[0]])
    except (OSError, Refused):
        return False
    answer = [int(row["id"]) for row in rows]
    share = recall([answer], truth, queries=full.queries[:1], vectors=full.vectors, metric=full.metric)
    return len(answer) == K and share >= 0.9


def _until(replies: Replies, last_ns: int) -> Replies:
    """Return the replies to what was sent before a moment."""
    kept = np.flatnonzero(replies.sent_ns < last_ns)
    return Replies(
        replies.numbers[kept], replies.due_ns[kept], replies.sent_ns[kept], replies.done_ns[kept],
        replies.statuses[kept], [replies.bodies[i] for i in kept.tolist()],
    )  # fmt: skip
