"""Scalar indexes by name: which Milvus has for which fields, with which parameters, and what they are built of here.

Milvus has a structure for each kind of field (inverted lists, bitmaps, a sorted list, a trie). Here one serves them all
(`postings.SortedColumn`), also for the elements of arrays and for what stands at a path of JSON; NGRAM is the other.
How filters use them is `candidates.py`. They are not stored: a segment makes one when a filter first asks for it, which
takes 5 ms for 60,000 numbers and 60 ms for as many texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from storage.errors import InvalidParameter
from storage.filter.indexed import Cast, Indexed
from storage.filter.parser import parse
from storage.filter.syntax import Complaint, Path
from storage.postings import GRAM_BYTES_MAX
from storage.schema import DataType, FieldSchema
from storage.types import FieldId

SPEC_KEY: Final = "scalar"
"""The spec of a scalar index is `{SPEC_KEY: its type}`, and what else `Indexed` has, if it is not as usual."""


class ScalarIndexType(StrEnum):
    """Milvus's names; what they are built of is the same but for NGRAM."""

    AUTOINDEX = "AUTOINDEX"
    INVERTED = "INVERTED"
    BITMAP = "BITMAP"
    STL_SORT = "STL_SORT"
    TRIE = "Trie"
    NGRAM = "NGRAM"


_INTEGERS: Final = (DataType.INT8, DataType.INT16, DataType.INT32, DataType.INT64)
_NUMBERS: Final = (*_INTEGERS, DataType.FLOAT, DataType.DOUBLE)
_ORDERED: Final = (*_NUMBERS, DataType.VARCHAR, DataType.TIMESTAMPTZ)
_TYPES: Final = {
    ScalarIndexType.AUTOINDEX: (DataType.BOOL, *_ORDERED, DataType.ARRAY, DataType.JSON),
    ScalarIndexType.INVERTED: (DataType.BOOL, *_ORDERED, DataType.ARRAY, DataType.JSON),
    ScalarIndexType.BITMAP: (DataType.BOOL, *_INTEGERS, DataType.VARCHAR, DataType.ARRAY),
    ScalarIndexType.STL_SORT: _ORDERED,
    ScalarIndexType.TRIE: (DataType.VARCHAR,),
    ScalarIndexType.NGRAM: (DataType.VARCHAR, DataType.JSON),
}
_FLOATS: Final = (DataType.FLOAT, DataType.DOUBLE)


def parse_scalar_index(name: str, field: FieldSchema, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the spec of an index of this type on a field that is no vector; no name is AUTOINDEX.

    params  json_path (the whole field if left out) and json_cast_type of a JSON field, min_gram and max_gram of NGRAM
    Raises InvalidParameter.
    """
    found = _type(name, field)
    given = params or {}
    spec: dict[str, Any] = {SPEC_KEY: str(found)}
    if field.type is DataType.JSON:
        spec["cast"] = str(_cast(found, field, given))
        spec["path"] = list(_path(field, given))
    if found is ScalarIndexType.NGRAM:
        least, most = (_whole(given, one) for one in ("min_gram", "max_gram"))
        if not 1 <= least <= most:
            raise InvalidParameter(
                f"min_gram must be at least 1 and max_gram no less, got {least} and {most}, field {field.name}"
            )
        spec["gram"] = min(least, GRAM_BYTES_MAX)
    return spec


def check_spec(spec: Mapping[str, Any], field: FieldSchema) -> None:
    """Raise InvalidParameter unless the spec is one that `parse_scalar_index` returns for the field."""
    _type(str(spec[SPEC_KEY]), field)
    try:
        indexed_by(field.id, spec)
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidParameter(f"not the spec of a scalar index: {error}") from error


def indexed_by(field_id: FieldId, spec: Mapping[str, Any]) -> Indexed:
    """Return what an index with this spec is of."""
    keys = tuple(spec["path"]) if "path" in spec else None
    return Indexed(field_id, keys, Cast(spec["cast"]) if "cast" in spec else None, int(spec.get("gram", 0)))


def _type(name: str, field: FieldSchema) -> ScalarIndexType:
    wanted = name.upper() or ScalarIndexType.AUTOINDEX
    found = next((one for one in ScalarIndexType if one.upper() == wanted), None)
    possible = [str(one) for one, types in _TYPES.items() if field.type in types]
    if field.type is DataType.ARRAY and field.element in _FLOATS:
        possible.remove(ScalarIndexType.BITMAP)
    if not possible:
        raise InvalidParameter(
            f"field {field.name} of type {field.type} can have no index in this server; filters on it work without one"
        )
    if found is None or str(found) not in possible or (found is ScalarIndexType.BITMAP and field.primary):
        raise InvalidParameter(
            f"index type {name} cannot be built on field {field.name} of type {field.type}"
            f"{', the primary key' if field.primary else ''}; use {' or '.join(possible)}"
        )
    return found


def _cast(found: ScalarIndexType, field: FieldSchema, params: Mapping[str, Any]) -> Cast:
    given = str(params.get("json_cast_type", "")).upper()
    if not given:
        raise InvalidParameter(f"json_cast_type is missing: an index on JSON field {field.name} holds values of a type")
    if "json_cast_function" in params:
        raise InvalidParameter("json_cast_function is not supported: index the values as they are stored")
    if given not in list(Cast):
        raise InvalidParameter(f"json_cast_type {given} is not supported; use {' or '.join(Cast)}")
    if found is ScalarIndexType.NGRAM and given != Cast.VARCHAR:
        raise InvalidParameter(f"index type NGRAM on JSON field {field.name} needs json_cast_type VARCHAR, got {given}")
    return Cast(given)


def _path(field: FieldSchema, params: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Return the keys that lead from the field's document to the values."""
    text = str(params.get("json_path") or field.name)
    try:
        node = parse(text)
    except Complaint as complaint:
        raise InvalidParameter(f"json_path {text!r} is no path: {complaint.message}") from complaint
    if not isinstance(node, Path) or node.bare:
        raise InvalidParameter(f'json_path {text!r} is no path; it is written {field.name}["key"]["key"]')
    if node.name == field.name:
        return node.keys
    if not field.dynamic:
        raise InvalidParameter(f"json_path {text!r} does not begin with its field, {field.name}")
    return (node.name, *node.keys)


def _whole(params: Mapping[str, Any], name: str) -> int:
    try:
        return int(params[name])
    except (KeyError, TypeError, ValueError):
        raise InvalidParameter(f"{name} is missing or no whole number: NGRAM needs min_gram and max_gram") from None
