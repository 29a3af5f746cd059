"""One leadership of one Raft group: who has what, what is sent to whom and when, and what rests on the answers.

It lives from the election to the step-down, so nothing of an older leadership can be mistaken for news. Every message
has a sequence number; an answer names the newest message that it answers, and so tells when its sender must have heard
us: not before that message was sent. From the times of a quorum's answers follow

  * the **lease**. Who has heard a leader votes for nobody for `election_s_min` after; so until that long after the
    sending of messages that a quorum has answered, by our clock and less a margin for clocks that run at different
    speeds, nobody else leads;
  * the **barrier** without a lease: a quorum has answered something sent after the barrier began, so nobody else led
    then;
  * the **confirmed stamp**: every quorum has a member that has heard a stamp as high.

Learners follow too: they are sent everything, and nothing rests on their answers.

A follower is either *probed* (one small message under way, until it is known where the logs meet) or *fed* (appends
of about 1 MB follow each other without waiting, up to a window of bytes that the follower has not made durable). What
is sent is read back from the journal then, so a follower that lags costs no memory here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from cluster.raft_wire import ROOT, Ack, Append, Campaign, Message, Missing, Reject
from storage.journal import GroupLog
from storage.types import Position

APPEND_BYTES: Final = 1 << 20
"""Where an append is cut, so that disk and network work at the same time; a larger entry goes alone."""
APPEND_ENTRIES: Final = 4096
PROBE_BYTES: Final = 16 << 10
WINDOW_BYTES: Final = 12 << 20
TURN_BYTES: Final = 4 << 20
"""Sent to one follower in one turn: reading more would hold the loop."""
UNANSWERED_MAX: Final = 4096
KNOWN_MAX: Final = 10_000
"""Entries that a follower may have in memory, looked at when it begins to be fed."""
LEASE_FRACTION: Final = 0.8
"""Of the time for which followers promise to protect a leader: clocks may differ in speed by a fifth."""
ALMOST_S: Final = 1e-6
"""A timer that comes early by rounding is on time."""


@dataclass(frozen=True, slots=True)
class PeerProgress:
    """What a leader knows of a follower."""

    name: str
    match: Position
    """The follower has the log up to here on its disk."""
    in_flight_bytes: int
    """Sent and not known to be on its disk."""
    is_up: bool
    is_behind: bool
    """It needs entries that are no longer in our log, hence a checkpoint."""
    votes: bool
    """False for a learner."""


@dataclass(frozen=True, slots=True)
class Barrier:
    token: int
    position: Position
    after: int
    """Answers to messages after this one count."""


class Follower:
    """The leader's view of one follower."""

    __slots__ = (
        "answered",
        "answered_at_s",
        "answered_stamp",
        "commit",
        "counted",
        "in_flight",
        "in_flight_bytes",
        "is_behind",
        "is_probed",
        "is_up",
        "match",
        "name",
        "next",
        "probe",
        "rejects_after",
        "sent_at_s",
        "sequence",
        "unanswered",
    )

    def __init__(self, name: str, next_position: int, is_up: bool) -> None:
        self.name = name
        self.is_up = is_up
        self.next = next_position
        """The next position to send."""
        self.match = 0
        self.counted = 0
        """What PySyncObj was told of `match`: never more than is durable here."""
        self.commit = 0
        """The commit index that was sent last."""
        self.is_probed = True
        self.is_behind = False
        self.probe = 0
        """Sequence of the first probe at `next`; 0 if none is under way."""
        self.rejects_after = 0
        """Rejections of messages up to this one are old news."""
        self.sequence = 0
        self.sent_at_s = -inf
        self.unanswered: deque[tuple[int, float, int]] = deque(maxlen=UNANSWERED_MAX)
        """(sequence, when, stamp) of what was sent."""
        self.answered, self.answered_at_s, self.answered_stamp = 0, -inf, 0
        self.in_flight: deque[tuple[int, int]] = deque()
        """(last position, bytes) of appends that are not known to be durable there."""
        self.in_flight_bytes = 0

    def probe_from(self, position: int) -> None:
        """Stop feeding; find out where the logs meet, beginning before `position`."""
        self.is_probed, self.probe, self.next = True, 0, position
        self.in_flight.clear()
        self.in_flight_bytes = 0

    def hear(self, sequence: int) -> None:
        """Note that everything up to `sequence` was answered."""
        while self.unanswered and self.unanswered[0][0] <= sequence:
            self.answered, self.answered_at_s, self.answered_stamp = self.unanswered.popleft()


class Leadership:
    """What this replica does and knows as the leader of one term.

    Invariants
      1. At most one probe per follower is under way, but for a repeat each heartbeat.
      2. A follower's match only rises.
    """

    def __init__(
        self,
        *,
        term: int,
        first: Position,
        peers: Sequence[str],
        learners: Sequence[str],
        is_up: Callable[[str], bool],
        log: GroupLog,
        send: Callable[[str, Message], bool],
        count: Callable[[str, int], None],
        heartbeat_s: float,
        election_s_min: float,
        stamp: Callable[[], int],
        note: Callable[[], Any],
    ) -> None:
        """Begin.

        first      position of the first entry of this term
        learners   who follows beside the voters
        send       hand over a message; False if it will not arrive
        count      tell PySyncObj that a follower answered and has the log up to a position, which is durable here too
        """
        self.term, self.first = term, first
        self._log, self._send, self._count = log, send, count
        self._heartbeat_s, self._promise_s = heartbeat_s, election_s_min
        self._stamp, self._note = stamp, note
        self._is_up = is_up
        self.followers = {name: Follower(name, first, is_up(name)) for name in (*peers, *learners)}
        self._voters = [self.followers[name] for name in peers]
        self._quorum_place = (len(peers) + 1) // 2 - 1
        """Place, best first, of the voter whose answer completes a quorum with us; -1 if we are one alone."""
        self._sequence = 0
        self._beat_at_s = -inf
        self._barriers: list[Barrier] = []
        self.transfer_to: str | None = None
        self._transfer_until_s = inf
        self._has_asked = False
        """The follower was told to campaign in this transfer."""
        self._is_handed = False
        """Others may begin to lead at any time from now on, leases or not."""
        self._more = False
        self._said: tuple[int, int] | None = None
        """(last position, commit index) when everything was last said; None if something happened since."""
        self.has_news = False
        """PySyncObj was told that a follower has more than before."""

    # ---- what comes in

    def on_ack(self, name: str, ack: Ack) -> bool:
        """Take an answer of this term; False if it cannot be one."""
        follower = self.followers[name]
        last = self._log.last_position
        if ack.sequence > follower.sequence or not ack.durable <= ack.accepted <= last:
            return False
        if not follower.is_up or follower.is_probed or ack.durable > follower.match:
            self._said = None
        follower.is_up = True
        follower.hear(ack.sequence)
        if ack.durable > follower.match:
            follower.match = ack.durable
            while follower.in_flight and follower.in_flight[0][0] <= ack.durable:
                follower.in_flight_bytes -= follower.in_flight.popleft()[1]
        if follower.is_probed and ack.accepted >= max(follower.next - 1, self._log.base_position):
            follower.is_probed = follower.is_behind = False
            follower.next, follower.commit = ack.accepted + 1, 0
            follower.rejects_after = ack.sequence
            # What it has in memory counts against its window, whoever sent it.
            known = range(max(ack.durable, self._log.base_position, ack.accepted - KNOWN_MAX) + 1, ack.accepted + 1)
            if (size := sum(map(self._log.payload_bytes, known))) > 0:
                follower.in_flight.append((ack.accepted, size))
                follower.in_flight_bytes = size
        self._count_in(follower)
        return True

    def on_reject(self, name: str, reject: Reject) -> bool:
        """Step back to where the follower says; False if it cannot be an answer."""
        follower = self.followers[name]
        if reject.sequence > follower.sequence:
            return False
        self._said, follower.is_up = None, True
        follower.hear(reject.sequence)
        if follower in self._voters:
            self._count(name, 0)
        position = max(min(reject.position, self._log.last_position + 1), ROOT + 1)
        if follower.is_probed:
            # Only an answer to the probe at this very place counts. One that changes nothing is not asked again before
            # the next heartbeat.
            if 0 < follower.probe <= reject.sequence and position != follower.next:
                follower.probe_from(position)
        elif reject.sequence > follower.rejects_after:
            follower.probe_from(position)
        return True

    def on_session(self, name: str, up: bool) -> None:
        """Whatever was under way is lost."""
        follower = self.followers[name]
        self._said, follower.is_up = None, up
        follower.probe_from(follower.next if follower.is_probed else max(follower.match + 1, ROOT + 1))
        follower.unanswered.clear()
        follower.sent_at_s = -inf

    def set_learners(self, names: Sequence[str]) -> None:
        """These follow from now on, beside the voters."""
        self._said = None
        kept = {one.name: one for one in self._voters}
        for name in names:
            kept[name] = self.followers.get(name) or Follower(name, self._log.last_position + 1, self._is_up(name))
        self.followers = kept

    def feed_all(self) -> None:
        """Take it that the logs of all who vote end where this term begins; whose does not will say so."""
        for voter in self._voters:
            voter.is_probed = False

    def end_lease(self) -> None:
        """Promise nothing more that rests on nobody else leading."""
        self._is_handed = True

    def on_durable(self) -> None:
        """Our own copy reaches further: what followers have counts as far."""
        for follower in self.followers.values():
            if follower.match > follower.counted:
                self._count_in(follower)

    def _count_in(self, follower: Follower) -> None:
        # PySyncObj always counts our own copy, so nothing may count before that copy is durable.
        if follower.match > follower.counted:
            counted = min(follower.match, self._log.durable_position)
            self.has_news = self.has_news or counted > follower.counted
            follower.counted = max(follower.counted, counted)
        if follower in self._voters:
            # What is older than this term commits with the first entry of it only; PySyncObj need not look at it.
            self._count(follower.name, follower.counted if follower.counted >= self.first else 0)

    # ---- what goes out

    def beat(self, now: float) -> None:
        """Set the next heartbeat. All groups beat at the same instants, so that their messages share wake-ups."""
        # Rounding must not find the beat that is due just now to be the next one.
        self._beat_at_s = ((now + ALMOST_S) // self._heartbeat_s + 1) * self._heartbeat_s

    def is_beat_due(self, now: float) -> bool:
        return now >= self._beat_at_s - ALMOST_S

    def speak(self, now: float, commit: int) -> None:
        """Send every follower what it should have by now."""
        beats, state = self.is_beat_due(now), (self._log.last_position, commit)
        if self._said == state and not beats and not self._barriers and self.transfer_to is None:
            return
        self._said = state
        if beats:
            self.beat(now)
        if self.transfer_to is not None and now >= self._transfer_until_s - ALMOST_S:
            self.transfer_to, self._transfer_until_s = None, inf
        self._more = False
        asked = self._barriers[-1].after if self._barriers and not self.has_lease(now) else -1
        for follower in self.followers.values():
            must = follower.sequence <= asked or (beats and now - follower.sent_at_s > self._heartbeat_s / 2)
            if not must and not follower.is_up:
                continue
            if follower.is_probed:
                self._probe(follower, now, commit, must)
            else:
                self._feed(follower, now, commit, must)
        self._hand_over()

    def deadline(self) -> float:
        """Return when to speak next if nothing else happens."""
        if self._more:
            return -inf
        return min(self._beat_at_s, self._transfer_until_s)

    def _probe(self, follower: Follower, now: float, commit: int, must: bool) -> None:
        if follower.probe and not must:
            return
        previous, log = follower.next - 1, self._log
        follower.is_behind = previous < log.base_position
        if follower.is_behind:
            missing = Missing(self.term, self._number(), log.base_position, log.term_at(log.base_position))
            is_sent = self._say(follower, missing, now)
        else:
            terms, payloads, _ = self._read(follower.next, PROBE_BYTES, first_always=False)
            is_sent = self._append(follower, now, commit, terms, payloads)
        if is_sent and not follower.probe:
            follower.probe = follower.sequence

    def _feed(self, follower: Follower, now: float, commit: int, must: bool) -> None:
        log, sent_bytes = self._log, 0
        if follower.next <= log.base_position:
            follower.probe_from(follower.next)  # trimmed under its nose
            self._probe(follower, now, commit, must)
            return
        while follower.next <= log.last_position and follower.in_flight_bytes < WINDOW_BYTES:
            if sent_bytes >= TURN_BYTES:
                self._more, self._said = True, None
                return
            terms, payloads, size = self._read(follower.next, APPEND_BYTES, first_always=True)
            if not self._append(follower, now, commit, terms, payloads):
                return
            follower.next += len(terms)
            follower.in_flight.append((follower.next - 1, size))
            follower.in_flight_bytes += size
            sent_bytes += size + 1
        if not sent_bytes and (must or follower.commit < commit):
            self._append(follower, now, commit, [], [], is_answered=must)

    def _append(
        self,
        follower: Follower,
        now: float,
        commit: int,
        terms: Sequence[int],
        payloads: Sequence[bytes],
        *,
        is_answered: bool = True,
    ) -> bool:
        """Send an append; news of the commit index alone needs no answer."""
        previous, sequence = follower.next - 1, self._number() if is_answered else 0
        message = Append(
            self.term, sequence, previous, self._log.term_at(previous), commit, terms, payloads, self._note()
        )
        if not self._say(follower, message, now):
            return False
        follower.commit = commit
        return True

    def _read(self, position: int, bytes_max: int, *, first_always: bool) -> tuple[list[int], list[bytes], int]:
        """Return terms, payloads and bytes of entries from `position` on, about as many as fit."""
        log, size, end = self._log, 0, position
        while end <= log.last_position and end - position < APPEND_ENTRIES:
            entry_bytes = log.payload_bytes(end)
            if size + entry_bytes > bytes_max and not (first_always and end == position):
                break
            size, end = size + entry_bytes, end + 1
        return [log.term_at(at) for at in range(position, end)], [log.payload(at) for at in range(position, end)], size

    def _number(self) -> int:
        self._sequence += 1
        return self._sequence

    def _say(self, follower: Follower, message: Append | Missing, now: float) -> bool:
        stamp = self._stamp()
        follower.is_up = self._send(follower.name, message)
        if follower.is_up and message.sequence:
            follower.sequence, follower.sent_at_s = message.sequence, now
            follower.unanswered.append((message.sequence, now, stamp))
        return follower.is_up

    # ---- what rests on answers

    def has_lease(self, now: float) -> bool:
        """Whether nobody else can have begun to lead by now."""
        return not self._is_handed and now < self.heard_quorum_at_s() + self._promise_s * LEASE_FRACTION

    def heard_quorum_at_s(self) -> float:
        """Return the latest time such that a quorum has answered something sent then or later."""
        if not self._voters:
            return inf
        return sorted((voter.answered_at_s for voter in self._voters), reverse=True)[self._quorum_place]

    @property
    def confirmed_stamp(self) -> int:
        """The greatest stamp such that a quorum has answered something sent with it or later."""
        if not self._voters:
            return self._stamp()
        return sorted((voter.answered_stamp for voter in self._voters), reverse=True)[self._quorum_place]

    @property
    def matched(self) -> int:
        """A quorum, with us, has the log up to here on disk."""
        if not self._voters:
            return self._log.durable_position
        return sorted((voter.counted for voter in self._voters), reverse=True)[self._quorum_place]

    def begin_barrier(self, token: int, position: Position) -> None:
        self._barriers.append(Barrier(token, position, self._sequence))

    @property
    def has_barriers(self) -> bool:
        return bool(self._barriers)

    def passed(self, now: float) -> list[Barrier]:
        """Return, once each, the barriers that a lease or a quorum's answers let through."""
        if self.has_lease(now):
            through, self._barriers = self._barriers, []
            return through
        answered = sorted((voter.answered for voter in self._voters), reverse=True)[self._quorum_place]
        through = [barrier for barrier in self._barriers if barrier.after < answered]
        self._barriers = self._barriers[len(through) :]
        return through

    def give_up(self) -> list[Barrier]:
        """The leadership is over: return the barriers that will not pass."""
        return self._barriers

    # ---- transfer

    def begin_transfer(self, name: str, until_s: float) -> None:
        """Hand over to `name` as soon as it has our whole log; forget it at `until_s`."""
        self.transfer_to, self._transfer_until_s, self._has_asked = name, until_s, False

    def _hand_over(self) -> None:
        if self.transfer_to is None or self._has_asked:
            return
        follower = self.followers[self.transfer_to]
        assert follower in self._voters, "only a voter can lead"
        if follower.match == self._log.last_position and self._send(follower.name, Campaign(self.term)):
            # Handed for good: the message may be late, and nobody's promise protects us from who acts on it then.
            self._has_asked = self._is_handed = True

    def progress(self) -> list[PeerProgress]:
        return [
            PeerProgress(
                follower.name,
                Position(follower.match),
                follower.in_flight_bytes,
                follower.is_up,
                follower.is_behind,
                follower in self._voters,
            )
            for follower in self.followers.values()
        ]
