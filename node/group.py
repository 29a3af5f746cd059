"""The shell around one Raft group and its state machine: proposals in, acknowledged outcomes out.

The group is ticked when it has something to do (a proposal, bytes that became durable, its own timer), never on a
fixed period. Committed entries are applied in slices, so that replaying a long log never holds the loop for long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from cluster.machine import Acknowledge, Outcome, Rejected, StateMachine
from cluster.message import Delete, Entry, Insert, Message, Seal
from cluster.raft import BecameLeader, Committed, LostLeadership, RaftGroup
from cluster.tick import HybridClock
from node.clock import Clock
from storage.errors import NoLeader, RequestTimeout
from storage.types import Position, Tick

log = logging.getLogger(__name__)

SLICE_BYTES: Final = 4 << 20
"""Bytes of entries applied before other work gets its turn: about 5 ms of inserts."""

CLIENT_MESSAGES: Final = (Insert, Delete, Seal)

Machine = TypeVar("Machine", bound=StateMachine)


class Producer:
    """Names every write of this process, so that a shard can tell a repeat from a new write.

    `name` must never be used by another process, nor by this node after a restart.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._sequence = 0

    def next(self) -> int:
        self._sequence += 1
        return self._sequence


class GroupHost(Generic[Machine]):
    """Runs one group on the loop. `on_applied` is called after each slice of applied entries, `on_fatal` at a fault."""

    def __init__(
        self,
        name: str,
        raft: RaftGroup,
        machine: Machine,
        *,
        producer: Producer,
        hybrid: HybridClock,
        clock: Clock,
        kick_journal: Callable[[], None],
        on_applied: Callable[[], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self.machine = machine
        self.raft = raft
        self._producer = producer
        self._hybrid = hybrid
        self._clock = clock
        self._kick_journal = kick_journal
        self._on_applied = on_applied
        self._on_fatal = on_fatal
        self._waiting: dict[tuple[str, int], asyncio.Future[Outcome]] = {}
        self._clients: set[asyncio.Future[Outcome]] = set()
        """Those of `_waiting` for whom a client waits; the others go on by themselves, however late."""
        self._scheduled: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.is_leader = False
        self.led = asyncio.Event()
        """Set while this replica leads; by then it has applied everything that was committed before its term."""

    def start(self) -> None:
        self.poke()

    def stop(self) -> None:
        """Stop ticking; whoever still waits is told that the outcome is unknown."""
        self._stopped = True
        for handle in (self._scheduled, self._timer):
            if handle is not None:
                handle.cancel()
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(NoLeader(f"{self.name} stops; whether the write was kept is not known"))
        self._waiting.clear()

    def answer_unknown(self, why: str) -> None:
        """Tell the clients that wait for a write that it may still be made, but not soon."""
        for waiter in self._clients:
            if not waiter.done():
                waiter.set_exception(
                    RequestTimeout(f"{why}: the change may still be made when there is room, look before repeating it")
                )

    def poke(self) -> None:
        """Tick soon. Pokes before that are one."""
        if self._scheduled is None and not self._stopped:
            self._scheduled = asyncio.get_running_loop().call_soon(self._pump)

    def on_durable(self) -> None:
        self.raft.on_durable()
        self.poke()

    def trim(self, position: Position) -> None:
        """Let go of the log up to a position that a durable checkpoint covers."""
        self.raft.trim(position)
        self._kick_journal()

    async def propose(
        self, message: Message, body: bytes | memoryview = b"", *, producer: str = "", sequence: int = 0
    ) -> tuple[Outcome, Tick]:
        """Return the outcome once the message is durable and applied here.

        Without a producer the write is named by this process. Raises NoLeader if this replica does not lead, or
        stopped before the outcome was known; repeating with the same producer and sequence is then safe.
        """
        if not producer:
            producer, sequence = self._producer.name, self._producer.next()
        entry = Entry(producer, sequence, self._hybrid.stamp(), message, body)
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if self._stopped:
            raise NoLeader(f"{self.name} is stopping")
        self.raft.propose(entry.encode())
        self._waiting[producer, sequence] = waiter
        if isinstance(message, CLIENT_MESSAGES):
            self._clients.add(waiter)
        self.poke()
        try:
            outcome = await waiter
        finally:
            self._waiting.pop((producer, sequence), None)
            self._clients.discard(waiter)
        return outcome, self.machine.tick

    async def change(
        self, message: Message, body: bytes | memoryview = b"", *, producer: str = "", sequence: int = 0
    ) -> dict[str, object]:
        """Propose, and raise the error if the message was rejected."""
        outcome, _ = await self.propose(message, body, producer=producer, sequence=sequence)
        if isinstance(outcome, Rejected):
            raise outcome.error()
        return dict(outcome)

    def _pump(self) -> None:
        self._scheduled = None
        try:
            applied = self._tick()
        except BaseException as error:
            self._on_fatal(error)
            return
        self._kick_journal()
        if applied:
            self._on_applied()

    def _tick(self) -> bool:
        applied = 0
        for event in self.raft.tick(max_bytes=SLICE_BYTES):
            match event:
                case Committed(position, _, payload):
                    applied += 1
                    done = self.machine.apply(position, Entry.decode(payload))
                    if done is not None:
                        self._hybrid.observe(done.tick)
                        self._resolve(done)
                case BecameLeader(term):
                    log.info("leads group=%s term=%d", self.name, term)
                    self.is_leader = True
                    self.led.set()
                case LostLeadership(term):
                    log.info("lost leadership group=%s term=%d", self.name, term)
                    self.is_leader = False
                    self.led.clear()
        # Raft's own entries are passed over without a trace, but a checkpoint must cover them too.
        self.machine.position = self.raft.delivered
        self._set_timer()
        return applied > 0

    def _resolve(self, done: Acknowledge) -> None:
        waiter = self._waiting.get((done.producer, done.sequence))
        if waiter is not None and not waiter.done():
            waiter.set_result(done.outcome)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s = self._clock.monotonic_s()
        delay_s = self.raft.next_deadline(now_s) - now_s
        if delay_s <= 0:
            self.poke()
        elif delay_s != float("inf"):
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.poke)
