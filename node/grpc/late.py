"""The gRPC server, imported and made for the first client that wants it.

Importing it takes as long as a tenth of a start and 15 MB, for which who speaks only HTTP need not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from node.edge import Edge
from node.service import Service
from node.workers import Lane

if TYPE_CHECKING:
    from node.grpc.server import GrpcServer

log = logging.getLogger(__name__)


class LateGrpc:
    """What takes the connections of gRPC's clients. Belongs to the loop."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self._service = service
        self._edge = edge
        self._starting: asyncio.Task[GrpcServer] | None = None
        self._stopped = False

    def take(self, transport: asyncio.Transport, data: bytes, gone: Callable[[], None]) -> None:
        """Serve a connection from here on.

        data  what has come already
        gone  is called once, when the connection has ended
        """
        if self._starting is not None and self._starting.done() and self._starting.exception() is None:
            self._serve(self._starting.result(), transport, data, gone)
        else:
            transport.set_protocol(_Waiting(self, transport, data, gone))

    async def server(self) -> GrpcServer:
        """Return the server, made now if there is none."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.get_running_loop().create_task(self._start())
        return await asyncio.shield(self._starting)  # for others, if this client gives up

    async def stop(self) -> None:
        """Take no more requests; return when those that run are done, or the time for that is up."""
        self._stopped = True
        if self._starting is not None:
            with contextlib.suppress(Exception):  # it could not start, which its clients were told
                await (await self._starting).stop()
        await self._edge.drain()

    def _serve(self, server: GrpcServer, transport: asyncio.Transport, data: bytes, gone: Callable[[], None]) -> None:
        if self._stopped:
            transport.abort()
        connection = server.connection(transport, gone)
        transport.set_protocol(connection)
        connection.data_received(data)

    async def _start(self) -> GrpcServer:
        await self._edge.executor.run(Lane.DISK, import_module, "node.grpc.server")
        from node.grpc.server import GrpcServer

        return GrpcServer(self._service, self._edge)


class _Waiting(asyncio.Protocol):
    """A connection for which the server is being made."""

    def __init__(self, late: LateGrpc, transport: asyncio.Transport, data: bytes, gone: Callable[[], None]) -> None:
        self._late, self._transport, self._gone = late, transport, gone
        self._came = [data]
        transport.pause_reading()
        self._waiting = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        try:
            await self._late.server()
        except Exception as error:
            log.warning("gRPC connection closed, its server could not be made error=%r", error)
            self._transport.abort()
            return
        if not self._transport.is_closing():
            self._late.take(self._transport, b"".join(self._came), self._gone)
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._came.append(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._waiting.cancel()
        self._gone()
