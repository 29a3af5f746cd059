"""Requests under a client's key: what the control group remembers of them, and for how long."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import idempotency
from cluster.catalog import CreateAlias, CreateDatabase
from cluster.control import Control
from cluster.ddl import BeginDdl
from cluster.idempotency import KEEP_MS, CloseKey, KeyedStep, OpenKey
from cluster.machine import Outcome, Rejected
from cluster.message import Entry, Message, to_plain
from storage.types import Position, tick_from_ms
from tests.cluster.controls import new_collection, refused, restored

A = BeginDdl("create_collection", "default", "a", new_collection())


class Said:
    """A control group that is told messages at given times."""

    def __init__(self) -> None:
        self.control, self.position = Control(4), Position(0)

    def say(self, message: Message, at_ms: int = 0) -> Outcome:
        self.position = Position(self.position + 1)
        entry = Entry("tests", self.position, tick_from_ms(at_ms + self.position), message)
        done = self.control.apply(self.position, Entry.decode(entry.encode()))
        assert done is not None
        return done.outcome


def step(message: Message, number: int = 1, key: str = "k") -> KeyedStep:
    return KeyedStep(key, number, *to_plain(message))


def test_a_step_is_made_once() -> None:
    """A repeat gets the first answer, also from a replica that has started from a checkpoint."""
    one = Said()
    assert one.say(OpenKey("k", "r")) == {}
    first = one.say(step(CreateDatabase("d", {})))
    assert first == {"outcome": {}}
    one.control = restored(one.control)
    assert one.say(step(CreateDatabase("d", {}))) == first
    assert one.say(OpenKey("k", "r")) == {}, "the request is not over"
    assert one.say(step(CreateDatabase("d", {}), 2)) == {"refused": ["invalid_parameter", "database already exist: d"]}
    assert list(one.control.catalog.databases) == ["default", "d"]


def test_a_refusal_is_remembered() -> None:
    """Though by now it would succeed: whoever came first was told so."""
    one = Said()
    one.say(OpenKey("k", "r"))
    told = one.say(step(CreateAlias("none", "a", "x")))
    assert told == {"refused": ["database_not_found", "database not found[database=none]"]}
    one.say(CreateDatabase("none", {}))
    assert one.say(step(CreateAlias("none", "a", "x"))) == told


def test_what_passes_is_not_remembered() -> None:
    """A step that conflicts with an open task may be made later."""
    one = Said()
    one.say(A)
    one.say(OpenKey("k", "r"))
    refused(one.say(step(A)), "conflict", "try again")
    one.say(OpenKey("l", "r"))
    assert not isinstance(
        one.say(step(BeginDdl("create_collection", "default", "b", new_collection()), key="l")), Rejected
    )
    assert one.control.keys.known["k"].steps == {}


def test_the_first_outcome_counts() -> None:
    """Of two nodes that carry out one request, one closes it; the other is told how."""
    one = Said()
    one.say(OpenKey("k", "r"))
    assert one.say(CloseKey("k", [])) == {"outcome": []}
    assert one.say(CloseKey("k", ["bad_request", "no"])) == {"outcome": []}
    refused(one.say(step(A)), "invalid_parameter", "is over, or forgotten")
    assert one.say(OpenKey("k", "r")) == {"outcome": []}
    assert restored(one.control).checkpoint() == one.control.checkpoint()


def test_a_key_is_of_one_request() -> None:
    """Another one is refused while the key is remembered, whether the first is over or not."""
    one = Said()
    one.say(OpenKey("k", "r"))
    refused(one.say(OpenKey("k", "other")), "invalid_parameter", "used for another request")
    one.say(CloseKey("k", []))
    refused(one.say(OpenKey("k", "other")), "invalid_parameter", "used for another request")
    for key in ("", "x" * 129):
        refused(one.say(OpenKey(key, "r")), "invalid_parameter", "1 to 128 characters")


def test_keys_are_forgotten_by_the_time_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a day, and the oldest sooner if there are too many: all replicas forget at the same position."""
    one = Said()
    one.say(OpenKey("old", "r"))
    one.say(CloseKey("old", []))
    assert one.say(OpenKey("old", "r"), KEEP_MS - 10) == {"outcome": []}
    assert one.say(OpenKey("new", "r"), KEEP_MS + 10) == {}
    assert list(one.control.keys.known) == ["new"]
    assert one.say(OpenKey("old", "other"), KEEP_MS + 10) == {}
    monkeypatch.setattr(idempotency, "KEYS_MAX", 2)
    one.say(OpenKey("third", "r"), KEEP_MS + 10)
    assert list(one.control.keys.known) == ["old", "third"]
    refused(one.say(step(A, key="new")), "invalid_parameter", "forgotten")


@pytest.mark.parametrize(
    "message",
    [
        KeyedStep("k", 1, "open_key", ["k", "r"]),
        KeyedStep("k", 1, "keyed_step", ["k", 1, "create_database", ["d", {}]]),
        KeyedStep("k", 1, "nothing", []),
        KeyedStep("k", 1, "create_database", []),
        KeyedStep("k", 1, "create_database", ["d", {}, 3]),
        KeyedStep("k", 1, "create_database", [7, {}]),
        KeyedStep("k", 1, "create_database", "no list"),
        KeyedStep("k", "1", "create_database", ["d", {}]),  # type: ignore[arg-type]
        KeyedStep("k", 1, ["create_database"], ["d", {}]),  # type: ignore[arg-type]
        OpenKey(3, "r"),  # type: ignore[arg-type]
        CloseKey("k", [1]),  # type: ignore[list-item]
    ],
)
def test_what_is_no_step_is_refused(message: Message) -> None:
    """And changes nothing."""
    one = Said()
    one.say(OpenKey("k", "r"))
    before = one.control.catalog.to_bytes()
    outcome: Any = one.say(message)
    assert isinstance(outcome, Rejected) or "refused" in outcome
    assert one.control.catalog.to_bytes() == before


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_repeats_at_any_time_change_nothing(seed: int) -> None:
    """Requests of a few steps, repeated from any step at any time by any node, leave what each of them once would have:
    a dumb model that makes each step when it comes first, and remembers what it was told."""
    dice, one = Random(seed), Said()
    told: dict[tuple[str, int], Outcome] = {}
    over: dict[str, Any] = {}
    wanted = {"default"}
    for _ in range(60):
        key = dice.choice("abc")
        known = one.say(OpenKey(key, f"request {key}"))
        assert known == ({"outcome": over[key]} if key in over else {})
        for number in range(1, dice.randint(1, 4)):
            name = f"d{dice.randint(0, 5) if (key, number) not in told else 0}"
            answer = one.say(step(CreateDatabase(name, {}), number, key))
            if key in over:
                assert isinstance(answer, Rejected)
                continue
            expected: Any = {"outcome": {}}
            if name in wanted:
                expected = {"refused": ["invalid_parameter", f"database already exist: {name}"]}
            if (key, number) not in told:
                told[key, number] = expected
                wanted.add(name)
            assert answer == told[key, number]
        if dice.random() < 0.2:
            over.setdefault(key, dice.choice([[], ["bad_request", "no"]]))
            one.say(CloseKey(key, over[key]))
        if dice.random() < 0.1:
            one.control = restored(one.control)
        assert set(one.control.catalog.databases) == wanted
