"""A full disk makes a node read-only until there is room again; nothing that was answered is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.process.running import Running, check, until
from tests.process.small_disk import SmallDisk, small_disk

DIM = 64
ROWS = 100
READ_ONLY_CODE = 9
TIMEOUT_CODE = 10_001
SETTINGS = {
    "storage.segment_bytes_max": "2MiB",
    "storage.segment_idle_s_max": "1",
    "storage.journal_file_bytes_max": "1MiB",
    "storage.journal_bytes_max": "6MiB",
    "storage.checkpoint_interval_s": "1",
    "compaction.interval_s": "1",
    "index.rows_min": "256",
}


class Story:
    """A client that writes rows and remembers what it was told about them."""

    def __init__(self, node: Running) -> None:
        self.node = node
        self.random = Random(1)
        self.present: set[int] = set()
        self.deleted: set[int] = set()
        self.unknown: set[int] = set()
        self._next = 0
        node.ask("/collections/create", collectionName="c", dimension=DIM, metricType="L2")

    def insert(self) -> dict[str, Any]:
        keys = range(self._next, self._next + ROWS)
        self._next += ROWS
        data = [
            {
                "id": key,
                "vector": [self.random.random() for _ in range(DIM)],
                "text": f"{self.random.getrandbits(2000):x}",
            }
            for key in keys
        ]
        reply = self._send("/entities/insert", collectionName="c", data=data)
        if reply["code"] == 0:
            self.present |= set(keys)
        elif reply["code"] != READ_ONLY_CODE:
            self.unknown |= set(keys)
        return reply

    def delete(self) -> dict[str, Any]:
        keys = sorted(self.present)[:5]
        reply = self._send("/entities/delete", collectionName="c", filter=f"id in {keys}")
        self.present -= set(keys)
        if reply["code"] == 0:
            self.deleted |= set(keys)
        elif reply["code"] == READ_ONLY_CODE:
            self.present |= set(keys)
        else:
            self.unknown |= set(keys)
        return reply

    def check_reads(self) -> None:
        """All rows are counted, found by filter and by vector."""
        sure = len(self.present)
        assert sure <= self.node.count("c") <= sure + len(self.unknown)
        key = max(self.present)
        assert self.node.ask("/entities/get", collectionName="c", id=key, outputFields=["id"]) == [{"id": key}]
        hits = self.node.ask("/entities/search", collectionName="c", data=[[0.5] * DIM], limit=10)
        assert len(hits) == 10

    def check_all(self) -> None:
        """Row for row: what was answered is there, what was deleted is not, and nothing else is there."""
        found: set[int] = set()
        for low in range(0, self._next, 10_000):
            page = self.node.ask(
                "/entities/query",
                collectionName="c",
                filter=f"{low} <= id < {low + 10_000}",
                limit=16_384,
                outputFields=["id"],
                consistencyLevel="Strong",
            )
            found |= {row["id"] for row in page}
        assert not self.present - found
        assert not found & self.deleted
        assert not found - self.present - self.unknown

    def _send(self, path: str, **body: Any) -> dict[str, Any]:
        # What is under way while the last byte goes is neither done nor refused; it should not hold the test up.
        reply: dict[str, Any] = json.loads(self.node.send(path, json.dumps(body).encode(), Request_Timeout="2")[1])
        return reply


@pytest.mark.parametrize("reserve", ["4MiB", "0"])
def test_a_full_disk_passes(reserve: str, tmp_path: Path) -> None:
    """Full, the node refuses writes with a code to retry and reads on; with room again it writes; after a kill and a
    restart every answered row is there, `check` is content, and the log does not repeat itself."""
    with small_disk(tmp_path, 96) as disk:
        settings = {**SETTINGS, "storage.disk_reserve_bytes": reserve}
        node = Running(disk.path / "n1", settings=settings, prefix=disk.prefix, log=tmp_path / "log")
        with node:
            story = Story(node)
            for _ in range(12):
                assert story.insert()["code"] == 0
            for _ in range(2):
                _fill_and_empty(disk, node, story)
            lines = [one for one in node.events() if "read-only" in one["message"] or "writable" in one["message"]]
            assert len(lines) <= 8, lines
            disk.fill()
            story.insert()
            node.kill()
            disk.empty()
            status, said = check(node.data, disk.prefix)
            assert status == 0, said
            node.start()
            story.check_all()
            assert story.insert()["code"] == 0
            node.ask("/collections/flush", collectionName="c")
            until(lambda: node.index_finished("c"), what="index")
            assert node.stop() == 0
            status, said = check(node.data, disk.prefix)
            assert status == 0, said


def test_a_full_disk_at_the_start_is_told_in_plain_words(tmp_path: Path) -> None:
    """A node that cannot open its store says what to free; with room it starts and has every row."""
    with small_disk(tmp_path, 96) as disk:
        node = Running(
            disk.path / "n1",
            settings={**SETTINGS, "storage.disk_reserve_bytes": "1MiB"},
            prefix=disk.prefix,
            log=tmp_path / "log",
        )
        with node:
            story = Story(node)
            for _ in range(12):
                assert story.insert()["code"] == 0
            node.kill()
            disk.fill()
            node.launch()
            assert node.process.wait(30) == 1
            assert "is full" in node.said() and "free at least" in node.said() and "[Errno" not in node.said()
            disk.empty()
            node.start()
            story.check_all()


def test_a_write_under_way_is_answered_soon(tmp_path: Path) -> None:
    """The write during which the last byte goes is answered within seconds that it may still be made, and it is."""
    with small_disk(tmp_path, 48) as disk:
        settings = {**SETTINGS, "storage.disk_reserve_bytes": "0"}
        node = Running(disk.path / "n1", settings=settings, prefix=disk.prefix, log=tmp_path / "log")
        with node:
            node.ask("/collections/create", collectionName="c", dimension=DIM)
            disk.fill()
            told: set[int] = set()
            for number in range(20):
                data = [{"id": number, "vector": [0.5] * DIM, "text": "x" * 60_000}]
                began_s = time.monotonic()
                told.add(node.call("/entities/insert", collectionName="c", data=data)["code"])
                assert time.monotonic() - began_s < 6
            assert told - {0} == {READ_ONLY_CODE, TIMEOUT_CODE}
            assert len([one for one in node.events() if "journal waits" in one["message"]]) == 1
            disk.empty()
            until(lambda: not node.status()["read_only"], seconds=15, what="writable")
            assert 1 <= node.count("c") < 20
            assert node.stop() == 0


def _fill_and_empty(disk: SmallDisk, node: Running, story: Story) -> None:
    disk.fill()
    refusals: list[str] = []
    end_s = time.monotonic() + 20
    while len(refusals) < 5:
        assert time.monotonic() < end_s, "writes are not refused"
        began_s = time.monotonic()
        reply = story.insert()
        if reply["code"] == READ_ONLY_CODE:
            assert time.monotonic() - began_s < 1
            refusals.append(reply["message"])
        time.sleep(0.1)
    assert all("quota exceeded" in one and "until there is room" in one for one in refusals)
    status, raw = node.send("/collections/create", b'{"collectionName":"more","dimension":2}')
    assert json.loads(raw)["code"] == READ_ONLY_CODE and status == 200
    began_s = time.monotonic()
    story.delete()
    assert time.monotonic() - began_s < 5
    story.check_reads()
    assert node.status()["read_only"] and node.get("/healthz")[0] == 200 and node.is_alive()
    disk.empty()
    until(lambda: story.insert()["code"] == 0, seconds=15, what="writable again")
    until(lambda: not node.status()["read_only"], seconds=15, what="read_only is taken back")
    assert story.delete()["code"] == 0
    story.check_reads()
