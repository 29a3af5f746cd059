"""What a scalar index is of, as filters name it."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from storage.types import FieldId


class Cast(StrEnum):
    """What an index holds of a JSON path: the values of one kind, or the elements of lists that are of it.

    Milvus's names, of `json_cast_type`.
    """

    BOOL = "BOOL"
    DOUBLE = "DOUBLE"
    VARCHAR = "VARCHAR"
    ARRAY_BOOL = "ARRAY_BOOL"
    ARRAY_DOUBLE = "ARRAY_DOUBLE"
    ARRAY_VARCHAR = "ARRAY_VARCHAR"

    @property
    def is_array(self) -> bool:
        return self.startswith("ARRAY")


class Indexed(NamedTuple):
    """A scalar or array field, or a path of a JSON field, with an index."""

    field_id: FieldId
    keys: tuple[str | int, ...] | None = None
    """Of a JSON field: the path."""
    cast: Cast | None = None
    """Of a JSON field."""
    gram: int = 0
    """Bytes of the pieces of text that the index lists; 0 if it orders whole values."""
