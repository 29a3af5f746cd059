"""The broadcaster: changes of the catalogue, in order and to the end, by whoever leads the control group.

A change that shards must see is a task (`cluster.ddl`). It goes through these steps, each of which a crash may be the
last of:

    1 holds       what it needs is held (`cluster.resources`); others wait here for their turn
    2 opened      checked, and noted in the control group: from here on it is carried through, whoever dies
    3 tells       a shard is about to be told; all are told at once
    4 told        a shard has applied its message
    5 tells all   all shards have
    6 closed      the control group has changed the catalogue and forgotten the task, in one command
    7 let go      what was held is free again, the caller is about to be answered

Shards know the repeat of a message, and one that is applied again all the same changes nothing. So a new leader tells
every shard of which it is not noted that it was told; that is noted early only if others keep the task open. The open
tasks hold what they need in the control group's state: no conflicting change can be noted before they are closed, nor
does a new leader take one on that would have to be refused. Changes of the catalogue alone are one command and no task,
but wait for their turn all the same.

It also sees to it that the shards do the compactions that clients asked for (`cluster.jobs`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from cluster.catalog import Catalog, Task, holds_of
from cluster.control import CONTROL_GROUP, Control
from cluster.ddl import AckDdl, BeginDdl, messages
from cluster.idempotency import KeyedStep
from cluster.jobs import CompactedShard, Job
from cluster.machine import Rejected
from cluster.membership import FormCluster
from cluster.message import Message
from cluster.parse import check_values
from cluster.raft import NotLeader
from cluster.resources import Holds
from node.calls import Mesh
from node.clock import Clock
from node.group import GroupHost
from node.key_locks import KeyLocks
from node.metrics import Metrics
from node.route import Dice, Router
from node.settings import Settings
from storage.errors import AnnulusError, NoLeader, OutcomeUnknown, error_from
from storage.types import Position, ShardId

T = TypeVar("T")

log = logging.getLogger(__name__)

TURN_S: Final = 10.0
"""How long a change waits for others that hold what it needs."""
RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 5.0
"""Between attempts at what a task or a job cannot go on without."""
ACK_S: Final = 0.5
"""How long shards that are done wait for the others until it is noted that they are."""
COMPACT_METHOD: Final = "shard/compact"
COMPACT_S_MAX: Final = 3_600.0


class Step(StrEnum):
    """How far a change is; see above."""

    HOLDS = "1 holds"
    OPENED = "2 opened"
    TELLS = "3 tells"
    TOLD = "4 told"
    TELLS_ALL = "5 tells all"
    CLOSED = "6 closed"
    LETS_GO = "7 lets go"


class Carried(NamedTuple):
    """A change that was made: what it answered, and the position at which the catalogue has it."""

    outcome: Mapping[str, Any]
    position: Position


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
    def metrics(self) -> Metrics: ...
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
        self._locks = KeyLocks()
        self._work: dict[asyncio.Task[Any], None] = {}
        """All that this node does in the role, in the order in which it began."""
        self._troubles: dict[int, str] = {}
        """Task -> why a shard could not be told yet."""
        self.on_step: Callable[[Step], None] = lambda step: None
        """Called at each step of each change: the simulation lets nodes die there."""
        self.settled = asyncio.Event()
        """Set when what predecessors in the role had left open is finished."""

    @property
    def _control(self) -> GroupHost[Control]:
        return self._node.control

    @property
    def _catalog(self) -> Catalog:
        return self._control.machine.catalog

    async def carry_out(self, message: Message, *, producer: str = "", sequence: int = 0) -> Carried:
        """Make a change of the catalogue, be it a task or one command.

        Runs on the leader of the control group. Once begun it is carried through even if the caller goes away, or this
        node: repeating it under the same producer and sequence joins it. Raises what it is refused for; Busy if it did
        not get its turn, and NotLeader, having changed nothing; OutcomeUnknown if it goes on after the caller's time,
        or at another leader.
        """
        self._node.check_journal()
        if not self._control.is_leader:
            raise NotLeader(CONTROL_GROUP, self._control.leader)
        check_values(message, message.kind)
        wanted, locks = _holds(message), self._locks
        await locks.acquire(wanted, within_s=TURN_S)
        carrying = self._start(self._carry_out(message, producer, sequence, locks, wanted))
        await asyncio.wait({carrying}, timeout=self._node.settings.api.request_timeout_s)
        if carrying.cancelled():
            raise OutcomeUnknown("the control group has another leader, which goes on with what was begun")
        if not carrying.done():
            why = "; ".join(dict.fromkeys(self._troubles.values())) or "it is slow"
            raise OutcomeUnknown(f"the change goes on, but takes long: {why}")
        return carrying.result()

    def view(self) -> list[dict[str, Any]]:
        """Return the changes that are under way, which shards are known to be told, and what others wait for.

        The last is known only here where this node leads the control group.
        """
        return [
            {
                "task": task.task_id,
                "kind": task.kind,
                "database": task.facts["database"],
                "collection": task.facts["name"],
                "told": sorted(task.acked),
                "trouble": self._troubles.get(task.task_id, ""),
            }
            for task in self._catalog.tasks.values()
        ]

    def lead(self, leads: bool) -> None:
        """Begin with the role, anew if it was held already, or give it up."""
        self._locks.close(NotLeader(CONTROL_GROUP, None))
        for one in self._work:
            one.cancel()
        self._troubles.clear()
        self.settled.clear()
        if leads:
            self._locks, opened = KeyLocks(), list(self._catalog.tasks.values())
            for task in opened:  # before anybody else can ask
                self._locks.take(task.holds)
            for job in self._control.machine.jobs.open:
                self._start(self._compact(job))
            self._start(self._resume(opened, self._locks))

    async def finish(self, task: Task) -> None:
        """Tell the shards that are not known to be told, then close the task; nothing is done for one that is over."""
        if task.task_id not in self._catalog.tasks:
            return
        told = [one for one in messages(self._catalog, task) if one[0] not in task.acked]
        telling = {asyncio.ensure_future(self._tell_to_the_end(*one, task)): one[0] for one in told}
        try:
            while telling:
                done, _ = await asyncio.wait(telling, timeout=ACK_S)
                acked = [telling.pop(one) for one in done if one.result() is None]
                if not telling:
                    self.on_step(Step.TELLS_ALL)
                if acked:
                    await self._note(AckDdl(task.task_id, sorted(acked)))
            self._node.metrics.change_made(task.kind)
            self.on_step(Step.CLOSED)
        finally:
            self._troubles.pop(task.task_id, None)
            for one in telling:
                one.cancel()

    async def tell(self, shard_id: ShardId, message: Message, task: Task) -> None:
        """Return when a shard has applied the task's message, however often it is told. Raises why it has not."""
        deadline_s = self._node.seams.clock.monotonic_s() + self._node.settings.api.request_timeout_s
        written = await self._node.router.propose(
            shard_id, message, producer=f"task/{task.task_id}", sequence=shard_id, deadline_s=deadline_s
        )
        # A shard that has forgotten its answer was told, and is not told twice.
        if isinstance(written.outcome, Rejected) and written.outcome.code != OutcomeUnknown.code:
            raise written.outcome.error()

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something in the role, whoever asked for it; it ends with the role."""
        task = asyncio.get_running_loop().create_task(work)
        self._work[task] = None
        task.add_done_callback(self._work.pop)
        task.add_done_callback(_log_fault)
        self._node.keep(task)  # type: ignore[arg-type]
        return task

    async def _carry_out(
        self, message: Message, producer: str, sequence: int, locks: KeyLocks, wanted: Holds
    ) -> Carried:
        try:
            self.on_step(Step.HOLDS)
            outcome: Mapping[str, Any] = await self._control.change(message, producer=producer, sequence=sequence)
            if isinstance(message, KeyedStep):
                if "refused" in outcome:
                    raise error_from(*outcome["refused"])
                outcome = outcome["outcome"]
            if (task := self._catalog.tasks.get(outcome.get("task", 0))) is not None:
                self.on_step(Step.OPENED)
                await self.finish(task)
            if (job := self._control.machine.jobs.known.get(outcome.get("job", 0))) is not None:
                self._start(self._compact(job))
        finally:
            locks.release(wanted)
        self.on_step(Step.LETS_GO)
        return Carried(outcome, Position(self._control.machine.position))

    async def _resume(self, opened: Sequence[Task], locks: KeyLocks) -> None:
        """Go on with what predecessors have left open."""
        if self._node.mesh is not None and not self._control.machine.cluster_id:
            node = self._node.settings.node
            peers = {peer.name: str(peer.address) for peer in sorted(node.peers, key=lambda peer: peer.name)}
            await self._control.change(FormCluster(f"{self._node.seams.dice.getrandbits(64):016x}", peers, node.copies))
        await asyncio.gather(*(self._finish_open(task, locks) for task in opened))
        self.settled.set()

    async def _finish_open(self, task: Task, locks: KeyLocks) -> None:
        log.info("finishing an interrupted change task=%d kind=%s", task.task_id, task.kind)
        await self.finish(task)
        locks.release(task.holds)

    async def _tell_to_the_end(self, shard_id: ShardId, message: Message, task: Task) -> None:
        self.on_step(Step.TELLS)
        retry_s = RETRY_S_MIN
        while True:
            try:
                await self.tell(shard_id, message, task)
            except AnnulusError as error:
                level = logging.WARNING if error.retriable else logging.ERROR
                log.log(
                    level, "a shard is not told task=%d kind=%s shard=%d: %s", task.task_id, task.kind, shard_id, error
                )
                self._node.metrics.telling_failed(error.code)
                self._troubles[task.task_id] = str(error)
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_S_MAX, 2 * retry_s)
            else:
                break
        self.on_step(Step.TOLD)

    async def _note(self, message: Message) -> None:
        """Have the control group note what is so; ends with the role if it cannot."""
        while True:
            try:
                await self._control.change(message)
            except NoLeader:
                await asyncio.sleep(RETRY_S_MIN)  # or until somebody else leads
            else:
                return

    async def _compact(self, job: Job) -> None:
        until_s = self._node.seams.clock.monotonic_s() + COMPACT_S_MAX
        for shard_id in job.left:
            asked = {"collection": job.collection_id}
            while True:
                try:
                    await self._node.router.ask_leader(COMPACT_METHOD, shard_id, asked, deadline_s=until_s)
                except AnnulusError as error:
                    if error.retriable and self._node.seams.clock.monotonic_s() + RETRY_S_MAX < until_s:
                        await asyncio.sleep(RETRY_S_MAX)
                        continue
                    log.warning("compaction ends early job=%d shard=%d: %s", job.job_id, shard_id, error)
                break
            await self._note(CompactedShard(job.job_id, shard_id))


def _holds(message: Message) -> Holds:
    match message:
        case KeyedStep():
            return _holds(message.message)
        case BeginDdl():
            return message.holds
    return holds_of(message)


def _log_fault(done: asyncio.Task[Any]) -> None:
    """Say what went wrong that is no answer to a client, who may have gone."""
    error = None if done.cancelled() else done.exception()
    if error is not None and not isinstance(error, AnnulusError):
        log.error("the broadcaster fails: %r", error, exc_info=error)
