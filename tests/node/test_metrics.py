"""Metrics: what is counted can be scraped, under names with units."""

from __future__ import annotations

import re

from node.metrics import Metrics, PlanKind


def scrape(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    return {name: float(value) for name, value in (each.rsplit(" ", 1) for each in lines if not each.startswith("#"))}


def test_everything_can_be_scraped() -> None:
    """Each method shows in the next scrape."""
    metrics = Metrics()
    metrics.request_begun()
    metrics.request_begun()
    metrics.request_ended(route="/v2/vectordb/entities/search", code=0, seconds=0.003)
    metrics.rows_inserted(1000)
    metrics.rows_deleted(3)
    metrics.searched(PlanKind.SKIP, 2)
    metrics.fsynced(0.0007)
    metrics.journal_position(3, 4711)
    metrics.journal_bytes(1 << 20)
    metrics.segments("sealed", segments=2, rows=100, bytes=5000)
    metrics.index_bytes(7)
    metrics.build_begun()
    metrics.build_begun()
    metrics.build_ended(2.5)
    metrics.loop_stalled(0.3)
    metrics.loop_stalled(0.1)
    metrics.worker_calls("disk", 2)
    metrics.read_only(True)
    metrics.chunks_fetched(100)
    metrics.chunks_served(200)
    metrics.chunk_bytes_left(300)
    metrics.chunk_repaired()
    seen = scrape(metrics)
    search = '{code="0",route="/v2/vectordb/entities/search"}'
    expected = {
        f"annulus_request_seconds_count{search}": 1,
        "annulus_requests_running": 1,
        "annulus_rows_inserted_total": 1000,
        "annulus_rows_deleted_total": 3,
        'annulus_searches_total{plan="skip"}': 2,
        "annulus_fsync_seconds_count": 1,
        'annulus_fsync_seconds_bucket{le="0.001"}': 1,
        'annulus_journal_position{shard="3"}': 4711,
        "annulus_journal_bytes": 1 << 20,
        'annulus_segments{state="sealed"}': 2,
        'annulus_segment_rows{state="sealed"}': 100,
        'annulus_segment_bytes{state="sealed"}': 5000,
        "annulus_index_bytes": 7,
        "annulus_index_builds_running": 1,
        'annulus_index_build_seconds_count{result="ok"}': 1,
        "annulus_loop_stall_seconds_count": 2,
        "annulus_loop_stall_worst_seconds": 0.3,
        'annulus_worker_calls_pending{lane="disk"}': 2,
        "annulus_read_only": 1,
        'annulus_chunk_bytes_total{direction="in"}': 100,
        'annulus_chunk_bytes_total{direction="out"}': 200,
        "annulus_chunk_bytes_left": 300,
        "annulus_chunks_repaired_total": 1,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert seen["process_resident_memory_bytes"] > 0


def test_two_nodes_do_not_mix() -> None:
    """Each Metrics has its own registry."""
    one, other = Metrics(), Metrics()
    one.rows_inserted(5)
    assert scrape(other)["annulus_rows_inserted_total"] == 0


def test_gauges_are_refreshed_by_a_scrape() -> None:
    """Owners of state set their gauges only when somebody looks."""
    metrics = Metrics()
    metrics.before_scrape(lambda: metrics.journal_bytes(42))
    assert scrape(metrics)["annulus_journal_bytes"] == 42


def test_names_are_ours_and_described() -> None:
    """Every metric of ours has help text; nothing but ours and the process's is exported."""
    text = Metrics().render().decode()
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert all(name.startswith(("annulus_", "process_", "python_")) for name in names)
    assert all(re.search(rf"^# HELP {name} \S", text, re.MULTILINE) for name in names)
