"""Word lists on disk are those that were written, or none: then they are made anew."""

from __future__ import annotations

from storage.analysis import VERSION, analyzer_of
from storage.chunks import ChunkStore
from storage.filter.words import WordLists
from storage.keys import record_key
from storage.schema import DataType, FieldSchema
from storage.segment_files import ChunkRef, SegmentFiles
from storage.types import FieldId, SegmentId, ShardId
from storage.word_files import WordsOf, drop_all_words, drop_words, mark_of, read_words, stored_words, write_words

OF = WordsOf(ShardId(1), SegmentId(20), FieldId(101))
OTHER = WordsOf(ShardId(1), SegmentId(200), FieldId(101))
LARGE = WordLists.of([f"word{i} and word{i + 1} and more of them" for i in range(40_000)], analyzer_of())
SMALL = WordLists.of(["some words"], analyzer_of())


def test_what_was_written_is_read(store: ChunkStore) -> None:
    """In several pieces, by its mark alone, until it is dropped, which leaves nothing."""
    write_words(store, OF, b"m", LARGE)
    write_words(store, OTHER, b"m", SMALL)
    found = read_words(store, OF, b"m")
    assert found is not None and found.numbers == LARGE.numbers and found.rows == LARGE.rows
    assert found.rows_with("word7").tolist() == [6, 7]
    assert read_words(store, OF, b"n") is None
    assert stored_words(store, OF.shard_id) == {OF, OTHER} and stored_words(store, ShardId(2)) == set()
    drop_words(store, OF)
    assert stored_words(store, OF.shard_id) == {OTHER} and read_words(store, OF, b"m") is None
    assert not list(store.scan(record_key("words-piece", *OF.ids)))


def test_a_shard_that_goes_takes_its_lists_along(store: ChunkStore) -> None:
    """And leaves those of others."""
    elsewhere = WordsOf(ShardId(2), SegmentId(20), FieldId(101))
    for of in (OF, OTHER, elsewhere):
        write_words(store, of, b"m", LARGE)
    drop_all_words(store, OF.shard_id)
    left = [key for name in ("words", "words-piece") for key, _ in store.scan(record_key(name))]
    assert left and all(key.startswith((record_key("words", 2), record_key("words-piece", 2))) for key in left)
    assert read_words(store, elsewhere, b"m") is not None


def test_smaller_lists_leave_nothing_of_larger_ones(store: ChunkStore) -> None:
    write_words(store, OF, b"m", LARGE)
    write_words(store, OF, b"n", SMALL)
    assert len(list(store.scan(record_key("words-piece", *OF.ids)))) == 1
    found = read_words(store, OF, b"n")
    assert found is not None and found.rows_with("words").tolist() == [0]


def test_what_lacks_a_piece_is_none(store: ChunkStore) -> None:
    """As a crash in the middle of writing leaves it, or of dropping."""
    write_words(store, OF, b"m", LARGE)
    store.commit([], [record_key("words-piece", *OF.ids, 1)])
    assert read_words(store, OF, b"m") is None


def test_the_mark_tells_texts_and_analyzers_apart() -> None:
    """Other texts, another analyzer, other rules of one: another mark; other fields do not matter."""

    def mark(digest: bytes = b"d", params: str = "", version: int = VERSION, others: int = 0) -> bytes:
        field = FieldSchema(
            "t", DataType.VARCHAR, OF.field_id, params={"analyzer_params": params}, analyzer_version=version
        )
        refs = {FieldId(100 + i): (ChunkRef(b"x", 1, 1),) for i in range(others)}
        return mark_of(SegmentFiles(1, {**refs, OF.field_id: (ChunkRef(digest, 1, 1),)}), field)

    assert mark() == mark(others=1)
    assert len({mark(), mark(b"e"), mark(params='{"type": "english"}'), mark(version=VERSION + 1)}) == 4
