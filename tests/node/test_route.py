"""The router on hosts and a mesh that follow a script: what is repeated, what is hedged, what the client hears."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import cbor2
import pytest

from cluster.catalog import DropDatabase
from cluster.idempotency import KeyedStep
from cluster.machine import Outcome, Rejected
from cluster.message import Delete, Insert, Message, Seal, to_plain
from cluster.raft import NotLeader
from node.admission import Admission
from node.broadcaster import Carried
from node.metrics import Metrics
from node.network import Link
from node.route import PATIENCE_S, Router, _Rounds
from node.scope import Scope, current
from node.settings import Settings
from storage.errors import (
    AnnulusError,
    BadRow,
    Busy,
    CollectionNotFound,
    InvalidParameter,
    NoLeader,
    OutcomeUnknown,
    PeerUnreachable,
    ReadOnly,
    StorageFault,
    Unavailable,
    error_from,
)
from storage.types import CollectionId, PartitionId, Position, ShardId, Tick
from tests.sim.world import SimClock, SimLoop, close, run

S0, S1 = ShardId(0), ShardId(1)
ROW = Insert(CollectionId(1), PartitionId(2))


class Host:
    """One replica: leads if it says so, and remembers what was proposed."""

    def __init__(self, leader: str | None = None, *, me: str = "n1", outcome: Outcome | None = None) -> None:
        self.leader, self.me, self.outcome = leader, me, outcome or {"rows": 1}
        self.raft = SimpleNamespace(term=3)
        self.machine = SimpleNamespace(position=Position(0))
        self.proposed: list[tuple[str, int, Message, bytes]] = []
        self.barriers = 0
        self.fault: Exception | None = None
        self.is_whole, self.service_tick = True, Tick(0)

    @property
    def is_leader(self) -> bool:
        return self.leader == self.me

    async def propose(
        self, message: Message, body: Any = b"", *, producer: str = "", sequence: int = 0
    ) -> tuple[Outcome, Tick, Position]:
        self.proposed.append((producer, sequence, message, bytes(body)))
        await asyncio.sleep(0.01)
        if self.fault is not None:
            raise self.fault
        return self.outcome, Tick(70 + len(self.proposed)), Position(len(self.proposed))

    async def barrier(self) -> Position:
        self.barriers += 1
        await asyncio.sleep(0.01)
        return Position(40 + self.barriers)

    async def settle(self, within_s: float) -> None: ...

    async def wait_applied(self, position: Position) -> None: ...

    async def wait_service(self, tick: Tick) -> None: ...


class Mesh:
    """Carries calls between the nodes of one test as bytes; a peer that is `down` or takes `delay_s` shows it."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[str, str], Any] = {}
        self.down: set[str] = set()
        self.delay_s: dict[str, float] = {}
        self.calls: list[tuple[str, str, Link]] = []
        self.cancelled: list[str] = []
        self.lose_answers_of: set[str] = set()

    def of(self, me: str) -> Any:
        return SimpleNamespace(
            serve=lambda method, handler: self.handlers.__setitem__((me, method), handler),
            is_up=lambda peer: peer not in self.down,
            call=lambda *args, **more: self.call(me, *args, **more),
        )

    async def call(
        self,
        me: str,
        peer: str,
        method: str,
        arguments: Mapping[str, Any],
        blobs: Sequence[Any] = (),
        *,
        timeout_s: float,
        link: Link = Link.SMALL,
    ) -> Any:
        self.calls.append((peer, method, link))
        if peer in self.down:
            raise PeerUnreachable(f"node {peer} cannot be reached")
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self.delay_s.get(peer, 0.001))
                arrived = cbor2.loads(cbor2.dumps(dict(arguments)))
                handler = self.handlers[peer, method]
                answer, answer_blobs = await handler(me, arrived, [memoryview(bytes(one)) for one in blobs])
        except TimeoutError:
            raise PeerUnreachable(f"node {peer} did not answer") from None
        except asyncio.CancelledError:
            self.cancelled.append(peer)
            raise
        except AnnulusError as error:
            raise error_from(error.code, error.message) from None
        if peer in self.lose_answers_of:
            raise PeerUnreachable(f"the session to node {peer} ended before its answer")
        return cbor2.loads(cbor2.dumps(dict(answer))), [memoryview(bytes(one)) for one in answer_blobs]


class Node:
    """What a router sees of its node."""

    def __init__(self, name: str, loop: SimLoop, mesh: Mesh | None, shards: dict[ShardId, Host]) -> None:
        base = Settings()
        self.settings = SimpleNamespace(node=SimpleNamespace(name=name), api=base.api)
        self.seams = SimpleNamespace(clock=SimClock(loop), dice=Random(name))
        self.mesh: Any = None if mesh is None else mesh.of(name)
        self.control, self.shards = Host("n1", me=name), shards
        self.metrics = Metrics()
        self.admission = Admission(base, self.seams.clock, self.metrics)
        self.full = False
        self.broadcaster = SimpleNamespace(carry_out=self._carry_out)

    def replicas_of(self, shard_id: ShardId) -> Sequence[str]:
        return ("n1", "n2", "n3")

    def check_writable(self) -> None:
        if self.full:
            raise ReadOnly("quota exceeded")

    def check_journal(self) -> None: ...

    async def _carry_out(self, *args: Any, **more: Any) -> Carried:
        return Carried({}, Position(5))


class World:
    """Nodes n1 to n3 with a replica of shard 0 each, and n4 without."""

    def __init__(self, loop: SimLoop) -> None:
        self.mesh = Mesh()
        self.hosts = {name: Host("n2", me=name) for name in ("n1", "n2", "n3")}
        self.nodes = {name: Node(name, loop, self.mesh, {S0: host}) for name, host in self.hosts.items()}
        self.nodes["n4"] = Node("n4", loop, self.mesh, {})
        self.routers = {name: Router(node) for name, node in self.nodes.items()}  # type: ignore[arg-type]

    def lead(self, name: str | None) -> None:
        for host in self.hosts.values():
            host.leader = name


def simulated(script: Callable[[World, SimLoop], Awaitable[None]]) -> None:
    loop = SimLoop()

    async def main() -> None:
        await script(World(loop), loop)

    try:
        run(loop, main())
    finally:
        close(loop)


@pytest.mark.parametrize("name", ["n1", "n2", "n3", "n4"])
@pytest.mark.parametrize("outcome", [{"rows": 7, "deleted": 1}, Rejected("bad_row", "row 3 does not fit")])
def test_a_change_reaches_the_leader_from_anywhere(name: str, outcome: Outcome) -> None:
    """With its message and rows as they were; the outcome comes back as it was, a rejection as its error."""

    async def script(world: World, loop: SimLoop) -> None:
        world.hosts["n2"].outcome = outcome
        message = Delete(CollectionId(1), b"\x01" * 3_000_000, [PartitionId(4)])
        written = await world.routers[name].propose(S0, message, b"rows")
        assert written == (outcome, 71, 1)
        ((_, _, arrived, body),) = world.hosts["n2"].proposed
        assert (to_plain(arrived), body) == (to_plain(message), b"rows")
        if isinstance(outcome, Rejected):
            with pytest.raises(BadRow, match="row 3 does not fit"):
                await world.routers[name].change(S0, ROW)
        elif name != "n2":
            assert [link for _, method, link in world.mesh.calls if method == "shard/propose"] == [Link.BULK]

    simulated(script)


def test_a_node_alone_asks_nobody() -> None:
    """No mesh, no clock, no dice: straight to the host."""

    async def script(world: World, loop: SimLoop) -> None:
        host = Host("n1")
        router = Router(Node("n1", loop, None, {S0: host}))  # type: ignore[arg-type]
        assert await router.change(S0, ROW, b"x") == {"rows": 1}
        assert await router.refresh_catalog()
        host.fault = NoLeader("s0 stops")
        with pytest.raises(NoLeader, match="s0 stops"):
            await router.change(S0, ROW, b"x")

    simulated(script)


@pytest.mark.parametrize("name", ["n1", "n4"])
def test_a_lost_answer_is_asked_for_again_under_the_same_name(name: str) -> None:
    """The next leader gets the same producer and sequence, so that it can tell a repeat."""

    async def script(world: World, loop: SimLoop) -> None:
        world.mesh.lose_answers_of.add("n2")
        changing = asyncio.ensure_future(world.routers[name].change(S0, ROW, b"x"))
        await asyncio.sleep(0.05)
        world.lead("n3")
        assert await changing == {"rows": 1}
        first, again = world.hosts["n2"].proposed[0], world.hosts["n3"].proposed[0]
        assert first[:2] == again[:2]
        other = await world.routers[name].propose(S0, ROW, b"y")
        assert world.hosts["n3"].proposed[-1][:2] != again[:2] and other.tick

    simulated(script)


@pytest.mark.parametrize("name", ["n1", "n4"])
def test_a_leader_that_was_cut_off_is_given_up_when_another_leads(name: str) -> None:
    """Its answer is not waited for until the client's time is up."""

    async def script(world: World, loop: SimLoop) -> None:
        if name == "n4":
            await world.routers[name].change(S0, ROW)
        world.mesh.delay_s["n2"] = 1_000.0
        changing = asyncio.ensure_future(world.routers[name].change(S0, ROW, b"x"))
        await asyncio.sleep(0.3)
        world.lead("n3")
        assert await changing == {"rows": 1}
        assert loop.now_s < 3

    simulated(script)


@pytest.mark.parametrize("name", ["n1", "n2", "n4"])
@pytest.mark.parametrize("surely", [True, False])
def test_a_leader_that_refuses_has_changed_nothing(name: str, surely: bool) -> None:
    """One that no longer leads when it is asked to propose says so, and the client hears that nothing was changed; one
    that loses the lead afterwards cannot know."""

    async def script(world: World, loop: SimLoop) -> None:
        world.hosts["n2"].fault = NotLeader(1, None) if surely else NoLeader("lost after it was proposed")
        expected, text = (NoLeader, "nothing was changed") if surely else (OutcomeUnknown, "look before you repeat")
        with pytest.raises(expected, match=text):
            await world.routers[name].propose(S0, ROW, b"x", deadline_s=world.nodes[name].seams.clock.monotonic_s() + 5)

    simulated(script)


@pytest.mark.parametrize("name", ["n1", "n4"])
def test_a_change_of_the_catalogue_is_made_where_the_control_group_is_led(name: str) -> None:
    """Under one producer and sequence however often it is sent; its outcome, or why it was refused, comes back."""

    async def script(world: World, loop: SimLoop) -> None:
        asked: list[tuple[Message, str, int]] = []
        faults: list[Exception] = []

        async def carry_out(message: Message, *, producer: str, sequence: int) -> Carried:
            asked.append((message, producer, sequence))
            if faults:
                raise faults.pop(0)
            return Carried({"task": 7}, Position(5))

        world.nodes["n1"].broadcaster = SimpleNamespace(carry_out=carry_out)
        router = world.routers[name]
        drop = DropDatabase("d")
        faults += [NotLeader(0, None), OutcomeUnknown("it goes on")]
        assert await router.broadcast(drop) == {"task": 7}
        assert [message for message, _, _ in asked] == [drop] * 3
        assert len({one[1:] for one in asked}) == 1
        for fault in (Busy("others hold it"), InvalidParameter("no")):
            faults.append(fault)
            with pytest.raises(type(fault), match=str(fault)):
                await router.broadcast(drop)
        faults += [OutcomeUnknown("it goes on"), *(Busy("it is still held by the first attempt") for _ in range(99))]
        scope = current.set(Scope(world.nodes[name].seams.clock.monotonic_s() + 3))
        with pytest.raises(OutcomeUnknown, match="look before you repeat"):
            await router.broadcast(drop)
        current.reset(scope)
        faults.clear()
        current.set(Scope(world.nodes[name].seams.clock.monotonic_s() + 3, key="k"))
        for number in (1, 2):
            await router.broadcast(drop)
            assert asked[-1][0] == KeyedStep("k", number, *to_plain(drop))

    simulated(script)


@pytest.mark.parametrize("name", ["n1", "n4"])
def test_nobody_leads(name: str) -> None:
    """A change that nobody can have made is given up after some patience, and the client hears that it was not made."""

    async def script(world: World, loop: SimLoop) -> None:
        world.lead(None)
        with pytest.raises(NoLeader, match=r"shard 0 has no leader .* nothing was changed, try again soon"):
            await world.routers[name].change(S0, ROW)
        assert PATIENCE_S - 1 <= loop.now_s <= PATIENCE_S
        world.lead("n2")
        world.mesh.down.add("n2")
        with pytest.raises(NoLeader, match=r"n2, which leads it, cannot be reached|nobody leads it"):
            await world.routers["n1"].change(S0, ROW)

    simulated(script)


def test_an_outcome_that_stays_unknown_is_called_so_at_the_clients_deadline() -> None:
    """Not before: until then it is asked for again."""

    async def script(world: World, loop: SimLoop) -> None:
        world.mesh.lose_answers_of.add("n2")
        current.set(Scope(deadline_s=20.0))
        with pytest.raises(OutcomeUnknown, match=r"shard 0 has lost its leader, or is slow .* may have been made"):
            await world.routers["n1"].change(S0, ROW)
        assert 19 <= loop.now_s <= 20
        assert len({one[:2] for one in world.hosts["n2"].proposed}) == 1 < len(world.hosts["n2"].proposed)
        world.hosts["n2"].fault = NoLeader("s0 lost its leadership")
        current.set(Scope(deadline_s=loop.now_s + 2))
        with pytest.raises(OutcomeUnknown):
            await world.routers["n2"].change(S0, ROW)

    simulated(script)


def test_the_leaders_full_disk_counts_and_no_other() -> None:
    """A node without room passes rows on; the leader's refusal comes back, and a seal is not refused."""

    async def script(world: World, loop: SimLoop) -> None:
        world.nodes["n1"].full = True
        assert await world.routers["n1"].change(S0, ROW) == {"rows": 1}
        world.nodes["n2"].full = True
        for name in ("n1", "n2"):
            with pytest.raises(ReadOnly):
                await world.routers[name].change(S0, ROW)
            assert await world.routers[name].change(S0, Seal(CollectionId(1)))

    simulated(script)


@pytest.mark.parametrize("fault", [ReadOnly("no room"), StorageFault("a bug")])
def test_a_refusal_after_an_attempt_that_may_have_worked_does_not_unsay_it(fault: Exception) -> None:
    """Only what the group has decided counts as decided: a rejection of the repeat is that of the change."""

    async def script(world: World, loop: SimLoop) -> None:
        world.mesh.lose_answers_of.add("n2")
        world.hosts["n3"].fault = fault
        changing = asyncio.ensure_future(world.routers["n1"].change(S0, ROW, b"x"))
        await asyncio.sleep(0.05)
        world.lead("n3")
        with pytest.raises(OutcomeUnknown, match="it may have been made, look before you repeat; now"):
            await changing
        world.lead("n2")
        world.hosts["n3"].fault, world.hosts["n3"].outcome = None, Rejected("bad_row", "it does not fit")
        changing = asyncio.ensure_future(world.routers["n1"].change(S0, ROW, b"x"))
        await asyncio.sleep(0.05)
        world.lead("n3")
        with pytest.raises(BadRow, match="it does not fit"):
            await changing

    simulated(script)


def test_one_error_for_a_request_of_several_shards() -> None:
    """A refusal goes before a lost leader; what was partly done is never called undone; ticks go into the session."""

    async def script(world: World, loop: SimLoop) -> None:
        router, node = world.routers["n2"], world.nodes["n2"]
        second = Host("n2", me="n2")
        node.shards[S1] = second
        scope = Scope(deadline_s=5.0)
        current.set(scope)
        both = [(S0, ROW, b""), (S1, ROW, b"")]
        assert await router.change_all(both) == [{"rows": 1}, {"rows": 1}]
        assert scope.seen == {S0: 71, S1: 71}
        second.leader = None
        with pytest.raises(OutcomeUnknown, match=r"a part of the request is done\. shard 1 has no leader"):
            await router.change_all(both)
        scope.deadline_s = loop.now_s + 5
        world.lead(None)
        with pytest.raises(NoLeader, match=r"shard 0 has no leader .*; shard 1 has no leader"):
            await router.change_all(both)
        scope.deadline_s = loop.now_s + 5
        world.lead("n2")
        world.hosts["n2"].outcome = Rejected("collection_not_found", "can't find collection")
        with pytest.raises(CollectionNotFound):
            await router.change_all(both)

    simulated(script)


def test_a_barrier_begins_after_whoever_shares_it_asked() -> None:
    """Many that wait share one call, none a call that had begun before it came."""

    async def script(world: World, loop: SimLoop) -> None:
        router, host = world.routers["n1"], world.hosts["n2"]
        early = [asyncio.ensure_future(router.barrier(S0)) for _ in range(5)]
        await asyncio.sleep(0.002)
        begun = host.barriers
        late = [asyncio.ensure_future(router.barrier(S0)) for _ in range(5)]
        assert {await one for one in early} == {41}
        assert {await one for one in late} == {42}
        assert (begun, host.barriers) == (1, 2)
        assert await world.routers["n2"].barrier(S0) == 43

    simulated(script)


def test_rounds_go_on_after_a_failure_and_after_all_have_gone() -> None:
    """Who joins after that gets a call of its own."""

    async def script(world: World, loop: SimLoop) -> None:
        rounds, count = _Rounds(), 0

        async def ask() -> Position:
            nonlocal count
            count += 1
            await asyncio.sleep(0.01)
            if count == 1:
                raise NoLeader("nobody")
            return Position(count)

        with pytest.raises(NoLeader):
            await rounds.join(ask)
        waiting = asyncio.ensure_future(asyncio.wait_for(asyncio.shield(rounds.join(ask)), 0.001))
        with pytest.raises(TimeoutError):
            await waiting
        assert await rounds.join(ask) == 3

    simulated(script)


Handler = Callable[[], Awaitable[None]]


@pytest.mark.parametrize(
    ("delays_s", "faults", "wanted", "asked"),
    [
        ({}, {}, "n1", ["n1"]),
        ({"n1": 5.0}, {}, "n2", ["n1", "n2"]),
        ({"n1": 5.0, "n2": 9.0}, {}, "n1", ["n1", "n2"]),
        ({}, {"n1": NoLeader("x")}, "n2", ["n1", "n2"]),
        ({}, {"n1": NoLeader("x"), "n2": Unavailable("y")}, "n3", ["n1", "n2", "n3"]),
        ({"n1": 5.0}, {"n2": NoLeader("x")}, "n1", ["n1", "n2"]),
    ],
)
def test_the_first_good_answer_counts(
    delays_s: dict[str, float], faults: dict[str, Exception], wanted: str, asked: list[str]
) -> None:
    """One replica is asked; a second one if it fails, or once if it is slow; who is not needed is cancelled."""

    async def script(world: World, loop: SimLoop) -> None:
        router = world.routers["n4"]
        world.mesh.delay_s = delays_s

        def handler(name: str) -> Any:
            async def serve(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Any:
                if name in faults:
                    raise faults[name]
                return {"from": name}, [blobs[0]]

            return serve

        for name in ("n1", "n2", "n3"):
            world.mesh.handlers[name, "x"] = handler(name)
        answer, blobs = await router.hedging.ask_any(["n1", "n2", "n3"], "x", {}, [b"b"], deadline_s=30.0)
        assert (answer, bytes(blobs[0])) == ({"from": wanted}, b"b")
        assert [peer for peer, _, _ in world.mesh.calls] == asked
        await asyncio.sleep(0)
        lost = [name for name in asked if name != wanted and name not in faults]
        assert world.mesh.cancelled == lost

    simulated(script)


def test_no_replica_answers() -> None:
    """The error says what each of them said; a bad request is not tried on the next one."""

    async def script(world: World, loop: SimLoop) -> None:
        router = world.routers["n4"]

        async def refuse(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Any:
            raise InvalidParameter("it is wrong")

        async def busy(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Any:
            raise NoLeader("no leader there")

        world.mesh.handlers["n1", "x"] = busy
        world.mesh.handlers["n2", "x"] = refuse
        world.mesh.down.add("n3")
        with pytest.raises(Unavailable, match="n3: it is down; n1: no leader there"):
            await router.hedging.ask_any(["n1", "n3"], "x", {}, [], deadline_s=5.0)
        with pytest.raises(InvalidParameter, match="it is wrong"):
            await router.hedging.ask_any(["n2", "n1"], "x", {}, [], deadline_s=5.0)
        with pytest.raises(Unavailable, match="there is no other replica"):
            await router.hedging.ask_any([], "x", {}, [], deadline_s=5.0)

    simulated(script)


def test_quick_replicas_take_turns_and_slow_ones_come_after() -> None:
    """Those that are down come last; for a Strong read the leader is asked first."""

    async def script(world: World, loop: SimLoop) -> None:
        router = world.routers["n4"]

        async def serve(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Any:
            return {}, ()

        for name in ("n1", "n2", "n3"):
            world.mesh.handlers[name, "x"] = serve
        world.mesh.delay_s = {"n1": 0.01, "n2": 0.012, "n3": 0.2}
        for name in ("n1", "n2", "n3"):
            await router.hedging.ask_any([name], "x", {}, [], deadline_s=9.0)
        orders = [router.replicas_elsewhere(S0) for _ in range(6)]
        assert {order[0] for order in orders} == {"n1", "n2"} and {order[2] for order in orders} == {"n3"}
        assert [order[0] for order in orders].count("n1") == 3
        world.mesh.down.add("n1")
        assert {router.replicas_elsewhere(S0) for _ in range(4)} == {("n2", "n3", "n1")}
        await router.change(S0, ROW)
        world.mesh.down.clear()
        assert {router.replicas_elsewhere(S0, leader_first=True)[0] for _ in range(4)} == {"n2"}
        assert "n2" not in world.routers["n2"].replicas_elsewhere(S0)

    simulated(script)
