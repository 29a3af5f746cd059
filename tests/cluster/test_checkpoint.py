"""Checkpoints against a replica that never stops: whenever the power goes, the manifest and the log's tail give back
the same shard, and no chunk is lost or left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any

import cbor2
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.checkpoint import FrozenShard, Written, freeze, install, manifest_key, referenced, restore, write
from cluster.message import Entry
from storage.errors import ChunkDamaged
from storage.keys import chunk_key
from storage.schema import DataType
from storage.types import Position, ShardId
from tests.cluster.shards import SHARD, WEIGHTS, Step, World, hold, script, summary, take
from tests.sim.chunks import SimChunks


class PowerLoss(Exception):
    """The store stops in the middle of something."""


class FusedChunks(SimChunks):
    """A store that stops before its n-th change from now, if it is told so."""

    fuse: int | None = None

    def step(self) -> None:
        if self.fuse is not None:
            if self.fuse == 0:
                raise PowerLoss
            self.fuse -= 1

    def put_many(self, shard_id: ShardId, chunks: Any) -> None:
        super().put_many(shard_id, chunks)
        self.step()

    def commit(self, *arguments: Any, **named: Any) -> None:
        super().commit(*arguments, **named)
        self.step()


class CheckpointedWorld(World):
    """`first` takes checkpoints, loses its power, and starts again from its last one and the log's tail."""

    def __init__(self, pk: DataType, metric: str, dice: Random) -> None:
        self.fused = FusedChunks(dice)
        super().__init__(pk, metric, self.fused)
        self.frozen: FrozenShard | None = None
        self.written: Written | None = None
        self.trimmed = Position(0)
        self.swept = True

    def checkpoint(self) -> None:
        """Do what is next of a checkpoint: freeze, write, or install. Messages are applied in between."""
        if self.written is not None:
            install(self.first, self.written)
            assert self.trimmed <= self.written.position
            self.trimmed, self.frozen, self.written, self.busy = self.written.position, None, None, False
        elif self.frozen is not None:
            self.written = write(self.frozen, self.fused)
            self.check_manifest()
        else:
            self.frozen, self.busy = freeze(self.first), True

    def whole_checkpoint(self) -> None:
        self.checkpoint()
        while self.busy:
            self.checkpoint()

    def full(self) -> None:
        """The disk is full while a checkpoint is written; it is given up, and nothing is lost."""
        if self.written is None:
            self.fused.full = True
            with pytest.raises(OSError, match="No space"):
                write(freeze(self.first), self.fused)
            self.fused.full = self.busy = self.swept = False
            self.fused.reopen()
            self.frozen = None
            self.check_manifest()

    def crash(self, fuse: int | None) -> None:
        """Lose the power, now or (with a fuse) at some change of the store while a checkpoint is taken."""
        if fuse is not None and self.written is None:
            self.fused.fuse = fuse
            with suppress(PowerLoss):
                self.written = write(self.frozen or freeze(self.first), self.fused)
            self.fused.fuse = None
        self.fused.crash()
        self.frozen, self.written, self.busy, self.swept = None, None, False, False
        self.check_manifest()
        self.restart()

    def restart(self) -> None:
        self.first = restore(SHARD, self.fused)
        assert self.first.position >= self.trimmed, "the log is not cut above the checkpoint"
        raw = self.fused.read(manifest_key(SHARD))
        assert {digest for _, digest in referenced(raw or EMPTY)} == set(self.first.digests)
        for position, payload in self.log:
            if position > self.trimmed:  # also what the checkpoint has already
                self.first.apply(position, Entry.decode(payload))

    def sweep(self) -> None:
        """Remove what a crash left, as a node does when it starts."""
        if not self.busy:
            needed = self.first.digests.keys() | self.first.garbage
            self.fused.delete_chunks(SHARD, set(self.fused.chunk_digests(SHARD)) - needed)
            self.swept = True

    def check_manifest(self) -> None:
        raw = self.fused.read(manifest_key(SHARD))
        there = set(self.fused.chunk_digests(SHARD))
        lost = [(what, digest.hex()) for what, digest in referenced(raw or EMPTY) if digest not in there]
        assert not lost, "a committed manifest has all its chunks"

    def check(self) -> None:
        super().check()
        assert summary(self.first) == summary(self.second)
        there, needed = set(self.fused.chunk_digests(SHARD)), set(self.first.digests)
        assert needed <= there, "no chunk that is needed is missing"
        if self.swept and self.written is None:
            assert there == needed | self.first.garbage, "what is not needed is known to be garbage"


EMPTY = b"\xa1\x6bcollections\x80"  # CBOR: a manifest without collections
CHECKPOINT_WEIGHTS = {**WEIGHTS, "checkpoint": 25, "whole_checkpoint": 4, "crash": 4, "sweep": 3, "full": 1}


def checkpointed_script(dice: Random) -> list[Step]:
    steps = script(dice, 100, CHECKPOINT_WEIGHTS)
    return [
        ("crash", dice.choice([None, 0, dice.randrange(30)])) if name == "crash" else (name, *arguments)
        for name, *arguments in ((one[0], *(one[1:] if one[0] in WEIGHTS else ())) for one in steps)
    ]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [
                *[("create", 10), ("insert", 10, 1, [1, 2, 3], 0), ("whole_checkpoint",)],
                *[("truncate", 10), ("insert", 10, 1, [1, 2, 3], 0), ("whole_checkpoint",)],
            ],
            id="the same rows are inserted again before the first ones' chunks are removed",
        ),
    ],
)
def test_no_chunk_is_lost(steps: list[Step]) -> None:
    """What a checkpoint writes it does not remove, and what it removes nobody needs."""
    world = CheckpointedWorld(DataType.INT64, "L2", Random(0))
    for step in [*steps, ("crash", None), ("sweep",), ("whole_checkpoint",), ("crash", None)]:
        take(world, step)
        world.check()


@settings(phases=[Phase.generate])
@given(
    pk=st.sampled_from([DataType.INT64, DataType.VARCHAR]),
    metric=st.sampled_from(["L2", "COSINE"]),
    seed=st.integers(0, 1 << 32),
)
def test_a_restart_gives_the_same_shard(pk: DataType, metric: str, seed: int) -> None:
    """Crashed at any moment, also inside a checkpoint, restored and brought up to the log's end, a shard equals the one
    that never stopped: rows, deletes, segments, outcomes, tick and position. A committed manifest always has all its
    chunks; after the next checkpoint and sweep nothing else is left."""

    def run(steps: Sequence[Step]) -> None:
        world = CheckpointedWorld(pk, metric, Random(seed))
        for step in steps:
            take(world, step)
            world.check()
        world.crash(None)
        world.check()
        world.sweep()
        world.whole_checkpoint()
        world.whole_checkpoint()
        assert set(world.fused.chunk_digests(SHARD)) == set(world.first.digests)
        assert not world.first.garbage
        world.crash(None)
        world.check()

    hold(checkpointed_script(Random(seed)), run)


def flushed_world() -> CheckpointedWorld:
    world = CheckpointedWorld(DataType.INT64, "L2", Random(1))
    script = [
        *[("create", 10), ("create_index", 10, 1), ("load", 10, None), ("insert", 10, 1, [1, 2, 3], 0)],
        *[("seal", 10, None), ("flush", 10, 0, True), ("index", 10, 0, 1, 0, True), ("delete", 10, [2], None)],
        *[("insert", 10, 1, [4, 5], 1), ("whole_checkpoint",)],
    ]
    for step in script:
        take(world, step)
    return world


def test_a_damaged_manifest_is_named() -> None:
    """A manifest with a flipped bit is refused by its name, never half read."""
    world = flushed_world()
    world.fused.rot(manifest_key(SHARD))
    with pytest.raises(ChunkDamaged, match=f"record manifest/{SHARD} is damaged"):
        restore(SHARD, world.fused)


def test_a_manifest_of_another_version_is_refused() -> None:
    """What a newer program wrote is not guessed at."""
    world = flushed_world()
    raw = world.fused.read(manifest_key(SHARD))
    assert raw is not None
    newer = cbor2.dumps({**cbor2.loads(raw), "version": 99})
    world.fused.commit([(manifest_key(SHARD), newer)])
    with pytest.raises(ChunkDamaged, match=f"manifest of shard {SHARD} has version 99"):
        restore(SHARD, world.fused)


def test_a_damaged_chunk_is_named() -> None:
    """Each chunk that a restart reads is checked: one flipped bit, or none there, and the restart names that chunk.
    Indexes are read afterwards, by background work."""
    world = flushed_world()
    raw = world.fused.read(manifest_key(SHARD))
    assert raw is not None
    chunks = list(referenced(raw))
    for what, digest in chunks:
        if " index " in what:
            continue
        key = chunk_key(SHARD, digest)
        for damage in ("rot", "lose"):
            damaged = flushed_world().fused
            if damage == "rot":
                damaged.rot(key)
            else:
                damaged.delete_chunks(SHARD, [digest])
            with pytest.raises(ChunkDamaged, match=digest.hex()):
                restore(SHARD, damaged)


def test_an_empty_store_gives_an_empty_shard() -> None:
    """Before its first checkpoint a shard starts at the beginning of its log."""
    shard = restore(SHARD, SimChunks(Random(0)))
    assert (shard.position, shard.tick, shard.collections) == (0, 0, {})


def test_what_a_checkpoint_names_is_what_its_shard_counts() -> None:
    """`referenced` names every chunk once for each need, with what needs it."""
    world = flushed_world()
    raw = world.fused.read(manifest_key(SHARD))
    assert raw is not None
    named = list(referenced(raw))
    assert Counter(digest for _, digest in named) == world.first.digests
    assert {what.split(" ", 4)[4].split()[0] for what, _ in named} == {"field", "index", "deletes"}
