"""Replicas compare themselves with each other, and what is not what it should be is made good from the others.

Two things are compared. Chunks: every node reads its own again and takes a damaged one from a peer (`scrub.py`).
States: the leader of a group puts a `CompareState` into its log, and every replica takes a digest of its state
(`cluster/digest.py`) when it applies that entry, so at one position, however far apart they are in time. The picture is
taken on the loop in time proportional to the segments; the digest is made by a worker while the log goes on.

    healing/digest    the digest of a group's state at a position, once it is there
    healing/compare   have the group compared now; only its leader does that
    healing/rebuild   this replica's state is not what the others have: it is replaced

Who is wrong. What more than half of a group's replicas have is right. Two replicas that differ have no majority: then
the leader's is taken, by which writes were answered, but only if all its chunks can be read; and this is said loudly.
In any other case nothing is changed, and the next round asks again.

How it is made right. The replica applies nothing more and answers no reads from that moment on, and takes the newest
checkpoint of one that is right, like one that lags too far (`snapshot.py`); it keeps the chunks that it has, for equal
names are equal bytes. A mark on its disk makes it go on after a crash. A leader that is wrong hands over first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import cbor2

from cluster.checkpoint import FrozenShard, freeze
from cluster.control import Control, FrozenControl
from cluster.digest import state_digest
from cluster.machine import StateMachine
from cluster.message import CompareState
from cluster.shard import Shard
from node.chunk_transfer import Calls
from node.clock import Clock
from node.group import GroupHost
from node.metrics import Metrics
from node.scrub import Scrub, Scrubber
from node.settings import HealingSettings
from node.snapshot import Snapshots
from node.workers import Executor, Lane
from storage.chunks import ChunkStore
from storage.errors import AnnulusError, InvalidParameter, NoLeader, Unavailable
from storage.keys import record_key
from storage.types import Position, ShardId

log = logging.getLogger(__name__)

DIGEST: Final = "healing/digest"
COMPARE: Final = "healing/compare"
REBUILD: Final = "healing/rebuild"
DIGEST_S: Final = 30.0
"""How long a leader waits for a replica that lags behind the entry, or is slow to read its rows."""
REBUILD_S: Final = 600.0
HAND_OVER_S: Final = 2.0
LOOK_S: Final = 0.1
KEPT: Final = 4
"""Digests of a group that are remembered."""
FIRST_S_MAX: Final = 600.0
"""After the start of a node its first round comes no later than this, though rounds may be a day apart."""


class Verdict(StrEnum):
    """What comparing a group's replicas has shown."""

    EQUAL = "equal"
    """All that answered are equal."""
    DIVERGED = "diverged"
    """Some are not what most are."""
    TIED = "tied"
    """Two replicas differ, and there is no third."""
    UNDECIDED = "undecided"
    """They differ, and nobody can tell who is right."""
    ALONE = "alone"
    """There is nothing to compare with."""


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    right: tuple[str, ...]
    """Those whose state is to be kept, the leader first if it is one of them."""
    wrong: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    """Those that gave no digest."""


def judge(digests: Mapping[str, bytes | None], leader: str) -> Judgement:
    """Return who is right. `digests` has all replicas of the group; None for one that gave none."""
    known = {name: digest for name, digest in digests.items() if digest is not None}
    silent = tuple(sorted(digests.keys() - known.keys()))
    names = sorted(known, key=lambda name: (name != leader, name))
    if len(digests) < 2:
        return Judgement(Verdict.ALONE, tuple(names), silent=silent)
    if len(set(known.values())) <= 1:
        return Judgement(Verdict.EQUAL, tuple(names), silent=silent)
    commonest, count = Counter(known[name] for name in names).most_common(1)[0]
    if 2 * count > len(digests):
        right = tuple(name for name in names if known[name] == commonest)
        return Judgement(Verdict.DIVERGED, right, tuple(name for name in names if name not in right), silent)
    if len(digests) == 2 and leader in known:
        return Judgement(Verdict.TIED, (leader,), tuple(name for name in names if name != leader), silent)
    return Judgement(Verdict.UNDECIDED, (), tuple(names), silent)


def mark_key(group_id: int) -> bytes:
    """Return the key of the record that says that this node's replica of the group is wrong, and who is right."""
    return record_key("diverged", group_id)


class Healing:
    """The healing of one node's replicas. Belongs to the loop.

    Invariants
      1. A replica that was found wrong answers no read until its state is another's, also after a crash.
      2. No state is replaced unless more than half of the replicas, or the leader of two, have another.
    """

    def __init__(
        self,
        me: str,
        mesh: Calls | None,
        store: ChunkStore,
        executor: Executor,
        clock: Clock,
        settings: HealingSettings,
        metrics: Metrics,
        *,
        groups: Callable[[], Mapping[int, GroupHost[Any]]],
        scrubber: Scrubber,
        snapshots: Snapshots | None,
        on_store_error: Callable[[OSError], None],
    ) -> None:
        """Answer calls of other nodes from now on; `groups` are those that run here now, by id."""
        self._me = me
        self._mesh = mesh
        self._store = store
        self._executor = executor
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._groups = groups
        self.scrubber = scrubber
        self._snapshots = snapshots
        self._on_store_error = on_store_error
        self._digests: dict[int, OrderedDict[Position, asyncio.Task[bytes]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.rebuilding: dict[int, asyncio.Task[None]] = {}
        self.scrub = Scrub()
        """The reading of chunks that goes on in the background, or the last one."""
        self.compared: dict[int, dict[str, Any]] = {}
        """Of each group that was compared here while this node led it, what came out last."""
        self._stopped = False
        if mesh is not None:
            mesh.serve(DIGEST, self._serve_digest)
            mesh.serve(COMPARE, self._serve_compare)
            mesh.serve(REBUILD, self._serve_rebuild)

    async def start(self) -> None:
        """Go on with what a crash interrupted, then heal in the background."""
        for group_id in sorted(self._groups()):
            raw = await self._executor.run(Lane.DISK, self._store.read, mark_key(group_id))
            if raw is not None:
                self._begin_rebuild(group_id, list(cbor2.loads(raw)))
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._forever(self._settings.scrub_interval_s, self._scrub_all)))
        if self._mesh is not None:
            self._tasks.append(loop.create_task(self._forever(self._settings.compare_interval_s, self._compare_led)))

    async def stop(self) -> None:
        """Return when nothing of this runs any more; the next start goes on with what was not finished."""
        self._stopped = True
        tasks = [*self._tasks, *self.rebuilding.values(), *(t for ts in self._digests.values() for t in ts.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _forever(self, interval_s: float, work: Callable[[], Any]) -> None:
        delay_s = min(interval_s, FIRST_S_MAX)
        while True:
            await asyncio.sleep(delay_s)
            delay_s = interval_s
            try:
                await work()
            except OSError as error:
                self._on_store_error(error)
            except AnnulusError as error:
                log.warning("healing waits for its next round: %s", error)
            except Exception:
                log.exception("healing fails; it goes on with its next round")

    async def _scrub_all(self) -> None:
        self.scrub = Scrub()
        rate = self._settings.scrub_bytes_per_s_max
        await self.scrubber.run(self.scrub, bytes_per_s=rate, again=lambda: not self._stopped)
        if self.scrub.damaged:
            log.warning("chunks were damaged: %d, made good: %d", self.scrub.damaged, self.scrub.cured)

    async def _compare_led(self) -> None:
        for group_id, host in sorted(self._groups().items()):
            if host.is_leader:
                try:
                    await self.compare(group_id)
                except NoLeader:
                    continue  # its new leader compares it

    # taking digests

    def note(self, group_id: int, position: Position) -> None:
        """A `CompareState` was applied at this position: take the digest of the state as it is now."""
        host = self._groups().get(group_id)
        if host is None:
            return  # its replica is about to go
        kept = self._digests.setdefault(group_id, OrderedDict())
        kept[position] = asyncio.get_running_loop().create_task(self._digest_of(_frozen(host.machine)))
        while len(kept) > KEPT:
            kept.popitem(last=False)[1].cancel()

    async def _digest_of(self, frozen: FrozenShard | FrozenControl) -> bytes:
        return await self._executor.run(Lane.DISK, state_digest, frozen)

    async def _serve_digest(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        group_id, host = self._known(arguments)
        position = arguments.get("position")
        if type(position) is not int:
            raise InvalidParameter(f"{DIGEST} wants a position")
        await host.wait_applied(Position(position))
        task = self._digests.get(group_id, OrderedDict()).get(Position(position))
        if task is None:
            raise Unavailable(f"node {self._me} was not there when {host.name} was at {position}")
        return {"digest": await asyncio.shield(task)}, ()

    # comparing

    async def compare(self, group_id: int) -> dict[str, Any]:
        """Compare the replicas of a group that this node leads, and have those replaced that are wrong.

        Returns when they are. Raises NoLeader if another node leads.
        """
        host = self._groups()[group_id]
        judgement, position = await self._judged(group_id, host)
        rebuilt: list[str] = []
        verdict = judgement.verdict
        if verdict is Verdict.TIED and not await self._is_whole(group_id):
            verdict = Verdict.UNDECIDED
        if verdict in (Verdict.DIVERGED, Verdict.TIED):
            log.error(
                "replicas differ group=%s position=%d verdict=%s right=%s wrong=%s silent=%s",
                host.name, position, verdict, *map(",".join, (judgement.right, judgement.wrong, judgement.silent)),
            )  # fmt: skip
            for name in judgement.wrong:
                self._metrics.replica_diverged()
                if await self._have_rebuilt(group_id, name, judgement.right):
                    rebuilt.append(name)
        elif verdict is Verdict.UNDECIDED:
            log.error(
                "replicas differ, and nobody can tell which is right group=%s position=%d replicas=%s: nothing is "
                "changed", host.name, position, ",".join(judgement.wrong),
            )  # fmt: skip
            self._metrics.replica_diverged()
        self._metrics.state_compared(verdict.value)
        self.compared[group_id] = found = {
            "verdict": verdict.value,
            "position": position,
            "at_ms": self._clock.wall_ms(),
            "right": list(judgement.right),
            "wrong": list(judgement.wrong),
            "silent": list(judgement.silent),
            "rebuilt": rebuilt,
        }
        return found

    async def _judged(self, group_id: int, host: GroupHost[Any]) -> tuple[Judgement, Position]:
        position = (await host.propose(CompareState())).position
        names = [self._me, *host.raft.peers]
        answers = await asyncio.gather(*(self._ask_digest(name, group_id, position) for name in names))
        return judge(dict(zip(names, answers, strict=True)), self._me), position

    async def _ask_digest(self, name: str, group_id: int, position: Position) -> bytes | None:
        assert self._mesh is not None, "a lone replica is compared with nobody"
        try:
            answer, _ = await self._mesh.call(
                name, DIGEST, {"group": group_id, "position": position}, timeout_s=DIGEST_S
            )
        except AnnulusError as error:
            log.info("no digest group=%d peer=%s position=%d: %s", group_id, name, position, error)
            return None
        digest = answer.get("digest")
        return digest if isinstance(digest, bytes) else None

    async def _is_whole(self, group_id: int) -> bool:
        """Return whether every chunk of this group's state here can be read, or could be made good."""
        scrub = Scrub()
        shards = [] if group_id == 0 else [ShardId(group_id - 1)]
        rate = self._settings.check_bytes_per_s_max
        await self.scrubber.run(scrub, bytes_per_s=rate, shards=shards, again=lambda: not self._stopped)
        return scrub.ended_ms > 0 and not scrub.left

    async def _have_rebuilt(self, group_id: int, name: str, right: Sequence[str]) -> bool:
        assert self._mesh is not None
        try:
            arguments = {"group": group_id, "right": list(right)}
            answer, _ = await self._mesh.call(name, REBUILD, arguments, timeout_s=REBUILD_S)
        except AnnulusError as error:
            log.warning("replica not rebuilt yet group=%d peer=%s: %s", group_id, name, error)
            return False
        return bool(answer.get("rebuilt"))

    async def _serve_compare(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        group_id, host = self._known(arguments)
        if not host.is_leader:
            raise NoLeader(f"node {self._me} does not lead {host.name}")
        return await self.compare(group_id), ()

    # rebuilding

    async def _serve_rebuild(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        group_id, _ = self._known(arguments)
        right = arguments.get("right")
        if not (isinstance(right, list) and right and all(isinstance(one, str) for one in right)) or self._me in right:
            raise InvalidParameter(f"{REBUILD} wants the names of those that are right")
        await asyncio.shield(self._begin_rebuild(group_id, right))
        return {"rebuilt": True}, ()

    def _begin_rebuild(self, group_id: int, right: Sequence[str]) -> asyncio.Task[None]:
        task = self.rebuilding.get(group_id)
        if task is None:
            task = self.rebuilding[group_id] = asyncio.get_running_loop().create_task(self._rebuild(group_id, right))
            task.add_done_callback(lambda done: self._rebuilt(group_id, done))
        return task

    def _rebuilt(self, group_id: int, task: asyncio.Task[None]) -> None:
        del self.rebuilding[group_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, OSError):
                self._on_store_error(error)
            log.error("replica not rebuilt group=%d: %r", group_id, error)

    async def _rebuild(self, group_id: int, right: Sequence[str]) -> None:
        """Replace this replica's state by that of one that is right."""
        assert self._snapshots is not None, "a lone replica is compared with nobody"
        host = self._groups()[group_id]
        right = [one for one in right if one in host.raft.peers] or list(host.raft.peers)  # members may have changed
        if not right:
            await self._executor.run(Lane.DISK, self._store.commit, [], [mark_key(group_id)])
            return
        host.suspend()
        log.error(
            "this replica differs from the others, it is rebuilt group=%s position=%d right=%s",
            host.name, host.machine.position, ",".join(right),
        )  # fmt: skip
        await self._executor.run(Lane.DISK, self._store.commit, [(mark_key(group_id), cbor2.dumps(list(right)))])
        giving_up = asyncio.get_running_loop().create_task(self._lead_no_more(host))
        try:
            await self._snapshots.rebuild(group_id, right)
        finally:
            giving_up.cancel()
        await self._executor.run(Lane.DISK, self._store.commit, [], [mark_key(group_id)])
        self._metrics.replica_rebuilt()
        log.warning("replica rebuilt group=%s position=%d", host.name, host.machine.position)

    async def _lead_no_more(self, host: GroupHost[Any]) -> None:
        """Have others lead while this replica applies nothing; it may be elected again and again."""
        while True:
            if host.raft.leads and host.raft.transfer():
                host.poke()
                await asyncio.sleep(HAND_OVER_S)
            await asyncio.sleep(LOOK_S)

    # facts

    def _known(self, arguments: Mapping[str, Any]) -> tuple[int, GroupHost[Any]]:
        group_id = arguments.get("group")
        host = self._groups().get(group_id) if type(group_id) is int else None
        if host is None:
            raise InvalidParameter(f"node {self._me} does not hold group {group_id!r}")
        assert type(group_id) is int
        return group_id, host

    def view(self) -> dict[str, Any]:
        """Return what there is to show of this node's healing."""
        names = {group_id: host.name for group_id, host in self._groups().items()}
        compared = {names[group_id]: one for group_id, one in self.compared.items() if group_id in names}
        rebuilding = [names[group_id] for group_id in sorted(self.rebuilding) if group_id in names]
        return {"scrub": self.scrub.to_plain(), "compared": compared, "rebuilding": rebuilding}


def _frozen(machine: StateMachine) -> FrozenShard | FrozenControl:
    if isinstance(machine, Control):
        return machine.freeze()
    assert isinstance(machine, Shard)
    return freeze(machine)
