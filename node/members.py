"""Who the nodes of the cluster are and where, as this node knows it, and what it tells of itself.

The control group's state says it, with an epoch that rises with every change. But a node that was away for long has an
old copy of that state, and may need a node that came meanwhile to bring it up to date; so while its copy is not whole,
or it hears of no leader, it asks whomever it can reach, and goes by the newest answer. What is known is written down
for the next start. Before anything is known there is the list of those that form the cluster.

A node tells its own addresses and zone when the control state has others: they are what it was last started with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cluster.membership import Membership, SetMember
from node.background import Background
from node.settings import Address, parse_address
from storage.errors import AnnulusError, Conflict, Unavailable

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

KNOWN: Final = "members/known"
LOOK_S: Final = 1.0
"""How often a node that may know too little asks others, and whether what is known of it is looked at."""
ASK_S_MAX: Final = 2.0


class Members(Background):
    """One per node; runs while the node does."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._epoch = 0
        self._addresses: Mapping[str, str] = {}
        self._is_removed = False
        self._complaint = ""
        if node.mesh is not None:
            node.mesh.serve(KNOWN, self._tell)

    @property
    def names(self) -> Sequence[str]:
        """Names of all nodes; of those that form the cluster while no others are known."""
        return list(self._addresses) or list(self._node.identity.members)

    @property
    def number(self) -> int:
        """The number of this node among all. Raises Unavailable while the cluster does not know the node."""
        me = self._node.control.machine.membership.members.get(self._node.name)
        if me is not None:
            return me.number
        formed = self._node.identity.members
        if self._node.name not in formed:
            raise Unavailable(f"node {self._node.name} is no node of the cluster, as far as it knows: try another node")
        return formed.index(self._node.name)

    def name_of(self, number: int) -> str | None:
        """Return the name of the node with this number, None if there is none as far as is known here."""
        members = self._node.control.machine.membership.members if self._node.takes_part else {}
        if members:
            return next((name for name, one in members.items() if one.number == number), None)
        formed = self._node.identity.members
        return formed[number] if number < len(formed) else None

    @property
    def why_not_ready(self) -> str:
        if not self._is_removed:
            return ""
        return "this node was removed from its cluster: stop it, or start it with an empty directory and another name"

    def begin(self) -> None:
        """Go by what this node knew when it ran last; before the network starts."""
        identity = self._node.identity
        self._epoch, self._addresses = identity.epoch, identity.peers
        self._meet()

    def applied(self, membership: Membership) -> None:
        """The control state here has changed, and perhaps this part of it."""
        if membership.epoch > self._epoch and membership.members:
            self._learn(membership.epoch, {name: one.peer for name, one in membership.members.items()})

    def _learn(self, epoch: int, addresses: Mapping[str, str]) -> None:
        is_news = dict(addresses) != dict(self._addresses)
        self._epoch, self._addresses = epoch, dict(addresses)
        if is_news:
            self._meet()
            self._node.remember_soon(lambda identity: identity.knowing(epoch, addresses))

    def _meet(self) -> None:
        """Tell the network where the others are: where they say, else where they were when the cluster was formed."""
        network, settings = self._node.seams.network, self._node.settings.node
        if network is None:
            return
        found: dict[str, list[Address]] = {name: [parse_address(one)] for name, one in self._addresses.items()}
        for peer in settings.peers:
            if peer.name in found or not self._addresses:
                found.setdefault(peer.name, []).append(peer.address)
        network.set_peers({name: addresses for name, addresses in found.items() if name != self._node.name})

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._may_be_old:
                    await self._ask()
                else:
                    await self._announce(self._node.control.machine.membership)
            except Unavailable as error:
                if isinstance(error, Conflict):
                    self._complain(error)
                log.debug("members wait: %s", error)
            except AnnulusError as error:
                self._complain(error)
            except Exception:
                log.exception("members fail; it goes on")

    @property
    def _may_be_old(self) -> bool:
        """Whether this node's copy of the control state may be too old for the node to hear who leads it."""
        node = self._node
        return not node.takes_part or not node.control.is_whole or node.control.leader is None

    def _complain(self, error: AnnulusError) -> None:
        """Say once what the cluster does not accept of this node."""
        if error.message != self._complaint:
            self._complaint = error.message
            log.warning("the cluster does not take what this node tells of itself: %s", error.message)

    async def _ask(self) -> None:
        """Learn from the others who there is, if they know better."""
        mesh = self._node.mesh
        assert mesh is not None
        for peer in self.names:
            if peer != self._node.name and mesh.is_up(peer):
                answer, _ = await mesh.call(peer, KNOWN, {"epoch": self._epoch}, timeout_s=ASK_S_MAX)
                if answer["epoch"] > self._epoch:
                    self._learn(answer["epoch"], answer["addresses"])

    async def _tell(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        is_newer = self._epoch > int(arguments["epoch"])
        return {"epoch": self._epoch, "addresses": dict(self._addresses) if is_newer else {}}, ()

    # what this node tells of itself

    async def _announce(self, membership: Membership) -> None:
        """Have the control state say of this node what its settings do."""
        me = membership.members.get(self._node.name)
        if me is None:
            self._note_removed(membership)
            return
        mine = own_facts(self._node.settings.node)
        differs = {key: value for key, value in mine.items() if value and getattr(me, key) != value}
        if differs:
            log.info("tells the cluster %s", " ".join(f"{key}={value}" for key, value in differs.items()))
            await self._node.router.control_change(SetMember(me.name, **{"peer": me.peer, **differs}))

    def _note_removed(self, membership: Membership) -> None:
        if membership.members and not self._is_removed:
            self._is_removed = True
            log.error("%s", self.why_not_ready)


def own_facts(node: Any) -> dict[str, str]:
    """Return what a node's settings say of it: where others and clients find it, and its zone; "" for what they don't.

    An address to listen on that stands for all of a machine is no place to be found at: of the two the other one's
    host is given, if it is a better one.
    """
    listed = next((one.address for one in node.peers if one.name == node.name), None)
    peer = node.peer_advertise or listed or node.peer_listen
    client = node.listen if not node.listen.is_any else Address(peer.host, node.listen.port) if peer else None
    return {
        "peer": str(peer) if peer is not None and not peer.is_any else "",
        "client": str(client) if client is not None and not client.is_any else "",
        "zone": node.zone,
    }
