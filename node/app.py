"""The process around a node: seams of the real world, signals, and the HTTP server in front.

start   directories -> chunk store (refused if another process has it) -> node (journal, replay) -> HTTP
stop    SIGTERM or SIGINT: no new connections, running requests finish, checkpoint, everything closed; a second
        signal changes nothing
failure the node cannot trust its disk: the process ends at once, without pretending to be well; a node with peers may
        be told to set aside what is damaged, and take everything from them (`node/repair.py`)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from functools import partial
from importlib import import_module
from typing import Any, Final

import uvloop

from node.admission import Memory
from node.chunk_gate import GatedChunks
from node.client_tls import ClientTls
from node.clock import SystemClock
from node.cluster_status import ReplicaRole, role_of
from node.descriptors import raise_descriptor_limit
from node.disk import OsDisk
from node.identity import IDENTITY_KEY, settle
from node.joining import CannotJoin, admit, join
from node.memory import available_bytes, reclaim, resident_bytes
from node.metrics import Metrics
from node.node import Node, Seams
from node.peers import PeerNetwork
from node.repair import DAMAGE, advice, set_aside
from node.settings import Settings
from node.watchdog import Watchdog
from node.workers import Lane, Workers
from storage.chunks import ChunkStore, LevelDbChunks
from storage.filter import make_ready
from storage.keys import record_key
from storage.strings import forgo_pandas

log = logging.getLogger(__name__)

EXIT_FAILED: Final = 70
TICKET_KEY: Final = record_key("ticket")
"""Written before a directory asks to join (`node/joining.py`)."""
START_BYTES_MIN: Final = 64 << 20
"""Room that is enough to start: LevelDB writes out its log of up to twice 16 MiB, and the journal goes on."""
SWITCH_INTERVAL_S: Final = 0.001
"""How long a thread that wants the interpreter waits at most: the default of 5 ms is several searches' time, and each
hand-over costs tens of microseconds. With 0.2 ms inserts of JSON beside searches were a fifth slower, nobody faster."""


def run(settings: Settings) -> int:
    """Serve until told to stop; return the exit status. Raises StorageFault or OSError if the node cannot start."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    forgo_pandas()
    raise_descriptor_limit()  # before LevelDB looks at it
    try:
        return uvloop.run(_serve(settings))
    except DAMAGE as error:
        if not settings.cluster.repair_from_peers:
            error.args = (error.message + advice(settings),)
            raise
        log.error("data damaged: %s", error.message)
    set_aside(settings)
    return uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for warning in settings.warnings:
        log.warning("%s", warning)
    async with contextlib.AsyncExitStack() as ending:
        clock, metrics, disk = SystemClock(), Metrics(), OsDisk()
        listener = ending.enter_context(_bind(settings))  # first: a port in use is the commonest reason not to start
        network = None
        if settings.node.is_clustered:
            network = PeerNetwork.from_settings(settings, metrics, cluster_id=lambda: node.identity.cluster_id)
            network.bind()
            ending.push_async_callback(network.stop)
        data = settings.node.data
        with _plain_words(data):
            disk.make_directory(f"{data}/journal")
            store = GatedChunks(LevelDbChunks.open(f"{data}/chunks"))
        ending.callback(store.close)
        workers = Workers(
            disk_threads=settings.workers.disk_threads,
            search_threads=settings.workers.search_threads,
            build_threads=settings.workers.build_threads,
            build_nice=settings.workers.build_nice,
        )
        ending.push_async_callback(workers.close)
        tls = ClientTls.from_settings(settings.api, clock, workers)
        if tls is not None:
            loop.add_signal_handler(signal.SIGHUP, tls.look_again)
            following = loop.create_task(tls.keep())
            ending.callback(following.cancel)
        if settings.node.is_clustered and not settings.node.has_peers:
            await _belong(settings, store)  # after all that may be wrong with this node alone
        # While the data is read, which takes other threads.
        front = loop.create_task(workers.run(Lane.PARSE, import_module, "node.front"))
        filters = loop.create_task(workers.run(Lane.PARSE, make_ready))
        dice = random.Random(int.from_bytes(os.urandom(16)))
        memory = Memory(available_bytes(), resident_bytes)
        seams = Seams(
            disk, store, workers, clock, dice, network, reclaim=lambda: reclaim(f"{data}/chunks"), memory=memory
        )
        node = Node(settings, seams, metrics)
        if network is not None:
            network.on_guest = partial(admit, node)
        watchdog = Watchdog(
            threshold_s=settings.log.loop_stall_ms / 1000, report=lambda stall: metrics.loop_stalled(stall.length_s)
        )
        watchdog.start()
        ending.callback(watchdog.stop)
        stopping: asyncio.Future[Any] = loop.create_task(stop.wait())
        with _plain_words(data):
            if not await _unless_stopped(node.start(), stopping):
                log.info("stopped while starting; the next start begins with the same data")
                return 0
        await asyncio.gather(front, filters)
        from node.front import listen

        metrics.before_scrape(lambda: observe(node, metrics))
        gc.freeze()  # what is here stays; collections need not look at it again
        runner, grpc = await listen(listener, node, settings, metrics, clock, workers, tls)
        both: set[asyncio.Future[Any]] = {stopping, node.failed}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if node.failed.done():
            logging.shutdown()
            os._exit(EXIT_FAILED)  # nothing may run that would look like a proper end, no checkpoint least of all
        log.info("stopping")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(runner.cleanup(), grpc.stop()), settings.api.drain_s_max + 1)
        await node.stop()
    log.info("stopped")
    return 0


async def _belong(settings: Settings, store: ChunkStore) -> None:
    """Return when the directory is that of a node of a cluster: of one that it joins, if it is new."""
    node = settings.node
    raw = store.read(IDENTITY_KEY)
    if raw is not None:
        settle(raw, node)
        return
    if node.join is None:
        raise CannotJoin(
            f"the data directory {node.data} is new: say by which node of a cluster to join it, with --join, or with "
            "--peers which nodes form one"
        )
    ticket = store.read(TICKET_KEY) or os.urandom(16).hex().encode()
    store.commit([(TICKET_KEY, ticket)])
    identity = await join(settings, ticket.decode())
    store.commit([(IDENTITY_KEY, identity.to_bytes())], [TICKET_KEY])


async def _unless_stopped(starting: Coroutine[Any, Any, None], stopping: asyncio.Future[Any]) -> bool:
    """Start, or give up when told to stop: nothing was promised yet, so there is nothing to save."""
    task = asyncio.get_running_loop().create_task(starting)
    both: set[asyncio.Future[Any]] = {task, stopping}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        return False
    task.result()
    return True


@contextlib.contextmanager
def _plain_words(data: str) -> Iterator[None]:
    """Say what to do when the disk is full: opening LevelDB writes out its log, and without room it cannot."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of {data} is full ({error.strerror}): free at least {START_BYTES_MIN >> 20} MiB there, outside "
            "the data directory, then start again; nothing that was answered is lost"
        ) from error


def _bind(settings: Settings) -> socket.socket:
    """Return a socket bound to the client address, not listening yet. Raises OSError in words for a person."""
    address = settings.node.listen
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{address}: {reason}; stop what uses it, or give another --listen") from error
    return listener


def observe(node: Node, metrics: Metrics) -> None:
    """Set the gauges that show the state of the node."""
    counts = {state: [0, 0, 0] for state in ("growing", "sealed", "flushed", "indexed")}
    index_bytes = 0
    for shard_id, host in node.shards.items():
        metrics.journal_position(shard_id, host.machine.position)
        for state in host.machine.collections.values():
            for growing in state.growing.values():
                _add(counts["growing"], growing.rows, growing.nbytes)
            for stored in state.stored.values():
                name = "indexed" if stored.indexes else "flushed" if stored.is_flushed else "sealed"
                _add(counts[name], stored.segment.rows, stored.segment.nbytes)
                index_bytes += sum(one.memory_bytes for one in stored.segment.indexes.values())
    roles = [role_of(host) for host in node.hosts]
    for role in ReplicaRole:
        metrics.replicas(role, roles.count(role))
    for name, (segments, rows, nbytes) in counts.items():
        metrics.segments(name, segments=segments, rows=rows, bytes=nbytes)
    metrics.index_bytes(index_bytes)
    metrics.journal_bytes(node.journal.bytes_on_disk)
    node.admission.observe()
    if node.transfer is not None:
        metrics.chunk_bytes_left(node.transfer.bytes_left)
    for lane in Lane:
        metrics.worker_calls(lane, node.seams.executor.pending(lane))


def _add(count: list[int], rows: int, nbytes: int) -> None:
    count[0] += 1
    count[1] += rows
    count[2] += nbytes
