"""Short of memory in a cluster: followers have leaders seal and slow down, floods are held off, nothing is lost."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from node.node import Node
from node.pressure import Level, Mark
from storage.errors import MemoryShort, Overloaded
from tests.node.cluster_of import Site, on_a_cluster
from tests.node.test_database import rows


def crowd(node: Node, growing_bytes_max: int) -> None:
    """Let a node have so much memory for growing segments."""
    low, high = growing_bytes_max // 2, 2 * growing_bytes_max
    node.admission.growing_bytes_max, node.admission.growing_bytes_low = growing_bytes_max, low
    node.admission.pressure.growing = Mark("growing", low, growing_bytes_max, high, 5 * high // 4, "a test")


def growing(node: Node) -> int:
    return sum(one.growing_bytes() for one in node.upkeep.values())


def test_a_follower_has_the_leader_seal() -> None:
    """A node that leads nothing and has less memory than its leaders keeps its growing segments small all the same."""

    async def script(site: Site) -> None:
        await site.create()
        leaders = {site.leader_of(0), site.leader_of(1)}
        follower = next(one for one in site.others(*leaders))
        crowd(site.node(follower), 20_000)
        for first in range(0, 1000, 100):
            await site.insert(next(iter(leaders)), list(range(first, first + 100)))
        await asyncio.sleep(12)
        assert growing(site.node(follower)) <= 20_000
        assert len(await site.found(follower)) == 1000

    on_a_cluster(script)


def test_a_followers_word_stops_writers_and_its_silence_lets_them_go_on() -> None:
    """While a replica has no memory for more, inserts are refused to be repeated, through any node; deletes go on; and
    when it has, inserts do."""

    async def script(site: Site) -> None:
        await site.create()
        leaders = {site.leader_of(0), site.leader_of(1)}
        follower = next(one for one in site.others(*leaders))
        await site.insert("n1", list(range(500)))
        node = site.node(follower)
        node.admission.pressure.growing = Mark("growing", 1, 2, 3, 1 << 30, "a test")
        await asyncio.sleep(2)
        for name in sorted(leaders):
            with pytest.raises(MemoryShort, match=follower):
                await site.insert(name, [1000])
            assert site.node(name).admission.look() is Level.REFUSE and site.node(name).why_not_ready == ""
        assert await site.ask("n2", lambda database: database.delete("default", "c", "id < 10", {})) == 10
        node.admission.pressure.growing = Mark("growing", 1 << 20, 1 << 21, 1 << 22, 1 << 23, "a test")
        await asyncio.sleep(5)
        for name in ("n1", "n2", "n3"):
            await site.insert(name, [2000 + int(name[1])])
        assert len(await site.found("n3")) == 493

    on_a_cluster(script)


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_through_every_node(seed: int) -> None:
    """Nine clients flood one collection through all nodes; another tenant's writes all succeed; every acknowledged row
    of both is there once, no refused one is, and when it is over everything is accepted."""

    async def script(site: Site) -> None:
        dice = Random(seed)
        await site.create(shards=2)
        await site.create(name="d")
        for name in ("n1", "n2", "n3"):
            crowd(site.node(name), 40_000)
        until_s = site.world.loop.now_s + 20
        acknowledged, refused, ids = set[int](), set[int](), iter(range(0, 10_000_000, 100))

        async def flood(name: str) -> None:
            while site.world.loop.now_s < until_s:
                first = next(ids)
                mine = list(range(first, first + dice.randrange(20, 100)))
                try:
                    await site.insert(name, mine)
                    acknowledged.update(mine)
                except Overloaded:
                    refused.update(mine)

        async def write(name: str, first: int) -> None:
            await site.ask(name, lambda database: database.insert("default", "d", rows([first, first + 1])))

        floods = [asyncio.ensure_future(flood(f"n{1 + i % 3}")) for i in range(9)]
        good = 0
        while site.world.loop.now_s < until_s:
            await write(dice.choice(("n1", "n2", "n3")), good)
            good += 2
            await asyncio.sleep(0.1)
        await asyncio.gather(*floods)
        await asyncio.sleep(10)
        assert len(acknowledged) > 1000 and refused
        for name in ("n1", "n2", "n3"):
            assert site.node(name).admission.look() is Level.ACCEPT
        await site.insert("n1", [99_000_000])
        found = await site.found("n2")
        assert set(found) == acknowledged | {99_000_000} and not refused & acknowledged
        assert await site.ask("n3", lambda database: database.row_count("default", "d")) == good
        assert sum(site.node(name).crowding.sealed for name in ("n1", "n2", "n3")) > 0

    on_a_cluster(script, seed=seed + 1)
