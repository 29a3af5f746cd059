"""Who changes the catalogue of a simulated world, and knows afterwards what it must say.

One architect, one change at a time, on collections of its own. Each change is a request under a key, repeated at any
node until it is answered: so its outcome is always known, however often it was lost on the way, and a change that was
made twice, by halves, or after its answer shows. Some changes come from many clients at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Final

import numpy as np

from node.database import Database
from node.service import CollectionInfo, CollectionRequest, Consistency, IndexRequest, ReadOptions
from storage.columns import Batch, Column, ScalarColumn, VectorColumn
from storage.errors import BadRequest, StorageFault, Unavailable
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.types import FieldId
from storage.view import absent_column
from tests.sim.cluster import Cluster, NoAnswer, Refused
from tests.sim.history import Violation
from tests.sim.plan import Step

ANSWER_S: Final = 4.0
CROWD: Final = 4
"""Clients that ask for the same at once."""
KEYS: Final = range(8)

Work = Callable[[Database], Awaitable[object]]


@dataclass
class Built:
    """What a collection must be."""

    fields: set[str]
    partitions: set[str] = field(default_factory=lambda: {"_default"})
    indexed: bool = True
    loaded: bool = True
    ttl: str = ""
    aliases: set[str] = field(default_factory=set)
    rows: dict[int, int] | None = field(default_factory=dict)
    """Key -> version; None when a write of unknown outcome may still come."""


class Architect:
    """Makes the changes of one world's plan."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._built: dict[str, Built] = {}
        self._count = self._versions = 0
        self.done = 0

    async def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            await asyncio.sleep(max(0.0, step.at_s - self._cluster.loop.now_s))
            rng = Random(step.dice)
            await self._change(step.what, rng)
            self.done += 1
            await self._look(rng, rng.choice(self._cluster.names), patient=False)

    async def check(self, rng: Random) -> None:
        """Raise Violation unless every node describes everything as it must be."""
        for node in list(self._cluster.names):
            await self._look(rng, node, patient=True)

    # changes

    async def _change(self, what: str, rng: Random) -> None:
        name = rng.choice(sorted(self._built)) if self._built else ""
        if what in ("create", "crowd") or not name:
            await self._create(rng, CROWD if what == "crowd" else 1)
            return
        built = self._built[name]
        some = f"x{rng.randrange(3)}"
        match what:
            case "drop":
                for alias in sorted(built.aliases):
                    await self._once(rng, partial(_drop_alias, alias))
                built.aliases.clear()
                await self._once(rng, lambda db: db.drop_collection("default", name))
                del self._built[name]
            case "rename":
                new = self._fresh()
                await self._once(rng, lambda db: db.rename_collection("default", name, new, ""))
                self._built[new] = self._built.pop(name)
            case "truncate":
                await self._once(rng, lambda db: db.truncate_collection("default", name))
                built.rows = None if built.rows is None else {}
            case "field":
                if some in built.fields:
                    await self._once(rng, lambda db: db.drop_field("default", name, some))
                else:
                    added = FieldSchema(some, DataType.INT32, nullable=True)
                    await self._once(rng, lambda db: db.add_field("default", name, added))
                built.fields ^= {some}
            case "partition":
                if some not in built.partitions:
                    await self._once(rng, lambda db: db.create_partition("default", name, some))
                elif built.loaded:
                    await self._refused(rng, lambda db: db.drop_partition("default", name, some), "release it first")
                    return
                else:
                    await self._once(rng, lambda db: db.drop_partition("default", name, some))
                built.partitions ^= {some}
            case "load":
                if not built.loaded:
                    await self._once(rng, lambda db: db.load("default", name))
                else:
                    await self._once(rng, lambda db: db.release("default", name))
                built.loaded = not built.loaded
            case "alter":
                built.ttl = str(rng.randint(100_000, 999_999))
                changed = {"collection.ttl.seconds": built.ttl}
                await self._once(rng, lambda db: db.alter_collection("default", name, changed, []))
            case "alias":
                alias = f"alias_{some}"
                owner = next((one for one, known in self._built.items() if alias in known.aliases), None)
                if owner is None:
                    await self._once(rng, lambda db: db.create_alias("default", name, alias))
                else:
                    await self._once(rng, lambda db: db.alter_alias("default", name, alias))
                    self._built[owner].aliases.discard(alias)
                built.aliases.add(alias)
            case "flush-all":
                await self._until_done(rng, lambda db: db.flush_all())
            case "write":
                await self._write(rng, name, built)
            case _:
                raise ValueError(f"architects do not know what {what} is")

    async def _create(self, rng: Random, clients: int) -> None:
        name = self._fresh()
        wanted = CollectionRequest(
            name,
            [
                FieldSchema("id", DataType.INT64, primary=True),
                FieldSchema("version", DataType.INT64),
                FieldSchema("vector", DataType.FLOAT_VECTOR, dim=2),
            ],
            shards=rng.randint(1, 3),
            indexes=[IndexRequest("vector", "vector", "FLAT", "L2")],
            load=True,
        )
        rngs = [Random(rng.random()) for _ in range(clients)]
        await asyncio.gather(*(self._once(one, lambda db: db.create_collection("default", wanted)) for one in rngs))
        self._built[name] = Built({"id", "version", "vector"})

    async def _write(self, rng: Random, name: str, built: Built) -> None:
        keys = rng.sample(KEYS, rng.randint(1, 4))
        self._versions += 1
        version = self._versions
        node = rng.choice(self._cluster.names)

        async def write(database: Database) -> None:
            schema = await database.collection_schema("default", name, newest=True)
            await database.upsert("default", name, _rows(schema, keys, version))

        try:
            await self._ask(node, write)
        except (Unavailable, NoAnswer, Refused):
            built.rows = None
        else:
            if built.rows is not None:
                built.rows.update(dict.fromkeys(keys, version))

    async def _once(self, rng: Random, work: Work) -> None:
        """Have it made once; repeat it at any node until it is answered."""
        key = f"architect {self._next()}"
        try:
            await self._until_done(rng, lambda db: db.once(key, key, lambda: work(db)))
        except BadRequest as error:
            raise Violation(f"a change that is right was refused: {error!r}") from error

    async def _refused(self, rng: Random, work: Work, text: str) -> None:
        key = f"architect {self._next()}"
        for _ in range(2):
            try:
                await self._until_done(rng, lambda db: db.once(key, key, lambda: work(db)))
            except BadRequest as error:
                if text not in str(error):
                    raise Violation(f"a change was refused for another reason than {text!r}: {error!r}") from error
            else:
                raise Violation(f"a change was not refused though {text!r}")

    async def _until_done(self, rng: Random, work: Work) -> None:
        while True:
            try:
                await self._ask(rng.choice(self._cluster.names), work)
            except (Unavailable, NoAnswer, Refused):
                await asyncio.sleep(rng.uniform(0.05, 0.5))
            else:
                return

    async def _ask(self, node: str, work: Work) -> Any:
        try:
            return await self._cluster.ask(node, work, within_s=ANSWER_S)
        except StorageFault as error:
            if self._cluster.machines[node].excuses:
                raise NoAnswer(node) from error
            raise

    # what must be so

    async def _look(self, rng: Random, node: str, *, patient: bool) -> None:
        """Compare what a node says of a collection, or if patient of all, with what it must be."""
        names = sorted(self._built)
        for name in names if patient else rng.sample(names, min(1, len(names))):
            for attempt in range(20 if patient else 1):
                try:
                    await self._compare(node, name)
                except (Unavailable, NoAnswer, Refused) as error:
                    if patient and attempt == 19:
                        raise Violation(f"{node} does not describe {name} though nothing is broken") from error
                    await asyncio.sleep(0.2)
                else:
                    break
        if patient:
            said: set[str] = set(await self._ask(node, lambda db: db.list_collections("default")))
            mine = {name for name in said if name.startswith("built")}
            if mine != set(names):
                raise Violation(f"{node} lists {sorted(mine)}, there must be {names}")

    async def _compare(self, node: str, name: str) -> None:
        built = self._built[name]
        if not await self._ask(node, lambda db: self._refresh(node)):
            raise NoAnswer(node)  # what it has may be old, as it may say
        info: CollectionInfo = await self._ask(node, lambda db: db.describe_collection("default", name))
        said = Built(
            {one.name for one in info.schema.fields},
            set(info.partitions),
            bool(info.indexes),
            str(info.load_state) != "LoadStateNotLoad",
            info.properties.get("collection.ttl.seconds", ""),
            set(info.aliases),
            built.rows,
        )
        if said != built:
            raise Violation(f"{node} says of {name}: {said}; it must be {built}")
        if built.rows is not None and built.loaded:
            options = ReadOptions(output_fields=["id", "version"], consistency=Consistency.STRONG)
            rows = await self._ask(node, lambda db: db.query("default", name, options, limit=0, offset=0))
            by_name = {one.name: one.id for one in info.schema.fields}
            ids, versions = (rows.batch.columns[by_name[one]].to_list() for one in ("id", "version"))
            found = dict(zip(ids, versions, strict=True))
            if found != built.rows:
                raise Violation(f"{node} finds {found} in {name}; there must be {built.rows}")

    async def _refresh(self, node: str) -> bool:
        served = self._cluster.machines[node].node
        return served is not None and await served.router.refresh_catalog()

    def _fresh(self) -> str:
        return f"built{self._next()}"

    def _next(self) -> int:
        self._count += 1
        return self._count


async def _drop_alias(alias: str, database: Database) -> None:
    await database.drop_alias("default", alias)


def _rows(schema: CollectionSchema, keys: Sequence[int], version: int) -> Batch:
    """Return rows that have null in every field but the first three."""
    columns: dict[FieldId, Column] = {one.id: absent_column(one, len(keys)) for one in schema.fields if one.nullable}
    columns[schema.by_name["id"].id] = ScalarColumn(np.array(keys, np.int64))
    columns[schema.by_name["version"].id] = ScalarColumn(np.full(len(keys), version, np.int64))
    columns[schema.by_name["vector"].id] = VectorColumn(np.array([[key, version] for key in keys], np.float32))
    return Batch(columns, len(keys))
