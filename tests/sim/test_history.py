"""The judge of histories, on histories made by hand; scripts; and how failing plans are cut down."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from node.service import Consistency
from tests.sim.history import BOUND_S, History, Violation
from tests.sim.plan import Plan, plan_of
from tests.sim.shrink import shrink

STRONG, SESSION, BOUNDED, EVENTUALLY = (
    Consistency.STRONG, Consistency.SESSION, Consistency.BOUNDED, Consistency.EVENTUALLY,
)  # fmt: skip
Verdict = Callable[[], None]


class Told:
    """A history told in few words: everything happens in order, a second apart."""

    def __init__(self) -> None:
        self.history = History({"rows": 1}, clock_error_s=0.1)
        self.now_s = 0.0

    def write(self, version: int | None, *keys: int, client: str = "a", answered: bool = True) -> Told:
        self.now_s += 1
        made = self.history.write(client, "rows", dict.fromkeys(keys, version), self.now_s)
        if answered:
            self.history.acknowledge(made, self.now_s + 0.5)
        return self

    def read(self, level: Consistency, found: dict[int, int | None], client: str = "a", after_s: float = 1.0) -> Told:
        self.now_s += after_s
        self.history.read(client, "rows", level, found, self.history.moment(self.now_s), self.now_s + 0.1)
        return self

    def judge(self) -> None:
        self.history.check()

    def last(self, found: dict[int, int | None]) -> None:
        self.history.check_last("rows", found)


def good() -> list[Verdict]:
    return [
        Told().write(1, 7).read(STRONG, {7: 1}, "b").judge,
        Told().write(1, 7, answered=False).read(STRONG, {7: None}).read(STRONG, {7: 1}).judge,
        Told().write(1, 7).write(None, 7).read(STRONG, {7: None}).judge,
        Told().write(1, 7).write(2, 7).read(BOUNDED, {7: 1}, "b").judge,
        Told().write(1, 7).write(2, 7).read(EVENTUALLY, {7: None}, "b", after_s=99).judge,
        Told().write(1, 7).write(2, 7).read(SESSION, {7: 1}, "b").judge,
        Told().write(1, 7, 8).write(2, 7).read(STRONG, {7: 2, 8: 1}).judge,
        partial(Told().write(1, 7, 8, answered=False).last, {7: None, 8: None}),
        partial(Told().write(1, 7, 8, answered=False).write(2, 7).last, {7: 2, 8: 1}),
        partial(Told().write(1, 7).write(None, 7, 8, answered=False).last, {7: 1, 8: None}),
    ]


def bad() -> list[Callable[[], object]]:
    """Return stories each of which breaks a promise when it is told to its end."""
    return [
        lambda: Told().write(1, 7).read(STRONG, {7: None}, "b").judge(),
        lambda: Told().write(1, 7).write(2, 7).read(STRONG, {7: 1}, "b").judge(),
        lambda: Told().write(1, 7, answered=False).read(STRONG, {7: 1}).read(STRONG, {7: None}).judge(),
        lambda: Told().write(1, 7).write(2, 7).read(SESSION, {7: 1}, "a"),
        lambda: Told().write(1, 7).write(2, 7).read(SESSION, {7: 2}, "b").read(SESSION, {7: 1}, "b"),
        lambda: Told().write(1, 7).write(2, 7).read(BOUNDED, {7: 1}, "b", after_s=BOUND_S + 1),
        lambda: Told().write(1, 7).read(EVENTUALLY, {7: 3}),
        lambda: Told().write(1, 7, 8).write(2, 7, 8).read(EVENTUALLY, {7: 2, 8: 1}, "b"),
        lambda: Told().write(1, 7, 8).read(EVENTUALLY, {7: 1, 8: None}, "b"),
        lambda: Told().write(1, 7, 8, answered=False).last({7: 1, 8: None}),
        lambda: Told().write(1, 7, 8).write(None, 7, 8, answered=False).last({7: 1, 8: None}),
    ]


@pytest.mark.parametrize("number", range(len(good())))
def test_what_is_promised_is_accepted(number: int) -> None:
    """None of these breaks a promise."""
    good()[number]()


@pytest.mark.parametrize("number", range(len(bad())))
def test_what_is_not_promised_is_noticed(number: int) -> None:
    """Each of these does."""
    with pytest.raises(Violation):
        bad()[number]()


def test_steady_keys_are_those_that_nobody_touched() -> None:
    """A search must find what lived all the time: not what was deleted, may be, or was written meanwhile."""
    told = Told().write(1, 1, 2, 3, 4).write(None, 2).write(None, 3, answered=False)
    since = told.history.moment(told.now_s + 1)
    told.now_s += 1
    told.write(2, 4)
    assert told.history.steady("rows", since) == {1}


@pytest.mark.parametrize("seed", range(30))
def test_a_script_is_its_plan(seed: int) -> None:
    """A plan survives being written down and read again; what is no script is refused."""
    plan = plan_of(seed)
    assert Plan.from_script(plan.to_script("why\nit failed")) == plan
    with pytest.raises((ValueError, TypeError)):
        Plan.from_script(plan.to_script().replace("dice=", "dice", 1).replace("seed=", "sead=", 1))


def test_a_failing_plan_is_cut_down_to_what_matters() -> None:
    """Of hundreds of steps, the three that make it fail are left."""
    plan = plan_of(11, nodes=3)
    guilty = [plan.steps[place] for place in (3, len(plan.steps) // 2, -2)]
    shorter = shrink(plan, lambda one: all(step in one.steps for step in guilty), attempts_max=400)
    assert list(shorter.steps) == guilty
