"""Files as chunks of rows: columns by name, each chunk at its place in the file, so that reading can go on anywhere.

.parquet            one column each
.npy                one field each, named like the file; all that are given together are one table
.json .jsonl .ndjson   one object a line, or {"rows": [...]}, or a list
.csv .tsv           with a line of names; every value is text
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import orjson

from node.bulk.parquet import ParquetFile, Values
from storage.errors import InvalidParameter

READ_BYTES: Final = 1 << 20
_LIST: Final = re.compile(r'\s*(?:\{\s*"rows"\s*:\s*)?\[')
"""What is in front of the first row."""
ROW_BYTES_MAX: Final = 64 << 20
"""Of one row as text."""


@dataclass
class Chunk:
    """Rows `first` to `first + count` of a source. `columns` has those in `rows`, in order; `bad` the others."""

    first: int
    count: int
    columns: dict[str, Values]
    rows: Sequence[int]
    bad: dict[int, str] = field(default_factory=dict)
    is_text: bool = False
    """Whether all values are text that stands for what the field has, as in CSV."""
    is_json: bool = False
    """Whether values are what JSON has, so that text is text and stands for nothing else."""


class Source(Protocol):
    label: str
    """Which files, for messages and for the place where an import was broken off."""
    paths: list[str]
    rows: int | None
    """How many, if that is known before they are read."""

    def chunks(self, batch_rows: int, first: int = 0) -> Iterator[Chunk]:
        """Yield the rows from `first` on, a multiple of `batch_rows`. Raises InvalidParameter if one is unreadable."""
        ...


def sources_of(paths: Iterable[str]) -> list[Source]:
    """Return what the files hold. Raises InvalidParameter for a kind of file that is not known, or none."""
    found: list[Source] = []
    arrays: list[str] = []
    for path in paths:
        if not os.path.isfile(path):
            raise InvalidParameter(f"{path} is no file")
        ending = os.path.splitext(path)[1].lower()
        if ending == ".npy":
            arrays.append(path)
        elif ending == ".parquet":
            found.append(_Parquet(path))
        elif ending in (".json", ".jsonl", ".ndjson"):
            found.append(_Json(path))
        elif ending in (".csv", ".tsv"):
            found.append(_Csv(path, "\t" if ending == ".tsv" else ","))
        else:
            raise InvalidParameter(
                f"{path}: the name should end in .parquet, .npy, .json, .jsonl, .ndjson, .csv or .tsv"
            )
    if arrays:
        found.append(_Arrays(arrays))
    if not found:
        raise InvalidParameter("no files were given")
    return found


class _Parquet:
    def __init__(self, path: str) -> None:
        self.label, self.paths = path, [path]
        self.rows: int | None = ParquetFile(path).rows

    def chunks(self, batch_rows: int, first: int = 0) -> Iterator[Chunk]:
        for at, count, columns in ParquetFile(self.label).batches(batch_rows, first):
            yield Chunk(at, count, columns, range(at, at + count))


class _Arrays:
    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.label = ", ".join(paths)
        self._arrays: dict[str, Any] = {}
        for path in paths:
            name = os.path.splitext(os.path.basename(path))[0]
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise InvalidParameter(f"{path} is no readable array: {error}") from None
            if name in self._arrays:
                raise InvalidParameter(f"{path}: there are two files for the field {name}")
            if array.ndim not in (1, 2) or array.dtype.kind not in "biufU":
                raise InvalidParameter(
                    f"{path}: an array of numbers, text or vectors has one or two dimensions, this has {array.ndim} "
                    f"of {array.dtype}"
                )
            self._arrays[name] = array
        lengths = {name: len(one) for name, one in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {rows}" for name, rows in lengths.items())
            raise InvalidParameter(f"the arrays have different numbers of rows: {shown}")
        self.rows: int | None = next(iter(lengths.values()))

    def chunks(self, batch_rows: int, first: int = 0) -> Iterator[Chunk]:
        assert self.rows is not None
        for at in range(first, self.rows, batch_rows):
            end = min(at + batch_rows, self.rows)
            columns: dict[str, Any] = {}
            for name, array in self._arrays.items():
                part = np.array(array[at:end])
                columns[name] = part.tolist() if part.dtype.kind == "U" else part
            yield Chunk(at, end - at, columns, range(at, end))


class _Json:
    def __init__(self, path: str) -> None:
        self.label, self.paths = path, [path]
        self.rows: int | None = None
        with open(path, "rb") as file:
            head = file.read(READ_BYTES).lstrip()
        self._is_list = head[:1] == b"[" or (head[:1] == b"{" and head[1:].lstrip()[:6] == b'"rows"')

    def chunks(self, batch_rows: int, first: int = 0) -> Iterator[Chunk]:
        rows: list[bytes] = []
        at = 0
        for row in _elements(self.label) if self._is_list else _lines(self.label):
            if at + len(rows) >= first or len(rows):
                rows.append(row)
            else:
                at += 1
            if len(rows) == batch_rows:
                yield _of_objects(at, rows)
                at, rows = at + len(rows), []
        if rows:
            yield _of_objects(at, rows)


def _lines(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while line := file.readline(ROW_BYTES_MAX):
            if line.strip():
                yield line


def _elements(path: str) -> Iterator[bytes]:
    """Yield the texts of a list's rows, which may not fit into memory. Raises InvalidParameter where it is no JSON."""
    try:
        yield from _texts(path)
    except UnicodeDecodeError as error:
        raise InvalidParameter(f"{path} is no JSON: {error}") from None


def _texts(path: str) -> Iterator[bytes]:
    decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode  # finds where a row ends, and reads no number
    with open(path, encoding="utf-8") as file:
        text = file.read(READ_BYTES)
        head = _LIST.match(text)
        if head is None:
            raise InvalidParameter(f'{path}: "rows" should be a list')
        start = head.end()
        number = 0
        while True:
            while start < len(text) and text[start] in " \t\r\n,":
                start += 1
            if start < len(text) and text[start] == "]":
                return
            try:
                if start >= len(text) - 1:
                    raise json.JSONDecodeError("the list does not end", text[-40:], 0)
                value, end = decode(text, start)
                if end >= len(text) and not isinstance(value, dict):
                    raise json.JSONDecodeError("the list does not end", text[-40:], 0)
            except (json.JSONDecodeError, RecursionError) as error:
                text = text[start:]
                # as much again as is held, so that a long row is not looked at too often
                more = file.read(max(READ_BYTES, len(text))) if len(text) < ROW_BYTES_MAX else ""
                if not more:
                    raise InvalidParameter(
                        f"{path}: row {number} is no JSON, nor can what follows be read: {error}"
                    ) from None
                text, start = text + more, 0
                continue
            yield text[start:end].encode()
            number += 1
            start = end


def _of_objects(first: int, given: Sequence[bytes]) -> Chunk:
    bad: dict[int, str] = {}
    rows: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    for number, text in enumerate(given, first):
        try:
            one = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            bad[number] = f"no JSON: {error}"
            continue
        if not isinstance(one, dict):
            bad[number] = "a row is an object"
            continue
        rows.append(one)
        numbers.append(number)
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    columns: dict[str, Values] = {name: [row.get(name) for row in rows] for name in names}
    return Chunk(first, len(given), columns, numbers, bad, is_json=True)


class _Csv:
    def __init__(self, path: str, separator: str) -> None:
        self.label, self.paths = path, [path]
        self.rows: int | None = None
        self._separator = separator

    def chunks(self, batch_rows: int, first: int = 0) -> Iterator[Chunk]:
        csv.field_size_limit(ROW_BYTES_MAX)
        with open(self.label, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=self._separator, strict=True)
            at = 0
            try:
                names = next(lines, [])
                if not names or len(set(names)) < len(names) or "" in names:
                    raise InvalidParameter(f"{self.label}: the first line should name the columns, each once")
                rows: list[list[str]] = []
                for values in lines:
                    if not values:
                        continue
                    if at < first:
                        at += 1
                        continue
                    rows.append(values)
                    if len(rows) == batch_rows:
                        yield _of_lines(at, names, rows)
                        at, rows = at + len(rows), []
            except (csv.Error, UnicodeDecodeError) as error:
                raise InvalidParameter(f"{self.label} can not be read from line {lines.line_num} on: {error}") from None
            if rows:
                yield _of_lines(at, names, rows)


def _of_lines(first: int, names: Sequence[str], given: Sequence[Sequence[str]]) -> Chunk:
    bad: dict[int, str] = {}
    rows, numbers = [], []
    for number, values in enumerate(given, first):
        if len(values) != len(names):
            bad[number] = f"the line has {len(values)} values, the first line names {len(names)}"
        else:
            rows.append(values)
            numbers.append(number)
    columns: dict[str, Values] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Chunk(first, len(given), columns, numbers, bad, is_text=True)
