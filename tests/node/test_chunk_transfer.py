"""Chunks between replicas: whatever peers and wires do, what is stored is whole, and what somebody has arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.shard import Shard
from node.chunk_pins import ChunkPins
from node.chunk_transfer import BATCH_BYTES, Progress
from storage.errors import AnnulusError, InvalidParameter, PeerUnreachable, Unavailable
from storage.keys import chunk_key
from storage.segment_files import digest_of
from storage.types import Position, ShardId
from tests.node.wire import Answer, Wire, WiredNode, held, simulated
from tests.sim.world import SimClock, SimLoop, run

SHARD = ShardId(1)
NAMES = ("n1", "n2", "n3", "n4")


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with simulated() as loop:
        yield loop


def some_chunks(count: int, size: int = 1000, seed: int = 0) -> dict[bytes, bytes]:
    dice = Random(seed)
    return {digest_of(data): data for data in (dice.randbytes(dice.randint(1, size)) for _ in range(count))}


def sizes_of(chunks: dict[bytes, bytes]) -> dict[bytes, int]:
    return {digest: len(data) for digest, data in chunks.items()}


def nodes(wire: Wire, loop: SimLoop, names: Sequence[str] = NAMES, **options: Any) -> list[WiredNode]:
    return [WiredNode(name, wire, loop, names, **options) for name in names]


def test_a_fetch_takes_from_all_peers_at_once(loop: SimLoop) -> None:
    """What all peers have comes from each of them; progress ends at the total."""
    wire = Wire()
    first, *others = nodes(wire, loop)
    chunks = some_chunks(40, 1 << 20)
    for other in others:
        other.store.put_many(SHARD, chunks.items())
    progress = Progress(SHARD)
    assert run(loop, first.transfer.fetch(SHARD, sizes_of(chunks), progress=progress)) == []
    assert held(first.store, SHARD) == chunks.keys()
    assert set(progress.bytes_by_peer) == set(NAMES[1:])
    assert progress.bytes_done == progress.bytes_total == sum(map(len, chunks.values()))
    assert sum(other.transfer.bytes_served for other in others) == progress.bytes_total
    assert first.transfer.under_way == []


class UnreliableWire:
    """Loses, damages and garbles answers by the dice; some peers always."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self.hopeless = {name for name in NAMES[1:] if dice.random() < 0.2}

    async def fault(self, caller: str, callee: str, method: str, answer: Answer) -> Answer:
        plain, blobs = answer
        await asyncio.sleep(self._dice.random() * 0.05)
        kind = self._dice.choice(("lost", "damaged", "nonsense", "alien", "empty"))
        if callee not in self.hopeless and self._dice.random() > 0.1:
            return answer
        match kind:
            case "lost":
                raise PeerUnreachable(f"the session to {callee} ended")
            case "damaged" if blobs and blobs[-1]:
                flipped = bytearray(blobs[-1])
                flipped[self._dice.randrange(len(flipped))] ^= 1 << self._dice.randrange(8)
                return plain, [*blobs[:-1], memoryview(bytes(flipped))]
            case "nonsense":
                return {"sent": self._dice.choice([None, 7, ["x"], [b"short"]]), "missing": []}, blobs
            case "alien":
                return {"sent": [digest_of(b"alien")], "missing": []}, [memoryview(b"alien")]
            case _:
                return {"sent": [], "missing": []}, []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_what_somebody_has_arrives_whole(seed: int) -> None:
    """Peers have each a part; answers are lost, damaged or nonsense now and then, some peers give nothing else. After a
    few fetches everything is here that a peer which works has, whole; what was given up is named; nothing that was not
    asked for is stored; a chunk that is here is not asked for again."""
    with simulated() as loop:
        fetch_from_unreliable_peers(loop, Random(seed), seed)


def fetch_from_unreliable_peers(loop: SimLoop, dice: Random, seed: int) -> None:
    wire = Wire()
    first, *others = nodes(wire, loop, seed=seed)
    chunks = some_chunks(dice.randint(0, 60), dice.choice((10, 300_000)), seed)
    shares = {other.name: {d for d in chunks if dice.random() < 0.5} for other in others}
    here = {digest for digest in chunks if dice.random() < 0.2}
    first.store.put_many(SHARD, [(digest, chunks[digest]) for digest in here])
    for other in others:
        other.store.put_many(SHARD, [(digest, chunks[digest]) for digest in shares[other.name]])
    unreliable = UnreliableWire(dice)
    wire.fault = unreliable.fault
    wire.down = {name for name in NAMES[1:] if dice.random() < 0.2}
    useless = unreliable.hopeless | wire.down
    sure = here.union(*(share for name, share in shares.items() if name not in useless))
    possible = here.union(*(share for name, share in shares.items() if name not in wire.down))

    async def fetch() -> list[bytes]:
        for _ in range(20):
            before = held(first.store, SHARD)
            left = await first.transfer.fetch(SHARD, sizes_of(chunks))
            assert before <= held(first.store, SHARD), "what has come stays"
            if not sure & set(left):
                return left
        raise AssertionError("chunks that a peer has do not come")

    left = run(loop, fetch())
    there = held(first.store, SHARD)
    assert there >= sure and there <= possible and there | set(left) == chunks.keys() and not there & set(left)
    calls = wire.calls.total()
    assert run(loop, first.transfer.fetch(SHARD, dict.fromkeys(there, 0))) == []
    assert wire.calls.total() == calls


def test_an_interrupted_fetch_goes_on_where_it_stopped(loop: SimLoop) -> None:
    """Cancelled in the middle, a fetch leaves what has come; the next asks for the rest only."""
    wire = Wire()
    first, second = nodes(wire, loop, NAMES[:2])
    chunks = some_chunks(64, 1 << 20)
    second.store.put_many(SHARD, chunks.items())

    async def interrupt() -> None:
        fetching = loop.create_task(first.transfer.fetch(SHARD, sizes_of(chunks)))
        while len(held(first.store, SHARD)) < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        fetching.cancel()
        await asyncio.wait([fetching])

    run(loop, interrupt())
    there = held(first.store, SHARD)
    assert 20 <= len(there) < 64
    served = second.transfer.bytes_served
    assert run(loop, first.transfer.fetch(SHARD, sizes_of(chunks))) == []
    missing_bytes = sum(len(data) for digest, data in chunks.items() if digest not in there)
    assert second.transfer.bytes_served - served == missing_bytes


def test_a_fetch_keeps_to_its_rate(loop: SimLoop) -> None:
    """In the clock's own time, n bytes take n / rate seconds but for the burst of the first."""
    wire = Wire()
    rate = 8 << 20
    first = WiredNode("n1", wire, loop, NAMES[:2], bytes_per_s=rate)
    second = WiredNode("n2", wire, loop, NAMES[:2])
    chunks = {digest_of(data): data for data in (bytes([i]) * (1 << 20) for i in range(64))}
    second.store.put_many(SHARD, chunks.items())
    assert run(loop, first.transfer.fetch(SHARD, sizes_of(chunks))) == []
    assert 7 <= loop.now_s <= 9


def test_a_reply_is_bounded(loop: SimLoop) -> None:
    """However much is asked for with one call, about BATCH_BYTES come back, at least one chunk."""
    wire = Wire()
    first, second = nodes(wire, loop, NAMES[:2])
    chunks = {digest_of(data): data for data in (bytes([i]) * (3 << 20) for i in range(5))}
    chunks[digest_of(bytes(9 << 20))] = bytes(9 << 20)
    second.store.put_many(SHARD, chunks.items())
    for order in (list(chunks), list(reversed(chunks))):
        arguments = {"shard": SHARD, "digests": order}
        _, blobs = run(loop, first.mesh.call("n2", "chunks/get", arguments, timeout_s=9))
        assert len(blobs) == 1 and (len(blobs[0]) <= BATCH_BYTES or order[0] == digest_of(blobs[0]))
    assert run(loop, first.transfer.fetch(SHARD, sizes_of(chunks))) == []


def test_a_damaged_chunk_is_not_served_but_repaired(loop: SimLoop) -> None:
    """Whoever asks for a chunk that has rotten here gets it elsewhere, and here it is fetched anew."""
    wire = Wire()
    first, second, third = nodes(wire, loop, NAMES[:3])
    chunks = some_chunks(3)
    for other in (second, third):
        other.store.put_many(SHARD, chunks.items())
    rotten = next(iter(chunks))
    second.store.rot(chunk_key(SHARD, rotten))

    async def fetch() -> None:
        _, blobs = await first.mesh.call("n2", "chunks/get", {"shard": SHARD, "digests": [rotten]}, timeout_s=9)
        assert not blobs
        assert await first.transfer.fetch(SHARD, sizes_of(chunks)) == []
        await asyncio.sleep(1)

    run(loop, fetch())
    assert held(second.store, SHARD) == held(first.store, SHARD) == chunks.keys()
    assert second.transfer.chunks_repaired == 1
    wire.down = {"n2", "n3"}
    first.store.rot(chunk_key(SHARD, rotten))
    assert not run(loop, first.transfer.repair(SHARD, rotten))


@pytest.mark.parametrize(
    ("down", "have"), [((), {"n2", "n3"}), (("n2",), {"n3"}), (("n2", "n3"), set())], ids=["all", "one", "none"]
)
def test_chunks_are_shipped_to_whoever_is_up(loop: SimLoop, down: Sequence[str], have: set[str]) -> None:
    """A leader proposes what a majority has; without one it does not. What was shipped is kept for its message."""
    wire = Wire()
    first, *others = nodes(wire, loop, NAMES[:3])
    chunks = some_chunks(30, 1 << 18)
    first.store.put_many(SHARD, chunks.items())
    wire.down = set(down)
    if len(have) + 1 >= 2:
        run(loop, first.transfer.ship(SHARD, sizes_of(chunks)))
    else:
        with pytest.raises(Unavailable, match="on 1 of 3 replicas"):
            run(loop, first.transfer.ship(SHARD, sizes_of(chunks)))
    assert {other.name for other in others if held(other.store, SHARD) == chunks.keys()} == have
    assert {other.name for other in others if other.pins.kept == chunks.keys()} == have


def test_a_slow_replica_is_left_behind(loop: SimLoop) -> None:
    """Shipping ends after a time although one replica has not answered."""
    wire = Wire()
    first, *_ = nodes(wire, loop, NAMES[:3])
    first.store.put_many(SHARD, some_chunks(3).items())

    async def slow(caller: str, callee: str, method: str, answer: Answer) -> Answer:
        if callee == "n3":
            await asyncio.sleep(10_000)
        return answer

    wire.fault = slow
    run(loop, first.transfer.ship(SHARD, sizes_of(some_chunks(3))))
    assert loop.now_s < 100


def test_a_full_disk_ends_a_fetch_and_is_told(loop: SimLoop) -> None:
    """A replica without room says so to its leader, who counts it out; its own fetch raises OSError."""
    wire = Wire()
    first, second = nodes(wire, loop, NAMES[:2])
    chunks = some_chunks(3)
    first.store.put_many(SHARD, chunks.items())
    second.store.full = True
    with pytest.raises(Unavailable, match="too few"):
        run(loop, first.transfer.ship(SHARD, sizes_of(chunks)))
    with pytest.raises(OSError, match="No space"):
        run(loop, second.transfer.fetch(SHARD, sizes_of(chunks)))
    assert second.store_errors


@pytest.mark.parametrize(
    ("method", "arguments", "blobs"),
    [
        ("chunks/get", {}, []),
        ("chunks/get", {"shard": "1", "digests": []}, []),
        ("chunks/get", {"shard": 1}, []),
        ("chunks/get", {"shard": 1, "digests": [b"short"]}, []),
        ("chunks/get", {"shard": 1, "digests": [bytes(16)] * 5000}, []),
        ("chunks/want", {"shard": 1}, []),
        ("chunks/want", {"shard": 1}, [b""]),
        ("chunks/want", {"shard": 1}, [b"\xff\xff"]),
        ("chunks/want", {"shard": 1}, [b"\x81\x82\x41a\x01"]),
        ("chunks/want", {"shard": 1}, [b"\x81\x01"]),
    ],
)
def test_bad_calls_are_refused(loop: SimLoop, method: str, arguments: dict[str, Any], blobs: list[bytes]) -> None:
    """Arguments that do not fit are an error of the caller, and change nothing."""
    wire = Wire()
    first, second = nodes(wire, loop, NAMES[:2])
    with pytest.raises(InvalidParameter):
        run(loop, first.mesh.call("n2", method, arguments, blobs, timeout_s=9))
    assert held(second.store, SHARD) == set()


def test_a_shard_that_is_not_here_is_refused(loop: SimLoop) -> None:
    """A node gives and takes chunks of its own shards only."""
    wire = Wire()
    first = WiredNode("n1", wire, loop, ["n1", "n2"])
    WiredNode("n2", wire, loop, ["n1", "n3"])
    with pytest.raises(AnnulusError, match="does not hold shard 1"):
        run(loop, first.mesh.call("n2", "chunks/get", {"shard": 1, "digests": []}, timeout_s=9))


# leases


def shard_with(garbage: set[bytes], position: int = 0) -> Shard:
    shard = Shard(SHARD, lambda digest: b"")
    shard.garbage = garbage
    shard.position = Position(position)
    return shard


def test_what_is_kept_is_not_removed(loop: SimLoop) -> None:
    """Garbage under a lease survives; without it, or after its end, it goes."""
    pins = ChunkPins(SimClock(loop))
    a, b, c = (digest_of(one) for one in (b"a", b"b", b"c"))

    async def scenario() -> None:
        lease = await pins.keep([a, b], 60, loose=False)
        shard = shard_with({a, c})
        assert pins.doom(shard, 0) == {c}
        pins.spare()
        await asyncio.sleep(50)
        assert pins.renew(lease, 60)
        await asyncio.sleep(50)
        assert pins.doom(shard, 0) == {c}
        pins.spare()
        await asyncio.sleep(11)
        assert pins.doom(shard, 0) == {a, c} and pins.kept == set()
        assert not pins.renew(lease, 60)

    run(loop, scenario())


def test_a_lease_waits_for_what_is_being_removed(loop: SimLoop) -> None:
    """Nobody is told that a chunk is kept which a checkpoint is just removing."""
    pins = ChunkPins(SimClock(loop))
    a = digest_of(b"a")

    async def scenario() -> None:
        assert pins.doom(shard_with({a}), 0) == {a}
        keeping = loop.create_task(pins.keep([a], 60))
        await asyncio.sleep(1)
        assert not keeping.done()
        pins.spare()
        await keeping
        assert pins.doom(shard_with({a}), 0) == set()

    run(loop, scenario())


def test_chunks_whose_message_never_comes_are_garbage_in_the_end(loop: SimLoop) -> None:
    """Not before all that stood in the log when their time was up is applied; and not if a segment has them."""
    pins = ChunkPins(SimClock(loop))
    a, b = digest_of(b"a"), digest_of(b"b")
    shard = shard_with(set(), position=5)
    shard.remember([b])

    async def scenario() -> None:
        await pins.keep([a, b], 600)
        await asyncio.sleep(601)
        assert pins.doom(shard, 7) == set()
        shard.position = Position(6)
        assert pins.doom(shard, 8) == set()
        shard.position = Position(7)
        assert pins.doom(shard, 9) == {a} == shard.garbage

    run(loop, scenario())
