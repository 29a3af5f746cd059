"""Read everything back from a quiet node and hold it against the model, by every road there is."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.route import split as split_keys
from tools.crash.api import Answered, Caller, Unknown
from tools.crash.clients import World
from tools.crash.model import Kind, Model
from tools.crash.rows import Key, Subject, Version, differences, row, vector

SCAN_ROWS_MAX = 16_384
"""The longest reply there is; the clients keep their collections far below it."""
LOADED_S_MAX = 30
LOADED = "LoadStateLoaded"
SAMPLES = 24
SCORE_ERROR_MAX = 1e-4

Found = dict[Key, list[Version]]


async def prepare(world: World, api: Caller) -> None:
    """Create the collections under test, or bring them back to a state in which they can be searched."""
    there = set(await api.call("/collections/list"))
    for name, model in world.models.items():
        if name not in there:
            if name in world.indexed:
                world.complain(Kind.CATALOGUE, name, "the collection is gone")
            await _create(model.subject, api)
            world.indexed[name] = True
            continue
        indexed = bool(await api.call("/indexes/list", collectionName=name))
        if world.indexed.get(name) is not None and world.indexed[name] != indexed:
            world.complain(Kind.CATALOGUE, name, f"index there: {indexed}, acknowledged: {world.indexed[name]}")
        if not indexed:
            index = model.subject.index(model.subject.index_types[0])
            await api.call("/indexes/create", collectionName=name, indexParams=[index])
        await _load(name, api)
        world.indexed[name] = True
    for name, expected in world.scratch.items():
        if expected is not None and (name in there) != expected:
            world.complain(Kind.CATALOGUE, name, f"there: {name in there}, acknowledged: {expected}")
        world.scratch[name] = name in there


async def verify(world: World, api: Caller, chance: random.Random) -> None:
    """Compare all collections with their models; the models believe the node afterwards."""
    for model in world.models.values():
        try:
            found = await scan(world, model, api)
            for violation in model.settle(found, split_by_shard):
                world.complain(violation.kind, violation.where, violation.text)
            await _check_count(world, model, api)
            await _check_get(world, model, api, chance)
            await _check_search(world, model, api, chance)
        except Answered as answered:
            world.complain(Kind.REFUSED, model.subject.name, f"verification: {answered}")
    world.trace.write("verified", rows={name: len(model.rows) for name, model in world.models.items()})


async def scan(world: World, model: Model, api: Caller) -> Found:
    """Return the versions of every key, by one query; complain of values that are not as written."""
    found: Found = {}
    subject = model.subject
    rows = await api.call(
        "/entities/query",
        collectionName=subject.name,
        filter=subject.filter_all(),
        outputFields=["*"],
        limit=SCAN_ROWS_MAX,
        consistencyLevel="Strong",
    )
    for read in rows:
        key = subject.key_of(read["key"])
        found.setdefault(key, []).append(read["version"])
        if wrong := differences(row(subject, key, read["version"]), read):
            world.complain(Kind.DAMAGED, subject.name, f"key {key}: {'; '.join(wrong)[:400]}")
    return found


def split_by_shard(subject: Subject, keys: Sequence[Key]) -> list[list[Key]]:
    """Part keys as the node parts a request's rows over the collection's shards."""
    if subject.shards == 1:
        return [list(keys)]
    literals: Any = [subject.literal(key) for key in keys]
    parts = split_keys(literals if subject.text_keys else np.array(literals, dtype=np.int64), subject.shards)
    return [[keys[i] for i in part.tolist()] for part in parts]


async def _create(subject: Subject, api: Caller) -> None:
    await api.call(
        "/collections/create",
        collectionName=subject.name,
        schema=subject.schema(),
        indexParams=[subject.index(subject.index_types[0])],
        params={"shardsNum": subject.shards},
    )


async def _load(name: str, api: Caller) -> None:
    await api.call("/collections/load", collectionName=name)
    deadline = time.monotonic() + LOADED_S_MAX
    while (state := await api.call("/collections/get_load_state", collectionName=name))["loadState"] != LOADED:
        if time.monotonic() > deadline:
            raise Unknown(f"{name} not loaded within {LOADED_S_MAX} s: {state}")
        await asyncio.sleep(0.02)


async def _check_count(world: World, model: Model, api: Caller) -> None:
    """count(*) goes another way than a scan: through the segments' own counters."""
    name = model.subject.name
    rows = await api.call(
        "/entities/query", collectionName=name, filter="", outputFields=["count(*)"], consistencyLevel="Strong"
    )
    counted = rows[0]["count(*)"]
    if counted != len(model.rows):
        world.complain(Kind.COUNT, name, f"count(*) is {counted}, a scan finds {len(model.rows)} keys")


async def _check_get(world: World, model: Model, api: Caller, chance: random.Random) -> None:
    """Get goes through the key lookup."""
    subject = model.subject
    if subject.auto_id:
        return
    live, gone = _samples(model, chance)
    if not live and not gone:
        return
    ids = [subject.literal(key) for key in [*live, *gone]]
    rows = await api.call(
        "/entities/get",
        collectionName=subject.name,
        id=ids,
        outputFields=["key", "version"],
        consistencyLevel="Strong",
    )
    got = sorted((subject.key_of(read["key"]), read["version"]) for read in rows)
    if got != sorted(live.items()):
        world.complain(Kind.READ, subject.name, f"get of {ids} gives {got}, there are {sorted(live.items())}")


async def _check_search(world: World, model: Model, api: Caller, chance: random.Random) -> None:
    """Each sampled row is found by its own vector; every row shown is there, in its version, with its true score."""
    subject = model.subject
    live, gone = _samples(model, chance)
    asked = [*live.items(), *gone.items()]
    for key, version in asked:
        query = vector(subject, key, version)
        hits = await api.call(
            "/entities/search",
            collectionName=subject.name,
            data=[query],
            annsField="vector",
            limit=10,
            outputFields=["key", "version"],
            searchParams={"params": {"ef": 512, "nprobe": 4}},
            consistencyLevel="Strong",
        )
        _judge_hits(world, model, (key, version), query, hits)


def _judge_hits(
    world: World, model: Model, asked: tuple[Key, Version], query: list[float], hits: Sequence[Mapping[str, Any]]
) -> None:
    subject, name = model.subject, model.subject.name
    shown = [(subject.key_of(hit["key"]), int(hit["version"])) for hit in hits]
    if len(hits) < min(10, len(model.rows)):
        world.complain(Kind.SEARCH, name, f"{len(hits)} hits of 10, {len(model.rows)} rows")
    if len({key for key, _ in shown}) < len(shown):
        world.complain(Kind.SEARCH, name, f"a key is shown twice: {shown}")
    if model.rows.get(asked[0]) == asked[1] and (not shown or shown[0] != asked):
        world.complain(Kind.SEARCH, name, f"key {asked[0]} is not the first at its own vector: {shown[:3]}")
    for (key, version), hit in zip(shown, hits, strict=True):
        if model.rows.get(key) != version:
            world.complain(Kind.SEARCH, name, f"shows key {key} as {version}, there is {model.rows.get(key)}")
            continue
        there = np.array(vector(subject, key, version), dtype=np.float64)
        true = float(((there - np.array(query)) ** 2).sum())
        if abs(true - hit["distance"]) > SCORE_ERROR_MAX * max(1.0, true):
            world.complain(Kind.SEARCH, name, f"key {key} scored {hit['distance']}, its distance is {true}")


def _samples(model: Model, chance: random.Random) -> tuple[dict[Key, Version], dict[Key, Version]]:
    """Return some rows that are there, and some that are not any more in the version given."""
    live = chance.sample(sorted(model.rows), min(SAMPLES, len(model.rows)))
    deleted = sorted(model.gone.keys() - model.rows.keys())
    gone = chance.sample(deleted, min(SAMPLES // 3, len(deleted)))
    return {key: model.rows[key] for key in live}, {key: model.gone[key] for key in gone}
