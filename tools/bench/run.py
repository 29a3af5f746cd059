"""One run of the benchmark: the node, the data, what was asked for, and what was found so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from tools.bench.client import Client, wait_until
from tools.bench.data import Dataset
from tools.bench.engine import Engine, Task
from tools.bench.loading import Replies, run_load
from tools.bench.node import NodeProcess
from tools.bench.results import Results
from tools.bench.truth import Truth, exact
from tools.bench.wire import Codec, Form, Refused, insert_requests, schema_body

K: Final = 10
MAIN: Final = "bench_main"
INDEXED_S_MAX: Final = 1800


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    efs: Sequence[int]
    seconds: float
    """Of each search measurement."""
    repeats: int
    """Search measurements are spread over so many passes, and medians are reported: the machine is shared."""
    insert_connections: int
    search_rate: float
    index_type: str
    index_params: Mapping[str, Any]
    shards: int
    restart_rows: int
    build_threads: int
    settle_s: float
    """Idle time before a node at rest is weighed: longer than its checkpoints are apart."""


@dataclass
class Bench:
    """A run under way; a context manager, because the engine alone is a process."""

    client: Client
    node: NodeProcess | None
    """None when somebody else's node is driven; then it is neither weighed nor restarted."""
    everything: Dataset
    """All rows there are; `data` are those that the other scenarios use."""
    data: Dataset
    plan: Plan
    say: Callable[[str], None]
    results: Results = field(default_factory=Results)
    empty_bytes: int = 0
    """Resident memory of the node before anything was done with it."""
    _held: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    @cached_property
    def truth(self) -> Truth:
        return exact(self.data.queries, self.data.vectors, K, self.data.metric)

    @cached_property
    def engine(self) -> Engine:
        """The engine alone over the same rows, built once a run while the node is idle."""
        plan = self.plan
        self.say("engine alone: build")
        task = Task(plan.index_type, self.data.metric, plan.index_params, plan.build_threads, K, plan.seconds)
        return self._held.enter_context(Engine(self.data, task))

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

    def create(self, name: str) -> None:
        """Create a collection for the data's rows, in place of any other of that name."""
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
        _check_inserts(replies, form.codec, data.rows - first)
        return replies

    def wait_indexed(self, name: str, rows: int) -> None:
        """Return when the index of a collection covers `rows` rows. Raises RuntimeError if its build fails."""

        def finished() -> bool:
            state = self.client.call("/indexes/describe", collectionName=name, indexName="vector")[0]
            if state["indexState"] == "Failed":
                raise RuntimeError(f"index build failed: {state.get('failReason')}")
            return bool(
                state["indexState"] == "Finished" and state["pendingRows"] == 0 and state["indexedRows"] >= rows
            )

        wait_until(finished, timeout_s=INDEXED_S_MAX, what=f"{rows} rows of {name} indexed")

    def compact(self, name: str) -> None:
        """Compact a collection and return when it is done and indexed again."""
        job = self.client.call("/collections/compact", collectionName=name)["compactionID"]
        wait_until(
            lambda: self.client.call("/collections/get_compaction_state", jobID=job)["state"] == "Completed",
            timeout_s=INDEXED_S_MAX,
            what="compaction",
        )
        self.wait_indexed(name, self.data.rows)

    def count(self, name: str) -> int:
        """Return count(*) with every acknowledged write in it."""
        rows = self.client.call(
            "/entities/query", collectionName=name, filter="", outputFields=["count(*)"], consistencyLevel="Strong"
        )
        return int(rows[0]["count(*)"])


def _check_inserts(replies: Replies, codec: Codec, rows: int) -> None:
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
