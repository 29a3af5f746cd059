"""A network in memory that does what networks do to the unlucky: implements `node.network.Network` for every node.

Two nodes have a session while both live and each hears the other. Frames of a session arrive in order, at most once,
after a delay; when a session breaks, what was under way arrives up to some frame and no further, and nobody is told
which. So a frame is doubled only where its sender repeats it after a break, as over TCP.

A cut is of one direction: nothing that is sent that way arrives. As TCP would, it keeps what was sent and delivers it
if the cut is mended before somebody gives the session up for silent; else it is lost. Everything by chance comes from
the dice that the network is made with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any, Final

import cbor2

from node.network import Blob, Frame, FrameReader, Link, Receiver, encode_message
from node.settings import Address
from tests.sim.world import Life, SimLoop

SILENCE_S: Final = 3.0
"""A session over which nothing was heard for this long is given up. This and the next as in `node/peers.py`."""
CONNECT_S_MAX: Final = 0.6
NOTICE_S_MAX: Final = 0.05
"""A broken connection is noticed by each end within this."""
QUEUE_BYTES_MAX: Final = 32 << 20
CODEC_EVERY: Final = 8
"""Each so-manieth frame goes through the real codec; the others through a quick copy."""
CHECK_S: Final = 0.25
"""How often pairs without a session look whether they could have one, and sessions whether they fell silent."""


@dataclass
class Path:
    """One direction between two nodes, whatever session uses it."""

    cut: bool = False
    delay_s: float = 0.0005
    """Every frame takes up to this, beside its bytes."""
    bytes_per_s: float = 100e6


@dataclass
class _Queued:
    due_s: float
    data: Sequence[Blob]
    """A frame as the codec makes it, or a header and then its blobs."""
    is_frame: bool
    nbytes: int


@dataclass
class _Flow:
    """One direction of one link of one session."""

    frames: deque[_Queued] = field(default_factory=deque)
    queued_bytes: int = 0
    free_at_s: float = 0.0
    """When the last byte queued so far will have left."""
    waiting: bool = False
    """A timer will look at the first frame."""


class _Bulk(Enum):
    """What an end of a session knows of the BULK link."""

    UP = 0
    LOST = 1
    """It broke, which this end was not told yet: what it sends goes nowhere."""
    DOWN = 2
    """This end knows."""


class _Session:
    """A session of two nodes: up at each end from when it is told until it notices the end."""

    def __init__(self, ends: tuple[str, str]) -> None:
        self.ends = ends
        self.up: set[str] = set()
        """Who was told that it is up, and not yet that it is gone."""
        self.broken = False
        self.flows = {(a, b, link): _Flow() for a, b in (ends, ends[::-1]) for link in Link}
        self.silent_since: dict[str, float] = {}
        """Receiver -> since when nothing can reach it."""
        self.bulk = dict.fromkeys(ends, _Bulk.UP)


class SimWire:
    """The cables between all nodes."""

    def __init__(self, loop: SimLoop, rng: Random) -> None:
        self._loop = loop
        self._rng = rng
        self._context = copy_context()
        self._networks: dict[str, SimNetwork] = {}
        self._paths: dict[tuple[str, str], Path] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._connecting: set[tuple[str, str]] = set()
        self.sent = 0
        self.delivered = 0
        self.lost = 0
        self._later(CHECK_S, self._look)

    # what a simulation does to it

    def path(self, a: str, b: str) -> Path:
        """Return the direction from `a` to `b`; its fields may be changed."""
        found = self._paths.get((a, b))
        if found is None:
            found = self._paths[a, b] = Path()
        return found

    def cut(self, a: str, b: str) -> None:
        """Let nothing from `a` reach `b`."""
        self.path(a, b).cut = True

    def cut_apart(self, some: Iterable[str], others: Iterable[str]) -> None:
        """Let no node of the one set hear any of the other."""
        others = list(others)
        for a in some:
            for b in others:
                self.cut(a, b)
                self.cut(b, a)

    def mend(self) -> None:
        """Make every path whole and quick."""
        for (a, b), path in self._paths.items():
            self._paths[a, b] = Path()
            if path.cut:
                self._mended(a, b)

    def mend_path(self, a: str, b: str) -> None:
        """Let `b` hear `a` again."""
        if self.path(a, b).cut:
            self.path(a, b).cut = False
            self._mended(a, b)

    def reset(self, a: str, b: str) -> None:
        """Break the session of two nodes; they may have another at once."""
        session = self._sessions.get(_pair(a, b))
        if session is not None:
            self._break(session)

    def reset_bulk(self, a: str, b: str) -> None:
        """Break the BULK link of two nodes, while their session goes on."""
        session = self._sessions.get(_pair(a, b))
        if session is None or session.broken or session.up != {a, b} or set(session.bulk.values()) != {_Bulk.UP}:
            return
        for me, peer in ((a, b), (b, a)):
            self.lost += len(session.flows[me, peer, Link.BULK].frames)
            session.flows[me, peer, Link.BULK] = _Flow()
            session.bulk[me] = _Bulk.LOST
            self._networks[me].life.call_at(self._soon_s(), self._tell_bulk_lost, session, self._networks[me], peer)
        self._later(NOTICE_S_MAX + self._rng.random() * CONNECT_S_MAX, self._reopen_bulk, session)

    # what networks do

    def join(self, network: SimNetwork) -> None:
        self._networks[network.name] = network
        for pair, session in self._sessions.items():
            if network.name in pair:
                self._break(session)  # of a process before this one
        for other in sorted(self._networks):
            self._connect(network.name, other)

    def part(self, network: SimNetwork) -> None:
        """A process has other peers now: sessions with those that it knows no more end."""
        if self._networks.get(network.name) is network:
            for (a, b), session in self._sessions.items():
                if network.name in (a, b) and not network.knows(b if network.name == a else a):
                    self._break(session)

    def leave(self, network: SimNetwork, *, silently: bool = False) -> None:
        """The process is gone: its machine closes the sockets, or is gone too and the others hear nothing more."""
        if self._networks.get(network.name) is not network:
            return
        del self._networks[network.name]
        for pair, session in self._sessions.items():
            if network.name in pair:
                session.up.discard(network.name)
                self._later(SILENCE_S if silently else 0, self._break, session)

    def is_up(self, me: str, peer: str) -> bool:
        session = self._sessions.get(_pair(me, peer))
        return session is not None and me in session.up

    def queued_bytes(self, me: str, peer: str, link: Link) -> int:
        session = self._sessions.get(_pair(me, peer))
        return 0 if session is None else session.flows[me, peer, link].queued_bytes

    def send(self, me: str, peer: str, link: Link, header: Mapping[str, Any], blobs: Sequence[Blob]) -> bool:
        session = self._sessions.get(_pair(me, peer))
        if session is None or me not in session.up:
            return False
        if link is Link.BULK and session.bulk[me] is not _Bulk.UP:
            return session.bulk[me] is _Bulk.LOST
        flow = session.flows[me, peer, link]
        self.sent += 1
        is_frame = self.sent % CODEC_EVERY == 0
        data = encode_message(header, blobs) if is_frame else [cbor2.dumps(header), *blobs]
        nbytes = sum(len(one) for one in data)
        if flow.queued_bytes and flow.queued_bytes + nbytes > QUEUE_BYTES_MAX:
            return False
        path = self.path(me, peer)
        flow.free_at_s = max(flow.free_at_s, self._loop.now_s) + nbytes / path.bytes_per_s
        due_s = flow.free_at_s + self._rng.random() * path.delay_s
        if flow.frames:
            due_s = max(due_s, flow.frames[-1].due_s)
        flow.frames.append(_Queued(due_s, data, is_frame, nbytes))
        flow.queued_bytes += nbytes
        self._arrange(session, me, peer, link)
        return True

    # inside

    def _look(self) -> None:
        self._later(CHECK_S, self._look)
        names = sorted(self._networks)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                self._connect(a, b)
        for session in list(self._sessions.values()):
            if not session.broken and all(end in self._networks for end in session.ends):
                self._look_for_silence(session)

    def _look_for_silence(self, session: _Session) -> None:
        for a, b in (session.ends, session.ends[::-1]):
            if not self.path(a, b).cut and not self._networks[a].life.paused:
                session.silent_since.pop(b, None)
            elif self._loop.now_s - session.silent_since.setdefault(b, self._loop.now_s) > SILENCE_S:
                self._break(session)
                return

    def _connect(self, a: str, b: str) -> None:
        pair = _pair(a, b)
        if a == b or pair in self._sessions or pair in self._connecting or not self._hear_each_other(*pair):
            return
        self._connecting.add(pair)
        self._later(self._rng.random() * CONNECT_S_MAX, self._connected, pair)

    def _hear_each_other(self, a: str, b: str) -> bool:
        for me, peer in ((a, b), (b, a)):
            if me not in self._networks or self._networks[me].life.paused or self.path(me, peer).cut:
                return False
            if not self._networks[me].knows(peer):
                return False
        return True

    def _connected(self, pair: tuple[str, str]) -> None:
        self._connecting.discard(pair)
        if pair in self._sessions or not self._hear_each_other(*pair):
            return
        session = self._sessions[pair] = _Session(pair)
        for me, peer in (pair, pair[::-1]):
            life = self._networks[me].life
            life.call_at(self._soon_s(), self._tell_up, session, self._networks[me], peer)

    def _tell_up(self, session: _Session, network: SimNetwork, peer: str) -> None:
        if session.broken or self._networks.get(network.name) is not network:
            return
        session.up.add(network.name)
        network.receiver.on_session(peer, True)
        for link in Link:
            self._arrange(session, peer, network.name, link)

    def _break(self, session: _Session) -> None:
        """End a session. Each end notices a little later, and until then what is under way still reaches it."""
        if session.broken:
            return
        session.broken = True
        last_s = self._loop.now_s
        for me, peer in (session.ends, session.ends[::-1]):
            if me in session.up:
                at_s = self._soon_s()
                last_s = max(last_s, at_s)
                self._networks[me].life.call_at(at_s, self._tell_down, session, self._networks[me], peer)
        self._later(last_s - self._loop.now_s + 1e-6, self._forget, session)

    def _tell_down(self, session: _Session, network: SimNetwork, peer: str) -> None:
        if network.name in session.up and self._networks.get(network.name) is network:
            session.up.discard(network.name)
            network.receiver.on_session(peer, False)

    def _tell_bulk_lost(self, session: _Session, network: SimNetwork, peer: str) -> None:
        session.bulk[network.name] = _Bulk.DOWN
        if network.name in session.up:
            network.receiver.on_bulk_lost(peer)

    def _reopen_bulk(self, session: _Session) -> None:
        if _Bulk.LOST in session.bulk.values():
            self._later(CHECK_S, self._reopen_bulk, session)  # a paused process was not told yet
        else:
            session.bulk = dict.fromkeys(session.ends, _Bulk.UP)

    def _forget(self, session: _Session) -> None:
        if any(name in self._networks for name in session.up):
            # A paused process has not been told yet; nothing new may begin before.
            self._later(CHECK_S, self._forget, session)
            return
        self.lost += sum(len(flow.frames) for flow in session.flows.values())
        del self._sessions[session.ends]

    def _mended(self, a: str, b: str) -> None:
        session = self._sessions.get(_pair(a, b))
        if session is not None:
            for link in Link:
                self._arrange(session, a, b, link)

    def _arrange(self, session: _Session, a: str, b: str, link: Link) -> None:
        """See to it that the first frame of a flow is delivered when it is due, if it can be."""
        flow = session.flows[a, b, link]
        if flow.frames and not flow.waiting and b in session.up and not self.path(a, b).cut:
            flow.waiting = True
            at_s = max(flow.frames[0].due_s, self._loop.now_s)
            self._networks[b].life.call_at(at_s, self._deliver, session, a, b, link)

    def _deliver(self, session: _Session, a: str, b: str, link: Link) -> None:
        flow = session.flows[a, b, link]
        flow.waiting = False
        if not flow.frames or b not in session.up or self.path(a, b).cut:
            return
        if flow.frames[0].due_s > self._loop.now_s:
            self._arrange(session, a, b, link)  # the timer was of a link that broke
            return
        frame = flow.frames.popleft()
        flow.queued_bytes -= frame.nbytes
        self.delivered += 1
        self._arrange(session, a, b, link)
        if frame.is_frame:
            received = _through_codec(frame.data)
            header, blobs = received.header, received.blobs
        else:
            header = cbor2.loads(bytes(frame.data[0]))
            blobs = [memoryview(bytes(one)) for one in frame.data[1:]]
        self._networks[b].receiver.on_message(a, link, header, blobs)

    def _later(self, delay_s: float, function: Callable[..., None], *args: Any) -> None:
        """Call something that happens on the wire, in no process, though a process may have caused it."""
        self._loop.call_later(delay_s, function, *args, context=self._context.copy())

    def _soon_s(self) -> float:
        return self._loop.now_s + self._rng.random() * NOTICE_S_MAX


class SimNetwork:
    """One process's end of the wire."""

    def __init__(self, wire: SimWire, name: str, life: Life) -> None:
        self.name, self.life = name, life
        self.receiver: Receiver
        self._wire = wire
        self._peers: frozenset[str] | None = None
        """None: whoever is there."""

    def knows(self, peer: str) -> bool:
        return self._peers is None or peer in self._peers

    def set_peers(self, peers: Mapping[str, Sequence[Address]]) -> None:
        self._peers = frozenset(peers)
        self._wire.part(self)

    async def start(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._wire.join(self)

    async def stop(self) -> None:
        self._wire.leave(self)

    def send(self, peer: str, link: Link, header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> bool:
        if self.life.is_over or not self._wire.is_up(self.name, peer):
            return False
        return self._wire.send(self.name, peer, link, header, blobs)

    def is_up(self, peer: str) -> bool:
        return self._wire.is_up(self.name, peer)

    def queued_bytes(self, peer: str, link: Link) -> int:
        return self._wire.queued_bytes(self.name, peer, link)


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)


def _through_codec(data: Sequence[Blob]) -> Frame:
    """Return the frame as it comes out of a byte stream."""
    reader, frame = FrameReader(), None
    for piece in data:
        rest = memoryview(piece)
        while rest:
            room = reader.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            reader.filled(count)
            rest = rest[count:]
            frame = reader.next_frame() or frame
    assert frame is not None, "what was encoded is not a whole frame"
    return frame
