"""Values of vector fields other than FloatVector, gathered one by one: halves, bytes, bits and sparse ones.

| type            | JSON                                               | CBOR, or another protocol's bytes             |
|-----------------|----------------------------------------------------|-----------------------------------------------|
| Float16Vector   | list of numbers, or base64 of little-endian halves | the same list, or the halves, or dim float32  |
| BFloat16Vector  | the same                                           | the same                                      |
| Int8Vector      | list of whole numbers from -128 to 127             | the same list, or dim bytes, or dim float32   |
| BinaryVector    | base64 of dim / 8 bytes                            | the same text, or the bytes                   |
| SparseFloat-    | {"term": weight} or {"indices": [], "values": []}  | the same, or (uint32, float32) pairs,         |
| Vector          |                                                    | little-endian, terms ascending                |
"""

from __future__ import annotations

import base64
import binascii
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from index.sparse import TERM_MAX, SparseRows
from node.api.exact import loads
from node.api.gathering import Gatherer, Misfit, shortened
from storage.columns import VECTOR_TYPES, Column, Mask, SparseColumn, VectorColumn, vector_width
from storage.schema import DataType, FieldSchema
from storage.vectors import bfloat16

TERMS_MAX: Final = 65_536
"""Of one sparse vector."""
_PAIR: Final = np.dtype([("term", "<u4"), ("weight", "<f4")])
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


def vector_gatherer(field: FieldSchema) -> Gatherer:
    """Return an empty gatherer for a vector field that is no FloatVector."""
    if field.type is DataType.SPARSE_FLOAT_VECTOR:
        return _Sparse(field)
    if field.type is DataType.BINARY_VECTOR:
        return _Bits(field)
    return _Bytes(field) if field.type is DataType.INT8_VECTOR else _Halves(field)


class _Packed(Gatherer):
    """Vectors of a fixed width, packed row by row into one block."""

    takes_views = True

    def __init__(self, field: FieldSchema) -> None:
        super().__init__(field)
        self.dtype = VECTOR_TYPES[field.type]
        self.count = vector_width(field)
        self.width = self.dtype.itemsize * self.count
        self.block = bytearray()

    def add_json(self, text: bytes) -> None:
        if text == b"null":
            self.add_missing()
        if text[:1] == b"[" and (numbers := text.count(b",") + 1) > self.field.dim:  # known before they are made
            raise Misfit(self.unequal(numbers))
        self.block += self.packed(loads(text))

    def add_plain(self, value: Any) -> None:
        if value is None:
            self.add_missing()
        self.block += self.packed(value)

    @abstractmethod
    def packed(self, value: Any) -> bytes:
        """Return the bytes of a value of any of its forms. Raises Misfit."""

    def base64(self, text: str) -> bytes:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise Misfit(f"{shortened(text)} is no base64") from None
        return self.sized(data)

    def sized(self, data: bytes) -> bytes:
        if len(data) != self.width:
            raise Misfit(
                f"{self.unequal(self.field.dim * len(data) / self.width)}: {len(data)} bytes are not {self.width}"
            )
        return data

    def unequal(self, dim: float) -> str:
        return f"the dim ({dim:g}) of field data({self.field.name}) is not equal to schema dim ({self.field.dim})"

    def numbers(self, value: Any) -> npt.NDArray[np.float64]:
        """Return a list of numbers as an array. Raises Misfit."""
        if type(value) is not list or not set(map(type, value)) <= {int, float}:
            raise Misfit(f"{shortened(value)} is no {self.field.type}: {self.forms}")
        if len(value) != self.field.dim:
            raise Misfit(self.unequal(len(value)))
        try:
            return np.array(value, np.float64)
        except OverflowError:
            raise Misfit(f"a component of the vector is too large for a {self.field.type}") from None

    forms = ""

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
        return VectorColumn(np.frombuffer(data, self.dtype).reshape(rows, self.count))


class _Halves(_Packed):
    """Float16Vector and BFloat16Vector."""

    forms = "a list of numbers, or base64 of little-endian halves"

    def packed(self, value: Any) -> bytes:
        if type(value) is str:
            return self.base64(value)
        if type(value) is bytes:
            if len(value) == 4 * self.field.dim:
                return self._rounded(np.frombuffer(value, "<f4"))
            return self.sized(value)
        return self._rounded(self.numbers(value))

    def _rounded(self, values: npt.NDArray[Any]) -> bytes:
        with np.errstate(over="ignore", under="ignore"):
            single = values.astype(np.float32)
            halves = single.astype("<f2") if self.field.type is DataType.FLOAT16_VECTOR else bfloat16(single)
        if not self._finite(halves).all():
            raise Misfit(f"a component of the vector is NaN, infinite, or too large for a {self.field.type}")
        return halves.astype(self.dtype, copy=False).tobytes()

    def _finite(self, halves: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which values are finite: those whose exponent is not all ones."""
        mask = np.uint16(0x7C00 if self.field.type is DataType.FLOAT16_VECTOR else 0x7F80)
        return np.asarray((halves.view(np.uint16) & mask) != mask)

    def from_buffer(self, data: bytes | memoryview, rows: int, valid: Mask | None) -> Column:
        column = super().from_buffer(data, rows, valid)
        assert isinstance(column, VectorColumn)
        finite = self._finite(column.values)
        if not finite.all():
            row = int(np.argmin(finite.all(axis=1)))
            raise Misfit(f"row {row}: a component of the vector is NaN or infinite")
        return column


class _Bytes(_Packed):
    """Int8Vector."""

    forms = "a list of whole numbers from -128 to 127"

    def packed(self, value: Any) -> bytes:
        if type(value) is bytes:
            if len(value) != 4 * self.field.dim:
                return self.sized(value)
            values = np.frombuffer(value, "<f4").astype(np.float64)
        else:
            values = self.numbers(value)
        if not ((values >= -128) & (values <= 127) & (values == np.floor(values))).all():
            raise Misfit(f"{shortened(value)}: the components of an Int8Vector are whole numbers from -128 to 127")
        return values.astype(np.int8).tobytes()


class _Bits(_Packed):
    """BinaryVector."""

    forms = "base64 of dim / 8 bytes"

    def packed(self, value: Any) -> bytes:
        if type(value) is str:
            return self.base64(value)
        if type(value) is bytes:
            return self.sized(value)
        raise Misfit(f"{shortened(value)} is no BinaryVector: {self.forms}")


class _Sparse(Gatherer):
    """SparseFloatVector: terms from 0 to 2^32 - 2, each once; weights are finite and not negative."""

    def __init__(self, field: FieldSchema) -> None:
        super().__init__(field)
        self.terms: list[npt.NDArray[np.uint32]] = []
        self.weights: list[npt.NDArray[np.float32]] = []

    def add_json(self, text: bytes) -> None:
        if text == b"null":
            self.add_missing()
        if text[:1] != b"{":
            raise Misfit(
                f"{shortened(text)} is no sparse vector: an object of term -> weight, or of indices and values"
            )
        if text.count(b",") > 2 * TERMS_MAX:
            raise Misfit(f"a sparse vector has at most {TERMS_MAX} terms")
        self.add_plain(loads(text))

    def add_plain(self, value: Any) -> None:
        if value is None:
            self.add_missing()
        if type(value) is bytes:
            self._add_pairs(value)
        elif type(value) is dict:
            self._add_map(value)
        else:
            raise Misfit(f"{shortened(value)} is no sparse vector: a map of term -> weight, or of indices and values")

    def _add_pairs(self, data: bytes) -> None:
        if len(data) % _PAIR.itemsize:
            raise Misfit(f"{len(data)} bytes are no sparse vector: each term takes {_PAIR.itemsize}")
        pairs = np.frombuffer(data, _PAIR)
        terms = pairs["term"]
        if len(terms) > 1 and not (terms[1:] > terms[:-1]).all():
            raise Misfit("unsorted or same indices in sparse float vector: indices should ascend")
        self._add(terms, pairs["weight"])

    def _add_map(self, value: dict[Any, Any]) -> None:
        if value.keys() == {"indices", "values"} and type(value["indices"]) is list and type(value["values"]) is list:
            given, weights = value["indices"], value["values"]
            if len(given) != len(weights):
                raise Misfit(f"indices has {len(given)} numbers, values has {len(weights)}")
            if not set(map(type, given)) <= {int}:
                raise Misfit("indices should be whole numbers")
        else:
            given, weights = [self._term(key) for key in value], list(value.values())
        if not set(map(type, weights)) <= {int, float}:
            wrong = next(one for one in weights if type(one) not in (int, float))
            raise Misfit(f"{shortened(wrong)} is no weight of a sparse vector: a number is expected")
        for term in given:
            if not 0 <= term <= TERM_MAX:
                raise Misfit(f"index {term} of a sparse vector should be in range [0, {TERM_MAX}]")
        terms = np.array(given, np.uint32)
        if any(abs(weight) > _FLOAT32_MAX for weight in weights):
            raise Misfit("a value of the sparse vector is too large for a float32")
        order = np.argsort(terms, kind="stable")
        terms = terms[order]
        if len(terms) > 1 and (same := terms[1:] == terms[:-1]).any():
            raise Misfit(f"index {terms[int(np.argmax(same))]} is in the sparse vector twice")
        with np.errstate(under="ignore"):
            self._add(terms, np.array(weights, np.float64)[order].astype(np.float32))

    @staticmethod
    def _term(key: Any) -> int:
        if type(key) is int:
            return key
        if type(key) is str and len(key) <= 10 and key.isascii() and key.isdigit():
            return int(key)
        raise Misfit(f"{shortened(key)} is no index of a sparse vector: a whole number is expected")

    def _add(self, terms: npt.NDArray[np.uint32], weights: npt.NDArray[np.float32]) -> None:
        if len(terms) > TERMS_MAX:
            raise Misfit(f"the sparse vector has {len(terms)} terms, at most {TERMS_MAX} are accepted")
        if len(terms) and int(terms[-1]) > TERM_MAX:
            raise Misfit(f"index {terms[-1]} of a sparse vector should be in range [0, {TERM_MAX}]")
        if not np.isfinite(weights).all():
            raise Misfit("a value of the sparse vector is NaN or infinite")
        if len(weights) and weights.min() < 0:
            raise Misfit(f"negative value {weights.min():g} in sparse float vector: values should not be negative")
        self.terms.append(terms)
        self.weights.append(weights)

    def from_json(self, text: bytes) -> Any:
        raise AssertionError("vectors are packed as they come")

    def from_plain(self, value: Any) -> Any:
        raise AssertionError("vectors are packed as they come")

    def column(self, valid: Mask | None) -> Column:
        return SparseColumn(_rows(self.terms, self.weights))


def _rows(terms: Sequence[npt.NDArray[np.uint32]], weights: Sequence[npt.NDArray[np.float32]]) -> SparseRows:
    bounds = np.zeros(len(terms) + 1, np.int64)
    np.cumsum([len(one) for one in terms], out=bounds[1:])
    joined = SparseRows(
        bounds,
        np.concatenate([*terms, np.empty(0, np.uint32)]),
        np.concatenate([*weights, np.empty(0, np.float32)]),
    )
    for array in (joined.offsets, joined.terms, joined.weights):
        array.flags.writeable = False
    return joined
