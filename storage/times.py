"""Points in time as Timestamptz fields keep them, microseconds since 1970 in UTC; their texts, and what is added.

Texts are ISO 8601. One without an offset is of the zone that the field names; one is shown in that zone.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from storage.errors import InvalidParameter

TIMEZONE: Final = "timezone"
"""The property of a collection, and the type parameter of its fields, that names a zone of the IANA database."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_FIRST: Final = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
OUT_OF_RANGE: Final = "out of the range of years from 1 to 9999"
YEARS_MAX: Final = 10_000
"""Of an interval."""
_TEXT_CHARS_MAX: Final = 64
_INTERVAL: Final = re.compile(
    r"(-)?P(?:(\d{1,9})Y)?(?:(\d{1,9})M)?(?:(\d{1,9})W)?(?:(\d{1,9})D)?"
    r"(?:T(?:(\d{1,9})H)?(?:(\d{1,9})M)?(?:(\d{1,12})(?:\.(\d{1,6}))?S)?)?"
)


class Moment(int):
    """A point in time among the constants of a filter."""


@dataclass(frozen=True, slots=True)
class Interval:
    """What is added to a point in time: months by the calendar in UTC, then the rest."""

    months: int
    microseconds: int

    def negated(self) -> Interval:
        return Interval(-self.months, -self.microseconds)


def zone_of(name: str) -> tzinfo:
    """Return the zone of this name; none is UTC. Raises InvalidParameter."""
    if name in ("", "UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise InvalidParameter(f"{TIMEZONE} {name[:80]} is no zone of the IANA database, as Asia/Shanghai is") from None


def parse_time(text: str, zone: tzinfo) -> Moment:
    """Return the point in time of an ISO 8601 text. Raises ValueError."""
    if len(text) > _TEXT_CHARS_MAX:
        raise ValueError("too long for a time")
    if "\0" in text:  # Python would not look at what follows
        raise ValueError("a text of a time has no zero byte")
    found = datetime.fromisoformat(text.strip())
    if found.tzinfo is None:
        found = found.replace(tzinfo=zone)
    moment = Moment((found - _EPOCH) // _MICROSECOND)
    if not is_in_range(moment):
        raise ValueError(OUT_OF_RANGE)
    return moment


def is_in_range(microseconds: int) -> bool:
    """Return whether a year from 1 to 9999 holds the point in time."""
    return _FIRST <= microseconds <= _LAST


def show_time(microseconds: int, zone: tzinfo) -> str:
    """Return the ISO 8601 text of a point in time; what no year from 1 to 9999 holds in the zone is shown in UTC."""
    found = _EPOCH + microseconds * _MICROSECOND
    with contextlib.suppress(OverflowError):
        found = found.astimezone(zone)
    day, time = f"{found:%Y-%m-%d}".rjust(10, "0"), found.strftime("%H:%M:%S")
    fraction = f".{found.microsecond:06d}".rstrip("0") if found.microsecond else ""
    offset = found.isoformat()[len(found.replace(tzinfo=None).isoformat()) :]
    return f"{day}T{time}{fraction}{'Z' if offset == '+00:00' else offset}"


def parse_interval(text: str) -> Interval:
    """Return the interval of an ISO 8601 duration, as P1Y2M3DT4H5M6.7S. Raises ValueError."""
    found = _INTERVAL.fullmatch(text.strip())
    if found is None or not any(found.groups()[1:]) or text.strip().endswith("T"):
        raise ValueError("it is no duration, as P1DT12H is")
    years, months, weeks, days, hours, minutes, seconds = (int(one or 0) for one in found.groups()[1:8])
    fraction = int((found[9] or "0").ljust(6, "0"))
    in_all = timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes, seconds=seconds)
    months += 12 * years
    if months > 12 * YEARS_MAX or in_all.days > 366 * YEARS_MAX:
        raise ValueError(f"it is longer than {YEARS_MAX} years")
    made = Interval(months, in_all // _MICROSECOND + fraction)
    return made.negated() if found[1] else made


def show_interval(interval: Interval) -> str:
    """Return a duration that reads back as this interval, if its months and the rest have one sign."""
    sign = "-" if interval.months < 0 or interval.microseconds < 0 else ""
    seconds, fraction = divmod(abs(interval.microseconds), 1_000_000)
    tail = f".{fraction:06d}" if fraction else ""
    return f"{sign}P{abs(interval.months)}MT{seconds}{tail}S"


def shifted(times: npt.NDArray[Any], interval: Interval) -> npt.NDArray[np.int64]:
    """Return the points in time, an interval later.

    A day that a month does not have is counted on from its first: a month after 31 January is 3 March, or 2 March.
    """
    if interval.months:
        moments = times.astype("datetime64[us]")
        months = moments.astype("datetime64[M]")
        inside = moments - months.astype("datetime64[us]")
        times = ((months + interval.months).astype("datetime64[us]") + inside).astype(np.int64)
    return np.asarray(times + np.int64(interval.microseconds), np.int64)
