"""The gRPC server, imported and started for the first client that wants it.

Importing it takes as long as a tenth of a start and 15 MB, for which who speaks only HTTP need not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from importlib import import_module
from typing import TYPE_CHECKING

from node.edge import Edge
from node.service import Service
from node.workers import Lane

if TYPE_CHECKING:
    from node.grpc.server import GrpcServer


class LateGrpc:
    """What `Tunnel` connects clients to. Belongs to the loop."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self._service = service
        self._edge = edge
        self._starting: asyncio.Task[GrpcServer] | None = None
        self._stopped = False

    async def connected(self, client: str) -> tuple[socket.socket, str]:
        if self._stopped:
            raise OSError("the server has stopped")
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.get_running_loop().create_task(self._start())
        server = await asyncio.shield(self._starting)  # for others, if this client gives up
        return await server.backend.connected(client)

    def forget(self, name: str) -> None:
        if name and self._starting is not None:  # who has a name was connected
            self._starting.result().backend.forget(name)

    async def stop(self) -> None:
        """Take no more requests; return when those that run are done, or the time for that is up."""
        self._stopped = True
        if self._starting is not None:
            with contextlib.suppress(Exception):  # it could not start, which its clients were told
                await (await self._starting).stop()
        await self._edge.drain()

    async def _start(self) -> GrpcServer:
        await self._edge.executor.run(Lane.DISK, import_module, "node.grpc.server")
        from node.grpc.server import GrpcServer

        server = GrpcServer(self._service, self._edge)
        await server.start()
        return server
