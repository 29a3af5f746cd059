"""What a replica does besides applying its log: seal, flush, index, merge while it leads; load and checkpoint always.

Each kind of work is a loop of its own that looks at the shard's state, does the most useful piece that is left, and
proposes the outcome as a message; so nothing is remembered outside the log, and a restart or a new leader goes on
where the state says. Work is done on frozen views in worker threads.

What is made for all replicas goes by `making.py`: vector indexes (`indexing.py`), merged segments (`compacting.py`).
Only the rows of a flush are not shipped: every replica has them, and writes them itself. So it does with word lists
(`words.py`), and each makes its own checkpoints (`checkpoints.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from cluster.message import Flushed, Seal
from cluster.shard import CollectionState, Shard, StoredSegment
from cluster.tick import HybridClock
from node.checkpoints import Checkpoints
from node.chunk_pins import ChunkPins
from node.chunk_transfer import ChunkTransfer, Dice
from node.clock import Clock
from node.compacting import CompactionKeeper
from node.group import GroupHost
from node.indexing import IndexKeeper
from node.making import Maker
from node.metrics import Metrics
from node.provision import Provisioner
from node.settings import Settings
from node.slots import Slots
from node.words import WordKeeper
from node.workers import Executor, Lane
from storage.chunks import ChunkStore
from storage.errors import AnnulusError, ChunkDamaged, NoLeader, OutcomeUnknown
from storage.sealed import prepare_from_files
from storage.types import Position, tick_ms

log = logging.getLogger(__name__)

IDLE_S: Final = 1.0
"""How often a loop with nothing to do looks again, besides after every change."""
BACK_OFF_S: Final = 1.0


class Upkeep:
    """The background work of one shard on this node."""

    def __init__(
        self,
        host: GroupHost[Shard],
        store: ChunkStore,
        executor: Executor,
        hybrid: HybridClock,
        clock: Clock,
        settings: Settings,
        metrics: Metrics,
        *,
        dice: Dice,
        transfer: ChunkTransfer | None = None,
        on_store_error: Callable[[OSError], None],
        readers_gone: Callable[[], Awaitable[None]],
        store_full: Callable[[], bool],
        journal_full: Callable[[], bool] = lambda: False,
        memory_short: Callable[[], bool] = lambda: False,
        merge_bytes_max: int | None = None,
        slots: Slots | None = None,
    ) -> None:
        """
        transfer         None on a node without peers
        memory_short     whether compactions are to wait: they take memory before they give any back
        merge_bytes_max  of a merged segment, beside storage.segment_bytes_max
        slots            shared by all shards of the node; left out, this shard has its own
        """
        slots = slots or Slots(settings.workers.build_threads)
        self._host = host
        self._executor = executor
        self._hybrid = hybrid
        self._settings = settings
        self._on_store_error = on_store_error
        self._store_full = store_full
        self._memory_short = memory_short
        self._transfer = transfer
        self.pins = ChunkPins(clock)
        self.provision = Provisioner(
            lambda: self.shard, transfer, store, executor, dice, self.pins, on_store_error=on_store_error
        )
        """To be awaited before a message is applied."""
        self._maker = maker = Maker(host, store, executor, self.pins, transfer)
        self.indexes = IndexKeeper(maker, executor, clock, settings, metrics, slots, self._wake_all)
        self.compactions = CompactionKeeper(
            maker, executor, hybrid, settings, metrics, slots,
            lambda: maker.inherit(self.indexes.takes), merge_bytes_max=merge_bytes_max,
        )  # fmt: skip
        self.checkpoints = Checkpoints(
            host, store, executor, clock, self.pins,
            readers_gone=readers_gone, journal_full=journal_full, on_store_error=on_store_error,
        )  # fmt: skip
        self._words = WordKeeper(lambda: self.shard, store, executor)
        self._tasks: list[asyncio.Task[None]] = []
        self._wakers: list[asyncio.Event] = []
        self._changed = asyncio.Event()
        self._changes_seen = 0

    @property
    def shard(self) -> Shard:
        return self._host.machine

    @property
    def leads(self) -> bool:
        return self._host.led.is_set()

    def start(self) -> None:
        for step, idle_s in (
            (self._seal_step, IDLE_S),
            (self._index_step, IDLE_S),
            (self._compact_step, self._settings.compaction.interval_s),
        ):
            self._begin(self._forever(step, self._waker(), idle_s, leading=True))
        for step in (self._flush_step, self._load_step, self._words_step):
            self._begin(self._forever(step, self._waker(), IDLE_S, leading=False))
        if not self.checkpoints.swept:
            self._begin(self.checkpoints.sweep_later())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _waker(self) -> asyncio.Event:
        self._wakers.append(asyncio.Event())
        return self._wakers[-1]

    def wake(self) -> None:
        """Something was applied: look again, unless it was only rows coming and going."""
        if self.shard.changes == self._changes_seen:
            return
        self._changes_seen = self.shard.changes
        self.indexes.cancel_unwanted()
        self._wake_all()

    def _wake_all(self) -> None:
        for waker in self._wakers:
            waker.set()
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Return when this is so of the shard's segments."""
        while not wanted():
            await self._changed.wait()

    async def stop(self) -> None:
        """Return when nothing is worked on any more, nor written to the store. Chunks whose messages are under way stay
        for them."""
        self.indexes.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._executor.passed(Lane.DISK)

    async def _forever(
        self, step: Callable[[], Awaitable[bool]], waker: asyncio.Event, idle_s: float, *, leading: bool
    ) -> None:
        """Take the step whenever there may be something to do; one that only leaders take, while this replica leads."""
        while True:
            if leading:
                await self._host.led.wait()
            waker.clear()
            try:
                if await step():
                    continue
                delay_s = idle_s
            except (NoLeader, OutcomeUnknown) as error:  # the message may be applied yet, or the new leader begins anew
                log.debug("leadership lost in the middle shard=%s step=%s: %s", self._host.name, step.__name__, error)
                delay_s = BACK_OFF_S
            except (AnnulusError, OSError) as error:
                delay_s = BACK_OFF_S
                if isinstance(error, OSError):
                    self._on_store_error(error)
                else:
                    log.warning("upkeep fails shard=%s step=%s: %s", self._host.name, step.__name__, error)
            except Exception as error:  # a bug in one piece of work must not end the work of this shard in silence
                log.exception("upkeep fails shard=%s step=%s", self._host.name, step.__name__)
                delay_s = 10 * BACK_OFF_S
                del error
            try:
                async with asyncio.timeout(delay_s):  # `wait_for` would lose a cancellation that comes with the waking
                    await waker.wait()
            except TimeoutError:
                continue

    # sealing

    async def _seal_step(self) -> bool:
        """Seal what is full, old or idle."""
        now_ms = tick_ms(self._hybrid.stamp())
        storage = self._settings.storage
        for state in self.shard.populated():
            due = [
                one.segment_id
                for one in state.growing.values()
                if one.rows
                and (
                    one.nbytes >= storage.segment_bytes_max
                    or now_ms - tick_ms(one.first_tick) >= storage.segment_age_s_max * 1000
                    or now_ms - tick_ms(one.last_tick) >= storage.segment_idle_s_max * 1000
                )
            ]
            if due:
                await self._maker.propose(Seal(state.collection_id, due))
                return True
        return False

    def growing_bytes(self) -> int:
        return sum(one.nbytes for state in self.shard.populated() for one in state.growing.values())

    def unflushed_bytes(self) -> int:
        """Return the bytes of rows that are in no chunk yet, growing or sealed."""
        sealed = (
            one.segment for state in self.shard.populated() for one in state.stored.values() if not one.is_flushed
        )
        return self.growing_bytes() + sum(one.nbytes for one in sealed)

    @property
    def largest_growing_bytes(self) -> int:
        return max((one.nbytes for state in self.shard.populated() for one in state.growing.values()), default=0)

    async def seal_largest(self) -> None:
        """Seal the largest growing segment of this shard: memory is short. Raises NoLeader."""
        growing = [(state, one) for state in self.shard.populated() for one in state.growing.values()]
        if growing:
            state, largest = max(growing, key=lambda one: one[1].nbytes)
            await self._maker.propose(Seal(state.collection_id, [largest.segment_id]))

    # flushing

    async def _flush_step(self) -> bool:
        """Write the rows of one sealed segment to chunks. Replicas that do not lead do so for when the leader has."""
        found = None if self._store_full() else self._first(lambda state, one: not one.is_flushed)
        if found is None or not (self.leads or self._transfer):
            self.provision.forget_flush()
            return False
        state, stored = found
        segment_id = stored.segment.segment_id
        flush = await self.provision.write_rows(stored)
        files = flush.files
        if not self.leads:
            return False
        async with self._maker.kept(files.digests) as lease_id:
            if stored is not state.stored.get(segment_id) or not await self.provision.there(files):
                self.provision.forget_flush()
                return True
            shard = self.shard
            shard.hand_over_rows((segment_id,), flush.rows)
            try:
                await self._maker.propose(Flushed(state.collection_id, segment_id, files.to_dict()))
                self.pins.release(lease_id)
                self.pins.release(flush.lease_id)
                self.provision.forget_flush()
            finally:
                shard.take_back((segment_id,))
        log.info(
            "segment flushed shard=%s collection=%d segment=%d rows=%d bytes=%d",
            self._host.name, state.collection_id, segment_id, files.rows, files.nbytes,
        )  # fmt: skip
        return True

    # loading

    async def _load_step(self) -> bool:
        """Bring the columns or an index of one segment of a loaded collection into memory."""
        released = self._first(lambda state, one: one.segment.released and state.is_loaded(one.segment.partition_id))
        if released is not None:
            state, stored = released
            segment = stored.segment
            assert segment.files is not None
            try:
                rows = await self._executor.run(
                    Lane.DISK, prepare_from_files, segment.files, self.shard.get_chunk, segment.schema
                )
            except ChunkDamaged as error:
                if await self._maker.mend(error):
                    return True
                raise
            if segment.released and state.is_loaded(segment.partition_id):
                segment.load(rows)
            return True
        for state in self.shard.populated():
            for stored in list(state.stored.values()):
                for index, files in self.indexes.missing(state, stored):
                    await self.indexes.load_index(stored, index, files)
                    return True
        return False

    async def _index_step(self) -> bool:
        """Build one index that a flushed segment lacks."""
        return not self._store_full() and await self.indexes.step()

    async def _compact_step(self) -> bool:
        """Merge small segments, or rewrite one that is full of dead rows."""
        return not (self._store_full() or self._memory_short()) and await self.compactions.step()

    async def _words_step(self) -> bool:
        """Bring the word lists of one segment into memory, or make and store them."""
        return not self._store_full() and await self._words.step()

    @property
    def loading(self) -> tuple[int, int]:
        """Return (segments of loaded collections whose rows and indexes are in memory, all of them)."""
        ready = total = 0
        for state in self.shard.populated():
            for one in state.stored.values():
                if state.is_loaded(one.segment.partition_id):
                    total += 1
                    ready += not one.segment.released and not self.indexes.missing(state, one)
        return ready, total

    def replaced(self, position: Position) -> None:
        """The shard is now another replica's, as of a checkpoint at this position."""
        self._changes_seen = -1
        self.indexes.forget_faults()
        self.checkpoints.note(position)
        self.wake()

    def _first(
        self, wanted: Callable[[CollectionState, StoredSegment], bool]
    ) -> tuple[CollectionState, StoredSegment] | None:
        for state in self.shard.populated():
            for one in state.stored.values():
                if wanted(state, one):
                    return state, one
        return None
