"""The load generator: one cheap process that sends ready-made requests over some connections and keeps the replies.

    python -m tools.bench.load --target 127.0.0.1:19530 --requests FILE --out DIR --connections 8 --seconds 5 --cycle

It reads `requests` (frames: length as little-endian uint32, bytes), and leaves in `out` times.bin (int64 rows of
request number, due, sent, done in CLOCK_MONOTONIC ns, HTTP status) and replies.bin (frames, same order). It stops when
the requests are used up, the seconds are over, or its standard input closes; a request on its way is waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import mmap
import os
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle as endless
from typing import BinaryIO, cast

try:
    import uvloop
except ImportError:  # a platform without uvloop only measures its own client a little more
    uvloop = None  # type: ignore[assignment]

FRAME = struct.Struct("<I")
TIME_COLUMNS = 5
TIMES_FILE, REPLIES_FILE = "times.bin", "replies.bin"


class Generator:
    """Hands requests to connections and writes down what came of them."""

    def __init__(self, requests: Iterable[tuple[int, memoryview]], *, rate: float | None) -> None:
        self._requests = iter(requests)
        self._rate = rate
        self._backlog: deque[int] = deque()
        """Due times of requests for which no connection was free."""
        self._idle: list[_Connection] = []
        self._open = 0
        self._ended = False
        self.finished = asyncio.get_running_loop().create_future()
        self.times = array("q")
        self.replies: list[bytes] = []

    def connected(self, connection: _Connection) -> None:
        self._open += 1
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        self._settle()

    def done(self, connection: _Connection, status: int, reply: bytes) -> None:
        self.times.extend((connection.number, connection.due_ns, connection.sent_ns, time.monotonic_ns(), status))
        self.replies.append(reply)
        if status == 0:
            return
        if self._ended or (self._rate is not None and not self._backlog):
            self._idle.append(connection)
            self._settle()
        else:
            self._send(connection, self._backlog.popleft() if self._backlog else None)

    def stop(self) -> None:
        """Send nothing more; `finished` is set when the last reply is in."""
        self._ended = True
        self._settle()

    async def drive(self) -> None:
        """Start all connections; at a fixed rate, send whenever a request is due."""
        if self._rate is None:
            for connection in self._take_idle():
                self._send(connection, None)
            return
        period_ns = int(1e9 / self._rate)
        due_ns = time.monotonic_ns()
        while not self._ended:
            await asyncio.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            if self._idle:
                self._send(self._idle.pop(), due_ns)
            else:
                self._backlog.append(due_ns)
            due_ns += period_ns

    def _take_idle(self) -> list[_Connection]:
        taken, self._idle = self._idle, []
        return taken

    def _send(self, connection: _Connection, due_ns: int | None) -> None:
        numbered = next(self._requests, None) if not self._ended else None
        if numbered is None:
            self._idle.append(connection)
            self.stop()
        else:
            connection.send(*numbered, due_ns)

    def _settle(self) -> None:
        if not self.finished.done() and ((self._ended and len(self._idle) == self._open) or self._open == 0):
            self.finished.set_result(None)


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._buffer = bytearray()
        self._reply_bytes = -1
        self._head_bytes = 0
        self._busy = False
        self.number = self.due_ns = self.sent_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods alone
        self._generator.connected(self)

    def send(self, number: int, request: memoryview, due_ns: int | None) -> None:
        self._busy = True
        self.number = number
        self.sent_ns = time.monotonic_ns()
        self.due_ns = self.sent_ns if due_ns is None else min(due_ns, self.sent_ns)  # uvloop's timers round to ms
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if self._reply_bytes < 0:
            head = buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            self._head_bytes = head + 4
            self._reply_bytes = self._head_bytes + content_length(bytes(buffer[:head]))
        if len(buffer) < self._reply_bytes:
            return
        status, reply = int(buffer[9:12]), bytes(buffer[self._head_bytes : self._reply_bytes])
        del buffer[: self._reply_bytes]
        self._reply_bytes, self._busy = -1, False
        self._generator.done(self, status, reply)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._busy:
            self._generator.done(self, 0, b"")
        self._generator.lost(self)


def content_length(head: bytes) -> int:
    """Return the length that a reply's head announces. Raises ValueError if it does not: we read no chunked replies."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    raise ValueError(f"reply without Content-Length: {head[:200]!r}")


def write_frames(file: BinaryIO, frames: Iterable[bytes]) -> None:
    """Append frames to a file."""
    for frame in frames:
        file.write(FRAME.pack(len(frame)))
        file.write(frame)


def read_frames(buffer: memoryview) -> Iterator[memoryview]:
    """Yield the frames of a file's bytes, without copying."""
    at = 0
    while at < len(buffer):
        (length,) = FRAME.unpack_from(buffer, at)
        at += FRAME.size
        yield buffer[at : at + length]
        at += length


async def generate(options: argparse.Namespace, frames: list[memoryview]) -> Generator:
    """Run one load from first request to last reply."""
    loop = asyncio.get_running_loop()
    numbered = list(enumerate(frames))
    generator = Generator(endless(numbered) if options.cycle else numbered, rate=options.rate)
    host, _, port = options.target.rpartition(":")
    for _ in range(options.connections):
        await loop.create_connection(lambda: _Connection(generator), host, int(port))
    if options.seconds:
        loop.call_later(options.seconds, generator.stop)
    loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_input, generator, loop)
    driver = loop.create_task(generator.drive())
    await generator.finished
    driver.cancel()
    return generator


def _stop_at_end_of_input(generator: Generator, loop: asyncio.AbstractEventLoop) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        loop.remove_reader(sys.stdin.fileno())
        generator.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.load")
    parser.add_argument("--target", required=True)
    parser.add_argument("--requests", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--cycle", action="store_true")
    options = parser.parse_args()
    with open(options.requests, "rb") as file:
        frames = list(read_frames(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))))
    gc.disable()  # nothing here makes cycles, and a collection would be counted as the node's latency
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None)
    with runner:
        generator = runner.run(generate(options, frames))
    with open(f"{options.out}/{TIMES_FILE}", "wb") as file:
        generator.times.tofile(file)
    with open(f"{options.out}/{REPLIES_FILE}", "wb") as file:
        write_frames(file, generator.replies)


if __name__ == "__main__":
    main()
