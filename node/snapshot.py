"""A replica that lags too far takes another's checkpoint: its manifest, the chunks it lacks, and goes on from there.

    snapshot/manifest   the newest checkpoint of a group, its position and term; its chunks stay while a lease lasts
    snapshot/keep       renews that lease, or ends it

Installing, step by step; what a crash after each leaves:

    1  the manifest comes from a peer and is noted as incoming          the old state
    2  missing chunks come from all peers, each durable as it comes     the old state, and chunks that a repeat has
    3  the new state is read from them, which verifies each             the old state
    4  ONE synced batch: the manifest is this replica's own now,        the new state; the next start lets the log
       marked that the log is to begin at its position                  begin there (`cluster.checkpoint.begin_log`)
    5  the host takes the new state, Raft's log begins at its position  the same, until the journal has written that
    6  the chunks that only the old state needed are garbage, which     the new state, and orphans for the sweep
       the next checkpoint removes

The commit point is 4. Between 4 and 5 no checkpoint is written, so that none of the old state covers the new manifest.
The control group's snapshot is its catalogue record, which is whole without chunks. What is fetched is noted as
incoming so that the sweep after a restart leaves it to the repeat.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import cbor2

from cluster.checkpoint import (
    as_installed,
    chunk_sizes,
    covered,
    covered_term,
    incoming_key,
    manifest_key,
    restore_from,
)
from cluster.control import Control
from cluster.machine import StateMachine
from cluster.shard import Shard
from node.chunk_pins import COPY_S, MESSAGE_S, ChunkPins
from node.chunk_transfer import Calls, ChunkTransfer, Dice, Progress
from node.network import Link
from node.workers import Executor, Lane, carry_through
from storage.chunks import ChunkFault, ChunkStore
from storage.errors import AnnulusError, InvalidParameter, Unavailable
from storage.journal import GroupLog
from storage.keys import record_key
from storage.types import Position, ShardId

log = logging.getLogger(__name__)

CALL_S: Final = 60.0
BACK_OFF_S_MIN: Final = 0.5
BACK_OFF_S_MAX: Final = 10.0


@dataclass(frozen=True)
class Record:
    """What the checkpoints of a group are. `of_shard` and `of_control` make it."""

    name: str
    shard_id: ShardId | None
    key: bytes
    """Of the checkpoint's record in the chunk store."""
    incoming_key: bytes
    sizes: Callable[[bytes], Mapping[bytes, int]]
    """The chunks that a checkpoint needs, and their bytes."""
    restore: Callable[[bytes], StateMachine]
    """Makes a checkpoint's state, on a worker. Raises ChunkDamaged."""


def of_shard(shard_id: ShardId, store: ChunkStore) -> Record:
    """Return what a shard's checkpoints are."""
    return Record(
        f"s{shard_id}",
        shard_id,
        manifest_key(shard_id),
        incoming_key(shard_id),
        chunk_sizes,
        lambda raw: restore_from(raw, shard_id, store),
    )


def of_control(key: bytes) -> Record:
    """Return what the control group's checkpoints are: its catalogue's record under `key`, which is whole."""
    return Record("control", None, key, record_key("incoming-catalog"), lambda raw: {}, Control.restore)


@dataclass(frozen=True, kw_only=True)
class SnapshotGroup:
    """What is needed of a group to give and take its checkpoints."""

    group_id: int
    record: Record
    raft_log: Callable[[], GroupLog]
    pins: ChunkPins
    """Whoever writes a checkpoint of the group here holds `pins.committing`."""
    peers: Callable[[], Sequence[str]]
    machine: Callable[[], StateMachine]
    """The state as it is now."""
    install: Callable[[Any, Position, int], None]
    """Puts a state (at position, of term) in place of the one that is there, and lets Raft's log begin there."""
    note_installing: Callable[[bool], None]
    """Told when a checkpoint begins to be fetched, and when it is installed or no longer wanted."""
    replaced: Callable[[Position], None]
    """Told after a state was put in place."""
    checkpoint: Callable[[], Awaitable[None]] | None = None
    """Takes a checkpoint now, for a replica that needs one as new as its own state."""


class Snapshots:
    """Giving and taking checkpoints of all groups of one node. Belongs to the loop."""

    def __init__(
        self, mesh: Calls, transfer: ChunkTransfer, store: ChunkStore, executor: Executor, dice: Dice,
        groups: Mapping[int, SnapshotGroup], *, on_store_error: Callable[[OSError], None],
    ) -> None:  # fmt: skip
        """Answer calls of other nodes from now on.

        on_store_error  told of a checkpoint that could not be written for another node, as on a full disk
        """
        self._mesh = mesh
        self._transfer = transfer
        self._store = store
        self._executor = executor
        self._dice = dice
        self._groups = groups
        self._on_store_error = on_store_error
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._waits_for: dict[int, str] = {}
        """Group -> the node that was asked for its checkpoint and has not answered yet."""
        self._farewells: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.progress: dict[int, Progress] = {}
        """Of each group whose chunks are being fetched."""
        mesh.serve("snapshot/manifest", self._serve_manifest)
        mesh.serve("snapshot/keep", self._serve_keep)

    def begin(self, group_id: int, at_least: int, source: str) -> None:
        """Begin to install a checkpoint at or above a position, unless that is being done; try `source` first.

        Who waits for another node's word turns to this one, which has just shown that it lives.
        """
        if self._is_closed:
            return
        waits_for = self._waits_for.get(group_id)
        if waits_for is not None and waits_for != source:
            asking = self._tasks[group_id]
            if asking.cancel():
                asking.add_done_callback(lambda _: self.begin(group_id, at_least, source))
        elif group_id not in self._tasks:
            self._begin(group_id, self.install_snapshot(group_id, at_least, source))

    async def rebuild(self, group_id: int, sources: Sequence[str]) -> None:
        """Return when a checkpoint of one of these peers is in place of a state that is not trusted, however long.

        The group's host is suspended: it must not come further by itself.
        """
        broken = self._groups[group_id].machine()
        while self._groups[group_id].machine() is broken and not self._is_closed:
            if group_id not in self._tasks:
                self._begin(group_id, self._replace(group_id, broken, sources))
            await asyncio.wait({self._tasks[group_id]})
            if self._groups[group_id].machine() is broken:
                await asyncio.sleep(BACK_OFF_S_MIN)

    def _begin(self, group_id: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[group_id] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda done: self._ended(group_id, done))

    def _ended(self, group_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[group_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("snapshot fails group=%s", self._groups[group_id].record.name, exc_info=error)

    async def give_up(self, group_id: int) -> None:
        """End what is under way for a group that is leaving this node."""
        task = self._tasks.get(group_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """End what is under way; the next start goes on with it."""
        self._is_closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for farewell in list(self._farewells):
            farewell.cancel()

    async def install_snapshot(self, group_id: int, at_least: int, source: str) -> None:
        """Return when this replica's state is at or above the position, however long that takes."""
        group = self._groups[group_id]

        async def attempt() -> bool:
            others = sorted((one for one in group.peers() if one != source), key=lambda _: self._dice.random())
            return await self._install_from_any(group, [source, *others], at_least)

        await self._persist(group, attempt, lambda: group.machine().position >= at_least)

    async def _replace(self, group_id: int, broken: StateMachine, sources: Sequence[str]) -> None:
        group = self._groups[group_id]

        async def attempt() -> bool:
            return await self._install_from_any(group, sources, broken.position, replaces=True)

        await self._persist(group, attempt, lambda: group.machine() is not broken)

    async def _persist(
        self, group: SnapshotGroup, attempt: Callable[[], Awaitable[bool]], is_done: Callable[[], bool]
    ) -> None:
        group.note_installing(True)
        pause_s = BACK_OFF_S_MIN
        try:
            while not is_done():
                if not await attempt():
                    await asyncio.sleep(pause_s * (1 + self._dice.random()))
                    pause_s = min(2 * pause_s, BACK_OFF_S_MAX)
        finally:
            group.note_installing(False)

    async def _install_from_any(
        self, group: SnapshotGroup, peers: Sequence[str], at_least: int, *, replaces: bool = False
    ) -> bool:
        """Try one peer after the other; return whether one had a checkpoint that could be taken."""
        for peer in peers:
            try:
                await self._install_from(group, peer, at_least, replaces=replaces)
                return True
            except (AnnulusError, OSError) as error:
                log.warning("snapshot not installed group=%s peer=%s: %s", group.record.name, peer, error)
        return False

    async def _install_from(self, group: SnapshotGroup, peer: str, at_least: int, *, replaces: bool = False) -> None:
        """Do the steps with a peer's checkpoint; `at_least` may be reached otherwise meanwhile.

        replaces  this replica's own state is not trusted: one that is no newer is better
        """
        arguments = {"group": group.group_id, "at_least": at_least, "fresh": replaces}
        self._waits_for[group.group_id] = peer
        try:
            answer, blobs = await self._mesh.call(
                peer, "snapshot/manifest", arguments, timeout_s=CALL_S, link=Link.BULK
            )  # fmt: skip
        finally:
            del self._waits_for[group.group_id]
        raw, term, lease = _parse_manifest(peer, answer, blobs)
        position, sizes = await self._executor.run(Lane.DISK, _examine, group, raw)
        if position < at_least:
            raise Unavailable(
                f"node {peer} has a checkpoint of {group.record.name} at {position} only, not at {at_least}"
            )
        renewing = asyncio.get_running_loop().create_task(self._renew(group.group_id, peer, lease))
        kept = await group.pins.keep(sizes, inf)
        try:
            await self._executor.run(Lane.DISK, self._store.commit, [(group.record.incoming_key, raw)])
            await self._fetch(group, peer, position, sizes)
            machine = await self._read(group, raw)
            if await carry_through(self._put_in_place(group, raw, machine, position, term, replaces=replaces)):
                group.pins.release(kept)
                group.replaced(position)
                log.info(
                    "snapshot installed group=%s peer=%s position=%d term=%d", group.record.name, peer, position, term
                )
        finally:
            group.pins.renew(kept, MESSAGE_S)
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _fetch(self, group: SnapshotGroup, peer: str, position: Position, sizes: Mapping[bytes, int]) -> None:
        if group.record.shard_id is None:
            return
        progress = self.progress[group.group_id] = Progress(group.record.shard_id)
        log.info(
            "snapshot begun group=%s peer=%s position=%d chunks=%d bytes=%d",
            group.record.name, peer, position, len(sizes), sum(sizes.values()),
        )  # fmt: skip
        try:
            left = await self._transfer.fetch(group.record.shard_id, sizes, progress=progress)
        finally:
            del self.progress[group.group_id]
        if not set(left) <= set(progress.not_found):
            raise Unavailable(f"{len(left)} of {len(sizes)} chunks of {group.record.name} did not come")
        if left:  # fine if they are of indexes, which are built anew; rows are read before anything is committed
            log.warning(
                "chunks that no replica that answers has group=%s chunks=%d first=%s",
                group.record.name,
                len(left),
                left[0].hex(),
            )
        log.info("snapshot fetched group=%s bytes_by_peer=%s", group.record.name, progress.bytes_by_peer)

    async def _read(self, group: SnapshotGroup, raw: bytes) -> StateMachine:
        """Return the checkpoint's state; chunks that were here before, and are damaged, are fetched."""
        while True:
            try:
                return await self._executor.run(Lane.DISK, group.record.restore, raw)
            except ChunkFault as fault:
                if not await self._transfer.repair(fault.shard_id, fault.digest):
                    raise

    async def _put_in_place(
        self, group: SnapshotGroup, raw: bytes, machine: StateMachine, position: Position, term: int, *, replaces: bool
    ) -> bool:
        """Do steps 4 to 6; return False if this replica has come further by itself meanwhile."""
        async with group.pins.committing:
            if group.machine().position >= position + replaces:
                await self._executor.run(Lane.DISK, self._store.commit, [], [group.record.incoming_key])
                return False
            own = await self._executor.run(Lane.DISK, as_installed, raw, term)
            await self._executor.run(
                Lane.DISK, self._store.commit, [(group.record.key, own)], [group.record.incoming_key]
            )
            old = group.machine()
            if old.position >= position + replaces:
                return False  # its log has that entry, so manifest and log meet as they are
            if isinstance(machine, Shard) and isinstance(old, Shard):
                machine.garbage |= (old.digests.keys() | old.garbage) - machine.digests.keys()
            group.install(machine, position, term)
        return True

    async def _renew(self, group_id: int, peer: str, lease: int) -> None:
        """Keep the peer's chunks there; after the end of this they are let go, or go by themselves."""
        arguments = {"group": group_id, "lease": lease}
        try:
            while True:
                await asyncio.sleep(COPY_S / 3)
                await self._call_keep(peer, arguments)
        finally:
            farewell = asyncio.get_running_loop().create_task(self._call_keep(peer, {**arguments, "done": True}))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    async def _call_keep(self, peer: str, arguments: Mapping[str, Any]) -> None:
        try:
            await self._mesh.call(peer, "snapshot/keep", arguments, timeout_s=COPY_S / 3)
        except AnnulusError as error:
            log.info("lease on a snapshot not told group=%d peer=%s: %s", arguments["group"], peer, error)

    # serving

    async def _serve_manifest(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        group = self._known(arguments)
        wanted = arguments.get("at_least", 0)
        if type(wanted) is not int:
            raise InvalidParameter("snapshot/manifest wants a position")
        if group.checkpoint is not None and (arguments.get("fresh") or await self._lags(group, wanted)):
            try:
                await group.checkpoint()
            except OSError as error:
                self._on_store_error(error)
                raise Unavailable(f"no checkpoint can be taken there now: {error.strerror}") from error
        async with group.pins.committing:
            found = await self._executor.run(Lane.DISK, self._read_own, group)
            if found is None:
                raise Unavailable(f"{group.record.name} has no checkpoint yet on this node")
            raw, position, term, sizes = found
            if position < wanted:  # nothing is kept for who would only refuse it
                raise Unavailable(f"the checkpoint of {group.record.name} is at {position} only, not at {wanted}")
            if term is None:
                if not group.raft_log().base_position <= position <= group.raft_log().last_position:
                    raise Unavailable(f"the checkpoint of {group.record.name} at {position} is of an older program")
                term = group.raft_log().term_at(position)
            lease = await group.pins.keep(sizes, COPY_S, loose=False, position=position)
        log.info("snapshot given group=%s peer=%s position=%d chunks=%d", group.record.name, peer, position, len(sizes))
        return {"position": position, "term": term, "lease": lease}, [raw]

    async def _lags(self, group: SnapshotGroup, wanted: int) -> bool:
        """Return whether the checkpoint here is older than what is wanted, and this replica's state is not."""
        if not 0 < wanted <= group.machine().position:
            return False
        found = await self._executor.run(Lane.DISK, self._read_own, group)
        return found is None or found[1] < wanted

    def _read_own(self, group: SnapshotGroup) -> tuple[bytes, Position, int | None, Mapping[bytes, int]] | None:
        raw = self._store.read(group.record.key)
        return None if raw is None else (raw, covered(raw), covered_term(raw), group.record.sizes(raw))

    async def _serve_keep(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        group, lease = self._known(arguments), arguments.get("lease")
        if type(lease) is not int:
            raise InvalidParameter("snapshot/keep wants the number of a lease")
        if not arguments.get("done"):
            return {"kept": group.pins.renew(lease, COPY_S)}, ()
        group.pins.release(lease)
        return {"kept": False}, ()

    def _known(self, arguments: Mapping[str, Any]) -> SnapshotGroup:
        group_id = arguments.get("group")
        group = self._groups.get(group_id) if type(group_id) is int else None
        if group is None:
            raise InvalidParameter(f"this node has no group {group_id!r}")
        return group


def _parse_manifest(peer: str, answer: Mapping[str, Any], blobs: Sequence[memoryview]) -> tuple[bytes, int, int]:
    """Return (checkpoint, term, lease). Raises Unavailable."""
    term, lease = answer.get("term"), answer.get("lease")
    if len(blobs) != 1 or type(term) is not int or type(lease) is not int:
        raise Unavailable(f"node {peer} answers snapshot/manifest with something else than a checkpoint")
    return bytes(blobs[0]), term, lease


def _examine(group: SnapshotGroup, raw: bytes) -> tuple[Position, Mapping[bytes, int]]:
    """Return (position, chunks) of a checkpoint that came from a peer. Raises Unavailable."""
    try:
        return covered(raw), group.record.sizes(raw)
    except (cbor2.CBORDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(f"the checkpoint of {group.record.name} that came is none: {error}") from error
