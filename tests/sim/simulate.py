"""A whole node in a simulated world: clients write, read and change the catalogue, the world crashes, all from a seed.

What is checked, after every crash and all the time:
  1. every acknowledged write is there, with its values, exactly once, and nothing that was never asked for is;
  2. a request whose outcome nobody heard is there wholly or not at all, per shard;
  3. a read sees every write that was acknowledged before it began;
  4. a search returns min(limit, live rows) of the live rows, with right scores;
  5. ticks ascend over the life of a shard, through crashes;
  6. after a checkpoint and a sweep, the chunk store holds exactly the chunks that the manifests need.

Each client has keys of its own and one request under way at most, so what a key may hold is always known: the last
acknowledged version, or that of the one request whose outcome is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

import numpy as np

from cluster.checkpoint import manifest_key, referenced
from cluster.route import hash_keys
from node.database import Database
from node.metrics import Metrics
from node.node import Node, Seams
from node.service import CollectionRequest, IndexRequest, ReadOptions, Rows, SearchRequest
from node.settings import CompactionSettings, IndexSettings, NodeSettings, Settings, StorageSettings
from storage.columns import Batch, Column, ScalarColumn, StringColumn, VectorColumn
from storage.errors import AnnulusError, ReadOnly, Unavailable
from storage.schema import DataType, FieldSchema
from storage.strings import StringArray
from storage.types import FieldId, ShardId
from tests.sim.chunks import SimChunks
from tests.sim.disk import PowerLoss, SimDisk
from tests.sim.world import SimClock, SimExecutor, SimLoop, kill, run

SHARDS: Final = 2
DIM: Final = 4
KEYS_PER_CLIENT: Final = 60
COLLECTIONS: Final = {"rows": 1, "wide": 2}
"""Name -> virtual channels."""
INDEXES: Final = (("FLAT", "L2"), ("AUTOINDEX", "COSINE"), ("IVF_FLAT", "IP"), ("HNSW", "L2"), ("IVF_SQ8", "COSINE"))

Version = int | None
"""What a key holds: the number of the write that made it, None for nothing."""
PRIMARY, VERSION, TEXT, VECTOR, FLAG = (FieldId(number) for number in range(100, 105))


class Violation(AssertionError):
    """The node broke a promise."""


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


def fields() -> list[FieldSchema]:
    return [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("version", DataType.INT64),
        FieldSchema("text", DataType.VARCHAR, max_bytes=20),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=DIM),
        FieldSchema("flag", DataType.BOOL),
    ]


@dataclass
class Model:
    """What the clients know."""

    acked: dict[str, dict[int, int]] = field(default_factory=lambda: {name: {} for name in COLLECTIONS})
    open: dict[int, tuple[str, Mapping[int, Version]]] = field(default_factory=dict)
    """Client -> the request whose outcome is open: collection, and what its keys hold if it was done."""
    next_version: int = 1
    created: set[str] = field(default_factory=set)
    ticks: dict[ShardId, int] = field(default_factory=dict)
    requests: int = 0

    def settle(self, client: int, *, done: bool) -> None:
        name, wanted = self.open.pop(client)
        if done:
            for key, version in wanted.items():
                if version is None:
                    self.acked[name].pop(key, None)
                else:
                    self.acked[name][key] = version

    def resolve(self, name: str, found: Mapping[int, int]) -> None:
        """Take what was found after a crash, which must be explained by what was acknowledged or is open."""
        for client, (where, wanted) in list(self.open.items()):
            if where != name:
                continue
            before = {key: self.acked[name].get(key) for key in wanted}
            for shard_keys in _by_channel(list(wanted), COLLECTIONS[name]):
                seen = {key: found.get(key) for key in shard_keys}
                if seen == {key: wanted[key] for key in shard_keys}:
                    before.update(seen)
                elif seen != {key: before[key] for key in shard_keys}:
                    raise Violation(
                        f"{name}: an unacknowledged request of client {client} is there by halves: before "
                        f"{ {k: before[k] for k in shard_keys} }, wanted { {k: wanted[k] for k in shard_keys} }, "
                        f"found {seen}"
                    )
            self.open[client] = (name, before)
            self.settle(client, done=True)
        if found != self.acked[name]:
            missing = {k: v for k, v in self.acked[name].items() if found.get(k) != v}
            invented = {k: v for k, v in found.items() if self.acked[name].get(k) != v}
            raise Violation(f"{name}: acknowledged but not there {missing}; there but not acknowledged {invented}")


def _by_channel(keys: Sequence[int], channels: int) -> list[list[int]]:
    owner = hash_keys(np.array(keys, np.int64)) % np.uint64(channels)
    return [[key for key, mine in zip(keys, owner.tolist(), strict=True) if mine == one] for one in range(channels)]


class SimStore(SimChunks):
    """A chunk store on the same power line as the disk."""

    def __init__(self, rng: Random, disk: SimDisk) -> None:
        super().__init__(rng)
        self._disk = disk
        self.put_lately: set[bytes] = set()
        """Digests of chunks put in this life of the node."""

    def put_many(self, shard_id: ShardId, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        chunks = list(chunks)
        self.put_lately.update(digest for digest, _ in chunks)
        super().put_many(shard_id, chunks)

    def step(self) -> None:
        self._disk.step("chunk store")


@dataclass
class Faults:
    """What the world does to the node; chosen by the seed."""

    lives: int = 4
    torn: bool = True
    """Power loss (unsynced bytes lost, last write torn) or, if not, kill -9 (the machine lives on)."""
    mid_call: float = 0.5
    """Chance that the power goes in the middle of a disk call instead of between two callbacks."""
    graceful: float = 0.15
    jump_ms: int = 0
    full: bool = False


class Simulation:
    """One seed's run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.disk = SimDisk(Random(seed + 1))
        self.store = SimStore(Random(seed + 2), self.disk)
        self.model = Model()
        self.epoch_ms = 1_700_000_000_000
        self.faults = Faults(
            lives=self.rng.randint(2, 5),
            torn=self.rng.random() < 0.7,
            jump_ms=self.rng.choice((0, 0, -60_000, 60_000)),
            full=self.rng.random() < 0.15,
        )
        self.clients = self.rng.randint(1, 4)
        self.settings = Settings(
            node=NodeSettings(data="/data", shards=SHARDS),
            storage=StorageSettings(
                segment_bytes_max=self.rng.choice((1024, 4096, 16384)),
                segment_age_s_max=self.rng.choice((1.0, 5.0)),
                segment_idle_s_max=self.rng.choice((1.0, 2.0)),
                growing_bytes_max=self.rng.choice((16384, 1 << 20)),
                checkpoint_interval_s=self.rng.choice((0.2, 1.0, 20.0)),
                journal_file_bytes_max=self.rng.choice((4096, 65536)),
                journal_bytes_max=131_072,
                disk_reserve_bytes=0,
            ),
            compaction=CompactionSettings(segments_min=2, interval_s=0.5, deleted_ratio=self.rng.choice((0.1, 0.3))),
            index=IndexSettings(build_threads=1, rows_min=self.rng.choice((1, 20))),
        )

    def run(self) -> Model:
        """Live, crash, live again; raise Violation if a promise is broken. Returns the model for its counts."""
        for life in range(self.faults.lives):
            self._live(last=life == self.faults.lives - 1)
        return self.model

    def _live(self, *, last: bool) -> None:
        loop = SimLoop()
        clock = SimClock(loop, epoch_ms=self.epoch_ms)
        executor = SimExecutor(Random(self.rng.getrandbits(32)))
        self.store.full, self.disk.capacity_bytes = False, None
        self.store.reopen()
        duration_s = self.rng.uniform(0.2, 6.0)
        graceful = last or self.rng.random() < self.faults.graceful
        if not graceful and self.rng.random() < self.faults.mid_call:
            self.disk.power_loss_at = self.disk.steps + self.rng.randint(0, 400)
        try:
            run(loop, self._life(loop, clock, executor, duration_s, graceful))
        except PowerLoss:
            graceful = False
        finally:
            if not graceful:
                self._crash()
            self.disk.power_loss_at = None
            kill(loop, executor)
        self.epoch_ms = clock.wall_ms() + 1_000 + (self.faults.jump_ms if self.rng.random() < 0.5 else 0)

    def _crash(self) -> None:
        if self.faults.torn:
            self.disk.crash()
            self.store.crash()
        else:
            self.disk.kill()

    async def _life(
        self, loop: SimLoop, clock: SimClock, executor: SimExecutor, duration_s: float, graceful: bool
    ) -> None:
        dice = Random(self.rng.getrandbits(32))
        node = Node(self.settings, Seams(self.disk, self.store, executor, clock, dice), Metrics())
        work: asyncio.Future[Any] = loop.create_task(self._work(node, clock, duration_s))
        both: set[asyncio.Future[Any]] = {work, node.failed}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if node.failed.done():
            error = node.failed.result()
            if isinstance(error, PowerLoss):
                raise error
            raise Violation(f"the node stopped by itself: {error!r}") from error
        work.result()
        if graceful:
            await node.stop()
            self._check_chunks(node)

    async def _work(self, node: Node, clock: SimClock, duration_s: float) -> None:
        self.store.put_lately.clear()
        await node.start()
        self._check_chunks(node)
        database = Database(node)
        self._check_ticks(node)
        await self._set_up(database)
        for name in COLLECTIONS:
            self.model.resolve(name, await self._all_rows(database, name))
        until_s = clock.monotonic_s() + duration_s
        clients = [self._client(database, number, clock, until_s) for number in range(self.clients)]
        await asyncio.gather(*clients, self._operator(database, clock, until_s))
        self._check_ticks(node)

    async def _set_up(self, database: Database) -> None:
        for name, channels in COLLECTIONS.items():
            index_type, metric = INDEXES[(self.seed + channels) % len(INDEXES)]
            index = IndexRequest("vector", "vector", index_type, metric)
            request = CollectionRequest(name, fields(), shards=channels, indexes=[index], load=True)
            await database.create_collection("default", request)

    async def _client(self, database: Database, number: int, clock: SimClock, until_s: float) -> None:
        rng = Random(self.rng.getrandbits(32))
        while clock.monotonic_s() < until_s:
            await asyncio.sleep(rng.expovariate(20))
            name = rng.choice(list(COLLECTIONS))
            keys = rng.sample(range(number * KEYS_PER_CLIENT, (number + 1) * KEYS_PER_CLIENT), rng.randint(1, 20))
            kind = rng.choices(("upsert", "insert", "delete", "partial", "get", "search"), (4, 4, 3, 1, 2, 2))[0]
            self.model.requests += 1
            try:
                await self._request(database, rng, number, name, kind, keys)
            except ReadOnly:  # refused before anything was written
                self.model.settle(number, done=False)
            except Unavailable as error:
                raise Violation(f"client {number}: no answer though the node lives: {error!r}") from error

    async def _request(
        self, database: Database, rng: Random, client: int, name: str, kind: str, keys: Sequence[int]
    ) -> None:
        acked = self.model.acked[name]
        if kind == "get":
            found = _versions(await database.get("default", name, keys, ReadOptions(output_fields=["*"])))
            expected = {key: acked[key] for key in keys if key in acked}
            if found != expected:
                raise Violation(f"{name}: a read gave {found}, acknowledged is {expected}")
            return
        if kind == "search":
            await self._search(database, rng, name)
            return
        if kind == "insert":
            keys = [key for key in keys if key not in acked]
        elif kind in ("delete", "partial"):
            keys = [key for key in keys if key in acked]
        if not keys:
            return
        version = self.model.next_version
        self.model.next_version += 1
        wanted: dict[int, Version] = dict.fromkeys(keys, None if kind == "delete" else version)
        rows = batch_of(dict.fromkeys(keys, version))
        self.model.open[client] = (name, wanted)
        if kind == "insert":
            await database.insert("default", name, rows)
        elif kind == "upsert":
            await database.upsert("default", name, rows)
        elif kind == "partial":
            await database.upsert("default", name, rows.select([PRIMARY, VERSION, TEXT, VECTOR]), partial=True)
        else:
            deleted = await database.delete("default", name, "id in {keys}", {"keys": list(keys)})
            if deleted != len(keys):
                raise Violation(f"{name}: {deleted} rows deleted, {len(keys)} live keys given")
        self.model.settle(client, done=True)

    async def _search(self, database: Database, rng: Random, name: str) -> None:
        limit = rng.randint(1, 20)
        before = dict(self.model.acked[name])
        busy = {key for where, wanted in self.model.open.values() if where == name for key in wanted}
        result = await database.search(
            "default",
            name,
            SearchRequest(np.array([vector_of(rng.randrange(100), 1)], np.float32), limit=limit),
            ReadOptions(output_fields=["*"]),
        )
        after = self.model.acked[name]
        busy |= {key for where, wanted in self.model.open.values() if where == name for key in wanted}
        found = _versions(result.rows)
        moved = busy | {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        wrong = {k: v for k, v in found.items() if k not in moved and before.get(k) != v}
        if wrong:
            raise Violation(f"{name}: a search gave rows that do not live: {wrong}")
        steady = sum(key not in moved for key in before)
        if result.rows.batch.rows < min(limit, steady):
            raise Violation(f"{name}: {result.rows.batch.rows} hits, limit {limit}, {steady} rows lived all the time")

    async def _operator(self, database: Database, clock: SimClock, until_s: float) -> None:
        """Change the catalogue, flush, compact, fill the disk."""
        rng = Random(self.rng.getrandbits(32))
        while clock.monotonic_s() < until_s:
            await asyncio.sleep(rng.expovariate(2))
            name = rng.choice(list(COLLECTIONS))
            kind = rng.choice(("flush", "compact", "reload", "reindex", "other", "full"))
            with contextlib.suppress(Unavailable):
                if kind == "flush":
                    await database.flush("default", name)
                elif kind == "compact":
                    await database.compact("default", name)
                elif kind == "other":
                    await database.create_collection("default", CollectionRequest("other", fields()))
                    await database.insert("default", "other", batch_of({1: 1, 2: 1}))
                    await database.drop_collection("default", "other")
                elif kind == "full" and self.faults.full:
                    self.store.full = True
                    self.disk.capacity_bytes = self.disk.total_bytes + rng.randrange(2_000)
                    await asyncio.sleep(rng.uniform(0.1, 1.0))
                    self.store.full, self.disk.capacity_bytes = False, None
                    await asyncio.sleep(2.0)

    async def _all_rows(self, database: Database, name: str) -> dict[int, int]:
        options = ReadOptions(output_fields=["*"])
        rows = await database.query("default", name, options, limit=0, offset=0)
        counted = await database.query("default", name, replace(options, output_fields=["count(*)"]), limit=0, offset=0)
        found = _versions(rows)
        if counted.count != len(found):
            raise Violation(f"{name}: count(*) is {counted.count}, a scan gives {len(found)} rows")
        return found

    def _check_ticks(self, node: Node) -> None:
        for shard_id, host in node.shards.items():
            before = self.model.ticks.get(shard_id, 0)
            if host.machine.tick < before:
                raise Violation(f"shard {shard_id}: tick {host.machine.tick} after {before}")
            self.model.ticks[shard_id] = host.machine.tick

    def _check_chunks(self, node: Node) -> None:
        """The store holds what the manifests need, and nothing from before this life that nobody needs."""
        for shard_id, host in node.shards.items():
            manifest = self.store.read(manifest_key(shard_id))
            needed = set() if manifest is None else {digest for _, digest in referenced(manifest)}
            present = set(self.store.chunk_digests(shard_id))
            if needed - present:
                raise Violation(f"shard {shard_id}: {len(needed - present)} chunks of the manifest are missing")
            orphans = present - needed - host.machine.digests.keys() - host.machine.garbage - self.store.put_lately
            if orphans:
                raise Violation(f"shard {shard_id}: {len(orphans)} chunks that nothing needs are left")


def _versions(rows: Rows) -> dict[int, int]:
    """Return key -> version of result rows, having checked every other value."""
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


def simulate(seed: int) -> Model:
    """Run one seed; raise Violation, naming the seed, if a promise is broken."""
    logging.disable(logging.CRITICAL)
    try:
        return Simulation(seed).run()
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}") from violation
    except (AnnulusError, AssertionError, RuntimeError) as error:
        raise Violation(f"seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
