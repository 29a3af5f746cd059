"""What all state machines keep of what they have done, so that nothing is done twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from cluster import machine
from cluster.machine import Rejected, StateMachine
from cluster.message import Entry, Message, Seal
from storage.types import CollectionId, Position, Tick

SEAL = Seal(CollectionId(1), None)


class Counting(StateMachine):
    """Counts what it executes."""

    def __init__(self) -> None:
        super().__init__()
        self.executed = 0

    def _execute(self, message: Message, body: bytes | memoryview, tick: Tick) -> Mapping[str, Any]:
        self.executed += 1
        return {"number": self.executed}

    def say(self, producer: str, sequence: int) -> Any:
        done = self.apply(Position(self.position + 1), Entry(producer, sequence, Tick(0), SEAL))
        assert done is not None
        return done.outcome


def restarted(one: Counting) -> Counting:
    again = Counting()
    again.load_machine(one.freeze_machine().to_plain())
    again.executed = one.executed
    return again


@pytest.fixture(autouse=True)
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REMEMBERED_MAX", 3)
    monkeypatch.setattr(machine, "PRODUCERS_MAX", 2)


@pytest.mark.parametrize("restart", [False, True])
def test_a_repeat_that_comes_too_late_is_not_made_again(restart: bool) -> None:
    """Its first outcome is forgotten: it is refused, not executed, also after a restart."""
    one = Counting()
    for sequence in range(1, 6):
        one.say("a", sequence)
    if restart:
        one = restarted(one)
    assert one.say("a", 4) == {"number": 4}
    late = one.say("a", 2)
    assert isinstance(late, Rejected) and late.code == "outcome_unknown"
    assert one.say("b", 1) == {"number": 6}, "others begin where they want"
    assert one.say("a", 6) == {"number": 7}
    assert one.executed == 7


def test_forgotten_producers_are_few() -> None:
    """Those of which something was forgotten last are kept."""
    one = Counting()
    for number in range(8):
        one.say(f"p{number}", 1)
    plain = one.freeze_machine().to_plain()
    assert plain["forgotten"] == [["p3", 1], ["p4", 1]]
