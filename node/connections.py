"""How many connections a node holds: never so many that it cannot open its own files, and none that says nothing.

Whoever connects and sends no request costs a descriptor, and a node without one can neither begin a journal file nor
read a chunk. So the client connections get a share of the descriptors. At the limit the oldest connection that has
never sent a whole request header makes way; if there is none, the new one is closed at once.

A connection that begins as gRPC's do is passed on to the gRPC server, and counts like the others (`tunnel.py`). Where
clients come by TLS it is taken off first (`client_tls.py`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

from aiohttp import web

from node.client_tls import Entrance
from node.tunnel import PREFACE, Passage, Tunnel

log = logging.getLogger(__name__)

HEADER_S_MAX: Final = 30.0
"""From connecting to the end of the first request's header."""
YIELDING_S: Final = 1.0
"""A connection gets this long to send its header even when others want in."""
KEEPALIVE_S: Final = 75.0
"""Between two requests of a connection: more than the 60 s after which proxies commonly close it themselves."""
OWN_DESCRIPTORS: Final = 128
"""Kept for journal, threads and what else the process opens."""


def connections_max(descriptors: int) -> int:
    """Return the clients' share. LevelDB may take a fifth of all descriptors for its tables."""
    return max(descriptors // 2, descriptors - descriptors // 5 - OWN_DESCRIPTORS)


class Doorman:
    """Makes the protocol of each new connection: give it to `create_server` instead of aiohttp's own server."""

    def __init__(
        self,
        server: web.Server,
        limit: int,
        *,
        header_s: float = HEADER_S_MAX,
        yielding_s: float = YIELDING_S,
        keepalive_s: float = KEEPALIVE_S,
        grpc: Passage | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """`tls` returns what the next connection is secured by; without it there is plain text."""
        self._server = server
        self._tls = tls
        self._limit = limit
        self._header_s, self._yielding_s, self._keepalive_s = header_s, yielding_s, keepalive_s
        self._grpc = grpc
        self._loop = asyncio.get_running_loop()
        self._open: set[_Connection] = set()
        self._silent: dict[_Connection, float] = {}
        """Those that were not yet seen to send a whole header, with the time they came; the oldest first."""
        self._crowded = False

    @property
    def connections(self) -> int:
        return len(self._open)

    def __call__(self) -> asyncio.Protocol:
        # Counted here, not when the connection is made: a burst is accepted as a whole before the first one is made.
        now_s = self._loop.time()
        if len(self._open) >= self._limit and not self._make_room(now_s):
            self._say_crowded(True)
            return _Refusal()
        if len(self._open) < self._limit // 2:
            self._say_crowded(False)
        connection = _Connection(self._server, self._loop, self._forget, self._keepalive_s, self._grpc)
        connection.timer = self._loop.call_later(self._header_s, self._close_silent, connection)
        self._open.add(connection)
        self._silent[connection] = now_s
        if self._tls is None:
            return connection
        connection.entrance = Entrance(connection, self._tls(), lambda: self._forget(connection))
        return connection.entrance

    def _make_room(self, now_s: float) -> bool:
        while self._silent:
            oldest, came_s = next(iter(self._silent.items()))
            if oldest.has_asked:
                del self._silent[oldest]
                continue
            if now_s - came_s < self._yielding_s:
                return False
            self._forget(oldest)
            oldest.force_close()
            self._say_crowded(True)
            return True
        return False

    def _close_silent(self, connection: _Connection) -> None:
        self._silent.pop(connection, None)
        if not connection.has_asked:
            connection.force_close()

    def _forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._silent.pop(connection, None)
        if connection.timer is not None:
            connection.timer.cancel()

    def _say_crowded(self, crowded: bool) -> None:
        if crowded != self._crowded:
            self._crowded = crowded
            if crowded:
                log.warning("too many connections, some are closed: limit=%d", self._limit)
            else:
                log.info("connections are no longer refused")


class GuardedSite(web.SockSite):
    """A site of aiohttp with a doorman."""

    __slots__ = ("_grpc", "_limit", "_tls")

    def __init__(
        self,
        runner: web.BaseRunner,
        listener: socket.socket,
        limit: int,
        *,
        backlog: int,
        grpc: Passage | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Take what `Doorman` does.

        grpc  where the gRPC server listens; with none, there is only HTTP
        """
        super().__init__(runner, listener, backlog=backlog)
        self._limit, self._grpc, self._tls = limit, grpc, tls

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        doorman = Doorman(self._runner.server, self._limit, grpc=self._grpc, tls=self._tls)
        self._server = await asyncio.get_running_loop().create_server(doorman, sock=self._sock, backlog=self._backlog)


class _Connection(web.RequestHandler):
    """aiohttp's connection, and a word when it has gone; or a tunnel to the gRPC server, as its first bytes tell."""

    __slots__ = ("_gone", "_grpc", "_opening", "_outer", "_tunnel", "entrance", "timer")

    def __init__(
        self,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
        gone: Callable[[_Connection], None],
        keepalive_s: float,
        grpc: Passage | None,
    ) -> None:
        settings: dict[str, Any] = {**server._kwargs, "keepalive_timeout": keepalive_s}
        super().__init__(server, loop=loop, **settings)
        self.timer: asyncio.TimerHandle | None = None
        self.entrance: Entrance | None = None
        self._gone = gone
        self._grpc = grpc
        self._outer: asyncio.Transport | None = None
        self._opening: bytes | None = None
        """What has come while it may still become the preface of HTTP/2; None once it is known."""
        self._tunnel: Tunnel | None = None

    @property
    def has_asked(self) -> bool:
        """Whether a whole request header has come."""
        return self._request_count > 0 or self._tunnel is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._outer = cast(asyncio.Transport, transport)  # uvloop's transports have the methods, not the base class
        if self._grpc is not None:
            self._opening = b""  # aiohttp hears of it when it turns out to be HTTP
        else:
            super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._opening is not None:
            assert self._outer is not None
            data = self._opening + data
            if len(data) < len(PREFACE) and PREFACE.startswith(data):
                self._opening = data
                return
            if self._grpc is not None and data.startswith(PREFACE):
                self._tunnel = Tunnel(self._outer, self._grpc, data, lambda: self._gone(self))
                self._outer.set_protocol(self._tunnel)
                return
            self._opening = None
            super().connection_made(self._outer)
        super().data_received(data)

    def force_close(self) -> None:
        if self._outer is None and self.entrance is not None:
            self.entrance.abort()  # its TLS has not come about
        if self._opening is not None and self._outer is not None:
            self._outer.abort()
        super().force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._gone(self)
        if self._opening is None:
            super().connection_lost(exc)


class _Refusal(asyncio.Protocol):
    """A connection that is closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()  # uvloop's transports have the methods, not the base class
