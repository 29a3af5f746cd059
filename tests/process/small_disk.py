"""A small disk of its own for a node: a tmpfs in a mount namespace that a sleeping process keeps, gone with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.running import PROJECT


class SmallDisk:
    """`path` is where processes started with `prefix` find it; `outside` is the same place as this process sees it."""

    def __init__(self, path: Path, keeper_pid: int) -> None:
        self.path = path
        self.outside = Path(f"/proc/{keeper_pid}/root{path}")
        enter = ["nsenter", f"--mount=/proc/{keeper_pid}/ns/mnt"]
        self.prefix = [*enter, "sh", "-c", f'cd "{PROJECT}" && exec "$@"', "sh"]

    @property
    def free_bytes(self) -> int:
        facts = os.statvfs(self.outside)
        return facts.f_bavail * facts.f_frsize

    def fill(self) -> None:
        """Put a ballast file on the disk until not a byte is left."""
        with open(self.outside / "ballast", "ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(1 << 16))
        assert self.free_bytes < 1 << 16

    def empty(self) -> None:
        (self.outside / "ballast").unlink()


@contextlib.contextmanager
def small_disk(directory: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """Skips the test where this process may not mount."""
    path = directory / "disk"
    path.mkdir()
    script = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && exec sleep 3600'
    keeper = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", f"{mebibytes}m", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert keeper.stdout is not None
    try:
        if keeper.stdout.readline() != b"mounted\n":
            pytest.skip("may not mount a small disk: needs root, unshare and tmpfs")
        yield SmallDisk(path, keeper.pid)
    finally:
        keeper.kill()
        keeper.wait()
        keeper.stdout.close()
