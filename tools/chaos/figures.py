"""What a run says about availability: rates over time, and how long nothing was answered, fault by fault."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.chaos.fleet import Kind, Outcome, Request
from tools.chaos.run import Happening, Record

AFTER_S = 5.0
"""What comes this long after a fault still counts as its doing."""


@dataclass(frozen=True)
class Gaps:
    """The longest times without an answer around the faults of one name, in seconds, by kind of request."""

    fault: str
    times: int
    longest_s: dict[Kind, list[float]]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)] if ordered else 0.0


def longest_gap_s(answers: Sequence[float], first_s: float, last_s: float) -> float:
    """Return the longest time between neighbours of ascending `answers` that reaches into [first_s, last_s]."""
    longest = 0.0
    before = first_s
    for at_s in answers:
        if at_s <= first_s:
            before = at_s
            continue
        longest = max(longest, min(at_s, last_s) - before)
        before = at_s
        if at_s >= last_s:
            return longest
    return max(longest, last_s - before)


def gaps(requests: Iterable[Request], record: Record) -> list[Gaps]:
    """Return the gaps around the faults, by name of the fault."""
    answers: dict[Kind, list[float]] = {kind: [] for kind in (Kind.WRITE, Kind.STRONG, Kind.RELAXED)}
    for request in requests:
        if request.outcome is Outcome.OK and request.kind in answers:
            answers[request.kind].append(request.ended_s)
    for times in answers.values():
        times.sort()
    found: dict[str, Gaps] = {}
    for happening in record.happenings:
        name = happening.name
        known = found.get(name) or Gaps(name, 0, {kind: [] for kind in answers})
        first_s, last_s = _window(happening, record)
        for kind, times in answers.items():
            near = [at_s for at_s in times if first_s - AFTER_S <= at_s <= last_s + AFTER_S]
            known.longest_s[kind].append(longest_gap_s(near, first_s, last_s))
        found[name] = Gaps(name, known.times + 1, known.longest_s)
    return [found[name] for name in sorted(found)]


def repeats(requests: Iterable[Request], kind: Kind) -> dict[int, int]:
    """Return attempts -> how many requests of the kind needed so many."""
    counted: dict[int, int] = {}
    for request in requests:
        if request.kind is kind:
            counted[request.attempts] = counted.get(request.attempts, 0) + 1
    return dict(sorted(counted.items()))


def rates(
    requests: Iterable[Request], kinds: Sequence[Kind], *, began_s: float, bin_s: float, bins: int
) -> list[tuple[int, int]]:
    """Return per bin of time how many requests of these kinds were answered, and how many not."""
    counted = [[0, 0] for _ in range(bins)]
    for request in requests:
        slot = int((request.ended_s - began_s) // bin_s)
        if request.kind in kinds and 0 <= slot < bins:
            counted[slot][request.outcome is not Outcome.OK] += 1
    return [(answered, failed) for answered, failed in counted]


def _window(happening: Happening, record: Record) -> tuple[float, float]:
    """Return from when to when a fault counts: not into the calm in which nobody asks anything."""
    last_s = happening.ended_s + AFTER_S
    for begun_s, _ in record.calm:
        if happening.began_s < begun_s < last_s:
            last_s = max(begun_s, happening.began_s)
    return happening.began_s, last_s
