"""The door to PySyncObj: the library's class with what is replaced of it, and what it sees of the world.

PySyncObj decides who leads and what is committed; nothing else of it is used. Its clock and dice, its journal and its
transport are ours; it gets no threads, no sockets, no pickle. Its apply only moves a number, because after a restart it
would apply its whole log within one tick: entries are read from the journal and delivered by `raft.py`.

The names that are replaced are private to one version of the library, so exactly the file with which the seams were
proved is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from math import inf
from typing import Any, Final, NoReturn, overload
from zlib import crc32

from pysyncobj import SyncObj, SyncObjConf
from pysyncobj import syncobj as _library
from pysyncobj.journal import Journal as _JournalBase
from pysyncobj.node import Node as _NodeBase
from pysyncobj.transport import Transport as _TransportBase
from pysyncobj.version import VERSION

from cluster.raft_guard import Dice, Guard
from cluster.raft_wire import Blob
from storage.journal import GroupLog

PROVED_VERSION: Final = "0.3.17"
PROVED_DIGEST: Final = "e8bdf06797085d734df86e24ab4802fe87893dff77268565ec036f7ad4a1cfe4"

_NO_OP: Final = b"\x01"


def core_of(
    me: str,
    peers: Sequence[str],
    log: GroupLog,
    *,
    committed: int,
    heartbeat_s: float,
    election_s_min: float,
    election_s_max: float,
    clock: Callable[[], float],
    rng: Dice,
) -> RaftCore:
    """Return PySyncObj on a log, of which everything up to `committed` is known to be committed."""
    adapter = _LogAdapter(log, committed=committed)
    _WORLD.enter(clock, rng)
    conf = _conf(adapter, heartbeat_s, election_s_min, election_s_max)
    return RaftCore(_Node(me), adapter, conf, [_Node(peer) for peer in peers], (clock, rng))


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
        log = self._log
        if place == -1:  # asked for all the time
            return _Stored(log, log.last_position), log.last_position, log.last_term
        return _Entries(log, range(log.base_position, log.last_position + 1))[place]

    def add(self, command: object, idx: int, term: int) -> None:
        """Add PySyncObj's no-op, or a leader's entry, which is a view of what came in."""
        if isinstance(command, memoryview):
            self._log.append(bytes(command), idx, term)
        else:
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

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._hash = crc32(name.encode())

    def __hash__(self) -> int:
        return self._hash


class _Wire(_TransportBase):  # type: ignore[misc]
    """Where PySyncObj's messages go: its votes to the guard, its answers to whoever asked. Appends it does not send."""

    def __init__(self, core: RaftCore) -> None:
        super().__init__(None, None, None)
        self._core = core

    def send(self, node: _Node, message: dict[str, Any]) -> bool:
        guard = self._core.guard
        if guard is None:
            return False  # a lone voter has nobody to talk to
        match message["type"]:
            case "request_vote":
                guard.ask_vote(node.id, message["term"], message["last_log_index"], message["last_log_term"])
            case "response_vote":
                guard.grant_vote(node.id, message["term"])
            case "next_node_idx":
                self._core.accepted = message["success"]
            case kind:
                raise AssertionError(f"PySyncObj sends {kind}")
        return True


class RaftCore(SyncObj):  # type: ignore[misc]
    """PySyncObj with those parts replaced that queue, forward, replicate, apply, pickle or write files.

    Implements `raft_guard.Core`.
    """

    def __init__(
        self,
        me: _Node,
        adapter: _LogAdapter,
        conf: SyncObjConf,
        peers: Sequence[_Node],
        world: tuple[Callable[[], float], Dice],
    ) -> None:
        self._world = world
        self.guard: Guard | None = None
        self.accepted = False
        self._nodes = {str(peer.id): peer for peer in peers}
        self.adapter = adapter
        super().__init__(me, peers, conf, nodeClass=_Node, transport=_Wire(self))
        self.proposals: list[bytes] = []
        self._SyncObj__raftLastApplied = self.commit
        if not peers:
            self._SyncObj__raftElectionDeadline = -inf  # a lone voter has nobody to wait for

    def enter(self) -> None:
        """Let the library run by this group's clock and dice. Call it before anything else of this."""
        _WORLD.enter(*self._world)

    # ---- for the guard

    @property
    def term(self) -> int:
        return int(self._SyncObj__raftCurrentTerm)

    @property
    def commit(self) -> int:
        return int(self._SyncObj__raftCommitIndex)

    @property
    def is_leader(self) -> bool:
        return bool(self._isLeader())

    @property
    def leader(self) -> str | None:
        node = self._SyncObj__raftLeader
        return None if node is None else str(node.id)

    @property
    def election_at_s(self) -> float:
        return float(self._SyncObj__raftElectionDeadline)

    @property
    def peers(self) -> list[str]:
        return list(self._nodes)

    def hear(self, leader: str, term: int, commit: int) -> None:
        self._hear(leader, type="append_entries", term=term, commit_index=commit, serialized=None)

    def append(
        self,
        leader: str,
        term: int,
        previous: int,
        previous_term: int,
        entries: Sequence[tuple[int, Blob]],
        commit: int,
    ) -> bool:
        self._hear(
            leader,
            type="append_entries",
            term=term,
            commit_index=commit,
            prevLogIdx=previous,
            prevLogTerm=previous_term,
            entries=[
                (memoryview(payload), position, entry_term)
                for position, (entry_term, payload) in enumerate(entries, previous + 1)
            ],
        )
        return self.accepted

    def adopt(self, peer: str, term: int) -> None:
        # A candidate whom nobody can vote for.
        self._hear(peer, type="request_vote", term=term, last_log_index=-1, last_log_term=-1)

    def asked_for_vote(self, peer: str, term: int, last: int, last_term: int) -> None:
        self._hear(peer, type="request_vote", term=term, last_log_index=last, last_log_term=last_term)

    def got_vote(self, peer: str, term: int) -> None:
        self._hear(peer, type="response_vote", term=term)

    def told_to_campaign(self, leader: str, term: int) -> None:
        self._hear(leader, type="timeout_now", term=term)

    def hurry(self) -> None:
        self._SyncObj__raftElectionDeadline = -inf

    def lead(self) -> None:
        self._SyncObj__onBecomeLeader()

    def count(self, peer: str, match: int) -> None:
        self._hear(peer, type="next_node_idx", next_node_idx=match + 1, reset=False, success=match > 0)

    def settle(self, position: int) -> None:
        """Everything up to `position` is known to be committed."""
        if position > self.commit:
            self._SyncObj__raftCommitIndex = self._SyncObj__raftLastApplied = position

    def _hear(self, peer: str, **message: Any) -> None:
        self._SyncObj__onMessageReceived(self._nodes[peer], message)

    # ---- replaced parts

    def _SyncObj__connectedToAnyone(self) -> bool:  # noqa: N802
        """Asked when the election timer has run out."""
        return self.guard is None or self.guard.may_campaign()

    def _SyncObj__sendAppendEntries(self) -> None:  # noqa: N802
        """The guard sends, from the journal, after each tick."""
        self._SyncObj__newAppendEntriesTime = inf

    def _checkCommandsToApply(self) -> None:  # noqa: N802
        """Add what was proposed. Without leadership it is dropped: PySyncObj would forward it, or keep it for later."""
        if self._isLeader():
            for payload in self.proposals:
                self.adapter.propose(payload, self.raftCurrentTerm)
        self.proposals.clear()

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802
        """Apply is only a number here; returns whether there is a newer commit index to tell peers."""
        moved = self.commit > self._SyncObj__raftLastApplied
        self._SyncObj__raftLastApplied = self.commit
        return moved

    def _SyncObj__doApplyCommand(self, command: object) -> NoReturn:  # noqa: N802
        raise AssertionError("PySyncObj never sees the bytes of a command")

    def _SyncObj__tryLogCompaction(self) -> None:  # noqa: N802
        pass


def _conf(adapter: _LogAdapter, heartbeat_s: float, election_s_min: float, election_s_max: float) -> SyncObjConf:
    return SyncObjConf(
        autoTick=False,
        journalFile=adapter,
        appendEntriesUseBatch=False,
        appendEntriesPeriod=heartbeat_s,
        # Above every command, so that the library never cuts one in pieces: that path pickles and cuts wrongly.
        appendEntriesBatchSizeBytes=1 << 40,
        raftMinTimeout=election_s_min,
        raftMaxTimeout=election_s_max,
        leaderFallbackTimeout=election_s_max,
        connectionTimeout=election_s_max,
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
            f"pysyncobj {VERSION} at {_library.__file__} is not the {PROVED_VERSION} with which "
            f"cluster/raft_core.py was proved; its private names are replaced here, so only that very file is safe. "
            f"Install it with: pip install --force-reinstall pysyncobj=={PROVED_VERSION}"
        )
    _library.createJournal = _accept_journal
    _library.createPoller = lambda _kind: _NullPoller()
    _library.PIPE_NOTIFIER_ENABLED = False
    _library.monotonicTime = _WORLD.monotonic
    _library.random = _WORLD


_WORLD: Final = _World()
_install()
