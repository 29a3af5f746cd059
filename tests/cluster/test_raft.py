"""One-voter Raft groups over the journal: what is delivered, when, and after which crashes."""

from __future__ import annotations

from contextlib import suppress
from math import inf
from random import Random
from typing import Any

import pysyncobj.pickle
import pytest
from pysyncobj import syncobj

from cluster import raft_core
from cluster.raft import (
    SLICE_BYTES,
    BecameLeader,
    Committed,
    LostLeadership,
    NotLeader,
    RaftConfig,
    RaftEvent,
    RaftGroup,
)
from storage.errors import JournalDamaged, Overloaded
from storage.journal import Journal
from storage.types import Position
from tests.sim.disk import PowerLoss, SimDisk


class Replica:
    """A node with some groups, driven by hand."""

    def __init__(self, disk: SimDisk, *, groups: int = 1, applied: int = 0, config: RaftConfig | None = None) -> None:
        self.disk = disk
        self.now = 100.0
        self.journal = Journal.open(disk, "journal", file_bytes_max=2_000)
        self.groups = [
            RaftGroup(
                group_id,
                "n1",
                [],
                self.journal.group(group_id),
                applied=applied,
                clock=lambda: self.now,
                rng=Random(group_id),
                config=config,
            )
            for group_id in range(groups)
        ]

    @property
    def group(self) -> RaftGroup:
        return self.groups[0]

    def sync(self) -> None:
        for group_id in self.journal.write_now():
            self.groups[group_id].on_durable()

    def tick(self, max_bytes: int = SLICE_BYTES) -> list[RaftEvent]:
        return self.group.tick(max_bytes)

    def settle(self) -> list[RaftEvent]:
        """Tick and sync until no group has anything to do; return what the first one delivered."""
        events: list[RaftEvent] = []
        while self.journal.pending_bytes or any(group.next_deadline(self.now) <= self.now for group in self.groups):
            for group in self.groups:
                happened = group.tick()
                events += happened if group is self.group else []
            self.sync()
        return events


def entries(events: list[RaftEvent]) -> list[tuple[int, bytes]]:
    return [(event.position, event.payload) for event in events if isinstance(event, Committed)]


@pytest.fixture(autouse=True)
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this file may ever unpickle or pickle through PySyncObj."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("loads", "load", "dumps", "dump"):
        monkeypatch.setattr(pysyncobj.pickle, name, refuse)
        monkeypatch.setattr(syncobj.pickle, name, refuse)


def test_an_entry_is_delivered_once_and_only_when_durable() -> None:
    """No tick before the fsync delivers an entry, not even the one that adds it; the first one after does, once."""
    replica = Replica(SimDisk(Random(1)))
    assert replica.settle() == [BecameLeader(1)]
    replica.group.propose(b"hello")
    for _ in range(3):
        assert replica.tick() == []
    batch = replica.journal.take_batch()
    assert batch is not None
    batch.write()
    assert replica.tick() == []
    assert replica.journal.batch_done(batch) == {0}
    replica.group.on_durable()
    assert replica.group.next_deadline(replica.now) == replica.now
    assert replica.tick() == [Committed(Position(3), 1, b"hello")]
    assert replica.tick() == []
    assert replica.group.next_deadline(replica.now) == inf


def test_leadership_is_reported_when_it_is_durable_and_everything_older_was_delivered() -> None:
    """BecameLeader comes behind all older entries, terms rise with each start, and no proposal is taken before."""
    disk = SimDisk(Random(1))
    for term in range(1, 5):
        replica = Replica(disk)
        with pytest.raises(NotLeader, match="the leader is not known yet") as refusal:
            replica.group.propose(b"early")
        assert refusal.value.leader is None
        before = replica.tick()
        assert BecameLeader(term) not in before and not replica.group.leads
        with pytest.raises(NotLeader):
            replica.group.propose(b"still early")
        replica.sync()
        events = before + replica.settle()
        assert events[-1] == BecameLeader(term)
        assert [payload for _, payload in entries(events)] == [b"of term %d" % old for old in range(1, term)]
        assert (replica.group.leads, replica.group.leader, replica.group.term) == (True, "n1", term)
        replica.group.propose(b"of term %d" % term)
        replica.settle()
        replica.journal.close()


def test_any_bytes_can_be_proposed() -> None:
    """PySyncObj's own command bytes, pickles and large values are only bytes; the empty entry is refused."""
    replica = Replica(SimDisk(Random(1)))
    replica.settle()
    payloads = [b"\x00", b"\x01", b"\x02\x80\x02.", b"\x03\x80\x02K\x01.", b"x" * 3_000_000, b"\x80\x04."]
    for payload in payloads:
        replica.group.propose(payload)
    assert [payload for _, payload in entries(replica.settle())] == payloads
    with pytest.raises(ValueError, match="at least one byte"):
        replica.group.propose(b"")


PROPOSED = [b"entry %d" % serial * (1 + serial % 40) for serial in range(30)]


class Life:
    """What a caller remembers of a replica that lives until the power goes."""

    def __init__(self) -> None:
        self.delivered: list[tuple[int, bytes]] = []
        self.checkpoint = 0

    def live(self, disk: SimDisk) -> None:
        replica = Replica(disk)
        for serial, payload in enumerate(PROPOSED):
            self.delivered += entries(replica.settle())
            replica.group.propose(payload)
            if serial % 3:
                self.delivered += entries(replica.tick())
            if serial % 11 == 10:
                self.checkpoint = replica.group.delivered - 4
                replica.group.trim(self.checkpoint)
        self.delivered += entries(replica.settle())


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_at_every_disk_call_loses_nothing_that_was_delivered(seed: int) -> None:
    """Cut the power before every single call to the disk; what was delivered comes again, in order, at its position.

    Nothing else comes, but for entries that were proposed and not delivered yet.
    """
    probe = SimDisk(Random(seed))
    Life().live(probe)
    for call in range(probe.steps):
        disk = SimDisk(Random(seed * 1_000 + call))
        disk.power_loss_at = call
        life = Life()
        with suppress(PowerLoss):
            life.live(disk)
        disk.crash()
        replica = Replica(disk, applied=life.checkpoint)
        again = entries(replica.settle())
        covered = [entry for entry in life.delivered if entry[0] <= life.checkpoint]
        expected = life.delivered[len(covered) :]
        assert again[: len(expected)] == expected
        assert len(again) - len(expected) <= 2, "at most what was under way"
        payloads = [payload for _, payload in covered + again]
        assert payloads == PROPOSED[: len(payloads)]
        replica.group.propose(b"life goes on")
        assert [payload for _, payload in entries(replica.settle())] == [b"life goes on"]


def test_crash_after_crash() -> None:
    """Many lives with random power losses: one history, terms that rise, nothing twice, nothing lost."""
    for seed in range(25):
        rng = Random(seed)
        disk = SimDisk(rng)
        history: dict[int, bytes] = {}
        highest_term = 0
        for life in range(8):
            disk.power_loss_at = disk.steps + rng.randint(3, 60)
            delivered: list[RaftEvent] = []
            with suppress(PowerLoss):
                replica = Replica(disk)
                for serial in range(15):
                    delivered += replica.settle()
                    for part in range(rng.randint(1, 4)):
                        replica.group.propose(b"life %d entry %d.%d" % (life, serial, part))
            terms = [event.term for event in delivered if isinstance(event, BecameLeader)]
            assert all(term > highest_term for term in terms)
            highest_term = max([highest_term, *terms])
            found = entries(delivered)
            assert [position for position, _ in found] == sorted({position for position, _ in found})
            for position, payload in found:
                assert history.setdefault(position, payload) == payload
            disk.crash()
        final = dict(entries(Replica(disk).settle()))
        assert final.items() >= history.items()


def test_a_long_log_is_replayed_in_slices() -> None:
    """A restart delivers about max_bytes per tick, without holding the rest; next_deadline asks for the next slice."""
    disk = SimDisk(Random(1))
    replica = Replica(disk)
    replica.settle()
    for serial in range(500):
        replica.group.propose(b"%03d" % serial * 100)
    replica.settle()
    replica.journal.close()
    replica = Replica(disk)
    collected: list[tuple[int, bytes]] = []
    ticks = 0
    while len(collected) < 500:
        assert replica.group.next_deadline(replica.now) == replica.now
        slice_ = entries(replica.tick(10_000))
        assert 0 < sum(len(payload) for _, payload in slice_) <= 10_300
        collected += slice_
        ticks += 1
    assert [payload for _, payload in collected] == [b"%03d" % serial * 100 for serial in range(500)]
    assert ticks > 15


def test_a_checkpoint_hides_what_it_covers() -> None:
    """Entries at or below `applied` are not delivered again, trimmed or not."""
    disk = SimDisk(Random(1))
    replica = Replica(disk)
    replica.settle()
    for serial in range(50):
        replica.group.propose(b"%02d" % serial * 100)
    replica.settle()
    replica.group.trim(20)
    replica.group.trim(10_000_000)  # clamped to what was delivered
    replica.settle()
    assert replica.journal.group(0).base_position == replica.group.delivered == 52
    replica.group.propose(b"tail 53")
    replica.group.propose(b"tail 54")
    replica.settle()
    replica.journal.close()
    assert entries(Replica(disk, applied=52).settle()) == [(53, b"tail 53"), (54, b"tail 54")]
    assert entries(Replica(disk, applied=53).settle()) == [(54, b"tail 54")]


@pytest.mark.parametrize(
    ("applied", "what"), [(3, "its checkpoint covers only 3"), (400, "the journal has lost its end")]
)
def test_a_log_that_does_not_meet_its_checkpoint_is_refused(applied: int, what: str) -> None:
    """A gap between checkpoint and log, or a checkpoint beyond the log's end, is damage and not a fresh start."""
    disk = SimDisk(Random(1))
    replica = Replica(disk)
    replica.settle()
    for _ in range(10):
        replica.group.propose(b"x")
    replica.settle()
    replica.group.trim(8)
    replica.settle()
    replica.journal.close()
    with pytest.raises(JournalDamaged, match=what):
        Replica(disk, applied=applied)


def test_too_much_under_way_is_refused_and_then_accepted() -> None:
    """in_flight_bytes_max bounds what waits; delivery makes room; one entry always fits."""
    replica = Replica(SimDisk(Random(1)), config=RaftConfig(in_flight_bytes_max=1_000))
    replica.settle()
    replica.group.propose(bytes(5_000))
    with pytest.raises(Overloaded, match="5000 bytes"):
        replica.group.propose(b"x")
    replica.settle()
    assert replica.group.in_flight_bytes == 0
    replica.group.propose(bytes(600))
    with pytest.raises(Overloaded):
        replica.group.propose(bytes(600))
    replica.group.propose(bytes(400))
    assert len(entries(replica.settle())) == 2


def test_lost_leadership_is_told_and_proposals_stop() -> None:
    """A higher term from elsewhere ends the leadership at the next tick; the group then leads again in a higher one."""
    replica = Replica(SimDisk(Random(1)))
    replica.settle()
    replica.group.propose(b"before")
    core: Any = replica.group._core
    request = {"type": "request_vote", "term": 7, "last_log_index": 99, "last_log_term": 6}
    core._SyncObj__onMessageReceived(raft_core._Node("n2"), request)
    assert replica.tick() == [LostLeadership(1)]
    with pytest.raises(NotLeader):
        replica.group.propose(b"refused")
    deadline = replica.group.next_deadline(replica.now)
    assert replica.now + 0.6 < deadline < replica.now + 1
    replica.now = deadline + 0.001
    assert replica.settle() == [BecameLeader(8)]
    replica.group.propose(b"after")
    assert [payload for _, payload in entries(replica.settle())] == [b"after"]


def test_groups_share_one_sync() -> None:
    """64 groups that propose at once become durable with one datasync, and idle they ask for no tick at all."""
    disk = SimDisk(Random(1))
    replica = Replica(disk, groups=64)
    replica.settle()
    for group in replica.groups:
        assert group.leads
        group.propose(b"x")
        group.tick()
    before = disk.syncs
    replica.sync()
    assert disk.syncs - before <= 64 * 48 // 2_000 + 1, "one for each file that the batch touches"
    for group in replica.groups:
        assert entries(group.tick()) == [(3, b"x")]
        assert group.next_deadline(replica.now) == inf


def test_the_same_seed_replays() -> None:
    """Clock and dice are arguments: two runs give the same events and the same bytes on disk."""

    def run() -> tuple[list[RaftEvent], list[bytes]]:
        disk = SimDisk(Random(5))
        replica = Replica(disk, groups=3)
        events = replica.settle()
        for serial in range(20):
            replica.groups[serial % 3].propose(b"%d" % serial)
            events += replica.settle()
        return events, [disk.contents(f"journal/{name}") for name in disk.list("journal")]

    assert run() == run()


def test_another_library_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one changed byte of syncobj.py is accepted."""
    monkeypatch.setattr(raft_core, "PROVED_DIGEST", "0" * 64)
    with pytest.raises(ImportError, match=r"pysyncobj==0\.3\.17"):
        raft_core._install()


def test_the_library_keeps_no_threads_sockets_or_files() -> None:
    """What PySyncObj takes from its module is ours."""
    assert syncobj.PIPE_NOTIFIER_ENABLED is False
    assert syncobj.random is raft_core._WORLD
    core = Replica(SimDisk(Random(1))).group._core
    assert core._SyncObj__thread is None
    assert isinstance(core._poller, raft_core._NullPoller)
    with pytest.raises(AssertionError):
        core._SyncObj__doApplyCommand(b"\x03\x80\x02K\x01.")


@pytest.mark.parametrize(
    "times",
    [{"heartbeat_s": 0.5}, {"election_s_min": 3.0}, {"heartbeat_s": 0.0}],
    ids=["heartbeat too slow", "no spread", "no heartbeat"],
)
def test_times_that_do_not_fit_together_are_refused(times: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="election_s_min"):
        RaftConfig(**times)  # type: ignore[arg-type]
