"""What a node does about its shards, look by look: what it keeps, follows and drops."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.machine import Generation
from cluster.membership import Moved, Placement
from cluster.message import Handover
from cluster.raft_leader import PeerProgress
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


class Led:
    """A shard's replica that leads it, and what is done with it."""

    def __init__(self, *, generation: int = 0, position: int = 0, delivered: int = 9, votes: str = "abc") -> None:
        self.name, self.generation, self.is_leader = "s0", generation, True
        self.machine = SimpleNamespace(generation=Generation(generation, ("a", "b", "d"), Position(position)))
        self.done: list[Any] = []
        self.can_lead = set(votes)
        self.raft = SimpleNamespace(
            me="a",
            last_position=9,
            delivered=delivered,
            is_closing=False,
            progress=lambda: [PeerProgress(one, Position(9), 0, True, False, one in votes) for one in "bcde"],
            set_learners=lambda names: None,
            transfer=self.transfer,
        )

    def transfer(self, to: str) -> bool:
        self.done.append(("asks", to))
        return to in self.can_lead

    def poke(self) -> None: ...

    async def change(self, message: Handover) -> None:
        self.done.append(("ends", tuple(message.members)))
        self.generation += 1


def led(applied: dict[str, int]) -> tuple[Placing, list[Any]]:
    """A node's placing among nodes that have applied so much, and what it tells the control group."""
    told: list[Any] = []

    async def tell(message: Any) -> None:
        told.append(message)

    placing = Placing(cast(Node, SimpleNamespace(name="a", mesh=None, router=SimpleNamespace(control_change=tell))))

    async def ask(name: str, slot: int, generation: int) -> int:
        return applied.get(name, -1)

    placing._ask_applied = ask  # type: ignore[method-assign]
    return placing, told


@pytest.mark.parametrize(
    ("votes", "applied", "members", "done"),
    [
        pytest.param("abc", "bcd", "abd", [("ends", ("a", "b", "d"))], id="stays"),
        pytest.param("abc", "bcd", "bcd", [("asks", "b"), ("ends", ("b", "c", "d"))], id="leaves"),
        pytest.param("abc", "cd", "bcd", [("asks", "c"), ("ends", ("c", "d", "b"))], id="leaves, and one is not near"),
        pytest.param("abc", "bde", "bde", [("asks", "b"), ("ends", ("b", "d", "e"))], id="leaves with another"),
        pytest.param("a", "bd", "bd", [("ends", ("b", "d"))], id="leaves, and nobody stays"),
    ],
)
def test_who_leads_and_is_to_leave_first_asks_one_that_stays_to_lead(
    votes: str, applied: str, members: str, done: list[Any]
) -> None:
    """Once in a generation: whoever was asked need not take it, and then the generation ends all the same."""

    async def story() -> None:
        placing, _ = led(dict.fromkeys(applied, 9))
        host = Led(votes=votes)
        for _ in range(3):
            if host.generation == 0:
                await placing._hand_over(1, cast(Any, host), list(members))
        assert host.done == done

    asyncio.run(story())


@pytest.mark.parametrize("delivered", [20, 21])
def test_a_move_is_told_when_a_majority_has_opened_the_generation(delivered: int) -> None:
    """Old members drop what they hold when the control group knows of it: the first leader waits for its first entry to
    be decided."""

    async def story() -> None:
        placing, told = led({})
        host = Led(generation=1, position=20, delivered=delivered)
        placed = Placement(0, ("a", "b", "c"), ("a", "b", "d"))
        assert await placing._lead(SHARD, cast(Any, host), placed)
        assert told == ([Moved(SHARD, 1, ["a", "b", "d"], 20)] if delivered > 20 else [])

    asyncio.run(story())
