"""What a node should reach, as data. Ratios count; absolute figures are orientation for a two-core x86-64 machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tools.bench.results import Results

RECALL_MIN = 0.97
MEMORY_RAW_RATIO_MAX = 2.2
MEMORY_FIXED_BYTES = 150_000_000
EXACT_RATIO_MAX = 1.1
"""Not slower than exact search, within the noise of two medians."""
SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105  the word, not a secret
    FAIL = "FAIL"
    BELOW = "below orientation"
    UNMEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """A bound on one number of the results."""

    text: str
    scenario: str
    name: str
    column: str
    at_least: float | None = None
    at_most: float | None = None
    orientation: bool = False
    """An absolute figure: missing it says something about the machine first."""

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def judge(self, results: Results) -> tuple[float | None, Verdict]:
        """Return the number found and what it means."""
        value = results.get(self.scenario, self.name, self.column)
        if value is None:
            return None, Verdict.UNMEASURED
        met = value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)
        return value, Verdict.PASS if met else Verdict.BELOW if self.orientation else Verdict.FAIL


def selectivity_name(share: float) -> str:
    """Return the row's name in the filter scenario."""
    return f"bucket, {share * 100:g} % pass"


def best_search(codec: str) -> str:
    """Return the name of the row with the fastest ef that reaches RECALL_MIN, 8 connections."""
    return f"{codec}, 8 connections, recall >= {RECALL_MIN}"


_SEARCH: Mapping[str, str] = {"json": best_search("json"), "cbor": best_search("cbor")}

CLUSTER_GOALS: tuple[Goal, ...] = (
    Goal("insert JSON through 3 nodes", "insert", "3 nodes, json", "rows/s", at_least=2_500, orientation=True),
    *(
        Goal(f"insert {form} through 3 nodes", "insert", f"3 nodes, {form}", "rows/s", at_least=6_000, orientation=True)
        for form in ("cbor", "cbor columns")
    ),
    *(Goal(f"rows missing after {form}", "insert", f"3 nodes, {form}", "missing rows", at_most=0)
      for form in ("json", "cbor", "cbor columns")),
    *(
        Goal(f"search ({codec}) through {node} beside one node", "search", f"3 nodes, {node}, {codec}", "of one node",
             at_least=0.9)
        for codec in ("json", "cbor") for node in ("n1", "n2", "n3")
    ),
)  # fmt: skip

DDL_GOALS: tuple[Goal, ...] = (
    Goal("a change over 8 shards on 3 nodes, p50", "latency", "3 nodes, all", "p50 ms", at_most=60),
    Goal("500 collections made, described, dropped on one node", "many", "1 node, 500 collections", "total s",
         at_most=60),
    Goal("3 nodes with 500 collections at rest", "idle", "3 nodes, 500 collections", "cores", at_most=0.1),
)  # fmt: skip

ELASTIC_GOALS: tuple[Goal, ...] = (
    Goal("rows lost", "end", "all nodes", "lost", at_most=0),
    Goal("rows doubled", "end", "all nodes", "doubled", at_most=0),
    Goal("replicas differ at the end", "end", "all nodes", "digests differ", at_most=0),
    *(
        goal
        for name in ("3 to 5", "5 to 3", "n3 lost, n6 instead")
        for goal in (
            Goal(f"writes failed, {name}", "writes", name, "failed", at_most=0),
            Goal(f"wrong counts at a snapshot, {name}", "reads", name, "wrong counts", at_most=0),
            Goal(f"copies moved of the ideal, {name}", "phases", name, "of ideal", at_most=1.2),
            Goal(f"recall, {name}", "reads", name, "recall@10", at_least=RECALL_MIN),
        )
    ),
    *(
        goal
        for name in ("3 to 5", "5 to 3")
        for goal in (
            Goal(f"writes repeated more than once, {name}", "writes", name, "repeated more", at_most=0),
            Goal(f"longest time without a leader in a hand-over, {name}", "writes", name, "leaderless max ms",
                 at_most=300, orientation=True),
            Goal(f"longest pause of writes around a hand-over, {name}", "writes", name, "pause max ms", at_most=300,
                 orientation=True),
        )
    ),
)  # fmt: skip

GOALS: tuple[Goal, ...] = (
    *(Goal(f"search ({c}) of the engine alone", "search", n, "of engine", at_least=0.5) for c, n in _SEARCH.items()),
    *(Goal(f"search ({c}) p99", "search", n, "p99 ms", at_most=15) for c, n in _SEARCH.items()),
    Goal("search beside Chroma's server", "peers", "chroma: search, 8 connections", "annulus ratio", at_least=4),
    Goal("insert JSON", "insert", "json", "rows/s", at_least=6_000, orientation=True),
    Goal("insert CBOR, rows", "insert", "cbor", "rows/s", at_least=15_000, orientation=True),
    Goal("insert CBOR, columns", "insert", "cbor columns", "rows/s", at_least=15_000, orientation=True),
    *(
        goal
        for codec in ("json", "cbor columns")
        for goal in (
            Goal(f"searches during {codec} insert, p99", "mixed", codec, "search p99 ms", at_most=100),
            Goal(f"searches during {codec} insert, wrong", "mixed", codec, "wrong", at_most=0),
            Goal(f"searches during {codec} insert, recall", "mixed", codec, "recall@10", at_least=RECALL_MIN),
        )
    ),
    Goal("fully indexed after the last insert", "index", "build", "of engine", at_most=1.3),
    Goal("restart to first right answer", "restart", "SIGTERM", "first answer s", at_most=3),
    Goal("restart after kill -9 to first right answer", "restart", "SIGKILL", "first answer s", at_most=3),
    Goal("memory at rest", "size", "memory", "of allowance", at_most=1),
    Goal("disk after compaction over raw vectors", "size", "disk after compaction", "of raw", at_most=2.5),
    *(
        goal
        for share in SELECTIVITIES
        for goal in (
            Goal(f"filter {share * 100:g} %, recall", "filter", selectivity_name(share), "recall@10",
                 at_least=RECALL_MIN),
            Goal(f"filter {share * 100:g} %, p50 over exact", "filter", selectivity_name(share), "of exact",
                 at_most=EXACT_RATIO_MAX),
        )
    ),
)  # fmt: skip
