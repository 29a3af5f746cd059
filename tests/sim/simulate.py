"""A cluster in a simulated world: clients write, read and change the catalogue, the world breaks, all from a seed.

One world has 1, 3 or 5 nodes: the real code of the node on simulated clocks, disks, chunk stores, executors and cables,
in one event loop. What is checked:

  1. every acknowledged write is there in the end, with its values, exactly once, and nothing that was never asked for;
  2. Strong reads are those of one copy; Session, Bounded and Eventually keep what they promise (tests/sim/history.py);
  3. a request whose outcome nobody heard is there wholly or not at all, per shard;
  4. a search returns min(limit, live rows) of the live rows, and a filter those that it is true of, whatever indexes
     there are;
  5. replicas agree: equal positions hold equal entries, ticks and states, and ticks ascend (tests/sim/witness.py);
  6. one node leads a group in a term;
  7. when the faults have ended, every node serves again within a bounded time, and all replicas become equal;
  8. after a graceful stop, the chunk store holds what the manifests need, and nothing else;
  9. a change of the catalogue is made once and as a whole, on every shard and in every catalogue, however often it is
     asked for and wherever the coordinator dies (tests/sim/architect.py, agreement.py);
 10. no node stops by itself, nor says that something went wrong inside, but for a reason that the world gave it;
 11. where nodes come and go (tests/sim/steward.py), each shard has one valid configuration at any moment, and in the
     end all its copies, on nodes that belong to the cluster, and nothing moves any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final, TypeVar
from unittest.mock import patch

from cluster.control import CONTROL_GROUP
from cluster.machine import StateMachine
from cluster.membership import MemberState, Placement
from cluster.planner import plan
from node import words
from node.checkpoints import SWEEP_AFTER_S
from node.database import Database
from node.group import GroupHost
from node.node import Node
from node.placing import control_voters
from node.replicas import group_of
from node.scrub import Scrub
from node.service import Consistency, ReadOptions
from storage import view
from storage.errors import AnnulusError, Unavailable
from storage.types import ShardId
from tests.sim.agreement import disagreements
from tests.sim.cluster import Cluster, NoAnswer, Refused
from tests.sim.disk import PowerLoss
from tests.sim.faults import STOP_S, Faults
from tests.sim.history import History, Version, Violation
from tests.sim.invariants import Ending, Moments, check_ending
from tests.sim.plan import Plan, plan_of
from tests.sim.witness import Witness
from tests.sim.workload import COLLECTIONS, REQUEST_S, Workload, batch_of, versions_of
from tests.sim.world import LIFE, SimLoop, close, run

T = TypeVar("T")

LOOK_S: Final = 0.1
HEAL_S: Final = 40.0
"""Within this time of the last fault every node serves reads and writes again."""
CHURN_S: Final = 150.0
"""And within this, nodes that were to come or go have done so, and shards are where they are to be."""
SETTLE_S: Final = 60.0
"""And within this, all replicas are equal."""
LIFE_S: Final = 1_800.0
"""A world ends within this: who asks until there is an answer gets one."""
LEAD_S: Final = 2.0
"""A leadership is handed over within this, or another is won."""
HEAL_KEYS: Final = 2_000_000


@dataclass
class Summary:
    """What happened in a world that kept its promises."""

    seed: int
    nodes: int
    requests: int
    failed: int
    writes: int
    reads: int
    faults: int
    lives: int
    churned: int
    """Nodes that came, went, or were lost."""
    compared: int
    """Whole states that were compared with another replica's, or with an earlier life's."""
    simulated_s: float
    callbacks: int


class Simulation:
    """One plan's run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.loop = SimLoop()
        self.witness = Witness()
        self.cluster = Cluster(self.loop, plan)
        jumps_ms = 200 if plan.nodes > 1 else 60_000
        clock_error_s = (2 * plan.clock_error_ms + jumps_ms) / 1000 + plan.clock_drift_ppm * 2e-4
        self.history = History(COLLECTIONS, clock_error_s=clock_error_s)
        self.workload = Workload(self.cluster, self.history)
        self.faults = Faults(self.cluster, plan)
        self._moments = Moments(self.cluster)
        self._rest: Mapping[ShardId, Placement] = {}
        """Where the shards were when they had come to rest."""

    def run(self) -> Summary:
        """Live through the plan; raise Violation if a promise is broken."""
        try:
            with self.witness.watching(), _Alarms(self.cluster).listening(), _thresholds(self.plan):
                run(self.loop, self._main())
        except Exception as error:
            raise self.witness.violation or error from error
        finally:
            self.cluster.close()
            close(self.loop)
        return Summary(
            seed=self.plan.seed,
            nodes=self.plan.nodes,
            requests=self.workload.requests,
            failed=self.workload.failed,
            writes=len(self.history.writes),
            reads=len(self.history.reads),
            faults=self.faults.done,
            lives=sum(one.lives for one in self.cluster.machines.values()),
            churned=len(self.workload.steward.done),
            compared=self.witness.compared,
            simulated_s=self.loop.now_s,
            callbacks=self.loop.callbacks,
        )

    async def _main(self) -> None:
        looking = self.loop.create_task(self._look())
        broken = self.loop.create_task(self.cluster.violations.get())
        living = self.loop.create_task(self._live())
        both: set[asyncio.Future[Any]] = {living, broken, looking}
        done, _ = await asyncio.wait(both, timeout=LIFE_S, return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            raise broken.result()
        if looking.done():
            looking.result()
        if not done:
            raise Violation(f"after {LIFE_S} s somebody still waits for an answer: {self._state()}")
        living.result()

    async def _live(self) -> None:
        for name in self.plan.names:
            self.cluster.start(name)
        doing = [*self.workload.start(self.plan.steps), *self.faults.start(self.plan.steps)]
        # The first failure counts; the rest would only wait for what will not come.
        await asyncio.gather(*doing)
        await self._heal()
        await self._find_rest()
        await self._settle()
        if self.plan.heal_s:
            await self._look_at_chunks()
        rng = self.cluster.dice("end")
        await self._check_end(rng)
        if rng.random() < 0.4:
            await self._power_cut(rng)
            await self._check_end(rng)
        if self.plan.nodes > 1 and rng.random() < 0.1:
            await asyncio.sleep(1.2 * SWEEP_AFTER_S)
        for name in rng.sample(self.cluster.names, len(self.cluster.names)):
            if not await self.cluster.stop(name, within_s=STOP_S):
                raise Violation(f"{name} does not stop within {STOP_S} s")

    async def _check_end(self, rng: Random) -> None:
        found = await self._read_everything()
        await self._be_led()
        architect = self.workload.architect
        await check_ending(Ending(self.cluster, self.history, architect, rng, found, self.witness.compare, self._rest))

    async def _be_led(self) -> None:
        """Leaderships are evened out at any time: wait while one is handed over. Later the check finds who has none."""
        until_s = self.loop.now_s + LEAD_S
        while self.loop.now_s < until_s:
            leading = [
                shard for _, node in self.cluster.nodes() for shard, host in node.shards.items() if host.is_leader
            ]
            if sorted(leading) == list(range(self.plan.shards)):
                return
            await asyncio.sleep(LOOK_S)

    async def _power_cut(self, rng: Random) -> None:
        for name in self.cluster.names:
            self.cluster.kill(name, power=True)
        for name in self.cluster.names:
            self.cluster.start(name)
        await self._heal()
        await self._find_rest()
        await self._settle()

    async def _look_at_chunks(self) -> None:
        """Have every node read its chunks; raise Violation if one is lost, or damaged after it was made good."""
        for name in self.cluster.names:
            machine = self.cluster.machines[name]
            node, life = machine.node, machine.life
            assert node is not None and life is not None
            for last in (False, True):
                scrub = Scrub()
                await life.start(node.healing.scrubber.run(scrub, bytes_per_s=0, again=lambda: True))
                if scrub.left or (last and scrub.damaged):
                    raise Violation(f"{name} has damaged chunks: {scrub}")

    # becoming whole

    async def _heal(self) -> None:
        """End all faults; raise Violation unless every node then serves again in time."""
        cluster = self.cluster
        cluster.wire.mend()
        for machine in cluster.machines.values():
            machine.store.full, machine.disk.capacity_bytes, machine.disk.failing_syncs = False, None, 0
            machine.disk.power_loss_at = None
        for name in cluster.names:
            cluster.start_if_down(name)
        if self.plan.churn:
            await self._finish_churn()
        until_s = self.loop.now_s + HEAL_S
        await asyncio.gather(*(self._serves(name, i, until_s) for i, name in enumerate(cluster.names)))

    async def _finish_churn(self) -> None:
        finishing = self.loop.create_task(self.workload.steward.finish())
        await asyncio.wait({finishing}, timeout=CHURN_S)
        if not finishing.done():
            story = ", ".join(self.workload.steward.done)
            raise Violation(f"{CHURN_S} s after the last fault nodes have yet to come or go ({story}): {self._state()}")
        finishing.result()

    async def _find_rest(self) -> None:
        """Where there are peers: wait until nothing has anywhere to move to."""
        until_s = self.loop.now_s + CHURN_S
        while self.plan.nodes > 1 and (why := unrest(self.cluster)):
            if self.loop.now_s > until_s:
                raise Violation(f"{CHURN_S} s after the last change {why}: {self._state()}")
            await asyncio.sleep(LOOK_S)

    async def _serves(self, node: str, number: int, until_s: float) -> None:
        """Write and read through one node until that works."""
        for name in COLLECTIONS:
            for version in range(1_000):
                if self.loop.now_s > until_s:
                    raise Violation(f"{HEAL_S} s after the last fault {node} does not serve yet: {self._state()}")
                try:
                    await self._write_and_read(node, name, HEAL_KEYS + number)
                except (Unavailable, NoAnswer, Refused):
                    await asyncio.sleep(0.2 + 0.01 * (version % 7))
                else:
                    break

    async def _write_and_read(self, node: str, name: str, key: int) -> None:
        version = self.workload.next_version()
        made = self.history.write(node, name, {key: version}, self.loop.now_s)
        try:
            await self._ask(node, lambda database: database.upsert("default", name, batch_of({key: version})))
        except Refused:
            self.history.refuse(made)
            raise
        self.history.acknowledge(made, self.loop.now_s)
        await self._read(node, name, Consistency.STRONG, [key])

    async def _read(self, node: str, name: str, level: Consistency, keys: Sequence[int]) -> dict[int, Version]:
        """Return what all keys hold, and the given ones in any case; noted as a read of them."""
        options = ReadOptions(output_fields=["*"], consistency=level)
        called = self.history.moment(self.loop.now_s)
        rows = await self._ask(node, lambda database: database.query("default", name, options, limit=0, offset=0))
        rows_found = versions_of(rows)
        found: dict[int, Version] = {key: rows_found.get(key) for key in {*keys, *rows_found}}
        self.history.read(node, name, level, found, called, self.loop.now_s)
        return found

    async def _ask(self, node: str, request: Callable[[Database], Awaitable[T]]) -> T:
        return await self.cluster.ask(node, request, within_s=REQUEST_S)

    async def _settle(self) -> None:
        """Wait until all replicas of each group are at the same position; raise Violation if they are not equal."""
        until_s = self.loop.now_s + SETTLE_S
        for group in range(self.plan.shards + 1):
            while not (replicas := self._at_one_position(group)):
                if self.loop.now_s > until_s:
                    raise Violation(f"replicas of group {group} do not become equal: {self._state()}")
                await asyncio.sleep(LOOK_S)
            for machine in replicas:
                self.witness.compare(machine, anew=True)
        self._rest = dict(self.cluster.membership().placements)
        while wrong := self._disagreements():
            if self.loop.now_s > until_s:
                raise Violation("catalogue and shards do not agree: " + "; ".join(wrong))
            await asyncio.sleep(LOOK_S)

    def _disagreements(self) -> list[str]:
        return [f"{machine.name}: {text}" for machine, node in self.cluster.nodes() for text in disagreements(node)]

    def _at_one_position(self, group: int) -> list[StateMachine]:
        hosts = [hosts[group] for _, node in self.cluster.nodes() if group in (hosts := _hosts(node))]
        wanted = len(self.cluster.names) if group == CONTROL_GROUP else self.plan.copies
        if len(hosts) != wanted or len({host.machine.position for host in hosts}) != 1:
            return []
        if len({host.generation for host in hosts}) != 1 or any(host.is_over for host in hosts):
            return []
        if group != CONTROL_GROUP and any(host.raft.is_learner for host in hosts):
            return []  # of a move under way
        if hosts[0].machine.position != max(host.raft.last_position for host in hosts):
            return []
        return [host.machine for host in hosts]

    async def _read_everything(self) -> dict[str, dict[int, Version]]:
        """Return collection -> what all keys hold, as every node answers it at Strong. Other levels are asked too."""
        result: dict[str, dict[int, Version]] = {}
        for name in COLLECTIONS:
            keys = self.history.keys(name)
            for node in self.cluster.names:
                found = await self._patiently(node, name, Consistency.STRONG, keys)
                if found != result.setdefault(name, found):
                    raise Violation(f"{name}: nodes answer differently when all is quiet: {found} and {result[name]}")
                for level in (Consistency.BOUNDED, Consistency.EVENTUALLY):
                    await self._patiently(node, name, level, keys)
        return result

    async def _patiently(self, node: str, name: str, level: Consistency, keys: Sequence[int]) -> dict[int, Version]:
        for _ in range(20):
            try:
                return await self._read(node, name, level, keys)
            except (Unavailable, NoAnswer, Refused):
                await asyncio.sleep(0.2)
        raise Violation(f"{name}: {node} does not answer at {level} though nothing is broken: {self._state()}")

    # all the time

    async def _look(self) -> None:
        """Check what must hold at every moment."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.witness.violation:
                raise self.witness.violation
            self._moments.check()

    def _state(self) -> str:
        """Return where everybody is, for a violation's text."""
        lines = []
        membership = self.cluster.membership()
        for name, machine in self.cluster.machines.items():
            node = machine.node
            if machine.database is None or node is None:
                lines.append(f"{name} {'starting' if machine.is_up else 'lost' if machine.is_lost else 'down'}")
                continue
            if why := node.why_not_ready:
                lines.append(f"{name} {why}")
            for group, host in _hosts(node).items():
                raft = host.raft
                place = f"applied {host.machine.position} delivered {raft.delivered} of {raft.last_position}"
                role = f"leader {raft.leader} leads {raft.leads} learns {raft.is_learner} whole {host.is_whole}"
                role = f"generation {host.generation} over {host.is_over} {role}"
                lines.append(f"{name} group {group} term {raft.term} {role} {place}")
        lines += [f"{one}" for one in membership.members.values()]
        lines += [f"shard {shard} {one}" for shard, one in membership.placements.items()]
        return "\n    ".join(["", *lines])


def unrest(cluster: Cluster) -> str:
    """Return what has yet to come to rest in a cluster whose nodes came and went; "" if nothing has."""
    membership = cluster.membership()
    moving = [shard for shard, placed in membership.placements.items() if placed.following]
    if moving:
        return f"shards {moving} are on the move"
    if set(membership.members) != set(cluster.names):
        return f"the cluster says it is {sorted(membership.members)}, not {sorted(cluster.names)}"
    if idle := [one.name for one in membership.members.values() if one.state is not MemberState.ACTIVE]:
        return f"nodes {idle} are not active"
    for machine, node in cluster.nodes():
        if not node.takes_part or node.control.machine.membership.epoch != membership.epoch:
            return f"{machine.name} does not know the newest membership"
        voters = node.placing.control_voters
        if set(voters) != set(control_voters(membership, voters)):
            return f"{sorted(voters)} vote in the control group"
    leading = [node.coordinator for _, node in cluster.nodes() if node.control.is_leader]
    if not leading:
        return "there is no coordinator"
    health, limits = leading[0].health(), leading[0].limits
    if away := [name for name in cluster.names if name not in health or not health[name].is_up]:
        return f"the coordinator does not see nodes {away}"
    if young := [name for name in cluster.names if health[name].for_s < limits.steady_s]:
        return f"nodes {young} have just come"
    return "the coordinator has moves to make" if plan(membership, health, {}, limits).moves else ""


def _hosts(node: Node) -> dict[int, GroupHost[Any]]:
    """Return the replicas on a node by group; none while it has yet to find its place."""
    if not node.takes_part:
        return {}
    return {CONTROL_GROUP: node.control, **{group_of(shard_id): host for shard_id, host in node.shards.items()}}


class _Alarms(logging.Handler):
    """Hears the nodes say that something went wrong inside."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(logging.ERROR)
        self._cluster = cluster

    def emit(self, record: logging.LogRecord) -> None:
        life = LIFE.get(None)
        if life is None or life.is_over or record.levelno >= logging.CRITICAL:  # what stops a node is heard anyway
            return
        machine = self._cluster.machines[life.name.partition(".")[0]]
        error = record.exc_info[1] if record.exc_info else None
        if machine.name in self._cluster.leaving and machine.node is not None and machine.node.known.why_not_ready:
            return  # it says that it was removed
        if machine.excuses or record.msg.startswith("read-only") or isinstance(error, PowerLoss):
            return
        text = f"{machine.name} complains at {self._cluster.loop.now_s:.3f}: {record.getMessage()}"
        self._cluster.violations.put_nowait(Violation(f"{text}: {error!r}" if error else text))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear everything of level ERROR; keep quieter things from being made at all, unless somebody reads them."""
        root = logging.getLogger()
        root.addHandler(self)
        try:
            yield
        finally:
            root.removeHandler(self)


@contextmanager
def _thresholds(plan: Plan) -> Iterator[None]:
    """Where fields are indexed: have the small segments of a world use their indexes, and keep lists of their words."""
    with ExitStack() as stack:
        for module, name in ((view, "ROWS_MIN"), (words, "ROWS_KEPT_MIN")) if plan.indexed else ():
            stack.enter_context(patch.object(module, name, 1))
        yield


def simulate(seed: int, *, nodes: int | None = None) -> Summary:
    """Run one seed; raise Violation, naming the seed, if a promise is broken."""
    return play(plan_of(seed, nodes=nodes))


def play(plan: Plan) -> Summary:
    """Run one plan; raise Violation, naming its seed, if a promise is broken."""
    quiet = logging.root.manager.disable
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.disable(logging.WARNING)
    try:
        return Simulation(plan).run()
    except Violation as violation:
        raise Violation(f"seed {plan.seed}: {violation}") from violation
    except (AnnulusError, AssertionError, RuntimeError, ExceptionGroup) as error:
        raise Violation(f"seed {plan.seed}: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(quiet)
