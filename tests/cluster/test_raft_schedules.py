"""Hand-made schedules of Raft groups with peers, each of which breaks PySyncObj as it comes, or a group that lacks a
rule of the guard."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from cluster.raft import Behind, LostLeadership, NotLeader, RaftConfig
from cluster.raft_leader import WINDOW_BYTES
from cluster.raft_wire import Ack, Append, AskVote, Campaign, GrantVote, HigherTerm, Malformed, decode, encode
from storage.errors import StorageFault
from storage.journal import Journal
from tests.cluster.raft_stage import Stage
from tests.sim.disk import SimDisk

CONFIG = RaftConfig()


def led(servers: int = 3, leader: str = "a") -> Stage:
    """A stage on which a server leads and all have its first entry."""
    stage = Stage(servers)
    stage.lead(leader, "".join(name for name in stage.actors if name != leader))
    return stage


def test_the_first_election_commits_and_all_hear_of_it() -> None:
    for servers in (2, 3, 4, 5):
        stage = led(servers)
        stage["a"].raft.propose(b"x")
        stage.settle()
        assert all(actor.delivered == [b"x"] for actor in stage.actors.values())
        assert {actor.raft.leader for actor in stage.actors.values()} == {"a"}
        assert all(actor.raft.refused == 0 for actor in stage.actors.values())


# ---- durability


def test_a_follower_does_not_vouch_for_what_its_disk_lacks() -> None:
    """An entry that a follower has in memory only is not committed; the power failing on it loses nothing."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage["a"].sync()
    stage.wait(CONFIG.heartbeat_s)
    stage.deliver("ab")
    stage.deliver("ba")
    assert stage["a"].delivered == []
    stage["b"].sync()
    stage.deliver("ba")
    assert stage["a"].delivered == [b"x"]
    stage.crash("a", "b")
    stage.start("b")
    stage.lead("b", "c")
    assert stage["b"].delivered == stage["c"].delivered == [b"x"]


def test_a_leader_does_not_count_itself_before_its_disk() -> None:
    """Acknowledgements of a minority commit nothing while the leader's own copy is not durable."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage["a"].tick()
    stage.deliver("ab")
    stage["b"].sync()
    stage.deliver("ba")
    assert stage["a"].raft.committed == 2
    stage["a"].sync()
    assert stage["a"].delivered == [b"x"]


def test_a_vote_leaves_when_it_is_durable() -> None:
    """A voter that loses power before its vote is durable has told nobody; the same for a candidate."""
    stage = led()
    stage.wait(2)
    stage["b"].ring()
    stage["b"].tick()
    stage.deliver("bc")
    stage.deliver("cb")
    assert stage["b"].raft.term == 2
    assert not stage.links["b", "c"], "the candidacy is not durable"
    stage["b"].sync()
    stage.deliver("bc")
    assert not [header for header, _ in stage.links["c", "b"] if header["m"] == "vg"], "nor the vote"
    stage.crash("c")
    stage.start("c")
    assert stage["c"].raft.term == 1
    stage.wait(2)
    for _ in range(2):
        stage["b"].ring()
        stage["b"].sync()
        stage.deliver("bc")
        stage.deliver("cb")
    stage["b"].sync()
    stage.deliver("bc")
    stage["c"].sync()
    assert [header for header, _ in stage.links["c", "b"] if header["m"] == "vg"]
    stage.crash("c")
    stage.start("c")
    assert stage["c"].log.hard_state.vote == "b"


def test_a_slow_disk_is_no_silence() -> None:
    """A follower that waits for its disk answers all the same, and its leader goes on leading."""
    stage = led()
    stage["a"].raft.propose(b"x")
    for _ in range(20):
        stage.wait(CONFIG.heartbeat_s)
        stage["a"].sync()
        for link in ("ab", "ac", "ba", "ca"):
            stage.deliver(link)
    assert stage["a"].raft.leads
    assert stage["a"].delivered == []


# ---- appends


def test_a_late_append_cuts_nothing() -> None:
    """A resent append with fewer entries than the follower has leaves the rest: they were acknowledged."""
    stage = led()
    for payload in (b"x", b"y", b"z", b"w"):
        stage["a"].raft.propose(payload)
        stage["a"].sync()
    first, blobs = stage.links["a", "b"][0]
    stage.deliver("ab")
    stage["b"].sync()
    stage.deliver("ba")
    assert stage["a"].delivered == [b"x", b"y", b"z", b"w"]
    stage.hand("ab", (first, blobs))
    stage.hand("ab", (first | {"v": [first["v"][0], 1_000, *first["v"][2:]]}, blobs))
    assert stage["b"].log.last_position == stage["a"].log.last_position
    stage.crash("a")
    stage.lead("b", "c")
    assert stage["c"].delivered == [b"x", b"y", b"z", b"w"]


def test_nothing_is_sent_twice() -> None:
    """With 64 entries in flight each follower is sent each byte once, whenever acknowledgements come."""
    stage = led()
    stage.sent_bytes = 0
    for _ in range(64):
        stage["a"].raft.propose(bytes(70_000))
        stage["a"].tick()
    for _ in range(300):
        stage["a"].sync()
        for name in "bc":
            stage.deliver(f"a{name}", 1)
            stage[name].sync()
            stage.deliver(f"{name}a", 1)
    assert len(stage["a"].delivered) == 64
    assert stage.sent_bytes == 2 * 64 * 70_000


def test_a_slow_follower_costs_a_window() -> None:
    """A follower that acknowledges nothing is sent a window's bytes and no more, in pieces of about 1 MB."""
    stage = led()
    for _ in range(40):
        stage["a"].raft.propose(bytes(600_000))
        for _ in range(8):
            stage["a"].sync()
        stage.deliver("ac")
        stage["c"].sync()
        stage.deliver("ca")
    assert len(stage["a"].delivered) == 40
    waiting = [sum(len(blob) for blob in blobs) for _, blobs in stage.links["a", "b"]]
    assert WINDOW_BYTES <= sum(waiting) <= WINDOW_BYTES + 1_200_000
    assert max(waiting) <= 1_200_000
    slow = {peer.name: peer for peer in stage["a"].raft.progress()}["b"]
    assert slow.in_flight_bytes == sum(waiting)
    stage.settle()
    assert len(stage["b"].delivered) == 40


@pytest.mark.parametrize(("stale", "new", "size"), [(6, 6, 1_500_000), (40, 40, 300_000), (200, 200, 100), (2, 60, 9)])
def test_a_conflicting_tail_is_repaired(stale: int, new: int, size: int) -> None:
    """A follower whose log conflicts far below the end catches up, without being sent more than it lacks."""
    stage = led()
    stage.cut("a", "b")
    stage.cut("a", "c")
    for _ in range(stale):
        stage["a"].raft.propose(bytes(size))
    stage["a"].sync()
    stage.lead("b", "c")
    for serial in range(new):
        stage["b"].raft.propose(b"%d" % serial + bytes(size))
        stage.settle("bc")
    stage.lead("c", "b")
    stage.sent_bytes = 0
    stage.join("a", "b")
    stage.join("a", "c")
    stage.run(1.0)
    # Without the values: where pytest cuts nothing, in CI, it would look for what differs in megabytes, for an hour.
    assert all(stage[name].contents() == stage["c"].contents() for name in "ab")
    assert stage.sent_bytes <= (new + 1) * (size + 4) + (64 << 10)
    assert (stage["a"].delivered == stage["c"].delivered) is True


def test_what_is_committed_is_never_cut() -> None:
    """A leader whose log contradicts what this replica knows to be committed is told of damage, not obeyed."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage.settle()
    stage["b"].raft.receive("a", *encode(Append(9, 1, 2, 1, 3, [5], [b"y"])))
    with pytest.raises(StorageFault, match="term 1 at 3"):
        stage["b"].raft.tick()
    assert stage["b"].contents()[-1] == (3, 1, b"x")


# ---- answers


def test_an_acknowledgement_of_an_older_leadership_counts_for_nothing() -> None:
    """Acknowledgements of term 1 that arrive in term 3 commit nothing: the follower no longer has those entries."""
    stage = led(5)
    for serial in range(8):
        stage["a"].raft.propose(b"old %d" % serial)
    stage["a"].sync()
    stage.deliver("ac")
    stage["c"].sync()  # its answers stay on the way
    stage.drop("ab", "ad", "ae")
    assert len(stage.links["c", "a"]) >= 1
    stage.lead("b", "de")
    late = list(stage.links["c", "a"])
    stage.drop("ca")
    stage.run(0.5, "bcde")
    stage.wait(2)
    stage["a"].tick()
    assert not stage["a"].raft.leads
    stage.settle("abde")
    stage.lead("a", "bd")
    for serial in range(12):
        stage["a"].raft.propose(b"new %d" % serial)
    stage["a"].sync()
    stage.deliver("ab")
    stage["b"].sync()
    for message in late:
        stage.hand("ca", message)
    stage.deliver("ba")
    assert stage["a"].delivered == [], "two copies of five"
    assert all(peer.match <= stage[peer.name].log.last_position for peer in stage["a"].raft.progress())


def test_a_vote_counts_once_and_only_a_member_has_one() -> None:
    """Neither a second copy of a vote nor a stranger's makes a leader of a candidate with two of five."""
    stage = Stage(5)
    stage.wait(2)
    stage["a"].ring()
    stage["a"].tick()
    for name in "bcde":
        stage.deliver(f"a{name}")
        stage.deliver(f"{name}a")
    stage["a"].sync()
    assert stage["a"].raft.term == 1
    vote = encode(GrantVote(1))
    for voter in ("b", "b", "z", "a"):
        stage["a"].raft.receive(voter, *vote)
        stage["a"].tick()
    assert not stage["a"].raft._core.is_leader
    assert stage["a"].raft.refused == 2
    stage["a"].raft.receive("c", *vote)
    assert stage["a"].raft._core.is_leader


# ---- faults of the own disk


def test_a_fault_that_a_message_meets_is_told_by_the_tick() -> None:
    """Who carries messages need not know of faults: a journal that has halted stops the replica in its next tick."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage["a"].tick()
    stage["b"].disk.failing_syncs = 1
    stage["b"].log.set_hard_state(2, None)
    with pytest.raises(StorageFault, match="Input/output"):
        stage["b"].journal.write_now()
    stage["b"].raft.receive("a", *stage.links["a", "b"][0])
    with pytest.raises(StorageFault, match="syncing"):
        stage["b"].raft.tick()


# ---- checkpoints


def behind() -> Stage:
    """`b` lacks entries that `a` has trimmed."""
    stage = led()
    stage.cut("a", "b")
    stage.cut("b", "c")
    for serial in range(20):
        stage["a"].raft.propose(b"%d" % serial)
    stage.settle()
    stage.run(0.5)
    for name in "ac":
        stage[name].raft.trim(15)
        stage[name].sync()
    stage.join("a", "b")
    stage.join("b", "c")
    return stage


def test_who_lacks_trimmed_entries_is_told_to_get_a_checkpoint() -> None:
    """Behind comes once a second; after an install the log goes on behind it, and nothing moves before."""
    stage = behind()
    stage.run(3.0)
    assert stage["b"].behind and len(stage["b"].behind) <= 4
    assert stage["b"].behind[0] == Behind("a", stage["a"].log.base_position, 1)
    assert [peer.is_behind for peer in stage["a"].raft.progress()] == [True, False]
    assert stage["b"].raft.committed == 2
    stage["b"].raft.install(18, 1)
    stage.run(0.5)
    assert stage["b"].raft.delivered == stage["a"].raft.delivered == 22
    assert stage["b"].delivered == [b"16", b"17", b"18", b"19"]
    assert not any(peer.is_behind for peer in stage["a"].raft.progress())
    stage["b"].raft.install(10, 1)
    assert stage["b"].raft.delivered == 22


def test_a_late_hint_to_get_a_checkpoint_wipes_nothing() -> None:
    """The same hint again, after the install and after more was acknowledged, leaves the log as it is."""
    stage = behind()
    stage.wait(CONFIG.heartbeat_s)
    stage["a"].tick()
    hint = next(message for message in stage.links["a", "b"] if message[0]["m"] == "ms")
    stage.run(0.5)
    stage["b"].raft.install(18, 1)
    stage.run(0.5)
    stage.crash("c")
    stage["a"].raft.propose(b"acknowledged by a and b")
    stage.settle()
    last = stage["b"].log.last_position
    stage.hand("ab", (hint[0] | {"v": [hint[0]["v"][0], 1_000, *hint[0]["v"][2:]]}, hint[1]))
    stage["b"].raft.install(20, 1)
    assert stage["b"].log.last_position == last
    stage.crash("a")
    stage["c"].applied, stage["c"].applied_term = 15, 1
    stage.start("c")
    stage.lead("b", "c")
    assert stage["c"].delivered[-1] == b"acknowledged by a and b"


def test_an_install_keeps_a_log_that_holds_the_entry() -> None:
    """A checkpoint in the middle of the log does not cost the acknowledged rest of it."""
    stage = led()
    for serial in range(20):
        stage["a"].raft.propose(b"%d" % serial)
    stage["a"].sync()
    stage.deliver("ab")
    stage["b"].sync()
    stage.deliver("ba")
    assert len(stage["a"].delivered) == 20
    assert stage["b"].raft.delivered < 10
    stage["b"].raft.install(10, 1)
    assert (stage["b"].raft.delivered, stage["b"].log.last_position) == (10, 22)
    stage.crash("a")
    assert stage.elect("b", "c")
    stage.settle("bc")
    stage["c"].raft.install(10, 1)
    stage.run(0.5, "bc")
    assert stage["c"].delivered == [b"%d" % serial for serial in range(8, 20)]


def test_an_install_ends_a_leadership_without_the_entry() -> None:
    """A leader that a checkpoint of later leaders has overtaken knows then that it is none."""
    stage = led()
    stage.cut("a", "b")
    stage.cut("a", "c")
    for serial in range(20):
        stage["a"].raft.propose(b"phantom %d" % serial)
    stage["a"].sync()
    before = stage.now
    stage.lead("b", "c")
    for serial in range(20):
        stage["b"].raft.propose(b"%d" % serial)
    stage.settle("bc")
    stage.now = before
    assert stage["a"].raft.leads
    stage["a"].raft.install(15, 2)
    stage["a"].sync()
    assert LostLeadership(1) in stage["a"].events
    assert (stage["a"].raft.term, stage["a"].log.base_position, stage["a"].raft.delivered) == (2, 15, 15)
    stage.now = before + 5
    stage.lead("b", "c")
    stage.join("a", "b")
    stage.run(0.5)
    assert stage["a"].delivered == [b"%d" % serial for serial in range(12, 20)]


def test_a_crash_between_checkpoint_and_log_is_finished_at_the_start() -> None:
    """A log that a checkpoint has overtaken, or that contradicts it, begins anew behind it."""
    stage = behind()
    stage.run(0.5)
    stage.crash("b")
    stage["b"].applied, stage["b"].applied_term = 18, 1
    stage.start("b")
    assert stage["b"].log.base_position == 18
    stage.run(0.5)
    assert stage["b"].delivered == [b"16", b"17", b"18", b"19"]


def test_no_commit_index_without_a_match() -> None:
    """Hints and heartbeats of a new leader do not commit what only this old leader has."""
    stage = led()
    stage.cut("a", "b")
    stage.cut("a", "c")
    for serial in range(3):
        stage["a"].raft.propose(b"phantom %d" % serial)
    stage["a"].sync()
    stage.lead("b", "c")
    for serial in range(20):
        stage["b"].raft.propose(b"%d" % serial)
    stage.settle("bc")
    for name in "bc":
        stage[name].raft.trim(15)
        stage[name].sync()
    stage.join("a", "b")
    for _ in range(8):
        stage.wait(CONFIG.heartbeat_s)
        stage.settle("ab")
    assert stage["a"].delivered == []
    assert LostLeadership(1) in stage["a"].events
    stage["a"].raft.install(18, 2)
    stage.run(0.5)
    assert stage["a"].delivered == [b"%d" % serial for serial in range(15, 20)]


def test_a_restart_takes_nothing_for_committed() -> None:
    """An entry that only a dead leader had is not delivered by it after its restart, and gives way."""
    stage = led()
    stage.cut("a", "b")
    stage.cut("a", "c")
    stage["a"].raft.propose(b"phantom")
    stage["a"].sync()
    stage.crash("a")
    stage.start("a")
    stage["a"].tick()
    stage.run(0.5, "a")
    assert stage["a"].delivered == []
    stage.lead("b", "c")
    stage["b"].raft.propose(b"real")
    stage.settle("bc")
    stage.join("a", "b")
    stage.join("a", "c")
    stage.run(0.5)
    assert stage["a"].delivered == [b"real"]


# ---- elections and leases


def test_an_isolated_leader_steps_down() -> None:
    """A leader that no quorum answers is none after an election timeout, and says so."""
    stage = led()
    stage.run(0.3)
    stage.wait(CONFIG.election_s_max + 0.01)
    stage["a"].tick()
    assert LostLeadership(1) in stage["a"].events
    assert stage["a"].raft.confirmed_stamp == 0
    with pytest.raises(NotLeader):
        stage["a"].raft.propose(b"x")


def test_a_leader_that_is_heard_is_not_voted_away() -> None:
    """A candidate that cannot hear the leader gets no vote of one who does, though it asks in a higher term."""
    stage = led()
    stage.run(0.5, "ac")
    stage["b"].ring()
    stage["b"].tick()
    stage.deliver("bc")
    assert not stage.links["c", "b"]
    stage.hand("bc", encode(AskVote(7, 100, 7, False)))  # type: ignore[arg-type]
    stage.hand("ba", encode(AskVote(7, 100, 7, False)))  # type: ignore[arg-type]
    assert (stage["a"].raft.term, stage["c"].raft.term, stage["a"].raft.leads) == (1, 1, True)


def test_a_restarted_voter_keeps_the_promise_it_has_forgotten() -> None:
    """Who starts votes for nobody for as long as a leader may count on it."""
    stage = led()
    stage.run(0.5)
    stage.crash("c")
    stage.start("c")
    stage.wait(CONFIG.election_s_min * 0.9)
    for ask in (AskVote(7, 100, 7, False),):
        stage.hand("bc", encode(ask))  # type: ignore[arg-type]
    stage["c"].sync()
    assert stage["c"].raft.term == 1
    stage.wait(CONFIG.election_s_min * 0.2)
    stage.hand("bc", encode(AskVote(7, 100, 7, False)))  # type: ignore[arg-type]
    stage["c"].sync()
    assert stage["c"].log.hard_state.vote == "b"


def test_a_lease_is_as_old_as_the_message_that_was_answered() -> None:
    """An answer that was long on its way extends the lease from when the question left, not from its arrival."""
    stage = led()
    stage.run(0.5)
    lead = stage["a"].raft._guard.leadership  # type: ignore[union-attr]
    assert lead is not None
    stage.wait(0.2)
    stage["a"].tick()
    began = stage["a"].raft._clock()
    stage.deliver("ab")
    stage.drop("ac")
    for _ in range(2):
        stage.wait(0.2)
        stage.deliver("ba")
    stage["a"].tick()
    assert lead.has_lease(began + 0.47) and not lead.has_lease(began + 0.49)


def test_a_lease_ends_before_any_promise_does() -> None:
    """A leader whose clock runs 8 % slow loses its lease before a voter whose clock runs 8 % fast may vote again."""
    stage = led()
    stage.run(0.5)
    stage["a"].speed, stage["b"].speed = 0.92, 1.08
    stage.run(0.5)  # both have heard each other by their new clocks
    lead = stage["a"].raft._guard.leadership  # type: ignore[union-attr]
    assert lead is not None
    for _ in range(80):
        stage.wait(0.01)
        guard = stage["b"].raft._guard
        assert guard is not None
        has_lease = lead.has_lease(stage["a"].raft._clock())
        assert not has_lease or guard._protects_leader(stage["b"].raft._clock())
    assert not has_lease


def test_a_one_way_link_moves_no_term() -> None:
    """A server that hears nobody but is heard asks in vain: terms and leader stay, and all the time writes pass."""
    stage = led()
    for _ in range(100):
        stage.wait(CONFIG.heartbeat_s)
        stage["c"].ring()
        stage.drop("ac", "bc")
        stage["c"].tick()
        stage["a"].raft.propose(b"x")
        stage.settle("ab")
        stage.deliver("ca")
        stage.deliver("cb")
    assert (stage["a"].raft.term, stage["c"].raft.term) == (1, 1)
    assert len(stage["a"].delivered) == 100


def test_a_stale_leader_is_told() -> None:
    """Who is of an older term hears so from whoever it speaks to, and follows."""
    stage = led()
    stage.wait(CONFIG.heartbeat_s)
    stage["a"].tick()
    (late,) = stage.links["a", "c"]
    stage.drop("ab", "ac")
    stage.lead("b", "c")
    stage.drop("ca", "ba")
    stage.hand("ac", late)
    stage.deliver("ca")
    assert stage["a"].raft.term == 2
    assert LostLeadership(1) in stage["a"].events


# ---- barriers


def test_a_barrier_passes_at_once_under_a_lease() -> None:
    stage = led()
    stage.run(0.5)
    stage["a"].raft.propose(b"x")
    stage.settle()
    stage["a"].raft.barrier(7)
    stage["a"].tick()
    assert stage["a"].passed == {7: 3}
    for name in "bc":
        with pytest.raises(NotLeader):
            stage[name].raft.barrier(8)


def test_a_barrier_without_a_lease_waits_for_a_quorum() -> None:
    """Answers to what was sent before the barrier count for nothing; many barriers share one round."""
    stage = led()
    stage.run(0.5)
    stage.wait(CONFIG.heartbeat_s)
    stage["a"].tick()
    stage.deliver("ab")
    stage.wait(CONFIG.election_s_min)
    for token in range(50):
        stage["a"].raft.barrier(token)
    stage.deliver("ba")
    assert stage["a"].passed == {}
    assert len(stage.links["a", "b"]) <= 2
    stage.deliver("ab")
    stage.deliver("ba")
    assert stage["a"].passed == dict.fromkeys(range(50), 2)


def test_a_barrier_of_a_deposed_leader_fails() -> None:
    """A leader that does not know yet that it is none lets no barrier pass."""
    stage = led()
    stage.run(0.5)
    stage.cut("a", "b")
    stage.cut("a", "c")
    stage.lead("b", "c")
    stage["b"].raft.propose(b"newer")
    stage.settle("bc")
    stage["a"].raft.barrier(1)
    stage["a"].tick()
    stage.join("a", "b")
    stage.run(0.5)
    assert stage["a"].passed == {}
    assert any(getattr(event, "token", None) == 1 for event in stage["a"].events)


def test_no_barrier_before_an_entry_of_the_own_term_is_committed() -> None:
    """A new leader's commit index may lag what its predecessor acknowledged; until it does not, there are no reads."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage["a"].sync()
    stage.deliver("ab")
    stage["b"].sync()
    stage.deliver("ba")
    assert stage["a"].delivered == [b"x"]
    stage.drop("ab")
    stage.crash("a")
    assert stage.elect("b", "c")
    assert stage["b"].raft.committed < 3
    with pytest.raises(NotLeader):
        stage["b"].raft.barrier(1)
    stage.settle("bc")
    stage["b"].raft.barrier(1)
    stage.settle("bc")
    assert stage["b"].passed == {1: 4}


def test_the_confirmed_stamp_is_what_a_quorum_has_heard() -> None:
    """It follows answers, never leads them, and is 0 for who does not lead."""
    stage = led()
    stage.run(0.5)
    before = stage["a"].raft.confirmed_stamp
    assert 0 < before <= stage["a"].stamps
    stage.wait(CONFIG.heartbeat_s)
    sent = stage["a"].stamps
    stage["a"].tick()
    assert stage["a"].raft.confirmed_stamp == before
    stage.deliver("ab")
    stage.deliver("ba")
    assert sent < stage["a"].raft.confirmed_stamp <= stage["a"].stamps
    assert stage["b"].raft.confirmed_stamp == 0


def test_notes_ride_along() -> None:
    """A leader's note comes with heartbeats and appends, on followers only."""
    stage = led()
    heard: list[tuple[str, Any]] = []
    for actor in stage.actors.values():
        actor.raft.on_note = lambda peer, note: heard.append((peer, note))
    stage["a"].raft.note = lambda: {"served": stage.now}
    stage.wait(CONFIG.heartbeat_s)
    stage["a"].tick()
    stage.deliver("ab")
    assert heard == [("a", {"served": stage.now})]


# ---- transfer


def test_a_transfer_hands_over_to_who_has_everything() -> None:
    """Proposals are refused meanwhile, nothing is lost, no election timeout passes, no lease stands in the way."""
    stage = led()
    stage.run(0.5)
    for serial in range(10):
        stage["a"].raft.propose(b"%d" % serial)
    stage["a"].sync()
    assert stage["a"].raft.transfer("c")
    with pytest.raises(NotLeader, match="c does"):
        stage["a"].raft.propose(b"late")
    began = stage.now
    stage.settle()
    assert stage["c"].raft.leads and stage.now == began
    assert stage["a"].raft.leader == stage["b"].raft.leader == "c"
    assert all(len(actor.delivered) == 10 for actor in stage.actors.values())
    assert not stage["a"].raft.transfer()


def test_a_transfer_in_vain_is_given_up_and_leaves_no_lease() -> None:
    """Who was told to campaign may do so late; so the leader reads by quorum only, for the rest of its term."""
    stage = led()
    stage.run(0.5)
    assert stage["a"].raft.transfer("b")
    stage["a"].tick()
    late = [message for message in stage.links["a", "b"] if message[0]["m"] == "ca"]
    assert late
    stage.drop("ab")
    stage.run(1.2, "ac")
    stage["a"].raft.propose(b"x")
    stage.settle("ac")
    assert stage["a"].delivered == [b"x"]
    lead = stage["a"].raft._guard.leadership  # type: ignore[union-attr]
    assert lead is not None and not lead.has_lease(stage["a"].raft._clock())
    stage["a"].raft.barrier(1)
    stage["a"].tick()
    assert stage["a"].passed == {}
    stage.settle("ac")
    assert stage["a"].passed == {1: 3}


def test_only_the_leader_may_call_for_a_campaign() -> None:
    stage = led()
    stage.run(0.5)
    for sender, term in (("c", 1), ("a", 0), ("a", 5)):
        stage.hand(f"{sender}b", encode(Campaign(term)))  # type: ignore[arg-type]
    stage["b"].sync()
    assert stage["b"].raft.term == 1


# ---- lost disks


def lose_disk(stage: Stage, name: str, *, term: int, leader: str, abstains: int) -> None:
    """Have a server come back with an empty disk, and what `node/forming.py` gives it to begin with."""
    actor = stage[name]
    actor.disk, actor.abstains = SimDisk(Random(5)), abstains
    journal = Journal.open(actor.disk, "journal", file_bytes_max=1 << 20)
    journal.group(0).set_hard_state(term, leader)
    journal.write_now()
    journal.close()
    stage.start(name)


def test_who_lost_its_disk_has_no_vote_until_it_has_caught_up() -> None:
    """Neither does it vote, nor stand, nor vouch for others, also after a restart; caught up, it does all three."""
    stage = led()
    for payload in (b"x", b"y", b"z"):
        stage["a"].raft.propose(payload)
        stage["a"].sync()
        stage.deliver("ac")
        stage["c"].sync()
        stage.deliver("ca")
    assert stage["a"].delivered == [b"x", b"y", b"z"]
    term, last = stage["a"].raft.term, stage["a"].raft.last_position
    stage.crash("a", "c")
    lose_disk(stage, "c", term=term, leader="a", abstains=last)
    for _ in range(2):
        assert not stage["c"].raft.remembers
        assert not stage.elect("b", "c")
        assert not stage.elect("c", "b")
        stage.crash("c")
        stage.start("c")
    stage.start("a")
    stage.lead("a", "bc")
    stage.settle()
    assert stage["c"].delivered == [b"x", b"y", b"z"]
    assert stage["c"].raft.remembers
    stage.crash("a")
    stage.lead("c", "b")


def test_what_it_was_told_outlives_a_leader_that_is_gone() -> None:
    """It keeps abstaining under a new leader whose log does not reach as far; the next entries bring it there."""
    stage = led()
    stage["a"].raft.propose(b"x")
    stage.settle()
    term, last = stage["a"].raft.term, stage["a"].raft.last_position
    stage.crash("c")
    lose_disk(stage, "c", term=term, leader="a", abstains=last + 3)
    stage.settle()
    assert not stage["c"].raft.remembers
    for payload in (b"1", b"2", b"3"):
        stage["a"].raft.propose(payload)
    stage.settle()
    assert stage["c"].raft.remembers


def test_who_has_no_vote_sleeps() -> None:
    """A replica that has no vote and hears no leader asks for no tick, whatever its timer says."""
    stage = led()
    stage["c"].raft._guard._abstains = 100  # type: ignore[union-attr]
    stage.wait(5)
    stage["c"].ring()
    stage["c"].events += stage["c"].raft.tick()
    now = stage["c"].raft._clock()
    assert stage["c"].raft.next_deadline(now) > now + 1
    assert not stage.links["c", "a"]


# ---- bad input


def test_no_message_raises() -> None:
    """Whatever is in a header or its blobs is refused and counted, or is a message; the group goes on."""
    rng = Random(1)
    stage = led()
    stage.run(0.3)
    kinds = ["ap", "ms", "ak", "rj", "pv", "pg", "vo", "vg", "ht", "ca", "??", 3, None, b"ap", []]
    values: list[Any] = [0, 1, 2, 3, 5, -1, 1 << 62, 1 << 70, 1.5, None, "x", b"y", [], [1], [1, 2], [None], {}, True]
    for _ in range(20_000):
        kind = rng.choice(kinds)
        header: dict[str, Any] = {"m": kind} | {key: rng.choice(values) for key in "venz" if rng.random() < 0.5}
        if rng.random() < 0.8:
            header["v"] = [rng.choice(values) for _ in range(rng.choice((1, 2, 3, 4, 4, 5, 5)))]
            if kind in ("ap", "ms", "ht", "vo"):
                header["v"][0] = rng.choice((0, 0, -1, None))  # a later term would be believed
        blobs = [memoryview(bytes(rng.randrange(3))) for _ in range(rng.choice((0, 0, 1, 2)))]
        stage[rng.choice("abc")].raft.receive(rng.choice("abcz"), header, blobs)
    nothing: list[Any] = [None, 3, [], "ap", b""]
    for whole in nothing:
        stage["a"].raft.receive("b", whole, [])
    assert stage["a"].raft.refused > 1_000
    stage.run(3.0)
    leader = next((actor for actor in stage.actors.values() if actor.raft.leads), None)
    if leader is None:
        stage.lead("a", "bc")
        leader = stage["a"]
    leader.raft.propose(b"alive")
    stage.run(0.5)
    assert all(actor.delivered[-1] == b"alive" for actor in stage.actors.values())


@pytest.mark.parametrize("seed", range(3))
def test_messages_survive_the_wire(seed: int) -> None:
    """decode undoes encode, for entries of any sizes; a byte too much or too few is noticed."""
    rng = Random(seed)
    for _ in range(200):
        payloads = [rng.randbytes(rng.choice((0, 1, 100, 20_000, 40_000))) for _ in range(rng.randrange(6))]
        message = Append(9, 5, 7, 3, 2, sorted(rng.choices(range(3, 10), k=len(payloads))), payloads, {"n": 1})
        header, blobs = encode(message)
        again = decode(header, blobs)
        assert isinstance(again, Append)
        assert [bytes(payload) for payload in again.payloads] == payloads
        assert (list(again.terms), again.note, again.commit) == (list(message.terms), {"n": 1}, 2)
        for wrong in ([*blobs, b"x"], [bytes(blob)[:-1] for blob in blobs]):
            if b"".join(map(bytes, wrong)) != b"".join(map(bytes, blobs)):
                with pytest.raises(Malformed):
                    decode(header, wrong)
    for plain in (Ack(1, 2, 3, 4), AskVote(1, 2, 3, True), GrantVote(5), HigherTerm(6), Campaign(7)):
        assert decode(*encode(plain)) == plain
