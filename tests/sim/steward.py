"""Who has nodes of a simulated world come and go, and sees in the end to it that the cluster is what it should be.

    join       another node comes
    leave      a node is drained, and removed when it holds nothing any more
    stay       a node is to leave, and a moment later it is not
    replace    a blank node takes the place of one that still runs
    lose       a machine is gone for good; a blank one takes its place after a while
    lose-zone  all machines of a zone lose their power for a while; or for good, if no group had its majority there

Each goes on beside the others, and asks anybody until it is answered, as one who runs a command again does. What is
gone for good never was more than a minority of any group, in its generation or the next: with more, data is lost, and
rightly. A node that was removed may run on, aware of it or not: nothing comes of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Final

from node.database import Database
from storage.errors import BadRequest, Conflict, Unavailable
from tests.sim.cluster import Cluster, NoAnswer, Refused
from tests.sim.plan import GUESTS_MAX, Step

ASK_S: Final = 8.0
LOOK_S: Final = 0.3


class Steward:
    """Carries out one world's churn."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._count = cluster.plan.nodes
        """Of machines there have ever been."""
        self._doing: list[asyncio.Task[None]] = []
        self._coming: set[str] = set()
        """Nodes that have yet to be let in."""
        self._heirs: dict[str, str] = {}
        """Node -> who takes its place."""
        self.done: list[str] = []

    async def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            await asyncio.sleep(max(0.0, step.at_s - self._cluster.loop.now_s))
            self._doing.append(self._cluster.loop.create_task(self._carry_out(step)))

    async def finish(self) -> None:
        """Return when all that was begun is done, every machine that was lost has been replaced, and nodes suffice.

        Nothing else may be broken any more.
        """
        while missing := [*self._missing(), *(one for one in self._doing if not one.done())]:
            self._doing += [one for one in missing if one not in self._doing]
            await asyncio.wait(missing, timeout=1.0)  # what goes on may wait for what is missing since
        await asyncio.gather(*self._doing)

    def _missing(self) -> list[asyncio.Task[None]]:
        """Begin what is to be done besides what was planned: in place of what was lost, and for all copies."""
        cluster = self._cluster
        lost = [name for name in cluster.names if cluster.machines[name].is_lost and name not in cluster.leaving]
        works = [self._replace(name, Random(f"end of {name}")) for name in lost]
        if not works and self._staying() < cluster.plan.copies:
            name = self._fresh_name()
            works.append(self._join(name, Random(f"coming of {name}")))
        return [cluster.loop.create_task(one) for one in works]

    def _fresh_name(self) -> str:
        self._count += 1
        return f"n{self._count}"

    def _staying(self) -> int:
        """How many nodes the cluster will have when all that was begun is done."""
        return len(self._coming) + sum(self._stays(name) for name in self._cluster.names)

    def _stays(self, name: str) -> bool:
        return (
            name not in self._cluster.leaving and name not in self._heirs and not self._cluster.machines[name].is_lost
        )

    async def _carry_out(self, step: Step) -> None:
        rng, cluster = Random(step.dice), self._cluster
        staying = [name for name in cluster.names if self._stays(name)]
        if not cluster.is_formed or not staying:
            return
        is_full = self._count >= cluster.plan.nodes + GUESTS_MAX
        chosen, for_s = rng.choice(staying), step.number("for")
        match step.what:
            case "join":
                if not is_full:
                    name = self._fresh_name()
                    self.done.append(f"join {name}")
                    await self._join(name, rng)
            case "leave":
                if self._staying() > cluster.plan.copies:
                    self.done.append(f"leave {chosen}")
                    await self._leave(chosen, rng)
            case "stay":
                if self._staying() > cluster.plan.copies:
                    self.done.append(f"stay {chosen}")
                    await self._stay(chosen, rng, for_s)
            case "replace":
                if not is_full:
                    self.done.append(f"replace {chosen}")
                    await self._replace(chosen, rng)
            case "lose":
                if cluster.may_lose([chosen]):
                    self.done.append(f"lose {chosen}")
                    cluster.damaged.add(chosen)
                    cluster.lose(chosen)
                    await asyncio.sleep(for_s)
                    await self._replace(chosen, rng)
            case "lose-zone":
                await self._lose_zone(cluster.zone_of(chosen), rng, for_s)
            case other:
                raise ValueError(f"stewards do not know what {other} is")

    async def _join(self, name: str, rng: Random, replaces: str = "") -> None:
        self._coming.add(name)
        zones = self._cluster.plan.zones
        zone = f"z{rng.randrange(zones)}" if zones else ""
        while name not in self._cluster.names:
            try:
                await self._cluster.join(name, rng.choice(self._cluster.names), zone=zone, replaces=replaces)
            except (Unavailable, NoAnswer, Refused):
                await asyncio.sleep(rng.uniform(0.2, 1.0))
        self._coming.discard(name)

    async def _replace(self, old: str, rng: Random) -> None:
        """Have a blank node take the place of another, which is removed when it holds nothing any more."""
        if old in self._heirs or old in self._cluster.leaving:
            return
        name = self._heirs[old] = self._fresh_name()
        self._cluster.leaving.add(old)
        await self._join(name, rng, replaces=old)
        while not self._has_gone(old, name):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        await self._dismiss(old, rng)

    def _has_gone(self, old: str, heir: str) -> bool:
        """Whether a node was removed, as those say who know that its heir was there."""
        known = self._cluster.membership().members
        return bool(known) and old not in known and (heir in known or heir not in self._cluster.names)

    async def _leave(self, name: str, rng: Random) -> None:
        self._cluster.leaving.add(name)
        if not await self._drain(name, rng, undo=False):
            self._cluster.leaving.discard(name)
            return
        while True:
            try:
                await self._ask(rng, lambda database: database.nodes.remove(name))
                break
            except BadRequest as error:
                if "there is no node" not in str(error):
                    raise
                break  # an answer was lost
            except (Unavailable, NoAnswer, Refused, Conflict):
                await asyncio.sleep(LOOK_S)
        await self._dismiss(name, rng)

    async def _stay(self, name: str, rng: Random, for_s: float) -> None:
        self._cluster.leaving.add(name)
        if await self._drain(name, rng, undo=False):
            await asyncio.sleep(for_s)
            await self._drain(name, rng, undo=True)
        self._cluster.leaving.discard(name)

    async def _drain(self, name: str, rng: Random, *, undo: bool) -> bool:
        """Return whether the cluster agreed."""
        while True:
            try:
                await self._ask(rng, lambda database: database.nodes.drain(name, undo=undo))
                return True
            except (Unavailable, NoAnswer, Refused):
                await asyncio.sleep(LOOK_S)
            except BadRequest:
                return False

    async def _dismiss(self, name: str, rng: Random) -> None:
        self._cluster.dismiss(name)
        if rng.random() < 0.5:
            self._cluster.machines[name].is_lost = True
            self._cluster.kill(name, power=False)

    async def _lose_zone(self, zone: str, rng: Random, for_s: float) -> None:
        cluster = self._cluster
        names = [name for name in cluster.names if zone and cluster.zone_of(name) == zone]
        if rng.random() < 0.5 and cluster.may_lose(names):
            self.done.append(f"lose-zone {zone} {names}")
            for name in names:
                cluster.damaged.add(name)
                cluster.lose(name)
            await asyncio.sleep(for_s)
            await asyncio.gather(*(self._replace(name, rng) for name in names))
            return
        self.done.append(f"dark-zone {zone} {names}")
        for name in names:
            cluster.kill(name, power=True)
        await asyncio.sleep(for_s)
        for name in names:
            cluster.start_if_down(name)

    async def _ask(self, rng: Random, request: Callable[[Database], Awaitable[object]]) -> None:
        await self._cluster.ask(rng.choice(self._cluster.names), request, within_s=ASK_S)
