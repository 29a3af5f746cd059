"""The measurement of consensus alone: three real processes agree, one of them leads, and the figures are of commits."""

from __future__ import annotations

from dataclasses import replace

from tools.bench.consensus import LOADS, measure


def test_three_processes_commit_what_one_proposes() -> None:
    """What the leader counted was delivered on a majority, in both forms of entries: small and large."""
    for load in (LOADS["many"], replace(LOADS["big"], entry_bytes=200_000)):
        found = measure(load, 0.5, profile=False)
        (leader,) = (one for one in found if one["led"])
        assert leader["commits"] > 0
        assert leader["p50_ms"] <= leader["p99_ms"]
        delivered = sorted(one["delivered"] for one in found)
        assert delivered[1] >= leader["commits"]


def test_idle_groups_have_leaders() -> None:
    """Every group of an idle cluster is led by exactly one of the three."""
    assert sum(one["led"] for one in measure(replace(LOADS["idle"], groups=4), 0.2, profile=False)) == 4
