"""The queue of changes: who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.resources import WHOLE_CLUSTER, Holds, conflict, holds, of_database, of_names
from node.key_locks import KeyLocks
from storage.errors import Busy, NoLeader
from tests.sim.world import SimLoop, close, run

A, B, OTHER = of_names(("d", "a")), of_names(("d", "b")), of_names(("e", "a"))
RENAME = of_names(("d", "a"), ("e", "a"))
D, E = of_database("d"), of_database("e")
ALL = holds([WHOLE_CLUSTER])


def on_a_loop(script: Callable[[], Awaitable[None]]) -> None:
    loop = SimLoop()
    try:
        run(loop, script())  # type: ignore[arg-type]
    finally:
        close(loop)


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        pytest.param(A, A, True, id="a name"),
        pytest.param(A, B, False, id="two names of a database"),
        pytest.param(A, OTHER, False, id="a name of two databases"),
        pytest.param(A, RENAME, True, id="a rename and its source"),
        pytest.param(OTHER, RENAME, True, id="a rename and its target"),
        pytest.param(B, RENAME, False, id="a rename and another name"),
        pytest.param(A, D, True, id="a database and a name in it"),
        pytest.param(RENAME, E, True, id="a database and a rename into it"),
        pytest.param(A, E, False, id="a database and a name elsewhere"),
        pytest.param(D, E, False, id="two databases"),
        pytest.param(A, ALL, True, id="the cluster and a name"),
        pytest.param(D, ALL, True, id="the cluster and a database"),
        pytest.param(ALL, ALL, True, id="the cluster"),
    ],
)
def test_what_conflicts(one: Holds, other: Holds, apart: bool) -> None:
    """Names are held alone and their databases with others, databases alone, and the cluster by all or by one."""
    assert conflict(one, other) is conflict(other, one) is apart


def test_each_resource_is_taken_once_and_in_order() -> None:
    """R-CO-7: sorted, each once, alone if any wants it so."""
    for one in (A, RENAME, D, ALL, holds([*A, *D, *A])):
        resources = [resource for resource, _ in one]
        assert resources == sorted(set(resources))
    assert [alone for _, alone in holds([*A, *D])] == [False, True, True]


def test_who_waits_longer_goes_first() -> None:
    """A change that needs all is not passed over for ever by ones that need little; those that conflict neither with
    what is held nor with it go on (I-CO-4, I-LK-4)."""

    async def script() -> None:
        locks, went = KeyLocks(), []

        async def one(name: str, wanted: Holds) -> None:
            await locks.acquire(wanted, within_s=100.0)
            went.append(name)

        locks.take(A)
        waiting = []
        for name, wanted in (("alter a", A), ("drop d", D), ("create b", B), ("alter e.a", OTHER)):
            waiting.append(asyncio.ensure_future(one(name, wanted)))
            await asyncio.sleep(0)
        assert went == ["alter e.a"] and locks.waiting == 3
        for held in (A, A, D):
            locks.release(held)
            await asyncio.sleep(0.01)
        assert went == ["alter e.a", "alter a", "drop d", "create b"]

    on_a_loop(script)


def test_who_leaves_lets_others_go_on() -> None:
    """I-LK-5: who is cancelled or out of time leaves nothing locked, whether it waits or has just got its turn."""

    async def script() -> None:
        locks = KeyLocks()
        locks.take(A)
        with pytest.raises(Busy, match="nothing was changed"):
            await locks.acquire(D, within_s=1.0)
        waiting = asyncio.ensure_future(locks.acquire(D, within_s=9.0))
        after = asyncio.ensure_future(locks.acquire(B, within_s=9.0))
        await asyncio.sleep(0)
        waiting.cancel()
        await after
        locks.release(B)
        waiting = asyncio.ensure_future(locks.acquire(A, within_s=9.0))
        await asyncio.sleep(0)
        locks.release(A)
        waiting.cancel()  # its turn has come, and it does not know yet
        await asyncio.sleep(0)
        await locks.acquire(ALL, within_s=0.1)

    on_a_loop(script)


def test_a_queue_that_is_closed_refuses() -> None:
    """Whoever waits is told, and whoever comes; what is held can still be let go of."""

    async def script() -> None:
        locks = KeyLocks()
        locks.take(A)
        waiting = asyncio.ensure_future(locks.acquire(A, within_s=9.0))
        await asyncio.sleep(0)
        locks.close(NoLeader("another node leads"))
        for one in (waiting, asyncio.ensure_future(locks.acquire(B, within_s=9.0))):
            with pytest.raises(NoLeader):
                await one
        locks.release(A)

    on_a_loop(script)


@settings(max_examples=50)
@given(seed=st.integers(0, 1 << 32))
def test_nothing_that_conflicts_runs_at_once(seed: int) -> None:
    """Any changes, some of which give up: at no moment do two that conflict hold what they need; all get their turn,
    and in the end everything is free."""

    async def script() -> None:
        dice, locks, running = Random(seed), KeyLocks(), dict[object, Holds]()
        names = [(database, name) for database in "de" for name in "ab"]

        async def change(wanted: Holds, patience_s: float) -> None:
            try:
                await locks.acquire(wanted, within_s=patience_s)
            except Busy:
                return
            me = object()
            assert not any(conflict(wanted, other) for other in running.values())
            running[me] = wanted
            await asyncio.sleep(dice.random())
            del running[me]
            locks.release(wanted)

        def anything() -> Holds:
            kinds: list[Any] = [lambda: of_names(*dice.sample(names, dice.randint(1, 2)))] * 6
            return dice.choice([*kinds, lambda: of_database(dice.choice("de")), lambda: ALL])()  # type: ignore[no-any-return]

        tasks = []
        for _ in range(40):
            tasks.append(asyncio.ensure_future(change(anything(), dice.choice([0.1, 1.0, 100.0]))))
            await asyncio.sleep(dice.random() / 5)
            if dice.random() < 0.1:
                dice.choice(tasks).cancel()
        await asyncio.wait(tasks)
        for one in tasks:
            assert one.cancelled() or one.exception() is None
        # A change that was cancelled while it ran has let go of nothing; the queue itself must not care.
        assert not locks.waiting

    on_a_loop(script)
