"""Whose data a directory holds: written when it is first used, compared at every start.

A directory belongs to one node of one cluster. Where shards began follows from the nodes that formed the cluster, the
number of shards and the number of copies; a node that counted differently would take part in other groups than the
rest believe. So all three stay as they were then, also in the directory of a node that joined later. Which nodes there
are now is in the control group's state; what was last known of it is here too, so that a start finds the others.

Two clusters may have the same names. What tells them apart is an id that the first leader makes up and the cluster's
own log hands to every node (`cluster.membership.FormCluster`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import cbor2

from node.settings import NodeSettings
from storage.errors import StorageFault
from storage.keys import record_key

IDENTITY_KEY: Final = record_key("identity")
FORMAT: Final = 1
CLUSTER_FORMAT: Final = 2
"""Of a directory of a cluster: where its shards are is in the control state, and the first placement is another."""


@dataclass(frozen=True)
class Identity:
    """What a directory says about its owner."""

    node: str
    shards: int
    members: tuple[str, ...]
    """The nodes that formed the cluster; this one is not among them if it joined."""
    copies: int
    cluster_id: str = ""
    """Empty until this node has learnt it."""
    is_seated: bool = False
    """Whether votes and logs of this node may be in its journal. False in a new directory, and in one whose data was
    set aside: what the node once promised is not known there (see `node/forming.py`)."""
    has_forgotten: bool = False
    """Whether data of this node was set aside: then it is not new, though it is not seated."""
    abstains: Mapping[int, int] = field(default_factory=dict)
    """Group -> position up to which its log must reach before this node votes in it again."""
    seats: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Group of a later generation -> its members, as they were told to this node when it had forgotten, or joined."""
    peers: Mapping[str, str] = field(default_factory=dict)
    """All nodes, this one included, and their addresses for each other, as last known; empty before that."""
    epoch: int = 0
    """Of the membership that has these peers."""
    ticket: str = ""
    """Made up by a directory that asks to join, so that asking again is told from another node of the name."""

    @property
    def has_joined(self) -> bool:
        return self.node not in self.members

    @property
    def is_newcomer(self) -> bool:
        """Whether this node has taken part in nothing for certain: a disk that is lost does not join under its name."""
        return self.has_joined and not self.is_seated and not self.has_forgotten

    @property
    def has_peers(self) -> bool:
        return len(self.members) > 1 or self.has_joined

    @property
    def form(self) -> str:
        """What all nodes of a cluster must agree on, as text."""
        return f"nodes {','.join(self.members)}; shards {self.shards}; copies {self.copies}"

    def learnt(self, cluster_id: str) -> Identity:
        return replace(self, cluster_id=cluster_id)

    def knowing(self, epoch: int, peers: Mapping[str, str]) -> Identity:
        return replace(self, epoch=epoch, peers=dict(peers))

    def seated(self, abstains: Mapping[int, int], seats: Mapping[int, tuple[str, ...]]) -> Identity:
        return replace(self, is_seated=True, has_forgotten=False, abstains=dict(abstains), seats=dict(seats))

    def unseated(self) -> Identity:
        """Return the identity of the same node without its memory."""
        return replace(self, is_seated=False, has_forgotten=True, abstains={}, seats={})

    def to_bytes(self) -> bytes:
        form = CLUSTER_FORMAT if self.has_peers else FORMAT
        plain: dict[str, Any] = {"format": form, "node": self.node, "shards": self.shards}
        if self.has_peers:
            plain |= {
                "members": list(self.members), "copies": self.copies, "cluster_id": self.cluster_id,
                "is_seated": self.is_seated, "has_forgotten": self.has_forgotten, "abstains": dict(self.abstains),
                "seats": {group: list(members) for group, members in self.seats.items()},
                "peers": dict(self.peers), "epoch": self.epoch, "ticket": self.ticket,
            }  # fmt: skip
        return cbor2.dumps(plain)


def settle(raw: bytes | None, node: NodeSettings) -> Identity:
    """Return the identity in a directory's record, or a new one if there is none.

    Raises StorageFault if the directory is not this node's: it says what differs and what to do about it.
    """
    if raw is None:
        return Identity(node.name, node.shards, node.members, node.copies)
    plain = cbor2.loads(raw)
    readable = CLUSTER_FORMAT if "members" in plain else FORMAT
    if plain["format"] != readable:
        raise StorageFault(
            f"the data directory {node.data} has format {plain['format']}, this program reads {readable}: "
            "start the version that wrote it"
        )
    found = Identity(
        node=plain["node"],
        shards=plain["shards"],
        members=tuple(plain.get("members", (plain["node"],))),
        copies=plain.get("copies", 1),
        cluster_id=plain.get("cluster_id", ""),
        is_seated=plain.get("is_seated", True),
        has_forgotten=plain.get("has_forgotten", False),
        abstains=plain.get("abstains", {}),
        seats={group: tuple(members) for group, members in plain.get("seats", {}).items()},
        peers=plain.get("peers", {}),
        epoch=plain.get("epoch", 0),
        ticket=plain.get("ticket", ""),
    )
    if found.node != node.name:
        raise StorageFault(
            f"the data directory {node.data} belongs to node {found.node}, not to {node.name}: "
            f"start with --name {found.node}, or give another --data"
        )
    if found.has_peers != node.is_clustered:
        raise StorageFault(
            f"the data directory {node.data} belongs to {_owners(found)}, but the settings name "
            f"{_listed(node.members) if not node.is_clustered or node.peers else 'a cluster'}: start with "
            f"{'--peer-listen' if found.has_joined else 'the peers that it was formed with'}, or give another --data"
        )
    if not node.peers or not found.has_peers:
        return found
    # A list of peers is for forming: once there is a cluster its own state says who belongs to it.
    if found.members != node.members and not found.cluster_id:
        raise StorageFault(
            f"the data directory {node.data} is to be part of a cluster of {_listed(found.members)}, but the settings "
            f"name {_listed(node.members)}: start with the peers that it was to be formed with, or give another --data"
        )
    if found.shards != node.shards:
        raise StorageFault(
            f"the data directory {node.data} belongs to a cluster of {found.shards} shards, but the settings say "
            f"{node.shards}: start with --shards {found.shards}, or give another --data"
        )
    wanted = node.replication_factor if found.members != node.members else node.copies
    if wanted is not None and found.copies != wanted:
        raise StorageFault(
            f"the data directory {node.data} belongs to a cluster that keeps {found.copies} copies of each shard, but "
            f"the settings say {wanted}: start with --replication-factor {found.copies}, or give another --data"
        )
    return found


def _owners(found: Identity) -> str:
    return f"node {found.node} of a cluster" if found.has_joined else _listed(found.members)


def _listed(names: tuple[str, ...]) -> str:
    return f"the {len(names)} nodes {', '.join(names)}" if len(names) > 1 else f"the node {names[0]} alone"
