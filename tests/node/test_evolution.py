"""Changes of a collection's schema through the service: what readers and writers see before, during and after them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import numpy as np
import pytest

from cluster.ddl import AckDdl
from cluster.message import Message
from node.database import Database
from node.facts import states_of
from node.metrics import Metrics
from node.node import Node, Seams
from node.service import IndexRequest, ReadOptions, SearchRequest
from node.write import fitted
from storage.columns import Batch, ScalarColumn, StringColumn
from storage.errors import BadRow, FieldNotFound, FilterError, InvalidParameter, SchemaMismatch, Unavailable
from storage.evolution import with_field, without_field
from storage.schema import DataType, FieldSchema, make_schema
from storage.strings import StringArray
from storage.types import FieldId
from tests.node.cluster_of import BOUNDED, STRONG, Site, on_a_cluster
from tests.node.test_database import ID, META, NUMBER, SETTINGS, VECTOR, fields, on_a_node, request, rows
from tests.sim.chunks import SimChunks
from tests.sim.disk import SimDisk
from tests.sim.world import SimClock, SimExecutor, SimLoop, close, run

PRICE = FieldSchema("price", DataType.DOUBLE, nullable=True)
KIND = FieldSchema("kind", DataType.VARCHAR, default="book", max_bytes=20)
FIRST, SECOND = FieldId(104), FieldId(105)
EVERYTHING = ReadOptions(output_fields=["*"], consistency=STRONG)


def with_columns(batch: Batch, **more: list[Any]) -> Batch:
    """Return the rows with values of fields 104 (numbers) and 105 (text)."""
    columns = dict(batch.columns)
    for name, values in more.items():
        if name == "price":
            columns[FIRST] = ScalarColumn(np.array(values, np.float64))
        else:
            columns[SECOND] = StringColumn(StringArray.from_strings(values))
    return Batch(columns, batch.rows)


async def shown(database: Database, filter: str = "", **more: Any) -> dict[int, tuple[Any, ...]]:
    """Return id -> the values of all fields but the key and the vector, as `*` shows them."""
    options = ReadOptions(output_fields=["*"], consistency=STRONG, filter=filter, **more)
    found = await database.query("default", "c", options, limit=0, offset=0)
    hidden = ("id", "vector")
    ids = [found.schema.field(name).id for name in found.fields if name not in hidden]
    columns = [found.batch.columns[one].to_list() for one in ids]
    keys = found.batch.columns[ID].to_list()
    return {key: tuple(column[i] for column in columns) for i, key in enumerate(keys)}


async def compacted(database: Database) -> None:
    await asyncio.sleep(2)  # until what there is is indexed: what is worked on is not merged
    job = await database.compact("default", "c")
    while (await database.compaction_state(job))[0] != "Completed":  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def on_a_disk(*scripts: Callable[[Database], Awaitable[None]]) -> None:
    """Run each script on a node that starts with what the one before it left."""
    loop = SimLoop()
    disk, chunks = SimDisk(Random(2)), SimChunks(Random(3))

    async def main() -> None:
        for i, script in enumerate(scripts):
            seams = Seams(disk, chunks, SimExecutor(Random(i)), SimClock(loop), Random(4 + i))
            node = Node(SETTINGS, seams, Metrics())
            await node.start()
            await script(Database(node))
            await node.stop()

    try:
        run(loop, main())
    finally:
        close(loop)


def test_old_rows_have_null_or_the_default_of_a_new_field() -> None:
    """In output, filters, counts, searches and partial upserts; whether they grow, are sealed, merged or read again
    after a restart; and a value that is set stays."""
    wanted = {1: (7, None, "book"), 2: (7, 2.5, "book"), 3: (7, None, "book"), 4: (7, 9.0, "film")}

    async def check(database: Database) -> None:
        assert await shown(database) == wanted
        for filter, keys in (
            ("price is null", {1, 3}),
            ("price > 2", {2, 4}),
            ('kind == "book"', {1, 2, 3}),
            ('kind == "book" and number == 7 and price is not null', {2}),
            ('kind in ["film"]', {4}),
            ('not (kind == "book")', {4}),
            ("id in [1, 4] and price is null", {1}),
        ):
            assert set(await shown(database, filter)) == keys, filter
            counting = ReadOptions(filter=filter, output_fields=["count(*)"], consistency=STRONG)
            assert (await database.query("default", "c", counting, limit=0, offset=0)).count == len(keys), filter
        options = ReadOptions(filter='kind == "book"', output_fields=["price", "kind"], consistency=STRONG)
        near = SearchRequest(np.array([[3.9, 0]], np.float32), limit=2)
        hits = (await database.search("default", "c", near, options)).rows.batch
        assert [hits.columns[one].to_list() for one in (ID, FIRST, SECOND)] == [[3, 2], [None, 2.5], ["book", "book"]]

    async def change(database: Database) -> None:
        await database.create_collection("default", request())
        await database.insert("default", "c", rows([1, 2], number=7))
        await database.flush("default", "c")
        await database.insert("default", "c", rows([3], number=7))
        await database.add_field("default", "c", PRICE)
        await database.add_field("default", "c", KIND)
        await database.insert("default", "c", with_columns(rows([4], number=7), price=[9.0], kind=["film"]))
        part = Batch({ID: ScalarColumn(np.array([2])), FIRST: ScalarColumn(np.array([2.5]))}, 1)
        await database.upsert("default", "c", part, partial=True)
        await check(database)
        await database.flush("default", "c")
        await check(database)

    async def look(database: Database) -> None:
        await check(database)
        await compacted(database)
        await check(database)

    async def released(database: Database) -> None:
        await check(database)
        await database.release("default", "c")
        await database.load("default", "c")
        await check(database)

    on_a_disk(change, look, released)


def test_no_value_of_a_dropped_field_comes_back() -> None:
    """It is gone from answers and filters at once, from chunks with the next compaction, and a field of the same name
    that is added later has its own values only; its index goes with it, and another vector is searched as before."""

    async def begin(database: Database) -> None:
        more = FieldSchema("other", DataType.FLOAT_VECTOR, dim=2)
        indexes = [IndexRequest(one, one, "FLAT", "L2") for one in ("vector", "other")]
        await database.create_collection("default", request(fields=[*fields(), more], indexes=indexes, dynamic=False))
        batch = rows([1, 2, 3], number=5)
        columns = {i: column for i, column in batch.columns.items() if i != META}
        await database.insert("default", "c", Batch({**columns, FieldId(103): batch.columns[VECTOR]}, 3))
        await database.flush("default", "c")
        await database.drop_field("default", "c", "number")
        await database.drop_field("default", "c", "other")
        await look(database)

    async def look(database: Database) -> None:
        assert await shown(database) == {1: (), 2: (), 3: ()}
        with pytest.raises(FilterError, match="number"):
            await shown(database, "number == 5")
        with pytest.raises(FieldNotFound, match="number"):
            options = ReadOptions(output_fields=["number"])
            await database.query("default", "c", options, limit=1, offset=0)
        info = await database.describe_collection("default", "c")
        assert [one.index_name for one in info.indexes] == ["vector"]
        near = SearchRequest(np.array([[2.2, 0]], np.float32), limit=1)
        assert (await database.search("default", "c", near, EVERYTHING)).rows.batch.columns[ID].to_list() == [2]

    async def again(database: Database) -> None:
        await look(database)
        states = [state for _, state in states_of(database._node, database._node.catalog.find("default", "c"))]
        files = [one.segment.files for state in states for one in state.stored.values()]
        assert all(one is not None and NUMBER in one.fields for one in files)
        await compacted(database)
        files = [one.segment.files for state in states for one in state.stored.values()]
        assert [sorted(one.fields) for one in files if one is not None] == [[1, ID, VECTOR]]
        await look(database)
        await database.add_field("default", "c", FieldSchema("number", DataType.INT64, nullable=True))
        assert await shown(database) == {1: (None,), 2: (None,), 3: (None,)}
        assert await shown(database, "number == 5") == {}

    on_a_disk(begin, again)


def test_what_is_refused_changes_nothing() -> None:
    """The version of the schema stays."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request())
        await database.insert("default", "c", rows([1]))
        for work, error in (
            (database.add_field("default", "c", FieldSchema("price", DataType.DOUBLE)), InvalidParameter),
            (database.drop_field("default", "c", "id"), InvalidParameter),
            (database.drop_field("default", "c", "none"), FieldNotFound),
            (database.alter_field("default", "c", "number", {"max_length": "9"}), InvalidParameter),
            (database.alter_collection("default", "c", {"dynamicfield.enabled": "false"}, []), InvalidParameter),
        ):
            with pytest.raises(error):
                await work
        assert (await database.collection_schema("default", "c")).version == 1
        assert await shown(database) == {1: (1,)}

    on_a_node(script)


def test_the_dynamic_field_comes_later() -> None:
    """Rows from before have no keys; from then on rows may have some, and partial upserts may add some."""

    async def script(database: Database, clock: SimClock) -> None:
        await database.create_collection("default", request(dynamic=False))
        await database.insert("default", "c", rows([1, 2]).select([ID, VECTOR, NUMBER]))
        await database.alter_collection("default", "c", {"dynamicfield.enabled": "true"}, [])
        await database.insert("default", "c", rows([3], meta='{"a":1}'))
        await database.upsert("default", "c", rows([1], meta='{"a":2}').select([ID, META]), partial=True)
        assert set(await shown(database, "a > 0")) == {1, 3}
        assert set(await shown(database, "a == 2")) == {1}
        assert set(await shown(database, "not (a > 0)")) <= {2}
        assert set(await shown(database)) == {1, 2, 3}
        info = await database.describe_collection("default", "c")
        assert info.schema.dynamic is not None and info.properties == {}

    on_a_node(script)


SCHEMA = make_schema(fields(), dynamic=True)


def test_rows_are_fitted_to_a_schema() -> None:
    """Dropped fields go, new ones are null or the default, and a field that rows must have is asked for."""
    old = rows([1, 2])
    assert fitted(old, SCHEMA) is old
    newer = without_field(with_field(with_field(SCHEMA, PRICE), KIND), "number")
    new = fitted(old, newer)
    assert sorted(new.columns) == [ID, VECTOR, META, FIRST, SECOND]
    assert new.columns[FIRST].to_list() == [None, None] and new.columns[SECOND].to_list() == ["book", "book"]
    assert fitted(new, newer) is new
    with pytest.raises(BadRow, match="no field vector"):
        fitted(old.select([ID]), SCHEMA)


async def change_at_random(ask: Callable[[Callable[[Database], Awaitable[None]]], Awaitable[None]], rng: Random) -> int:
    """Add and drop fields, let one grow; return how often."""
    there: set[str] = set()
    for i in range(12):
        name = f"f{rng.randrange(3)}"
        if name in there and rng.random() < 0.6:
            await ask(lambda db, name=name: db.drop_field("default", "c", name))  # type: ignore[misc]
            there.discard(name)
        elif name not in there:
            one = FieldSchema(name, DataType.INT64, default=i, nullable=i % 2 == 0)
            await ask(lambda db, one=one: db.add_field("default", "c", one))  # type: ignore[misc]
            there.add(name)
        await asyncio.sleep(rng.random() / 20)
    return 12


@pytest.mark.parametrize(("nodes", "copies"), [(3, 3), (5, 3)])
def test_rows_written_while_fields_come_and_go_are_there_once(nodes: int, copies: int) -> None:
    """Through every node, in inserts, upserts and partial upserts of several shards: each acknowledged row is there
    once, none fails, reads meanwhile are whole, and in the end all nodes show the same."""

    async def script(site: Site) -> None:
        await site.create(shards=3)
        names = list(site.world.machines)
        rng = Random(nodes)
        acknowledged: list[int] = []
        over = asyncio.Event()

        async def write(number: int) -> None:
            name, i = names[number % len(names)], 0
            while not over.is_set():
                keys = list(range(10_000 * number + 5 * i, 10_000 * number + 5 * i + 5))
                if i % 3 == 2:
                    await site.ask(name, lambda db: db.upsert("default", "c", rows(keys, number=number)))  # noqa: B023
                else:
                    assert await site.insert(name, keys, number=number) == 5
                acknowledged.extend(keys)
                if i % 4 == 3:
                    part = rows(keys[:2], number=-1).select([ID, NUMBER])
                    await site.ask(name, lambda db: db.upsert("default", "c", part, partial=True))  # noqa: B023
                i += 1

        async def read(name: str) -> None:
            while not over.is_set():
                before = set(acknowledged)
                level = rng.choice([STRONG, STRONG, BOUNDED])
                found = await site.found(name, level)
                if level is STRONG:
                    assert before <= set(found)
                await asyncio.sleep(0.01)

        tasks = [asyncio.ensure_future(write(number)) for number in range(4)]
        tasks += [asyncio.ensure_future(read(name)) for name in names]
        await change_at_random(lambda work: site.ask("n2", work), rng)
        over.set()
        await asyncio.gather(*tasks)
        schemas = [await site.ask(name, lambda db: db.collection_schema("default", "c", newest=True)) for name in names]
        assert schemas.count(schemas[0]) == len(names) and schemas[0].version > 6
        answers = [await site.ask(name, shown) for name in names]
        assert all(one == answers[0] for one in answers)
        assert sorted(answers[0]) == sorted(acknowledged)
        assert await site.ask("n1", lambda db: db.row_count("default", "c")) == len(acknowledged) > 100
        defaults = [one.default for one in schemas[0].user_fields[3:]]
        assert all(list(row[1 : 1 + len(defaults)]) == defaults for row in answers[0].values())

    on_a_cluster(script, nodes=nodes, copies=copies, shards=3)


@pytest.mark.parametrize("seed", range(4))
def test_a_change_is_whole_though_who_makes_it_dies(seed: int) -> None:
    """The leader of the control group dies at some moment of a change, and comes back: the change is made everywhere or
    nowhere, rows written meanwhile are there once, and the next change finds its way."""

    async def script(site: Site) -> None:
        await site.create(shards=3)
        await site.insert("n1", [1, 2, 3])
        (control,) = [machine.name for machine, node in site.world.nodes() if node.control.is_leader]
        asking, writing = site.others(control)
        written = [1, 2, 3]

        async def write() -> None:
            for i in range(10, 40):
                await site.insert(writing, [i])
                written.append(i)

        async def change() -> None:
            await site.ask(asking, lambda db: db.add_field("default", "c", KIND))

        tasks = [asyncio.ensure_future(write()), asyncio.ensure_future(change())]
        await asyncio.sleep(Random(seed).random() / 20)
        site.kill(control)
        await asyncio.sleep(2)
        site.world.start(control)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await site.ready()
        assert results[0] is None and (results[1] is None or isinstance(results[1], Unavailable)), results
        await site.ask(asking, lambda db: db.add_field("default", "c", PRICE))
        schema = site.node(asking).catalog.find("default", "c").schema
        assert (
            (schema.version, "kind" in schema.by_name) == (3, True) if results[1] is None else schema.version in (2, 3)
        )
        nothing = tuple(one.default for one in schema.user_fields[3:])
        for name in site.world.machines:
            found = await site.ask(name, shown)
            assert sorted(found) == sorted(written)
            assert {row[1 : 1 + len(nothing)] for row in found.values()} == {nothing}
            node = site.node(name)
            states = [state for host in node.shards.values() for state in host.machine.collections.values()]
            assert {state.schema.version for state in states} == {schema.version}

    on_a_cluster(script, shards=3, seed=seed + 1)


def test_until_a_change_has_ended_reads_go_on_and_inserts_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """When shards have the new schema and the catalogue has not: reads are by the old one, on every node; rows of the
    old one are refused by the shards and made when the change has ended; none is lost, none is there twice."""

    async def script(site: Site) -> None:
        await site.create(shards=3)
        await site.insert("n1", [1, 2, 3])
        for name in site.world.machines:
            await site.ask(name, lambda db: db.flush("default", "c"))
        may_end = asyncio.Event()
        for _, node in site.world.nodes():
            change = node.control.change

            async def held(message: Message, *, change: Any = change, **more: Any) -> Any:
                if isinstance(message, AckDdl):
                    await may_end.wait()
                return await change(message, **more)

            monkeypatch.setattr(node.control, "change", held)
        dropping = asyncio.ensure_future(site.ask("n2", lambda db: db.drop_field("default", "c", "number")))
        shards = site.node("n1").catalog.find("default", "c").shards

        def has_dropped(node: Node) -> bool:
            states = [host.machine.collections.values() for shard, host in node.shards.items() if shard in shards]
            return all(state.schema.version == 2 for some in states for state in some)

        while not all(has_dropped(node) for _, node in site.world.nodes()):  # noqa: ASYNC110  (time is virtual)
            await asyncio.sleep(0.01)
        inserting = [
            asyncio.ensure_future(site.insert(name, [10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3]))
            for i, name in enumerate(site.world.machines, 1)
        ]
        decoding = [
            asyncio.ensure_future(
                site.ask("n4", lambda db, ids=ids: db.insert("default", "c", rows(ids), schema_version=1))  # type: ignore
            )
            for ids in ([500], list(range(600, 630)))
        ]
        part = rows([1], meta='{"k":1}').select([ID, META])
        updating = asyncio.ensure_future(site.ask("n3", lambda db: db.upsert("default", "c", part, partial=True)))
        for name in site.world.machines:
            for level in (STRONG, BOUNDED):
                assert await site.found(name, level) == {1: 1, 2: 1, 3: 1}
                assert set(await site.found(name, level, "number == 1 and id > 1")) == {2, 3}
        await asyncio.sleep(1)
        assert not any(one.done() for one in (dropping, updating, *inserting, *decoding))
        with pytest.raises(
            SchemaMismatch, match=r"rows are of version 1 of the schema .* which has version 2: try again"
        ):
            late = rows([1_000])
            await site.ask("n1", lambda db: db.insert("default", "c", late), within_s=1)
        may_end.set()
        await dropping
        assert await asyncio.gather(*inserting) == [4] * len(inserting)
        await updating
        for one in decoding:  # of which nothing was written, so that they can be decoded again
            with pytest.raises(SchemaMismatch):
                await one
        keys = [1, 2, 3, *(10 * i + j for i in range(1, len(inserting) + 1) for j in range(4))]
        for name in site.world.machines:
            assert await site.ask(name, shown) == dict.fromkeys(keys, ())
            assert set(await site.ask(name, lambda db: shown(db, "k == 1"))) == {1}
            assert await site.ask(name, lambda db: db.row_count("default", "c")) == len(keys)

    on_a_cluster(script, nodes=5, shards=3)
