"""Founding a cluster and coming back to one: who may, what is waited for, and what a node that forgot begins with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from node import forming
from node.forming import Forming, Known, Seat, Standing
from storage.errors import PeerUnreachable
from storage.types import Position

MEMBERS = ("n1", "n2", "n3")


class Hall:
    """Meshes of nodes in one room: a call is a function call, unless the node is away."""

    def __init__(self) -> None:
        self.meshes: dict[str, HallMesh] = {}
        self.away: set[str] = set()


class HallMesh:
    def __init__(self, hall: Hall, me: str) -> None:
        self.hall, self.me = hall, me
        self.methods: dict[str, Any] = {}
        hall.meshes[me] = self

    def serve(self, method: str, handler: Any) -> None:
        self.methods[method] = handler

    async def call(self, peer: str, method: str, arguments: Mapping[str, Any], *, timeout_s: float) -> Any:
        await asyncio.sleep(0)
        if peer in self.hall.away or peer not in self.hall.meshes:
            raise PeerUnreachable(f"node {peer} cannot be reached")
        return await self.hall.meshes[peer].methods[method](self.me, dict(arguments), ())


class Voter:
    """One node: the id it knows and where it stands in each group."""

    def __init__(
        self,
        hall: Hall,
        name: str,
        cluster_id: str = "",
        is_new: bool = False,
        members: Sequence[str] = MEMBERS,
        silent_max: int | None = None,
        **standings: Standing,
    ) -> None:
        self.cluster_id = cluster_id
        self.is_new = is_new
        self.standings = {int(key[1:]): one for key, one in standings.items()}
        self.known: dict[int, Known] = {}
        mesh: Any = HallMesh(hall, name)
        self.forming = Forming(
            mesh,
            members,
            others=lambda: [one for one in members if one != name],
            silent_max=lambda: silent_max,
            cluster_id=lambda: self.cluster_id,
            standing=self.standing,
            is_new=lambda group: self.is_new,
            known=lambda: self.known,
        )

    def standing(self, slot: int, generation: int) -> Standing | None:
        known = self.known.get(slot, Known(0, ()))
        return self.standings.get(slot) if known.generation == generation else None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forming, "ASK_S", 0.001)


def stand(term: int, last: int, leads: bool = False) -> Standing:
    return Standing(term, leads, Position(last))


def formed(**slots: Sequence[str]) -> dict[int, Known]:
    return {int(slot[1:]): Known(0, tuple(members)) for slot, members in slots.items()}


def seat(term: int, leader: str, last: int, members: Sequence[str] = MEMBERS, generation: int = 0) -> Seat:
    return Seat(term, leader, Position(last), Known(generation, tuple(members)))


async def soon(waiting: Any) -> Any:
    return await asyncio.wait_for(waiting, 5)


async def waits(node: Voter, waiting: Any, why: str) -> asyncio.Task[Any]:
    """Return the task after it has said what it waits for."""
    task: asyncio.Task[Any] = asyncio.ensure_future(waiting)
    for _ in range(2_000):
        await asyncio.sleep(0.001)
        assert not task.done(), task.result()
        if why in node.forming.why:
            return task
    raise AssertionError(f"it waits for something else: {node.forming.why!r}")


def test_all_that_every_quorum_needs_found() -> None:
    """Of three nodes one or two wait, and say for whom; with the third all found; the id is nobody's yet."""

    async def scenario() -> None:
        hall = Hall()
        first = Voter(hall, "n1", is_new=True)
        finding = await waits(first, first.forming.find_cluster(), "waiting for n2, n3: 3 of 3 nodes form a cluster")
        second = Voter(hall, "n2", is_new=True)
        other = await waits(second, second.forming.find_cluster(), "waiting for n3: 3 of 3 nodes form a cluster")
        assert not finding.done(), "one of the two may have formed it with the third, and forgotten"
        third = Voter(hall, "n3", is_new=True)
        assert await soon(third.forming.find_cluster()) == await soon(other) == await soon(finding) == ""


@pytest.mark.parametrize(("nodes", "needed"), [(2, 2), (3, 3), (4, 3), (5, 4), (7, 4)])
def test_so_many_found(nodes: int, needed: int) -> None:
    """As many as leave no quorum of voters without one that is new, besides the one that asks; five vote at most."""

    async def scenario() -> None:
        hall, names = Hall(), [f"n{number}" for number in range(1, nodes + 1)]
        voters = [Voter(hall, name, is_new=True, members=names) for name in names[: needed - 1]]
        finding = await waits(voters[0], voters[0].forming.find_cluster(), f"{needed} of {min(5, nodes)} nodes form")
        Voter(hall, names[needed - 1], is_new=True, members=names)
        assert await soon(finding) == ""

    asyncio.run(scenario())

    asyncio.run(scenario())


def test_a_cluster_that_is_there_is_found() -> None:
    """One node that knows the id is enough: a new directory founds nothing beside it."""

    async def scenario() -> None:
        hall = Hall()
        Voter(hall, "n2", "the id")
        Voter(hall, "n3")
        assert await soon(Voter(hall, "n1").forming.find_cluster()) == "the id"

    asyncio.run(scenario())


def test_those_who_have_promised_something_found_nothing() -> None:
    """Who comes late does not count one that has voted, or that has forgotten, though it knows no id yet; it waits."""

    async def scenario() -> None:
        hall = Hall()
        first = Voter(hall, "n1")
        Voter(hall, "n2", is_new=True)
        third = Voter(hall, "n3", is_new=True)
        finding = await waits(third, third.forming.find_cluster(), "n1 has been part of a cluster: waiting for a node")
        first.cluster_id = "the id"
        assert await soon(finding) == "the id"
        first.cluster_id = ""
        finding = await waits(first, first.forming.find_cluster(), "n1 has been part of a cluster: waiting for a node")
        finding.cancel()

    asyncio.run(scenario())


def test_coming_back_needs_all_others_in_one_term() -> None:
    """Nothing less than all other voters, of one term, with its leader, tells what was promised."""

    async def scenario() -> None:
        hall = Hall()
        hall.away = {"n3"}
        leader = Voter(hall, "n2", g0=stand(7, 40, leads=True))
        other = Voter(hall, "n3", g0=stand(8, 39))
        me = Voter(hall, "n1")
        finding = await waits(
            me, me.forming.find_seats(formed(g0=MEMBERS)), "group 0 needs n3: node n3 cannot be reached"
        )
        hall.away.clear()
        for state in ("the other is ahead", "the leader stood down"):
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not finding.done(), state
            assert "has no leader that all follow" in me.forming.why
            other.standings[0], leader.standings[0] = stand(8, 39), stand(8, 40)
        other.standings.clear()
        await asyncio.sleep(0.05)
        assert "group 0 needs n3, which has yet to find its own place" in me.forming.why
        other.standings[0], leader.standings[0] = stand(9, 39), stand(9, 42, leads=True)
        assert await soon(finding) == {0: seat(9, "n2", 42)}
        assert me.forming.why == ""

    asyncio.run(scenario())


def test_groups_come_back_each_for_itself() -> None:
    """A group that waits does not hold up the others; who has no other copies begins anew."""

    async def scenario() -> None:
        hall = Hall()
        Voter(hall, "n2", g0=stand(1, 5, leads=True), g1=stand(3, 9))
        Voter(hall, "n3", g0=stand(1, 4))
        me = Voter(hall, "n1")
        groups = formed(g0=MEMBERS, g1=("n1", "n2"), g2=("n1",), g3=("n2", "n3"))
        finding = await waits(me, me.forming.find_seats(groups), "2 of 3 groups; group 1 has no leader")
        hall.meshes["n2"].methods[forming.STANDING] = Voter(
            hall, "n2", g1=stand(4, 9, leads=True)
        ).forming._tell_standing
        seats = await soon(finding)
        assert seats == {0: seat(1, "n2", 5), 1: seat(4, "n2", 9, ("n1", "n2")), 2: seat(0, "", 0, ("n1",))}

    asyncio.run(scenario())


def test_those_who_forgot_vouch_for_nothing() -> None:
    """Two of five come back at once by the three who remember; two of three have lost the group."""

    async def scenario() -> None:
        hall = Hall()
        five = ("n1", "n2", "n3", "n4", "n5")
        me = Voter(hall, "n1")
        Voter(hall, "n2")
        Voter(hall, "n3", g0=stand(4, 30, leads=True))
        other = Voter(hall, "n4", g0=stand(4, 30))
        Voter(hall, "n5", g0=stand(4, 28))
        assert await soon(me.forming.find_seats(formed(g0=five))) == {0: seat(4, "n3", 30, five)}
        other.standings.clear()
        finding = await waits(me, me.forming.find_seats(formed(g0=five)), "group 0 needs n2, n4, which has yet to find")
        finding.cancel()
        finding = await waits(me, me.forming.find_seats(formed(g0=five[:3])), "group 0 needs n2, which has yet to find")
        finding.cancel()

    asyncio.run(scenario())


def test_a_group_that_nobody_knows_begins() -> None:
    """If all are new a group begins; one that has forgotten, or has yet to look, is not new, and stands in the way."""

    async def scenario() -> None:
        hall = Hall()
        voters = [Voter(hall, name, "the id") for name in MEMBERS]
        me = voters[0]
        me.is_new = voters[1].is_new = True
        finding = await waits(me, me.forming.find_seats(formed(g3=MEMBERS)), "group 3 needs n2, n3")
        voters[2].is_new = True
        assert await soon(finding) == {3: seat(0, "", 0)}
        me.is_new = False
        finding = await waits(me, me.forming.find_seats(formed(g3=MEMBERS)), "group 3 needs n2, n3")
        voters[1].standings[3] = stand(2, 7, leads=True)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not finding.done(), "one of three that remembers may not be the one that has everything"
        finding.cancel()

    asyncio.run(scenario())


def test_the_newest_generation_counts() -> None:
    """Whoever knows most tells who holds a slot now; who has no part in it needs no seat, nor does a learner."""

    async def scenario() -> None:
        hall = Hall()
        second = Voter(hall, "n2", g0=stand(3, 8, leads=True), g1=stand(5, 9, leads=True), g2=stand(1, 1, leads=True))
        third = Voter(hall, "n3", g1=stand(5, 9))
        second.known = {0: Known(2, ("n2",)), 1: Known(4, ("n1", "n2", "n3")), 2: Known(1, ("n2", "n3"))}
        third.known = {1: Known(3, ("n2", "n3"))}
        me = Voter(hall, "n1")
        finding = await waits(me, me.forming.find_seats(formed(g0=MEMBERS, g1=MEMBERS, g2=MEMBERS)), "1 of 2 groups")
        third.known = {1: Known(4, ("n1", "n2", "n3"))}
        seats = await soon(finding)
        assert seats == {0: seat(0, "", 0, ("n2",), 2), 1: seat(5, "n2", 9, generation=4)}

    asyncio.run(scenario())


def test_who_holds_a_slot_is_asked_of_all_but_so_many() -> None:
    """A node that does not hear of a group would come back to it as one that never voted there."""

    async def scenario() -> None:
        hall = Hall()
        five = ("n1", "n2", "n3", "n4", "n5")
        me = Voter(hall, "n1", members=five)
        assert await soon(me.forming.find_seats({0: Known(0, ("n2", "n3"))})) == {0: seat(0, "", 0, ("n2", "n3"))}
        me = Voter(hall, "n1", members=five, silent_max=1)
        Voter(hall, "n2")
        Voter(hall, "n3")
        fourth = Voter(hall, "n4", g1=stand(3, 9))
        fifth = Voter(hall, "n5", g1=stand(3, 9, leads=True))
        fourth.known = fifth.known = {1: Known(2, ("n1", "n4", "n5"))}
        hall.away = {"n4", "n5"}
        groups = {0: Known(0, ("n1",)), 1: Known(0, ("n2", "n3"))}
        finding = await waits(me, me.forming.find_seats(groups), "waiting for n4, n5: all but 1 of the other nodes")
        hall.away = {"n3"}
        assert await soon(finding) == {0: seat(0, "", 0, ("n1",)), 1: seat(3, "n5", 9, ("n1", "n4", "n5"), 2)}

    asyncio.run(scenario())
