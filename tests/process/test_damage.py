"""Bytes on the disk that are not what was written: the offline check tells, and a node is right or does not start."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.process.running import Running, check, free_port, refused, until

DIM = 32
STORED, LATE = 1_500, 60
SETTINGS = {
    "index.rows_min": "256",
    "storage.segment_bytes_max": "1MiB",
    "storage.journal_file_bytes_max": "64KiB",
    "storage.checkpoint_interval_s": "1",
}


def vectors() -> list[list[float]]:
    random = Random(3)
    return [[random.random() for _ in range(DIM)] for _ in range(STORED + LATE)]


VECTORS = vectors()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a node that was stopped and started, wrote more, and was killed."""
    path = tmp_path_factory.mktemp("whole") / "n1"
    with Running(path, settings=SETTINGS) as node:
        node.ask("/collections/create", collectionName="c", dimension=DIM, metricType="L2")
        for first in range(0, STORED, 500):
            insert(node, range(first, first + 500))
        node.ask("/collections/flush", collectionName="c")
        until(lambda: node.index_finished("c"), what="index")
        node.restart()
        for key in range(STORED, STORED + LATE):
            insert(node, range(key, key + 1))
            if key == STORED + LATE // 2:  # so that the store's own log holds a segment and checkpoints
                node.ask("/collections/flush", collectionName="c")
                until(lambda: all(one["checkpoint"] == one["position"] for one in node.status()["shards"]))
        node.kill()
    yield path


def insert(node: Running, keys: range) -> None:
    data = [{"id": key, "vector": VECTORS[key], "word": f"w{key}"} for key in keys]
    node.ask("/entities/insert", collectionName="c", data=data)


def everything(node: Running) -> dict[int, str]:
    found = node.ask(
        "/entities/query",
        collectionName="c",
        filter="",
        limit=16_384,
        outputFields=["id", "word"],
        consistencyLevel="Strong",
    )
    return {row["id"]: row["word"] for row in found}


def is_right(node: Running) -> bool:
    if everything(node) != {key: f"w{key}" for key in range(STORED + LATE)}:
        return False
    for key in range(0, STORED + LATE, 60):
        hits = node.ask("/entities/search", collectionName="c", data=[VECTORS[key]], limit=1, outputFields=["vector"])
        if hits[0]["id"] != key or max(abs(a - b) for a, b in zip(hits[0]["vector"], VECTORS[key], strict=True)) > 1e-6:
            return False
    return True


def copied(written: Path, folder: Path) -> Path:
    shutil.copytree(written, folder / "n1")
    return folder / "n1"


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x40
    path.write_bytes(data)


def file_of(data: Path, pattern: str, which: int) -> Path:
    found = sorted(data.glob(pattern), key=lambda path: (path.stat().st_size, path.name))
    return found[which]


def journal_files(data: Path) -> list[Path]:
    return sorted(path for path in (data / "journal").iterdir() if path.suffix == ".log")


DAMAGE: list[Any] = [
    pytest.param(lambda data: flip(journal_files(data)[0], 0.5), id="first journal file"),
    pytest.param(lambda data: flip(journal_files(data)[-1], 0.3), id="last journal file"),
    pytest.param(lambda data: journal_files(data)[0].unlink(), id="first journal file gone"),
    pytest.param(lambda data: flip(file_of(data, "chunks/*.ldb", -1), 0.1), id="chunks, near the start"),
    pytest.param(lambda data: flip(file_of(data, "chunks/*.ldb", -1), 0.5), id="chunks, in the middle"),
    pytest.param(lambda data: flip(file_of(data, "chunks/*.ldb", -1), 0.8), id="chunks, near the end"),
    pytest.param(lambda data: flip(file_of(data, "chunks/*.ldb", -1), 0.98), id="chunks, the table's index"),
    pytest.param(lambda data: file_of(data, "chunks/*.ldb", -1).unlink(), id="a chunk file gone"),
    pytest.param(lambda data: flip(file_of(data, "chunks/*.log", -1), 0.3), id="the store's own log"),
    pytest.param(lambda data: file_of(data, "chunks/*.log", -1).unlink(), id="the store's own log gone"),
    pytest.param(lambda data: flip(file_of(data, "chunks/MANIFEST*", -1), 0.5), id="the store's manifest"),
    pytest.param(lambda data: (data / "chunks/CURRENT").unlink(), id="the store's CURRENT gone"),
    pytest.param(lambda data: shutil.rmtree(data / "journal"), id="the whole journal gone"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_and_never_served(damage: Callable[[Path], None], written: Path, tmp_path: Path) -> None:
    """`check` reports it with exit 1. A node refuses to start and says why, or it answers everything right."""
    data = copied(written, tmp_path)
    damage(data)
    status, said = check(data)
    assert status == 1, said
    assert "Traceback" not in said
    node = Running(data, settings=SETTINGS)
    process = node.launch()
    until(lambda: process.poll() is not None or node.is_ready(), what="a decision")
    try:
        if process.poll() is None:
            assert is_right(node)
        else:
            assert process.returncode == 1
            assert "cannot serve: " in node.said() and "Traceback" not in node.said()
    finally:
        node.kill()


def test_a_store_without_current_is_left_alone(written: Path, tmp_path: Path) -> None:
    """Neither the check nor a start takes the directory for new and removes what is in it: CURRENT back, all is."""
    data = copied(written, tmp_path)
    current = (data / "chunks/CURRENT").read_bytes()
    (data / "chunks/CURRENT").unlink()
    assert check(data)[0] == 1
    status, said = refused(data, free_port(), SETTINGS)
    assert status == 1 and "CURRENT" in said
    (data / "chunks/CURRENT").write_bytes(current)
    assert check(data)[0] == 0
    with Running(data, settings=SETTINGS) as node:
        assert is_right(node)


@pytest.mark.parametrize("tail", [b"\0" * 4_096, b"\x5a" * 999], ids=["zeros", "nonsense"])
def test_a_torn_end_is_cut_and_said(tail: bytes, written: Path, tmp_path: Path) -> None:
    """What a power cut leaves behind the last record is cut at the start, which says how much; all rows are there."""
    data = copied(written, tmp_path)
    with open(journal_files(data)[-1], "ab") as file:
        file.write(tail)
    status, said = check(data)
    assert status == 0, said
    with Running(data, settings=SETTINGS) as node:
        assert is_right(node)
        if tail.strip(b"\0"):
            assert [one for one in node.events() if one["level"] == "warning" and "cut" in one["message"]]


@pytest.mark.parametrize("lost_bytes", [1, 9, 200])
def test_a_last_record_cut_short_is_dropped_alone(lost_bytes: int, written: Path, tmp_path: Path) -> None:
    """Without the end of the last record the node starts, says what it cut, and has every row but the last one."""
    data = copied(written, tmp_path)
    last = journal_files(data)[-1]
    whole = last.read_bytes().rstrip(b"\0")
    last.write_bytes(whole[:-lost_bytes])
    with Running(data, settings=SETTINGS) as node:
        found = everything(node)
        assert found == {key: f"w{key}" for key in range(len(found))}
        assert STORED + LATE - 2 <= len(found) <= STORED + LATE
        if len(found) < STORED + LATE:
            assert [one for one in node.events() if one["level"] == "warning" and "cut" in one["message"]]
