"""What a node knows about each group's log without its payloads: where every entry lies, its term, vote, base.

A live journal and one that recovers drive the same `GroupState.apply`, record by record, so what a restart finds is by
construction what the process believed; the first record of each file repeats the states (`pack_states`), and recovery
compares.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from struct import Struct, error
from typing import Final

from storage.journal_records import Kind

FORMAT: Final = 1
_TABLE = Struct("<II")
_ROW = Struct("<IQQQQH")

NOWHERE: Final = 0
"""LSN of an entry whose record lies in a file that was dropped. No entry is at 0, where the first FILE record is."""


class Impossible(ValueError):
    """A record that does not follow from the state before it: a bug when we write it, damage when we read it."""


class GroupState:
    """One group's log without the payloads: 20 bytes of memory per entry.

    Invariants
      1. Entries are base + 1 ... last without gaps; terms never fall along them.
      2. `lsns` rises along the log, but for a run of NOWHERE at its front while files are replayed.
    """

    __slots__ = (
        "base",
        "base_term",
        "group_id",
        "hard_state_lsn",
        "lengths",
        "lsns",
        "reset_lsn",
        "term",
        "terms",
        "touched_lsn",
        "vote",
    )

    def __init__(self, group_id: int) -> None:
        self.group_id = group_id
        self.base = 0
        """Position below the first entry: what a snapshot or checkpoint covers."""
        self.base_term = 0
        self.term = 0
        self.vote: str | None = None
        self.terms, self.lsns, self.lengths = array("Q"), array("Q"), array("I")
        self.reset_lsn = 0
        """Where the RESET record lies that made the base, if one did."""
        self.hard_state_lsn = 0
        """Where the latest term and vote lie, if this process wrote any."""
        self.touched_lsn = 0
        """Where the latest record of this group lies."""

    @property
    def last(self) -> int:
        return self.base + len(self.lsns)

    def term_at(self, position: int) -> int:
        if position == self.base:
            return self.base_term
        if not self.base < position <= self.last:
            raise IndexError(f"group {self.group_id} has positions {self.base}..{self.last}, not {position}")
        return self.terms[position - self.base - 1]

    def durable_position(self, durable_lsn: int) -> int:
        """Return the last position that survives if everything at and above `durable_lsn` is lost."""
        if self.reset_lsn and self.reset_lsn >= durable_lsn:
            return 0
        return self.base + bisect_left(self.lsns, durable_lsn)

    def apply(self, kind: Kind, *, position: int, term: int, payload: bytes, lsn: int) -> None:
        """Follow one record. Raises Impossible."""
        match kind:
            case Kind.ENTRY:
                if position != self.last + 1 or term < self.term_at(self.last):
                    raise Impossible(f"entry {position} of term {term} after {self.last} of {self.term_at(self.last)}")
                self.terms.append(term)
                self.lsns.append(lsn)
                self.lengths.append(len(payload))
            case Kind.TRUNCATE:
                if not self.base < position <= self.last:
                    raise Impossible(f"truncation from {position} of a log of {self.base}..{self.last}")
                self._cut(slice(position - self.base - 1, None))
            case Kind.TRIM:
                if not self.base < position <= self.last:
                    raise Impossible(f"trim to {position} of a log of {self.base}..{self.last}")
                self._cut(slice(0, position - self.base))
                self.base, self.base_term = position, term
            case Kind.RESET:
                self._cut(slice(None))
                self.base, self.base_term, self.reset_lsn = position, term, lsn
            case Kind.HARD_STATE:
                if term < self.term:
                    raise Impossible(f"term {term} after {self.term}")
                self.term, self.vote = term, payload.decode() or None
                self.hard_state_lsn = lsn
            case _:
                raise Impossible(f"{kind.name} is not about a group")
        self.touched_lsn = lsn

    def _cut(self, gone: slice) -> None:
        del self.terms[gone], self.lsns[gone], self.lengths[gone]

    def lost_entry(self) -> int | None:
        """Return a position whose record is in no file, or None."""
        return self.base + 1 if self.lsns and self.lsns[0] == NOWHERE else None


def pack_states(states: Iterable[GroupState]) -> bytes:
    """Return the payload of a FILE record."""
    rows = []
    for state in sorted(states, key=lambda state: state.group_id):
        vote = (state.vote or "").encode()
        rows.append(_ROW.pack(state.group_id, state.base, state.base_term, state.last, state.term, len(vote)) + vote)
    return _TABLE.pack(FORMAT, len(rows)) + b"".join(rows)


def unpack_states(payload: bytes) -> dict[int, GroupState]:
    """Return the states of a FILE record; their entries are known by number only. Raises Impossible."""
    try:
        version, rows = _TABLE.unpack_from(payload)
        if version != FORMAT:
            raise Impossible(f"format {version} is not the one this program reads ({FORMAT})")
        offset, states = _TABLE.size, {}
        for _ in range(rows):
            group_id, base, base_term, last, term, vote_bytes = _ROW.unpack_from(payload, offset)
            offset += _ROW.size
            state = states[group_id] = GroupState(group_id)
            state.base, state.base_term, state.term = base, base_term, term
            state.vote = payload[offset : offset + vote_bytes].decode() or None
            offset += vote_bytes
            for column in (state.terms, state.lsns, state.lengths):
                column.frombytes(bytes(column.itemsize * (last - base)))
            state.terms = array("Q", [base_term]) * (last - base)
        return states
    except (error, UnicodeDecodeError) as caught:
        raise Impossible(f"unreadable group table: {caught}") from caught
