"""Requests anywhere: a change goes to its group's leader wherever that is; a read to any replica (`hedging.py`).

A change is sent under one producer and sequence, however often it takes: if the leader is lost before it answers, the
same is sent to the next one, which makes the change or answers with the first outcome. Only when the client's time is
up does it hear that the outcome is not known. Where a change certainly was not made, because nobody led, it hears that
instead, and sooner.

    leader here   the group's host is asked directly: no copy, no encoding
    elsewhere     one call over the mesh; whoever does not lead answers with the leader that it knows
    unknown       the replicas are asked who leads

A node without a mesh leads all its groups. What it does goes straight to the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import cbor2

from cluster.ddl import BeginDdl
from cluster.idempotency import KeyedStep
from cluster.machine import Outcome, Rejected
from cluster.message import Body, Insert, Message, from_plain, to_plain
from cluster.raft import NotLeader
from node.admission import Admission
from node.calls import Answer, Mesh
from node.clock import Clock
from node.group import Producer
from node.hedging import Hedging
from node.metrics import Metrics, Routed
from node.network import Blob, Link
from node.scope import current
from node.settings import Settings
from storage.columns import Batch
from storage.errors import (
    AnnulusError,
    BadRequest,
    Busy,
    Conflict,
    JournalDamaged,
    NoLeader,
    OutcomeUnknown,
    Overloaded,
    PeerUnreachable,
    Unavailable,
    UnsupportedOperation,
    error_from,
)
from storage.types import Position, ShardId, Tick

BACKOFF_S_MIN: Final = 0.01
BACKOFF_S_MAX: Final = 0.25
PATIENCE_S: Final = 10.0
"""How long a group may be without a leader before a request that has changed nothing gives up: an election takes two
seconds, and whoever waits longer holds a place that others want."""
BUSY_S: Final = 1.0
"""How long a leader that refuses for having too much to do is asked again."""
ASK_LEADER_S: Final = 0.5
SETTLE_S: Final = 0.25
"""How long a request waits at a replica that does not know who leads, or whose leadership is about to go on, before it
looks elsewhere: a hand-over ends sooner, and who waits for its end goes on at once."""
WATCH_S: Final = 0.5
"""How often a call without an answer is checked against who leads now: a leader that was cut off never answers."""
BULK_BYTES_MIN: Final = 16 << 10
"""Larger requests travel over the link that is not the consensus's."""
REFRESH_S: Final = 1.0
"""How long a look at the catalogue waits for the newest one before it takes the one here."""

T = TypeVar("T")
LeaderHandler = Callable[[ShardId, Mapping[str, Any]], Awaitable[dict[str, Any]]]


class Written(NamedTuple):
    """A change that was decided: its outcome, and where it stands."""

    outcome: Outcome
    tick: Tick
    position: Position


class Host(Protocol):
    """The part of a `GroupHost` that requests need."""

    @property
    def machine(self) -> Any: ...
    @property
    def raft(self) -> Any: ...
    @property
    def leader(self) -> str | None: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def is_whole(self) -> bool: ...
    @property
    def service_tick(self) -> Tick: ...
    async def propose(
        self, message: Message, body: Body = b"", *, producer: str = "", sequence: int = 0
    ) -> tuple[Outcome, Tick, Position]: ...
    async def barrier(self) -> Position: ...
    async def settle(self, within_s: float) -> None: ...
    async def wait_applied(self, position: Position) -> None: ...
    async def wait_service(self, tick: Tick) -> None: ...


class Dice(Protocol):
    def random(self) -> float: ...
    def getrandbits(self, k: int, /) -> int: ...


class Surroundings(Protocol):
    """The part of the seams that a router needs."""

    @property
    def clock(self) -> Clock: ...
    @property
    def dice(self) -> Dice: ...


class Carries(Protocol):
    """What a `Broadcaster` answers."""

    @property
    def outcome(self) -> Mapping[str, Any]: ...
    @property
    def position(self) -> Position: ...


class Broadcasts(Protocol):
    """The part of a `Broadcaster` that requests need."""

    async def carry_out(self, message: Message, *, producer: str = "", sequence: int = 0) -> Carries: ...


class Home(Protocol):
    """The part of a node that a router needs."""

    @property
    def settings(self) -> Settings: ...
    @property
    def seams(self) -> Surroundings: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def mesh(self) -> Mesh | None: ...
    @property
    def control(self) -> Host: ...
    @property
    def shards(self) -> Mapping[ShardId, Host]: ...
    def replicas_of(self, shard_id: ShardId) -> Sequence[str]: ...
    def check_writable(self) -> None: ...
    def check_journal(self) -> None: ...
    @property
    def admission(self) -> Admission: ...
    @property
    def broadcaster(self) -> Broadcasts: ...


@dataclass(frozen=True)
class _Step(Generic[T]):
    """Something that only a leader can do: how it is done here, and how it is asked of another node."""

    method: str
    here: Callable[[Host], Awaitable[T]]
    arguments: dict[str, Any]
    read: Callable[[dict[str, Any]], T]
    blobs: Callable[[], Sequence[Blob]] = tuple
    """Made only if the step goes elsewhere."""
    changes: bool = True
    """Whether an attempt without an answer may have changed something."""


class _Rounds:
    """Calls whose answers many may share: one is under way, and those who come meanwhile wait for the next one."""

    def __init__(self) -> None:
        self._running: asyncio.Task[Position] | None = None
        self._next: asyncio.Task[Position] | None = None

    def join(self, ask: Callable[[], Awaitable[Position]]) -> asyncio.Task[Position]:
        """Return a call that has not begun yet."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._begin(ask))
            self._next.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may have gone
        return self._next

    async def _begin(self, ask: Callable[[], Awaitable[Position]]) -> Position:
        if self._running is not None:
            await asyncio.wait({self._running})
        self._running, self._next = self._next, None
        return await ask()


class Router:
    """Finds leaders and replicas. One per node.

    Invariants
      1. All attempts at one change have one producer and sequence.
      2. An error says that nothing was changed only if no attempt can have changed anything.
    """

    def __init__(self, node: Home) -> None:
        self._node = node
        self._me = node.settings.node.name
        self._clock = node.seams.clock
        self._producer = Producer(f"{self._me}/r{node.seams.dice.getrandbits(64):016x}")
        self._leaders: dict[ShardId, str] = {}
        """Who led a shard that has no replica here when it was last heard of."""
        self._rounds: dict[ShardId | None, _Rounds] = {}
        self._functions: dict[str, LeaderHandler] = {}
        self.hedging = Hedging(node.mesh, self._me, self._clock, node.metrics)
        """Asks whoever may answer."""
        if node.mesh is not None:
            for method, handler in (
                ("shard/propose", self._serve_propose),
                ("shard/barrier", self._serve_barrier),
                ("shard/leader", self._serve_leader),
                ("control/change", self._serve_propose),
                ("control/barrier", self._serve_barrier),
                ("control/broadcast", self._serve_broadcast),
            ):
                node.mesh.serve(method, handler)

    # changes of shards

    async def propose(
        self,
        shard_id: ShardId,
        message: Message,
        body: Body = b"",
        *,
        producer: str = "",
        sequence: int = 0,
        deadline_s: float | None = None,
        is_rest: bool = False,
    ) -> Written:
        """Return the outcome, tick and position of the message once it is durable on a majority and applied.

        producer, sequence  name the change; without them this process does
        deadline_s          monotonic; without it the client's, or as long as a request may take
        is_rest             another shard has taken a part of the same request

        Raises NoLeader if nobody led, so that nothing was changed; OutcomeUnknown if it may have been; ReadOnly or
        Overloaded if the leader has no room.
        """
        if not producer:
            producer, sequence = self._producer.name, self._producer.next()
        if self._node.mesh is None:
            return await self._propose_here(self._node.shards[shard_id], message, body, producer, sequence, is_rest)
        step = self._proposal("shard/propose", shard_id, message, body, producer, sequence, is_rest)
        return await self._at_leader(shard_id, step, deadline_s)

    async def change(
        self,
        shard_id: ShardId,
        message: Message,
        body: Body = b"",
        *,
        producer: str = "",
        sequence: int = 0,
        is_rest: bool = False,
    ) -> Mapping[str, Any]:
        """Propose, note the tick in the client's session, and return the outcome. Raises what it was rejected for."""
        written = await self.propose(shard_id, message, body, producer=producer, sequence=sequence, is_rest=is_rest)
        outcome, tick, _ = written
        if isinstance(outcome, Rejected):
            raise outcome.error()
        scope = current.get()
        if scope is not None:
            scope.saw(shard_id, tick)
        return outcome

    async def change_all(
        self,
        changes: Sequence[tuple[ShardId, Message, Body]],
        change: Callable[[ShardId, Message, Body], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> list[Mapping[str, Any]]:
        """Make several changes at once and return their outcomes. Raises one error for all that failed.

        change  how each is made, by `change` if nothing is said
        """
        change = change or self.change
        if len(changes) == 1:
            return [await change(*changes[0])]
        results = await asyncio.gather(*(change(*one) for one in changes), return_exceptions=True)
        made = [one for one in results if not isinstance(one, BaseException)]
        if len(made) < len(results):
            raise one_error([one for one in results if isinstance(one, BaseException)], partly=bool(made))
        return made

    async def barrier(self, shard_id: ShardId, *, deadline_s: float | None = None) -> Position:
        """Return a position: a replica that has applied it has every write acknowledged before the call.

        Who calls while a barrier is on its way to another node shares the next one with all who do. Raises NoLeader.
        """
        return await self._barrier(shard_id, _barrier("shard/barrier", shard_id), self.deadline_s(deadline_s))

    # the catalogue

    async def control_change(self, message: Message) -> Mapping[str, Any]:
        """Change the catalogue alone; return the outcome when this node's copy has it. Raises why it was rejected."""
        deadline_s = self.deadline_s()
        step = self._proposal("control/change", None, message, b"", self._producer.name, self._producer.next())
        written = await self._at_leader(None, step, deadline_s)
        await self._catch_up(written.position, deadline_s)
        if isinstance(written.outcome, Rejected):
            raise written.outcome.error()
        return written.outcome

    async def ddl(self, kind: str, database: str, collection: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make a change that shards must see; return its outcome, empty if there was nothing to do."""
        return await self.broadcast(BeginDdl(kind, database, collection, dict(request)))

    async def broadcast(self, message: Message) -> Mapping[str, Any]:
        """Make a change of the catalogue in its turn, on the control leader; return when this node's copy has it.

        Raises what it was refused for, and Busy if it did not get its turn.
        """
        deadline_s = self.deadline_s()
        scope = current.get()
        if scope is not None and scope.key:
            scope.steps += 1
            message = KeyedStep(scope.key, scope.steps, *to_plain(message))
        producer, sequence = self._producer.name, self._producer.next()

        async def here(control: Host) -> tuple[Mapping[str, Any], Position]:
            return await self._carry_out_here(message, producer, sequence)

        def read(reply: dict[str, Any]) -> tuple[Mapping[str, Any], Position]:
            return reply["outcome"], Position(reply["position"])

        arguments = {"producer": producer, "sequence": sequence}
        step = _Step("control/broadcast", here, arguments, read, lambda: (cbor2.dumps(to_plain(message)),))
        outcome, position = await self._at_leader(None, step, deadline_s)
        await self._catch_up(position, deadline_s)
        return outcome

    async def refresh_catalog(self, *, patience_s: float = REFRESH_S) -> bool:
        """Bring this node's catalogue up to every change acknowledged before the call; return whether that worked."""
        if self._node.mesh is None:
            return True
        step = _barrier("control/barrier", None)
        try:
            async with asyncio.timeout(patience_s):
                position = await self._barrier(None, step, self._clock.monotonic_s() + patience_s)
                await self._node.control.wait_applied(position)  # here, to hear of a lack of time
        except (TimeoutError, Unavailable):
            return False
        return True

    # what else a shard's leader does

    def on_leader(self, method: str, function: LeaderHandler) -> None:
        """Serve a method for shards that this node leads: `function(shard, arguments)` returns plain data."""
        self._functions[method] = function
        if self._node.mesh is None:
            return

        async def serve(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
            host = await self._settled(arguments.get("shard"))
            if host is None or not host.is_leader:
                return _elsewhere(host)
            return {"reply": await function(ShardId(arguments["shard"]), arguments)}, ()

        self._node.mesh.serve(method, serve)

    async def ask_leader(
        self,
        method: str,
        shard_id: ShardId,
        arguments: Mapping[str, Any],
        *,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """Return what the leader's function for this method answers; it may be asked more than once."""

        async def here(host: Host) -> dict[str, Any]:
            if method not in self._functions:
                raise NoLeader(f"{self._me} is starting")
            return await self._functions[method](shard_id, arguments)

        def read(reply: dict[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = reply["reply"]
            return answer

        step = _Step(method, here, {**arguments, "shard": shard_id}, read, changes=False)
        return await self._at_leader(shard_id, step, deadline_s)

    # replicas

    def replicas_elsewhere(self, shard_id: ShardId, *, leader_first: bool = False) -> tuple[str, ...]:
        """Return the other nodes that have the shard, whom to ask first first. Those that are down come last."""
        peers = [one for one in self._node.replicas_of(shard_id) if one != self._me]
        return self.hedging.order(peers, self._known_leader(shard_id) if leader_first else None)

    async def pause(self, attempt: int, deadline_s: float) -> bool:
        """Wait a little, longer after each attempt; return whether there is time for another one."""
        pause_s = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2.0**attempt) * (0.5 + self._node.seams.dice.random())
        if self._clock.monotonic_s() + pause_s >= deadline_s:
            return False
        await asyncio.sleep(pause_s)
        return True

    def deadline_s(self, given_s: float | None = None) -> float:
        """Return when to give up: as given, or the client's time, or as long as a request may take."""
        if given_s is not None:
            return given_s
        scope = current.get()
        if scope is not None:
            return scope.deadline_s
        return self._clock.monotonic_s() + self._node.settings.api.request_timeout_s

    # leaders

    async def _barrier(self, shard_id: ShardId | None, step: _Step[Position], deadline_s: float) -> Position:
        if self._known_leader(shard_id) in (None, self._me):
            return await self._at_leader(shard_id, step, deadline_s)
        rounds = self._rounds.setdefault(shard_id, _Rounds())
        mine = rounds.join(lambda: self._at_leader(shard_id, step, self._clock.monotonic_s() + PATIENCE_S))
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                return await asyncio.shield(mine)
        except TimeoutError:
            raise NoLeader(f"{name_of(shard_id)} has a leader that does not answer: try again soon") from None

    async def _at_leader(self, shard_id: ShardId | None, step: _Step[T], deadline_s: float | None) -> T:
        """Do the step at the leader of a shard, or of the control group (None), wherever it is."""
        mesh = self._node.mesh
        if mesh is None:
            host = self._host(shard_id)
            assert host is not None, "a node without a mesh has every shard"
            return await step.here(host)
        deadline_s = self.deadline_s(deadline_s)
        patient_until_s = min(deadline_s, self._clock.monotonic_s() + PATIENCE_S)
        busy_until_s = self._clock.monotonic_s() + BUSY_S
        unsure = False
        attempt = 0
        why = "nobody leads it"
        while True:
            host = await self._settled(shard_id, deadline_s)
            leader = self._known_leader(shard_id) or await self._find_leader(shard_id, deadline_s)
            tried = False
            try:
                if leader == self._me and host is not None and host.is_leader:
                    tried = step.changes
                    async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                        return await step.here(host)
                elif leader is not None and leader != self._me and mesh.is_up(leader):
                    tried = step.changes
                    reply = await self._call_leader(shard_id, leader, step, deadline_s)
                    if "elsewhere" not in reply:
                        if step.changes:
                            self._node.metrics.routed(Routed.WRITE)
                        return step.read(reply)
                    tried = False
                    why = f"{leader} does not lead it"
                    self._note_leader(shard_id, reply["elsewhere"])
                    if reply["elsewhere"] not in ("", leader) and attempt == 0:
                        attempt = 1
                        continue
                elif leader is not None:
                    why = f"{leader}, which leads it, cannot be reached"
                    self._note_leader(shard_id, "")
            except (BadRequest, Conflict):
                raise  # decided, whichever attempt it was
            except Busy as error:
                if not unsure:
                    raise
                why = str(error)
            except NotLeader as error:  # here, before anything was proposed
                tried, why = False, str(error)
            except Overloaded as error:
                if not unsure and self._clock.monotonic_s() > busy_until_s:
                    raise
                tried, why = False, str(error)
            except _LEADER_LOST as error:
                why = str(error) or "time is up"
                self._note_leader(shard_id, "")
            except AnnulusError as error:
                if unsure:
                    raise OutcomeUnknown(f"it may have been made, look before you repeat; now {error}") from None
                raise
            unsure = unsure or tried
            attempt += 1
            self._node.metrics.routed(Routed.REPEAT)
            if not await self.pause(attempt, deadline_s if unsure else patient_until_s):
                break
        where = name_of(shard_id)
        if unsure:
            raise OutcomeUnknown(
                f"{where} has lost its leader, or is slow ({why}): it may have been made, look before you repeat"
            )
        done = "nothing was changed, " if step.changes else ""
        raise NoLeader(f"{where} has no leader that can be reached ({why}): {done}try again soon")

    async def _call_leader(
        self, shard_id: ShardId | None, leader: str, step: _Step[T], deadline_s: float
    ) -> dict[str, Any]:
        """Call the leader, and give up on it when another one is known to lead."""
        mesh = self._node.mesh
        assert mesh is not None
        blobs = step.blobs()
        size = sum(len(one) for one in blobs)
        link = Link.BULK if size >= BULK_BYTES_MIN else Link.SMALL
        timeout_s = max(0.0, deadline_s - self._clock.monotonic_s())
        call = asyncio.ensure_future(
            mesh.call(leader, step.method, step.arguments, blobs, timeout_s=timeout_s, link=link)
        )
        try:
            while not (await asyncio.wait({call}, timeout=WATCH_S))[0]:
                now = self._host_leader(shard_id) or await self._find_leader(shard_id, deadline_s)
                if now not in (None, leader):
                    raise NoLeader(f"{now} leads now, {leader} has not answered")
            return call.result()[0]
        finally:
            call.cancel()

    async def _settled(self, shard_id: ShardId | None, deadline_s: float = math.inf) -> Host | None:
        """Return the replica here, if there is one: once it is known who leads it, or after a moment."""
        if (host := self._host(shard_id)) is not None:
            await host.settle(min(SETTLE_S, deadline_s - self._clock.monotonic_s()))
        return self._host(shard_id)

    def _known_leader(self, shard_id: ShardId | None) -> str | None:
        host = self._host(shard_id)
        if host is not None:
            return host.leader
        return None if shard_id is None else self._leaders.get(shard_id)

    def _host_leader(self, shard_id: ShardId | None) -> str | None:
        host = self._host(shard_id)
        return None if host is None else host.leader

    async def _find_leader(self, shard_id: ShardId | None, deadline_s: float) -> str | None:
        """Ask the replicas of a shard that has none here who leads it; believe the one with the highest term."""
        mesh = self._node.mesh
        if shard_id is None or shard_id in self._node.shards or mesh is None:
            return None
        timeout_s = min(ASK_LEADER_S, max(0.0, deadline_s - self._clock.monotonic_s()))
        peers = [one for one in self._node.replicas_of(shard_id) if mesh.is_up(one)]
        calls = (mesh.call(one, "shard/leader", {"shard": shard_id}, timeout_s=timeout_s) for one in peers)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        known = [one[0] for one in answers if not isinstance(one, BaseException) and one[0]["elsewhere"]]
        leader = max(known, key=lambda one: int(one["term"]))["elsewhere"] if known else ""
        self._note_leader(shard_id, leader)
        return leader or None

    def _note_leader(self, shard_id: ShardId | None, leader: str) -> None:
        """Remember who leads a shard that has no replica here; "" for nobody known."""
        if shard_id is None or shard_id in self._node.shards:
            return
        if leader:
            self._leaders[shard_id] = leader
        else:
            self._leaders.pop(shard_id, None)

    def _host(self, shard_id: ShardId | None) -> Host | None:
        return self._node.control if shard_id is None else self._node.shards.get(shard_id)

    async def _catch_up(self, position: Position, deadline_s: float) -> None:
        """Let this node's catalogue apply a position, if there is time: the change is made all the same."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                await self._node.control.wait_applied(position)

    # steps

    def _proposal(
        self,
        method: str,
        shard_id: ShardId | None,
        message: Message,
        body: Body,
        producer: str,
        sequence: int,
        is_rest: bool = False,
    ) -> _Step[Written]:
        async def here(host: Host) -> Written:
            return await self._propose_here(host, message, body, producer, sequence, is_rest)

        arguments = {"shard": shard_id, "producer": producer, "sequence": sequence, "rest": is_rest}
        # The message may name very many keys, for which a header has no room.
        return _Step(method, here, arguments, _written, lambda: (cbor2.dumps(to_plain(message)), _as_bytes(body)))

    async def _propose_here(
        self,
        host: Host,
        message: Message,
        body: Body,
        producer: str,
        sequence: int,
        is_rest: bool = False,
        is_forwarded: bool = False,
    ) -> Written:
        if not isinstance(message, Insert):
            self._node.check_journal()
            return Written(*await host.propose(message, body, producer=producer, sequence=sequence))
        self._node.check_writable()
        admission, nbytes = self._node.admission, body.nbytes if isinstance(body, Batch) else len(body)
        key = await admission.take_rows(message.collection_id, nbytes, is_rest=is_rest, is_forwarded=is_forwarded)
        try:
            return Written(*await host.propose(message, body, producer=producer, sequence=sequence))
        finally:
            admission.give_rows(key, nbytes)

    async def _carry_out_here(
        self, message: Message, producer: str, sequence: int
    ) -> tuple[Mapping[str, Any], Position]:
        if isinstance(message, BeginDdl) and message.ddl == "create_collection":
            self._node.check_writable()
        carried = await self._node.broadcaster.carry_out(message, producer=producer, sequence=sequence)
        return carried.outcome, carried.position

    # what peers ask of this node

    async def _serve_propose(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        host = await self._settled(arguments["shard"])
        if host is None or not host.is_leader:
            return _elsewhere(host)
        message = self._message(peer, blobs[0])
        try:
            producer, sequence, is_rest = arguments["producer"], arguments["sequence"], bool(arguments.get("rest"))
            written = await self._propose_here(host, message, blobs[1], producer, sequence, is_rest, is_forwarded=True)
        except NotLeader:
            return _elsewhere(host)
        except NoLeader as error:
            raise OutcomeUnknown(str(error)) from None  # it was proposed, and may yet be decided
        outcome = written.outcome
        plain = [outcome.code, outcome.message] if isinstance(outcome, Rejected) else dict(outcome)
        return {"outcome": plain, "tick": written.tick, "position": written.position}, ()

    async def _serve_barrier(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        host = await self._settled(arguments["shard"])
        if host is None or not host.is_leader:
            return _elsewhere(host)
        try:
            return {"position": await host.barrier()}, ()
        except NoLeader:
            return _elsewhere(host)

    async def _serve_leader(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        return _elsewhere(self._host(arguments["shard"]))

    async def _serve_broadcast(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        control = await self._settled(None)
        if control is None or not control.is_leader:
            return _elsewhere(control)
        message = self._message(peer, blobs[0])
        try:
            outcome, position = await self._carry_out_here(message, arguments["producer"], arguments["sequence"])
        except NotLeader:
            return _elsewhere(control)
        except NoLeader as error:
            raise OutcomeUnknown(str(error)) from None
        return {"outcome": dict(outcome), "position": position}, ()

    def _message(self, peer: str, plain: Blob) -> Message:
        try:
            return from_plain(*cbor2.loads(plain))
        except (JournalDamaged, cbor2.CBORDecodeError, TypeError) as error:
            raise UnsupportedOperation(f"{self._me} runs another version than {peer}: {error}") from None


_LEADER_LOST: Final = (NoLeader, OutcomeUnknown, PeerUnreachable, TimeoutError)
"""After these a step is repeated, at whoever leads then."""


def name_of(shard_id: ShardId | None) -> str:
    """Return what messages call a group."""
    return "the control group" if shard_id is None else f"shard {shard_id}"


def _elsewhere(host: Host | None) -> Answer:
    """Return the answer of a node that does not lead: who does, as far as it knows, and in which term."""
    if host is None:
        return {"elsewhere": "", "term": 0}, ()
    return {"elsewhere": host.leader or "", "term": host.raft.term}, ()


def _barrier(method: str, shard_id: ShardId | None) -> _Step[Position]:
    async def here(host: Host) -> Position:
        return await host.barrier()

    return _Step(method, here, {"shard": shard_id}, lambda reply: Position(reply["position"]), changes=False)


def _as_bytes(body: Body) -> Blob:
    return body.to_bytes() if isinstance(body, Batch) else body


def _written(reply: dict[str, Any]) -> Written:
    outcome = reply["outcome"]
    return Written(
        Rejected(*outcome) if isinstance(outcome, list) else outcome, Tick(reply["tick"]), Position(reply["position"])
    )


def one_error(errors: Sequence[BaseException], *, partly: bool = False) -> BaseException:
    """Return one error for the parts of a request that failed; `partly` says that other changes were made.

    A refusal that a repeat would meet again goes first; then whatever says that something may have been done.
    """
    passing = [one for one in errors if isinstance(one, Unavailable) and not isinstance(one, Conflict)]
    if len(passing) < len(errors):
        return next(one for one in errors if one not in passing)
    text = "; ".join(one.message for one in passing)
    if partly:
        return OutcomeUnknown(f"a part of the request is done. {text}")
    worst = min(passing, key=lambda one: (not isinstance(one, OutcomeUnknown), isinstance(one, NoLeader)))
    return error_from(worst.code, text)
