"""What must be there: per collection a mapping key -> version, and the requests whose outcome nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tools.crash.rows import Key, Subject, Version


class Kind(StrEnum):
    """How a node can break its word."""

    LOST = "lost"  # an acknowledged row is not there
    GHOST = "ghost"  # a row is there that was deleted, or never written
    STALE = "stale"  # a row is there in another version than the last acknowledged one
    DOUBLED = "doubled"  # a key is there more than once
    HALF = "half"  # an unanswered request is there in part, within one shard
    DAMAGED = "damaged"  # a value differs from what was written
    COUNT = "count"  # count(*) differs from the scan
    SEARCH = "search"  # a search missed a row, showed one that is not there, or scored it wrongly
    READ = "read"  # a read beside the writers was not what was acknowledged
    CATALOGUE = "catalogue"  # an acknowledged creation or drop did not hold
    REFUSED = "refused"  # a valid request was refused as invalid
    CHECK = "check"  # `node check` finds fault with the directory
    PROCESS = "process"  # the node ended by itself, would not start, or would not stop


@dataclass(frozen=True)
class Violation:
    """One broken promise."""

    kind: Kind
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.text}"


@dataclass(frozen=True)
class Write:
    """One request to write: what each key holds once it has happened, None for nothing."""

    number: int
    after: Mapping[Key, Version | None]


Split = Callable[[Subject, Sequence[Key]], list[list[Key]]]
"""Parts a request's keys as the node parts them over shards."""


@dataclass
class Model:
    """One collection as its clients know it."""

    subject: Subject
    rows: dict[Key, Version] = field(default_factory=dict)
    """What is acknowledged, and not deleted."""
    unknown: list[Write] = field(default_factory=list)
    """Requests without an answer. A key is in at most one of them: its writer stops."""
    under_way: set[Key] = field(default_factory=set)
    touched: dict[Key, int] = field(default_factory=dict)
    """How often a key was written to; a reader compares it before and after."""
    gone: dict[Key, Version] = field(default_factory=dict)
    """The last versions of rows that are not there any more."""

    def begin(self, write: Write) -> None:
        """A request is about to be sent."""
        assert not self.under_way & set(write.after), "a key has one writer, which waits"
        self.under_way |= set(write.after)
        for key in write.after:
            self.touched[key] = self.touched.get(key, 0) + 1

    def acknowledge(self, write: Write) -> None:
        """The node has said that it happened."""
        self.under_way -= set(write.after)
        for key, version in write.after.items():
            self._set(key, version)

    def refuse(self, write: Write) -> None:
        """The node has said that it did not happen."""
        self.under_way -= set(write.after)

    def lose_sight(self, write: Write) -> None:
        """Nobody said anything. The keys stay under way until `settle`."""
        self.unknown.append(write)

    def settle(self, found: Mapping[Key, Sequence[Version]], split: Split) -> list[Violation]:
        """Compare with all rows of the quiet collection, believe them from now on, and return what was wrong."""
        violations = list(self._judge(found, split))
        self.unknown.clear()
        self.under_way.clear()
        for key in self.rows.keys() | found.keys():
            versions = found.get(key, ())
            self._set(key, versions[-1] if versions else None)
        return violations

    def _judge(self, found: Mapping[Key, Sequence[Version]], split: Split) -> Iterable[Violation]:
        where = self.subject.name
        pending = {key: write for write in self.unknown for key in write.after}
        for key in sorted(self.rows.keys() | found.keys() | pending.keys()):
            versions = found.get(key, ())
            if len(versions) > 1:
                yield Violation(Kind.DOUBLED, where, f"key {key} is there {len(versions)} times, as {list(versions)}")
                continue
            seen = versions[0] if versions else None
            allowed = {self.rows.get(key)} | ({pending[key].after[key]} if key in pending else set())
            if seen not in allowed:
                yield Violation(*self._complaint(key, seen, allowed))
        for write in self.unknown:
            yield from self._halves(write, found, split)

    def _complaint(self, key: Key, seen: Version | None, allowed: set[Version | None]) -> tuple[Kind, str, str]:
        if seen is None:
            return Kind.LOST, self.subject.name, f"key {key} is not there, acknowledged as {self.rows.get(key)}"
        if allowed == {None}:
            last = self.gone.get(key)
            return Kind.GHOST, self.subject.name, f"key {key} is there as {seen}, but is deleted (last {last})"
        return Kind.STALE, self.subject.name, f"key {key} is there as {seen}, allowed {sorted(map(str, allowed))}"

    def _halves(self, write: Write, found: Mapping[Key, Sequence[Version]], split: Split) -> Iterable[Violation]:
        for part in split(self.subject, list(write.after)):
            telling = [key for key in part if write.after[key] != self.rows.get(key)]
            happened = [key for key in telling if (found.get(key) or (None,))[0] == write.after[key]]
            if happened and len(happened) < len(telling):
                missing = sorted(set(telling) - set(happened))
                text = f"request {write.number}: {len(happened)} of {len(telling)} keys happened, not {missing[:5]}"
                yield Violation(Kind.HALF, self.subject.name, text)

    def _set(self, key: Key, version: Version | None) -> None:
        before = self.rows.pop(key, None)
        if before is not None and before != version:
            self.gone[key] = before
        if version is not None:
            self.rows[key] = version
