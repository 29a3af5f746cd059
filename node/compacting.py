"""Merging of one shard's segments, by its leader for all replicas: small ones, and those full of dead rows."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from cluster.message import Compacted
from cluster.shard import CollectionState
from cluster.tick import HybridClock
from node.making import Maker
from node.metrics import Metrics
from node.settings import Settings
from node.slots import Slots
from node.workers import Executor, Lane
from storage.compaction import CompactionSettings, Plan, choose, facts_of, merge
from storage.errors import ChunkDamaged, NoLeader
from storage.sealed import SealedRows, prepare
from storage.segment_files import Chunks, SegmentFiles, write_segment
from storage.types import CollectionId, Tick
from storage.view import SegmentView

log = logging.getLogger(__name__)


class CompactionKeeper:
    """The work of one shard; belongs to the loop."""

    def __init__(
        self,
        maker: Maker,
        executor: Executor,
        hybrid: HybridClock,
        settings: Settings,
        metrics: Metrics,
        slots: Slots,
        inherit: Callable[[], Awaitable[bool]],
        *,
        merge_bytes_max: int | None = None,
    ) -> None:
        """
        inherit          proposes what other leaders left first; returns whether it did so now
        merge_bytes_max  of a merged segment, beside storage.segment_bytes_max
        """
        self._maker = maker
        self._executor = executor
        self._hybrid = hybrid
        self._settings = settings
        self._metrics = metrics
        self._slots = slots
        self._inherit = inherit
        self._merge_bytes_max = min(settings.storage.segment_bytes_max, merge_bytes_max or 1 << 62)

    async def step(self) -> bool:
        """Merge small segments, or rewrite one that is full of dead rows."""
        if self._next() is None:
            return False
        if await self._inherit():
            return True
        async with self._slots.take(self._settings.compaction.priority):
            found = self._next()
            if found is not None and self._maker.leads:
                await self._compact(*found)
        return True

    def _next(self) -> tuple[CollectionState, Plan] | None:
        for state in self._maker.shard.populated():
            if state.properties.get("collection.autocompaction.enabled", "true").lower() == "false":
                continue
            for plan in self._plans(state, self._limits()):
                return state, plan
        return None

    async def compact_now(self, collection_id: CollectionId) -> None:
        """Merge and rewrite whatever can shrink, whether or not it is due."""
        eager = CompactionSettings(
            segment_bytes_max=self._merge_bytes_max,
            small_ratio_max=0.99,
            full_ratio_min=1.0,
            garbage_ratio_min=1e-9,
            inputs_min=2,
            renew=True,
        )
        while (state := self._maker.shard.collections.get(collection_id)) and (plans := self._plans(state, eager)):
            if not self._maker.leads:
                raise NoLeader(f"this node does not lead {self._maker.name} any more")
            async with self._slots.take(self._settings.compaction.priority):
                if state is self._maker.shard.collections.get(collection_id) and plans == self._plans(state, eager):
                    await self._compact(state, plans[0])

    def _limits(self) -> CompactionSettings:
        chosen = self._settings.compaction
        return CompactionSettings(
            segment_bytes_max=self._merge_bytes_max,
            small_ratio_max=chosen.small_segment_fill_ratio,
            garbage_ratio_min=chosen.deleted_ratio,
            inputs_min=chosen.segments_min,
        )

    def _plans(self, state: CollectionState, settings: CompactionSettings) -> Sequence[Plan]:
        expire_before = state.expire_before(self._hybrid.stamp())
        facts = [
            facts_of(
                one.segment.view(), one.segment.files.nbytes, tick=self._maker.shard.tick, expire_before=expire_before
            )
            for one in state.stored.values()
            if one.segment.files is not None and one.segment.segment_id not in self._maker.busy
        ]
        return choose(facts, settings)

    async def _compact(self, state: CollectionState, plan: Plan) -> None:
        inputs = [state.stored[one] for one in plan.inputs]
        views = [one.segment.view() for one in inputs]
        as_of = self._maker.shard.tick
        expire_before = state.expire_before(self._hybrid.stamp())
        self._maker.busy.update(plan.inputs)
        try:
            rows, files, chunks = await self._executor.run(Lane.BUILD, _merge, views, as_of, expire_before)
            message = Compacted(state.collection_id, plan.inputs, as_of, expire_before, files.to_dict())
            await self._maker.make(
                message,
                files,
                chunks,
                hand_over=lambda shard: shard.hand_over_rows(plan.inputs, rows),
                take_back=lambda shard: shard.take_back(plan.inputs),
            )
        except ChunkDamaged as error:
            if not await self._maker.mend(error):
                raise
            return
        finally:
            self._maker.busy.difference_update(plan.inputs)
        self._metrics.compacted(plan.kind.value, sum(view.rows for view in views), files.rows)
        log.info(
            "segments compacted shard=%s collection=%d inputs=%d rows_before=%d rows_after=%d why=%s",
            self._maker.name, state.collection_id, len(views), sum(v.rows for v in views), files.rows, plan.why,
        )  # fmt: skip


def _merge(views: Sequence[SegmentView], as_of: Tick, expire_before: Tick) -> tuple[SealedRows, SegmentFiles, Chunks]:
    rows = prepare(*merge(views, as_of, expire_before), views[0].schema)
    return (rows, *write_segment(rows.batch, rows.ticks)) if rows.batch.rows else (rows, SegmentFiles(0, {}), iter(()))
