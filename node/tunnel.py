"""A client's connection passed on to a server on a socket in the file system, byte by byte, as fast as both can.

gRPC and HTTP share a port. gRPC begins with HTTP/2's preface, which no request of HTTP/1 does; its server cannot be
handed a connection, only listen itself. Whatever secured the client's connection has been taken off before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONNECT_S_MAX: Final = 10.0


class Tunnel(asyncio.Protocol):
    """The client's side. Give it to the client's transport by `set_protocol`."""

    def __init__(self, transport: asyncio.Transport, path: str, data: bytes, gone: Callable[[], None]) -> None:
        """`data` is what has come already; `gone` is called once, when the client's connection has ended."""
        self.transport = transport
        self._waiting = [data]
        self._gone = gone
        self._inner: asyncio.Transport | None = None
        transport.pause_reading()
        self._opening = asyncio.get_running_loop().create_task(self._open(path))

    async def _open(self, path: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                inner, _ = await loop.create_unix_connection(lambda: _Inner(self.transport), path)
        except OSError as error:  # it has just stopped; a TimeoutError is one too
            log.warning("gRPC connection not passed on error=%s", error)
            self.transport.abort()
            return
        if self.transport.is_closing():
            inner.abort()
            return
        self._inner = inner
        self._inner.writelines(self._waiting)
        self._waiting.clear()
        with contextlib.suppress(RuntimeError):
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._inner is None:
            self._waiting.append(data)
        else:
            self._inner.write(data)

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_reading()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._opening.cancel()
        self._gone()
        if self._inner is not None:
            self._inner.close()


class _Inner(asyncio.Protocol):
    """The server's side."""

    def __init__(self, outer: asyncio.Transport) -> None:
        self._outer = outer

    def data_received(self, data: bytes) -> None:
        self._outer.write(data)

    def pause_writing(self) -> None:
        self._outer.pause_reading()

    def resume_writing(self) -> None:
        self._outer.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._outer.close()
