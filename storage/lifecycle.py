"""The states of a segment, and the steps between them as a table.

    growing --seal--> sealed --flush--> flushed --index--> indexed --drop--> dropped
                                           ^                  |
                                           +----drop index----+

Each step is a message in the shard's log, so every replica takes it at the same position. A segment only moves forward,
but for an index that is dropped: its rows stay as durable as they were. Any state but the last may end in `dropped`
(collection, partition or compaction). Indexing again, another field or after a rebuild, is a step too.

What a step promises once it is in the log:

    seal     no row is added any more
    flush    every row is in chunks named by the message: the log before it is not needed for them
    index    a vector index of the rows is in chunks; building it again is never necessary
    drop     no read begun later sees the segment; its chunks may go once no checkpoint names them
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from storage.types import Position, SegmentId


class SegmentState(StrEnum):
    GROWING = "growing"
    SEALED = "sealed"
    FLUSHED = "flushed"
    INDEXED = "indexed"
    DROPPED = "dropped"


class Step(StrEnum):
    SEAL = "seal"
    FLUSH = "flush"
    INDEX = "index"
    DROP_INDEX = "drop index"
    DROP = "drop"


TRANSITIONS: Final[Mapping[tuple[SegmentState, Step], SegmentState]] = {
    (SegmentState.GROWING, Step.SEAL): SegmentState.SEALED,
    (SegmentState.SEALED, Step.FLUSH): SegmentState.FLUSHED,
    (SegmentState.FLUSHED, Step.INDEX): SegmentState.INDEXED,
    (SegmentState.INDEXED, Step.INDEX): SegmentState.INDEXED,
    (SegmentState.INDEXED, Step.DROP_INDEX): SegmentState.FLUSHED,
    (SegmentState.GROWING, Step.DROP): SegmentState.DROPPED,
    (SegmentState.SEALED, Step.DROP): SegmentState.DROPPED,
    (SegmentState.FLUSHED, Step.DROP): SegmentState.DROPPED,
    (SegmentState.INDEXED, Step.DROP): SegmentState.DROPPED,
}


class InvalidTransition(Exception):
    """A segment was told to take a step that its state does not allow: a bug, told with the segment's story."""

    def __init__(self, segment_id: SegmentId, state: SegmentState, step: Step, story: str) -> None:
        allowed = ", ".join(one for was, one in TRANSITIONS if was is state) or "nothing"
        super().__init__(f"segment {segment_id} is {state} and cannot {step} (it can: {allowed}). Its story: {story}")
        self.segment_id = segment_id
        self.state = state
        self.step = step


class Life:
    """The state of one segment and how it came to it."""

    def __init__(self, segment_id: SegmentId, created: Position) -> None:
        self.segment_id = segment_id
        self.state = SegmentState.GROWING
        self._steps: list[tuple[Step, Position]] = []
        self._created = created

    def take(self, step: Step, position: Position) -> SegmentState:
        """Take the step that stands at this position of the log; return the new state. Raises InvalidTransition."""
        state = TRANSITIONS.get((self.state, step))
        if state is None:
            raise InvalidTransition(self.segment_id, self.state, step, self.story)
        self._steps.append((step, position))
        self.state = state
        return state

    @property
    def story(self) -> str:
        """Every step with its position, for people."""
        return "; ".join((f"created at {self._created}", *(f"{step} at {at}" for step, at in self._steps)))
