"""Chunks between the replicas of a shard: fetched by digest from whoever has them, served, and shipped.

    chunks/get     "these digests": the bytes of as many as fit a reply, and which of them are not here
    chunks/want    "have these soon, this message will name them": answered when they are all here
    chunks/offers  the messages whose chunks were wanted here, and that may not have been proposed

A fetch gives its work out in batches. Every peer takes the next one when it is done with its last; a batch that a peer
fails, or parts that it lacks, go back to the others. What has arrived is verified against its digest and stored before
more is asked for, so a fetch that is interrupted goes on with what is still missing. Both ends verify: a chunk that is
damaged where it is stored is answered as missing, and repaired there.

Leaders ship chunks before they propose the message that names them, and propose only when a majority has them: then a
committed message names nothing that the loss of one node could take away. The message travels along: if its leader dies
before it proposes it, the next one asks around and proposes it, rather than doing the work again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeGuard

import cbor2

from node.chunk_pins import MESSAGE_S, ChunkPins
from node.clock import Clock
from node.metrics import Metrics
from node.network import Blob, Link
from node.workers import Executor, Lane
from storage.chunks import ChunkFault, ChunkStore
from storage.errors import AnnulusError, InvalidParameter, PeerUnreachable, Unavailable
from storage.segment_files import DIGEST_BYTES, digest_of
from storage.types import ShardId

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 4 << 20
"""Asked for with one call: large enough that the way there and back does not count, small enough to give back."""
BATCH_CHUNKS_MAX: Final = 4096
CALLS_PER_PEER: Final = 2
"""One is on the way while the other is verified and stored."""
CALL_S: Final = 30.0
FAILURES_MAX: Final = 3
"""In a row, after which a peer gets nothing more of this fetch."""
FAILURE_PAUSE_S: Final = 0.2
SHIP_S: Final = 30.0
"""How long a leader waits for replicas, beside the time that the bytes themselves take."""
SHIP_BYTES_PER_S: Final = 10 << 20
"""The slowest replica that a leader waits for."""
OFFERS_MAX: Final = 64
"""Of a shard. There are seldom more than two under way."""
OFFERS_S: Final = 2.0
"""How long a new leader waits for what others know of its predecessor's work."""


class Calls(Protocol):
    """What is needed of `node.calls.Mesh`."""

    def serve(self, method: str, handler: Any) -> None: ...

    async def call(
        self,
        peer: str,
        method: str,
        arguments: Mapping[str, Any],
        blobs: Sequence[Blob] = (),
        *,
        timeout_s: float,
        link: Link = Link.SMALL,
    ) -> tuple[dict[str, Any], Sequence[memoryview]]: ...


class Dice(Protocol):
    """The part of random.Random that jitter needs."""

    def random(self) -> float: ...


@dataclass(eq=False)
class Progress:
    """How far a fetch has come."""

    shard_id: ShardId
    bytes_total: int = 0
    bytes_done: int = 0
    chunks_total: int = 0
    chunks_done: int = 0
    bytes_by_peer: dict[str, int] = field(default_factory=dict)
    nowhere: list[bytes] = field(default_factory=list)
    """What every other replica said that it lacks."""
    not_found: list[bytes] = field(default_factory=list)
    """What every other replica that answered said that it lacks; nothing if none did."""


class TokenBucket:
    """Lets so many bytes a second pass, on average, and a second's worth at once. 0: as many as come."""

    def __init__(self, clock: Clock, bytes_per_s: int) -> None:
        self._clock = clock
        self.bytes_per_s = bytes_per_s
        self._free_at_s = clock.monotonic_s()

    async def take(self, count: int) -> None:
        """Return when this many bytes may pass; those who asked before are served before."""
        if not self.bytes_per_s:
            return
        now_s = self._clock.monotonic_s()
        self._free_at_s = max(self._free_at_s, now_s - 1.0) + count / self.bytes_per_s
        if self._free_at_s > now_s:
            await asyncio.sleep(self._free_at_s - now_s)


class ChunkTransfer:
    """All fetching, serving and shipping of chunks on one node. Belongs to the loop."""

    def __init__(
        self,
        me: str,
        mesh: Calls,
        store: ChunkStore,
        executor: Executor,
        clock: Clock,
        dice: Dice,
        *,
        replicas: Callable[[ShardId], Sequence[str]],
        pins: Callable[[ShardId], ChunkPins | None],
        bytes_per_s: int = 0,
        on_store_error: Callable[[OSError], None],
        metrics: Metrics | None = None,
    ) -> None:
        """Answer calls of other nodes from now on.

        replicas        names of the nodes that hold a shard, this one among them; none for an unknown shard
        pins            the leases on a shard's chunks here; None before this node has opened the shard
        bytes_per_s     what this node fetches at most; 0 for no limit
        on_store_error  told of a failed write, such as a full disk
        """
        self._me = me
        self._mesh = mesh
        self._store = store
        self._executor = executor
        self._clock = clock
        self._dice = dice
        self._replicas = replicas
        self._pins = pins
        self._bucket = TokenBucket(clock, bytes_per_s)
        self._on_store_error = on_store_error
        self._metrics = metrics or Metrics()
        self._repairs: dict[tuple[ShardId, bytes], asyncio.Task[bool]] = {}
        self.under_way: list[Progress] = []
        self.bytes_fetched = 0
        self.bytes_served = 0
        self.chunks_repaired = 0
        self._offers: dict[ShardId, OrderedDict[bytes, float]] = {}
        """Messages that came with chunks, and when they are forgotten."""
        mesh.serve("chunks/get", self._serve_get)
        mesh.serve("chunks/want", self._serve_want)
        mesh.serve("chunks/offers", self._serve_offers)

    def peers(self, shard_id: ShardId) -> list[str]:
        """Return the other nodes that hold the shard."""
        return [name for name in self._replicas(shard_id) if name != self._me]

    @property
    def bytes_left(self) -> int:
        """What the fetches under way have yet to bring."""
        return sum(one.bytes_total - one.bytes_done for one in self.under_way)

    async def close(self) -> None:
        """End what runs in the background."""
        for task in self._repairs.values():
            task.cancel()
        await asyncio.gather(*self._repairs.values(), return_exceptions=True)

    # fetching

    async def fetch(
        self, shard_id: ShardId, wanted: Mapping[bytes, int], *, progress: Progress | None = None
    ) -> list[bytes]:
        """Bring chunks (digest -> bytes) that are missing here; return those that no peer gave.

        Raises OSError if they cannot be stored. What has come so far stays, whatever happens.
        """
        missing = await self._executor.run(Lane.DISK, self._store.missing, shard_id, list(wanted))
        if not missing:
            return []
        progress = progress or Progress(shard_id)
        progress.chunks_total += len(missing)
        progress.bytes_total += sum(wanted[one] for one in missing)
        pool = _Pool({one: wanted[one] for one in missing})
        loop = asyncio.get_running_loop()
        workers = [
            loop.create_task(self._fetch_from(peer, shard_id, pool, progress))
            for peer in self._shuffled(self.peers(shard_id))
            for _ in range(CALLS_PER_PEER)
        ]
        self.under_way.append(progress)
        try:
            await asyncio.gather(*workers)
        finally:
            self.under_way.remove(progress)
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        progress.nowhere = pool.lacked_by(self.peers(shard_id))
        progress.not_found = pool.lacked_by(pool.heard) if pool.heard else []
        return list(pool.left)

    async def _fetch_from(self, peer: str, shard_id: ShardId, pool: _Pool, progress: Progress) -> None:
        """Fetch batch after batch from one peer, until nothing is left that it might have, or it fails too often."""
        failures = 0
        while failures < FAILURES_MAX and (batch := await pool.take(peer)):
            stored: list[bytes] = []
            try:
                await self._bucket.take(sum(batch.values()))
                stored = await self._fetch_batch(peer, shard_id, batch, pool)
                failures = 0
            except AnnulusError as error:
                failures += 1
                level = logging.DEBUG if isinstance(error, PeerUnreachable) else logging.INFO  # no session: told once
                log.log(level, "fetch fails shard=%d peer=%s failures=%d: %s", shard_id, peer, failures, error)
            finally:
                stored_bytes = sum(batch.pop(digest) for digest in stored)
                pool.give_back(batch)
            progress.chunks_done += len(stored)
            progress.bytes_done += stored_bytes
            progress.bytes_by_peer[peer] = progress.bytes_by_peer.get(peer, 0) + stored_bytes
            self.bytes_fetched += stored_bytes
            self._metrics.chunks_fetched(stored_bytes)
            if failures:
                await asyncio.sleep(FAILURE_PAUSE_S * failures * (1 + self._dice.random()))

    async def _fetch_batch(self, peer: str, shard_id: ShardId, batch: Mapping[bytes, int], pool: _Pool) -> list[bytes]:
        """Return which chunks of the batch are stored now; the pool is told what the peer lacks."""
        answer, blobs = await self._mesh.call(
            peer, "chunks/get", {"shard": shard_id, "digests": list(batch)}, timeout_s=CALL_S, link=Link.BULK
        )
        sent, lacking = _parse_sent(peer, batch, answer, blobs)
        damaged = await self._store_verified(shard_id, sent)
        if damaged:
            log.warning(
                "chunks came damaged shard=%d peer=%s chunks=%d first=%s",
                shard_id, peer, len(damaged), damaged[0].hex(),
            )  # fmt: skip
        pool.lacks(peer, [*lacking, *damaged])
        return [digest for digest, _ in sent if digest not in damaged]

    async def _store_verified(self, shard_id: ShardId, sent: Sequence[tuple[bytes, memoryview]]) -> list[bytes]:
        """Store what is what its digest says; return the digests of what is not. Raises OSError."""
        try:
            return await self._executor.run(Lane.DISK, self._put_verified, shard_id, sent)
        except OSError as error:
            self._on_store_error(error)
            raise

    def _put_verified(self, shard_id: ShardId, sent: Sequence[tuple[bytes, memoryview]]) -> list[bytes]:
        damaged: list[bytes] = []

        def whole() -> Iterable[tuple[bytes, bytes]]:
            for digest, data in sent:
                if digest_of(data) == digest:
                    yield digest, bytes(data)
                else:
                    damaged.append(digest)

        self._store.put_many(shard_id, whole())
        return damaged

    def _shuffled(self, names: Sequence[str]) -> list[str]:
        return sorted(names, key=lambda _: self._dice.random())

    # repairing

    async def repair(self, shard_id: ShardId, digest: bytes) -> bool:
        """Replace a chunk that is damaged or missing here by a peer's; return whether that was done."""
        return await asyncio.shield(self._begin_repair(shard_id, digest))

    def _begin_repair(self, shard_id: ShardId, digest: bytes) -> asyncio.Task[bool]:
        key = (shard_id, digest)
        task = self._repairs.get(key)
        if task is None:
            task = self._repairs[key] = asyncio.get_running_loop().create_task(self._repair(shard_id, digest))
            task.add_done_callback(lambda _: self._repairs.pop(key, None))
        return task

    async def _repair(self, shard_id: ShardId, digest: bytes) -> bool:
        pins = self._pins(shard_id)
        # Nobody may need it any more by the time that it is here: kept by a lease, it is then garbage like any other.
        lease_id = None if pins is None else await pins.keep([digest], MESSAGE_S)
        try:
            return await self._repair_from_any(shard_id, digest)
        finally:
            if pins is not None and lease_id is not None:
                pins.renew(lease_id, 0.0)

    async def _repair_from_any(self, shard_id: ShardId, digest: bytes) -> bool:
        for peer in self._shuffled(self.peers(shard_id)):
            try:
                answer, blobs = await self._mesh.call(
                    peer, "chunks/get", {"shard": shard_id, "digests": [digest]}, timeout_s=CALL_S, link=Link.BULK
                )
                sent, _ = _parse_sent(peer, {digest: 0}, answer, blobs)
                if not sent or await self._store_verified(shard_id, sent):
                    continue
            except (AnnulusError, OSError) as error:
                log.info("repair fails shard=%d peer=%s digest=%s: %s", shard_id, peer, digest.hex(), error)
                continue
            self.chunks_repaired += 1
            self._metrics.chunk_repaired()
            log.warning("chunk repaired shard=%d digest=%s peer=%s", shard_id, digest.hex(), peer)
            return True
        return False

    # shipping

    async def ship(self, shard_id: ShardId, chunks: Mapping[bytes, int], offer: bytes = b"") -> None:
        """Return when the other replicas have the chunks (digest -> bytes), or the slow ones have had their time.

        `offer` is the message that is going to name them, for a leader that may have to propose it instead.

        Raises Unavailable if fewer than a majority, this node among it, have them then: do not propose.
        """
        peers = self.peers(shard_id)
        if not peers or not chunks:
            return
        rate = min(self._bucket.bytes_per_s or SHIP_BYTES_PER_S, SHIP_BYTES_PER_S)
        timeout_s = SHIP_S + sum(chunks.values()) / rate
        blob = cbor2.dumps([[digest, size] for digest, size in chunks.items()])
        self._note_offer(shard_id, offer)
        results = await asyncio.gather(
            *(
                self._mesh.call(
                    peer, "chunks/want", {"shard": shard_id}, [blob, offer], timeout_s=timeout_s, link=Link.BULK
                )
                for peer in peers
            ),
            return_exceptions=True,
        )  # fmt: skip
        failures = {peer: one for peer, one in zip(peers, results, strict=True) if isinstance(one, BaseException)}
        for peer, error in failures.items():
            if not isinstance(error, AnnulusError):
                raise error
            level = logging.DEBUG if isinstance(error, PeerUnreachable) else logging.INFO
            log.log(level, "replica left behind shard=%d peer=%s: %s", shard_id, peer, error)
        if 2 * (1 + len(peers) - len(failures)) <= 1 + len(peers):
            raise Unavailable(
                f"the chunks of shard {shard_id} are on {1 + len(peers) - len(failures)} of {1 + len(peers)} replicas, "
                "too few to propose what names them"
            )

    async def offers(self, shard_id: ShardId) -> list[bytes]:
        """Return the messages that this node and the other replicas know chunks to be there for, each once."""
        found = self._known_offers(shard_id)
        calls = (
            self._mesh.call(peer, "chunks/offers", {"shard": shard_id}, timeout_s=OFFERS_S, link=Link.BULK)
            for peer in self.peers(shard_id)
        )
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, tuple):
                found += [bytes(one) for one in answer[1]]
            elif not isinstance(answer, AnnulusError):
                raise answer
        return list(dict.fromkeys(found))

    def _note_offer(self, shard_id: ShardId, offer: bytes) -> None:
        if offer:
            kept = self._offers.setdefault(shard_id, OrderedDict())
            kept[offer] = self._clock.monotonic_s() + MESSAGE_S
            while len(kept) > OFFERS_MAX:
                kept.popitem(last=False)

    def _known_offers(self, shard_id: ShardId) -> list[bytes]:
        """Return those whose chunks are still kept for them."""
        kept, now_s = self._offers.get(shard_id, OrderedDict()), self._clock.monotonic_s()
        for offer in [one for one, until_s in kept.items() if until_s < now_s]:
            del kept[offer]
        return list(kept)

    # serving

    async def _serve_offers(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        return {}, self._known_offers(self._known_shard(arguments))

    async def _serve_get(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        shard_id = self._known_shard(arguments)
        digests = arguments.get("digests")
        if not _are_digests(digests):
            raise InvalidParameter(f"chunks/get wants a list of at most {BATCH_CHUNKS_MAX} digests")
        found, faults = await self._executor.run(Lane.DISK, self._read, shard_id, digests)
        for fault in faults:
            if not fault.is_missing:
                log.error("chunk not served shard=%d peer=%s: %s", shard_id, peer, fault)
                self._begin_repair(shard_id, fault.digest)
        sent = [data for _, data in found]
        self.bytes_served += sum(map(len, sent))
        self._metrics.chunks_served(sum(map(len, sent)))
        return {"sent": [digest for digest, _ in found], "missing": [fault.digest for fault in faults]}, sent

    def _read(self, shard_id: ShardId, digests: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], list[ChunkFault]]:
        """Return the chunks, up to what fits a reply, and those that are missing or damaged."""
        found: list[tuple[bytes, bytes]] = []
        faults: list[ChunkFault] = []
        room = BATCH_BYTES
        for digest in digests:
            try:
                data = self._store.get(shard_id, digest)
            except ChunkFault as fault:
                faults.append(fault)
                continue
            if found and len(data) > room:
                break
            found.append((digest, data))
            room -= len(data)
        return found, faults

    async def _serve_want(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        shard_id = self._known_shard(arguments)
        wanted = _parse_wanted(blobs[:1])
        pins = self._pins(shard_id)
        if pins is None:
            raise Unavailable(f"node {self._me} is starting")
        lease_id = await pins.keep(wanted, MESSAGE_S)
        try:
            left = await self.fetch(shard_id, wanted)
        except OSError as error:
            raise Unavailable(f"node {self._me} cannot store chunks: {error.strerror}") from error
        if left:
            raise Unavailable(f"node {self._me} found {len(left)} of {len(wanted)} chunks of shard {shard_id} nowhere")
        pins.renew(lease_id, MESSAGE_S)
        if len(blobs) > 1:
            self._note_offer(shard_id, bytes(blobs[1]))
        return {}, ()

    def _known_shard(self, arguments: Mapping[str, Any]) -> ShardId:
        shard_id = arguments.get("shard")
        if type(shard_id) is not int or self._me not in self._replicas(ShardId(shard_id)):
            raise InvalidParameter(f"node {self._me} does not hold shard {shard_id!r}")
        return ShardId(shard_id)


class _Pool:
    """The chunks of one fetch that nobody is fetching just now, and which of them who lacks."""

    def __init__(self, wanted: dict[bytes, int]) -> None:
        self.left = wanted
        self._lacking: dict[str, set[bytes]] = {}
        self._batches_out = 0
        self._given_back = asyncio.Event()

    async def take(self, peer: str) -> dict[bytes, int]:
        """Return a batch of what the peer may have; empty once there will be no more for it."""
        while not (batch := self._batch(peer)) and self._batches_out:
            await self._given_back.wait()
        self._batches_out += bool(batch)
        return batch

    def _batch(self, peer: str) -> dict[bytes, int]:
        lacking = self._lacking.get(peer, ())
        batch: dict[bytes, int] = {}
        room = BATCH_BYTES
        for digest, size in self.left.items():
            if digest in lacking:
                continue
            if batch and (size > room or len(batch) == BATCH_CHUNKS_MAX):
                break
            batch[digest] = size
            room -= size
        for digest in batch:
            del self.left[digest]
        return batch

    def give_back(self, rest: Mapping[bytes, int]) -> None:
        """A batch was tried, and this of it is still to be fetched."""
        self.left.update(rest)
        self._batches_out -= 1
        self._given_back.set()
        self._given_back = asyncio.Event()

    def lacks(self, peer: str, digests: Iterable[bytes]) -> None:
        self._lacking.setdefault(peer, set()).update(digests)

    @property
    def heard(self) -> list[str]:
        """Who has said what it lacks."""
        return list(self._lacking)

    def lacked_by(self, peers: Sequence[str]) -> list[bytes]:
        """Return what is left that each of these lacks."""
        return [digest for digest in self.left if all(digest in self._lacking.get(peer, ()) for peer in peers)]


def _are_digests(value: Any) -> TypeGuard[list[bytes]]:
    return (
        isinstance(value, list)
        and len(value) <= BATCH_CHUNKS_MAX
        and all(isinstance(one, bytes) and len(one) == DIGEST_BYTES for one in value)
    )


def _parse_sent(
    peer: str, asked: Mapping[bytes, int], answer: Mapping[str, Any], blobs: Sequence[memoryview]
) -> tuple[list[tuple[bytes, memoryview]], list[bytes]]:
    """Return (digest, bytes) of what was sent and the digests that the peer lacks. Raises Unavailable."""
    sent, lacking = answer.get("sent"), answer.get("missing")
    if not _are_digests(sent) or not _are_digests(lacking) or len(sent) != len(blobs):
        raise Unavailable(f"node {peer} answers chunks/get with something else than chunks")
    if not (sent or lacking) or not asked.keys() >= {*sent, *lacking} or len({*sent}) < len(sent):
        raise Unavailable(f"node {peer} answers chunks/get with other chunks than those asked for")
    return list(zip(sent, blobs, strict=True)), lacking


def _parse_wanted(blobs: Sequence[memoryview]) -> dict[bytes, int]:
    """Return digest -> bytes. Raises InvalidParameter."""
    try:
        (blob,) = blobs
        wanted: dict[bytes, int] = dict(cbor2.loads(bytes(blob)))
        if all(isinstance(one, bytes) and len(one) == DIGEST_BYTES for one in wanted) and all(
            type(size) is int and size >= 0 for size in wanted.values()
        ):
            return wanted
    except (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError, OverflowError, MemoryError):
        pass
    raise InvalidParameter("chunks/want wants a list of digests with their sizes")
