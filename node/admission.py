"""What a node takes on at a time: budgets that collections share, slowing and refusing when memory is short.

    bodies     bytes of large request bodies that are being read, shared by client address
    requests   bytes of inserts and upserts from their decoding to their answer
    decoding   large inserts that are decoded at a time
    log        bytes of rows at the leader, from their proposal until they are applied; other nodes' too
    reads      searches, queries and gets at a time

Each is a `FairQueue`: what does not fit waits for its turn, and what waits too long is refused, to be repeated. Whoever
waits holds only budgets above this one in the list, so nobody waits for somebody who waits for him; what comes from
another node waits briefly, as it holds a place in the way between the two, and goes back there to be sent again.

Memory (`node/pressure.py`) slows or stops what goes to the log, and only that. Deletes, changes of the catalogue and
what nodes say to each other ask nobody here: they are few, or make room.

The rest of a request of which another shard has taken a part is not held up for want of memory: refusing it would
leave half a request.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Final, NamedTuple

from node.clock import Clock
from node.fair_queue import FairQueue, State, Ticket
from node.metrics import Metrics
from node.pressure import Level, Mark, Pressure
from node.scope import current
from node.settings import MIB, Settings
from storage.errors import MemoryShort, Overloaded
from storage.types import CollectionId

BODIES_MAX: Final = 4
"""Bodies of the largest size that may be in memory at once."""
MEMORY_RATIO: Final = 0.75
"""Of the memory there is, where no limit is set."""
GROWING_MEMORY_RATIO: Final = 1 / 16
"""Of the limit for all memory, what growing segments may have; to flush one takes twice its size beside it."""
REQUESTS_MEMORY_RATIO: Final = 1 / 16
"""The same for bodies that are being read, for requests under way, and for those that wait."""
MERGE_MEMORY_RATIO: Final = 1 / 16
"""The same for a segment that is merged of others: they, the rows in order, and their chunks are there at once."""
LOG_MEMORY_RATIO: Final = 1 / 32
"""The same for rows in the log, of which there are several copies."""
GROWING_MARK_BYTES_MIN: Final = 16 * MIB
"""Less than this in growing segments slows nobody, however early they are sealed."""
LAST_RATIO: Final = 1.25
"""Of the mark at which those who write most are refused, where all are."""
REQUESTS_MAX: Final = 512
"""A small request counts as this part of the budget, which so bounds their number too."""
WAITING_RATIO: Final = 1 / 8
"""Of the requests that may run, how many of one collection may wait in one queue."""
DECODING_MAX: Final = 2
BLOCKED_WAIT_S: Final = 0.5
"""How long an insert waits that is refused for want of memory: its client asks less often so."""
FORWARDED_WAIT_S: Final = 0.1
LOOK_S: Final = 0.25
"""How often memory is measured while rows come."""
LOOK_PRESSED_S: Final = 0.05
"""The same while it is short."""


@dataclass(frozen=True)
class Memory:
    """What the system says of it."""

    total_bytes: int
    resident_bytes: Callable[[], int]


class Rest(NamedTuple):
    """The key of parts of requests that others have taken parts of."""

    collection: Hashable


class Gate:
    """A `FairQueue` on the loop."""

    def __init__(
        self,
        what: str,
        queue: FairQueue,
        clock: Clock,
        metrics: Metrics,
        *,
        refuse: Callable[[Hashable, str], Exception],
        tick_s: float = inf,
    ) -> None:
        """
        refuse  makes the error for a key that is refused because its queue is `full`, or it waited too long: `late`
        tick_s  how often those who wait are looked at though nobody leaves
        """
        self.what = what
        self.queue = queue
        self.delayed = 0
        self.refused: Counter[str] = Counter()
        self._clock = clock
        self._metrics = metrics
        self._refuse = refuse
        self._tick_s = tick_s
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, key: Hashable, cost: int = 1) -> bool:
        """Take part of the budget if that can be at once; return whether it was taken."""
        return self.queue.enter(key, cost, self._clock.monotonic_s())

    async def wait(self, key: Hashable, cost: int = 1, *, wait_s_max: float = inf) -> None:
        """Take part of the budget when its turn has come. Raises Overloaded."""
        now_s = self._clock.monotonic_s()
        scope = current.get()
        until_s = min(now_s + wait_s_max, inf if scope is None else scope.deadline_s)
        ticket = self.queue.wait(key, cost, now_s, until_s)
        if ticket is None:
            raise self._refused(key, "full")
        self._advance()
        if ticket.is_in(State.WAITING):
            self._turns[ticket] = asyncio.get_running_loop().create_future()
            try:
                await self._turns[ticket]
            except asyncio.CancelledError:
                self._turns.pop(ticket, None)
                if ticket.is_in(State.ADMITTED):
                    self.leave(key, cost)
                else:
                    self.queue.give_up(ticket)
                    self._advance()
                raise
        if ticket.is_in(State.LATE):
            raise self._refused(key, "late")
        self.delayed += 1
        self._metrics.delayed(self.what, self._clock.monotonic_s() - now_s)

    def leave(self, key: Hashable, cost: int = 1) -> None:
        """Give back what was taken."""
        self.queue.leave(key, cost)
        if self.queue.waiting:
            self._advance()

    @asynccontextmanager
    async def hold(self, key: Hashable, cost: int = 1, *, wait_s_max: float = inf) -> AsyncIterator[None]:
        """Hold part of the budget. Raises Overloaded."""
        if not self.enter(key, cost):
            await self.wait(key, cost, wait_s_max=wait_s_max)
        try:
            yield
        finally:
            self.leave(key, cost)

    def view(self) -> Mapping[str, Any]:
        queue = self.queue
        return {
            "held": queue.used, "limit": queue.limit, "waiting": queue.waiting, "delayed": self.delayed,
            "refused": self.refused.total(),
        }  # fmt: skip

    def _advance(self) -> None:
        now_s = self._clock.monotonic_s()
        for ticket in self.queue.advance(now_s):
            turn = self._turns.pop(ticket, None)
            if turn is not None and not turn.done():
                turn.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.queue.waiting:
            delay_s = max(0.001, min(self._tick_s, self.queue.next_deadline_s(now_s) - now_s))
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._advance)

    def _refused(self, key: Hashable, reason: str) -> Exception:
        error = self._refuse(key, reason)
        reason = "memory" if isinstance(error, MemoryShort) else reason
        self.refused[reason] += 1
        return error


class Admission:
    """The budgets of one node. Belongs to the loop."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        *,
        memory: Memory | None = None,
        growing_bytes: Callable[[], int] = lambda: 0,
        name_of: Callable[[CollectionId], str] = str,
        id_of: Callable[[str, str], CollectionId | None] = lambda database, collection: None,
    ) -> None:
        """
        growing_bytes  returns the bytes of rows that are in no chunk yet
        name_of        returns what people call a collection
        id_of          returns the collection of this database and name, None if it is not known
        """
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._memory = memory
        self._growing_bytes = growing_bytes
        self._name_of = name_of
        self._id_of = id_of
        self._looked_at_s = -inf
        self._level = Level.ACCEPT
        admission, storage = settings.admission, settings.storage
        total = admission.memory_bytes_max or int(MEMORY_RATIO * (memory.total_bytes if memory else 0))
        self.memory_bytes_max = total
        """0 if there is no limit."""
        self.growing_bytes_max = min(storage.growing_bytes_max, int(GROWING_MEMORY_RATIO * total) or 1 << 62)
        """Above it the largest growing segments are sealed, until no more than `growing_bytes_low` is left."""
        self.merge_bytes_max = int(MERGE_MEMORY_RATIO * total) or storage.segment_bytes_max
        self.growing_bytes_low = int(storage.growing_low_ratio * self.growing_bytes_max)
        self.pressure = Pressure(self._growing_mark(), self._resident_mark() if memory and total else None)
        bodies = self._requests_max(BODIES_MAX * settings.api.body_bytes_max)
        requests = self._requests_max(admission.request_bytes_max)
        self._request_bytes_min = max(1, requests // REQUESTS_MAX)
        self.bodies = self._gate("bodies", bodies, "api.body_bytes_max", "bytes of request bodies", is_memory=True)
        self.requests = self._gate(
            "requests", requests, "admission.request_bytes_max", "bytes of inserts", rate=self._may_come, is_memory=True
        )
        self.decoding = self._gate("decoding", DECODING_MAX, "", "large inserts are being decoded")
        self.reads = self._gate("reads", admission.reads_max, "admission.reads_max", "reads")
        in_log = min(admission.log_bytes_max, int(LOG_MEMORY_RATIO * total) or admission.log_bytes_max)
        self.log = self._gate("log", in_log, "admission.log_bytes_max", "bytes of rows", rate=self._rate)

    async def take_request(self, database: str, collection: str, nbytes: int) -> int:
        """Take room for an insert or upsert of this size; return what to `give_request` back: 0 if its request holds
        room already.

        Raises Overloaded, MemoryShort.
        """
        scope = current.get()
        if scope is not None and scope.is_admitted:
            return 0
        if self._level is not Level.ACCEPT and (found := self._id_of(database, collection)) is not None:
            self.pressure.ask(found, nbytes)  # here, in case it comes no further
        key, cost = (database, collection), max(nbytes, self._request_bytes_min)
        if not self.requests.enter(key, cost):
            await self.requests.wait(key, cost)
        if scope is not None:
            scope.is_admitted = True
        return cost

    def give_request(self, database: str, collection: str, cost: int) -> None:
        """The request is answered."""
        if cost:
            self.requests.leave((database, collection), cost)
            if (scope := current.get()) is not None:
                scope.is_admitted = False

    async def take_rows(
        self, collection_id: CollectionId, nbytes: int, *, is_rest: bool = False, is_forwarded: bool = False
    ) -> Hashable:
        """Take room for rows on their way through a log that is led here; return the key to `give_rows` back.

        is_rest       another shard has taken a part of the same request
        is_forwarded  they came from another node

        Raises Overloaded, MemoryShort.
        """
        self.pressure.ask(collection_id, nbytes)
        key = Rest(collection_id) if is_rest else collection_id
        if not self.log.enter(key, nbytes):
            await self.log.wait(key, nbytes, wait_s_max=FORWARDED_WAIT_S if is_forwarded else inf)
        self.pressure.take(nbytes)
        return key

    def give_rows(self, key: Hashable, nbytes: int) -> None:
        """The rows are applied, or will not be."""
        self.log.leave(key, nbytes)

    def look(self, now_s: float | None = None) -> Level:
        """Measure memory, if that was not done just now; return what those who write most meet."""
        now_s = self._clock.monotonic_s() if now_s is None else now_s
        if now_s - self._looked_at_s >= (LOOK_S if self._level is Level.ACCEPT else LOOK_PRESSED_S):
            self._looked_at_s = now_s
            resident = self._memory.resident_bytes() if self._memory is not None else 0
            self.pressure.observe(growing=self._growing_bytes(), resident=resident, now_s=now_s)
            self._level = self.pressure.level
        return self._level

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (self.bodies, self.requests, self.decoding, self.log, self.reads)

    def view(self) -> Mapping[str, Any]:
        """Return the state as plain data."""
        return {
            "memory": {"limit": self.memory_bytes_max, **self.pressure.view()},
            "why": "" if self._level is Level.ACCEPT else self.pressure.why(),
            **{gate.what: gate.view() for gate in self.gates},
        }

    def observe(self) -> None:
        """Set the gauges."""
        self.look()
        for gate in self.gates:
            self._metrics.budget(gate.what, gate.queue.used, gate.queue.limit, gate.queue.waiting)
        for mark in self.pressure.marks:
            self._metrics.memory(mark.name, mark.value, mark.high)
        self._metrics.write_level(list(Level).index(self._level))

    # parts

    def _gate(
        self,
        what: str,
        limit: int,
        setting: str,
        unit: str,
        *,
        rate: Callable[[Hashable], float] | None = None,
        is_memory: bool = False,
    ) -> Gate:
        admission = self._settings.admission
        queue = FairQueue(
            limit,
            share_ratio=admission.share_ratio,
            wait_s_max=admission.wait_s_max,
            standing_wait_s_max=admission.standing_wait_s_max,
            blocked_wait_s_max=BLOCKED_WAIT_S,
            waiting_max=max(1, int(WAITING_RATIO * self._settings.api.requests_running_max)),
            shares_waiting=is_memory,
            rate=rate,
        )

        def refuse(key: Hashable, reason: str) -> Exception:
            name = self._name(key)
            if rate is not None and rate(key) < inf:
                self._metrics.refused(what, "memory", name)
                return MemoryShort(
                    f"quota exceeded[reason=memory quota exceeded]: {name} writes more than there is memory for: "
                    f"{self.pressure.why()}; deletes, drops and releases make room; try again later"
                )
            self._metrics.refused(what, reason, name)
            waits = f"{queue.waiting} wait" if reason == "full" else "it had to wait too long"
            raises = f" ({setting} raises it)" if setting else ""
            return Overloaded(
                f"{name} has {queue.used_by(key)} and all have {queue.used} of at most {queue.limit} {unit} under way "
                f"on node {self._settings.node.name}{raises}, and {waits}: try again soon"
            )

        tick_s = inf if rate is None else LOOK_PRESSED_S
        return Gate(what, queue, self._clock, self._metrics, refuse=refuse, tick_s=tick_s)

    def _rate(self, key: Hashable) -> float:
        if isinstance(key, Rest):
            return inf
        self.look()
        return self.pressure.rate(key)

    def _may_come(self, key: Hashable) -> float:
        """Return 0 for a collection whose rows would be refused in the end: to decode them takes memory too."""
        if self._level is not Level.ACCEPT and self.look() is not Level.ACCEPT:
            match key:
                case (str(database), str(collection)):
                    found = self._id_of(database, collection)
                    return inf if found is None or self.pressure.rate(found) > 0 else 0.0
        return inf

    def _name(self, key: Hashable) -> str:
        match key:
            case Rest(collection):
                return self._name(collection)
            case (str(database), str(collection)):
                return collection if database == "default" else f"{database}.{collection}"
            case int():
                return self._name_of(CollectionId(key))
        return str(key)

    def _requests_max(self, asked: int) -> int:
        if not self.memory_bytes_max:
            return asked
        return min(asked, max(self._settings.api.body_bytes_max, int(REQUESTS_MEMORY_RATIO * self.memory_bytes_max)))

    def _growing_mark(self) -> Mark:
        slow = max(self.growing_bytes_max, GROWING_MARK_BYTES_MIN)
        high = int(self._settings.admission.unflushed_ratio_max * slow)
        setting = "storage.growing_bytes_max"
        if self.growing_bytes_max < self._settings.storage.growing_bytes_max:
            setting = "admission.memory_bytes_max"
        return Mark("growing", min(self.growing_bytes_low, slow), slow, high, int(LAST_RATIO * high), setting)

    def _resident_mark(self) -> Mark:
        admission, total = self._settings.admission, self.memory_bytes_max
        ratios = admission.memory_low_ratio, admission.memory_slow_ratio, admission.memory_high_ratio
        low, slow, high = (int(ratio * total) for ratio in ratios)
        return Mark("resident", low, slow, high, max(total, high + 1), "admission.memory_bytes_max")
