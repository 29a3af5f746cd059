"""Who is at work while a round lasts: writers, readers, and somebody who flushes, compacts and rebuilds indexes.

Each client ends by itself when the node stops answering. All chance comes from the round's seed; what the clients then
do to each other depends on timing, so a seed repeats the plan of a run and not its course.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tools.crash.api import INDEX_MISSING_CODE, NOT_LOADED_CODES, REFUSED_CODES, Answered, Caller, Unknown
from tools.crash.model import Kind, Model, Violation, Write
from tools.crash.rows import Key, Subject, row, vector
from tools.crash.trace import Trace

WRITERS = 2
"""Per collection; writer w owns the keys that leave w when divided by their number."""
BATCHES = (1, 1, 7, 50, 200)
ROWS_MAX = 2500
"""Per collection; above it deletes grow, so that rounds stay short however many there are."""
SCRATCH = "crash_scratch"


@dataclass
class World:
    """Everything that a run remembers between rounds."""

    models: dict[str, Model]
    trace: Trace
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """Request numbers, which are also the versions of the rows that a request writes."""
    fresh: dict[tuple[str, int], int] = field(default_factory=dict)
    """(collection, writer) -> next key, in units of the writer's own keys."""
    scratch: dict[str, bool | None] = field(default_factory=dict)
    """Collections made and dropped during rounds: there, not there, or unknown (None)."""
    indexed: dict[str, bool | None] = field(default_factory=dict)
    """Whether a collection under test has its index."""
    violations: list[Violation] = field(default_factory=list)
    acknowledged: int = 0
    reads: int = 0

    def complain(self, kind: Kind, where: str, text: str) -> None:
        """Note a broken promise."""
        violation = Violation(kind, where, text)
        self.violations.append(violation)
        self.trace.write("violation", kind=str(kind), where=where, text=text)


def everybody(world: World, api: Caller, seed: str) -> list[asyncio.Task[None]]:
    """Start all clients of a round."""
    tasks = [asyncio.create_task(scratch_keeper(world, api, random.Random(f"{seed}/scratch")))]
    for name, model in world.models.items():
        for w in range(WRITERS):
            chance = random.Random(f"{seed}/{name}/writer{w}")
            tasks.append(asyncio.create_task(writer(world, model, api, chance, w)))
        tasks.append(asyncio.create_task(reader(world, model, api, random.Random(f"{seed}/{name}/reader"))))
        tasks.append(asyncio.create_task(keeper(world, model, api, random.Random(f"{seed}/{name}/keeper"))))
    return tasks


async def writer(world: World, model: Model, api: Caller, chance: random.Random, w: int) -> None:
    """Write to the keys of writer `w` until the node stops answering."""
    while True:
        write, path, body = _next_write(world, model, chance, w)
        model.begin(write)
        facts = {"request": write.number, "collection": model.subject.name, "keys": list(write.after)}
        op = path.rpartition("/")[2]
        try:
            data = await api.call(path, collectionName=model.subject.name, **body)
        except Unknown as unknown:
            model.lose_sight(write)
            world.trace.write(op, **facts, outcome="unknown", why=str(unknown)[:200])
            return
        except Answered as answered:
            model.refuse(write)
            world.trace.write(op, **facts, outcome="refused", why=str(answered)[:200])
            if answered.code not in REFUSED_CODES:
                world.complain(Kind.REFUSED, model.subject.name, f"request {write.number}: {answered}")
                return
            await asyncio.sleep(0.05)
            continue
        model.acknowledge(write)
        world.acknowledged += 1
        world.trace.write(op, **facts, outcome="done")
        _check_receipt(world, model, write, op, data)
        if chance.random() < 0.3:
            await asyncio.sleep(chance.uniform(0, 0.02))


def _next_write(world: World, model: Model, chance: random.Random, w: int) -> tuple[Write, str, dict[str, Any]]:
    """Return a request that fits the model: insert of absent keys, upsert of any, delete of present ones."""
    subject, number = model.subject, next(world.numbers)
    size = chance.choice(BATCHES)
    mine = [key for key in model.rows if key % WRITERS == w and key not in model.under_way]
    kind = chance.random()
    crowded = len(model.rows) > ROWS_MAX
    if mine and (kind < 0.25 or crowded):
        keys = chance.sample(mine, min(len(mine), size * (4 if crowded else 1)))
        return Write(number, dict.fromkeys(keys)), "/entities/delete", {"filter": subject.filter_of(keys)}
    if mine and kind < 0.55 and not subject.auto_id:
        keys = chance.sample(mine, min(len(mine), size)) + _fresh_keys(world, subject, w, chance.choice((0, 0, 3)))
        path = "/entities/upsert"
    else:
        deleted = [key for key in model.gone.keys() - model.rows.keys() - model.under_way if key % WRITERS == w]
        again = chance.sample(deleted, min(len(deleted), size // 5))
        keys, path = again + _fresh_keys(world, subject, w, max(1, size - len(again))), "/entities/insert"
    chance.shuffle(keys)
    return Write(number, dict.fromkeys(keys, number)), path, {"data": [row(subject, key, number) for key in keys]}


def _fresh_keys(world: World, subject: Subject, w: int, count: int) -> list[Key]:
    first = world.fresh.get((subject.name, w), 0)
    world.fresh[subject.name, w] = first + count
    return [i * WRITERS + w for i in range(first, first + count)]


def _check_receipt(world: World, model: Model, write: Write, op: str, data: Any) -> None:
    """An acknowledgement counts the rows, and names their primary keys."""
    counted = data.get(f"{op}Count")
    if counted != len(write.after):
        world.complain(Kind.COUNT, model.subject.name, f"request {write.number}: {op}Count {counted}")
    if op == "delete" or model.subject.auto_id:
        return
    if data.get(f"{op}Ids") != [model.subject.literal(key) for key in write.after]:
        world.complain(Kind.DAMAGED, model.subject.name, f"request {write.number}: {op}Ids are not those sent")


async def reader(world: World, model: Model, api: Caller, chance: random.Random) -> None:
    """Read rows that nobody is writing; they must be as acknowledged, by query and by search."""
    subject = model.subject
    while True:
        await asyncio.sleep(chance.uniform(0, 0.03))
        quiet = sorted((model.rows.keys() | model.gone.keys()) - model.under_way)
        if not quiet:
            continue
        search = chance.random() < 0.5
        keys = chance.sample(quiet, 1 if search else min(len(quiet), 10))
        before = {key: (model.touched.get(key, 0), model.rows.get(key)) for key in keys}
        try:
            rows = await (_search_for(model, api, keys[0]) if search else _query_for(model, api, keys))
        except Unknown:
            return
        except Answered as answered:
            if answered.code in REFUSED_CODES | NOT_LOADED_CODES:
                continue
            world.complain(Kind.REFUSED, subject.name, f"read: {answered}")
            return
        world.reads += 1
        for key, (touched, version) in before.items():
            if model.touched.get(key, 0) != touched:
                continue  # somebody began to write to it meanwhile: both answers are right
            found = [found["version"] for found in rows if subject.key_of(found["key"]) == key]
            expected = [] if version is None else [version]
            if found != expected:
                how = "search" if search else "query"
                world.complain(Kind.READ, subject.name, f"{how} shows key {key} as {found}, acknowledged {expected}")


async def _query_for(model: Model, api: Caller, keys: list[Key]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await api.call(
        "/entities/query",
        collectionName=model.subject.name,
        filter=model.subject.filter_of(keys),
        outputFields=["key", "version"],
        limit=1000,
        consistencyLevel="Strong",
    )
    return found


async def _search_for(model: Model, api: Caller, key: Key) -> list[dict[str, Any]]:
    """Return what lies at the very place of a row, which is the row alone."""
    version = model.rows.get(key, model.gone.get(key, 0))
    found: list[dict[str, Any]] = await api.call(
        "/entities/search",
        collectionName=model.subject.name,
        data=[vector(model.subject, key, version)],
        annsField="vector",
        limit=5,
        outputFields=["key", "version"],
        searchParams={"params": {"ef": 256, "nprobe": 4}},
        consistencyLevel="Strong",
    )
    return [hit for hit in found if abs(hit["distance"]) < 1e-6]


async def keeper(world: World, model: Model, api: Caller, chance: random.Random) -> None:
    """Flush, compact, and drop and rebuild the index, at random moments."""
    name = model.subject.name
    while True:
        await asyncio.sleep(chance.uniform(0.02, 0.4))
        op = chance.choice(("flush", "flush", "compact", "reindex"))
        try:
            if op == "reindex":
                await _reindex(world, model, api, chance.choice(model.subject.index_types))
            else:
                await api.call(f"/collections/{op}", collectionName=name)
        except Unknown as unknown:
            world.trace.write(op, collection=name, outcome="unknown", why=str(unknown)[:200])
            return
        except Answered as answered:
            world.trace.write(op, collection=name, outcome="refused", why=str(answered)[:200])
            if answered.code not in REFUSED_CODES:
                world.complain(Kind.REFUSED, name, f"{op}: {answered}")
                return
        else:
            world.trace.write(op, collection=name, outcome="done")


async def _reindex(world: World, model: Model, api: Caller, index_type: str) -> None:
    name = model.subject.name
    await api.call("/collections/release", collectionName=name)
    world.indexed[name] = None
    with suppress_code(INDEX_MISSING_CODE):
        await api.call("/indexes/drop", collectionName=name, indexName="vector")
    await api.call("/indexes/create", collectionName=name, indexParams=[model.subject.index(index_type)])
    world.indexed[name] = True
    await api.call("/collections/load", collectionName=name)


async def scratch_keeper(world: World, api: Caller, chance: random.Random) -> None:
    """Create, fill and drop small collections; remember which of them must be there."""
    while True:
        await asyncio.sleep(chance.uniform(0.05, 0.3))
        name = f"{SCRATCH}_{chance.randrange(6)}"
        there = world.scratch.get(name, False)
        if there is None:
            continue  # what was asked for last may happen yet
        op = "drop" if there else "create"
        world.scratch[name] = None
        try:
            if there:
                await api.call("/collections/drop", collectionName=name)
            else:
                await api.call("/collections/create", collectionName=name, dimension=4)
            world.scratch[name] = not there
            if not there:
                rows = [{"id": i, "vector": [float(i), 0.0, 0.0, 1.0]} for i in range(10)]
                await api.call("/entities/insert", collectionName=name, data=rows)
        except Unknown as unknown:
            world.trace.write(op, collection=name, outcome="unknown", why=str(unknown)[:200])
            return
        except Answered as answered:
            world.trace.write(op, collection=name, outcome="refused", why=str(answered)[:200])
            if world.scratch[name] is None:
                world.scratch[name] = there
            if answered.code not in REFUSED_CODES:
                world.complain(Kind.REFUSED, name, f"{op}: {answered}")
                return
        else:
            world.trace.write(op, collection=name, outcome="done")


@contextmanager
def suppress_code(code: int) -> Iterator[None]:
    """Take one refusal for success: what was to be undone had not been done."""
    try:
        yield
    except Answered as answered:
        if answered.code != code:
            raise
