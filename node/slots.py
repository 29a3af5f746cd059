"""How many builds a node does at a time, and which goes first: index builds and compactions of all its shards.

Who waits for a slot has chosen its work, but not begun it: it looks again once it has one.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """Belongs to the loop.

    Invariants
      1. At most `count` hold a slot.
      2. Nobody gets one while somebody waits whose priority is a smaller number, or who has the same and came before.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self._came = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def take(self, priority: int) -> AsyncIterator[None]:
        """Hold a slot; a smaller number waits less."""
        if self.free and not self._waiting:
            self.free -= 1
        else:
            await self._wait(priority)
        try:
            yield
        finally:
            self._give()

    async def _wait(self, priority: int) -> None:
        self._came += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self._came, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was this one's turn, and is the next one's now
                self._give()
            raise

    def _give(self) -> None:
        self.free += 1
        while self._waiting and self.free:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self.free -= 1
                turn.set_result(None)
