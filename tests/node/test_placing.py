"""What a node does about its shards, look by look: what it keeps, follows and drops."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.machine import Generation
from cluster.membership import Placement
from node.node import Node
from node.placing import Placing
from storage.types import Position, ShardId

SHARD = ShardId(0)


class Kept:
    """Replicas of a node that has left the shard, and what is done to them."""

    def __init__(self) -> None:
        self.shards: dict[ShardId, Any] = {}
        self.upkeep = {SHARD: SimpleNamespace(shard=SimpleNamespace(generation=None))}
        self.left = {SHARD: 1}
        self.leftovers: set[ShardId] = set()
        self.done: list[str] = []

    async def drop(self, shard_id: ShardId) -> None:
        self.done.append("drop")

    async def follow(self, shard_id: ShardId, placed: Placement) -> None:
        self.done.append("follow")


@pytest.mark.parametrize(
    ("placed", "done"),
    [
        (Placement(0, ("n1", "n2", "n3"), ("n1", "n3", "n4")), []),
        (Placement(0, ("n1", "n2", "n3")), []),
        (Placement(1, ("n1", "n3", "n4"), (), Position(9)), ["drop"]),
        (Placement(2, ("n1", "n2", "n4"), (), Position(12)), ["drop"]),
    ],
)
def test_a_shard_that_was_left_is_kept_until_the_move_is_known(placed: Placement, done: list[str]) -> None:
    """While the control group has the generation before, its members of then forget nothing and take no part: with
    nothing they would elect each other. Once it knows the next one, what is here is dropped."""

    async def story() -> None:
        replicas = Kept()
        placing = Placing(cast(Node, SimpleNamespace(name="n2", mesh=None, replicas=replicas)))

        async def call(slot: int, state: Generation) -> None: ...

        placing._call_heirs = call  # type: ignore[method-assign]
        assert await placing._look_at(SHARD, placed)
        assert replicas.done == done

    asyncio.run(story())
