"""What stands between nodes: a TCP proxy in front of each, in a process of its own.

The proxy of node b is the address of b that all others know, also those that join later. Who connects says so in the
first bytes, so the proxy knows which *way* bytes go: from a to b on the connections that a made to b's proxy, and on
those that b made to a's. A rule is for a way, so it holds on both, and a way can be cut while the other direction
flows.

A proxy speaks TCP on both sides, so it cannot lose a packet: a cut way holds what it is given, as a network does whose
packets are sent again and again, and lets it go when it heals. What breaks connections is `reset`.

    python -m tools.chaos.proxy

It takes one JSON line per change from its input: `["open", to, "HOST:PORT"]`, to which it answers with a line that says
on which port the proxy listens, `["rule", from, to, {...}]` or `["reset", from, to]`. It ends when its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from node.handshake import HELLO_BYTES, Refused, dialer_of
from tools.bench.loading import REPOSITORY
from tools.bench.wire import Address

READ_BYTES = 1 << 16
UNDER_WAY_READS_MAX = 256
"""Reads that wait on one way of one connection; beyond it the sender feels it."""
Way = tuple[str, str]


@dataclass(frozen=True)
class Rule:
    """What happens to bytes on a way."""

    cut: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0 is as fast as it goes."""

    def and_also(self, other: Rule) -> Rule:
        """Return what both together do."""
        slowest = [one for one in (self.bytes_per_s, other.bytes_per_s) if one]
        return Rule(self.cut or other.cut, self.delay_s + other.delay_s, min(slowest, default=0.0))


class Proxies:
    """All proxies of a cluster, on the running loop."""

    def __init__(self) -> None:
        self._rules: defaultdict[Way, Rule] = defaultdict(Rule)
        self._flowing: defaultdict[Way, asyncio.Event] = defaultdict(_set)
        self._connections: defaultdict[Way, set[asyncio.StreamWriter]] = defaultdict(set)
        self._servers: list[asyncio.Server] = []

    async def open(self, target: str, address: Address) -> int:
        """Listen for connections to `target`, and return the port."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                hello = await reader.readexactly(HELLO_BYTES)
                source = dialer_of(hello)
            except (asyncio.IncompleteReadError, OSError, Refused):
                writer.transport.abort()
                return
            await self._serve((source, target), address, hello, reader, writer)

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
        self, way: Way, address: Address, hello: bytes, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter
    ) -> None:
        here = self._connections[way]
        here.add(near_out)
        far_out: asyncio.StreamWriter | None = None
        try:
            await self._flowing[way].wait()  # a cut way does not connect either
            far_in, far_out = await asyncio.open_connection(address.host, address.port)
            here.add(far_out)
            far_out.write(hello)
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
                await under_way.put((clock() + self._rules[way].delay_s, data))
                if not data:
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(take())
            while True:
                due_s, data = await under_way.get()
                if (wait_s := due_s - clock()) > 0:
                    await asyncio.sleep(wait_s)
                if limit := self._rules[way].bytes_per_s:
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


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


class ProxyProcess:
    """The proxies of a cluster in a process of their own, so that a busy tester does not slow the network."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._addresses: dict[str, Address] = {}
        self._disturbances: list[tuple[Way, Rule]] = []

    async def start(self) -> None:
        """Start the process; no node has a proxy yet."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tools.chaos.proxy",
            cwd=REPOSITORY, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def open(self, target: str, address: Address) -> None:
        """Return when the proxy of a node listens."""
        self._send("open", target, str(address))
        assert self._process is not None and self._process.stdout is not None
        self._addresses[target] = Address("127.0.0.1", int(await self._process.stdout.readline()))

    async def stop(self) -> None:
        """End the process and wait for it."""
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()

    def address(self, target: str) -> Address:
        """Return where others find a node."""
        return self._addresses[target]

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


async def run() -> None:
    """Serve as told on standard input until it ends."""
    proxies = Proxies()
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        match json.loads(line):
            case ["open", target, address]:
                print(await proxies.open(target, Address.parse(address)), flush=True)
            case ["rule", source, target, rule]:
                proxies.set_rule(source, target, Rule(**rule))
            case ["reset", source, target]:
                proxies.reset(source, target)
    proxies.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run())
