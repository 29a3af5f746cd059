"""Rows of an insert or upsert into a `Batch` that fits the schema, values kept exactly.

`data` comes in one of three forms:

    JSON           a list of objects, field -> value; one bare object is a list of one
    CBOR rows      the same, where a FloatVector may be a byte string: dim little-endian float32
    CBOR columns   one map, field -> column; a column is
                     a list                     one value per row, null where there is none
                     a byte string              the rows' values one after the other, little-endian, each in the width
                                                of the field's own type (Bool 1 byte 0/1, Int16 2, Int64 8, Float 4,
                                                Double 8, FloatVector 4 * dim)
                     {values: bytes, valid: bytes}  the same with one byte per row, 0 where the row is null
                     {values: bytes, lengths: bytes}  texts of a VarChar as UTF-8 one after the other, and of each its
                                                bytes as little-endian uint32; `valid` may be there too

Keys that are no field go to the dynamic field where the collection has one, else they are refused. All refusals are
BadRow and name the row, the field and the value. Decoding works on any thread: it touches nothing but its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final

import msgspec
import numpy as np
import orjson

from node.api.exact import NotExact, count_of, loads, split_list, split_object
from node.api.limits import check_row_marks
from node.api.requests import plain
from node.api.values import JSON_BYTES_MAX, LENGTH_BYTES, Gatherer, Misfit, bounded, document_text, gatherer, shortened
from storage.columns import Batch, Column, StringColumn
from storage.errors import BadJson, BadRow
from storage.schema import DYNAMIC_NAME, CollectionSchema, DataType, FieldSchema
from storage.strings import StringArray
from storage.types import FieldId

ROWS_PER_SLICE: Final = 32
"""Rows decoded between two chances for other threads: well below a millisecond of work."""
_NOT_A_ROW: Final = re.compile(r"(Expected `object`, got .*) - at `\$\[(\d+)\]`")
_rows = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_BETWEEN_ROWS: Final = re.compile(rb"\}\s*+,\s*+\{")
_PIECE_BYTES: Final = 128 << 10
"""0.3 ms of splitting, for which a thread keeps the interpreter."""
DYNAMIC_KEYS_MAX: Final = JSON_BYTES_MAX // 4
"""Of one row: each takes 4 bytes at least of the text they are kept as."""
NO_ROWS: Final = "fail to deal the insert data, error: missing required parameters: data has no rows"


class Write(Enum):
    """What the rows are for."""

    INSERT = "insert"
    """Every field but a generated primary key."""
    UPSERT = "upsert"
    """Every field, the primary key always."""
    PARTIAL = "partial"
    """The primary key and the fields to change, the same ones in every row."""


def rows_from_json(
    data: msgspec.Raw, schema: CollectionSchema, write: Write, breathe: Callable[[], None] = lambda: None
) -> Batch:
    """Return the rows of a JSON body. `breathe` is called between slices. Raises BadRow, or BadJson for no list."""
    text = bytes(data)
    check_row_marks(text)
    rows = _split_by_pieces(text) or _split(data)
    if not rows:
        raise BadRow(NO_ROWS)
    table = _Table(schema, write, len(rows), rows[0].keys())
    vectors = {one.name for one in schema.vectors if one.type is not DataType.SPARSE_FLOAT_VECTOR}
    colons, hidden = 0, False
    for i, row in enumerate(rows):
        colons += len(row)
        for key, raw in row.items():
            hidden = hidden or ":" in key
            if key not in vectors:  # a vector that has any is refused below
                colons += bytes(raw).count(b":")
        table.add_json(i, row)
        if i % ROWS_PER_SLICE == ROWS_PER_SLICE - 1:
            breathe()
    if hidden or colons != count_of(b":", text):
        _split_carefully(data)
    return table.batch()


def _split_by_pieces(text: bytes) -> list[dict[str, msgspec.Raw]] | None:
    """Return what `_split` does, with chances for other threads in between; None where it should say what is wrong.

    A cut may be anywhere: a piece is a list of whole objects, as its text is one, only if it begins and ends between
    rows.
    """
    if len(text) < 2 * _PIECE_BYTES or text[:1] != b"[":
        return None
    rows: list[dict[str, msgspec.Raw]] = []
    start, found = 1, _BETWEEN_ROWS.search(text, _PIECE_BYTES)
    try:
        while found is not None:
            rows += _rows.decode(b"[%b]" % text[start : found.start() + 1])
            start = found.end() - 1
            found = _BETWEEN_ROWS.search(text, start + _PIECE_BYTES)
        rows += _rows.decode(b"[" + text[start:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return rows


def _split(data: msgspec.Raw) -> list[dict[str, msgspec.Raw]]:
    """Return the rows' pairs, values as raw JSON, in one pass that does not notice a key given twice."""
    try:
        return _rows.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if found := _NOT_A_ROW.fullmatch(str(error)):  # not split to be counted: there may be millions
            raise BadRow(f"row {found[2]}: not an object: {found[1]}") from None
        return _split_carefully(data)


def _split_carefully(data: msgspec.Raw) -> list[dict[str, msgspec.Raw]]:
    """Return the same slowly. Raises BadRow naming a row that is no object or repeats a key, BadJson for no list."""
    try:
        elements = [data] if bytes(memoryview(data)[:1]) == b"{" else split_list(data)
    except NotExact as error:
        raise BadJson(
            f"can only accept json format request, error: json: cannot unmarshal data of type []row: {error}"
        ) from None
    rows = []
    for i, element in enumerate(elements):
        try:
            rows.append(split_object(element))
        except NotExact as error:
            raise BadRow(f"row {i}: {error}") from None
    return rows


def rows_from_cbor(
    data: Any, schema: CollectionSchema, write: Write, breathe: Callable[[], None] = lambda: None
) -> Batch:
    """Return the rows of a decoded CBOR body, in either of its forms. Raises BadRow, or BadJson for neither form."""
    if type(data) is dict:
        return _from_columns(data, schema, write)
    if type(data) is not list:
        raise BadJson("data should be a list of rows or a map of columns")
    if not data:
        raise BadRow(NO_ROWS)
    table: _Table | None = None
    for i, row in enumerate(data):
        if type(row) is not dict:
            raise BadRow(f"row {i}: a map is expected, got {type(row).__name__}")
        if table is None:
            table = _Table(schema, write, len(data), row.keys())
        table.add_plain(i, row)
        if i % ROWS_PER_SLICE == ROWS_PER_SLICE - 1:
            breathe()
    assert table is not None
    return table.batch()


class _Table:
    """The rows so far: a gatherer for each field that the write takes, and the dynamic keys of each row."""

    def __init__(self, schema: CollectionSchema, write: Write, rows: int, named: Any) -> None:
        self.schema = schema
        self.write = write
        self.rows = rows
        self.fields = _taken(schema, write, named)
        self.gatherers = [(one.name, gatherer(one)) for one in self.fields]
        self.refused = _refused(schema, self.fields)
        self.dynamic: dict[int, str] = {}

    def add_json(self, i: int, row: dict[str, msgspec.Raw]) -> None:
        name = ""
        try:
            for name, column in self.gatherers:
                raw = row.pop(name, None)
                if raw is not None:
                    column.add_json(bytes(raw))
                else:
                    self._missing(column)
            if row:
                name = next(iter(row))
                self._check_extra(row)
                if len(row) > DYNAMIC_KEYS_MAX:
                    raise Misfit(f"the row has {len(row)} dynamic keys, at most {DYNAMIC_KEYS_MAX} have room")
                kept = {}
                for name, raw in row.items():
                    value = loads(bounded(bytes(raw)))
                    if value is not None or self.write is Write.PARTIAL:
                        kept[name] = value
                self.dynamic[i] = document_text(kept)
        except (Misfit, NotExact) as error:
            raise BadRow(f"row {i}, field {name[:80]!r}: {error}") from None

    def add_plain(self, i: int, row: dict[Any, Any]) -> None:
        name: Any = ""
        row = dict(row)
        try:
            for name, column in self.gatherers:
                if name in row:
                    column.add_plain(row.pop(name))
                else:
                    self._missing(column)
            if row:
                name = next(iter(row))
                self._check_extra(row)
                for name, value in row.items():  # noqa: B007 (the error names the key reached)
                    plain(value)
                keep_nulls = self.write is Write.PARTIAL
                self.dynamic[i] = document_text({k: v for k, v in row.items() if v is not None or keep_nulls})
        except (Misfit, BadJson) as error:
            raise BadRow(f"row {i}, field {shortened(name)}: {error}") from None

    def _missing(self, column: Gatherer) -> None:
        if self.write is Write.PARTIAL:
            raise Misfit("the row leaves out a field that the first row names; all rows must name the same fields")
        column.add_missing()

    def _check_extra(self, row: Mapping[Any, Any]) -> None:
        for key in row:
            _check_key(key, self.schema, self.refused)

    def batch(self) -> Batch:
        columns: dict[FieldId, Column] = {}
        for one, (name, column) in zip(self.fields, self.gatherers, strict=True):
            try:
                columns[one.id] = column.finish()
            except Misfit as error:
                raise BadRow(f"field {name!r}, {error}") from None
        _add_dynamic(columns, self.schema, self.write, self.rows, self.dynamic)
        return Batch(columns, self.rows)


def _taken(schema: CollectionSchema, write: Write, named: Any) -> list[FieldSchema]:
    """Return the fields for which the write carries columns."""
    given = [one for one in schema.user_fields if one.id not in schema.computed]
    if write is Write.PARTIAL:
        return [one for one in given if one.primary or one.name in named]
    return [one for one in given if write is Write.UPSERT or not one.auto_id]


def _refused(schema: CollectionSchema, taken: Sequence[FieldSchema]) -> Mapping[str, str]:
    """Return the names that are fields but may not be given, with the reason."""
    reasons = {}
    names = {one.name for one in taken}
    for one in schema.user_fields:
        if one.id in schema.computed:
            reasons[one.name] = f"a function computes this field of {schema.computed[one.id].name}; it can not be given"
        elif one.name not in names:
            reasons[one.name] = (
                "the primary key is generated (autoID is on) and can not be given"
                if one.auto_id
                else "the first row does not name this field; all rows must name the same fields"
            )
    reasons[DYNAMIC_NAME] = f"{DYNAMIC_NAME} is the name of the dynamic field itself; give its keys directly"
    return reasons


def _check_key(key: Any, schema: CollectionSchema, refused: Mapping[str, str]) -> None:
    if type(key) is not str:
        raise Misfit("keys are text")
    if key in refused:
        raise Misfit(refused[key])
    if schema.dynamic is None:
        raise Misfit(f"has pass more field without dynamic schema, please check it: there is no field {key[:80]!r}")


def _add_dynamic(
    columns: dict[FieldId, Column], schema: CollectionSchema, write: Write, rows: int, texts: Mapping[int, str]
) -> None:
    if schema.dynamic is not None and (texts or write is not Write.PARTIAL):
        values = ["{}"] * rows
        for i, text in texts.items():
            values[i] = text
        columns[schema.dynamic.id] = StringColumn(StringArray.from_strings(values))


# --- columns -----------------------------------------------------------------------------------------------------


def _from_columns(data: dict[Any, Any], schema: CollectionSchema, write: Write) -> Batch:
    fields = _taken(schema, write, data.keys())
    refused = _refused(schema, fields)
    rows = _row_count(data, schema)
    if rows == 0:
        raise BadRow(NO_ROWS)
    columns: dict[FieldId, Column] = {}
    for one in fields:
        columns[one.id] = _column(one, data[one.name], rows) if one.name in data else _filled(one, rows)
    known = {one.name for one in fields}
    extra: dict[str, list[Any]] = {}
    for key, column in data.items():
        if key in known:
            continue
        try:
            _check_key(key, schema, refused)
            if type(column) is not list or len(column) != rows:
                raise Misfit(f"a dynamic key's column is a list of {rows} values")
            extra[key] = plain(column)
        except (Misfit, BadJson) as error:
            raise BadRow(f"field {shortened(key)}: {error}") from None
    _add_dynamic(columns, schema, write, rows, _dynamic_texts(extra, rows, write) if extra else {})
    return Batch(columns, rows)


Supply = Callable[[Gatherer, int], Column]
"""Makes a field's column of so many rows with its gatherer, which judges the values. Raises Misfit."""


def rows_from_supplies(
    supplies: Mapping[str, Supply], documents: Sequence[str] | None, rows: int, schema: CollectionSchema, write: Write
) -> Batch:
    """Return the rows whose columns a protocol of columns supplies by the names of their fields. Raises BadRow.

    documents  the dynamic keys of each row, from `check_document`, or None where none are given
    """
    if rows == 0:
        raise BadRow(NO_ROWS)
    fields = _taken(schema, write, supplies.keys())
    refused = _refused(schema, fields)
    known = {one.name for one in fields}
    columns: dict[FieldId, Column] = {}
    name = DYNAMIC_NAME
    try:
        if documents is not None and schema.dynamic is None:
            raise Misfit("the collection has no dynamic field")
        for name in supplies:
            if name not in known:
                _check_key(name, schema, refused)
                raise Misfit("there is no such field; dynamic keys go into the dynamic field")
        for one in fields:
            name = one.name
            supply = supplies.get(name)
            columns[one.id] = supply(gatherer(one), rows) if supply is not None else _filled(one, rows)
            if len(columns[one.id]) != rows:
                raise Misfit(f"the column has {len(columns[one.id])} values, not {rows}")
    except (Misfit, NotExact, BadJson) as error:
        raise BadRow(f"field {name[:80]!r}: {error}") from None
    _add_dynamic(columns, schema, write, rows, dict(enumerate(documents or ())))
    return Batch(columns, rows)


def check_document(text: bytes, schema: CollectionSchema, write: Write) -> str:
    """Return the dynamic keys of one row as the text that is kept. Raises Misfit or NotExact."""
    document = loads(bounded(text))
    if type(document) is not dict:
        raise Misfit("the dynamic field of a row is a JSON object")
    for key in document:
        if key in schema.by_name:
            raise Misfit(f"key {key[:80]!r} is the name of a field")
    if write is not Write.PARTIAL:
        document = {key: value for key, value in document.items() if value is not None}
    return document_text(document)


def _row_count(data: Mapping[Any, Any], schema: CollectionSchema) -> int:
    """Return the number of rows, as the first column has it; `_column` holds the others against it."""
    for key, column in data.items():
        if type(column) is dict and isinstance(lengths := column.get("lengths"), bytes | memoryview):
            return len(lengths) // LENGTH_BYTES
        values = column.get("values") if type(column) is dict else column
        if type(values) is list:
            return len(values)
        one = schema.by_name.get(key) if type(key) is str else None
        width = gatherer(one).element_bytes() if one is not None and not one.dynamic else 0
        if isinstance(values, bytes | memoryview) and width:
            return len(values) // width
    return 0


def _column(one: FieldSchema, given: Any, rows: int) -> Column:
    column = gatherer(one)
    row = -1
    try:
        if type(given) is list:
            if len(given) != rows:
                raise Misfit(f"the column has {len(given)} values, the first column has {rows}")
            if column.takes_all(given):
                return column.finish()
            for row, value in enumerate(given):  # noqa: B007 (the error names the row reached)
                column.add_plain(value)
            row = -1
            return column.finish()
        values, valid = given, None
        if type(given) is dict:
            values = given.get("values")
            valid = _validity(one, _copied(given.get("valid")), rows)
            if "lengths" in given:
                return column.from_lengths(_copied(values), _copied(given["lengths"]), rows, valid)
        if type(values) is memoryview and not column.takes_views:
            values = bytes(values)
        if not isinstance(values, bytes | memoryview):
            raise Misfit("a column is a list, a byte string, or {values: bytes, valid: bytes}")
        if len(values) != rows * (width := column.element_bytes()) and width:
            raise Misfit(f"the column has {len(values)} bytes, {rows} rows of {width} bytes need {rows * width}")
        return column.from_buffer(values, rows, valid)
    except (Misfit, BadJson) as error:
        where = f"row {row}, " if row >= 0 else ""
        raise BadRow(f"{where}field {one.name!r}: {error}") from None


def _copied(given: Any) -> Any:
    """Return a byte string that may be a view of the body as one of its own."""
    return bytes(given) if type(given) is memoryview else given


def _validity(one: FieldSchema, given: Any, rows: int) -> Any:
    if given is None:
        return None
    if type(given) is not bytes or len(given) != rows or given.translate(None, b"\x00\x01"):
        raise Misfit(f"valid is a byte string of {rows} bytes, each 0 or 1")
    valid = np.frombuffer(given, np.bool_)
    if valid.all():
        return None
    if not one.nullable or one.default is not None:
        raise Misfit("the column has nulls, but the field is not nullable (or has a default: send a list then)")
    return valid


def _filled(one: FieldSchema, rows: int) -> Column:
    """Return the column of a field that was left out: its default, or nulls."""
    column = gatherer(one)
    try:
        for _ in range(rows):
            column.add_missing()
    except Misfit as error:
        raise BadRow(f"field {one.name!r}: {error}") from None
    return column.finish()


def _dynamic_texts(extra: Mapping[str, list[Any]], rows: int, write: Write) -> dict[int, str]:
    texts: dict[int, str] = {}
    for i in range(rows):
        row = {key: column[i] for key, column in extra.items()}
        if write is not Write.PARTIAL:
            row = {key: value for key, value in row.items() if value is not None}
        try:
            texts[i] = document_text(row)
        except (Misfit, orjson.JSONEncodeError) as error:
            raise BadRow(f"row {i}, dynamic keys: {error}") from None
    return texts
