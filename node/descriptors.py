"""How many files and connections the process may have open."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

DESCRIPTORS_MAX: Final = 1 << 20


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may; return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit than they tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else soft
