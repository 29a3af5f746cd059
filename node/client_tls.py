"""TLS for clients: the node's certificate, renewed while it runs, and taking TLS off a connection.

Both protocols of the port go through it. Which one a client speaks is agreed on in its hello (ALPN): HTTP/1 if the
client offers it, since whoever offers both wants the REST API, and HTTP/2 if it offers nothing else, as gRPC's clients
do. What then comes is looked at all the same (`node/connections.py`).

A connection begins here as its bytes come. So one whose client speaks plain text is told so, instead of hanging, and
one that never finishes its handshake is known to the doorman and counted like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any, Final, cast

from node.certificates import Shown, load_authority, load_chain, look_at
from node.clock import Clock
from node.settings import ApiSettings
from node.tunnel import address_of
from node.workers import Executor, Lane

log = logging.getLogger(__name__)

WHAT: Final = "TLS for clients"
LOOK_S: Final = 5.0
"""How often it is looked whether the files have changed."""
EXPIRING_S: Final = 14 * 86_400.0
REMIND_S: Final = 86_400.0
HANDSHAKE_S_MAX: Final = 30.0
CLOSE_S_MAX: Final = 3.0
"""How long the other side may take to answer that the connection ends."""
HANDSHAKE: Final = 0x16
"""First byte of every TLS connection, and of no HTTP."""
_ADVICE: Final = b"this port speaks TLS: use https://\n"
PLAIN_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_ADVICE), _ADVICE)
)


class ClientTls:
    """The certificate as it is now: `context` is for the next connection, those that are open keep theirs."""

    def __init__(self, settings: ApiSettings, clock: Clock, executor: Executor) -> None:
        """Raises OSError that names the file at fault and says how to mend it."""
        self._settings = settings
        self._clock = clock
        self._executor = executor
        self._again = asyncio.Event()
        self._reminded_s = -REMIND_S
        self._seen = self._stamp()
        self.context, self.shown = self._load()
        self._tell()

    @classmethod
    def from_settings(cls, settings: ApiSettings, clock: Clock, executor: Executor) -> ClientTls | None:
        """Return None where clients speak plain text."""
        return cls(settings, clock, executor) if settings.tls_certificate_file else None

    def look_again(self) -> None:
        """Load the files anew, whether or not they look changed."""
        self._again.set()

    async def keep(self) -> None:
        """Follow the files until cancelled. What cannot be used is said once, and changes nothing."""
        failed = False
        while True:
            asked = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    asked = await self._again.wait()
            self._again.clear()
            self._remind()
            stamp = await self._executor.run(Lane.DISK, self._stamp)
            if stamp == self._seen and not failed and not asked:
                continue
            is_news = stamp != self._seen or asked
            self._seen = stamp
            try:
                self.context, self.shown = await self._executor.run(Lane.DISK, self._load)
            except OSError as error:
                failed = True  # it may be half written: tried again without a change
                if is_news:
                    log.error("certificate not renewed, the old one stays: %s", error)
                continue
            failed = False
            self._tell()

    def _load(self) -> tuple[ssl.SSLContext, Shown]:
        files = self._settings
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        load_chain(context, files.tls_certificate_file, files.tls_key_file, WHAT)
        if files.tls_client_ca_file:
            context.verify_mode = ssl.CERT_REQUIRED
            load_authority(context, files.tls_client_ca_file, WHAT)
        context.set_alpn_protocols(["http/1.1", "h2"])
        return context, look_at(files.tls_certificate_file, files.tls_key_file)

    def _stamp(self) -> tuple[tuple[int, ...], ...]:
        """Return what differs when a file was written anew, or another put in its place."""
        stamps: list[tuple[int, ...]] = []
        for path in (
            self._settings.tls_certificate_file,
            self._settings.tls_key_file,
            self._settings.tls_client_ca_file,
        ):
            try:
                found = os.stat(path)
            except OSError:
                stamps.append(())
            else:
                stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
        return tuple(stamps)

    def _tell(self) -> None:
        shown = self.shown
        log.info(
            "certificate loaded file=%s names=%s expires_s=%d",
            self._settings.tls_certificate_file,
            ",".join(shown.names) or "-",
            shown.expires_s,
        )
        if not shown.trouble and not shown.names:
            log.warning(
                "the certificate in %s is for no name: clients compare the name they connect to with its "
                "subjectAltName",
                self._settings.tls_certificate_file,
            )
        self._reminded_s = -REMIND_S
        self._remind()

    def _remind(self) -> None:
        now_s, left_s = self._clock.monotonic_s(), self.shown.expires_s - self._clock.wall_ms() / 1000
        if (not self.shown.trouble and left_s > EXPIRING_S) or now_s - self._reminded_s < REMIND_S:
            return
        self._reminded_s = now_s
        path = self._settings.tls_certificate_file
        if self.shown.trouble or left_s <= 0:
            log.error(
                "CLIENTS REFUSE THE CERTIFICATE in %s: %s; put a renewed one in its place, no restart is needed",
                path,
                self.shown.trouble or "certificate has expired",
            )
        else:
            log.warning("the certificate in %s expires soon: renew it days=%d", path, left_s // 86_400)


class Entrance(asyncio.Protocol):
    """A new connection where TLS is expected: its first byte tells whether the client knows."""

    def __init__(self, inner: asyncio.Protocol, context: ssl.SSLContext, gone: Callable[[], None]) -> None:
        """`inner` gets what is under the TLS once there is any; `gone` is called when the connection has ended."""
        self._inner = inner
        self._context = context
        self._gone = gone
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's have the methods, not the base class

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None
        if data[0] != HANDSHAKE:
            log.info("plain text on a port with TLS address=%s", address_of(transport))
            if not data.startswith(b"PRI "):  # gRPC's clients would wait for more if they were answered
                transport.write(PLAIN_ANSWER)
            transport.close()
            return
        layer = _Layer(self._inner, self._context, self._gone)
        layer.waiter.add_done_callback(lambda ended: _tell_failed(ended, transport))
        transport.pause_reading()  # uvloop reads into the buffers of a protocol that was there when it began to
        transport.set_protocol(layer)
        transport.resume_reading()
        layer.connection_made(transport)
        layer.feed(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._gone()

    def abort(self) -> None:
        """End it now, whatever it has come to."""
        if self._transport is not None:
            self._transport.abort()


class _Layer(SSLProtocol):
    """asyncio's TLS, which also tells of a connection that has ended before there was any."""

    def __init__(self, inner: asyncio.Protocol, context: ssl.SSLContext, gone: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.waiter: asyncio.Future[None] = loop.create_future()
        super().__init__(
            cast(Any, loop),
            inner,
            context,
            self.waiter,
            server_side=True,
            ssl_handshake_timeout=cast(Any, HANDSHAKE_S_MAX),
            ssl_shutdown_timeout=cast(Any, CLOSE_S_MAX),
        )
        self._ended = gone

    def feed(self, data: bytes) -> None:
        """Take what came before the layer was there."""
        left = memoryview(data)
        while left:
            buffer = self.get_buffer(len(left))
            size = min(len(buffer), len(left))
            buffer[:size] = left[:size]
            self.buffer_updated(size)
            left = left[size:]

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(cast(Any, exc))
        self._ended()


def _tell_failed(ended: asyncio.Future[None], transport: asyncio.Transport) -> None:
    if not ended.cancelled() and (error := ended.exception()) is not None:
        reason = getattr(error, "reason", None) or getattr(error, "verify_message", None) or type(error).__name__
        log.info("TLS handshake failed address=%s error=%s", address_of(transport), reason)
