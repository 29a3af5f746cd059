"""Filters on indexed fields: what a segment takes to find their rows by a scalar index, beside looking at all rows.

    python -m tools.bench.scalars --rows 60000 --rows 1000000

Measured is `storage.search.count`: which rows are visible and pass, without parsing the filter and without the way
there; each filter is new, as one that was asked before is remembered. The more rows a segment has, the more an index
gains: numpy compares 60,000 numbers in 15 us, and no question takes much less than 30 in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from storage.columns import ArrayColumn, Batch, Column, ScalarColumn, StringColumn, VectorColumn
from storage.filter import compile_filter
from storage.filter.indexed import Cast, Indexed
from storage.schema import CollectionSchema, DataType, FieldSchema, make_schema
from storage.sealed import SealedSegment
from storage.search import count
from storage.strings import StringArray
from storage.types import PartitionId, SegmentId, Tick
from storage.view import SegmentView

VALUES: Final = 1_000
"""Different values of a field: each filter lets one row in so many through."""
NOW: Final = Tick(1 << 40)
FILTERS: Final[Mapping[str, Callable[[int], str]]] = {
    "n == x": lambda i: f"n == {i}",
    "x <= ratio < y": lambda i: f"ratio >= {i / VALUES} and ratio < {(i + 1) / VALUES}",
    "word == x": lambda i: f"word == '{_word(i)}'",
    "word like 'x%'": lambda i: f"word like '{_word(i)[:-1]}%'",
    "n == x and word like '%y'": lambda i: f"n == {i} and word like '%{_word(i)[-8:]}'",
    "word like '%x%', NGRAM": lambda i: f"word like '%y {i:04d} of%'",
    "array_contains(tags, x)": lambda i: f"array_contains(tags, {i})",
    'doc["n"] == x': lambda i: f'doc["n"] == {i}',
}


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--rows", multiple=True, default=(60_000,), help="Of a segment; may be given several times.")
@click.option("--queries", default=200, help="Filters of each kind.")
def main(rows: tuple[int, ...], queries: int) -> None:
    """Count the rows of a segment that pass filters on fields with and without a scalar index."""
    table = Table("rows", "filter", "scan us", "index us", "scan over index", title="median of new filters")
    for size in rows:
        schema, view = _segment(size)
        for name, text in FILTERS.items():
            took = {is_indexed: _median_us(schema, view, text, queries, is_indexed) for is_indexed in (False, True)}
            ratio = took[False] / took[True]
            table.add_row(f"{size:,}", name, f"{took[False]:,.0f}", f"{took[True]:,.0f}", f"{ratio:.1f}")
    Console().print(table)


def _median_us(
    schema: CollectionSchema, view: SegmentView, text: Callable[[int], str], queries: int, is_indexed: bool
) -> float:
    indexed: frozenset[Indexed] = _indexed(schema) if is_indexed else frozenset()
    count([view], compile_filter(text(VALUES - 1), schema, indexed=indexed), tick=NOW)  # makes the index
    took_ns = []
    for i in range(queries):
        wanted = compile_filter(text(i % (VALUES - 1)), schema, indexed=indexed)
        began_ns = time.perf_counter_ns()
        count([view], wanted, tick=NOW)
        took_ns.append(time.perf_counter_ns() - began_ns)
    return float(np.median(took_ns)) / 1e3


def _indexed(schema: CollectionSchema) -> frozenset[Indexed]:
    plain = [Indexed(one.id) for one in schema.fields if one.type is not DataType.JSON and not one.type.is_vector]
    word, doc = schema.by_name["word"].id, schema.by_name["doc"].id
    return frozenset([*plain, Indexed(word, gram=3), Indexed(doc, ("n",), Cast.DOUBLE)])


def _segment(rows: int) -> tuple[CollectionSchema, SegmentView]:
    schema = make_schema(
        [
            FieldSchema("id", DataType.INT64, primary=True),
            FieldSchema("n", DataType.INT64),
            FieldSchema("ratio", DataType.DOUBLE),
            FieldSchema("word", DataType.VARCHAR, max_bytes=200),
            FieldSchema("tags", DataType.ARRAY, element=DataType.INT64, capacity=2),
            FieldSchema("doc", DataType.JSON),
            FieldSchema("v", DataType.FLOAT_VECTOR, dim=2),
        ],
        dynamic=False,
    )
    chance = np.random.default_rng(1)
    numbers = chance.integers(0, VALUES, rows)
    words = [_word(i) for i in chance.integers(0, VALUES, rows).tolist()]
    columns: Mapping[str, Column] = {
        "id": ScalarColumn(np.arange(rows, dtype=np.int64)),
        "n": ScalarColumn(numbers),
        "ratio": ScalarColumn(chance.random(rows)),
        "word": StringColumn(StringArray.from_strings(words)),
        "tags": ArrayColumn(np.arange(rows + 1, dtype=np.int64), ScalarColumn(numbers)),
        "doc": StringColumn(StringArray.from_strings([f'{{"n": {i}}}' for i in numbers.tolist()])),
        "v": VectorColumn(np.zeros((rows, 2), np.float32)),
    }
    batch = Batch({one.id: columns[one.name] for one in schema.fields}, rows)
    ticks = np.arange(rows, dtype=np.int64)
    return schema, SealedSegment.from_batch(SegmentId(1), PartitionId(1), schema, batch, ticks).view()


def _word(number: int) -> str:
    return f"entry {number:04d} of the lexicon, {number % 97}"


if __name__ == "__main__":
    main()
