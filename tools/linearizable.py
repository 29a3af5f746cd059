"""Is there one order that explains what clients of a register saw? For the simulation and for chaos, key by key.

A history is linearizable if each operation can be given one moment between its call and its return so that, in the
order of these moments, every read shows what the last write before it wrote (Herlihy and Wing, 1990). Keys are
independent, so each key's history is judged by itself.

The search goes through calls and returns in the order of time and keeps every configuration that may still hold: what
the register holds, and which of the operations under way have had their moment ("just-in-time" linearization: Lowe,
Testing for linearizability, 2017). Four rules keep the configurations few and lose no answer:

* A read that finds its value has its moment at once: it changes nothing.
* A write that nobody answered has its moment just before a read of its value, or never: nobody else can tell.
* Of unanswered writes of the same value, which differ in nothing, the one that was called first goes first.
* Of two configurations that differ only in the unanswered writes they have used, the thriftier is enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = Hashable
"""What a register holds; None for nothing."""
UNKNOWN = math.inf
"""`returned` of an operation that may happen at any time after its call, or never."""
CONFIGURATIONS_MAX = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A write of `value` or a read that showed it, from call to return, by one clock.

    An operation that was refused is left out of a history: it did not happen. A read without an answer says nothing.
    A repeat of a request is an operation of its own.
    """

    called: float
    returned: float
    is_write: bool
    value: Value
    note: str = ""
    """Who and where, for people."""

    def __str__(self) -> str:
        until = "?" if self.returned == UNKNOWN else f"{self.returned:.4f}"
        what = f"{'write' if self.is_write else 'read'} {self.value}"
        return f"[{self.called:.4f}..{until}] {what}{f' ({self.note})' if self.note else ''}"


class Undecided(Exception):
    """More configurations than memory should hold: too many operations at once on one key."""


def first_violation(history: Iterable[Operation], initial: Value = None) -> Operation | None:
    """Return the operation at whose return no order is left that explains the history, None if there always is one.

    Cost: about the square of the number of writes at the same time for each return. Raises Undecided.
    """
    operations = [one for one in history if one.is_write or one.returned != UNKNOWN]
    seen = {one.value for one in operations if not one.is_write}
    operations = [one for one in operations if one.returned != UNKNOWN or one.value in seen]
    moments = [(one.called, 0, number) for number, one in enumerate(operations)]
    moments += [(one.returned, 1, number) for number, one in enumerate(operations) if one.returned != UNKNOWN]
    search = _Search(operations, initial)
    for _, is_return, number in sorted(moments):
        if not is_return:
            search.call(number)
        elif not search.answer(number):
            return operations[number]
    return None


def around(history: Iterable[Operation], violation: Operation, *, shown_max: int = 12) -> list[Operation]:
    """Return the operations that were called before the violation's return, the last ones, in order of their calls."""
    before = sorted((one for one in history if one.called <= violation.returned), key=lambda one: one.called)
    return before[-shown_max:]


_Numbers: TypeAlias = frozenset[int]
_Configuration: TypeAlias = tuple[Value, _Numbers, _Numbers]
"""What the register holds; the operations under way that have had their moment; the unanswered writes that had one."""


class _Search:
    def __init__(self, operations: list[Operation], initial: Value) -> None:
        self._operations = operations
        self._reads: set[int] = set()
        self._writes: dict[int, None] = {}
        """Under way and to be answered, in order of their calls."""
        self._unanswered: dict[Value, list[int]] = {}
        self._configurations: set[_Configuration] = {(initial, frozenset(), frozenset())}

    def call(self, number: int) -> None:
        operation = self._operations[number]
        if not operation.is_write:
            self._reads.add(number)
            self._configurations = {self._after_reads(*one) for one in self._configurations}
        elif operation.returned == UNKNOWN:
            self._unanswered.setdefault(operation.value, []).append(number)
        else:
            self._writes[number] = None

    def answer(self, number: int) -> bool:
        """Keep the configurations in which the operation has had its moment; return whether there are any."""
        held: set[_Configuration] = set()
        waiting = list(self._configurations)
        known = set(waiting)
        while waiting:
            value, done, used = waiting.pop()
            if number in done:
                held.add((value, done - {number}, used))
                continue
            for following in self._following(value, done, used):
                if following not in known:
                    known.add(following)
                    waiting.append(following)
            if len(known) > CONFIGURATIONS_MAX:
                raise Undecided(f"more than {CONFIGURATIONS_MAX} configurations at {self._operations[number]}")
        self._reads.discard(number)
        self._writes.pop(number, None)
        self._configurations = _thriftiest(held)
        return bool(held)

    def _following(self, value: Value, done: _Numbers, used: _Numbers) -> Iterable[_Configuration]:
        """Yield the configurations one write later."""
        for write in self._writes:
            if write not in done:
                yield self._after_reads(self._operations[write].value, done | {write}, used)
        for wanted in {self._operations[read].value for read in self._reads - done} - {value}:
            for write in itertools.islice((w for w in self._unanswered.get(wanted, ()) if w not in used), 1):
                yield self._after_reads(wanted, done, used | {write})

    def _after_reads(self, value: Value, done: _Numbers, used: _Numbers) -> _Configuration:
        found = {read for read in self._reads - done if self._operations[read].value == value}
        return value, done | found if found else done, used


def _thriftiest(configurations: set[_Configuration]) -> set[_Configuration]:
    """Leave out what has used more unanswered writes than another that is the same otherwise: it can do no more."""
    alike: dict[tuple[Value, _Numbers], list[_Numbers]] = {}
    for value, done, used in configurations:
        alike.setdefault((value, done), []).append(used)
    return {
        (value, done, used)
        for (value, done), uses in alike.items()
        for used in uses
        if len(uses) == 1 or not any(other < used for other in uses)
    }
