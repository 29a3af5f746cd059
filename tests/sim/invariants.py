"""What is promised, by the names of the specification: name -> what looks after it, in a world that is simulated.

    IN_EVERY_LOG      of each entry, when the first replica applies it, and of its effect on that replica
    AT_EVERY_MOMENT   of the nodes as they are, again and again
    IN_THE_END        when all faults are over, all nodes serve, and nothing is on the move

A check yields what is wrong, or raises it. One check may stand for several names; it is then made once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Final

import numpy as np

from cluster.control import Control
from cluster.machine import Acknowledge, Rejected, StateMachine
from cluster.membership import Membership, MemberState, Placement
from cluster.message import Compacted, Entry, Flushed, Handover, Indexed, Seal, SealAll
from cluster.route import channel_of
from cluster.shard import CollectionState, Shard
from node.database import Database
from node.node import Node
from node.service import Consistency, ReadOptions
from storage.errors import StorageFault
from storage.types import Position, ShardId
from storage.view import SegmentView
from storage.word_files import stored_words
from tests.sim.agreement import disagreements
from tests.sim.architect import Architect
from tests.sim.cluster import Cluster
from tests.sim.history import History, Version, Violation
from tests.sim.order import Order
from tests.sim.workload import filters_of, versions_of

COUNT_S: Final = 4.0

Rows = frozenset[tuple[int, Any, int]]
"""(collection, key, tick) of live rows."""


# in every log


@dataclass
class Before:
    """What a replica was before it applied an entry."""

    tick: int
    generation: int
    epoch: int
    placements: Mapping[ShardId, Placement]
    known: bool
    """Whether it had applied the entry's producer and sequence before."""
    extent: Any
    """Its collections and their partitions."""
    files: Any
    """Of the segment that the entry says is flushed, if it was flushed already."""
    rows: Rows | None
    """Its live rows, where the entry must not change them; None where it may, or they cannot be read."""

    @classmethod
    def of(cls, machine: StateMachine, entry: Entry, *, is_new: bool) -> Before:
        membership = machine.membership if isinstance(machine, Control) else Membership()
        keeps_rows = is_new and isinstance(entry.message, Seal | SealAll | Flushed | Indexed | Compacted)
        return cls(
            machine.tick,
            machine.generation.number,
            membership.epoch,
            dict(membership.placements),
            (entry.producer, entry.sequence) in machine._outcomes,
            _extent(machine),
            _files(machine, entry),
            live_rows(machine) if keeps_rows and isinstance(machine, Shard) else None,
        )


@dataclass
class Step:
    """An entry that was applied."""

    machine: StateMachine
    position: Position
    entry: Entry
    done: Acknowledge
    before: Before


@dataclass
class Logs:
    """What the logs of one world have said so far."""

    order: Order = field(default_factory=Order)
    entries: dict[tuple[str, Position], tuple[Any, ...]] = field(default_factory=dict)
    began: dict[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)
    """(group, generation) -> who holds it, and where it begins."""

    def knows(self, name: str, position: Position) -> bool:
        """Whether a replica has applied the entry before."""
        return (name, position) in self.entries

    def check(self, name: str, step: Step) -> str:
        """Return what is wrong with an entry and its effect, and the names of that; "" if nothing is."""
        for names, check in _IN_EVERY_LOG.items():
            for wrong in check(self, name, step):
                return f"{names}: {name} position {step.position}: {wrong}"
        return ""

    def ticks_ascend(self, name: str, step: Step) -> Iterator[str]:
        """Over terms and generations: the log goes on where it was."""
        if step.done.tick <= step.before.tick:
            yield f"tick {step.done.tick} after {step.before.tick}"

    def are_the_same(self, name: str, step: Step) -> Iterator[str]:
        """Also of one that was cut off, and of what it wrote then: it is applied by nobody, or by all."""
        entry, done = step.entry, step.done
        said = (entry.producer, entry.sequence, entry.stamp, entry.message.kind)
        fact = (*said, done.tick, done.outcome, step.before.generation)
        known = self.entries.setdefault((name, step.position), fact)
        if known != fact:
            yield f"it is {known} on one replica and {fact} on another"

    def hand_over_once(self, name: str, step: Step) -> Iterator[str]:
        """A generation has one beginning and one list of members, and follows the one before."""
        if isinstance(step.entry.message, Handover) and not isinstance(step.done.outcome, Rejected):
            state = step.machine.generation
            if state.number != step.before.generation + 1 and not step.before.known:
                yield f"generation {state.number} follows {step.before.generation}"
            fact = (state.members, state.position)
            known = self.began.setdefault((name, state.number), fact)
            if known != fact:
                yield f"generation {state.number} is {known} to one and {fact} to another"

    def stay_placed(self, name: str, step: Step) -> Iterator[str]:
        """What is said twice or too late of a generation changes nothing: no shard goes back to an earlier one."""
        if isinstance(step.machine, Control):
            for shard, now in step.machine.membership.placements.items():
                was = step.before.placements.get(shard)
                if was is None or now.generation > was.generation:
                    continue
                if (now.generation, now.members) != (was.generation, was.members):
                    yield f"shard {shard} goes from {was} to {now}"

    def epochs_ascend(self, name: str, step: Step) -> Iterator[str]:
        if isinstance(step.machine, Control):
            membership = step.machine.membership
            if membership.epoch < step.before.epoch:
                yield f"epoch {membership.epoch} after {step.before.epoch}"
            if membership.epoch == step.before.epoch and membership.placements != step.before.placements:
                yield f"placements changed within epoch {membership.epoch}"

    def are_in_order(self, name: str, step: Step) -> Iterator[str]:
        is_shard = isinstance(step.machine, Shard)
        if is_shard and (wrong := self.order.saw(name, step.position, step.entry, step.done.outcome)):
            yield wrong

    def repeats_change_nothing(self, name: str, step: Step) -> Iterator[str]:
        if step.before.known and _extent(step.machine) != step.before.extent:
            yield f"{step.entry.message.kind} was made again"

    def segments_are_flushed_once(self, name: str, step: Step) -> Iterator[str]:
        if step.before.files is not None and _files(step.machine, step.entry) not in (None, step.before.files):
            yield "a segment was flushed again"

    def seals_take_all(self, name: str, step: Step) -> Iterator[str]:
        """What is sealed as a whole leaves no row behind."""
        message = step.entry.message
        if isinstance(step.machine, Shard) and isinstance(message, Seal) and message.segments is None:
            state = step.machine.collections.get(message.collection_id)
            if state is not None and not step.before.known and any(one.view().rows for one in state.growing.values()):
                yield f"rows are left in {list(state.growing)}"

    def rows_stay(self, name: str, step: Step) -> Iterator[str]:
        """Whatever is sealed, flushed, indexed or merged: the same rows live, also those deleted meanwhile do not."""
        if step.before.rows is not None and isinstance(step.machine, Shard):
            now = live_rows(step.machine)
            if now is not None and now != step.before.rows:
                lost, new = step.before.rows - now, now - step.before.rows
                yield f"{step.entry.message.kind} loses {sorted(lost)[:5]} and brings {sorted(new)[:5]}"


InLogs = Callable[[Logs, str, Step], Iterator[str]]

IN_EVERY_LOG: Final[Mapping[str, InLogs]] = {
    "I-CH-2 a deposed leader's entries": Logs.are_the_same,
    "I-CH-3 ticks ascend": Logs.ticks_ascend,
    "I-CH-4 one configuration": Logs.hand_over_once,
    "I-CH-5 late news change nothing": Logs.stay_placed,
    "I-CH-8 epochs ascend": Logs.epochs_ascend,
    "I-MS-3 order": Logs.are_in_order,
    "I-MS-4 one message of a broadcast": Logs.are_in_order,
    "I-MS-6 one schema of an insert": Logs.are_in_order,
    "I-CO-2 one effect": Logs.repeats_change_nothing,
    "I-CO-3 one order of changes": Logs.are_in_order,
    "I-SH-3 seals take all": Logs.seals_take_all,
    "I-SH-5 inserts and dropped partitions": Logs.are_in_order,
    "I-SH-6 inserts and old schemas": Logs.are_in_order,
    "I-SH-7 one flush of a segment": Logs.segments_are_flushed_once,
    "I-SH-8 repeats change nothing": Logs.repeats_change_nothing,
    "I-CP-1 results after compaction": Logs.rows_stay,
    "I-CP-2 deletes during compaction": Logs.rows_stay,
    "I-CP-3 inputs or outputs": Logs.rows_stay,
}


def _extent(machine: StateMachine) -> Any:
    if isinstance(machine, Shard):
        return {one: frozenset(state.partitions) for one, state in machine.collections.items()}
    assert isinstance(machine, Control)
    return len(machine.catalog.collections)


def _files(machine: StateMachine, entry: Entry) -> Any:
    if not isinstance(machine, Shard) or not isinstance(entry.message, Flushed):
        return None
    stored = machine.stored_segment(entry.message.collection_id, entry.message.segment_id)
    return None if stored is None or stored.segment.files is None else stored.segment.files.to_dict()


def live_rows(shard: Shard) -> Rows | None:
    """Return the rows of a shard that were inserted and not deleted; None if some cannot be read."""
    try:
        return frozenset(
            (collection_id, key, tick)
            for collection_id, state in shard.collections.items()
            for view in _views(state)
            for key, tick in _living(state, view)
        )
    except StorageFault:
        return None


def _views(state: CollectionState) -> Iterator[SegmentView]:
    yield from (one.segment.view() for one in state.stored.values())
    yield from (one.view() for one in state.growing.values())


def _living(state: CollectionState, view: SegmentView) -> Iterator[tuple[Any, int]]:
    primary = state.schema.primary.id
    dead = set(view.deletes.offsets.tolist())
    living = [offset for offset in range(view.rows) if offset not in dead]
    if living:
        keys = view.fetch(np.array(living, np.int64), [primary]).columns[primary].to_list()
        ticks = view.ticks.tolist()
        yield from ((key, ticks[offset]) for key, offset in zip(keys, living, strict=True))


# at every moment


@dataclass
class Moments:
    """What the nodes of one world were seen to be."""

    cluster: Cluster
    leaders: dict[tuple[int, int], str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise Violation, with the names of what is broken, if anything is."""
        for names, check in _AT_EVERY_MOMENT.items():
            for wrong in check(self):
                raise Violation(f"{names}: {wrong}")

    def one_leader(self) -> Iterator[str]:
        for name, _, host in _replicas(self.cluster):
            if host.raft.leads:
                leader = self.leaders.setdefault((host.raft.group_id, host.raft.term), name)
                if leader != name:
                    yield f"{leader} and {name} both lead group {host.raft.group_id} in {host.raft.term}"

    def leaders_belong(self) -> Iterator[str]:
        """Who leads a generation is a member of it: nobody who was removed."""
        for name, _, host in _replicas(self.cluster):
            members = host.machine.generation.members
            if (
                host.raft.leads
                and host.generation == host.machine.generation.number
                and members
                and name not in members
            ):
                yield f"{name} leads group {host.raft.group_id} of {members}"


AT_EVERY_MOMENT: Final[Mapping[str, Callable[[Moments], Iterator[str]]]] = {
    "I-CH-1 one leader in a term": Moments.one_leader,
    "who leads belongs": Moments.leaders_belong,
}


def _replicas(cluster: Cluster) -> Iterator[tuple[str, int, Any]]:
    """Yield (node, slot, replica) of all processes that run, of the removed ones too."""
    for name, machine in cluster.machines.items():
        node = machine.node
        if machine.database is not None and node is not None and node.takes_part:
            for slot, host in node.replicas.hosts.items():
                yield name, slot, host


# in the end


@dataclass
class Ending:
    """A world in which nothing is broken and nothing moves any more."""

    cluster: Cluster
    history: History
    architect: Architect
    dice: Random
    found: Mapping[str, Mapping[int, Version]]
    """Collection -> what all keys hold, as every node answers."""
    compare: Callable[[StateMachine], None]
    """Raises Violation if another replica had another state at the machine's position."""
    rest: Mapping[ShardId, Placement]
    """Where the shards were when they had come to rest."""

    @property
    def nodes(self) -> Sequence[tuple[str, Node]]:
        return [(machine.name, node) for machine, node in self.cluster.nodes()]

    def shards(self) -> Iterator[tuple[str, Node, Shard]]:
        for name, node in self.nodes:
            for host in node.shards.values():
                yield name, node, host.machine

    def terms_ascend(self) -> Iterator[str]:
        for name, slot, host in _replicas(self.cluster):
            raft_log = host.raft.log
            terms = [raft_log.term_at(one) for one in range(raft_log.first_position, raft_log.last_position + 1)]
            if terms != sorted(terms):
                yield f"{name} slot {slot} has terms {terms}"

    def one_configuration(self) -> Iterator[str]:
        """Of each shard: the control group, all members and their Raft groups say the same, and one of them leads."""
        membership = self.cluster.membership()
        for shard, placed in membership.placements.items():
            hosts = {name: node.shards[shard] for name, node in self.nodes if shard in node.shards}
            if set(hosts) != set(placed.members) or placed.following:
                yield f"shard {shard} is on {sorted(hosts)}, said to be on {placed}"
            for name, host in hosts.items():
                of_raft = {name, *host.raft.peers}
                if host.generation != placed.generation or of_raft != set(placed.members) or host.raft.is_learner:
                    yield f"{name} is in generation {host.generation} of shard {shard} with {of_raft}, not in {placed}"
            if len(leading := [name for name, host in hosts.items() if host.is_leader]) != 1:
                yield f"shard {shard} is led by {leading}"

    def all_copies(self) -> Iterator[str]:
        """As many as there are to be, on nodes that are up, in as many zones as there are."""
        membership, copies = self.cluster.membership(), self.cluster.plan.copies
        zones = {one.zone for one in membership.members.values()}
        for shard, placed in membership.placements.items():
            if len(set(placed.members)) != copies or not set(placed.members) <= set(self.cluster.ready()):
                yield f"shard {shard} is on {placed.members}, {copies} copies are wanted"
            spread = len({membership.members[name].zone for name in placed.members if name in membership.members})
            if self.cluster.plan.churn and spread < min(len(zones), copies):
                yield f"shard {shard} is in {spread} of {len(zones)} zones: {placed.members}"

    def removed_are_out(self) -> Iterator[str]:
        """A node that was removed leads and votes nowhere, and nobody counts on it, whether it knows of it or not."""
        gone = {name for name in self.cluster.machines if name not in self.cluster.names}
        for name, slot, host in _replicas(self.cluster):
            if name in gone and host.raft.leads:
                yield f"{name} was removed and leads {slot}"
            if name not in gone and gone.intersection(host.raft.peers):
                yield f"{name} counts on {gone.intersection(host.raft.peers)} in {slot}"
        for name, node in self.nodes:
            if gone.intersection(node.placing.control_voters) or gone.intersection(node.members):
                yield f"{name} knows {gone.intersection(node.members)}, {node.placing.control_voters} vote"

    def nothing_moves(self) -> Iterator[str]:
        """Since it came to rest; and nobody has more than one copy more than another, where zones leave the choice."""
        membership = self.cluster.membership()
        if membership.placements and dict(membership.placements) != dict(self.rest):
            yield f"it was at rest with {self.rest}, and is {membership.placements} now"
        if self.cluster.plan.churn and not self.cluster.plan.zones:
            held = Counter(name for placed in membership.placements.values() for name in placed.members)
            load = [held[name] for name in membership.members]
            if max(load) - min(load) > 1:
                yield f"copies of nodes: {dict(held)}"

    def nobody_leaves(self) -> Iterator[str]:
        for one in self.cluster.membership().members.values():
            if one.state is not MemberState.ACTIVE or one.is_replaced:
                yield f"{one.name} is {one.state}"
        for name, node in self.nodes:
            strange = {ShardId(one) for one in range(self.cluster.plan.shards)} - node.replicas.upkeep.keys()
            if left := [one for one in sorted(strange) if stored_words(node.seams.store, one)]:
                yield f"{name} has word lists of shards {left}, which have gone elsewhere"

    def all_or_none(self) -> Iterator[str]:
        for name, node in self.nodes:
            for wrong in disagreements(node):
                yield f"{name}: {wrong}"

    async def as_built(self) -> None:
        """Every node describes everything as the architect has it, who asked for each change until it was answered."""
        await self.architect.check(self.dice)

    def states_are_equal(self) -> Iterator[str]:
        """On all replicas, in whatever life and by whatever checkpoint they came by them."""
        for _, _, host in _replicas(self.cluster):
            self.compare(host.machine)
        yield from ()

    def catalogue_reloads(self) -> Iterator[str]:
        for name, node in self.nodes:
            control = node.control.machine
            again, now = Control.restore(control.checkpoint()), control.freeze()
            if again.freeze().to_bytes() != now.to_bytes():
                yield f"{name} has another catalogue after a restart"

    def rows_are_once(self) -> Iterator[str]:
        """In one segment of one shard, which is the one that the key's hash says."""
        for name, _, shard in self.shards():
            for collection_id, state in shard.collections.items():
                rows = Counter(key for view in _views(state) for key, _ in _living(state, view))
                if twice := [key for key, count in rows.items() if count > 1]:
                    yield f"{name} shard {shard.shard_id} collection {collection_id} has rows {twice} twice"
                ids = [view.segment_id for view in _views(state)]
                if len(ids) != len(set(ids)):
                    yield f"{name} shard {shard.shard_id} collection {collection_id} has segments {ids}"

    def keys_are_where_they_belong(self) -> Iterator[str]:
        for name, node, shard in self.shards():
            for collection_id, state in shard.collections.items():
                if (known := node.catalog.collections.get(collection_id)) is None:
                    continue
                keys = [key for view in _views(state) for key, _ in _living(state, view)]
                strange = [key for key in keys if known.shards[channel_of(key, len(known.shards))] != shard.shard_id]
                if strange:
                    yield f"{name} has keys {strange} of collection {collection_id} in shard {shard.shard_id}"

    def acknowledged_is_there(self) -> Iterator[str]:
        """Every acknowledged write, exactly once, and nothing that nobody asked for; reads were as they may be."""
        for name, found in self.found.items():
            self.history.check_last(name, found)
        self.history.check()
        yield from ()

    async def counts_are_right(self) -> None:
        """count(*) of every node, at a snapshot that it is given, is what the model has."""
        for collection, found in self.found.items():
            wanted = sum(version is not None for version in found.values())
            for name, _ in self.nodes:
                counted = await self.cluster.ask(name, partial(_count, collection), within_s=COUNT_S)
                if counted != wanted:
                    raise Violation(f"count(*) of {collection} is {counted} at {name}, must be {wanted}")

    async def filters_find(self) -> None:
        """Filters find the rows that they are true of, and no others, at every node, whatever they look at."""
        plan, dice = self.cluster.plan, self.cluster.dice("filters")
        for collection, found in self.found.items():
            if not (versions := sorted({one for one in found.values() if one is not None})):
                continue
            for name, _ in self.nodes:
                version = dice.choice(versions)
                wanted = {key for key, one in found.items() if one == version}
                filters = filters_of(plan, version)
                for text in filters if plan.indexed else dice.sample(filters, 1):
                    got = await self.cluster.ask(name, partial(_matching, collection, text), within_s=COUNT_S)
                    if got != wanted:
                        raise Violation(f"{text} of {collection} finds {got} at {name}, must find {wanted}")


async def _matching(collection: str, text: str, database: Database) -> set[int]:
    options = ReadOptions(filter=text, output_fields=["*"], consistency=Consistency.STRONG)
    return set(versions_of(await database.query("default", collection, options, limit=0, offset=0)))


async def _count(collection: str, database: Database) -> int | None:
    options = ReadOptions(output_fields=["count(*)"], consistency=Consistency.STRONG)
    return (await database.query("default", collection, options, limit=0, offset=0)).count


IN_THE_END: Final[Mapping[str, Callable[[Ending], Iterator[str] | Awaitable[None]]]] = {
    "I-CH-1 terms ascend": Ending.terms_ascend,
    "I-CH-4 one owner": Ending.one_configuration,
    "I-CH-6 one channel of a key": Ending.keys_are_where_they_belong,
    "I-CO-1 all or none": Ending.all_or_none,
    "I-CO-6 changes are seen everywhere": Ending.as_built,
    "I-CO-7 one effect of a key": Ending.as_built,
    "I-CO-8 everything is owned, and rests": Ending.nothing_moves,
    "I-CO-9 who leaves has nothing": Ending.nobody_leaves,
    "I-SH-2 one segment of a row": Ending.rows_are_once,
    "I-CT-1 made as a whole": Ending.as_built,
    "I-CT-2 the catalogue reloads": Ending.catalogue_reloads,
    "I-CT-3 one of several creators": Ending.as_built,
    "I-SH-1 states that were rebuilt": Ending.states_are_equal,
    "acknowledged writes": Ending.acknowledged_is_there,
    "snapshot counts": Ending.counts_are_right,
    "filters": Ending.filters_find,
    "full replication": Ending.all_copies,
    "removed nodes": Ending.removed_are_out,
}

Table = Mapping[str, Callable[..., Any]]


def once(table: Table) -> Mapping[str, Callable[..., Any]]:
    """Return each check of a table once, with all names that it stands for."""
    names: dict[Callable[..., Any], list[str]] = {}
    for name, check in table.items():
        names.setdefault(check, []).append(name)
    return {", ".join(stands_for): check for check, stands_for in names.items()}


_IN_EVERY_LOG: Final = once(IN_EVERY_LOG)
_AT_EVERY_MOMENT: Final = once(AT_EVERY_MOMENT)


async def check_ending(ending: Ending) -> None:
    """Raise Violation, with the names of what is broken, if anything is."""
    for names, check in once(IN_THE_END).items():
        try:
            found = check(ending)
            if isinstance(found, Awaitable):
                await found
                continue
            wrong = next(found, "")
        except Violation as violation:
            raise Violation(f"{names}: {violation}") from violation
        if wrong:
            raise Violation(f"{names}: {wrong}")
