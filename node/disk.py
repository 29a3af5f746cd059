"""The real disk: the operating system's files behind the seam of `storage/disk.py`.

Files are private to the user (0600) and are not inherited by child processes. Every call blocks; the callers decide
in which thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Final

VECTORS_MAX: Final = min(1024, os.sysconf("SC_IOV_MAX"))
"""How many buffers one pwritev takes."""


class OsFile:
    """An open file of the operating system."""

    def __init__(self, path: str, *, create: bool) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)

    def read_at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]  # a signal, a network file system or 2 GiB at once can cut a read short
        got = len(data)
        while got < length and (data := os.pread(self._fd, length - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def write_at(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        first = 0
        while first < len(left):
            written = os.pwritev(self._fd, left[first : first + VECTORS_MAX], offset)
            offset += written
            while first < len(left) and written >= len(left[first]):
                written -= len(left[first])
                first += 1
            if written:
                left[first] = left[first][written:]

    def datasync(self) -> None:
        os.fdatasync(self._fd)

    def truncate(self, length: int) -> None:
        os.ftruncate(self._fd, length)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class OsDisk:
    """The file system of this machine."""

    def open(self, path: str, *, create: bool = False) -> OsFile:
        return OsFile(path, create=create)

    def list(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []

    def make_directory(self, path: str) -> None:
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path) or "."
        for directory in reversed(missing):
            os.mkdir(directory, 0o700)
            self.sync_directory(os.path.dirname(directory) or ".")

    def remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def used_bytes(self, directory: str) -> int:
        total = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    total += entry.stat().st_size
        return total

    def free_bytes(self, path: str) -> int:
        facts = os.statvfs(path)
        return facts.f_bavail * facts.f_frsize
