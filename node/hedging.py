"""Asking whoever may answer: of several replicas first the one that answers soonest, and another one if it is slow.

A second request beside a slow one, a hedge, cuts the tail of the latencies for few requests more (Dean and Barroso,
The Tail at Scale, CACM 56, 2013, page 77).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from node.calls import Mesh
from node.clock import Clock
from node.metrics import Metrics, Routed
from node.network import Blob, Link
from storage.errors import AnnulusError, BadRequest, SchemaMismatch, Unavailable

HEDGES_MAX: Final = 1
"""Replicas asked beside the first one because it is slow."""
HEDGE_S_MIN: Final = 0.05
HEDGE_S_UNKNOWN: Final = 0.2
"""Before a replica's times are known."""
LATENCY_WEIGHT: Final = 0.2
NEAR_RATIO: Final = 2.0
"""Replicas that take at most this much longer than the fastest one take turns."""

Reply = tuple[dict[str, Any], Sequence[memoryview]]
"""What a call returns."""


class Latency:
    """What one peer's answers take, as TCP keeps its round trips: a smoothed mean and deviation, in seconds."""

    def __init__(self, first_s: float) -> None:
        self.mean_s = first_s
        self.deviation_s = first_s / 2

    def note(self, taken_s: float) -> None:
        self.deviation_s += LATENCY_WEIGHT * (abs(taken_s - self.mean_s) - self.deviation_s)
        self.mean_s += LATENCY_WEIGHT * (taken_s - self.mean_s)

    @property
    def high_s(self) -> float:
        """About the 95th percentile: answers seldom take longer."""
        return self.mean_s + 2 * self.deviation_s


class Hedging:
    """One per node. Belongs to the loop."""

    def __init__(self, mesh: Mesh | None, me: str, clock: Clock, metrics: Metrics) -> None:
        self._mesh = mesh
        self._me = me
        self._clock = clock
        self._metrics = metrics
        self._latencies: dict[str, Latency] = {}
        self._turn = 0

    def is_up(self, peer: str) -> bool:
        """Return whether a node can be reached; this one always can."""
        return peer == self._me or (self._mesh is not None and self._mesh.is_up(peer))

    def order(self, peers: Sequence[str], first: str | None = None) -> tuple[str, ...]:
        """Return the peers in the order in which to ask them: `first` if it is up, then who answers soon; those that
        take about as long as the fastest one take turns. Those that are down come last.
        """
        mean_s = {one: self._latencies[one].mean_s if one in self._latencies else 0.0 for one in peers}
        up = sorted((one for one in peers if self.is_up(one)), key=mean_s.__getitem__)
        near = [one for one in up if mean_s[one] <= NEAR_RATIO * mean_s[up[0]]]
        self._turn += 1
        turn = self._turn % len(near) if near else 0
        order = [*near[turn:], *near[:turn], *up[len(near) :], *(one for one in peers if one not in up)]
        if first in up:
            order.sort(key=lambda one: one != first)
        return tuple(order)

    async def ask_any(
        self,
        peers: Sequence[str],
        method: str,
        arguments: dict[str, Any],
        blobs: Sequence[Blob],
        *,
        deadline_s: float,
        link: Link = Link.SMALL,
    ) -> Reply:
        """Return the first good answer of these peers, asked in their order.

        The next one is asked when one fails, and once also when an answer takes longer than that peer's usually do.
        Raises the error of a bad request, or of an old schema, at once, else Unavailable with what each peer said.
        """
        waiting = [one for one in peers if self.is_up(one)]
        faults = {one: "it is down" for one in peers if one not in waiting}
        running: dict[asyncio.Task[Reply], str] = {}
        hedges = HEDGES_MAX

        def start() -> None:
            peer = waiting.pop(0)
            running[asyncio.ensure_future(self._timed(peer, method, arguments, blobs, deadline_s, link))] = peer

        try:
            while waiting or running:
                if not running:
                    start()
                patience_s = self._hedge_s(next(iter(running.values()))) if waiting and hedges else None
                await asyncio.wait(running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                done = [task for task in running if task.done()]
                if not done:
                    hedges -= 1
                    self._metrics.routed(Routed.HEDGE)
                    start()
                for task in done:
                    peer = running.pop(task)
                    try:
                        return task.result()
                    except (BadRequest, SchemaMismatch):
                        raise
                    except (AnnulusError, TimeoutError) as error:
                        faults[peer] = str(error) or "time is up"
        finally:
            for task in running:
                task.cancel()
        raise Unavailable(
            "; ".join(f"{peer}: {fault}" for peer, fault in faults.items()) or "there is no other replica"
        )

    async def _timed(
        self, peer: str, method: str, arguments: dict[str, Any], blobs: Sequence[Blob], deadline_s: float, link: Link
    ) -> Reply:
        mesh = self._mesh
        assert mesh is not None, "a node without peers is the only one that is up"
        began_s = self._clock.monotonic_s()
        try:
            return await mesh.call(peer, method, arguments, blobs, timeout_s=max(0.0, deadline_s - began_s), link=link)
        finally:
            taken_s = self._clock.monotonic_s() - began_s
            known = self._latencies.get(peer)
            if known is None:
                self._latencies[peer] = Latency(taken_s)
            else:
                known.note(taken_s)

    def _hedge_s(self, peer: str) -> float:
        """Return after how long another replica is asked too."""
        known = self._latencies.get(peer)
        return HEDGE_S_UNKNOWN if known is None else max(HEDGE_S_MIN, known.high_s)
