"""A cluster of one Raft group in virtual time: the real groups and journals, on simulated disks, network and clocks.

Everything by chance comes from one seed. Messages of a session arrive in order after a delay; a session may break and
lose what is under way, a direction may hang. A disk syncs after a delay; a crash loses what was not synced, or tears
it. Each server's clock has its own speed. What servers deliver, who leads, which barriers pass and which writes are
acknowledged is checked while it happens, against one history that the whole cluster must agree on.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import cbor2

from cluster.checkpoint import begin_log_at
from cluster.raft import (
    BarrierFailed,
    BarrierPassed,
    BecameLeader,
    Behind,
    Committed,
    LostLeadership,
    NotLeader,
    RaftConfig,
    RaftGroup,
)
from storage.errors import Overloaded
from storage.journal import Journal, WriteBatch
from tests.sim.disk import PowerLoss, SimDisk

CONFIG = RaftConfig()


class Violation(AssertionError):
    """A promise of Raft was broken."""


@dataclass(frozen=True)
class Checkpoint:
    """What a server needs no log for."""

    position: int = 0
    term: int = 0


KINDS = (
    ("crash", "crash", "cut", "cut", "hang", "isolate", "slow disk", "slow link", "pause", "wipe"),
    ("crash", "crash", "slow disk", "isolate"),
    ("hang", "isolate", "slow link", "pause", "cut"),
    ("wipe", "crash", "isolate"),
)
"""What goes wrong in one schedule: a bit of everything, or one sort of trouble, and so more of it."""


@dataclass
class Faults:
    """How bad the world is. Times in seconds."""

    delay_s: float = 0.002
    jitter_s: float = 0.004
    sync_s: float = 0.002
    every_s: float = 0.0
    """Mean time between faults; 0 for none."""
    kinds: tuple[str, ...] = KINDS[0]
    drift: float = 0.05
    """Clocks run this much faster or slower at most."""


class Server:
    """A machine that may be down: a disk that stays, and a process that does not."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.disk = SimDisk(world.rng)
        self.checkpoint = Checkpoint()
        """Durable, beside the journal."""
        self.has_forgotten = False
        """Its disk is a new one, and nobody has told it yet what to begin with."""
        self.abstains = 0
        """Durable too."""
        self.speed = 1.0
        self.life = 0
        self.raft: RaftGroup | None = None
        self.journal: Journal
        self.batch: WriteBatch | None = None
        self.history: dict[int, bytes] = {}
        self.terms: dict[int, int] = {}
        self.clock = 0
        """Of stamps: the greatest that was seen or made. A restart forgets nothing here: time has passed it."""
        self.busy_until_s = 0.0
        self.slow_disk_until_s = 0.0
        self.poked = False
        self.timer_at_s = float("inf")
        self.proposed: dict[bytes, int] = {}
        self.barriers: dict[int, int] = {}
        """Token -> position that was acknowledged somewhere before the barrier was asked for."""
        self.installing = False

    def now(self) -> float:
        return 1_000 + self.world.now * self.speed

    def stamp(self) -> int:
        self.clock = max(self.clock + 1, int(self.world.now * 1_000_000))
        return self.clock

    def start(self) -> None:
        world = self.world
        self.life += 1
        self.journal = Journal.open(self.disk, "journal", file_bytes_max=world.file_bytes_max)
        at = self.checkpoint
        self.history = {position: world.committed[position][1] for position in world.positions_to(at.position)}
        if at.position:
            begin_log_at(self.journal.group(0), at.position, at.term)
        self.raft = RaftGroup(
            0,
            self.name,
            [name for name in world.servers if name != self.name],
            self.journal.group(0),
            applied=at.position,
            clock=self.now,
            rng=Random(world.rng.random()),
            config=world.config,
            transport=self,
            stamp=self.stamp,
            abstains=self.abstains,
        )
        self.batch, self.poked, self.busy_until_s, self.installing = None, False, 0.0, False
        self.proposed, self.barriers, self.timer_at_s = {}, {}, float("inf")
        for other in world.servers:
            if world.is_up(self.name, other):
                self.raft.session(other, True)
        self.poke()

    def crash(self) -> None:
        """Lose power, possibly in the middle of a write."""
        if self.batch is not None and self.world.rng.random() < 0.5:
            self.disk.power_loss_at = self.disk.steps + self.world.rng.randrange(4)
            with suppress(PowerLoss):
                self.batch.write()
        self.life += 1
        self.raft = self.batch = None
        self.disk.crash()

    # ---- Transport

    def send(self, peer: str, header: dict[str, Any], blobs: Any) -> bool:
        return self.world.send(self.name, peer, header, blobs)

    # ---- the loop

    def poke(self) -> None:
        if not self.poked:
            self.poked = True
            self.world.after(self.world.rng.choice((0.0, 0.0, 0.0005)), self.life_of(self.pump))

    def life_of(self, call: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        """A callback that a crash cancels and a pause defers."""
        life = self.life

        def run() -> None:
            if self.life != life:
                return
            if self.busy_until_s > self.world.now:
                self.world.at(self.busy_until_s, run)
            else:
                call(*arguments)

        return run

    def pump(self) -> None:
        self.poked = False
        raft = self.raft
        assert raft is not None
        for event in raft.tick(self.world.slice_bytes):
            self.take(event)
        self.world.check(self)
        self.kick()
        now = self.now()
        due = raft.next_deadline(now)
        if due <= now:
            self.poke()
        elif due != float("inf"):
            self.set_timer(self.world.now + (due - now) / self.speed)

    def set_timer(self, at_s: float) -> None:
        self.timer_at_s = at_s

        def ring() -> None:
            if self.timer_at_s == at_s:
                self.poke()

        self.world.at(at_s, self.life_of(ring))

    def take(self, event: object) -> None:
        world = self.world
        match event:
            case Committed(position, term, payload):
                world.note_committed(self, position, term, payload)
                if self.proposed.pop(payload, None) == term:
                    world.note_acknowledged(payload, position)
            case BecameLeader(term):
                world.stats["leaders"] += 1
                world.note_leader(self, term)
            case LostLeadership():
                self.proposed.clear()
            case BarrierPassed(token, position):
                world.stats["barriers"] += 1
                needed = self.barriers.pop(token)
                if position < needed:
                    raise Violation(f"barrier at {position} on {self.name} misses the acknowledged {needed}")
            case BarrierFailed(token):
                del self.barriers[token]
            case Behind(leader, position, _):
                world.stats["behind"] += 1
                self.fetch(leader, position)

    def fetch(self, leader: str, position: int) -> None:
        """Get a checkpoint of some server, later; a crash may come between its parts."""
        world = self.world
        sources = [server for server in world.servers.values() if server.checkpoint.position >= position]
        if self.installing or not sources:
            return
        self.installing = True
        found = world.rng.choice(sources).checkpoint

        def store() -> None:
            assert self.raft is not None
            if found.position > self.raft.delivered:
                self.checkpoint = found
                world.after(world.rng.choice((0.0, 0.05)), self.life_of(install))
            else:
                self.installing = False

        def install() -> None:
            assert self.raft is not None
            self.installing = False
            if found.position > self.raft.delivered:
                world.stats["installs"] += 1
                self.raft.install(found.position, found.term)
                self.history = {at: world.committed[at][1] for at in world.positions_to(found.position)}
                self.poke()

        world.after(world.rng.uniform(0.001, 0.5), self.life_of(store))

    def kick(self) -> None:
        if self.batch is None and (batch := self.journal.take_batch()) is not None:
            self.batch = batch
            slow = self.world.rng.uniform(0.05, 3.0) if self.slow_disk_until_s > self.world.now else 0.0
            delay = slow or self.world.rng.expovariate(1 / self.world.faults.sync_s)
            self.world.after(delay, self.life_of(self.synced, batch))

    def synced(self, batch: WriteBatch) -> None:
        batch.write()
        self.batch = None
        moved = self.journal.batch_done(batch)
        if moved and self.raft is not None:
            self.raft.on_durable()
            self.poke()
        self.kick()

    def receive(self, peer: str, raw: bytes, blobs: list[memoryview]) -> None:
        assert self.raft is not None
        header, stamp = cbor2.loads(raw)
        self.clock = max(self.clock, stamp)
        self.raft.receive(peer, header, blobs)
        self.poke()

    def session(self, peer: str, up: bool) -> None:
        if self.raft is not None:
            self.raft.session(peer, up)
            self.poke()

    def take_checkpoint(self) -> None:
        """Cover what was delivered, durably, and trim the log."""
        raft = self.raft
        assert raft is not None
        position = raft.delivered - self.world.rng.choice((0, 0, 3, 10))
        log = self.journal.group(0)
        if position > self.checkpoint.position and position >= log.base_position:
            self.checkpoint = Checkpoint(position, log.term_at(position))
        if self.checkpoint.position <= raft.delivered:
            raft.trim(self.checkpoint.position)
        self.kick()


class World:
    """Servers, links between them, time, clients, and what must hold."""

    def __init__(
        self,
        seed: int,
        servers: int = 3,
        *,
        faults: Faults | None = None,
        config: RaftConfig = CONFIG,
        start: bool = True,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.faults = faults or Faults()
        self.config = config
        self.now = 0.0
        self.serial = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.stats: Counter[str] = Counter()
        self.slice_bytes = self.rng.choice((300, 5_000, 1 << 20))
        self.file_bytes_max = self.rng.choice((3_000, 20_000))
        self.entry_bytes = self.rng.choice(((10, 60), (10, 600), (10, 3_000)))
        self.servers: dict[str, Server] = {}
        self.committed: dict[int, tuple[int, bytes]] = {}
        """Position -> (term, payload), as first delivered anywhere. The empty ones are nowhere."""
        self.committed_in: dict[int, int] = {}
        """Position -> a term not before the one in which it was committed."""
        self.places: dict[bytes, int] = {}
        self.acknowledged: dict[bytes, int] = {}
        self.highest_acknowledged = 0
        self.leaders: dict[int, tuple[str, int]] = {}
        self.confirmed: dict[int, int] = {}
        """Term -> the greatest stamp that its leader took for confirmed."""
        self.healed = False
        self.proposals = 0
        self.tokens = 0
        self.sessions: dict[tuple[str, str], int] = {}
        """Pair -> number of the session; negative while it is down."""
        self.hung: dict[tuple[str, str], float] = {}
        """Direction -> until when it carries nothing."""
        self.arrivals: dict[tuple[str, str], float] = {}
        self.slow: dict[tuple[str, str], float] = {}
        self.hear: Callable[[str, str, dict[str, Any]], bool] = lambda sender, receiver, header: True
        """Whether a message arrives."""
        names = [f"n{number}" for number in range(1, servers + 1)]
        for name in names:
            self.servers[name] = Server(self, name)
            self.servers[name].speed = 1 + self.rng.uniform(-1, 1) * self.faults.drift
        for name in names:
            for other in names:
                if name < other:
                    self.sessions[name, other] = 1
        if start:
            for server in self.servers.values():
                server.start()

    # ---- time

    def at(self, when: float, call: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.events, (when, self.serial, call))

    def after(self, delay: float, call: Callable[[], None]) -> None:
        self.at(self.now + delay, call)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.events and self.events[0][0] <= end:
            when, _, call = heapq.heappop(self.events)
            self.now = max(self.now, when)
            call()
        self.now = end

    def run_until(self, holds: Callable[[], Any], seconds: float = 10.0) -> None:
        end = self.now + seconds
        while not holds():
            if self.now >= end or not self.events:
                raise Violation(f"did not happen within {seconds} s")
            self.run(0.01)

    # ---- network

    def pair(self, name: str, other: str) -> tuple[str, str]:
        return (min(name, other), max(name, other))

    def is_up(self, name: str, other: str) -> bool:
        if name == other:
            return False
        alive = self.servers[name].raft is not None and self.servers[other].raft is not None
        return alive and self.sessions[self.pair(name, other)] > 0

    def send(self, sender: str, receiver: str, header: dict[str, Any], blobs: Any) -> bool:
        if not self.is_up(sender, receiver):
            return False
        link, session = (sender, receiver), self.sessions[self.pair(sender, receiver)]
        self.stats["messages"] += 1
        raw = cbor2.dumps([header, self.servers[sender].stamp()])
        copies = [memoryview(bytes(blob)) for blob in blobs]
        delay = self.faults.delay_s + self.rng.expovariate(1 / self.faults.jitter_s)
        if self.slow.get(link, 0.0) > self.now:
            delay += self.rng.uniform(0.05, 1.5)
        when = max(self.now + delay, self.arrivals.get(link, 0.0), self.hung.get(link, 0.0))
        self.arrivals[link] = when
        target = self.servers[receiver]

        def arrive() -> None:
            until_s = self.hung.get(link, 0.0)
            if until_s > self.now:
                self.at(until_s, arrive)  # in order: the later ones wait likewise
            elif self.sessions[self.pair(sender, receiver)] == session and self.hear(sender, receiver, header):
                target.life_of(target.receive, sender, raw, copies)()

        self.at(when, arrive)
        return True

    def cut(self, name: str, other: str) -> None:
        """Break the session; what is under way is lost."""
        pair = self.pair(name, other)
        if self.sessions[pair] > 0:
            was_up = self.is_up(name, other)
            self.sessions[pair] = -self.sessions[pair] - 1
            if was_up:
                self.servers[name].session(other, False)
                self.servers[other].session(name, False)

    def join(self, name: str, other: str) -> None:
        pair = self.pair(name, other)
        if self.sessions[pair] < 0:
            self.sessions[pair] = -self.sessions[pair]
            self.arrivals.pop((name, other), None)
            self.arrivals.pop((other, name), None)
            if self.is_up(name, other):
                self.servers[name].session(other, True)
                self.servers[other].session(name, True)

    def crash(self, name: str) -> None:
        server = self.servers[name]
        if server.raft is None:
            return
        self.stats["crashes"] += 1
        for other in self.servers:
            if other != name:
                pair = self.pair(name, other)
                if self.is_up(name, other):
                    self.servers[other].session(name, False)
                self.sessions[pair] = abs(self.sessions[pair]) + 1 if self.sessions[pair] > 0 else self.sessions[pair]
        server.crash()

    def wipe(self, name: str, back_after_s: float) -> None:
        """Lose a disk, unless another server has not recovered from losing its own; two have no copy to spare."""
        hosted = [server.raft for server in self.servers.values()]
        if len(hosted) == 2 or any(raft is None or not raft.remembers for raft in hosted):
            return
        self.stats["wiped"] += 1
        self.crash(name)
        server = self.servers[name]
        server.disk, server.has_forgotten = SimDisk(self.rng), True
        if self.rng.random() < 0.5:
            server.checkpoint = Checkpoint()
        self.after(back_after_s, lambda: self.start(name))

    def find_seat(self, server: Server) -> bool:
        """Let a server that forgot begin as `node/forming.py` has it, if all others are of one term with its leader."""
        rafts = [other.raft for other in self.servers.values() if other is not server]
        hosted = [raft for raft in rafts if raft is not None and raft.remembers]
        leaders = [raft for raft in hosted if raft.leads]
        if len(hosted) < len(rafts) or len(leaders) != 1 or len({raft.term for raft in hosted}) != 1:
            return False
        journal = Journal.open(server.disk, "journal", file_bytes_max=self.file_bytes_max)
        journal.group(0).set_hard_state(leaders[0].term, leaders[0].me)
        journal.write_now()
        journal.close()
        server.has_forgotten, server.abstains = False, leaders[0].last_position
        return True

    def start(self, name: str) -> None:
        server = self.servers[name]
        if server.has_forgotten and not self.find_seat(server):
            self.after(0.1, lambda: self.start(name))
        elif server.raft is None:
            server.start()
            for other in self.servers:
                if self.is_up(name, other):
                    self.servers[other].session(name, True)

    # ---- what must hold

    def positions_to(self, position: int) -> list[int]:
        return [at for at in sorted(self.committed) if at <= position]

    def note_committed(self, server: Server, position: int, term: int, payload: bytes) -> None:
        first = self.committed.setdefault(position, (term, payload))
        assert server.raft is not None
        self.committed_in.setdefault(position, server.raft.term)
        if first != (term, payload):
            raise Violation(f"{server.name} delivers {payload[:20]!r} of {term} at {position}, others {first}")
        if self.places.setdefault(payload, position) != position:
            raise Violation(f"{payload[:20]!r} is at {position} and at {self.places[payload]}")
        if server.history and position <= max(server.history):
            raise Violation(f"{server.name} delivers {position} again or late")
        server.history[position] = payload
        self.stats["delivered"] += 1

    def note_acknowledged(self, payload: bytes, position: int) -> None:
        self.acknowledged[payload] = position
        self.highest_acknowledged = max(self.highest_acknowledged, position)
        self.stats["acknowledged"] += 1

    def note_leader(self, server: Server, term: int) -> None:
        """Whoever leads has everything that was committed in terms before."""
        log = server.journal.group(0)
        for position, (entry_term, _) in self.committed.items():
            if self.committed_in[position] >= term or position <= log.base_position:
                continue
            if position > log.last_position or log.term_at(position) != entry_term:
                raise Violation(f"{server.name} leads term {term} without the committed {position}")

    def check(self, server: Server) -> None:
        raft = server.raft
        assert raft is not None
        if not raft._core.is_leader:
            return
        owner = self.leaders.setdefault(raft.term, (server.name, server.life))
        if owner != (server.name, server.life):
            raise Violation(f"term {raft.term} is led by {owner} and {server.name}")
        # A leader's confirmed stamp is in the clocks of a quorum, and whoever leads later stamps above it.
        confirmed = raft.confirmed_stamp
        if sum(one.clock >= confirmed for one in self.servers.values()) * 2 <= len(self.servers):
            raise Violation(f"{server.name} takes {confirmed} for confirmed, which no quorum has heard")
        if raft.leads:
            earlier = max((stamp for term, stamp in self.confirmed.items() if term < raft.term), default=0)
            if server.clock < earlier:
                raise Violation(f"{server.name} leads and may stamp below the {earlier} that was confirmed before")
            self.confirmed[raft.term] = max(confirmed, self.confirmed.get(raft.term, 0))
        # While somebody holds a lease, nobody else decides anything.
        for other in self.servers.values():
            guard = None if other.raft is None or not raft.leads else other.raft._guard
            lead = None if guard is None else guard.leadership
            if lead is not None and lead.term < raft.term and lead.has_lease(other.now()):
                raise Violation(f"{other.name} holds a lease of {lead.term} beside {raft.term}")

    def check_logs(self) -> None:
        """Two logs with the same term at a position are the same up to there."""
        logs = [server.journal.group(0) for server in self.servers.values() if server.raft is not None]
        for place, log in enumerate(logs):
            for other in logs[place + 1 :]:
                low = max(log.base_position, other.base_position)
                agreed = False
                for position in range(min(log.last_position, other.last_position), low, -1):
                    same = log.term_at(position) == other.term_at(position)
                    if agreed > same or (same and log.payload(position) != other.payload(position)):
                        raise Violation(f"logs differ at {position} below an entry they share")
                    agreed = agreed or same

    # ---- clients and faults

    def leader(self) -> Server | None:
        leading = [server for server in self.alive() if server.raft is not None and server.raft.leads]
        return max(leading, key=lambda server: server.raft.term, default=None)  # type: ignore[union-attr]

    def alive(self) -> list[Server]:
        return [server for server in self.servers.values() if server.raft is not None]

    def propose(self, server: Server, size: int = 20) -> bytes:
        self.proposals += 1
        payload = (b"p%d." % self.proposals).ljust(size, b"x")
        raft = server.raft
        assert raft is not None
        raft.propose(payload)
        server.proposed[payload] = raft.term
        server.poke()
        return payload

    def client(self, every_s: float) -> None:
        """Until the world is healed, propose on who leads, ask for barriers, take checkpoints, transfer."""
        if self.healed:
            return
        rng = self.rng
        leading = [server for server in self.alive() if server.raft is not None and server.raft.leads]
        if leading:
            server = rng.choice(leading)
            assert server.raft is not None
            with suppress(NotLeader, Overloaded):
                for _ in range(rng.choice((1, 1, 2, 8))):
                    self.propose(server, rng.randint(*self.entry_bytes))
            if rng.random() < 0.3 or len(leading) > 1:
                for one in leading:
                    self.ask_barrier(one)
            if rng.random() < 0.01:
                self.stats["transfers"] += server.raft.transfer()
                server.poke()
        if rng.random() < 0.1 and (alive := self.alive()):
            rng.choice(alive).take_checkpoint()
        if rng.random() < 0.05:
            self.check_logs()
        self.after(rng.expovariate(1 / every_s), lambda: self.client(every_s))

    def ask_barrier(self, server: Server) -> None:
        assert server.raft is not None
        self.tokens += 1
        with suppress(NotLeader):
            server.raft.barrier(self.tokens)
            server.barriers[self.tokens] = self.highest_acknowledged
            server.poke()

    def trouble(self, until_s: float) -> None:
        """One fault, with its end, and the next one later."""
        if self.now >= until_s or self.healed:
            return
        rng = self.rng
        names = list(self.servers)
        name, other = rng.sample(names, 2)
        leader = self.leader()
        if leader is not None and rng.random() < 0.4:  # where it hurts
            name = leader.name
            other = rng.choice([one for one in names if one != name])
        long_s = rng.choice((0.05, 0.3, 1.0, 3.0)) * min(1.0, self.faults.every_s)
        kind = rng.choice(self.faults.kinds)
        self.stats[kind] += 1
        match kind:
            case "crash":
                others = [one for one in names if one != name]
                for victim in (name, *rng.sample(others, rng.choice((0, 0, 0, 1, len(others))))):
                    self.crash(victim)
                    self.after(long_s, lambda victim=victim: self.start(victim))  # type: ignore[misc]
            case "wipe":
                self.wipe(name, long_s)
            case "cut":
                self.cut(name, other)
                self.after(long_s, lambda: self.join(name, other))
            case "hang":
                self.hung[name, other] = self.now + long_s
            case "isolate":
                group = [name, *rng.sample(names, rng.randint(0, (len(names) - 1) // 2))]
                leaks = rng.choice((0.0, 0.0, 0.2, 0.5))
                for one in group:
                    for two in names:
                        if two not in group:
                            for direction in ((one, two), (two, one)):
                                if rng.random() >= leaks:
                                    self.hung[direction] = self.now + long_s
            case "slow disk":
                self.servers[name].slow_disk_until_s = self.now + long_s
            case "slow link":
                self.slow[name, other] = self.now + long_s
            case "pause":
                self.servers[name].busy_until_s = self.now + long_s
        self.after(rng.expovariate(1 / self.faults.every_s), lambda: self.trouble(until_s))

    def heal(self) -> None:
        self.healed = True
        for name in self.servers:
            self.servers[name].slow_disk_until_s = self.servers[name].busy_until_s = 0.0
            self.start(name)
        self.hung, self.slow = {}, {}
        for pair in self.sessions:
            self.join(*pair)

    def must_converge(self, seconds: float = 15.0) -> None:
        """After everything is well again, all servers soon have the same history, with all that was acknowledged."""
        self.heal()
        self.run(4.0)
        leader = self.leader()
        if leader is None:
            raise Violation("no leader 4 s after the last fault")
        last = b""
        for _ in range(3):
            with suppress(NotLeader, Overloaded):
                last = self.propose(leader)
            self.run(0.1)
        if not last:
            raise Violation("the leader takes no proposals")
        self.run_until(lambda: all(last in server.history.values() for server in self.servers.values()), seconds)
        for payload, position in self.acknowledged.items():
            if self.committed[position][1] != payload:
                raise Violation(f"acknowledged {payload[:20]!r} is lost")
            for server in self.servers.values():
                if server.history.get(position) != payload:
                    raise Violation(f"acknowledged {payload[:20]!r} at {position} is not on {server.name}")
        if len({tuple(sorted(server.history.items())) for server in self.servers.values()}) != 1:
            raise Violation("histories differ")
        self.check_logs()
        for server in self.servers.values():
            assert server.raft is not None
            if server.raft.refused:
                raise Violation(f"{server.name} refused {server.raft.refused} messages of honest peers")


def fuzz(seed: int, servers: int | None = None, seconds: float = 12.0) -> World:
    """Run one schedule of faults under load, heal, and check. Raises Violation, with the seed."""
    rng = Random(seed)
    faults = Faults(
        delay_s=rng.choice((0.0, 0.001, 0.02)),
        jitter_s=rng.choice((0.0005, 0.005, 0.05)),
        sync_s=rng.choice((0.0005, 0.005, 0.05)),
        every_s=rng.choice((0.4, 0.8, 1.5)),
        drift=rng.choice((0.0, 0.05, 0.08)),
        kinds=rng.choice(KINDS),
    )
    world = World(seed, servers or rng.choice((2, 3, 3, 3, 4, 5)), faults=faults)
    try:
        world.client(rng.choice((0.02, 0.05, 0.1)))
        world.after(1.0, lambda: world.trouble(seconds))
        world.run(seconds)
        world.must_converge()
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}") from violation
    except Exception as error:
        raise RuntimeError(f"seed {seed} at {world.now:.3f} s: {error!r}") from error
    return world


@dataclass
class Tally:
    """What many schedules had in them."""

    schedules: int = 0
    stats: Counter[str] = field(default_factory=Counter)

    def add(self, world: World) -> None:
        self.schedules += 1
        self.stats.update(world.stats)


def main() -> None:
    """python -m tests.cluster.raft_world [first seed] [schedules] [servers]"""
    import sys
    import time

    first, count, servers = (int(word) for word in (*sys.argv[1:], *("0", "100", "0")[len(sys.argv) - 1 :]))
    tally, began = Tally(), time.monotonic()
    failed = []
    for seed in range(first, first + count):
        try:
            tally.add(fuzz(seed, servers or None))
        except Exception as error:
            failed.append(seed)
            print(error, flush=True)
    print(f"{tally.schedules} schedules in {time.monotonic() - began:.0f} s, failed {failed}: {dict(tally.stats)}")


if __name__ == "__main__":
    main()
