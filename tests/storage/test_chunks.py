"""One contract for every chunk store: what is read is what was written, or it is called damaged; commits are atomic."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from storage.chunks import ChunkFault, ChunkStore, LevelDbChunks, RecordFault
from storage.errors import ChunkDamaged, DirectoryInUse, Unavailable
from storage.keys import chunk_key, describe, manifest_key, parse, record_key
from storage.segment_files import digest_of
from storage.types import ShardId
from tests.sim.chunks import SimChunks

SHARD, OTHER = ShardId(3), ShardId(300)
Make = Callable[[], ChunkStore]


def chunks(*contents: bytes) -> list[tuple[bytes, bytes]]:
    return [(digest_of(one), one) for one in contents]


def test_chunks_come_back_whole(store: ChunkStore) -> None:
    """A chunk is found under its shard and digest, also an empty or a large one, and under no other shard."""
    some = chunks(b"one", b"", os.urandom(3 << 20))
    store.put_many(SHARD, some)
    store.put_many(SHARD, some[:1])
    assert [store.get(SHARD, digest) for digest, _ in some] == [data for _, data in some]
    assert store.chunk_digests(SHARD) == sorted(digest for digest, _ in some)
    assert store.chunk_digests(OTHER) == []
    with pytest.raises(ChunkFault, match=f"{some[0][0].hex()} of shard 300 is damaged .it is missing"):
        store.get(OTHER, some[0][0])


def test_missing_names_what_is_not_there(store: ChunkStore) -> None:
    """`missing` gives back the digests without a chunk, in their order; a chunk of another shard does not count."""
    there, other, absent = (digest_of(one) for one in (b"there", b"other", b"absent"))
    store.put_many(SHARD, chunks(b"there"))
    store.put_many(OTHER, chunks(b"other"))
    assert store.missing(SHARD, [other, there, absent, b"\xff" * 16]) == [other, absent, b"\xff" * 16]
    assert store.missing(SHARD, []) == []


def test_commit_writes_and_removes_together(store: ChunkStore) -> None:
    """A commit puts records, removes others and removes chunks; `read` and `scan` see just that, in key order."""
    store.put_many(SHARD, chunks(b"old", b"kept"))
    store.commit(
        [(record_key("segment", 20010), b"b"), (record_key("segment", 2001), b"a"), (manifest_key(SHARD), b"")]
    )
    store.commit([(record_key("node"), b"n")], [manifest_key(SHARD)], [(SHARD, digest_of(b"old"))])
    assert store.read(manifest_key(SHARD)) is None
    assert store.read(record_key("node")) == b"n"
    assert list(store.scan(record_key("segment"))) == [
        (record_key("segment", 2001), b"a"),
        (record_key("segment", 20010), b"b"),
    ]
    assert list(store.scan(record_key("segment", 2001))) == [(record_key("segment", 2001), b"a")]
    assert store.chunk_digests(SHARD) == [digest_of(b"kept")]
    store.delete_chunks(SHARD, [digest_of(b"kept"), digest_of(b"never there")])
    assert store.chunk_digests(SHARD) == []


def test_a_chunk_under_a_wrong_name_is_damaged(store: ChunkStore) -> None:
    """Bytes that do not have the digest they are asked for by are refused."""
    store.put_many(SHARD, [(digest_of(b"this"), b"that")])
    with pytest.raises(ChunkDamaged, match="its bytes have another digest"):
        store.get(SHARD, digest_of(b"this"))


def test_what_was_put_or_committed_survives_a_crash() -> None:
    """Chunks are durable when put, records when committed; removals of chunks may come undone, the last ones first."""
    for seed in range(30):
        sim = SimChunks(Random(seed))
        sim.put_many(SHARD, chunks(b"a", b"b", b"c", b"d"))
        sim.commit([(manifest_key(SHARD), b"a")])
        sim.put_many(SHARD, chunks(b"e"))
        sim.delete_chunks(SHARD, [digest_of(one) for one in (b"b", b"c", b"d")])
        sim.crash()
        assert sim.read(manifest_key(SHARD)) == b"a"
        kept = set(sim.chunk_digests(SHARD)) - {digest_of(b"a"), digest_of(b"e")}
        assert kept in [{digest_of(one) for one in (b"b", b"c", b"d")[n:]} for n in range(4)]
        assert sim.get(SHARD, digest_of(b"e")) == b"e"


def test_a_killed_process_keeps_what_it_committed(tmp_path: Path) -> None:
    """A LevelDB whose process died without closing it opens again with every committed chunk and record."""
    path = str(tmp_path / "chunks")
    script = (
        "import os, sys\n"
        "from storage.chunks import LevelDbChunks\n"
        "from storage.keys import manifest_key\n"
        "from storage.segment_files import digest_of\n"
        f"store = LevelDbChunks.open({path!r})\n"
        "data = [bytes([i]) * 2_000_000 for i in range(20)]\n"
        "store.put_many(3, [(digest_of(one), one) for one in data])\n"
        "store.commit([(manifest_key(3), b'twenty')])\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert done.returncode == 9
    store = LevelDbChunks.open(path)
    assert store.read(manifest_key(SHARD)) == b"twenty"
    for i in range(20):
        assert store.get(SHARD, digest_of(bytes([i]) * 2_000_000)) == bytes([i]) * 2_000_000
    store.close()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """After any one byte of LevelDB's table file is changed, a read gives the right bytes or says damaged."""
    rng = Random(5)
    path = tmp_path / "chunks"
    store = LevelDbChunks.open(str(path))
    some = chunks(*(rng.randbytes(300) for _ in range(40)))
    store.put_many(SHARD, some)
    store.commit([(record_key("segment", i), bytes([i]) * 50) for i in range(20)])
    store.compact()
    store.close()
    (table,) = [*path.glob("*.ldb"), *path.glob("*.sst")]
    good = table.read_bytes()
    noticed = 0
    for _ in range(150):
        place = rng.randrange(len(good))
        table.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
        noticed += _damage_seen(str(path), some)
    table.write_bytes(good)
    assert noticed > 100
    assert not _damage_seen(str(path), some)


def _damage_seen(path: str, some: list[tuple[bytes, bytes]]) -> bool:
    try:
        store = LevelDbChunks.open(path)
    except ChunkDamaged:
        return True
    seen = False
    for digest, data in some:
        try:
            assert store.get(SHARD, digest) == data
        except ChunkDamaged:
            seen = True
    for i in range(20):
        try:
            assert store.read(record_key("segment", i)) in (bytes([i]) * 50, None)
        except ChunkDamaged:
            seen = True
    store.close()
    return seen


def test_rot_in_memory_is_noticed_too() -> None:
    """The simulated store finds a rotten chunk and a rotten record as the real one does."""
    sim = SimChunks(Random(1))
    sim.put_many(SHARD, chunks(b"chunk"))
    sim.commit([(manifest_key(SHARD), b"record")])
    sim.rot(chunk_key(SHARD, digest_of(b"chunk")))
    sim.rot(manifest_key(SHARD))
    with pytest.raises(ChunkFault):
        sim.get(SHARD, digest_of(b"chunk"))
    with pytest.raises(RecordFault, match="record manifest/3 is damaged"):
        sim.read(manifest_key(SHARD))


def test_a_full_disk_is_told_from_a_failing_one() -> None:
    """ENOSPC and other failures surface as OSError with their number; nothing is written; reopening mends it."""
    sim = SimChunks(Random(1))
    sim.commit([(manifest_key(SHARD), b"1")])
    sim.full = True
    with pytest.raises(OSError) as full:
        sim.commit([(manifest_key(SHARD), b"2")])
    assert full.value.errno == errno.ENOSPC
    sim.full, sim.failing_commits = False, 1
    with pytest.raises(OSError) as still_full:
        sim.put_many(SHARD, chunks(b"x"))
    assert still_full.value.errno == errno.ENOSPC
    sim.reopen()
    with pytest.raises(OSError) as broken:
        sim.commit([(manifest_key(SHARD), b"3")])
    assert broken.value.errno == errno.EIO
    with pytest.raises(OSError, match="an earlier write failed"):
        sim.put_many(SHARD, chunks(b"x"))
    sim.reopen()
    assert sim.read(manifest_key(SHARD)) == b"1"
    sim.commit([(manifest_key(SHARD), b"4")])


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs to mount a small file system")
def test_leveldb_on_a_full_disk(tmp_path: Path) -> None:
    """LevelDB out of room raises ENOSPC on every write, goes on reading, and writes again after room and reopen."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        ballast = small / "ballast"
        ballast.write_bytes(bytes(6 << 20))
        store = LevelDbChunks.open(str(small / "chunks"))
        store.commit([(manifest_key(SHARD), b"1")])
        with pytest.raises(OSError) as full:
            for _ in range(12):
                store.put_many(SHARD, chunks(os.urandom(1 << 20)))
        assert full.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as still_full:
            store.commit([(manifest_key(SHARD), b"small")])
        assert still_full.value.errno == errno.ENOSPC
        assert store.read(manifest_key(SHARD)) == b"1"
        ballast.unlink()
        store.reopen()
        store.commit([(manifest_key(SHARD), b"2")])
        assert store.read(manifest_key(SHARD)) == b"2"
        store.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_reopening_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While LevelDB cannot be opened again reads are Unavailable and writes say why; the next try mends both."""
    store = LevelDbChunks.open(str(tmp_path / "chunks"))
    store.commit([(manifest_key(SHARD), b"1")])
    with monkeypatch.context() as patch:
        patch.setattr("storage.chunks._open", _no_room)
        for _ in range(2):
            with pytest.raises(OSError, match="no room"):
                store.reopen()
            with pytest.raises(Unavailable, match="try again"):
                store.read(manifest_key(SHARD))
            with pytest.raises(OSError, match="has not been opened again"):
                store.commit([(manifest_key(SHARD), b"2")])
    store.reopen()
    assert store.read(manifest_key(SHARD)) == b"1"
    store.commit([(manifest_key(SHARD), b"2")])
    store.close()
    store.close()


def _no_room(path: str) -> None:
    raise OSError(errno.ENOSPC, f"{path}: no room")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Opening a directory that is open names it and says what to do."""
    store = LevelDbChunks.open(str(tmp_path / "chunks"))
    with pytest.raises(DirectoryInUse, match=r"another process has .*chunks open; stop that one"):
        LevelDbChunks.open(str(tmp_path / "chunks"))
    store.close()
    LevelDbChunks.open(str(tmp_path / "chunks")).close()


def test_removing_chunks_frees_space(tmp_path: Path) -> None:
    """After chunks are removed and the store is compacted, the files are smaller by about as much."""
    path = tmp_path / "chunks"
    store = LevelDbChunks.open(str(path))
    some = chunks(*(os.urandom(1 << 20) for _ in range(40)))
    store.put_many(SHARD, some)
    store.compact()
    before = _bytes_in(path)
    assert before > 40 << 20
    store.commit([(manifest_key(SHARD), b"fewer")], (), [(SHARD, digest) for digest, _ in some[:35]])
    store.compact()
    assert _bytes_in(path) < 8 << 20
    assert [store.get(SHARD, digest) for digest, _ in some[35:]] == [data for _, data in some[35:]]
    store.close()


def _bytes_in(path: Path) -> int:
    return sum(one.stat().st_size for one in path.iterdir())


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (chunk_key(ShardId(3), bytes(range(16))), "chunk shard=3 digest=000102030405060708090a0b0c0d0e0f"),
        (record_key("manifest", 3), "record manifest/3"),
        (record_key("node"), "record node"),
        (b"z?", "unknown key 7a3f"),
        (b"c123", "unknown key 63313233"),
    ],
)
def test_keys_read_as_text(key: bytes, text: str) -> None:
    """A person can read any key, also one that is none of ours."""
    assert describe(key) == text
    if not text.startswith("unknown"):
        assert str(parse(key)) == text


def test_keys_sort_by_their_numbers() -> None:
    """Keys are in the order of shard and ids, as numbers."""
    numbers = [0, 1, 255, 256, 2001, 20010, 1 << 31]
    assert sorted(record_key("segment", n) for n in reversed(numbers)) == [record_key("segment", n) for n in numbers]
    keys = [chunk_key(ShardId(n), bytes(16)) for n in numbers]
    assert sorted(keys, reverse=True)[::-1] == keys


def test_a_store_that_cannot_read_its_own_tables_is_not_opened_again(tmp_path: Path) -> None:
    """When LevelDB refuses writes because a table is damaged, that is EIO; the next start says what is the matter, as
    it would go on like this for ever."""
    path = str(tmp_path / "chunks")
    store = LevelDbChunks.open(path)
    data = [b"%d" % number * 400 for number in range(12_000)]
    store.put_many(SHARD, chunks(*data))
    store.close()
    LevelDbChunks.open(path).close()  # which moves what its log holds to tables
    for table in Path(path).glob("*.ldb"):
        spoiled = bytearray(table.read_bytes())
        for at in range(100, len(spoiled) * 3 // 4, 7):  # also where it says how long its keys are
            spoiled[at] ^= 0xFF
        table.write_bytes(spoiled)
    store = LevelDbChunks.open(path)
    with pytest.raises(OSError, match="orrupt") as told:
        for _ in range(5):
            store.put_many(SHARD, chunks(*data))
            store.compact()
    assert told.value.errno == errno.EIO
    with pytest.raises(OSError):
        store.put_many(SHARD, chunks(b"one more"))
    store.close()
    with pytest.raises(ChunkDamaged, match="tables that it cannot read"):
        LevelDbChunks.open(path)


def test_damage_in_a_chunk_does_not_keep_the_store_from_writing(tmp_path: Path) -> None:
    """Bytes that change inside a chunk spoil that chunk alone: the store goes on, also after its tables were rewritten,
    and a chunk that is put again is whole again."""
    path = str(tmp_path / "chunks")
    data = [Random(number).randbytes(50_000) + bytes(50_000) for number in range(200)]
    store = LevelDbChunks.open(path)
    store.put_many(SHARD, chunks(*data))
    store.close()
    LevelDbChunks.open(path).close()
    for table in Path(path).glob("*.ldb"):
        spoiled = bytearray(table.read_bytes())
        for number in range(0, 200, 3):
            at = spoiled.find(data[number])
            if at >= 0:
                spoiled[at + 70_000] ^= 1
        table.write_bytes(spoiled)
    store = LevelDbChunks.open(path)
    for _ in range(2):
        damaged = []
        for number, one in enumerate(data):
            try:
                assert store.get(SHARD, digest_of(one)) == one
            except ChunkFault:
                damaged.append(number)
        assert damaged == list(range(0, 200, 3))
        store.compact()
    store.put_many(SHARD, chunks(*(data[number] for number in damaged)))
    store.compact()
    assert all(store.get(SHARD, digest_of(one)) == one for one in data)
    store.close()
