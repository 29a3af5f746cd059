"""What people are told of healing: by `annulus status`, and at the end of `annulus check --cluster`."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from node.cluster_check_command import EXIT_STATUSES, progress
from node.cluster_check_command import tables as check_tables
from node.scrub import Scrub
from node.status_tables import tables, troubles


def scrub(**facts: Any) -> dict[str, Any]:
    return Scrub(began_ms=1, ended_ms=2, chunks_total=1200, chunks_done=1200, **facts).to_plain()


def healing(**facts: Any) -> dict[str, Any]:
    return {"scrub": scrub(), "compared": {}, "rebuilding": [], **facts}


def status(found: Mapping[str, Any] | None) -> dict[str, Any]:
    node = {"name": "n2", "state": "ready", "why": "", "leads": 1, "replicas": 2, "healing": found}
    return {"node": "n1", "cluster": {"nodes": [node], "groups": []}}


def shown(renderables: Any) -> str:
    console = Console(file=StringIO(), width=200)
    for one in renderables:
        console.print(one)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


COMPARED = {"verdict": "undecided", "wrong": ["n1", "n2"], "rebuilt": [], "silent": []}


@pytest.mark.parametrize(
    ("found", "cell", "trouble"),
    [
        pytest.param(None, "not read yet", "", id="an older program, or a node that does not answer"),
        pytest.param({**healing(), "scrub": Scrub().to_plain()}, "not read yet", "", id="nothing read yet"),
        pytest.param(healing(), "1,200 whole", "", id="all is whole"),
        pytest.param(healing(scrub=Scrub(began_ms=1, chunks_total=9, chunks_done=4).to_plain()), "reading, 4 of 9", "",
                     id="while it reads"),
        pytest.param(healing(scrub=scrub(damaged=2, cured=2)), "2 damaged, 2 made good", "", id="made good"),
        pytest.param(healing(scrub=scrub(damaged=2, cured=1)), "2 damaged, 1 made good",
                     "n2 has 1 damaged chunks that nothing could replace", id="lost"),
        pytest.param(healing(rebuilding=["s1"]), "", "the replica of s1 on n2 differed", id="rebuilding"),
        pytest.param(healing(compared={"s0": COMPARED}), "", "the replicas of s0 differ (undecided): n1, n2",
                     id="nobody knows"),
        pytest.param(healing(compared={"s0": {**COMPARED, "verdict": "diverged", "rebuilt": ["n1", "n2"]}}), "", "",
                     id="rebuilt"),
    ],
)  # fmt: skip
def test_status_says_what_healing_has_found(found: Mapping[str, Any] | None, cell: str, trouble: str) -> None:
    """A cell for each node; what could not be made good is a sentence, and no status of 0."""
    given = status(found)
    assert cell in shown(tables(given))
    said = troubles(given)
    assert len(said) == bool(trouble) and all(trouble in one for one in said)


def test_a_round_is_shown() -> None:
    """How far it is in a line; at the end tables of nodes and shards, and a sentence of what it comes to."""
    found = {
        "finding": "damaged",
        "nodes": {
            "n1": {"state": "read", **scrub(damaged=3, cured=2, lost=["chunk ab is damaged"])},
            "n2": {"state": "silent", "why": "no session"},
        },
        "groups": {
            "s0": {"state": "compared", "position": 7, "verdict": "diverged", "again": "equal", "wrong": ["n2"],
                   "rebuilt": ["n2"], "silent": []},
            "s1": {"state": "waiting", "verdict": "equal", "wrong": [], "rebuilt": [], "silent": ["n2"]},
        },
    }  # fmt: skip
    assert progress(found) == "1,200 of 1,200 chunks read, 1 of 2 shards compared"
    text = shown(check_tables(found))
    for wanted in ("silent: no session", "diverged, then equal", "! n1: chunk ab is damaged", "damaged: something"):
        assert wanted in text
    assert EXIT_STATUSES == {"clean": 0, "healed": 3, "damaged": 1, "incomplete": 1}
