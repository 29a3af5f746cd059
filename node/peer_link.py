"""One connection to another node: first its handshake, then frames, until it breaks, falls silent or is closed.

A connection is heard at least once a second, by a ping if there is nothing else. One that is silent for DEAD_S, or
takes nothing for STUCK_S, is closed: a kernel would notice only after minutes that the other side is gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, cast

from node.clock import Clock
from node.handshake import Handshake, Proven, Refused, Verdict
from node.network import SIGNAL_BYTES, BadFrame, Blob, Frame, FrameKind, FrameReader, Link, encode_signal
from node.peer_tls import certificate_names

PING_S: Final = 1.0
DEAD_S: Final = 3.0
STUCK_S: Final = 10.0
CHALLENGE_S: Final = 1.0
PARTING_S: Final = 1.0
"""A connection that is closed has this long to send what is queued."""
SLICE_S: Final = 0.005
"""Frames of one connection are handed over for so long at a time."""
QUEUE_BYTES_MAX: Final[Mapping[Link, int]] = {Link.SMALL: 64 << 20, Link.BULK: 32 << 20}
"""Nothing more is taken while so much waits; calls keep to less (`node/calls.py`), so that consensus has room."""


class Owner(Protocol):
    """What a connection tells the network it is part of."""

    @property
    def clock(self) -> Clock: ...

    def accept_handshake(self, connection: PeerLink) -> Handshake:
        """Return the acceptor's side of the handshake."""
        ...

    def establish(self, connection: PeerLink, proven: Proven) -> bool:
        """The handshake is over: make the connection the link. Return False if that has become senseless."""
        ...

    def lost(self, connection: PeerLink, proven: Proven, reason: str) -> None:
        """A link is no more."""
        ...

    def message_came(self, proven: Proven, frame: Frame) -> None: ...

    def round_trip(self, peer: str, seconds: float) -> None:
        """A ping's reply took so long."""
        ...

    def refuse(self, who: str, reason: str, text: str) -> None:
        """Count a refusal, and log it when it is this peer's first for the reason."""
        ...

    def say_duplicate(self, peer: str) -> None:
        """A link's process has answered the challenge: there are two of that name."""
        ...


class PeerLink(asyncio.BufferedProtocol):
    """One connection: first its handshake, then frames.

    Invariants
      1. Before the handshake is over, no more bytes are read than its turn wants.
      2. After `close` or `drop` nothing is delivered.
    """

    def __init__(self, network: Owner, handshake: Handshake | None, who: str) -> None:
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
            self._certificate_names = certificate_names(tls.getpeercert() or {})
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
