"""Hybrid time: ticks ascend whatever the wall clock does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.tick import HybridClock, next_tick
from storage.types import Tick, tick_from_ms, tick_ms

ticks = st.integers(0, 1 << 62).map(Tick)


@given(previous=ticks, stamp=ticks)
def test_a_tick_is_above_the_one_before_and_not_below_its_stamp(previous: Tick, stamp: Tick) -> None:
    """So ticks of a log are unique and ascend, whoever stamped its messages."""
    tick = next_tick(previous, stamp)
    assert tick > previous and tick >= stamp
    assert tick in (previous + 1, stamp), "and no later than it must be"


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("wall"), st.integers(0, 5_000)),
            st.tuples(st.just("stamp"), st.integers(1, 1_000)),
            st.tuples(st.just("observe"), st.integers(0, 5_000)),
        ),
        max_size=40,
    )
)
def test_the_clock_never_runs_backwards(steps: list[tuple[str, int]]) -> None:
    """Stamps ascend over jumps of the wall clock either way, ranges do not overlap, nothing observed is stamped again,
    and no stamp is behind the wall."""
    wall = 1_000
    clock = HybridClock(lambda: wall)
    used = -1
    for name, number in steps:
        if name == "wall":
            wall = number
        elif name == "observe":
            clock.observe(tick_from_ms(number))
            used = max(used, tick_from_ms(number))
        else:
            first = clock.stamp(number)
            assert first > used and tick_ms(first) >= wall
            used = first + number - 1


def test_a_stamp_shows_its_wall_time() -> None:
    """The upper bits are milliseconds, so people and TTLs can read a tick."""
    clock = HybridClock(lambda: 1_700_000_000_123)
    assert tick_ms(clock.stamp()) == 1_700_000_000_123
    assert clock.stamp() == tick_from_ms(1_700_000_000_123) + 1
