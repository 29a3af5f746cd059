"""Checkpoints of one shard on this node: what is applied made durable outside the journal, and what that lets go of.

The journal below a checkpoint goes, but for what another replica wants next, and so do the chunks that no segment needs
any more and nothing keeps (`chunk_pins.py`). What a crash left behind is swept after a start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from cluster.checkpoint import chunk_sizes, freeze, incoming_key, install, write
from cluster.shard import Shard
from node.chunk_pins import ChunkPins
from node.clock import Clock
from node.group import GroupHost
from node.workers import Executor, Lane, carry_through
from storage.chunks import ChunkStore
from storage.types import Position

log = logging.getLogger(__name__)

SWEEP_AFTER_S: Final = 60.0
"""After the start of a node with peers: longer than between the coming of chunks and that of their message."""


class Checkpoints:
    """Those of one shard; belongs to the loop."""

    def __init__(
        self,
        host: GroupHost[Shard],
        store: ChunkStore,
        executor: Executor,
        clock: Clock,
        pins: ChunkPins,
        *,
        readers_gone: Callable[[], Awaitable[None]],
        journal_full: Callable[[], bool],
        on_store_error: Callable[[OSError], None],
    ) -> None:
        self._host = host
        self._store = store
        self._executor = executor
        self._clock = clock
        self._pins = pins
        self._readers_gone = readers_gone
        self._journal_full = journal_full
        self._on_store_error = on_store_error
        self.position = host.machine.position
        self.at_s = clock.monotonic_s()
        self.installing = False
        """Another replica's checkpoint is being fetched for this shard."""
        self.swept = False
        self.is_dropped = False
        """The shard is no longer on this node, and must not come back by a checkpoint."""

    @property
    def is_dirty(self) -> bool:
        return self._host.machine.position > self.position or not self._host.machine.garbage <= self._pins.kept

    async def write(self) -> None:
        """Make everything applied so far durable outside the journal, and let go of the journal below it.

        Once begun it is carried through even if the caller goes away: what a worker writes cannot be called back.
        """
        await carry_through(self._write())

    async def _write(self) -> None:
        async with self._pins.committing:
            if self.is_dropped:
                return
            shard, position = self._host.machine, self._host.machine.position
            frozen = freeze(
                shard,
                term=self._host.applied_term,
                # Of a generation that is about to begin, the log may not be there yet.
                reset_log=self._host.is_over or self._host.raft.log.durable_position < position,
                garbage=self._pins.doom(shard, self._host.raft.log.last_position),
            )
            try:
                if frozen.garbage:
                    await self._readers_gone()
                written = await self._executor.run(Lane.DISK, write, frozen, self._store)
                install(shard, written)
            finally:
                self._pins.spare()
            self.note(position)
        self.trim_log()

    def trim_log(self) -> None:
        """Let go of the journal below the checkpoint, but for what others will want next while there is room."""
        self._host.trim(self._pins.trimmed_to(self.position, is_full=self._journal_full()))

    def note(self, position: Position) -> None:
        """There is a checkpoint of this position now."""
        self.position = position
        self.at_s = self._clock.monotonic_s()

    def note_installing(self, installing: bool) -> None:
        self.installing = installing

    async def sweep(self) -> int:
        """Remove chunks that nothing needs: what a crash left. Returns how many.

        Call it when all of the log that was here at the start is applied: its messages name chunks too.
        """
        shard = self._host.machine
        async with self._pins.committing:
            present = set(await self._executor.run(Lane.DISK, self._store.chunk_digests, shard.shard_id))
            incoming = await self._executor.run(Lane.DISK, self._store.read, incoming_key(shard.shard_id))
            if incoming is not None and self.installing:
                present -= chunk_sizes(incoming).keys()
            orphans = present - shard.digests.keys() - shard.garbage
            try:
                shard.garbage |= orphans
                orphans &= self._pins.doom(shard, self._host.raft.log.last_position)
                removal = [incoming_key(shard.shard_id)] if incoming is not None and not self.installing else []
                if orphans or removal:
                    chunks = [(shard.shard_id, digest) for digest in sorted(orphans)]
                    await self._executor.run(Lane.DISK, self._store.commit, [], removal, chunks)
                shard.garbage -= orphans
            finally:
                self._pins.spare()
        self.swept = True
        return len(orphans)

    async def sweep_later(self) -> None:
        """Sweep when no message can be under way any more whose chunks came before this process began.

        Those that came since have leases.
        """
        await asyncio.sleep(SWEEP_AFTER_S)
        log_end = self._host.raft.log.last_position
        while self._host.machine.position < log_end or self.installing:  # noqa: ASYNC110  # nobody waits for this
            await asyncio.sleep(SWEEP_AFTER_S / 10)
        try:
            removed = await carry_through(self.sweep())
        except OSError as error:
            self._on_store_error(error)
            return
        if removed:
            log.info("removed chunks that a crash had left shard=%s chunks=%d", self._host.name, removed)
