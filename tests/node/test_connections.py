"""The doorman: a limit that silent connections cannot use up."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from aiohttp import web

from node.certificates import load_chain
from node.connections import Doorman, connections_max
from tests.process.authority import Authority, needs_openssl

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("descriptors", "connections"), [(64, 32), (256, 128), (1024, 692), (65_536, 52_301), (1 << 20, 838_733)]
)
def test_clients_get_a_share_of_the_descriptors(descriptors: int, connections: int) -> None:
    """At least half of them, and all but LevelDB's fifth and a fixed number when there are many."""
    assert connections_max(descriptors) == connections


def test_a_connection_without_a_header_is_closed() -> None:
    """Half a header counts for nothing however often bytes come; whoever sent a request stays."""

    async def story(doorman: Doorman, port: int) -> None:
        good = await asyncio.open_connection("127.0.0.1", port)
        assert await asks(good)
        slow = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(8):
            slow[1].write(b"GET / HTTP/1.1\r\n"[:1])
            await asyncio.sleep(0.05)
        assert await is_closed(slow)
        assert await asks(good)
        assert doorman.connections == 1
        await close(good, slow)

    run(story, limit=10, header_s=0.2, yielding_s=9)


def test_the_oldest_silent_connection_makes_way() -> None:
    """At the limit a new connection is closed while the silent ones are fresh, and taken once they are not."""

    async def story(doorman: Doorman, port: int) -> None:
        asking = await asyncio.open_connection("127.0.0.1", port)
        assert await asks(asking)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await asyncio.open_connection("127.0.0.1", port)
        assert await is_closed(refused)
        await asyncio.sleep(0.3)
        late = await asyncio.open_connection("127.0.0.1", port)
        assert await asks(late) and await asks(asking)
        assert await is_closed(silent[0])
        assert await asks(silent[1])
        assert doorman.connections == 3
        await close(asking, refused, late, *silent)
        for _ in range(100):
            if not doorman.connections:
                break
            await asyncio.sleep(0.01)
        assert doorman.connections == 0

    run(story, limit=3, header_s=9, yielding_s=0.3)


@needs_openssl
def test_a_handshake_that_fails_or_never_comes_frees_its_place(tmp_path: Path) -> None:
    """Where clients come by TLS, one counts from its first byte to its last, whatever becomes of its handshake."""
    files = Authority(tmp_path, "ours").sign("node", "DNS:localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_chain(context, str(files.certificate), str(files.key), "TLS")

    async def story(doorman: Doorman, port: int) -> None:
        for opening in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0", b"\x16\x03\x01\x00\x05hello"):
            streams = await asyncio.open_connection("127.0.0.1", port)
            streams[1].write(opening)
            await asyncio.wait_for(streams[0].read(), 5)
            await close(streams)
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ours.crt"))
        streams = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="localhost")
        assert await asks(streams)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        silent[0][1].write(b"\x16")
        await asyncio.sleep(0.05)
        assert doorman.connections == 3
        assert [await is_closed(one) for one in silent] == [True, True]
        assert doorman.connections == 1 and await asks(streams)
        await close(streams, *silent)
        async with asyncio.timeout(5):
            while doorman.connections:  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.01)

    run(story, limit=4, header_s=0.5, yielding_s=9, tls=context)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def asks(streams: Streams) -> bool:
    streams[1].write(REQUEST)
    return (await asyncio.wait_for(streams[0].readuntil(b"well"), 5)).startswith(b"HTTP/1.1 200")


async def is_closed(streams: Streams) -> bool:
    try:
        return await asyncio.wait_for(streams[0].read(1), 5) == b""
    except ConnectionError:
        return True


async def close(*connections: Streams) -> None:
    for _, writer in connections:
        writer.close()


def run(story: object, *, limit: int, header_s: float, yielding_s: float, tls: ssl.SSLContext | None = None) -> None:
    async def inside() -> None:
        async def answer(_: web.BaseRequest) -> web.Response:
            return web.Response(text="well")

        server = web.Server(answer)
        secured = None if tls is None else (lambda: tls)
        doorman = Doorman(server, limit, header_s=header_s, yielding_s=yielding_s, tls=secured)
        listening = await asyncio.get_running_loop().create_server(doorman, "127.0.0.1", 0)
        try:
            await story(doorman, listening.sockets[0].getsockname()[1])  # type: ignore[operator]
        finally:
            listening.close()
            await server.shutdown(1)

    asyncio.run(inside())
