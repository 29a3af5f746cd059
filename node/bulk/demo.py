"""The demonstration: the sample that ships with the project, loaded into a node, searched, and how to ask again.

`annulus demo` is one door to it, `tools/bootstrap.py demo`, which makes the environment too, the other. Where no node
answers, one is started for it: a process like any other that `annulus serve` starts.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from node.bulk.remote import Remote

PROJECT: Final = Path(__file__).resolve().parents[2]
SAMPLE: Final = PROJECT / "node" / "sample"
COLLECTION: Final = "wordnet_sample"
ROWS_PER_INSERT: Final = 250
INDEXED_S_MAX: Final = 300.0
READY_S_MAX: Final = 60.0
STOP_S_MAX: Final = 60.0
LOCAL: Final = ("127.0.0.1", "localhost")
ASK: Final = 0
"""Which example sentence is asked: it finds wines, and under the filter the places they come from."""
FILTER: Final = 'category == "noun.location" and link_count >= 2'

Vectors = npt.NDArray[np.float32]


class DemoError(Exception):
    """The demonstration cannot go on; the message says why, in a sentence for a person."""


@dataclass(frozen=True)
class Sample:
    """3,000 synsets with their vectors, and example sentences with theirs; all vectors of unit length."""

    rows: list[dict[str, Any]]
    vectors: Vectors
    sentences: list[str]
    queries: Vectors


def load_sample(directory: Path = SAMPLE) -> Sample:
    """Return the sample that ships with the project."""
    lines = (directory / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return Sample(
        rows=[json.loads(line) for line in lines],
        vectors=_unit(np.load(directory / "vectors.npy")),
        sentences=json.loads((directory / "queries.json").read_text(encoding="utf-8")),
        queries=_unit(np.load(directory / "queries.npy")),
    )


def create(node: Remote, dim: int) -> None:
    """Make the sample's collection anew, typed and indexed."""
    named = {"collectionName": COLLECTION}
    if node.call("/collections/has", named)["has"]:
        node.call("/collections/drop", named)
    text_fields = {"lemma": 128, "pos": 8, "category": 32, "definition": 1024}
    node.call(
        "/collections/create",
        {
            "collectionName": COLLECTION,
            "description": "A sample of WordNet 3.0, Copyright 2006 by Princeton University",
            "schema": {
                "autoID": False,
                "enableDynamicField": False,
                "fields": [
                    {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                    {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": dim}},
                    *(
                        {"fieldName": name, "dataType": "VarChar", "elementTypeParams": {"max_length": most}}
                        for name, most in text_fields.items()
                    ),
                    {"fieldName": "lemma_count", "dataType": "Int32"},
                    {"fieldName": "link_count", "dataType": "Int32"},
                ],
            },
            "indexParams": [
                {"fieldName": "vector", "indexName": "vector", "metricType": "COSINE", "indexType": "AUTOINDEX"},
            ],
        },
    )


def insert(node: Remote, sample: Sample) -> Iterator[int]:
    """Insert all rows; yields how many are in, after each acknowledged batch."""
    for start in range(0, len(sample.rows), ROWS_PER_INSERT):
        stop = min(start + ROWS_PER_INSERT, len(sample.rows))
        vectors = (one.tobytes() for one in sample.vectors[start:stop])
        data = [{**row, "vector": vector} for row, vector in zip(sample.rows[start:stop], vectors, strict=True)]
        inserted = node.call("/entities/insert", {"collectionName": COLLECTION, "data": data})["insertCount"]
        if inserted != stop - start:
            raise DemoError(f"the node took {inserted} of {stop - start} rows")
        yield stop


def indexed(node: Remote, *, rows: int, wait_s: float = INDEXED_S_MAX) -> Iterator[int]:
    """Flush, then yield how many rows are indexed until all are. Raises DemoError after `wait_s`."""
    node.call("/collections/flush", {"collectionName": COLLECTION})
    until_s = time.monotonic() + wait_s
    while True:
        (index,) = node.call("/indexes/describe", {"collectionName": COLLECTION, "indexName": "vector"})
        if index["indexState"] == "Failed":
            raise DemoError(f"the index could not be built: {index.get('failReason', '')}")
        yield int(index["indexedRows"])
        if index["indexState"] == "Finished" and index["pendingRows"] == 0:
            return
        if time.monotonic() > until_s:
            raise DemoError(f"after {wait_s:.0f} s only {index['indexedRows']} of {rows} rows are indexed")
        time.sleep(0.1)


def search_request(query: Vectors, *, filter: str = "", limit: int = 5) -> dict[str, Any]:
    """Return the body of a search for the rows nearest to a vector."""
    return {
        "collectionName": COLLECTION,
        "data": [[round(float(component), 6) for component in query]],
        "annsField": "vector",
        "limit": limit,
        "outputFields": ["lemma", "category", "definition"],
        "consistencyLevel": "Strong",
        **({"filter": filter} if filter else {}),
    }


def answers_table(title: str, hits: Sequence[dict[str, Any]]) -> Table:
    """Return the hits of one search, best first."""
    table = Table(title=Text(title, style="bold"), title_justify="left")
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("lemma", no_wrap=True)
    table.add_column("category", no_wrap=True)
    table.add_column("definition", overflow="ellipsis", ratio=1)
    for rank, hit in enumerate(hits, 1):
        texts = (hit[name] for name in ("lemma", "category", "definition"))
        table.add_row(str(rank), f"{hit['distance']:.3f}", *map(Text, texts))  # Text: data is no markup
    return table


def run(node: Remote, *, body_file: Path, console: Console) -> None:
    """Load, wait, search, show. `body_file` gets the body of the search that the printed curl line repeats.

    Raises DemoError, Refused or Unreachable.
    """
    sample = load_sample()
    create(node, dim=sample.vectors.shape[1])
    load_and_index(node, sample, console)
    title = f'Nearest to "{sample.sentences[ASK]}"'
    body = search_request(sample.queries[ASK])
    console.print(answers_table(title, node.call("/entities/search", body)))
    filtered = search_request(sample.queries[ASK], filter=FILTER)
    console.print(answers_table(f"{title} where {FILTER}", node.call("/entities/search", filtered)))
    body_file.parent.mkdir(parents=True, exist_ok=True)
    body_file.write_text(json.dumps(body) + "\n", encoding="utf-8")
    console.print(f"\nThe node serves [bold]{node.address}[/bold]. To ask the first question again:\n")
    console.print("  " + curl_line(node.address, body_file), soft_wrap=True, highlight=False, markup=False)


def load_and_index(node: Remote, sample: Sample, console: Console) -> None:
    """Insert the sample and wait until it is indexed, with a bar for each."""
    rows = len(sample.rows)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for description, counts in (
            ("inserting rows", insert(node, sample)),
            ("indexing", indexed(node, rows=rows)),
        ):
            task = progress.add_task(description, total=rows)
            for count in counts:
                progress.update(task, completed=count)
            progress.update(task, completed=rows)


def curl_line(address: str, body_file: Path) -> str:
    """Return a line for a shell that repeats the search whose body is in the file."""
    return (
        f"curl -s -H 'Content-Type: application/json' -d {shlex.quote(f'@{body_file}')}"
        f" http://{address}/v2/vectordb/entities/search"
    )


def _unit(vectors: npt.NDArray[Any]) -> Vectors:
    """Return the vectors as float32 of length one; float16 has rounded them."""
    exact = vectors.astype(np.float32)
    return np.asarray(exact / np.linalg.norm(exact, axis=1, keepdims=True), dtype=np.float32)


def free_place(address: str) -> str | None:
    """Return HOST:PORT if that is of this machine, and nothing answers there, so that a node may be started."""
    parts = urlsplit(f"http://{address}")
    if "://" in address or parts.hostname not in LOCAL:
        return None
    place = (parts.hostname, parts.port or 19530)
    try:
        with socket.create_connection(place, timeout=5):
            return None
    except OSError:
        return f"{place[0]}:{place[1]}"


@contextmanager
def own_node(directory: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """Serve from the directory while the block runs, its log beside it. Raises DemoError if the node does not start."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "demo.log"
    command = [sys.executable, "-m", "node", "serve", "--data", str(directory / "data"), "--listen", address]
    paths = filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with open(log, "wb") as output:
        # in a session of its own: Ctrl-C is ours, and the node is told to stop when we do
        process = subprocess.Popen(  # noqa: S603  (our own program)
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_ready(process, address, log)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until_s = time.monotonic() + READY_S_MAX
    while not _is_ready(address):
        if process.poll() is not None:
            end = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise DemoError(f"the node did not start ({log}): {''.join(end)}")
        if time.monotonic() > until_s:
            raise DemoError(f"the node was not ready after {READY_S_MAX:.0f} s: see {log}")
        time.sleep(0.05)


def _is_ready(address: str) -> bool:
    connection = HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
