"""A Raft group on a stage: nothing moves unless the test says so.

Messages wait in their links until they are delivered, bytes are durable when they are synced, time passes when it is
told to. For schedules that chance would not find.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Any

import cbor2

from cluster.checkpoint import begin_log_at
from cluster.raft import BarrierPassed, Behind, Committed, RaftConfig, RaftEvent, RaftGroup
from storage.journal import GroupLog, Journal
from tests.sim.disk import SimDisk

CONFIG = RaftConfig()
FAR_S = 1e6
Sent = tuple[dict[str, Any], list[memoryview]]


class Actor:
    """One server."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.name = stage, name
        self.disk = SimDisk(Random(name))
        self.raft: RaftGroup
        self.journal: Journal
        self.alive = False
        self.events: list[RaftEvent] = []
        self.applied, self.applied_term, self.abstains = 0, 0, 0
        self.committed = 0
        self.heir = ""
        self.stamps = 0
        self.speed = 1.0

    @property
    def log(self) -> GroupLog:
        return self.journal.group(0)

    @property
    def delivered(self) -> list[bytes]:
        """Payloads that were delivered in this life."""
        return [event.payload for event in self.events if isinstance(event, Committed)]

    @property
    def passed(self) -> dict[int, int]:
        return {event.token: event.position for event in self.events if isinstance(event, BarrierPassed)}

    @property
    def behind(self) -> list[Behind]:
        return [event for event in self.events if isinstance(event, Behind)]

    def contents(self) -> list[tuple[int, int, bytes]]:
        """The log as (position, term, payload)."""
        log = self.log
        return [(at, log.term_at(at), log.payload(at)) for at in range(log.first_position, log.last_position + 1)]

    def start(self) -> None:
        self.journal = Journal.open(self.disk, "journal", file_bytes_max=1 << 20)
        self.events, self.alive = [], True
        if self.applied:
            begin_log_at(self.log, self.applied, self.applied_term, self.heir)
        self.raft = RaftGroup(
            0,
            self.name,
            [name for name in self.stage.voters if name != self.name],
            self.log,
            applied=self.applied,
            clock=lambda: 100 + self.stage.now * self.speed,
            rng=Random(1),
            config=self.stage.config,
            transport=self,
            stamp=self.stamp,
            abstains=self.abstains,
            is_learner=self.name not in self.stage.voters,
            committed=self.committed,
        )
        self.calm()

    def stamp(self) -> int:
        self.stamps += 1
        return self.stamps

    def send(self, peer: str, header: dict[str, Any], blobs: Any) -> bool:
        stage = self.stage
        if (self.name, peer) in stage.down or not stage.actors[peer].alive:
            return False
        copy = cbor2.loads(cbor2.dumps(header)), [memoryview(bytes(blob)) for blob in blobs]
        stage.links[self.name, peer].append(copy)
        stage.sent_bytes += sum(len(blob) for blob in copy[1])
        return True

    def calm(self) -> None:
        """Have no election here for long."""
        self.raft._core._SyncObj__raftElectionDeadline = FAR_S

    def ring(self) -> None:
        """Have the election timer run out."""
        self.raft._core._SyncObj__raftElectionDeadline = 0.0

    def tick(self) -> None:
        self.events += self.raft.tick()
        if not self.raft._core.is_leader and self.raft._core.election_at_s > 0:
            self.calm()

    def sync(self) -> None:
        """Let the group work, make everything durable, and tell it."""
        self.tick()
        if self.journal.write_now():
            self.raft.on_durable()
        self.tick()


class Stage:
    """The servers and what lies between them."""

    def __init__(self, servers: int = 3, *, learners: int = 0, config: RaftConfig = CONFIG) -> None:
        self.config = config
        self.voters = "abcde"[:servers]
        self.now = 0.0
        self.sent_bytes = 0
        self.actors: dict[str, Actor] = {}
        for name in "abcde"[: servers + learners]:
            self.actors[name] = Actor(self, name)
        self.links: dict[tuple[str, str], deque[Sent]] = {
            (one, two): deque() for one in self.actors for two in self.actors if one != two
        }
        self.down: set[tuple[str, str]] = set()
        for actor in self.actors.values():
            actor.start()
        for one, two in self.links:
            self.actors[one].raft.session(two, True)

    def __getitem__(self, name: str) -> Actor:
        return self.actors[name]

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def deliver(self, link: str, count: int | None = None) -> int:
        """Deliver messages of a link such as "ab", all or the first few; return how many."""
        queue, done = self.links[link[0], link[1]], 0
        while queue and (count is None or done < count):
            self.hand(link, queue.popleft())
            done += 1
        return done

    def hand(self, link: str, message: Sent) -> None:
        """Give a message to its receiver."""
        actor = self.actors[link[1]]
        if actor.alive:
            actor.raft.receive(link[0], *message)
            actor.tick()

    def drop(self, *links: str) -> None:
        for link in links:
            self.links[link[0], link[1]].clear()

    def cut(self, one: str, two: str) -> None:
        """Break the session between two."""
        self.drop(one + two, two + one)
        for name, other in ((one, two), (two, one)):
            self.down.add((name, other))
            if self.actors[name].alive:
                self.actors[name].raft.session(other, False)

    def join(self, one: str, two: str) -> None:
        for name, other in ((one, two), (two, one)):
            self.down.discard((name, other))
            if self.actors[name].alive:
                self.actors[name].raft.session(other, True)

    def crash(self, *names: str) -> None:
        """Lose power: what is not synced is gone."""
        for name in names:
            for other in self.actors:
                if other != name:
                    self.drop(name + other, other + name)
                    if self.actors[other].alive:
                        self.actors[other].raft.session(name, False)
            actor = self.actors[name]
            actor.alive = False
            for inode in actor.disk._seen.values():
                inode.unsynced.clear()  # none of it survives by luck
                inode.seen[:] = inode.durable
            actor.disk.crash()

    def start(self, *names: str) -> None:
        for name in names:
            self.actors[name].start()
            for other in self.actors:
                if other != name and self.actors[other].alive and (name, other) not in self.down:
                    self.actors[name].raft.session(other, True)
                    self.actors[other].raft.session(name, True)

    def settle(self, names: Iterable[str] | None = None, *, rounds: int = 60) -> None:
        """Let messages and syncs among some servers happen until nothing more does; time stands still."""
        chosen = [actor for actor in self.actors.values() if actor.alive and (names is None or actor.name in names)]
        for _ in range(rounds):
            moved = 0
            for actor in chosen:
                actor.tick()
                if actor.journal.pending_bytes:
                    actor.sync()
                    moved += 1
            for one in chosen:
                for two in chosen:
                    if one is not two:
                        moved += self.deliver(one.name + two.name)
            if not moved:
                return

    def run(self, seconds: float, names: Iterable[str] | None = None) -> None:
        """Let time pass in heartbeats, with everything that it brings among some servers."""
        end = self.now + seconds
        while self.now < end:
            self.wait(self.config.heartbeat_s)
            self.settle(names)

    def elect(self, name: str, voters: str) -> bool:
        """Let a server stand for election among some voters, whose leader is long gone for them."""
        self.wait(2 * self.config.election_s_max)
        actor = self.actors[name]
        for _ in range(3):  # the question, the vote, and an answer that an earlier message delayed
            actor.ring()
            actor.tick()
            actor.sync()
            for voter in voters:
                self.deliver(name + voter)
                self.actors[voter].sync()
                self.deliver(voter + name)
            if actor.raft._core.is_leader:
                return True
        return False

    def lead(self, name: str, voters: str) -> None:
        """Elect and have the election's entry committed among the voters."""
        assert self.elect(name, voters), f"{name} is not elected"
        self.settle(name + voters)
        assert self.actors[name].raft.leads
