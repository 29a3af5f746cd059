"""Segments are skipped when their statistics rule out a match, and only then."""

from __future__ import annotations

import pytest

from storage.filter import FieldStats, compile_filter
from tests.storage.filter.model import SCHEMA

STATS = {
    SCHEMA.by_name[name].id: stats
    for name, stats in {
        "id": FieldStats(100, 199, 0, 100),
        "small": FieldStats(5, 5, 0, 100),
        "whole": FieldStats(None, None, 100, 100),
        "ratio": FieldStats(0.5, 1.5, 10, 100),
        "name": FieldStats("cat", "dog", 1, 100),
        "flag": FieldStats(True, True, 0, 100),
    }.items()
}


@pytest.mark.parametrize(
    "text",
    [
        "id == 99", "id > 199", "id >= 199.5", "id < 100", "id in [1, 200]", "id in []", "200 < id", "50 < id < 100",
        "small != 5", "not small == 5", "not (id >= 100)", "whole == 1", "whole != 1", "whole in [1]", "ratio > 1.5",
        "ratio < 0.25 and id > 0", "id < 50 or name > 'dogs'", "name == 'cas'", "name like 'b%'", "name like 'dot%'",
        "name like 'cap'", "flag == false", "not flag", "id is null", "whole is not null", "not whole is null", "false",
        "not (id > 0 or other == 'x')", "whole == 1 or false",
    ],
)  # fmt: skip
def test_segments_that_can_not_match(text: str) -> None:
    """No value between the bounds, or no null, satisfies it."""
    assert not compile_filter(text, SCHEMA).may_match(STATS)


@pytest.mark.parametrize(
    "text",
    [
        "id == 100", "id == 199", "id in [1, 150]", "id not in [1]", "small == 5", "whole is null", "ratio == 0.5",
        "name like 'ca%'", "name like 'do%'", "name like 'd%'", "name like '%z'", "name =~ 'z'", "name is null", "flag",
        "other == 'x'", "id + 1 == 5", "id < 50 or other == 'x'", "k == 1", "array_length(nums) == 1", "small < id", "",
        "not (id < 50 and other == 'x')", "ratio != 0.5", "name != 'cat'", "not name like 'c%'", "true",
        "words is null",
    ],
)  # fmt: skip
def test_segments_that_may_match(text: str) -> None:
    """Some value between the bounds does, or the statistics say nothing about it."""
    assert compile_filter(text, SCHEMA).may_match(STATS)


def test_without_statistics_everything_may_match() -> None:
    """A segment nothing is known of is never skipped."""
    for text in ("id == 1", "not id == 1", "name like 'a%'", "id in [1]", "id is null", "whole is not null"):
        assert compile_filter(text, SCHEMA).may_match({})
