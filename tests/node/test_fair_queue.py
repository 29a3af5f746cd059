"""The fair queue: tables of single properties, and random lives that keep its invariants."""

from __future__ import annotations

from math import inf
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from node.fair_queue import KEYS_KEPT, FairQueue, State, Ticket


def make(limit: int = 100, **more: Any) -> FairQueue:
    chosen = {"share_ratio": 0.75, "wait_s_max": 5.0, "standing_wait_s_max": 1.0, "waiting_max": 50, **more}
    return FairQueue(limit, **chosen)


def queued(queue: FairQueue, key: str, cost: int, now_s: float = 0.0) -> Ticket:
    ticket = queue.wait(key, cost, now_s)
    assert ticket is not None
    return ticket


def test_one_key_alone_gets_its_share_and_a_newcomer_finds_room() -> None:
    """However much one key asks for, a quarter stays free; several keys share evenly, and a part is free still."""
    queue = make()
    taken = [queue.enter("flood", 5, 0.0) for _ in range(20)]
    assert sum(taken) == 15 and queue.used_by("flood") == 75
    assert queue.enter("newcomer", 25, 0.0)
    queue = make(1000)
    for _ in range(1000):
        for key in "abc":
            queue.enter(key, 1, 0.0)
    assert [queue.used_by(key) for key in "abc"] == [300, 300, 300]


def test_what_is_larger_than_the_budget_is_admitted_alone() -> None:
    """A cost above the limit counts as the limit: it comes when all others have left, and nobody overtakes it."""
    queue = make()
    assert queue.enter("small", 10, 0.0)
    large, after = queued(queue, "large", 10_000), queued(queue, "another", 1)
    assert queue.advance(0.0) == [] and not queue.enter("third", 1, 0.0)
    queue.leave("small", 10)
    assert queue.advance(0.1) == [large] and queue.used == 100
    queue.leave("large", 10_000)
    assert queue.advance(0.2) == [after]


def test_turns_go_round_among_keys_by_what_they_were_given() -> None:
    """A key with a long queue of large requests gets no more than one with few small ones asks for."""
    queue = make(10, wait_s_max=100.0)
    assert queue.enter("x", 10, 0.0)
    flood = [queued(queue, "flood", 10) for _ in range(20)]
    other = [queued(queue, "other", 1) for _ in range(3)]
    queue.leave("x", 10)
    order: list[Ticket] = []
    for turn in range(8):
        order.extend(queue.advance(float(turn)))
        if order:
            for ticket in order:
                if ticket.state is State.ADMITTED:
                    queue.leave(ticket.key, ticket.cost)
                    ticket.state = State.LEFT
    assert max(order.index(one) for one in other) <= 4 and flood[0] in order


def test_a_standing_queue_is_left_sooner() -> None:
    """A burst may wait long; who comes to a queue that has stood for that long is told soon."""
    queue = make(10)
    assert queue.enter("k", 10, 0.0)
    first = queued(queue, "k", 1, 0.0)
    assert first.until_s == 5.0
    assert queued(queue, "k", 1, 4.9).until_s == 9.9
    second = queued(queue, "k", 1, 5.5)
    assert second.until_s == 6.5
    assert queue.advance(5.5) == [first] and first.state is State.LATE
    assert [one.state for one in queue.advance(10.0)] == [State.LATE] * 2


def test_too_many_waiting_are_refused_at_once() -> None:
    """The tickets of one key are bounded, and where waiting takes room, their cost is shared like the budget."""
    queue = make(10, waiting_max=2)
    assert queue.enter("k", 10, 0.0)
    assert queued(queue, "k", 1) and queued(queue, "k", 1) and queue.wait("k", 1, 0.0) is None
    assert queue.wait("other", 1, 0.0) is not None
    queue = make(100, shares_waiting=True)
    assert queue.enter("k", 100, 0.0)
    assert sum(queue.wait("k", 5, 0.0) is not None for _ in range(30)) == 15
    assert queue.wait("other", 10, 0.0) is not None and queue.waiting_cost == 85


def test_a_slowed_key_keeps_its_pace_and_others_do_not_notice() -> None:
    """At 10 units a second, 5 units cost half a second; at 0 nothing comes; a key without bound is not held up."""
    rates = {"slow": 10.0, "fast": inf}
    queue = make(1000, rate=lambda key: rates[str(key)], blocked_wait_s_max=0.5, waiting_max=1000)
    assert queue.enter("slow", 5, 0.0) and not queue.enter("slow", 5, 0.1)
    ticket = queued(queue, "slow", 5, 0.1)
    assert queue.advance(0.1) == [] and queue.next_deadline_s(0.1) == 0.5
    assert queued(queue, "fast", 5, 0.2) in queue.advance(0.2)
    assert queue.advance(0.5) == [ticket]
    rates["slow"] = 0.0
    blocked = queued(queue, "slow", 5, 2.0)
    assert queue.advance(2.4) == [] and queue.advance(2.5) == [blocked] and blocked.state is State.LATE
    blocked = queued(queue, "slow", 5, 3.0)
    rates["slow"] = inf
    assert queue.advance(3.1) == [blocked] and blocked.state is State.ADMITTED


def test_keys_that_have_gone_are_forgotten() -> None:
    """A million collections, one after the other, leave nothing behind."""
    queue = make()
    for number in range(3 * KEYS_KEPT):
        assert queue.enter(number, 1, 0.0)
        queue.leave(number, 1)
    assert len(queue._lanes) <= KEYS_KEPT


Steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "leave", "leave", "give up", "rate"]),
        st.integers(0, 4),
        st.integers(1, 60),
        st.floats(0, 0.7),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(steps=Steps, limit=st.integers(1, 60), share=st.sampled_from([0.3, 0.5, 0.75, 0.95]))
def test_random_lives(steps: list[tuple[str, int, int, float]], limit: int, share: float) -> None:
    """The budget is never exceeded and the books agree with a dumb model; nobody waits beyond his time; no key that
    holds nothing waits while what it asks for is free; and when all have left, everything is admitted again."""
    rates: dict[object, float] = dict.fromkeys(range(5), inf)
    queue = make(limit, share_ratio=share, rate=lambda key: rates[key], waiting_max=10)
    held: list[tuple[int, int]] = []
    waiting: list[Ticket] = []
    now_s = 0.0

    def settle() -> None:
        for ticket in queue.advance(now_s):
            waiting.remove(ticket)
            if ticket.state is State.ADMITTED:
                assert now_s <= ticket.until_s + 1e-9 or ticket.until_s >= now_s
                held.append((ticket.key, ticket.cost))  # type: ignore[arg-type]
            else:
                assert ticket.state is State.LATE and now_s >= ticket.until_s

    for what, key, cost, passes_s in steps:
        now_s += passes_s
        settle()
        if what == "ask":
            if queue.enter(key, cost, now_s):
                held.append((key, cost))
            elif (ticket := queue.wait(key, cost, now_s)) is not None:
                waiting.append(ticket)
        elif what == "leave" and held:
            queue.leave(*held.pop(cost % len(held)))
        elif what == "give up" and waiting:
            queue.give_up(waiting.pop(cost % len(waiting)))
        elif what == "rate":
            rates[key] = [inf, 0.0, 10.0][cost % 3]
        settle()
        assert queue.used == sum(min(cost, limit) for _, cost in held) <= limit
        assert queue.waiting == len(waiting) and queue.waiting_cost == sum(one.cost for one in waiting)
        assert all(one.until_s > now_s for one in waiting)
        if queue.used == 0:
            assert not [one for one in waiting if rates[one.key] == inf]
    for one in held:
        queue.leave(*one)
    held.clear()
    rates.update(dict.fromkeys(range(5), inf))
    for _ in range(len(waiting) + 1):
        settle()
        for one in held:
            queue.leave(*one)
        held.clear()
    assert not waiting and queue.used == 0
    assert all(queue.enter(key, 1, now_s) for key in range(1)) and queue.next_deadline_s(now_s + 1000) >= 0


@settings(max_examples=40, deadline=None)
@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=30), clients=st.integers(2, 40))
def test_a_flood_does_not_hold_up_another(costs: list[int], clients: int) -> None:
    """Whatever a flood of one key asks for, one request at a time of another key is admitted within the time that the
    flood's requests take which were under way when it came, and none of it is refused."""
    queue = make(40, waiting_max=1000, wait_s_max=1000.0)
    running: list[tuple[float, str, int]] = []
    now_s, worst_s, given_up = 0.0, 0.0, 0
    asked: tuple[float, Ticket] | None = None
    for step in range(400):
        now_s = step * 0.1
        for one in [one for one in running if one[0] <= now_s]:
            running.remove(one)
            queue.leave(one[1], one[2])
        for client in range(clients if step % 5 == 0 else 1):
            queue.wait("flood", costs[(step + client) % len(costs)], now_s)
        if asked is None:
            asked = now_s, queued(queue, "other", 2, now_s)
        for ticket in queue.advance(now_s):
            given_up += ticket.key == "other" and ticket.state is State.LATE
            if ticket.state is State.ADMITTED:
                running.append((now_s + 1.0, str(ticket.key), ticket.cost))
        if asked[1].state is State.ADMITTED:
            worst_s, asked = max(worst_s, now_s - asked[0]), None
    assert worst_s <= 1.0 + 1e-6 and not given_up
