"""What stands between PySyncObj and the wire, and makes each replica a correct Raft peer.

PySyncObj decides who leads and what is committed. It believes what it is told; so what it is told is made true here,
and what it says is sent only when it holds. The rules, beside those of a leadership (`raft_leader.py`):

  1. **Nothing rests on what a crash can take back.** Votes, candidacies and answers leave when the term and vote that
     they rest on are durable. An answer says how far the log is durable, and is held for the disk only so long that
     the leader does not miss a sign of life.
  2. **A log is cut only at a conflict**, and never below the commit index: entries that are there already are taken
     off a message before PySyncObj sees it, and it never sees one that ends inside a matching log.
  3. **The commit index moves only with a match**: at most to where the logs were just compared.
  4. **An election disturbs nobody who has a leader.** A campaign begins with a question that binds nobody, and neither
     that nor a vote is granted within `election_s_min` of hearing a leader, or of a start, before which one may have
     been heard. Leases rest on this. The leader itself may lift it (`Campaign`).
  5. **Members only, votes once each.** Who is of an older term is told so; what does not fit is counted, not raised.
  6. **A learner has no voice.** It follows, and neither campaigns nor votes; its answers count for nothing.
  7. **Who has lost its disk takes no part in elections** before its log reaches to where it was told (`abstains`):
     there it has again all that it had confirmed. Who tells it, and how it knows that it has voted for nobody who
     may still count on it, is the caller's affair (`node/forming.py`).
  8. **In the first term of a later generation only its heir can lead.** Members open the group with their vote in that
     term given away (`begin_log_at`), and stand for election in later ones. So an heir that can have done it only once
     leads in it without asking (`RaftGroup.lead_first`).

A message is handled when it comes; answers leave in `speak`, once for all that came before it.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Final, Protocol

from cluster.raft_leader import ALMOST_S, Barrier, Leadership
from cluster.raft_wire import (
    Ack,
    Append,
    AskPreVote,
    AskVote,
    Blob,
    Campaign,
    GrantPreVote,
    GrantVote,
    HigherTerm,
    Malformed,
    Message,
    Missing,
    Reject,
    decode,
    encode,
)
from storage.errors import StorageFault
from storage.journal import GroupLog

log = logging.getLogger(__name__)

BEHIND_S: Final = 1.0
"""A replica that needs a checkpoint says so this often."""


TIMER_S: Final = 1e-3
HELD_MAX: Final = 64


class Dice(Protocol):
    """The part of random.Random that elections need."""

    def random(self) -> float: ...


class Transport(Protocol):
    """Carries one group's messages over sessions: in order, at most once, nothing of an old session after a new one."""

    def send(self, peer: str, header: dict[str, Any], blobs: Sequence[Blob]) -> bool:
        """Hand over a message; False if there is no session with `peer`, or too much waits for it."""
        ...


class Core(Protocol):
    """PySyncObj as the guard uses it. Messages in its own words are made and taken apart behind this."""

    @property
    def term(self) -> int: ...
    @property
    def commit(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def leader(self) -> str | None: ...
    @property
    def election_at_s(self) -> float: ...

    def hear(self, leader: str, term: int, commit: int) -> None:
        """The leader of `term` lives; the log was compared with its up to `commit`."""
        ...

    def append(
        self,
        leader: str,
        term: int,
        previous: int,
        previous_term: int,
        entries: Sequence[tuple[int, Blob]],
        commit: int,
    ) -> bool:
        """Put (term, payload) entries behind `previous`, cutting off what is there; False if that is not there."""
        ...

    def adopt(self, peer: str, term: int) -> None:
        """There is a higher term."""
        ...

    def asked_for_vote(self, peer: str, term: int, last: int, last_term: int) -> None: ...
    def got_vote(self, peer: str, term: int) -> None: ...
    def told_to_campaign(self, leader: str, term: int) -> None: ...
    def hurry(self) -> None:
        """Wait no longer for a leader."""
        ...

    def lead(self) -> None:
        """All members have voted for us in the current term."""

    def count(self, peer: str, match: int) -> None:
        """A follower has answered, and has the log up to `match`."""
        ...


class PreVote:
    """A question to all members under way."""

    def __init__(self, term: int, nonce: int, until_s: float) -> None:
        self.term, self.nonce, self.until_s = term, nonce, until_s
        self.granted: set[str] = set()
        """Who would vote for us."""


class Guard:
    """One replica's side of all conversations of one group."""

    def __init__(
        self,
        group_id: int,
        me: str,
        peers: Sequence[str],
        log: GroupLog,
        core: Core,
        transport: Transport,
        *,
        clock: Callable[[], float],
        rng: Dice,
        stamp: Callable[[], int],
        heartbeat_s: float,
        election_s_min: float,
        election_s_max: float,
        abstains: int = 0,
        is_learner: bool = False,
    ) -> None:
        self._group_id, self._me, self._peers = group_id, me, sorted(peers)
        self._log, self._core, self._transport = log, core, transport
        self._clock, self._rng, self._stamp = clock, rng, stamp
        self._heartbeat_s = heartbeat_s
        self._election_s_min, self._election_s_max = election_s_min, election_s_max
        self._abstains = abstains
        self._is_learner = is_learner
        self._learners: list[str] = []
        self._quorum = (len(self._peers) + 1) // 2 + 1
        self._up: set[str] = set()
        self.note: Callable[[], Any] | None = None
        self.on_note: Callable[[str, Any], None] | None = None
        self.refused = 0
        """Messages that made no sense."""
        self.core_due = True
        """PySyncObj has something to decide."""
        self.leadership: Leadership | None = None
        self.failed_barriers: list[Barrier] = []
        self._contact_s = clock()
        """When a leader was last heard. One may have been heard just before a restart."""
        self._pre_vote: PreVote | None = None
        self._nonce = 0
        self._patience_s = -inf
        """Until then the votes of our candidacy may come in."""
        self._campaign_term = 0
        """The leader has asked us to stand for election in this term."""
        self._votes_term = 0
        self._votes: set[str] = set()
        """Who voted for us in that term."""
        self._held: deque[tuple[int, str, Message]] = deque(maxlen=HELD_MAX)
        """(term, to whom, what) waits until our term and vote are durable."""
        self._told_commit = 0
        """The greatest commit index that a leader has told."""
        # ---- as a follower of one term
        self._followed = 0
        self._accepted = 0
        """Our log agrees with the leader's up to here."""
        self._ack: tuple[str, int] | None = None
        """(leader, sequence) of its latest message."""
        self._ack_owed = False
        self._acked = 0
        self._acked_at_s = -inf
        self._behind: tuple[str, int, int] | None = None
        self._behind_at_s = -inf

    # ---- sessions and the disk

    def session(self, peer: str, up: bool) -> None:
        (self._up.add if up else self._up.discard)(peer)
        if peer not in self._peers and peer not in self._learners:
            return
        if self._ack is not None and self._ack[0] == peer:
            self._ack, self._ack_owed = None, False
        if self.leadership is not None:
            self.leadership.on_session(peer, up)

    def set_learners(self, names: Sequence[str]) -> None:
        """Let these follow beside the voters, whenever this replica leads."""
        self._learners = sorted(set(names) - {*self._peers, self._me})
        if self.leadership is not None:
            self.leadership.set_learners(self._learners)

    def campaign(self) -> None:
        """Stand for election at once, whomever the others have heard last."""
        self._campaign_term = self._core.term + 1
        self._core.hurry()
        self.core_due = True

    def lead(self) -> None:
        """Lead in the current term, the log's first, whose votes are known to be ours."""
        self._core.lead()
        self._note_role()
        if self.leadership is not None:
            self.leadership.feed_all()
        self.core_due = True

    def on_durable(self) -> None:
        if self.leadership is not None:
            self.leadership.on_durable()

    # ---- what peers say

    def receive(self, peer: str, header: Mapping[str, Any], blobs: Sequence[Blob]) -> None:
        """Handle a message. Raises StorageFault only, if this log contradicts what the group has committed."""
        try:
            message = decode(header, blobs)
            if peer not in self._peers:
                if not isinstance(message, Ack | Reject):
                    raise Malformed(f"{peer} is not a member")
                if peer not in self._learners:
                    return  # it was one until a moment ago
        except Malformed as error:
            self._refuse(peer, str(error))
            return
        self._handle(peer, message)
        self._note_role()

    def _handle(self, peer: str, message: Message) -> None:
        term = self._core.term
        match message:
            case Append() | Missing():
                self._hear_leader(peer, message)
            case Ack():
                self._answered(peer, message.term, lambda lead: lead.on_ack(peer, message))
            case Reject():
                self._answered(peer, message.term, lambda lead: lead.on_reject(peer, message))
            case AskPreVote():
                self._hear_pre_vote(peer, message)
            case GrantPreVote(of_term, nonce):
                asked = self._pre_vote
                if asked is not None and (asked.term, asked.nonce) == (of_term, nonce):
                    asked.granted.add(peer)
                    self.core_due = True
            case AskVote():
                self._hear_candidate(peer, message)
            case GrantVote():
                self._hear_vote(peer, message)
            case HigherTerm(of_term):
                if of_term > term:
                    self._core.adopt(peer, of_term)
                    self.core_due = True
            case Campaign(of_term):
                if of_term == term and self._core.leader == peer and self.remembers:
                    self._campaign_term = term + 1
                    self._core.told_to_campaign(peer, term)
                    self.core_due = True

    def _refuse(self, peer: str, why: str) -> None:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the first, and then ever more rarely
            log.warning("refused group=%d peer=%s count=%d: %s", self._group_id, peer, self.refused, why)

    def _answered(self, peer: str, term: int, take: Callable[[Leadership], bool]) -> None:
        if self.leadership is None or term != self.leadership.term or term != self._core.term:
            return  # of an older leadership, and old news
        if not take(self.leadership):
            self._refuse(peer, "an answer to what was not said")
        if self.leadership.has_news:
            self.leadership.has_news = False
            self.core_due = True

    # ---- as a voter

    def _protects_leader(self, now: float) -> bool:
        """Whether a vote now might depose a leader who counts on us."""
        heard_s = self._contact_s
        if self.leadership is not None:
            heard_s = max(heard_s, self.leadership.heard_quorum_at_s())
        return now - heard_s < self._election_s_min

    @property
    def hears_leader(self) -> bool:
        """Whether a leader has been heard for as long as followers wait before they campaign."""
        return self.leadership is not None or self._clock() - self._contact_s < self._election_s_max

    @property
    def remembers(self) -> bool:
        """Whether this replica remembers, or has got back, all that it ever confirmed; else it has no vote."""
        return not self._is_learner and self._log.durable_position >= self._abstains

    def _hear_pre_vote(self, peer: str, ask: AskPreVote) -> None:
        if ask.term <= self._core.term:
            self._say(peer, HigherTerm(self._core.term))
        elif self.remembers and not self._protects_leader(self._clock()) and (ask.last_term, ask.last) >= self._end():
            self._send(peer, GrantPreVote(ask.term, ask.nonce))

    def _hear_candidate(self, peer: str, ask: AskVote) -> None:
        if ask.term < self._core.term:
            self._say(peer, HigherTerm(self._core.term))
        elif self.remembers and (ask.is_transfer or not self._protects_leader(self._clock())):
            self._core.asked_for_vote(peer, ask.term, ask.last, ask.last_term)
            self.core_due = True

    def grant_vote(self, peer: str, term: int) -> None:
        """PySyncObj votes for a candidate."""
        self._say(peer, GrantVote(term))

    def _end(self) -> tuple[int, int]:
        return self._log.last_term, self._log.last_position

    # ---- as a candidate

    def may_campaign(self) -> bool:
        """Return whether an election may begin now that PySyncObj's timer has run out; ask the others if need be."""
        term, now, asked = self._core.term, self._clock(), self._pre_vote
        if not self.remembers:
            return False
        if self._campaign_term == term + 1 or not self._peers:
            return True
        if not self._may_ask() or now < self._patience_s - ALMOST_S:
            return False
        if asked is not None and asked.term == term + 1 and now < asked.until_s - ALMOST_S:
            if len(asked.granted) + 1 < self._quorum:
                return False
            self._pre_vote = None
            return True
        self._nonce += 1
        until_s = now + self._election_s_min * (0.5 + self._rng.random())
        self._pre_vote = PreVote(term + 1, self._nonce, until_s)
        last_term, last = self._end()
        for peer in self._peers:
            self._send(peer, AskPreVote(term + 1, self._nonce, last, last_term))
        return False

    def _may_ask(self) -> bool:
        """Whether the last candidacy is not still on its way, and ours would be a good one."""
        return self.remembers and self._log.is_hard_state_durable and not self._held

    def ask_vote(self, peer: str, term: int, last: int, last_term: int) -> None:
        """PySyncObj is a candidate."""
        self._say(peer, AskVote(term, last, last_term, term == self._campaign_term))

    def _hear_vote(self, peer: str, vote: GrantVote) -> None:
        if vote.term != self._core.term:
            return
        if self._votes_term != vote.term:
            self._votes_term, self._votes = vote.term, set()
        if peer not in self._votes:
            self._votes.add(peer)
            self._core.got_vote(peer, vote.term)
            self.core_due = True

    # ---- as a follower

    def _hear_leader(self, peer: str, message: Append | Missing) -> None:
        term, core = message.term, self._core
        if term < core.term:
            self._say(peer, HigherTerm(core.term))
            return
        if term == core.term and core.is_leader:
            self._refuse(peer, f"a second leader of term {term}")
            return
        self._contact_s = self._clock()
        self._pre_vote = None
        if term != self._followed:
            self._followed, self._accepted, self._acked, self._ack = term, 0, 0, None
        if message.sequence:
            if self._ack is not None and message.sequence < self._ack[1]:
                return
            self._ack, self._ack_owed = (peer, message.sequence), True
        if isinstance(message, Missing):
            core.hear(peer, term, 0)
            self._hear_missing(peer, message)
        else:
            self._hear_append(peer, message)
            if message.note is not None and self.on_note is not None:
                self.on_note(peer, message.note)

    def _hear_append(self, peer: str, message: Append) -> None:
        """Pass on what is news, behind an entry on which both logs agree."""
        own, core, term = self._log, self._core, message.term
        previous, previous_term, terms = message.previous, message.previous_term, message.terms
        skipped = 0
        if previous < own.base_position <= previous + len(terms):
            skipped = own.base_position - previous
            previous, previous_term = own.base_position, terms[skipped - 1]
        if not own.base_position <= previous <= own.last_position:
            core.hear(peer, term, 0)
            self._reject(message, own.base_position if previous < own.base_position else own.last_position)
            return
        if own.term_at(previous) != previous_term:
            core.hear(peer, term, 0)
            self._conflict(message, previous)
            return
        while skipped < len(terms) and previous < own.last_position:
            if own.term_at(previous + 1) != terms[skipped]:
                break
            skipped, previous, previous_term = skipped + 1, previous + 1, terms[skipped]
        if skipped == len(terms):
            # All of it is there. What our log has beyond stays: the message may be late, or its sender not know yet.
            core.hear(peer, term, min(message.commit, previous))
        else:
            if previous < min(core.commit, own.last_position):
                core.hear(peer, term, 0)
                self._conflict(message, previous + 1)
                return
            entries = list(zip(terms[skipped:], message.payloads[skipped:], strict=True))
            accepted = core.append(peer, term, previous, previous_term, entries, message.commit)
            assert accepted, "PySyncObj refuses what was compared"
            previous += len(entries)
        self._accepted = max(self._accepted, previous)
        self._told_commit = max(self._told_commit, min(message.commit, previous))

    def _conflict(self, message: Append, at: int) -> None:
        """Our entry at `at` is not the leader's: name a place where the logs may meet."""
        own, commit = self._log, self._core.commit
        if at <= self._told_commit:
            raise StorageFault(
                f"the log of group {self._group_id} has an entry of term {own.term_at(at)} at {at}, which is "
                f"committed, but the leader of term {message.term} has another: one of the two has lost its data. "
                f"Stop both, and give the one that is damaged an empty data directory."
            )
        # The first entry of that term: none of the term need be the leader's.
        low = max(commit, own.base_position) + 1
        first = low + bisect_left(range(low, at), own.term_at(at), key=own.term_at)
        self._reject(message, first - 1)

    def _reject(self, message: Append | Missing, meet: int) -> None:
        if self._ack is not None and message.sequence:
            self._ack_owed = False
            self._say(self._ack[0], Reject(message.term, message.sequence, meet + 1))

    def _hear_missing(self, peer: str, message: Missing) -> None:
        own = self._log
        if own.base_position <= message.base <= own.last_position and own.term_at(message.base) == message.base_term:
            self._accepted = max(self._accepted, message.base)
        elif message.base < own.base_position:
            # A checkpoint has put us ahead of the leader's base; see whether the logs meet at ours.
            self._reject(message, own.base_position)
        elif message.base > self._core.commit:
            self._behind = (peer, message.base, message.base_term)

    @property
    def is_behind(self) -> bool:
        return self._behind is not None

    def take_behind(self, now: float) -> tuple[str, int, int] | None:
        """Return (leader, position, term) if a checkpoint is needed, about once a second."""
        behind = self._behind
        if behind is None or behind[1] <= self._core.commit or now < self._behind_at_s + BEHIND_S:
            return None
        self._behind, self._behind_at_s = None, now
        return behind

    def on_install(self, keeps_log: bool) -> None:
        """A checkpoint has moved the commit index; the log was replaced, or kept as it is."""
        self._behind = None
        if not keeps_log:
            self._accepted = self._acked = 0

    # ---- what goes out

    def speak(self) -> None:
        """Send what is due."""
        now = self._clock()
        self._note_role()
        if self._held and self._log.is_hard_state_durable:
            held, self._held = self._held, deque(maxlen=HELD_MAX)
            for term, peer, message in held:
                if term == self._core.term:
                    self._send(peer, message)
        if self.leadership is not None:
            # A lone voter's PySyncObj takes for committed what it has not on disk yet.
            commit = self._core.commit if self._peers else min(self._core.commit, self._log.durable_position)
            self.leadership.speak(now, commit)
        elif self._ack is not None:
            self._answer(self._ack, now)

    def _answer(self, ack: tuple[str, int], now: float) -> None:
        if self._followed != self._core.term:
            self._ack, self._ack_owed = None, False
            return
        durable = min(self._accepted, self._log.durable_position)
        if not self._ack_owed and durable <= self._acked:
            return
        if durable < self._accepted and durable <= self._acked and not self._is_sign_due(now):
            return  # the disk will have more to say in a moment
        if not self._log.is_hard_state_durable:
            return
        self._ack_owed, self._acked, self._acked_at_s = False, durable, now
        leader, sequence = ack
        self._send(leader, Ack(self._followed, sequence, durable, self._accepted))

    def _is_sign_due(self, now: float) -> bool:
        return now >= self._acked_at_s + self._heartbeat_s / 2 - ALMOST_S

    def deadline(self, now: float) -> float:
        """Return when the replica must be ticked if nothing else happens."""
        if self.leadership is not None:
            return self.leadership.deadline()
        # PySyncObj's timer has run out only when it is past, which a rounded clock may not be.
        at_s = self._core.election_at_s + TIMER_S
        if at_s <= now + ALMOST_S and not self._may_ask():
            at_s = inf  # the disk is awaited
        elif at_s <= now + ALMOST_S:
            at_s = max(at_s, self._patience_s, -inf if self._pre_vote is None else self._pre_vote.until_s)
        if self._ack_owed and self._log.is_hard_state_durable:
            at_s = min(at_s, self._acked_at_s + self._heartbeat_s / 2)
        return at_s

    def _say(self, peer: str, message: Message) -> None:
        """Send what rests on our term and vote."""
        if self._log.is_hard_state_durable:
            self._send(peer, message)
        else:
            self._held.append((self._core.term, peer, message))

    def _send(self, peer: str, message: Message) -> bool:
        if isinstance(message, AskVote):
            self._patience_s = self._clock() + self._election_s_min
        header, blobs = encode(message)
        return self._transport.send(peer, header, blobs)

    # ---- as a leader

    def _note_role(self) -> None:
        """Begin a leadership when PySyncObj begins to lead, end it when it ceases to."""
        core, lead = self._core, self.leadership
        if lead is not None and not (core.is_leader and core.term == lead.term):
            self.failed_barriers += lead.give_up()
            self.leadership = None
        if core.is_leader and self.leadership is None:
            self._pre_vote, self._ack, self._ack_owed = None, None, False
            self._contact_s = self._clock()
            self.leadership = Leadership(
                term=core.term,
                first=self._log.last_position,  # PySyncObj has just written it
                peers=self._peers,
                learners=self._learners,
                is_up=self._up.__contains__,
                log=self._log,
                send=self._send,
                count=core.count,
                heartbeat_s=self._heartbeat_s,
                election_s_min=self._election_s_min,
                stamp=self._stamp,
                note=lambda: None if self.note is None else self.note(),
            )
