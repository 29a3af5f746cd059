"""The replicas of one node: the control group's, and those of its shards, each through the generations of its group.

A replica has a slot (0 for the control group, i + 1 for shard i), a `GroupHost`, and for each generation a Raft group
and a log of its own. It opens a generation only with a state that has the handover to it:

    applied      the last entry of the generation before was applied here: the next one begins at its position
    installed    another replica's checkpoint came that is of a later generation: the same, from its position on

So there is one way into a generation, and a start after a crash takes it too: the checkpoint's generation is opened,
and if a log of the next one is there already, the handover to it is known to be committed and is applied again.

Who is to become a member follows first, as a learner. Who is no member any more keeps what it has until the control
group has noted where the shard went, then drops it (`node/placing.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cluster.checkpoint import begin_log, begin_log_at, covered_term, incoming_key, manifest_key, restore
from cluster.control import CONTROL_GROUP, Control
from cluster.machine import StateMachine
from cluster.membership import Placement, generation_of, group_id, slot_of, voters_of
from cluster.message import Message
from cluster.raft import Behind, RaftConfig, RaftGroup
from cluster.raft_wire import ROOT
from cluster.shard import Shard
from node.calls import Mesh
from node.chunk_pins import ChunkPins
from node.group import GroupHost, Producer
from node.network import Blob
from node.pressure import Level
from node.snapshot import Record, SnapshotGroup, of_control, of_shard
from node.upkeep import Upkeep
from node.workers import Lane
from storage.chunks import ChunkFault
from storage.keys import record_key
from storage.types import Position, ShardId
from storage.word_files import drop_all_words

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

CATALOG_KEY: Final = record_key("catalog")
MEND_S: Final = 5.0
"""How long a start waits for peers that have a chunk which is damaged here."""
MEND_RETRY_S: Final = 0.5
EARLY_MAX: Final = 64
"""Messages kept of a generation that is about to be opened here."""


def group_of(shard_id: ShardId) -> int:
    """Return the slot of a shard; slot 0 is the control group's."""
    return shard_id + 1


class Replicas:
    """Opens, reopens and closes them. Belongs to the loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.hosts: dict[int, GroupHost[Any]] = {}
        """By slot."""
        self.shards: dict[ShardId, GroupHost[Shard]] = {}
        self.upkeep: dict[ShardId, Upkeep] = {}
        """Also of shards that have moved away, whose chunks others may still be fetching."""
        self.snapshot_groups: dict[int, SnapshotGroup] = {}
        self.control_pins = ChunkPins(node.seams.clock)
        self.ahead: dict[int, str] = {}
        """Slot -> a node that has spoken in a generation which is not open here."""
        self.left: dict[ShardId, int] = {}
        """Shard of which there is something here, though this node takes no part in it -> the generation from which on
        it does not; 0 if it knows of none in which it did."""
        self._by_group: dict[int, GroupHost[Any]] = {}
        self._early: dict[int, tuple[int, deque[tuple[str, dict[str, Any], Sequence[memoryview]]]]] = {}
        """Slot -> group of the newest generation that others speak in and that is not open here, and what they say."""
        self._producer = Producer("")
        self._upkeep_runs = False

    # start

    async def open(self, formed: Mapping[ShardId, Sequence[str]]) -> None:
        """Start the control group and every shard of which this node is a member, from checkpoints and logs.

        formed  the placement that the cluster was formed with
        """
        node, run = self._node, self._node.seams.executor.run
        self._producer = Producer(f"{node.name}/{node.seams.dice.getrandbits(64):016x}")
        raw = await run(Lane.DISK, node.seams.store.read, CATALOG_KEY)
        control = Control(node.identity.shards) if raw is None else await run(Lane.DISK, Control.restore, raw)
        voters, told = voters_of(node.identity.members), self._told(CONTROL_GROUP, control)
        opened: list[GroupHost[Any] | None] = [self._open(CONTROL_GROUP, control, raw, voters, told)]
        for shard_id in sorted(formed):
            placed = control.membership.placements.get(shard_id)
            members = formed[shard_id] if placed is None or placed.generation == 0 else ()
            opened.append(await self._open_shard(shard_id, members))
        if node.mesh is not None:
            node.mesh.on_unknown_group(self._not_open)
        for host in opened:
            if host is not None:
                host.start()

    async def _open_shard(
        self, shard_id: ShardId, members: Sequence[str], told: Placement | None = None
    ) -> GroupHost[Shard] | None:
        """Return the replica, not started, if this node has one.

        members  of the first generation, if this node may have been one of them
        told     follow this generation, unless the state here makes this node a member: whoever is one without that
                 state may have a vote only when it has it, for several of them would elect each other with nothing
        """
        node, slot = self._node, group_of(shard_id)
        raw = await node.seams.executor.run(Lane.DISK, node.seams.store.read, manifest_key(shard_id))
        has_seat = any(slot_of(group) == slot for group in node.identity.seats)
        if raw is None and node.name not in members and told is None and not has_seat:
            return None
        shard = await self._restore(shard_id)
        seat = self._told(slot, shard, told)
        told = seat or told
        is_member = told is None and node.name in (shard.generation.members or members)
        if not is_member and (told is None or shard.generation.number > told.generation):
            state = shard.generation
            if state.number and node.name not in state.members:  # the others may still need what is here
                self._open(slot, shard, raw, (), Placement(state.number, state.members))
                self.leave(shard_id, state.number)
            else:
                self.left[shard_id] = 0
            return None
        if node.name in shard.generation.members and told is not None and shard.generation.number == told.generation:
            told = None
        follows = told is not None and seat is None
        number = shard.generation.number
        if told is not None and follows and group_id(slot, number + 1) in node.journal.group_ids:
            told = Placement(number, shard.generation.members or told.members)  # the logs here lead on from this state
        begins = 0 if told is None else node.journal.group(group_id(slot, told.generation)).base_position
        if told is not None and follows and raw is None and begins > ROOT:
            self._forget_before(slot, told.generation + 1)  # a crash kept the logs when all else was dropped
        host = self._open(slot, shard, raw, members, told, follows=follows)
        self.left.pop(shard_id, None)
        self.shards[shard_id] = host
        return host

    def _told(self, slot: int, machine: StateMachine, told: Placement | None = None) -> Placement | None:
        """Return the generation in which this node was given a seat, if the state is of an older one.

        told  what the control group says: a seat in a generation before that is one no longer
        """
        seats = self._node.identity.seats.items()
        mine = {generation_of(group): members for group, members in seats if slot_of(group) == slot}
        number = max(mine, default=0)
        is_over = number <= machine.generation.number or (told is not None and number < told.generation)
        return None if is_over else Placement(number, mine[number])

    async def begin_upkeep(self) -> None:
        """Start the background work of all shards here, and of those that will come."""
        self._upkeep_runs = True
        for shard_id, upkeep in list(self.upkeep.items()):
            if self._node.mesh is None:  # all of the log is applied; with peers more may come that names chunks
                removed = 0
                try:
                    removed = await upkeep.checkpoints.sweep()
                except OSError as error:
                    self._node.note_store_error(error)  # a full disk: what is left is removed by the next start
                if removed:
                    log.info("removed chunks that a crash had left shard=%d chunks=%d", shard_id, removed)
            upkeep.start()

    async def _restore(self, shard_id: ShardId) -> Shard:
        """Return a shard as its checkpoint has it; damaged chunks are taken from peers. Raises ChunkDamaged."""
        node = self._node
        clock, began_s = node.seams.clock, node.seams.clock.monotonic_s()
        while True:
            try:
                return await node.seams.executor.run(Lane.DISK, restore, shard_id, node.seams.store)
            except ChunkFault as fault:
                if node.transfer is None:
                    raise
                if not await node.transfer.repair(shard_id, fault.digest):
                    if clock.monotonic_s() - began_s > MEND_S:
                        raise
                    await asyncio.sleep(MEND_RETRY_S)

    def _open(
        self,
        slot: int,
        machine: StateMachine,
        raw: bytes | None,
        members: Sequence[str],
        told: Placement | None = None,
        *,
        follows: bool = False,
    ) -> GroupHost[Any]:
        node = self._node
        node.hybrid.observe(machine.tick)
        number = machine.generation.number if told is None else told.generation
        members = told.members if told is not None else machine.generation.members or members
        term = 0 if raw is None else covered_term(raw) or 0
        begin_log(node.journal.group(group_id(slot, number)), raw)
        self._forget_before(slot, machine.generation.number)
        raft = self._raft(slot, number, members, machine, term, follows=follows)
        shard_id = None if slot == CONTROL_GROUP else ShardId(slot - 1)
        host: GroupHost[Any] = GroupHost(
            "control" if shard_id is None else f"s{shard_id}",
            raft,
            machine,
            producer=self._producer,
            hybrid=node.hybrid,
            clock=node.seams.clock,
            kick_journal=node.kick_journal,
            on_applied=node.control_applied if shard_id is None else self._waker(shard_id),
            on_fatal=node.fail,
            on_behind=lambda behind: self._take_snapshot(slot, behind),
            on_over=lambda: self._go_on(slot),
            on_role=node.control_role if shard_id is None else lambda leads: node.placing.wake(),
            provision=None if shard_id is None else self._provider(shard_id),
        )
        host.on_compare = lambda position: node.healing.note(slot, position)
        self.hosts[slot] = host
        if shard_id is None:
            node.note_control_saved(machine.position)
        else:
            self.upkeep[shard_id] = self._upkeep(host)
        if node.mesh is not None:
            self._open_snapshots(slot, shard_id, host)
        self._attach(host)
        return host

    def _upkeep(self, host: GroupHost[Shard]) -> Upkeep:
        node = self._node
        return Upkeep(
            host,
            node.seams.store,
            node.seams.executor,
            node.hybrid,
            node.seams.clock,
            node.settings,
            node.metrics,
            dice=node.seams.dice,
            transfer=node.transfer,
            on_store_error=node.note_store_error,
            readers_gone=node.readers_gone,
            store_full=lambda: node.is_store_full,
            journal_full=lambda: node.is_journal_full,
            memory_short=lambda: node.admission.look() is not Level.ACCEPT,
            merge_bytes_max=node.admission.merge_bytes_max,
            slots=node.slots,
        )

    def _open_snapshots(self, slot: int, shard_id: ShardId | None, host: GroupHost[Any]) -> None:
        node = self._node
        record: Record
        checkpoint: Callable[[], Awaitable[None]]
        note_installing: Callable[[bool], None]
        replaced: Callable[[Position], None]
        if shard_id is None:
            record, pins, checkpoint = of_control(CATALOG_KEY), self.control_pins, node.checkpoint_control
            note_installing, replaced = lambda installing: None, node.control_replaced
        else:
            upkeep = self.upkeep[shard_id]
            record, pins, checkpoint = of_shard(shard_id, node.seams.store), upkeep.pins, upkeep.checkpoints.write
            note_installing, replaced = upkeep.checkpoints.note_installing, upkeep.replaced
        self.snapshot_groups[slot] = SnapshotGroup(
            group_id=slot,
            record=record,
            raft_log=lambda: host.raft.log,
            pins=pins,
            peers=lambda: self._holders(shard_id, host),
            machine=lambda: host.machine,
            install=lambda machine, position, term: host.install(machine, term),
            note_installing=note_installing,
            replaced=replaced,
            checkpoint=checkpoint,
        )

    def _holders(self, shard_id: ShardId | None, host: GroupHost[Any]) -> Sequence[str]:
        """Return the other nodes that have a group: in the generation here, and as far as is known in later ones."""
        known = self._node.members if shard_id is None else self._node.replicas_of(shard_id)
        return [one for one in dict.fromkeys([*host.raft.peers, *known]) if one != self._node.name]

    # generations

    def _raft(
        self,
        slot: int,
        number: int,
        members: Sequence[str],
        machine: StateMachine,
        term: int,
        *,
        follows: bool = False,
    ) -> RaftGroup:
        """Return the Raft group of a generation on its log, which begins where the state ends unless it is there."""
        node = self._node
        group = group_id(slot, number)
        raft_log = node.journal.group(group)
        if number > machine.generation.number and raft_log.last_position == 0 and machine.position > 0:
            begin_log_at(raft_log, machine.position, term)
        following = group_id(slot, number + 1)
        is_followed = following in node.journal.group_ids
        cluster = node.settings.cluster
        return RaftGroup(
            group,
            node.name,
            [one for one in members if one != node.name],
            raft_log,
            applied=machine.position,
            clock=node.seams.clock.monotonic_s,
            rng=node.seams.dice,
            stamp=node.hybrid.stamp,
            config=RaftConfig(cluster.heartbeat_s, cluster.election_s_min, cluster.election_s_max),
            abstains=node.identity.abstains.get(group, 0),
            is_learner=follows or node.name not in members,
            committed=node.journal.group(following).base_position if is_followed else 0,
            transport=None if node.mesh is None else _GroupTransport(node.mesh, group),
        )

    def _attach(self, host: GroupHost[Any]) -> None:
        """Let the group hear its peers."""
        node, group = self._node, host.raft.group_id
        self._by_group[group] = host
        if node.mesh is None:
            return
        node.mesh.on_raft(group, host.receive)
        for peer in node.peer_names:
            host.session(peer, node.mesh.is_up(peer))
        newest, said = self._early.get(slot_of(group), (0, ()))
        if newest <= group:
            self._early.pop(slot_of(group), None)
        for peer, header, blobs in said if newest == group else ():
            host.receive(peer, header, blobs)

    def _detach(self, group: int) -> None:
        self._by_group.pop(group, None)
        if self._node.mesh is not None:
            self._node.mesh.off_raft(group)

    def _go_on(self, slot: int) -> None:
        """A generation is over here: open the one that the state is of, if this node takes part in it."""
        host = self.hosts.get(slot)
        if host is None or not host.is_over or self._node.failed.done():
            return
        state = host.machine.generation
        is_member = self._node.name in state.members
        self._detach(host.raft.group_id)
        if not is_member and slot != CONTROL_GROUP:
            self.leave(ShardId(slot - 1), state.number)
            self._node.keep(asyncio.get_running_loop().create_task(self._settle(slot)))
            return
        raft_log = self._node.journal.group(group_id(slot, state.number))
        heir = state.members[0] if host.machine.position == state.position else ""
        begin_log_at(raft_log, int(host.machine.position), host.last_term, heir)  # unless another's checkpoint is older
        raft = self._raft(slot, state.number, state.members, host.machine, host.last_term)
        is_fresh, is_own = raft.last_position == state.position, host.begun == state
        host.reopen(raft)
        self._attach(host)
        if is_fresh and state.members[0] == self._node.name and not (is_own and raft.lead_first()):
            raft.campaign()
        self._node.keep(asyncio.get_running_loop().create_task(self._settle(slot)))
        self._node.placing.wake()

    async def _settle(self, slot: int) -> None:
        """Take a checkpoint of the new generation: who missed its beginning needs one, and older logs do not."""
        host = self.hosts.get(slot)
        number = 0 if host is None else host.generation  # by now: while it is written another may begin
        try:
            if slot == CONTROL_GROUP:
                await self._node.checkpoint_control()
            else:
                await self.upkeep[ShardId(slot - 1)].checkpoints.write()
                self._node.placing.wake()
        except OSError as error:
            self._node.note_store_error(error)
            return
        self._forget_before(slot, number)
        self._node.kick_journal()

    def _forget_before(self, slot: int, number: int) -> None:
        """Let go of the logs of older generations: a durable checkpoint covers them."""
        for group in self._node.journal.group_ids:
            if slot_of(group) == slot and generation_of(group) < number:
                self._node.journal.forget(group)

    def _not_open(self, group: int, peer: str, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        """Keep what is said in a generation that this replica may open in a moment, or must catch up with."""
        slot = slot_of(group)
        host = self.hosts.get(slot)
        if host is None or generation_of(group) <= host.generation:
            return
        newest, said = self._early.get(slot, (0, deque()))
        if group < newest:
            return
        if group > newest:
            said = deque(maxlen=EARLY_MAX)
            self._early[slot] = group, said
        said.append((peer, header, blobs))
        self.ahead[slot] = peer
        self._node.placing.wake()

    # learners and leavers

    async def follow(self, shard_id: ShardId, placed: Placement) -> None:
        """Begin to follow a shard's generation."""
        host = await self._open_shard(shard_id, (), placed)
        if host is not None:
            log.info("follows group=%s generation=%d of=%s", host.name, host.generation, ",".join(host.raft.peers))
            host.start()
            if self._upkeep_runs:
                self.upkeep[shard_id].start()

    def leave(self, shard_id: ShardId, generation: int) -> None:
        """Take no more part in a shard from a generation on.

        What is here stays until it is dropped: others may be fetching it, and until the control group has noted the
        generation this node, once it had forgotten the one before, would take itself for a blank member of that.
        """
        self.shards.pop(shard_id, None)
        self.left[shard_id] = generation
        host = self.hosts.pop(group_of(shard_id), None)
        if host is not None:
            host.stop()
            host.led.clear()
            self._detach(host.raft.group_id)
        self._node.placing.wake()

    async def drop(self, shard_id: ShardId) -> None:
        """Remove what is here of a shard that was left, unless somebody is fetching it just now."""
        node, slot, upkeep = self._node, group_of(shard_id), self.upkeep.get(shard_id)
        if upkeep is not None and upkeep.pins.is_copied:
            return
        if node.snapshots is not None:
            await node.snapshots.give_up(slot)
        self.snapshot_groups.pop(slot, None)
        if upkeep is not None:
            await upkeep.stop()
        await node.checkpoint_control()  # or the next start might take this node for a member still
        await node.readers_gone()
        if upkeep is None:
            await self._remove(shard_id)
        else:
            async with upkeep.pins.committing:
                upkeep.checkpoints.is_dropped = True
                await self._remove(shard_id)
            del self.upkeep[shard_id]
        self.left.pop(shard_id, None)

    async def _remove(self, shard_id: ShardId) -> None:
        node = self._node
        store, run = node.seams.store, node.seams.executor.run
        digests = await run(Lane.DISK, store.chunk_digests, shard_id)
        gone = [(shard_id, digest) for digest in digests]
        await run(Lane.DISK, drop_all_words, store, shard_id)  # once the manifest has gone nobody looks here again
        await run(Lane.DISK, store.commit, [], [manifest_key(shard_id), incoming_key(shard_id)], gone)
        for group in node.journal.group_ids:
            if slot_of(group) == group_of(shard_id):
                node.journal.forget(group)
        node.kick_journal()
        log.info("dropped shard=%d chunks=%d", shard_id, len(gone))

    # what the journal and the network say

    def durable(self, group: int) -> None:
        host = self._by_group.get(group)
        if host is not None:
            host.on_durable()

    def session(self, peer: str, up: bool) -> None:
        for host in self.hosts.values():
            host.session(peer, up)

    def stop(self) -> None:
        for host in self.hosts.values():
            host.stop()

    # parts

    def _take_snapshot(self, slot: int, behind: Behind) -> None:
        assert self._node.snapshots is not None, "a lone replica is never behind"
        self._node.snapshots.begin(slot, behind.position, behind.leader)

    def _provider(self, shard_id: ShardId) -> Callable[[Message], Awaitable[None]]:
        return lambda message: self.upkeep[shard_id].provision(message)

    def _waker(self, shard_id: ShardId) -> Callable[[], None]:
        return lambda: self.upkeep[shard_id].wake()


class _GroupTransport:
    """What one Raft group says to its peers, over the connections that all groups share."""

    def __init__(self, mesh: Mesh, group: int) -> None:
        self._mesh, self._group = mesh, group

    def send(self, peer: str, header: dict[str, Any], blobs: Sequence[Blob]) -> bool:
        return self._mesh.send_raft(self._group, peer, header, blobs)
