"""The disk seam: everything the journal asks of a file system, and nothing more.

`node/disk.py` is the real disk; `tests/sim/disk.py` is one in memory that loses unsynced bytes at a crash, tears the
last write, fills up and fails on request. All calls block: the journal calls the ones that touch the platter from the
executor. Paths are plain strings with `/`.

Durability: bytes written are safe after `datasync` of that file; a created, renamed or removed name is safe after
`sync_directory` of its directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class File(Protocol):
    """An open file, positioned reads and writes only."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`; fewer only at the end of the file."""
        ...

    def write_at(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Write all buffers one after the other from `offset`. Raises OSError (ENOSPC: the disk is full)."""
        ...

    def datasync(self) -> None:
        """Make the written bytes durable. Raises OSError; after that nothing about this file's pages is known."""
        ...

    def truncate(self, length: int) -> None:
        """Cut or extend (with zeros) to `length` bytes."""
        ...

    def size(self) -> int:
        """Return the current length in bytes."""
        ...

    def close(self) -> None: ...


class Disk(Protocol):
    """A directory tree."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Open for reading and writing. Raises FileNotFoundError unless `create`."""
        ...

    def list(self, directory: str) -> list[str]:
        """Return the sorted names in a directory; an absent directory has none."""
        ...

    def make_directory(self, path: str) -> None:
        """Create the directory and its parents, durably; existing ones are fine."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file; one that is absent already is fine."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Rename atomically, replacing `new`."""
        ...

    def sync_directory(self, path: str) -> None:
        """Make created, renamed and removed names in `path` durable."""
        ...

    def used_bytes(self, directory: str) -> int:
        """Return how many bytes the files of a directory have; opens none of them (that could drop others' locks)."""
        ...

    def free_bytes(self, path: str) -> int:
        """Return how many bytes may still be written to the file system that holds `path`."""
        ...
