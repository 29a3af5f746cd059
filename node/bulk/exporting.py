"""An export: a collection into files of a folder, by primary key ascending, all pages of one snapshot.

    part-00000.parquet, ...   rows; each file is there as a whole or not at all
    collection.json           what `collections/create` takes to make the collection again
    export.json               where to go on after a break; gone when the export is whole

`collections/create`'s body also stands in each Parquet file, so that an import of the files restores the collection.
Dynamic keys are one column, `$meta`. Where a collection has several partitions and all are exported, one after the
other, the column `$partition` names each row's. In Parquet, vectors other than FloatVector are bytes, JSON and sparse
vectors text; in JSON lines, halves and bits are base64.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import numpy as np
import orjson

from node.bulk.importing import batch_rows_for
from node.bulk.parquet import ParquetWriter
from node.bulk.partitions import PARTITION_NAME, PARTITIONS, named_partitions
from node.bulk.remote import Remote
from node.bulk.schemas import create_request, schema_of
from storage.errors import InvalidParameter
from storage.schema import DYNAMIC_NAME, CollectionSchema, DataType, FieldSchema

SNAPSHOT: Final = "Annulus-Snapshot"
STATE_FILE: Final = "export.json"
SCHEMA_FILE: Final = "collection.json"
FORMATS: Final = ("parquet", "jsonl")
_Page = tuple[str, list[dict[str, Any]]]
"""A partition and some of its rows."""


@dataclass
class State:
    database: str
    collection: str
    collection_id: int
    format: str
    filter: str
    partition: str
    snapshot: str = ""
    """Token of the first page."""
    at: str = ""
    """The partition that is being read, where each row's is told."""
    last: Any = None
    """Greatest primary key, of that partition, in a file that is there."""
    files: int = 0
    rows: int = 0


def described(remote: Remote, collection: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return (the body that makes the collection again, its description)."""
    asked = {"collectionName": collection}
    found = remote.call("/collections/describe", asked)
    indexes = [
        remote.call("/indexes/describe", asked | {"indexName": name})[0] for name in remote.call("/indexes/list", asked)
    ]
    keyed = any(one["partitionKey"] for one in found["fields"])
    partitions = named_partitions(remote.call("/partitions/list", asked), keyed=keyed)
    return create_request(found, indexes, partitions), found


class Exporter:
    """Runs one export. `noted` is told how many rows are written."""

    def __init__(
        self,
        remote: Remote,
        folder: str,
        *,
        database: str,
        collection: str,
        format: str = "parquet",
        filter: str = "",
        partition: str = "",
        file_rows: int = 1_000_000,
        live: bool = False,
        noted: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._remote = remote
        self._folder = folder
        self._file_rows = file_rows
        self._live = live
        self._noted = noted
        self.body, found = described(remote, collection)
        self._schema = schema_of(self.body)
        self._partitions: list[str] = [] if partition else self.body.get(PARTITIONS, [])
        self.state = State(database, collection, found["collectionID"], format, filter, partition)

    def resume(self) -> None:
        """Go on where the folder's export was broken off. Raises InvalidParameter if that was another one."""
        path = os.path.join(self._folder, STATE_FILE)
        try:
            with open(path, "rb") as file:
                found = State(**json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidParameter(f"{path} is no state of an export: {error}") from None
        mine = self.state
        wanted = (mine.database, mine.collection_id, mine.format, mine.filter, mine.partition)
        if (found.database, found.collection_id, found.format, found.filter, found.partition) != wanted:
            raise InvalidParameter(f"{path} is of another export: of {found.collection} as {found.format}")
        self.state = found

    def run(self) -> None:
        """Raises Refused or Unreachable; `resume` goes on with the first file that is not there."""
        os.makedirs(self._folder, exist_ok=True)
        body = orjson.dumps(self.body, option=orjson.OPT_INDENT_2)
        with open(os.path.join(self._folder, SCHEMA_FILE), "wb") as file:
            file.write(body)
        self._save()
        pages = self._pages()
        page = next(pages, None)
        if page is None and not self.state.files:
            self._write_file(iter(()), None, body)
        while page is not None:
            page = self._write_file(pages, page, body)
        os.remove(os.path.join(self._folder, STATE_FILE))

    def _pages(self) -> Iterator[_Page]:
        state = self.state
        last = state.last
        for partition in self._partitions or [state.partition]:
            if partition < state.at:
                continue
            for rows in self._pages_of(partition, last):
                if self._partitions:
                    for row in rows:
                        row[PARTITION_NAME] = partition
                yield partition, rows
            last = None

    def _pages_of(self, partition: str, last: Any) -> Iterator[list[dict[str, Any]]]:
        state, primary = self.state, self._schema.primary.name
        limit = batch_rows_for(self._schema)
        while True:
            parts = [f"({state.filter})"] if state.filter else []
            parts += [f"{primary} > {{last}}"] if last is not None else []
            asked: dict[str, Any] = {
                "collectionName": state.collection, "outputFields": ["*"], "limit": limit,
                "filter": " and ".join(parts), "consistencyLevel": "Strong",
            }  # fmt: skip
            if last is not None:
                asked["exprParams"] = {"last": last}
            if partition:
                asked["partitionNames"] = [partition]
            answered: dict[str, str] = {}
            headers = {SNAPSHOT: state.snapshot} if state.snapshot and not self._live else {}
            rows = self._remote.call("/entities/query", asked, headers=headers, answered=answered)
            state.snapshot = state.snapshot or answered.get(SNAPSHOT, "")
            if not rows:
                return
            last = rows[-1][primary]
            yield rows
            if len(rows) < limit:
                return

    def _write_file(self, pages: Iterator[_Page], page: _Page | None, body: bytes) -> _Page | None:
        """Write a file that begins with the page; return the first page of the next one."""
        state = self.state
        path = os.path.join(self._folder, f"part-{state.files:05d}.{state.format}")
        writer: _Writer = (
            _Columns(f"{path}.new", self._schema, body, with_partitions=bool(self._partitions))
            if state.format == "parquet"
            else _Lines(f"{path}.new", self._schema)
        )
        rows = 0
        at, last = state.at, state.last
        try:
            while page is not None and rows < self._file_rows:
                partition, found = page
                writer.write(found)
                rows += len(found)
                last = found[-1][self._schema.primary.name]
                at = partition if self._partitions else ""
                self._noted(state.rows + rows)
                page = next(pages, None)
        finally:
            writer.close()
        with open(f"{path}.new", "rb") as file:
            os.fsync(file.fileno())
        if not state.files:
            self._save()  # before the first file is there: what goes on beside it must be of its snapshot
        os.replace(f"{path}.new", path)
        state.files, state.rows, state.at, state.last = state.files + 1, state.rows + rows, at, last
        self._save()
        return page

    def _save(self) -> None:
        path = os.path.join(self._folder, STATE_FILE)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(asdict(self.state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)


class _Writer(Protocol):
    def write(self, rows: Sequence[dict[str, Any]]) -> None: ...
    def close(self) -> None: ...


class _Lines:
    def __init__(self, path: str, schema: CollectionSchema) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by `close`)
        self._fields = schema.user_fields

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            for one in self._fields:
                value = row.get(one.name)
                if isinstance(value, bytes):
                    row[one.name] = _shown(one, value)
            self._file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    def close(self) -> None:
        self._file.close()


def _shown(one: FieldSchema, value: bytes) -> Any:
    if one.type is DataType.FLOAT_VECTOR:
        return np.frombuffer(value, "<f4")
    if one.type is DataType.INT8_VECTOR:
        return np.frombuffer(value, np.int8)
    return base64.b64encode(value).decode()


class _Columns:
    def __init__(self, path: str, schema: CollectionSchema, body: bytes, *, with_partitions: bool) -> None:
        self._fields = schema.user_fields
        self._known = {one.name for one in self._fields} | {PARTITION_NAME}
        kinds = {one.name: _kind(one) for one in self._fields}
        self._with_partitions = with_partitions
        if with_partitions:
            kinds[PARTITION_NAME] = "VarChar"
        self._dynamic = schema.dynamic is not None
        if self._dynamic:
            kinds[DYNAMIC_NAME] = "JSON"
        self._file = ParquetWriter(path, kinds, body)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        columns: dict[str, list[Any]] = {}
        for one in self._fields:
            values: list[Any] = [row.get(one.name) for row in rows]
            if one.type is DataType.FLOAT_VECTOR:
                values = [np.frombuffer(value, "<f4") for value in values]
            elif one.type in (DataType.JSON, DataType.SPARSE_FLOAT_VECTOR):
                values = [None if value is None else orjson.dumps(value).decode() for value in values]
            columns[one.name] = values
        if self._dynamic:
            columns[DYNAMIC_NAME] = [
                orjson.dumps({key: value for key, value in row.items() if key not in self._known}).decode()
                for row in rows
            ]
        if self._with_partitions:
            columns[PARTITION_NAME] = [row[PARTITION_NAME] for row in rows]
        self._file.write(columns)

    def close(self) -> None:
        self._file.close()


def _kind(one: FieldSchema) -> str:
    if one.type is DataType.ARRAY:
        return f"Array<{one.element}>"
    if one.type is DataType.SPARSE_FLOAT_VECTOR:
        return "JSON"
    if one.type is DataType.TIMESTAMPTZ:
        return "VarChar"
    return "bytes" if one.type.is_vector and one.type is not DataType.FLOAT_VECTOR else str(one.type)
