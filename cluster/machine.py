"""What every replicated state machine shares: ticks, safe retries, and an `apply` that is total.

Invariants
  1. `position` and `tick` ascend strictly; an entry at or below `position` is ignored.
  2. The state after a prefix of the log depends on that prefix alone: no clock, no chance, no network.
  3. A (producer, sequence) is executed once; a repeat gets the first outcome if it is among the last
     `REMEMBERED_MAX` of the shard, and is refused as of unknown outcome after that. A producer's sequences ascend, so
     the greatest one that is forgotten tells which may be repeats.
  4. A message that cannot be applied answers `Rejected` and changes nothing but `position`, `tick` and the outcomes.
     A local fault (disk, damage, a bug) is raised: it must stop this replica, not become an answer. From then on
     the machine applies nothing and is in no checkpoint, which would be of a state that no prefix of the log gives.
  5. Who holds the log from here on is part of the state (`Generation`): it changes at one position, for all alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.message import CompareState, Entry, Handover, Message
from cluster.tick import next_tick
from storage.columns import Batch
from storage.errors import AnnulusError, Conflict, OutcomeUnknown, StorageFault, error_from
from storage.types import Position, Tick

REMEMBERED_MAX: Final = 16_384
"""Outcomes kept for retries: at 5,000 small writes a second still 3 s, and a retry follows a lost leader within 2 s.
It comes later when the node that sends it was held up, or its client has much time."""
PRODUCERS_MAX: Final = 4_096
"""Producers of forgotten outcomes that are kept, those last forgotten of: one a process, and one a task."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The message could not be applied, on any replica."""

    code: str
    message: str

    def error(self) -> AnnulusError:
        return error_from(self.code, self.message)


Outcome = Mapping[str, Any] | Rejected


@dataclass(frozen=True, slots=True)
class Generation:
    """Who holds the group's log, from the entry after `position` on."""

    number: int = 0
    members: tuple[str, ...] = ()
    """Empty in the first generation, whose members are those that the cluster was formed with."""
    position: Position = Position(0)


@dataclass(frozen=True, slots=True)
class FrozenMachine:
    """What all state machines keep, at one position; cheap to take on the loop, made plain by a worker."""

    position: Position
    tick: Tick
    outcomes: list[tuple[tuple[str, int], Outcome]]
    forgotten: list[tuple[str, int]]
    generation: Generation
    term: int | None = None
    """Raft term of the entry at `position`, without which no other replica's log can begin there."""
    reset_log: bool = False
    """Whether the log on the disk may not have that entry yet, because the state came from another replica."""

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for CBOR; `load_machine` takes it back."""
        outcomes = [
            [producer, sequence, [one.code, one.message] if isinstance(one, Rejected) else dict(one)]
            for (producer, sequence), one in self.outcomes
        ]
        return {
            "position": self.position,
            "tick": self.tick,
            "term": self.term,
            "reset_log": self.reset_log,
            "outcomes": outcomes,
            "forgotten": [list(one) for one in self.forgotten],
            "generation": [self.generation.number, list(self.generation.members), self.generation.position],
        }


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Effect of applying an entry: whoever waits for this (producer, sequence) may be told."""

    producer: str
    sequence: int
    outcome: Outcome
    tick: Tick


class StateMachine:
    """Base of the shard's and the control group's state machines; they implement `_execute`."""

    def __init__(self) -> None:
        self.position = Position(0)
        self.tick = Tick(0)
        self.generation = Generation()
        self._outcomes: OrderedDict[tuple[str, int], Outcome] = OrderedDict()
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        """Producer -> its greatest sequence whose outcome is forgotten."""
        self._fault = ""

    def apply(self, position: Position, entry: Entry) -> Acknowledge | None:
        """Apply one committed entry; None if it is applied already. Raises only for faults of this replica."""
        self._check_whole()
        if position <= self.position:
            return None
        self.position = position
        self.tick = next_tick(self.tick, entry.stamp)
        who = (entry.producer, entry.sequence)
        outcome = self._outcomes.get(who)
        if outcome is None and entry.sequence <= self._forgotten.get(entry.producer, -1):
            outcome = Rejected(
                OutcomeUnknown.code, "it comes too late to tell whether it was made; look before repeating"
            )
        elif outcome is None:
            outcome = self._try(entry)
            self._outcomes[who] = outcome
            if len(self._outcomes) > REMEMBERED_MAX:
                self._forget_oldest()
        return Acknowledge(entry.producer, entry.sequence, outcome, self.tick)

    def _forget_oldest(self) -> None:
        (producer, sequence), _ = self._outcomes.popitem(last=False)
        self._forgotten[producer] = max(sequence, self._forgotten.get(producer, -1))
        self._forgotten.move_to_end(producer)
        if len(self._forgotten) > PRODUCERS_MAX:
            self._forgotten.popitem(last=False)

    def _try(self, entry: Entry) -> Outcome:
        match entry.message:
            case CompareState():
                return {}
            case Handover(generation, members):
                if generation != self.generation.number + 1:
                    return Rejected(Conflict.code, f"generation {self.generation.number} is not before {generation}")
                self.generation = Generation(generation, tuple(members), self.position)
                return {}
        try:
            body = entry.body.to_bytes() if isinstance(entry.body, Batch) else entry.body
            return self._execute(entry.message, body, self.tick)
        except Exception as error:
            if isinstance(error, AnnulusError) and error.deterministic:
                return Rejected(error.code, error.message)
            self._fault = f"the {entry.message.kind} at position {self.position} was not applied: {error!r}"
            raise

    def _check_whole(self) -> None:
        if self._fault:
            raise StorageFault(f"this replica has stopped: {self._fault}")

    def _execute(self, message: Message, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        """Change the state and return the outcome, or raise a deterministic error having changed nothing."""
        raise NotImplementedError

    def freeze_machine(self, term: int | None = None, *, reset_log: bool = False) -> FrozenMachine:
        """Return position, tick and outcomes as they are now, for a checkpoint. Raises StorageFault after a fault.

        term, reset_log  see FrozenMachine
        """
        self._check_whole()
        return FrozenMachine(
            self.position,
            self.tick,
            list(self._outcomes.items()),
            list(self._forgotten.items()),
            self.generation,
            term,
            reset_log,
        )

    def load_machine(self, data: Mapping[str, Any]) -> None:
        self.position, self.tick = Position(data["position"]), Tick(data["tick"])
        for producer, sequence, one in data["outcomes"]:
            self._outcomes[producer, sequence] = Rejected(*one) if isinstance(one, list) else one
        for producer, sequence in data.get("forgotten", ()):
            self._forgotten[producer] = sequence
        generation, members, position = data.get("generation", (0, (), 0))
        self.generation = Generation(generation, tuple(members), Position(position))
