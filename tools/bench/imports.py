"""How fast files come in: `annulus import` of real rows from Parquet into one node, whole and broken off half way.

    python -m tools.bench.imports --data /path/to/wordnet [--rows 60000]

Prints one line of JSON for each way: rows, seconds from the start of the command to its end, rows a second, and whether
every row was there once. `killed client` and `killed node` end with kill -9 when half of the rows are in, and go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.bench.data import Dataset, load_dataset
from tools.bench.loading import REPOSITORY
from tools.bench.node import NodeProcess, free_address
from tools.bench.wire import Address

WAYS = ("whole", "killed client", "killed node")
LOOK_S = 0.02


def write_parquet(data: Dataset, path: str) -> None:
    """Write the rows with ids from 0."""
    vectors = np.ascontiguousarray(data.vectors, dtype=np.float32)
    columns = {
        "id": pa.array(np.arange(data.rows)),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    }
    for name in data.scalars[0] if data.rows else ():
        if name != "id":
            columns[name] = pa.array([row[name] for row in data.scalars])
    pq.write_table(pa.table(columns), path, row_group_size=10_000)


class Importing:
    """One `annulus import` after the other into one collection."""

    def __init__(self, folder: str, address: Address, collection: str) -> None:
        self._folder = folder
        self._collection = collection
        words = ["import", "rows.parquet", "--collection", collection, "--address", str(address)]
        self._command = [sys.executable, "-m", "node", *words]

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": REPOSITORY}
        return subprocess.Popen([*self._command, *more], cwd=self._folder, env=environment)

    def rows_done(self) -> int:
        try:
            with open(os.path.join(self._folder, f"{self._collection}.import.json"), "rb") as file:
                return int(sum(json.load(file)["done"]))
        except OSError:
            return 0

    def until_half(self, process: subprocess.Popen[bytes], rows: int) -> int:
        """Return how many rows were in when half of them were, or the import was over."""
        while self.rows_done() < rows // 2 and process.poll() is None:
            time.sleep(LOOK_S)
        return self.rows_done()


def measure(way: str, folder: str, node: NodeProcess, rows: int) -> dict[str, Any]:
    """Import once, in one of the WAYS, and look whether all rows are there."""
    collection = f"import_{way.replace(' ', '_')}"
    importing = Importing(folder, node.address, collection)
    began_s = time.monotonic()
    process = importing.start()
    broken_at = None
    if way != "whole":
        broken_at = importing.until_half(process, rows)
        if way == "killed client":
            process.kill()
            process.wait()
            process = importing.start("--resume")
        else:
            node.kill()
            node.start()
    status = process.wait()
    took_s = time.monotonic() - began_s

    def ask(filter_text: str, field: str, limit: int) -> Any:
        asked = {"collectionName": collection, "consistencyLevel": "Strong"}
        return node.client.call("/entities/query", **asked, filter=filter_text, outputFields=[field], limit=limit)

    count = ask("", "count(*)", 0)[0]["count(*)"]
    found = 0
    for first in range(0, rows, 10_000):
        found += len(ask(f"{first} <= id < {first + 10_000}", "id", 16_384))
    return {
        "way": way,
        "rows": rows,
        "broken_at": broken_at,
        "seconds": round(took_s, 2),
        "rows_per_s": round(rows / took_s),
        "exit_status": status,
        "each_once": int(count) == found == rows,
    }


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", "data_path", required=True, help="Any 2-d .npy, or a folder with wordnet_*.npy.")
@click.option("--rows", default=60_000, help="Rows to import.")
@click.option("--only", default=",".join(WAYS), help="Ways, separated by commas.")
def main(data_path: str, rows: int, only: str) -> None:
    """Measure imports from Parquet into a node that is started for it."""
    data = load_dataset(data_path, queries_path=None, rows=rows, queries=1, seed=1, metric="COSINE")
    with tempfile.TemporaryDirectory(prefix="annulus-import-") as folder:
        write_parquet(data, os.path.join(folder, "rows.parquet"))
        log = os.path.join(folder, "node.log")
        with NodeProcess(os.path.join(folder, "data"), free_address(), log_path=log) as node:
            node.start()
            for way in only.split(","):
                click.echo(json.dumps(measure(way.strip(), folder, node, data.rows)))


if __name__ == "__main__":
    main()
