"""Connections passed on to a server in the same process: it knows whose they are, and they end together."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from node.tunnel import PREFACE, Backend, Tunnel


class Echo:
    """Stands for the server: says the peer's name, then what it is sent."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.peers: list[str] = []
        self.ended = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peers.append(f"unix:{writer.get_extra_info('peername')}")
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()
        self.ended.release()


class _Door(asyncio.Protocol):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_protocol(Tunnel(transport, self.backend, b"", lambda: None))


def run(script: Callable[[Echo, int], Awaitable[None]], directory: Path) -> None:
    async def main() -> None:
        backend = Backend(str(directory))
        echo = Echo(backend)
        server = await asyncio.start_unix_server(echo.serve, backend.path)
        door = await asyncio.get_running_loop().create_server(lambda: _Door(backend), "127.0.0.1", 0)
        try:
            await asyncio.wait_for(script(echo, door.sockets[0].getsockname()[1]), 20)
        finally:
            door.close()
            server.close()

    asyncio.run(main())


def test_the_server_knows_whose_a_connection_is(tmp_path: Path) -> None:
    """Each connection has a name of its own that stands for the client's address until it ends, and leaves no file."""

    async def script(echo: Echo, port: int) -> None:
        streams = []
        for client in ("127.0.0.1", "127.0.0.7"):
            streams.append(await asyncio.open_connection("127.0.0.1", port, local_addr=(client, 0)))
            streams[-1][1].write(PREFACE)
            assert await streams[-1][0].readexactly(len(PREFACE)) == PREFACE
        first, second = echo.peers
        assert [echo.backend.client_of(one) for one in echo.peers] == ["127.0.0.1", "127.0.0.7"]
        assert os.listdir(tmp_path) == ["grpc"]
        streams[0][1].close()
        await echo.ended.acquire()
        assert [echo.backend.client_of(one) for one in (first, second, "unix:")] == ["", "127.0.0.7", ""]
        streams[1][1].close()
        await echo.ended.acquire()
        await asyncio.gather(*(writer.wait_closed() for _, writer in streams))

    run(script, tmp_path)


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """A server that is slow to accept makes connections wait; without a server they fail and leave nothing."""

    async def main() -> None:
        backend = Backend(str(tmp_path))
        with socket.socket(socket.AF_UNIX) as slow:
            slow.bind(backend.path)
            slow.listen(0)
            made = [await backend.connected("a")]
            waiting = asyncio.ensure_future(backend.connected("b"))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            accepted = [slow.accept()[0]]
            made.append(await asyncio.wait_for(waiting, 10))
            for one in (*accepted, *(connection for connection, _ in made)):
                one.close()
        with pytest.raises(ConnectionRefusedError):
            await backend.connected("c")
        assert os.listdir(tmp_path) == ["grpc"]

    asyncio.run(main())
