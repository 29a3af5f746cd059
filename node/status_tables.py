"""`annulus status` for people: what `/status` of a node says, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

LAG_SHOWN_MIN = 1
"""A follower that is this many entries behind is shown with its lag."""


def troubles(found: Mapping[str, Any]) -> list[str]:
    """Return what is not as it should be, one sentence each; none if all is well."""
    said = []
    if found.get("state", "ready") != "ready":
        said.append(f"node {found['node']} is {found['state']}: {found.get('reason', '')}")
    if found.get("read_only"):
        said.append(f"node {found['node']} is read-only: {found['read_only']}")
    if why := found.get("admission", {}).get("why"):
        does = "refuses" if found["admission"]["memory"]["level"] == "refuse" else "slows down"
        said.append(f"node {found['node']} {does} inserts of those who write most: {why}")
    cluster = found.get("cluster") or {"nodes": (), "groups": ()}
    said += [
        f"node {node['name']} is {node['state']}" + (f": {node['why']}" if node.get("why") else "")
        for node in cluster["nodes"]
        if node["state"] != "ready"
    ]
    for group in cluster["groups"]:
        if not group["leader"]:
            said.append(f"{group['group']} has no leader")
        said += [
            f"the replica of {group['group']} on {replica['node']} is {replica['state']}"
            for replica in group["replicas"]
            if replica["state"].startswith("catching up")
        ]
    for node in cluster["nodes"] or [{"name": found["node"], "healing": found.get("healing")}]:
        said += _damage(node["name"], node.get("healing") or {})
    return list(dict.fromkeys(said))


def _damage(name: str, healing: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a node could not make good of its chunks, and which replicas differ, as far as it knows."""
    if left := healing.get("scrub", {}).get("left"):
        yield f"node {name} has {left} damaged chunks that nothing could replace; `annulus check --cluster` tries again"
    for group in healing.get("rebuilding", ()):
        yield f"the replica of {group} on {name} differed from the others and is being rebuilt"
    for group, one in healing.get("compared", {}).items():
        if wrong := set(one["wrong"]) - set(one["rebuilt"]):
            yield f"the replicas of {group} differ ({one['verdict']}): {', '.join(sorted(wrong))}"


def tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what to print."""
    if "journal" in found:
        yield Text.assemble(
            "node ", (found["node"], "bold"), f": {'READ-ONLY' if found['read_only'] else 'writable'}, "
            f"journal {size(found['journal']['bytes'])} in {found['journal']['files']} files, "
            f"chunks {size(found['chunks']['bytes'])}",
        )  # fmt: skip
        yield _collections(found["collections"], of="on this node" if found.get("cluster") else "")
    if found.get("cluster"):
        yield _nodes(found["cluster"]["nodes"])
        yield _groups(found["cluster"]["groups"])
        yield from moves_tables(found["cluster"])
    elif "shards" in found:
        yield _shards(found["shards"])
    for sentence in troubles(found):
        yield Text(f"! {sentence}", style="bold red")


def _collections(collections: list[Mapping[str, Any]], *, of: str) -> Table:
    table = Table(
        "database", "collection", "loaded", "rows", "growing", "sealed", "memory", "disk", "indexes",
        title=f"collections {of}".rstrip(),
    )  # fmt: skip
    for one in collections:
        indexes = ", ".join(f"{i['name']} {i['type']} {i['state']} {i['indexed_rows']}" for i in one["indexes"])
        table.add_row(
            one["database"], one["name"], "yes" if one["loaded"] else "no", f"{one['rows']:,}",
            str(one["growing_segments"]), str(one["sealed_segments"]), size(one["memory_bytes"]),
            size(one["chunk_bytes"]), indexes,
        )  # fmt: skip
    return table


def _shards(shards: list[Mapping[str, Any]]) -> Table:
    columns = ("shard", "leader", "replicas", "term", "position", "checkpoint", "segments", "rows")
    table = Table(*columns, title="shards")
    for one in shards:
        shown = {**one, "replicas": ", ".join(one["replicas"])}
        table.add_row(*(str(shown[column]) for column in columns))
    return table


def _nodes(nodes: list[Mapping[str, Any]]) -> Table:
    table = Table("node", "state", "leads", "replicas", "chunks", title="nodes")
    for one in nodes:
        style = "" if one["state"] == "ready" else "red"
        row = (str(one["leads"]), str(one["replicas"]), _chunks(one.get("healing") or {}))
        table.add_row(one["name"], Text(one["state"], style=style), *row)
    return table


def _chunks(healing: Mapping[str, Any]) -> str:
    """Return how the last reading of a node's chunks ended, or how far this one is."""
    scrub = healing.get("scrub", {})
    if not scrub.get("began_ms"):
        return "not read yet"
    if not scrub["ended_ms"]:
        return f"reading, {scrub['chunks_done']:,} of {scrub['chunks_total']:,}"
    found = f", {scrub['damaged']} damaged, {scrub['cured']} made good" if scrub["damaged"] else " whole"
    return f"{scrub['chunks_total']:,}{found}"


def _groups(groups: list[Mapping[str, Any]]) -> Table:
    """One line for each replica, the leader's first."""
    table = Table("shard", "term", "replica", "state", "position", "lag", "checkpoint", "as of", title="shards")
    for group in groups:
        first = True
        ordered = sorted(group["replicas"], key=lambda one: (one["node"] != group["leader"], one["node"]))
        for one in ordered:
            state, style = one["state"], ""
            if state == "leader":
                style = "bold green"
            elif state != "follower":
                style = "red"
            table.add_row(
                group["group"] if first else "",
                str(group["term"]) if first else "",
                one["node"],
                Text(state, style=style),
                *(_cells(one) if "position" in one else ("", "", "", "")),
                end_section=one is ordered[-1],
            )
            first = False
    return table


def _cells(replica: Mapping[str, Any]) -> tuple[str, str, str, str]:
    age_ms = replica["service_age_ms"]
    lag = replica["lag"]
    return (
        str(replica["position"]), str(lag) if lag >= LAG_SHOWN_MIN else "", str(replica["checkpoint"]),
        "" if age_ms is None else f"{age_ms / 1000:.1f} s ago",
    )  # fmt: skip


def moves_tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what to print of the shards that are on the move; `found` has {"moves", "movesPaused"}."""
    if found.get("moves"):
        table = Table("shard", "from", "to", "for", "copied", "left", title="on the move")
        for one in found["moves"]:
            table.add_row(
                f"s{one['shard']}", ", ".join(one["from"]), ", ".join(one["to"]), f"{one['seconds']:.0f} s",
                f"{size(one['bytesDone'])} of {size(one['bytesTotal'])}" if one["bytesTotal"] else "",
                "" if one["secondsLeft"] is None else f"about {one['secondsLeft']:.0f} s",
            )  # fmt: skip
        yield table
    if found.get("movesPaused"):
        yield Text("! moves are paused: no lost copy is replaced until `annulus node resume-moves`", "bold red")


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    rest = float(count)
    for unit in ("B", "KiB", "MiB"):
        if rest < 1024:
            return f"{rest:.0f} {unit}" if unit == "B" else f"{rest:.1f} {unit}"
        rest /= 1024
    return f"{rest:.1f} GiB"
