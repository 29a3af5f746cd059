"""A replica that forgot, and was told where it has to catch up to, takes no part in elections before it is there."""

from __future__ import annotations

from random import Random

from storage.journal import Journal
from tests.cluster.raft_stage import Stage
from tests.cluster.test_raft_schedules import led
from tests.sim.disk import SimDisk


def lose(stage: Stage, name: str, *, term: int, leader: str, abstains: int) -> None:
    """Have a server come back with an empty disk, and what `node/forming.py` gives it to begin with."""
    actor = stage[name]
    actor.disk = SimDisk(Random(5))
    journal = Journal.open(actor.disk, "journal", file_bytes_max=1 << 20)
    journal.group(0).set_hard_state(term, leader)
    journal.write_now()
    journal.close()
    stage.start(name)
    assert actor.raft._guard is not None
    actor.raft._guard._abstains = abstains


def remembers(stage: Stage) -> bool:
    return stage["c"].raft.remembers


def test_it_abstains_until_it_has_caught_up() -> None:
    """Neither does it vote, nor stand, nor vouch for others; caught up, it does all three again."""
    stage = led()
    for payload in (b"x", b"y", b"z"):
        stage["a"].raft.propose(payload)
        stage.settle()
    term, last = stage["a"].raft.term, stage["a"].raft.last_position
    stage.crash("a", "c")
    lose(stage, "c", term=term, leader="a", abstains=last)
    assert not remembers(stage)
    assert not stage.elect("b", "c")
    assert not stage.elect("c", "b")
    stage.start("a")
    stage.lead("a", "b")
    stage.settle()
    assert stage["c"].delivered == [b"x", b"y", b"z"]
    assert remembers(stage)
    stage.crash("a")
    stage.lead("c", "b")


def test_what_it_was_told_outlives_a_leader_that_is_gone() -> None:
    """It keeps abstaining under a new leader whose log does not reach as far; the next entries bring it there."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage.settle()
    term, last = stage["a"].raft.term, stage["a"].raft.last_position
    stage.crash("c")
    lose(stage, "c", term=term, leader="a", abstains=last + 3)
    stage.settle()
    assert not remembers(stage)
    for payload in (b"1", b"2", b"3"):
        stage["a"].raft.propose(payload)
    stage.settle()
    assert remembers(stage)
