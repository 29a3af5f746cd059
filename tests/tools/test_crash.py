"""The crash test's own test: its model by tables, its rounds against a dumb node that breaks one promise at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.tools.dumb_node import FAULTS
from tools.crash.canary import CANARIES, run_canaries
from tools.crash.model import Kind, Model, Write
from tools.crash.rounds import Arena, Ending
from tools.crash.rows import SUBJECTS, Key, Subject, Version, differences, row, vector
from tools.crash.trace import Trace
from tools.crash.verify import split_by_shard

ONE, TWO, TEXT, AUTO = SUBJECTS
DUMB = "tests.tools.dumb_node"


def whole(subject: Subject, keys: Sequence[Key]) -> list[list[Key]]:
    return [list(keys)]


def odd_and_even(subject: Subject, keys: Sequence[Key]) -> list[list[Key]]:
    return [[key for key in keys if key % 2], [key for key in keys if not key % 2]]


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        pytest.param({1: [5], 2: [6]}, [], id="as acknowledged"),
        pytest.param({1: [5], 2: [6], 10: [9], 11: [9]}, [], id="the unanswered request happened"),
        pytest.param({1: [5]}, [Kind.LOST], id="a row is missing"),
        pytest.param({1: [5], 2: [4]}, [Kind.STALE], id="an older version is back"),
        pytest.param({1: [5], 2: [6], 3: [7]}, [Kind.GHOST], id="a deleted row is back"),
        pytest.param({1: [5], 2: [6], 99: [7]}, [Kind.GHOST], id="a row that nobody wrote"),
        pytest.param({1: [5, 5], 2: [6]}, [Kind.DOUBLED], id="a row is there twice"),
        pytest.param({1: [5], 2: [6], 10: [9]}, [Kind.HALF], id="half of the unanswered request happened"),
        pytest.param({1: [5], 2: [6], 10: [8], 11: [9]}, [Kind.STALE, Kind.HALF], id="a version of another request"),
    ],
)
def test_settling_names_what_is_wrong(found: dict[Key, list[Version]], kinds: list[Kind]) -> None:
    """Rows 1 and 2 are acknowledged, 3 is deleted, 10 and 11 are in a request that nobody answered."""
    model = _model()
    assert [violation.kind for violation in model.settle(found, whole)] == kinds


def test_a_request_may_happen_per_shard() -> None:
    """With the keys on two shards, one shard may have its part and the other not."""
    assert _model().settle({1: [5], 2: [6], 10: [9]}, odd_and_even) == []


def test_an_unanswered_delete_is_whole_or_not() -> None:
    """Half a delete is a half; keys that were absent before tell nothing."""
    for found, kinds in (({1: [5], 2: [6]}, []), ({}, []), ({2: [6]}, [Kind.HALF])):
        model = _model(unknown=Write(9, {1: None, 2: None, 3: None}))
        assert [violation.kind for violation in model.settle(found, whole)] == kinds


def test_the_model_believes_what_it_settled() -> None:
    """After settling, what was unknown is known, and the next round holds the node to it."""
    model = _model()
    assert model.settle({1: [5], 2: [6], 10: [9], 11: [9]}, whole) == []
    assert model.rows == {1: 5, 2: 6, 10: 9, 11: 9}
    assert not model.unknown and not model.under_way
    assert [violation.kind for violation in model.settle({1: [5], 2: [6]}, whole)] == [Kind.LOST, Kind.LOST]


def test_rows_are_a_function_of_key_and_version() -> None:
    """The same row again is the same; another version has another vector; one changed value is named."""
    assert row(TWO, 7, 1) == row(TWO, 7, 1)
    assert vector(TWO, 7, 1) != vector(TWO, 7, 2)
    assert differences(row(TWO, 7, 1), row(TWO, 7, 1)) == []
    changed = {**row(TWO, 7, 1), "small": 1.0}
    assert [line.partition(":")[0] for line in differences(row(TWO, 7, 1), changed)] == ["small"]
    assert all(np.float32(x) == x for x in vector(TEXT, 3, 4))


def test_keys_are_parted_as_the_node_parts_them() -> None:
    """Every key is in one part; a collection of one shard has one part."""
    keys = list(range(100))
    for subject in (TWO, TEXT):
        parts = split_by_shard(subject, keys)
        assert len(parts) == 2 and sorted(key for part in parts for key in part) == keys
        assert all(len(part) > 20 for part in parts)
    assert split_by_shard(ONE, keys) == [keys]


def test_endings_are_drawn_from_the_seed() -> None:
    """The same seed ends rounds in the same way, and all ways occur."""
    endings = [Ending.drawn(random.Random(f"1/{i}")) for i in range(300)]
    assert endings == [Ending.drawn(random.Random(f"1/{i}")) for i in range(300)]
    assert {(ending.gently, ending.cut_short_s is not None) for ending in endings} == {
        (False, False),
        (True, False),
        (True, True),
    }
    assert {len(ending.starts_killed_s) for ending in endings} == {0, 1, 2, 3}


def test_a_node_that_keeps_its_promises_passes(tmp_path: Path) -> None:
    """Two rounds against a sound node: nothing to complain of, one line in the trace per operation."""
    arena = _run(tmp_path, rounds=2)
    assert arena.world.violations == []
    assert arena.world.acknowledged > 0 and arena.world.reads > 0
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) > arena.world.acknowledged


NOTICED = {
    "late": {Kind.LOST, Kind.CATALOGUE, Kind.GHOST, Kind.STALE},
    "halves": {Kind.HALF},
    "revives": {Kind.GHOST, Kind.DOUBLED},
    "doubles": {Kind.DOUBLED, Kind.READ, Kind.COUNT},
    "alters": {Kind.DAMAGED},
    "old": {Kind.SEARCH, Kind.READ},
    "unclean": {Kind.CHECK},
    "stubborn": {Kind.PROCESS},
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault in ("late", "halves") else pytest.mark.slow) for fault in FAULTS]
)
def test_a_broken_promise_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with one fault does not get through, and the complaint is of the right kind."""
    monkeypatch.setenv("FAKE_FAULT", fault)
    arena = _run(tmp_path, rounds=8)
    assert {violation.kind for violation in arena.world.violations} & NOTICED[fault]


@pytest.mark.slow
def test_every_canary_is_noticed(tmp_path: Path) -> None:
    """Lies to the model, rows changed behind its back and a flipped byte are all caught."""
    said: list[str] = []
    with Trace(str(tmp_path / "trace.jsonl")) as trace:
        arena = Arena(str(tmp_path), 1, trace, said.append, node_module=DUMB, subjects=(TWO, AUTO))
        missed = asyncio.run(run_canaries(arena, said.append))
    assert missed == []
    assert sum(line.startswith("canary") for line in said) == len(CANARIES) + 1, "one file is there to be damaged"


def _model(unknown: Write | None = None) -> Model:
    model = Model(ONE)
    for write in (Write(5, {1: 5}), Write(6, {2: 6, 3: 6}), Write(7, {3: None})):
        model.begin(write)
        model.acknowledge(write)
    last = unknown or Write(9, {10: 9, 11: 9})
    model.begin(last)
    model.lose_sight(last)
    return model


def _run(folder: Path, *, rounds: int) -> Arena:
    with Trace(str(folder / "trace.jsonl")) as trace:
        arena = Arena(str(folder), 1, trace, lambda line: None, node_module=DUMB, subjects=(ONE,))
        asyncio.run(arena.run(rounds))
    return arena
