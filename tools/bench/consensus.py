"""Consensus alone: three processes on loopback, each with its own journal on the disk, and nothing above Raft.

    python -m tools.bench.consensus                    all measurements
    python -m tools.bench.consensus --only big,idle    some of them

Every entry is durable on a majority, the leader included, before it counts. The network, the journal and the groups
are those of a node. The leader proposes to itself, so no client's cost is in the figures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

from cluster.raft import BecameLeader, Committed, LostLeadership, RaftGroup
from cluster.tick import HybridClock
from node.calls import Mesh
from node.clock import SystemClock
from node.disk import OsDisk
from node.journaling import JournalWriter
from node.metrics import Metrics
from node.peers import PeerNetwork
from node.settings import Address
from node.workers import Workers
from storage.journal import Journal
from tools.bench.node import free_address

NODES = ("n1", "n2", "n3")
SETTLE_S = 1.5
ELECTED_S_MAX = 30.0
SWITCH_INTERVAL_S = 0.0005
WORD = "a cluster that lives for seconds"


@dataclass(frozen=True)
class Load:
    """What the leaders do."""

    text: str
    goal: str
    entry_bytes: int = 0
    in_flight: int = 0
    """Proposals under way at once, in each group; 0 leaves the groups idle."""
    groups: int = 1


LOADS: Mapping[str, Load] = {
    "big": Load("1.5 MB, one at a time", "100 MB/s, p50 < 15 ms", 1_500_000, 1),
    "big4": Load("1.5 MB, 4 in flight", "", 1_500_000, 4),
    "middle": Load("100 KB, 16 in flight", "", 100_000, 16),
    "single": Load("100 B, one at a time", "p50 < 4 ms", 100, 1),
    "many": Load("100 B, 64 in flight", "4,000/s", 100, 64),
    "idle": Load("32 idle groups", "CPU < 5 % of a core", groups=32),
}


# ---- one member, in its own process


class Member:
    """Hosts one replica of every group, and loads those that it leads."""

    def __init__(self, name: str, group_id: int, member: Process, load: Load) -> None:
        self.member, self.load = member, load
        self.delivered = 0
        self.leads = False
        self.began_s: deque[float] = deque()
        self.latencies_s: list[float] = []
        self.is_loaded = False
        self._payloads = [os.urandom(max(1, load.entry_bytes)) for _ in range(4)]
        self._handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.raft = RaftGroup(
            group_id,
            name,
            [node for node in NODES if node != name],
            member.journal.group(group_id),
            applied=0,
            clock=member.clock.monotonic_s,
            rng=Random(),
            transport=Sender(member.mesh, group_id),
            stamp=member.hybrid.stamp,
        )
        member.mesh.on_raft(group_id, self.receive)
        member.mesh.on_session(self.session)

    def receive(self, peer: str, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        self.raft.receive(peer, header, blobs)
        self.poke()

    def session(self, peer: str, up: bool) -> None:
        self.raft.session(peer, up)
        self.poke()

    def on_durable(self) -> None:
        self.raft.on_durable()
        self.poke()

    def poke(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._pump)

    def propose(self) -> None:
        self.began_s.append(time.perf_counter())
        self.raft.propose(self._payloads[len(self.latencies_s) % len(self._payloads)])
        self.poke()

    def _pump(self) -> None:
        self._handle = None
        for event in self.raft.tick():
            match event:
                case Committed():
                    self.delivered += 1
                    if self.is_loaded:
                        self.latencies_s.append(time.perf_counter() - self.began_s.popleft())
                        self.propose()
                case BecameLeader():
                    self.leads = True
                case LostLeadership():
                    self.leads = self.is_loaded = False
        self.member.writer.kick()
        if self.is_loaded and self.load.in_flight:
            while len(self.began_s) < self.load.in_flight:
                self.propose()
        now = self.member.clock.monotonic_s()
        delay_s = self.raft.next_deadline(now) - now
        if delay_s <= 0:
            self.poke()
            return
        # A timer that rings too early costs less than a new one for every message.
        when = asyncio.get_running_loop().time() + delay_s
        if self._timer is None or self._timer.cancelled() or self._timer.when() > when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.poke()


class Sender:
    def __init__(self, mesh: Mesh, group_id: int) -> None:
        self.send = partial(mesh.send_raft, group_id)


class Process:
    """One node of the cluster."""

    def __init__(self, name: str, addresses: Mapping[str, Address], folder: str, load: Load) -> None:
        self.clock = SystemClock()
        self.hybrid = HybridClock(self.clock.wall_ms)
        metrics = Metrics()
        self.journal = Journal.open(OsDisk(), folder)
        self.network = PeerNetwork(
            name, addresses, cluster="bench", listen=addresses[name], secret=WORD, metrics=metrics
        )
        self.mesh = Mesh(self.network, name, self.hybrid, self.clock)
        self.workers = Workers()
        self.writer = JournalWriter(
            self.journal,
            self.workers,
            self.clock,
            metrics,
            on_durable=lambda group_id: self.members[group_id].on_durable(),
            on_stuck=lambda why: None,
            on_fatal=self._fail,
        )
        self.load = load
        self.members = [Member(name, group_id, self, load) for group_id in range(load.groups)]

    def _fail(self, error: BaseException) -> None:
        raise error

    async def run(self, seconds: float, *, profile: bool) -> dict[str, Any]:
        await self.mesh.start()
        for member in self.members:
            member.poke()
        until = time.monotonic() + ELECTED_S_MAX
        while any(member.raft.leader is None for member in self.members):
            assert time.monotonic() < until, "no leader"
            await asyncio.sleep(0.05)
        await asyncio.sleep(SETTLE_S)
        gc.collect()
        gc.freeze()
        leading = [member for member in self.members if member.leads]
        terms = sum(member.raft.term for member in self.members)
        profiler = None
        if profile and leading:
            import cProfile

            profiler = cProfile.Profile()
            profiler.enable()
        began_s, cpu_s = time.perf_counter(), time.process_time()
        for member in leading:
            member.is_loaded = bool(self.load.in_flight)
            member.poke()
        await asyncio.sleep(seconds)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        if profiler is not None:
            import pstats

            profiler.disable()
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(40)
        latencies_s = sorted(latency for member in leading for latency in member.latencies_s)
        for member in leading:
            member.is_loaded = False
        await asyncio.sleep(1.0)
        result = {
            "led": len(leading),
            "commits": len(latencies_s),
            "per_s": len(latencies_s) / took_s,
            "mb_per_s": len(latencies_s) * self.load.entry_bytes / took_s / 1e6,
            "p50_ms": _at(latencies_s, 0.5) * 1e3,
            "p99_ms": _at(latencies_s, 0.99) * 1e3,
            "cpu": cpu_s / took_s,
            "delivered": sum(member.delivered for member in self.members),
            "elections": sum(member.raft.term for member in self.members) - terms,
        }
        await self.mesh.stop()
        return result


def _at(ordered: Sequence[float], fraction: float) -> float:
    return ordered[int(len(ordered) * fraction)] if ordered else float("nan")


def run_member(name: str, addresses: Mapping[str, str], folder: str, load: Load, seconds: float, profile: bool) -> None:
    """Be one process of the three; print the result as one line of JSON."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    parsed = {node: Address(*_split(address)) for node, address in addresses.items()}

    async def all_of_it() -> dict[str, Any]:
        return await Process(name, parsed, folder, load).run(seconds, profile=profile)

    print(json.dumps(uvloop.run(all_of_it())), flush=True)
    os._exit(0)


def _split(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)


# ---- all three


def measure(load: Load, seconds: float, *, profile: bool) -> list[dict[str, Any]]:
    """Run three processes under the load; return what each found."""
    addresses = {node: str(free_address()) for node in NODES}
    with tempfile.TemporaryDirectory(prefix="annulus-consensus-") as folder:
        started = []
        for node in NODES:
            task = json.dumps([node, addresses, f"{folder}/{node}", asdict(load), seconds, profile])
            command = [sys.executable, "-m", "tools.bench.consensus", "--member", task]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        try:
            return [json.loads(process.communicate(timeout=seconds + 60)[0]) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--only", default=",".join(LOADS), help="Measurements, separated by commas.")
@click.option("--seconds", default=5.0, help="Length of each.")
@click.option("--profile", is_flag=True, help="Print where the leader's time goes.")
@click.option("--out", default=None, help="Write the figures as JSON.")
@click.option("--member", default=None, hidden=True)
def main(only: str, seconds: float, profile: bool, out: str | None, member: str | None) -> None:
    """Measure Raft over the real network and disk, with nothing above it."""
    if member is not None:
        name, addresses, folder, load, seconds, profile = json.loads(member)
        run_member(name, addresses, folder, Load(**load), seconds, profile)
        return
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in LOADS]:
        raise click.UsageError(f"no measurement {', '.join(unknown)}; there are {', '.join(LOADS)}")
    table = Table(title="consensus: three processes, fsync on each", title_justify="left", title_style="bold")
    for heading in ("load", "goal", "commits/s", "MB/s", "p50 ms", "p99 ms", "CPU leader", "CPU others", "elections"):
        table.add_column(heading, justify="left" if heading in ("load", "goal") else "right")
    figures = {}
    for name in chosen:
        found = sorted(measure(LOADS[name], seconds, profile=profile), key=lambda one: -one["led"])
        figures[name] = found
        busiest = max(found, key=lambda one: one["commits"])
        table.add_row(
            LOADS[name].text,
            LOADS[name].goal,
            f"{busiest['per_s']:.0f}",
            f"{busiest['mb_per_s']:.1f}",
            f"{busiest['p50_ms']:.2f}",
            f"{busiest['p99_ms']:.2f}",
            f"{busiest['cpu']:.1%}",
            " ".join(f"{one['cpu']:.1%}" for one in found if one is not busiest),
            str(max(one["elections"] for one in found)),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if out is not None:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
