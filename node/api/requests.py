"""Request bodies, JSON or CBOR, into checked values: shapes are tables, so that the API's description is made of them.

The rules are Milvus's: declared keys match without regard to case (except those read by exact path: `data`, `id`),
unknown keys are ignored, null means "not given", a required field that is absent, null, "" or 0 is missing (1802), any
other type than the declared one is an error that names the field (1801); nothing is coerced.

The CBOR form of a body has the same names. Its data model is JSON's plus byte strings, so tags (big numbers, dates,
shared references), indefinite lengths, duplicate keys and keys that are no text are refused.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, NoReturn

import cbor2
import msgspec

from node.api.exact import DEPTH_MAX, NotExact, count_of, kind_of, loads, split_list, split_object
from node.api.limits import (
    KEYS_MAX,
    LIST_MAX,
    LOOSE_COLONS_MAX,
    MARKS_MAX,
    LongBytes,
    check_cbor,
    check_list,
    check_list_text,
    check_marks,
)
from storage.errors import BadJson, InvalidParameter, MissingParameter

JSON: Final = "application/json"
CBOR: Final = "application/cbor"
EMPTY_BODY: Final = (  # Milvus's words, which clients compare
    "can only accept json format request, the request body should be nil, however {} is valid"
)
_INT_EDGE: Final = {"int32": 1 << 31, "int64": 1 << 63}


class Kind(StrEnum):
    """What a declared field takes; the value is the type's name in error texts."""

    TEXT = "string"
    BOOL = "bool"
    INT32 = "int32"
    INT64 = "int64"
    TEXTS = "[]string"
    INTS = "[]int64"
    MAP = "map[string]interface {}"
    """An object with keys of the client's choice; arrives as a dict of Python values."""
    ANY = "interface {}"
    """Any value; arrives as a Python value."""
    OBJECT = "struct"
    OBJECTS = "[]struct"
    RAW = "raw"
    """Read by exact key and left undecoded (msgspec.Raw of JSON, the Python value of CBOR): the schema decides."""


@dataclass(frozen=True)
class Field:
    name: str
    kind: Kind
    doc: str
    default: Any = None
    required: bool = False
    shape: Shape | None = None
    """The fields of an OBJECT, or of each of the OBJECTS."""
    values_max: int = LIST_MAX
    """Of a list."""
    marks_max: int = MARKS_MAX
    """Of the JSON text of OBJECTS, see `limits.check_marks`."""
    schema: Mapping[str, Any] | None = None
    """JSON schema of a RAW field, for the API's description."""
    takes_views: bool = False
    """Whether the long byte strings of a RAW field may come as views of a CBOR body."""

    @property
    def go_name(self) -> str:
        return self.name[:1].upper() + self.name[1:]


@dataclass(frozen=True)
class Shape:
    """A request's declared fields; `name` is what error texts call it."""

    name: str
    fields: tuple[Field, ...] = ()
    defaults: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "defaults", {one.name: one.default for one in self.fields})

    @cached_property
    def exact(self) -> Mapping[str, Field]:
        return {one.name: one for one in self.fields}

    @cached_property
    def folded(self) -> Mapping[str, Field]:
        return {one.name.lower(): one for one in self.fields if one.kind is not Kind.RAW}

    @cached_property
    def required(self) -> tuple[Field, ...]:
        return tuple(one for one in self.fields if one.required)

    @cached_property
    def takes_views(self) -> bool:
        return any(one.takes_views for one in self.fields)

    @cached_property
    def skimmer(self) -> msgspec.json.Decoder[Any]:
        """Finds the declared fields without making anything of the others."""
        names = {f"f{i}": one.name for i, one in enumerate(self.fields)}
        struct = msgspec.defstruct("Skimmed", [(name, msgspec.Raw, msgspec.Raw()) for name in names], rename=names)
        return msgspec.json.Decoder(struct)

    def find(self, key: str) -> Field | None:
        return self.exact.get(key) or self.folded.get(key.lower())


def decode_json(body: bytes, shape: Shape) -> dict[str, Any]:
    """Return the values of all declared fields, defaults filled in. Raises BadJson or MissingParameter."""
    if not body:
        raise BadJson(EMPTY_BODY)
    if len(body) < 16 and body.strip() == b"null":
        return _checked(dict(shape.defaults), shape)
    try:
        _check_keys(body, shape)
        return _checked(_from_pairs(split_object(body), shape, shape.name), shape)
    except NotExact as error:
        raise BadJson(f"can only accept json format request, error: {error}") from None


def decode_cbor(body: bytes, shape: Shape) -> dict[str, Any]:
    """Return the values of all declared fields, defaults filled in. Raises BadJson or MissingParameter."""
    return values_of_cbor(load_cbor(body, views=shape.takes_views), shape)


def values_of_cbor(value: Any, shape: Shape) -> dict[str, Any]:
    """Return what `decode_cbor` does, of what `load_cbor` has read."""
    if value is None:
        return _checked(dict(shape.defaults), shape)
    if type(value) is not dict:
        raise BadJson(f"the CBOR body is not a map but {type(value).__name__}")
    return _checked(_from_map(value, shape, shape.name), shape)


def load_cbor(body: bytes, *, views: bool = False) -> Any:
    """Return the one CBOR item that the body holds. Raises BadJson for anything JSON and bytes cannot express.

    views  byte strings of `LONG_BYTES_MIN` and more come as memoryviews of the body
    """
    if not body:
        raise BadJson(EMPTY_BODY)
    long = check_cbor(body)
    tags: _NoTags = _NO_TAGS
    if views and long:
        # The library would copy them, and holds the interpreter meanwhile: in their place it reads which they are.
        tags = _Views([memoryview(body)[one.start : one.stop] for one in long])
        body = _without(body, long)
    source = io.BytesIO(body)
    try:
        value = cbor2.CBORDecoder(
            source,
            tag_hook=_refuse_tag,
            semantic_decoders=tags,
            max_depth=DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
            read_size=1 << 16,
        ).decode()
    except (cbor2.CBORDecodeError, RecursionError, ValueError) as error:
        raise BadJson(f"the body is not acceptable CBOR: {error}") from None
    if source.tell() != len(body):
        raise BadJson("the body is not acceptable CBOR: bytes follow the item")
    return value


class _NoTags(dict[int, Callable[..., Any]]):
    """Claims to decode every tag, so that none of the library's own decoders runs, and refuses each."""

    def __missing__(self, tag: int) -> Callable[..., Any]:
        return _refuse_tag


class _Views(_NoTags):
    """The same, but for one tag, which none of a client's may be where this is used: its number is that of a view."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        super().__init__({_VIEW_TAG: lambda number, _: views[number]})


def _without(body: bytes, long: Sequence[LongBytes]) -> bytes:
    """Return the body with the number of each of these byte strings in its place, tagged."""
    pieces, at = [], 0
    for number, one in enumerate(long):
        pieces += [body[at : one.head], _NUMBERED.pack(0xD9, _VIEW_TAG, 0x1A, number)]
        at = one.stop
    return b"".join((*pieces, body[at:]))


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not accepted")


_NO_TAGS: Final = _NoTags()
_VIEW_TAG: Final = 40_000
_NUMBERED: Final = struct.Struct(">BHBI")
"""A tag of 16 bits around an integer of 32."""


def _checked(values: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Return the values if no required one is missing, also of objects within (but not within lists, as Milvus)."""
    for one in shape.required:
        value = values[one.name]
        if value is None or (type(value) in (str, int) and not value):
            raise MissingParameter(
                f"missing required parameters, error: Key: '{shape.name}.{one.go_name}' Error:Field validation "
                f"for '{one.go_name}' failed on the 'required' tag"
            )
        if one.kind is Kind.OBJECT and one.shape is not None:
            _checked(value, one.shape)
    return values


def _check_keys(body: bytes, shape: Shape) -> None:
    """Raise InvalidParameter if splitting the body would make far more keys than it may have."""
    colons = count_of(b":", body)
    if colons <= LOOSE_COLONS_MAX:
        return
    try:
        found = shape.skimmer.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BadJson("can only accept json format request, error: the body is not a JSON object") from None
    for name in found.__struct_fields__:
        colons -= bytes(getattr(found, name)).count(b":")
    if colons > LOOSE_COLONS_MAX:
        raise InvalidParameter(
            f"the body has {colons} ':' outside its declared fields; {KEYS_MAX} keys are accepted: invalid parameter"
        )


def _check_key_count(count: int, path: str) -> None:
    if count > KEYS_MAX:
        raise InvalidParameter(f"{path} has {count} keys, at most {KEYS_MAX} are accepted: invalid parameter")


# --- JSON --------------------------------------------------------------------------------------------------------


def _from_pairs(pairs: Mapping[str, msgspec.Raw], shape: Shape, path: str) -> dict[str, Any]:
    _check_key_count(len(pairs), path)
    values = dict(shape.defaults)
    exact = shape.exact
    for key, raw in pairs.items():
        one = exact.get(key) or shape.folded.get(key.lower())
        if one is None:
            continue
        if one.kind is Kind.RAW:
            if len(memoryview(raw)) != 4 or bytes(raw) != b"null":
                values[one.name] = raw
            continue
        text = bytes(raw)
        if text != b"null":
            values[one.name] = _JSON_READERS[one.kind](text, one, path)
        else:
            values[one.name] = one.default
    return values


def _json_text(raw: bytes, one: Field, path: str) -> Any:
    if raw[:1] != b'"':
        raise _mismatch(kind_of(raw), one, path)
    return loads(raw)


def _json_bool(raw: bytes, one: Field, path: str) -> Any:
    if raw == b"true":
        return True
    if raw == b"false":
        return False
    raise _mismatch(kind_of(raw), one, path)


def _json_int(raw: bytes, one: Field, path: str) -> Any:
    kind = kind_of(raw)
    if kind != "number":
        raise _mismatch(kind, one, path)
    edge = _INT_EDGE[one.kind]
    if len(raw) > 20 or not raw.lstrip(b"-").isdigit() or not -edge <= (value := int(raw)) < edge:
        raise _mismatch(f"number {raw[:40].decode('ascii', 'replace')}", one, path)
    return value


def _json_list(raw: bytes, one: Field, path: str) -> Any:
    if raw[:1] != b"[":
        raise _mismatch(kind_of(raw), one, path)
    check_list_text(one.name, raw, one.values_max)
    values = loads(raw)
    return _list_of(values, one, path)


def _json_map(raw: bytes, one: Field, path: str) -> Any:
    if raw[:1] != b"{":
        raise _mismatch(kind_of(raw), one, path)
    check_marks(one.name, raw)
    return loads(raw)


def _json_any(raw: bytes, one: Field, path: str) -> Any:
    check_marks(one.name, raw)
    return loads(raw)


def _json_object(raw: bytes, one: Field, path: str) -> Any:
    assert one.shape is not None
    if raw[:1] != b"{":
        raise _mismatch(kind_of(raw), one, path)
    check_marks(one.name, raw, one.marks_max)
    return _from_pairs(split_object(raw), one.shape, f"{path}.{one.name}")


def _json_objects(raw: bytes, one: Field, path: str) -> Any:
    if raw[:1] != b"[":
        raise _mismatch(kind_of(raw), one, path)
    check_marks(one.name, raw, one.marks_max)
    items = split_list(raw)
    check_list(one.name, len(items), one.values_max)
    return [_json_object(bytes(item), one, path) for item in items]


_JSON_READERS: Final[Mapping[Kind, Callable[[bytes, Field, str], Any]]] = {
    Kind.TEXT: _json_text,
    Kind.BOOL: _json_bool,
    Kind.INT32: _json_int,
    Kind.INT64: _json_int,
    Kind.TEXTS: _json_list,
    Kind.INTS: _json_list,
    Kind.MAP: _json_map,
    Kind.ANY: _json_any,
    Kind.OBJECT: _json_object,
    Kind.OBJECTS: _json_objects,
}


# --- CBOR --------------------------------------------------------------------------------------------------------


def _from_map(given: Mapping[Any, Any], shape: Shape, path: str) -> dict[str, Any]:
    _check_key_count(len(given), path)
    values = dict(shape.defaults)
    for key, value in given.items():
        if type(key) is not str:
            raise BadJson(f"keys are text, not {type(key).__name__}")
        one = shape.find(key)
        if one is None:
            continue
        if value is None:
            values[one.name] = one.default
        elif one.kind is Kind.RAW:
            values[one.name] = value
        else:
            values[one.name] = _from_value(value, one, path)
    return values


def _from_value(value: Any, one: Field, path: str) -> Any:
    kind, found = one.kind, type(value)
    if kind is Kind.ANY:
        return plain(value)
    if kind in (Kind.TEXTS, Kind.INTS):
        if found is list:
            return _list_of(value, one, path)
    elif kind in (Kind.INT32, Kind.INT64):
        if found is int:
            edge = _INT_EDGE[kind]
            if -edge <= value < edge:
                return value
            raise _mismatch(f"number {value}", one, path)
    elif kind is Kind.OBJECT:
        if found is dict and one.shape is not None:
            return _from_map(value, one.shape, f"{path}.{one.name}")
    elif kind is Kind.OBJECTS:
        if found is list:
            check_list(one.name, len(value), one.values_max)
        if found is list and one.shape is not None and all(type(item) is dict for item in value):
            return [_from_map(item, one.shape, f"{path}.{one.name}") for item in value]
    elif found is _PLAIN_TYPES[kind]:
        return plain(value)
    raise _mismatch(_kind_of_value(value), one, path)


_PLAIN_TYPES: Final[Mapping[Kind, type]] = {Kind.TEXT: str, Kind.BOOL: bool, Kind.MAP: dict}


def plain(value: Any) -> Any:
    """Return the value if JSON could express it, with integers of 64 bits. Raises BadJson."""
    found = type(value)
    if found is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise BadJson(f"keys are text, not {type(key).__name__}")
            plain(inner)
    elif found is list:
        for inner in value:
            plain(inner)
    elif found is float:
        if value - value != 0.0:
            raise BadJson(f"{value} is not a number that JSON has")
    elif found is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise BadJson(f"integer {value} does not fit in 64 bits")
    elif not (found is str or found is bool or value is None):
        raise BadJson(f"a value of type {found.__name__} has no place here")
    return value


# --- both --------------------------------------------------------------------------------------------------------


def _list_of(values: list[Any], one: Field, path: str) -> list[Any]:
    check_list(one.name, len(values), one.values_max)
    for value in values:
        if one.kind is Kind.TEXTS:
            if type(value) is not str:
                raise _mismatch(_kind_of_value(value), one, path, Kind.TEXT)
        elif type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise _mismatch(f"number {value}" if type(value) is int else _kind_of_value(value), one, path, Kind.INT64)
    return values


def _kind_of_value(value: Any) -> str:
    names = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _mismatch(got: str, one: Field, path: str, go_type: str = "") -> BadJson:
    return BadJson(
        f"can only accept json format request, error: json: cannot unmarshal {got} into Go struct field "
        f"{path}.{one.name} of type {go_type or one.kind}"
    )


_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})


def parse_bool(value: Any, what: str) -> bool:
    """Return a free-form value (true, "False", "0", 1) as a bool. Raises InvalidParameter naming `what`."""
    text = as_text(value)
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise InvalidParameter(f"{what} should be true or false, got {text[:80]!r}: invalid parameter")


def parse_int(value: Any, what: str) -> int:
    """Return a free-form value (128, "128") as an int. Raises InvalidParameter naming `what`."""
    text = as_text(value).strip()
    if len(text) <= 20 and text.removeprefix("-").isdecimal() and text.isascii():
        return int(text)
    raise InvalidParameter(f"{what} should be an integer, got {text[:80]!r}: invalid parameter")


def as_text(value: Any) -> str:
    """Return a free-form value as the text that Milvus keeps: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
