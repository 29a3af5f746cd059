"""Memory marks: who is slowed and who is refused at which value, and that it ends."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.pressure import CALM_S, RATE_BYTES_MAX, RATE_BYTES_MIN, WORD_S, Level, Mark, Pressure


def make() -> Pressure:
    return Pressure(
        Mark("growing", low=40, slow=100, high=200, last=250, setting="storage.growing_bytes_max"),
        Mark("resident", low=800, slow=900, high=950, last=1000, setting="admission.memory_bytes_max"),
    )


def seen(pressure: Pressure, growing: int = 0, resident: int = 0, now_s: float = 0.0) -> float:
    """Return the rate of a collection that writes most."""
    pressure.ask("flood", 1 << 30)
    pressure.ask("little", 1 << 20)
    pressure.observe(growing=growing, resident=resident, now_s=now_s)
    return pressure.rate("flood")


@pytest.mark.parametrize(
    ("growing", "resident", "rate", "level"),
    [
        (0, 0, inf, Level.ACCEPT),
        (100, 900, inf, Level.ACCEPT),
        (150, 0, RATE_BYTES_MAX / 8, Level.DELAY),
        (0, 925, RATE_BYTES_MAX / 8, Level.DELAY),
        (150, 949, RATE_BYTES_MIN * 1.1, Level.DELAY),
        (200, 0, 0, Level.REFUSE),
        (0, 950, 0, Level.REFUSE),
        (300, 2000, 0, Level.REFUSE),
    ],
)
def test_marks(growing: int, resident: int, rate: float, level: Level) -> None:
    """Below both marks anything goes; between them the rate falls from its greatest to its least; above, nothing."""
    pressure = make()
    assert seen(pressure, growing, resident) == pytest.approx(rate, rel=0.1)
    assert pressure.level is level


def test_who_writes_little_goes_on_until_nothing_goes() -> None:
    """What is refused to the flood is not to the others, up to the last mark."""
    pressure = make()
    for growing, rate in ((150, inf), (249, inf), (250, 0.0)):
        seen(pressure, growing)
        assert pressure.rate("little") == rate
    pressure = make()
    pressure.ask("only", 10_000)
    pressure.observe(growing=210, resident=0, now_s=0.0)
    assert pressure.rate("only") == 0


def test_what_was_admitted_since_counts() -> None:
    """Between two looks the marks are not passed unseen."""
    pressure = make()
    assert seen(pressure, growing=99) == inf
    pressure.take(1000)
    assert pressure.rate("flood") == 0 and pressure.rate("little") == 0
    assert seen(pressure, growing=99) == inf


def test_refusing_ends_below_low_or_after_a_calm() -> None:
    """It does not alternate: above `low` it takes CALM_S below `high`, and then goes on slowly."""
    pressure = make()
    assert seen(pressure, 200) == 0
    assert seen(pressure, 199, now_s=1) == 0
    assert seen(pressure, 41, now_s=2) == 0
    assert seen(pressure, 39, now_s=3) == inf
    assert seen(pressure, 200, now_s=4) == 0
    assert seen(pressure, 190, now_s=4 + CALM_S - 0.1) == 0
    assert RATE_BYTES_MIN < seen(pressure, 190, now_s=4 + CALM_S) < 2 * RATE_BYTES_MIN


def test_another_node_is_believed_for_a_while() -> None:
    """A follower that is short of memory slows and stops those who write most here; its silence ends that."""
    pressure = make()
    pressure.hear("n2", 0.5, False, 0.0)
    assert seen(pressure) == pytest.approx(RATE_BYTES_MAX / 8) and pressure.level is Level.DELAY
    assert "n2" in pressure.why()
    pressure.hear("n2", 7.0, True, 1.0)
    assert seen(pressure, now_s=1.0) == 0 and pressure.rate("little") == inf and not pressure.is_refusing
    assert seen(pressure, now_s=1.0 + WORD_S) == inf and pressure.fraction == 0


def test_the_reason_names_value_and_setting() -> None:
    """An operator reads what is full, how full, and what to change."""
    pressure = make()
    seen(pressure, growing=120, resident=960)
    assert "resident" in pressure.why() and "admission.memory_bytes_max" in pressure.why()
    seen(pressure, growing=220, resident=10, now_s=CALM_S)
    assert "growing" in pressure.why() and "storage.growing_bytes_max" in pressure.why()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 1200), st.floats(0.05, 3)), max_size=50))
def test_it_always_ends(looks: list[tuple[int, int, float]]) -> None:
    """Whatever was measured before, values that stay below `slow` are accepted within CALM_S; a rate is never
    negative, and never rises with the value alone."""
    pressure, now_s = make(), 0.0
    for growing, resident, passes_s in looks:
        now_s += passes_s
        rate = seen(pressure, growing, resident, now_s)
        assert rate >= 0
        if growing >= 250 or resident >= 1000:
            assert rate == 0 == pressure.rate("little")
        elif growing >= 200 or resident >= 950:
            assert rate == 0 and pressure.rate("little") == inf
        pressure.take(100)
        assert pressure.rate("flood") <= rate
    seen(pressure, 99, 899, now_s + 0.1)
    assert seen(pressure, 99, 899, now_s + CALM_S + 0.1) == inf
    assert pressure.level is Level.ACCEPT
