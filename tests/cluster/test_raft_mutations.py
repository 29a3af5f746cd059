"""Each rule of the guard, taken away, breaks a hand-made schedule; with all of them, none is broken."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tests.cluster import test_raft_schedules
from tests.cluster.raft_mutations import MUTATIONS


def cases(schedule: Any) -> list[dict[str, Any]]:
    """The arguments with which a schedule is run."""
    marks = [mark for mark in getattr(schedule, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        assert not inspect.signature(schedule).parameters
        return [{}]
    names, values = marks[0].args
    return [dict(zip(names, value, strict=True)) for value in values]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str) -> None:
    """Some schedule that is named for the mutation fails under it."""
    mutation = MUTATIONS[name]
    noticed = 0
    for schedule_name in mutation.noticed_by:
        schedule = getattr(test_raft_schedules, schedule_name)
        for arguments in cases(schedule):
            with mutation.applied():
                try:
                    schedule(**arguments)
                except (AssertionError, pytest.fail.Exception, ValueError):
                    noticed += 1
    assert noticed, f"nobody notices that {mutation.text}"
