"""Which segments to write anew, and what comes out.

Two reasons: a segment whose dead or expired rows are a fifth or more is rewritten without them, and small segments of
one partition become larger ones, because a search pays for every segment.

Merging is greedy: the largest small segments first, filled up with what fits. A merge is worth it if its result is
nearly full, or if it joins several segments of which none outweighs all others together; so a row is rewritten
O(log(segments)) times, and a large segment is not copied for the sake of a few rows. Each plan leaves fewer segments or
fewer dead rows, so repeating `choose` and carrying out its plans comes to rest.

`merge` is a pure function of the rows that live at a tick: replicas that merge the same segments at the same tick get
the same bytes. Deletes that arrive meanwhile are later than that tick; whoever installs the output applies them to it
again by primary key (`view.deletes.after(tick)` says which).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from storage.columns import Batch
from storage.deletes import Ticks
from storage.merging import key_order
from storage.segment_files import TICK_FIELD
from storage.types import FieldId, PartitionId, SegmentId, Tick
from storage.view import NEVER, SegmentView


@dataclass(frozen=True)
class CompactionSettings:
    """When a compaction is worth its writing. The ratios and their defaults are Milvus's where it has them."""

    segment_bytes_max: int = 512 << 20
    """No merge makes a segment larger than this."""
    small_ratio_max: float = 0.5
    """A segment is small below this share of segment_bytes_max (dataCoord.segment.smallProportion)."""
    full_ratio_min: float = 0.85
    """A merge of any two segments is worth it from here on (dataCoord.segment.compactableProportion)."""
    garbage_ratio_min: float = 0.2
    """Dead and expired rows from which a segment is rewritten."""
    inputs_min: int = 4
    """Segments that a merge must join if its result is not full."""
    inputs_max: int = 30
    renew: bool = False
    """Rewrite segments that have other fields than the schema."""

    def __post_init__(self) -> None:
        assert 0 < self.small_ratio_max < self.full_ratio_min <= 1, "a full segment is not small"
        assert 0 < self.garbage_ratio_min <= 1 and 2 <= self.inputs_min <= self.inputs_max


@dataclass(frozen=True)
class SegmentFacts:
    """What `choose` wants to know of a flushed segment that no other compaction has taken."""

    segment_id: SegmentId
    partition_id: PartitionId
    rows: int
    live_rows: int
    """Neither deleted nor expired."""
    nbytes: int
    outdated: bool = False
    """It lacks fields of the schema, or has some that were dropped."""

    @property
    def garbage_ratio(self) -> float:
        return 1 - self.live_rows / self.rows if self.rows else 1.0

    @property
    def live_bytes(self) -> int:
        return self.nbytes * self.live_rows // self.rows if self.rows else 0


class Kind(StrEnum):
    """What a compaction is for."""

    MERGE = "merge"
    """Small segments become one; what is dead or expired in them goes too."""
    PURGE = "purge"
    """One segment without its rows that are deleted or expired."""
    RENEW = "renew"
    """One segment under the newest version of the schema."""


@dataclass(frozen=True)
class Plan:
    """Segments of one partition to be replaced by one, by id ascending."""

    partition_id: PartitionId
    inputs: tuple[SegmentId, ...]
    kind: Kind
    why: str


def facts_of(view: SegmentView, nbytes: int, *, tick: Tick, expire_before: Tick = NEVER) -> SegmentFacts:
    """Return the facts of a segment at a tick; `nbytes` is what its rows take in chunks."""
    live = view.visible_count(tick, expire_before)
    outdated = view.stored is not None and {*view.stored} - {TICK_FIELD} != {*view.schema.by_id}
    return SegmentFacts(view.segment_id, view.partition_id, view.rows, live, nbytes, outdated)


def choose(segments: Iterable[SegmentFacts], settings: CompactionSettings) -> list[Plan]:
    """Return plans that share no segment, by partition and first input. No plans: there is nothing to gain."""
    by_partition: dict[PartitionId, list[SegmentFacts]] = {}
    for one in segments:
        by_partition.setdefault(one.partition_id, []).append(one)
    return [plan for partition in sorted(by_partition) for plan in _choose(by_partition[partition], settings)]


def merge(
    views: Sequence[SegmentView],
    tick: Tick,
    expire_before: Tick = NEVER,
    *,
    field_ids: Collection[FieldId] | None = None,
) -> tuple[Batch, Ticks]:
    """Return the rows of the segments that live at the tick, sorted by insert tick, then primary key, and their ticks.

    All fields of the schema, or these, as they were inserted. The views are of sealed segments of one partition, with
    one version of the schema. Raises ChunkDamaged where vectors have to be read.
    """
    ordered = sorted(views, key=lambda view: view.segment_id)
    schema = ordered[0].schema
    fields = [one.id for one in schema.fields] if field_ids is None else sorted(field_ids)
    batches, ticks = [], []
    for view in ordered:
        offsets = np.flatnonzero(view.visible(tick, expire_before))
        batches.append(view.fetch(offsets, fields))
        ticks.append(view.ticks[offsets])
    rows, row_ticks = Batch.concat(batches), np.concatenate(ticks)
    by_key = key_order(rows.columns[schema.primary.id])
    order = by_key[np.argsort(row_ticks[by_key], kind="stable")]
    return rows.take(order), row_ticks[order]


def _choose(segments: list[SegmentFacts], settings: CompactionSettings) -> list[Plan]:
    full = settings.segment_bytes_max
    waiting = [one for one in segments if one.live_bytes < settings.small_ratio_max * full]
    waiting.sort(key=lambda one: (-one.live_bytes, one.segment_id))
    plans: list[Plan] = []
    planned: set[SegmentId] = set()
    while waiting:
        taken: list[SegmentFacts] = []
        total = 0
        for one in waiting:
            if len(taken) < settings.inputs_max and total + one.live_bytes <= full:
                taken.append(one)
                total += one.live_bytes
        chosen = _worth_merging(taken, settings)
        if chosen:
            plans.append(_plan(chosen, Kind.MERGE, f"merges {len(chosen)} small segments"))
            planned.update(one.segment_id for one in chosen)
            waiting = [one for one in waiting if one.segment_id not in planned]
        else:
            waiting = waiting[1:]  # too large to be merged with what there is
    for one in segments:
        if one.segment_id not in planned and one.garbage_ratio >= settings.garbage_ratio_min:
            plans.append(_plan([one], Kind.PURGE, f"{one.garbage_ratio:.0%} of its rows are dead or expired"))
        elif one.segment_id not in planned and one.outdated and settings.renew:
            plans.append(_plan([one], Kind.RENEW, "it has other fields than the schema"))
    return sorted(plans, key=lambda plan: plan.inputs)


def _worth_merging(taken: list[SegmentFacts], settings: CompactionSettings) -> list[SegmentFacts]:
    """Return the segments to merge, none if it is not worth it. `taken` is the largest first."""
    total = sum(one.live_bytes for one in taken)
    if len(taken) >= 2 and total >= settings.full_ratio_min * settings.segment_bytes_max:
        return taken
    if len(taken) >= settings.inputs_min and 2 * taken[0].live_bytes <= total:
        return taken
    return []


def _plan(chosen: list[SegmentFacts], kind: Kind, why: str) -> Plan:
    return Plan(chosen[0].partition_id, tuple(sorted(one.segment_id for one in chosen)), kind, why)
