"""The ids and clocks of the log, as types of their own, so that mypy tells a position from a tick."""

from __future__ import annotations

from typing import Final, NewType

ShardId = NewType("ShardId", int)
CollectionId = NewType("CollectionId", int)
PartitionId = NewType("PartitionId", int)
FieldId = NewType("FieldId", int)
SegmentId = NewType("SegmentId", int)
IndexId = NewType("IndexId", int)
Position = NewType("Position", int)
"""Place of an entry in a shard's Raft log; the first entry has position 1 or more."""
Tick = NewType("Tick", int)
"""Hybrid timestamp: milliseconds since the epoch << 18 | counter (the layout of Milvus's timestamps)."""

LOGICAL_BITS: Final = 18
TICK_MAX: Final = Tick((1 << 63) - 1)
"""Above every tick: the delete tick of a row that lives."""


def tick_from_ms(wall_ms: int) -> Tick:
    """Return the first tick of a wall-clock millisecond."""
    return Tick(wall_ms << LOGICAL_BITS)


def tick_ms(tick: Tick) -> int:
    """Return the wall-clock millisecond of a tick."""
    return tick >> LOGICAL_BITS
