"""What clients and operators of a simulated world do, through the service layer of whichever node they choose.

Each client has keys of its own, of which it knows what they hold unless an outcome is open, and all share a few hot
ones. A client has one request under way at a time. When a request fails for no fault of its own it is repeated at
another node, as another request: a write then has another version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from random import Random
from typing import Any, Final, TypeVar

import numpy as np

from cluster.membership import PlanMove
from node.database import Database
from node.scope import Scope
from node.service import CollectionRequest, Consistency, IndexRequest, ReadOptions, Rows, SearchRequest
from storage import analysis
from storage.columns import Batch, Column, ScalarColumn, StringColumn, VectorColumn
from storage.errors import (
    AnnulusError,
    BadRequest,
    InvalidParameter,
    NoLeader,
    Overloaded,
    ReadOnly,
    StorageFault,
    Unavailable,
)
from storage.schema import DataType, FieldSchema
from storage.strings import StringArray
from storage.types import FieldId, ShardId
from tests.sim.architect import Architect
from tests.sim.cluster import Cluster, NoAnswer, Refused
from tests.sim.history import History, Version, Violation
from tests.sim.plan import Plan, Step
from tests.sim.steward import Steward

T = TypeVar("T")

DIM: Final = 4
KEYS_PER_CLIENT: Final = 60
KEYS_BETWEEN: Final = 1_000
HOT_KEYS: Final = range(1_000_000, 1_000_006)
UNSURE_MAX: Final = 5
"""A key with so many writes of unknown outcome is left alone: what it may hold is hard to decide."""
COLLECTIONS: Final = {"rows": 1, "wide": 2}
"""Name -> virtual channels."""
INDEXES: Final = (("FLAT", "L2"), ("AUTOINDEX", "COSINE"), ("IVF_FLAT", "IP"), ("HNSW", "L2"), ("IVF_SQ8", "COSINE"))
FIELD_INDEXES: Final = (
    (("version", "version", "INVERTED"), ("text", "text", "INVERTED"), ("flag", "flag", "BITMAP")),
    (("version", "version", "STL_SORT"), ("text", "text", "NGRAM", "", {"min_gram": 2, "max_gram": 3})),
)
"""Of worlds in which fields beside the vector have some."""
ATTEMPTS_MAX: Final = 4
REQUEST_S: Final = 4.0
DDL_S: Final = 8.0
PRIMARY, VERSION, TEXT, VECTOR, FLAG = (FieldId(number) for number in range(100, 105))


@lru_cache(maxsize=10_000)
def vector_of(key: int, version: int) -> list[float]:
    """Return the vector that a version of a key has: a function of both, so that every value can be checked."""
    return [float(value) for value in Random(key * 1_000_003 + version).choices(range(-50, 50), k=DIM)]


def batch_of(versions: Mapping[int, int]) -> Batch:
    """Return the rows of these versions of keys."""
    columns: dict[FieldId, Column] = {
        PRIMARY: ScalarColumn(np.array(list(versions), np.int64)),
        VERSION: ScalarColumn(np.array(list(versions.values()), np.int64)),
        TEXT: StringColumn(StringArray.from_strings([f"v{version}" for version in versions.values()])),
        VECTOR: VectorColumn(np.array([vector_of(*one) for one in versions.items()], np.float32)),
        FLAG: ScalarColumn(np.ones(len(versions), np.bool_)),  # so that segments share chunks of equal bytes
    }
    return Batch(columns, len(versions))


def fields(plan: Plan) -> list[FieldSchema]:
    text = FieldSchema("text", DataType.VARCHAR, max_bytes=20)
    if plan.indexed:
        matched = {"enable_analyzer": "true", "enable_match": "true"}
        text = replace(text, params=matched, analyzer_version=analysis.VERSION)
    return [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("version", DataType.INT64),
        text,
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=DIM),
        FieldSchema("flag", DataType.BOOL),
    ]


def versions_of(rows: Rows) -> dict[int, int]:
    """Return key -> version of result rows. Raises Violation if a key is there twice or a value is another's."""
    columns: dict[FieldId, list[Any]] = {i: column.to_list() for i, column in rows.batch.columns.items()}
    found: dict[int, int] = {}
    for key, version, text, vector in zip(
        columns[PRIMARY], columns[VERSION], columns[TEXT], columns[VECTOR], strict=True
    ):
        if key in found:
            raise Violation(f"key {key} is there twice, versions {found[key]} and {version}")
        if text != f"v{version}" or vector.tolist() != vector_of(key, version):
            raise Violation(f"key {key} version {version} has values of another: {text!r} {vector.tolist()}")
        found[key] = version
    return found


def collection_request(name: str, plan: Plan) -> CollectionRequest:
    channels = COLLECTIONS.get(name, 1)
    index_type, metric = INDEXES[(plan.seed + channels) % len(INDEXES)]
    indexes = [IndexRequest("vector", "vector", index_type, metric)]
    if plan.indexed:
        indexes += [IndexRequest(*one) for one in FIELD_INDEXES[plan.seed % len(FIELD_INDEXES)]]
    return CollectionRequest(name, fields(plan), shards=channels, indexes=indexes, load=True)


def filters_of(plan: Plan, version: int) -> list[str]:
    """Return filters that are true of the rows of a version and of no others, of which indexes know different parts."""
    matched = [f"text_match(text, 'v{version}')"] if plan.indexed else []
    same = [f"version == {version}", f"version in [{version}, -1]", f"text == 'v{version}'", f"text like '%v{version}'"]
    return [*same, f"flag == true and version > {version - 1} and version <= {version}", *matched]


async def _create(wanted: CollectionRequest, database: Database) -> None:
    await database.create_collection("default", wanted)


class Workload:
    """All clients of one world, and who looks after it."""

    def __init__(self, cluster: Cluster, history: History) -> None:
        self.cluster, self.history = cluster, history
        self.requests = 0
        """Answered as they should be."""
        self.failed = 0
        """Given up after several attempts."""
        self.made = asyncio.Event()
        """The collections are there."""
        self._versions = 0
        self.architect = Architect(cluster)
        self.steward = Steward(cluster)

    @property
    def now_s(self) -> float:
        return self.cluster.loop.now_s

    def next_version(self) -> int:
        self._versions += 1
        return self._versions

    def start(self, steps: Sequence[Step]) -> list[asyncio.Task[None]]:
        """Begin to do all that clients and the operator do."""
        everybody = {
            name: [one for one in steps if one.who == name] for name in dict.fromkeys(one.who for one in steps)
        }
        everybody.pop("fault", None)
        doing = [self._doing(name, mine) for name, mine in everybody.items()]
        return [self.cluster.loop.create_task(one) for one in [self._make_collections(), *doing]]

    def _doing(self, name: str, steps: Sequence[Step]) -> Coroutine[Any, Any, None]:
        match name:
            case "operator":
                return self._operate(steps)
            case "architect":
                return self.architect.run(steps)
            case "steward":
                return self.steward.run(steps)
        return Client(self, name).run(steps)

    async def until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now_s))

    async def at_some_node(
        self, rng: Random, request: Callable[[Database], Awaitable[T]], *, attempts: int, within_s: float
    ) -> T:
        """Return the first answer of any node. Raises the last failure."""
        for attempt in range(attempts):
            try:
                return await self.cluster.ask(rng.choice(self.cluster.names), request, within_s=within_s)
            except (Unavailable, NoAnswer, Refused):
                if attempt == attempts - 1:
                    raise
                await asyncio.sleep(rng.uniform(0.05, 0.5))
        raise AssertionError("no attempt was made")

    async def _make_collections(self) -> None:
        rng = self.cluster.dice("collections")
        for name in COLLECTIONS:
            wanted = collection_request(name, self.cluster.plan)
            make = partial(_create, wanted)
            await self.at_some_node(rng, make, attempts=200, within_s=DDL_S)
        self.made.set()

    # the operator

    async def _operate(self, steps: Sequence[Step]) -> None:
        await self.made.wait()
        for step in steps:
            await self.until(step.at_s)
            rng = Random(step.dice)
            try:
                await self._chore(step.what, rng)
            except (Unavailable, NoAnswer, Refused):
                self.failed += 1

    async def _chore(self, what: str, rng: Random) -> None:
        name = rng.choice(list(COLLECTIONS))
        if what == "other":
            await self._other(rng)
            return
        if what == "move":
            await self._move(rng)
            return
        request: Callable[[Database], Awaitable[object]]
        if what == "flush":
            request = lambda database: database.flush("default", name)  # noqa: E731
        elif what == "compact":
            request = lambda database: database.compact("default", name)  # noqa: E731
        else:
            value = rng.choice(("true", "false"))
            properties = {"collection.autocompaction.enabled": value}
            request = lambda database: database.alter_collection("default", name, properties, [])  # noqa: E731
        await self.at_some_node(rng, request, attempts=2, within_s=DDL_S)
        self.requests += 1

    async def _move(self, rng: Random) -> None:
        """Let other nodes hold a shard: any of them, in the middle of a move too."""
        plan = self.cluster.plan
        names = [name for name in self.cluster.names if name not in self.cluster.leaving]
        shard, order, far = ShardId(rng.randrange(plan.shards)), rng.sample(names, len(names)), rng.random() < 0.5

        async def move(database: Database) -> None:
            node = database._node  # the way of a coordinator, which no client has
            known = node.control.machine.membership.placements.get(shard)
            if known is None:
                raise Refused("its catalogue has yet to catch up")
            if far:  # to those first who have nothing of it
                order.sort(key=lambda name: name in known.members)
            await node.router.control_change(PlanMove(shard, known.generation, order[: plan.copies]))

        try:
            await self.at_some_node(rng, move, attempts=2, within_s=DDL_S)
        except InvalidParameter:
            if set(order) <= set(self.cluster.names) - self.cluster.leaving:
                raise
            return  # one of them was removed meanwhile
        self.requests += 1

    async def _other(self, rng: Random) -> None:
        """Make a collection, use it, and drop it again; after a failure its state is not known, and it is left."""
        name = f"other{self.next_version()}"
        wanted = collection_request(name, self.cluster.plan)

        async def step(request: Callable[[Database], Awaitable[T]]) -> T:
            return await self.cluster.ask(rng.choice(self.cluster.names), request, within_s=DDL_S)

        await step(lambda database: database.create_collection("default", wanted))
        await step(lambda database: database.insert("default", name, batch_of({1: 1, 2: 1})))
        options = ReadOptions(output_fields=["*"], consistency=Consistency.STRONG)
        found = versions_of(await step(lambda database: database.get("default", name, [1, 2, 3], options)))
        if found != {1: 1, 2: 1}:
            raise Violation(f"{name}: two rows were inserted, a Strong read gives {found}")
        await step(lambda database: database.drop_collection("default", name))
        if await step(lambda database: database.has_collection("default", name)):
            raise Violation(f"{name}: it was dropped, and is there")


class Client:
    """One client: its keys, its session, and what it knows."""

    def __init__(self, workload: Workload, name: str) -> None:
        self.name = name
        number = int(name.removeprefix("client"))
        self._keys = list(range(number * KEYS_BETWEEN, number * KEYS_BETWEEN + KEYS_PER_CLIENT))
        self._workload, self._cluster, self._history = workload, workload.cluster, workload.history
        self._scope = Scope(0.0)
        alone = self._cluster.plan.nodes == 1
        self._refusals = (Refused, ReadOnly) if alone else (Refused, ReadOnly, NoLeader, Overloaded)
        """Errors that say that nothing was written."""
        self._known: dict[str, dict[int, Version]] = {name: dict.fromkeys(self._keys) for name in COLLECTIONS}
        """Collection -> what its own keys hold, for those of which no outcome was ever open."""

    async def run(self, steps: Sequence[Step]) -> None:
        await self._workload.made.wait()
        for step in steps:
            await self._workload.until(step.at_s)
            rng = Random(step.dice)
            name = rng.choice(list(COLLECTIONS))
            for attempt in range(ATTEMPTS_MAX):
                if await self._attempt(step.what, rng, name, Consistency(step.text("level"))):
                    self._workload.requests += 1
                    break
                await asyncio.sleep(rng.uniform(0.02, 0.4) * (attempt + 1))
            else:
                self._workload.failed += 1

    async def _attempt(self, what: str, rng: Random, name: str, level: Consistency) -> bool:
        """Do it once; return whether it needs no repeat."""
        try:
            match what:
                case "get":
                    await self._get(rng, name, level, self._some(rng))
                case "hot-get":
                    await self._get(rng, name, level, rng.sample(HOT_KEYS, 2))
                case "scan" if self._cluster.plan.indexed and rng.random() < 0.7:
                    await self._find(rng, name, level)
                case "scan":
                    await self._scan(rng, name, level)
                case "search":
                    await self._search(rng, name, level)
                case _:
                    return await self._write(what, rng, name)
        except (Unavailable, NoAnswer, Refused) as error:
            self._judge(error)
            return False
        return True

    def _judge(self, error: Exception) -> None:
        """A node alone has nobody to wait for: while it lives and has room, it answers."""
        if self._cluster.plan.nodes > 1 or isinstance(error, NoAnswer | Refused | ReadOnly):
            return
        machine = self._cluster.machines["n1"]
        if machine.is_up and not machine.stopping:
            raise Violation(f"{self.name}: no answer though the node lives: {error!r}") from error

    async def _ask(self, rng: Random, request: Callable[[Database], Awaitable[T]]) -> T:
        node = rng.choice(self._cluster.names)
        try:
            return await self._cluster.ask(node, request, scope=self._scope, within_s=REQUEST_S)
        except StorageFault as error:
            if self._cluster.machines[node].excuses:
                raise NoAnswer(node) from error
            raise Violation(f"{self.name}: {node} answers {error!r}") from error
        except AnnulusError as error:
            if isinstance(error, BadRequest) or not error.retriable:
                raise Violation(f"{self.name}: {node} answers {error!r}") from error
            raise

    def _give_up(self, keys: Sequence[int]) -> None:
        """What these keys hold is not known: fresh ones are used beside them."""
        for key in keys:
            was_known = [one.pop(key, 0) for one in self._known.values()]
            if any(one != 0 for one in was_known):
                fresh = self._keys[0] + len(self._keys)
                self._keys.append(fresh)
                for one in self._known.values():
                    one[fresh] = None

    def _some(self, rng: Random) -> list[int]:
        return rng.sample(self._keys, rng.randint(1, 20))

    # reads

    async def _get(self, rng: Random, name: str, level: Consistency, keys: Sequence[int]) -> None:
        options = ReadOptions(output_fields=["*"], consistency=level)
        called = self._history.moment(self._workload.now_s)
        rows = versions_of(await self._ask(rng, lambda database: database.get("default", name, keys, options)))
        if rows.keys() - set(keys):
            raise Violation(f"{name}: keys {keys} were asked for, {rows} came")
        found = {key: rows.get(key) for key in keys}
        self._history.read(self.name, name, level, found, called, self._workload.now_s)

    async def _scan(self, rng: Random, name: str, level: Consistency) -> None:
        options = ReadOptions(output_fields=["*"], consistency=level)
        keys = self._history.keys(name)  # of later ones it is not known whether the scan should have seen them
        called = self._history.moment(self._workload.now_s)
        rows = await self._ask(rng, lambda database: database.query("default", name, options, limit=0, offset=0))
        found = versions_of(rows)
        seen = {key: found.get(key) for key in {*keys, *found}}
        self._history.read(self.name, name, level, seen, called, self._workload.now_s)

    async def _find(self, rng: Random, name: str, level: Consistency) -> None:
        """Ask for the rows of one request that wrote."""
        writes = [one for one in self._history.writes if one.collection == name]
        versions = {version for one in writes for version in one.wanted.values() if version is not None}
        version = rng.choice(sorted(versions)) if versions else 1
        text = rng.choice(filters_of(self._cluster.plan, version))
        options = ReadOptions(filter=text, output_fields=["*"], consistency=level)
        called = self._history.moment(self._workload.now_s)
        rows = await self._ask(rng, lambda database: database.query("default", name, options, limit=0, offset=0))
        found = versions_of(rows)
        if not set(found.values()) <= {version}:
            raise Violation(f"{name}: {text} found {found}")
        self._history.read(self.name, name, level, found, called, self._workload.now_s)

    async def _search(self, rng: Random, name: str, level: Consistency) -> None:
        limit = rng.randint(1, 20)
        vectors = np.array([vector_of(rng.randrange(100), 1)], np.float32)
        options = ReadOptions(output_fields=["*"], consistency=level)
        called = self._history.moment(self._workload.now_s)
        request = SearchRequest(vectors, limit=limit)
        result = await self._ask(rng, lambda database: database.search("default", name, request, options))
        found = versions_of(result.rows)
        self._history.read(self.name, name, level, found, called, self._workload.now_s)
        if level is Consistency.STRONG:
            steady = self._history.steady(name, called)
            if len(found) < min(limit, len(steady)):
                raise Violation(
                    f"{name}: {len(found)} hits, limit {limit}, {len(steady)} rows lived since {called:.4f}"
                )

    # writes

    async def _write(self, what: str, rng: Random, name: str) -> bool:
        known, history = self._known[name], self._history
        hot = what.startswith("hot-")
        keys = rng.sample(HOT_KEYS, rng.randint(1, 3)) if hot else self._some(rng)
        if what == "insert":
            keys = [key for key in keys if key in known and known[key] is None]
        elif what in ("delete", "partial"):
            keys = [key for key in keys if known.get(key) is not None]
        keys = [key for key in keys if history.unsure(name, key) < UNSURE_MAX]
        if not keys:
            return True
        version = self._workload.next_version()
        wanted: dict[int, Version] = dict.fromkeys(keys, None if what in ("delete", "hot-delete") else version)
        made = history.write(self.name, name, wanted, self._workload.now_s)
        try:
            await self._carry_out(what, rng, name, keys, version)
        except BaseException as error:
            if isinstance(error, self._refusals):
                history.refuse(made)
            else:
                self._give_up(keys)
            if not isinstance(error, Unavailable | NoAnswer | Refused):
                raise
            self._judge(error)
            return what == "insert" and not isinstance(error, self._refusals)
        history.acknowledge(made, self._workload.now_s)
        known.update((key, value) for key, value in wanted.items() if key in known)
        return True

    async def _carry_out(self, what: str, rng: Random, name: str, keys: Sequence[int], version: int) -> None:
        rows = batch_of(dict.fromkeys(keys, version))
        match what:
            case "insert":
                await self._ask(rng, lambda database: database.insert("default", name, rows))
            case "upsert" | "hot-upsert":
                await self._ask(rng, lambda database: database.upsert("default", name, rows))
            case "partial":
                some = rows.select([PRIMARY, VERSION, TEXT, VECTOR])
                await self._ask(rng, lambda database: database.upsert("default", name, some, partial=True))
            case "delete" | "hot-delete":
                among = {"keys": list(keys)}
                deleted = await self._ask(rng, lambda database: database.delete("default", name, "id in {keys}", among))
                if what == "delete" and deleted != len(keys):
                    raise Violation(f"{name}: {deleted} rows deleted, {len(keys)} live keys given")
            case _:
                raise ValueError(f"clients do not know what {what} is")
