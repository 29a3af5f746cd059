"""Bytes of a running node's chunks change: reads stay right, the node mends itself, the check of a cluster says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from tests.process.clusters import Trio
from tests.process.running import PROJECT, Running, clean_environment, until

DIM, ROWS = 32, 4_000
SETTINGS = {
    "shards": "2",
    "index.rows_min": "256",
    "storage.segment_bytes_max": "1MiB",
    "storage.checkpoint_interval_s": "1",
    "healing.scrub_interval_s": "3600",
}
RANDOM = Random(5)
VECTORS = [[RANDOM.random() for _ in range(DIM)] for _ in range(ROWS)]


def fill(node: Running) -> None:
    node.ask("/collections/create", collectionName="c", dimension=DIM, metricType="COSINE")
    for first in range(0, ROWS, 1_000):
        data = [{"id": key, "vector": VECTORS[key], "word": f"w{key}"} for key in range(first, first + 1_000)]
        node.ask("/entities/insert", collectionName="c", data=data)
    node.ask("/collections/flush", collectionName="c")
    until(lambda: node.index_finished("c"), seconds=120.0, what="index")


def rot(data: Path, *, places: int = 12) -> int:
    """Change bytes in the first parts of the store's tables, while it is in use; return how many."""
    changed = 0
    for path in (data / "chunks").glob("*.ldb"):
        size = path.stat().st_size
        if size < 100_000:
            continue
        with open(path, "r+b") as file:
            for place in range(places):
                at = 4_096 + place * (size - 65_536) // places
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 0x10]))
                changed += 1
    return changed


def reads_right(node: Running, keys: range) -> bool:
    """Ask for rows with their vectors, which are in chunks alone once an index of unit vectors is in memory."""
    found = node.ask("/entities/get", collectionName="c", id=list(keys), outputFields=["vector", "word"])
    rows = {row["id"]: row for row in found}
    return rows.keys() == set(keys) and all(
        rows[key]["word"] == f"w{key}"
        and max(abs(a - b) for a, b in zip(rows[key]["vector"], VECTORS[key], strict=True)) < 1e-6
        for key in keys
    )


def check_cluster(address: str) -> tuple[int, dict[str, Any], str]:
    """Run `annulus check --cluster`; return its exit status, what it found, and what it printed."""
    command = [sys.executable, "-m", "node", "check", "--cluster", "--address", address]
    shown = subprocess.run(
        command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    found = subprocess.run(
        [*command, "--json"], cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    return shown.returncode, json.loads(found.stdout or "{}"), shown.stdout + shown.stderr


def test_a_damaged_chunk_heals_under_reads(tmp_path: Path) -> None:
    """Whoever reads rows of damaged chunks gets them right, from a peer's; nothing is restarted, and it is counted."""
    with Trio(tmp_path, settings=SETTINGS) as trio:
        fill(trio["n1"])
        trio["n2"].restart()  # which moves what the store's log holds to its tables
        trio.wait_ready(trio["n2"])
        pid = trio["n2"].process.pid
        assert rot(tmp_path / "n2")
        for first in range(0, ROWS, 500):
            assert reads_right(trio["n2"], range(first, first + 500))
        status, found, said = check_cluster(f"127.0.0.1:{trio['n3'].port}")
        assert status in (0, 3), said  # reads may have found all of it
        assert "replicas" in said and "n2" in said
        assert found["finding"] == "clean", found  # the second one
        assert {one["verdict"] for one in found["groups"].values()} == {"equal"}
        assert trio["n2"].metric("annulus_chunks_damaged_total") >= 1
        assert trio["n2"].process.pid == pid and trio["n2"].is_alive()
        for first in range(0, ROWS, 500):
            assert reads_right(trio["n2"], range(first, first + 500))


def test_the_check_of_a_cluster(tmp_path: Path) -> None:
    """Exit 0 when all is right, 3 when something was mended, 1 when a node does not answer; any node can be asked."""
    with Trio(tmp_path, settings=SETTINGS) as trio:
        fill(trio["n1"])
        address = f"127.0.0.1:{trio['n1'].port}"
        status, found, said = check_cluster(address)
        assert (status, found["finding"]) == (0, "clean"), said
        assert all(one["chunks_done"] == one["chunks_total"] > 0 for one in found["nodes"].values())
        trio["n3"].restart()
        trio.wait_ready(trio["n3"])
        assert rot(tmp_path / "n3")
        status, found, said = check_cluster(address)
        assert status == 3, said
        assert "healed" in said and found["finding"] == "clean"
        trio["n2"].kill()
        status, found, said = check_cluster(address)
        assert (status, found["finding"]) == (1, "incomplete"), said
        assert "n2" in said and "silent" in said
        shown = json.loads(json.dumps(trio["n1"].status()))
        scrubs = {one["name"]: one["healing"] for one in shown["cluster"]["nodes"]}
        assert scrubs["n2"] is None and scrubs["n3"]["scrub"]["damaged"] >= 0


def test_a_node_alone_is_checked_too(tmp_path: Path) -> None:
    """Without peers chunks are read, and there is nothing to compare; a wrong use is told."""
    with Running(tmp_path / "n1", settings=SETTINGS) as node:
        fill(node)
        status, found, said = check_cluster(f"127.0.0.1:{node.port}")
        assert (status, found["finding"]) == (0, "clean"), said
        assert {one["verdict"] for one in found["groups"].values()} == {"alone"}
    status, found, said = check_cluster(f"127.0.0.1:{node.port}")
    assert status == 1 and "no node begins a check" in said
    both = [sys.executable, "-m", "node", "check", "--cluster", str(tmp_path)]
    wrong = subprocess.run(both, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "give a directory, or --cluster" in wrong.stderr
