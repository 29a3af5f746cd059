"""One Raft group: what was decided, delivered in slices, and how to propose, read, hand over and catch up.

PySyncObj (`raft_core.py`) decides who leads and what is committed. It counts an entry as its own the moment it adds it,
long before any fsync. So *committed* there means only "committed if our disk keeps it", and an entry is delivered here
when it is committed there AND durable here, read from the journal in slices of a size that the caller chooses.

An entry is the caller's bytes as they are. The empty entry is PySyncObj's no-op, which every leader writes first; it is
not delivered, but the leader's own one is the moment at which it has delivered everything older, and `BecameLeader` is
delivered in its place. Until then it takes no proposals: it does not know yet what its log says. The first leader of a
group that goes on from another knows that the log says nothing yet, and takes them at once (`lead_first`).

The log begins at position 1, a root that every replica has and nobody stores; the first entry is 2.

With peers, a guard (`raft_guard.py`) stands between PySyncObj and the wire and makes each replica a correct Raft peer;
what PySyncObj would send to followers is sent by it too (`raft_leader.py`), from the journal. A group of one voter has
no guard, and nobody to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from cluster.raft_core import core_of
from cluster.raft_guard import Dice, Guard, Transport
from cluster.raft_leader import ALMOST_S, PeerProgress
from cluster.raft_wire import ROOT, Blob
from storage.errors import JournalDamaged, NoLeader, Overloaded, StorageFault
from storage.journal import GroupLog, HardState
from storage.types import Position

SLICE_BYTES: Final = 4 << 20
ENTRY_COST_BYTES: Final = 200
"""What an event costs in memory beside its payload, so that a slice of tiny entries is bounded too."""


@dataclass(frozen=True, slots=True)
class Committed:
    """An entry that the group has decided on, and that is durable here. In order, without gaps but for no-ops."""

    position: Position
    term: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class BecameLeader:
    """This replica leads, and everything that earlier leaders committed has been delivered.

    It takes proposals from now on, and none before.
    """

    term: int


@dataclass(frozen=True, slots=True)
class LostLeadership:
    """This replica led in `term` and no longer does. What it proposed may or may not be delivered later."""

    term: int


@dataclass(frozen=True, slots=True)
class BarrierPassed:
    """A replica that has applied `position` sees every write that was acknowledged before the barrier was asked for."""

    token: int
    position: Position


@dataclass(frozen=True, slots=True)
class BarrierFailed:
    """The leadership ended first."""

    token: int


@dataclass(frozen=True, slots=True)
class Behind:
    """The leader no longer has the entries that this replica needs: get a checkpoint at or above `position`."""

    leader: str
    position: Position
    term: int
    """The term of the entry at `position`."""


RaftEvent = Committed | BecameLeader | LostLeadership | BarrierPassed | BarrierFailed | Behind


class NotLeader(NoLeader):
    """The proposal was not made: this replica does not lead."""

    def __init__(self, group_id: int, leader: str | None) -> None:
        hint = f"{leader} does" if leader is not None else "the leader is not known yet"
        super().__init__(f"this node does not lead group {group_id}; {hint}")
        self.group_id, self.leader = group_id, leader


@dataclass(frozen=True)
class RaftConfig:
    """Times in seconds of the caller's clock."""

    heartbeat_s: float = 0.15
    """A leader with nothing to say says so this often."""
    election_s_min: float = 0.6
    """A follower that has heard nothing for this long, plus a random part, campaigns; leases are a bit shorter."""
    election_s_max: float = 1.0
    """A leader that no quorum has answered for this long steps down."""
    in_flight_bytes_max: int = 64 << 20
    """Proposals beyond this wait in memory for the disk or for peers; more are refused."""

    def __post_init__(self) -> None:
        # PySyncObj's own rule (config.py, validate).
        if not 0 < 3 * self.heartbeat_s < self.election_s_min < self.election_s_max:
            raise ValueError(f"3 * heartbeat_s < election_s_min < election_s_max does not hold: {self}")


class RaftGroup:
    """One replica of one Raft group. Belongs to the loop; never blocks but to read old entries from the journal.

    Drive it: `tick` when `next_deadline` is reached, after `propose`, `barrier`, `transfer`, `receive`, `session`,
    and after `on_durable`; then let the journal write. Nothing happens between ticks: an idle group costs heartbeats.

    Invariants
      1. `delivered` never decreases, and delivered entries are committed and durable here.
      2. BecameLeader(term) is delivered at most once per term, over all replicas and restarts.
    """

    def __init__(
        self,
        group_id: int,
        me: str,
        peers: Sequence[str],
        log: GroupLog,
        *,
        applied: int,
        clock: Callable[[], float],
        rng: Dice,
        config: RaftConfig | None = None,
        transport: Transport | None = None,
        stamp: Callable[[], int] = lambda: 0,
        abstains: int = 0,
        is_learner: bool = False,
        committed: int = 0,
    ) -> None:
        """Open the group on its log.

        peers         names of the other voters
        transport     how to reach them, and learners; none for a group that is and stays one replica
        applied       position up to which the caller's own checkpoint holds everything; 0 for none
        clock         monotonic seconds
        stamp         for `confirmed_stamp`
        abstains      position that the log must have reached before this replica takes part in elections: it forgot
                      what it had voted for and confirmed, all of which is at or below
        is_learner    follow, without a vote
        committed     position up to which the group is known to have decided, if the log reaches so far
        Raises JournalDamaged if log and checkpoint do not meet.
        """
        if me in peers or (peers and transport is None):
            raise ValueError(f"group {group_id} of {me} with peers {list(peers)} and transport {transport}")
        self.group_id, self.me, self.peers = group_id, me, tuple(peers)
        self.config = config or RaftConfig()
        self._log = log
        self._clock, self._stamp = clock, stamp
        if log.last_position == 0:
            log.reset(ROOT, 0)
        if max(applied, ROOT) < log.base_position:
            raise JournalDamaged(
                f"the log of group {group_id} begins after {log.base_position}, its checkpoint covers only {applied}: "
                "the entries between are gone."
            )
        if applied > log.last_position:
            raise JournalDamaged(
                f"the log of group {group_id} ends at {log.last_position}, but its checkpoint covers {applied}: "
                "the journal has lost its end."
            )
        self._delivered = Position(max(applied, ROOT))
        self._leading_term: int | None = None
        self._in_flight_bytes = 0
        self._due = True
        # Whatever is in a lone voter's log was committed when it became durable: nobody can have decided otherwise.
        # PySyncObj would find that out entry by entry in its first tick, and block the loop for seconds. With peers
        # only the checkpoint is known to be committed.
        known = max(self._delivered, min(committed, log.last_position)) if peers else log.last_position
        times = {
            "heartbeat_s": self.config.heartbeat_s,
            "election_s_min": self.config.election_s_min,
            "election_s_max": self.config.election_s_max,
        }
        self._core = core_of(me, peers, log, committed=known, clock=clock, rng=rng, **times)
        self._guard: Guard | None = None
        if transport is not None:
            self._guard = self._core.guard = Guard(
                group_id,
                me,
                peers,
                log,
                self._core,
                transport,
                clock=clock,
                rng=rng,
                stamp=stamp,
                abstains=abstains,
                is_learner=is_learner,
                **times,
            )
        self._is_learner = is_learner
        self.is_closing = False
        """Whether the last entry of this leadership, and of the group, was proposed."""
        self._leads_first = False
        """Whether this replica leads in a log in which nobody can have led before; to be told."""
        self._passed: list[RaftEvent] = []
        self._fault: StorageFault | None = None

    # ---- what callers see

    @property
    def log(self) -> GroupLog:
        return self._log

    @property
    def is_learner(self) -> bool:
        """Whether this replica follows without a vote."""
        return self._is_learner

    @property
    def delivered(self) -> Position:
        """Position of the last entry that was delivered or covered by the checkpoint."""
        return self._delivered

    @property
    def leads(self) -> bool:
        """Whether proposals are taken."""
        return self._leading_term is not None

    @property
    def term(self) -> int:
        return int(self._core.raftCurrentTerm)

    @property
    def leader(self) -> str | None:
        """Name of the node that leads as far as is known here; a leader that has fallen silent is none."""
        if self._guard is not None and not self._guard.hears_leader:
            return None
        return self._core.leader

    @property
    def successor(self) -> str | None:
        """The peer that this leadership is being transferred to; no proposals are taken meanwhile."""
        lead = None if self._guard is None else self._guard.leadership
        return None if lead is None else lead.transfer_to

    @property
    def last_position(self) -> Position:
        """Position of the last entry of the log, committed or not."""
        return self._log.last_position

    @property
    def committed(self) -> Position:
        """Position up to which the group has decided, as far as is known here."""
        return Position(self._core.commit)

    @property
    def remembers(self) -> bool:
        """Whether this replica never lost its votes and its log, or has got back what they stood for."""
        return self._guard is None or self._guard.remembers

    @property
    def is_new(self) -> bool:
        """Whether this replica has never voted, nor heard of a leader, as far as it knows."""
        return self.term == 0 and self._log.last_term == 0

    @property
    def confirmed_stamp(self) -> int:
        """The greatest stamp that was sent in this leadership and that a quorum has answered; 0 if this is no leader.

        A quorum's clocks have passed it, so whoever leads next will stamp later. Alone, it is a fresh stamp.
        """
        if self._leading_term is None:
            return 0
        if self._guard is None:
            return self._stamp()
        return 0 if self._guard.leadership is None else self._guard.leadership.confirmed_stamp

    @property
    def note(self) -> Callable[[], Any] | None:
        """What a leader sends along with appends and heartbeats; a small value that CBOR can carry, or None."""
        return None if self._guard is None else self._guard.note

    @note.setter
    def note(self, note: Callable[[], Any] | None) -> None:
        if self._guard is not None:
            self._guard.note = note

    @property
    def on_note(self) -> Callable[[str, Any], None] | None:
        """Called with the leader's name and note when one comes in. It is whatever the peer sent."""
        return None if self._guard is None else self._guard.on_note

    @on_note.setter
    def on_note(self, on_note: Callable[[str, Any], None] | None) -> None:
        if self._guard is not None:
            self._guard.on_note = on_note

    @property
    def refused(self) -> int:
        """How many messages from peers made no sense."""
        return 0 if self._guard is None else self._guard.refused

    def progress(self) -> list[PeerProgress]:
        """Return what a leader knows of each follower; nothing if this is no leader."""
        lead = None if self._guard is None else self._guard.leadership
        return [] if lead is None else lead.progress()

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that were proposed here and not delivered yet."""
        return self._in_flight_bytes

    def propose(self, payload: bytes) -> None:
        """Propose an entry; it is delivered as Committed if all goes well. Nothing is promised before that.

        Raises NotLeader, or Overloaded if too much is under way; then the proposal was not made.
        """
        if not payload:
            raise ValueError("an entry has at least one byte; the empty one is Raft's own")
        if self._leading_term is None or self.is_closing:
            raise NotLeader(self.group_id, self.leader)
        if self.successor is not None:
            raise NotLeader(self.group_id, self.successor)
        if self._in_flight_bytes and self._in_flight_bytes + len(payload) > self.config.in_flight_bytes_max:
            raise Overloaded(f"group {self.group_id} has {self._in_flight_bytes} bytes under way; try again shortly")
        self._in_flight_bytes += len(payload)
        self._core.proposals.append(payload)
        self._wake()

    def close(self, payload: bytes) -> None:
        """Propose the group's last entry. From now on this leadership takes no other, and makes no promise to readers:
        once the entry is committed, another group goes on with other members. Raises NotLeader.
        """
        self.propose(payload)
        self.is_closing = True
        if self._guard is not None and self._guard.leadership is not None:
            self._guard.leadership.end_lease()

    def set_learners(self, names: Sequence[str]) -> None:
        """Let these nodes follow beside the voters, whenever this replica leads."""
        if self._guard is not None:
            self._guard.set_learners(names)
            self._due = True

    def campaign(self) -> None:
        """Stand for election at once: there is no leader whom the others should protect."""
        if self._guard is not None:
            self._guard.campaign()
        self._due = True

    def lead_first(self) -> bool:
        """Lead in the first term of a group that goes on from another, without asking for votes; False if it may not.

        Nothing can have been decided in the group before that term, so proposals are taken from the next tick on, which
        says BecameLeader. Whoever leads in a later term already will tell this replica so, and decides nothing with it.

        All members open the group with their votes in that term given to its heir (`begin_log_at`). The caller sees to
        it that the heir does this once in all its lives: it does if, in this life, it has led the other group in the
        term of that one's last entry.
        """
        is_heir = self._log.hard_state == HardState(self._log.last_term + 1, self.me)
        is_first = self._log.last_position == self._delivered
        if not (self.peers and is_heir and is_first and self.remembers) or self._guard is None:
            return False
        self._core.enter()
        self._guard.lead()
        self._leads_first = self._due = True
        return True

    def barrier(self, token: int) -> None:
        """Ask for a BarrierPassed, by lease or by a round of messages to a quorum; BarrierFailed comes if it cannot be.

        Raises NotLeader.
        """
        if self._leading_term is None or self._leading_term != self._led_term() or self.is_closing:
            raise NotLeader(self.group_id, self.leader)
        # An entry of this term is committed, or there was no earlier leader: the commit index covers whatever any has
        # acknowledged.
        position = Position(self._core.commit)
        if self._guard is None:
            self._passed.append(BarrierPassed(token, position))
        else:
            assert self._guard.leadership is not None
            self._guard.leadership.begin_barrier(token, position)
        self._due = True

    def transfer(self, to: str | None = None) -> bool:
        """Begin to hand the leadership to a peer, the most advanced one unless named; False if there is none.

        Proposals are refused from now on, until LostLeadership comes or an election timeout has passed in vain.
        """
        lead = None if self._guard is None else self._guard.leadership
        if lead is None or self._leading_term is None:
            return False
        able = [peer for peer in lead.progress() if peer.is_up and peer.votes and to in (None, peer.name)]
        if not able:
            return False
        lead.begin_transfer(max(able, key=lambda peer: peer.match).name, self._clock() + self.config.election_s_max)
        self._wake()
        return True

    def receive(self, peer: str, header: Mapping[str, Any], blobs: Sequence[Blob]) -> None:
        """A message has come from a peer. One that makes no sense is counted in `refused`; a fault is for `tick`."""
        if self._guard is not None and self._fault is None:
            self._core.enter()
            try:
                self._guard.receive(peer, header, blobs)
            except StorageFault as fault:
                self._fault = fault
            self._due = True

    def session(self, peer: str, up: bool) -> None:
        """A session with a node has begun, or has ended and took with it what was under way."""
        if self._guard is not None:
            self._guard.session(peer, up)
            self._due = True

    def install(self, position: int, term: int) -> None:
        """A durable checkpoint of the caller covers everything up to `position`, whose entry is of `term`.

        The log goes on from there, or stays if it holds that entry. Does nothing if that much was delivered already.
        """
        if position <= self._delivered:
            return
        assert self._guard is not None, "a lone voter has nobody to get a checkpoint from"
        self._core.enter()
        keeps_log = _holds(self._log, position, term)
        if not keeps_log:
            if self._core.is_leader or term > self._core.term:
                # A leader without that entry is none any more, though it has not heard so.
                self._core.adopt(self._core.peers[0], max(term, self._core.term + self._core.is_leader))
            self._log.reset(position, term)
        self._core.settle(position)
        self._delivered = Position(position)
        self._guard.on_install(keeps_log)
        self.trim(position)
        self._wake()

    def tick(self, max_bytes: int = SLICE_BYTES) -> list[RaftEvent]:
        """Let Raft work and return what happened, about `max_bytes` of it; `next_deadline` tells if there is more.

        Raises StorageFault if an entry cannot be read back, if the journal has halted, or if this log contradicts what
        the group has committed; the replica must then stop.
        """
        if self._fault is not None:
            raise self._fault
        self._core.enter()
        guard = self._guard
        if guard is None:
            self._core.doTick(0.0)
        else:
            self._decide(guard)
            guard.speak()
        self._due = False
        events: list[RaftEvent] = []
        if self._leading_term is not None and self._leading_term != self._led_term():
            events.append(LostLeadership(self._leading_term))
            self._leading_term, self._in_flight_bytes, self.is_closing = None, 0, False
        if self._leads_first:
            self._leads_first = False
            if (led_term := self._led_term()) is not None:
                self._leading_term = led_term
                events.append(BecameLeader(led_term))
        self._deliver(events, max_bytes)
        if guard is not None:
            self._take_news(guard)
        if self._passed:
            events += self._passed
            self._passed = []
        return events

    def next_deadline(self, now: float, *, delivering: bool = True) -> float:
        """Return when `tick` must be called next if nothing else happens; infinity if never.

        delivering  False if the caller takes no entries just now
        """
        if self._due or (delivering and self._delivered < self._deliverable()):
            return now
        if self._guard is not None:
            return max(now, self._guard.deadline(now))
        if self._core._isLeader():
            return inf  # no peer waits for a heartbeat
        return self._core.election_at_s

    def on_durable(self) -> None:
        """The journal named this group in `batch_done`: tick it."""
        if self._guard is not None:
            self._core.enter()
            self._guard.on_durable()
        self._wake()

    def trim(self, position: int) -> None:
        """Let go of entries up to `position`, which a durable checkpoint covers; never of undelivered ones."""
        self._log.trim_below(min(position, self._delivered, self._log.durable_position) + 1)

    # ---- inside

    def _wake(self) -> None:
        self._due = True
        if self._guard is not None:
            self._guard.core_due = True

    def _decide(self, guard: Guard) -> None:
        """Let PySyncObj look at what came in, if anything did or a timer has run out."""
        now = self._clock()
        if not guard.core_due and now < guard.deadline(now) - ALMOST_S:
            return
        guard.core_due = False
        lead = guard.leadership
        if lead is not None and self._core.commit < lead.first <= lead.matched:
            # What is older than this term commits now, at once; PySyncObj would go through it entry by entry.
            self._core.settle(lead.first - 1)
        self._core.doTick(0.0)

    def _take_news(self, guard: Guard) -> None:
        lead = guard.leadership
        if guard.failed_barriers:
            self._passed += [BarrierFailed(barrier.token) for barrier in guard.failed_barriers]
            guard.failed_barriers.clear()
        if lead is not None and lead.has_barriers:
            self._passed += [BarrierPassed(passed.token, passed.position) for passed in lead.passed(self._clock())]
        if guard.is_behind and (behind := guard.take_behind(self._clock())) is not None:
            leader, position, term = behind
            self._passed.append(Behind(leader, Position(position), term))

    def _led_term(self) -> int | None:
        return self.term if self._core._isLeader() else None

    def _deliverable(self) -> int:
        return min(int(self._core.raftCommitIndex), self._log.durable_position)

    def _deliver(self, events: list[RaftEvent], max_bytes: int) -> None:
        log, led_term, end = self._log, self._led_term(), self._deliverable()
        while self._delivered < end and max_bytes > 0:
            position = Position(self._delivered + 1)
            term, payload = log.term_at(position), log.payload(position)
            if payload:
                events.append(Committed(position, term, payload))
                if term == self._leading_term:
                    self._in_flight_bytes -= len(payload)
            elif term == led_term != self._leading_term:
                self._leading_term = term
                events.append(BecameLeader(term))
            self._delivered = position
            max_bytes -= len(payload) + ENTRY_COST_BYTES


def _holds(log: GroupLog, position: int, term: int) -> bool:
    return log.base_position <= position <= log.last_position and log.term_at(position) == term
