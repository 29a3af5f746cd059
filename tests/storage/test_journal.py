"""The journal against a dumb model, crashes at every byte and at every call, rot, a full disk and a failed fsync."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from errno import EIO, EMFILE, ENOSPC
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node.disk import OsDisk
from storage.disk import Disk
from storage.errors import JournalDamaged
from storage.journal import Journal, JournalHalted, Severity, verify
from storage.journal_records import HEADER_BYTES, Kind, Record, decode, encode
from storage.journal_state import Impossible
from tests.sim.disk import PowerLoss, SimDisk


@dataclass
class ModelLog:
    """A group's log as a dict."""

    base: int = 0
    base_term: int = 0
    entries: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    hard: tuple[int, str | None] = (0, None)

    @property
    def last(self) -> int:
        return self.base + len(self.entries)

    @property
    def last_term(self) -> int:
        return self.entries[self.last][0] if self.entries else self.base_term


Model = dict[int, ModelLog]


def read_all(journal: Journal) -> Model:
    """Return what the journal holds, as a model."""
    model: Model = {}
    for group_id in journal.group_ids:
        log = journal.group(group_id)
        positions = range(log.first_position, log.last_position + 1)
        entries = {position: (log.term_at(position), log.payload(position)) for position in positions}
        hard = log.hard_state
        model[group_id] = ModelLog(log.base_position, log.term_at(log.base_position), entries, (hard.term, hard.vote))
    return model


@pytest.fixture(params=["simulated", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Disk, str]:
    if request.param == "real":
        return OsDisk(), str(tmp_path / "journal")
    return SimDisk(Random(1)), "data/journal"


def filled(disk: Disk, directory: str, *, file_bytes_max: int = 600, entries: int = 12) -> Journal:
    """Return a journal with two groups over several files, every entry in a batch of its own."""
    journal = Journal.open(disk, directory, file_bytes_max=file_bytes_max)
    first, second = journal.group(1), journal.group(2)
    first.set_hard_state(1, "n1")
    for position in range(1, entries + 1):
        first.append(b"a%d" % position * position, position, 1)
        second.append(b"b", position, 2)
        journal.write_now()
    return journal


# ---- what it promises, on both disks


def test_what_was_written_is_there_after_reopening(place: tuple[Disk, str]) -> None:
    """Entries, hard state, truncation, trim and reset come back exactly, from several files."""
    disk, directory = place
    with closing(filled(disk, directory)) as journal:
        first, second, third = journal.group(1), journal.group(2), journal.group(3)
        first.truncate_from(10)
        first.append(b"other", 10, 3)
        first.trim_below(4)
        second.reset(100, 7)
        third.set_hard_state(9, None)
        assert journal.write_now() == {1, 2, 3}
        expected = read_all(journal)
    with closing(Journal.open(disk, directory)) as journal:
        assert read_all(journal) == expected
        assert (journal.group(1).first_position, journal.group(1).last_position) == (4, 10)
        assert (journal.group(2).first_position, journal.group(2).last_term) == (101, 7)
        assert journal.report.torn_bytes == 0
        assert journal.report.files == journal.files > 1
    assert list(verify(disk, directory)) == []


def test_nothing_is_durable_before_its_batch_is_done(place: tuple[Disk, str]) -> None:
    """durable_position and is_durable move in batch_done, not in append or write; one batch is under way at a time."""
    disk, directory = place
    with closing(Journal.open(disk, directory)) as journal:
        log = journal.group(5)
        assert journal.take_batch() is None
        log.append(b"one", 1, 1)
        batch = journal.take_batch()
        assert batch is not None
        log.append(b"two", 2, 1)
        assert journal.take_batch() is None
        batch.write()
        assert (log.durable_position, log.is_durable) == (0, False)
        assert journal.batch_done(batch) == {5}
        assert (log.durable_position, log.is_durable) == (1, False)
        assert journal.write_now() == {5}
        assert (log.durable_position, log.is_durable, journal.pending_bytes) == (2, True, 0)
        log.truncate_from(1)
        log.append(b"uno", 1, 2)
        assert log.durable_position == 0
        log.reset(50, 2)
        assert log.durable_position == 0
        journal.write_now()
        assert log.durable_position == 50


def test_files_that_nobody_needs_are_dropped_and_who_needs_them_is_told(place: tuple[Disk, str]) -> None:
    """A trim that frees whole files removes them, after it is durable; a group that pins files is named."""
    disk, directory = place
    with closing(filled(disk, directory)) as journal:
        files_before = journal.files
        journal.group(1).trim_below(13)
        journal.write_now()
        assert journal.files == files_before, "group 2 needs its first entry"
        assert [pin.group_id for pin in journal.pinning()] == [2]
        assert journal.pinning()[0].pinned_bytes == journal.bytes_on_disk
        journal.group(2).trim_below(13)
        journal.write_now()
        assert journal.files == 1
        assert len([name for name in disk.list(directory) if name.endswith(".log")]) == 1
        assert journal.pinning() == []
        expected = read_all(journal)
        assert expected[1].hard == (1, "n1")
    with closing(Journal.open(disk, directory)) as journal:
        assert read_all(journal) == expected


def test_a_group_that_leaves_pins_nothing(place: tuple[Disk, str]) -> None:
    """After forget the group is unknown, now and after reopening, and its files can go."""
    disk, directory = place
    with closing(filled(disk, directory)) as journal:
        journal.group(1).trim_below(13)
        journal.forget(2)
        journal.write_now()
        assert (journal.files, journal.group_ids, journal.group(2).last_position) == (1, [1], 0)
    with closing(Journal.open(disk, directory)) as journal:
        assert journal.group_ids == [1]


def test_memory_is_bounded_by_the_cache(place: tuple[Disk, str]) -> None:
    """However long the log, no more than cache_bytes_max of durable payloads stay in memory; all can be read back."""
    disk, directory = place
    with closing(Journal.open(disk, directory, cache_bytes_max=50_000)) as journal:
        log = journal.group(1)
        for position in range(1, 301):
            log.append(bytes([position % 251]) * 3_000, position, 1)
            if position % 10 == 0:
                journal.write_now()
                assert journal.pending_bytes == 0
                assert journal.cached_bytes <= 50_000
                assert not journal._unwritten
        for position in range(1, 301):
            assert log.payload(position) == bytes([position % 251]) * 3_000
            assert log.payload_bytes(position) == 3_000
        assert journal.cached_bytes <= 50_000
        journal.forget_cached()
        assert journal.cached_bytes == 0
        assert log.payload(300) == bytes([300 % 251]) * 3_000


def test_an_entry_larger_than_a_file_gets_its_own(place: tuple[Disk, str]) -> None:
    """file_bytes_max bounds files of many records, never the size of one."""
    disk, directory = place
    with closing(Journal.open(disk, directory, file_bytes_max=1_000)) as journal:
        log = journal.group(1)
        for position, size in enumerate((10, 100_000, 10, 1 << 20), start=1):
            log.append(bytes(size), position, 1)
        journal.write_now()
        expected = read_all(journal)
    with closing(Journal.open(disk, directory, file_bytes_max=1_000)) as journal:
        assert read_all(journal) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda log: log.append(b"x", 5, 1), id="gap"),
        pytest.param(lambda log: log.append(b"x", 2, 1), id="again"),
        pytest.param(lambda log: log.append(b"x", 4, 0), id="term falls"),
        pytest.param(lambda log: log.set_hard_state(0, None), id="hard state falls"),
        pytest.param(lambda log: log.trim_below(5), id="trim of what is not durable"),
        pytest.param(lambda log: log.truncate_from(0), id="truncation below the base"),
    ],
)
def test_what_raft_never_asks_for_is_refused(wrong: Callable[[object], None]) -> None:
    """A call that would break an invariant raises and leaves no trace."""
    journal = Journal.open(SimDisk(Random(1)), "j")
    log = journal.group(1)
    log.set_hard_state(1, None)
    for position in range(1, 4):
        log.append(b"x", position, 1)
    journal.write_now()
    before = read_all(journal)
    with pytest.raises((Impossible, ValueError)):
        wrong(log)
    assert read_all(journal) == before
    assert journal.take_batch() is None


# ---- the stateful model

PAYLOAD_SIZES = st.sampled_from([0, 1, 7, 8, 40, 200, 900])


class JournalMachine(RuleBasedStateMachine):
    """Any operations, crashes and restarts: what is found is a state the journal was in, no older than what is durable.

    One operation is one record, so the model's history has one state per record, and a recovered journal must equal
    one of those at or after the last that was reported durable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rng = Random(0)
        self.disk = SimDisk(self.rng)
        self.model: Model = {}
        self.history: list[Model] = [{}]
        self.durable = 0
        self.term = 1
        self.serial = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal.open(self.disk, "data/journal", file_bytes_max=700, cache_bytes_max=500)

    def follow(self, group_id: int) -> ModelLog:
        return self.model.setdefault(group_id, ModelLog())

    def done(self) -> None:
        self.history.append(copy.deepcopy(self.model))

    @rule(group_id=st.integers(1, 3), size=PAYLOAD_SIZES, rise=st.booleans())
    def append(self, group_id: int, size: int, rise: bool) -> None:
        log = self.follow(group_id)
        self.term += rise
        self.serial += 1
        term, payload = max(self.term, log.last_term), (b"%d-" % self.serial * size)[:size]
        self.journal.group(group_id).append(payload, log.last + 1, term)
        log.entries[log.last + 1] = (term, payload)
        self.done()

    @rule(group_id=st.integers(1, 3), back=st.integers(0, 5))
    def truncate(self, group_id: int, back: int) -> None:
        log = self.model.get(group_id)
        if log is None or back >= len(log.entries):
            return
        position = log.last - back
        self.journal.group(group_id).truncate_from(position)
        log.entries = {at: entry for at, entry in log.entries.items() if at < position}
        self.done()

    @rule(group_id=st.integers(1, 3), keep=st.integers(0, 3))
    def trim(self, group_id: int, keep: int) -> None:
        log = self.model.get(group_id)
        if log is None:
            return
        live = self.journal.group(group_id)
        position = min(log.last - keep, live.durable_position)
        if position <= log.base:
            return
        live.trim_below(position + 1)
        log.base_term, log.base = log.entries[position][0], position
        log.entries = {at: entry for at, entry in log.entries.items() if at > position}
        self.done()

    @rule(group_id=st.integers(1, 3), ahead=st.integers(0, 50))
    def reset(self, group_id: int, ahead: int) -> None:
        log = self.follow(group_id)
        position, term = log.last + ahead, max(self.term, log.last_term)
        self.journal.group(group_id).reset(position, term)
        log.base, log.base_term, log.entries = position, term, {}
        self.done()

    @rule(group_id=st.integers(1, 3), vote=st.sampled_from([None, "n1", "knoten-ü"]))
    def hard_state(self, group_id: int, vote: str | None) -> None:
        self.term += 1
        self.follow(group_id).hard = (self.term, vote)
        self.journal.group(group_id).set_hard_state(self.term, vote)
        self.done()

    @rule(group_id=st.integers(1, 3))
    def forget(self, group_id: int) -> None:
        if self.model.pop(group_id, None) is not None:
            self.journal.forget(group_id)
            self.done()

    @rule()
    def write(self) -> None:
        """Everything is durable, and the oldest file is one that some group needs."""
        moved = self.journal.write_now()
        self.durable = len(self.history) - 1
        if moved and self.journal.files > 1:
            oldest_end = self.journal._files[0].end_lsn
            assert any(state.lsns[0] < oldest_end for state in self.journal._states.values() if state.lsns)

    @rule(seed=st.integers(0, 1 << 30))
    def close_and_reopen(self, seed: int) -> None:
        self.journal.close()
        self.durable = len(self.history) - 1
        self.recover(seed)
        assert self.model == self.history[self.durable]
        assert self.journal.report.torn_bytes == 0

    @rule(seed=st.integers(0, 1 << 30), calls=st.integers(0, 12))
    def power_loss_while_writing(self, seed: int, calls: int) -> None:
        """The power goes after some of the disk calls of a batch, or after all of them but before batch_done."""
        batch = self.journal.take_batch()
        self.disk.power_loss_at = self.disk.steps + calls
        if batch is not None:
            try:
                batch.write()
                self.durable = len(self.history) - 1
            except PowerLoss:
                pass
        self.disk.crash()
        self.recover(seed)

    @rule(seed=st.integers(0, 1 << 30))
    def killed_after_writing_without_sync(self, seed: int) -> None:
        """kill -9 between write and fsync, restart, and only then the power goes: what was read stays."""
        batch = self.journal.take_batch()
        if batch is not None:
            batch._write_all()
        self.disk.kill()
        self.recover(seed)
        self.disk.crash()
        self.durable = len(self.history) - 1
        self.recover(seed)

    @rule(seed=st.integers(0, 1 << 30), calls=st.integers(0, 4))
    def power_loss_while_recovering(self, seed: int, calls: int) -> None:
        batch = self.journal.take_batch()
        if batch is not None:
            batch._write_all()
        self.disk.crash()
        self.disk.power_loss_at = self.disk.steps + calls
        with suppress(PowerLoss):
            self.open()
        self.disk.crash()
        self.recover(seed)

    def recover(self, seed: int) -> None:
        self.disk.power_loss_at = None
        self.rng.seed(seed)
        self.open()
        found = read_all(self.journal)
        candidates = self.history[self.durable :]
        assert found in candidates, f"found {found}, expected one of {candidates}"
        self.model = copy.deepcopy(found)
        self.history, self.durable = [found], 0
        assert list(verify(self.disk, "data/journal")) == []

    @invariant()
    def equals_the_model(self) -> None:
        assert read_all(self.journal) == self.model

    def teardown(self) -> None:
        self.journal.close()


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# ---- every byte


def states_by_record(journal: Journal, steps: list[Callable[[], None]]) -> list[Model]:
    states = [read_all(journal)]
    for step in steps:
        step()
        states.append(read_all(journal))
    return states


def last_writes(journal: Journal) -> list[Callable[[], None]]:
    log, other = journal.group(1), journal.group(2)
    return [
        lambda: log.append(b"last but not least", 13, 4),
        lambda: other.set_hard_state(6, "n3"),
        lambda: log.truncate_from(12),
        lambda: log.append(b"really last", 12, 6),
    ]


@pytest.mark.parametrize("tail", ["missing", "zeros", "noise"])
def test_a_write_torn_at_any_byte_is_cut(tail: str) -> None:
    """Whatever a power loss left of an unacknowledged batch, the start succeeds and keeps its first whole records."""
    disk = SimDisk(Random(3))
    journal = filled(disk, "j", file_bytes_max=1 << 20)
    durable_bytes = journal.bytes_on_disk
    states = states_by_record(journal, last_writes(journal))
    journal.write_now()
    path = "j/00000000000000000001.log"
    whole = disk.contents(path)
    seen = set()
    for cut in range(durable_bytes, len(whole) + 1):
        missing = len(whole) - cut
        rest = {"missing": b"", "zeros": bytes(missing), "noise": Random(cut).randbytes(missing)}[tail]
        torn = disk.clone()
        torn.overwrite(path, whole[:cut] + rest)
        findings = list(verify(torn, "j"))
        assert all(finding.severity is Severity.TORN for finding in findings)
        recovered = Journal.open(torn, "j")
        state = states.index(read_all(recovered))
        seen.add(state)
        padding = recovered.report.torn_bytes + recovered.bytes_on_disk - len(whole[:cut] + rest)
        assert 0 <= padding < 8
        assert len(findings) == (recovered.report.torn_bytes > 0)
        log = recovered.group(1)
        log.append(b"life goes on", log.last_position + 1, 9)
        recovered.close()
        assert Journal.open(torn, "j").group(1).payload(log.last_position) == b"life goes on"
    assert seen == set(range(len(states)))


@pytest.mark.parametrize("peaceful", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flipped_bit_anywhere_is_found_or_harmless(peaceful: bool, flip: int) -> None:
    """After a peaceful end any flipped bit is refused or changes nothing; after a kill the last batch may be cut."""
    disk = SimDisk(Random(3))
    journal = filled(disk, "j", file_bytes_max=700, entries=6)
    states = [read_all(journal)]
    log = journal.group(1)
    log.append(b"last", 7, 5)
    states.append(read_all(journal))
    log.append(b"of all", 8, 5)
    states.append(read_all(journal))
    journal.write_now()
    if peaceful:
        journal.close()
        states = states[-1:]
    refused = 0
    for name in disk.list("j"):
        for offset in range(len(disk.contents(f"j/{name}"))):
            rotten = disk.clone()
            rotten.rot(f"j/{name}", offset, flip=flip)
            try:
                found = read_all(Journal.open(rotten, "j"))
            except JournalDamaged as damage:
                refused += 1
                assert name in damage.message and "offset" in damage.message and "Restore" not in damage.message
                assert [finding.severity for finding in verify(rotten, "j")] == [Severity.DAMAGED]
                continue
            assert found in states, f"{name} at {offset}"
    assert refused > 0.6 * sum(len(disk.contents(f"j/{name}")) for name in disk.list("j"))


def test_damage_changes_nothing_on_disk() -> None:
    """A journal that is refused is left as it is, for a person to look at."""
    disk = SimDisk(Random(3))
    filled(disk, "j").close()
    name = disk.list("j")[1]
    disk.rot(f"j/{name}", HEADER_BYTES + 5)
    before = {name: disk.contents(f"j/{name}") for name in disk.list("j")}
    with pytest.raises(JournalDamaged, match=name):
        Journal.open(disk, "j")
    assert {name: disk.contents(f"j/{name}") for name in disk.list("j")} == before


def missing_file(disk: SimDisk, names: list[str]) -> None:
    disk.remove(f"j/{names[1]}")


def missing_first_file(disk: SimDisk, names: list[str]) -> None:
    disk.remove(f"j/{names[0]}")


def swapped_files(disk: SimDisk, names: list[str]) -> None:
    first, second = disk.contents(f"j/{names[0]}"), disk.contents(f"j/{names[1]}")
    disk.overwrite(f"j/{names[0]}", second)
    disk.overwrite(f"j/{names[1]}", first)


def shortened_file(disk: SimDisk, names: list[str]) -> None:
    disk.overwrite(f"j/{names[1]}", disk.contents(f"j/{names[1]}")[:-64])


def emptied_file(disk: SimDisk, names: list[str]) -> None:
    disk.overwrite(f"j/{names[1]}", b"")


def missing_first_file_and_torn_end(disk: SimDisk, names: list[str]) -> None:
    disk.remove(f"j/{names[0]}")
    disk.overwrite(f"j/{names[-1]}", disk.contents(f"j/{names[-1]}") + b"torn")


def older_copy(disk: SimDisk, names: list[str]) -> None:
    disk.overwrite(f"j/{names[2]}", disk.contents(f"j/{names[1]}"))


@pytest.mark.parametrize(
    "harm",
    [
        missing_first_file_and_torn_end,
        missing_file,
        missing_first_file,
        swapped_files,
        shortened_file,
        emptied_file,
        older_copy,
    ],
)
def test_files_that_do_not_fit_together_are_refused(harm: Callable[[SimDisk, list[str]], None]) -> None:
    """What a careless hand does to whole files is damage, with a message that names a file."""
    disk = SimDisk(Random(3))
    filled(disk, "j", entries=20).close()
    names = disk.list("j")
    assert len(names) > 3
    harm(disk, names)
    with pytest.raises(JournalDamaged, match=r"0000\d+\.log"):
        Journal.open(disk, "j")


def test_a_record_in_the_wrong_place_is_no_record() -> None:
    """A whole record verifies only in the file and at the offset for which it was made."""
    facts = {"group": 1, "position": 2, "term": 3, "durable": 4}
    head, padding = encode(Kind.ENTRY, b"payload", **facts, file_number=5, offset=64)
    data = memoryview(head + b"payload" + padding)
    assert decode(data, file_number=5, offset=64) == Record(Kind.ENTRY, **facts, offset=64, payload=b"payload")
    assert decode(data, file_number=5, offset=72) is None
    assert decode(data, file_number=6, offset=64) is None


def test_an_entry_that_rots_while_the_node_runs_is_not_served() -> None:
    """Reading back verifies: a flipped byte raises instead of being returned."""
    disk = SimDisk(Random(3))
    filled(disk, "j", file_bytes_max=1 << 20).close()
    journal = Journal.open(disk, "j", cache_bytes_max=0)
    contents = disk.contents("j/00000000000000000001.log")
    disk.rot("j/00000000000000000001.log", contents.index(b"a9a9"))
    with pytest.raises(JournalDamaged, match="position 9 of group 1"):
        journal.group(1).payload(9)
    assert journal.group(1).payload(8) == b"a8" * 8


# ---- a full disk, a failed fsync


def test_a_full_disk_loses_nothing_and_ends() -> None:
    """Nothing is acknowledged while there is no room; the same bytes are written when there is; appends may go on."""
    disk = SimDisk(Random(3))
    journal = Journal.open(disk, "j", file_bytes_max=2_000)
    log = journal.group(1)
    log.append(b"safe", 1, 1)
    journal.write_now()
    disk.capacity_bytes = disk.total_bytes + 1_000
    for position in range(2, 8):
        log.append(bytes([position]) * 700, position, 1)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            journal.write_now()
        assert (log.durable_position, journal.halted) == (1, False)
    log.append(b"meanwhile", 8, 1)
    disk.capacity_bytes = None
    assert journal.write_now() == {1}
    assert log.durable_position == 8
    expected = read_all(journal)
    disk.crash()
    assert read_all(Journal.open(disk, "j")) == expected


def test_power_loss_on_a_full_disk_leaves_a_torn_end() -> None:
    """A batch that was half written for want of room and then lost its power is cut."""
    for seed in range(30):
        disk = SimDisk(Random(seed))
        journal = filled(disk, "j")
        expected = read_all(journal)
        disk.capacity_bytes = disk.total_bytes + 900
        journal.group(1).append(bytes(700), 13, 2)
        journal.group(2).append(bytes(700), 13, 2)
        with pytest.raises(OSError, match="No space"):
            journal.write_now()
        disk.crash()
        disk.capacity_bytes = None
        found = read_all(Journal.open(disk, "j"))
        found[1].entries.pop(13, None)
        assert found == expected


def test_the_reserve_lets_a_full_disk_be_emptied() -> None:
    """With no byte left, a trim still gets through, frees files, and says that the reserve is gone."""
    disk = SimDisk(Random(3))
    journal = Journal.open(disk, "j", file_bytes_max=1_000, reserve_bytes=4_096)
    log = journal.group(1)
    for position in range(1, 11):
        log.append(bytes(700), position, 1)
    journal.write_now()
    disk.capacity_bytes = disk.total_bytes
    held_before, used = journal.reserve_held, disk.total_bytes
    log.trim_below(10)
    journal.write_now()
    assert (held_before, journal.reserve_held) == (True, False)
    assert disk.total_bytes < used - 4_096 - 7 * 700
    journal.close()
    disk.capacity_bytes = None
    assert Journal.open(disk, "j", reserve_bytes=4_096).reserve_held


@pytest.mark.parametrize("number", [EIO, ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_failed_fsync_halts_for_good(number: int) -> None:
    """After a failed fsync nothing is acknowledged any more, even if the next one would succeed; a restart goes on."""
    disk = SimDisk(Random(3))
    journal = filled(disk, "j")
    expected = read_all(journal)
    journal.group(1).append(b"doubtful", 13, 1)
    disk.failing_syncs, disk.sync_errno = 1, number
    batch = journal.take_batch()
    assert batch is not None
    with pytest.raises(OSError, match=r"Input/output|No space") as failure:
        batch.write()
    with pytest.raises(JournalHalted, match="syncing"):
        journal.batch_failed(batch, failure.value)
    assert journal.halted
    for refused in (
        journal.take_batch,
        lambda: journal.group(1).append(b"more", 14, 1),
        lambda: journal.group(1).set_hard_state(9, None),
        lambda: journal.forget(1),
    ):
        with pytest.raises(JournalHalted):
            refused()
    assert journal.group(1).durable_position == 12
    journal.close()
    disk.crash()
    assert read_all(Journal.open(disk, "j")) == expected


def test_a_failed_write_that_is_not_a_full_disk_halts() -> None:
    """EIO on a write is not "try again"."""
    journal = filled(SimDisk(Random(3)), "j")
    journal.group(1).append(b"doubtful", 13, 1)
    batch = journal.take_batch()
    assert batch is not None
    with pytest.raises(JournalHalted):
        journal.batch_failed(batch, OSError(EIO, "Input/output error"))


@pytest.mark.parametrize("call", ["open", "sync_directory"])
def test_a_missing_descriptor_is_waited_for(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE while a file begins, before its write or after its sync, leaves the batch to be written again."""
    disk = SimDisk(Random(3))
    journal = filled(disk, "j")
    journal.group(1).append(b"x" * 700, 13, 1)
    with monkeypatch.context() as patch:
        patch.setattr(disk, call, _without_descriptor)
        for _ in range(2):
            batch = journal.take_batch()
            assert batch is not None
            with pytest.raises(OSError, match="open files") as failure:
                batch.write()
            journal.batch_failed(batch, failure.value)
            assert journal.group(1).durable_position == 12
    journal.write_now()
    assert journal.group(1).durable_position == 13
    expected = read_all(journal)
    disk.crash()
    assert read_all(Journal.open(disk, "j")) == expected


def _without_descriptor(*_: object, **__: object) -> None:
    raise OSError(EMFILE, "Too many open files")


def test_a_closed_journal_refuses_writes() -> None:
    journal = filled(SimDisk(Random(3)), "j")
    journal.close()
    with pytest.raises(JournalHalted, match="closed"):
        journal.group(1).append(b"late", 13, 1)


def test_one_sync_serves_all_groups() -> None:
    """A batch with entries of 64 groups costs one datasync."""
    disk = SimDisk(Random(3))
    journal = Journal.open(disk, "j")
    before = disk.syncs
    for group_id in range(64):
        journal.group(group_id).append(b"x", 1, 1)
    assert journal.write_now() == set(range(64))
    assert disk.syncs == before + 1
