"""What a node counts, as Prometheus reads it: units in the names, few labels, no label that grows with the data.

A `Metrics` has a registry of its own, so that several nodes in one process (tests, simulation) do not mix. Gauges of
the state (segments, journal) are set when somebody scrapes: their owner registers with `before_scrape`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REQUEST_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
FSYNC_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
BUILD_BUCKETS_S = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)
STALL_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)

COLLECTIONS_NAMED = 64
"""Labels of refusals: collections come and go without end."""


class PlanKind(StrEnum):
    """How a segment was searched."""

    EXACT = "exact"
    """Every row, or every survivor of the filter, compared."""
    INDEX = "index"
    """The vector index, under a mask of the survivors if a filter or deletes leave some out."""
    SKIP = "skip"
    """Not at all: no row of it can match."""


class Routed(StrEnum):
    """Why another node was asked, or one was asked again."""

    WRITE = "write"
    """A change went to a leader elsewhere."""
    READ = "read"
    """Replicas elsewhere answered a read, or a part of it."""
    HEDGE = "hedge"
    """A second replica was asked because the first one took long."""
    REPEAT = "repeat"
    """A leader did not answer, or nobody led: it was tried again."""


class Metrics:
    """Counters, gauges and histograms of one node; each method takes a few microseconds.

    What is told of requests and searches comes from the loop, the rest from any thread.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._scrapers: list[Callable[[], None]] = []
        self._worst_stall_s = 0.0
        registry = self.registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Histogram(
            "annulus_request_seconds",
            "Time to answer a request; code is Milvus's, 0 for success",
            ["route", "code"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._request_times: dict[tuple[str, int], Histogram] = {}
        self._running = 0
        running = Gauge("annulus_requests_running", "Requests being served", registry=registry)
        running.set_function(lambda: self._running)
        self._rows_inserted = Counter("annulus_rows_inserted", "Rows inserted or upserted", registry=registry)
        self._rows_deleted = Counter("annulus_rows_deleted", "Rows deleted", registry=registry)
        self._segments = Gauge("annulus_segments", "Segments by state", ["state"], registry=registry)
        self._segment_rows = Gauge("annulus_segment_rows", "Rows in segments by state", ["state"], registry=registry)
        self._segment_bytes = Gauge("annulus_segment_bytes", "Bytes of segments by state", ["state"], registry=registry)
        self._index_bytes = Gauge("annulus_index_bytes", "Memory of vector indexes", registry=registry)
        self._journal_position = Gauge(
            "annulus_journal_position", "Last applied position by shard", ["shard"], registry=registry
        )
        self._replicas = Gauge(
            "annulus_replicas",
            "Replicas here by role: leader, follower, leaderless (no leader is known), behind (catching up)",
            ["role"],
            registry=registry,
        )
        self._journal_bytes = Gauge("annulus_journal_bytes", "Bytes of the journal on disk", registry=registry)
        self._fsync = Histogram(
            "annulus_fsync_seconds", "Time of a journal fsync", buckets=FSYNC_BUCKETS_S, registry=registry
        )
        self._builds = Histogram(
            "annulus_index_build_seconds",
            "Time of an index build; result is ok, failed or cancelled",
            ["result"],
            buckets=BUILD_BUCKETS_S,
            registry=registry,
        )
        self._builds_running = Gauge("annulus_index_builds_running", "Index builds under way", registry=registry)
        self._stalls = Histogram(
            "annulus_loop_stall_seconds",
            "Pauses of the event loop above the threshold",
            buckets=STALL_BUCKETS_S,
            registry=registry,
        )
        self._stall_worst = Gauge("annulus_loop_stall_worst_seconds", "Longest pause since start", registry=registry)
        searches = Counter("annulus_searches", "Segments searched by kind of plan", ["plan"], registry=registry)
        self._searches = {plan: searches.labels(plan.value) for plan in PlanKind}
        self._workers = Gauge(
            "annulus_worker_calls_pending", "Calls queued or running by lane", ["lane"], registry=registry
        )
        self._chunk_bytes = Counter(
            "annulus_chunk_bytes",
            "Bytes of chunks from and to other nodes; direction is in or out",
            ["direction"],
            registry=registry,
        )
        self._chunk_bytes_left = Gauge(
            "annulus_chunk_bytes_left", "Bytes of chunks that fetches under way have yet to bring", registry=registry
        )
        self._chunks_repaired = Counter(
            "annulus_chunks_repaired", "Damaged chunks replaced by those of other nodes", registry=registry
        )
        self._compactions = Counter(
            "annulus_compactions", "Compactions by kind: merge, purge, renew", ["kind"], registry=registry
        )
        self._compacted_rows = Counter(
            "annulus_compacted_rows", "Rows that compactions read (in) and kept (out)", ["direction"], registry=registry
        )
        self._chunks_scrubbed = Counter(
            "annulus_chunks_scrubbed", "Chunks read again to see whether they are whole", registry=registry
        )
        self._chunks_damaged = Counter(
            "annulus_chunks_damaged", "Chunks and manifests found damaged or missing by scrubbing", registry=registry
        )
        self._chunks_cured = Counter(
            "annulus_chunks_cured",
            "What became of chunks found damaged; by is peer, memory, rebuild, unneeded or none",
            ["by"],
            registry=registry,
        )
        self._states_compared = Counter(
            "annulus_states_compared",
            "Comparisons of a group's replicas by its leader; verdict is equal, diverged, tied, undecided or alone",
            ["verdict"],
            registry=registry,
        )
        self._replicas_diverged = Counter(
            "annulus_replicas_diverged", "Replicas whose state was not that of the others", registry=registry
        )
        self._replicas_rebuilt = Counter(
            "annulus_replicas_rebuilt", "Replicas here that took another's state for theirs", registry=registry
        )
        self._held = Gauge(
            "annulus_admission_held",
            "What is under way of each budget: bodies, requests and log in bytes, decoding and reads as they are",
            ["budget"],
            registry=registry,
        )
        self._budgets = Gauge("annulus_admission_limit", "What may be under way", ["budget"], registry=registry)
        self._queued = Gauge("annulus_admission_waiting", "Who waits for room", ["budget"], registry=registry)
        self._delays = Histogram(
            "annulus_admission_delay_seconds",
            "How long those waited for room that were admitted, but not at once",
            ["budget"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._refusals = Counter(
            "annulus_admission_refused",
            "Requests that were refused, to be repeated; reason is full, late or memory; of many collections, the "
            "first ones are named",
            ["budget", "reason", "collection"],
            registry=registry,
        )
        self._refused_names: set[str] = set()
        self._memory = Gauge(
            "annulus_memory_bytes", "Memory that slows or refuses inserts: growing, resident", ["what"],
            registry=registry,
        )  # fmt: skip
        self._memory_high = Gauge(
            "annulus_memory_high_bytes", "Where inserts of those who write most are refused", ["what"],
            registry=registry,
        )  # fmt: skip
        self._write_level = Gauge(
            "annulus_admission_level",
            "What those meet who write most: 0 nothing, 1 they are slowed, 2 they are refused",
            registry=registry,
        )
        self._early_seals = Counter(
            "annulus_segments_sealed_early", "Segments sealed because growing ones took too much memory",
            registry=registry,
        )  # fmt: skip
        self._read_only = Gauge("annulus_read_only", "1 while writes are refused for want of disk", registry=registry)
        self._peer_sessions = Gauge(
            "annulus_peer_sessions", "1 while there is a session with the node", ["peer"], registry=registry
        )
        self._peer_bytes = Counter(
            "annulus_peer_bytes",
            "Bytes from and to other nodes; direction is in or out",
            ["peer", "direction"],
            registry=registry,
        )
        self._peer_round_trip = Gauge(
            "annulus_peer_round_trip_seconds", "Time of the last ping and its reply", ["peer"], registry=registry
        )
        self._changes = Counter(
            "annulus_catalogue_changes",
            "Changes that shards had to be told of and were, by kind",
            ["kind"],
            registry=registry,
        )
        self._tellings_failed = Counter(
            "annulus_catalogue_tellings_failed",
            "Attempts to tell a shard of a change that failed, to be repeated, by the code of the error",
            ["code"],
            registry=registry,
        )
        self._peer_refused = Counter(
            "annulus_peer_refused",
            "Connections and frames that were refused, by reason; each is logged when it first happens",
            ["reason"],
            registry=registry,
        )
        routed = Counter(
            "annulus_routed",
            "What requests did beyond this node, or again; kind is write, read, hedge or repeat",
            ["kind"],
            registry=registry,
        )
        self._routed = {kind: routed.labels(kind.value) for kind in Routed}

    def routed(self, kind: Routed) -> None:
        self._routed[kind].inc()

    # requests
    def request_begun(self) -> None:
        self._running += 1

    def request_ended(self, *, route: str, code: int, seconds: float) -> None:
        """`route` is the route's pattern, never the path a client sent: paths are without end."""
        self._running -= 1
        times = self._request_times.get((route, code))
        if times is None:
            times = self._request_times[route, code] = self._requests.labels(route, str(code))
        times.observe(seconds)

    # rows
    def rows_inserted(self, rows: int) -> None:
        self._rows_inserted.inc(rows)

    def rows_deleted(self, rows: int) -> None:
        self._rows_deleted.inc(rows)

    def searched(self, plan: PlanKind, segments: int = 1) -> None:
        self._searches[plan].inc(segments)

    # admission
    def budget(self, name: str, held: int, limit: int, waiting: int) -> None:
        """Set what is under way of a budget, what may be, and who waits."""
        self._held.labels(name).set(held)
        self._budgets.labels(name).set(limit)
        self._queued.labels(name).set(waiting)

    def delayed(self, budget: str, seconds: float) -> None:
        self._delays.labels(budget).observe(seconds)

    def refused(self, budget: str, reason: str, collection: str) -> None:
        """`collection` becomes a label until there are COLLECTIONS_NAMED of them; the others are one."""
        if collection not in self._refused_names:
            if len(self._refused_names) >= COLLECTIONS_NAMED:
                collection = "(others)"
            else:
                self._refused_names.add(collection)
        self._refusals.labels(budget, reason, collection).inc()

    def memory(self, what: str, count: int, high: int) -> None:
        self._memory.labels(what).set(count)
        self._memory_high.labels(what).set(high)

    def write_level(self, level: int) -> None:
        self._write_level.set(level)

    def sealed_early(self) -> None:
        self._early_seals.inc()

    # log and disk
    def fsynced(self, seconds: float) -> None:
        self._fsync.observe(seconds)

    def journal_position(self, shard: int, position: int) -> None:
        self._journal_position.labels(str(shard)).set(position)

    def replicas(self, role: str, count: int) -> None:
        self._replicas.labels(role).set(count)

    def journal_bytes(self, count: int) -> None:
        self._journal_bytes.set(count)

    def chunks_fetched(self, bytes: int) -> None:
        self._chunk_bytes.labels("in").inc(bytes)

    def chunks_served(self, bytes: int) -> None:
        self._chunk_bytes.labels("out").inc(bytes)

    def chunk_bytes_left(self, count: int) -> None:
        self._chunk_bytes_left.set(count)

    def chunk_repaired(self) -> None:
        self._chunks_repaired.inc()

    # healing
    def chunks_scrubbed(self, chunks: int) -> None:
        self._chunks_scrubbed.inc(chunks)

    def chunk_damaged(self) -> None:
        self._chunks_damaged.inc()

    def chunk_cured(self, by: str) -> None:
        self._chunks_cured.labels(by).inc()

    def state_compared(self, verdict: str) -> None:
        self._states_compared.labels(verdict).inc()

    def replica_diverged(self) -> None:
        self._replicas_diverged.inc()

    def replica_rebuilt(self) -> None:
        self._replicas_rebuilt.inc()

    def read_only(self, now: bool) -> None:
        self._read_only.set(1 if now else 0)

    # other nodes
    def peer_session(self, peer: str, up: bool) -> None:
        self._peer_sessions.labels(peer).set(1 if up else 0)

    def peer_forgotten(self, peer: str) -> None:
        """The node is no peer any more: its gauges end."""
        for gauge in (self._peer_sessions, self._peer_round_trip):
            with contextlib.suppress(KeyError):
                gauge.remove(peer)

    def peer_bytes(self, peer: str, *, received: int, sent: int) -> None:
        self._peer_bytes.labels(peer, "in").inc(received)
        self._peer_bytes.labels(peer, "out").inc(sent)

    def peer_round_trip(self, peer: str, seconds: float) -> None:
        self._peer_round_trip.labels(peer).set(seconds)

    def peer_refused(self, reason: str) -> None:
        """`reason` is one of ours, never text that a stranger sent."""
        self._peer_refused.labels(reason).inc()

    # changes of the catalogue
    def change_made(self, kind: str) -> None:
        self._changes.labels(kind).inc()

    def telling_failed(self, code: str) -> None:
        self._tellings_failed.labels(code).inc()

    # segments and indexes
    def segments(self, state: str, *, segments: int, rows: int, bytes: int) -> None:
        """Set what there is in one state (growing, sealed, flushed, indexed)."""
        self._segments.labels(state).set(segments)
        self._segment_rows.labels(state).set(rows)
        self._segment_bytes.labels(state).set(bytes)

    def index_bytes(self, count: int) -> None:
        self._index_bytes.set(count)

    def build_begun(self) -> None:
        self._builds_running.inc()

    def build_ended(self, seconds: float, *, result: str = "ok") -> None:
        """`result` is ok, failed or cancelled."""
        self._builds_running.dec()
        self._builds.labels(result).observe(seconds)

    def compacted(self, kind: str, rows_before: int, rows_after: int) -> None:
        self._compactions.labels(kind).inc()
        self._compacted_rows.labels("in").inc(rows_before)
        self._compacted_rows.labels("out").inc(rows_after)

    # the loop and its threads
    def loop_stalled(self, seconds: float) -> None:
        self._stalls.observe(seconds)
        self._worst_stall_s = max(self._worst_stall_s, seconds)
        self._stall_worst.set(self._worst_stall_s)

    def worker_calls(self, lane: str, pending: int) -> None:
        self._workers.labels(lane).set(pending)

    # scraping
    def before_scrape(self, refresh: Callable[[], None]) -> None:
        """Have `refresh` called before each scrape, to set gauges that would be wasteful to keep up to date."""
        self._scrapers.append(refresh)

    def render(self) -> bytes:
        """Return everything in Prometheus's text format (CONTENT_TYPE)."""
        for refresh in self._scrapers:
            refresh()
        return generate_latest(self.registry)
