"""The broadcaster: changes of the catalogue that shards must see, carried through by whoever leads the control group.

A change is a task: begun in the catalogue, told to every shard concerned, ended in the catalogue (`cluster.ddl`). Once
begun it is carried through even if its caller goes away, or the leader: the next one goes on where the catalogue says
that it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from cluster.catalog import Catalog, Task
from cluster.control import CONTROL_GROUP, Control
from cluster.ddl import BeginDdl, EndDdl, messages
from cluster.machine import Rejected
from cluster.membership import FormCluster
from cluster.message import Message
from cluster.raft import NotLeader
from node.calls import Mesh
from node.clock import Clock
from node.group import GroupHost
from node.route import Dice, Router
from node.settings import Settings
from storage.errors import AnnulusError, OutcomeUnknown
from storage.types import Position, ShardId

log = logging.getLogger(__name__)

ROLE_RETRY_S: Final = 0.5
"""How long an interrupted change that cannot go on waits for its next attempt."""


class Surroundings(Protocol):
    """The part of the seams that a broadcaster needs."""

    @property
    def clock(self) -> Clock: ...
    @property
    def dice(self) -> Dice: ...


class Home(Protocol):
    """The part of a node that a broadcaster needs."""

    @property
    def settings(self) -> Settings: ...
    @property
    def seams(self) -> Surroundings: ...
    @property
    def mesh(self) -> Mesh | None: ...
    @property
    def control(self) -> GroupHost[Control]: ...
    @property
    def router(self) -> Router: ...
    def check_journal(self) -> None: ...
    def keep(self, task: asyncio.Task[None], /) -> None: ...


class Broadcaster:
    """One per node; it works while the node leads the control group."""

    def __init__(self, node: Home) -> None:
        self._node = node
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._role: asyncio.Task[None] | None = None
        """Runs while this node leads the control group."""
        self.settled = asyncio.Event()
        """Set when what predecessors in the role had left open is finished."""

    @property
    def _control(self) -> GroupHost[Control]:
        return self._node.control

    @property
    def _catalog(self) -> Catalog:
        return self._control.machine.catalog

    async def ddl(
        self,
        kind: str,
        database: str,
        collection: str,
        request: Mapping[str, Any],
        *,
        producer: str = "",
        sequence: int = 0,
    ) -> Position:
        """Carry a change through: begun in the catalogue, told to every shard, ended in the catalogue.

        Runs on the leader of the control group. Once begun it is carried through even if the caller goes away, or this
        node: repeating it under the same producer and sequence joins it. Returns the position of the control group at
        which it is done. Raises what `begin` refuses, and NoLeader if another node leads.
        """
        self._node.check_journal()
        # Held by whoever waits for it, so it is the same one for all who want to change this collection.
        lock = self._locks.setdefault((database, collection), asyncio.Lock())
        async with lock:
            if not self._control.is_leader:
                raise NotLeader(CONTROL_GROUP, self._control.leader)
            for task in self._catalog.open_tasks(database, collection):
                await self.finish(task)  # which another leader began
            begin = BeginDdl(kind, database, collection, request)
            outcome = await self._control.change(begin, producer=producer, sequence=sequence)
            facts: Any = outcome.get("task")
            if facts is not None and facts["task_id"] in self._catalog.tasks:
                finishing = asyncio.get_running_loop().create_task(self.finish(Task(**facts)))
                self._node.keep(finishing)
                finishing.add_done_callback(self._note_finished)
                await asyncio.shield(finishing)
        return self._control.machine.position

    def lead(self, leads: bool) -> None:
        """Begin with the role, anew if it was held already, or give it up."""
        if self._role is not None:
            self._role.cancel()
            self._role = None
        self.settled.clear()
        if leads:
            self._role = asyncio.get_running_loop().create_task(self._coordinate())

    async def finish(self, task: Task) -> None:
        """Tell the shards, then end the task; nothing is done for one that has ended."""
        if task.task_id not in self._catalog.tasks:
            return  # somebody else has finished it, and its collection may be gone
        told = messages(self._catalog, task)
        await asyncio.gather(*(self.tell(shard_id, message, task) for shard_id, message in told))
        await self._control.change(EndDdl(task.task_id))

    async def tell(self, shard_id: ShardId, message: Message, task: Task) -> None:
        """Return when a shard has applied the task's message, however often it is told."""
        deadline_s = self._node.seams.clock.monotonic_s() + self._node.settings.api.request_timeout_s
        written = await self._node.router.propose(
            shard_id, message, producer=f"task/{task.task_id}", sequence=shard_id, deadline_s=deadline_s
        )
        # A shard that has forgotten its answer was told, and is not told twice.
        if isinstance(written.outcome, Rejected) and written.outcome.code != OutcomeUnknown.code:
            raise written.outcome.error()

    def _note_finished(self, finishing: asyncio.Task[None]) -> None:
        """See to it that a change goes on which a shard could not be told; whoever asked for it may have gone."""
        if finishing.cancelled() or finishing.exception() is None:
            return
        if self._control.is_leader and (self._role is None or self._role.done()):
            self.lead(True)  # else the next leader goes on

    async def _coordinate(self) -> None:
        if self._node.mesh is not None and not self._control.machine.cluster_id:
            node = self._node.settings.node
            peers = {peer.name: str(peer.address) for peer in sorted(node.peers, key=lambda peer: peer.name)}
            await self._control.change(FormCluster(f"{self._node.seams.dice.getrandbits(64):016x}", peers, node.copies))
        while self._catalog.tasks:
            for task in list(self._catalog.tasks.values()):
                log.info("finishing an interrupted change task=%d kind=%s", task.task_id, task.kind)
                try:
                    await self.finish(task)
                except AnnulusError as error:
                    log.warning("an interrupted change waits task=%d kind=%s: %s", task.task_id, task.kind, error)
                    await asyncio.sleep(ROLE_RETRY_S)
        self.settled.set()
