"""The network over sockets: two connections to each other node, proved, watched and bounded.

Of two nodes the one with the smaller name dials, so that they never cross. The SMALL link is the session; the BULK
link belongs to it, comes after it and ends with it. What is refused is counted, and logged once per peer and reason.

A connection is heard at least once a second, by a ping if there is nothing else. One that is silent for DEAD_S, or
takes nothing for STUCK_S, is closed: a kernel would notice only after minutes that the other side is gone.

Two processes with one name: the session that there is stays while its process answers a ping within CHALLENGE_S, and
the newcomer is refused. If it does not answer, it was a connection that nobody has told us is broken, and the newcomer
is let in when it tries again. A process that begins anew by itself replaces its own session.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from node.clock import SystemClock
from node.handshake import (
    INCARNATION_BYTES,
    NONCE_BYTES,
    Handshake,
    Identity,
    Proven,
    Refused,
    Verdict,
    accept,
    dial,
)
from node.metrics import Metrics
from node.network import (
    SIGNAL_BYTES,
    BadFrame,
    Blob,
    Frame,
    FrameKind,
    FrameReader,
    Link,
    Receiver,
    encode_message,
    encode_signal,
)
from node.settings import Address, Settings

log = logging.getLogger(__name__)

HELLO_S_MAX: Final = 3.0
"""From connecting to the end of the handshake, TLS included."""
UNPROVEN_MAX: Final = 32
"""Connections in their handshake; when one more comes, the oldest goes."""
BACKLOG: Final = 64
PING_S: Final = 1.0
DEAD_S: Final = 3.0
STUCK_S: Final = 10.0
CHALLENGE_S: Final = 1.0
PARTING_S: Final = 1.0
"""A connection that is closed has this long to send what is queued."""
SLICE_S: Final = 0.005
"""Frames of one connection are handed over for so long at a time."""
LOOK_S: Final = 0.25
"""How often connections are looked at."""
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 0.6
"""Trying again costs little, and a node that is back should be found well within an election."""
STEADY_S: Final = 5.0
"""A session of this length was a good one: the next attempt follows at once."""
QUEUE_BYTES_MAX: Final[Mapping[Link, int]] = {Link.SMALL: 64 << 20, Link.BULK: 32 << 20}
"""Nothing more is taken while so much waits; calls keep to less (`node/calls.py`), so that consensus has room."""
STRANGERS_MAX: Final = 256
"""Addresses of strangers whose refusal was logged; further ones are only counted."""


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files. The certificate's name (DNS name or common name) must be the node's."""

    certificate: str
    key: str
    authority: str


@dataclass(frozen=True)
class PeerState:
    """What is known of another node."""

    name: str
    address: Address
    is_up: bool
    round_trip_s: float | None
    trouble: str
    """Why there is no session, as far as known."""


class PeerNetwork:
    """Implements `node.network.Network`. All of it runs on the loop."""

    def __init__(
        self,
        me: str,
        peers: Mapping[str, Address],
        *,
        cluster: str,
        cluster_id: Callable[[], str] = lambda: "",
        listen: Address,
        secret: str = "",
        tls: TlsFiles | None = None,
        metrics: Metrics,
        incarnation: bytes | None = None,
    ) -> None:
        """Make the network of node `me`.

        peers       all nodes of the cluster, `me` included or not, and where to reach them
        cluster     any text that the nodes of one cluster have in common
        cluster_id  returns the id that the cluster gave itself, "" while it is not known here
        Raises OSError, in words for a person, if the TLS files cannot be used or others could pose as a node.
        """
        others = {name: address for name, address in sorted(peers.items()) if name != me}
        _check_proof(listen, others, has_proof=bool(secret) or tls is not None)
        incarnation = incarnation or os.urandom(INCARNATION_BYTES)
        self._identity = Identity.make(me, cluster, secret, incarnation, cluster_id)
        self._addresses = others
        self._listen_address = listen
        self._metrics = metrics
        self.clock = SystemClock()
        self._dice = random.Random(int.from_bytes(os.urandom(8)))
        self._server_tls = None if tls is None else _load_tls(tls, ssl.PROTOCOL_TLS_SERVER)
        self._client_tls = None if tls is None else _load_tls(tls, ssl.PROTOCOL_TLS_CLIENT)
        self._receiver: Receiver
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._unproven: dict[asyncio.Task[None], None] = {}
        """Accepted connections in their handshake; the oldest first."""
        self._links: dict[tuple[str, Link], _Connection] = {}
        self._session_begun: dict[str, asyncio.Event] = {}
        self._round_trips_s: dict[str, float] = {}
        self._troubles: dict[str, str] = {}
        self._said: set[tuple[str, str]] = set()
        self._stopping = False

    @classmethod
    def from_settings(
        cls, settings: Settings, metrics: Metrics, *, cluster_id: Callable[[], str] = lambda: ""
    ) -> PeerNetwork:
        """Return the network of a node whose settings name peers. Raises OSError as the constructor does."""
        node, cluster = settings.node, settings.cluster
        assert node.peer_address is not None, "a node without peers needs no network"
        has_tls = bool(cluster.tls_certificate_file)
        return cls(
            node.name,
            {peer.name: peer.address for peer in node.peers},
            cluster=f"{','.join(node.members)} shards={node.shards} copies={node.copies}",
            cluster_id=cluster_id,
            listen=node.peer_address,
            secret=node.cluster_secret,
            tls=TlsFiles(cluster.tls_certificate_file, cluster.tls_key_file, cluster.tls_ca_file) if has_tls else None,
            metrics=metrics,
        )

    # the seam

    def bind(self) -> Address:
        """Take the address to listen on; return it. Raises OSError in words for a person. May come before start."""
        if self._listener is None:
            self._listener = _bind(self._listen_address)
        host, port = self._listener.getsockname()[:2]
        return Address(host, port)

    async def start(self, receiver: Receiver) -> None:
        """Listen, and dial those whose turn it is not. Raises OSError if the address is taken."""
        self._receiver = receiver
        address = self.bind()
        assert self._listener is not None
        self._listener.listen(BACKLOG)
        for peer in self._addresses:
            self._session_begun[peer] = asyncio.Event()
            self._metrics.peer_session(peer, False)
            if peer > self._identity.name:
                for link in Link:
                    self._spawn(self._keep_linked(peer, link))
        self._spawn(self._accept_all(self._listener))
        self._spawn(self._watch())
        proof = ["secret"] * bool(self._identity.key) + ["TLS"] * (self._server_tls is not None)
        if not proof:
            log.warning(
                "nodes do not prove themselves: any process of this machine can pose as one; set cluster_secret"
            )
        log.info("listening for nodes address=%s proof=%s", address, " and ".join(proof) or "none")

    async def stop(self) -> None:
        """End all sessions, after sending what is queued as far as the others take it."""
        self._stopping = True
        for task in [*self._tasks, *self._unproven]:
            task.cancel()
        if self._tasks or self._unproven:
            await asyncio.wait([*self._tasks, *self._unproven])
        if self._listener is not None:
            self._listener.close()
        leaving = list(self._links.values())
        for connection in leaving:
            connection.close("stopping", gently=True)
        if leaving:
            await asyncio.wait([connection.gone for connection in leaving], timeout=PARTING_S)
        for connection in leaving:
            connection.abort()

    def send(self, peer: str, link: Link, header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> bool:
        connection = self._links.get((peer, link))
        if connection is None or connection.queued_bytes > QUEUE_BYTES_MAX[link]:
            return False
        connection.write(encode_message(header, blobs))
        return True

    def is_up(self, peer: str) -> bool:
        return (peer, Link.SMALL) in self._links

    def queued_bytes(self, peer: str, link: Link) -> int:
        connection = self._links.get((peer, link))
        return 0 if connection is None else connection.queued_bytes

    def states(self) -> list[PeerState]:
        """Return what is known of each other node."""
        return [
            PeerState(
                name,
                address,
                is_up := self.is_up(name),
                self._round_trips_s.get(name) if is_up else None,
                "" if is_up else self._troubles.get(name, "not tried yet"),
            )
            for name, address in self._addresses.items()
        ]

    # connecting

    async def _keep_linked(self, peer: str, link: Link) -> None:
        """Dial, wait for the end, dial again."""
        loop = asyncio.get_running_loop()
        retry_s = RETRY_S_MIN
        while True:
            if link is Link.BULK:
                await self._session_begun[peer].wait()
            connection = _Connection(self, dial(self._identity, peer, link, os.urandom(NONCE_BYTES)), peer)
            began_s = self.clock.monotonic_s()
            address = self._addresses[peer]
            if await self._prove(
                connection,
                lambda made=connection, at=address: loop.create_connection(  # type: ignore[misc]
                    lambda: made, *at, ssl=self._client_tls
                ),
            ):
                await connection.gone
                if self.clock.monotonic_s() - began_s > STEADY_S:
                    retry_s = RETRY_S_MIN
            await asyncio.sleep(retry_s * self._dice.uniform(0.5, 1))
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, came_from = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, or the dialer has gone already
                self.refuse("anybody", "accept_failed", f"a connection could not be accepted: {error}")
                await asyncio.sleep(LOOK_S)
                continue
            if len(self._unproven) >= UNPROVEN_MAX:
                self.refuse("anybody", "crowded", f"{UNPROVEN_MAX} connections have yet to prove themselves")
                oldest = next(iter(self._unproven))
                self._unproven.pop(oldest)
                oldest.cancel()
            connection = _Connection(self, None, f"stranger at {came_from[0]}")
            task = loop.create_task(self._accept(connection, accepted))
            self._unproven[task] = None
            task.add_done_callback(self._forget_unproven(connection, accepted))
            await asyncio.sleep(0)  # the accepted one begins, and whoever else is waiting has a turn

    async def _accept(self, connection: _Connection, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await self._prove(
            connection, lambda: loop.connect_accepted_socket(lambda: connection, accepted, ssl=self._server_tls)
        )

    def _forget_unproven(
        self, connection: _Connection, accepted: socket.socket
    ) -> Callable[[asyncio.Task[None]], None]:
        def forget(task: asyncio.Task[None]) -> None:
            self._unproven.pop(task, None)
            if not connection.is_begun:
                accepted.close()  # nobody else does it for a task that was cancelled before its first step

        return forget

    async def _prove(self, connection: _Connection, connect: Callable[[], Awaitable[object]]) -> bool:
        """Connect and shake hands; return whether the connection is a link now. It is closed otherwise."""
        connection.is_begun = True
        try:
            async with asyncio.timeout(HELLO_S_MAX):
                await connect()
                if (error := await connection.outcome) is not None:
                    raise error
        except TimeoutError:
            if not connection.is_link:
                self.refuse(connection.who, "hello_timeout", f"no handshake within {HELLO_S_MAX:g} s")
        except Refused as error:
            if error.verdict is Verdict.NO_SESSION:  # usual where a session ends and begins: bulk was a moment early
                self._metrics.peer_refused(error.verdict.label)
            else:
                self.refuse(connection.who, error.verdict.label, str(error))
        except ssl.SSLError as error:
            self.refuse(connection.who, "tls", f"TLS fails: {error.reason or error}")
        except OSError as error:
            if isinstance(error, ConnectionResetError) and connection.who in self._addresses:
                self._note_trouble(
                    connection.who,
                    "the connection ends in its handshake; if it always does: do both nodes use TLS, or neither?",
                )
            elif connection.who in self._addresses:
                self._note_trouble(connection.who, f"it cannot be reached: {error.strerror or error}")
            else:
                self.refuse(connection.who, "hello_broken", "it left during the handshake")
        finally:
            if not connection.is_link:
                connection.drop()
        return connection.is_link

    def accept_handshake(self, connection: _Connection) -> Handshake:
        return accept(
            self._identity,
            os.urandom(NONCE_BYTES),
            knows=lambda name: name in self._addresses and name < self._identity.name,
            admit=lambda proven: self._admit(connection, proven),
        )

    def _admit(self, connection: _Connection, proven: Proven) -> Verdict:
        """Decide about a dialer that has proved itself; the present link makes way if it must."""
        connection.who = proven.peer
        if self._stopping:
            return Verdict.NO_SESSION
        if not connection.may_be(proven.peer):
            return Verdict.CERTIFICATE
        session = self._links.get((proven.peer, Link.SMALL))
        if proven.link is Link.BULK and (session is None or session.incarnation != proven.incarnation):
            return Verdict.NO_SESSION
        present = self._links.get((proven.peer, proven.link))
        if present is None:
            return Verdict.WELCOME
        if present.incarnation == proven.incarnation:
            present.close("its process began a new one")
            return Verdict.WELCOME
        present.challenge()
        return Verdict.DUPLICATE

    # links

    def establish(self, connection: _Connection, proven: Proven) -> bool:
        """The handshake is over: make the connection the link. Return False if that has become senseless."""
        peer, link = proven.peer, proven.link
        session = self._links.get((peer, Link.SMALL))
        if self._stopping or (peer, link) in self._links:
            return False
        if link is Link.BULK and (session is None or session.incarnation != proven.incarnation):
            return False
        self._links[peer, link] = connection
        if link is Link.SMALL:
            self._troubles.pop(peer, None)
            self._said.discard((peer, "trouble"))
            self._metrics.peer_session(peer, True)
            log.info("session begun peer=%s", peer)
            self._session_begun[peer].set()
            self._tell(self._receiver.on_session, peer, True)
        return True

    def lost(self, connection: _Connection, proven: Proven, reason: str) -> None:
        """A link is no more; nothing of it is delivered from now on."""
        peer, link = proven.peer, proven.link
        if self._links.get((peer, link)) is not connection:
            return
        del self._links[peer, link]
        if link is Link.BULK:
            log.info("bulk link broke peer=%s (%s)", peer, reason)
            self._tell(self._receiver.on_bulk_lost, peer)
            return
        if (bulk := self._links.pop((peer, Link.BULK), None)) is not None:
            bulk.drop()
        self._session_begun[peer].clear()
        self._troubles[peer] = f"the session ended: {reason}"
        self._metrics.peer_session(peer, False)
        log.log(logging.INFO if self._stopping else logging.WARNING, "session ended peer=%s (%s)", peer, reason)
        self._tell(self._receiver.on_session, peer, False)

    def message_came(self, proven: Proven, frame: Frame) -> None:
        self._tell(self._receiver.on_message, proven.peer, proven.link, frame.header, frame.blobs)

    def round_trip(self, peer: str, seconds: float) -> None:
        self._round_trips_s[peer] = seconds
        self._metrics.peer_round_trip(peer, seconds)

    def _tell(self, listener: Callable[..., None], *args: object) -> None:
        """A receiver that raises has a bug; the connection, and with it the other groups, go on."""
        try:
            listener(*args)
        except Exception:
            log.exception("receiver failed")

    async def _watch(self) -> None:
        looked_s = self.clock.monotonic_s()
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = self.clock.monotonic_s()
            late_s = max(0.0, now_s - looked_s - 2 * LOOK_S)
            looked_s = now_s
            for connection in list(self._links.values()):
                # A process that was stopped has not listened: that is not the others' silence.
                connection.look(now_s, late_s)
                received, sent = connection.take_counts()
                self._metrics.peer_bytes(connection.who, received=received, sent=sent)

    # telling

    def refuse(self, who: str, reason: str, text: str) -> None:
        """Count a refusal, and log it when it is this peer's first for the reason."""
        self._metrics.peer_refused(reason)
        if who in self._addresses:
            self._troubles[who] = text
        elif len(self._said) > STRANGERS_MAX:
            return
        if (who, reason) not in self._said:
            self._said.add((who, reason))
            log.warning("refused peer=%s reason=%s (%s)", who, reason, text)

    def say_duplicate(self, peer: str) -> None:
        self._metrics.peer_refused("duplicate_name")
        if (peer, "duplicate_name") not in self._said:
            self._said.add((peer, "duplicate_name"))
            log.error(
                "two processes claim to be one node peer=%s (the one that was connected first stays, the other is "
                "refused; stop one of them, or give it a name of its own)", peer,
            )  # fmt: skip

    def _note_trouble(self, peer: str, text: str) -> None:
        self._troubles[peer] = text
        if (peer, "trouble") not in self._said:
            self._said.add((peer, "trouble"))
            log.info("no session, trying on peer=%s (%s)", peer, text)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection(asyncio.BufferedProtocol):
    """One connection: first its handshake, then frames.

    Invariants
      1. Before the handshake is over, no more bytes are read than its turn wants.
      2. After `close` or `drop` nothing is delivered.
    """

    def __init__(self, network: PeerNetwork, handshake: Handshake | None, who: str) -> None:
        """`who` is the peer to be dialled, or how to call a dialer that has yet to say its name."""
        loop = asyncio.get_running_loop()
        self.who = who
        self.outcome: asyncio.Future[BaseException | None] = loop.create_future()
        """Of the handshake: None, or why it failed."""
        self.gone: asyncio.Future[None] = loop.create_future()
        self.is_begun = self.is_link = False
        self.incarnation = b""
        self._loop = loop
        self._clock = network.clock
        self._network = network
        self._is_dialing = handshake is not None
        self._handshake = handshake or network.accept_handshake(self)
        self._turn = memoryview(b"")
        self._turn_left = self._turn
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._certificate_names: frozenset[str] | None = None
        self._proven: Proven
        self._is_over = self._is_pausing = False
        self._received = self._sent = 0
        self._received_told = self._sent_told = 0
        self._heard_s = self._pinged_s = self._flowed_s = 0.0
        self._flowed = 0
        """How many bytes had left at `_flowed_s`, the last time that any did or none had to."""
        self._pings = 0
        self._challenge: bytes | None = None
        self._challenged_s = 0.0

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's have the methods, not the base class
        self._transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (tls := self._transport.get_extra_info("ssl_object")) is not None:
            self._certificate_names = _certificate_names(tls.getpeercert() or {})
        if self._is_dialing and not self.may_be(self.who):
            self._fail(Refused(Verdict.CERTIFICATE))
        else:
            self._step(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer() if self.is_link else self._turn_left

    def buffer_updated(self, count: int) -> None:
        self._received += count
        if not self.is_link:
            self._turn_left = self._turn_left[count:]
            if not self._turn_left and not self._is_over:
                self._step(bytes(self._turn))
            return
        self._reader.filled(count)
        self._deliver()

    def _deliver(self) -> None:
        """Hand over the frames that are there, or as many as SLICE_S allows: then the rest of the node has a turn."""
        assert self._transport is not None
        self._heard_s = now_s = self._clock.monotonic_s()
        until_s = now_s + SLICE_S
        try:
            while not self._is_over and (frame := self._reader.next_frame()) is not None:
                if frame.kind is FrameKind.MESSAGE:
                    self._network.message_came(self._proven, frame)
                else:
                    self._signalled(frame)
                if self._clock.monotonic_s() > until_s and not self._is_over:
                    self._transport.pause_reading()
                    self._is_pausing = True
                    self._loop.call_soon(self._deliver)
                    return
            if self._is_pausing and not self._is_over:
                self._is_pausing = False
                if not self._transport.is_closing():
                    self._transport.resume_reading()
        except BadFrame as error:
            self._network.refuse(self.who, error.reason, str(error))
            self.close(f"it sent what is no frame: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.outcome.done():
            self.outcome.set_result(
                exc if isinstance(exc, OSError) else ConnectionResetError("it closed the connection")
            )
        self._end("it closed the connection" if exc is None else str(exc) or type(exc).__name__)
        if not self.gone.done():
            self.gone.set_result(None)

    # the handshake

    def may_be(self, name: str) -> bool:
        """Return whether the certificate, if there is one, is the node's."""
        return self._certificate_names is None or name in self._certificate_names

    def _step(self, answer: bytes | None) -> None:
        assert self._transport is not None
        try:
            turn = next(self._handshake) if answer is None else self._handshake.send(answer)
            if turn.send:
                self._transport.write(turn.send)
            if not turn.want:
                self._handshake.send(b"")
                raise AssertionError("a handshake goes on after its last turn")
            self._turn = self._turn_left = memoryview(bytearray(turn.want))
        except Refused as refused:
            self._fail(refused)
        except StopIteration as done:
            self._establish(done.value)

    def _fail(self, refused: Refused) -> None:
        assert self._transport is not None
        self._is_over = True
        if refused.answer:
            self._transport.write(refused.answer)
        self._transport.close()
        self._loop.call_later(PARTING_S, self.abort)
        if not self.outcome.done():
            self.outcome.set_result(refused)

    def _establish(self, proven: Proven) -> None:
        self._proven = proven
        self.incarnation = proven.incarnation
        self._heard_s = self._pinged_s = self._flowed_s = self._clock.monotonic_s()
        self.is_link = True  # before it is told, as whoever is told may send at once
        self.is_link = self._network.establish(self, proven)
        if not self.is_link:
            self.drop()
        if not self.outcome.done():
            self.outcome.set_result(None if self.is_link else Refused(Verdict.NO_SESSION))

    # frames

    @property
    def queued_bytes(self) -> int:
        assert self._transport is not None
        return self._transport.get_write_buffer_size()

    def write(self, pieces: Sequence[Blob]) -> None:
        assert self._transport is not None
        self._sent += sum(map(len, pieces))
        self._transport.writelines(pieces)

    def take_counts(self) -> tuple[int, int]:
        """Return the bytes received and sent since this was last asked."""
        counts = self._received - self._received_told, self._sent - self._sent_told
        self._received_told, self._sent_told = self._received, self._sent
        return counts

    def _signalled(self, frame: Frame) -> None:
        if frame.kind is FrameKind.PING:
            if self.queued_bytes <= QUEUE_BYTES_MAX[self._proven.link]:
                self.write([encode_signal(FrameKind.PONG, frame.signal)])
            return
        if frame.signal == self._challenge:
            self._challenge = None
            self._network.say_duplicate(self.who)
        if frame.signal == self._pings.to_bytes(SIGNAL_BYTES, "little") and self._proven.link is Link.SMALL:
            self._network.round_trip(self.who, self._clock.monotonic_s() - self._pinged_s)

    def _ping(self) -> bytes:
        self._pings += 1
        self._pinged_s = self._clock.monotonic_s()
        signal = self._pings.to_bytes(SIGNAL_BYTES, "little")
        self.write([encode_signal(FrameKind.PING, signal)])
        return signal

    def challenge(self) -> None:
        """Have the connection closed soon unless its process shows that it is alive."""
        if self._challenge is None:
            self._challenge = self._ping()
            self._challenged_s = self._pinged_s

    def look(self, now_s: float, late_s: float) -> None:
        """Ping, or close what is silent or stuck; the loop itself was late by `late_s`."""
        self._heard_s += late_s
        self._flowed_s += late_s
        self._challenged_s += late_s
        queued = self.queued_bytes
        if not queued or self._sent - queued != self._flowed:
            self._flowed, self._flowed_s = self._sent - queued, now_s
        if now_s - self._heard_s > DEAD_S:
            self.close(f"nothing was heard of it for {DEAD_S:g} s")
        elif now_s - self._flowed_s > STUCK_S:
            self.close(f"it took nothing of {queued} bytes for {STUCK_S:g} s")
        elif self._challenge is not None and now_s - self._challenged_s > CHALLENGE_S:
            self.close("another process of that name has come, and this one does not answer")
        elif now_s - self._pinged_s >= PING_S:
            self._ping()

    # the end

    def close(self, reason: str, *, gently: bool = False) -> None:
        """End the link; `gently` sends first what is queued."""
        self._end(reason)
        if self._transport is not None:
            if gently:
                self._transport.close()
            else:
                self._transport.abort()

    def drop(self) -> None:
        """End without telling anybody; what is being said in parting is still sent."""
        self._is_over = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()

    def abort(self) -> None:
        """End what is closing and takes too long over it."""
        self._is_over = True
        if self._transport is not None:
            self._transport.abort()

    def _end(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            if self.is_link:
                self._network.lost(self, self._proven, reason)


def _bind(address: Address) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{address}: {error.strerror or error}; give another --peer-listen") from error
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        reason = "another node or program has it" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(
            f"{address}, where this node is to listen for other nodes, cannot be used: {reason}; stop what uses it, or "
            "give each node an address of its own in --peers"
        ) from error
    return listener


def _check_proof(listen: Address, peers: Mapping[str, Address], *, has_proof: bool) -> None:
    """Raise OSError if anybody on other machines could pose as a node."""
    open_ones = [str(address) for address in (listen, *peers.values()) if not address.is_local]
    if open_ones and not has_proof:
        raise OSError(
            f"other machines reach {open_ones[0]}, where anybody may pose as a node: give each node the same "
            "cluster_secret, or TLS files"
        )


def _load_tls(files: TlsFiles, side: int) -> ssl.SSLContext:
    """Return the context of acceptor or dialer. Raises OSError that names the file at fault."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # nodes are called by name, wherever they are: the connection compares names
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise OSError(
            f"TLS between nodes: {files.certificate} and {files.key} are no certificate and its key: {error}"
        ) from error
    try:
        context.load_verify_locations(files.authority)
    except OSError as error:
        raise OSError(f"TLS between nodes: {files.authority} holds no certificates: {error}") from error
    return context


def _certificate_names(certificate: Mapping[str, Any]) -> frozenset[str]:
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    names |= {value for parts in certificate.get("subject", ()) for key, value in parts if key == "commonName"}
    return frozenset(names)
