"""The engine alone: the index room without a database around it, in a process of its own, on the same cores.

    python -m tools.bench.engine FOLDER

FOLDER holds vectors.npy, queries.npy, and task.json (see `Task`); the answer is one JSON object on standard output.
Searches are one query a call on one thread, as a client of a library would make them, and so is exact search.
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
from typing import Any

import numpy as np

from tools.bench.data import Dataset, Matrix
from tools.bench.loading import REPOSITORY
from tools.bench.truth import percentile


@dataclass(frozen=True)
class Task:
    """What to build and how to search it."""

    index_type: str
    metric: str
    params: Mapping[str, Any]
    build_threads: int
    efs: Sequence[int]
    k: int
    seconds: float
    """Per ef."""


@dataclass(frozen=True)
class Speed:
    """Single-threaded, one query at a time."""

    per_s: float
    p50_ms: float
    p99_ms: float
    answers: list[list[int]]
    """Row numbers found for each query that was asked at least once, in order of the queries."""


@dataclass(frozen=True)
class EngineFigures:
    build_s: float
    memory_bytes: int
    dump_bytes: int
    searches: dict[int, Speed]
    """By ef."""


def measure_engine(data: Dataset, task: Task) -> EngineFigures:
    """Build and search the index in a fresh process and return its figures."""
    with tempfile.TemporaryDirectory(prefix="annulus-engine-") as folder:
        np.save(os.path.join(folder, "vectors.npy"), data.vectors)
        np.save(os.path.join(folder, "queries.npy"), data.queries)
        with open(os.path.join(folder, "task.json"), "w", encoding="utf-8") as file:
            json.dump(asdict(task), file)
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench.engine", folder],
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            check=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
    answer = json.loads(done.stdout)
    searches = {int(ef): Speed(**speed) for ef, speed in answer.pop("searches").items()}
    return EngineFigures(**answer, searches=searches)


def time_queries(search: Callable[[Matrix], Sequence[int]], queries: Matrix, seconds: float) -> Speed:
    """Return how fast `search` answers single queries, taken in turn for some seconds and each at least once."""
    for i in range(min(20, len(queries))):
        search(queries[i : i + 1])
    answers: list[list[int]] = []
    took_ns: list[int] = []
    started = time.monotonic_ns()
    while len(took_ns) < len(queries) or time.monotonic_ns() - started < seconds * 1e9:
        i = len(took_ns) % len(queries)
        before = time.monotonic_ns()
        found = search(queries[i : i + 1])
        took_ns.append(time.monotonic_ns() - before)
        if len(answers) < len(queries):
            answers.append([int(offset) for offset in found])
    times = np.array(took_ns, dtype=np.int64)
    wall_s = (time.monotonic_ns() - started) / 1e9
    return Speed(len(times) / wall_s, percentile(times, 50) / 1e6, percentile(times, 99) / 1e6, answers)


def run(vectors: Matrix, queries: Matrix, task: Task) -> EngineFigures:
    """Build one index over all rows and search it."""
    from index.engines import build
    from index.spec import SearchParams, parse_index_spec

    spec = parse_index_spec(task.index_type, task.metric, task.params)
    started = time.monotonic()
    index = build(spec, vectors, threads=task.build_threads, progress=lambda fraction: None, cancelled=lambda: False)
    build_s = time.monotonic() - started

    def searcher(ef: int) -> Callable[[Matrix], Sequence[int]]:
        params = SearchParams(ef=ef)
        return lambda query: index.search(query, task.k, params=params).offsets[0].tolist()

    searches = {ef: time_queries(searcher(ef), queries, task.seconds) for ef in task.efs}
    return EngineFigures(build_s, index.memory_bytes, len(index.dump()), searches)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.engine")
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    with open(os.path.join(folder, "task.json"), encoding="utf-8") as file:
        task = Task(**json.load(file))
    figures = run(np.load(os.path.join(folder, "vectors.npy")), np.load(os.path.join(folder, "queries.npy")), task)
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()
