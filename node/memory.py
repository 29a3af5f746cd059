"""Memory back to the system: what a node frees should leave its resident size, not wait in an allocator.

Segments come and go in pieces of a megabyte. glibc learns from the first large `free` to keep such pieces in its heap,
where fragments then hold on to hundreds of megabytes; so its thresholds are fixed before they can move, and the heap is
trimmed after large changes. LevelDB maps its table files and never lets go of their pages; they are clean copies of
what the disk has, so they are dropped, and come back from the page cache when they are read again.

On other systems than Linux with glibc these do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from typing import Any, Final

MMAP_THRESHOLD_BYTES: Final = 256 << 10
"""Larger pieces get pages of their own, which `free` returns at once."""
ARENAS_MAX: Final = 2

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def tame_allocator() -> None:
    """Fix glibc's thresholds; to be called before anything large is allocated."""
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)


def reclaim(directory: str) -> None:
    """Trim the heap, and drop the pages of mapped table files below the directory. Any thread; a few milliseconds."""
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


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
