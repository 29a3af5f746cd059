"""What nodes say to each other: Raft messages by group, calls with deadlines, and the hybrid clock on every frame.

    raft     {"s", "t": "raft",   "r": [[group, header], ...]}        blobs of the message, if there is only one
    call     {"s", "t": "call",   "c": id, "m": method, "a": arguments, "d": milliseconds left}      blobs
    cancel   {"s", "t": "cancel", "c": id}                            the caller no longer waits
    reply    {"s", "t": "reply",  "c": id, "a": answer}               blobs
    error    {"s", "t": "error",  "c": id, "e": [code, message]}

`s` is the sender's hybrid stamp. A reply takes the link that its call took, so that chunks never stand before
consensus. A session's end fails the calls that wait for the peer and cancels those that are served for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cbor2

from cluster.tick import HybridClock
from node.clock import Clock
from node.network import BadFrame, Blob, Link, Network
from storage.errors import AnnulusError, InvalidParameter, NoLeader, Overloaded, PeerUnreachable, error_from, let_go
from storage.types import Tick, tick_ms

log = logging.getLogger(__name__)

STAMP_AHEAD_MS_MAX: Final = 60_000
"""A stamp further ahead of our wall clock is refused: observing it would drag every tick of the cluster along."""
SERVED_MAX: Final = 64
"""Calls of one peer and link that run at once; one peer cannot starve the others."""
WAITING_MAX: Final = 256
"""Further calls of that peer and link that wait for their turn; more are refused as overload."""
OUTSTANDING_MAX: Final = 8192
"""Calls to all peers that wait for their answer."""
CALL_S_MAX: Final = 3600.0
CALL_QUEUE_BYTES_MAX: Final = 16 << 20
"""Calls wait while a link has more than this to send. The rest of the queue's room is for consensus."""
ROOM_LOOK_S: Final = 0.005

Answer = tuple[Mapping[str, Any], Sequence[Blob]]
Handler = Callable[[str, dict[str, Any], Sequence[memoryview]], Awaitable[Answer]]
"""Serves a method: `await handler(peer, arguments, blobs)` returns the answer and its blobs.

It is cancelled when the caller's time is up, the caller gives up, or the session ends. What it may assume of the
arguments is that a node of the cluster sent them; raising BadRequest for what does not fit is enough.
"""
RaftHandler = Callable[[str, dict[str, Any], Sequence[memoryview]], None]
UnknownGroupHandler = Callable[[int, str, dict[str, Any], Sequence[memoryview]], None]
SessionHandler = Callable[[str, bool], None]


class Mesh:
    """Dispatch and calls over a network.

    Invariants
      1. Who calls gets an answer, an error, or PeerUnreachable within its time; nothing waits for an ended session.
      2. No handler runs for a session that has ended or past its caller's deadline, but for what it does about
         being cancelled.
      3. No header, whatever is in it, makes anything but a refusal that is counted.
    """

    def __init__(
        self,
        network: Network,
        me: str,
        hybrid: HybridClock,
        clock: Clock,
        *,
        on_refused: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """Make the mesh of node `me`; `on_refused(reason)` counts what `refused` counts, where others see it."""
        self.me = me
        self._on_refused = on_refused
        self.refused: Counter[str] = Counter()
        """Frames that made no sense, by reason."""
        self._network = network
        self._hybrid = hybrid
        self._clock = clock
        self._groups: dict[int, RaftHandler] = {}
        self._unknown_group: UnknownGroupHandler | None = None
        self._methods: dict[str, Handler] = {}
        self._session_handlers: list[SessionHandler] = []
        self._outstanding: dict[int, _Outstanding] = {}
        self._last_call_id = 0
        self._desks: dict[tuple[str, Link], _Desk] = {}
        self._waiting: dict[str, list[list[Any]]] = {}
        """Messages of groups, (group, header), that go to a peer at the end of this turn."""
        self._said: set[tuple[str, str]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._types: Final[Mapping[str, Callable[[str, Link, dict[str, Any], Sequence[memoryview]], None]]] = {
            "raft": self._on_raft,
            "call": self._on_call,
            "cancel": self._on_cancel,
            "reply": self._on_reply,
            "error": self._on_error,
        }

    async def start(self) -> None:
        """Start the network; handlers that should miss nothing are registered before."""
        await self._network.start(_Inbox(self))

    async def stop(self) -> None:
        """Stop the network. Calls that wait raise PeerUnreachable, those that are served are cancelled."""
        await self._network.stop()
        for waiting in list(self._outstanding.values()):
            waiting.fail(f"node {self.me} is stopping")
        tasks = {task for desk in self._desks.values() for task in desk.close()} | self._ending
        self._desks.clear()
        if tasks:
            await asyncio.wait(tasks)

    def is_up(self, peer: str) -> bool:
        return peer == self.me or self._network.is_up(peer)

    def on_session(self, handler: SessionHandler) -> None:
        """Have `handler(peer, up)` called whenever a session begins or ends."""
        self._session_handlers.append(handler)

    # raft

    def on_raft(self, group_id: int, handler: RaftHandler) -> None:
        """Have the group's messages given to `handler(peer, header, blobs)`; replaces an earlier handler."""
        self._groups[group_id] = handler

    def off_raft(self, group_id: int) -> None:
        """Take no more messages of the group."""
        self._groups.pop(group_id, None)

    def on_unknown_group(self, handler: UnknownGroupHandler) -> None:
        """Have `handler(group, peer, header, blobs)` called with messages of groups that nobody takes."""
        self._unknown_group = handler

    def send_raft(self, group_id: int, peer: str, header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> bool:
        """Queue a group's message; False if there is no session or too much is queued.

        What groups say in one turn of the loop travels in one frame, for all groups beat at the same instants: a frame
        costs more than what it says. Messages with blobs have frames of their own, and none overtakes another.
        """
        if not self._network.is_up(peer):
            return False
        if blobs:
            self._send_waiting(peer)
            return self._send(peer, Link.SMALL, {"t": "raft", "r": [[group_id, header]]}, blobs)
        waiting = self._waiting.setdefault(peer, [])
        if not waiting:
            asyncio.get_running_loop().call_soon(self._send_waiting, peer)
        waiting.append([group_id, header])
        return True

    def _send_waiting(self, peer: str) -> None:
        if messages := self._waiting.pop(peer, None):
            self._send(peer, Link.SMALL, {"t": "raft", "r": messages})

    # calls

    def serve(self, method: str, handler: Handler) -> None:
        """Answer calls of the method by `handler`; replaces an earlier one."""
        self._methods[method] = handler

    async def call(
        self,
        peer: str,
        method: str,
        arguments: Mapping[str, Any],
        blobs: Sequence[Blob] = (),
        *,
        timeout_s: float,
        link: Link = Link.SMALL,
    ) -> tuple[dict[str, Any], Sequence[memoryview]]:
        """Return the peer's answer and its blobs.

        Raises PeerUnreachable if there is no session, it ends before the answer, or time is up: the call may have
        been carried out. Raises Overloaded if the peer, or the way to it, has too much to do. Any other AnnulusError
        is the handler's own.
        """
        if peer == self.me:
            return await self._call_myself(method, dict(arguments), blobs, timeout_s)
        if not self._network.is_up(peer):
            raise PeerUnreachable(f"node {peer} cannot be reached from {self.me}: there is no session")
        if len(self._outstanding) >= OUTSTANDING_MAX:
            raise Overloaded(f"{OUTSTANDING_MAX} calls of node {self.me} to other nodes wait for an answer")
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        self._last_call_id += 1
        call_id = self._last_call_id
        waiting = self._outstanding[call_id] = _Outstanding(peer, link, loop.create_future())
        timer = loop.call_at(until_s, waiting.fail, f"node {peer} did not answer {method} within {timeout_s:g} s")
        sent = False
        try:
            while not waiting.answer.done():
                left_ms = max(1, int((until_s - loop.time()) * 1000))
                header = {"t": "call", "c": call_id, "m": method, "a": arguments, "d": left_ms}
                if sent := self._send_call(peer, link, header, blobs):
                    break
                await asyncio.sleep(ROOM_LOOK_S)
            return await waiting.answer
        except BadFrame as error:
            raise InvalidParameter(f"too large to be passed on to node {peer}: {error}") from None
        finally:
            timer.cancel()
            del self._outstanding[call_id]
            if sent and not waiting.is_answered:
                self._send(peer, link, {"t": "cancel", "c": call_id})
            waiting.forget()

    async def _call_myself(
        self, method: str, arguments: dict[str, Any], blobs: Sequence[Blob], timeout_s: float
    ) -> tuple[dict[str, Any], Sequence[memoryview]]:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                answer, answer_blobs = await self._run(self.me, method, arguments, [memoryview(one) for one in blobs])
        except TimeoutError:
            if limit.expired():
                raise PeerUnreachable(f"node {self.me} did not answer {method} within {timeout_s:g} s") from None
            raise
        return dict(answer), [memoryview(one) for one in answer_blobs]

    async def _run(self, peer: str, method: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        """Return what the method's handler returns; its bugs become an AnnulusError that gives nothing away."""
        handler = self._methods.get(method)
        if handler is None:
            # What serves clients comes last at a start: usually this passes.
            raise NoLeader(f"node {self.me} has no method {method!r}: it starts, or runs another version")
        try:
            return await handler(peer, arguments, blobs)
        except AnnulusError:
            raise
        except Exception as error:
            log.exception("call failed method=%s peer=%s", method, peer)
            raise AnnulusError(f"{method} failed on node {self.me}; its log says why") from error

    # what comes in

    def session_changed(self, peer: str, up: bool) -> None:
        self._waiting.pop(peer, None)
        if not up:
            for waiting in list(self._outstanding.values()):
                if waiting.peer == peer:
                    waiting.fail(f"the session to node {peer} ended before its answer")
            for link in Link:
                self._close_desk(peer, link)
        for handler in self._session_handlers:
            try:
                handler(peer, up)
            except Exception:
                log.exception("session handler failed peer=%s up=%s", peer, up)

    def bulk_lost(self, peer: str) -> None:
        for waiting in list(self._outstanding.values()):
            if waiting.peer == peer and waiting.link is Link.BULK:
                waiting.fail(f"the bulk link to node {peer} broke before its answer")
        self._close_desk(peer, Link.BULK)

    def message_came(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        stamp = header.get("s")
        if type(stamp) is not int or not 0 <= stamp < 1 << 63:
            self._refuse(peer, "no_stamp", "a frame without a hybrid stamp")
            return
        ahead_ms = tick_ms(Tick(stamp)) - self._clock.wall_ms()
        if ahead_ms > STAMP_AHEAD_MS_MAX:
            self._refuse(
                peer,
                "stamp_ahead",
                f"its clock is {ahead_ms / 1000:.0f} s ahead of ours: nothing of it is accepted until the clocks agree",
            )
            return
        self._hybrid.observe(Tick(stamp))
        kind = header.get("t")
        act = self._types.get(kind) if type(kind) is str else None
        if act is None:
            self._refuse(peer, "unknown_type", "a frame of a type that this program does not know")
            return
        act(peer, link, header, blobs)

    def _on_raft(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        messages = header.get("r")
        if type(messages) is not list or (blobs and len(messages) != 1):
            self._refuse(peer, "malformed", "a frame of Raft without messages")
            return
        for one in messages:
            match one:
                case [int(group_id), dict(message)]:
                    self._hear_group(peer, group_id, message, blobs)
                case _:
                    self._refuse(peer, "malformed", "a Raft message without group or header")

    def _hear_group(self, peer: str, group_id: int, message: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        handler = self._groups.get(group_id)
        if handler is None:  # usual while this node starts: its groups open later than its network
            self._count("unknown_group")
            if self._unknown_group is not None:
                self._unknown_group(group_id, peer, message, blobs)
            return
        try:
            handler(peer, message, blobs)
        except Exception:
            self._count("handler_failed")
            log.exception("Raft message failed group=%d peer=%s", group_id, peer)

    def _on_call(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        call_id, method, arguments, left_ms = (header.get(key) for key in ("c", "m", "a", "d"))
        if type(call_id) is not int or type(method) is not str or type(arguments) is not dict:
            self._refuse(peer, "malformed", "a call without id, method or arguments")
            return
        if type(left_ms) is not int or left_ms <= 0:
            self._refuse(peer, "malformed", "a call without time left")
            return
        desk = self._desks.setdefault((peer, link), _Desk())
        loop = asyncio.get_running_loop()
        call = _Served(call_id, method, arguments, blobs, loop.time() + min(left_ms / 1000, CALL_S_MAX))
        if call_id in desk.running:
            self._refuse(peer, "malformed", "a call whose id is in use")
        elif len(desk.running) < SERVED_MAX:
            self._begin(peer, link, desk, call)
        elif len(desk.waiting) < WAITING_MAX:
            desk.waiting.append(call)
        else:
            self._count("overloaded")
            error = Overloaded(f"node {self.me} has {SERVED_MAX + WAITING_MAX} calls of node {peer} to answer")
            self._send(peer, link, {"t": "error", "c": call_id, "e": [error.code, error.message]})

    def _begin(self, peer: str, link: Link, desk: _Desk, call: _Served) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._answer(peer, link, call), name=f"call {call.method} of {peer}")
        timer = loop.call_at(call.until_s, task.cancel)
        desk.running[call.call_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            timer.cancel()
            self._ending.discard(task)
            del desk.running[call.call_id]
            while desk.waiting and len(desk.running) < SERVED_MAX:
                following = desk.waiting.popleft()
                if following.until_s > loop.time():
                    self._begin(peer, link, desk, following)

        task.add_done_callback(ended)

    async def _answer(self, peer: str, link: Link, call: _Served) -> None:
        """Serve the call and send what came of it; sends nothing when cancelled, as nobody waits any more."""
        blobs: Sequence[Blob] = ()
        try:
            answer, blobs = await self._run(peer, call.method, call.arguments, call.blobs)
            header: dict[str, Any] = {"t": "reply", "c": call.call_id, "a": answer}
        except AnnulusError as error:
            header = {"t": "error", "c": call.call_id, "e": [error.code, error.message]}
            let_go(error)
        try:
            while not self._send_call(peer, link, header, blobs):  # noqa: ASYNC110  (no seam tells of room)
                await asyncio.sleep(ROOM_LOOK_S)
        except (BadFrame, cbor2.CBOREncodeError, ValueError, TypeError):
            log.exception("answer cannot be sent method=%s peer=%s", call.method, peer)
            text = f"{call.method} on node {self.me} has an answer that cannot be sent; its log says why"
            self._send(peer, link, {"t": "error", "c": call.call_id, "e": [AnnulusError.code, text]})

    def _on_cancel(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        desk, call_id = self._desks.get((peer, link)), header.get("c")
        if desk is None or type(call_id) is not int:
            return
        if (task := desk.running.get(call_id)) is not None:
            task.cancel()
        desk.waiting = deque(call for call in desk.waiting if call.call_id != call_id)

    def _on_reply(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        answer = header.get("a")
        if type(answer) is not dict:
            self._refuse(peer, "malformed", "a reply without an answer")
        elif (waiting := self._find_waiting(peer, header)) is not None:
            waiting.succeed(answer, blobs)

    def _on_error(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        match header.get("e"):
            case [str(code), str(message)]:
                if (waiting := self._find_waiting(peer, header)) is not None:
                    waiting.raise_(error_from(code, message))
            case _:
                self._refuse(peer, "malformed", "an error without code and message")

    def _find_waiting(self, peer: str, header: dict[str, Any]) -> _Outstanding | None:
        """Return the call that the frame answers; None if nobody waits any more, or the call went to another peer."""
        call_id = header.get("c")
        waiting = self._outstanding.get(call_id) if type(call_id) is int else None
        return waiting if waiting is not None and waiting.peer == peer else None

    # helpers

    def _send(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[Blob] = ()) -> bool:
        return self._network.send(peer, link, {"s": self._hybrid.stamp(), **header}, blobs)

    def _send_call(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[Blob]) -> bool:
        """Send as soon as the link has room for calls; False if it has none now."""
        if self._network.queued_bytes(peer, link) > CALL_QUEUE_BYTES_MAX:
            return False
        return self._send(peer, link, header, blobs)

    def _close_desk(self, peer: str, link: Link) -> None:
        if (desk := self._desks.pop((peer, link), None)) is not None:
            self._ending |= desk.close()

    def _count(self, reason: str) -> None:
        self.refused[reason] += 1
        self._on_refused(reason)

    def _refuse(self, peer: str, reason: str, text: str) -> None:
        self._count(reason)
        if (peer, reason) not in self._said:
            self._said.add((peer, reason))
            log.warning("refused peer=%s reason=%s (%s)", peer, reason, text)


class _Inbox:
    """The mesh as the network sees it."""

    def __init__(self, mesh: Mesh) -> None:
        self.on_session = mesh.session_changed
        self.on_message = mesh.message_came
        self.on_bulk_lost = mesh.bulk_lost


@dataclass(frozen=True)
class _Served:
    """A call that a peer made."""

    call_id: int
    method: str
    arguments: dict[str, Any]
    blobs: Sequence[memoryview]
    until_s: float


@dataclass
class _Desk:
    """The calls of one peer, link and session that are served."""

    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    waiting: deque[_Served] = field(default_factory=deque)

    def close(self) -> set[asyncio.Task[None]]:
        """Begin nothing more; return the tasks, cancelled, that have yet to end."""
        self.waiting.clear()
        for task in self.running.values():
            task.cancel()
        return set(self.running.values())


@dataclass
class _Outstanding:
    """A call of ours."""

    peer: str
    link: Link
    answer: asyncio.Future[tuple[dict[str, Any], Sequence[memoryview]]]
    is_answered: bool = False
    """By the peer, so that it need not be told when we stop waiting."""

    def succeed(self, answer: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        self.is_answered = True
        if not self.answer.done():
            self.answer.set_result((answer, blobs))

    def raise_(self, error: AnnulusError) -> None:
        self.is_answered = True
        if not self.answer.done():
            self.answer.set_exception(error)

    def fail(self, text: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(PeerUnreachable(text))

    def forget(self) -> None:
        """Let asyncio know that nobody will look at the answer."""
        with contextlib.suppress(asyncio.CancelledError):
            if not self.answer.cancel():
                self.answer.exception()
