"""Nodes that call each other without a network, and what the wire may do to a call; for tests of what is said."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import cbor2

from node.chunk_pins import ChunkPins
from node.chunk_transfer import ChunkTransfer
from node.network import Blob, Link
from storage.chunks import ChunkStore
from storage.errors import PeerUnreachable
from storage.types import ShardId
from tests.sim.chunks import SimChunks
from tests.sim.world import SimClock, SimExecutor, SimLoop, run

Answer = tuple[dict[str, Any], Sequence[memoryview]]
Fault = Callable[[str, str, str, Answer], Awaitable[Answer]]
"""`await fault(caller, callee, method, answer)` returns the answer as it arrives, or raises."""


async def no_fault(caller: str, callee: str, method: str, answer: Answer) -> Answer:
    return answer


@contextmanager
def simulated() -> Iterator[SimLoop]:
    """Give a loop whose time is virtual; at the end, what still runs on it is cancelled."""
    loop = SimLoop()
    try:
        yield loop
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            run(loop, _ended(tasks))
    finally:
        loop.close()


async def _ended(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


class Wire:
    """Who is connected with whom: everybody with everybody that is not `down`."""

    def __init__(self) -> None:
        self.nodes: dict[str, WiredMesh] = {}
        self.down: set[str] = set()
        self.fault: Fault = no_fault
        self.calls: Counter[tuple[str, str, str]] = Counter()
        """(caller, callee, method) -> how often."""


class WiredMesh:
    """What `node.calls.Mesh` is to the rest of a node."""

    def __init__(self, me: str, wire: Wire) -> None:
        self.me, self._wire = me, wire
        self._handlers: dict[str, Any] = {}
        wire.nodes[me] = self

    def serve(self, method: str, handler: Any) -> None:
        self._handlers[method] = handler

    async def call(
        self,
        peer: str,
        method: str,
        arguments: Mapping[str, Any],
        blobs: Sequence[Blob] = (),
        *,
        timeout_s: float,
        link: Link = Link.SMALL,
    ) -> Answer:
        wire = self._wire
        wire.calls[self.me, peer, method] += 1
        await asyncio.sleep(0.001)
        if {self.me, peer} & wire.down or peer not in wire.nodes:
            raise PeerUnreachable(f"{peer} is down")
        try:
            async with asyncio.timeout(timeout_s):
                sent = [memoryview(bytes(one)) for one in blobs]
                handler = wire.nodes[peer]._handlers[method]
                answer, back = await handler(self.me, cbor2.loads(cbor2.dumps(dict(arguments))), sent)
                arrived = (cbor2.loads(cbor2.dumps(dict(answer))), [memoryview(bytes(one)) for one in back])
                return await wire.fault(self.me, peer, method, arrived)
        except TimeoutError as error:
            raise PeerUnreachable(f"{peer} takes too long") from error


class WiredNode:
    """A node as far as chunks go: store, leases, transfer."""

    def __init__(
        self,
        name: str,
        wire: Wire,
        loop: SimLoop,
        replicas: Sequence[str],
        *,
        store: SimChunks | None = None,
        bytes_per_s: int = 0,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.clock = SimClock(loop)
        self.dice = Random(f"{name}{seed}")
        self.executor = SimExecutor(Random(f"{name}{seed} threads"))
        self.store = store or SimChunks(Random(seed))
        self.mesh = WiredMesh(name, wire)
        self.pins = ChunkPins(self.clock)
        self.store_errors: list[OSError] = []
        self.transfer = ChunkTransfer(
            name,
            self.mesh,
            self.store,
            self.executor,
            self.clock,
            self.dice,
            replicas=lambda shard_id: replicas,
            pins=lambda shard_id: self.pins,
            bytes_per_s=bytes_per_s,
            on_store_error=self.store_errors.append,
        )


def held(store: ChunkStore, shard_id: ShardId) -> set[bytes]:
    """Return the digests of the chunks that are there, having read each."""
    found = store.chunk_digests(shard_id)
    for digest in found:
        store.get(shard_id, digest)
    return set(found)
