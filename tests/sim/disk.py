"""A disk in memory that does what disks do to the unlucky.

What is durable and what a running process sees are kept apart: `crash` returns to the durable state, plus whatever part
of the unsynced changes the dice let through. A write that was not synced may survive whole, not at all, as a prefix, or
with its middle missing (zeros); a file's new length may survive without its bytes; a name that was created, renamed or
removed without `sync_directory` may or may not be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from os import strerror
from random import Random


@dataclass
class _Inode:
    seen: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes) of writes since the last sync; offset -1 stands for a truncation to len(bytes)."""


class SimFile:
    """An open file of a SimDisk; of no use after a crash."""

    def __init__(self, disk: SimDisk, inode: _Inode) -> None:
        self._disk, self._inode, self._epoch = disk, inode, disk.crashes
        self.closed = False

    def read_at(self, offset: int, length: int) -> bytes:
        self._check()
        return bytes(self._inode.seen[offset : offset + length])

    def write_at(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        self._check()
        data = b"".join(bytes(buffer) for buffer in buffers)
        room = self._disk.room(len(self._inode.seen), offset + len(data))
        kept = data[: max(0, len(data) + room)] if room < 0 else data
        self._disk.step("write")
        seen = self._inode.seen
        seen.extend(bytes(max(0, offset + len(kept) - len(seen))))
        seen[offset : offset + len(kept)] = kept
        self._inode.unsynced.append((offset, kept))
        if len(kept) < len(data):
            raise OSError(ENOSPC, "No space left on device")

    def datasync(self) -> None:
        self._check()
        if self._disk.failing_syncs:
            self._disk.failing_syncs -= 1
            self._inode.unsynced.clear()  # the kernel marks the pages clean: they are lost, and nobody says so again
            raise OSError(self._disk.sync_errno, strerror(self._disk.sync_errno))
        self._disk.step("sync")
        self._inode.durable[:] = self._inode.seen
        self._inode.unsynced.clear()
        self._disk.syncs += 1

    def truncate(self, length: int) -> None:
        self._check()
        self._disk.step("truncate")
        seen = self._inode.seen
        del seen[length:]
        seen.extend(bytes(length - len(seen)))
        self._inode.unsynced.append((-1, bytes(length)))

    def size(self) -> int:
        self._check()
        return len(self._inode.seen)

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        assert not self.closed, "the file is closed"
        assert self._epoch == self._disk.crashes, "this process is dead"


class PowerLoss(BaseException):
    """The power went in the middle of a call; only a test catches it."""


class SimDisk:
    """Implements `storage.disk.Disk`. Everything by chance comes from `rng`."""

    def __init__(self, rng: Random, *, capacity_bytes: int | None = None) -> None:
        self._rng = rng
        self._seen: dict[str, _Inode] = {}
        self._durable: dict[str, _Inode] = {}
        self._directories: set[str] = set()
        self.capacity_bytes = capacity_bytes
        self.failing_syncs = 0
        """How many of the next datasyncs fail with `sync_errno`, losing what was written before them."""
        self.sync_errno = EIO
        self.crashes = 0
        self.syncs = 0
        self.steps = 0
        self.power_loss_at: int | None = None
        """Number of the changing call before which the power goes."""
        self.on_power_loss: Callable[[], None] = lambda: None
        """Called in the moment in which it goes."""

    # ---- storage.disk.Disk

    def open(self, path: str, *, create: bool = False) -> SimFile:
        inode = self._seen.get(path)
        if inode is None:
            if not create:
                raise FileNotFoundError(path)
            self.step("create")
            inode = self._seen[path] = _Inode()
        return SimFile(self, inode)

    def list(self, directory: str) -> list[str]:
        prefix = directory.rstrip("/") + "/"
        below = [path[len(prefix) :] for path in (*self._seen, *self._directories) if path.startswith(prefix)]
        return sorted({path.split("/")[0] for path in below})

    def make_directory(self, path: str) -> None:
        parts = path.split("/")
        self._directories |= {"/".join(parts[: i + 1]) for i in range(len(parts))}

    def remove(self, path: str) -> None:
        if path in self._seen:
            self.step("remove")
            del self._seen[path]

    def rename(self, old: str, new: str) -> None:
        if old not in self._seen:
            raise FileNotFoundError(old)
        self.step("rename")
        self._seen[new] = self._seen.pop(old)

    def sync_directory(self, path: str) -> None:
        self.step("sync directory")
        prefix = path.rstrip("/") + "/"
        kept = {name: inode for name, inode in self._durable.items() if not _directly_in(name, prefix)}
        self._durable = kept | {name: inode for name, inode in self._seen.items() if _directly_in(name, prefix)}

    def used_bytes(self, directory: str) -> int:
        prefix = directory.rstrip("/") + "/"
        return sum(len(inode.seen) for path, inode in self._seen.items() if _directly_in(path, prefix))

    def free_bytes(self, path: str) -> int:
        return 1 << 60 if self.capacity_bytes is None else max(0, self.capacity_bytes - self.total_bytes)

    # ---- what tests do to it

    @property
    def total_bytes(self) -> int:
        return sum(len(inode.seen) for inode in self._seen.values())

    def room(self, size: int, wanted: int) -> int:
        """How many bytes are left if a file grows from `size` to `wanted`; negative if it cannot."""
        if self.capacity_bytes is None:
            return 0
        return min(0, self.capacity_bytes - self.total_bytes - max(0, wanted - size))

    def step(self, what: str) -> None:
        """Count a call that changes something; the power may go before it."""
        if self.power_loss_at is not None and self.steps >= self.power_loss_at:
            self.on_power_loss()
            raise PowerLoss(what)
        self.steps += 1

    def crash(self) -> None:
        """Lose power: unsynced bytes and names survive only by chance, and open files are dead."""
        self.crashes += 1
        self.power_loss_at = None
        # A file that is only half there by name is one inode under its old or its new name; both are possible.
        names = sorted(self._seen.keys() | self._durable.keys())
        survived: dict[str, _Inode] = {}
        for name in names:
            before, after = self._durable.get(name), self._seen.get(name)
            chosen = after if before is after or self._rng.random() < 0.5 else before
            if chosen is not None:
                survived[name] = chosen
        for inode in {id(inode): inode for inode in survived.values()}.values():
            for offset, data in inode.unsynced:
                self._tear(inode.durable, offset, data)
            inode.unsynced.clear()
            inode.seen[:] = inode.durable
        self._seen, self._durable = survived, dict(survived)

    def kill(self) -> None:
        """Kill the process, not the machine: everything written is still seen, nothing more is durable."""
        self.crashes += 1
        self.power_loss_at = None

    def _tear(self, durable: bytearray, offset: int, data: bytes) -> None:
        fate = self._rng.random()
        if offset < 0:
            if fate < 0.5:
                del durable[len(data) :]
                durable.extend(bytes(len(data) - len(durable)))
            return
        kept, hole = data, (0, 0)
        if fate < 0.25:
            kept = b""
        elif fate < 0.6:
            kept = data[: self._rng.randint(0, len(data))]
        elif fate < 0.8 and data:
            hole = tuple(sorted((self._rng.randrange(len(data)), self._rng.randrange(len(data)))))  # type: ignore[assignment]
        if not kept:
            return
        old = bytes(durable[offset : offset + len(kept)])
        durable.extend(bytes(max(0, offset + len(kept) - len(durable))))
        durable[offset : offset + len(kept)] = kept
        start, stop = hole
        durable[offset + start : offset + stop] = old[start:stop].ljust(stop - start, b"\0")

    def contents(self, path: str) -> bytes:
        """Return what a process would read."""
        return bytes(self._seen[path].seen)

    def overwrite(self, path: str, contents: bytes) -> None:
        """Replace a file's bytes behind everybody's back, durably."""
        inode = self._seen[path]
        inode.seen[:] = inode.durable[:] = contents
        inode.unsynced.clear()

    def rot(self, path: str, offset: int, *, flip: int = 0x01) -> None:
        """Flip bits of one byte, durably."""
        contents = bytearray(self.contents(path))
        contents[offset] ^= flip
        self.overwrite(path, bytes(contents))

    def clone(self) -> SimDisk:
        """Return a copy of what would be read now, all of it durable."""
        copy = SimDisk(self._rng, capacity_bytes=self.capacity_bytes)
        copy._directories = set(self._directories)
        for path, inode in self._seen.items():
            copy._seen[path] = copy._durable[path] = _Inode(bytearray(inode.seen), bytearray(inode.seen))
        return copy


def _directly_in(path: str, prefix: str) -> bool:
    return path.startswith(prefix) and "/" not in path[len(prefix) :]
