"""What happens in one simulated world, as data: made from a seed, written as a script, cut down when it fails.

A script is text, one step a line; `python -m tools.sim --script FILE` plays it:

    world seed=17 nodes=3 shards=2 clients=2 ...
    0.513 client1 upsert dice=52331 level=Strong
    2.250 fault cut dice=77 one=n2 to=n1,n3 for=1.5
    ...

A step says what is tried when; its dice decide what else there is to decide (which keys, which node), so that a step
does much the same when others are left out. After the last step all faults end, and the world must become whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any, Final

from node.broadcaster import Step as BroadcastStep

Fact = str | int | float


@dataclass(frozen=True)
class Step:
    """One thing that somebody does. `who` is a client, "operator", "architect", "steward" or "fault"."""

    at_s: float
    who: str
    what: str
    dice: int
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = "".join(f" {name}={value}" for name, value in self.facts.items())
        return f"{self.at_s:.3f} {self.who} {self.what} dice={self.dice}{facts}"

    @classmethod
    def parse(cls, line: str) -> Step:
        at_s, who, what, dice, *facts = line.split()
        return cls(float(at_s), who, what, int(dice.removeprefix("dice=")), dict(_fact(one) for one in facts))

    def text(self, name: str) -> str:
        return str(self.facts[name])

    def number(self, name: str) -> float:
        return float(self.facts[name])

    def names(self, name: str) -> list[str]:
        return str(self.facts[name]).split(",")


@dataclass(frozen=True)
class Plan:
    """One world and what happens in it."""

    seed: int
    nodes: int
    copies: int
    shards: int
    clients: int
    duration_s: float
    """When the faults end at the latest."""
    clock_error_ms: int
    """How far each wall clock is off at the start, either way."""
    clock_drift_ppm: int
    segment_bytes_max: int
    segment_age_s_max: float
    segment_idle_s_max: float
    growing_bytes_max: int
    checkpoint_interval_s: float
    journal_file_bytes_max: int
    deleted_ratio: float
    index_rows_min: int
    repair: int = 0
    """1: nodes repair damaged data from their peers by themselves."""
    heal_s: float = 0.0
    """How often replicas are compared and chunks read again; 0 for not in this world's time."""
    churn: int = 0
    """1: nodes come and go, and other machines may be lost than those that the world begins with."""
    zones: int = 0
    """In how many zones the nodes are; 0 for none that anybody has told them of."""
    dead_after_s: float = 600.0
    """After how long a node that is away counts as gone."""
    indexed: int = 0
    """1: all fields have indexes, texts word lists too, and what is made of large segments is made of small ones."""
    steps: Sequence[Step] = ()

    @property
    def names(self) -> list[str]:
        return [f"n{number + 1}" for number in range(self.nodes)]

    @property
    def guests(self) -> list[str]:
        """Names of nodes that may join."""
        return [f"n{self.nodes + number + 1}" for number in range(GUESTS_MAX if self.churn else 0)]

    def with_steps(self, steps: Iterable[Step]) -> Plan:
        return replace(self, steps=tuple(steps))

    def to_script(self, comment: str = "") -> str:
        """Return the plan as text, every line of `comment` in front of it."""
        head = " ".join(f"{one.name}={getattr(self, one.name)}" for one in fields(self) if one.name != "steps")
        lines = [*(f"# {line}" for line in comment.splitlines()), f"world {head}", *map(str, self.steps)]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_script(cls, text: str) -> Plan:
        """Return the plan that `to_script` wrote. Raises ValueError at what it does not understand."""
        lines = [line.strip() for line in text.splitlines()]
        head, *rest = [line for line in lines if line and not line.startswith("#")]
        word, *facts = head.split()
        if word != "world":
            raise ValueError(f"a script begins with its world, not with {head!r}")
        known: dict[str, Any] = dict(_fact(one) for one in facts)
        return cls(**known, steps=tuple(Step.parse(line) for line in rest))


def _fact(text: str) -> tuple[str, Fact]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{text!r} should be name=value")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


REQUESTS: Final = {
    "upsert": 5, "insert": 4, "delete": 3, "partial": 1, "hot-upsert": 3, "hot-delete": 1, "hot-get": 5, "get": 3,
    "search": 3, "scan": 0.4,
}  # fmt: skip
LEVELS: Final = {"Strong": 6, "Session": 3, "Bounded": 3, "Eventually": 1}
CHANGES: Final = {
    "create": 4, "crowd": 1, "drop": 2, "rename": 2, "truncate": 3, "field": 4, "partition": 3, "load": 2, "alter": 2,
    "alias": 2, "flush-all": 1, "write": 6,
}  # fmt: skip
DEADLY: Final = "die-at-step"
"""The fault that comes with changes of the catalogue."""
ROT: Final = "rot-live"
"""The fault of worlds whose nodes read their chunks again."""
STEPS: Final = tuple(step.name for step in BroadcastStep)
CHORES: Final = {"flush": 3, "compact": 2, "other": 2, "alter": 1}
MOVES: Final = {**CHORES, "move": 8}
"""Where there are more nodes than a shard has copies."""
CHURN: Final = {"join": 3, "leave": 4, "replace": 3, "lose": 3, "lose-zone": 2, "stay": 1}
"""What the steward does where nodes come and go."""
GUESTS_MAX: Final = 6
CHURN_SHARE: Final = 0.25
"""Of the worlds with peers."""
INDEXED_SHARE: Final = 0.4


def plan_of(
    seed: int, *, nodes: int | None = None, kinds: Sequence[str] | None = None, churn: bool | None = None
) -> Plan:
    """Return the plan of a seed.

    nodes  how many nodes its world begins with (default: as the seed has it)
    kinds  what faults there are (default: as the seed has it)
    churn  whether nodes come and go (default: as the seed has it, and not if `kinds` are given); a lone node never does
    """
    rng = Random(seed)
    chosen = rng.choices((1, 3, 5), (2, 7, 1))[0]
    dice = Random(f"{seed} churn")
    drawn = dice.random() < CHURN_SHARE and kinds is None
    count = nodes or (3 if churn and chosen == 1 else chosen)
    churns = count > 1 and (drawn if churn is None else churn)
    duration_s = rng.uniform(3.0, 12.0)
    plan = Plan(
        seed=seed,
        nodes=count,
        copies=min(3, count) if rng.random() < 0.85 else count,
        shards=2 if count < 5 else 3,
        clients=rng.randint(1, 4),
        duration_s=round(duration_s, 3),
        clock_error_ms=rng.choice((0, 20, 200)),
        clock_drift_ppm=rng.choice((0, 100, 2_000)),
        segment_bytes_max=rng.choice((1024, 4096, 16384)),
        segment_age_s_max=rng.choice((1.0, 5.0)),
        segment_idle_s_max=rng.choice((1.0, 2.0)),
        growing_bytes_max=rng.choice((16384, 1 << 20)),
        checkpoint_interval_s=rng.choice((0.2, 1.0, 20.0)),
        journal_file_bytes_max=rng.choice((4096, 65536)),
        deleted_ratio=rng.choice((0.1, 0.3)),
        index_rows_min=rng.choice((1, 20)),
        repair=int(rng.random() < 0.5 and count > 1),
        heal_s=Random(f"{seed} healing").choice((0.0, 0.0, 0.0, 1.0, 4.0)),
        churn=int(churns),
        zones=dice.choice((0, 2, 3)) if churns else 0,
        dead_after_s=dice.choice((1.5, 4.0, 600.0)) if churns else 600.0,
        indexed=int(Random(f"{seed} indexed").random() < INDEXED_SHARE and kinds is None),
    )
    steps = [*_requests(plan, Random(f"{seed} requests")), *_faults(plan, Random(f"{seed} faults"), kinds)]
    steps += _changes(plan, Random(f"{seed} changes"), kinds)
    steps += _rot(plan, Random(f"{seed} rot"), kinds)
    steps += _churn(plan, dice)
    return plan.with_steps(sorted(steps, key=lambda one: one.at_s))


def _requests(plan: Plan, rng: Random) -> Iterable[Step]:
    per_s = rng.choice((2, 5, 10))
    for number in range(plan.clients):
        at_s = 0.0
        while (at_s := at_s + rng.expovariate(per_s)) < plan.duration_s:
            what, level = _weighted(rng, REQUESTS), _weighted(rng, LEVELS)
            yield Step(round(at_s, 3), f"client{number}", what, rng.getrandbits(32), {"level": level})
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(0.7)) < plan.duration_s:
        chores = CHORES if plan.copies == plan.nodes and not plan.churn else MOVES
        yield Step(round(at_s, 3), "operator", _weighted(rng, chores), rng.getrandbits(32))


def _changes(plan: Plan, rng: Random, kinds: Sequence[str] | None) -> Iterable[Step]:
    """Changes of the catalogue, in every world a few; in some the power goes at a step of one."""
    per_s = rng.choice((0.4, 1.2))
    deadly = rng.random() < 0.3 if kinds is None else DEADLY in kinds
    at_s = rng.uniform(0.0, 1.0)
    while at_s < plan.duration_s:
        yield Step(round(at_s, 3), "architect", _weighted(rng, CHANGES), rng.getrandbits(32))
        if deadly and rng.random() < 0.3:
            facts = {"step": rng.choice(STEPS), "after": rng.choice((0, 0, 1)), "for": round(rng.uniform(0.05, 2.0), 3)}
            yield Step(round(at_s, 3), "fault", DEADLY, rng.getrandbits(32), facts)
        at_s += rng.expovariate(per_s)


def _rot(plan: Plan, rng: Random, kinds: Sequence[str] | None) -> Iterable[Step]:
    """Where nodes read their chunks again: now and then some change while the node runs."""
    if plan.heal_s and plan.copies > 2 and (kinds is None or ROT in kinds):
        at_s = rng.expovariate(0.3)
        while at_s < plan.duration_s:
            yield Step(round(at_s, 3), "fault", ROT, rng.getrandbits(32), _node_for(2.0)(plan, rng))
            at_s += rng.expovariate(0.3)


def _churn(plan: Plan, rng: Random) -> Iterable[Step]:
    """Nodes come and go; what takes longer than it is to the next step goes on beside it."""
    if plan.churn:
        at_s = rng.uniform(0.5, 2.0)
        every_s = rng.choice((1.5, 3.0))
        while at_s < plan.duration_s:
            facts = {"for": round(rng.uniform(0.2, 5.0), 3)}
            yield Step(round(at_s, 3), "steward", _weighted(rng, CHURN), rng.getrandbits(32), facts)
            at_s += rng.expovariate(1 / every_s)


FaultMaker = Callable[[Plan, Random], Mapping[str, Fact]]


def _crash(plan: Plan, rng: Random) -> Mapping[str, Fact]:
    how = rng.choices(("power", "kill", "mid-call"), (4, 3, 4))[0]
    return {"node": rng.choice(plan.names + plan.guests), "how": how, "for": round(rng.uniform(0.05, 4.0), 3)}


def _node_for(longest_s: float) -> FaultMaker:
    def make(plan: Plan, rng: Random) -> Mapping[str, Fact]:
        return {"node": rng.choice(plan.names + plan.guests), "for": round(rng.uniform(0.05, longest_s), 3)}

    return make


def _cut(plan: Plan, rng: Random) -> Mapping[str, Fact]:
    names = rng.sample(plan.names, len(plan.names))
    shape = rng.choice(("halves", "alone", "one-way", "bridge", "flapping"))
    return {"shape": shape, "order": ",".join(names), "for": round(rng.uniform(0.2, 6.0), 3)}


def _pair(plan: Plan, rng: Random) -> Mapping[str, Fact]:
    return {"pair": ",".join(rng.sample(plan.names, 2))}


def _slow(plan: Plan, rng: Random) -> Mapping[str, Fact]:
    return {
        "order": ",".join(rng.sample(plan.names, 2)),
        "delay": rng.choice((0.02, 0.1, 0.3)),
        "bytes_per_s": rng.choice((20_000, 200_000, 100_000_000)),
        "for": round(rng.uniform(0.5, 6.0), 3),
    }


def _jump(plan: Plan, rng: Random) -> Mapping[str, Fact]:
    most_ms = 200 if plan.nodes > 1 else 60_000
    return {"node": rng.choice(plan.names), "ms": rng.choice((-1, 1)) * rng.randint(1, most_ms)}


def _nothing(plan: Plan, rng: Random) -> Mapping[str, Fact]:
    return {"for": round(rng.uniform(0.05, 3.0), 3)}


FAULTS: Final[Mapping[str, tuple[float, int, FaultMaker]]] = {
    "crash": (8, 1, _crash),
    "stop": (2, 1, _node_for(3.0)),
    "blackout": (0.7, 1, _nothing),
    "jump": (2, 1, _jump),
    "slow-disk": (1.5, 1, _node_for(4.0)),
    "full": (1, 1, _node_for(1.0)),
    "pause": (3, 2, _node_for(4.0)),
    "cut": (7, 2, _cut),
    "reset": (2, 2, _pair),
    "reset-bulk": (1, 2, _pair),
    "slow": (2, 2, _slow),
    "lead": (1, 2, _node_for(0.1)),
    "bad-sync": (1, 2, _node_for(2.0)),
    "usurp": (1, 3, _node_for(0.6)),
    "rot-journal": (1, 3, _node_for(2.0)),
    "rot-chunk": (1, 3, _node_for(2.0)),
    "lose-disk": (0.7, 3, _node_for(2.0)),
}
"""Name -> weight, fewest nodes, what else there is to choose."""


def _faults(plan: Plan, rng: Random, kinds: Sequence[str] | None) -> Iterable[Step]:
    possible = {name: weight for name, (weight, least, _) in FAULTS.items() if plan.nodes >= least}
    if kinds is None:
        # Most worlds see a few kinds of faults only, so that each kind also meets quiet surroundings.
        kinds = rng.sample(list(possible), min(len(possible), rng.choice((0, 1, 2, 3, 4, len(possible)))))
        every_s = rng.choice((1.0, 2.0, 4.0))
    else:
        every_s = 1.0
    weights = {name: possible[name] for name in kinds if name != DEADLY}
    if not weights:
        return
    at_s = rng.uniform(0.0, 2.0)
    while at_s < plan.duration_s:
        name = _weighted(rng, weights)
        yield Step(round(at_s, 3), "fault", name, rng.getrandbits(32), FAULTS[name][2](plan, rng))
        at_s += rng.expovariate(1 / every_s)


def _weighted(rng: Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
