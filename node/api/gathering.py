"""What gathers one field's values from a request, whatever their type: see `values.py` and `vectors.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from storage.columns import Column, Mask
from storage.schema import FieldSchema


class Misfit(ValueError):
    """A value does not fit its field; the message says why, with the value shortened."""


class Gatherer(ABC):
    """The values of one field so far. Subclasses say how a value is judged and what the column looks like."""

    def __init__(self, field: FieldSchema) -> None:
        self.field = field
        self.values: list[Any] = []
        self.nulls: list[int] = []

    @abstractmethod
    def from_json(self, text: bytes) -> Any:
        """Return the value of a JSON text that is not null. Raises Misfit or NotExact."""

    @abstractmethod
    def from_plain(self, value: Any) -> Any:
        """Return the checked value of a CBOR item that is not null. Raises Misfit or BadJson."""

    @abstractmethod
    def column(self, valid: Mask | None) -> Column: ...

    @property
    def blank(self) -> Any:
        """What a null row holds."""
        return 0

    def add_json(self, text: bytes) -> None:
        if text == b"null":
            self.add_missing()
        else:
            self.values.append(self.from_json(text))

    def add_plain(self, value: Any) -> None:
        if value is None:
            self.add_missing()
        else:
            self.values.append(self.from_plain(value))

    def takes_all(self, values: list[Any]) -> bool:
        """Add CBOR items that all are as the column keeps them, if that can be seen of all at once; return whether."""
        return False

    def add_missing(self) -> None:
        if self.field.default is not None:
            self.values.append(self.field.default)
        elif self.field.nullable:
            self.nulls.append(len(self.values))
            self.values.append(self.blank)
        else:
            raise Misfit("a value is required: the field is not nullable and has no default")

    def finish(self) -> Column:
        valid = None
        if self.nulls:
            valid = np.ones(len(self.values), np.bool_)
            valid[self.nulls] = False
            valid.flags.writeable = False
        return self.column(valid)

    takes_views = False
    """Whether `from_buffer` also takes a view that begins anywhere in the bytes of a request."""

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        """Return the column whose values are the little-endian bytes `data`. Raises Misfit."""
        raise Misfit(f"a {self.field.type} column is a list of values, not bytes")

    def from_lengths(self, data: Any, lengths: Any, rows: int, valid: Mask | None) -> Column:
        """Return the column of texts that stand one after the other, from their lengths. Raises Misfit."""
        raise Misfit(f"a {self.field.type} column has no lengths")

    def element_bytes(self) -> int:
        """Return how many bytes one row takes in `from_buffer`; 0 if there is no such form."""
        return 0


def shortened(value: object) -> str:
    """Return the value as text for an error message, at most 60 characters of it."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
