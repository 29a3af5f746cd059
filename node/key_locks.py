"""Who may change what: callers wait here for what another change holds, in the order in which they came."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.resources import Hold, Holds, Resource
from storage.errors import AnnulusError, Busy


@dataclass(eq=False)
class _Waiter:
    wanted: Holds
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class KeyLocks:
    """Locks of resources, shared or alone, all that a change needs at once: so nobody waits for anybody in a circle.

    Who came earlier and conflicts goes first, also if only those before it could go at once: nobody waits for ever.
    """

    def __init__(self) -> None:
        self._held: dict[Resource, tuple[int, bool]] = {}
        """Resource -> (how many hold it, whether alone)."""
        self._waiting: list[_Waiter] = []
        self._closed: AnnulusError | None = None

    async def acquire(self, wanted: Holds, *, within_s: float) -> None:
        """Return when all of these are held. Raises Busy after that time, or what `close` was given."""
        if self._closed is not None:
            raise self._closed
        one = _Waiter(wanted)
        self._waiting.append(one)
        self._grant()
        try:
            async with asyncio.timeout(within_s):
                await one.granted
        except TimeoutError:
            if one.granted.done() and not one.granted.cancelled():
                return  # in the last moment
            self._leave(one)
            raise Busy("other changes hold what this one needs; nothing was changed: try again") from None
        except asyncio.CancelledError:
            self._leave(one)
            raise

    def take(self, wanted: Holds) -> None:
        """Hold these at once: nobody else can hold them yet."""
        for hold in wanted:
            self._take(hold)

    def release(self, wanted: Holds) -> None:
        """Let go of what was acquired or taken."""
        for resource, _ in wanted:
            count, alone = self._held[resource]
            if count == 1:
                del self._held[resource]
            else:
                self._held[resource] = (count - 1, alone)
        self._grant()

    def close(self, error: AnnulusError) -> None:
        """Refuse everybody who waits, and whoever comes."""
        self._closed = error
        for one in self._waiting:
            if not one.granted.done():
                one.granted.set_exception(error)
        self._waiting.clear()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _leave(self, one: _Waiter) -> None:
        if one in self._waiting:
            self._waiting.remove(one)
            self._grant()
        elif one.granted.done() and not one.granted.cancelled() and one.granted.exception() is None:
            self.release(one.wanted)

    def _grant(self) -> None:
        """Let everybody go on who conflicts neither with what is held nor with anybody who waits longer."""
        blocked: dict[Resource, bool] = {}
        still: list[_Waiter] = []
        for one in self._waiting:
            if one.granted.done():
                continue
            if all(self._is_free(hold) and not _clash(blocked.get(hold.resource), hold.alone) for hold in one.wanted):
                self.take(one.wanted)
                one.granted.set_result(None)
                continue
            still.append(one)
            for resource, alone in one.wanted:
                blocked[resource] = blocked.get(resource, False) or alone
        self._waiting = still

    def _is_free(self, hold: Hold) -> bool:
        held = self._held.get(hold.resource)
        return held is None or not _clash(held[1], hold.alone)

    def _take(self, hold: Hold) -> None:
        count, _ = self._held.get(hold.resource, (0, False))
        self._held[hold.resource] = (count + 1, hold.alone)


def _clash(theirs: bool | None, mine: bool) -> bool:
    """Return whether one who holds a resource, alone or not (None: nobody does), keeps another from it."""
    return theirs is not None and (theirs or mine)
