"""A cluster that grows, shrinks and loses a node while it is written to, read and searched: what its clients notice.

    python -m tools.bench.elastic --data ../shared/data --rows 15000

Three nodes; two more join; both are drained and removed; one of the three is killed and replaced by a blank one. Real
processes, and all the while

    writers   write rows again that are there, so that each collection has the same rows at any moment
    counters  count a collection at Strong through one node, and at the snapshot of that answer through another
    searches  at Bounded; their recall is against exact answers, as the vectors stay what they are
    probes    insert single rows into each shard, which shows how long each hand-over holds writes up

How long a phase takes is stated beside a plain copy, from one store to another, of as many bytes of chunks as came in
checkpoints; who follows a log from its beginning fetches chunks with it, which are not counted. The nodes share this
machine's cores with each other and with the load.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console

from cluster.route import split
from tools.bench.__main__ import FILE_COLUMNS
from tools.bench.client import Client
from tools.bench.copying import copy_plainly, fill
from tools.bench.data import Dataset, load_dataset
from tools.bench.goals import ELASTIC_GOALS
from tools.bench.report import as_json, machine, print_report, write_json
from tools.bench.results import Results
from tools.bench.run import K
from tools.bench.truth import Truth, exact, percentile, recall
from tools.bench.wire import Address
from tools.chaos.failover import outage
from tools.chaos.fleet import Attempt, Fleet
from tools.crash.api import Answered, Api, Unknown
from tools.nodes import Cluster

NAMES: Final = ("elastic_a", "elastic_b", "elastic_c")
PROBES: Final = "elastic_probes"
NODES_PATH: Final = "/v2/annulus/nodes/"
BATCH_ROWS: Final = 20
LOAD_ROWS: Final = 500
EF: Final = 64
WRITE_S_MAX: Final = 60.0
"""A write that is not acknowledged within this time, however often it is repeated, has failed."""
BEFORE_S, AFTER_S = 0.1, 1.5
"""From when to when around a hand-over the longest wait for an acknowledgement is its doing."""
PART_S: Final = 1.0
"""Between telling clients to ask other nodes and the removal of a node: what it was asked is answered."""
PHASE_S_MAX: Final = 600.0
KEYS: Final = 2_000_000
WHY_CHARS: Final = 300
SNAPSHOT: Final = "Annulus-Snapshot"


@dataclass
class Seen:
    """What clients saw in one phase."""

    writes: int = 0
    repeats: Counter[int] = field(default_factory=Counter)
    """How many attempts a write needed -> how many writes."""
    failed_writes: int = 0
    slowest_write_s: float = 0.0
    counts: int = 0
    wrong_counts: list[str] = field(default_factory=list)
    searches: int = 0
    failed_reads: int = 0
    answers: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """Collection -> query -> the keys found last."""
    why: Counter[str] = field(default_factory=Counter)
    """Why attempts had to be repeated."""


class Elastic:
    """One cluster, its load, and what is done to it."""

    def __init__(self, cluster: Cluster, data: Dataset, *, shards: int, seed: int, pause_s: float) -> None:
        self.cluster = cluster
        self.shards = shards
        self.seen = Seen()
        self.lost: list[str] = []
        """What was acknowledged and is not as it should be."""
        self._data = data
        self._chance = random.Random(seed)
        self._rest_s = pause_s
        self._parts = np.array_split(np.arange(data.rows), len(NAMES))
        self._truths: dict[str, Truth] = {
            name: exact(data.queries, data.vectors[part], K, data.metric)
            for name, part in zip(NAMES, self._parts, strict=True)
        }
        self._versions: dict[str, dict[int, int]] = {name: {} for name in NAMES}
        """Collection -> key -> the version acknowledged last."""
        addresses = {name: Address.parse(one.client_address) for name, one in cluster.members.items()}
        self._fleet = Fleet(addresses, random.Random(f"{seed}/fleet"))
        self._apis: dict[str, Api] = {name: Api(address) for name, address in addresses.items()}
        self._former: list[Api] = []
        self._acknowledged: list[list[float]] = [[] for _ in range(shards)]
        """When probes of each shard were acknowledged, in time of `time.time`."""
        self._probes: set[int] = set()
        self._probes_begun: set[int] = set()

    # load

    async def load(self) -> None:
        """Create the collections and write all rows once."""
        metric = self._data.metric
        fields: list[dict[str, Any]] = [
            {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
            {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": self._data.dim}},
            {"fieldName": "version", "dataType": "Int64"},
        ]
        index = {"fieldName": "vector", "indexName": "vector", "indexType": "AUTOINDEX", "metricType": metric}
        for name in NAMES:
            await self._fleet.call(
                "/collections/create", collectionName=name, schema={"fields": fields}, indexParams=[index],
                params={"shardsNum": self.shards},
            )  # fmt: skip
        await self._fleet.call("/collections/create", collectionName=PROBES, dimension=2,
                               params={"shardsNum": self.shards})  # fmt: skip
        for number, name in enumerate(NAMES):
            for start in range(0, len(self._parts[number]), LOAD_ROWS):
                await self._upsert(number, range(start, min(start + LOAD_ROWS, len(self._parts[number]))), 0)
            await self._fleet.call("/collections/flush", collectionName=name)

    @asynccontextmanager
    async def loaded(self, *, writers: int, searchers: int) -> AsyncIterator[None]:
        """Write, count, search and probe until the block is left."""
        keys = [iter(channel.tolist()) for channel in split(np.arange(KEYS, dtype=np.int64), self.shards)]
        found = (await self._fleet.call("/collections/describe", collectionName=PROBES))["collectionID"]
        work = [self._write(number, writers) for number in range(writers)]
        work += [self._probe(keys[way], (int(found) + way) % self.shards) for way in range(self.shards)]
        work += [self._search(number) for number in range(searchers)] + [self._count(), self._count()]
        tasks = [asyncio.create_task(one) for one in work]
        try:
            yield
        finally:
            self._is_ending = True
            for task in tasks:
                await task

    _is_ending = False

    async def _upsert(self, number: int, offsets: Sequence[int], version: int) -> bool:
        name = NAMES[number]
        keys = self._parts[number][list(offsets)]
        rows = [
            {"id": i, "vector": self._data.vectors[key].tolist(), "version": version}
            for i, key in zip(offsets, keys.tolist(), strict=True)
        ]
        done = await self._repeat("/entities/upsert", {"collectionName": name, "data": rows})
        if done:
            self._versions[name].update(dict.fromkeys(offsets, version))
        return done

    async def _repeat(self, path: str, body: Mapping[str, Any]) -> bool:
        """Send a write until it is acknowledged; return whether it was."""
        attempts, began_s, seen = 0, time.monotonic(), self.seen

        def watch() -> Callable[[Attempt], None]:
            nonlocal attempts
            attempts += 1
            return lambda attempt: seen.why.update([attempt.why[:WHY_CHARS]] if attempt.why else [])

        done = False
        while not done and time.monotonic() < began_s + WRITE_S_MAX:
            try:
                await self._fleet.ask(path, body, watch=watch)
                done = True
            except (Answered, Unknown):
                await asyncio.sleep(0.05)
        seen.writes += 1
        seen.repeats[attempts] += 1
        seen.failed_writes += not done
        seen.slowest_write_s = max(seen.slowest_write_s, time.monotonic() - began_s)
        return done

    async def _write(self, writer: int, writers: int) -> None:
        """Write rows that only this writer writes, again and again."""
        version = 0
        while not self._is_ending:
            version += 1
            number = self._chance.randrange(len(NAMES))
            mine = range(writer, len(self._parts[number]), writers)
            start = self._chance.randrange(max(1, len(mine) - BATCH_ROWS))
            await self._upsert(number, mine[start : start + BATCH_ROWS], version)
            await asyncio.sleep(self._rest_s)

    async def _probe(self, keys: Any, shard: int) -> None:
        while not self._is_ending:
            key = next(keys)
            self._probes_begun.add(key)
            if await self._repeat("/entities/upsert", {"collectionName": PROBES,
                                                       "data": [{"id": key, "vector": [0.0, 1.0]}]}):  # fmt: skip
                self._probes.add(key)
                self._acknowledged[shard].append(time.time())
            await asyncio.sleep(self._rest_s)

    async def _count(self) -> None:
        while not self._is_ending:
            number = self._chance.randrange(len(NAMES) + 1)
            name = (*NAMES, PROBES)[number]
            least = len(self._probes) if name == PROBES else len(self._parts[number])
            try:
                first, token = await self._counted(name, {})
                most = len(self._probes_begun) if name == PROBES else least
                again, _ = await self._counted(name, {SNAPSHOT: token})
            except (Answered, Unknown) as error:
                self.seen.failed_reads += 1
                self.seen.why[str(error)[:WHY_CHARS]] += 1
            else:
                self.seen.counts += 1
                if not least <= first <= most or first != again:
                    self.seen.wrong_counts.append(f"{name}: {first}, at its snapshot {again}, of {least} to {most}")
            await asyncio.sleep(self._rest_s)

    async def _counted(self, name: str, headers: Mapping[str, str]) -> tuple[int, str]:
        body = {"collectionName": name, "filter": "", "outputFields": ["count(*)"], "consistencyLevel": "Strong"}
        api = self._apis[self._chance.choice(list(self._apis))]
        found, told = await api.exchange("/entities/query", body, headers)
        return int(found[0]["count(*)"]), told[SNAPSHOT]

    async def _search(self, searcher: int) -> None:
        while not self._is_ending:
            name = self._chance.choice(NAMES)
            query = self._chance.randrange(len(self._data.queries))
            try:
                found = await self._fleet.call(
                    "/entities/search", collectionName=name, data=[self._data.queries[query].tolist()],
                    annsField="vector", limit=K, searchParams={"params": {"ef": EF}}, consistencyLevel="Bounded",
                )  # fmt: skip
            except (Answered, Unknown) as error:
                self.seen.failed_reads += 1
                self.seen.why[str(error)[:WHY_CHARS]] += 1
            else:
                self.seen.searches += 1
                self.seen.answers.setdefault(name, {})[query] = [int(hit["id"]) for hit in found]
            await asyncio.sleep(self._rest_s)

    # what is done

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        async with self._fleet.connected():
            for api in self._apis.values():
                await api.__aenter__()
            try:
                yield
            finally:
                for api in (*self._apis.values(), *self._former):
                    await api.__aexit__(None, None, None)

    async def join(self, *names: str) -> None:
        """Start new nodes and return when shards are spread evenly over all nodes."""
        for name in names:
            self.cluster.add(name, "n1")
            self.cluster.start(name)
        for name in names:
            await asyncio.to_thread(self.cluster.wait_ready, name)
            await self._meet(name)
        await self._until("even", lambda found: _is_even(found) and len(found["nodes"]) == len(self.cluster.members))

    async def leave(self, *names: str) -> None:
        """Drain nodes, remove and stop them."""
        for name in names:
            await self._operate("drain", nodeName=name)
        for name in names:
            await self._until(f"{name} empty", partial(_is_empty, name))
            self._part(name)
            await asyncio.sleep(PART_S)
            await self._until(f"{name} removed", lambda found: self._remove(name))  # noqa: B023
            await asyncio.to_thread(self.cluster.stop, name)
            self.cluster.forget(name)

    async def replace(self, old: str, new: str) -> None:
        """End a node for good, and have a blank one take its place by one command; return when that has everything."""
        self.cluster.kill(old)
        self._part(old)
        self.cluster.forget(old)
        self.cluster.add(new, "n1")
        self.cluster.start(new)
        await asyncio.to_thread(self.cluster.wait_ready, new)
        await self._meet(new)
        await self._operate("replace", nodeName=old, newNodeName=new)
        await self._until("replaced", lambda found: _is_even(found) and old not in _names(found))

    async def _remove(self, name: str) -> bool:
        try:
            await self._operate("remove", nodeName=name)
        except RuntimeError:
            return False
        return True

    async def _meet(self, name: str) -> None:
        address = Address.parse(self.cluster.members[name].client_address)
        await self._fleet.add(name, address)
        self._apis[name] = await Api(address).__aenter__()

    def _part(self, name: str) -> None:
        """Have clients ask other nodes."""
        self._fleet.forget(name)
        self._former.append(self._apis.pop(name))

    async def _operate(self, what: str, **body: Any) -> Any:
        """Ask the first node that answers, as an operator would. Raises RuntimeError."""
        raw = b""
        for _ in range(20):
            for member in list(self.cluster.members.values()):
                client = Client(Address.parse(member.client_address), timeout_s=35)
                try:
                    _, raw = await asyncio.to_thread(
                        client.exchange, "POST", NODES_PATH + what, json.dumps(body).encode()
                    )
                except OSError:
                    continue
                reply = json.loads(raw)
                if reply["code"] == 0:
                    return reply["data"]
            await asyncio.sleep(0.2)
            if what != "list":
                break
        raise RuntimeError(f"{what} {body}: {raw!r}")

    async def _until(self, what: str, wanted: Callable[[Any], bool | Coroutine[Any, Any, bool]]) -> None:
        until_s = time.monotonic() + PHASE_S_MAX
        while True:
            found = await self._operate("list")
            verdict = wanted(found)
            if verdict if isinstance(verdict, bool) else await verdict:
                return
            if time.monotonic() > until_s:
                raise TimeoutError(f"not {what} after {PHASE_S_MAX:g} s: {json.dumps(found)}")
            await asyncio.sleep(0.1)

    async def held(self) -> dict[str, int]:
        """Return how many shards each node holds."""
        return {one["name"]: one["shards"] for one in (await self._operate("list"))["nodes"]}

    # figures

    def recall(self, seen: Seen) -> float:
        """Return the mean recall of what was found in a phase."""
        shares = []
        for number, name in enumerate(NAMES):
            answers = seen.answers.get(name, {})
            asked = sorted(answers)
            if asked:
                truth, part = self._truths[name], self._parts[number]
                shares.append(recall(
                    [answers[i] for i in asked], Truth(truth.ids[asked], truth.scores[asked]),
                    queries=self._data.queries[asked], vectors=self._data.vectors[part], metric=self._data.metric,
                ))  # fmt: skip
        return float(np.mean(shares)) if shares else float("nan")

    def pauses_s(self, since_s: float, until_s: float) -> list[float]:
        """Return, for each hand-over of a time, the longest wait for an acknowledged write to its shard.

        Without any hand-over: what such waits are when nothing happens, of each shard about once a second.
        """
        ends = [(at_s, int(shard[1:])) for at_s, shard in self._logged("hands over", "group") if shard != "control"]
        during = [(at_s, shard) for at_s, shard in ends if since_s <= at_s < until_s]
        seconds = range(1, int(until_s - since_s - AFTER_S))
        calm = [(since_s + second, shard) for second in seconds for shard in range(self.shards)]
        return [self._pause_s_at(at_s, shard) for at_s, shard in during or calm]

    def _pause_s_at(self, at_s: float, shard: int) -> float:
        near = [one for one in self._acknowledged[shard] if at_s - 10 < one < at_s + 10]
        first_s = max([one for one in near if one <= at_s - BEFORE_S], default=at_s - BEFORE_S)
        last_s = min([one for one in near if one >= at_s + AFTER_S], default=at_s + AFTER_S)
        return outage([one for one in near if one <= last_s], first_s, last_s)[0]

    def hand_overs_s(self, since_s: float, until_s: float) -> list[float]:
        """Return, for each hand-over, how long after it was proposed the shard had a leader again, as nodes log it."""
        led = self._logged("leads group", "group")
        return [
            min((then_s - at_s for then_s, other in led if other == shard and then_s > at_s), default=float("nan"))
            for at_s, shard in self._logged("hands over", "group")
            if since_s <= at_s < until_s and shard != "control"
        ]

    def moved(self, since_s: float, until_s: float) -> int:
        """Return how many copies of shards were given to nodes that had none, counting plans that were taken back."""
        moves = [fields for at_s, fields in self._lines("moves shard") if since_s <= at_s < until_s]
        return sum(len(set(one["to"].split(",")) - set(one["from"].split(","))) for one in moves)

    def fetched_bytes(self, since_s: float, until_s: float) -> int:
        """Return the bytes of the checkpoints that replicas took over."""
        begun = [fields for at_s, fields in self._lines("snapshot begun") if since_s <= at_s < until_s]
        return sum(int(one["bytes"]) for one in begun)

    def _logged(self, event: str, key: str) -> list[tuple[float, str]]:
        return [(at_s, str(fields[key])) for at_s, fields in self._lines(event)]

    def _lines(self, event: str) -> list[tuple[float, dict[str, Any]]]:
        found = []
        for path in sorted(self.cluster.directory.glob("*.log")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if f'"{event}' in line:
                    told = json.loads(line)
                    found.append((datetime.fromisoformat(told["time"]).timestamp(), told["fields"]))
        return sorted(found, key=lambda one: one[0])

    # the end

    async def verify(self) -> tuple[int, int]:
        """Return (rows lost or of an older version, rows doubled), the worst of all nodes, of all collections."""
        lost = doubled = 0
        for name, api in self._apis.items():
            for number, collection in enumerate((*NAMES, PROBES)):
                wanted = dict.fromkeys(self._probes, 0) if collection == PROBES else self._versions[NAMES[number]]
                known = self._probes_begun if collection == PROBES else set(wanted)
                found: list[tuple[int, int]] = []
                for first in range(0, max(known, default=0) + 1, 10_000):
                    body = {
                        "collectionName": collection, "filter": f"{first} <= id < {first + 10_000}", "limit": 16_384,
                        "outputFields": ["id"] if collection == PROBES else ["id", "version"],
                        "consistencyLevel": "Strong",
                    }  # fmt: skip
                    rows, _ = await api.exchange("/entities/query", body, {})
                    found += [(int(row["id"]), int(row.get("version", 0))) for row in rows]
                there = dict(found)
                missing = [key for key, version in wanted.items() if there.get(key, -1) != version]
                strange = [key for key in there if key not in known]
                if missing or strange or len(there) < len(found):
                    self.lost.append(f"{collection} on {name}: missing {missing[:5]}, never written {strange[:5]}")
                lost = max(lost, len(missing))
                doubled = max(doubled, len(found) - len(there) + len(strange))
        return lost, doubled

    async def check(self) -> tuple[str, Any]:
        """Return what a full check of the cluster comes to, and the check."""
        client = Client(Address.parse(self.cluster.members["n1"].client_address))
        found = json.loads((await asyncio.to_thread(client.exchange, "POST", "/cluster/check", b""))[1])
        while found.get("finding") == "running":
            await asyncio.sleep(0.2)
            found = json.loads((await asyncio.to_thread(client.exchange, "GET", "/cluster/check"))[1])
        return str(found.get("finding")), found


def _names(found: Mapping[str, Any]) -> list[str]:
    return [one["name"] for one in found["nodes"]]


def _is_empty(name: str, found: Mapping[str, Any]) -> bool:
    return not any(one["shards"] + one["coming"] for one in found["nodes"] if one["name"] == name)


def _is_even(found: Mapping[str, Any]) -> bool:
    """Return whether nothing moves and active nodes hold the same number of shards, or one less."""
    held = [one["shards"] for one in found["nodes"] if one["state"] == "active"]
    return not found["moves"] and not any(one["coming"] for one in found["nodes"]) and max(held) - min(held) <= 1


class Report:
    """Runs phases and notes of each what was seen in it."""

    def __init__(self, elastic: Elastic, results: Results, console: Console) -> None:
        self._elastic = elastic
        self._results = results
        self._console = console
        self.fetched: dict[str, int] = {}

    async def phase(self, name: str, doing: Coroutine[Any, Any, None], ideal: float) -> None:
        self._console.print(f"[dim]{name}[/dim]")
        elastic = self._elastic
        elastic.seen = seen = Seen()
        began_s, clock_s = time.time(), time.monotonic()
        await doing
        seconds = time.monotonic() - clock_s
        await asyncio.sleep(AFTER_S + 1)
        ended_s = time.time()
        elastic.seen = Seen()
        await asyncio.sleep(0)
        pauses_ms = np.array([1000 * one for one in elastic.pauses_s(began_s, ended_s)])
        leaderless_ms = np.array([1000 * one for one in elastic.hand_overs_s(began_s, ended_s)])
        moved = elastic.moved(began_s, ended_s)
        self.fetched[name] = elastic.fetched_bytes(began_s, ended_s)
        more = sum(count for attempts, count in seen.repeats.items() if attempts > 2)
        self._results.add(
            "phases", name,
            seconds=seconds, copies_moved=moved, of_ideal=moved / ideal if ideal else float("nan"),
            mib=self.fetched[name] / 2**20, load=os.getloadavg()[0],
        )  # fmt: skip
        self._results.add(
            "writes", name,
            writes=seen.writes, failed=seen.failed_writes, repeated_once=seen.repeats[2], repeated_more=more,
            slowest_ms=1000 * seen.slowest_write_s,
            waits=len(pauses_ms), pause_p50_ms=percentile(pauses_ms, 50), pause_max_ms=percentile(pauses_ms, 100),
            leaderless_p50_ms=percentile(leaderless_ms, 50), leaderless_max_ms=percentile(leaderless_ms, 100),
        )  # fmt: skip
        self._results.add(
            "reads", name,
            snapshot_counts=seen.counts, wrong_counts=len(seen.wrong_counts), searches=seen.searches,
            recall=elastic.recall(seen), failed=seen.failed_reads,
        )  # fmt: skip
        for line in seen.wrong_counts[:5]:
            self._console.print(f"wrong count: {line}", style="red", markup=False)
        for why, count in seen.why.most_common(6):
            self._console.print(f"  {count} attempts: {why}", style="dim", markup=False)

    def add_plain_copies(self, folder: Path) -> None:
        """State how long a plain copy of what was fetched takes, now that the machine has nothing else to do."""
        mib = max(1, round(sum(self.fetched.values()) / 2**20))
        sizes = fill(str(folder / "source"), min(mib, 256))
        per_mib_s = copy_plainly(str(folder / "source"), str(folder / "target"), sizes)[0] / min(mib, 256)
        for name, fetched in self.fetched.items():
            seconds = self._results.get("phases", name, "seconds") or 0.0
            plain_s = fetched / 2**20 * per_mib_s
            self._results.add(
                "time", name, seconds=seconds, plain_copy_s=plain_s, over_plain_s=seconds - plain_s
            )  # fmt: skip


async def measure(
    elastic: Elastic, report: Report, results: Results, console: Console, *,
    steady_s: float, writers: int, searchers: int,
) -> None:  # fmt: skip
    """Run all phases."""
    async with elastic.connected():
        console.print("[dim]load[/dim]")
        await elastic.load()
        copies = 3 * elastic.shards
        async with elastic.loaded(writers=writers, searchers=searchers):
            await report.phase("3 nodes", asyncio.sleep(steady_s), 0)
            await report.phase("3 to 5", elastic.join("n4", "n5"), copies * 2 / 5)
            held = await elastic.held()
            await report.phase("5 to 3", elastic.leave("n4", "n5"), held["n4"] + held["n5"])
            held = await elastic.held()
            await report.phase("n3 lost, n6 instead", elastic.replace("n3", "n6"), held["n3"])
        lost, doubled = await elastic.verify()
        finding, check = await elastic.check()
        results.add("end", "all nodes", lost=lost, doubled=doubled, digests_differ=int(finding != "clean"))
        for line in elastic.lost:
            console.print(line, style="red", markup=False)
        if finding != "clean":
            console.print(f"{finding}: {json.dumps(check)}", style="red", markup=False)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", "data_path", required=True, help="Any 2-d .npy, or a folder with wordnet_*.npy.")
@click.option("--rows", default=15_000, help="Rows, spread over three collections.")
@click.option("--shards", default=8, help="Shards of the cluster, and of each collection.")
@click.option("--seed", default=1, help="Chooses the rows and who asks what.")
@click.option("--steady-s", default=5.0, help="Length of the phase in which nothing happens.")
@click.option("--writers", default=3, help="Clients that write rows again.")
@click.option("--searchers", default=2, help="Clients that search.")
@click.option("--pause-ms", default=30.0, help="What each client waits after an answer.")
@click.option("--keep", default=None, metavar="DIR", help="Where data and logs go, and stay.")
@click.option("--out", default=None, help="Write the run as JSON.")
def main(data_path: str, rows: int, shards: int, seed: int, steady_s: float, writers: int, searchers: int,
         pause_ms: float, keep: str | None, out: str | None) -> None:  # fmt: skip
    """Measure what clients notice of nodes that come, go and are replaced."""
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    data = load_dataset(data_path, queries_path=None, rows=rows, queries=200, seed=seed, metric="COSINE")
    results, before = Results(), machine()
    with tempfile.TemporaryDirectory(prefix="annulus-elastic-") as scratch:
        cluster = Cluster.make(
            Path(sys.executable), Path(keep or scratch) / "nodes", nodes=3, settings={"shards": str(shards)}
        )
        try:
            cluster.start_all()
            elastic = Elastic(cluster, data, shards=shards, seed=seed, pause_s=pause_ms / 1000)
            report = Report(elastic, results, console)
            asyncio.run(
                measure(elastic, report, results, console, steady_s=steady_s, writers=writers, searchers=searchers)
            )
        finally:
            cluster.stop_all()
        report.add_plain_copies(Path(scratch))
    print_report(results, console, ELASTIC_GOALS)
    if out:
        described = {"name": data.name, "rows": data.rows, "dim": data.dim, "shards": shards}
        command = ["python", "-m", "tools.bench.elastic", *sys.argv[1:]]
        write_json(
            out, as_json(results, seed=seed, command=command, machine=before, data=described, goals=ELASTIC_GOALS)
        )


if __name__ == "__main__":
    main()
