"""Scenarios of writing: rows a second, what searches feel of it, and how long the index takes after it."""

from __future__ import annotations

import numpy as np

from tools.bench import freshness
from tools.bench.freshness import Freshness
from tools.bench.loading import Load, Replies
from tools.bench.run import Bench, K
from tools.bench.truth import percentile
from tools.bench.wire import BATCH_ROWS, Form, search_requests

MIXED_QUERIES = 200
MIXED_CONNECTIONS = 4
MIXED_SEARCHES_MIN = 400
MIXED_PASSES_MAX = 6


def insert(bench: Bench) -> None:
    """Insert everything in 1,000-row batches, once in each form."""
    for form in Form:
        bench.say(f"insert {bench.data.rows} rows, {form}")
        with bench.collection("bench_insert") as name:
            replies = bench.insert(name, bench.data, form)
            counted = bench.count(name)
        bench.results.add(
            "insert",
            str(form),
            rows_per_s=bench.data.rows / replies.wall_s,
            p50_ms=replies.latency_ms(50),
            p99_ms=replies.latency_ms(99),
            connections=bench.plan.insert_connections,
            missing_rows=bench.data.rows - counted,
        )


def mixed(bench: Bench) -> None:
    """Search at a fixed rate while rows are inserted: latency, and whether the answers were right.

    Everything is inserted again until there are enough searches for a percentile of 99 to be more than the worst one.
    """
    for form in (Form.JSON, Form.COLUMNS):
        passes: list[tuple[Replies, Replies, Freshness]] = []
        while sum(len(searches) for searches, _, _ in passes) < MIXED_SEARCHES_MIN and len(passes) < MIXED_PASSES_MAX:
            bench.say(f"insert {bench.data.rows} rows, {form}, under {bench.plan.search_rate:g} searches/s")
            passes.append(_mixed_pass(bench, form))
        latencies_ns = np.concatenate([searches.done_ns - searches.due_ns for searches, _, _ in passes])
        counts = [len(searches) for searches, _, _ in passes]
        bench.results.add(
            "mixed",
            str(form),
            rows_per_s=bench.data.rows * len(passes) / sum(inserts.wall_s for _, inserts, _ in passes),
            searches=sum(counts),
            search_p50_ms=percentile(latencies_ns, 50) / 1e6,
            search_p99_ms=percentile(latencies_ns, 99) / 1e6,
            recall=float(np.average([found.recall for _, _, found in passes], weights=[one or 1 for one in counts])),
            wrong=sum(found.wrong for _, _, found in passes),
        )


def _mixed_pass(bench: Bench, form: Form) -> tuple[Replies, Replies, Freshness]:
    """Return the searches that were due while everything was inserted, the inserts, and how right the searches were."""
    data, rate = bench.data, bench.plan.search_rate
    queries = min(MIXED_QUERIES, len(data.queries))
    with bench.collection("bench_mixed") as name:
        asked = search_requests(
            bench.client.address, name, data.queries[:queries], form.codec, k=K, consistency="Strong"
        )
        with Load(bench.client.address, asked, connections=MIXED_CONNECTIONS, rate=rate, cycle=True) as load:
            inserts = bench.insert(name, data, form)
            searches = load.stop()
    during = searches.due_between(int(inserts.sent_ns.min()), int(inserts.done_ns.max()))
    found = freshness.judge(during, inserts, data, queries=queries, batch_rows=BATCH_ROWS, codec=form.codec, k=K)
    return during, inserts, found


def index(bench: Bench) -> None:
    """Time from the last insert to fully indexed, beside the engine's build of one index over the same rows."""
    indexed_s, built = bench.indexed_s, bench.engine.built
    bench.results.add(
        "index",
        "build",
        indexed_s=indexed_s,
        engine_build_s=built.build_s,
        of_engine=indexed_s / built.build_s,
        threads=bench.plan.build_threads,
        engine_memory_of_raw=built.memory_bytes / bench.data.raw_bytes,
        engine_dump_of_raw=built.dump_bytes / bench.data.raw_bytes,
    )
