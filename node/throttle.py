"""How long who has failed to prove itself must wait: twice as long each time, per user and per address.

Memory is bounded: of more than `KNOWN_MAX` the one that failed longest ago is forgotten, which to an attacker is worth
what it costs to fail from so many addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from node.clock import Clock

KNOWN_MAX: Final = 16_384
FIRST_S: Final = 0.1
FORGET_S: Final = 900.0


class _Failures(NamedTuple):
    times: int
    until_s: float


class Throttle:
    """Failures by name."""

    def __init__(self, clock: Clock, longest_s: float) -> None:
        self._clock = clock
        self._longest_s = longest_s
        self._known: OrderedDict[str, _Failures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def has_failed(self, name: str) -> bool:
        return name in self._known

    def wait_s(self, name: str) -> float:
        """Return in how many seconds the name may try again, 0 for now."""
        found = self._known.get(name)
        if found is None:
            return 0.0
        left_s = found.until_s - self._clock.monotonic_s()
        if left_s < -FORGET_S:
            del self._known[name]
        return max(0.0, left_s)

    def failed(self, name: str) -> float:
        """Note a failure; return how long the name has to wait now, in seconds."""
        now_s = self._clock.monotonic_s()
        found = self._known.pop(name, None)
        times = 0 if found is None or now_s - found.until_s > FORGET_S else found.times
        wait_s = min(self._longest_s, FIRST_S * 2.0 ** min(times, 30))
        self._known[name] = _Failures(times + 1, now_s + wait_s)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return wait_s

    def succeeded(self, name: str) -> None:
        self._known.pop(name, None)
