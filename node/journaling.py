"""Group commit: one write and one fsync for the pending log bytes of all groups of this node.

While a batch is on its way to the disk, the next one gathers; so a loaded node syncs as often as its disk can and
every sync carries everything that came in meanwhile. A full disk, or no descriptor to open a file with, leaves the
batch pending and is told to the callback; any other failure of the disk is fatal: after a failed fsync nothing is
known about what was written.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from node.clock import Clock
from node.metrics import Metrics
from node.workers import Executor, Lane
from storage.journal import Journal

log = logging.getLogger(__name__)

RETRY_S = 0.5


class JournalWriter:
    """Writes the journal in the background; `kick` after anything was appended."""

    def __init__(
        self,
        journal: Journal,
        executor: Executor,
        clock: Clock,
        metrics: Metrics,
        *,
        on_durable: Callable[[int], None],
        on_stuck: Callable[[str], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._journal = journal
        self._executor = executor
        self._clock = clock
        self._metrics = metrics
        self._on_durable = on_durable
        self._on_stuck = on_stuck
        self._on_fatal = on_fatal
        self._running: asyncio.Task[None] | None = None
        self._stuck = ""
        self._closing = False
        """Then nothing is tried twice. A write that is under way is waited for: a thread cannot be called back."""

    def kick(self) -> None:
        """Start writing if there is something to write and nothing is being written."""
        if self._running is None and self._journal.pending_bytes:
            self._running = asyncio.get_running_loop().create_task(self._drain())

    async def close(self) -> None:
        """Return when what was appended is written, or cannot be now."""
        self._closing = True
        while (running := self._running) is not None:
            await asyncio.wait({running})

    async def _drain(self) -> None:
        try:
            while (batch := self._journal.take_batch()) is not None:
                began_s = self._clock.monotonic_s()
                try:
                    await self._executor.run(Lane.LOG, batch.write)
                except OSError as error:
                    self._journal.batch_failed(batch, error)
                    self._say_stuck(_why_stuck(error))  # another failure has halted the journal
                    if self._closing:
                        return
                    await asyncio.sleep(RETRY_S)
                    continue
                self._metrics.fsynced(self._clock.monotonic_s() - began_s)
                self._say_stuck("")
                for group_id in sorted(self._journal.batch_done(batch)):
                    self._on_durable(group_id)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._on_fatal(error)
        finally:
            self._running = None

    def _say_stuck(self, why: str) -> None:
        if why != self._stuck:
            self._stuck = why
            self._on_stuck(why)


def _why_stuck(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files and connections are open"
    return "the disk of the journal is full"
