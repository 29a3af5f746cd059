"""Changes of the catalogue on a cluster: whole or not at all, once, in order, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.catalog import Task
from cluster.membership import FormCluster
from cluster.message import Message
from node.broadcaster import Step
from node.database import Database
from node.service import Consistency, IndexRequest
from storage.errors import BadRequest, InvalidParameter, Unavailable
from storage.schema import DataType, FieldSchema
from storage.types import ShardId
from tests.node.cluster_of import Site, on_a_cluster
from tests.node.test_database import request, rows
from tests.sim.agreement import disagreements
from tests.sim.cluster import NoAnswer, Refused

Work = Callable[[Database], Awaitable[Any]]
NAMES = ("n1", "n2", "n3")
INDEX = IndexRequest("vector", "vector", "FLAT", "L2")
NOTE = FieldSchema("note", DataType.VARCHAR, nullable=True, max_bytes=8, params={"max_length": "8"})


def leader_of_control(site: Site) -> str:
    return next(machine.name for machine, node in site.world.nodes() if node.control.is_leader)


async def quiet(site: Site) -> None:
    """Return when every node has applied all there is, and nothing is open; then catalogue and shards agree."""
    async with asyncio.timeout(30):
        while True:
            nodes = [node for _, node in site.world.nodes()]
            hosts = [[node.control, *node.shards.values()] for node in nodes]
            ends = [{host.machine.position for host in same} for same in zip(*hosts, strict=True)]
            if len(nodes) == 3 and all(len(one) == 1 for one in ends) and not any(node.catalog.tasks for node in nodes):
                break
            await asyncio.sleep(0.05)
    for node in nodes:
        assert disagreements(node) == []


CHANGES: list[tuple[str, Work]] = [
    ("create", lambda db: db.create_collection("default", request(shards=2))),
    ("create a partition", lambda db: db.create_partition("default", "c", "p")),
    ("alter", lambda db: db.alter_collection("default", "c", {"collection.ttl.seconds": "100000"}, [])),
    ("add a field", lambda db: db.add_field("default", "c", NOTE)),
    ("alter a field", lambda db: db.alter_field("default", "c", "note", {"max_length": "9"})),
    ("drop a field", lambda db: db.drop_field("default", "c", "note")),
    ("release", lambda db: db.release("default", "c")),
    ("drop an index", lambda db: db.drop_index("default", "c", "vector")),
    ("create an index", lambda db: db.create_index("default", "c", INDEX)),
    ("load", lambda db: db.load("default", "c", ["_default"])),
    ("truncate", lambda db: db.truncate_collection("default", "c")),
    ("drop a partition", lambda db: db.drop_partition("default", "c", "p")),
    ("create a database", lambda db: db.create_database("d", {})),
    ("rename", lambda db: db.rename_collection("default", "c", "e", "d")),
    ("create an alias", lambda db: db.create_alias("d", "e", "x")),
    ("move an alias", lambda db: db.alter_alias("d", "e", "x")),
    ("drop an alias", lambda db: db.drop_alias("d", "x")),
    ("flush all", lambda db: db.flush_all()),
    ("drop", lambda db: db.drop_collection("d", "e")),
    ("drop a database", lambda db: db.drop_database("d")),
]


@pytest.mark.parametrize(
    ("step", "after"),
    [*((step, 0) for step in Step), (Step.TELLS, 1), (Step.TOLD, 1)],
)
def test_the_coordinator_dies_at_a_step(step: Step, after: int) -> None:
    """I-CO-1, I-CO-2, I-CT-1: the power goes at this step of every kind of change in turn. Its client, at another node,
    is told that it was made; then it is so on every shard and in every catalogue, and was made once."""

    async def script(site: Site) -> None:
        deaths = 0
        for what, work in CHANGES:
            leader = leader_of_control(site)
            site.world.kill_at_step(leader, step, after)
            asking = next(name for name in NAMES if name != leader)
            await site.ask(asking, work, within_s=25.0)
            site.world.machines[leader].dies_at = None
            if not site.world.machines[leader].is_up:
                deaths += 1
                site.world.start(leader)
            await site.ready()
            await quiet(site)
            catalog = site.node("n1").catalog
            if what == "truncate":
                assert await site.found("n2") == {}
            if what in ("create", "truncate"):  # what is written after a change survives its repeats
                await site.insert("n1", [1, 2, 3, 4])
            if what == "rename":
                assert set(catalog.names) == {("d", "e")}
        assert not catalog.names and not catalog.aliases and list(catalog.databases) == ["default"]
        alone = {Step.HOLDS, Step.LETS_GO}  # the steps of changes of which shards hear nothing
        assert deaths == (len(CHANGES) if step in alone else len(CHANGES) - 6)

    on_a_cluster(script)


def test_what_was_told_is_not_told_again() -> None:
    """A shard without a leader keeps a change open; that the other was told is noted after a while, and the next
    coordinator tells only the one that is left. Meanwhile changes of another collection go on (I-CO-4)."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        first = leader_of_control(site)
        told: list[tuple[str, ShardId]] = []
        stuck = True
        for machine, node in site.world.nodes():

            async def tell(
                shard_id: ShardId, message: Message, task: Task, *, name: str = machine.name,
                really: Any = node.broadcaster.tell,
            ) -> None:  # fmt: skip
                told.append((name, shard_id))
                if stuck and shard_id == 1 and task.kind == "truncate_collection":
                    raise Unavailable("shard 1 has no leader")
                await really(shard_id, message, task)

            node.broadcaster.tell = tell  # type: ignore[method-assign]
        changing = asyncio.ensure_future(
            site.ask("n1", lambda db: db.truncate_collection("default", "c"), within_s=60.0)
        )
        await asyncio.sleep(2.0)
        await site.ask("n2", lambda db: db.create_collection("default", request("other", shards=2)))
        with pytest.raises(Unavailable, match="hold what this one needs"):
            await site.ask("n3", lambda db: db.create_partition("default", "c", "p"))
        (task,) = site.node(first).catalog.tasks.values()
        assert task.acked == {0}
        (shown,) = (await site.ask(first, lambda db: db.status()))["changes"]
        assert (shown["kind"], shown["collection"], shown["told"]) == ("truncate_collection", "c", [0])
        assert "no leader" in shown["trouble"]
        told.clear()
        node = site.node(first)
        assert node.control.raft.transfer()
        node.control.poke()
        await asyncio.sleep(3.0)
        second = leader_of_control(site)
        assert second != first and {one for one in told if one[0] == second} == {(second, 1)}
        stuck = False
        await changing
        await quiet(site)

    on_a_cluster(script)


def test_a_new_leader_finishes_what_others_left_and_nothing_else() -> None:
    """What begins while it still forms the cluster is not taken for something that was left open."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        node = site.node(leader_of_control(site))
        formed, told = asyncio.Event(), asyncio.Event()
        change, tell, cluster_id = node.control.change, node.broadcaster.tell, node.control.machine.cluster_id

        async def slow_change(message: Message, *args: Any, **more: Any) -> Any:
            if isinstance(message, FormCluster):
                await formed.wait()
                return {}
            return await change(message, *args, **more)

        async def slow_tell(*args: Any) -> None:
            await told.wait()
            await tell(*args)

        node.control.change, node.broadcaster.tell = slow_change, slow_tell  # type: ignore[method-assign, assignment]
        node.control.machine.cluster_id = ""
        node.broadcaster.lead(True)
        changing = asyncio.ensure_future(site.ask("n1", lambda db: db.truncate_collection("default", "c")))
        await asyncio.sleep(0.2)
        assert node.catalog.tasks and not node.broadcaster.settled.is_set()
        node.control.machine.cluster_id = cluster_id
        formed.set()
        await asyncio.sleep(0.2)
        assert node.broadcaster.settled.is_set()
        told.set()
        await changing
        await site.ask("n2", lambda db: db.create_partition("default", "c", "p"))
        await quiet(site)

    on_a_cluster(script)


def test_ten_identical_creates_succeed() -> None:
    """All ten clients, at all nodes, are told that the collection is there, and it is there once; of two that want
    different things under one name one is refused (I-CT-3)."""

    async def script(site: Site) -> None:
        def create(name: str, shards: int) -> Work:
            return lambda db: db.create_collection("default", request(name, shards=shards))

        await asyncio.gather(*(site.ask(NAMES[i % 3], create("c", 2)) for i in range(10)))
        assert len(site.node("n1").catalog.collections) == 1
        two = await asyncio.gather(
            *(site.ask(name, create("d", shards)) for shards, name in enumerate(("n1", "n2"), 1)),
            return_exceptions=True,
        )
        refused = [one for one in two if isinstance(one, InvalidParameter)]
        assert len(refused) == 1 and "create duplicate collection" in str(refused[0])
        await quiet(site)
        for name in NAMES:  # I-CO-6
            found = await site.ask(name, lambda db: db.describe_collection("default", "c"))
            assert [one.index_name for one in found.indexes] == ["vector"] and str(
                found.load_state
            ) == "LoadStateLoaded"

    on_a_cluster(script)


async def once(site: Site, node: str, key: str, asked: str, work: Work, **more: Any) -> bool:
    return await site.ask(node, lambda db: db.once(key, asked, lambda: work(db)), **more)


def test_a_request_under_a_key_is_made_once() -> None:
    """I-CO-7: through any node, at once or later, whether the first answer was heard or not; a refusal too. Rows that
    were written after a truncation survive its repeats."""

    def truncate(database: Database) -> Awaitable[None]:
        return database.truncate_collection("default", "c")

    async def script(site: Site) -> None:
        await site.create(shards=2)
        await site.insert("n1", [1, 2])
        both = await asyncio.gather(*(once(site, name, "k", "truncate", truncate) for name in NAMES))
        assert sorted(both)[0] is False
        assert await site.found("n2") == {}
        await site.insert("n1", [3])
        for name in NAMES:
            assert await once(site, name, "k", "truncate", truncate) is True
        assert set(await site.found("n2")) == {3}
        with pytest.raises(InvalidParameter, match="used for another request"):
            await once(site, "n3", "k", "truncate another", truncate)
        drop: Work = lambda db: db.drop_partition("default", "c", "_default")  # noqa: E731
        said = []
        for name in NAMES:
            with pytest.raises(InvalidParameter) as refusal:
                await once(site, name, "l", "drop", drop)
            said.append(str(refusal.value))
        assert len(set(said)) == 1 and "default partition" in said[0]
        leader = leader_of_control(site)
        asking = next(name for name in NAMES if name != leader)
        site.world.kill_at_step(leader, Step.OPENED)
        with pytest.raises((Unavailable, NoAnswer)):
            await once(site, asking, "m", "truncate", truncate, within_s=0.3)
        await asyncio.sleep(3.0)
        site.world.start_if_down(leader)
        await site.ready()
        await once(site, asking, "m", "truncate", truncate)
        await site.insert(asking, [4])
        assert await once(site, leader, "m", "truncate", truncate) is True
        assert set(await site.found(asking)) == {4}

    on_a_cluster(script)


def test_a_request_of_several_steps_goes_on_where_it_was_lost() -> None:
    """The node that serves it dies between two steps; under its key another node makes what is left, and no more."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        await site.insert("n1", [1])
        asking = next(name for name in NAMES if name != leader_of_control(site))

        async def work(database: Database, *, dies: bool) -> None:
            await database.truncate_collection("default", "c")
            if dies:
                site.kill(asking)
                await asyncio.sleep(0)
            await database.create_partition("default", "c", "p")

        with pytest.raises((NoAnswer, Refused)):
            await once(site, asking, "k", "both", lambda db: work(db, dies=True))
        other = leader_of_control(site)
        await site.insert(other, [2])
        assert await once(site, other, "k", "both", lambda db: work(db, dies=False)) is False
        assert set(await site.found(other)) == {2}
        assert "p" in site.node(other).catalog.find("default", "c").partitions
        site.world.start(asking)
        await site.ready()
        await quiet(site)

    on_a_cluster(script)


def test_any_node_knows_how_far_a_compaction_is() -> None:
    """The node that took the request, the one that drives the job, and the third; also after the driver has died."""

    async def script(site: Site) -> None:
        await site.create(shards=2)
        for key in range(3):
            await site.insert("n1", [key])
            await site.ask("n1", lambda db: db.flush("default", "c"))
        job = await site.ask("n2", lambda db: db.compact("default", "c"))
        leader = leader_of_control(site)
        site.kill(leader)
        names = [name for name in NAMES if name != leader]
        async with asyncio.timeout(60):
            for name in names:
                while await site.ask(name, lambda db: db.compaction_state(job)) != ("Completed", 0, 1):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        assert await site.ask(names[0], lambda db: db.compaction_state(job + 1)) == ("UndefiedState", 0, 0)
        with pytest.raises(BadRequest):
            await site.ask(names[0], lambda db: db.compact("default", "none"))

    on_a_cluster(script)


def test_flush_all_seals_every_collection() -> None:
    """What was inserted before it, anywhere, is in chunks on every replica that leads."""

    async def script(site: Site) -> None:
        for name in ("c", "d"):
            await site.create(name=name, shards=2)
            await site.ask("n2", lambda db, name=name: db.insert("default", name, rows([1, 2, 3, 4])))  # type: ignore
        await site.ask("n3", lambda db: db.flush_all())
        for shard in (0, 1):
            machine = site.node(site.leader_of(shard)).shards[ShardId(shard)].machine
            states = list(machine.collections.values())
            assert len(states) == 2 and not any(state.growing for state in states)
            assert all(stored.is_flushed for state in states for stored in state.stored.values())
        assert len(await site.found("n1", Consistency.STRONG)) == 4

    on_a_cluster(script)
