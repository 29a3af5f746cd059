"""A budget that many share: what is admitted at once, who waits, whose turn is next, and who has waited too long.

Pure: told the time, it answers; it holds no future and reads no clock. `node/admission.py` puts it on the loop.

*Share.* A key (a collection, as a rule) may hold `ratio / (1 - ratio)` times what is free. Alone it so gets `ratio` of
the budget; several share it evenly, and a part stays free in which a newcomer finds room at once. (Dynamic threshold:
Choudhury and Hahne, 1998.)

*Turn.* What is released goes to the key that has been given least (start-time fair queueing: Goyal, Vin and Cheng,
1996), within a key in order. Nobody overtakes one whose turn it is and who waits for room of the whole budget; so what
is large comes too.

*Patience.* Who comes to a queue that was empty not long ago may wait long: it is a burst. Who comes to one that stands
waits briefly: there, waiting helps nobody. (Maurer, Fail at scale, ACM Queue 2015, after CoDel.)

*Pace.* Somebody else may slow a key down to so many units a second, or to none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from math import inf
from typing import Final

KEYS_KEPT: Final = 1_024
"""Keys that hold nothing and wait for nothing are forgotten when there are more."""


class State(Enum):
    WAITING = "waiting"
    ADMITTED = "admitted"
    LATE = "late"
    """It has waited as long as it may."""
    LEFT = "left"
    """Its caller went away."""


@dataclass(slots=True, eq=False)
class Ticket:
    """Somebody who waits."""

    key: Hashable
    cost: int
    came_s: float
    until_s: float
    state: State = State.WAITING

    def is_in(self, state: State) -> bool:
        return self.state is state


@dataclass(slots=True, eq=False)
class _Lane:
    """A key."""

    used: int = 0
    tag: float = 0.0
    """What it was given, on the queue's virtual time."""
    not_before_s: float = 0.0
    """When it may have more, if it is slowed down."""
    standing_since_s: float = 0.0
    """Since when somebody of it waits."""
    waiting: deque[Ticket] = field(default_factory=deque)
    waiting_cost: int = 0


class FairQueue:
    """Invariants
    1. `used` is the sum of what was admitted and not left, and at most `limit`.
    2. Every ticket is admitted or late at its `until_s`, whatever others do.
    3. A key that holds nothing waits only for others to leave, never for its share.
    """

    def __init__(
        self,
        limit: int,
        *,
        share_ratio: float,
        wait_s_max: float,
        standing_wait_s_max: float,
        blocked_wait_s_max: float = inf,
        waiting_max: int,
        shares_waiting: bool = False,
        rate: Callable[[Hashable], float] | None = None,
    ) -> None:
        """
        limit                units that may be held at once; a cost above it counts as the limit
        share_ratio          of it one key gets alone
        standing_wait_s_max  how long one waits where the queue has stood for `wait_s_max`
        blocked_wait_s_max   the same while the key's rate is 0
        waiting_max          tickets of one key
        shares_waiting       those who wait share another budget of the same size: what waits takes room too
        rate                 units a second of a key: inf for no bound, 0 for nothing now
        """
        self.limit = limit
        self._factor = share_ratio / (1 - share_ratio) if share_ratio < 1 else inf
        self._wait_s = wait_s_max
        self._standing_wait_s = standing_wait_s_max
        self._blocked_wait_s = blocked_wait_s_max
        self._waiting_max = waiting_max
        self._shares_waiting = shares_waiting
        self._rate = rate
        self.used = 0
        self.waiting = 0
        """Tickets."""
        self.waiting_cost = 0
        self._lanes: dict[Hashable, _Lane] = {}
        self._backlogged: dict[Hashable, _Lane] = {}
        self._virtual = 0.0
        self._expiries: list[tuple[float, int, Ticket]] = []
        self._count = 0

    def used_by(self, key: Hashable) -> int:
        lane = self._lanes.get(key)
        return 0 if lane is None else lane.used

    def enter(self, key: Hashable, cost: int, now_s: float) -> bool:
        """Admit at once if nobody waits and there is room; else nothing happens."""
        if self._backlogged:
            return False
        cost = min(cost, self.limit)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._new_lane(key, now_s)
        free = self.limit - self.used
        if cost > free or (lane.used and lane.used + cost > self._factor * free):
            return False
        if self._rate is not None and not self._in_time(key, lane, now_s):
            return False
        self._admit(key, lane, cost, now_s)
        return True

    def wait(self, key: Hashable, cost: int, now_s: float, until_s_max: float = inf) -> Ticket | None:
        """Return a ticket, for `advance` to decide; None if too many of the key wait."""
        lane = self._lanes.get(key) or self._new_lane(key, now_s)
        cost = min(cost, self.limit)
        if len(lane.waiting) >= self._waiting_max:
            return None
        if self._shares_waiting:
            free = self.limit - self.waiting_cost
            if cost > free or (lane.waiting and lane.waiting_cost + cost > self._factor * free):
                return None
        if not lane.waiting:
            lane.standing_since_s = now_s
        stands = now_s - lane.standing_since_s > self._wait_s
        patience_s = min(self._standing_wait_s, self._wait_s) if stands else self._wait_s
        if self._rate is not None and self._rate(key) <= 0:
            patience_s = min(patience_s, self._blocked_wait_s)
        ticket = Ticket(key, cost, now_s, min(until_s_max, now_s + patience_s))
        lane.waiting.append(ticket)
        lane.waiting_cost += cost
        self._backlogged[key] = lane
        self.waiting += 1
        self.waiting_cost += cost
        self._count += 1
        heappush(self._expiries, (ticket.until_s, self._count, ticket))
        return ticket

    def leave(self, key: Hashable, cost: int) -> None:
        """Give back what was admitted. `advance` then says whose turn it is."""
        cost = min(cost, self.limit)
        lane = self._lanes[key]
        assert lane.used >= cost, "nobody gives back what was not given"
        lane.used -= cost
        self.used -= cost

    def give_up(self, ticket: Ticket) -> None:
        """The caller has gone. A ticket that was admitted is to be left as well."""
        if ticket.state is State.WAITING:
            self._take_out(ticket, State.LEFT)

    def advance(self, now_s: float) -> list[Ticket]:
        """Return the tickets that were decided: those whose time is up, then those that are admitted."""
        decided = []
        while self._expiries and (self._expiries[0][0] <= now_s or self._expiries[0][2].state is not State.WAITING):
            ticket = heappop(self._expiries)[2]
            if ticket.state is State.WAITING:
                self._take_out(ticket, State.LATE)
                decided.append(ticket)
        while (lane := self._next(now_s)) is not None:
            head = lane.waiting[0]
            if self.used + head.cost > self.limit:
                break
            self._take_out(head, State.ADMITTED)
            self._admit(head.key, lane, head.cost, now_s)
            decided.append(head)
        return decided

    def next_deadline_s(self, now_s: float) -> float:
        """Return when `advance` has something to do though nobody leaves; inf if never."""
        deadline_s = self._expiries[0][0] if self._expiries else inf
        if self._rate is not None:
            for key, lane in self._backlogged.items():
                if self._rate(key) > 0 and lane.not_before_s > now_s:
                    deadline_s = min(deadline_s, lane.not_before_s)
        return deadline_s

    # parts

    def _next(self, now_s: float) -> _Lane | None:
        """Return the lane whose turn it is; None if all wait for their share, or their pace."""
        best: _Lane | None = None
        free = self.limit - self.used
        for key, lane in self._backlogged.items():
            if best is not None and lane.tag >= best.tag:
                continue
            if lane.used and lane.used + lane.waiting[0].cost > self._factor * free:
                continue
            if self._rate is None or self._in_time(key, lane, now_s):
                best = lane
        return best

    def _in_time(self, key: Hashable, lane: _Lane, now_s: float) -> bool:
        assert self._rate is not None
        rate = self._rate(key)
        return rate == inf or (rate > 0 and now_s >= lane.not_before_s)

    def _admit(self, key: Hashable, lane: _Lane, cost: int, now_s: float) -> None:
        lane.used += cost
        self.used += cost
        if lane.tag > self._virtual:
            self._virtual = lane.tag
        lane.tag = self._virtual + cost
        if self._rate is not None and 0 < (rate := self._rate(key)) < inf:
            lane.not_before_s = max(now_s, lane.not_before_s) + cost / rate

    def _take_out(self, ticket: Ticket, state: State) -> None:
        lane = self._lanes[ticket.key]
        if lane.waiting[0] is ticket:
            lane.waiting.popleft()
        else:
            lane.waiting.remove(ticket)
        if not lane.waiting:
            del self._backlogged[ticket.key]
        ticket.state = state
        lane.waiting_cost -= ticket.cost
        self.waiting -= 1
        self.waiting_cost -= ticket.cost

    def _new_lane(self, key: Hashable, now_s: float) -> _Lane:
        if len(self._lanes) >= KEYS_KEPT:
            self._lanes = {
                one: lane for one, lane in self._lanes.items() if lane.used or lane.waiting or lane.not_before_s > now_s
            }
        lane = self._lanes[key] = _Lane(tag=self._virtual)
        return lane
