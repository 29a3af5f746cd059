"""A client's connection passed on to a server on a socket in the file system, byte by byte, as fast as both can.

gRPC and HTTP share a port. gRPC begins with HTTP/2's preface, which no request of HTTP/1 does; its server cannot be
handed a connection, only listen itself. Whatever secured the client's connection has been taken off before.

To that server all its clients are this process. So each tunnel begins at a socket with a name, by which the server asks
who is behind it; the name leaves the file system as soon as the connection is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable
from typing import Final, Protocol

log = logging.getLogger(__name__)

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONNECT_S_MAX: Final = 30.0
"""The first client waits until the server is imported and started (`node/grpc/late.py`)."""
RETRY_S: Final = 0.01


class Passage(Protocol):
    """A way to the gRPC server."""

    async def connected(self, client: str) -> tuple[socket.socket, str]:
        """Return a connection on behalf of a client, and the name it is known by until `forget`. Raises OSError."""
        ...

    def forget(self, name: str) -> None: ...


class Backend:
    """A server on a socket in a directory that is this process's own."""

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/grpc"
        self._directory = directory
        self._numbers = itertools.count(1)
        self._clients: dict[str, str] = {}

    def client_of(self, peer: str) -> str:
        """Return the address of the client that the server knows by this name, "" if there is none."""
        return self._clients.get(peer, "")

    async def connected(self, client: str) -> tuple[socket.socket, str]:
        """Return a connection on behalf of a client, and the name it is known by until `forget`. Raises OSError."""
        path = f"{self._directory}/{next(self._numbers):x}"
        made = socket.socket(socket.AF_UNIX)
        try:
            made.setblocking(False)
            made.bind(path)
            try:
                while True:
                    with contextlib.suppress(BlockingIOError):  # too many wait to be accepted
                        made.connect(self.path)
                        break
                    await asyncio.sleep(RETRY_S)
            finally:
                os.unlink(path)
        except BaseException:
            made.close()
            raise
        name = f"unix:{path}"
        self._clients[name] = client
        return made, name

    def forget(self, name: str) -> None:
        self._clients.pop(name, None)


def address_of(transport: asyncio.BaseTransport) -> str:
    """Return where a connection comes from, "" if that is not known."""
    found = transport.get_extra_info("peername")
    return str(found[0]) if isinstance(found, tuple) and found else ""


class Tunnel(asyncio.Protocol):
    """The client's side. Give it to the client's transport by `set_protocol`."""

    def __init__(self, transport: asyncio.Transport, server: Passage, data: bytes, gone: Callable[[], None]) -> None:
        """`data` is what has come already; `gone` is called once, when the client's connection has ended."""
        self.transport = transport
        self._server = server
        self._name = ""
        self._waiting = [data]
        self._gone = gone
        self._inner: asyncio.Transport | None = None
        transport.pause_reading()
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                passed, self._name = await self._server.connected(address_of(self.transport))
                inner, _ = await loop.create_unix_connection(lambda: _Inner(self.transport), sock=passed)
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
        self._server.forget(self._name)
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
