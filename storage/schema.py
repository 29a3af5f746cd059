"""Collection schemas: field types with Milvus's names, their limits and their validation.

A schema is a value: it travels in the log (`to_dict`, `from_dict`) and every replica reads the same one. User fields
have ids from 100 in the order of the request, as in Milvus; the dynamic field `$meta` follows them.

Limits and texts follow the public documentation of Milvus 2.6 (limitations and collection schema pages).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from index.protocol import Form
from storage.analysis import Analyzer, analyzer_of
from storage.errors import FieldNotFound, InvalidParameter, NameInvalid
from storage.types import FieldId

NAME_CHARS_MAX: Final = 255
DIM_MIN: Final = 2
DIM_MAX: Final = 32_768
VARCHAR_BYTES_MAX: Final = 65_535
ARRAY_CAPACITY_MAX: Final = 4_096
FIELDS_MAX: Final = 256
VECTOR_FIELDS_MAX: Final = 10
SHARDS_MAX: Final = 16
FIRST_FIELD_ID: Final = 100
DYNAMIC_NAME: Final = "$meta"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PARTITION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\Z")
_RESERVED: Final = frozenset(
    word
    for name in (
        "like exists and or not in null true false json_contains json_contains_all json_contains_any array_contains "
        "array_contains_all array_contains_any array_length text_match phrase_match random_sample"
    ).split()
    for word in (name, name.upper())
) | {DYNAMIC_NAME, "True", "False"}


class DataType(StrEnum):
    """Field types by their Milvus names (exact case)."""

    BOOL = "Bool"
    INT8 = "Int8"
    INT16 = "Int16"
    INT32 = "Int32"
    INT64 = "Int64"
    FLOAT = "Float"
    DOUBLE = "Double"
    VARCHAR = "VarChar"
    TIMESTAMPTZ = "Timestamptz"
    JSON = "JSON"
    ARRAY = "Array"
    FLOAT_VECTOR = "FloatVector"
    BINARY_VECTOR = "BinaryVector"
    FLOAT16_VECTOR = "Float16Vector"
    BFLOAT16_VECTOR = "BFloat16Vector"
    SPARSE_FLOAT_VECTOR = "SparseFloatVector"
    INT8_VECTOR = "Int8Vector"

    @property
    def is_integer(self) -> bool:
        return self in _INTEGERS

    @property
    def is_float(self) -> bool:
        return self in (DataType.FLOAT, DataType.DOUBLE)

    @property
    def is_numeric(self) -> bool:
        return self.is_integer or self.is_float

    @property
    def is_vector(self) -> bool:
        return self in _VECTORS

    @property
    def form(self) -> Form:
        """What engines take its vectors as."""
        return _FORMS.get(self, Form.DENSE)


_INTEGERS: Final = frozenset({DataType.INT8, DataType.INT16, DataType.INT32, DataType.INT64})
INTEGER_BITS: Final = {DataType.INT8: 8, DataType.INT16: 16, DataType.INT32: 32, DataType.INT64: 64}
_VECTORS: Final = frozenset(one for one in DataType if one.endswith("Vector"))
_NO_ELEMENTS: Final = (DataType.JSON, DataType.ARRAY, DataType.TIMESTAMPTZ)
_FORMS: Final = {DataType.BINARY_VECTOR: Form.BINARY, DataType.SPARSE_FLOAT_VECTOR: Form.SPARSE}
_KNOWN_ELSEWHERE: Final = frozenset("Geometry Text".split())


def data_type(name: object, *, what: str = "data type") -> DataType:
    """Return the type with this exact name, or raise InvalidParameter naming the types there are."""
    try:
        return DataType(str(name))
    except ValueError:
        if name in _KNOWN_ELSEWHERE:
            raise InvalidParameter(
                f"{what} {name} is not supported by this server; supported: {', '.join(DataType)}"
            ) from None
        raise InvalidParameter(f"{what} {name} is invalid(case sensitive); supported: {', '.join(DataType)}") from None


def check_name(name: str, what: str = "collection") -> str:
    """Return the name of a collection, alias, database or field, or raise NameInvalid saying what is allowed."""
    pattern = _PARTITION_NAME if what == "partition" else _NAME
    title = f"Invalid {what} name: {_shortened(name)}. "
    if not name:
        raise NameInvalid(f"{title} the {what} name should not be empty: invalid parameter")
    if len(name) > NAME_CHARS_MAX:
        raise NameInvalid(
            f"{title} the length of a {what} name must be less than {NAME_CHARS_MAX + 1} characters, "
            f"got {len(name)}: invalid parameter"
        )
    if not pattern.match(name):
        raise NameInvalid(
            f"{title} {what} name can only contain numbers, letters and underscores"
            f"{' or hyphens' if what == 'partition' else ', and must not start with a number'}: invalid parameter"
        )
    return name


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True, slots=True)
class FieldSchema:
    """One field. `max_bytes` bounds VarChar (also as an array's element), `capacity` bounds arrays, `dim` vectors."""

    name: str
    type: DataType
    id: FieldId = FieldId(0)
    element: DataType | None = None
    primary: bool = False
    auto_id: bool = False
    nullable: bool = False
    default: bool | int | float | str | None = None
    partition_key: bool = False
    clustering_key: bool = False
    dim: int = 0
    max_bytes: int = 0
    capacity: int = 0
    dynamic: bool = False
    description: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    """Type parameters as the client gave them, for `describe`; the typed ones above are read from here."""
    analyzer_version: int = 0
    """Of the rules by which its text becomes terms (`analysis.VERSION`); 0 for a field without an analyzer."""

    @property
    def has_analyzer(self) -> bool:
        """Whether its text is taken apart: for a BM25 function, or for text_match."""
        return self.analyzer_version > 0

    @property
    def has_match(self) -> bool:
        """Whether text_match and phrase_match may ask about it."""
        return self.has_analyzer and is_on(self.params, "enable_match")

    @property
    def analyzer(self) -> Analyzer:
        """What takes its text apart."""
        return analyzer_of(self.params.get("analyzer_params", ""), self.analyzer_version)

    def to_dict(self) -> dict[str, Any]:
        version = {"analyzer_version": self.analyzer_version} if self.has_analyzer else {}
        return version | {
            "name": self.name, "type": str(self.type), "id": self.id,
            "element": None if self.element is None else str(self.element),
            "primary": self.primary, "auto_id": self.auto_id, "nullable": self.nullable, "default": self.default,
            "partition_key": self.partition_key, "clustering_key": self.clustering_key, "dim": self.dim,
            "max_bytes": self.max_bytes, "capacity": self.capacity, "dynamic": self.dynamic,
            "description": self.description, "params": dict(self.params),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FieldSchema:
        known = dict(data)
        known["type"] = DataType(known["type"])
        known["element"] = None if known["element"] is None else DataType(known["element"])
        return cls(**known)


def is_on(params: Mapping[str, str], name: str) -> bool:
    """Return whether a field's parameter of this name says true."""
    return params.get(name, "").strip().lower() == "true"


@dataclass(frozen=True, slots=True)
class FunctionSchema:
    """A BM25 function: the vector field `output` has the terms of the text field `input`, and how often it has each."""

    name: str
    input: str
    output: str
    id: int = 0
    description: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    """As the client gave them, for `describe`."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "input": self.input, "output": self.output, "id": self.id,
            "description": self.description, "params": dict(self.params),
        }  # fmt: skip


@dataclass(frozen=True)
class CollectionSchema:
    """The fields of a collection, the dynamic one included when it is switched on. Build it with `make_schema`."""

    fields: tuple[FieldSchema, ...]
    version: int = 1
    next_field_id: int = 0
    """Ids below it are taken, also by fields that were dropped; 0 while the schema is as it was made."""
    functions: tuple[FunctionSchema, ...] = ()

    @cached_property
    def computed(self) -> Mapping[FieldId, FieldSchema]:
        """Field that a function computes -> the field that it computes it of."""
        return {self.by_name[one.output].id: self.by_name[one.input] for one in self.functions}

    @cached_property
    def by_name(self) -> Mapping[str, FieldSchema]:
        return {one.name: one for one in self.fields}

    @cached_property
    def by_id(self) -> Mapping[FieldId, FieldSchema]:
        return {one.id: one for one in self.fields}

    @cached_property
    def primary(self) -> FieldSchema:
        return next(one for one in self.fields if one.primary)

    @cached_property
    def dynamic(self) -> FieldSchema | None:
        return next((one for one in self.fields if one.dynamic), None)

    @cached_property
    def vectors(self) -> tuple[FieldSchema, ...]:
        return tuple(one for one in self.fields if one.type.is_vector)

    @cached_property
    def user_fields(self) -> tuple[FieldSchema, ...]:
        return tuple(one for one in self.fields if not one.dynamic)

    @property
    def fresh_field_id(self) -> FieldId:
        """The id of the next field that is added: one that no field of the collection ever had."""
        return FieldId(max(self.next_field_id, 1 + max(one.id for one in self.fields)))

    @cached_property
    def partition_key(self) -> FieldSchema | None:
        return next((one for one in self.fields if one.partition_key), None)

    def field(self, name: str) -> FieldSchema:
        """Return the field of this name or raise FieldNotFound."""
        found = self.by_name.get(name)
        if found is None:
            raise FieldNotFound(f"field {name} not exist; fields: {', '.join(f.name for f in self.user_fields)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        fields = [one.to_dict() for one in self.fields]
        functions = {"functions": [one.to_dict() for one in self.functions]} if self.functions else {}
        return functions | {"version": self.version, "fields": fields, "next_field_id": self.next_field_id}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CollectionSchema:
        fields = tuple(FieldSchema.from_dict(one) for one in data["fields"])
        functions = tuple(FunctionSchema(**one) for one in data.get("functions", ()))
        return cls(fields, data["version"], data.get("next_field_id", 0), functions)


def make_schema(
    fields: list[FieldSchema], *, dynamic: bool, version: int = 1, functions: Sequence[FunctionSchema] = ()
) -> CollectionSchema:
    """Return a checked schema with ids given to its fields; raise InvalidParameter naming the first field at fault."""
    if len(fields) > FIELDS_MAX:
        raise InvalidParameter(f"maximum field's number should be limited to {FIELDS_MAX}, got {len(fields)}")
    seen: set[str] = set()
    for one in fields:
        check_field(one)
        if one.name in seen:
            raise InvalidParameter(f"duplicated field name {one.name}")
        seen.add(one.name)
    primaries = [one.name for one in fields if one.primary]
    if len(primaries) != 1:
        detail = f"{len(primaries)} primary keys ({', '.join(primaries)})" if primaries else "no primary key"
        raise InvalidParameter(f"schema needs exactly one primary key field, got {detail}: set isPrimary on one field")
    vectors = [one.name for one in fields if one.type.is_vector]
    if not vectors:
        raise InvalidParameter("schema does not contain vector field: add one of type FloatVector")
    if len(vectors) > VECTOR_FIELDS_MAX:
        raise InvalidParameter(f"maximum vector field's number should be limited to {VECTOR_FIELDS_MAX}")
    if sum(one.partition_key for one in fields) > 1:
        raise InvalidParameter("there is more than one partition key")
    placed = [replace(one, id=FieldId(FIRST_FIELD_ID + i)) for i, one in enumerate(fields)]
    if dynamic:
        placed.append(
            FieldSchema(DYNAMIC_NAME, DataType.JSON, FieldId(FIRST_FIELD_ID + len(fields)), dynamic=True, nullable=True)
        )
    _check_functions(functions, {one.name: one for one in fields})
    numbered = tuple(replace(one, id=FIRST_FIELD_ID + i) for i, one in enumerate(functions))
    return CollectionSchema(tuple(placed), version, functions=numbered)


def _check_functions(functions: Sequence[FunctionSchema], fields: Mapping[str, FieldSchema]) -> None:
    names: set[str] = set()
    outputs: set[str] = set()
    for one in functions:
        check_name(one.name, "function")
        if one.name in names:
            raise InvalidParameter(f"duplicate function name: {one.name}")
        names.add(one.name)
        where = f"function {one.name}"
        source, target = fields.get(one.input), fields.get(one.output)
        if source is None:
            raise InvalidParameter(f"{where}: input field {one.input[:80]} is not in the schema")
        if target is None:
            raise InvalidParameter(f"{where}: output field {one.output[:80]} is not in the schema")
        if source.type is not DataType.VARCHAR or not source.has_analyzer:
            raise InvalidParameter(
                f"{where}: BM25 function input field must be a VARCHAR field with enable_analyzer set to true, field "
                f"{source.name} is {source.type}: set elementTypeParams.enable_analyzer"
            )
        if source.nullable:
            raise InvalidParameter(f"{where}: function input field cannot be nullable, field {source.name}")
        if target.type is not DataType.SPARSE_FLOAT_VECTOR:
            raise InvalidParameter(
                f"{where}: BM25 function output field must be a SparseFloatVector field, field {target.name} is "
                f"{target.type}"
            )
        if one.output in outputs:
            raise InvalidParameter(f"{where}: field {one.output} is the output of two functions")
        outputs.add(one.output)


def check_field(one: FieldSchema) -> None:
    """Raise NameInvalid or InvalidParameter if the field cannot exist on its own."""
    check_name(one.name, "field")
    if one.name in _RESERVED:
        raise NameInvalid(f"Invalid field name: {one.name}.  {one.name} is a keyword of filters: invalid parameter")
    where = f"field {one.name}"
    scalar = one.element if one.type is DataType.ARRAY else one.type
    if one.type is DataType.ARRAY:
        if one.element is None or one.element in _NO_ELEMENTS or one.element.is_vector:
            raise InvalidParameter(f"element data type of array {where} is invalid, got {one.element}")
        if not 1 <= one.capacity <= ARRAY_CAPACITY_MAX:
            raise InvalidParameter(
                f"the maximum capacity specified for array {where} should be in (0, {ARRAY_CAPACITY_MAX}], "
                f"got {one.capacity}: set elementTypeParams.max_capacity"
            )
    if scalar is DataType.VARCHAR and not 1 <= one.max_bytes <= VARCHAR_BYTES_MAX:
        raise InvalidParameter(
            f"the maximum length specified for the {where} should be in (0, {VARCHAR_BYTES_MAX}], got {one.max_bytes}: "
            "type param(max_length) should be specified for the field in elementTypeParams"
        )
    if one.type.is_vector:
        _check_dim(one)
    if one.primary:
        if one.type not in (DataType.INT64, DataType.VARCHAR):
            raise InvalidParameter(f"the data type of primary key should be Int64 or VarChar, {where} is {one.type}")
        if one.nullable:
            raise InvalidParameter(f"primary field not support null, {where}")
        if one.default is not None:
            raise InvalidParameter(f"primary field not support default_value, {where}")
    if one.partition_key:
        if one.type not in (DataType.INT64, DataType.VARCHAR):
            raise InvalidParameter(f"the data type of partition key should be Int64 or VarChar, {where} is {one.type}")
        if one.primary:
            raise InvalidParameter(f"the partition key field must not be primary field, {where}")
        if one.nullable:
            raise InvalidParameter(f"partition key field not support nullable, {where}")
    if one.type.is_vector and one.nullable:
        raise InvalidParameter(f"vector type not support null, {where}")
    if one.default is not None:
        _check_default(one)
    _check_analyzer(one)


def _check_analyzer(one: FieldSchema) -> None:
    if is_on(one.params, "enable_match") and not is_on(one.params, "enable_analyzer"):
        raise InvalidParameter(f"field {one.name} has enable_match: set elementTypeParams.enable_analyzer too")
    if one.has_analyzer:
        if one.type is not DataType.VARCHAR:
            raise InvalidParameter(f"field {one.name} has enable_analyzer, and only VarChar can: it is {one.type}")
        if "multi_analyzer_params" in one.params:
            raise InvalidParameter(f"field {one.name}: multi_analyzer_params are not supported by this server")
        _ = one.analyzer


def _check_dim(one: FieldSchema) -> None:
    where = f"field {one.name}"
    if one.type is DataType.SPARSE_FLOAT_VECTOR:
        if one.dim:
            raise InvalidParameter(
                f"dim should not be specified for sparse vector {where}, got {one.dim}: leave elementTypeParams.dim out"
            )
        return
    bits = one.type is DataType.BINARY_VECTOR
    least, most = (8, 8 * DIM_MAX) if bits else (DIM_MIN, DIM_MAX)
    if not least <= one.dim <= most:
        raise InvalidParameter(
            f"invalid dimension: {one.dim} of {where}. should be in range {least} ~ {most}: set elementTypeParams.dim"
        )
    if bits and one.dim % 8:
        raise InvalidParameter(
            f"invalid dimension: {one.dim} of {where}. binary vector dimension should be multiple of 8: "
            "set elementTypeParams.dim"
        )


def _check_default(one: FieldSchema) -> None:
    value = one.default
    where = f"convert defaultValue fail, err:field {one.name} of type {one.type}"
    if one.type in _NO_ELEMENTS or one.type.is_vector:
        raise InvalidParameter(f"{where} can not have a default value")
    if one.type is DataType.BOOL:
        fits = isinstance(value, bool)
    elif one.type.is_integer:
        edge = 1 << (INTEGER_BITS[one.type] - 1)
        fits = isinstance(value, int) and not isinstance(value, bool) and -edge <= value < edge
    elif one.type.is_float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, str) and len(value.encode()) <= one.max_bytes
    if not fits:
        raise InvalidParameter(f"{where} does not take {value!r}")
