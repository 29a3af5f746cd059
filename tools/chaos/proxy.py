"""What stands between two nodes: a TCP proxy for each ordered pair, in a process of its own.

Node a reaches node b only through the proxy (a, b). Bytes from a to b flow through two of them: (a, b) on the
connections that a made, (b, a) on those that b made. A rule is for a *way*, so it holds in both, and a way can be cut
while the other direction flows.

What a node tells the cluster of its own address is the proxy (ANYBODY, b), which refuses all connections but while it
is opened for a node that joins: else whoever is cut off from b would find it there.

A proxy speaks TCP on both sides, so it cannot lose a packet: a cut way holds what it is given, as a network does whose
packets are sent again and again, and lets it go when it heals. What breaks connections is `reset`.

    python -m tools.chaos.proxy ROUTES      ROUTES as JSON: [[from, to, "HOST:PORT"], ...]

It prints one JSON line, the ports it listens on in the same order, and takes one JSON line per change from its input:
`["rule", from, to, {...}]` or `["reset", from, to]`. It ends when its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from tools.bench.loading import REPOSITORY
from tools.bench.wire import Address

READ_BYTES = 1 << 16
UNDER_WAY_READS_MAX = 256
"""Reads that wait on one way of one connection; beyond it the sender feels it."""
Way = tuple[str, str]
ANYBODY = "anybody"
"""Who comes to the address that a node tells the cluster."""


@dataclass(frozen=True)
class Rule:
    """What happens to bytes on a way."""

    cut: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0 is as fast as it goes."""
    refuses: bool = False
    """New connections end at once."""

    def and_also(self, other: Rule) -> Rule:
        """Return what both together do."""
        slowest = [one for one in (self.bytes_per_s, other.bytes_per_s) if one]
        refuses = self.refuses or other.refuses
        return Rule(self.cut or other.cut, self.delay_s + other.delay_s, min(slowest, default=0.0), refuses)


class Proxies:
    """All proxies of a cluster, on the running loop."""

    def __init__(self) -> None:
        self._rules: dict[Way, Rule] = {}
        self._flowing: dict[Way, asyncio.Event] = {}
        self._connections: dict[Way, set[asyncio.StreamWriter]] = {}
        self._servers: list[asyncio.Server] = []

    async def open(self, source: str, target: str, address: Address) -> int:
        """Listen for connections that `source` makes to `target`, and return the port."""
        for way in ((source, target), (target, source)):
            self._flowing.setdefault(way, asyncio.Event()).set()
        self._connections[source, target] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve((source, target), address, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def set_rule(self, source: str, target: str, rule: Rule) -> None:
        """Let the rule hold for bytes from `source` to `target`, those already under way too if it cuts."""
        self._rules[source, target] = rule
        if rule.cut:
            self._flowing[source, target].clear()
        else:
            self._flowing[source, target].set()

    def reset(self, source: str, target: str) -> None:
        """Break all connections that `source` made to `target`; what was under way is lost."""
        for writer in list(self._connections[source, target]):
            raw = writer.get_extra_info("socket")
            if raw is not None and not writer.transport.is_closing():
                with contextlib.suppress(OSError, ValueError):  # it may be closed already
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        """Stop listening and break everything."""
        for server in self._servers:
            server.close()
        for source, target in self._connections:
            self.reset(source, target)

    async def _serve(
        self, way: Way, address: Address, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter
    ) -> None:
        here = self._connections[way]
        here.add(near_out)
        far_out: asyncio.StreamWriter | None = None
        try:
            if self._rule(way).refuses:
                return
            await self._flowing[way].wait()  # a cut way does not connect either
            far_in, far_out = await asyncio.open_connection(address.host, address.port)
            here.add(far_out)
            back = (way[1], way[0])
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(way, near_in, far_out))
                both.create_task(self._pump(back, far_in, near_out))
        except* OSError:
            pass  # the one side is gone, so the other goes below
        finally:
            for writer in (near_out, far_out):
                if writer is not None:
                    here.discard(writer)
                    writer.transport.abort()

    async def _pump(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes until their end; time to arrive passes for all that is under way at once."""
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY_READS_MAX)

        async def take() -> None:
            while True:
                data = await reader.read(READ_BYTES)
                await under_way.put((clock() + self._rule(way).delay_s, data))
                if not data:
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(take())
            while True:
                due_s, data = await under_way.get()
                if (wait_s := due_s - clock()) > 0:
                    await asyncio.sleep(wait_s)
                if limit := self._rule(way).bytes_per_s:
                    await asyncio.sleep(len(data) / limit)
                await self._flowing[way].wait()
                if not data:
                    if not writer.transport.is_closing():
                        writer.write_eof()
                    return
                if writer.transport.is_closing():
                    raise ConnectionResetError("the other side is gone")  # uvloop would raise what is no OSError
                writer.write(data)
                await writer.drain()

    def _rule(self, way: Way) -> Rule:
        return self._rules.get(way, Rule())


class ProxyProcess:
    """The proxies of a cluster in a process of their own, so that a busy tester does not slow the network."""

    def __init__(self, addresses: Mapping[str, Address]) -> None:
        self._pairs = [(a, b) for a in (*addresses, ANYBODY) for b in addresses if a != b]
        self._addresses = addresses
        self._process: asyncio.subprocess.Process | None = None
        self._ports: dict[Way, int] = {}
        self._disturbances: list[tuple[Way, Rule]] = []

    async def start(self) -> None:
        """Return when all proxies listen."""
        routes = [(a, b, str(self._addresses[b])) for a, b in self._pairs]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tools.chaos.proxy", json.dumps(routes),
            cwd=REPOSITORY, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        said = await self._process.stdout.readline()
        self._ports = dict(zip(self._pairs, json.loads(said), strict=True))
        self._set_open(False)

    async def stop(self) -> None:
        """End the process and wait for it."""
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()

    def address(self, source: str, target: str) -> Address:
        """Return where `source` finds `target`."""
        return Address("127.0.0.1", self._ports[source, target])

    def between(self, ways: Sequence[Way]) -> list[Way]:
        """Return those of the ways on which there is a proxy: a node that joined later has none."""
        return [way for way in ways if way in self._ports]

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Let nodes that join connect to any node, until the block is left."""
        self._set_open(True)
        try:
            yield
        finally:
            self._set_open(False)
            self.reset([(ANYBODY, target) for target in self._addresses])

    def _set_open(self, is_open: bool) -> None:
        for target in self._addresses:
            self._send("rule", ANYBODY, target, asdict(Rule(refuses=not is_open)))

    @contextlib.contextmanager
    def disturbed(self, ways: Sequence[Way], rule: Rule) -> Iterator[None]:
        """Let the rule hold on these ways, on top of what others do to them, until the block is left."""
        mine = [(way, rule) for way in ways]
        self._disturbances += mine
        self._tell(ways)
        try:
            yield
        finally:
            for one in mine:
                self._disturbances.remove(one)
            self._tell(ways)

    def reset(self, ways: Sequence[Way]) -> None:
        """Break the connections made along these ways."""
        for way in ways:
            self._send("reset", *way)

    def _tell(self, ways: Sequence[Way]) -> None:
        for way in ways:
            rule = Rule()
            for other, also in self._disturbances:
                rule = rule.and_also(also) if other == way else rule
            self._send("rule", *way, asdict(rule))

    def _send(self, *words: Any) -> None:
        assert self._process is not None and self._process.stdin is not None, "not started"
        if self._process.returncode is not None:
            raise RuntimeError(f"the proxies ended with {self._process.returncode}: what comes after proves nothing")
        self._process.stdin.write(json.dumps(words).encode() + b"\n")


async def run(routes: Sequence[tuple[str, str, str]]) -> None:
    """Serve as told on standard input until it ends."""
    proxies = Proxies()
    ports = [await proxies.open(source, target, Address.parse(address)) for source, target, address in routes]
    print(json.dumps(ports), flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        match json.loads(line):
            case ["rule", source, target, rule]:
                proxies.set_rule(source, target, Rule(**rule))
            case ["reset", source, target]:
                proxies.reset(source, target)
    proxies.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run(json.loads(sys.argv[1])))
