"""The coordinator: nodes, places and leaderships of shards, looked after by whoever leads the control group.

Every moment it asks the nodes that are up what they lead and fetch, has the planner (`cluster.planner`) say what is
next, and does that: a node's state and a shard's move are proposed to the control group, a leadership is asked for at
the node that has it. It keeps nothing that the next coordinator needs. How long a node has been away is counted anew by
each, so that after a change of coordinator a dead node is noticed later, and never earlier.

    coordinator/look       what this node leads, and how far what it fetches is
    coordinator/transfer   let another node lead a shard
    coordinator/moves      what is under way, as the coordinator sees it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cluster.membership import Membership, RemoveMember, SetMember
from cluster.planner import Decisions, Health, Limits, Transfer, plan
from node.replicas import group_of
from node.workers import Lane
from storage.errors import AnnulusError, InvalidParameter, NoLeader, PeerUnreachable
from storage.types import ShardId

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

LOOK: Final = "coordinator/look"
TRANSFER: Final = "coordinator/transfer"
MOVES: Final = "coordinator/moves"
LOOK_S: Final = 1.0
ASK_S_MAX: Final = 2.0
STEADY_S: Final = 5.0
PATIENCE_S: Final = 30.0
TRANSFER_GAP_S: Final = 5.0
"""Between two rounds of transfers: their outcome is seen before more is asked for."""
REST_S: Final = 60.0
"""How long a leadership that was moved stays where it is."""
LOAD_S: Final = 30.0
"""Loads are averages over about this time."""


@dataclass
class Move:
    """A move under way."""

    generation: int
    following: tuple[str, ...]
    began_s: float
    bytes_done: int = 0
    bytes_total: int = 0

    def left_s(self, now_s: float) -> float | None:
        """Return how long fetching goes on at the speed that it had so far; None while that is not known."""
        if not self.bytes_done:
            return None
        return (now_s - self.began_s) * (self.bytes_total - self.bytes_done) / self.bytes_done


class Coordinator:
    """One per node; it works while the node leads the control group."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._role: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._epoch = 0
        self._since: dict[str, tuple[bool, float]] = {}
        """Node -> whether it is up, since when, as this coordinator saw it."""
        self._leaders: dict[ShardId, str] = {}
        self._positions: dict[ShardId, tuple[int, float]] = {}
        self._loads: dict[ShardId, float] = {}
        """Entries a second."""
        self._transferred_s: dict[ShardId, float] = {}
        self._transfers_s = -math.inf
        self.moves: dict[ShardId, Move] = {}
        if node.mesh is not None:
            node.mesh.serve(LOOK, self._tell)
            node.mesh.serve(TRANSFER, self._transfer)
            node.mesh.serve(MOVES, self._tell_moves)

    def lead(self, leads: bool) -> None:
        """Begin with the role, anew if it was held already, or give it up."""
        if self._role is not None:
            self._role.cancel()
            self._role = None
        if leads and self._node.mesh is not None:
            for kept in (self._since, self._leaders, self._positions, self._loads, self._transferred_s, self.moves):
                kept.clear()
            self._role = asyncio.get_running_loop().create_task(self._run())

    def applied(self, membership: Membership) -> None:
        """The control state here has changed, and perhaps this part of it."""
        if membership.epoch != self._epoch:
            self._epoch = membership.epoch
            self._changed.set()

    @property
    def limits(self) -> Limits:
        cluster = self._node.settings.cluster
        return Limits(
            moves_max=cluster.moves_max,
            dead_after_s=cluster.dead_after_s,
            steady_s=min(STEADY_S, cluster.dead_after_s),
            patience_s=min(PATIENCE_S, cluster.dead_after_s),
        )

    def health(self) -> Mapping[str, Health]:
        """Return how the nodes are, as far as this node has led long enough to see."""
        now_s = self._now_s()
        return {name: Health(is_up, now_s - since_s) for name, (is_up, since_s) in self._since.items()}

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._look(self._node.control.machine.membership)
            except AnnulusError as error:
                log.debug("the coordinator waits: %s", error)
            except Exception:
                log.exception("the coordinator fails; it goes on")
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(LOOK_S / 4)  # changes that come together are looked at together
                async with asyncio.timeout(LOOK_S * 3 / 4):
                    await self._changed.wait()

    async def _look(self, membership: Membership) -> None:
        if not membership.placements:
            return
        self._note_health(membership)
        await asyncio.gather(*(self._ask(name) for name, (is_up, _) in self._since.items() if is_up))
        self._note_moves(membership)
        now_s = self._now_s()
        resting = [shard for shard, at_s in self._transferred_s.items() if now_s - at_s < REST_S]
        decisions = await self._node.seams.executor.run(
            Lane.PARSE,
            _plan,
            membership.copy(),
            self.health(),
            dict(self._leaders),
            self.limits,
            dict(self._loads),
            resting,
        )
        await self._carry_out(membership, decisions)

    def _note_health(self, membership: Membership) -> None:
        mesh, now_s = self._node.mesh, self._now_s()
        assert mesh is not None
        for name in membership.members:
            is_up = mesh.is_up(name)
            if name not in self._since or self._since[name][0] != is_up:
                if name in self._since:
                    log.info("node=%s is %s", name, "back" if is_up else "away")
                self._since[name] = (is_up, now_s)
        for name in [name for name in self._since if name not in membership.members]:
            del self._since[name]

    async def _ask(self, name: str) -> None:
        """Learn what a node leads, how busy that is, and how far what it fetches is."""
        mesh = self._node.mesh
        assert mesh is not None
        try:
            seen, _ = await mesh.call(name, LOOK, {}, timeout_s=ASK_S_MAX)
        except PeerUnreachable:
            return
        now_s = self._now_s()
        for shard, leader in list(self._leaders.items()):
            if leader == name and shard not in seen["leads"]:
                del self._leaders[shard]
        for shard, position in seen["leads"].items():
            self._leaders[shard] = name
            before, at_s = self._positions.get(shard, (position, now_s - LOOK_S))
            self._positions[shard] = (position, now_s)
            weight = math.exp(-(now_s - at_s) / LOAD_S)
            rate = max(0, position - before) / max(now_s - at_s, 1e-3)
            self._loads[shard] = weight * self._loads.get(shard, rate) + (1 - weight) * rate
        for shard, (done, total) in seen["fetching"].items():
            if (move := self.moves.get(shard)) is not None:
                move.bytes_done, move.bytes_total = done, total

    def _note_moves(self, membership: Membership) -> None:
        now_s = self._now_s()
        for shard, placed in membership.placements.items():
            move = self.moves.get(shard)
            if not placed.following:
                self.moves.pop(shard, None)
            elif move is None or (move.generation, move.following) != (placed.generation, placed.following):
                self.moves[shard] = Move(placed.generation, placed.following, now_s)

    async def _carry_out(self, membership: Membership, decisions: Decisions) -> None:
        node = self._node
        for name, state in decisions.states:
            log.warning("node=%s counts as %s", name, state)
            await node.control.change(SetMember(name, membership.members[name].peer, state=state))
        for move in decisions.moves:
            now = membership.placements[move.shard]
            if set(move.members) == set(now.members):
                log.info("takes back a move shard=%d", move.shard)
            else:
                log.info("moves shard=%d from=%s to=%s", move.shard, ",".join(now.members), ",".join(move.members))
            await node.control.change(move)
        for name in decisions.removals:
            if name not in node.placing.control_voters:
                log.info("removes node=%s: another has taken its place", name)
                await node.control.change(RemoveMember(name))
        if decisions.transfers and self._now_s() - self._transfers_s >= TRANSFER_GAP_S:
            self._transfers_s = self._now_s()
            await asyncio.gather(*map(self._ask_transfer, decisions.transfers))

    async def _ask_transfer(self, transfer: Transfer) -> None:
        mesh = self._node.mesh
        assert mesh is not None
        log.info("leadership of shard=%d from=%s to=%s", *transfer)
        self._transferred_s[transfer.shard] = self._now_s()
        try:
            await mesh.call(
                transfer.giver, TRANSFER, {"shard": transfer.shard, "to": transfer.taker}, timeout_s=ASK_S_MAX
            )
        except AnnulusError as error:
            log.info("shard=%d keeps its leader: %s", transfer.shard, error)

    def _now_s(self) -> float:
        return self._node.seams.clock.monotonic_s()

    # answers to other nodes

    async def _tell(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        node = self._node
        leads = {shard: int(host.raft.last_position) for shard, host in node.shards.items() if host.is_leader}
        running = {} if node.snapshots is None else node.snapshots.progress
        fetching = {
            shard: [one.bytes_done, one.bytes_total]
            for shard in node.shards
            if (one := running.get(group_of(shard))) is not None
        }
        return {"leads": leads, "fetching": fetching}, ()

    async def _transfer(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        shard, to = ShardId(int(arguments["shard"])), str(arguments["to"])
        host = self._node.shards.get(shard)
        if host is None or not host.is_leader:
            raise NoLeader(f"node {self._node.name} does not lead shard {shard}")
        if not host.raft.transfer(to):
            raise InvalidParameter(f"node {to} cannot lead shard {shard} now")
        host.poke()
        return {}, ()

    async def _tell_moves(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        if self._role is None:
            raise NoLeader(f"node {self._node.name} is not the coordinator")
        now_s = self._now_s()
        placements = self._node.control.machine.membership.placements
        moves = [
            {
                "shard": shard,
                "from": list(placements[shard].members),
                "to": list(move.following),
                "for_s": now_s - move.began_s,
                "bytes_done": move.bytes_done,
                "bytes_total": move.bytes_total,
                "left_s": move.left_s(now_s),
            }
            for shard, move in sorted(self.moves.items())
            if shard in placements
        ]
        away = {name: one.for_s for name, one in self.health().items() if not one.is_up}
        loads = {shard: self._loads.get(shard, 0.0) for shard in placements}
        return {"moves": moves, "away_s": away, "loads": loads, "leaders": dict(self._leaders)}, ()


def _plan(
    membership: Membership,
    health: Mapping[str, Health],
    leaders: Mapping[ShardId, str],
    limits: Limits,
    loads: Mapping[ShardId, float],
    resting: Sequence[ShardId],
) -> Decisions:
    return plan(membership, health, leaders, limits, loads=loads, resting=resting)
