"""Who belongs to the cluster, and which nodes hold which shard: the part of the control group's state that moves them.

A shard's copies are fixed within a **generation** of its group. A move is decided in two places, and each has one job:

    here            `PlanMove` says which nodes shall hold a shard. They begin to follow its log, with no say in it.
    the shard's log `Handover` (`cluster.message`) ends the generation, at one position, for whoever reads the log. What
                    it says is what is: a log has one handover, so a shard has one valid configuration at any moment.
    here            `Moved` notes what the log has said. Until then nobody removes what the old copies hold.

So a plan may be changed or dropped at any time, and none of these steps can be done twice. (Spec: raft, section 4.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from cluster.message import Message
from cluster.ring import place
from storage.errors import Conflict, InvalidParameter
from storage.types import Position, ShardId

MEMBERS_MAX: Final = 64
SLOTS: Final = 1 << 16
"""Slot 0 is the control group's, slot i + 1 that of shard i."""
VOTERS_MAX: Final = 5
"""Nodes that vote in the control group: the first ones that came; all others follow it."""


def group_id(slot: int, generation: int) -> int:
    """Return the Raft group of a generation: what is said and written in one is never taken for another's."""
    return generation * SLOTS + slot


def slot_of(group: int) -> int:
    """Return whose generation a Raft group is."""
    return group % SLOTS


def generation_of(group: int) -> int:
    """Return which generation of its slot a Raft group is."""
    return group // SLOTS


def voters_of(members: Sequence[str]) -> tuple[str, ...]:
    """Return who votes in the control group of a cluster that was formed with these nodes."""
    return tuple(members[:VOTERS_MAX])


class MemberState(StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"
    """Its replicas are moved away; it serves until the last one is."""
    GONE = "gone"
    """It was away for too long, or was removed: its replicas are rebuilt elsewhere."""


@dataclass(frozen=True)
class Member:
    """One node."""

    name: str
    peer: str
    """host:port for other nodes."""
    client: str = ""
    """host:port for clients; "" until the node has told it."""
    zone: str = ""
    """Replicas of a shard are in different zones while there are enough."""
    state: MemberState = MemberState.ACTIVE
    replaces: str = ""
    """The node whose shards it takes over while that one drains."""
    is_replaced: bool = False
    """It was told to make room for another, whatever has become of that one: it is removed when it holds nothing."""
    number: int = 0
    """Below MEMBERS_MAX, and no other node's: what makes names of things that nodes give different."""
    ticket: str = ""
    """Of the directory that joined, which tells it from another of the name; "" of a node that formed the cluster."""


@dataclass(frozen=True)
class Placement:
    """Which nodes hold a shard."""

    generation: int
    members: tuple[str, ...]
    following: tuple[str, ...] = ()
    """Who shall be the members of the next generation; empty while no move is planned."""
    position: Position = Position(0)
    """Where the log of this generation begins."""

    @property
    def holders(self) -> tuple[str, ...]:
        """Everybody who has, or is about to have, a copy."""
        return self.members + tuple(name for name in self.following if name not in self.members)


@dataclass(frozen=True)
class FormCluster(Message):
    """Tells this cluster from all others, and who it begins with. Leaders propose one while there is none."""

    kind = "form_cluster"
    cluster_id: str
    members: Mapping[str, str]
    """Name -> host:port for other nodes."""
    copies: int


@dataclass(frozen=True)
class SetMember(Message):
    """Change what is known of a node, where what is not given stays; with a ticket, add it."""

    kind = "set_member"
    name: str
    peer: str
    client: str = ""
    zone: str = ""
    state: str = ""
    replaces: str = ""
    """Drain that node, and let this one take over its shards."""
    ticket: str = ""
    """Made up by the directory that asks to join; asking again with it changes nothing more."""


@dataclass(frozen=True)
class RemoveMember(Message):
    """The node no longer belongs to the cluster; refused while it holds or is to hold a shard."""

    kind = "remove_member"
    name: str


@dataclass(frozen=True)
class PlanMove(Message):
    """A shard of this generation shall be held by these nodes; none takes the plan back."""

    kind = "plan_move"
    shard: ShardId
    generation: int
    members: Sequence[str]


@dataclass(frozen=True)
class PauseMoves(Message):
    """No move is planned from now on, until this is said again with False; those that are planned go on."""

    kind = "pause_moves"
    paused: bool


@dataclass(frozen=True)
class Moved(Message):
    """The shard's log has handed over: generation, members and position are what it says."""

    kind = "moved"
    shard: ShardId
    generation: int
    members: Sequence[str]
    position: int


class Membership:
    """Nodes and placements. Empty in a node without peers, which holds everything itself."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        """In the order in which they came."""
        self.placements: dict[ShardId, Placement] = {}
        self.copies = 0
        self.moves_paused = False
        self.epoch = 0
        """Rises with every change of this state."""

    def form(self, message: FormCluster, shard_count: int) -> None:
        """Begin: every shard is where the ring of the first nodes has it."""
        self.members = {
            name: Member(name, peer, number=number) for number, (name, peer) in enumerate(message.members.items())
        }
        self.copies = message.copies
        placed = place(list(self.members), shard_count, message.copies)
        self.placements = {shard: Placement(0, members) for shard, members in placed.items()}
        self.epoch += 1

    def change(self, message: Message) -> Mapping[str, Any] | None:
        """Apply one of this module's messages; None for any other. Raises BadRequest, having changed nothing."""
        match message:
            case SetMember():
                self._set_member(message)
            case RemoveMember(name):
                self._remove_member(name)
            case PlanMove(shard, generation, members):
                self._plan(shard, generation, tuple(members))
            case PauseMoves(paused):
                self.moves_paused = paused
            case Moved(shard, generation, members, position):
                known = self._placement(shard)
                if generation <= known.generation:
                    return {}
                self.placements[shard] = Placement(generation, tuple(members), (), Position(position))
            case _:
                return None
        self.epoch += 1
        return {}

    def _placement(self, shard: ShardId) -> Placement:
        found = self.placements.get(shard)
        if found is None:
            raise InvalidParameter(f"there is no shard {shard}: there are {len(self.placements)}")
        return found

    def _set_member(self, message: SetMember) -> None:
        if not message.name or not message.peer:
            raise InvalidParameter("a node has a name and an address for other nodes")
        if message.state and message.state not in set(MemberState):
            raise InvalidParameter(f"a node is {', '.join(MemberState)}, not {message.state}")
        owner = next((one.name for one in self.members.values() if one.peer == message.peer), message.name)
        if owner != message.name:
            raise Conflict(f"node {owner} has the address {message.peer} already")
        before = self.members.get(message.name) or self._newcomer(message)
        if message.ticket and before.ticket != message.ticket:
            raise Conflict(f"there is a node {message.name} in the cluster already, at {before.peer}")
        asks_again = message.ticket and message.name in self.members
        # What was asked for may be over when it is asked for again.
        replaces = message.replaces if message.replaces in self.members or not asks_again else ""
        if replaces:
            self._drain_replaced(message)
        self.members[message.name] = replace(
            before,
            peer=message.peer,
            client=message.client or before.client,
            zone=message.zone or before.zone,
            state=MemberState(message.state or before.state),
            replaces=replaces or before.replaces,
            is_replaced=before.is_replaced and message.state != MemberState.ACTIVE,
        )

    def _newcomer(self, message: SetMember) -> Member:
        if not message.ticket:
            raise InvalidParameter(f"there is no node {message.name}; nodes: {', '.join(self.members)}")
        taken = {one.number for one in self.members.values()}
        free = next((number for number in range(MEMBERS_MAX) if number not in taken), None)
        if free is None:
            raise InvalidParameter(f"a cluster has at most {MEMBERS_MAX} nodes")
        return Member(message.name, message.peer, number=free, ticket=message.ticket)

    def _drain_replaced(self, message: SetMember) -> None:
        old = self.members.get(message.replaces)
        if old is None or old.name == message.name:
            raise InvalidParameter(
                f"node {message.name} cannot replace {message.replaces}: there are {', '.join(self.members)}"
            )
        other = next((one.name for one in self.members.values() if one.replaces == old.name), message.name)
        if other != message.name:
            raise Conflict(f"node {other} replaces {old.name} already")
        self.members[old.name] = replace(old, state=MemberState.DRAINING, is_replaced=True)

    def _remove_member(self, name: str) -> None:
        held = [shard for shard, one in self.placements.items() if name in one.holders]
        if held:
            raise Conflict(f"node {name} holds {len(held)} shards, {held[0]} among them: drain it first")
        member = self.members.get(name)
        if member is None:
            raise InvalidParameter(f"there is no node {name}; nodes: {', '.join(self.members)}")
        if member.state is MemberState.ACTIVE:
            raise Conflict(f"node {name} is active: drain it first")
        del self.members[name]
        for heir in [one for one in self.members.values() if one.replaces == name]:
            self.members[heir.name] = replace(heir, replaces="")

    def _plan(self, shard: ShardId, generation: int, members: tuple[str, ...]) -> None:
        known = self._placement(shard)
        if known.generation != generation:
            raise Conflict(f"shard {shard} is in generation {known.generation}, not {generation}: plan anew")
        unknown = [name for name in members if name not in self.members]
        if unknown or len(set(members)) != len(members):
            raise InvalidParameter(f"{', '.join(members)} are not different nodes of this cluster")
        following = () if set(members) == set(known.members) else members
        self.placements[shard] = replace(known, following=following)

    # checkpoint

    def copy(self) -> Membership:
        """Return this state as it is now; the values are frozen."""
        copy = Membership()
        copy.members, copy.placements = dict(self.members), dict(self.placements)
        copy.copies, copy.epoch, copy.moves_paused = self.copies, self.epoch, self.moves_paused
        return copy

    def to_plain(self) -> dict[str, Any]:
        return {
            "members": [dict(vars(one)) for one in self.members.values()],
            "placements": [[shard, dict(vars(one))] for shard, one in self.placements.items()],
            "copies": self.copies,
            "epoch": self.epoch,
            "moves_paused": self.moves_paused,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Membership:
        found = cls()
        for one in plain["members"]:
            found.members[one["name"]] = Member(**{**one, "state": MemberState(one["state"])})
        for shard, one in plain["placements"]:
            found.placements[ShardId(shard)] = Placement(
                one["generation"], tuple(one["members"]), tuple(one["following"]), Position(one["position"])
            )
        found.copies, found.epoch = plain["copies"], plain["epoch"]
        found.moves_paused = plain.get("moves_paused", False)
        return found
