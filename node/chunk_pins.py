"""Chunks that must stay although no segment of this replica needs them: not yet, or no longer.

Two kinds of lease keep them. Chunks come before the message that names them: the leader writes or fetches them, then
proposes, and a follower has them long before it applies. And another replica that copies a manifest needs its chunks
here until it has them, whatever is compacted meanwhile. A checkpoint removes only garbage that nothing keeps (`doom`),
and whoever wants to keep what is being removed just now waits until that is done.

For as long as that takes the log after the manifest stays too (`copied_from`), or a replica for which it takes longer
than from one checkpoint to the next would begin again and again.

A lease ends by itself, so that nothing that dies leaves chunks behind for ever: what came for a message that was never
applied is then garbage like any other. Before that, all that stood in the log when its time was up is applied: the
message may be among it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cluster.shard import Shard
from node.clock import Clock
from storage.types import Position

MESSAGE_S: Final = 600.0
"""How long chunks wait for the message that names them: longer than any proposal, or a follower a little behind."""
COPY_S: Final = 60.0
"""How long a manifest's chunks stay for a replica that copies them and is not heard of."""


@dataclass
class _Lease:
    digests: frozenset[bytes]
    until_s: float
    loose: bool
    """Whether nobody else knows of these chunks, so that they are garbage when the lease ends."""
    position: Position | None = None
    """What the copied manifest covers."""
    log_end: int | None = None
    """The last position of the log when the time was up."""


class ChunkPins:
    """The leases on one shard's chunks on this node. Belongs to the loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._leases: dict[int, _Lease] = {}
        self._last_id = 0
        self._doomed: frozenset[bytes] = frozenset()
        self._removed = asyncio.Event()
        self.committing = asyncio.Lock()
        """Held while a manifest is written: there is one at a time, and who reads the newest waits for it."""

    async def keep(
        self, digests: Iterable[bytes], seconds: float, *, loose: bool = True, position: Position | None = None
    ) -> int:
        """Keep the chunks, which may not be there yet, for so long; return the lease's number.

        position  of the manifest that is copied, whose log is wanted next
        """
        wanted = frozenset(digests)
        while wanted & self._doomed:
            await self._removed.wait()
        self._last_id += 1
        self._leases[self._last_id] = _Lease(wanted, self._clock.monotonic_s() + seconds, loose, position)
        return self._last_id

    def renew(self, lease_id: int, seconds: float) -> bool:
        """Let the lease last that much longer from now; False if it has ended."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.until_s < self._clock.monotonic_s():
            return False
        lease.until_s = self._clock.monotonic_s() + seconds
        return True

    def release(self, lease_id: int) -> None:
        """End the lease: a segment needs the chunks now, or they are known as garbage, or nobody wants them."""
        self._leases.pop(lease_id, None)

    @property
    def is_copied(self) -> bool:
        """Whether another replica is fetching chunks from here."""
        now_s = self._clock.monotonic_s()
        return any(not lease.loose and lease.until_s >= now_s for lease in self._leases.values())

    @property
    def copied_from(self) -> Position | None:
        """The log after this position is wanted by replicas that copy manifests; None if there are none."""
        now_s = self._clock.monotonic_s()
        leases = self._leases.values()
        return min((one.position for one in leases if one.position is not None and one.until_s >= now_s), default=None)

    def trimmed_to(self, position: Position, *, is_full: bool) -> Position:
        """Return up to where the log below a checkpoint at this position may go; all of it if the journal is full."""
        wanted = self.copied_from
        return position if is_full or wanted is None else min(position, wanted)

    @property
    def kept(self) -> frozenset[bytes]:
        return frozenset().union(*(lease.digests for lease in self._leases.values()))

    def doom(self, shard: Shard, log_end: int) -> frozenset[bytes]:
        """Return the garbage that may be removed now; until `spare` nobody gets a lease on it.

        log_end  last position of the shard's log, committed or not
        """
        now_s = self._clock.monotonic_s()
        for lease_id, lease in list(self._leases.items()):
            if lease.until_s >= now_s:
                continue
            if lease.log_end is None:
                lease.log_end = log_end if lease.loose else 0
            if shard.position >= lease.log_end:
                del self._leases[lease_id]
                if lease.loose:
                    shard.garbage.update(digest for digest in lease.digests if digest not in shard.digests)
        self._doomed = frozenset(shard.garbage) - self.kept
        return self._doomed

    def spare(self) -> None:
        """What was doomed is removed, or will not be."""
        self._doomed = frozenset()
        self._removed.set()
        self._removed = asyncio.Event()
