"""What the replicas of a Raft group say to each other, and the header and blobs of each message.

A header is a small dict of whole numbers and lists of them (it becomes CBOR); payloads travel as blobs beside it. Every
message carries its sender's term. `decode` accepts exactly what `encode` makes: a peer is authenticated, but it may run
another version, so a header is checked field by field before anything rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Final

from storage.types import Position

ROOT: Final = Position(1)
"""The position at which every log begins, an entry of term 0 that every replica has and nobody stores."""
NUMBER_MAX: Final = 1 << 62
ENTRIES_MAX: Final = 1 << 16
JOIN_BYTES_MAX: Final = 16 << 10
"""Payloads up to this size travel joined in one blob; larger ones are not copied."""

Header = dict[str, Any]
Blob = bytes | memoryview


class Malformed(ValueError):
    """A message that this version does not speak."""


@dataclass(frozen=True, slots=True)
class Append:
    """The leader's log from `previous + 1` on; with no entries, a sign of life and the commit index."""

    term: int
    sequence: int
    """Rises with every message of a leadership; the answer names it. 0 wants no answer."""
    previous: int
    previous_term: int
    commit: int
    terms: Sequence[int] = ()
    payloads: Sequence[Blob] = ()
    note: Any = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Missing:
    """The leader's log begins only after `base`, which the receiver does not reach: it needs a checkpoint."""

    term: int
    sequence: int
    base: int
    base_term: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Answer to all messages of this leadership up to `sequence`."""

    term: int
    sequence: int
    durable: int
    """The logs agree up to here, and the follower's is on its disk; 0 if nothing is known yet."""
    accepted: int
    """The logs agree up to here."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The logs do not meet at the message `sequence`; try to append at `position`."""

    term: int
    sequence: int
    position: int


@dataclass(frozen=True, slots=True)
class AskPreVote:
    """Would you vote for me in `term`, with a log that ends at `last`? Binds nobody."""

    term: int
    nonce: int
    last: int
    last_term: int


@dataclass(frozen=True, slots=True)
class GrantPreVote:
    term: int
    nonce: int


@dataclass(frozen=True, slots=True)
class AskVote:
    term: int
    last: int
    last_term: int
    is_transfer: bool
    """The leader itself asked for this election, so that nobody need protect it."""


@dataclass(frozen=True, slots=True)
class GrantVote:
    term: int


@dataclass(frozen=True, slots=True)
class HigherTerm:
    """What you said is of an older term than `term`."""

    term: int


@dataclass(frozen=True, slots=True)
class Campaign:
    """From the leader of `term`: stand for election now."""

    term: int


Message = (
    Append | Missing | Ack | Reject | AskPreVote | GrantPreVote | AskVote | GrantVote | HigherTerm | Campaign
)  # fmt: skip


_KINDS: Final[dict[type[Message], str]] = {
    Append: "ap",
    Missing: "ms",
    Ack: "ak",
    Reject: "rj",
    AskPreVote: "pv",
    GrantPreVote: "pg",
    AskVote: "vo",
    GrantVote: "vg",
    HigherTerm: "ht",
    Campaign: "ca",
}
_FLAGS: Final = {"is_transfer"}
"""Fields that are true or false; they come last. The others in a header's list are whole numbers."""
_LISTED: Final = {
    make: [field.name for field in fields(make) if field.name not in ("terms", "payloads", "note")] for make in _KINDS
}
_TAKERS: Final = {
    make: (kind, attrgetter(*_LISTED[make]) if len(_LISTED[make]) > 1 else lambda message: (message.term,))
    for make, kind in _KINDS.items()
}
_SHAPES: Final = {
    kind: (make, len(_LISTED[make]) - (_LISTED[make][-1] in _FLAGS), _LISTED[make][-1] in _FLAGS)
    for make, kind in _KINDS.items()
}
"""Kind -> what to make, how many numbers it has, and whether a flag follows."""


def encode(message: Message) -> tuple[Header, list[Blob]]:
    """Return header and blobs; large payloads are not copied.

    The header has the kind as "m" and the numbers and flags as the list "v"; an append has "e", the terms of its
    entries, "z", their lengths, and "n", the note.
    """
    kind, take = _TAKERS[type(message)]
    header: Header = {"m": kind, "v": list(take(message))}
    if type(message) is not Append:
        return header, []
    if message.note is not None:
        header["n"] = message.note
    if not message.terms:
        return header, []
    header["e"], header["z"] = list(message.terms), [len(payload) for payload in message.payloads]
    return header, list(_joined(message.payloads))


def decode(header: Mapping[str, Any], blobs: Sequence[Blob]) -> Message:
    """Return the message. Raises Malformed, naming the field."""
    kind = header.get("m") if isinstance(header, Mapping) else None
    shape = _SHAPES.get(kind) if isinstance(kind, str) else None
    if shape is None:
        raise Malformed(f"unknown kind {str(kind)[:20]!r}")
    make, count, is_flagged = shape
    values = header.get("v")
    if type(values) is not list or len(values) != count + is_flagged:
        raise Malformed(f"v is not a list of {count + is_flagged}")
    if is_flagged and type(values[-1]) is not bool:
        raise Malformed("v does not end with true or false")
    _check_numbers(values[:count] if is_flagged else values, "v")
    if make is Append:
        return _append(values, header, blobs)
    if blobs:
        raise Malformed(f"{len(blobs)} blobs with kind {kind!r}")
    return make(*values)


def _check_numbers(numbers: list[Any], key: str) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < NUMBER_MAX:
            raise Malformed(f"{key} holds what is not a number in range")


def _append(numbers: Sequence[int], header: Mapping[str, Any], blobs: Sequence[Blob]) -> Append:
    term, sequence, previous, previous_term, commit = numbers
    terms, lengths = header.get("e", []), header.get("z", [])
    for key, listed in (("e", terms), ("z", lengths)):
        if type(listed) is not list or len(listed) > ENTRIES_MAX:
            raise Malformed(f"{key} is not a list of bounded length")
        _check_numbers(listed, key)
    if len(terms) != len(lengths):
        raise Malformed(f"{len(terms)} terms with {len(lengths)} lengths")
    if previous < 1 or previous_term > term:
        raise Malformed(f"previous entry {previous} of term {previous_term} in a message of term {term}")
    latest = previous_term
    for entry_term in terms:
        if not latest <= entry_term <= term:
            raise Malformed(f"an entry of term {entry_term} after one of {latest} in a message of term {term}")
        latest = entry_term
    payloads = _parted(lengths, blobs)
    return Append(term, sequence, previous, previous_term, commit, terms, payloads, header.get("n"))


def _joined(payloads: Iterable[Blob]) -> Iterable[Blob]:
    """Yield blobs that hold the payloads end to end; none lies in two blobs."""
    small: list[Blob] = []
    for payload in payloads:
        if len(payload) <= JOIN_BYTES_MAX:
            if payload:
                small.append(payload)
            continue
        if small:
            yield b"".join(small)
            small = []
        yield payload
    if small:
        yield b"".join(small)


def _parted(lengths: Iterable[int], blobs: Sequence[Blob]) -> list[memoryview]:
    """Undo `_joined`. Raises Malformed if the blobs are not exactly that long."""
    if not all(isinstance(blob, (bytes, bytearray, memoryview)) for blob in blobs):
        raise Malformed("a blob is not bytes")
    views = [memoryview(blob) for blob in blobs]
    if any(view.ndim != 1 or view.itemsize != 1 for view in views):
        raise Malformed("a blob is not a row of bytes")
    payloads: list[memoryview] = []
    which, offset = 0, 0
    for length in lengths:
        if which < len(views) and offset == len(views[which]) and length:
            which, offset = which + 1, 0
        view = views[which] if which < len(views) else memoryview(b"")
        if offset + length > len(view):
            raise Malformed("the blobs are shorter than their lengths say")
        payloads.append(view[offset : offset + length])
        offset += length
    if sum(len(view) for view in views) != sum(len(payload) for payload in payloads):
        raise Malformed("the blobs are longer than their lengths say")
    return payloads
