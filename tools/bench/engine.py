"""The engine alone: the index room without a database around it, in a process of its own, on the same cores.

    python -m tools.bench.engine FOLDER

FOLDER holds vectors.npy, queries.npy and task.json (see `Task`). The process builds the index and prints one JSON line
about that; then it answers each line on standard input, an ef, with a line about a search at this ef. So one build
serves measurements that are spread over the run, beside those of the node. Searches are one query a call on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import numpy as np

from tools.bench.data import Dataset, Matrix
from tools.bench.loading import REPOSITORY
from tools.bench.truth import percentile

WARM_UP_QUERIES = 20


@dataclass(frozen=True)
class Task:
    """What to build, and how long to search it each time."""

    index_type: str
    metric: str
    params: Mapping[str, Any]
    build_threads: int
    k: int
    seconds: float


@dataclass(frozen=True)
class Built:
    """What the index cost."""

    build_s: float
    memory_bytes: int
    dump_bytes: int


@dataclass(frozen=True)
class Speed:
    """How fast single queries are answered, one after the other."""

    per_s: float
    p50_ms: float
    p99_ms: float
    answers: list[list[int]]
    """Row numbers found for each query, in the order of the queries."""


class Engine:
    """An index in a process of its own; built when this is made."""

    def __init__(self, data: Dataset, task: Task) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="annulus-engine-")
        folder = self._folder.name
        np.save(os.path.join(folder, "vectors.npy"), data.vectors)
        np.save(os.path.join(folder, "queries.npy"), data.queries)
        with open(os.path.join(folder, "task.json"), "w", encoding="utf-8") as file:
            json.dump(asdict(task), file)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.engine", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        self.built = Built(**self._next_line())

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def search(self, ef: int) -> Speed:
        """Return how fast and how right the index is at this ef, measured now."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{ef}\n")
        self._process.stdin.flush()
        return Speed(**self._next_line())

    def _next_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def time_queries(
    search: Callable[[Matrix], Sequence[int]], queries: Matrix, seconds: float, *, pause_s: float = 0.0
) -> Speed:
    """Return how fast `search` answers single queries, taken in turn for some seconds and each at least once.

    pause_s  between two of them. A loop without any finds the rows of the query before in the processor's caches, which
             nobody does who asks as often as a client over HTTP can.
    """
    for i in range(min(WARM_UP_QUERIES, len(queries))):
        search(queries[i : i + 1])
    answers: list[list[int]] = []
    took_ns: list[int] = []
    started = time.monotonic_ns()
    while len(took_ns) < len(queries) or time.monotonic_ns() - started < seconds * 1e9:
        i = len(took_ns) % len(queries)
        if pause_s:
            time.sleep(pause_s)
        before = time.monotonic_ns()
        found = search(queries[i : i + 1])
        took_ns.append(time.monotonic_ns() - before)
        if len(answers) < len(queries):
            answers.append([int(offset) for offset in found])
    times = np.array(took_ns, dtype=np.int64)
    wall_s = (time.monotonic_ns() - started) / 1e9
    return Speed(len(times) / wall_s, percentile(times, 50) / 1e6, percentile(times, 99) / 1e6, answers)


def serve(vectors: Matrix, queries: Matrix, task: Task) -> None:
    """Build one index over all rows, then search it as often as asked."""
    from index.engines import build
    from index.spec import SearchParams, parse_index_spec

    spec = parse_index_spec(task.index_type, task.metric, task.params)
    started = time.monotonic()
    index = build(spec, vectors, threads=task.build_threads, progress=lambda fraction: None, cancelled=lambda: False)
    build_s = time.monotonic() - started
    _say(Built(build_s, index.memory_bytes, len(index.dump())))
    for line in sys.stdin:
        params = SearchParams(ef=int(line))

        def found(query: Matrix, params: SearchParams = params) -> Sequence[int]:
            offsets: list[int] = index.search(query, task.k, params=params).offsets[0].tolist()
            return offsets

        _say(time_queries(found, queries, task.seconds))


def _say(answer: Built | Speed) -> None:
    print(json.dumps(asdict(answer)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.engine")
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    with open(os.path.join(folder, "task.json"), encoding="utf-8") as file:
        task = Task(**json.load(file))
    serve(np.load(os.path.join(folder, "vectors.npy")), np.load(os.path.join(folder, "queries.npy")), task)


if __name__ == "__main__":
    main()
