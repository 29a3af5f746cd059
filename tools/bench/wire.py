"""Requests as bytes, made before the clock starts, and replies read after it has stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import cbor2
import numpy as np
import orjson

from tools.bench.data import Dataset, Matrix

BASE_PATH = "/v2/vectordb"
BATCH_ROWS = 1000


class Codec(StrEnum):
    """How bodies are written, both ways."""

    JSON = "json"
    CBOR = "cbor"

    @property
    def content_type(self) -> str:
        return f"application/{self}"

    def dumps(self, body: Any) -> bytes:
        """Return the body's bytes; numpy vectors become arrays of numbers or, in CBOR, little-endian float32 bytes."""
        if self is Codec.JSON:
            return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        return cbor2.dumps(body, default=_vector_bytes)

    def loads(self, body: bytes) -> Any:
        """Return what the reply says. Raises ValueError if it is not in this codec."""
        return orjson.loads(body) if self is Codec.JSON else cbor2.loads(body)


class Refused(Exception):
    """The node answered, and said no."""

    def __init__(self, path: str, code: int, message: str) -> None:
        super().__init__(f"{path}: code {code}: {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """Return the address in `HOST:PORT` or `http://HOST:PORT`."""
        host, _, port = text.removeprefix("http://").rstrip("/").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{text!r} is not HOST:PORT")
        return Address(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def http_request(address: Address, path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """Return a whole HTTP/1.1 keep-alive POST."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {content_type}\r\n"
        f"Accept: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def api_request(address: Address, path: str, body: Mapping[str, Any], codec: Codec) -> bytes:
    """Return a call of Milvus's REST API as bytes; `path` is below /v2/vectordb."""
    return http_request(address, BASE_PATH + path, codec.dumps(body), codec.content_type)


def reply_data(path: str, reply: Any) -> Any:
    """Return the reply's data. Raises Refused if its code is not 0."""
    if reply.get("code") != 0:
        raise Refused(path, int(reply.get("code", -1)), str(reply.get("message", "")))
    return reply.get("data")


class Form(StrEnum):
    """How an insert carries its rows."""

    JSON = "json"
    CBOR = "cbor"
    """A list of rows, vectors as bytes."""
    COLUMNS = "cbor columns"
    """One map of columns, numbers and vectors as bytes."""

    @property
    def codec(self) -> Codec:
        return Codec.JSON if self is Form.JSON else Codec.CBOR


def insert_requests(
    address: Address, collection: str, data: Dataset, form: Form, *, first: int = 0, batch_rows: int = BATCH_ROWS
) -> Iterator[bytes]:
    """Yield one insert per `batch_rows` rows, from row `first` on."""
    for start in range(first, data.rows, batch_rows):
        batch = range(start, min(start + batch_rows, data.rows))
        rows = row_columns(data, batch) if form is Form.COLUMNS else row_objects(data, batch)
        yield api_request(address, "/entities/insert", {"collectionName": collection, "data": rows}, form.codec)


def row_objects(data: Dataset, rows: range) -> list[dict[str, Any]]:
    """Return rows as the API takes them; the vector is still a numpy array."""
    return [{"id": i, "vector": data.vectors[i], "bucket": int(data.buckets[i]), **data.scalars[i]} for i in rows]


def row_columns(data: Dataset, rows: range) -> dict[str, Any]:
    """Return rows as columns: numbers and vectors as little-endian bytes, text as lists."""
    chosen = slice(rows.start, rows.stop)
    columns: dict[str, Any] = {
        "id": np.arange(rows.start, rows.stop, dtype="<i8").tobytes(),
        "vector": data.vectors[chosen].astype("<f4").tobytes(),
        "bucket": data.buckets[chosen].astype("<i4").tobytes(),
    }
    for name, kind in scalar_kinds(data).items():
        values = [row[name] for row in data.scalars[chosen]]
        columns[name] = np.array(values, dtype="<i8").tobytes() if kind is int else values
    return columns


def scalar_kinds(data: Dataset) -> dict[str, type[int] | type[str]]:
    """Return the scalar fields of the data's rows and whether they hold integers or text."""
    names = data.scalars[0] if data.rows else ()
    return {name: int if all(isinstance(row[name], int) for row in data.scalars) else str for name in names}


def search_requests(
    address: Address,
    collection: str,
    queries: Matrix,
    codec: Codec,
    *,
    k: int,
    ef: int | None = None,
    filter_text: str = "",
    consistency: str | None = None,
) -> list[bytes]:
    """Return one search per query."""
    body: dict[str, Any] = {"collectionName": collection, "annsField": "vector", "limit": k}
    if ef is not None:
        body["searchParams"] = {"params": {"ef": ef}}
    if filter_text:
        body["filter"] = filter_text
    if consistency:
        body["consistencyLevel"] = consistency
    vectors = queries if codec is Codec.JSON else [query.astype("<f4").tobytes() for query in queries]
    return [api_request(address, "/entities/search", {**body, "data": [vector]}, codec) for vector in vectors]


def search_hits(reply: bytes, codec: Codec) -> tuple[list[int], list[float]]:
    """Return the primary keys and scores of a search's reply. Raises Refused."""
    rows: Sequence[Mapping[str, Any]] = reply_data("/entities/search", codec.loads(reply))
    return [int(row["id"]) for row in rows], [float(row["distance"]) for row in rows]


def schema_body(data: Dataset) -> dict[str, Any]:
    """Return the schema that fits the dataset's rows, as collections/create takes it."""
    fields: list[dict[str, Any]] = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": data.dim}},
        {"fieldName": "bucket", "dataType": "Int32"},
    ]
    for name, kind in scalar_kinds(data).items():
        if kind is int:
            fields.append({"fieldName": name, "dataType": "Int64"})
        else:
            longest = max(len(str(row[name]).encode()) for row in data.scalars)
            room = 1 << math.ceil(math.log2(max(longest, 32)))
            fields.append({"fieldName": name, "dataType": "VarChar", "elementTypeParams": {"max_length": room}})
    return {"autoID": False, "enableDynamicField": False, "fields": fields}


def _vector_bytes(encoder: cbor2.CBOREncoder, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"no CBOR for {type(value).__name__}")
    encoder.encode(value.astype("<f4", copy=False).tobytes())
