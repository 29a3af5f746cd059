"""python -m tools.demo: load the sample into a running node, search it, and show how to ask again.

Speaks nothing but REST v2, over one connection, as any client could. `python3 tools/bootstrap.py demo` starts a node
for it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

SAMPLE = Path(__file__).resolve().parent / "sample"
COLLECTION = "wordnet_sample"
ROWS_PER_INSERT = 250
INDEXED_S_MAX = 300.0
ASK = 0
"""Which example sentence is asked: it finds wines, and under the filter the places they come from."""
FILTER = 'category == "noun.location" and link_count >= 2'

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


class Client:
    """One connection to a node; `call` posts to a REST v2 route and returns its data."""

    def __init__(self, address: str, *, timeout_s: float = 60.0) -> None:
        self.address = address
        self._connection = http.client.HTTPConnection(address, timeout=timeout_s)

    def call(self, route: str, **body: Any) -> Any:
        """Return `data` of the answer. Raises DemoError when the node cannot be reached or answers with an error."""
        text = json.dumps(body).encode()
        try:
            self._connection.request("POST", f"/v2/vectordb{route}", text, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            payload = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise DemoError(f"no answer from a node at {self.address}: {error}") from None
        try:
            envelope = json.loads(payload)
            code = envelope["code"]
        except (ValueError, KeyError, TypeError):
            raise DemoError(f"{self.address} is not an Annulus node: {route} answered {answer.status}") from None
        if code != 0:
            raise DemoError(f"{route} failed: {envelope.get('message', '')} (code {code})")
        return envelope.get("data")

    def close(self) -> None:
        self._connection.close()


def create(client: Client, dim: int) -> None:
    """Make the sample's collection anew, typed and indexed."""
    if client.call("/collections/has", collectionName=COLLECTION)["has"]:
        client.call("/collections/drop", collectionName=COLLECTION)
    text_fields = {"lemma": 128, "pos": 8, "category": 32, "definition": 1024}
    client.call(
        "/collections/create",
        collectionName=COLLECTION,
        description="A sample of WordNet 3.0, Copyright 2006 by Princeton University",
        schema={
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
        indexParams=[
            {"fieldName": "vector", "indexName": "vector", "metricType": "COSINE", "indexType": "AUTOINDEX"},
        ],
    )


def insert(client: Client, sample: Sample) -> Iterator[int]:
    """Insert all rows; yields how many are in, after each acknowledged batch."""
    for start in range(0, len(sample.rows), ROWS_PER_INSERT):
        stop = min(start + ROWS_PER_INSERT, len(sample.rows))
        vectors = sample.vectors[start:stop].tolist()
        data = [{**row, "vector": vector} for row, vector in zip(sample.rows[start:stop], vectors, strict=True)]
        inserted = client.call("/entities/insert", collectionName=COLLECTION, data=data)["insertCount"]
        if inserted != stop - start:
            raise DemoError(f"the node took {inserted} of {stop - start} rows")
        yield stop


def indexed(client: Client, *, rows: int, wait_s: float = INDEXED_S_MAX) -> Iterator[int]:
    """Flush, then yield how many rows are indexed until all are. Raises DemoError after `wait_s`."""
    client.call("/collections/flush", collectionName=COLLECTION)
    until_s = time.monotonic() + wait_s
    while True:
        (index,) = client.call("/indexes/describe", collectionName=COLLECTION, indexName="vector")
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


def run(address: str, *, body_file: Path, console: Console) -> None:
    """Load, wait, search, show. `body_file` gets the body of the search that the printed curl line repeats."""
    sample, client = load_sample(), Client(address)
    try:
        create(client, dim=sample.vectors.shape[1])
        load_and_index(client, sample, console)
        title = f'Nearest to "{sample.sentences[ASK]}"'
        body = search_request(sample.queries[ASK])
        console.print(answers_table(title, client.call("/entities/search", **body)))
        filtered = search_request(sample.queries[ASK], filter=FILTER)
        console.print(answers_table(f"{title} where {FILTER}", client.call("/entities/search", **filtered)))
    finally:
        client.close()
    body_file.parent.mkdir(parents=True, exist_ok=True)
    body_file.write_text(json.dumps(body) + "\n", encoding="utf-8")
    console.print(f"\nThe node serves [bold]http://{address}[/bold]. To ask the first question again:\n")
    console.print("  " + curl_line(address, body_file), soft_wrap=True, highlight=False, markup=False)


def load_and_index(client: Client, sample: Sample, console: Console) -> None:
    """Insert the sample and wait until it is indexed, with a bar for each."""
    rows = len(sample.rows)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for description, counts in (
            ("inserting rows", insert(client, sample)),
            ("indexing", indexed(client, rows=rows)),
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description="Load and search the sample on a node.")
    parser.add_argument("--address", default="127.0.0.1:19530", metavar="HOST:PORT", help="client address of the node")
    parser.add_argument(
        "--body-file", type=Path, default=Path("annulus-data/demo-search.json"), metavar="FILE",
        help="where to write the body of the search that the printed curl line repeats",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    try:
        run(chosen.address, body_file=chosen.body_file, console=Console())
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
