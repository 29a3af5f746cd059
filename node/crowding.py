"""Growing segments within their memory: the largest are sealed first, here or by whoever leads them.

Sealing makes rows immutable, so that they are flushed, and of a collection that is not loaded leave memory. It is a
message in the log, so only a shard's leader can do it. A node that follows more than it has memory for asks the
leaders to; and as long as it is short of memory it tells them so, and they slow down or refuse inserts as for
themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Final

from node.calls import Answer
from node.pressure import Level
from storage.errors import AnnulusError, InvalidParameter, Unavailable
from storage.types import ShardId

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

SEAL_METHOD: Final = "shard/seal_largest"
WORD_METHOD: Final = "admission/word"
ASK_AGAIN_S: Final = 5.0
"""Between two askings of one shard's leader: what was asked for takes a while to arrive."""
ASK_S: Final = 2.0
WORD_S: Final = 1.0
"""How long a node's word may take; the next one comes sooner than that."""


class Crowding:
    """Looks when it is told to. Belongs to the loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked_at_s: dict[ShardId, float] = {}
        self._telling: set[str] = set()
        self.sealed = 0
        """Segments that were sealed early, here."""

    def begin(self) -> None:
        """Serve what other nodes ask."""
        self._node.router.on_leader(SEAL_METHOD, self._seal_here)
        if self._node.mesh is not None:
            self._node.mesh.serve(WORD_METHOD, self._hear)

    async def relieve(self) -> None:
        """Seal the largest growing segments if all are too large, until they are as small as they should be."""
        admission = self._node.admission
        level = admission.look()
        if level is not Level.ACCEPT:
            self._tell()
        growing = self._growing()
        resident = admission.pressure.resident
        is_short = resident is not None and (resident.is_refusing or resident.fraction > 0)
        if sum(growing.values()) <= (admission.growing_bytes_low if is_short else admission.growing_bytes_max):
            return
        while sum(growing.values()) > admission.growing_bytes_low:
            upkeep = self._node.upkeep
            shard_id = max(growing, key=lambda one: upkeep[one].largest_growing_bytes)
            if upkeep[shard_id].leads:
                try:
                    await upkeep[shard_id].seal_largest()
                except Unavailable as error:  # another leads by now, and sees to it
                    log.debug("nothing sealed: %s", error)
                    return
                self.sealed += 1
                self._node.metrics.sealed_early()
                left = self._growing()
                growing = {one: left[one] for one in growing if one in left}
            else:
                self._ask(shard_id)
                del growing[shard_id]

    def _growing(self) -> dict[ShardId, int]:
        upkeep = self._node.upkeep
        sizes = {shard_id: upkeep[shard_id].growing_bytes() for shard_id in self._node.shards if shard_id in upkeep}
        return {shard_id: size for shard_id, size in sizes.items() if size}

    def _ask(self, shard_id: ShardId) -> None:
        now_s = self._node.seams.clock.monotonic_s()
        if now_s - self._asked_at_s.get(shard_id, -inf) < ASK_AGAIN_S:
            return
        self._asked_at_s[shard_id] = now_s

        async def ask() -> None:
            try:
                await self._node.router.ask_leader(SEAL_METHOD, shard_id, {}, deadline_s=now_s + ASK_S)
            except (AnnulusError, TimeoutError) as error:
                log.debug("nobody sealed shard=%d: %s", shard_id, error)

        self._node.keep(asyncio.get_running_loop().create_task(ask()))

    async def _seal_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        await self._node.upkeep[shard_id].seal_largest()
        return {}

    def _tell(self) -> None:
        """Tell the nodes that lead what is followed here how short of memory this one is."""
        node = self._node
        pressure = node.admission.pressure
        if node.mesh is None or not (pressure.is_refusing or pressure.fraction > 0):
            return
        leaders = {host.leader for host in node.shards.values()} - {None, node.name}
        word = {"fraction": pressure.fraction, "refuses": pressure.is_refusing}
        for name in sorted(str(one) for one in leaders):
            if name not in self._telling:
                self._telling.add(name)
                node.keep(asyncio.get_running_loop().create_task(self._say(name, word)))

    async def _say(self, name: str, word: Mapping[str, Any]) -> None:
        assert self._node.mesh is not None
        try:
            await self._node.mesh.call(name, WORD_METHOD, word, timeout_s=WORD_S)
        except (AnnulusError, TimeoutError) as error:
            log.debug("not told node=%s: %s", name, error)
        finally:
            self._telling.discard(name)

    async def _hear(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        match arguments:
            case {"fraction": float() | int() as fraction, "refuses": bool(refuses)}:
                clock = self._node.seams.clock
                self._node.admission.pressure.hear(peer, float(fraction), refuses, clock.monotonic_s())
                return {}, ()
        raise InvalidParameter(f"{peer} says nothing of its memory that {self._node.name} understands")
