"""The door to pyarrow's files: Parquet, read and written a batch of rows at a time.

The other door (`storage/strings.py`) gives the core immutable arrays of text and nothing else; what is read here comes
from outside and leaves as numpy arrays and lists, so that no arrow value gets further than this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from storage.errors import InvalidParameter

Values = Any
"""One column of a chunk: a numpy array, of two dimensions for vectors, or Texts or a list with None for null."""
SCHEMA_KEY = b"annulus.collection"


class Texts(Sequence[Any]):
    """Texts as they stand in memory one after the other; a list of them, made when somebody looks at one."""

    def __init__(self, data: bytes, lengths: Any, valid: Any | None, listed: Callable[[], list[str | None]]) -> None:
        """`lengths` (n,) uint32 in bytes, 0 where `valid` (n,) bool says that there is none."""
        self.data = data
        self.lengths = lengths
        self.valid = valid
        self._listed = listed

    @cached_property
    def _list(self) -> list[str | None]:
        return self._listed()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: Any) -> Any:
        return self._list[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._list)


class ParquetFile:
    """An open file. Raises InvalidParameter if it is none."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq  # here: every node imports this module, and few read such files

        try:
            self._file = pq.ParquetFile(path, memory_map=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InvalidParameter(f"{path} is no readable Parquet file: {error}") from None
        self.path = path
        self.rows: int = self._file.metadata.num_rows
        self.names: list[str] = list(self._file.schema_arrow.names)

    @property
    def collection(self) -> bytes:
        """What an export says of the collection that it is of, b"" in other files."""
        return bytes((self._file.schema_arrow.metadata or {}).get(SCHEMA_KEY, b""))

    def batches(self, batch_rows: int, first: int) -> Iterator[tuple[int, int, dict[str, Values]]]:
        """Yield (first row, rows, columns) from a row on, which is a multiple of `batch_rows`."""
        groups: list[int] = []
        skipped = 0
        for i in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(i).num_rows
            if not groups and skipped + rows <= first:
                skipped += rows
            else:
                groups.append(i)
        held: list[Any] = []
        at, held_rows = first, 0
        drop = first - skipped
        try:
            for batch in self._file.iter_batches(batch_rows, row_groups=groups, use_threads=False):
                part = batch.slice(min(drop, batch.num_rows))
                drop -= batch.num_rows - part.num_rows
                while part.num_rows:
                    taken = part.slice(0, batch_rows - held_rows)
                    part = part.slice(taken.num_rows)
                    held.append(taken)
                    held_rows += taken.num_rows
                    if held_rows == batch_rows:
                        yield at, held_rows, _columns(held)
                        at, held, held_rows = at + held_rows, [], 0
        except (pa.ArrowException, OSError) as error:
            raise InvalidParameter(f"{self.path} can not be read from row {at} on: {error}") from None
        if held_rows:
            yield at, held_rows, _columns(held)


def _columns(batches: Sequence[Any]) -> dict[str, Values]:
    table = pa.Table.from_batches(batches)
    return {name: _values(table.column(name).combine_chunks()) for name in table.column_names}


def _values(column: Any) -> Values:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if is_number and column.null_count == 0:
        return _numbers(column)
    if is_number and pa.types.is_float16(kind):
        return [None if one is None else float(one) for one in column.to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        is_plain = pa.types.is_integer(inner) or pa.types.is_floating(inner)
        if is_plain and column.null_count == 0 and len(column):
            flat = column.flatten()
            if pa.types.is_fixed_size_list(kind):
                widths = np.array([kind.list_size])
            else:
                widths = np.unique(np.diff(_numbers(column.offsets)))
            if len(widths) == 1 and widths[0] and flat.null_count == 0:
                return _numbers(flat).reshape(len(column), int(widths[0]))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _texts(column)
    if pa.types.is_map(kind):
        return [None if one is None else dict(one) for one in column.to_pylist()]
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return [None if one is None else str(one) for one in column.to_pylist()]
    return list(column.to_pylist())


def _texts(column: Any) -> Values:
    valid_bits, raw_offsets, data = column.buffers()
    if not len(column) or raw_offsets is None:
        return list(column.to_pylist())
    width = np.dtype(np.int64 if pa.types.is_large_string(column.type) else np.int32)
    offsets = np.frombuffer(raw_offsets, width, len(column) + 1, column.offset * width.itemsize)
    lengths = np.diff(offsets).astype("<u4")
    valid = None
    if column.null_count:
        bits = np.unpackbits(np.frombuffer(valid_bits, np.uint8), bitorder="little")
        valid = bits[column.offset : column.offset + len(column)].astype(np.bool_)
        if lengths[~valid].any():
            return list(column.to_pylist())
    first, last = int(offsets[0]), int(offsets[-1])
    return Texts(bytes(memoryview(data or b"")[first:last]), lengths, valid, column.to_pylist)


def _numbers(column: Any) -> Any:
    """Return numbers without nulls, uncopied but for truth values. Arrow's own way imports pandas, if there is one."""
    data = column.buffers()[1]
    if pa.types.is_boolean(column.type):
        bits = np.frombuffer(data or b"", np.uint8)
        return np.unpackbits(bits, bitorder="little")[column.offset : column.offset + len(column)].astype(np.bool_)
    dtype = np.dtype(column.type.to_pandas_dtype())
    return np.frombuffer(data or b"", dtype, len(column), column.offset * dtype.itemsize)


class ParquetWriter:
    """Writes rows as columns whose types follow from the fields; `collection` is kept in the file's metadata."""

    def __init__(self, path: str, kinds: Mapping[str, str], collection: bytes) -> None:
        import pyarrow.parquet as pq

        self._schema = pa.schema([(name, _TYPES[kind]) for name, kind in kinds.items()]).with_metadata(
            {SCHEMA_KEY: collection}
        )
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, columns: Mapping[str, Sequence[Any]]) -> None:
        arrays = [pa.array(columns[one.name], one.type) for one in self._schema]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


_ELEMENTS: Mapping[str, Any] = {
    "Bool": pa.bool_(),
    "Int8": pa.int8(),
    "Int16": pa.int16(),
    "Int32": pa.int32(),
    "Int64": pa.int64(),
    "Float": pa.float32(),
    "Double": pa.float64(),
    "VarChar": pa.string(),
}
_TYPES: Mapping[str, Any] = {
    **_ELEMENTS,
    "JSON": pa.string(),
    "bytes": pa.binary(),
    **{f"Array<{name}>": pa.list_(kind) for name, kind in _ELEMENTS.items()},
    "FloatVector": pa.list_(pa.float32()),
}
