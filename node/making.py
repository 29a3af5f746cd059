"""How a leader makes something for all replicas of its shard: the chunks first, then the message that names them.

Chunks are written here under a lease (`chunk_pins.py`), so that no checkpoint takes one for garbage, and shipped
to the other replicas, which then apply the message without waiting. A leader that dies between the two leaves an offer
with those that have the chunks: its successor proposes that before it makes anything itself (`inherit`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from math import inf

import cbor2

from cluster.message import Compacted, Indexed, Message, from_plain, to_plain
from cluster.parse import parse_blob_files, parse_segment_files
from cluster.shard import Shard
from node.chunk_pins import MESSAGE_S, ChunkPins
from node.chunk_transfer import ChunkTransfer
from node.group import GroupHost
from node.workers import Executor, Lane
from storage.chunks import ChunkFault, ChunkStore
from storage.errors import AnnulusError
from storage.segment_files import BlobFiles, Chunks, SegmentFiles
from storage.types import SegmentId

log = logging.getLogger(__name__)

Takes = Callable[[Indexed | Compacted], Sequence[SegmentId]]


class Maker:
    """The way of one shard's chunks and messages, and which of its segments something is made of just now."""

    def __init__(
        self,
        host: GroupHost[Shard],
        store: ChunkStore,
        executor: Executor,
        pins: ChunkPins,
        transfer: ChunkTransfer | None,
    ) -> None:
        """`transfer` is None on a node without peers."""
        self._host = host
        self._store = store
        self._executor = executor
        self._transfer = transfer
        self.pins = pins
        self.busy: set[SegmentId] = set()
        self._inherited = 0
        """The term in which this replica last asked what the leaders before it had left."""
        self._inheriting = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._host.name

    @property
    def shard(self) -> Shard:
        return self._host.machine

    @property
    def leads(self) -> bool:
        return self._host.led.is_set()

    async def make(
        self,
        message: Message,
        files: BlobFiles | SegmentFiles,
        chunks: Chunks,
        *,
        hand_over: Callable[[Shard], None],
        take_back: Callable[[Shard], None],
    ) -> None:
        """Write the chunks of these files, ship them, propose the message. Raises Unavailable.

        hand_over  gives the shard what it else would read from the chunks when it applies the message
        take_back  takes what is left of that
        """
        async with self.kept(files.digests) as lease_id:
            await self._executor.run(Lane.DISK, self._store.put_many, self.shard.shard_id, chunks)
            await self._ship(files.sizes, message)
            shard = self.shard
            hand_over(shard)
            try:
                await self.propose(message)
                self.pins.release(lease_id)
            finally:
                take_back(shard)

    async def propose(self, message: Message) -> None:
        await self._host.change(message)

    @asynccontextmanager
    async def kept(self, digests: Sequence[bytes]) -> AsyncIterator[int]:
        """Keep chunks that are about to be written. Who has seen their message applied releases the lease; else the
        message may still come, and they stay for a while."""
        lease_id = await self.pins.keep(digests, inf)
        try:
            yield lease_id
        finally:
            self.pins.renew(lease_id, MESSAGE_S)

    async def _ship(self, sizes: Mapping[bytes, int], message: Message) -> None:
        """Return when a majority has the chunks that the message names. Raises Unavailable."""
        if self._transfer is not None:
            await self._transfer.ship(self.shard.shard_id, sizes, cbor2.dumps(to_plain(message)))

    async def mend(self, error: Exception) -> bool:
        """Fetch the chunk that a read found damaged or missing; return whether the read may be tried again."""
        if self._transfer is None or not isinstance(error, ChunkFault):
            return False
        return await self._transfer.repair(error.shard_id, error.digest)

    async def inherit(self, takes: Takes) -> bool:
        """Propose what earlier leaders made and shipped but did not come to propose; once in each leadership.

        takes  returns the segments that a message is of, if it would change something now
        Returns whether that was done now, so that whoever is about to make something looks again.
        """
        async with self._inheriting:
            term = self._host.raft.term
            if self._transfer is None or self._inherited == term:
                return False
            for offer in await self._transfer.offers(self.shard.shard_id):
                message = _offered(offer)
                if message is not None and (inputs := takes(message)):
                    await self._propose_offered(message, inputs)
            self._inherited = term
            return True

    async def _propose_offered(self, message: Indexed | Compacted, inputs: Sequence[SegmentId]) -> None:
        assert self._transfer is not None
        files = (parse_blob_files if isinstance(message, Indexed) else parse_segment_files)(message.files)
        self.busy.update(inputs)
        try:
            async with self.kept(files.digests) as lease_id:
                if await self._transfer.fetch(self.shard.shard_id, files.sizes):
                    return  # not all of it is anywhere: it is made again
                await self._ship(files.sizes, message)
                await self.propose(message)
                self.pins.release(lease_id)
        finally:
            self.busy.difference_update(inputs)
        log.info("proposed what another leader had made shard=%s kind=%s", self._host.name, message.kind)


def _offered(offer: bytes) -> Indexed | Compacted | None:
    """Return the message that came with chunks; None if this program does not know it."""
    try:
        message = from_plain(*cbor2.loads(offer))
        if isinstance(message, Indexed):
            parse_blob_files(message.files)
            return message
        if isinstance(message, Compacted):
            parse_segment_files(message.files)
            return message
    except (cbor2.CBORDecodeError, ValueError, TypeError, AnnulusError) as error:
        log.warning("an offer that cannot be read: %s", error)
    return None
