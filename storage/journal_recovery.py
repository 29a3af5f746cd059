"""Reading a journal from disk: what a restart and the offline check have in common.

The files are one stream, addressed by LSN: a file's first record says at which LSN it begins. `Survey.run` follows the
stream from the oldest file and stops at the first place where no record verifies. Then there are two cases, told apart
by the records that lie beyond that place:

  * one of them says "durable up to beyond this place": acknowledged bytes were damaged, and the node must not start;
  * none does: the end of a write that was never acknowledged, because the power went while it was under way. It is cut.

A crash can also lose the *names* of files that were created in the interrupted write, some and not others, so a missing
file is the same case as a damaged record. Files are removed from the front one by one, each made durable, so that a
name that comes back is always the oldest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from storage.disk import Disk, File
from storage.errors import JournalDamaged
from storage.journal_records import Kind, Record, durable_beyond, read_records
from storage.journal_state import GroupState, Impossible, pack_states, unpack_states

log = logging.getLogger(__name__)


class Severity(Enum):
    TORN = "torn"  # heals by itself at the next start
    DAMAGED = "damaged"  # acknowledged bytes are lost; needs a person or a peer


@dataclass(frozen=True)
class Finding:
    """One thing about a journal that a person should know."""

    severity: Severity
    file: str
    offset: int
    what: str


@dataclass(frozen=True)
class RecoveryReport:
    """What opening a journal found and did."""

    files: int
    records: int
    groups: int
    stream_bytes: int
    torn_bytes: int
    torn_file: str | None


@dataclass(slots=True, eq=False)
class JournalFile:
    """One file of the stream."""

    number: int
    base_lsn: int
    handle: File | None
    length: int = 0
    header_bytes: int = 0
    """Length of the file's first record, which repeats the state of the groups."""
    named: bool = False
    """Whether the file's name is durable."""

    @property
    def end_lsn(self) -> int:
        return self.base_lsn + self.length


def file_name(number: int) -> str:
    """Return the name of a journal file; names sort as their numbers."""
    return f"{number:020d}.log"


class Survey:
    """One pass over a journal that changes nothing; `run` it, then read what it found."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self.disk, self.directory = disk, directory
        self.files: list[JournalFile] = []
        """The files that hold the stream; behind a torn place there is nothing."""
        self.states: dict[int, GroupState] = {}
        self.records = 0
        self.durable_lsn = 0
        """How far the records themselves say the stream was durable."""
        self.ends_marked = False
        self.torn_bytes = 0
        self.torn_file: str | None = None
        self.excess: list[str] = []
        """Names of files behind the torn place."""
        self._opened: list[JournalFile] = []

    @property
    def end_lsn(self) -> int:
        return self.files[-1].end_lsn if self.files else 0

    def run(self) -> Iterator[Finding]:
        """Follow the stream; yield what is wrong, and stop at the first such place."""
        names = [name for name in self.disk.list(self.directory) if name.endswith(".log") and name[:-4].isdigit()]
        for place, name in enumerate(names):
            file = JournalFile(int(name[:-4]), self.end_lsn, self.disk.open(self._path(name)))
            self._opened.append(file)
            if self.files and file.number != self.files[-1].number + 1:
                yield from self._broken(names[place:], file_name(self.files[-1].number + 1), 0, "the file is missing")
                return
            try:
                whole = self._follow(file)
            except Impossible as caught:
                yield Finding(Severity.DAMAGED, name, file.length, str(caught))
                return
            assert file.handle is not None
            if not whole or file.length < file.handle.size():
                yield from self._broken(names[place:], name, file.length, "no whole record here")
                return
        yield from self._lost_entries()

    def _follow(self, file: JournalFile) -> bool:
        """Apply the file's records and keep it, with `length` where they end; False if it does not even begin."""
        assert file.handle is not None
        for record in read_records(file.handle, file.number):
            if record.offset == 0:
                if not self._begins(file, record):
                    return False
                file.header_bytes = record.end
                self.files.append(file)
            lsn = file.base_lsn + record.offset
            if record.durable > lsn:
                raise Impossible(f"a record at {lsn} that says the stream was durable up to {record.durable}")
            self.durable_lsn = max(self.durable_lsn, record.durable)
            self._apply(record, lsn)
            self.records += 1
            self.ends_marked = record.kind is Kind.MARK
            file.length = record.end
        return file.length > 0

    def _begins(self, file: JournalFile, record: Record) -> bool:
        """Whether the first record of a file continues the stream."""
        if record.kind is not Kind.FILE or record.term != file.number:
            raise Impossible("the file does not begin with its own header")
        if not self.files:
            self.states = unpack_states(record.payload)
            file.base_lsn = record.position
        elif record.position == self.end_lsn and record.payload != pack_states(self.states.values()):
            raise Impossible("the groups that this file's header lists are not what the files before it say")
        return record.position == file.base_lsn

    def _apply(self, record: Record, lsn: int) -> None:
        if record.kind is Kind.FORGET:
            self.states.pop(record.group, None)
        elif record.kind not in (Kind.FILE, Kind.MARK):
            state = self.states.setdefault(record.group, GroupState(record.group))
            state.apply(record.kind, position=record.position, term=record.term, payload=record.payload, lsn=lsn)

    def _broken(self, names: list[str], name: str, offset: int, what: str) -> Iterator[Finding]:
        """Decide between torn and damaged for the place where the stream ends although bytes follow it."""
        end = self.end_lsn
        for behind in names:
            number = int(behind[:-4])
            handle = self.disk.open(self._path(behind))
            try:
                begin = offset if behind == name else 0
                witness = durable_beyond(handle, number, start=begin, lsn=end)
                self.torn_bytes += handle.size() - begin
            finally:
                handle.close()
            if witness is not None:
                what += f", but {behind} says at offset {witness} that the bytes here were durable"
                yield Finding(Severity.DAMAGED, name, offset, what)
                return
        if not self.files and names[0] != file_name(1):
            yield Finding(Severity.DAMAGED, name, offset, f"{what}, and the files before it were dropped long ago")
            return
        self.torn_file = name
        self.excess = names[1:] if self.files and file_name(self.files[-1].number) == names[0] else names
        yield Finding(Severity.TORN, name, offset, f"{what}; {self.torn_bytes} bytes that nobody was told about")
        yield from self._lost_entries()

    def _lost_entries(self) -> Iterator[Finding]:
        for state in self.states.values():
            position = state.lost_entry()
            if position is not None:
                what = f"group {state.group_id} needs position {position}, which no file holds"
                yield Finding(Severity.DAMAGED, file_name(self.files[0].number), 0, what)

    def close(self, *, keep: Sequence[JournalFile] = ()) -> None:
        """Close the files that were looked at, but for those to keep."""
        for file in self._opened:
            if file.handle is not None and file not in keep:
                file.handle.close()

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name}"


def recover(disk: Disk, directory: str) -> tuple[Survey, RecoveryReport]:
    """Read the journal, cut a torn end, make durable what remains.

    Raises JournalDamaged, naming the place, if acknowledged bytes are lost; then nothing was changed.
    """
    survey = Survey(disk, directory)
    for finding in survey.run():
        if finding.severity is Severity.DAMAGED:
            survey.close()
            raise damaged(directory, finding.file, finding.offset, finding.what)
        log.warning("journal cut file=%s offset=%d: %s", finding.file, finding.offset, finding.what)
    survey.close(keep=survey.files)
    # Until the names are gone for good the torn place stays as it is, so that a crash in between finds it again.
    for name in survey.excess:
        disk.remove(f"{directory}/{name}")
    disk.sync_directory(directory)
    for file in survey.files:
        assert file.handle is not None
        # Longer: a torn end. Shorter: the last record is whole but for the zeros that pad it.
        if file.handle.size() != file.length:
            file.handle.truncate(file.length)
        # What a killed process wrote but did not sync is readable now and would be believed from here on.
        if file.end_lsn > survey.durable_lsn:
            file.handle.datasync()
        file.named = True
    return survey, RecoveryReport(
        files=len(survey.files),
        records=survey.records,
        groups=len(survey.states),
        stream_bytes=sum(file.length for file in survey.files),
        torn_bytes=survey.torn_bytes,
        torn_file=survey.torn_file,
    )


def verify(disk: Disk, directory: str) -> Iterator[Finding]:
    """Yield what is wrong with a journal that no process has open; changes nothing. Nothing yielded: all is well."""
    survey = Survey(disk, directory)
    try:
        yield from survey.run()
    finally:
        survey.close()


def damaged(directory: str, file: str, offset: int, what: str) -> JournalDamaged:
    """Return the error for damage at a place."""
    return JournalDamaged(
        f"the journal is damaged at {directory}/{file} offset {offset}: {what}. Acknowledged writes may be lost, so "
        "this node does not start."
    )
