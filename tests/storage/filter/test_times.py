"""Times: their texts, and filters that compare them, against Python's own calendar."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from operator import eq, ge, gt, le, lt, ne
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.candidates import candidates
from storage.columns import Batch, ScalarColumn
from storage.errors import FilterError, InvalidParameter
from storage.filter import compile_filter
from storage.filter.indexed import Indexed
from storage.schema import DataType, FieldSchema, make_schema
from storage.times import Interval, parse_interval, parse_time, show_interval, show_time, zone_of
from storage.view import Part, PartIndexes

SHANGHAI = zone_of("Asia/Shanghai")
SCHEMA = make_schema(
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("t", DataType.TIMESTAMPTZ, nullable=True, params={"timezone": "Asia/Shanghai"}),
        FieldSchema("u", DataType.TIMESTAMPTZ),
        FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
    ],
    dynamic=True,
)
T, U = SCHEMA.by_name["t"].id, SCHEMA.by_name["u"].id


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2024-12-31 22:00:00", "2024-12-31T22:00:00+08:00"),
        ("2024-12-31T22:00:00.5Z", "2025-01-01T06:00:00.5+08:00"),
        ("1969-12-31T23:59:59.999999+00:00", "1970-01-01T07:59:59.999999+08:00"),
        ("2025-05-01T23:59:59-03:30", "2025-05-02T11:29:59+08:00"),
        ("2025-05-01", "2025-05-01T00:00:00+08:00"),
    ],
)
def test_texts_are_of_the_zone_unless_they_say(text: str, shown: str) -> None:
    moment = parse_time(text, SHANGHAI)
    assert show_time(moment, SHANGHAI) == shown
    assert parse_time(show_time(moment, UTC), UTC) == moment and show_time(moment, UTC).endswith("Z")


@pytest.mark.parametrize(
    "text", ["", "x", "2025-13-01", "9999-12-31T23:59:59-08:00", "5", "2025-01-01" * 9, "2025-01-01T00:00:00Z\0"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_time(text, SHANGHAI)


@pytest.mark.parametrize(
    ("text", "months", "microseconds"),
    [
        ("P1Y2M3DT1H2M3S", 14, 262_923_000_000), ("P0D", 0, 0), ("-P1M", -1, 0), ("P1W", 0, 604_800_000_000),
        ("PT0.25S", 0, 250_000),
    ],
)  # fmt: skip
def test_intervals(text: str, months: int, microseconds: int) -> None:
    found = parse_interval(text)
    assert found == Interval(months, microseconds) == parse_interval(show_interval(found))


@pytest.mark.parametrize("text", ["", "P", "PT", "1D", "P1", "P1DT", "P99999Y", "P1.5D", "PT1H1D"])
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_interval(text)


def test_zones() -> None:
    """Names of the IANA database; none is UTC; no path gets out of it."""
    assert zone_of("") is UTC and zone_of("Europe/Berlin") == ZoneInfo("Europe/Berlin")
    for name in ("Nowhere/Else", "../../etc/passwd", "/etc/passwd", "x" * 999):
        with pytest.raises(InvalidParameter, match="is no zone"):
            zone_of(name)


OPS: dict[str, Callable[[datetime, datetime], bool]] = {"==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
moments = st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)).map(lambda one: one.replace(tzinfo=UTC))
intervals = st.tuples(st.integers(0, 30), st.integers(0, 60), st.integers(0, 10**5)) | st.just((0, 0, 0))


def later(moment: datetime, sign: int, interval: tuple[int, int, int]) -> datetime:
    """Return the time an interval later: months from the first of a month on, then days and seconds."""
    months, days, seconds = interval
    year, month = divmod(moment.year * 12 + moment.month - 1 + sign * months, 12)
    first = moment.replace(year=year, month=month + 1, day=1)
    return first + timedelta(days=moment.day - 1) + sign * timedelta(days=days, seconds=seconds)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.none() | moments, min_size=1, max_size=8), moments, intervals, st.sampled_from([1, -1]),
    st.sampled_from(list(OPS)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_comparisons_are_the_calendars(
    times: list[datetime | None],
    constant: datetime,
    interval: tuple[int, int, int],
    sign: int,
    op: str,
    flipped: bool,
    is_met: bool,
) -> None:
    """With any interval, either way round, printed and read again, by a scan and by an index; null is unknown."""
    live = [one for one in times if one is not None]
    if live and is_met:
        constant = later(live[0], sign, interval)
    micros = [0 if one is None else int(parse_time(one.isoformat(), UTC)) for one in times]
    column = ScalarColumn(np.array(micros, np.int64), np.array([one is not None for one in times], np.bool_))
    batch = Batch({T: column}, len(times))
    value = (
        "t" if interval == (0, 0, 0) else f"t {'-+'[sign > 0]} INTERVAL 'P{interval[0]}M{interval[1]}DT{interval[2]}S'"
    )
    mirrored = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(op, op)
    iso = f"ISO '{constant.astimezone(SHANGHAI).isoformat()}'"
    text = f"{iso} {mirrored} {value}" if flipped else f"{value} {op} {iso}"
    wanted = [i for i, one in enumerate(times) if one is not None and OPS[op](later(one, sign, interval), constant)]
    compiled = compile_filter(text, SCHEMA, indexed=frozenset({Indexed(T)}))
    assert np.flatnonzero(compiled.evaluate(batch)).tolist() == wanted
    assert compile_filter(compiled.text, SCHEMA).text == compiled.text
    found = candidates(compiled.predicate, PartIndexes(Part(batch, 0), compiled.indexed), 99)
    assert found is None or (found.rest is None and found.offsets.tolist() == wanted)
    assert found is not None or op == "!=" or interval[0]


def test_fields_and_lists_of_times() -> None:
    """Two fields, ranges between sums of constants, and `in`; a time without an offset is of the field's zone."""
    base = int(parse_time("2025-01-01T00:00:00Z", UTC))
    hours = np.arange(48, dtype=np.int64) * 3_600_000_000 + base
    batch = Batch({T: ScalarColumn(hours), U: ScalarColumn(np.full(48, hours[24]))}, 48)

    def found(text: str) -> list[int]:
        return np.flatnonzero(compile_filter(text, SCHEMA).evaluate(batch)).tolist()

    assert found("t >= u and t + INTERVAL 'PT1H' != u") == [*range(24, 48)]
    assert found("ISO '2025-01-01T05:00:00Z' <= t < ISO '2025-01-01T05:00:00Z' + INTERVAL 'PT2H'") == [5, 6]
    assert found("t in [ISO '2025-01-01T05:00:00Z', ISO '2025-01-01 09:00:00'] and t is not null") == [1, 5]
    assert found('t == iso "2025-01-01T12:00:00+08:00"') == [4]
    assert found("t + INTERVAL 'P1M' == ISO '2025-02-01T03:00:00Z'") == [3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("t > '2025-01-01'", "comparisons between Timestamptz and VarChar are not supported; a time is written ISO"),
        ("t > 5", "comparisons between Timestamptz and Int64"),
        ("t + 1 > ISO '2025-01-01'", "+ can not be used on Timestamptz"),
        ("t * INTERVAL 'P1D' > ISO '2025-01-01'", "* can not be used on Interval"),
        ("id + INTERVAL 'P1D' > 5", "an INTERVAL is added to a field of type Timestamptz"),
        ("t == INTERVAL 'P1D'", "comparisons between Timestamptz and Interval"),
        ("t in ['2025-01-01']", "cannot be casted to Timestamptz"),
        ("id == ISO '2025-01-01'", "comparisons between Int64 and Timestamptz"),
        ("a == ISO '2025-01-01'", "comparisons between JSON and Timestamptz"),
        ("a in [ISO '2025-01-01']", "comparisons between JSON and Timestamptz"),
        ("json_contains(a, ISO '2025-01-01')", "comparisons between JSON and Timestamptz"),
        ("t > ISO 'soon'", "'soon' is no ISO 8601 time"),
        ("t > ISO '2025-01-01' + INTERVAL 'P9999Y'", "out of the range of years"),
        ("t + INTERVAL 'P1' > ISO '2025-01-01'", "'P1' is no ISO 8601 interval"),
        ("t + INTERVAL 'P1D' + INTERVAL 'P1D' > ISO '2025-01-01'", "one to each"),
        ("t like 'a%'", "like"),
        ("t", "predicate is not a boolean expression, its type is Timestamptz"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(FilterError) as refused:
        compile_filter(text, SCHEMA)
    assert says in str(refused.value)
