"""A small cluster of real nodes in a quiet simulated world, for tests of what its clients may rely on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from node.database import Database
from node.node import Node
from node.scope import Scope
from node.service import Consistency, ReadOptions
from storage.types import ShardId
from tests.node.test_database import ID, META, NUMBER, request, rows
from tests.sim.cluster import Cluster
from tests.sim.plan import Plan
from tests.sim.world import SimLoop, close, run

T = TypeVar("T")

ANSWER_S: Final = 20.0
READY_S: Final = 30.0
STRONG, BOUNDED = Consistency.STRONG, Consistency.BOUNDED
SESSION, EVENTUALLY = Consistency.SESSION, Consistency.EVENTUALLY


@dataclass
class Site:
    """The cluster of a test. Names are n1, n2, ..."""

    world: Cluster

    async def ready(self, *names: str) -> None:
        """Return when these nodes, or all, are ready."""
        until_s = self.world.loop.now_s + READY_S
        for name in names or tuple(self.world.machines):
            while (why := self._why_not_ready(name)) and self.world.loop.now_s < until_s:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert not why, f"{name} is not ready after {READY_S} s: {why}"

    def _why_not_ready(self, name: str) -> str:
        return self.node(name).why_not_ready if self.world.machines[name].database is not None else "it starts"

    def node(self, name: str) -> Node:
        node = self.world.machines[name].node
        assert node is not None
        return node

    async def ask(
        self,
        name: str,
        work: Callable[[Database], Awaitable[T]],
        *,
        scope: Scope | None = None,
        within_s: float = ANSWER_S,
    ) -> T:
        """Return what a node answers to a client."""
        return await self.world.ask(name, work, scope=scope, within_s=within_s)

    async def create(self, node: str = "n1", **more: Any) -> None:
        await self.ask(node, lambda database: database.create_collection("default", request(**more)))

    async def insert(self, name: str, ids: list[int], *, scope: Scope | None = None, **more: Any) -> int:
        result = await self.ask(name, lambda database: database.insert("default", "c", rows(ids, **more)), scope=scope)
        return result.rows

    async def found(
        self,
        name: str,
        level: Consistency | None = STRONG,
        filter: str = "",
        *,
        scope: Scope | None = None,
        within_s: float = ANSWER_S,
        **more: Any,
    ) -> dict[int, Any]:
        """Return id -> number of the rows that match, as this node answers."""
        options = ReadOptions(filter=filter, output_fields=["number"], consistency=level, **more)
        result = await self.ask(
            name,
            lambda database: database.query("default", "c", options, limit=0, offset=0),
            scope=scope,
            within_s=within_s,
        )
        ids, numbers = (result.batch.columns[one].to_list() for one in (ID, NUMBER))
        return dict(zip(ids, numbers, strict=True))

    def leader_of(self, shard_id: int) -> str:
        """Return the node that leads a shard, which has a leader."""
        leaders = [
            machine.name
            for machine, node in self.world.nodes()
            if ShardId(shard_id) in node.shards and node.shards[ShardId(shard_id)].is_leader
        ]
        assert len(leaders) == 1, leaders
        return leaders[0]

    def others(self, *names: str) -> list[str]:
        return [one for one in self.world.machines if one not in names]

    def kill(self, name: str) -> None:
        self.world.kill(name, power=False)

    def scope(self, name: str, within_s: float = ANSWER_S) -> Scope:
        """Return a request's company on a node."""
        return Scope(self.world.machines[name].clock.monotonic_s() + within_s)


def on_a_cluster(
    script: Callable[[Site], Awaitable[None]],
    *,
    nodes: int = 3,
    copies: int = 3,
    shards: int = 2,
    seed: int = 1,
    dead_after_s: float = 600.0,
) -> None:
    """Run the script on a cluster whose nodes are ready."""
    loop = SimLoop()
    plan = Plan(
        seed=seed, nodes=nodes, copies=copies, shards=shards, clients=1, duration_s=1.0, clock_error_ms=20,
        clock_drift_ppm=0, segment_bytes_max=1 << 20, segment_age_s_max=600.0, segment_idle_s_max=600.0,
        growing_bytes_max=1 << 30, checkpoint_interval_s=60.0, journal_file_bytes_max=1 << 16, deleted_ratio=0.2,
        index_rows_min=1,
    )  # fmt: skip
    world = Cluster(loop, plan)
    world.dead_after_s = dead_after_s

    async def main() -> None:
        for name in plan.names:
            world.start(name)
        site = Site(world)
        await site.ready()
        await script(site)

    try:
        run(loop, main())
        if not world.violations.empty():
            raise world.violations.get_nowait()
    except AssertionError as error:
        if not world.violations.empty():
            raise world.violations.get_nowait() from error
        raise
    finally:
        world.close()
        close(loop)


__all__ = ["ANSWER_S", "BOUNDED", "EVENTUALLY", "ID", "META", "NUMBER", "SESSION", "STRONG", "Site", "on_a_cluster"]
