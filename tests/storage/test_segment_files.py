"""Chunks of segments, delete logs and key lookups: small parts, each against something simpler."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.chunks import ChunkFault
from storage.columns import Batch, ScalarColumn
from storage.deletes import DeleteLog, DeletesDamaged
from storage.errors import ChunkDamaged
from storage.filter import compile_filter
from storage.growing import PART_BYTES_MAX, PART_ROWS_MAX, GrowingSegment
from storage.key_lookup import KeyDict, KeySet, batch_keys, hash_texts, sorted_lookup
from storage.keys import chunk_key
from storage.schema import DataType
from storage.sealed import SealedSegment, prepare, prepare_from_files
from storage.segment_files import (
    CHUNK_BYTES,
    TICK_FIELD,
    BlobFiles,
    SegmentFiles,
    read_blob,
    read_rows,
    read_segment,
    write_blob,
    write_segment,
)
from storage.stats import batch_stats, column_stats
from storage.strings import StringArray
from storage.types import PartitionId, SegmentId, ShardId, Tick
from tests.sim.chunks import SimChunks
from tests.storage.rows import GROUP, META, NOTE, PK, VECTOR, as_keys, key_of, make_batch, make_collection, numbered

SHARD = ShardId(1)
WIDE = make_collection(dim=200)


def stored(batch: Batch, ticks: np.ndarray) -> tuple[SegmentFiles, SimChunks]:
    store = SimChunks(Random(0))
    files, chunks = write_segment(batch, ticks)
    store.put_many(SHARD, chunks)
    return SegmentFiles.from_dict(files.to_dict()), store


def test_a_segment_is_cut_and_comes_back() -> None:
    """Columns become chunks of about CHUNK_BYTES each, by their own width, and read back equal, whole or in part."""
    batch = numbered(WIDE, range(6_000))
    ticks = np.arange(6_000, dtype=np.int64) + 5
    files, store = stored(batch, ticks)
    assert [len(files.fields[i]) for i in (TICK_FIELD, PK, VECTOR)] == [1, 1, 5]
    assert all(CHUNK_BYTES * 0.9 < ref.bytes < CHUNK_BYTES * 1.01 for ref in files.fields[VECTOR][:-1])
    back, back_ticks = read_segment(files, lambda digest: store.get(SHARD, digest))
    assert back.to_bytes() == batch.to_bytes() and (back_ticks == ticks).all()
    some, _ = read_segment(files, lambda digest: store.get(SHARD, digest), [GROUP])
    assert list(some.columns) == [GROUP]


def test_rows_are_read_from_their_chunks_only() -> None:
    """Fetching rows reads each chunk that holds one once, and gives them in the order asked, repeats included."""
    batch = numbered(WIDE, range(6_000))
    files, store = stored(batch, np.zeros(6_000, np.int64))
    offsets = np.array([5_999, 0, 3, 5_999], np.int64)
    column = read_rows(files, VECTOR, offsets, lambda digest: store.get(SHARD, digest))
    assert store.reads == 2
    assert (np.array(column.to_list()) == np.array(batch.columns[VECTOR].to_list())[offsets]).all()
    assert len(read_rows(files, NOTE, np.empty(0, np.int64), lambda digest: store.get(SHARD, digest))) == 0


def test_chunks_depend_on_rows_only() -> None:
    """The same rows give the same chunks whatever batches they came in, and whether a mask says that all are valid."""
    whole = numbered(WIDE, range(900))
    parts = [whole.slice(0, 1), whole.slice(1, 400), whole.slice(400, 900)]
    masked = dict(whole.columns)
    group = masked[GROUP]
    assert isinstance(group, ScalarColumn)
    masked[GROUP] = ScalarColumn(group.values, np.ones(900, np.bool_))
    ticks = np.arange(900, dtype=np.int64)
    digests = [write_segment(one, ticks)[0] for one in (whole, Batch.concat(parts), Batch(masked, 900))]
    assert digests[0] == digests[1] == digests[2]


def test_segments_share_no_chunks() -> None:
    """Columns that are alike in two segments are different chunks, so that removing one segment spares the other."""
    batch = numbered(WIDE, range(100))
    files = [write_segment(batch, np.full(100, tick, np.int64))[0] for tick in (1, 2)]
    assert not set(files[0].digests) & set(files[1].digests)


def test_every_rotten_chunk_is_found() -> None:
    """Whichever chunk of a segment rots, reading the segment raises with its shard and digest."""
    files, store = stored(numbered(WIDE, range(3_000)), np.zeros(3_000, np.int64))
    for digest in files.digests:
        good = store.get(SHARD, digest)
        store.rot(chunk_key(SHARD, digest))
        with pytest.raises(ChunkDamaged) as raised:
            prepare_from_files(files, lambda one: store.get(SHARD, one), WIDE)
        assert isinstance(raised.value, ChunkFault)
        assert (raised.value.shard_id, raised.value.digest) == (SHARD, digest)
        store.put_many(SHARD, [(digest, good)])


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_blobs_come_back(size: int) -> None:
    """A blob of any size is cut into chunks and put together again."""
    blob = np.random.default_rng(size).bytes(size)
    files, chunks = write_blob(blob)
    found = dict(chunks)
    assert read_blob(BlobFiles.from_dict(files.to_dict()), found.__getitem__) == blob
    assert files.nbytes == size and len(files.digests) == -(-size // CHUNK_BYTES)


@given(st.lists(st.lists(st.integers(0, 49), unique=True, max_size=5), max_size=12), st.integers(0, 20))
def test_delete_log_is_a_list(steps: list[list[int]], read_at: int) -> None:
    """Views are prefixes that later deletes do not touch; bytes round trip; damage is refused."""
    log = DeleteLog(50)
    dead: list[tuple[int, int]] = []
    views = []
    for tick, offsets in enumerate(steps):
        fresh = [one for one in offsets if one not in {o for o, _ in dead}]
        log.record(np.array(fresh, np.int64), Tick(tick))
        dead += [(one, tick) for one in fresh]
        views.append((log.view(), list(dead)))
    for view, expected in views:
        assert list(zip(view.offsets.tolist(), view.ticks.tolist(), strict=True)) == expected
        assert view.dead_at(Tick(read_at)).tolist() == [o for o, t in expected if t <= read_at]
        assert view.after(Tick(read_at)).offsets.tolist() == [o for o, t in expected if t > read_at]
    data = log.view().to_bytes()
    again = DeleteLog.from_bytes(data, 50)
    assert again.view().to_bytes() == data and again.last_tick == log.last_tick
    for broken in (data[:-1], data + b"\0", b"x" + data[1:]):
        with pytest.raises(DeletesDamaged):
            DeleteLog.from_bytes(broken, 50)


@pytest.mark.parametrize("pk", [DataType.INT64, DataType.VARCHAR])
@given(rows=st.lists(st.integers(0, 30), max_size=60), wanted=st.lists(st.integers(0, 40), max_size=20))
def test_lookups_find_what_a_scan_finds(pk: DataType, rows: list[int], wanted: list[int]) -> None:
    """The dictionary and the sorted arrays find exactly the rows with the keys, repeats and strangers included."""
    schema = make_collection(pk)
    batch = numbered(schema, rows)
    growing = KeyDict()
    for start in range(0, len(rows), 7):
        growing.add(batch_keys(batch.slice(start, start + 7), PK))
    expected = [offset for offset, number in enumerate(rows) if number in wanted]
    keys = as_keys(schema, wanted)
    assert growing.find(keys).tolist() == expected
    assert sorted_lookup(batch, PK).find(KeySet.of(keys)).tolist() == expected
    for number in set(wanted):
        offsets = [o for o, one in enumerate(rows) if one == number]
        assert list(growing.newest_first(key_of(schema, number))) == offsets[::-1]


def test_text_hashes_do_not_depend_on_neighbours() -> None:
    """A text has one hash, wherever it stands and however long the texts around it are; few texts share one."""
    texts = ["", "a", "b", "aa", "ab", "ba", "é", "x" * 3_000_000, "a\0", "\0a", *map(str, range(5_000))]
    hashes = hash_texts(StringArray.from_strings(texts)).tolist()
    assert len(set(hashes)) == len(texts)
    for i in (0, 1, 5, 7, 8, 999):
        assert hash_texts(StringArray.from_strings([texts[i]])).tolist() == [hashes[i]]
    tail = StringArray.from_strings(texts).slice(5, 40)
    assert hash_texts(tail).tolist() == hashes[5:40]


def test_parts_stay_few_and_small() -> None:
    """Appends of any sizes leave few parts, none beyond the limits unless it came so; a view made before stays."""
    growing = GrowingSegment(SegmentId(1), PartitionId(1), WIDE, Tick(0))
    rng = Random(3)
    first, views = 0, []
    for tick in range(400):
        rows = rng.choice([1, 1, 2, 10, 100, 300])
        growing.append(numbered(WIDE, range(first, first + rows)), Tick(tick))
        first += rows
        views.append((growing.view(), first))
        assert len(growing.view().parts) <= 16 + first // 3_000
        assert all(part.batch.rows <= PART_ROWS_MAX for part in growing.view().parts)
        assert all(part.batch.nbytes <= PART_BYTES_MAX for part in growing.view().parts)
    for view, rows in views[::40]:
        assert view.whole().columns[PK].to_list() == list(range(rows))


def test_a_spilled_segment_is_put_together_again() -> None:
    """What was spilled in pieces, with the deletes, restores to a segment that reads and spills as before."""
    growing = GrowingSegment(SegmentId(1), PartitionId(1), WIDE, Tick(0))
    store: dict[bytes, bytes] = {}
    for tick in range(1, 6):
        growing.append(numbered(WIDE, range(tick * 10, tick * 10 + 5)), Tick(tick))
        if tick % 2 == 0:
            rows = growing.unspilled()
            assert rows is not None
            files, chunks = write_segment(*rows)
            store.update(chunks)
            growing.spilled(files)
    growing.delete(np.array([10, 21], np.int64), Tick(9))
    assert growing.spilled_rows == 20
    again = GrowingSegment(SegmentId(1), PartitionId(1), WIDE, Tick(0))
    for files in growing.spilled_files:
        again.restore(*read_segment(files, store.__getitem__), files)
    again.append(numbered(WIDE, range(50, 55)), Tick(5))
    again.restore_deletes(growing.deletes.view().to_bytes())
    rows, more = growing.unspilled(), again.unspilled()
    assert rows is not None and more is not None and rows[0].rows == more[0].rows == 5
    assert again.view().ticks.tolist() == growing.view().ticks.tolist()
    assert again.view().visible(Tick(9)).tolist() == growing.view().visible(Tick(9)).tolist()
    assert again.live_rows == growing.live_rows == 23


def test_a_released_segment_keeps_little_and_still_deletes() -> None:
    """Release leaves keys and ticks in memory; deletes and reads go on; load brings the rest back."""
    batch = numbered(WIDE, range(3_000))
    files, store = stored(batch, np.ones(3_000, np.int64))

    def get(digest: bytes) -> bytes:
        return store.get(SHARD, digest)

    segment = SealedSegment.from_batch(
        SegmentId(1), PartitionId(1), WIDE, batch, np.ones(3_000, np.int64), files=files, get=get
    )
    loaded_bytes = segment.nbytes
    segment.release()
    assert segment.released and segment.nbytes < loaded_bytes / 20
    assert segment.delete(np.array([7], np.int64), Tick(5)) == 1
    offsets = segment.view().find(np.array([7, 8], np.int64), Tick(5))
    assert segment.view().fetch(offsets, [NOTE]).columns[NOTE].to_list() == ["note 8"]
    assert prepare_from_files(files, get, WIDE, released=True).batch.columns.keys() == {PK}
    segment.load(prepare_from_files(files, get, WIDE))
    reads = store.reads
    assert segment.view().fetch(offsets, [NOTE, META]).columns[META].to_list() == ['{"n":8}']
    assert store.reads == reads and segment.live_rows == 2_999


def test_statistics_bound_what_is_there() -> None:
    """Statistics are the bounds of the valid values; columns with NaN, JSON and vectors have none."""
    batch = make_batch(WIDE, [5, 9, 7], [3, None, 1], np.zeros((3, 200), np.float32))
    stats = batch_stats(batch, WIDE)
    assert set(stats) == {PK, GROUP, NOTE}
    assert (stats[GROUP].min, stats[GROUP].max, stats[GROUP].null_count) == (1, 3, 1)
    assert (stats[NOTE].min, stats[NOTE].max) == ("note 5", "note 9")
    assert not compile_filter("group > 3", WIDE).may_match(stats)
    assert compile_filter("group >= 3", WIDE).may_match(stats)
    assert column_stats(ScalarColumn(np.array([1.0, np.nan]))) is None
    nothing = column_stats(ScalarColumn(np.zeros(2, np.int64), np.zeros(2, np.bool_)))
    assert nothing is not None and nothing.min is None and nothing.null_count == 2


def test_rows_must_come_in_the_order_of_ticks() -> None:
    """Rows whose ticks go backwards are a bug and are not taken."""
    growing = GrowingSegment(SegmentId(1), PartitionId(1), WIDE, Tick(0))
    growing.append(numbered(WIDE, [1]), Tick(5))
    with pytest.raises(AssertionError, match="rows of tick 4 after rows of 5"):
        growing.append(numbered(WIDE, [2]), Tick(4))
    with pytest.raises(AssertionError, match="ticks ascend"):
        prepare(numbered(WIDE, [1, 2]), np.array([2, 1], np.int64), WIDE)
