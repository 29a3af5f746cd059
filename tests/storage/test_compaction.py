"""Compaction: what is chosen, that choosing comes to rest, and that merged rows are the live rows, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.compaction import CompactionSettings, Kind, SegmentFacts, choose, facts_of, merge
from storage.growing import GrowingSegment
from storage.sealed import SealedSegment
from storage.segment_files import write_segment
from storage.types import PartitionId, SegmentId, Tick
from tests.storage.rows import PK, make_collection, numbered

SETTINGS = CompactionSettings(segment_bytes_max=1000)
P1, P2 = PartitionId(1), PartitionId(2)


def facts(number: int, nbytes: int, live: float = 1.0, partition: PartitionId = P1) -> SegmentFacts:
    return SegmentFacts(SegmentId(number), partition, 1000, int(1000 * live), nbytes)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([facts(1, 900), facts(2, 600)], [], id="large ones are left"),
        pytest.param([facts(1, 100), facts(2, 100), facts(3, 100)], [], id="three small ones are not worth it"),
        pytest.param([facts(n, 100) for n in (4, 3, 2, 1)], [(1, 2, 3, 4)], id="four are"),
        pytest.param([facts(1, 450), facts(2, 450)], [(1, 2)], id="two that fill a segment"),
        pytest.param([facts(1, 450), facts(2, 460), facts(3, 90)], [(1, 2, 3)], id="filled up with what fits"),
        pytest.param([facts(1, 450), *(facts(n, 2) for n in (2, 3, 4))], [], id="a large one is not moved for crumbs"),
        pytest.param([facts(1, 450), *(facts(n, 2) for n in (2, 3, 4, 5))], [(2, 3, 4, 5)], id="the crumbs are"),
        pytest.param([facts(1, 900, 0.79)], [(1,)], id="a fifth is dead"),
        pytest.param([facts(1, 900, 0.81)], [], id="less than a fifth is dead"),
        pytest.param([facts(1, 900, 0.0)], [(1,)], id="nothing lives"),
        pytest.param([facts(1, 450), facts(2, 450, partition=P2)], [], id="partitions do not mix"),
        pytest.param([facts(1, 1000, 0.45), facts(2, 500, 0.9)], [(1, 2)], id="small once the dead are gone"),
    ],
)
def test_choice(segments: list[SegmentFacts], expected: list[tuple[int, ...]]) -> None:
    """Small segments of a partition are merged when it is worth it, segments with a fifth of garbage rewritten."""
    plans = choose(segments, SETTINGS)
    assert [plan.inputs for plan in plans] == expected
    assert all(plan.why for plan in plans)
    assert all((plan.kind is Kind.MERGE) == (len(plan.inputs) > 1) for plan in plans)


@given(
    st.lists(
        st.tuples(st.integers(1, 1200), st.floats(0, 1), st.sampled_from([P1, P2])), max_size=60
    )
)  # fmt: skip
def test_choosing_comes_to_rest(given_segments: list[tuple[int, float, PartitionId]]) -> None:
    """Carrying out plans ends; no plan shares a segment, mixes partitions or overfills; few small segments remain."""
    segments = {SegmentId(n): facts(n, size, live, p) for n, (size, live, p) in enumerate(given_segments)}
    rounds = 0
    while plans := choose(segments.values(), SETTINGS):
        rounds += 1
        assert rounds <= 2 + len(given_segments)
        taken = [one for plan in plans for one in plan.inputs]
        assert len(taken) == len(set(taken))
        for plan in plans:
            inputs = [segments.pop(one) for one in plan.inputs]
            assert {one.partition_id for one in inputs} == {plan.partition_id}
            live = sum(one.live_bytes for one in inputs)
            assert len(inputs) == 1 or live <= SETTINGS.segment_bytes_max
            if live:
                number = SegmentId(max([*segments, *taken], default=0) + 1)
                taken.append(number)
                segments[number] = facts(number, live, 1.0, plan.partition_id)
    assert all(one.garbage_ratio < SETTINGS.garbage_ratio_min for one in segments.values())


def test_merged_rows_are_the_live_rows_in_a_fixed_order() -> None:
    """The output holds what lived at the tick and had not expired, by tick then key, whatever the inputs' parts."""
    schema = make_collection()

    def segment(number: int, cuts: list[list[int]]) -> SealedSegment:
        growing = GrowingSegment(SegmentId(number), P1, schema, Tick(0))
        for cut in cuts:
            for tick in sorted({10 + one // 10 for one in cut}):
                growing.append(numbered(schema, [one for one in cut if 10 + one // 10 == tick], tick), Tick(tick))
        return SealedSegment.from_growing(growing)

    first, second = segment(1, [[9, 3], [25, 21]]), segment(2, [[14, 11], [38]])
    for one in (first, second):
        one.delete(np.array([3, 14], np.int64), Tick(20))
        one.delete(np.array([21], np.int64), Tick(30))
    batch, ticks = merge([second.view(), first.view()], Tick(20))
    assert batch.columns[PK].to_list() == [9, 11, 21, 25, 38]
    assert ticks.tolist() == [10, 11, 12, 12, 13]
    batch, ticks = merge([first.view(), second.view()], Tick(30), Tick(11))
    assert batch.columns[PK].to_list() == [11, 25, 38]
    assert facts_of(first.view(), 400, tick=Tick(30)).live_rows == 2
    empty, _ = merge([first.view()], Tick(30), Tick(99))
    assert empty.rows == 0 and write_segment(empty, np.empty(0, np.int64))[0].rows == 0


def test_settings_hold_together() -> None:
    """Ratios that would let compaction run for ever are refused."""
    with pytest.raises(AssertionError, match="a full segment is not small"):
        replace(SETTINGS, small_ratio_max=0.9)
