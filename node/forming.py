"""A node without a memory finds its place: it founds the cluster with others, or comes back as one that forgot.

Raft is safe because no voter forgets its promises. A new directory may be that of a new cluster, or of a node whose
disk was lost or set aside; in the second case the node once voted and confirmed entries, and does not know it. So a
node whose directory holds no votes yet (`Identity.is_seated`) asks the others first:

    one of them knows the cluster's id      there is a cluster: come back as one that forgot
    so many others answer that they are     nothing has been promised to any client: found it
    new that no quorum is without one

Who is new has neither voted nor heard of a leader in the control group. A quorum of its voters takes part in whatever
is promised; if one of every quorum is new, besides this node, which cannot know what it has forgotten, nothing has
been. Where that is not so, the first leader is about to give the id, or the cluster waits for its nodes.

**Coming back.** For each of its groups the node waits until all other voters answer, so many of them remember that
every quorum has one, and these are of one term, with its leader among them. Then
  1. whoever it may once have voted for in a higher term cannot count that vote any more: nobody is in a higher one;
  2. everything that its lost log helped to commit is in the log of the leader, who was elected without it.
It takes this term, with a vote for that leader, as its own, and abstains from elections until its log reaches to where
the leader's ended when it was asked. From then on it remembers, and is a voter like any other. With three replicas both
others must answer, which is not more than what reading any data back takes.

A node that is started for the first time after the others have formed the cluster comes in the same way. A group in
which nobody has ever heard of a leader, as far as all its voters know, has yet to begin: it is founded like a cluster.

Groups move from generation to generation. Which one is current, and of whom it consists, the others tell, whoever they
are by now; it is asked for again as long as there is no seat. So many of them must answer that of each group that this
node may be of, another member does: it would come back to a group that nobody names as one that never voted there. Who
has just joined never did. A node that is no voter of the control group follows it, and needs no seat there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from cluster.control import CONTROL_GROUP
from cluster.membership import voters_of
from node.calls import Mesh
from storage.errors import AnnulusError, NoLeader
from storage.types import Position

log = logging.getLogger(__name__)

GREET: Final = "forming/greet"
STANDING: Final = "forming/standing"
ASK_S: Final = 0.1
"""How often the others are asked again."""
ANSWER_S_MAX: Final = 2.0


class Standing(NamedTuple):
    """Where a voter stands in a group."""

    term: int
    leads: bool
    last: Position
    """Where its log ends."""


class Known(NamedTuple):
    """What is known of who holds a slot."""

    generation: int
    members: tuple[str, ...]


class Seat(NamedTuple):
    """What a replica that forgot begins with."""

    term: int
    leader: str
    abstains: Position
    """It takes no part in elections until its log reaches to here."""
    of: Known
    """The generation in which it has this seat."""


class Forming:
    """Asks the others, and answers them. `why` says what is being waited for; empty when nothing is."""

    def __init__(
        self,
        mesh: Mesh,
        members: Sequence[str],
        *,
        others: Callable[[], Sequence[str]],
        silent_max: Callable[[], int | None],
        cluster_id: Callable[[], str],
        standing: Callable[[int, int], Standing | None],
        is_new: Callable[[int], bool],
        known: Callable[[], Mapping[int, Known]],
    ) -> None:
        """Make one; it answers others from now on.

        members     those that form the cluster
        others      returns all other nodes of the cluster, as far as is known
        silent_max  returns how many of these need not answer for it to be known who holds a slot; None if this node
                    cannot have voted anywhere
        standing  of a generation of a slot is None while this node remembers too little to vouch for anything in it
        is_new    of a slot: whether this node has taken no part in it yet, as far as it knows
        known     slot -> who holds it, as far as this node knows
        """
        self.why = ""
        self._mesh = mesh
        self._others = others
        self._silent_max = silent_max
        self._voters = voters_of(members)
        self._cluster_id = cluster_id
        self._standing = standing
        self._is_new = is_new
        self._known = known
        mesh.serve(GREET, self._greet)
        mesh.serve(STANDING, self._tell_standing)

    async def find_cluster(self) -> str:
        """Return the id of the cluster that this node belongs to, or "" if it is about to be founded."""
        # This node may be the one that has forgotten, so it does not count: of three nodes both others must be new.
        needed = len(self._voters) - len(self._voters) // 2
        while True:
            answers = await self._ask(self._others(), GREET, {})
            for peer, answer in answers.items():
                if isinstance(answer, dict) and answer["cluster_id"]:
                    log.info("found the cluster=%s by peer=%s", answer["cluster_id"], peer)
                    return str(answer["cluster_id"])
            here = {peer: answer for peer, answer in answers.items() if isinstance(answer, dict)}
            old = [peer for peer, answer in here.items() if not answer["is_new"]]
            if not self._is_new(CONTROL_GROUP):
                old.append(self._mesh.me)
            if not old and len(here.keys() & set(self._voters)) >= needed:
                log.info("founding a cluster with peers=%s", ",".join(here))
                return ""
            missing = ", ".join(peer for peer in self._voters if peer not in {*here, self._mesh.me})
            self.why = (
                f"waiting for {missing}: {needed + 1} of {len(self._voters)} nodes form a cluster; if others are one "
                f"by now, start with a new name and --join one of them, --replaces {self._mesh.me}"
            )
            if old:
                self.why = f"{', '.join(old)} has been part of a cluster: waiting for a node that knows its id"
            await asyncio.sleep(ASK_S)

    async def find_seats(self, formed: Mapping[int, Known]) -> dict[int, Seat]:
        """Return slot -> what to begin with there, of all slots in which this node has a part.

        formed  who held the slots when the cluster was formed
        """
        seats: dict[int, Seat] = {}
        while True:
            known, silent = await self._newest(formed)
            silent_max = self._silent_max()
            if silent_max is not None and len(silent) > silent_max:  # others of a group in which this one has voted?
                self.why = (
                    f"coming back: waiting for {', '.join(silent)}: all but {silent_max} of the other nodes "
                    "must say which groups there are; remove those that are gone (annulus node remove NAME)"
                )
                await asyncio.sleep(ASK_S)
                continue
            mine = {slot: one for slot, one in known.items() if slot == CONTROL_GROUP or self._mesh.me in one.members}
            seats = {slot: seat for slot, seat in seats.items() if mine.get(slot) == seat.of}
            open_slots = [slot for slot in sorted(mine) if slot not in seats]
            whys: dict[int, str] = {}
            found = await asyncio.gather(*(self._find_seat(slot, mine[slot], whys) for slot in open_slots))
            seats |= {slot: seat for slot, seat in zip(open_slots, found, strict=True) if seat is not None}
            if len(seats) == len(mine):
                self.why = ""
                return seats
            self.why = f"coming back: {len(seats)} of {len(mine)} groups" + "".join(
                f"; group {slot} {why}" for slot, why in sorted(whys.items())[:1]
            )
            await asyncio.sleep(ASK_S)

    async def _newest(self, formed: Mapping[int, Known]) -> tuple[dict[int, Known], list[str]]:
        """Return slot -> who holds it, as the one knows who knows most of it; and those who do not answer."""
        newest, silent = dict(formed), []
        for peer, answer in (await self._ask(self._others(), GREET, {})).items():
            if not isinstance(answer, dict):
                silent.append(peer)
                continue
            for slot, (generation, members) in answer["groups"].items():
                if slot not in newest or generation > newest[slot].generation:
                    newest[slot] = Known(generation, tuple(members))
        return newest, silent

    async def _find_seat(self, slot: int, known: Known, whys: dict[int, str]) -> Seat | None:
        others = [name for name in known.members if name != self._mesh.me]
        new_seat = Seat(0, "", Position(0), known)
        if self._mesh.me not in known.members:
            return new_seat  # of a learner
        if not others:
            log.warning("group=%d has no other copy: what it held here before, if anything, is gone", slot)
            return new_seat
        answers = await self._ask(others, STANDING, {"group": slot, "generation": known.generation})
        found: dict[str, Standing] = {}
        new: list[str] = []
        for peer in others:
            answer = answers[peer]
            if not isinstance(answer, dict):
                whys[slot] = f"needs {peer}: {answer}"
                return None
            if answer["standing"] is not None:
                found[peer] = Standing(*answer["standing"])
            elif answer["is_new"]:
                new.append(peer)
        if len(new) == len(others) and self._is_new(slot):
            return new_seat
        voters = len(others) + 1
        quorum = voters // 2 + 1
        if len(found) < voters - quorum + 1:  # a quorum could be of those who forgot
            lost = ", ".join(peer for peer in others if peer not in found)
            whys[slot] = f"needs {lost}, which has yet to find its own place"
            return None
        leaders = [peer for peer, one in found.items() if one.leads]
        if len(leaders) != 1 or len({one.term for one in found.values()}) != 1:
            whys[slot] = "has no leader that all follow"
            return None
        leader = leaders[0]
        return Seat(found[leader].term, leader, Position(found[leader].last), known)

    async def _ask(
        self, peers: Sequence[str], method: str, arguments: Mapping[str, Any]
    ) -> dict[str, dict[str, Any] | str]:
        """Return the answer of each peer, or why there is none."""

        async def ask(peer: str) -> dict[str, Any] | str:
            try:
                answer, _ = await self._mesh.call(peer, method, arguments, timeout_s=ANSWER_S_MAX)
            except AnnulusError as error:
                return error.message
            return answer

        return dict(zip(peers, await asyncio.gather(*map(ask, peers)), strict=True))

    # answers

    async def _greet(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        groups = {slot: [one.generation, list(one.members)] for slot, one in self._known().items()}
        return {"cluster_id": self._cluster_id(), "is_new": self._is_new(CONTROL_GROUP), "groups": groups}, ()

    async def _tell_standing(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        slot, generation = int(arguments["group"]), int(arguments["generation"])
        standing = self._standing(slot, generation)
        plain = None if standing is None else list(standing)
        return {"standing": plain, "is_new": standing is None and self._is_new(slot)}, ()


def closed(why: str) -> NoLeader:
    """Return the answer to a request that comes before this node has found its place."""
    return NoLeader(f"the node is not part of its cluster yet: {why or 'it starts'}")
