"""Chunks into the rows of an insert: as columns where all fit, else row by row, so that only bad rows are left out.

| the field is      | and a value of the file may be                                                             |
|-------------------|--------------------------------------------------------------------------------------------|
| a number, Bool    | a number of any width that it fits; in CSV its text                                        |
| VarChar           | text                                                                                       |
| JSON              | anything that JSON has; text is read as JSON if it is an object, in CSV and Parquet always |
| Array             | a list; in CSV as JSON                                                                     |
| FloatVector       | a list of numbers, or little-endian float32 bytes; in CSV a list as JSON                   |
| the other vectors | what the API takes: numbers, bytes, base64; bits also as a list of bytes                   |
| SparseFloatVector | a map, {"indices", "values"}, or either as JSON                                            |
| dynamic           | columns that are no field; the column `$meta` has documents, as objects or JSON            |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson

from node.api.rows import Write, rows_from_cbor
from node.bulk.parquet import Texts, Values
from node.bulk.sources import Chunk
from storage.errors import BadRequest
from storage.schema import DYNAMIC_NAME, INTEGER_BITS, CollectionSchema, DataType, FieldSchema
from storage.vectors import bfloat16

REASON_CHARS_MAX: Final = 400
_WIDTHS: Final = {
    DataType.BOOL: "?", DataType.INT8: "<i1", DataType.INT16: "<i2", DataType.INT32: "<i4", DataType.INT64: "<i8",
    DataType.FLOAT: "<f4", DataType.DOUBLE: "<f8",
}  # fmt: skip
_TRUTHS: Final = {"true": True, "false": False, "1": True, "0": False, "t": True, "f": False}


class Unfit(ValueError):
    """A value that can not be what its field has."""


def as_columns(chunk: Chunk, schema: CollectionSchema) -> dict[str, Any] | None:
    """Return the chunk as the columns of an insert, or None if it has to be looked at row by row."""
    if not chunk.rows or DYNAMIC_NAME in chunk.columns:
        return None
    columns: dict[str, Any] = {}
    for name, values in chunk.columns.items():
        one = schema.by_name.get(name)
        if one is None and schema.dynamic is None:
            return None
        if one is not None and (one.auto_id or one.id in schema.computed):
            continue
        try:
            columns[name] = _plain_list(values) if one is None else _column(one, values, chunk)
        except (Unfit, ValueError, TypeError, OverflowError):
            return None
    return columns


def as_rows(chunk: Chunk, schema: CollectionSchema) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return (the rows that the schema takes, reasons by the number of the row for those that it does not)."""
    bad = dict(chunk.bad)
    good = []
    columns = {name: _row_values(values) for name, values in chunk.columns.items()}
    for i, number in enumerate(chunk.rows):
        name = ""
        row: dict[str, Any] = {}
        try:
            for name, values in columns.items():
                one = schema.by_name.get(name)
                if name == DYNAMIC_NAME:
                    row |= _document(values[i], schema)
                elif one is None:
                    if values[i] is not None:  # a row of a file of objects that does not have this key
                        row[name] = values[i]
                elif not one.auto_id and one.id not in schema.computed:
                    value = _value(one, values[i], chunk)
                    if value is not None or one.nullable or one.default is not None:
                        row[name] = value
            name = ""
            rows_from_cbor([row], schema, Write.INSERT)
        except (Unfit, ValueError, TypeError) as error:
            bad[number] = f"field {name!r}: {error}"[:REASON_CHARS_MAX]
        except BadRequest as error:
            bad[number] = error.message.removeprefix("row 0, ")[:REASON_CHARS_MAX]
        else:
            good.append(row)
    return good, bad


def _column(one: FieldSchema, values: Values, chunk: Chunk) -> Any:
    """Return the column in the shortest form that the API takes. Raises Unfit and alike if a value does not fit."""
    if isinstance(values, np.ndarray):
        if one.type in _WIDTHS and values.ndim == 1:
            return _numbers(one.type, values).tobytes()
        if one.type.is_vector and values.ndim == 2:
            return _vectors(one, values).tobytes()
        values = values.tolist()
    if one.type is DataType.FLOAT_VECTOR and not chunk.is_text and isinstance(values[0], list):
        matrix = np.array(values, "<f4")
        if matrix.shape != (len(values), one.dim) or set(map(type, values[0])) - {int, float}:
            raise Unfit(f"vectors of {one.dim} numbers are expected")
        return matrix.tobytes()
    if one.type is DataType.VARCHAR and not chunk.is_text:
        return _texts(one, values)
    return [_value(one, value, chunk) for value in values]


def _texts(one: FieldSchema, values: Values) -> Any:
    """Return texts as bytes and lengths if they are at hand so, else as a list, which takes defaults too."""
    if not isinstance(values, Texts):
        return values
    if values.valid is None:
        return {"values": values.data, "lengths": values.lengths.tobytes()}
    if not one.nullable or one.default is not None:
        return list(values)
    return {"values": values.data, "lengths": values.lengths.tobytes(), "valid": values.valid.tobytes()}


def _numbers(kind: DataType, values: Any) -> Any:
    if (kind is DataType.BOOL) != (values.dtype.kind == "b"):
        raise Unfit(f"{values.dtype} is no {kind}")
    if kind.is_integer and len(values):
        edge = 1 << (INTEGER_BITS[kind] - 1)
        if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.rint(values))).all():
            raise Unfit("a number is not whole")
        if not -edge <= int(values.min()) <= int(values.max()) < edge:
            raise Unfit(f"a number is out of the range of {kind}")
    with np.errstate(over="ignore"):
        return values.astype(_WIDTHS[kind])


def _vectors(one: FieldSchema, values: Any) -> Any:
    kind, width = one.type, values.shape[1]
    if kind is DataType.BINARY_VECTOR:
        if values.dtype != np.uint8 or 8 * width != one.dim:
            raise Unfit(f"{width} of {values.dtype} are no {one.dim} bits")
        return values
    if width != one.dim or values.dtype.kind not in "iuf":
        raise Unfit(f"{width} of {values.dtype} are no vector of dim {one.dim}")
    with np.errstate(over="ignore", under="ignore"):
        if kind is DataType.FLOAT16_VECTOR:
            return values.astype("<f2")
        if kind is DataType.BFLOAT16_VECTOR:
            return bfloat16(values.astype(np.float32))
        if kind is DataType.INT8_VECTOR:
            if not ((values >= -128) & (values <= 127) & (values == np.rint(values))).all():
                raise Unfit("a component is no whole number from -128 to 127")
            return values.astype(np.int8)
        return values.astype("<f4")


def _row_values(values: Values) -> Sequence[Any]:
    listed: Sequence[Any] = values.tolist() if isinstance(values, np.ndarray) else values
    return listed


def _plain_list(values: Values) -> list[Any]:
    return list(_row_values(values))


def _value(one: FieldSchema, value: Any, chunk: Chunk) -> Any:
    """Return one value as the API takes it in CBOR. Raises Unfit, ValueError."""
    kind = one.type
    if value is None or (chunk.is_text and value == "" and (one.nullable or kind is not DataType.VARCHAR)):
        return None
    if chunk.is_text:
        return _of_text(one, value)
    if isinstance(value, float) and kind.is_integer and value.is_integer():
        return int(value)
    if kind is DataType.JSON and isinstance(value, str) and not chunk.is_json:
        return _json_or_text(value)
    if kind is DataType.SPARSE_FLOAT_VECTOR and isinstance(value, str):
        return orjson.loads(value)
    if kind is DataType.BINARY_VECTOR and isinstance(value, list):
        return bytes(value)
    return value


def _of_text(one: FieldSchema, text: str) -> Any:
    kind = one.type
    if kind in (DataType.VARCHAR, DataType.TIMESTAMPTZ):
        return text
    if kind is DataType.BOOL:
        if text.strip().lower() not in _TRUTHS:
            raise Unfit(f"{text[:40]!r} is neither true nor false")
        return _TRUTHS[text.strip().lower()]
    if kind.is_integer:
        return int(text)
    if kind.is_float:
        return float(text)
    if kind is DataType.JSON:
        return _json_or_text(text)
    if kind.is_vector and text.lstrip()[:1] not in ("[", "{"):
        return text  # base64
    value = orjson.loads(text)
    return bytes(value) if kind is DataType.BINARY_VECTOR else value


def _json_or_text(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _document(value: Any, schema: CollectionSchema) -> Mapping[str, Any]:
    if value is None or value == "":
        return {}
    document = orjson.loads(value) if isinstance(value, str | bytes) else value
    if not isinstance(document, dict):
        raise Unfit("dynamic keys are an object")
    if clash := next((key for key in document if key in schema.by_name), ""):
        raise Unfit(f"key {clash!r} is the name of a field")
    return document
