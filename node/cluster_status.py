"""What a cluster looks like from one node: every group's leader and replicas, how far each is, who cannot be reached.

A node knows its own replicas. It asks the others for theirs when somebody wants to know; one that does not answer in
time is shown as such, and holds nothing up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol

from cluster.control import CONTROL_GROUP
from node.calls import Mesh
from storage.errors import AnnulusError
from storage.types import Tick, tick_ms

REPLICAS: Final = "status/replicas"
ASK_S_MAX: Final = 1.0


class ReplicaRole(StrEnum):
    """What a replica does just now."""

    LEADER = "leader"
    FOLLOWER = "follower"
    LEARNER = "learner"
    """It follows without a vote: it is about to hold the group, or one of many in the control group."""
    LEADERLESS = "leaderless"
    """It knows no leader."""
    BEHIND = "behind"
    """It takes a checkpoint of another, and answers nobody until it has it."""


class Raft(Protocol):
    """The part of a RaftGroup that is shown."""

    @property
    def term(self) -> int: ...
    @property
    def leader(self) -> str | None: ...
    @property
    def leads(self) -> bool: ...
    @property
    def last_position(self) -> int: ...
    @property
    def is_learner(self) -> bool: ...


class Host(Protocol):
    """The part of a GroupHost that is shown."""

    @property
    def raft(self) -> Raft: ...
    @property
    def machine(self) -> Any: ...
    @property
    def is_whole(self) -> bool: ...
    @property
    def service_tick(self) -> Tick: ...


def role_of(host: Host) -> ReplicaRole:
    if not host.is_whole:
        return ReplicaRole.BEHIND
    if host.raft.leads:
        return ReplicaRole.LEADER
    if not host.raft.leader:
        return ReplicaRole.LEADERLESS
    return ReplicaRole.LEARNER if host.raft.is_learner else ReplicaRole.FOLLOWER


def replica_view(host: Host, *, checkpoint: int, now_ms: int, progress: str = "") -> dict[str, Any]:
    """Return what there is to say about a replica of this node; `progress` is how far it is with catching up."""
    raft = host.raft
    service_ms = tick_ms(host.service_tick)
    role = role_of(host)
    state = str(role) if role is not ReplicaRole.BEHIND else f"catching up {progress}".rstrip()
    return {
        "state": state,
        "term": raft.term,
        "leader": raft.leader or "",
        "position": host.machine.position,
        "last": raft.last_position,
        "checkpoint": checkpoint,
        # A replica that has heard no leader yet does not know how old its state is.
        "service_age_ms": max(0, now_ms - service_ms) if service_ms else None,
    }


def merged(
    replicas: Mapping[int, Sequence[str]], views: Mapping[str, Mapping[int, Mapping[str, Any]] | str]
) -> list[dict[str, Any]]:
    """Return one view of each group from those of the nodes; a node that gave none is named with the reason.

    replicas  group -> names of the nodes that hold it
    views     node -> group -> its replica's view, or why there is none
    """
    groups = []
    for group_id, names in sorted(replicas.items()):
        known: dict[str, Mapping[str, Any]] = {}
        for name in names:
            view = views.get(name, "not asked")
            if not isinstance(view, str) and group_id in view:
                known[name] = view[group_id]
        term = max((view["term"] for view in known.values()), default=0)
        said = [view["leader"] for view in known.values() if view["term"] == term and view["leader"]]
        leader = next((name for name, view in known.items() if view["state"] == "leader" and view["term"] == term), "")
        end = max((view["position"] for view in known.values()), default=0)
        groups.append(
            {
                "group": "control" if group_id == CONTROL_GROUP else f"s{group_id - 1}",
                "leader": leader or (said[0] if said else ""),
                "term": term,
                "position": end,
                "replicas": [
                    {"node": name, **known[name], "lag": end - known[name]["position"]}
                    if name in known
                    else {"node": name, "state": "unknown", "why": _why(views.get(name, "not asked"))}
                    for name in names
                ],
            }
        )
    return groups


def _why(view: Mapping[int, Mapping[str, Any]] | str) -> str:
    return view if isinstance(view, str) else "it does not know the group yet"


class ClusterStatus:
    """Tells other nodes about this one's replicas, and gathers theirs."""

    def __init__(self, mesh: Mesh, members: Callable[[], Sequence[str]], mine: Callable[[], dict[str, Any]]) -> None:
        """`mine` returns {"why_not_ready", "groups": group -> `replica_view`} of this node."""
        self._mesh = mesh
        self._members = members
        self._mine = mine
        mesh.serve(REPLICAS, self._tell)

    async def gather(self, replicas: Mapping[int, Sequence[str]]) -> dict[str, Any]:
        """Return {"nodes", "groups"} as of now. `replicas` are the names of the nodes that hold each group."""
        members = self._members()
        answers = dict(zip(members, await asyncio.gather(*map(self._ask, members)), strict=True))
        views = {name: one if isinstance(one, str) else one["groups"] for name, one in answers.items()}
        groups = merged(replicas, views)
        nodes = [
            {
                "name": name,
                "state": "unreachable"
                if isinstance(answer, str)
                else "not ready"
                if answer["why_not_ready"]
                else "ready",
                "why": answer if isinstance(answer, str) else answer["why_not_ready"],
                "healing": None if isinstance(answer, str) else answer.get("healing"),
                "leads": sum(1 for group in groups if group["leader"] == name),
                "replicas": sum(1 for names in replicas.values() if name in names),
            }
            for name, answer in answers.items()
        ]
        return {"nodes": nodes, "groups": groups}

    async def _ask(self, name: str) -> dict[str, Any] | str:
        try:
            answer, _ = await self._mesh.call(name, REPLICAS, {}, timeout_s=ASK_S_MAX)
        except AnnulusError as error:
            return error.message
        return answer

    async def _tell(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        return self._mine(), ()
