"""BM25: the terms of texts as sparse vectors, and what a search needs to know of all rows before it asks for any.

A function field holds for each row the terms of its text, under their numbers (`analysis.term_number`), and how often
the text has each. A search is told in the same way; its terms are then weighted by the statistics of the collection,

    idf(term) = ln(1 + (N - n + 0.5) / (n + 0.5))      N rows, n of them with the term

and `index.sparse` adds up. Statistics are of all visible rows of the collection, in all its partitions and shards,
whatever the search's filter: so a row's score does not depend on where it lies, nor on which rows compete with it.
Rows that were deleted leave the statistics at once (in Milvus when they are compacted away).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from index.metric import Metric
from index.sparse import SparseRows
from index.spec import IndexSpec, SearchParams
from storage.analysis import Analyzer, term_number
from storage.columns import Batch, Column, SparseColumn, StringColumn
from storage.schema import CollectionSchema
from storage.types import FieldId, Tick
from storage.view import NEVER, SegmentView


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What is known of the rows of some shards."""

    rows: int
    terms: int
    """In all their texts together, each as often as it is there."""
    with_term: npt.NDArray[np.int64]
    """Of each term that was asked about: the rows that have it."""


def term_rows(texts: Sequence[str], analyzer: Analyzer) -> SparseRows:
    """Return for each text its terms and how often it has each."""
    rows = []
    for text in texts:
        counts: dict[int, int] = {}
        for term in analyzer.terms(text):
            number = term_number(term)
            counts[number] = counts.get(number, 0) + 1
        numbers = sorted(counts)
        rows.append((numbers, [float(counts[number]) for number in numbers]))
    return SparseRows.of(rows)


def with_computed(batch: Batch, schema: CollectionSchema) -> Batch:
    """Return whole rows with the fields that functions compute, anew if they are there already."""
    if not schema.functions:
        return batch
    computed: dict[FieldId, Column] = {}
    for field_id, source in schema.computed.items():
        column = batch.columns[source.id]
        assert isinstance(column, StringColumn), "a function's input is text"
        computed[field_id] = SparseColumn(term_rows(column.values.to_list(), source.analyzer))
    columns: Mapping[FieldId, Column] = {**batch.columns, **computed}
    return Batch({one.id: columns[one.id] for one in schema.fields if one.id in columns}, batch.rows)


def statistics(
    views: Sequence[SegmentView],
    field_id: FieldId,
    terms: Sequence[int],
    tick: Tick,
    expire_before: Tick = NEVER,
) -> Statistics:
    """Return what is known of the visible rows. Cost: the rows once, then the lists of the terms."""
    rows = total = 0
    with_term = np.zeros(len(terms), np.int64)
    for view in views:
        visible, count = view.visibility(tick, expire_before)
        if not count:
            continue
        rows += count
        for start, piece, _ in view.matrices(field_id, Metric.BM25):
            seen = None if count == view.rows else visible[start : start + len(piece)]
            total += int(piece.lengths.sum() if seen is None else piece.lengths[seen].sum())
            for i, term in enumerate(terms):
                owners = piece.lists.rows_with(term)
                with_term[i] += len(owners) if seen is None else int(np.count_nonzero(seen[owners]))
    return Statistics(rows, total, with_term)


def weighted(
    queries: SparseRows, terms: Sequence[int], known: Statistics, spec: IndexSpec, params: SearchParams
) -> tuple[SparseRows, SearchParams]:
    """Return the queries with their terms weighted, and parameters that make the engine's sums BM25's.

    terms  ascending, all that the queries have; `known` is about them
    """
    k1, b = float(spec.params["bm25_k1"]), float(spec.params["bm25_b"])
    n = known.with_term.astype(np.float64)
    idf = np.log(1.0 + (np.maximum(known.rows - n, 0.0) + 0.5) / (n + 0.5))
    places = np.searchsorted(np.asarray(terms, np.int64), queries.terms)
    weights = (queries.weights * idf[places] * (k1 + 1.0)).astype(np.float32)
    average = known.terms / known.rows if known.terms else 1.0
    told = replace(params, damping=k1 * (1.0 - b), damping_per_term=k1 * b / average)
    return SparseRows(queries.offsets, queries.terms, weights), told
