"""One JSON line per operation, flushed at once, so that a key can be grepped to its history."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any


class Trace:
    """Append-only record of a run."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by __exit__
        self._started = time.monotonic()
        self.round = 0
        self.lines = 0

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def write(self, op: str, **facts: Any) -> None:
        """Append a line: seconds since the start, round, operation, facts."""
        line = {"s": round(time.monotonic() - self._started, 4), "round": self.round, "op": op, **facts}
        self._file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        self.lines += 1
