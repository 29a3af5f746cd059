"""The journal: one append-only stream of bytes per node in which all Raft groups keep their logs.

One stream, because what costs is the fsync: everything that all groups wrote since the last one becomes durable with
the next (group commit). The stream is cut into files; it is only ever appended to. Removing from the back (a conflict)
and from the front (a checkpoint) are records too, so a crash at any byte leaves a state that was meant. A file goes
away whole, when no group needs an entry in it.

Who calls what:

    loop                                     worker thread
    group.append(...), group.trim_below(...)
    batch = journal.take_batch()
                                             batch.write()
    journal.batch_done(batch)  -> groups whose durable position or hard state moved
    journal.batch_failed(batch, error)       (write raised)

Everything but `WriteBatch.write` belongs to the loop and does not block, except that reading an entry that is no longer
cached reads its file. One batch is under way at a time; that is what fills the next one.

A process without a free descriptor is no failure of the disk either: only opening fails so, and it is tried again.

A full disk. If a *write* fails because there is no room, nothing was promised yet and no page is in doubt: the batch
stays and is written again, byte for byte at the same place, when the caller tries again. If *fsync* fails, the kernel
may have dropped the pages and marked them clean, so that a second fsync reports success for bytes that are gone; the
journal then halts for good, and only a restart, which reads what is really there, goes on. (PostgreSQL learnt this in
2018, "fsyncgate".) File systems that report a full disk only at fsync therefore halt the node; so do quotas on NFS.
To be able to delete on a full disk, the journal holds `reserve_bytes` in a file of zeros which it gives up when a batch
finds no room: `reserve_held` turns False, and its owner should then let through only what frees space. It must be
larger than what the owner lets wait (`pending_bytes`): a batch that does not fit stands in the way of those that trim.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from errno import EDQUOT, EMFILE, ENFILE, ENOSPC
from typing import ClassVar, Final, NamedTuple

from storage.disk import Disk
from storage.errors import StorageFault
from storage.journal_records import PAYLOAD_BYTES_MAX, Kind, encode, read_record, record_bytes
from storage.journal_recovery import (
    Finding,
    JournalFile,
    RecoveryReport,
    Severity,
    damaged,
    file_name,
    recover,
    verify,
)
from storage.journal_state import GroupState, pack_states
from storage.types import Position

__all__ = [
    "Journal",
    "GroupLog",
    "WriteBatch",
    "Pin",
    "JournalHalted",
    "RecoveryReport",
    "Finding",
    "Severity",
    "verify",
]

log = logging.getLogger(__name__)

FILE_BYTES_MAX: Final = 64 << 20
CACHE_BYTES_MAX: Final = 64 << 20
RESERVE_NAME: Final = "reserve"
JOIN_BYTES_MAX: Final = 32 << 10
"""Payloads up to this size are copied together into one buffer: cheaper than one vector element each."""


class JournalHalted(StorageFault):
    """The journal stopped because an fsync or a write failed for a reason other than a full disk."""

    code: ClassVar[str] = "journal_halted"


class Pin(NamedTuple):
    """A group that keeps old files alive: it should take a checkpoint and trim."""

    group_id: int
    pinned_bytes: int
    """Bytes of all files from the oldest one that the group needs."""


class _Planned(NamedTuple):
    """A record with its place, not yet written."""

    file: JournalFile
    offset: int
    kind: Kind
    group: int
    position: int
    term: int
    payload: bytes


class _Stage(Enum):
    WRITING = "writing"
    SYNCING = "syncing"
    DURABLE = "durable"


class WriteBatch:
    """The bytes of all groups since the last batch, on their way to the disk. Immutable but for its progress."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        planned: Sequence[_Planned],
        *,
        durable_lsn: int,
        end_lsn: int,
        removals: Sequence[JournalFile],
    ) -> None:
        self.disk, self.directory = disk, directory
        self.planned = planned
        self.durable_lsn, self.end_lsn = durable_lsn, end_lsn
        self.removals = removals
        self.removed: list[JournalFile] = []
        self.stage = _Stage.WRITING
        self.reserve_spent = False

    @property
    def size_bytes(self) -> int:
        return sum(record_bytes(len(record.payload)) for record in self.planned)

    def write(self) -> None:
        """Write, make durable, then remove the files that nothing needs any more. Blocks; for a worker thread.

        Raises OSError; the caller hands it to `Journal.batch_failed`.
        """
        self.stage = _Stage.WRITING
        try:
            touched = self._write_all()
        except OSError as caught:
            if not (_is_full(caught) and self._spend_reserve()):
                raise
            touched = self._write_all()
        self.stage = _Stage.SYNCING
        for file in touched:
            assert file.handle is not None
            file.handle.datasync()
        if not all(file.named for file in touched):
            self.disk.sync_directory(self.directory)
            for file in touched:
                file.named = True
        self.stage = _Stage.DURABLE
        self._remove_superfluous()

    def _remove_superfluous(self) -> None:
        """Only after the sync: now the records that make these files superfluous are durable."""
        for file in self.removals:
            try:
                self.disk.remove(f"{self.directory}/{file_name(file.number)}")
                self.disk.sync_directory(self.directory)
            except OSError as caught:
                log.warning("journal could not drop file=%s: %s", file_name(file.number), caught)
                return  # a later batch tries again, from the oldest on
            self.removed.append(file)

    def _write_all(self) -> list[JournalFile]:
        touched: list[JournalFile] = []
        start = 0
        while start < len(self.planned):
            file = self.planned[start].file
            stop = start
            while stop < len(self.planned) and self.planned[stop].file is file:
                stop += 1
            if file.handle is None:
                file.handle = self.disk.open(f"{self.directory}/{file_name(file.number)}", create=True)
            file.handle.write_at(self.planned[start].offset, self._buffers(self.planned[start:stop]))
            touched.append(file)
            start = stop
        return touched

    def _buffers(self, planned: Sequence[_Planned]) -> list[bytes | memoryview]:
        buffers: list[bytes | memoryview] = []
        small: list[bytes] = []
        for record in planned:
            head, padding = encode(
                record.kind,
                record.payload,
                group=record.group,
                position=record.position,
                term=record.term,
                durable=self.durable_lsn,
                file_number=record.file.number,
                offset=record.offset,
            )
            if len(record.payload) <= JOIN_BYTES_MAX:
                small += (head, record.payload, padding)
            else:
                buffers += (b"".join((*small, head)), record.payload)
                small = [padding]
        return [*buffers, b"".join(small)]

    def _spend_reserve(self) -> bool:
        if self.reserve_spent or RESERVE_NAME not in self.disk.list(self.directory):
            return False
        self.disk.remove(f"{self.directory}/{RESERVE_NAME}")
        self.reserve_spent = True
        self.disk.sync_directory(self.directory)
        return True


class Journal:
    """All groups' logs on one node.

    Invariants
      1. Records get rising addresses (LSN) in the order in which the loop made them, and reach the disk in that order.
      2. Below `durable_lsn` every byte is on the platter.
      3. A file is removed only after a record that makes it superfluous is durable.
    """

    def __init__(
        self,
        disk: Disk,
        directory: str,
        *,
        files: list[JournalFile],
        states: dict[int, GroupState],
        report: RecoveryReport,
        file_bytes_max: int,
        cache_bytes_max: int,
    ) -> None:
        """For `open` only."""
        self._disk, self._directory = disk, directory
        self._files = files
        self._states = states
        self._groups: dict[int, GroupLog] = {}
        self._planned: list[_Planned] = []
        self._unwritten: dict[int, bytes] = {}
        """LSN -> payload of entries that the disk does not have yet."""
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        """LSN -> payload, least recently used first. An address is never used twice, so nothing here goes stale."""
        self._cache_bytes = 0
        self._pending_bytes = 0
        self._batch: WriteBatch | None = None
        self._batch_in_flight = False
        self._halted: str | None = None
        self._marked = False
        self._waits = False
        """The last write found no room, which is told once."""
        self.durable_lsn = files[-1].end_lsn if files else 0
        self.file_bytes_max, self.cache_bytes_max = file_bytes_max, cache_bytes_max
        self.report = report
        self.reserve_held = False

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        *,
        file_bytes_max: int = FILE_BYTES_MAX,
        cache_bytes_max: int = CACHE_BYTES_MAX,
        reserve_bytes: int = 0,
    ) -> Journal:
        """Return the journal in `directory`, recovered; creates an empty one. Blocks.

        Raises JournalDamaged if acknowledged bytes are lost, and OSError; `verify` tells more.
        """
        disk.make_directory(directory)
        survey, report = recover(disk, directory)
        journal = cls(
            disk,
            directory,
            files=survey.files,
            states=survey.states,
            report=report,
            file_bytes_max=file_bytes_max,
            cache_bytes_max=cache_bytes_max,
        )
        journal._marked = survey.ends_marked
        if not journal._files:
            # At once, so that recovery can rely on file 1 being there before any other.
            journal._begin_file()
            journal.write_now()
        journal._hold_reserve(reserve_bytes)
        return journal

    def group(self, group_id: int) -> GroupLog:
        """Return the log of a group; one that was never written to is empty."""
        found = self._groups.get(group_id)
        if found is None:
            state = self._states.get(group_id) or GroupState(group_id)
            found = self._groups[group_id] = GroupLog(self, state)
        return found

    @property
    def group_ids(self) -> list[int]:
        """The groups that have ever written, and were not forgotten."""
        return sorted(self._states)

    def forget(self, group_id: int) -> None:
        """Drop a group's log and hard state: it has left this node."""
        self._check()
        self._groups.pop(group_id, None)
        if group_id in self._states:
            self._roll_for(record_bytes(0))
            del self._states[group_id]
            self._plan(Kind.FORGET, group=group_id, position=0, term=0, payload=b"")

    # ---- the way to the disk

    def take_batch(self) -> WriteBatch | None:
        """Return everything that waits for the disk, or None if nothing does or a batch is under way."""
        self._check()
        if self._batch_in_flight:
            return None
        if self._batch is None and self._planned:
            self._batch = WriteBatch(
                self._disk,
                self._directory,
                self._planned,
                durable_lsn=self.durable_lsn,
                end_lsn=self.end_lsn,
                removals=self._superfluous(),
            )
            self._planned = []
        self._batch_in_flight = self._batch is not None
        return self._batch

    def batch_done(self, batch: WriteBatch) -> set[int]:
        """Note that `batch` is durable. Returns the groups whose durable position or hard state moved."""
        assert batch is self._batch and self._batch_in_flight, "not the batch under way"
        assert batch.stage is _Stage.DURABLE, "the batch was not written"
        self._batch, self._batch_in_flight = None, False
        self._note_reserve(batch)
        if self._waits:
            self._waits = False
            log.info("journal goes on bytes=%d", batch.size_bytes)
        self.durable_lsn = batch.end_lsn
        self._pending_bytes -= batch.size_bytes
        self._files = [file for file in self._files if file not in batch.removed]
        for file in batch.removed:
            if file.handle is not None:
                file.handle.close()
            log.info("journal file dropped file=%s bytes=%d", file_name(file.number), file.length)
        for record in batch.planned:
            if record.kind is Kind.ENTRY:
                lsn = record.file.base_lsn + record.offset
                self._remember(lsn, self._unwritten.pop(lsn))
        return {record.group for record in batch.planned if record.kind not in (Kind.FILE, Kind.MARK)}

    def batch_failed(self, batch: WriteBatch, error: OSError) -> None:
        """Note that `batch.write()` raised `error`.

        Returns if the disk was full before anything was synced, or a file could not be opened: `take_batch` gives the
        same batch again, and the caller tries again later. Raises JournalHalted otherwise; from then on every call
        does.
        """
        assert batch is self._batch and self._batch_in_flight, "not the batch under way"
        self._batch_in_flight = False
        self._note_reserve(batch)
        if (batch.stage is _Stage.WRITING and _is_full(error)) or _is_not_opened(error):
            if not self._waits:
                self._waits = True
                log.warning("journal waits bytes=%d: %s", batch.size_bytes, error)
            return
        self._halted = (
            f"the journal in {self._directory} failed while {batch.stage.value} {batch.size_bytes} bytes: {error}"
        )
        log.error("journal halted: %s", self._halted)
        self._check()

    def write_now(self) -> set[int]:
        """Write everything that waits, here and now. For start, stop and tests. Raises OSError, JournalHalted."""
        moved: set[int] = set()
        while (batch := self.take_batch()) is not None:
            try:
                batch.write()
            except OSError as caught:
                self.batch_failed(batch, caught)
                raise
            moved |= self.batch_done(batch)
        assert not self._batch_in_flight, "a batch is under way elsewhere"
        return moved

    def close(self) -> None:
        """Write what waits and a mark that it was all durable, then close the files. Blocks; no batch may be under way.

        The mark lets the next start tell damage at the very end from a torn write.
        """
        try:
            if self._halted is None:
                self.write_now()
                if not self._marked:
                    self._plan(Kind.MARK, group=0, position=0, term=0, payload=b"")
                    self.write_now()
        finally:
            self._halted = self._halted or "the journal is closed"
            for file in self._files:
                if file.handle is not None:
                    file.handle.close()

    # ---- facts

    @property
    def end_lsn(self) -> int:
        """Address of the next record."""
        return self._files[-1].end_lsn if self._files else 0

    @property
    def pending_bytes(self) -> int:
        """Bytes that are not durable yet, all of them in memory."""
        return self._pending_bytes

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.length for file in self._files)

    @property
    def files(self) -> int:
        return len(self._files)

    @property
    def cached_bytes(self) -> int:
        return self._cache_bytes

    def forget_cached(self) -> None:
        """Let go of the payloads kept for those who read what was just written; the disk has them."""
        self._cache.clear()
        self._cache_bytes = 0

    @property
    def halted(self) -> bool:
        return self._halted is not None

    def pinning(self) -> list[Pin]:
        """Return the groups that need an entry in a file other than the newest, the worst one first."""
        pins = []
        for group_id, state in self._states.items():
            if state.lsns and state.lsns[0] < self._files[-1].base_lsn:
                pins.append(Pin(group_id, self.end_lsn - self._file_of(state.lsns[0]).base_lsn))
        return sorted(pins, key=lambda pin: (-pin.pinned_bytes, pin.group_id))

    # ---- for GroupLog

    def record(self, state: GroupState, kind: Kind, *, position: int, term: int, payload: bytes = b"") -> None:
        """Add a record about a group, after its state has followed it."""
        self._check()
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise ValueError(f"an entry of {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX}")
        self._roll_for(record_bytes(len(payload)))
        lsn = self.end_lsn
        state.apply(kind, position=position, term=term, payload=payload, lsn=lsn)
        self._states[state.group_id] = state
        if kind is Kind.ENTRY:
            self._unwritten[lsn] = payload
        self._plan(kind, group=state.group_id, position=position, term=term, payload=payload)

    def read(self, state: GroupState, position: int) -> bytes:
        """Return an entry's payload. Raises JournalDamaged if the disk gives back something else."""
        place = position - state.base - 1
        lsn, payload_bytes = state.lsns[place], state.lengths[place]
        found = self._unwritten.get(lsn)
        if found is not None:
            return found
        found = self._cache.get(lsn)
        if found is not None:
            self._cache.move_to_end(lsn)
            return found
        file = self._file_of(lsn)
        assert file.handle is not None
        offset = lsn - file.base_lsn
        record = read_record(file.handle, file_number=file.number, offset=offset, payload_bytes=payload_bytes)
        if record is None or (record.kind, record.group, record.position) != (Kind.ENTRY, state.group_id, position):
            what = f"position {position} of group {state.group_id} does not verify"
            raise damaged(self._directory, file_name(file.number), offset, what)
        self._remember(lsn, record.payload)
        return record.payload

    # ---- inside

    def _plan(self, kind: Kind, *, group: int, position: int, term: int, payload: bytes) -> None:
        size = record_bytes(len(payload))
        file = self._files[-1]
        self._planned.append(_Planned(file, file.length, kind, group, position, term, payload))
        file.length += size
        self._pending_bytes += size
        self._marked = kind is Kind.MARK

    def _roll_for(self, size: int) -> None:
        """Begin a new file if the current one has records and no room for `size` more bytes."""
        file = self._files[-1]
        # Without the header, whose size grows with the groups and may alone exceed a small limit.
        filled = file.length - file.header_bytes
        if filled and filled + size > self.file_bytes_max:
            self._begin_file()

    def _begin_file(self) -> None:
        number = self._files[-1].number + 1 if self._files else 1
        base_lsn = self.end_lsn
        table = pack_states(self._states.values())
        file = JournalFile(number, base_lsn, handle=None)
        file.length = file.header_bytes = record_bytes(len(table))
        self._files.append(file)
        self._planned.append(_Planned(file, 0, Kind.FILE, 0, base_lsn, number, table))
        self._pending_bytes += file.length

    def _superfluous(self) -> list[JournalFile]:
        """The oldest files in which no group needs an entry; never the newest."""
        needed = min((state.lsns[0] for state in self._states.values() if state.lsns), default=self.end_lsn)
        count = 0
        while count < len(self._files) - 1 and self._files[count].end_lsn <= needed:
            count += 1
        return self._files[:count]

    def _file_of(self, lsn: int) -> JournalFile:
        return self._files[bisect_right(self._files, lsn, key=lambda file: file.base_lsn) - 1]

    def _remember(self, lsn: int, payload: bytes) -> None:
        if len(payload) > self.cache_bytes_max:
            return
        self._cache[lsn] = payload
        self._cache_bytes += len(payload)
        while self._cache_bytes > self.cache_bytes_max:
            _, gone = self._cache.popitem(last=False)
            self._cache_bytes -= len(gone)

    def _hold_reserve(self, reserve_bytes: int) -> None:
        """Make sure that the reserve exists, if there is room for it."""
        path = f"{self._directory}/{RESERVE_NAME}"
        if reserve_bytes == 0 or RESERVE_NAME in self._disk.list(self._directory):
            self.reserve_held = reserve_bytes > 0
            return
        file = self._disk.open(path, create=True)
        try:
            file.write_at(0, [bytes(reserve_bytes)])
            file.datasync()
            self._disk.sync_directory(self._directory)
            self.reserve_held = True
        except OSError as caught:
            if not _is_full(caught):
                raise
            self._disk.remove(path)
        finally:
            file.close()

    def _note_reserve(self, batch: WriteBatch) -> None:
        if batch.reserve_spent and self.reserve_held:
            self.reserve_held = False
            log.warning("journal gave up its reserve: the disk is full")

    def _check(self) -> None:
        if self._halted is not None:
            raise JournalHalted(self._halted)


@dataclass(frozen=True)
class HardState:
    """What a Raft voter must never forget."""

    term: int
    vote: str | None


class GroupLog:
    """One Raft group's log inside the journal.

    Positions base + 1 ... last hold entries; `base` itself is covered by a checkpoint or snapshot, and its term is
    known. What is added here is durable when `durable_position` says so, and not before.
    """

    def __init__(self, journal: Journal, state: GroupState) -> None:
        self._journal, self._state = journal, state

    @property
    def group_id(self) -> int:
        return self._state.group_id

    @property
    def base_position(self) -> Position:
        return Position(self._state.base)

    @property
    def first_position(self) -> Position:
        """Position of the first entry; one more than `last_position` if there is none."""
        return Position(self._state.base + 1)

    @property
    def last_position(self) -> Position:
        """Position of the last entry; `base_position` if there is none."""
        return Position(self._state.last)

    @property
    def last_term(self) -> int:
        return self._state.term_at(self._state.last)

    @property
    def durable_position(self) -> Position:
        """The log up to here survives any crash."""
        return Position(self._state.durable_position(self._journal.durable_lsn))

    @property
    def hard_state(self) -> HardState:
        return HardState(self._state.term, self._state.vote)

    @property
    def is_durable(self) -> bool:
        """Whether everything this log was told is durable, hard state included."""
        return self._state.touched_lsn < self._journal.durable_lsn

    @property
    def is_hard_state_durable(self) -> bool:
        """Whether term and vote survive any crash as they are."""
        return self._state.hard_state_lsn < self._journal.durable_lsn

    def term_at(self, position: int) -> int:
        """Return the term of an entry, or of the base. Raises IndexError outside of them."""
        return self._state.term_at(position)

    def payload(self, position: int) -> bytes:
        """Return an entry's payload, from memory or disk. Raises IndexError, and JournalDamaged if the disk lies."""
        self._expect(position)
        return self._journal.read(self._state, position)

    def payload_bytes(self, position: int) -> int:
        """Return the size of an entry's payload without reading it."""
        self._expect(position)
        return self._state.lengths[position - self._state.base - 1]

    def append(self, payload: bytes, position: int, term: int) -> None:
        """Add the entry after the last one. Raises Impossible (a ValueError) if it is not that."""
        self._journal.record(self._state, Kind.ENTRY, position=position, term=term, payload=payload)

    def truncate_from(self, position: int) -> None:
        """Remove the entries at and above `position`, which a leader has overruled."""
        if position <= self._state.last:
            self._journal.record(self._state, Kind.TRUNCATE, position=position, term=0)

    def trim_below(self, position: int) -> None:
        """Remove the entries below `position`: a durable checkpoint covers them. Their durability is required."""
        if position <= self.first_position:
            return
        if position - 1 > self.durable_position:
            raise ValueError(f"group {self.group_id} is durable up to {self.durable_position}, not {position - 1}")
        self._journal.record(self._state, Kind.TRIM, position=position - 1, term=self.term_at(position - 1))

    def reset(self, position: int, term: int) -> None:
        """Replace the whole log by a snapshot that covers everything up to `position`, an entry of `term`."""
        self._journal.record(self._state, Kind.RESET, position=position, term=term)

    def set_hard_state(self, term: int, vote: str | None) -> None:
        """Remember term and vote. No message may rest on them before `is_durable`."""
        if self.hard_state != HardState(term, vote):
            payload = (vote or "").encode()
            self._journal.record(self._state, Kind.HARD_STATE, position=0, term=term, payload=payload)

    def _expect(self, position: int) -> None:
        if not self._state.base < position <= self._state.last:
            raise IndexError(
                f"group {self.group_id} has entries {self.first_position}..{self.last_position}: {position}"
            )


def _is_full(error: OSError) -> bool:
    return error.errno in (ENOSPC, EDQUOT)


def _is_not_opened(error: OSError) -> bool:
    """Whether there was no descriptor to open a file with; no write and no sync fails so, hence none is in doubt."""
    return error.errno in (EMFILE, ENFILE)
