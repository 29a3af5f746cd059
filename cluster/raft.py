"""The door to PySyncObj: one Raft group, with the library's holes closed.

PySyncObj decides who leads and what is committed; nothing else of it is used. What it believes about the world comes
through seams: our clock and dice, our journal, our transport, no threads, no sockets, no pickle. Two facts shape this
file:

  * PySyncObj counts an entry as its own the moment it adds it, long before any fsync. So *committed* there means only
    "committed if our disk keeps it", and an entry is delivered here when it is committed there AND durable here.
  * After a restart PySyncObj would apply its whole log within one tick. So its apply only moves a number; entries are
    read from the journal and delivered in slices of a size that the caller chooses.

An entry is the caller's bytes as they are. The empty entry is PySyncObj's no-op, which every leader writes first; it is
not delivered, but the leader's own one is the moment at which it has delivered everything older, and `BecameLeader` is
delivered in its place. Until then it takes no proposals: it does not know yet what its log says.

The log begins at position 1, a root that every replica has and nobody stores; the first entry is 2.

The names that are replaced are private to one version of the library, so exactly the file with which the seams were
proved is accepted.

A group has one voter here. With peers, a guard between PySyncObj's messages and the wire makes each a correct Raft
peer (acks carry terms and wait for fsync, appends are normalised, votes count once, pre-vote); `Transport` is what it
will speak through, and callers will not see a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import inf
from typing import Any, Final, NoReturn, Protocol, overload
from zlib import crc32

from pysyncobj import SyncObj, SyncObjConf
from pysyncobj import syncobj as _library
from pysyncobj.journal import Journal as _JournalBase
from pysyncobj.node import Node as _NodeBase
from pysyncobj.transport import Transport as _TransportBase
from pysyncobj.version import VERSION

from storage.errors import JournalDamaged, NoLeader, Overloaded, UnsupportedOperation
from storage.journal import GroupLog
from storage.types import Position

PROVED_VERSION: Final = "0.3.17"
PROVED_DIGEST: Final = "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4"
ROOT: Final = Position(1)
"""The position at which every log begins; PySyncObj takes an entry of term 0 there for granted."""
SLICE_BYTES: Final = 4 << 20
ENTRY_COST_BYTES: Final = 200
"""What an event costs in memory beside its payload, so that a slice of tiny entries is bounded too."""

_NO_OP: Final = b"\x01"


@dataclass(frozen=True, slots=True)
class Committed:
    """An entry that the group has decided on, and that is durable here. In order, without gaps but for no-ops."""

    position: Position
    term: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class BecameLeader:
    """This replica leads, and everything that earlier leaders committed has been delivered."""

    term: int


@dataclass(frozen=True, slots=True)
class LostLeadership:
    """This replica led in `term` and no longer does. What it proposed may or may not be delivered later."""

    term: int


RaftEvent = Committed | BecameLeader | LostLeadership


class NotLeader(NoLeader):
    """The proposal was not made: this replica does not lead."""

    def __init__(self, group_id: int, leader: str | None) -> None:
        hint = f"{leader} does" if leader is not None else "the leader is not known yet"
        super().__init__(f"this node does not lead group {group_id}; {hint}")
        self.group_id, self.leader = group_id, leader


class Dice(Protocol):
    """The part of random.Random that elections need."""

    def random(self) -> float: ...


class Transport(Protocol):
    """Carries one group's messages over sessions: in order, at most once, nothing of an old session after a new one."""

    def send(self, peer: str, header: dict[str, Any], blobs: Sequence[bytes]) -> bool:
        """Hand over a message; False if there is no session with `peer`."""
        ...


@dataclass(frozen=True)
class RaftConfig:
    """Times in seconds of the caller's clock."""

    heartbeat_s: float = 0.3
    """A leader with nothing to say says so this often. 64 idle groups then cost 3 % of a core."""
    election_s_min: float = 1.0
    """A follower that has heard nothing for this long, plus a random part, campaigns."""
    election_s_max: float = 2.0
    in_flight_bytes_max: int = 64 << 20
    """Proposals beyond this wait in memory for the disk or for peers; more are refused."""

    def __post_init__(self) -> None:
        # PySyncObj's own rule (config.py, validate).
        if not 0 < 3 * self.heartbeat_s < self.election_s_min < self.election_s_max:
            raise ValueError(f"3 * heartbeat_s < election_s_min < election_s_max does not hold: {self}")


class RaftGroup:
    """One replica of one Raft group. Belongs to the loop; never blocks but to read old entries from the journal.

    Drive it: `tick` when `next_deadline` is reached, after `propose`, and after `on_durable`; then let the journal
    write. Nothing happens between ticks, so an idle group costs nothing.

    Invariants
      1. `delivered` never decreases, and delivered entries are committed and durable here.
      2. BecameLeader(term) is delivered at most once per term, over all restarts: its no-op is durable by then.
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
    ) -> None:
        """Open the group on its log.

        applied    position up to which the caller's own checkpoint holds everything; 0 for none
        clock      monotonic seconds
        Raises JournalDamaged if log and checkpoint do not meet.
        """
        if peers or transport is not None:
            raise UnsupportedOperation(
                f"group {group_id} has peers {list(peers)}, but groups of one voter only are served"
            )
        self.group_id, self.me = group_id, me
        self.config = config or RaftConfig()
        self._log = log
        self._world = (clock, rng)
        if log.last_position == 0:
            log.reset(ROOT, 0)
        if max(applied, ROOT) < log.base_position:
            raise JournalDamaged(
                f"the log of group {group_id} begins after {log.base_position}, its checkpoint covers only {applied}: "
                "the entries between are gone. Restore the data directory from a backup."
            )
        if applied > log.last_position:
            raise JournalDamaged(
                f"the log of group {group_id} ends at {log.last_position}, but its checkpoint covers {applied}: "
                "the journal has lost its end. Restore the data directory from a backup."
            )
        self._delivered = Position(max(applied, ROOT))
        self._leading_term: int | None = None
        self._in_flight_bytes = 0
        self._due = True
        # Whatever is in a lone voter's log was committed when it became durable: nobody can have decided otherwise.
        # PySyncObj would find that out entry by entry in its first tick, and block the loop for seconds.
        adapter = _LogAdapter(log, committed=log.last_position)
        _WORLD.enter(*self._world)
        self._core = _Core(_Node(me), adapter, _conf(self.config, adapter), _NoPeers(None, None, None))

    # ---- what callers see

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
        """Name of the node that leads as far as is known here."""
        node = self._core._getLeader()
        return None if node is None else str(node.id)

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
        if self._leading_term is None:
            raise NotLeader(self.group_id, self.leader)
        if self._in_flight_bytes and self._in_flight_bytes + len(payload) > self.config.in_flight_bytes_max:
            raise Overloaded(f"group {self.group_id} has {self._in_flight_bytes} bytes under way; try again shortly")
        self._in_flight_bytes += len(payload)
        self._core.proposals.append(payload)
        self._due = True

    def tick(self, max_bytes: int = SLICE_BYTES) -> list[RaftEvent]:
        """Let Raft work and return what happened, about `max_bytes` of it; `next_deadline` tells if there is more.

        Raises JournalDamaged if an entry cannot be read back; the replica must then stop.
        """
        _WORLD.enter(*self._world)
        self._core.doTick(0.0)
        self._due = False
        events: list[RaftEvent] = []
        if self._leading_term is not None and self._leading_term != self._led_term():
            events.append(LostLeadership(self._leading_term))
            self._leading_term, self._in_flight_bytes = None, 0
        self._deliver(events, max_bytes)
        return events

    def next_deadline(self, now: float) -> float:
        """Return when `tick` must be called next if nothing else happens; infinity if never."""
        if self._due or self._delivered < self._deliverable():
            return now
        if self._core._isLeader():
            return inf  # no peer waits for a heartbeat
        return float(self._core._SyncObj__raftElectionDeadline)

    def on_durable(self) -> None:
        """The journal named this group in `batch_done`: tick it."""
        self._due = True

    def trim(self, position: int) -> None:
        """Let go of entries up to `position`, which a durable checkpoint covers; never of undelivered ones."""
        self._log.trim_below(min(position, self._delivered) + 1)

    # ---- inside

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
            elif term == led_term:
                self._leading_term = term
                events.append(BecameLeader(term))
            self._delivered = position
            max_bytes -= len(payload) + ENTRY_COST_BYTES


# ---- what PySyncObj sees


class _Stored:
    """An entry's command as PySyncObj sees it: a length. The bytes stay in the journal until somebody sends them."""

    __slots__ = ("log", "position")

    def __init__(self, log: GroupLog, position: int) -> None:
        self.log, self.position = log, position

    def __len__(self) -> int:
        return self.log.payload_bytes(self.position)


class _Entries(Sequence[tuple[_Stored, int, int]]):
    """A slice of the log as (command, position, term), made one by one."""

    __slots__ = ("log", "positions")

    def __init__(self, log: GroupLog, positions: range) -> None:
        self.log, self.positions = log, positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, place: int) -> tuple[_Stored, int, int]: ...
    @overload
    def __getitem__(self, place: slice) -> _Entries: ...
    def __getitem__(self, place: int | slice) -> tuple[_Stored, int, int] | _Entries:
        if isinstance(place, slice):
            return _Entries(self.log, self.positions[place])
        position = self.positions[place]
        return _Stored(self.log, position), position, self.log.term_at(position)


class _LogAdapter(_JournalBase):  # type: ignore[misc]  # the library has no types
    """A GroupLog as the list that PySyncObj wants: its first element stands for the base."""

    def __init__(self, log: GroupLog, *, committed: int) -> None:
        self._log = log
        self._committed = committed

    def __len__(self) -> int:
        return self._log.last_position - self._log.base_position + 1

    def __getitem__(self, place: int | slice) -> Any:
        return _Entries(self._log, range(self._log.base_position, self._log.last_position + 1))[place]

    def add(self, command: object, idx: int, term: int) -> None:
        assert command == _NO_OP, "PySyncObj itself adds nothing but no-ops"
        self._log.append(b"", idx, term)

    def propose(self, payload: bytes, term: int) -> None:
        """Add a caller's entry at the end."""
        self._log.append(payload, self._log.last_position + 1, term)

    def deleteEntriesFrom(self, entryFrom: int) -> None:  # noqa: N802, N803  # PySyncObj's names
        self._log.truncate_from(self._log.base_position + entryFrom)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:  # noqa: N802, N803
        self._log.set_hard_state(term, votedForNodeId)

    def getCurrentTerm(self) -> int:  # noqa: N802
        return self._log.hard_state.term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802
        return self._log.hard_state.vote

    def getRaftCommitIndex(self) -> int:  # noqa: N802
        """Known from the start, not remembered: a stored commit index may be newer than a log that lost its end."""
        return self._committed

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:  # noqa: N802, N803
        pass

    def clear(self) -> NoReturn:
        raise AssertionError("PySyncObj's snapshots are not used")

    def deleteEntriesTo(self, entryTo: int) -> NoReturn:  # noqa: N802, N803
        raise AssertionError("PySyncObj's compaction is not used")

    def _destroy(self) -> None:
        pass


class _Node(_NodeBase):  # type: ignore[misc]
    """PySyncObj iterates over sets of nodes; with this hash a simulation replays in every process."""

    def __hash__(self) -> int:
        return crc32(str(self.id).encode())


class _NoPeers(_TransportBase):  # type: ignore[misc]
    """The transport of a group of one voter."""

    def send(self, node: object, message: object) -> bool:
        return False


class _Core(SyncObj):  # type: ignore[misc]
    """PySyncObj with those parts replaced that queue, forward, apply, pickle or write files."""

    def __init__(self, me: _Node, adapter: _LogAdapter, conf: SyncObjConf, transport: _TransportBase) -> None:
        super().__init__(me, [], conf, nodeClass=_Node, transport=transport)
        self.adapter = adapter
        self.proposals: list[bytes] = []
        self._SyncObj__raftLastApplied = self._SyncObj__raftCommitIndex
        # A lone voter has nobody to wait for.
        self._SyncObj__raftElectionDeadline = -inf

    def _checkCommandsToApply(self) -> None:  # noqa: N802
        """Add what was proposed. Without leadership it is dropped: PySyncObj would forward it, or keep it for later."""
        if self._isLeader():
            for payload in self.proposals:
                self.adapter.propose(payload, self.raftCurrentTerm)
        self.proposals.clear()

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802
        """Apply is only a number here; returns whether there is a newer commit index to tell peers."""
        moved = bool(self._SyncObj__raftCommitIndex > self._SyncObj__raftLastApplied)
        self._SyncObj__raftLastApplied = self._SyncObj__raftCommitIndex
        return moved

    def _SyncObj__doApplyCommand(self, command: object) -> NoReturn:  # noqa: N802
        raise AssertionError("PySyncObj never sees the bytes of a command")

    def _SyncObj__tryLogCompaction(self) -> None:  # noqa: N802
        pass


def _conf(config: RaftConfig, adapter: _LogAdapter) -> SyncObjConf:
    return SyncObjConf(
        autoTick=False,
        journalFile=adapter,
        appendEntriesUseBatch=False,
        appendEntriesPeriod=config.heartbeat_s,
        # Above every command, so that the library never cuts one in pieces: that path pickles and cuts wrongly.
        appendEntriesBatchSizeBytes=1 << 40,
        raftMinTimeout=config.election_s_min,
        raftMaxTimeout=config.election_s_max,
        connectionTimeout=config.election_s_max,
        dynamicMembershipChange=False,
        useFork=False,
    )


class _World:
    """Clock and dice of the group that runs just now.

    PySyncObj takes both from its module, and a process may hold groups of different worlds (a simulation holds whole
    nodes), so each call into the library enters the group's world first. One thread owns all groups.
    """

    def __init__(self) -> None:
        self._clock: Callable[[], float] = lambda: 0.0
        self._rng: Dice | None = None

    def enter(self, clock: Callable[[], float], rng: Dice) -> None:
        self._clock, self._rng = clock, rng

    def monotonic(self) -> float:
        return self._clock()

    def random(self) -> float:
        assert self._rng is not None, "no group runs"
        return self._rng.random()


class _NullPoller:
    def poll(self, timeout: float) -> None:
        pass


def _accept_journal(journal: object) -> _LogAdapter:
    assert isinstance(journal, _LogAdapter), "PySyncObj is used through RaftGroup only"
    return journal


def _install() -> None:
    """Replace what PySyncObj takes from its module. Raises ImportError for any file but the proved one."""
    source = _library.__loader__.get_data(_library.__file__)
    if VERSION != PROVED_VERSION or sha256(source).hexdigest() != PROVED_DIGEST:
        raise ImportError(
            f"pysyncobj {VERSION} at {_library.__file__} is not the {PROVED_VERSION} with which cluster/raft.py was "
            f"proved; its private names are replaced here, so only that very file is safe. "
            f"Install it with: pip install --force-reinstall pysyncobj=={PROVED_VERSION}"
        )
    _library.createJournal = _accept_journal
    _library.createPoller = lambda _kind: _NullPoller()
    _library.PIPE_NOTIFIER_ENABLED = False
    _library.monotonicTime = _WORLD.monotonic
    _library.random = _WORLD


_WORLD: Final = _World()
_install()
