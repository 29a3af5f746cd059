"""The linearizability checker against a dumb one that tries every order."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.linearizable import UNKNOWN, Operation, around, first_violation


def write(called: float, returned: float, value: int | None) -> Operation:
    return Operation(called, returned, True, value)


def read(called: float, returned: float, value: int | None) -> Operation:
    return Operation(called, returned, False, value)


@pytest.mark.parametrize(
    ("history", "violation"),
    [
        pytest.param([], None, id="nothing happened"),
        pytest.param([write(0, 1, 1), read(2, 3, 1)], None, id="read after write"),
        pytest.param([write(0, 1, 1), read(2, 3, None)], 1, id="an acknowledged write is not seen"),
        pytest.param([write(0, 1, 1), write(2, 3, 2), read(4, 5, 1)], 2, id="an older value"),
        pytest.param([read(0, 1, 7)], 0, id="a value that nobody wrote"),
        pytest.param([read(0, 1, 7), write(2, 3, 7)], 0, id="a value before it was written"),
        pytest.param([write(0, 5, 1), read(1, 2, 1), read(3, 4, None)], 2, id="seen, then unseen"),
        pytest.param([write(0, 5, 1), read(1, 2, None), read(3, 4, 1)], None, id="unseen, then seen"),
        pytest.param([write(0, 5, 1), write(0, 5, 2), read(6, 7, 1), read(8, 9, 2)], 3, id="two orders at once"),
        pytest.param([write(0, UNKNOWN, 1), read(1, 2, None), read(3, 4, 1)], None, id="an unanswered write, late"),
        pytest.param([write(0, UNKNOWN, 1), read(1, 2, None)], None, id="an unanswered write, never"),
        pytest.param([write(0, UNKNOWN, 1), read(1, 2, 1), read(3, 4, None)], 2, id="an unanswered write, undone"),
        pytest.param(
            [write(0, 1, 1), write(2, UNKNOWN, None), read(3, 4, None), write(5, 6, 2), read(7, 8, None)],
            4,
            id="one unanswered delete explains one disappearance",
        ),
        pytest.param(
            [write(0, 1, 1), write(2, UNKNOWN, None), write(2, UNKNOWN, None), read(3, 4, None), write(5, 6, 2),
             read(7, 8, None)],
            None,
            id="two unanswered deletes explain two",
        ),
        pytest.param([write(0, 1, 1), write(2, 3, 2), read(4, UNKNOWN, 1)], None, id="an unanswered read"),
    ],
)  # fmt: skip
def test_the_operation_that_cannot_be_explained_is_named(history: list[Operation], violation: int | None) -> None:
    """Tables of histories, each with the one operation that has no place in any order."""
    assert first_violation(history) is (None if violation is None else history[violation])


@given(st.integers(0, 2**32))
def test_the_verdict_is_that_of_all_orders(seed: int) -> None:
    """For small random histories the verdict is that of trying every order of every subset of unanswered writes."""
    chance = random.Random(seed)
    history = []
    for _ in range(chance.randrange(1, 6)):
        called = chance.randrange(10)
        is_write = chance.random() < 0.5
        returned = UNKNOWN if is_write and chance.random() < 0.3 else called + chance.randrange(1, 6)
        history.append(Operation(called, returned, is_write, chance.choice((None, 1, 2, 3))))
    assert (first_violation(history) is None) == _explained(history)


def test_a_long_history_is_judged_quickly() -> None:
    """Thousands of operations by several clients at once, hundreds of them unanswered: right, then with one lie."""
    chance = random.Random(1)
    history: list[Operation] = []
    value: int | None = None
    for number in range(6000):
        slack = chance.uniform(0, 3)
        if chance.random() < 0.5:
            value = None if chance.random() < 0.2 else number
            returned = UNKNOWN if chance.random() < 0.1 else number + slack
            history.append(Operation(number - slack, returned, True, value))
        else:
            history.append(Operation(number - slack, number + slack, False, value))
    assert first_violation(history) is None
    lie = Operation(6010, 6011, False, -1)
    assert first_violation([*history, lie]) is lie


def test_what_is_shown_of_a_violation_ends_with_it() -> None:
    """The excerpt holds the last operations called before the violation returned, at most so many."""
    history = [write(i, i + 0.5, i) for i in range(30)]
    shown = around(history, history[20], shown_max=5)
    assert shown == history[16:21]


def _explained(history: list[Operation]) -> bool:
    answered = [one for one in history if one.returned != UNKNOWN]
    unanswered = [one for one in history if one.returned == UNKNOWN]
    subsets = (itertools.combinations(unanswered, size) for size in range(len(unanswered) + 1))
    return any(
        _in_time(order) and _right(order)
        for subset in itertools.chain(*subsets)
        for order in itertools.permutations([*answered, *subset])
    )


def _in_time(order: tuple[Operation, ...]) -> bool:
    return all(a.called <= b.returned for a, b in itertools.combinations(order, 2))


def _right(order: tuple[Operation, ...]) -> bool:
    value: object = None
    for one in order:
        if one.is_write:
            value = one.value
        elif one.value != value:
            return False
    return True
