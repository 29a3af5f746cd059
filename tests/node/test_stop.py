"""A node stops gracefully, whatever state its disk is in."""

from __future__ import annotations

import asyncio

from tests.node.cluster_of import Site, on_a_cluster


def test_a_stop_without_room_in_the_journal() -> None:
    """What could not be written was promised to nobody: the node stops, and comes back when there is room."""

    async def script(site: Site) -> None:
        await site.create(shards=1)
        (shard_id,) = next(iter(site.node("n1").catalog.collections.values())).shards
        leader = site.leader_of(shard_id)
        full = site.others(leader)[0]
        machine = site.world.machines[full]
        machine.disk.capacity_bytes = 0
        for first in range(0, 2_000, 500):
            await site.insert(leader, list(range(first, first + 500)))
        await asyncio.sleep(1.0)
        assert site.node(full).journal.pending_bytes
        await site.world.stop(full, within_s=20.0)
        machine.disk.capacity_bytes = None
        site.world.start(full)
        await site.ready()
        assert len(await site.found(full)) == 2_000

    on_a_cluster(script)
