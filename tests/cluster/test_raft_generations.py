"""Learners, and a group's last entry: who counts, who may lead, and what a leader may promise before another group."""

from __future__ import annotations

import pytest

from cluster.checkpoint import begin_log_at
from cluster.raft import BecameLeader, LostLeadership, NotLeader, RaftConfig, RaftEvent
from cluster.raft_wire import Append, HigherTerm, decode, encode
from storage.journal import HardState
from tests.cluster.raft_stage import Actor, Stage

CONFIG = RaftConfig()


def led(servers: int, learners: int) -> Stage:
    """A stage on which `a` leads the voters, and the others follow."""
    stage = Stage(servers, learners=learners)
    followers = [name for name in stage.actors if name not in stage.voters]
    for actor in stage.actors.values():
        actor.raft.set_learners(followers)
    stage.lead("a", stage.voters[1:])
    stage.settle()
    return stage


def test_a_learner_has_what_the_voters_have() -> None:
    """It is fed like them, hears what is committed, and says how far it is."""
    stage = led(3, 2)
    for payload in (b"x", b"y"):
        stage["a"].raft.propose(payload)
    stage.settle()
    assert all(actor.delivered == [b"x", b"y"] for actor in stage.actors.values())
    assert {one.name: one.votes for one in stage["a"].raft.progress()} == {"b": True, "c": True, "d": False, "e": False}
    assert {one.match for one in stage["a"].raft.progress()} == {stage["a"].log.last_position}
    assert stage["d"].raft.is_learner and stage["d"].raft.leader == "a"


def test_a_learner_counts_for_nothing() -> None:
    """With both other voters away two learners commit nothing, pass no barrier, confirm no stamp, keep no leader."""
    stage = led(3, 2)
    for voter in "bc":
        for other in "ade":
            stage.cut(voter, other)
    stage.run(2 * CONFIG.heartbeat_s, "ade")
    stage.wait(CONFIG.election_s_min)
    confirmed = stage["a"].raft.confirmed_stamp
    stage["a"].raft.propose(b"x")
    stage["a"].raft.barrier(1)
    stage.settle("ade")
    assert stage["a"].delivered == [] and stage["a"].passed == {}
    assert stage["a"].raft.confirmed_stamp == confirmed
    stage.run(3 * CONFIG.election_s_max, "ade")
    assert not stage["a"].raft.leads


def test_a_learner_never_stands_for_election() -> None:
    """With all voters gone it waits, however long."""
    stage = led(3, 1)
    stage.crash("a", "b", "c")
    for _ in range(20):
        stage.wait(CONFIG.election_s_max)
        stage["d"].ring()
        stage["d"].sync()
    assert not any(stage.links["d", voter] for voter in "abc")
    assert stage["d"].raft.term == 1


def test_leadership_goes_to_voters_only() -> None:
    """A learner that is named, or that alone is up, is not handed the leadership."""
    stage = led(2, 1)
    assert not stage["a"].raft.transfer("c")
    stage.cut("a", "b")
    assert not stage["a"].raft.transfer()


def test_a_learner_that_is_let_go_is_no_stranger() -> None:
    """Its last answers are not counted as nonsense, and a new one is fed from the start."""
    stage = led(3, 1)
    stage["a"].raft.propose(b"x")
    stage["a"].sync()
    stage.deliver("ad")
    stage["d"].sync()
    stage["a"].raft.set_learners([])
    stage.settle()
    assert stage["a"].raft.refused == 0
    stage["a"].raft.propose(b"y")
    stage.settle()
    assert stage["d"].delivered == [b"x"] or stage["d"].delivered == []
    stage["a"].raft.set_learners(["d"])
    stage.settle()
    stage.run(CONFIG.heartbeat_s)
    assert stage["d"].delivered == [b"x", b"y"]


def test_after_the_last_entry_nothing_is_taken_or_promised() -> None:
    """No proposal, no barrier, no lease: whoever goes on may decide something at any moment."""
    stage = led(3, 0)
    stage.run(CONFIG.heartbeat_s)
    guard = stage["a"].raft._guard
    assert guard is not None and guard.leadership is not None
    assert guard.leadership.has_lease(100 + stage.now)
    stage["a"].raft.close(b"last")
    assert stage["a"].raft.is_closing and not guard.leadership.has_lease(100 + stage.now)
    with pytest.raises(NotLeader):
        stage["a"].raft.propose(b"x")
    with pytest.raises(NotLeader):
        stage["a"].raft.barrier(7)
    stage.settle()
    assert all(actor.delivered == [b"last"] for actor in stage.actors.values())


def test_a_last_entry_that_came_to_nothing_binds_nobody() -> None:
    """Its leader is cut off before anybody has it; the next one takes proposals, and so does the first later."""
    stage = led(3, 0)
    for other in "bc":
        stage.cut("a", other)
    stage["a"].raft.close(b"last")
    stage["a"].sync()
    stage.lead("b", "c")
    stage["b"].raft.propose(b"x")
    stage.settle("bc")
    for other in "bc":
        stage.join("a", other)
    stage.run(2 * CONFIG.heartbeat_s)
    assert not stage["a"].raft.is_closing
    assert all(actor.delivered == [b"x"] for actor in stage.actors.values())
    stage.lead("a", "bc")
    stage["a"].raft.propose(b"y")
    stage.settle()
    assert stage["a"].delivered == [b"x", b"y"]


def test_a_first_leader_need_not_wait() -> None:
    """Who is told to campaign in a group that begins is elected at once, though voters protect leaders at a start."""
    stage = Stage(3)
    stage["b"].raft.campaign()
    stage["b"].tick()
    for _ in range(4):
        stage.settle()
    assert stage["b"].raft.leads and stage.now == 0


def begun(heir: str) -> Stage:
    """A stage on which three servers open a group that goes on from position 7, an entry of term 4."""
    stage = Stage(3)
    for name, actor in stage.actors.items():
        stage.crash(name)
        actor.applied, actor.applied_term, actor.heir = 7, 4, heir
        actor.start()
    for one, two in stage.links:
        stage.links[one, two].clear()
        stage[one].raft.session(two, True)
    return stage


def leaders(stage: Stage) -> list[str]:
    return [name for name, actor in stage.actors.items() if actor.raft.leads]


def told(actor: Actor) -> list[RaftEvent]:
    """What an actor was told of its leaderships."""
    return [event for event in actor.events if isinstance(event, BecameLeader | LostLeadership)]


def test_an_heir_leads_without_being_elected() -> None:
    """No vote is asked for, and none is written; what it takes at once is decided when a majority's disks have it."""
    stage = begun("b")
    assert stage["b"].raft.lead_first() and stage["b"].raft.term == 5
    stage["b"].tick()
    assert leaders(stage) == ["b"]
    stage["b"].raft.propose(b"x")
    stage["b"].sync()
    assert all(isinstance(decode(*message), Append) for message in stage.links["b", "a"])
    assert stage["b"].delivered == []
    stage.deliver("ba")
    stage["a"].sync()
    stage.deliver("ab")
    stage["b"].tick()
    assert stage["b"].delivered == [b"x"] and stage.now == 0
    for _ in range(3):
        stage.settle()
    assert all(actor.delivered == [b"x"] and actor.raft.leader == "b" for actor in stage.actors.values())
    assert told(stage["b"]) == [BecameLeader(5)]


def test_an_heir_that_comes_late_decides_and_promises_nothing() -> None:
    """Others have had an election and have decided something before it opens the generation: what it takes is lost."""
    stage = begun("b")
    for other in "ac":
        stage.cut("b", other)
    stage.lead("a", "c")
    stage["a"].raft.propose(b"x")
    stage.settle("ac")
    assert stage["b"].raft.lead_first()
    stage["b"].tick()
    stage["b"].raft.propose(b"y")
    stage["b"].raft.barrier(7)
    stage["b"].sync()
    assert stage["b"].passed == {} and stage["b"].raft.confirmed_stamp == 0
    for other in "ac":
        stage.join("b", other)
    for _ in range(3):
        stage.run(2 * CONFIG.heartbeat_s)
    assert leaders(stage) == ["a"] and all(actor.delivered == [b"x"] for actor in stage.actors.values())
    assert stage["b"].passed == {} and told(stage["b"]) == [BecameLeader(5), LostLeadership(5)]


def test_an_heir_that_has_heard_of_a_later_term_is_not_told_that_it_leads() -> None:
    stage = begun("b")
    assert stage["b"].raft.lead_first()
    stage["b"].raft.receive("a", *encode(HigherTerm(9)))
    stage["b"].sync()
    assert told(stage["b"]) == [] and leaders(stage) == []


def test_in_an_heirs_term_nobody_else_is_elected() -> None:
    """Whoever stands for election does so in a later term, and whoever was opened first has no vote left for it."""
    stage = begun("b")
    assert stage["b"].raft.lead_first()
    stage.cut("a", "b")
    stage.cut("b", "c")
    stage.wait(2 * CONFIG.election_s_max)
    stage["a"].raft.campaign()
    stage["a"].sync()
    stage.settle("ac")
    stage.settle("ac")
    stage.settle("ac")
    stage["b"].sync()
    assert leaders(stage) == ["a"] and stage["a"].raft.term == 6


@pytest.mark.parametrize(
    ("known", "begins", "expected"),
    [
        pytest.param(None, True, HardState(5, "b"), id="blank"),
        pytest.param(HardState(4, None), False, HardState(5, "b"), id="begun by a checkpoint before it was a member"),
        pytest.param(HardState(4, "c"), False, HardState(5, "b"), id="voted in the term before"),
        pytest.param(HardState(5, None), False, HardState(5, None), id="heard the heir"),
        pytest.param(HardState(6, "c"), False, HardState(6, "c"), id="voted later"),
    ],
)
def test_whoever_opens_a_generation_has_voted_for_the_heir(
    known: HardState | None, begins: bool, expected: HardState
) -> None:
    """However its log began, a member has no other vote in the first term; what it has voted since stays."""
    log = Stage(1)["a"].journal.group(1)
    if known is not None:
        begin_log_at(log, 7, 4)
        log.set_hard_state(known.term, known.vote)
    assert begin_log_at(log, 7, 4, "b") == begins
    assert (log.hard_state, log.base_position, log.last_term) == (expected, 7, 4)
    log.append(b"x", 8, expected.term)
    assert not begin_log_at(log, 7, 4, "b")
    assert (log.hard_state, log.last_position) == (expected, 8)


@pytest.mark.parametrize("is_durable", [False, True])
def test_nobody_is_an_heir_twice(is_durable: bool) -> None:
    """After a crash its vote, and what it has sent, bind the heir; only one whose log begins leads unasked."""
    stage = begun("b")
    assert not stage["a"].raft.lead_first()
    stage["b"].raft.lead_first()
    if is_durable:
        stage["b"].sync()
        stage.crash("b")
        stage["b"].start()
        assert not stage["b"].raft.lead_first()
    stage["a"].sync()
    assert stage["a"].log.hard_state == HardState(5, "b")


@pytest.mark.parametrize("known", [0, 3, 9])
def test_what_is_known_to_be_decided_is_delivered_without_a_leader(known: int) -> None:
    """A start that knows of a later group delivers up to where that begins, as far as its log goes, and no further."""
    stage = led(3, 0)
    for payload in (b"x", b"y"):
        stage["a"].raft.propose(payload)
    stage.settle()
    stage.crash("b")
    stage["b"].committed = known
    stage["b"].start()
    stage["b"].sync()
    assert stage["b"].delivered == {0: [], 3: [b"x"], 9: [b"x", b"y"]}[known]


def test_a_group_of_one_voter_feeds_a_learner() -> None:
    """It commits, passes barriers and confirms stamps by itself, as soon as its disk has it."""
    stage = led(1, 1)
    stage["a"].raft.propose(b"x")
    stage["a"].raft.barrier(1)
    stage["a"].tick()
    assert stage["a"].delivered == [] and 1 in stage["a"].passed
    stage["a"].sync()
    assert stage["a"].delivered == [b"x"]
    stage.settle()
    stage.run(CONFIG.heartbeat_s)
    assert stage["b"].delivered == [b"x"]
    assert stage["a"].raft.confirmed_stamp > 0
