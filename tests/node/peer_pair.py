"""What the tests of the peer network share: networks on loopback, a receiver that writes down, a stranger."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar

import uvloop

from node.handshake import NONCE_BYTES, Handshake, Identity, Proven, Refused, Turn, dial
from node.metrics import Metrics
from node.network import Blob, Link, encode_message
from node.peer_tls import TlsFiles
from node.peers import PeerNetwork
from node.settings import Address

SECRET = "a secret of the cluster"
INCARNATION = b"stranger"


def run(story: Coroutine[Any, Any, None], *, limit_s: float = 60) -> None:
    """Run the story as a node does, on uvloop; strangers that are left at its end leave."""

    async def all_of_it() -> None:
        try:
            await asyncio.wait_for(story, limit_s)
        finally:
            while Stranger.present:
                await Stranger.present[-1].leave()

    uvloop.run(all_of_it())


def free_addresses(*names: str) -> dict[str, Address]:
    """Return an address on loopback for each name, free a moment ago."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in names:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found[name] = Address("127.0.0.1", probe.getsockname()[1])
        return found


class Diary:
    """A receiver that remembers what it was told, and may do something about messages."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.messages: list[tuple[str, Link, dict[str, Any], list[bytes]]] = []
        self.act: Callable[[str, Link, dict[str, Any], Sequence[memoryview]], None] = lambda *_: None

    def on_session(self, peer: str, up: bool) -> None:
        self.entries.append((peer, up))

    def on_message(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        self.messages.append((peer, link, header, [bytes(blob) for blob in blobs]))
        self.entries.append((peer, header.get("n")))
        self.act(peer, link, header, blobs)

    def on_bulk_lost(self, peer: str) -> None:
        self.entries.append((peer, "bulk lost"))


class Host:
    """One node's network with its diary."""

    def __init__(
        self,
        name: str,
        addresses: Mapping[str, Address],
        *,
        secret: str = SECRET,
        cluster: str = "c",
        tls: TlsFiles | None = None,
        listen: Address | None = None,
    ) -> None:
        self.name = name
        self.metrics = Metrics()
        self.diary = Diary()
        self.network = PeerNetwork(
            name,
            addresses,
            cluster=cluster,
            listen=listen or addresses[name],
            secret=secret,
            tls=tls,
            metrics=self.metrics,
        )

    async def __aenter__(self) -> Host:
        await self.network.start(self.diary)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.network.stop()

    def send(self, peer: str, number: int, blobs: Sequence[Blob] = (), link: Link = Link.SMALL) -> bool:
        return self.network.send(peer, link, {"n": number}, blobs)

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("annulus_peer_refused_total", {"reason": reason}) or 0

    async def meets(self, peer: str) -> None:
        """Return when both links to the peer are up."""
        await until(lambda: self.network.is_up(peer) and self.network.send(peer, Link.BULK, {"n": "hello"}))


async def until(holds: Callable[[], object], *, within_s: float = 30) -> None:
    """Return as soon as the condition holds. Raises TimeoutError if it does not in time."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  (tests look from outside)
            await asyncio.sleep(0.01)


class Stranger:
    """A program that speaks the protocol as well as the test wants, over a plain socket."""

    present: ClassVar[list[Stranger]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.present.append(self)
        self.heard = b""
        self.said = b""

    @classmethod
    async def connect(cls, address: Address) -> Stranger:
        return cls(*await asyncio.open_connection(*address))

    def say(self, data: bytes) -> None:
        """Say it, if anybody is there to hear it."""
        self.said += data
        if not self.writer.transport.is_closing():
            self.writer.write(data)

    async def shake(self, handshake: Handshake) -> Proven | Refused | None:
        """Go through with the handshake; None if the other side closes in the middle."""
        try:
            turn = next(handshake)
            while True:
                self.say(turn.send)
                answer = await self.reader.readexactly(turn.want)
                self.heard += answer
                turn = handshake.send(answer)
                assert isinstance(turn, Turn)
        except StopIteration as done:
            assert isinstance(done.value, Proven)
            return done.value
        except Refused as refused:
            return refused
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def pose_as(
        self,
        name: str,
        to: str,
        *,
        link: Link = Link.SMALL,
        secret: str = SECRET,
        cluster: str = "c",
        incarnation: bytes = INCARNATION,
    ) -> Proven | Refused | None:
        me = Identity.make(name, cluster, secret, incarnation)
        return await self.shake(dial(me, to, link, os.urandom(NONCE_BYTES)))

    def send(self, header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> None:
        self.say(b"".join(encode_message(header, blobs)))

    async def is_closed(self) -> bool:
        """Read to the end; False if there is none within seconds."""
        try:
            async with asyncio.timeout(10):
                while await self.reader.read(1 << 16):
                    pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    async def leave(self) -> None:
        self.present.remove(self)
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
