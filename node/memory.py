"""Memory back to the system: what a node frees should leave its resident size, not wait in an allocator.

Segments come and go in pieces of a megabyte. glibc learns from the first large `free` to keep such pieces in its heap,
where fragments then hold on to hundreds of megabytes; so its thresholds are fixed before they can move, and the heap is
trimmed after large changes. LevelDB maps its table files and never lets go of their pages; they are clean copies of
what the disk has, so they are dropped, and come back from the page cache when they are read again.

On other systems than Linux with glibc these do nothing, and what the process holds is not known.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Final

MMAP_THRESHOLD_BYTES: Final = 256 << 10
"""Larger pieces get pages of their own, which `free` returns at once."""
ARENAS_MAX: Final = 2
GC_THRESHOLDS: Final = (50_000, 20, 100)
"""Rows come as lists of thousands of values, none of them in a cycle: looking for cycles each 700 is a waste."""
CGROUP_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of the container, by both versions of control groups."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def tame_allocator() -> None:
    """Fix glibc's thresholds, and how often cycles are looked for; to be called before anything large is imported."""
    gc.set_threshold(*GC_THRESHOLDS)
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)


def reclaim(directory: str) -> None:
    """Trim the heap, and drop the pages of mapped table files below the directory. Any thread; a few milliseconds.

    Young cycles are collected first: few objects come to be for each megabyte of rows, so that it seldom happens by
    itself.
    """
    gc.collect(1)
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if not hasattr(libc, "madvise") or not os.path.exists("/proc/self/maps"):
        return
    prefix = os.path.abspath(directory) + os.sep
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:  # out of files: nothing to fail for
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(prefix) and fields[1].startswith("r--"):
                start, stop = (int(part, 16) for part in fields[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def available_bytes() -> int:
    """Return the memory of the machine, or of the container if that is less; 0 if it is not known."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total


def resident_bytes() -> int:
    """Return what this process holds of the memory, without pages that a file has too; 0 if it is not known."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", "rb", buffering=0) as file:
        fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE
    return 0


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
