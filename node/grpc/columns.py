"""Milvus's `FieldData` into the columns that storage keeps, and back, with no step per value that need not be.

What came is judged by the gatherers of the REST API (`node.api.values`), so that both interfaces take and refuse the
same. protobuf keeps numbers as an array, which numpy copies as a whole; the other way, an array of floats is the wire
format of a packed field but for its head, so it is parsed from its own bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from node.api.exact import NotExact
from node.api.replies import time_texts
from node.api.rows import NO_ROWS, Supply, Write, check_document, rows_from_supplies
from node.api.values import Gatherer, Misfit
from node.grpc.protocol import Message, enum, enum_names, message
from node.service import Rows
from storage.columns import ArrayColumn, Batch, Column, Mask, ScalarColumn, StringColumn
from storage.errors import BadRow
from storage.schema import DYNAMIC_NAME, INTEGER_BITS, CollectionSchema, DataType, FieldSchema

TYPES: Final = enum("schema.DataType")
TYPE_NAMES: Final = {**enum_names("schema.DataType"), TYPES["String"]: "VarChar"}
_FIELD_DATA: Final = message("schema.FieldData")
_SCALARS: Final[Mapping[DataType, str]] = {
    DataType.BOOL: "bool_data", DataType.INT8: "int_data", DataType.INT16: "int_data", DataType.INT32: "int_data",
    DataType.INT64: "long_data", DataType.FLOAT: "float_data", DataType.DOUBLE: "double_data",
    DataType.VARCHAR: "string_data", DataType.TIMESTAMPTZ: "string_data",
}  # fmt: skip
_OTHERS: Final = {DataType.JSON: "json_data", DataType.ARRAY: "array_data"}
_WIRE: Final = {
    "bool_data": np.dtype(np.bool_), "int_data": np.dtype("<i4"), "long_data": np.dtype("<i8"),
    "float_data": np.dtype("<f4"), "double_data": np.dtype("<f8"),
}  # fmt: skip
_BYTES: Final = {
    "BinaryVector": "binary_vector", "Float16Vector": "float16_vector", "BFloat16Vector": "bfloat16_vector",
    "Int8Vector": "int8_vector",
}  # fmt: skip
"""Vectors whose rows lie one after the other in a byte string."""
_SPARSE: Final = "SparseFloatVector"
_PAIR: Final = np.dtype([("term", "<u4"), ("weight", "<f4")])
"""A term of a sparse vector, as Milvus sends it."""


# --- requests ----------------------------------------------------------------------------------------------------


def batch_of(
    fields: Iterable[Message],
    rows: int,
    schema: CollectionSchema,
    write: Write,
    breathe: Callable[[], None] = lambda: None,
) -> Batch:
    """Return the rows of an insert. Raises BadRow. `breathe` is called between columns."""
    if rows == 0:
        raise BadRow(NO_ROWS)
    supplies: dict[str, Supply] = {}
    documents: list[str] | None = None
    for data in fields:
        if data.is_dynamic or data.field_name in ("", DYNAMIC_NAME):
            documents = _documents(data, rows, schema, write)
        elif data.field_name in supplies:
            raise BadRow(f"field {data.field_name[:80]!r} is given twice")
        else:
            supplies[data.field_name] = _supply(data)
        breathe()
    return rows_from_supplies(supplies, documents, rows, schema, write)


def _documents(data: Message, rows: int, schema: CollectionSchema, write: Write) -> list[str]:
    """Return the dynamic keys of each row, checked. Raises BadRow."""
    given = data.scalars.json_data.data
    if len(given) != rows:
        raise BadRow(f"the dynamic field has {len(given)} values, there are {rows} rows")
    row = 0
    try:
        checked = []
        for row, text in enumerate(given):  # noqa: B007 (the error names the row reached)
            checked.append("{}" if text in (b"{}", b"") else check_document(text, schema, write))
    except (Misfit, NotExact) as error:
        raise BadRow(f"row {row}, dynamic field: {error}") from None
    return checked


def _supply(data: Message) -> Supply:
    def column(into: Gatherer, rows: int) -> Column:
        field = into.field
        if TYPE_NAMES.get(data.type) != field.type:
            given = TYPE_NAMES.get(data.type, data.type)
            raise Misfit(f"the column is of type {given}, the field is of type {field.type}")
        valid = _validity(data, field, rows)
        if field.type.is_vector:
            return _vectors(into, data.vectors, rows)
        if field.type in (DataType.VARCHAR, DataType.TIMESTAMPTZ):
            return _gathered(into, into.add_plain, data.scalars.string_data.data, valid, rows)
        if field.type is DataType.JSON:
            return _gathered(into, into.add_json, data.scalars.json_data.data, valid, rows)
        if field.type is DataType.ARRAY:
            assert field.element is not None
            name = _SCALARS[field.element]
            lists = [_elements(one, name) for one in data.scalars.array_data.data]
            return _gathered(into, into.add_plain, lists, valid, rows)
        return _numbers(into, data.scalars, valid, rows)

    return column


def _validity(data: Message, field: FieldSchema, rows: int) -> Mask | None:
    """Return which rows have a value, None if all have. Raises Misfit if some have none that must."""
    inner = data.vectors if field.type.is_vector else data.scalars
    given = inner.valid_data or data.valid_data
    if not given:
        return None
    valid = np.array(given, np.bool_)
    if len(valid) != rows:
        raise Misfit(f"valid_data has {len(valid)} values, there are {rows} rows")
    if valid.all():
        return None
    if field.default is None and not field.nullable:
        row = int(np.argmin(valid))
        raise Misfit(f"row {row}: a value is required: the field is not nullable and has no default")
    return valid


def _numbers(into: Gatherer, scalars: Message, valid: Mask | None, rows: int) -> Column:
    field = into.field
    name = _SCALARS[field.type]
    values: npt.NDArray[Any] = np.array(getattr(scalars, name).data, _WIRE[name])
    if field.type in INTEGER_BITS and name == "int_data":
        edge = 1 << (INTEGER_BITS[field.type] - 1)
        wrong = (values < -edge) | (values >= edge)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise Misfit(f"row {row}: {values[row]} is out of the range of {field.type}")
        values = values.astype(f"<i{INTEGER_BITS[field.type] // 8}")
    if valid is not None:
        values = _spread(values, valid, rows)
        if field.default is not None:
            values = np.where(valid, values, np.array(field.default, values.dtype))
            valid = None
    _check_count(len(values), rows)
    return into.from_buffer(values.tobytes(), rows, valid)


def _spread(values: npt.NDArray[Any], valid: Mask, rows: int) -> npt.NDArray[Any]:
    """Return a value for every row: clients leave out those of null rows, or send something in their place."""
    if len(values) == rows or len(values) != np.count_nonzero(valid):
        return values
    spread = np.zeros(rows, values.dtype)
    spread[valid] = values
    return spread


def _gathered(
    into: Gatherer, add: Callable[[Any], None], values: Sequence[Any], valid: Mask | None, rows: int
) -> Column:
    row = 0
    try:
        if valid is None:
            _check_count(len(values), rows)
            for row, value in enumerate(values):  # noqa: B007 (the error names the row reached)
                add(value)
        else:
            is_full = len(values) == rows
            if not is_full:
                _check_count(len(values), int(np.count_nonzero(valid)))
            left = iter(values)
            for row, live in enumerate(valid.tolist()):  # noqa: B007 (the same)
                value = next(left) if live or is_full else None
                if live:
                    add(value)
                else:
                    into.add_missing()
    except (Misfit, NotExact) as error:
        raise Misfit(f"row {row}: {error}") from None
    return into.finish()


def _elements(given: Message, name: str) -> list[Any]:
    which = given.WhichOneof("data")
    if which not in (name, None):
        raise Misfit(f"an array's elements are in {which}, they should be in {name}")
    return list(getattr(given, name).data)


def _vectors(into: Gatherer, given: Message, rows: int) -> Column:
    field = into.field
    which = given.WhichOneof("data")
    expected = "sparse_float_vector" if field.type == _SPARSE else _BYTES.get(field.type, "float_vector")
    if which not in (expected, None):
        raise Misfit(f"the vectors are in {which}, they should be in {expected}")
    if field.type == _SPARSE:
        return _gathered(into, into.add_plain, given.sparse_float_vector.contents, None, rows)
    if given.dim not in (0, field.dim):
        raise Misfit(f"the dim ({given.dim}) of field data({field.name}) is not equal to schema dim ({field.dim})")
    if field.type in _BYTES:
        block: bytes = getattr(given, expected)
    else:
        block = np.array(given.float_vector.data, "<f4").tobytes()
    width = into.element_bytes()
    if len(block) != rows * width:
        raise Misfit(f"the vectors have {len(block)} bytes, {rows} rows of {width} bytes need {rows * width}")
    return into.from_buffer(block, rows, None)


def _check_count(count: int, rows: int) -> None:
    if count != rows:
        raise Misfit(f"the column has {count} values, not {rows}")


# --- answers -----------------------------------------------------------------------------------------------------


def show_rows(rows: Rows, fields_data: Message, output_fields: Message, *, with_key: bool) -> None:
    """Append the columns of an answer, the primary key's only if it is wanted, and the names of what was asked for."""
    schema, batch = rows.schema, rows.batch
    names = [name for name in rows.fields if name != schema.primary.name]
    if with_key:
        names.insert(0, schema.primary.name)
    for name in names:
        one = schema.by_name[name]
        show_column(fields_data.add(), one, batch.columns.get(one.id))
        output_fields.append(name)
    dynamic = schema.dynamic
    if dynamic is not None and (rows.dynamic_keys is None or rows.dynamic_keys):
        data = fields_data.add(type=TYPES["JSON"], field_name=DYNAMIC_NAME, field_id=dynamic.id, is_dynamic=True)
        column = batch.columns.get(dynamic.id)
        texts = [] if column is None else column.to_list()
        data.scalars.json_data.SetInParent()
        data.scalars.json_data.data.extend([_document(text, schema) for text in texts])
        output_fields.extend([DYNAMIC_NAME] if rows.dynamic_keys is None else rows.dynamic_keys)


def show_groups(groups: Sequence[Mapping[str, Any]], names: Sequence[str], fields_data: Message) -> None:
    """Append a column for each name of rows of aggregates, of the widest type that its values have."""
    for name in names:
        values = [one.get(name) for one in groups]
        kinds = {type(value) for value in values if value is not None}
        kind = DataType.INT64
        for python, wider in ((bool, DataType.BOOL), (int, DataType.INT64), (float, DataType.DOUBLE)):
            kind = wider if python in kinds else kind
        if str in kinds:
            kind = DataType.VARCHAR
        data = fields_data.add(type=TYPES[kind], field_name=name)
        empty: Any = "" if kind is DataType.VARCHAR else 0
        getattr(data.scalars, _SCALARS[kind]).data.extend([empty if value is None else value for value in values])
        if None in values:
            data.valid_data.extend([value is not None for value in values])


def _document(text: str | None, schema: CollectionSchema) -> bytes:
    """Return a row's dynamic keys, without those that are fields by now."""
    if not text or text == "{}":
        return b"{}"
    if schema.version > 1:
        return orjson.dumps({key: value for key, value in orjson.loads(text).items() if key not in schema.by_name})
    return text.encode()


def show_column(data: Message, field: FieldSchema, column: Column | None) -> None:
    """Fill a FieldData with a column; None is one without rows."""
    data.type, data.field_name, data.field_id = TYPES[str(field.type)], field.name, field.id
    if field.type.is_vector:
        _show_vectors(data.vectors, field, column)
        return
    getattr(data.scalars, _OTHERS.get(field.type) or _SCALARS[field.type]).SetInParent()  # also where it has no rows
    if column is None or not len(column):
        return
    if column.valid is not None:
        data.valid_data.extend(column.valid.tolist())
    if field.type is DataType.TIMESTAMPTZ:
        assert isinstance(column, ScalarColumn), "times are numbers"
        data.scalars.string_data.data.extend([one or "" for one in time_texts(field, column)])
    elif isinstance(column, ScalarColumn):
        _show_numbers(data.scalars, field.type, column.values)
    elif isinstance(column, ArrayColumn):
        assert field.element is not None
        data.scalars.array_data.element_type = TYPES[str(field.element)]
        _show_arrays(data.scalars.array_data.data, field.element, column)
    elif isinstance(column, StringColumn):
        texts = column.values.to_list()
        if field.type is DataType.JSON:
            data.scalars.json_data.data.extend([text.encode() for text in texts])
        else:
            data.scalars.string_data.data.extend(texts)


def _show_vectors(into: Message, field: FieldSchema, column: Column | None) -> None:
    values: Any = None if column is None else column.values  # type: ignore[union-attr]
    into.dim = field.dim
    if field.type == _SPARSE:
        sparse = into.sparse_float_vector
        sparse.SetInParent()
        for row in range(0 if values is None else len(values)):
            terms, weights = values.row(row)
            pairs = np.empty(len(terms), _PAIR)
            pairs["term"], pairs["weight"] = terms, weights
            sparse.contents.append(pairs.tobytes())
            sparse.dim = max(sparse.dim, int(terms[-1]) + 1 if len(terms) else 0)
        into.dim = sparse.dim
    elif field.type in _BYTES:
        setattr(into, _BYTES[field.type], b"" if values is None else values.tobytes())
    else:
        into.float_vector.SetInParent()
        if values is not None and len(values):
            into.float_vector.MergeFromString(_packed(values))


def _show_numbers(scalars: Message, kind: DataType, values: npt.NDArray[Any]) -> None:
    into = getattr(scalars, _SCALARS[kind])
    if kind.is_float:
        into.MergeFromString(_packed(values))
    else:
        into.data.extend(values.tolist())


def _show_arrays(into: Message, element: DataType, column: ArrayColumn) -> None:
    name = _SCALARS[element]
    for row in column.to_list():
        items = getattr(into.add(), name)
        items.SetInParent()
        items.data.extend(row or ())


def _packed(values: npt.NDArray[Any]) -> bytes:
    """Return the wire form of a message whose field 1 has these floats or doubles, packed."""
    size = values.nbytes
    head = bytearray(b"\x0a")
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
