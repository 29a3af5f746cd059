"""The machines of a simulated world and the real nodes on them: started, killed, cut apart, and made whole again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from errno import ENOSPC
from functools import partial
from random import Random
from typing import Any, Final, TypeVar

from cluster.checkpoint import manifest_key, referenced
from cluster.membership import Membership
from node.broadcaster import Step
from node.database import Database
from node.identity import IDENTITY_KEY, settle
from node.joining import admit, belonging
from node.metrics import Metrics
from node.node import Node, Seams
from node.placing import control_voters
from node.scope import Scope, current
from node.settings import (
    Address,
    ClusterSettings,
    CompactionSettings,
    HealingSettings,
    IndexSettings,
    NodeSettings,
    Peer,
    Settings,
    StorageSettings,
)
from storage.errors import StorageFault
from storage.keys import chunk_key
from storage.types import ShardId
from tests.sim.chunks import SimChunks
from tests.sim.disk import PowerLoss, SimDisk
from tests.sim.history import Violation
from tests.sim.network import SimNetwork, SimWire
from tests.sim.plan import Plan
from tests.sim.world import Life, SimClock, SimExecutor, SimLoop

T = TypeVar("T")

EPOCH_MS: Final = 1_700_000_000_000
RESTART_S: Final = 0.3
"""After a node has stopped by itself, for a reason that the world gave it."""


class NoAnswer(Exception):
    """The client does not know what became of its request."""


class Refused(Exception):
    """Nothing listens there: the request did not happen."""


class SimStore(SimChunks):
    """A chunk store on the same power line as the disk."""

    def __init__(self, rng: Random, disk: SimDisk) -> None:
        super().__init__(rng)
        self._disk = disk
        self.put_lately: set[bytes] = set()
        """Digests of chunks put in this life of the node."""

    def put_many(self, shard_id: ShardId, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        chunks = list(chunks)
        self.put_lately.update(digest for digest, _ in chunks)
        super().put_many(shard_id, chunks)

    def step(self) -> None:
        self._disk.step("chunk store")


@dataclass(eq=False)
class Machine:
    """One machine: its disk, clock and cables outlive the processes on it."""

    name: str
    rng: Random
    disk: SimDisk
    store: SimStore
    clock: SimClock
    life: Life | None = None
    node: Node | None = None
    database: Database | None = None
    """Set while the node serves."""
    executor: SimExecutor | None = None
    network: SimNetwork | None = None
    lives: int = 0
    excuses: set[str] = field(default_factory=set)
    """What the world did to it that a node may stop for, or lose data by."""
    stopping: bool = False
    dies_at: tuple[Step, int] | None = None
    """The step of the broadcaster at which the power goes, and how many of these come before it."""
    is_lost: bool = False
    """It never comes back."""

    @property
    def is_up(self) -> bool:
        return self.life is not None

    def lose_disk(self) -> None:
        """Put an empty disk in place of this one."""
        self.disk = SimDisk(self.rng)
        self.store = SimStore(self.rng, self.disk)

    def set_aside(self, settings: Settings, *, remembers: bool) -> None:
        """Do what the process does about damaged data when told to (node/repair.py), or what an operator does."""
        identity = settle(self.store.read(IDENTITY_KEY), settings.node).unseated()
        self.lose_disk()
        if remembers:
            self.store.commit([(IDENTITY_KEY, identity.to_bytes())])


class Cluster:
    """All machines, and what happens to them. A method that ends a process returns when it is over."""

    def __init__(self, loop: SimLoop, plan: Plan) -> None:
        self.loop, self.plan = loop, plan
        self.wire = SimWire(loop, self.dice("wire"))
        self.violations: asyncio.Queue[Violation] = asyncio.Queue()
        self._context = copy_context()
        self.machines = {name: self._machine(name) for name in plan.names}
        self.names = list(plan.names)
        """The nodes that clients know: those that formed the cluster or joined it, and have not been removed."""
        self.damaged: set[str] = set()
        """Machines of these that lost something at some time."""
        self.leaving: set[str] = set()
        """Nodes that the cluster was told to remove, or has removed."""
        self._guests: dict[str, Address] = {}
        """Peer addresses of the nodes that joined."""
        self._zones = {name: f"z{i % plan.zones}" if plan.zones else "" for i, name in enumerate(plan.names)}
        self.dead_after_s = plan.dead_after_s

    def dice(self, *what: object) -> Random:
        """Return the dice of one part of the world, which others do not touch."""
        return Random(" ".join(map(str, (self.plan.seed, *what))))

    def _machine(self, name: str) -> Machine:
        rng = self.dice("machine", name)
        disk = SimDisk(self.dice("disk", name))
        error_ms = rng.randint(-self.plan.clock_error_ms, self.plan.clock_error_ms)
        drift = rng.randint(-self.plan.clock_drift_ppm, self.plan.clock_drift_ppm) / 1e6
        clock = SimClock(self.loop, epoch_ms=EPOCH_MS + error_ms, rate=1 + drift)
        return Machine(name, rng, disk, SimStore(self.dice("chunks", name), disk), clock)

    async def join(self, name: str, by: str, *, zone: str = "", replaces: str = "") -> None:
        """Start a node on a machine of its own, after another has let it in, as the process does (`node/joining.py`).

        Raises what it is refused for, NoAnswer if the other one dies; with the same name again it is the same node.
        """
        if name not in self._guests:
            if name not in self.machines:
                self.machines[name] = self._machine(name)
            self._guests[name] = Address("127.0.0.1", 20_000 + len(self.machines))
            self._zones[name] = zone
        machine = self.machines[name]
        ticket = f"ticket of {name}"
        question = {
            "peer": str(self._guests[name]), "client": "", "zone": zone, "replaces": replaces, "ticket": ticket,
        }  # fmt: skip
        life, node = self.machines[by].life, self.machines[by].node
        if life is None or node is None:
            raise Refused(by)
        asked = life.start(admit(node, name, question))
        waiting: set[asyncio.Future[Any]] = {asked, life.ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise NoAnswer(by)
        machine.store.commit([(IDENTITY_KEY, belonging(name, ticket, asked.result()).to_bytes())])
        self.names.append(name)
        self.start(name)

    def lose(self, name: str) -> None:
        """A machine and its disk are gone for good."""
        machine = self.machines[name]
        machine.is_lost = True
        self.kill(name, power=True)
        machine.lose_disk()

    def dismiss(self, name: str) -> None:
        """Clients learn that a node is none of the cluster any more. Its process may run on."""
        if name in self.names:
            self.names.remove(name)
        self.damaged.discard(name)

    def zone_of(self, name: str) -> str:
        return self._zones[name]

    def is_guest(self, name: str) -> bool:
        return name in self._guests

    # processes

    def start(self, name: str) -> None:
        """Start a process on a machine that has none."""
        machine = self.machines[name]
        assert not machine.is_up
        machine.lives += 1
        life = machine.life = Life(self.loop, f"{name}.{machine.lives}")
        machine.executor = SimExecutor(self.dice("executor", life.name))
        machine.network = SimNetwork(self.wire, name, life)
        machine.stopping = False
        machine.store.put_lately.clear()
        if not machine.store.full:
            machine.store.reopen()
        machine.node = None
        life.start(self._process(machine, life))

    async def _process(self, machine: Machine, life: Life) -> None:
        error: BaseException | None = None
        try:
            node = machine.node = Node(self.settings(machine.name), self._seams(machine, life), Metrics())
            node.broadcaster.on_step = partial(self._at_step, machine, life)
            starting: asyncio.Future[Any] = asyncio.ensure_future(node.start())
            both: set[asyncio.Future[Any]] = {starting, node.failed}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not node.failed.done():
                starting.result()
                machine.database = Database(node)
                if self.plan.nodes == 1:
                    self.check_chunks(machine)
            error = await node.failed
        except BaseException as caught:
            error = caught
        self.loop.call_soon(self._stopped_by_itself, machine, life, error, context=self._context.copy())

    def _stopped_by_itself(self, machine: Machine, life: Life, error: BaseException | None) -> None:
        if machine.life is not life or machine.stopping:
            return
        self.kill(machine.name, power=False)
        began = machine.node is not None and bool(machine.node.shards)
        if isinstance(error, OSError) and error.errno == ENOSPC and not began:
            self.loop.call_later(RESTART_S, self.start_if_down, machine.name)  # a full disk keeps a node from starting
            return
        if not machine.excuses:
            violation = Violation(f"{machine.name} stopped by itself at {self.loop.now_s:.3f}: {error!r}")
            violation.__cause__ = error
            self.violations.put_nowait(violation)
            return
        if isinstance(error, StorageFault) and "damage" in machine.excuses:
            # Who joined could not do so again under its name.
            remembers = bool(self.plan.repair) or self.is_guest(machine.name)
            machine.set_aside(self.settings(machine.name), remembers=remembers)
        self.loop.call_later(RESTART_S, self.start_if_down, machine.name)

    def start_if_down(self, name: str) -> None:
        """Start a process again where one was. A machine that nobody has let in yet never had one."""
        machine = self.machines[name]
        if machine.lives and not machine.is_up and not machine.is_lost:
            self.start(name)

    def kill(self, name: str, *, power: bool) -> None:
        """End the process at once; with the power, what was not synced is lost too, or torn."""
        machine = self.machines[name]
        life, executor, network = machine.life, machine.executor, machine.network
        if life is None or executor is None or network is None:
            return
        life.end()
        executor.dead = True
        self.wire.leave(network, silently=power and machine.rng.random() < 0.5)
        if power:
            machine.disk.crash()
            machine.store.crash()
        else:
            machine.disk.kill()
        machine.life = machine.database = None

    def kill_in_a_call(self, name: str, calls: int) -> None:
        """Let the power go in the middle of a disk call, after so many of them."""
        machine, life = self.machines[name], self.machines[name].life
        if life is None:
            return

        def lost() -> None:
            if not life.is_over:
                life.end()
                self.loop.call_soon(self._power_lost, machine, life, context=self._context.copy())

        machine.disk.on_power_loss = lost
        machine.disk.power_loss_at = machine.disk.steps + calls

    def kill_at_step(self, name: str, step: Step, after: int = 0) -> None:
        """Let the power go when the node's broadcaster comes to this step, after so many times."""
        self.machines[name].dies_at = (step, after)

    def _at_step(self, machine: Machine, life: Life, step: Step) -> None:
        if machine.dies_at is None or machine.dies_at[0] is not step or machine.life is not life:
            return
        if machine.dies_at[1]:
            machine.dies_at = (step, machine.dies_at[1] - 1)
            return
        machine.dies_at = None
        life.end()
        self.loop.call_soon(self._power_lost, machine, life, context=self._context.copy())
        raise PowerLoss(step)

    def _power_lost(self, machine: Machine, life: Life) -> None:
        if machine.life is life:
            self.kill(machine.name, power=True)

    async def stop(self, name: str, *, within_s: float) -> bool:
        """Stop the node gracefully; return whether it ended by itself in time. Raises Violation if chunks are left."""
        machine = self.machines[name]
        life, node = machine.life, machine.node
        if life is None or node is None or machine.database is None:
            return False
        machine.database, machine.stopping = None, True
        stopping = life.start(node.stop())
        await asyncio.wait({stopping, life.ended}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if machine.life is not life:
            return False
        in_time = stopping.done()
        if in_time:
            stopping.result()
            if not node.failed.done():
                self.check_chunks(machine)
        self.kill(name, power=False)
        return in_time

    # requests

    def ready(self) -> list[str]:
        return [name for name in self.names if self.machines[name].database is not None]

    async def ask(
        self, name: str, request: Callable[[Database], Awaitable[T]], *, scope: Scope | None = None, within_s: float
    ) -> T:
        """Return what the node answers. Raises NoAnswer if it dies or time is up, Refused if it does not serve."""
        machine = self.machines[name]
        life, database = machine.life, machine.database
        if life is None or database is None:
            raise Refused(name)

        async def serve() -> T:
            current.set(scope or Scope(machine.clock.monotonic_s() + within_s))
            return await request(database)

        if scope is not None:
            scope.deadline_s = machine.clock.monotonic_s() + within_s
        asked = life.start(serve())
        waiting: set[asyncio.Future[Any]] = {asked, life.ended}
        # A client waits a little longer than it says, for the server to say that time is up.
        await asyncio.wait(waiting, timeout=within_s + 0.5, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            if not life.is_over:
                asked.cancel()
            raise NoAnswer(name)
        if asked.cancelled():
            raise NoAnswer(name)
        return asked.result()

    # facts

    def settings(self, name: str) -> Settings:
        plan = self.plan
        peers = tuple(Peer(one, Address("127.0.0.1", 20_000 + i)) for i, one in enumerate(plan.names))
        return Settings(
            node=NodeSettings(
                data="/data",
                name=name,
                shards=plan.shards,
                peers=peers if plan.nodes > 1 and name not in self._guests else (),
                peer_listen=self._guests.get(name),
                zone=self._zones[name],
                replication_factor=plan.copies if name not in self._guests else None,
                cluster_secret="a secret of the simulation" if plan.nodes > 1 else "",
            ),
            storage=StorageSettings(
                segment_bytes_max=plan.segment_bytes_max,
                segment_age_s_max=plan.segment_age_s_max,
                segment_idle_s_max=plan.segment_idle_s_max,
                growing_bytes_max=plan.growing_bytes_max,
                checkpoint_interval_s=plan.checkpoint_interval_s,
                journal_file_bytes_max=plan.journal_file_bytes_max,
                journal_bytes_max=131_072,
                disk_reserve_bytes=0,
            ),
            compaction=CompactionSettings(segments_min=2, interval_s=0.5, deleted_ratio=plan.deleted_ratio),
            index=IndexSettings(build_threads=1, rows_min=plan.index_rows_min),
            healing=self._healing(),
            cluster=ClusterSettings(repair_from_peers=bool(plan.repair), dead_after_s=self.dead_after_s),
        )

    def _healing(self) -> HealingSettings:
        every_s = self.plan.heal_s
        return (
            HealingSettings(compare_interval_s=every_s, scrub_interval_s=2 * every_s) if every_s else HealingSettings()
        )

    def _seams(self, machine: Machine, life: Life) -> Seams:
        assert machine.executor is not None
        dice = self.dice("node", life.name)
        network = machine.network if self.plan.nodes > 1 else None
        return Seams(machine.disk, machine.store, machine.executor, machine.clock, dice, network=network)

    def membership(self) -> Membership:
        """Return the newest that any node that serves knows; empty if none does."""
        known = (node.control.machine.membership for _, node in self.nodes() if node.takes_part)
        return max(known, key=lambda one: one.epoch, default=Membership())

    @property
    def is_formed(self) -> bool:
        """A cluster does not form while one of those that are to form it has forgotten what it promised."""
        nodes = [self.machines[name].node for name in self.names]
        return all(node is not None and node.identity.is_seated for node in nodes) and bool(self.membership().members)

    def may_lose(self, names: Sequence[str]) -> bool:
        """Whether what was acknowledged survives it if these machines lose what they have."""
        if not self.is_formed:
            return False
        lost = self.damaged.union(names)
        if not self.plan.churn:
            return len(lost) <= (self.plan.copies - 1) // 2
        return all(2 * len(lost.intersection(members)) < len(members) for members in self._electorates())

    def _electorates(self) -> Iterator[Collection[str]]:
        """Yield the members of every generation that is, was a moment ago, or may be next, as any node knows it."""
        for machine in self.machines.values():
            if (node := machine.node) is None or not node.takes_part:
                continue
            membership, voters = node.control.machine.membership, node.placing.control_voters
            yield from (voters, control_voters(membership, voters))
            for placed in membership.placements.values():
                yield from (members for members in (placed.members, placed.following) if members)
            for host in node.shards.values():
                yield from (members for members in (host.machine.generation.members,) if members)

    def nodes(self) -> Iterator[tuple[Machine, Node]]:
        """Yield the machines of the cluster whose nodes serve."""
        for machine in map(self.machines.__getitem__, self.names):
            if machine.database is not None and machine.node is not None:
                yield machine, machine.node

    def check_chunks(self, machine: Machine) -> None:
        """The store holds what the manifests need and, once swept, nothing from before this life that nobody needs."""
        assert machine.node is not None
        for shard_id, host in machine.node.shards.items():
            manifest = machine.store.read(manifest_key(shard_id))
            needed = set() if manifest is None else {digest for _, digest in referenced(manifest)}
            present = set(machine.store.chunk_digests(shard_id))
            where = f"{machine.name} shard {shard_id}"
            missing = {one for one in needed - present if chunk_key(shard_id, one) not in machine.store.lost}
            if missing:
                raise Violation(f"{where}: {len(missing)} chunks of the manifest are missing")
            known = host.machine.digests.keys() | host.machine.garbage | machine.store.put_lately
            if machine.node.upkeep[shard_id].checkpoints.swept and (orphans := present - needed - known):
                raise Violation(f"{where}: {len(orphans)} chunks that nothing needs are left")

    def close(self) -> None:
        for machine in self.machines.values():
            machine.disk.on_power_loss = lambda: None
            if machine.executor is not None:
                machine.executor.dead = True
