"""The real disk and the simulated one keep the same promises, and the simulated one breaks none that it made."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from random import Random

import pytest

from node.disk import VECTORS_MAX, OsDisk
from storage.disk import Disk
from tests.sim.disk import PowerLoss, SimDisk


@pytest.fixture(params=["simulated", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Disk, str]:
    if request.param == "real":
        return OsDisk(), str(tmp_path / "data" / "deep")
    return SimDisk(Random(1)), "data/deep"


def test_reads_give_what_was_written(place: tuple[Disk, str]) -> None:
    """Buffers land one after the other, over old bytes and beyond the end; reads stop at the end."""
    disk, root = place
    disk.make_directory(root)
    file = disk.open(f"{root}/a", create=True)
    file.write_at(0, [b"hello ", memoryview(b"wide "), b"", b"world"])
    file.write_at(6, [b"tiny"])
    assert file.read_at(0, 100) == b"hello tiny world"
    assert file.read_at(6, 4) == b"tiny"
    assert file.read_at(100, 4) == b""
    file.write_at(20, [b"!"])
    assert file.read_at(14, 10) == b"ld\0\0\0\0!"
    file.datasync()
    assert file.size() == 21
    file.close()
    assert disk.open(f"{root}/a").read_at(0, 5) == b"hello"


def test_more_buffers_than_one_call_takes(place: tuple[Disk, str]) -> None:
    """A write of thousands of buffers is one write to the caller."""
    disk, root = place
    disk.make_directory(root)
    file = disk.open(f"{root}/a", create=True)
    buffers = [b"%06d" % i for i in range(3 * VECTORS_MAX + 7)]
    file.write_at(3, buffers)
    assert file.read_at(0, 1 << 20) == b"\0\0\0" + b"".join(buffers)
    file.close()


def test_truncate_cuts_and_extends(place: tuple[Disk, str]) -> None:
    """After truncate the file has that length; new bytes are zeros."""
    disk, root = place
    disk.make_directory(root)
    file = disk.open(f"{root}/a", create=True)
    file.write_at(0, [b"abcdef"])
    file.truncate(3)
    assert (file.size(), file.read_at(0, 10)) == (3, b"abc")
    file.truncate(5)
    assert file.read_at(0, 10) == b"abc\0\0"
    file.close()


def test_names(place: tuple[Disk, str]) -> None:
    """list is sorted, and empty for a directory that is not there; rename replaces; remove may be repeated."""
    disk, root = place
    assert disk.list(root) == []
    disk.make_directory(root)
    disk.make_directory(root)
    with pytest.raises(FileNotFoundError):
        disk.open(f"{root}/a")
    for name in ("b", "a", "c"):
        file = disk.open(f"{root}/{name}", create=True)
        file.write_at(0, [name.encode()])
        file.close()
    assert disk.list(root) == ["a", "b", "c"]
    disk.rename(f"{root}/a", f"{root}/b")
    disk.sync_directory(root)
    file = disk.open(f"{root}/b")
    assert (disk.list(root), file.read_at(0, 9)) == (["b", "c"], b"a")
    file.close()
    disk.remove(f"{root}/c")
    disk.remove(f"{root}/c")
    assert disk.list(root) == ["b"]
    with pytest.raises(FileNotFoundError):
        disk.rename(f"{root}/c", f"{root}/d")
    assert disk.free_bytes(root) > 0


def test_files_are_private_and_are_not_inherited(tmp_path: Path) -> None:
    """Mode 0600, directories 0700, close-on-exec."""
    disk = OsDisk()
    disk.make_directory(str(tmp_path / "d"))
    file = disk.open(str(tmp_path / "d" / "a"), create=True)
    assert stat.S_IMODE((tmp_path / "d" / "a").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert not os.get_inheritable(file._fd)
    file.close()
    file.close()


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes or gives a few bytes at a time makes no difference."""
    pwritev, pread = os.pwritev, os.pread
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, [memoryview(buffers[0])[:3]], at))
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 4), at))
    file = OsDisk().open(str(tmp_path / "a"), create=True)
    file.write_at(1, [b"abcd", b"e", b"", b"fghijkl"])
    assert file.read_at(0, 100) == b"\0abcdefghijkl"
    file.close()


def test_the_simulated_disk_keeps_what_was_synced() -> None:
    """Synced bytes under a synced name survive every crash; others may not, and over many seeds do not."""
    fates = set()
    for seed in range(200):
        disk = SimDisk(Random(seed))
        disk.make_directory("d")
        file = disk.open("d/a", create=True)
        file.write_at(0, [b"safe"])
        file.datasync()
        disk.sync_directory("d")
        file.write_at(4, [b"maybe"])
        disk.open("d/b", create=True)
        disk.crash()
        contents = disk.contents("d/a")
        assert contents[:4] == b"safe"
        fates.add((contents[4:] == b"maybe", contents[4:] == b"", b"\0" in contents, disk.list("d") == ["a"]))
    assert {fate[:3] for fate in fates} == {
        (True, False, False),
        (False, True, False),
        (False, False, False),
        (False, False, True),
    }
    assert {fate[3] for fate in fates} == {True, False}


def test_the_simulated_power_goes_at_the_chosen_call() -> None:
    """power_loss_at counts changing calls, and a crash turns the power on again."""
    disk = SimDisk(Random(1))
    file = disk.open("a", create=True)
    disk.power_loss_at = disk.steps + 1
    file.write_at(0, [b"x"])
    with pytest.raises(PowerLoss):
        file.datasync()
    disk.crash()
    with pytest.raises(AssertionError, match="dead"):
        file.size()
    disk.open("b", create=True)
