"""One node of three without a byte of disk: the others take the writes, and it catches up when there is room again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.clusters import Trio, keys_of, put, row
from tests.process.running import Running, until
from tests.process.small_disk import small_disk

RESERVE = {"storage.disk_reserve_bytes": "4MiB", "storage.journal_file_bytes_max": "1MiB",
           "storage.journal_bytes_max": "4MiB"}  # fmt: skip


@pytest.mark.slow
def test_a_node_with_a_full_disk(tmp_path: Path) -> None:
    """Whatever it led is led by others, no write is refused for long, and nothing that was answered is missing."""
    with small_disk(tmp_path, 48) as disk:
        trio = Trio(tmp_path / "trio", settings=RESERVE)
        roomy = trio["n1"]
        node = Running(disk.path / "n1", settings=roomy.settings, prefix=disk.prefix, log=tmp_path / "n1.log")
        node.port = roomy.port
        trio.nodes["n1"] = node
        with trio:
            trio["n2"].ask("/collections/create", collectionName="c", dimension=2, params={"shardsNum": 4})
            put(trio["n2"], "c", range(100))
            for name in ("n2", "n3"):  # what they led is handed over
                trio[name].stop()
                trio.start([name])
            assert "n1" in leaders(trio)
            disk.fill()
            answered: set[int] = set()

            def written() -> bool:
                """Whether a write into every shard is answered well."""
                keys = range(1_000 + len(answered), 1_000 + len(answered) + 100)
                reply = trio["n2"].call("/entities/upsert", collectionName="c", data=[row(key) for key in keys])
                if reply["code"] == 0:
                    answered.update(keys)
                return bool(reply["code"] == 0)

            until(written, what="writes while a disk is full")
            for _ in range(10):
                assert written()
            assert "n1" not in leaders(trio)
            assert node.is_alive()
            disk.empty()
            until(lambda: node.metric("annulus_read_only") == 0, what="room")
            keys = answered | set(range(100))
            assert keys_of(node, "c") == keys
            until(lambda: keys_of(node, "c", "Eventually") == keys, what="its own copy")
            assert node.stop() == 0


def leaders(trio: Trio) -> set[str]:
    return {trio.leader(group, "n2") for group in ("control", "s0", "s1", "s2", "s3")}
