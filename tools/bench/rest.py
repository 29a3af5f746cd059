"""Scenarios of a node at rest, and of one that comes back: memory, disk, restart."""

from __future__ import annotations

import time

from tools.bench import goals
from tools.bench.client import wait_until
from tools.bench.data import Dataset
from tools.bench.run import MAIN, Bench, K
from tools.bench.truth import Truth, exact, recall
from tools.bench.wire import Form, Refused

RIGHT_RECALL_MIN = 0.9
RIGHT_EF = 256
ANSWER_S_MAX = 120
RESTART_SETTLE_S_MAX = 3.0


def size(bench: Bench) -> None:
    """Memory at rest, disk before and after compaction."""
    assert bench.indexed_s is not None
    if bench.node is None:
        return
    raw = bench.data.raw_bytes
    before = bench.node.disk_bytes()
    bench.say(f"compact, then {bench.plan.settle_s:g} s at rest")
    bench.compact(MAIN)
    time.sleep(bench.plan.settle_s)
    after, memory = bench.node.disk_bytes(), bench.node.memory_bytes()
    allowance = goals.MEMORY_RAW_RATIO_MAX * raw + goals.MEMORY_FIXED_BYTES
    bench.results.add("size", "raw vectors", mb=raw / 1e6)
    bench.results.add("size", "memory of an empty node", mb=bench.empty_bytes / 1e6)
    bench.results.add(
        "size",
        "memory",
        mb=memory["rss"] / 1e6,
        anonymous_mb=memory["anonymous"] / 1e6,
        of_raw=memory["rss"] / raw,
        of_allowance=memory["rss"] / allowance,
    )
    bench.results.add("size", "disk before compaction", mb=before / 1e6, of_raw=before / raw)
    bench.results.add("size", "disk after compaction", mb=after / 1e6, of_raw=after / raw)
    for folder, part in sorted(bench.node.disk_parts().items()):
        bench.results.add("size", f"of it {folder}", mb=part / 1e6, of_raw=part / raw)


def restart(bench: Bench) -> None:
    """Stop or kill the node, start it, and wait for the first right answer, with all rows indexed."""
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
        stopping_s = time.monotonic()
        if how == "SIGTERM":
            bench.node.stop()
        else:
            bench.node.kill()
        started_s = time.monotonic()
        bench.node.spawn()
        wait_until(lambda: _right(bench, full, truth), timeout_s=ANSWER_S_MAX, what="first right answer", poll_s=0.01)
        first_s = time.monotonic() - started_s
        bench.wait_indexed(MAIN, full.rows)
        indexed_s = time.monotonic() - started_s
        time.sleep(min(bench.plan.settle_s, RESTART_SETTLE_S_MAX))
        bench.results.add(
            "restart",
            how,
            rows=full.rows,
            stop_s=started_s - stopping_s,
            first_answer_s=first_s,
            indexed_s=indexed_s,
            memory_mb=bench.node.memory_bytes()["rss"] / 1e6,
        )


def _right(bench: Bench, full: Dataset, truth: Truth) -> bool:
    """Return whether the node answers one search well, from all rows."""
    body = {"collectionName": MAIN, "annsField": "vector", "limit": K, "searchParams": {"params": {"ef": RIGHT_EF}}}
    try:
        rows = bench.client.call("/entities/search", **body, data=[full.queries[0]])
    except (OSError, Refused):
        return False
    answer = [int(row["id"]) for row in rows]
    share = recall([answer], truth, queries=full.queries[:1], vectors=full.vectors, metric=full.metric)
    return len(answer) == K and share >= RIGHT_RECALL_MIN
