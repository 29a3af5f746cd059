"""Scenarios of writing: rows a second, what searches feel of it, and how long the index takes after it."""

from __future__ import annotations

from tools.bench import freshness
from tools.bench.loading import Load
from tools.bench.run import Bench, K
from tools.bench.wire import BATCH_ROWS, Form, search_requests

MIXED_QUERIES = 200
MIXED_CONNECTIONS = 4


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
    """Search at a fixed rate while rows are inserted: latency, and whether the answers were right."""
    data, address = bench.data, bench.client.address
    queries = min(MIXED_QUERIES, len(data.queries))
    for form in (Form.JSON, Form.COLUMNS):
        bench.say(f"insert {data.rows} rows, {form}, under {bench.plan.search_rate:g} searches/s")
        with bench.collection("bench_mixed") as name:
            asked = search_requests(address, name, data.queries[:queries], form.codec, k=K, consistency="Strong")
            rate = bench.plan.search_rate
            with Load(address, asked, connections=MIXED_CONNECTIONS, rate=rate, cycle=True) as load:
                inserts = bench.insert(name, data, form)
                searches = load.stop()
        during = searches.due_between(int(inserts.sent_ns.min()), int(inserts.done_ns.max()))
        found = freshness.judge(during, inserts, data, queries=queries, batch_rows=BATCH_ROWS, codec=form.codec, k=K)
        bench.results.add(
            "mixed",
            str(form),
            rows_per_s=data.rows / inserts.wall_s,
            searches=len(during),
            search_p50_ms=during.latency_ms(50),
            search_p99_ms=during.latency_ms(99),
            recall=found.recall,
            wrong=found.wrong,
        )


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
