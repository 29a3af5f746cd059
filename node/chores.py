"""What clients may have the leaders of shards do at once: flush and compact."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cluster.message import Seal
from cluster.shard import Shard
from node.broadcaster import COMPACT_METHOD
from node.node import Node
from storage.errors import NoLeader
from storage.types import CollectionId, ShardId

FLUSH_METHOD: Final = "shard/flush"
LOOK_S: Final = 0.5


class Chores:
    """Asks, and does it for the shards that this node leads."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._router = node.router
        self._router.on_leader(FLUSH_METHOD, self._flush_here)
        self._router.on_leader(COMPACT_METHOD, self._compact_here)

    async def flush(self, shards: Sequence[ShardId], collection_id: CollectionId | None) -> None:
        """Have the shards' leaders seal a collection, or nothing more; return when all that is sealed is in chunks."""
        asked = {"collection": collection_id}
        await asyncio.gather(*(self._router.ask_leader(FLUSH_METHOD, one, asked) for one in shards))

    async def _flush_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Seal a collection in a shard that this node leads; return when all that is sealed of it is in chunks.

        Without a collection: seal nothing more, and wait for all of them.
        """
        self._node.check_writable()
        host = self._node.shards[shard_id]
        collection_id = asked["collection"]
        waiting = _unflushed(host.machine, collection_id)
        if collection_id is not None:
            outcome = await host.change(Seal(collection_id, None))
            waiting |= set(_ids(outcome["segments"]))

        def is_over() -> bool:
            return not host.is_leader or not waiting & _unflushed(host.machine, collection_id)

        while not is_over():
            with contextlib.suppress(TimeoutError):  # losing the lead changes no segment, and wakes nobody
                async with asyncio.timeout(LOOK_S):
                    await self._node.upkeep[shard_id].until(is_over)
        if not host.is_leader:
            raise NoLeader(f"shard {shard_id} changed its leader while it was flushed")
        return {}

    async def _compact_here(self, shard_id: ShardId, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Compact the collection in a shard that this node leads, and give the room back."""
        try:
            await self._node.upkeep[shard_id].compactions.compact_now(CollectionId(asked["collection"]))
            await self._node.checkpoint()
            await self._node.give_back_space()
        except OSError as error:
            self._node.note_store_error(error)
        return {}


def _unflushed(shard: Shard, collection_id: CollectionId | None) -> set[int]:
    """Return the sealed segments of a collection, or of all, that are not in chunks yet."""
    states = [one for one in shard.populated() if collection_id in (None, one.collection_id)]
    return {segment_id for state in states for segment_id, one in state.stored.items() if not one.is_flushed}


def _ids(found: Any) -> list[int]:
    return [int(one) for one in found]
