"""A test of the tests: each rule that keeps a Raft group safe or available, taken away, must be noticed.

    python -m tests.cluster.raft_mutations [seconds for each] [part of a name]

runs random schedules against each mutation until one fails; the hand-made schedules are in `test_raft_mutations.py`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final
from unittest import mock

from cluster import raft, raft_core, raft_leader
from cluster.raft import RaftGroup
from cluster.raft_core import RaftCore
from cluster.raft_guard import Guard
from cluster.raft_leader import Leadership
from cluster.raft_wire import Ack, Append, HigherTerm
from tests.cluster.raft_world import fuzz

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Mutation:
    """Something that a guard must not do."""

    text: str
    patches: tuple[Patch, ...]
    noticed_by: tuple[str, ...]
    """Hand-made schedules, any of which fails."""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for target, name, replacement in self.patches:
                stack.enter_context(mock.patch.object(target, name, replacement))
            yield


def _answer_at_once(self: Guard, ack: tuple[str, int], now: float) -> None:
    if self._ack_owed and self._followed == self._core.term:
        self._ack_owed = False
        self._send(ack[0], Ack(self._followed, ack[1], self._accepted, self._accepted))


def _count_at_once(self: Leadership, follower: Any) -> None:
    follower.counted, self.has_news = follower.match, True
    self._count(follower.name, follower.match)


def _append_as_it_comes(self: Guard, peer: str, message: Append) -> None:
    self._core.append(
        peer,
        message.term,
        message.previous,
        message.previous_term,
        list(zip(message.terms, message.payloads, strict=True)),
        message.commit,
    )
    self._accepted = self._log.last_position


def _answer_of_any_term(self: Guard, peer: str, term: int, take: Callable[[Leadership], bool]) -> None:
    if self.leadership is not None:
        take(self.leadership)
        self.core_due = True


def _on_ack_of_anything(self: Leadership, name: str, ack: Ack) -> bool:
    return _on_ack(self, name, replace(ack, sequence=min(ack.sequence, self.followers[name].sequence)))


_on_ack = Leadership.on_ack


_hear = RaftCore.hear


def _hear_any_commit(self: Any, leader: str, term: int, commit: int) -> None:
    _hear(self, leader, term, 1 << 40)


def _hear_every_vote(self: Guard, peer: str, vote: Any) -> None:
    if vote.term == self._core.term:
        self._core.got_vote(peer if peer in self._peers else self._peers[0], vote.term)


def _count_no_lease_from_sending(self: Any, sequence: int) -> None:
    while self.unanswered and self.unanswered[0][0] <= sequence:
        self.answered, _, self.answered_stamp = self.unanswered.popleft()
    self.answered_at_s = CLOCK[0]()


CLOCK: list[Callable[[], float]] = [lambda: 0.0]
_guard_init = Guard.__init__


def _remember_clock(self: Guard, *arguments: Any, **named: Any) -> None:
    _guard_init(self, *arguments, **named)
    CLOCK[0] = named["clock"]


def _promise_nothing_at_start(self: Guard, *arguments: Any, **named: Any) -> None:
    _guard_init(self, *arguments, **named)
    self._contact_s = -inf


def _reject_anything(self: Leadership, name: str, reject: Any) -> bool:
    follower = self.followers[name]
    follower.is_up = True
    follower.hear(reject.sequence)
    follower.probe_from(max(min(reject.position, self._log.last_position + 1), 2))
    follower.is_probed = False
    return True


def _barrier_at_once(self: Leadership, now: float) -> Any:
    through, self._barriers = self._barriers, []
    return through


def _barrier_of_any_leader(self: RaftGroup, token: int) -> None:
    from storage.types import Position

    if not self._core.is_leader:
        raise raft.NotLeader(self.group_id, self.leader)
    self._passed.append(raft.BarrierPassed(token, Position(self._core.commit)))


def _hand_over_under_lease(self: Leadership) -> None:
    _hand_over(self)
    self._is_handed = False


_hand_over = Leadership._hand_over


def _always_reset(log: Any, position: int, term: int) -> bool:
    return False


def _forget_vote(self: Any, term: int, votedForNodeId: str | None) -> None:
    self._log.set_hard_state(term, None)


_adapter_init = raft_core._LogAdapter.__init__


def _trust_the_log(self: Any, log: Any, *, committed: int) -> None:
    _adapter_init(self, log, committed=log.last_position)


_say = Guard._say


def _tell_nobody(self: Guard, peer: str, message: Any) -> None:
    if not isinstance(message, HigherTerm):
        _say(self, peer, message)


def _fall_back_never(*args: Any) -> Any:
    conf = _conf(*args)
    conf.leaderFallbackTimeout = 1e9
    return conf


_conf = raft_core._conf

MUTATIONS: Final[dict[str, Mutation]] = {
    "acknowledges before fsync": Mutation(
        "a follower vouches for what its disk does not have",
        ((Guard, "_answer", _answer_at_once),),
        ("test_a_follower_does_not_vouch_for_what_its_disk_lacks",),
    ),
    "leader counts itself before fsync": Mutation(
        "a leader's own copy counts before it is durable",
        ((Leadership, "_count_in", _count_at_once),),
        ("test_a_leader_does_not_count_itself_before_its_disk",),
    ),
    "votes before fsync": Mutation(
        "votes and candidacies leave before they are durable",
        ((Guard, "_say", lambda self, peer, message: self._send(peer, message)),),
        ("test_a_vote_leaves_when_it_is_durable",),
    ),
    "forgets its vote": Mutation(
        "the vote is not in the journal",
        ((raft_core._LogAdapter, "setCurrentTerm", _forget_vote),),
        ("test_a_vote_leaves_when_it_is_durable",),
    ),
    "no normaliser": Mutation(
        "PySyncObj sees appends as they come, and cuts matching entries",
        ((Guard, "_hear_append", _append_as_it_comes),),
        ("test_a_late_append_cuts_nothing",),
    ),
    "acknowledgements without term": Mutation(
        "an answer of an older leadership counts in this one",
        ((Guard, "_answered", _answer_of_any_term), (Leadership, "on_ack", _on_ack_of_anything)),
        ("test_an_acknowledgement_of_an_older_leadership_counts_for_nothing",),
    ),
    "commit without match": Mutation(
        "a heartbeat or a hint moves the commit index as far as it says",
        ((RaftCore, "hear", _hear_any_commit),),
        ("test_no_commit_index_without_a_match",),
    ),
    "log's end is committed": Mutation(
        "a restart takes its whole log for committed",
        ((raft_core._LogAdapter, "__init__", _trust_the_log),),
        ("test_a_restart_takes_nothing_for_committed",),
    ),
    "votes by number": Mutation(
        "votes are counted by message, whoever sent it",
        ((Guard, "_hear_vote", _hear_every_vote),),
        ("test_a_vote_counts_once_and_only_a_member_has_one",),
    ),
    "votes against a live leader": Mutation(
        "a vote is granted although a leader was just heard",
        ((Guard, "_protects_leader", lambda self, now: False),),
        ("test_a_leader_that_is_heard_is_not_voted_away",),
    ),
    "no promise after a restart": Mutation(
        "who has just started votes at once",
        ((Guard, "__init__", _promise_nothing_at_start),),
        ("test_a_restarted_voter_keeps_the_promise_it_has_forgotten",),
    ),
    "lease from receipt": Mutation(
        "a lease runs from when an answer came",
        ((Guard, "__init__", _remember_clock), (raft_leader.Follower, "hear", _count_no_lease_from_sending)),
        ("test_a_lease_is_as_old_as_the_message_that_was_answered",),
    ),
    "lease without margin": Mutation(
        "a lease takes no account of clocks that run at different speeds",
        ((raft_leader, "LEASE_FRACTION", 1.15),),
        ("test_a_lease_ends_before_any_promise_does",),
    ),
    "lease beside a transfer": Mutation(
        "a leader that told another to campaign relies on its lease",
        ((Leadership, "_hand_over", _hand_over_under_lease),),
        ("test_a_transfer_in_vain_is_given_up_and_leaves_no_lease",),
    ),
    "barrier without a round": Mutation(
        "a barrier passes whether or not this is still the leader",
        ((Leadership, "passed", _barrier_at_once),),
        ("test_a_barrier_without_a_lease_waits_for_a_quorum", "test_a_barrier_of_a_deposed_leader_fails"),
    ),
    "barrier before the own term": Mutation(
        "a new leader reads before it knows what is committed",
        ((RaftGroup, "barrier", _barrier_of_any_leader),),
        ("test_no_barrier_before_an_entry_of_the_own_term_is_committed",),
    ),
    "every rejection resets": Mutation(
        "appends are pipelined while it is not known where the logs meet",
        ((Leadership, "on_reject", _reject_anything),),
        ("test_a_conflicting_tail_is_repaired",),
    ),
    "install wipes the log": Mutation(
        "a checkpoint costs a log that goes on behind it",
        ((raft, "_holds", _always_reset),),
        ("test_an_install_keeps_a_log_that_holds_the_entry",),
    ),
    "no pre-vote": Mutation(
        "who hears nobody campaigns",
        ((Guard, "may_campaign", lambda self: True),),
        ("test_a_one_way_link_moves_no_term",),
    ),
    "stale leaders are not told": Mutation(
        "what is of an older term is passed over in silence",
        ((Guard, "_say", _tell_nobody),),
        ("test_a_stale_leader_is_told",),
    ),
    "leads for ever": Mutation(
        "a leader that nobody answers goes on",
        ((raft_core, "_conf", _fall_back_never),),
        ("test_an_isolated_leader_steps_down",),
    ),
    "empty replicas vote": Mutation(
        "a replica that lost its disk votes like any other",
        ((Guard, "remembers", property(lambda self: True)),),
        ("test_who_lost_its_disk_has_no_vote_until_it_has_caught_up",),
    ),
    "confirmed when sent": Mutation(
        "a stamp counts as heard by a quorum when it leaves",
        ((Leadership, "confirmed_stamp", property(lambda self: self._stamp())),),
        ("test_the_confirmed_stamp_is_what_a_quorum_has_heard",),
    ),
    "unbounded flight": Mutation(
        "a follower that acknowledges nothing is sent everything",
        ((raft_leader, "WINDOW_BYTES", 1 << 40),),
        ("test_a_slow_follower_costs_a_window",),
    ),
}


def main() -> None:
    """Fuzz each mutation; print the first seed that notices it."""
    logging.disable(logging.CRITICAL)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    for name, mutation in MUTATIONS.items():
        if part not in name:
            continue
        until, seed, found = time.monotonic() + seconds, 0, ""
        with mutation.applied():
            while not found and time.monotonic() < until:
                try:
                    fuzz(seed)
                except Exception as error:
                    found = str(error)
                seed += 1
        print(f"{name:36s} {f'schedule {seed}: {found[:150]}' if found else f'not in {seed} schedules'}", flush=True)


if __name__ == "__main__":
    main()
