"""The node's program on a disk whose fdatasync fails as soon as a certain file exists.

python -m tests.process.failing_sync FILE serve --data DIR ...
"""

from __future__ import annotations

import errno
import os
import sys

from node.__main__ import main


def fail_when_exists(path: str) -> None:
    sync = os.fdatasync

    def fdatasync(fd: int) -> None:
        if os.path.exists(path):
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    setattr(os, "fdatasync", fdatasync)  # noqa: B010 (mypy does not let it be assigned)


if __name__ == "__main__":
    fail_when_exists(sys.argv.pop(1))
    main()
