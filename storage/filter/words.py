"""text_match and phrase_match: which texts have some of the terms, or have them one after the other.

Both ask an inverted list: for each term the rows that have it, and where. To make it takes all texts of a column apart:
a node does so once for each segment, and stores it (`storage.word_files`). Where a filter asks before that, it is made
then and remembered; the columns of a growing segment are short, and have lists of their own. A few rows of a column
without one are taken apart for themselves, as long as that costs less than all would. So what is found is always what
looking at every text would find.

A phrase matches where its terms stand in their order with their distances; with a slop of s, where that is so after
moving them by s places in all: terms that each stand d places behind where the phrase would have them match if the
greatest and the least d differ by at most s (Lucene's rule, by which two terms in the wrong order need a slop of 2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.analysis import Analyzer
from storage.columns import ArrayColumn, Batch, BatchDamaged, ScalarColumn, StringColumn
from storage.filter.column_cache import ColumnCache
from storage.filter.tree import PhraseMatch, TextMatch
from storage.filter.values import Rows
from storage.schema import FieldSchema
from storage.strings import StringArray
from storage.types import FieldId

CACHE_BYTES_MAX: Final = 256 << 20
"""60,000 definitions of 9 words take 9 MB."""
_TERM_BYTES: Final = 150
"""Of a term in the dictionary."""
_TERMS, _OWNERS, _POSITIONS = FieldId(1), FieldId(2), FieldId(3)
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class WordLists:
    """Term i, by its number, stands in rows `owners[bounds[i]:bounds[i + 1]]`, ascending, at `positions`."""

    numbers: Mapping[str, int]
    bounds: Places
    owners: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    rows: int

    @property
    def nbytes(self) -> int:
        arrays = self.bounds.nbytes + self.owners.nbytes + self.positions.nbytes
        return int(arrays) + _TERM_BYTES * len(self.numbers)

    @classmethod
    def of(cls, texts: Sequence[str], analyzer: Analyzer) -> WordLists:
        numbers: dict[str, int] = {}
        terms, positions, counts = [], [], []
        for text in texts:
            placed = analyzer.placed(text)
            counts.append(len(placed))
            for position, term in placed:
                terms.append(numbers.setdefault(term, len(numbers)))
                positions.append(position)
        by_row = np.array(terms, np.int64)
        order = np.argsort(by_row, kind="stable")
        bounds = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(np.bincount(by_row, minlength=len(numbers)), out=bounds[1:])
        owners = np.repeat(np.arange(len(texts), dtype=np.int32), counts)
        return cls(numbers, bounds, owners[order], np.array(positions, np.int32)[order], len(texts))

    def to_bytes(self) -> bytes:
        """Return the lists for storing."""
        terms = StringColumn(StringArray.from_strings(list(self.numbers)))
        owners, positions = (ArrayColumn(self.bounds, ScalarColumn(one)) for one in (self.owners, self.positions))
        return Batch({_TERMS: terms, _OWNERS: owners, _POSITIONS: positions}, len(self.numbers)).to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, rows: int) -> WordLists:
        """Return lists of so many texts. Raises BatchDamaged."""
        columns = Batch.from_bytes(data).columns
        try:
            terms, owners, positions = columns[_TERMS], columns[_OWNERS], columns[_POSITIONS]
            assert isinstance(terms, StringColumn)
            assert isinstance(owners, ArrayColumn) and isinstance(owners.items, ScalarColumn)
            assert isinstance(positions, ArrayColumn) and isinstance(positions.items, ScalarColumn)
        except (KeyError, AssertionError) as error:
            raise BatchDamaged("not word lists") from error
        numbers = {term: number for number, term in enumerate(terms.values.to_list())}
        return cls(numbers, owners.offsets, owners.items.values, positions.items.values, rows)

    def places(self, term: str) -> tuple[Places, Places]:
        """Return the rows that have a term, each as often as it does, and where they have it."""
        number = self.numbers.get(term)
        first, last = (0, 0) if number is None else (int(self.bounds[number]), int(self.bounds[number + 1]))
        return self.owners[first:last].astype(np.int64), self.positions[first:last].astype(np.int64)

    def rows_with(self, term: str) -> npt.NDArray[np.int32]:
        """Return the rows that have a term, ascending, each as often as it does."""
        number = self.numbers.get(term)
        return self.owners[:0] if number is None else self.owners[self.bounds[number] : self.bounds[number + 1]]

    def with_terms(self, terms: Sequence[str], least: int) -> Mask:
        """Return the rows that have so many of these different terms at least."""
        counts = np.zeros(self.rows, np.int32)
        for term in terms:
            counts[np.unique(self.places(term)[0])] += 1
        return np.asarray(counts >= least)

    def with_phrase(self, placed: Sequence[tuple[int, str]], slop: int) -> Mask:
        """Return the rows that have these terms, each so far behind the first one, or nearly so."""
        found = np.zeros(self.rows, np.bool_)
        if not placed:
            return found
        terms = sorted({term for _, term in placed})
        places = {term: self.places(term) for term in terms}
        if slop == 0:
            begins: Places | None = None  # row and place of the first term, for each term that stands where it should
            for offset, term in placed:
                owners, positions = places[term]
                fitting = positions >= offset
                mine = (owners[fitting] << 32) | (positions[fitting] - offset)
                begins = mine if begins is None else np.intersect1d(begins, mine)
            assert begins is not None
            found[begins >> 32] = True
            return found
        wanted = {term: [offset for offset, one in placed if one == term] for term in terms}
        for row in np.flatnonzero(self.with_terms(terms, len(terms))).tolist():
            here = {}
            for term, (owners, positions) in places.items():
                first, last = np.searchsorted(owners, [row, row + 1])
                here[term] = positions[first:last].tolist()
            found[row] = _is_near(wanted, here, slop)
        return found


def _is_near(wanted: Mapping[str, Sequence[int]], here: Mapping[str, Sequence[int]], slop: int) -> bool:
    """Return whether each wanted offset can have a place of its term, all nearly as far behind.

    For each least distance that there can be, each term's offsets in their order take the first place that is left: as
    all of them allow the same range, that finds places for all if there are any.
    """
    starts = {place - offset for term, offsets in wanted.items() for offset in offsets for place in here[term]}
    return any(
        all(_fit(offsets, here[term], start, slop) for term, offsets in wanted.items()) for start in sorted(starts)
    )


def _fit(offsets: Sequence[int], places: Sequence[int], start: int, slop: int) -> bool:
    i = 0
    for offset in offsets:
        i = bisect_left(places, start + offset, i)
        if i == len(places) or places[i] > start + offset + slop:
            return False
        i += 1
    return True


def matched(node: TextMatch | PhraseMatch, rows: Rows) -> Mask:
    """Return where the text matches; false of null."""
    field = node.value.field
    column = rows.batch.columns.get(field.id)
    if not isinstance(column, StringColumn):  # rows from before the field: null or its default
        column = rows.column(field)
        assert isinstance(column, StringColumn), "text_match is of text"
        return _found(node, WordLists.of(column.values.to_list(), field.analyzer))
    texts, offsets = column.values, rows.offsets
    key = _key(field)
    known = _CACHE.get(texts, key)
    if known is None:
        few = offsets is not None and len(offsets) * 8 < len(texts)
        if offsets is not None and few and _CACHE.defer(texts, key, len(offsets)):
            return _found(node, WordLists.of(texts.take(offsets).to_list(), field.analyzer))
        known = WordLists.of(texts.to_list(), field.analyzer)
        _CACHE.put(texts, key, known)
    found = _found(node, known)
    return found if offsets is None else found[offsets]


def known_lists(column: StringColumn, field: FieldSchema) -> WordLists | None:
    """Return the inverted list of a column, if it has been made."""
    return _CACHE.get(column.values, _key(field))


def keep_lists(column: StringColumn, field: FieldSchema, lists: WordLists) -> None:
    """Have the lists at hand for as long as the column lives."""
    _CACHE.keep(column.values, _key(field), lists)


def keeps_lists(column: StringColumn, field: FieldSchema) -> bool:
    """Return whether `keep_lists` has been called."""
    return _CACHE.keeps(column.values, _key(field))


def make_lists(column: StringColumn, field: FieldSchema) -> WordLists:
    """Return the inverted list of a column: the one that is known, or a new one, made of all its texts."""
    return known_lists(column, field) or WordLists.of(column.values.to_list(), field.analyzer)


def _found(node: TextMatch | PhraseMatch, lists: WordLists) -> Mask:
    if isinstance(node, TextMatch):
        return lists.with_terms(node.terms, node.least) if node.terms else np.zeros(lists.rows, np.bool_)
    return lists.with_phrase(node.placed, node.slop)


def _key(field: FieldSchema) -> tuple[str, int]:
    return field.params.get("analyzer_params", ""), field.analyzer_version


_CACHE: Final[ColumnCache[WordLists]] = ColumnCache(CACHE_BYTES_MAX)
