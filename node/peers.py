"""The network over sockets: two connections to each other node, proved, watched and bounded.

Of two nodes the one with the smaller name dials, so that they never cross. The SMALL link is the session; the BULK
link belongs to it, comes after it and ends with it. What is refused is counted, and logged once per peer and reason.

Two processes with one name: the session that there is stays while its process answers a ping within a second, and the
newcomer is refused. If it does not answer, it was a connection that nobody has told us is broken, and the newcomer is
let in when it tries again. A process that begins anew by itself replaces its own session.
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
from typing import Any, Final

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
    Blob,
    Frame,
    Link,
    Receiver,
    encode_message,
)
from node.peer_link import PARTING_S, QUEUE_BYTES_MAX, PeerLink
from node.peer_tls import TlsFiles, load_tls
from node.settings import Address, Settings
from storage.errors import AnnulusError

log = logging.getLogger(__name__)

HELLO_S_MAX: Final = 3.0
"""From connecting to the end of the handshake, TLS included."""
UNPROVEN_MAX: Final = 32
"""Connections in their handshake; when one more comes, the oldest goes."""
BACKLOG: Final = 64
LOOK_S: Final = 0.25
"""How often connections are looked at."""
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 0.6
"""Trying again costs little, and a node that is back should be found well within an election."""
STEADY_S: Final = 5.0
"""A session of this length was a good one: the next attempt follows at once."""
GUESTS_MAX: Final = 4
"""Nodes that ask to join at the same time."""
GUEST_S_MAX: Final = 30.0
"""How long a guest may take, its answer included."""
STRANGERS_MAX: Final = 256
"""Addresses of strangers whose refusal was logged; further ones are only counted."""


GuestHandler = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""`await handler(name, question)` returns the answer to a node that is not of the cluster yet."""


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

        peers       all nodes of the cluster as far as known, `me` included or not, and where to reach them
        cluster     any text that nodes have in common that form a cluster; "" of a node that joined it
        cluster_id  returns the id that the cluster gave itself, "" while it is not known here
        Raises OSError, in words for a person, if the TLS files cannot be used or others could pose as a node.
        """
        self._has_proof = bool(secret) or tls is not None
        _check_proof((listen, *peers.values()), has_proof=self._has_proof)
        incarnation = incarnation or os.urandom(INCARNATION_BYTES)
        self.me = me
        self._identity = Identity.make(me, cluster, secret, incarnation, cluster_id)
        self._addresses: dict[str, Sequence[Address]] = {}
        """Of each other node, the one first that was right the last time."""
        self._diallers: dict[str, list[asyncio.Task[None]]] = {}
        self._listen_address = listen
        self._metrics = metrics
        self.clock = SystemClock()
        self._dice = random.Random(int.from_bytes(os.urandom(8)))
        self._server_tls = None if tls is None else load_tls(tls, ssl.PROTOCOL_TLS_SERVER)
        self._client_tls = None if tls is None else load_tls(tls, ssl.PROTOCOL_TLS_CLIENT)
        self._receiver: Receiver
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._unproven: dict[asyncio.Task[None], None] = {}
        """Accepted connections in their handshake; the oldest first."""
        self._links: dict[tuple[str, Link], PeerLink] = {}
        self._session_begun: dict[str, asyncio.Event] = {}
        self._round_trips_s: dict[str, float] = {}
        self._troubles: dict[str, str] = {}
        self._said: set[tuple[str, str]] = set()
        self.on_guest: GuestHandler | None = None
        """Answers nodes that want to join; while there is none they are told to come back."""
        self._guests: dict[bytes, PeerLink] = {}
        """Incarnation -> connection of a guest that has proved itself."""
        self._is_started = self._stopping = False
        self.set_peers({name: [address] for name, address in peers.items()})

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
            cluster=f"{','.join(node.members)} shards={node.shards} copies={node.copies}" if node.peers else "",
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
        self._is_started = True
        for peer in self._addresses:
            self._begin_with(peer)
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
        leaving = [*self._links.values(), *self._guests.values()]
        for connection in leaving:
            connection.close("stopping", gently=True)
        if leaving:
            await asyncio.wait([connection.gone for connection in leaving], timeout=PARTING_S)
        for connection in leaving:
            connection.abort()

    def set_peers(self, peers: Mapping[str, Sequence[Address]]) -> None:
        others = {name: tuple(dict.fromkeys(found)) for name, found in sorted(peers.items()) if name != self.me}
        for peer in [name for name in self._addresses if name not in others]:
            self._end_with(peer)
        for peer, addresses in others.items():
            if set(addresses) == set(self._addresses.get(peer, ())):
                continue
            if not self._has_proof and not all(address.is_local for address in addresses):
                self.refuse(peer, "unproved", f"other machines reach {addresses[0]}, and nodes do not prove themselves")
                continue
            is_new = peer not in self._addresses
            self._addresses[peer] = addresses
            if is_new and self._is_started:
                self._begin_with(peer)

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
                addresses[0],
                is_up := self.is_up(name),
                self._round_trips_s.get(name) if is_up else None,
                ""
                if is_up
                else self._troubles.get(name, "not tried yet" if name > self.me else "it has yet to dial us"),
            )
            for name, addresses in self._addresses.items()
        ]

    # connecting

    def _begin_with(self, peer: str) -> None:
        """From now on there may be a session with the peer."""
        self._session_begun[peer] = asyncio.Event()
        self._metrics.peer_session(peer, False)
        if peer > self.me:
            self._diallers[peer] = [self._spawn(self._keep_linked(peer, link)) for link in Link]

    def _end_with(self, peer: str) -> None:
        """The peer is no node of the cluster any more."""
        for task in self._diallers.pop(peer, ()):
            task.cancel()
        del self._addresses[peer]
        if (session := self._links.get((peer, Link.SMALL))) is not None:
            session.close("it is no node of the cluster any more")
        self._session_begun.pop(peer, None)
        self._troubles.pop(peer, None)
        if self._is_started:
            log.info("no longer a peer=%s", peer)
            self._metrics.peer_forgotten(peer)

    async def _keep_linked(self, peer: str, link: Link) -> None:
        """Dial, wait for the end, dial again."""
        retry_s = RETRY_S_MIN
        while True:
            if link is Link.BULK:
                await self._session_begun[peer].wait()
            connection = PeerLink(self, dial(self._identity, peer, link, os.urandom(NONCE_BYTES)), peer)
            began_s = self.clock.monotonic_s()
            first, *rest = self._addresses[peer]
            if await self._dial(connection, first):
                await connection.gone
                if self.clock.monotonic_s() - began_s > STEADY_S:
                    retry_s = RETRY_S_MIN
            elif rest and self._addresses[peer][0] == first:
                self._addresses[peer] = (*rest, first)
            await asyncio.sleep(retry_s * self._dice.uniform(0.5, 1))
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    async def _dial(self, connection: PeerLink, address: Address) -> bool:
        loop = asyncio.get_running_loop()
        return await self._prove(
            connection, lambda: loop.create_connection(lambda: connection, *address, ssl=self._client_tls)
        )

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
            connection = PeerLink(self, None, f"stranger at {came_from[0]}")
            task = loop.create_task(self._accept(connection, accepted))
            self._unproven[task] = None
            task.add_done_callback(self._forget_unproven(connection, accepted))
            await asyncio.sleep(0)  # the accepted one begins, and whoever else is waiting has a turn

    async def _accept(self, connection: PeerLink, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await self._prove(
            connection, lambda: loop.connect_accepted_socket(lambda: connection, accepted, ssl=self._server_tls)
        )

    def _forget_unproven(self, connection: PeerLink, accepted: socket.socket) -> Callable[[asyncio.Task[None]], None]:
        def forget(task: asyncio.Task[None]) -> None:
            self._unproven.pop(task, None)
            if not connection.is_begun:
                accepted.close()  # nobody else does it for a task that was cancelled before its first step

        return forget

    async def _prove(self, connection: PeerLink, connect: Callable[[], Awaitable[object]]) -> bool:
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

    def accept_handshake(self, connection: PeerLink) -> Handshake:
        return accept(
            self._identity,
            os.urandom(NONCE_BYTES),
            knows=lambda name: name in self._addresses and name < self.me,
            admit=lambda proven: self._admit(connection, proven),
        )

    def _admit(self, connection: PeerLink, proven: Proven) -> Verdict:
        """Decide about a dialer that has proved itself; the present link makes way if it must."""
        connection.who = proven.peer
        if self._stopping:
            return Verdict.NO_SESSION
        if not connection.may_be(proven.peer):
            return Verdict.CERTIFICATE
        if proven.is_guest:
            is_welcome = self.on_guest is not None and len(self._guests) < GUESTS_MAX
            return Verdict.WELCOME if is_welcome else Verdict.CROWDED
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

    def establish(self, connection: PeerLink, proven: Proven) -> bool:
        """The handshake is over: make the connection the link. Return False if that has become senseless."""
        if proven.is_guest:
            return self._receive_guest(connection, proven)
        peer, link = proven.peer, proven.link
        session = self._links.get((peer, Link.SMALL))
        if self._stopping or peer not in self._addresses or (peer, link) in self._links:
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

    def lost(self, connection: PeerLink, proven: Proven, reason: str) -> None:
        """A link is no more; nothing of it is delivered from now on."""
        if proven.is_guest:
            self._guests.pop(proven.incarnation, None)
            return
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

    def _receive_guest(self, connection: PeerLink, proven: Proven) -> bool:
        if self._stopping or proven.incarnation in self._guests:
            return False
        self._guests[proven.incarnation] = connection
        asyncio.get_running_loop().call_later(GUEST_S_MAX, connection.close, "it took too long over joining")
        return True

    async def _answer_guest(self, proven: Proven, question: Mapping[str, Any]) -> None:
        assert self.on_guest is not None
        answer: Mapping[str, Any]
        try:
            answer = {"answer": await self.on_guest(proven.peer, question)}
        except AnnulusError as error:
            log.warning("a node may not join name=%s (%s)", proven.peer, error.message)
            answer = {"refused": [error.code, error.message]}
        except Exception:
            log.exception("a node that wants to join gets no answer name=%s", proven.peer)
            answer = {"refused": [AnnulusError.code, f"joining failed on node {self.me}; its log says why"]}
        connection = self._guests.get(proven.incarnation)
        if connection is not None:
            connection.write(encode_message(answer))
            connection.close("it has its answer", gently=True)

    def message_came(self, proven: Proven, frame: Frame) -> None:
        if proven.is_guest:
            self._spawn(self._answer_guest(proven, frame.header))
            return
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

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


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


def _check_proof(addresses: Sequence[Address], *, has_proof: bool) -> None:
    """Raise OSError if anybody on other machines could pose as a node."""
    open_ones = [str(address) for address in addresses if not address.is_local]
    if open_ones and not has_proof:
        raise OSError(
            f"other machines reach {open_ones[0]}, where anybody may pose as a node: give each node the same "
            "cluster_secret, or TLS files"
        )
