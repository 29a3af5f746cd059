"""What is shown of a cluster: one view from many, holes where a node is silent, and tables that name what is wrong."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from node.cluster_status import REPLICAS, ClusterStatus, merged, replica_view
from node.status_tables import tables, troubles
from storage.errors import PeerUnreachable
from storage.types import tick_from_ms


def host(position: int, *, leads: bool = False, whole: bool = True, service_ms: int = 1_000, **raft: Any) -> Any:
    facts = {"term": 3, "leader": "n1", "leads": leads, "is_learner": False, "last_position": position + 1, **raft}
    return SimpleNamespace(
        raft=SimpleNamespace(**facts),
        machine=SimpleNamespace(position=position),
        is_whole=whole,
        service_tick=tick_from_ms(service_ms) if service_ms else 0,
    )


def view(position: int, **more: Any) -> dict[str, Any]:
    return replica_view(host(position, **more), checkpoint=2, now_ms=1_500)


def test_views_of_three_nodes_become_one() -> None:
    """The leader of the highest term leads, lags are measured from the furthest replica, a silent node is named."""
    old = view(30, leads=True, term=2, leader="n2")
    (control, shard) = merged(
        {0: ("n1", "n2", "n3"), 1: ("n1", "n2", "n3")},
        {"n1": {0: view(9, leads=True), 1: view(40, leads=True)}, "n2": {0: view(9), 1: old}, "n3": "no session"},
    )
    assert (control["group"], control["leader"], control["term"], control["position"]) == ("control", "n1", 3, 9)
    assert (shard["group"], shard["leader"], shard["term"], shard["position"]) == ("s0", "n1", 3, 40)
    assert [(one["node"], one["state"], one.get("lag")) for one in shard["replicas"]] == [
        ("n1", "leader", 0), ("n2", "leader", 10), ("n3", "unknown", None),
    ]  # fmt: skip
    assert shard["replicas"][2]["why"] == "no session"
    assert shard["replicas"][0]["service_age_ms"] == 500


def test_a_group_without_a_leader() -> None:
    """What followers believe of an older term makes nobody a leader; a replica that has heard nobody has no time."""
    (group,) = merged(
        {1: ("n1", "n2")}, {"n1": {1: view(5, term=4, leader=None, service_ms=0)}, "n2": {1: view(5, term=3)}}
    )
    assert group["leader"] == ""
    assert group["replicas"][0]["service_age_ms"] is None


def found() -> dict[str, Any]:
    views = {"n1": {0: view(9, leads=True), 1: view(40, leads=True)}, "n2": {0: view(9), 1: view(38, whole=False)}}
    groups = merged({0: ("n1", "n2", "n3"), 1: ("n1", "n2", "n3")}, {**views, "n3": "no session"})
    nodes = [
        {"name": "n1", "state": "ready", "why": "", "leads": 2, "replicas": 2},
        {"name": "n2", "state": "ready", "why": "", "leads": 0, "replicas": 2},
        {"name": "n3", "state": "unreachable", "why": "no session", "leads": 0, "replicas": 2},
    ]
    return {
        "node": "n1", "read_only": "", "journal": {"bytes": 3 << 20, "files": 1}, "chunks": {"bytes": 10},
        "collections": [], "shards": [], "cluster": {"nodes": nodes, "groups": groups},
    }  # fmt: skip


def shown(status: dict[str, Any]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120)
    for one in tables(status):
        console.print(one)
    return out.getvalue()


def test_tables_show_the_cluster_and_what_is_wrong() -> None:
    """Every replica has a line; who is silent or behind is said in a sentence, and makes the exit status 1."""
    status = found()
    text = shown(status)
    for word in ("journal 3.0 MiB in 1 files", "unreachable", "control", "s0", "catching up", "0.5 s ago"):
        assert word in text, text
    assert troubles(status) == ["node n3 is unreachable: no session", "the replica of s0 on n2 is catching up"]
    status["cluster"]["groups"][1]["leader"] = ""
    assert "s0 has no leader" in troubles(status)
    assert troubles({"node": "n1", "state": "not ready", "reason": "waiting for n2"}) == [
        "node n1 is not ready: waiting for n2"
    ]
    assert "waiting for n2" in shown({"node": "n1", "state": "not ready", "reason": "waiting for n2"})


def test_a_lone_node_has_a_line_for_each_shard() -> None:
    """Without peers there are no replicas to compare."""
    shard = {
        "shard": 0, "leader": "n1", "replicas": ["n1"], "term": 4, "position": 17, "checkpoint": 12, "segments": 1,
        "rows": 3,
    }  # fmt: skip
    status = {**found(), "cluster": None, "shards": [shard]}
    assert "17" in shown(status) and "replica" in shown(status)
    assert troubles(status) == []


def test_gathering_waits_for_nobody() -> None:
    """Nodes that answer are shown, one that does not is unreachable and says why."""

    class Mesh:
        def __init__(self) -> None:
            self.methods: dict[str, Any] = {}

        def serve(self, method: str, handler: Any) -> None:
            self.methods[method] = handler

        async def call(self, peer: str, method: str, arguments: Any, *, timeout_s: float) -> Any:
            if peer == "n3":
                raise PeerUnreachable("node n3 did not answer")
            return await self.methods[method](peer, arguments, ())

    mesh: Any = Mesh()
    status = ClusterStatus(
        mesh, lambda: ("n1", "n3"), lambda: {"why_not_ready": "", "groups": {0: view(9, leads=True)}}
    )
    assert REPLICAS in mesh.methods
    gathered = asyncio.run(status.gather({0: ("n1", "n3")}))
    assert [(one["name"], one["state"], one["leads"]) for one in gathered["nodes"]] == [
        ("n1", "ready", 1), ("n3", "unreachable", 0),
    ]  # fmt: skip
    assert gathered["groups"][0]["leader"] == "n1"
