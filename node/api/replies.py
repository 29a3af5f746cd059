"""Results into replies, JSON or CBOR, with as few steps between column and byte as there can be.

JSON: float32 values in their shortest form (orjson prints numpy's own types), vectors straight from their matrix, JSON
documents embedded as the text they are stored as, Int64 as numbers or, when the client asks, as text. CBOR: the same
rows, vectors as byte strings, little-endian. Halves, bytes and bits are base64 in JSON, sparse vectors objects.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cbor2
import numpy as np
import orjson

from node.service import Rows, SearchResult, WriteResult
from storage.columns import ArrayColumn, Column, ScalarColumn, SparseColumn, VectorColumn
from storage.schema import DataType, FieldSchema
from storage.times import TIMEZONE, show_time, zone_of

LARGE_REPLY_ROWS: Final = 512
"""Replies of more rows are built on a worker thread, and encoded in slices, so that the loop is not held up."""
_SLICE_ROWS: Final = 64
_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY
_LEGACY_KIND: Final = {
    DataType.BOOL: "BoolData", DataType.INT8: "IntData", DataType.INT16: "IntData", DataType.INT32: "IntData",
    DataType.INT64: "LongData", DataType.FLOAT: "FloatData", DataType.DOUBLE: "DoubleData",
    DataType.VARCHAR: "StringData",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Style:
    """How a client wants its answer."""

    cbor: bool = False
    int64_text: bool = False
    """Int64 values as strings, for clients whose numbers are doubles."""
    legacy_arrays: bool = False
    legacy_json: bool = False


def encode(envelope: Mapping[str, Any], style: Style) -> bytes:
    """Return the body of a reply."""
    if style.cbor:
        return cbor2.dumps(envelope)
    return orjson.dumps(envelope, option=_OPTIONS)


def is_large(envelope: Mapping[str, Any]) -> bool:
    """Return whether the reply should be encoded by `encode_large`, off the loop."""
    data = envelope.get("data")
    return type(data) is list and len(data) > LARGE_REPLY_ROWS


def encode_large(envelope: Mapping[str, Any], style: Style) -> bytes:
    """Return the same as `encode`, giving other threads a turn after every few rows."""
    if style.cbor:
        return cbor2.dumps(envelope)  # mostly bytes to copy
    rows = envelope["data"]
    slices = [
        orjson.dumps(rows[start : start + _SLICE_ROWS], option=_OPTIONS)[1:-1]
        for start in range(0, len(rows), _SLICE_ROWS)
    ]
    rest = orjson.dumps({key: value for key, value in envelope.items() if key != "data"}, option=_OPTIONS)
    return b'%b,"data":[%b]}' % (rest[:-1], b",".join(slices))


def success(data: Any, **siblings: Any) -> dict[str, Any]:
    """Return the envelope of a success; siblings of None are left out."""
    return {"code": 0, "data": data} | {name: value for name, value in siblings.items() if value is not None}


def rows_reply(rows: Rows, style: Style) -> dict[str, Any]:
    """Return the envelope of a query or get."""
    if rows.count is not None:
        data: Any = [{"count(*)": str(rows.count) if style.int64_text else rows.count}]
    elif rows.groups is not None:
        data = list(rows.groups)
    else:
        data = _rows(rows, style)
    return success(data, cost=0, explain=list(rows.explain) or None)


def search_reply(result: SearchResult, style: Style) -> dict[str, Any]:
    """Return the envelope of a search: the hits of all queries in order, each with its distance."""
    data = _rows(result.rows, style, result.scores)
    envelope = {"code": 0, "cost": 0, "data": data}
    if data:
        envelope["topks"] = list(result.topks)
    if result.rows.explain:
        envelope["explain"] = list(result.rows.explain)
    return envelope


def write_reply(result: WriteResult, verb: str, style: Style) -> dict[str, Any]:
    """Return the envelope of an insert or upsert; `verb` begins the names of its numbers."""
    keys = result.primary_keys
    shown: Any = keys
    if isinstance(keys, np.ndarray):
        shown = keys.tolist()
        if style.int64_text:
            shown = list(map(str, shown))
    elif style.cbor:
        shown = list(keys)
    return success({f"{verb}Count": result.rows, f"{verb}Ids": shown}, cost=0)


def _rows(rows: Rows, style: Style, scores: Any = None) -> list[dict[str, Any]]:
    """Return each row as a dict whose values the encoder takes: the primary key first, then the fields asked for."""
    schema, batch = rows.schema, rows.batch
    primary = schema.primary
    names = [primary.name]
    columns = [_values(primary, batch.columns[primary.id], style)] if batch.rows else []
    for name in rows.fields:
        if name != primary.name:
            names.append(name)
            if batch.rows:
                one = schema.by_name[name]
                columns.append(_values(one, batch.columns[one.id], style))
    shown = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    dynamic = schema.dynamic
    if dynamic is not None and dynamic.id in batch.columns and (rows.dynamic_keys is None or rows.dynamic_keys):
        for row, text in zip(shown, batch.columns[dynamic.id].to_list(), strict=True):
            if text and text != "{}":
                document = orjson.loads(text)
                if rows.dynamic_keys is None:
                    if schema.version > 1:  # a field may have the name of a key that rows had before
                        document = {key: value for key, value in document.items() if key not in schema.by_name}
                    row.update(document)
                else:
                    row.update((key, document[key]) for key in rows.dynamic_keys if key in document)
    if scores is not None:
        for row, score in zip(shown, scores.tolist() if style.cbor else scores, strict=True):
            row["distance"] = score
    return shown


def _values(one: FieldSchema, column: Column, style: Style) -> Sequence[Any]:
    """Return the column's values, one per row, in the form that the encoder takes."""
    if isinstance(column, VectorColumn):
        if one.type is DataType.FLOAT_VECTOR and not style.cbor:
            return list(column.values)
        rows = [row.tobytes() for row in column.values]
        return rows if style.cbor else [base64.b64encode(row).decode() for row in rows]
    if isinstance(column, SparseColumn):
        return [_terms(column, i, style) for i in range(len(column))]
    if isinstance(column, ScalarColumn):
        if one.type is DataType.TIMESTAMPTZ:
            return time_texts(one, column)
        if column.values.dtype == np.float32 and not style.cbor:
            singles = list(column.values)  # numpy's float32 prints as short as it can; a double of it would not
            if column.valid is None:
                return singles
            return [value if live else None for value, live in zip(singles, column.valid.tolist(), strict=True)]
        values = column.to_list()
        if style.int64_text and column.values.dtype == np.int64:
            return [None if value is None else str(value) for value in values]
        return values
    if isinstance(column, ArrayColumn):
        return _arrays(one, column, style)
    values = column.to_list()
    if one.type is not DataType.JSON or style.legacy_json:
        return values
    if style.cbor:
        return [None if text is None else orjson.loads(text) for text in values]
    return [None if text is None else orjson.Fragment(text) for text in values]


def time_texts(one: FieldSchema, column: ScalarColumn) -> list[str | None]:
    """Return points in time as ISO 8601 texts in the field's zone, None where there is none."""
    zone = zone_of(one.params.get(TIMEZONE, ""))
    return [None if value is None else show_time(value, zone) for value in column.to_list()]


def _terms(column: SparseColumn, i: int, style: Style) -> dict[str, Any]:
    terms, weights = column.values.row(i)
    shown = weights.tolist() if style.cbor else weights  # numpy's float32 prints as short as it can
    return dict(zip(map(str, terms.tolist()), shown, strict=True))


def _arrays(one: FieldSchema, column: ArrayColumn, style: Style) -> list[Any]:
    assert one.element is not None
    items = _values(FieldSchema(one.name, one.element), column.items, style)
    rows: list[Any] = [items[a:b] for a, b in itertools.pairwise(column.offsets.tolist())]
    if style.legacy_arrays:
        kind = _LEGACY_KIND[one.element]
        rows = [{"Data": {kind: {"data": row}}} for row in rows]
    if column.valid is None:
        return rows
    return [row if live else None for row, live in zip(rows, column.valid.tolist(), strict=True)]
