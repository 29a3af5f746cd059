"""Faults of disk and clock from inside a node: `shim.c`, compiled when it is wanted, and the page that steers it."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from enum import IntEnum

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim.c")
PAGE_BYTES = 4096
LAYOUT = "=iiq"
"""`struct control` of shim.c."""


class Disk(IntEnum):
    """What becomes of writes; the numbers are those of shim.c."""

    FINE = 0
    FULL = 1
    SYNC_FAILS = 2


def build(folder: str) -> str | None:
    """Return the path of the compiled library, None where there is no compiler for it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    path = os.path.join(folder, "shim.so")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", path, SOURCE, "-ldl"]
    return path if subprocess.run(command, capture_output=True).returncode == 0 else None


class Control:
    """Steers the library inside one node, and whatever runs in its place after a restart."""

    def __init__(self, path: str) -> None:
        self._path = path
        with open(path, "wb") as file:
            file.write(bytes(PAGE_BYTES))
        with open(path, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), PAGE_BYTES)
        self._disk, self._sync_delay_ms, self._clock_ns = Disk.FINE, 0, 0

    def environment(self, library: str, data_dir: str) -> Mapping[str, str]:
        """Return the variables with which a node is started; its data directory must exist."""
        return {"LD_PRELOAD": library, "CHAOS_CONTROL": self._path, "CHAOS_DISK": data_dir}

    def set(self, *, disk: Disk | None = None, sync_delay_ms: int | None = None, clock_s: float | None = None) -> None:
        """Change what is given, at once."""
        self._disk = self._disk if disk is None else disk
        self._sync_delay_ms = self._sync_delay_ms if sync_delay_ms is None else sync_delay_ms
        self._clock_ns = self._clock_ns if clock_s is None else round(clock_s * 1e9)
        page = struct.pack(LAYOUT, self._disk, self._sync_delay_ms, self._clock_ns)
        self._page[: len(page)] = page
