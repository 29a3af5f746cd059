"""What an operator asks about nodes: list them, drain, remove and replace them, and pause moves.

Each is one change of the control group's membership; the coordinator sees to what follows from it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cluster.membership import Member, Membership, MemberState, PauseMoves, RemoveMember, SetMember
from node.coordinator import MOVES
from node.names import NO_CATALOGUE, SURE_S
from storage.errors import AnnulusError, InvalidParameter, NoLeader, Unavailable

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

ASK_S_MAX: Final = 3.0


class Nodes:
    """An operator's requests, at whichever node they come in."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def entry(self) -> Mapping[str, str]:
        """Return where a node that wants to join proves itself."""
        me = self._membership().members.get(self._node.name)
        if me is None:
            raise Unavailable(f"node {self._node.name} is not part of its cluster yet: try again, or another node")
        return {"node": me.name, "peer": me.peer}

    async def describe(self) -> Mapping[str, Any]:
        """Return all nodes with what they hold and do, and the moves under way."""
        membership, seen = self._membership(), await self._ask_coordinator()
        held = Counter(name for one in membership.placements.values() for name in one.members)
        coming = Counter(
            name for one in membership.placements.values() for name in set(one.following) - set(one.members)
        )
        led = Counter(seen["leaders"].values())
        work: Counter[str] = Counter()
        for shard, leader in seen["leaders"].items():
            work[leader] += seen["loads"].get(shard, 0.0)
        voters = self._node.placing.control_voters
        nodes = [
            {
                "name": name,
                "state": str(one.state),
                "isUp": name not in seen["away_s"],
                "awaySeconds": round(seen["away_s"].get(name, 0.0), 1),
                "peer": one.peer,
                "client": one.client,
                "zone": one.zone,
                "shards": held[name],
                "coming": coming[name],
                "leads": led[name],
                "entriesPerSecond": round(work[name], 1),
                "votes": name in voters,
                "replaces": one.replaces,
            }
            for name, one in membership.members.items()
        ]
        return {"nodes": nodes, **moves_under_way(membership, seen), "copies": membership.copies}

    async def moves(self) -> Mapping[str, Any]:
        """Return {"moves", "movesPaused"}; without moves if nobody knows of them just now."""
        try:
            return moves_under_way(self._membership(), await self._ask_coordinator())
        except AnnulusError:
            return {"moves": [], "movesPaused": False}

    async def drain(self, name: str, *, undo: bool = False, force: bool = False) -> None:
        """Move everything away from a node, which serves meanwhile; with `undo` it is as it was before."""
        membership = await self._newest()
        known = self._member(membership, name)
        if not undo:
            others = [
                one.name for one in membership.members.values() if one.state is MemberState.ACTIVE and one != known
            ]
            if len(others) < membership.copies and not force and known.state is MemberState.ACTIVE:
                raise InvalidParameter(
                    f"without {name} there are {len(others)} active nodes for {membership.copies} copies of a shard: "
                    "join another node first, or force it, and there are fewer copies"
                )
            if not others:
                raise InvalidParameter(f"{name} is the last active node: nothing can be moved away from it")
        state = MemberState.ACTIVE if undo else MemberState.DRAINING
        await self._node.router.control_change(SetMember(name, known.peer, state=state))

    async def remove(self, name: str) -> None:
        """Have a node that holds nothing any more be no node of the cluster. Raises Conflict if it holds a shard."""
        self._member(await self._newest(), name)
        if name in self._node.placing.control_voters:
            raise Unavailable(
                f"node {name} votes in the control group: drain it first, or wait until another has its vote"
            )
        await self._node.router.control_change(RemoveMember(name))

    async def replace(self, old: str, new: str) -> None:
        """Have a node take over what another holds; that one is removed when it holds nothing any more."""
        membership = await self._newest()
        self._member(membership, old)
        heir = self._member(membership, new)
        if heir.state is not MemberState.ACTIVE:
            raise InvalidParameter(f"node {new} is {heir.state}: it takes nothing over")
        await self._node.router.control_change(SetMember(new, heir.peer, replaces=old))

    async def pause(self, paused: bool) -> None:
        """Plan no further moves, or go on."""
        self._membership()
        await self._node.router.control_change(PauseMoves(paused))

    async def _newest(self) -> Membership:
        """Return the membership with every change that was acknowledged; of an older one nothing follows for sure."""
        if not await self._node.router.refresh_catalog(patience_s=SURE_S):
            raise NoLeader(f"which nodes there are cannot be told: {NO_CATALOGUE}")
        return self._membership()

    def _membership(self) -> Membership:
        if self._node.mesh is None:
            raise InvalidParameter(
                f"node {self._node.name} is alone: it was started without peers, and a cluster begins with two nodes"
            )
        membership: Membership = self._node.control.machine.membership
        if not membership.members:
            raise NoLeader("the cluster is about to be formed")
        return membership

    def _member(self, membership: Membership, name: str) -> Member:
        known = membership.members.get(name)
        if known is None:
            raise InvalidParameter(f"there is no node {name}; nodes: {', '.join(membership.members)}")
        return known

    async def _ask_coordinator(self) -> dict[str, Any]:
        mesh, leader = self._node.mesh, self._node.control.leader
        if mesh is None or leader is None:
            raise NoLeader("the control group has no leader now")
        seen, _ = await mesh.call(leader, MOVES, {}, timeout_s=ASK_S_MAX)
        return seen


def moves_under_way(membership: Membership, seen: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return {"moves", "movesPaused"} as clients see them; `seen` is the coordinator's answer."""
    moves = [
        {
            "shard": one["shard"],
            "from": one["from"],
            "to": one["to"],
            "seconds": round(one["for_s"], 1),
            "bytesDone": one["bytes_done"],
            "bytesTotal": one["bytes_total"],
            "secondsLeft": None if one["left_s"] is None else round(one["left_s"], 1),
        }
        for one in seen["moves"]
    ]
    return {"moves": moves, "movesPaused": membership.moves_paused}
