"""The measuring side of the load generator: start it, stop it, read what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tools.bench.load import REPLIES_FILE, TIME_COLUMNS, TIMES_FILE, read_frames, write_frames
from tools.bench.truth import percentile
from tools.bench.wire import Address

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STOP_S_MAX = 120


@dataclass(frozen=True)
class Replies:
    """What came back, in order of completion; all arrays have one item per reply."""

    numbers: npt.NDArray[np.int64]
    """Which request."""
    due_ns: npt.NDArray[np.int64]
    sent_ns: npt.NDArray[np.int64]
    done_ns: npt.NDArray[np.int64]
    statuses: npt.NDArray[np.int64]
    """HTTP status, 0 where the connection broke."""
    bodies: list[bytes]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def failures(self) -> int:
        """Replies that are not HTTP 200."""
        return int((self.statuses != 200).sum())

    @property
    def wall_s(self) -> float:
        """Seconds from the first request to the last reply."""
        return float(self.done_ns.max() - self.sent_ns.min()) / 1e9 if len(self) else 0.0

    @property
    def per_s(self) -> float:
        return len(self) / self.wall_s if len(self) else 0.0

    def latency_ms(self, percent: float) -> float:
        """Return a percentile of the time from due to done."""
        return percentile(self.done_ns - self.due_ns, percent) / 1e6

    def due_between(self, first_ns: int, last_ns: int) -> Replies:
        """Return the replies to what was due from one moment until another."""
        kept = np.flatnonzero((self.due_ns >= first_ns) & (self.due_ns < last_ns))
        times = (self.numbers[kept], self.due_ns[kept], self.sent_ns[kept], self.done_ns[kept], self.statuses[kept])
        return Replies(*times, [self.bodies[i] for i in kept.tolist()])

    def first_bodies(self) -> dict[int, bytes]:
        """Return the first reply to each request, by request number."""
        first: dict[int, bytes] = {}
        for number, body in zip(self.numbers.tolist(), self.bodies, strict=True):
            first.setdefault(number, body)
        return first


class Load:
    """A running load. As a context manager it is stopped at the end; `replies()` waits for it."""

    def __init__(
        self,
        target: Address,
        requests: Iterable[bytes],
        *,
        connections: int,
        seconds: float | None = None,
        rate: float | None = None,
        cycle: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="annulus-load-")
        frames = os.path.join(self._folder.name, "requests.bin")
        with open(frames, "wb") as file:
            write_frames(file, requests)
        command = [sys.executable, "-m", "tools.bench.load", "--target", str(target), "--requests", frames]
        command += ["--out", self._folder.name, "--connections", str(connections)]
        command += ["--seconds", str(seconds)] if seconds else []
        command += ["--rate", str(rate)] if rate else []
        command += ["--cycle"] if cycle else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=REPOSITORY)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._folder.cleanup()

    def stop(self) -> Replies:
        """Send nothing more and return the replies."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.replies(STOP_S_MAX)

    def replies(self, timeout_s: float | None = None) -> Replies:
        """Wait for the end and return the replies. Raises RuntimeError if the generator failed."""
        if self._process.wait(timeout_s) != 0:
            raise RuntimeError(f"load generator ended with {self._process.returncode}")
        times = np.fromfile(os.path.join(self._folder.name, TIMES_FILE), dtype=np.int64).reshape(-1, TIME_COLUMNS)
        with open(os.path.join(self._folder.name, REPLIES_FILE), "rb") as file:
            bodies = [bytes(frame) for frame in read_frames(memoryview(file.read()))]
        return Replies(times[:, 0], times[:, 1], times[:, 2], times[:, 3], times[:, 4], bodies)


def run_load(
    target: Address,
    requests: Iterable[bytes],
    *,
    connections: int,
    seconds: float | None = None,
    rate: float | None = None,
    cycle: bool = False,
) -> Replies:
    """Run one load to its end and return the replies."""
    with Load(target, requests, connections=connections, seconds=seconds, rate=rate, cycle=cycle) as load:
        return load.replies()
