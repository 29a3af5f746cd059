"""A full round of healing now, of all nodes and all groups, for whoever asks: `annulus check --cluster`.

    check/scrub    read all chunks of this node now, at the pace of somebody who waits; answers at once
    check/seen     how far that is

The node that was asked has every node read its chunks and every group's leader compare its replicas, side by side, and
tells how far all of it is. What is found is made good on the way (`healing.py`, `scrub.py`); a group whose replicas
differed is compared again after that. A round that runs is joined by whoever asks for another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from cluster.control import CONTROL_GROUP
from node.chunk_transfer import Calls
from node.clock import Clock
from node.healing import COMPARE, Healing, Verdict
from node.scrub import Scrub, Scrubber
from node.snapshot import Snapshots
from storage.errors import AnnulusError, InvalidParameter, PeerUnreachable

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

SCRUB: Final = "check/scrub"
SEEN: Final = "check/seen"
CALL_S: Final = 5.0
LOOK_S: Final = 0.25
SILENT_S_MAX: Final = 10.0
"""After which a node that does not answer is told as such."""
LEADERLESS_S_MAX: Final = 15.0
COMPARE_S_MAX: Final = 900.0
"""Longer than any replica takes that is rebuilt meanwhile."""
ROUNDS_KEPT: Final = 4


class Finding(StrEnum):
    """What a round comes to; the worst of its parts."""

    RUNNING = "running"
    CLEAN = "clean"
    HEALED = "healed"
    """Something was damaged or different, and no longer is."""
    DAMAGED = "damaged"
    """Something still is, or nobody knows."""
    INCOMPLETE = "incomplete"
    """Nothing wrong was found, but a node or a replica did not answer."""


class ClusterCheck:
    """Rounds that were asked for at this node, and its part of those of others. Belongs to the loop."""

    def __init__(
        self,
        me: str,
        mesh: Calls | None,
        clock: Clock,
        healing: Healing,
        *,
        bytes_per_s: int,
        members: Callable[[], Sequence[str]],
        replicas: Callable[[], Mapping[int, Sequence[str]]],
    ) -> None:
        """members, replicas  names of all nodes; of those that hold each group"""
        self._me = me
        self._mesh = mesh
        self._clock = clock
        self._healing = healing
        self._bytes_per_s = bytes_per_s
        self._members = members
        self._replicas = replicas
        self._scrubs: OrderedDict[str, Scrub] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None
        self._rounds = 0
        self._round: dict[str, Any] = {}
        if mesh is not None:
            mesh.serve(SCRUB, self._serve_scrub)
            mesh.serve(SEEN, self._serve_seen)

    def begin(self) -> dict[str, Any]:
        """Begin a round, unless one runs; return how far it is."""
        if self._running is None:
            self._rounds += 1
            self._round = {
                "round": f"{self._me}-{self._clock.wall_ms():x}-{self._rounds}",
                "finding": Finding.RUNNING.value,
                "nodes": {name: {"state": "waiting"} for name in self._members()},
                "groups": {_name(group_id): {"state": "waiting"} for group_id in sorted(self._replicas())},
            }
            self._running = self._keep(self._run(self._round))
        return self._round

    def view(self) -> dict[str, Any]:
        """Return how far the round is that runs, or what the last one found; empty if there was none."""
        return self._round

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _keep(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, found: dict[str, Any]) -> None:
        log.info("round of healing begun round=%s", found["round"])
        try:
            await asyncio.gather(
                *(self._scrub_on(name, found["round"], node) for name, node in found["nodes"].items()),
                *(
                    self._compare(group_id, names, found["groups"][_name(group_id)])
                    for group_id, names in sorted(self._replicas().items())
                    if _name(group_id) in found["groups"]
                ),
            )
            found["finding"] = finding_of(found).value
        except Exception as error:
            log.exception("round of healing fails round=%s", found["round"])
            found["finding"], found["why"] = Finding.INCOMPLETE.value, repr(error)
        finally:
            self._running = None
        log.info("round of healing ended round=%s finding=%s", found["round"], found["finding"])

    # chunks

    async def _scrub_on(self, name: str, round_id: str, node: dict[str, Any]) -> None:
        """Have a node read its chunks; note in `node` how far it is."""
        silent_since_s: float | None = None
        begun = False
        while True:
            try:
                method = SEEN if begun else SCRUB
                answer = await self._call(name, method, {"round": round_id}, CALL_S)
                begun, silent_since_s = True, None
                node.clear()
                node.update(answer, state="read" if answer["ended_ms"] else "reading")
                if answer["ended_ms"]:
                    return
            except InvalidParameter:  # it was started anew meanwhile, and knows nothing of it
                begun = False
            except AnnulusError as error:
                now_s = self._clock.monotonic_s()
                silent_since_s = now_s if silent_since_s is None else silent_since_s
                node.update(state="silent", why=error.message)
                if now_s - silent_since_s > SILENT_S_MAX:
                    return
            await asyncio.sleep(LOOK_S)

    async def _serve_scrub(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        round_id = _round_id(arguments)
        if round_id not in self._scrubs:
            self._scrubs[round_id] = scrub = Scrub()
            while len(self._scrubs) > ROUNDS_KEPT:
                self._scrubs.popitem(last=False)
            self._keep(self._scrub(scrub))
        return self._scrubs[round_id].to_plain(), ()

    async def _scrub(self, scrub: Scrub) -> None:
        try:
            await self._healing.scrubber.run(scrub, bytes_per_s=self._bytes_per_s, again=lambda: True)
            self._healing.scrub = scrub if self._healing.scrub.ended_ms else self._healing.scrub
        except (AnnulusError, OSError) as error:
            log.warning("chunks not read to their end: %s", error)
            scrub.damaged += 1
            scrub.lost.append(str(error))
            scrub.ended_ms = self._clock.wall_ms()

    async def _serve_seen(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        scrub = self._scrubs.get(_round_id(arguments))
        if scrub is None:
            raise InvalidParameter("this node knows no such round")
        return scrub.to_plain(), ()

    # states

    async def _compare(self, group_id: int, names: Sequence[str], group: dict[str, Any]) -> None:
        """Have a group's replicas compared, once more if some had to be replaced; note the outcome in `group`."""
        first = await self._compared(group_id, names)
        if first is None:
            group.update(state="no leader", verdict=Verdict.UNDECIDED.value, wrong=[], silent=sorted(names), rebuilt=[])
            return
        group.update(first, state="compared")
        if first["rebuilt"]:
            group["state"] = "comparing again"
            again = await self._compared(group_id, names)
            group.update(state="compared", again=None if again is None else again["verdict"])

    async def _compared(self, group_id: int, names: Sequence[str]) -> dict[str, Any] | None:
        """Return what the group's leader found; None if there is no leader for long."""
        if len(names) < 2:
            return {"verdict": Verdict.ALONE.value, "wrong": [], "silent": [], "rebuilt": [], "position": 0}
        until_s = self._clock.monotonic_s() + LEADERLESS_S_MAX
        while self._clock.monotonic_s() < until_s:
            for name in names:
                try:
                    return await self._call(name, COMPARE, {"group": group_id}, COMPARE_S_MAX)
                except AnnulusError as error:
                    log.debug("not compared group=%d peer=%s: %s", group_id, name, error)
            await asyncio.sleep(LOOK_S)
        return None

    async def _call(self, name: str, method: str, arguments: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._mesh is None:
            if name != self._me:
                raise PeerUnreachable(f"there is no node {name}")
            serve = {SCRUB: self._serve_scrub, SEEN: self._serve_seen}[method]
            return (await serve(name, arguments, ()))[0]
        return (await self._mesh.call(name, method, arguments, timeout_s=timeout_s))[0]


def healing_of(node: Node, snapshots: Snapshots | None) -> tuple[Healing, ClusterCheck]:
    """Return what heals a node's replicas, and what does so when somebody asks for it."""
    seams, settings = node.seams, node.settings.healing
    healing = Healing(
        node.name,
        node.mesh,
        seams.store,
        seams.executor,
        seams.clock,
        settings,
        node.metrics,
        groups=lambda: node.groups,
        scrubber=Scrubber(seams.store, seams.executor, seams.clock, node.metrics, node.upkeep, node.transfer),
        snapshots=snapshots,
        on_store_error=node.note_store_error,
    )
    check = ClusterCheck(
        node.name,
        node.mesh,
        seams.clock,
        healing,
        bytes_per_s=settings.check_bytes_per_s_max,
        members=lambda: node.members,
        replicas=lambda: node.replicas_by_group,
    )
    return healing, check


def finding_of(found: Mapping[str, Any]) -> Finding:
    """Return what the parts of a round that has ended come to."""
    nodes, groups = list(found["nodes"].values()), list(found["groups"].values())
    undecided = [one for one in groups if one["verdict"] == Verdict.UNDECIDED and one["wrong"]]
    unhealed = [
        one
        for one in groups
        if set(one["wrong"]) - set(one["rebuilt"]) or one.get("again", Verdict.EQUAL) != Verdict.EQUAL
    ]
    if undecided or unhealed or any(one.get("left") for one in nodes):
        return Finding.DAMAGED
    if any(one["state"] != "read" for one in nodes) or any(one["silent"] for one in groups):
        return Finding.INCOMPLETE
    if any(one["damaged"] for one in nodes) or any(one["rebuilt"] for one in groups):
        return Finding.HEALED
    return Finding.CLEAN


def _round_id(arguments: Mapping[str, Any]) -> str:
    found = arguments.get("round")
    if not isinstance(found, str) or len(found) > 256:
        raise InvalidParameter("a round has a name")
    return found


def _name(group_id: int) -> str:
    return "control" if group_id == CONTROL_GROUP else f"s{group_id - 1}"
