"""The cluster under test: its processes, the network between them, and what each believes of its disk and its clock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tools.bench.wire import Address
from tools.chaos.proxy import ProxyProcess, Rule, Way
from tools.chaos.shim import Control, build
from tools.environment import Failure
from tools.nodes import Cluster

LEADERS_EVERY_S = 0.25
STATUS_S_MAX = 1.0
FLIPPED_BYTES_MIN = 8192
CHECK_S_MAX = 60.0
OPERATE_S_MAX = 10.0
WHOLE_S_MAX = 120.0
"""How long moves of shards may take, with all else that goes on."""


MemberWatcher = Callable[[str, Address | None], Awaitable[None]]


class Machines:
    """Nodes n1..nN in a folder. Whoever does something to one node holds it (`held`), so that faults do not mix there.

    `leaders` is shard -> node as the nodes told last; `moments` all changes of it, as (time, shard, node).
    """

    def __init__(
        self,
        folder: str,
        *,
        nodes: int,
        settings: Mapping[str, str],
        complain: Callable[[str, str], None],
        proxied: bool = True,
        shimmed: bool = True,
        python: str = sys.executable,
        zones: int = 0,
        patience: float = 1.0,
    ) -> None:
        """`complain(node, text)` is called when a process ends by itself. Nodes are in so many zones in turn.

        patience  how many times longer than else they may take to become ready, and shards to become whole
        """
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANNULUS_")}
        self.folder = folder
        self.cluster = Cluster.make(Path(python), Path(folder), nodes=nodes, settings=settings, environment=environment)
        self.cluster.ready_s_max *= patience
        self.patience = patience
        self.zones = zones
        self.cluster.zones = {name: self._zone(name) for name in self.cluster.members} if zones else {}
        self.names = list(self.cluster.members)
        self.addresses = {name: Address.parse(one.client_address) for name, one in self.cluster.members.items()}
        self.leaders: dict[int, str] = {}
        self.moments: list[tuple[float, int, str]] = []
        self._terms: dict[int, int] = {}
        self.proxies: ProxyProcess | None = None
        if proxied and nodes > 1:
            self.proxies = ProxyProcess()
        library = build(folder) if shimmed else None
        self._library = library
        self.controls = (
            {name: Control(os.path.join(folder, f"{name}.control")) for name in self.names} if library else {}
        )
        self.mortal: set[str] = set()
        """Nodes that may end by themselves: their disk fails."""
        self.rotten: set[str] = set()
        """The one whose stored chunks were damaged. It may find a table that it cannot read, however late, and end."""
        self.complain = complain
        self.watchers: list[MemberWatcher] = []
        """Told of each node that comes, with its address, and of each that has gone, without."""
        self.churning = asyncio.Lock()
        """Held by whoever changes which nodes there are."""
        self._locks = {name: asyncio.Lock() for name in self.names}
        self._numbers = nodes
        """Of the node that came last: no name is used twice."""
        self._held_since_s: dict[asyncio.Task[Any] | None, float] = {}
        self._up: set[str] = set()
        """Nodes that should run."""

    # all of them

    async def start(self) -> None:
        """Start everything and return when every node is ready. Raises Failure."""
        if self.proxies is not None:
            await self.proxies.start()
            for name, one in self.cluster.members.items():
                await self.proxies.open(name, Address.parse(one.peer_address))
        for name in self.names:
            self.spawn(name)
        await self.ready_all()

    async def ready_all(self) -> None:
        """Return when every node is ready. Raises Failure, with the end of a log, if one does not get there."""
        await asyncio.to_thread(self.cluster.wait_all_ready)

    async def stop(self) -> None:
        """Stop all nodes at once, as an operator would; what does not end well is complained of."""
        await asyncio.gather(*(self.terminate(name) for name in self.names))

    async def abandon(self) -> None:
        """End whatever runs, at once."""
        self._up.clear()
        for name in list(self.cluster.nodes):
            if self.cluster.is_alive(name):
                await asyncio.to_thread(self.cluster.kill, name)
        if self.proxies is not None:
            await self.proxies.stop()

    async def watch(self) -> None:
        """Keep `leaders` fresh and notice processes that end, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=STATUS_S_MAX)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                told = await asyncio.gather(*(self._status(session, name) for name in self.names))
                shards = [one for status in told for one in status.get("shards", ()) if one.get("leader")]
                for one in sorted(shards, key=lambda one: int(one.get("term") or 0)):
                    self._leads(int(one["shard"]), str(one["leader"]), int(one.get("term") or 0))
                self.notice()
                await asyncio.sleep(LEADERS_EVERY_S)

    async def _status(self, session: aiohttp.ClientSession, name: str) -> dict[str, Any]:
        try:
            async with session.get(f"http://{self.addresses[name]}/status") as response:
                found = await response.json()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):  # it may have gone for good
            return {}
        return found if isinstance(found, dict) else {}

    def _leads(self, shard: int, leader: str, term: int) -> None:
        if term < self._terms.get(shard, 0):
            return  # told by a node that has not heard of its successor
        self._terms[shard] = term
        if self.leaders.get(shard) != leader:
            self.leaders[shard] = leader
            self.moments.append((time.monotonic(), shard, leader))

    def notice(self) -> None:
        """Complain of processes that should run and do not."""
        for name in sorted(self._up):
            if not self.cluster.is_alive(name):
                self._up.discard(name)
                if name in self.rotten and "Corruption" in self.cluster.log_end(name):
                    self.spawn(name)  # it takes everything from the others
                elif name not in self.mortal:
                    self.complain(name, f"ended by itself. {self.cluster.log_end(name)}")

    # one of them

    def spawn(self, name: str) -> None:
        """Start a node without waiting until it is ready."""
        peers: dict[str, str] = {}
        if self.proxies is not None:
            peers = {one: str(self.proxies.address(one)) for one in {*self.cluster.founders, name}}
        data_dir = self.data_dir(name)
        os.makedirs(data_dir, exist_ok=True)
        prefix: list[str] = []
        if self._library is not None:
            variables = self.controls[name].environment(self._library, data_dir)
            prefix = ["env", *(f"{key}={value}" for key, value in variables.items())]
        self.cluster.start(name, peers=peers, prefix=prefix)
        self._up.add(name)

    async def ready(self, name: str) -> None:
        """Return when this node is ready. Raises Failure."""
        await asyncio.to_thread(self.cluster.wait_ready, name)

    async def kill(self, name: str) -> None:
        self._up.discard(name)
        if self.cluster.is_alive(name):
            await asyncio.to_thread(self.cluster.kill, name)

    async def terminate(self, name: str) -> None:
        """Stop a node as an operator would; complain if it does not end well."""
        self._up.discard(name)
        ready = await asyncio.to_thread(self.cluster.nodes[name].is_ready)
        try:
            gentle = await asyncio.to_thread(self.cluster.stop, name)
        except Failure as failure:
            self.complain(name, str(failure))
            return
        # Before the program has begun to listen for it, SIGTERM is the end of any process.
        fine = (0,) if ready else (0, -signal.SIGTERM)
        if not gentle:
            self.complain(name, f"did not end after SIGTERM and was killed. {self.cluster.log_end(name)}")
        elif (status := self.cluster.exit_statuses.get(name)) not in fine:
            self.complain(name, f"ended with {status} after SIGTERM. {self.cluster.log_end(name)}")

    def signal(self, name: str, number: int) -> None:
        self.cluster.signal(name, number)

    def revive(self, name: str) -> None:
        """Start a node that is down, if it is."""
        if not self.cluster.is_alive(name):
            self.spawn(name)

    def wipe(self, name: str) -> None:
        """Remove everything that a node keeps; it must be down."""
        shutil.rmtree(self.data_dir(name))

    def rot(self, name: str, chance: random.Random) -> str:
        """Change a few bytes of a node's stored chunks, whether or not it runs, and say where.

        Only in the parts of tables that hold chunks: what stands at their ends is in the memory of a node that runs.
        """
        folder = os.path.join(self.data_dir(name), "chunks")
        sizes = {one: os.path.getsize(os.path.join(folder, one)) for one in sorted(os.listdir(folder))}
        large = [one for one, size in sizes.items() if one.endswith(".ldb") and size >= FLIPPED_BYTES_MIN]
        if not large:
            return "nothing to damage"
        chosen = chance.choice(large)
        places = sorted(chance.randrange(sizes[chosen] * 3 // 4) for _ in range(chance.randrange(1, 5)))
        with open(os.path.join(folder, chosen), "r+b") as file:
            for at in places:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << chance.randrange(8)]))
        return f"{chosen} at {', '.join(map(str, places))}"

    async def healed(self, name: str) -> str:
        """Have the cluster checked through a node, and return what that found; "unknown" if it does not answer."""
        url = f"http://{self.addresses[name]}/cluster/check"
        finding = "unknown"
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CHECK_S_MAX)) as session:
                async with session.post(url) as response:
                    finding = str((await response.json()).get("finding", finding))
                until_s = time.monotonic() + CHECK_S_MAX
                while finding == "running" and time.monotonic() < until_s:
                    await asyncio.sleep(0.2)
                    async with session.get(url) as response:
                        finding = str((await response.json()).get("finding", "unknown"))
        return finding

    def flip(self, name: str, chance: random.Random) -> str:
        """Change one byte of a node's journal, and say where; it must be down.

        Not near the end of a file: there it could be taken for what a crash has torn.
        """
        folder = os.path.join(self.data_dir(name), "journal")
        sizes = {one: os.path.getsize(os.path.join(folder, one)) for one in sorted(os.listdir(folder))}
        large = [one for one, size in sizes.items() if size >= FLIPPED_BYTES_MIN]
        if not large:
            return "nothing to damage"
        chosen = chance.choice(large)
        at = chance.randrange(sizes[chosen] // 2)
        with open(os.path.join(folder, chosen), "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << chance.randrange(8))]))
        return f"{chosen} at {at} of {sizes[chosen]}"

    def data_dir(self, name: str) -> str:
        return os.path.join(self.folder, name)

    # choosing and holding

    @contextlib.asynccontextmanager
    async def held(self, chance: random.Random, *, leader: bool | None = None) -> AsyncIterator[str]:
        """Hold a node, if possible one that nobody else holds: it leads a shard, leads the fewest, or any (None)."""
        while True:
            free = [name for name in self.names if not self._locks[name].locked()]
            name = self._choose(free or self.names, chance, leader)
            async with self._locks[name]:
                if name in self.names:
                    self._note_held()
                    yield name
                    return

    @contextlib.asynccontextmanager
    async def held_here(self, names: Sequence[str]) -> AsyncIterator[None]:
        """Hold these nodes, once nobody else holds one."""
        async with contextlib.AsyncExitStack() as stack:
            for name in sorted(names):
                await stack.enter_async_context(self._locks[name])
            self._note_held()
            yield

    @contextlib.asynccontextmanager
    async def all_held(self) -> AsyncIterator[None]:
        """Hold all nodes, once nobody else holds one; none comes or goes meanwhile."""
        async with self.churning, self.held_here(self.names):
            yield

    def held_since_s(self) -> float | None:
        """Return when the running task got hold of what it asked for, None if it asked for nothing."""
        return self._held_since_s.pop(asyncio.current_task(), None)

    def _note_held(self) -> None:
        self._held_since_s[asyncio.current_task()] = time.monotonic()

    def led_by(self, name: str) -> list[int]:
        """Return the shards that a node leads."""
        return [shard for shard, leader in sorted(self.leaders.items()) if leader == name]

    def ways(self, sources: Sequence[str], targets: Sequence[str]) -> list[Way]:
        """Return the ways from each source to each target."""
        return [(a, b) for a in sources for b in targets if a != b]

    def disturbed(self, ways: Sequence[Way], rule: Rule) -> contextlib.AbstractContextManager[None]:
        assert self.proxies is not None, "a single node has no network"
        return self.proxies.disturbed(ways, rule)

    def _choose(self, free: Sequence[str], chance: random.Random, leader: bool | None) -> str:
        led = {name: len(self.led_by(name)) for name in free}
        if leader is None or not any(led.values()):
            return chance.choice(free)
        wanted = [name for name in free if led[name]] if leader else [n for n in free if led[n] == min(led.values())]
        return chance.choice(wanted)

    # who there is

    def _zone(self, name: str) -> str:
        return f"z{int(name[1:]) % self.zones}"

    def zone_of(self, name: str) -> str:
        return self.cluster.zones.get(name, "")

    async def join(self, by: str, replaces: str = "") -> str:
        """Have a blank node join by another one; return its name once it is ready. Raises Failure."""
        self._numbers += 1
        name = f"n{self._numbers}"
        if self.zones:
            self.cluster.zones[name] = self._zone(name)
        member = self.cluster.add(name, by, replaces=replaces)
        if self.proxies is not None:
            await self.proxies.open(name, Address.parse(member.peer_address))
        self.addresses[name] = Address.parse(member.client_address)
        self._locks[name] = asyncio.Lock()
        if self._library:
            self.controls[name] = Control(os.path.join(self.folder, f"{name}.control"))
        async with self._locks[name]:
            self.spawn(name)
            await self.ready(name)
            self.names.append(name)
        for watcher in self.watchers:
            await watcher(name, self.addresses[name])
        return name

    async def part(self, name: str) -> None:
        """Know a node no longer; it is down, and no node of the cluster any more or about to be none."""
        self.names.remove(name)
        self.rotten.discard(name)
        self.cluster.forget(name)
        for watcher in self.watchers:
            await watcher(name, None)
        del self.addresses[name], self._locks[name]

    async def operate(self, what: str, **body: Any) -> Any:
        """Ask any node what operators ask; return its answer, None if nobody does it. Raises nothing."""
        timeout = aiohttp.ClientTimeout(total=OPERATE_S_MAX)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for name in list(self.names):
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
                    url = f"http://{self.addresses[name]}/v2/annulus/nodes/{what}"
                    async with session.post(url, json=body) as response:
                        reply = await response.json()
                        if reply["code"] == 0:
                            return reply["data"]
        return None

    async def asked(self, what: str, **body: Any) -> None:
        """Ask until it is done. Raises Failure."""
        until_s = time.monotonic() + WHOLE_S_MAX * self.patience
        while await self.operate(what, **body) is None:
            if time.monotonic() > until_s:
                raise Failure(f"{what} {body}: refused for {WHOLE_S_MAX * self.patience:.0f} s")
            await asyncio.sleep(0.3)

    async def removed(self, name: str) -> None:
        """Have a node that holds nothing removed; an answer that was lost is no refusal. Raises Failure."""

        async def is_gone() -> bool:
            found = await self.operate("list")
            return found is not None and not is_listed(found, name)

        until_s = time.monotonic() + WHOLE_S_MAX * self.patience
        while await self.operate("remove", nodeName=name) is None and not await is_gone():
            if time.monotonic() > until_s:
                raise Failure(f"remove {name}: refused for {WHOLE_S_MAX * self.patience:.0f} s")
            await asyncio.sleep(0.3)

    async def until(self, what: str, wanted: Callable[[Any], bool], *, within_s: float = 0.0) -> None:
        """Return when the list of nodes is as wanted; it may take as long as healing does. Raises Failure."""
        within_s = within_s or WHOLE_S_MAX * self.patience
        until_s = time.monotonic() + within_s
        while True:
            found = await self.operate("list")
            if found is not None and wanted(found):
                return
            if time.monotonic() > until_s:
                raise Failure(f"{what}: not after {within_s:.0f} s: {found}")
            await asyncio.sleep(0.3)

    async def whole(self) -> None:
        """Return when every shard has all its copies, on nodes that stay, and nothing moves. Raises Failure."""
        await self.until("all copies of all shards", is_whole)

    async def control_leader(self) -> str:
        """Return the name of the node that leads the control group, "" if nobody says so."""
        timeout = aiohttp.ClientTimeout(total=STATUS_S_MAX)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for name in list(self.names):
                status = await self._status(session, name)
                for group in status.get("cluster", {}).get("groups", ()):
                    if group["group"] == "control" and group["leader"] in self.names:
                        return str(group["leader"])
        return ""


def is_whole(found: Any) -> bool:
    """Return whether a list of nodes says that all copies are on nodes that are up and stay, and that nothing moves."""
    nodes = found["nodes"]
    away = [one for one in nodes if one["shards"] and (one["state"] != "active" or not one["isUp"])]
    return not found["moves"] and not away and not any(one["coming"] for one in nodes)


def is_listed(found: Any, name: str) -> bool:
    """Return whether a list of nodes has one of this name."""
    return any(one["name"] == name for one in found["nodes"])
