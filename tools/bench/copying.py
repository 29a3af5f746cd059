"""How fast a replica takes chunks from the others, beside plain reading and writing of the same chunks.

    python3 -m tools.bench.copying [--mib 512] [--sources 2] [--folder annulus-copy]

Sources are processes of their own with LevelDB and the peer network on loopback; the copy is made by the node's own
`ChunkTransfer`. The plain copy reads each chunk with verification and writes it to a second store, 4 MiB a sync.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import socket
import time
from pathlib import Path
from random import Random

import click
import numpy as np
import uvloop

from cluster.tick import HybridClock
from node.calls import Mesh
from node.chunk_pins import ChunkPins
from node.chunk_transfer import ChunkTransfer
from node.clock import SystemClock
from node.metrics import Metrics
from node.peers import PeerNetwork
from node.settings import Address
from node.workers import Workers
from storage.chunks import LevelDbChunks
from storage.segment_files import CHUNK_BYTES, digest_of
from storage.types import ShardId

SHARD = ShardId(0)
WORD = "only for this benchmark"


class Node:
    """What of a node a copy needs."""

    def __init__(self, name: str, addresses: dict[str, Address], folder: str) -> None:
        clock = SystemClock()
        network = PeerNetwork(name, addresses, cluster="copy", listen=addresses[name], secret=WORD, metrics=Metrics())
        self.mesh = Mesh(network, name, HybridClock(clock.wall_ms), clock)
        self.store = LevelDbChunks.open(folder)
        self.workers = Workers()
        pins = ChunkPins(clock)
        self.transfer = ChunkTransfer(
            name, self.mesh, self.store, self.workers, clock, Random(),
            replicas=lambda shard_id: list(addresses), pins=lambda shard_id: pins, on_store_error=lambda error: None,
        )  # fmt: skip

    async def stop(self) -> None:
        await self.mesh.stop()
        await self.workers.close()
        self.store.close()


def serve(name: str, addresses: dict[str, Address], folder: str) -> None:
    """Be a source until killed."""

    async def forever() -> None:
        node = Node(name, addresses, folder)
        await node.mesh.start()
        await asyncio.Event().wait()

    uvloop.run(forever())


def fill(folder: str, chunks: int) -> dict[bytes, int]:
    """Write a store of vectors-like bytes, which do not compress; return digest -> bytes."""
    store = LevelDbChunks.open(folder)
    dice = np.random.default_rng(1)
    made = (dice.standard_normal(CHUNK_BYTES // 4, np.float32).tobytes() for _ in range(chunks))
    sizes: dict[bytes, int] = {}

    def named() -> object:
        for data in made:
            digest = digest_of(data)
            sizes[digest] = len(data)
            yield digest, data

    store.put_many(SHARD, named())  # type: ignore[arg-type]
    store.close()
    return sizes


def copy_plainly(source: str, target: str, sizes: dict[bytes, int]) -> tuple[float, float]:
    """Return (seconds, seconds of CPU) that reading and writing take in one thread."""
    old, new = LevelDbChunks.open(source), LevelDbChunks.open(target)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    new.put_many(SHARD, ((digest, old.get(SHARD, digest)) for digest in sizes))
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    old.close()
    new.close()
    return seconds, cpu_s


async def copy_over_network(
    addresses: dict[str, Address], folder: str, sizes: dict[bytes, int]
) -> tuple[float, float, float]:
    """Return (seconds, seconds of CPU, longest pause of the loop in seconds) at the node that takes."""
    node = Node("n1", addresses, folder)
    await node.mesh.start()
    while not all(node.mesh.is_up(peer) for peer in addresses):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    worst_s = 0.0

    async def watch() -> None:
        nonlocal worst_s
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(0.001)
            worst_s = max(worst_s, time.perf_counter() - before_s - 0.001)

    watching = asyncio.create_task(watch())
    began_s, cpu_s = time.perf_counter(), time.process_time()
    left = await node.transfer.fetch(SHARD, sizes)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    watching.cancel()
    assert not left, f"{len(left)} chunks did not come"
    await node.stop()
    return seconds, cpu_s, worst_s


def free_addresses(count: int) -> dict[str, Address]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = {f"n{i + 1}": Address("127.0.0.1", probe.getsockname()[1]) for i, probe in enumerate(probes)}
    for probe in probes:
        probe.close()
    return found


@click.command()
@click.option("--mib", default=512, help="How much to copy.")
@click.option("--sources", default=2, help="Replicas that have it.")
@click.option("--folder", default="annulus-copy", help="Where the stores are made; emptied before and after.")
def main(mib: int, sources: int, folder: str) -> None:
    """Copy chunks over the network and plainly, and print both rates."""
    root = Path(folder)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    sizes = fill(f"{root}/n2", mib)
    for number in range(3, sources + 2):
        shutil.copytree(root / "n2", root / f"n{number}")
    plain_s, plain_cpu_s = copy_plainly(f"{root}/n2", f"{root}/plain", sizes)
    addresses = free_addresses(sources + 1)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=serve, args=(name, addresses, f"{root}/{name}"), daemon=True)
        for name in addresses
        if name != "n1"
    ]
    for process in processes:
        process.start()
    try:
        seconds, cpu_s, worst_s = uvloop.run(copy_over_network(addresses, f"{root}/n1", sizes))
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(root)
    for what, took_s, used_s in (("plain copy", plain_s, plain_cpu_s), ("over network", seconds, cpu_s)):
        click.echo(f"{what:12} {mib / took_s:8.0f} MiB/s   {1024 * used_s / mib:6.2f} s of CPU for a GiB")
    click.echo(f"ratio of times {seconds / plain_s:.2f}, longest pause of the loop {1000 * worst_s:.0f} ms")


if __name__ == "__main__":
    main()
