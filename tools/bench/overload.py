"""Overload: one tenant floods a node that has little memory; what another one notices, and whether it passes.

    python -m tools.bench.overload --memory 448MiB --seconds 20

The flood inserts large rows into a collection that is not loaded, as fast as the node takes them, and pays no
attention to what it is told. The good tenant inserts a few rows and searches, one after the other. The node, the flood
and the good tenant share this machine's cores.
"""

from __future__ import annotations

import http.client
import itertools
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cbor2
import click
import numpy as np
from rich.console import Console

from tools.bench.__main__ import FILE_COLUMNS
from tools.bench.client import Client, wait_until
from tools.bench.node import NodeProcess, free_address
from tools.bench.report import as_json, machine, print_report, write_json
from tools.bench.results import Results
from tools.bench.truth import percentile
from tools.bench.wire import BASE_PATH, Address, Codec

FLOOD_DIM: Final = 1024
FLOOD_ROWS: Final = 1000
GOOD_DIM: Final = 64
GOOD_ROWS: Final = 20
RECOVER_S_MAX: Final = 60
AFTER: Final = 5
"""Inserts of the flood's kind when it is over."""
LOOK_S: Final = 0.05
BODY_BYTES_MAX: Final = "16MiB"


@dataclass
class Tenant:
    """What one collection's clients were answered."""

    took_s: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    acknowledged: int = 0
    """Rows."""
    attempted: int = 0
    without_retry_after: int = 0
    """Refusals that did not say when to come again."""
    messages: dict[int, str] = field(default_factory=dict)
    """Code -> one message."""


@dataclass
class Outcome:
    quiet: Tenant
    """The good tenant before the flood,"""
    beside: Tenant
    """and during it."""
    flood: Tenant
    after: Tenant
    """The flood's collection afterwards."""
    recovered_s: float
    """After the flood's end, until the node was accepting again."""
    flood_rows: int
    """Rows found in the end, after a restart."""
    good_rows: int
    rss_bytes_max: int
    rss_bytes_before: int
    limit_bytes: int
    levels: Counter[str]
    """How often the node was seen at each level."""


class Asker:
    """One connection that is kept, and counts what it hears."""

    def __init__(self, address: Address, tenant: Tenant) -> None:
        self._connection = http.client.HTTPConnection(address.host, address.port, timeout=120)
        self._tenant = tenant

    def close(self) -> None:
        self._connection.close()

    def ask(self, path: str, body: Mapping[str, Any], rows: int = 0) -> int:
        """Return the code of the answer."""
        tenant = self._tenant
        raw = cbor2.dumps(body)
        tenant.attempted += rows
        began_s = time.perf_counter()
        self._connection.request("POST", BASE_PATH + path, raw, {"Content-Type": Codec.CBOR.content_type})
        response = self._connection.getresponse()
        answer = cbor2.loads(response.read())
        tenant.took_s.append(time.perf_counter() - began_s)
        code = int(answer["code"])
        tenant.codes[code] += 1
        if code:
            tenant.messages.setdefault(code, answer["message"])
            tenant.without_retry_after += response.headers["Retry-After"] is None
        else:
            tenant.acknowledged += rows
        return code


def flood_into(address: Address, tenant: Tenant, ids: Callable[[int], int], stop: threading.Event) -> None:
    """Insert until told to stop."""
    vectors = np.random.default_rng(1).random((FLOOD_ROWS, FLOOD_DIM), dtype="<f4").tobytes()
    with closing(Asker(address, tenant)) as asker:
        while not stop.is_set():
            flood_once(asker, ids(FLOOD_ROWS), vectors)


def flood_once(asker: Asker, first: int, vectors: bytes) -> int:
    keys = np.arange(first, first + FLOOD_ROWS, dtype="<i8").tobytes()
    body = {"collectionName": "flood", "data": {"id": keys, "vector": vectors}}
    return asker.ask("/entities/insert", body, FLOOD_ROWS)


def good_for(address: Address, seconds: float, ids: Callable[[int], int], tenant: Tenant) -> None:
    """Insert a few rows and search, again and again."""
    dice = np.random.default_rng(2)
    until_s = time.monotonic() + seconds
    with closing(Asker(address, tenant)) as asker:
        while time.monotonic() < until_s:
            first = ids(GOOD_ROWS)
            keys = np.arange(first, first + GOOD_ROWS, dtype="<i8").tobytes()
            vectors = dice.random((GOOD_ROWS, GOOD_DIM), dtype="<f4")
            rows = {"id": keys, "vector": vectors.tobytes()}
            asker.ask("/entities/insert", {"collectionName": "good", "data": rows}, GOOD_ROWS)
            near = {"collectionName": "good", "data": vectors[:1].tobytes(), "limit": 10}
            asker.ask("/entities/search", near)
            time.sleep(0.01)


def run(node: NodeProcess, limit_bytes: int, *, seconds: float, clients: int) -> Outcome:
    """Flood a node that runs, and look at what it does. Raises TimeoutError if it does not recover."""
    client = node.client
    _create(client, "flood", FLOOD_DIM, load=False)
    _create(client, "good", GOOD_DIM, load=True)
    counters = {"flood": itertools.count(step=FLOOD_ROWS), "good": itertools.count(step=GOOD_ROWS)}
    quiet, beside, flood, after = Tenant(), Tenant(), Tenant(), Tenant()
    levels: Counter[str] = Counter()
    rss, stop, over = [node.memory_bytes()["anonymous"]], threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            rss.append(node.memory_bytes()["anonymous"])
            levels[_level(client)] += 1
            time.sleep(LOOK_S)

    def ids(name: str) -> Callable[[int], int]:
        return lambda rows: next(counters[name])

    good_for(node.address, seconds / 2, ids("good"), quiet)
    per_client = [Tenant() for _ in range(clients)]
    threads = [
        threading.Thread(target=flood_into, args=(node.address, one, ids("flood"), stop), daemon=True)
        for one in per_client
    ]
    watching = threading.Thread(target=watch, daemon=True)
    for thread in (watching, *threads):
        thread.start()
    good_for(node.address, seconds, ids("good"), beside)
    stop.set()
    for thread in threads:
        thread.join()
    for one in per_client:
        _add(flood, one)
    ended_s = time.monotonic()
    wait_until(lambda: _level(client) == "accept", timeout_s=RECOVER_S_MAX, what="accepting again")
    recovered_s = time.monotonic() - ended_s
    over.set()
    watching.join()
    vectors = np.zeros((FLOOD_ROWS, FLOOD_DIM), "<f4").tobytes()
    with closing(Asker(node.address, after)) as asker:
        for _ in range(AFTER):  # as fast as the flood, so that it may be slowed again, but not for long
            wait_until(
                lambda: flood_once(asker, next(counters["flood"]), vectors) == 0,
                timeout_s=RECOVER_S_MAX, what="accepted again", poll_s=0.5,
            )  # fmt: skip
    node.kill()
    node.start()
    return Outcome(
        quiet, beside, flood, after, recovered_s, _rows(client, "flood"), _rows(client, "good"), max(rss), rss[0],
        limit_bytes, levels,
    )  # fmt: skip


def environment(limit: str) -> dict[str, str]:
    """Return the settings of a node with so little memory."""
    return {"ANNULUS_ADMISSION_MEMORY_BYTES_MAX": limit, "ANNULUS_API_BODY_BYTES_MAX": BODY_BYTES_MAX}


def _create(client: Client, name: str, dim: int, *, load: bool) -> None:
    fields = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": dim}},
    ]
    index = {"indexParams": [{"fieldName": "vector", "indexType": "FLAT", "metricType": "L2"}]} if load else {}
    client.call("/collections/create", collectionName=name, schema={"fields": fields}, **index)


def _rows(client: Client, name: str) -> int:
    return int(client.call("/collections/get_stats", collectionName=name)["rowCount"])


def _level(client: Client) -> str:
    status = Codec.JSON.loads(client.exchange("GET", "/status")[1])
    return str(status["admission"]["memory"]["level"])


def _add(total: Tenant, one: Tenant) -> None:
    total.took_s += one.took_s
    total.codes += one.codes
    total.acknowledged += one.acknowledged
    total.attempted += one.attempted
    total.without_retry_after += one.without_retry_after
    total.messages |= one.messages


def note(outcome: Outcome, results: Results) -> None:
    """Put the outcome into the report's tables."""
    for name, one in (("good, alone", outcome.quiet), ("good, beside the flood", outcome.beside)):
        took_ms = np.array(one.took_s) * 1000
        results.add(
            "overload", name, requests=len(took_ms), refused=sum(one.codes.values()) - one.codes[0],
            p50_ms=percentile(took_ms, 50), p99_ms=percentile(took_ms, 99), worst_ms=float(took_ms.max()),
        )  # fmt: skip
    flood = outcome.flood
    results.add(
        "flood", "all clients", requests=len(flood.took_s), refused=sum(flood.codes.values()) - flood.codes[0],
        mib_taken=flood.acknowledged * FLOOD_DIM * 4 / 2**20, rows_lost=max(0, flood.acknowledged - outcome.flood_rows),
        accepting_after_s=outcome.recovered_s,
    )  # fmt: skip
    mib = 1 / 2**20
    results.add(
        "memory", "anonymous pages", before_mib=outcome.rss_bytes_before * mib, worst_mib=outcome.rss_bytes_max * mib,
        limit_mib=outcome.limit_bytes * mib,
    )  # fmt: skip


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--memory-mib", default=448, help="admission.memory_bytes_max of the node, in MiB.")
@click.option("--seconds", default=20.0, help="How long the flood lasts.")
@click.option("--clients", default=6, help="Clients of the flood.")
@click.option("--out", default=None, help="Write the run as JSON.")
def main(memory_mib: int, seconds: float, clients: int, out: str | None) -> None:
    """Measure what a flood of one collection does to another."""
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    results, before = Results(), machine()
    limit = memory_mib << 20
    with tempfile.TemporaryDirectory(prefix="annulus-bench-") as scratch:
        log, data = str(Path(scratch) / "log"), str(Path(scratch) / "data")
        with NodeProcess(data, free_address(), log_path=log, environment=environment(str(limit))) as node:
            node.start()
            outcome = run(node, limit, seconds=seconds, clients=clients)
    note(outcome, results)
    print_report(results, console, ())
    for code, message in outcome.flood.messages.items():
        console.print(f"the flood was told {code}: {message}", soft_wrap=True)
    console.print(f"levels seen: {dict(outcome.levels)}")
    if out:
        described = {"memory_mib": memory_mib, "seconds": seconds, "clients": clients}
        command = ["python", "-m", "tools.bench.overload", *sys.argv[1:]]
        write_json(out, as_json(results, seed=0, command=command, machine=before, data=described, goals=()))


if __name__ == "__main__":
    main()
