"""Word lists of a shard's segments, made ahead of the filters that ask for them.

A segment with a field that text_match may ask about gets them when it is flushed or merged, on a thread that nobody
waits for; at the next start they are read (`storage.word_files`). Every replica keeps its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.shard import Shard, StoredSegment
from node.workers import Executor, Lane
from storage.chunks import ChunkStore
from storage.columns import StringColumn
from storage.errors import ChunkDamaged
from storage.filter.column_cache import ROWS_KEPT_MIN
from storage.filter.words import keep_lists, keeps_lists, make_lists
from storage.schema import FieldSchema
from storage.word_files import WordsOf, drop_words, mark_of, read_words, stored_words, write_words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wanted:
    of: WordsOf
    field: FieldSchema
    column: StringColumn
    mark: bytes


class WordKeeper:
    """The work of one shard; belongs to the loop."""

    def __init__(self, shard: Callable[[], Shard], store: ChunkStore, executor: Executor) -> None:
        self._shard = shard
        self._store = store
        self._executor = executor
        self._stored: set[WordsOf] | None = None
        """What the store has; None until there is something to keep."""

    async def step(self) -> bool:
        """Read or make the lists of one field of a segment, or remove some; return whether there may be more to do.

        Raises OSError.
        """
        wanted = next(self._wanted(), None)
        if self._stored is None:
            if wanted is None:
                return False
            self._stored = await self._executor.run(Lane.DISK, self._read_stored)
        if wanted is not None:
            await self._provide(wanted)
            return True
        shard = self._shard()
        alive = {segment_id for state in shard.collections.values() for segment_id in state.stored}
        gone = next((one for one in self._stored if one.segment_id not in alive), None)
        if gone is None:
            return False
        await self._executor.run(Lane.DISK, drop_words, self._store, gone)
        self._stored.discard(gone)
        return True

    def _read_stored(self) -> set[WordsOf]:
        try:
            return stored_words(self._store, self._shard().shard_id)
        except ChunkDamaged as error:  # what cannot be read is made anew
            log.warning("word lists are made anew shard=%d: %s", self._shard().shard_id, error)
            return set()

    async def _provide(self, wanted: _Wanted) -> None:
        assert self._stored is not None
        lists = await self._executor.run(Lane.DISK, read_words, self._store, wanted.of, wanted.mark)
        if lists is None:
            lists = await self._executor.run(Lane.BUILD, make_lists, wanted.column, wanted.field)
            await self._executor.run(Lane.DISK, write_words, self._store, wanted.of, wanted.mark, lists)
            log.info(
                "words listed shard=%d segment=%d field=%d rows=%d terms=%d",
                *wanted.of.ids, lists.rows, len(lists.numbers),
            )  # fmt: skip
        self._stored.add(wanted.of)
        keep_lists(wanted.column, wanted.field, lists)

    def _wanted(self) -> Iterator[_Wanted]:
        shard = self._shard()
        for state in shard.populated():
            fields = [one for one in state.schema.fields if one.has_match]
            if fields:
                for stored in state.stored.values():
                    yield from _missing(shard, stored, fields)


def _missing(shard: Shard, stored: StoredSegment, fields: list[FieldSchema]) -> Iterator[_Wanted]:
    segment = stored.segment
    if not stored.is_flushed or segment.released or segment.rows < ROWS_KEPT_MIN or segment.files is None:
        return
    parts = segment.view().parts
    for field in fields:
        column = parts[0].batch.columns.get(field.id) if len(parts) == 1 else None
        if isinstance(column, StringColumn) and field.id in segment.files.fields and not keeps_lists(column, field):
            of = WordsOf(shard.shard_id, segment.segment_id, field.id)
            yield _Wanted(of, field, column, mark_of(segment.files, field))
