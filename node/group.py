"""The shell around one replica of a Raft group and its state machine: proposals in, acknowledged outcomes out.

The group is ticked when it has something to do (a proposal, a message, bytes that became durable, its own timer), never
on a fixed period. Committed entries are applied in slices, so that replaying a long log never holds the loop for long.
An entry that needs chunks is applied once they are here (`provision`): what follows it waits, Raft itself does not.

Service time. A leader tells its followers [T, P]: no entry with a tick at or below T has a position above P. It may say
so of a T that a majority has in its clocks, once an entry of its own term is committed, and of the P at which its log
ends just then: every later entry, its own or of a later leader, which hears those clocks in its election, is stamped
above T. A replica that has applied P has
therefore applied everything up to T, also on a shard on which nothing is written. (Spec: streaming, 3.6 and I-TT-11.)

Generations. The members of a Raft group never change. A `Handover` is its last entry: once it is applied the group is
over here, and `reopen` goes on with the group of the next generation, on the same state. Who has led to the end goes
on leading if the handover names it first; otherwise there is an election. Whoever has something to propose meanwhile
waits (`settle`) rather than tries again. (Spec: raft, section 4.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from cluster.machine import Acknowledge, Generation, Outcome, Rejected, StateMachine
from cluster.membership import generation_of
from cluster.message import (
    Body,
    Compacted,
    CompareState,
    Delete,
    Entry,
    Flushed,
    Handover,
    Indexed,
    Insert,
    Message,
    Seal,
)
from cluster.raft import (
    BarrierFailed,
    BarrierPassed,
    BecameLeader,
    Behind,
    Committed,
    LostLeadership,
    NotLeader,
    RaftEvent,
    RaftGroup,
)
from cluster.tick import HybridClock
from node.clock import Clock
from storage.errors import NoLeader, RequestTimeout
from storage.types import Position, Tick

log = logging.getLogger(__name__)

SLICE_BYTES: Final = 4 << 20
"""Bytes of entries applied before other work gets its turn: about 5 ms of inserts."""
NOTES_MAX: Final = 16
"""Service times of the leader kept until they are reached; with more the newest replaces the one before it."""

CLIENT_MESSAGES: Final = (Insert, Delete, Seal)
PROVIDED_MESSAGES: Final = (Flushed, Indexed, Compacted)
"""Messages whose chunks must be here before they are applied."""

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


class Applied(NamedTuple):
    """What became of a proposal: its first outcome, and where its (last) entry stands."""

    outcome: Outcome
    tick: Tick
    position: Position


class GroupHost(Generic[Machine]):
    """Runs one replica on the loop. A snapshot replaces `machine`: nobody keeps it across an await.

    on_applied   called after each slice of applied entries
    on_fatal     called with a fault after which this replica cannot go on
    on_role      called with True when this replica begins to lead, with False when it no longer does
    on_over      called when the group has had its last entry, or a snapshot of a later generation was installed
    on_behind    called when the leader's log no longer begins where this replica ends; it needs a snapshot
    provision    brings the chunks that a message names before it is applied
    """

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
        on_behind: Callable[[Behind], None] | None = None,
        on_over: Callable[[], None] | None = None,
        on_role: Callable[[bool], None] | None = None,
        provision: Callable[[Message], Awaitable[None]] | None = None,
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
        self._on_behind = on_behind
        self._on_over = on_over
        self._on_role = on_role
        self._provision = provision
        self._waiting: dict[tuple[str, int], asyncio.Future[Applied]] = {}
        self._clients: set[asyncio.Future[Applied]] = set()
        """Those of `_waiting` for whom a client waits; the others go on by themselves, however late."""
        self._barriers: dict[int, asyncio.Future[Position]] = {}
        self._barrier_count = 0
        self._progress = asyncio.Event()
        """Set, and replaced, whenever this replica has applied something, or learnt a service time or who leads."""
        self._backlog: deque[Committed | BecameLeader] = deque()
        """What Raft has delivered and is not applied yet, because the first of it waits for chunks."""
        self._providing: asyncio.Task[None] | None = None
        self._notes: deque[tuple[Tick, Position]] = deque()
        self._known_leader: str | None = None
        self._service_tick = Tick(0)
        self._scheduled: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.is_over = False
        """Whether another generation goes on: nothing more is said or applied in this one."""
        self.last_term = 0
        """The term of the last entry of the generation that is over."""
        self.begun: Generation | None = None
        """The generation that this replica has ended the one before for, as the leader whose term that entry is of."""
        self.is_whole = not raft.peers
        """Whether this replica has once had everything that its leader had; until then it answers no reads."""
        self.led = asyncio.Event()
        """Set while this replica leads; by then it has applied everything that was committed before its term."""
        self._follows = asyncio.Event()
        """Set while it does not."""
        self._follows.set()
        self.on_compare: Callable[[Position], None] = lambda position: None
        """Called when a `CompareState` at this position was applied, before anything else is."""
        self._suspended = False
        raft.note, raft.on_note = self._note, self._take_note

    def start(self) -> None:
        self.poke()

    @property
    def generation(self) -> int:
        return generation_of(self.raft.group_id)

    def reopen(self, raft: RaftGroup) -> None:
        """Go on with the group of the generation that this state is of, or with a vote in the same one."""
        assert self.is_over and generation_of(raft.group_id) >= self.generation, "one generation after the other"
        self.raft, self.is_over = raft, False
        raft.note, raft.on_note = self._note, self._take_note
        self._notes.clear()
        self._backlog.clear()
        self.poke()

    def stop(self) -> None:
        """Stop ticking; whoever still waits is told that the outcome is unknown."""
        self._stopped = True
        for handle in (self._scheduled, self._timer):
            if handle is not None:
                handle.cancel()
        if self._providing is not None:
            self._providing.cancel()
        self._answer_all(f"{self.name} stops; whether the write was kept is not known")

    async def hand_over(self, within_s: float) -> None:
        """Return once another replica has been asked to lead, if there is one that can; or when time is up."""
        if self.led.is_set() and self.raft.transfer():
            self.poke()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._follows.wait()

    def answer_unknown(self, why: str) -> None:
        """Tell the clients that wait for a write that it may still be made, but not soon."""
        for waiter in self._clients:
            if not waiter.done():
                waiter.set_exception(
                    RequestTimeout(f"{why}: the change may still be made when there is room, look before repeating it")
                )

    def poke(self) -> None:
        """Tick soon. Pokes before that are one."""
        if self._scheduled is None and not self._stopped and not self.is_over:
            self._scheduled = asyncio.get_running_loop().call_soon(self._pump)

    def on_durable(self) -> None:
        if self.is_over:
            return
        self.raft.on_durable()
        self.poke()

    def receive(self, peer: str, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        """Take a message of another replica."""
        if not self._stopped and not self.is_over:
            self.raft.receive(peer, header, blobs)
            self.poke()

    def session(self, peer: str, up: bool) -> None:
        """A peer can be reached from now on, or no more."""
        if not self._stopped:
            self.raft.session(peer, up)
            self.poke()

    def trim(self, position: Position) -> None:
        """Let go of the log up to a position that a durable checkpoint covers."""
        self.raft.trim(position)
        self._kick_journal()

    # what callers ask for

    @property
    def applied_term(self) -> int:
        """The term of the last entry that was applied here."""
        if self.is_over:
            return self.last_term
        log = self.raft.log
        return log.term_at(max(self.machine.position, log.base_position))

    @property
    def is_leader(self) -> bool:
        return self.led.is_set()

    @property
    def leader(self) -> str | None:
        """Name of the node that leads as far as is known here."""
        return None if self.is_over else self.raft.leader

    async def propose(self, message: Message, body: Body = b"", *, producer: str = "", sequence: int = 0) -> Applied:
        """Return the outcome once the message is durable on a majority and applied here.

        Without a producer the write is named by this process. Raises NoLeader if this replica does not lead, or no
        longer did before the outcome was known; repeating with the same producer and sequence is then safe, here or
        at the next leader.
        """
        if not producer:
            producer, sequence = self._producer.name, self._producer.next()
        if self._stopped or self.is_over:
            raise NoLeader(f"{self.name} is stopping, or moving")
        who = (producer, sequence)
        waiter = self._waiting.get(who)
        if waiter is None:
            payload = Entry(producer, sequence, self._hybrid.stamp(), message, body).encode()
            if isinstance(message, Handover):
                self.raft.close(payload)
            else:
                self.raft.propose(payload)
            waiter = self._waiting[who] = asyncio.get_running_loop().create_future()
            waiter.add_done_callback(lambda done: self._forget_waiter(who, done))
            self.poke()
        if isinstance(message, CLIENT_MESSAGES):
            self._clients.add(waiter)
        return await asyncio.shield(waiter)

    async def change(
        self, message: Message, body: Body = b"", *, producer: str = "", sequence: int = 0
    ) -> dict[str, object]:
        """Propose, and raise the error if the message was rejected."""
        applied = await self.propose(message, body, producer=producer, sequence=sequence)
        if isinstance(applied.outcome, Rejected):
            raise applied.outcome.error()
        return dict(applied.outcome)

    async def barrier(self) -> Position:
        """Return a position: whoever has applied it sees every write acknowledged before this call.

        Raises NoLeader if this replica does not lead, or loses its leadership before it could make sure.
        """
        if self._stopped or not self.led.is_set() or self.raft.is_closing:
            raise NotLeader(self.raft.group_id, self.raft.leader)
        if not self.raft.peers:
            return self.machine.position  # what is acknowledged is applied here, and nobody else leads
        self._barrier_count += 1
        token = self._barrier_count
        self.raft.barrier(token)
        waiter: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        self._barriers[token] = waiter
        self.poke()
        try:
            return await waiter
        finally:
            self._barriers.pop(token, None)

    async def settle(self, within_s: float) -> None:
        """Return when it is known here who leads, and proposals are taken if it is this replica; or when time is up.

        They are not between the last entry of a generation and the next one, while the leadership is transferred, and
        from an election to the first entry of the new term.
        """
        if not self._is_unsettled:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._is_unsettled:
                    await self._progress.wait()

    @property
    def _is_unsettled(self) -> bool:
        if self._stopped:
            return False
        if self.is_over:
            return self.raft.me in self.machine.generation.members
        if self.led.is_set():
            return self.raft.is_closing or self.raft.successor is not None
        return self.raft.leader in (None, self.raft.me)

    async def wait_applied(self, position: Position) -> None:
        """Return when this replica has applied the log up to here."""
        while self.machine.position < position:
            await self._progress.wait()

    @property
    def service_tick(self) -> Tick:
        """The greatest tick up to which this replica has applied everything that there is or will be."""
        if self.led.is_set():
            self._service_tick = max(self._service_tick, self._led_tick())
        return max(self._service_tick, self.machine.tick)

    async def wait_service(self, tick: Tick) -> None:
        """Return when the service time has reached a tick."""
        while self.service_tick < tick:
            await self._progress.wait()

    def install(self, machine: Machine, term: int) -> None:
        """Go on from a snapshot: `machine` is as its durable checkpoint has it, whose last entry is of this term.

        Nothing happens if this replica has come as far by itself. One that is suspended takes any that is as new.
        """
        if machine.position < self.machine.position + (not self._suspended):
            return
        self._suspended = False
        if self._providing is not None:
            self._providing.cancel()
            self._providing = None
        # Raft delivers nothing twice, and may have delivered more than the snapshot covers.
        self._backlog = deque(
            one for one in self._backlog if isinstance(one, BecameLeader) or one.position > machine.position
        )
        self.machine = machine
        self._hybrid.observe(machine.tick)
        if not self._end_generation(term):
            self.raft.install(machine.position, term)
        self._moved()
        self.poke()

    def suspend(self) -> None:
        """Apply nothing more and answer no reads: this state cannot be trusted. `install` of another one ends that."""
        self._suspended, self.is_whole = True, False
        if self._providing is not None:
            self._providing.cancel()
            self._providing = None

    # inside

    def _end_generation(self, term: int) -> bool:
        """Leave the group if the state is of a later one; return whether it was left.

        A learner leaves its group too when the state makes it a member. `term` is that of the last applied entry.
        """
        state, raft = self.machine.generation, self.raft
        joins = raft.is_learner and state.number == self.generation and raft.me in state.members
        if self.is_over or not (state.number > self.generation or joins):
            return False
        log.info("generation over group=%s generation=%d next=%d", self.name, self.generation, state.number)
        self.is_over, self.last_term = True, term
        self._backlog.clear()
        self._lead(False)
        self._answer_all(f"{self.name} moves; whether the write was kept is not known")
        if self._timer is not None:
            self._timer.cancel()
        if self._on_over is not None:
            asyncio.get_running_loop().call_soon(self._on_over)
        return True

    def _pump(self) -> None:
        self._scheduled = None
        if self.is_over:
            return
        try:
            applied = self._tick()
        except BaseException as error:
            self._on_fatal(error)
            return
        self._kick_journal()
        if applied:
            self._on_applied()

    def _tick(self) -> bool:
        """Let Raft work, apply what can be applied; return whether anything was."""
        self._take(self.raft.tick(max_bytes=0 if self._backlog else SLICE_BYTES))
        applied = self._providing is None and not self._suspended and self._apply_backlog()
        if not self._backlog and not self.is_over and self.machine.position < self.raft.delivered:
            # Raft's own entries are passed over without a trace, but a checkpoint must cover them too.
            self.machine.position = self.raft.delivered
            applied = True
        if applied or self._known_leader != self.raft.leader:
            self._known_leader = self.raft.leader
            self._moved()
        if not self.is_over:
            self._set_timer()
        return applied

    def _take(self, events: Sequence[RaftEvent]) -> None:
        for event in events:
            match event:
                case Committed() | BecameLeader():
                    self._backlog.append(event)
                case LostLeadership(term):
                    log.info("lost leadership group=%s term=%d", self.name, term)
                    self._lead(False)
                    # A leadership that was won by an entry of the backlog is lost with it.
                    self._backlog = deque(one for one in self._backlog if not isinstance(one, BecameLeader))
                    self._answer_all(f"{self.name} lost its leadership; whether the write was kept is not known")
                case BarrierPassed(token, position):
                    if (waiter := self._barriers.get(token)) is not None and not waiter.done():
                        waiter.set_result(Position(position))
                case BarrierFailed(token):
                    if (waiter := self._barriers.get(token)) is not None and not waiter.done():
                        waiter.set_exception(NotLeader(self.raft.group_id, self.raft.leader))
                case Behind():
                    self.is_whole = False
                    if self._on_behind is not None:
                        self._on_behind(event)

    def _lead(self, leads: bool) -> None:
        if leads == self.led.is_set():
            return
        now, before = (self.led, self._follows) if leads else (self._follows, self.led)
        before.clear()
        now.set()
        if self._on_role is not None:
            self._on_role(leads)

    def _apply_backlog(self) -> bool:
        applied = False
        while self._backlog:
            event = self._backlog[0]
            if isinstance(event, BecameLeader):
                log.info("leads group=%s term=%d", self.name, event.term)
                self.is_whole = True
                self._lead(True)
            else:
                entry = Entry.decode(event.payload)
                if (
                    self._provision is not None
                    and isinstance(entry.message, PROVIDED_MESSAGES)
                    and event.position > self.machine.position
                ):
                    self._providing = asyncio.get_running_loop().create_task(self._provide(event, entry))
                    return applied
                leads = self.raft.leads and self.raft.term == event.term
                self._apply(event.position, entry)
                if self._end_generation(event.term):
                    self.begun = self.machine.generation if leads else None
                    return True
            self._backlog.popleft()
            applied = True
        return applied

    def _apply(self, position: Position, entry: Entry) -> None:
        done = self.machine.apply(position, entry)
        if done is not None:
            self._hybrid.observe(done.tick)
            if isinstance(entry.message, CompareState):
                self.on_compare(position)
            self._resolve(done, position)

    async def _provide(self, event: Committed, entry: Entry) -> None:
        """Apply the first of the backlog once its chunks are here."""
        assert self._provision is not None
        try:
            await self._provision(entry.message)
            self._apply(event.position, entry)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._on_fatal(error)
            return
        self._backlog.popleft()
        self._providing = None
        self._moved()
        self._on_applied()
        self.poke()

    def _resolve(self, done: Acknowledge, position: Position) -> None:
        waiter = self._waiting.get((done.producer, done.sequence))
        if waiter is not None and not waiter.done():
            waiter.set_result(Applied(done.outcome, done.tick, position))

    def _forget_waiter(self, who: tuple[str, int], waiter: asyncio.Future[Applied]) -> None:
        del self._waiting[who]
        self._clients.discard(waiter)
        if not waiter.cancelled():
            waiter.exception()  # looked at, in case that nobody waits any more

    def _answer_all(self, why: str) -> None:
        for waiter in list(self._waiting.values()):
            if not waiter.done():
                waiter.set_exception(NoLeader(why))
        for barrier in list(self._barriers.values()):
            if not barrier.done():
                barrier.set_exception(NoLeader(why))

    # service time

    def _led_tick(self) -> Tick:
        """Return the service time of a leader."""
        if self.machine.position < self.raft.last_position or self.raft.in_flight_bytes:
            return self.machine.tick
        return Tick(self.raft.confirmed_stamp) if self.raft.peers else self._hybrid.stamp()

    def _note(self) -> list[int]:
        # Until an entry of its own is committed, an older one that it does not have might still come to be.
        # And after the last one, the next generation stamps.
        may_tell = self.raft.leads and not self.raft.is_closing
        return [self.raft.confirmed_stamp if may_tell else 0, self.raft.last_position]

    def _take_note(self, peer: str, note: Any) -> None:
        match note:
            case [int(tick), int(position)]:
                # A new leader's log may be shorter: what the lost one said of entries that never were, would wait.
                while self._notes and (self._notes[-1][1] >= position or len(self._notes) >= NOTES_MAX):
                    self._notes.pop()
                self._notes.append((Tick(tick), Position(position)))
                if position <= self.machine.position:
                    self._moved()

    def _moved(self) -> None:
        """Something was applied, or learnt about time or who leads: tell who waits for it."""
        while self._notes and self._notes[0][1] <= self.machine.position:
            tick, _ = self._notes.popleft()
            self._service_tick = max(self._service_tick, tick)
            self.is_whole = not self._suspended
        self._progress.set()
        self._progress = asyncio.Event()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s = self._clock.monotonic_s()
        delay_s = self.raft.next_deadline(now_s, delivering=not self._backlog) - now_s
        if delay_s <= 0:
            self.poke()
        elif delay_s != float("inf"):
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.poke)
