"""One field's values, gathered one by one from a request and then made a column.

A gatherer takes each value as JSON text (`add_json`: the literal is kept until the field's type has judged it, so
nothing is rounded on the way) or as a Python value from CBOR (`add_plain`); `finish` gives the column. A null, or a key
left out, is the field's default, else null where the field is nullable, else refused.

Every refusal is a `Misfit`: words about the value alone; who gathers rows adds which row and which field.
"""

from __future__ import annotations

import re
import struct
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from node.api.exact import NotExact, kind_of, loads, split_list
from node.api.gathering import Gatherer as Gatherer
from node.api.gathering import Misfit as Misfit
from node.api.gathering import shortened as shortened
from node.api.limits import SPLIT_COMMAS_MAX
from node.api.requests import plain
from node.api.vectors import vector_gatherer
from storage.columns import NUMPY_TYPES, ArrayColumn, Column, Mask, ScalarColumn, StringColumn, VectorColumn
from storage.schema import INTEGER_BITS, DataType, FieldSchema
from storage.strings import StringArray
from storage.times import TIMEZONE, parse_time, zone_of

JSON_BYTES_MAX: Final = 65_536
"""Of one JSON document or one row's dynamic keys, as in Milvus."""
JSON_TEXT_BYTES_MAX: Final = 8 * JSON_BYTES_MAX
"""Of the text it comes as: spaces and escapes may make it longer than it is."""
LENGTH_BYTES: Final = 4
"""Of the length of a text in a column of them."""
FLOAT_MAX: Final = 3.4028235677973366e38
"""Numbers of this size and above round to infinity as float32."""
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_floats = msgspec.json.Decoder(list[float])


def gatherer(field: FieldSchema) -> Gatherer:
    """Return an empty gatherer for the field's values."""
    kind = field.type
    if kind is DataType.FLOAT_VECTOR:
        return _Vectors(field)
    if kind.is_vector:
        return vector_gatherer(field)
    if kind is DataType.ARRAY:
        return _Arrays(field)
    if kind is DataType.JSON:
        return _Documents(field)
    return _scalars(field, kind)


def _scalars(field: FieldSchema, kind: DataType) -> Gatherer:
    if kind is DataType.VARCHAR:
        return _Texts(field)
    if kind is DataType.BOOL:
        return _Bools(field)
    if kind is DataType.TIMESTAMPTZ:
        return _Times(field)
    return _Integers(field, kind) if kind.is_integer else _Floats(field, kind)


# --- scalars -----------------------------------------------------------------------------------------------------


class _Numbers(Gatherer):
    """Fixed-width values: what bools, integers and floats share."""

    def __init__(self, field: FieldSchema, kind: DataType) -> None:
        super().__init__(field)
        self.kind = kind
        self.dtype = NUMPY_TYPES[kind]

    def column(self, valid: Mask | None) -> Column:
        values = np.array(self.values, self.dtype)
        values.flags.writeable = False
        return ScalarColumn(values, valid)

    def element_bytes(self) -> int:
        return self.dtype.itemsize

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        values: npt.NDArray[Any] = np.frombuffer(data, self.dtype)
        if valid is not None and not valid.all():
            values = np.where(valid, values, self.dtype.type(0))
            values.flags.writeable = False
        return ScalarColumn(values, valid)


class _Bools(_Numbers):
    def __init__(self, field: FieldSchema) -> None:
        super().__init__(field, DataType.BOOL)

    def from_json(self, text: bytes) -> bool:
        if text == b"true":
            return True
        if text == b"false":
            return False
        word = loads(text) if text[:1] == b'"' else text.decode("utf-8", "replace")
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
        raise Misfit(f"{shortened(text)} is not a Bool")

    def from_plain(self, value: Any) -> bool:
        if type(value) is bool:
            return value
        word = str(value) if type(value) in (int, str) else ""
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        raise Misfit(f"{shortened(value)} is not a Bool")

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        if bytes(data).translate(None, b"\x00\x01"):
            raise Misfit("the bytes of a Bool column are 0 and 1")
        return super().from_buffer(data, rows, valid)


def _quoted(text: bytes, kind: DataType) -> bytes:
    """Return the number within a JSON string, as clients send whose own numbers are doubles. Raises Misfit."""
    literal = loads(text).encode()
    if not _NUMBER.fullmatch(literal):
        raise Misfit(f"{shortened(text)} is not an {kind}" if kind.is_integer else f"{shortened(text)} is not a {kind}")
    return bytes(literal)


class _Integers(_Numbers):
    def __init__(self, field: FieldSchema, kind: DataType) -> None:
        super().__init__(field, kind)
        self.edge = 1 << (INTEGER_BITS[kind] - 1)

    def from_json(self, text: bytes) -> int:
        if text[:1] == b'"':
            text = _quoted(text, self.kind)
        elif kind_of(text) != "number":
            raise Misfit(f"{shortened(text)} is not an {self.kind}")
        if len(text) <= 20 and not (b"." in text or b"e" in text or b"E" in text):
            value = int(text)
        else:
            value = self._exact(text)
        if not -self.edge <= value < self.edge:
            raise Misfit(f"{shortened(text)} is out of the range of {self.kind}")
        return value

    def takes_all(self, values: list[Any]) -> bool:
        if set(map(type, values)) != {int} or min(values) < -self.edge or max(values) >= self.edge:
            return False
        self.values += values
        return True

    def _exact(self, text: bytes) -> int:
        """Return the integer that a literal with a fraction, an exponent or many digits stands for."""
        try:
            number = Decimal(text.decode())
        except InvalidOperation:  # an exponent beyond all bounds
            raise Misfit(f"{shortened(text)} is out of the range of {self.kind}") from None
        if number and number.adjusted() > 20:
            raise Misfit(f"{shortened(text)} is out of the range of {self.kind}")
        if number != (whole := number.to_integral_value()):
            raise Misfit(f"{shortened(text)} is not a whole number, as {self.kind} wants")
        return int(whole)

    def from_plain(self, value: Any) -> int:
        kind = type(value)
        if kind is float and value.is_integer():
            value = int(value)
        elif kind is str:
            return self.from_json(msgspec.json.encode(value))
        elif kind is not int:
            raise Misfit(f"{shortened(value)} is not an {self.kind}")
        if not -self.edge <= value < self.edge:
            raise Misfit(f"{shortened(value)} is out of the range of {self.kind}")
        return int(value)


class _Floats(_Numbers):
    def __init__(self, field: FieldSchema, kind: DataType) -> None:
        super().__init__(field, kind)
        self.edge = FLOAT_MAX if kind is DataType.FLOAT else float("inf")

    def from_json(self, text: bytes) -> float:
        if text[:1] == b'"':
            text = _quoted(text, self.kind)
        try:
            value = msgspec.json.decode(text, type=float)
        except msgspec.MsgspecError as error:
            if "out of range" in str(error):
                raise Misfit(f"{shortened(text)} is out of the range of {self.kind}") from None
            raise Misfit(f"{shortened(text)} is not a {self.kind}") from None
        return self._ranged(value, text)

    def from_plain(self, value: Any) -> float:
        if type(value) is str:
            return self.from_json(msgspec.json.encode(value))
        if type(value) not in (int, float):
            raise Misfit(f"{shortened(value)} is not a {self.kind}")
        return self._ranged(float(value), value)

    def _ranged(self, value: float, shown: object) -> float:
        if not -self.edge < value < self.edge:
            raise Misfit(f"{shortened(shown)} is out of the range of {self.kind}")
        return value

    def column(self, valid: Mask | None) -> Column:
        with np.errstate(under="ignore"):
            return super().column(valid)

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        column = super().from_buffer(data, rows, valid)
        assert isinstance(column, ScalarColumn)
        if not np.isfinite(column.values).all():
            row = int(np.argmin(np.isfinite(column.values)))
            raise Misfit(f"row {row} is not a finite {self.kind}")
        return column


class _Times(_Numbers):
    """Timestamptz: ISO 8601 texts; one without an offset is of the field's time zone."""

    def __init__(self, field: FieldSchema) -> None:
        super().__init__(field, DataType.TIMESTAMPTZ)
        self.zone = zone_of(field.params.get(TIMEZONE, ""))

    def from_json(self, text: bytes) -> int:
        if text[:1] != b'"':
            raise Misfit(f"{shortened(text)} is not a Timestamptz but a {kind_of(text)}: an ISO 8601 text is expected")
        return self.from_plain(loads(text))

    def from_plain(self, value: Any) -> int:
        if type(value) is not str:
            raise Misfit(f"{shortened(value)} is not a Timestamptz but a {type(value).__name__}")
        try:
            return int(parse_time(value, self.zone))
        except ValueError as error:
            raise Misfit(f"{shortened(value)} is not a Timestamptz: {error}") from None

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        raise Misfit("a Timestamptz column is a list of texts, not bytes")

    def element_bytes(self) -> int:
        return 0


class _Texts(Gatherer):
    """VarChar: `max_length` bounds the bytes of the UTF-8 text, as in Milvus. A number's literal is kept as it came."""

    @property
    def blank(self) -> Any:
        return ""

    def from_json(self, text: bytes) -> str:
        first = text[:1]
        if first == b'"':
            return self._bounded(loads(text))
        if first in (b"{", b"["):
            raise Misfit(f"{shortened(text)} is not a VarChar but an {kind_of(text)}")
        return self._bounded(text.decode())

    def from_plain(self, value: Any) -> str:
        if type(value) is not str:
            raise Misfit(f"{shortened(value)} is not a VarChar but a {type(value).__name__}")
        return self._bounded(value)

    def _bounded(self, value: str) -> str:
        limit = self.field.max_bytes
        if len(value) * 4 > limit and (length := len(value.encode())) > limit:
            raise Misfit(_too_long(length, limit))
        return value

    def takes_all(self, values: list[Any]) -> bool:
        if set(map(type, values)) != {str}:
            return False
        limit = self.field.max_bytes
        if 4 * max(map(len, values)) > limit and max(map(len, map(str.encode, values))) > limit:
            return False
        self.values += values
        return True

    def column(self, valid: Mask | None) -> Column:
        return StringColumn(StringArray.from_strings(self.values), valid)

    def from_lengths(self, data: Any, lengths: Any, rows: int, valid: Mask | None) -> Column:
        if type(data) is not bytes or type(lengths) is not bytes or len(lengths) != LENGTH_BYTES * rows:
            raise Misfit(f"texts are {{values: bytes, lengths: bytes}}, with {LENGTH_BYTES * rows} bytes of lengths")
        sizes = np.frombuffer(lengths, "<u4")
        offsets = np.zeros(rows + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        if int(offsets[-1]) != len(data):
            raise Misfit(f"the texts have {len(data)} bytes, their lengths add up to {int(offsets[-1])}")
        if int(sizes.max(initial=0)) > self.field.max_bytes:
            row = int(np.argmax(sizes > self.field.max_bytes))
            raise Misfit(f"row {row}: {_too_long(int(sizes[row]), self.field.max_bytes)}")
        if valid is not None and sizes[~valid].any():
            raise Misfit("a row that is null has a text")
        try:
            return StringColumn(StringArray.from_buffers(offsets, data), valid)
        except ValueError as error:
            raise Misfit(f"the texts are not UTF-8: {error}") from None


def _too_long(length: int, limit: int) -> str:
    return f"length of varchar field exceeds max length: length {length} bytes, max length {limit}"


# --- documents, arrays, vectors ----------------------------------------------------------------------------------


def bounded(text: bytes) -> bytes:
    """Return the JSON text if it can be a document at all: parsed, a hostile one takes 30 times its own memory."""
    if len(text) > JSON_TEXT_BYTES_MAX:
        raise Misfit(f"the JSON document has {len(text)} bytes, at most {JSON_BYTES_MAX} are allowed")
    return text


def document_text(value: Any) -> str:
    """Return the canonical text of a JSON value: no spaces, keys in the order given. Raises Misfit if it is long."""
    text = orjson.dumps(value)
    if len(text) > JSON_BYTES_MAX:
        raise Misfit(f"the JSON document has {len(text)} bytes, at most {JSON_BYTES_MAX} are allowed")
    return text.decode()


class _Documents(Gatherer):
    """JSON. A text that itself holds an object is that object: Milvus's older clients send documents so."""

    @property
    def blank(self) -> Any:
        return ""

    def from_json(self, text: bytes) -> str:
        return document_text(self._opened(loads(bounded(text))))

    def from_plain(self, value: Any) -> str:
        return document_text(self._opened(plain(value)))

    def _opened(self, value: Any) -> Any:
        if type(value) is str and value.lstrip()[:1] == "{":
            try:
                return loads(value.encode())
            except NotExact:
                return value
        return value

    def column(self, valid: Mask | None) -> Column:
        return StringColumn(StringArray.from_strings(self.values), valid)


class _Arrays(Gatherer):
    """Arrays: each element is judged as a value of the element's type, and is never null."""

    def __init__(self, field: FieldSchema) -> None:
        super().__init__(field)
        assert field.element is not None
        self.items = _scalars(field, field.element)

    @property
    def blank(self) -> Any:
        return []

    def from_json(self, text: bytes) -> list[Any]:
        if text[:1] != b"[":
            raise Misfit(f"{shortened(text)} is not an array but a {kind_of(text)}")
        if text.count(b",") > SPLIT_COMMAS_MAX:
            self._bound(text.count(b",") + 1)
        elements = [bytes(element) for element in split_list(text)]
        self._bound(len(elements))
        if b"null" in elements:
            raise Misfit(f"element {elements.index(b'null')} is null; an array's elements are not nullable")
        return [self.items.from_json(element) for element in elements]

    def from_plain(self, value: Any) -> list[Any]:
        if type(value) is not list:
            raise Misfit(f"{shortened(value)} is not an array but a {type(value).__name__}")
        self._bound(len(value))
        if None in value:
            raise Misfit(f"element {value.index(None)} is null; an array's elements are not nullable")
        return [self.items.from_plain(element) for element in value]

    def _bound(self, length: int) -> None:
        if length > self.field.capacity:
            raise Misfit(f"array length {length} exceeds max capacity {self.field.capacity}")

    def column(self, valid: Mask | None) -> Column:
        offsets = np.zeros(len(self.values) + 1, np.int64)
        np.cumsum([len(row) for row in self.values], out=offsets[1:])
        offsets.flags.writeable = False
        self.items.values = [element for row in self.values for element in row]
        items = self.items.column(None)
        assert isinstance(items, ScalarColumn | StringColumn)
        return ArrayColumn(offsets, items, valid)


class _Vectors(Gatherer):
    """Float vectors, packed row by row into one block of float32."""

    takes_views = True

    def __init__(self, field: FieldSchema) -> None:
        super().__init__(field)
        self.width = 4 * field.dim
        self.packer = struct.Struct(f"<{field.dim}f")
        self.block = bytearray()

    def add_json(self, text: bytes) -> None:
        if text == b"null":
            self.add_missing()
        if text[:1] == b"[" and (numbers := text.count(b",") + 1) > self.field.dim:  # known before they are made
            raise Misfit(self._unequal(numbers))
        try:
            self._pack(_floats.decode(text))
        except msgspec.ValidationError as error:
            raise Misfit(f"{shortened(text)} is not a float vector: {error}") from None
        except msgspec.DecodeError as error:
            raise NotExact(f"invalid JSON: {error}") from None

    def add_plain(self, value: Any) -> None:
        if type(value) is bytes:
            if len(value) != self.width:
                raise Misfit(f"{self._unequal(len(value) / 4)}: {len(value)} bytes are not {self.width}")
            self.block += value
            return
        if value is None:
            self.add_missing()
        if type(value) is not list or not set(map(type, value)) <= {int, float}:
            raise Misfit(f"{shortened(value)} is not a float vector: numbers, or little-endian float32 bytes")
        self._pack(value)

    def _pack(self, numbers: list[float]) -> None:
        if len(numbers) != self.field.dim:
            raise Misfit(self._unequal(len(numbers)))
        try:
            self.block += self.packer.pack(*numbers)
        except (OverflowError, struct.error):
            raise Misfit("a component of the vector is too large for a float32") from None

    def _unequal(self, dim: float) -> str:
        return f"the dim ({dim:g}) of field data({self.field.name}) is not equal to schema dim ({self.field.dim})"

    def from_json(self, text: bytes) -> Any:
        raise AssertionError("vectors are packed as they come")

    def from_plain(self, value: Any) -> Any:
        raise AssertionError("vectors are packed as they come")

    def column(self, valid: Mask | None) -> Column:
        return self.from_buffer(memoryview(self.block).toreadonly(), len(self.block) // self.width, None)

    def element_bytes(self) -> int:
        return self.width

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        if valid is not None:
            raise Misfit("a vector is never null")
        matrix = np.frombuffer(data, np.dtype("<f4")).reshape(rows, self.field.dim)
        finite = np.isfinite(matrix)
        if not finite.all():
            row = int(np.argmin(finite.all(axis=1)))
            raise Misfit(f"row {row}: a component of the vector is NaN or infinite")
        return VectorColumn(matrix)
