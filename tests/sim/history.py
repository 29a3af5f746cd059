"""What the clients of a simulated world asked and were told, and whether a database that keeps its promises says that.

    Strong      one copy of each key explains every answer: linearizable, key by key (tools/linearizable.py)
    Session     what the session wrote or read before is there, or something newer
    Bounded     nothing is missing that was acknowledged longer ago than the bound
    Eventually  every value was written once, and not after it was read
    all         what one request wrote to one shard is seen wholly or not at all

A version is the number of the request that wrote it, so a value tells which write it is of. Moments are seconds of
simulated time, made unique so that they give an order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from cluster.route import hash_keys
from node.service import Consistency
from tools.linearizable import Operation, around, first_violation

Version = int | None
"""What a key holds: the number of the write that made it, None for nothing."""
BOUND_S = 5.0
"""How far a Bounded read may be behind (design section 3)."""


class Violation(AssertionError):
    """The database broke a promise."""


@dataclass(eq=False)
class Write:
    """One request that writes: what each of its keys holds when it is done. `returned` stays infinite if not told."""

    client: str
    collection: str
    wanted: Mapping[int, Version]
    called: float
    returned: float = inf

    def __str__(self) -> str:
        versions = sorted({str(one) for one in self.wanted.values()})
        end = "?" if self.returned == inf else f"{self.returned:.4f}"
        return f"[{self.called:.4f}..{end}] {self.client} writes {'/'.join(versions)} to {sorted(self.wanted)}"


@dataclass(eq=False)
class Read:
    """One request that read: what each key that it looked at was found to hold."""

    client: str
    collection: str
    level: Consistency
    found: Mapping[int, Version]
    called: float
    returned: float


@dataclass
class Session:
    """What a client that reads at Session level has written and read."""

    known: dict[tuple[str, int], Write] = field(default_factory=dict)
    """(collection, key) -> of the writes that it was told of, or whose values it saw, the one that was called last:
    what must be seen because of another must be seen because of this one."""

    def learn(self, write: Write, keys: Iterable[int]) -> None:
        for key in keys:
            before = self.known.setdefault((write.collection, key), write)
            if write.called > before.called:
                self.known[write.collection, key] = write


class History:
    """Everything that was asked of one simulated world. `channels` gives the virtual channels of each collection."""

    def __init__(self, channels: Mapping[str, int], *, clock_error_s: float) -> None:
        self.channels = channels
        self.clock_error_s = clock_error_s
        """How much wall clocks differ from each other and from themselves."""
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.sessions: dict[str, Session] = {}
        self._moments = 0
        self._writes_of: dict[tuple[str, int], list[Write]] = {}
        self._sources_of: dict[tuple[str, int, Version], list[Write]] = {}
        self._shard_of: dict[tuple[str, int], int] = {}

    def moment(self, now_s: float) -> float:
        """Return `now_s`, a little later than any moment before."""
        self._moments += 1
        return now_s + self._moments * 1e-9

    def write(self, client: str, collection: str, wanted: Mapping[int, Version], now_s: float) -> Write:
        """Note a request that is about to be made."""
        made = Write(client, collection, dict(wanted), self.moment(now_s))
        self.writes.append(made)
        for key, version in made.wanted.items():
            self._writes_of.setdefault((collection, key), []).append(made)
            self._sources_of.setdefault((collection, key, version), []).append(made)
        return made

    def acknowledge(self, write: Write, now_s: float) -> None:
        write.returned = self.moment(now_s)
        self.sessions.setdefault(write.client, Session()).learn(write, write.wanted)

    def refuse(self, write: Write) -> None:
        """The request was refused before anything was written: it did not happen."""
        self.writes.remove(write)
        for key, version in write.wanted.items():
            self._writes_of[write.collection, key].remove(write)
            self._sources_of[write.collection, key, version].remove(write)

    def read(
        self,
        client: str,
        collection: str,
        level: Consistency,
        found: Mapping[int, Version],
        called: float,
        now_s: float,
    ) -> None:
        """Note the answer to a read; raise Violation if it breaks what can be told at once."""
        made = Read(client, collection, level, dict(found), called, self.moment(now_s))
        self.reads.append(made)
        self._check_whole(made)
        session = self.sessions.setdefault(client, Session())
        if level is Consistency.SESSION:
            self._check_session(made, session)
        elif level is Consistency.BOUNDED:
            self._check_fresh(made, called - BOUND_S - self.clock_error_s, "Bounded")
        elif level is Consistency.EVENTUALLY:
            self._check_fresh(made, -inf, "Eventually")
        for key, value in found.items():
            sources = self._sources(collection, key, value)
            if value is not None and len(sources) == 1:
                session.learn(sources[0], [key])

    def keys(self, collection: str) -> list[int]:
        """Return every key that was ever written."""
        return sorted(key for name, key in self._writes_of if name == collection)

    def unsure(self, collection: str, key: int) -> int:
        """Return how many writes of this key have no known outcome."""
        return sum(one.returned == inf for one in self._writes_of.get((collection, key), ()))

    def steady(self, collection: str, since: float) -> set[int]:
        """Return the keys that certainly held something all the time from `since` until now."""
        found = set()
        for (name, key), writes in self._writes_of.items():
            if name != collection:
                continue
            last = max((one.returned for one in writes), default=inf)
            if last <= since and _held_something(key, writes):  # else open, or acknowledged meanwhile
                found.add(key)
        return found

    # verdicts

    def check(self) -> None:
        """Raise Violation if the Strong reads of some key cannot be those of one copy."""
        reads: dict[tuple[str, int], list[Read]] = {}
        for read in self.reads:
            if read.level is Consistency.STRONG:
                for key in read.found:
                    reads.setdefault((read.collection, key), []).append(read)
        for where, mine in reads.items():
            collection, key = where
            history = [Operation(w.called, w.returned, True, w.wanted[key], w.client) for w in self._of(*where)]
            history += [Operation(r.called, r.returned, False, r.found[key], r.client) for r in mine]
            wrong = first_violation(history)
            if wrong is not None:
                lines = "\n".join(f"    {one}" for one in around(history, wrong))
                raise Violation(f"{collection} key {key}: no single copy answers {wrong}; before that:\n{lines}")

    def check_last(self, collection: str, found: Mapping[int, Version]) -> None:
        """Raise Violation if a request without known outcome is there by halves in the end.

        found  what every key holds after all requests have ended for good
        """
        for write in self.writes:
            if write.collection != collection or write.returned != inf:
                continue
            for keys in self._by_shard(collection, write.wanted):
                mine = [key for key in keys if self._is_last(collection, key, write) and self._tells(key, write)]
                done = {key for key in mine if found.get(key) == write.wanted[key]}
                undone = {key for key in mine if found.get(key) != write.wanted[key]}
                if done and undone:
                    raise Violation(f"{collection}: {write} is there by halves: {sorted(done)}, not {sorted(undone)}")

    def _of(self, collection: str, key: int) -> Sequence[Write]:
        return self._writes_of.get((collection, key), ())

    def _sources(self, collection: str, key: int, version: Version) -> Sequence[Write]:
        """Return the writes that wanted the key to hold this."""
        return self._sources_of.get((collection, key, version), ())

    def _is_last(self, collection: str, key: int, write: Write) -> bool:
        """Whether no other write of the key can have come after this one, nor beside it."""
        return all(one is write or one.returned < write.called for one in self._of(collection, key))

    def _tells(self, key: int, write: Write) -> bool:
        """Whether what the key holds after its last write says if that was done: not where nothing was deleted."""
        before = [one for one in self._of(write.collection, key) if one is not write]
        return write.wanted[key] is not None or _held_something(key, before)

    def _by_shard(self, collection: str, keys: Iterable[int]) -> list[list[int]]:
        chosen = list(keys)
        if fresh := [key for key in chosen if (collection, key) not in self._shard_of]:
            owner = hash_keys(np.array(fresh, np.int64)) % np.uint64(self.channels[collection])
            self._shard_of.update({(collection, key): one for key, one in zip(fresh, owner.tolist(), strict=True)})
        shards: dict[int, list[int]] = {}
        for key in chosen:
            shards.setdefault(self._shard_of[collection, key], []).append(key)
        return list(shards.values())

    def _check_whole(self, read: Read) -> None:
        """Raise if the read shows a request on one key and, on another of the same shard, what was there before it."""
        for keys in self._by_shard(read.collection, read.found):
            shown: dict[int, int] = {}
            for key in keys:
                if (version := read.found[key]) is not None:
                    shown.setdefault(version, key)
            for version, source in shown.items():
                writes = self._sources(read.collection, source, version)
                if len(writes) != 1:
                    continue  # a repeat of the same request: which one is seen where cannot be told
                (write,) = writes
                if len(write.wanted) == 1:
                    continue
                for key in keys:
                    if key in write.wanted and read.found[key] != version and self._is_older(read, key, write):
                        raise Violation(
                            f"{read.collection}: {read.client} at {read.level} saw {write} on key {source}, but "
                            f"version {read.found[key]} from before it on key {key} of the same shard"
                        )

    def _is_older(self, read: Read, key: int, write: Write) -> bool:
        """Whether what the read found under the key was certainly replaced by the write, if that was done."""
        found = read.found[key]
        sources = self._sources(read.collection, key, found)
        if found is None:
            return not sources
        return bool(sources) and all(one.returned < write.called for one in sources)

    def _check_fresh(self, read: Read, since: float, what: str) -> None:
        for key, value in read.found.items():
            newer = [] if since == -inf else [one for one in self._of(read.collection, key) if one.returned < since]
            self._check_value(read, key, value, newer, what)

    def _check_session(self, read: Read, session: Session) -> None:
        for key, value in read.found.items():
            newest = session.known.get((read.collection, key))
            self._check_value(read, key, value, () if newest is None else (newest,), "Session")

    def _check_value(self, read: Read, key: int, value: Version, newer: Sequence[Write], what: str) -> None:
        """Raise if nothing wrote the value in time, or each of its writes was certainly followed by one of `newer`."""
        ends = [one.returned for one in self._sources(read.collection, key, value) if one.called < read.returned]
        if value is None:
            ends.append(-inf)
        if not ends:
            raise Violation(
                f"{read.collection}: {what} read of key {key} gave version {value}, which nobody had written"
            )
        end = max(ends)
        missed = [one for one in newer if one.called > end]
        if missed:
            raise Violation(
                f"{read.collection}: {read.client} read key {key} at {what} at {read.called:.4f} and got {value}, but "
                f"must have seen {missed[-1]}"
            )


def _held_something(key: int, writes: Sequence[Write]) -> bool:
    """Whether the key certainly held something after these writes, all of which were answered."""
    newest = max(writes, key=lambda one: one.called, default=None)
    return newest is not None and all(one.wanted[key] is not None for one in writes if one.returned > newest.called)
