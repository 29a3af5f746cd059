"""The shell around a replica, driven by hand: a Raft that says what the test tells it to say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from math import inf
from typing import Any

import pytest

from cluster.machine import StateMachine
from cluster.membership import group_id
from cluster.message import Entry, Flushed, Handover, Insert, Message, Seal
from cluster.raft import BecameLeader, Committed, LostLeadership, RaftEvent
from cluster.tick import HybridClock
from node.group import GroupHost, Producer
from storage.errors import NoLeader
from storage.types import CollectionId, PartitionId, Position, SegmentId, Tick
from tests.sim.world import SimLoop, close, run


class ScriptedRaft:
    """As much of a RaftGroup as its host uses."""

    group_id = 1
    me, peers = "a", ("b", "c")
    leader: str | None = None
    successor: str | None = None
    is_learner = is_closing = False
    in_flight_bytes = 0

    def __init__(self) -> None:
        self.delivered = Position(0)
        self.last_position = Position(0)
        self.leads = False
        self.confirmed_stamp = 0
        self.events: list[RaftEvent] = []
        self.installed: list[int] = []
        self.note: Any = None
        self.on_note: Any = None

    def commit(self, *messages: Message) -> None:
        """Have these delivered at the next tick."""
        for message in messages:
            self.delivered = self.last_position = Position(self.delivered + 1)
            payload = Entry("p", self.delivered, Tick(self.delivered * 10), message, b"").encode()
            self.events.append(Committed(self.delivered, 1, payload))

    def tick(self, max_bytes: int) -> list[RaftEvent]:
        events, self.events = self.events, []
        return events

    def next_deadline(self, now: float, *, delivering: bool = True) -> float:
        return inf

    def install(self, position: int, term: int) -> None:
        if position > self.delivered:  # as the real one
            self.installed.append(position)
            self.delivered = self.last_position = Position(position)


class Recorder(StateMachine):
    """Remembers where it has executed something."""

    def __init__(self, position: int = 0) -> None:
        super().__init__()
        self.position, self.tick = Position(position), Tick(position * 10)
        self.executed: list[int] = []

    def _execute(self, message: Message, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        self.executed.append(self.position)
        return {}


class Clock:
    def monotonic_s(self) -> float:
        return 0.0

    def wall_ms(self) -> int:
        return 1


class Stand:
    """A host on its loop; what needs chunks waits until `chunks` is set."""

    def __init__(self) -> None:
        self.chunks = asyncio.Event()
        self.raft = ScriptedRaft()
        self.faults: list[BaseException] = []
        self.host: GroupHost[Any] = GroupHost(
            "s0",
            self.raft,  # type: ignore[arg-type]
            Recorder(),
            producer=Producer("me"),
            hybrid=HybridClock(lambda: 1),
            clock=Clock(),
            kick_journal=lambda: None,
            on_applied=lambda: None,
            on_fatal=self.faults.append,
            provision=lambda message: self._provide(),
        )

    async def _provide(self) -> None:
        await self.chunks.wait()

    def leads(self) -> bool:
        return self.host.is_leader

    async def settle(self) -> None:
        self.host.poke()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not self.faults


def on_a_stand(script: Any) -> None:
    loop = SimLoop()

    async def main() -> None:
        stand = Stand()
        await script(stand)
        stand.host.stop()

    try:
        run(loop, main())
    finally:
        close(loop)


WRITE = Insert(CollectionId(1), PartitionId(1))
SEAL = Seal(CollectionId(1), None)
FLUSHED = Flushed(CollectionId(1), SegmentId(1), {})


def test_a_snapshot_below_what_was_delivered_skips_nothing() -> None:
    """What was delivered and waited for chunks is applied on top of a snapshot that does not cover all of it."""

    async def script(stand: Stand) -> None:
        stand.raft.commit(WRITE, FLUSHED, WRITE, WRITE, WRITE)
        await stand.settle()
        assert stand.host.machine.position == 1
        stand.host.install(Recorder(3), 1)
        await stand.settle()
        assert (stand.host.machine.position, stand.host.machine.executed) == (5, [4, 5])

    on_a_stand(script)


def test_a_snapshot_takes_no_leadership_away() -> None:
    """A leadership that was won by an entry behind the snapshot is taken up all the same."""

    async def script(stand: Stand) -> None:
        stand.raft.commit(WRITE, FLUSHED, WRITE)
        stand.raft.events.append(BecameLeader(1))
        await stand.settle()
        assert not stand.leads()
        stand.host.install(Recorder(3), 1)
        await stand.settle()
        assert stand.leads()
        stand.raft.events.append(LostLeadership(1))
        await stand.settle()
        assert not stand.leads()

    on_a_stand(script)


def test_service_time_goes_on_after_a_leader_whose_log_was_longer() -> None:
    """A note that waits for entries of a lost leader does not hold up those of the next one, whose log is shorter."""

    async def script(stand: Stand) -> None:
        stand.raft.commit(WRITE)
        await stand.settle()
        stand.raft.on_note("b", [500, 9])
        assert stand.host.service_tick == 10
        stand.raft.on_note("c", [700, 1])
        assert stand.host.service_tick == 700

    on_a_stand(script)


def test_notes_that_wait_for_entries_count_when_these_are_applied() -> None:
    """Each note counts at its own position, none before."""

    async def script(stand: Stand) -> None:
        stand.raft.on_note("b", [100, 1])
        stand.raft.on_note("b", [200, 2])
        stand.raft.on_note("b", [300, 2])
        assert stand.host.service_tick == 0
        stand.raft.commit(WRITE)
        await stand.settle()
        assert stand.host.service_tick == 100
        stand.raft.commit(SEAL)
        await stand.settle()
        assert stand.host.service_tick == 300

    on_a_stand(script)


def test_whoever_has_something_to_propose_waits_until_it_is_settled_who_leads() -> None:
    """From an election to the first entry, while a leadership is transferred, and from the last entry of a generation
    to the next one; not where another leads, where this replica is to leave, or beyond its time."""

    async def script(stand: Stand) -> None:
        async def is_settled(within_s: float = 60.0) -> bool:
            waiting = asyncio.ensure_future(stand.host.settle(within_s))
            await stand.settle()
            if not waiting.done():
                waits.append(waiting)
            return waiting.done()

        async def goes_on() -> None:
            await stand.settle()
            assert waits and all(one.done() for one in waits)
            waits.clear()

        waits: list[asyncio.Future[None]] = []
        raft = stand.raft
        assert not await is_settled()
        raft.leader = "b"
        await goes_on()
        assert await is_settled()
        raft.leader = "a"
        assert not await is_settled()
        raft.events.append(BecameLeader(1))
        await goes_on()
        assert await is_settled()
        raft.successor = "b"
        assert not await is_settled()
        raft.successor, raft.leader = None, "b"
        raft.events.append(LostLeadership(1))
        await goes_on()
        raft.leader = "a"
        raft.events.append(BecameLeader(2))
        await stand.settle()
        raft.is_closing = True
        assert not await is_settled()
        raft.commit(Handover(1, ["a", "b"]))
        assert not await is_settled()
        stand.host.reopen(later := ScriptedRaft())  # type: ignore[arg-type]
        later.group_id, later.delivered = group_id(1, 1), raft.delivered
        assert not await is_settled()
        stand.raft, later.leader = later, "a"
        later.events.append(BecameLeader(3))
        await goes_on()
        later.commit(Handover(2, ["b", "c"]))
        assert await is_settled()
        later.is_closing = False
        with pytest.raises(NoLeader):
            await stand.host.propose(WRITE)

    on_a_stand(script)


def test_a_wait_for_a_leader_ends_when_its_time_is_up() -> None:
    async def script(stand: Stand) -> None:
        await stand.host.settle(0.25)
        assert asyncio.get_running_loop().time() >= 0.25

    on_a_stand(script)
