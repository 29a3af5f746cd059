"""What a node does about where shards are to be: it follows, hands over, reports and drops as the control group says.

Looked at whenever the control state, a role or a generation changes, and again soon while anything is under way.

    a shard that is to come here          follow its log as a learner
    a generation that began without us    take a checkpoint of it from a member
    a shard that we lead and that is to   once the newcomers are near, end the generation; if we are not of the next
    move                                  one, first let somebody lead who is
    a generation that we lead and the     tell it, once a majority has opened the generation
    control group does not know of yet
    a shard that has gone elsewhere       call those who have it now, if none of them has told the control group yet:
                                          they may have missed the last entry; then drop what is here
    the control group, if we vote no more  call those who do, likewise, while none of them leads

Near is who has applied what was the whole log a moment ago, not who has merely received it: a generation whose members
still fetch chunks or a checkpoint would hold writes up until they have them.

Each is a look at the state, not a memory of what was begun: a crash anywhere is followed by the same look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from cluster.control import CONTROL_GROUP
from cluster.machine import Generation
from cluster.membership import VOTERS_MAX, Membership, MemberState, Moved, Placement, voters_of
from cluster.message import Handover
from node.background import Background
from node.group import GroupHost
from node.replicas import group_of
from storage.errors import AnnulusError
from storage.types import ShardId

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

AHEAD: Final = "placing/ahead"
APPLIED: Final = "placing/applied"
CALL_S: Final = 1.0
LOOK_S: Final = 0.1
"""How often what is under way is looked at."""
IDLE_S: Final = 1.0


def control_voters(membership: Membership, voters: Sequence[str]) -> tuple[str, ...]:
    """Return who is to vote in the control group: those who do and may, then the first nodes that may."""
    able = [one.name for one in membership.members.values() if one.state is MemberState.ACTIVE]
    kept = [name for name in voters if name in able]
    return tuple((kept + [name for name in able if name not in kept])[:VOTERS_MAX])


class Placing(Background):
    """One per node; runs while the node does."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._changed = asyncio.Event()
        self._ends: dict[int, tuple[int, int]] = {}
        """Slot -> (generation, where the log ended when it was last looked at): who has that much is near."""
        self._asked: dict[int, int] = {}
        """Slot -> the generation in which this node, which leads it and is to leave, has asked another one to lead."""
        self._called_s: dict[int, float] = {}
        """Slot -> when those were called who have it now."""
        if node.mesh is not None:
            node.mesh.serve(AHEAD, self._hear_ahead)
            node.mesh.serve(APPLIED, self._tell_applied)

    def wake(self) -> None:
        self._changed.set()

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            is_busy = True
            try:
                is_busy = await self._look()
            except Exception:
                log.exception("placing fails; it goes on")
            if is_busy:
                await asyncio.sleep(LOOK_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_S):
                        await self._changed.wait()

    async def _look(self) -> bool:
        """Do what there is to do; return whether something is under way."""
        node = self._node
        if not node.takes_part:
            return False
        is_busy = self._catch_up_with_those_ahead()
        membership = node.control.machine.membership
        if not membership.placements:  # a node that has just joined knows nothing before it has caught up
            return is_busy
        looks = [self._lead_control(membership)]
        placements = membership.placements.items()
        looks += [self._look_at(shard_id, placed) for shard_id, placed in placements if self._asks(shard_id, placed)]
        # Side by side: a group that waits for its majority holds up no other.
        for found in await asyncio.gather(*looks, return_exceptions=True):
            if isinstance(found, OSError):
                node.note_store_error(found)
            elif isinstance(found, AnnulusError):
                log.debug("placing waits: %s", found)
            elif isinstance(found, BaseException):
                raise found
            is_busy |= found is not False
        return is_busy

    def _asks(self, shard_id: ShardId, placed: Placement) -> bool:
        """Whether a shard may ask anything of this node; most are led elsewhere, and are where they are to be."""
        node, host = self._node, self._node.replicas.shards.get(shard_id)
        if host is None:
            named = node.name in placed.members or node.name in placed.following
            return named or shard_id in node.replicas.upkeep or shard_id in node.replicas.left
        return host.is_over or host.is_leader or host.raft.is_learner or host.generation != placed.generation

    async def _look_at(self, shard_id: ShardId, placed: Placement) -> bool:
        node, host = self._node, self._node.replicas.shards.get(shard_id)
        is_member, follows = node.name in placed.members, node.name in placed.following
        if host is None:
            if shard_id in node.replicas.upkeep:  # also if it is to come back: then it begins anew
                if placed.generation >= node.replicas.left[shard_id]:
                    await node.replicas.drop(shard_id)
                else:
                    await self._call_heirs(group_of(shard_id), node.replicas.upkeep[shard_id].shard.generation)
            elif is_member or follows:
                await node.replicas.follow(shard_id, placed)
            elif shard_id in node.replicas.left:
                await node.replicas.drop(shard_id)
            else:
                return False
            return True
        if host.is_over:
            return True
        if host.generation < placed.generation or (host.raft.is_learner and is_member):
            if is_member or follows:
                self._install(group_of(shard_id), int(placed.position), placed.members)
            else:
                node.replicas.leave(shard_id, placed.generation)
            return True
        if host.raft.is_learner and not follows and host.generation == placed.generation:
            node.replicas.leave(shard_id, placed.generation)
            return True
        return await self._lead(shard_id, host, placed)

    async def _lead(self, shard_id: ShardId, host: GroupHost[Any], placed: Placement) -> bool:
        if not host.is_leader:
            return False
        if host.generation > placed.generation:
            state = host.machine.generation
            if host.raft.delivered <= state.position:
                return True  # a majority has yet to open it: what the old members hold must stay
            moved = Moved(shard_id, state.number, list(state.members), state.position)
            await self._node.router.control_change(moved)
            return True
        host.raft.set_learners([name for name in placed.following if name not in placed.members])
        if not placed.following:
            return False
        await self._hand_over(group_of(shard_id), host, placed.following)
        return True

    @property
    def control_voters(self) -> Sequence[str]:
        """Who votes in the control group, as far as its log is applied here."""
        return self._node.control.machine.generation.members or voters_of(self._node.identity.members)

    async def _lead_control(self, membership: Membership) -> bool:
        """Everybody follows the control group; see to it that the right ones vote."""
        host = self._node.control
        if host.is_over:
            return False
        if host.raft.is_learner and host.leader is None:  # its voters may not know yet that they are
            await self._call_heirs(CONTROL_GROUP, host.machine.generation)
        if not host.is_leader:
            return False
        voters = self.control_voters
        wanted = control_voters(membership, voters)
        host.raft.set_learners([name for name in membership.members if name not in voters])
        if not wanted or set(wanted) == set(voters):
            return False
        await self._hand_over(CONTROL_GROUP, host, wanted)
        return True

    async def _hand_over(self, slot: int, host: GroupHost[Any], members: Sequence[str]) -> None:
        """End the generation if all who come, and a majority of those who go on, are near.

        That is, they have applied what was the whole log a moment ago. Who stays and is away just now holds nothing up.
        """
        end, before = host.raft.last_position, self._ends.get(slot)
        self._ends[slot] = (host.generation, end)
        if before is None or before[0] != host.generation or host.raft.is_closing:
            return
        known = {one.name: one for one in host.raft.progress()}
        coming = {name for name in members if name != host.raft.me and (name not in known or not known[name].votes)}
        near = {host.raft.me: int(end)} if host.raft.me in members else {}
        fed = [name for name in members if name in known and known[name].is_up and known[name].match >= before[1]]
        if not coming <= set(fed) or len(near) + len(fed) <= len(members) // 2:
            return
        applied = await asyncio.gather(*(self._ask_applied(name, slot, host.generation) for name in fed))
        near |= {name: position for name, position in zip(fed, applied, strict=True) if position >= before[1]}
        if not coming <= near.keys() or len(near) <= len(members) // 2 or not host.is_leader or host.raft.is_closing:
            return
        if host.raft.me not in members and self._lets_lead(slot, host, [name for name in near if known[name].votes]):
            return
        # Whoever leads now leads on, if it may; else the one that is nearest.
        order = sorted(members, key=lambda name: (name != host.raft.me, -near.get(name, -1)))
        log.info("hands over group=%s generation=%d to=%s", host.name, host.generation + 1, ",".join(order))
        await host.change(Handover(host.generation + 1, order))

    def _lets_lead(self, slot: int, host: GroupHost[Any], staying: Sequence[str]) -> bool:
        """Ask one of those who stay to lead, who then ends the generation and goes on without an election.

        Return whether it was asked: once, for if it does not take it the generation ends all the same.
        """
        if self._asked.get(slot) == host.generation or not any(map(host.raft.transfer, staying)):
            return False
        self._asked[slot] = host.generation
        host.poke()
        return True

    def _catch_up_with_those_ahead(self) -> bool:
        """Others speak in a generation that is not open here: take a checkpoint of it."""
        ahead, self._node.replicas.ahead = self._node.replicas.ahead, {}
        for slot, peer in ahead.items():
            host = self._node.replicas.hosts.get(slot)
            if host is not None and not host.is_over:
                self._install(slot, host.machine.position + 1, [peer])
        return bool(ahead)

    async def _ask_applied(self, name: str, slot: int, generation: int) -> int:
        """Return how much of a generation's log a node has applied; -1 if it has nothing of it, or is away."""
        mesh = self._node.mesh
        assert mesh is not None, "a node without peers places nothing"
        try:
            found, _ = await mesh.call(name, APPLIED, {"slot": slot, "generation": generation}, timeout_s=CALL_S)
        except AnnulusError:
            return -1
        return int(found["position"])

    async def _tell_applied(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        host = self._node.replicas.hosts.get(int(arguments["slot"]))
        is_there = host is not None and host.is_whole and host.generation == int(arguments["generation"])
        return {"position": int(host.machine.position) if host is not None and is_there else -1}, ()

    async def _call_heirs(self, slot: int, state: Generation) -> None:
        """Tell the members of a generation that nobody is known to lead yet where its beginning is to be had."""
        mesh, now_s = self._node.mesh, self._node.seams.clock.monotonic_s()
        if now_s - self._called_s.get(slot, -CALL_S) < CALL_S:
            return
        self._called_s[slot] = now_s
        assert mesh is not None, "a node without peers places nothing"
        facts = {"slot": slot, "generation": state.number, "position": int(state.position)}
        calls = (mesh.call(name, AHEAD, facts, timeout_s=CALL_S) for name in state.members if mesh.is_up(name))
        await asyncio.gather(*calls, return_exceptions=True)

    async def _hear_ahead(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        slot, generation, position = (int(arguments[key]) for key in ("slot", "generation", "position"))
        host = self._node.replicas.hosts.get(slot)
        if host is not None and not host.is_over and host.generation < generation:
            self._install(slot, position, [peer])
        return {}, ()

    def _install(self, slot: int, at_least: int, sources: Sequence[str]) -> None:
        node = self._node
        assert node.snapshots is not None and node.mesh is not None, "a node without peers places nothing"
        up = [name for name in sources if name != node.name and node.mesh.is_up(name)]
        if up:
            node.snapshots.begin(slot, at_least, up[0])
