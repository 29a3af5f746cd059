"""Handlers of rows: insert, upsert, delete, get, query, search. Those of hybrid searches are in `hybrid.py`."""

from __future__ import annotations

import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.ddl import STALENESS_S_MAX
from node.api.calls import Call, Handler
from node.api.exact import NotExact, kind_of, loads, split_list
from node.api.forms import Singles, packer
from node.api.limits import IDS_MAX, SEARCHES_MARKS_MAX, check_list, check_list_text, check_marks, check_output
from node.api.replies import LARGE_REPLY_ROWS, Style, rows_reply, search_reply, success, write_reply
from node.api.requests import parse_bool, parse_int
from node.api.routes import SEARCH_UNSUPPORTED, unsupported_given
from node.api.rows import Write, rows_from_cbor, rows_from_json
from node.api.schemas import consistency
from node.api.values import Misfit, gatherer, shortened
from node.service import Order, ReadOptions, Rows, SearchRequest, SearchResult, WriteResult
from storage.bm25 import term_rows
from storage.columns import Batch
from storage.errors import (
    BadJson,
    BadPrimaryKey,
    BadRow,
    InvalidParameter,
    MissingParameter,
    SchemaMismatch,
    UnsupportedOperation,
)
from storage.schema import VARCHAR_BYTES_MAX, CollectionSchema, DataType, FieldSchema
from storage.vectors import Vectors, searchable

Envelope = Mapping[str, Any]
WINDOW_MAX: Final = 16_384
"""Of limit, of limit + offset, and of query vectors in one search: Milvus's limits."""
OFFLOAD_BYTES_MIN: Final = 64 << 10
"""Smaller bodies are decoded on the loop: it takes less time there than to wake a thread."""
BREATH_S: Final = 0.001
"""How long a decoder of many rows steps back after each slice of them."""
GAP_BYTES_MAX: Final = 64
"""Spaces and a ',' between two query vectors."""
GROUP_SIZE_MAX: Final = 10
"""Milvus's limit."""
_DIRECTIONS: Final = {"asc": False, "ascending": False, "desc": True, "descending": True}
_HINTS: Final = frozenset({"hints", "iterator"})
_queries = msgspec.json.Decoder(list[list[float]])
_query = msgspec.json.Decoder(list[float])


# --- writes ------------------------------------------------------------------------------------------------------


async def insert(call: Call) -> Envelope:
    async def send(batch: Batch, version: int) -> WriteResult:
        partition = call.values["partitionName"]
        return await call.service.insert(call.database, call.collection, batch, partition, schema_version=version)

    result = await _write(call, Write.INSERT, send)
    return write_reply(result, "insert", call.style)


async def upsert(call: Call) -> Envelope:
    for one in call.values["fieldOps"] or ():
        op = one.get("op") if isinstance(one, dict) else one
        if str(op).upper() != "REPLACE":
            raise UnsupportedOperation(f"fieldOps with op {shortened(op)} are not supported; REPLACE is")
    partial = call.values["partialUpdate"]

    async def send(batch: Batch, version: int) -> WriteResult:
        partition = call.values["partitionName"]
        return await call.service.upsert(
            call.database, call.collection, batch, partition, partial=partial, schema_version=version
        )

    result = await _write(call, Write.PARTIAL if partial else Write.UPSERT, send)
    return write_reply(result, "upsert", call.style)


async def delete(call: Call) -> Envelope:
    count = await call.service.delete(
        call.database, call.collection, call.values["filter"], call.values["exprParams"], call.values["partitionName"]
    )
    return success({"deleteCount": count}, cost=0)


async def _write(call: Call, write: Write, send: Callable[[Batch, int], Awaitable[WriteResult]]) -> WriteResult:
    """Decode the request's rows and send them, with the version of their schema; once more for each newer one."""
    cost = await call.admission.take_request(call.database, call.collection, call.body_bytes)
    try:
        while True:
            batch, version = await _batch(call, write)
            try:
                return await send(batch, version)
            except SchemaMismatch:  # none was written: a key may be a field by now, or no field any more
                newest = await call.service.collection_schema(call.database, call.collection, newest=True)
                if newest.version == version:
                    raise
    finally:
        call.admission.give_request(call.database, call.collection, cost)


async def _batch(call: Call, write: Write) -> tuple[Batch, int]:
    """Return the request's rows and the version of the schema that they have.

    A large body is decoded on a thread that often lets the loop go first.
    """
    schema = await call.service.collection_schema(call.database, call.collection)
    data = call.values["data"]
    decode = rows_from_json if isinstance(data, msgspec.Raw) else rows_from_cbor
    is_small = isinstance(data, msgspec.Raw) and len(memoryview(data)) < OFFLOAD_BYTES_MIN
    while True:
        try:
            if is_small:
                return decode(data, schema, write), schema.version
            async with call.admission.decoding.hold((call.database, call.collection)):
                batch: Batch = await call.offload(decode, data, schema, write, breathe)
            return batch, schema.version
        except BadRow:  # unless this node has missed that the collection was replaced by another of the same name
            newest = await call.service.collection_schema(call.database, call.collection, newest=True)
            if newest == schema:
                raise
            schema = newest


def breathe() -> None:
    """Let threads that wait for the interpreter have it: a search asks for it many times, and would wait each time."""
    time.sleep(BREATH_S)


# --- reads -------------------------------------------------------------------------------------------------------


async def get(call: Call) -> Envelope:
    schema = await call.service.collection_schema(call.database, call.collection)
    ids = _keys(call.values["id"], schema.primary)
    rows = await call.service.get(call.database, call.collection, ids, read_options(call.values, ("*",)))
    return await shown(call, rows_reply, rows, rows.batch.rows)


async def query(call: Call) -> Envelope:
    values = call.values
    options = read_options(values, ("*",))
    limit, offset = values["limit"], values["offset"]
    check_query(options, limit, offset)
    rows = await call.service.query(call.database, call.collection, options, limit=limit, offset=offset)
    return await shown(call, rows_reply, rows, rows.batch.rows)


def check_query(options: ReadOptions, limit: int, offset: int) -> None:
    """Raise InvalidParameter if a query asks for a window that cannot be, or for everything."""
    if limit < 0 or offset < 0 or limit + offset > WINDOW_MAX:
        raise InvalidParameter(
            "invalid max query result window, (offset+limit) should be in range "
            f"[1, {WINDOW_MAX}], but got {limit + offset} (offset {offset}, limit {limit}): invalid parameter"
        )
    bounded = limit or options.group_by or "count(*)" in options.output_fields
    if not bounded and not options.filter.strip():
        raise InvalidParameter("empty expression should be used with limit: invalid parameter")


async def search(call: Call) -> Envelope:
    values, form = call.values, call.form
    if form.made is None and (name := unsupported_given(values, SEARCH_UNSUPPORTED)):
        raise UnsupportedOperation(f"{name} is not supported by this server")
    schema = await call.service.collection_schema(call.database, call.collection)
    if form.made is None:
        form.made = search_asked(values)
    asked, options = form.made
    if isinstance(data := values["data"], msgspec.Raw) and len(memoryview(data)) > OFFLOAD_BYTES_MIN:
        vectors, ids = await call.offload(queries_of, values, schema)
    else:
        vectors, ids = queries_of(values, schema)
    hits = asked["limit"] * asked["group_size"]
    check_hits((len(ids or ()) if vectors is None else len(vectors)) * hits, options, schema)
    request = SearchRequest(vectors, ids, **asked)
    result = await call.service.search(call.database, call.collection, request, options)
    return await shown(call, search_reply, result, result.rows.batch.rows)


def search_asked(values: Mapping[str, Any]) -> tuple[dict[str, Any], ReadOptions]:
    """Return what a search asks for beside its query vectors: fields of SearchRequest, and the options."""
    limit, offset = values["limit"], values["offset"]
    check_window(limit, offset)
    params = search_params(values["searchParams"], values["params"])
    ignore_growing = parse_bool(_pop(params, "ignoreGrowing", "ignore_growing") or False, "ignoreGrowing")
    metric = str(_pop(params, "metricType", "metric_type") or "")
    round_decimal = round_decimals(_pop(params, "roundDecimal", "round_decimal"))
    group_by, group_size = grouping_of(values, params)
    for name in _HINTS:
        params.pop(name, None)
    asked = {
        "anns_field": values["annsField"], "limit": limit, "offset": offset, "metric_type": metric,
        "params": params, "round_decimal": round_decimal, "group_by_field": group_by, "group_size": group_size,
    }  # fmt: skip
    return asked, read_options(values, (), ignore_growing=ignore_growing)


def grouping_of(values: Mapping[str, Any], params: dict[str, Any]) -> tuple[str, int]:
    """Return the field to group by, if any, and the rows of each group, from either of the places they may stand in."""
    field = _pop(params, "groupingField", "group_by_field") or values.get("groupingField") or ""
    size = _pop(params, "groupSize", "group_size")
    parse_bool(_pop(params, "strictGroupSize", "strict_group_size") or False, "strict_group_size")
    count = parse_int(values.get("groupSize", 1) if size is None else size, "group_size")
    if not 1 <= count <= GROUP_SIZE_MAX:
        raise InvalidParameter(f"group size [{count}] is invalid, it should be in range [1, {GROUP_SIZE_MAX}]")
    return str(field), count if field else 1


def orders(given: Sequence[str] | str) -> tuple[Order, ...]:
    """Return what orderByFields asks for, a list or a text with ','. Raises InvalidParameter."""
    found = []
    for text in _names(given):
        name, *rest = (part.strip() for part in text.split(":"))
        direction = rest[0].lower() if rest else "asc"
        if direction not in _DIRECTIONS:
            raise InvalidParameter(
                f"invalid order direction {direction[:40]!r} of orderBy field {name[:80]}, should be asc or desc: "
                "invalid parameter"
            )
        nulls = rest[1].lower() if len(rest) > 1 else ""
        if nulls not in ("", "nulls_first", "nulls_last") or len(rest) > 2:
            raise InvalidParameter(
                f"orderBy field {text[:80]!r} should be field:asc|desc:nulls_first|nulls_last: invalid parameter"
            )
        found.append(Order(name, _DIRECTIONS[direction], nulls == "nulls_first" if nulls else None))
    return tuple(found)


def _names(given: Sequence[str] | str) -> Sequence[str]:
    return [one.strip() for one in given.split(",")] if isinstance(given, str) else given


async def shown(call: Call, reply: Callable[[Any, Style], Envelope], result: Any, rows: int) -> Envelope:
    """Return the reply, built on a worker thread where it has many rows. Raises InvalidParameter if it is too large."""
    found: Rows = result.rows if isinstance(result, SearchResult) else result
    if rows:
        check_output(rows, found.batch.nbytes / rows)
    if rows <= LARGE_REPLY_ROWS:
        return reply(result, call.style)
    envelope: Envelope = await call.offload(reply, result, call.style)
    return envelope


def read_options(values: Mapping[str, Any], output: Sequence[str], *, ignore_growing: bool = False) -> ReadOptions:
    asked = values["outputFields"]
    return ReadOptions(
        partitions=values["partitionNames"],
        filter=values.get("filter", ""),
        params=values.get("exprParams") or {},
        output_fields=output if asked is None else asked,
        consistency=consistency(values["consistencyLevel"]),
        staleness_s=_staleness_s(values["gracefulTime"]),
        ignore_growing=ignore_growing,
        explain=values.get("explain", False),
        order_by=orders(values.get("orderByFields") or ()),
        group_by=_names(values.get("groupByFields") or ()),
    )


def _staleness_s(milliseconds: int | None) -> float | None:
    if milliseconds is None:
        return None
    if not 0 <= milliseconds <= 1000 * STALENESS_S_MAX:
        raise InvalidParameter(
            f"gracefulTime [{milliseconds}] is invalid, it should be in range [0, {1000 * STALENESS_S_MAX:.0f}] "
            "milliseconds: invalid parameter"
        )
    return milliseconds / 1000


def check_hits(count: int, options: ReadOptions, schema: CollectionSchema) -> None:
    """Raise InvalidParameter if so many hits would take more memory than a reply may, text not even counted."""
    names = options.output_fields
    asked = [one for one in schema.vectors if one.name in names or "*" in names] if names else ()
    check_output(count, sum(4 * one.dim for one in asked))


def check_window(limit: int, offset: int) -> None:
    if not 1 <= limit <= WINDOW_MAX:
        raise InvalidParameter(
            f"topk [{limit}] is invalid, it should be in range [1, {WINDOW_MAX}], but got {limit}: invalid parameter"
        )
    if not 0 <= offset <= WINDOW_MAX:
        raise InvalidParameter(
            f"offset [{offset}] is invalid, it should be in range [0, {WINDOW_MAX}], but got {offset}: "
            "invalid parameter"
        )
    if limit + offset > WINDOW_MAX:
        raise InvalidParameter(
            f"offset+topk [{limit + offset}] is invalid, it should be in range [1, {WINDOW_MAX}], "
            f"but got {limit + offset}: invalid parameter"
        )


def search_params(given: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the search parameters of all three places as one map. Raises InvalidParameter where they disagree."""
    merged = dict(given)
    nested = merged.pop("params", None)
    if nested is not None and not isinstance(nested, dict):
        raise InvalidParameter("searchParams.params must be an object: invalid parameter")
    for more in (nested or {}, old):
        for key, value in more.items():
            if key in merged and merged[key] != value:
                raise InvalidParameter(
                    f"ambiguous parameter: {key[:80]} is given as {shortened(merged[key])} and as {shortened(value)}: "
                    "invalid parameter"
                )
            merged[key] = value
    return merged


def _pop(params: dict[str, Any], *names: str) -> Any:
    """Remove a parameter under all its names and return its value. Raises InvalidParameter if they disagree."""
    found = [params.pop(name) for name in names if name in params]
    if len(found) > 1 and found[0] != found[1]:
        raise InvalidParameter(f"ambiguous parameter: {' and '.join(names)} differ: invalid parameter")
    return found[0] if found else None


def round_decimals(value: Any) -> int:
    """Return the decimals that scores are to have, -1 for all. Raises InvalidParameter."""
    if value is None:
        return -1
    decimals = parse_int(value, "round_decimal")
    if not -1 <= decimals <= 6:
        raise InvalidParameter(f"round_decimal [{decimals}] is invalid, it should be -1 or an integer in range [0, 6]")
    return decimals


# --- queries and keys --------------------------------------------------------------------------------------------


def queries_of(values: Mapping[str, Any], schema: CollectionSchema) -> tuple[Vectors | None, list[int | str] | None]:
    """Return (vectors, None) or (None, primary keys). Raises the errors of a request that gives neither or both."""
    data, ids = values["data"], values["ids"]
    if data is not None and ids is not None:
        raise InvalidParameter("data and ids are mutually exclusive: invalid parameter")
    if ids is not None:
        return None, _search_ids(ids, schema.primary)
    if data is None:
        raise MissingParameter("missing required parameters, error: data or ids is required")
    field = _anns_field(values["annsField"], schema)
    vectors: Vectors
    if field.id in schema.computed:
        vectors = _text_queries(data, schema.computed[field.id])
    elif field.type is not DataType.FLOAT_VECTOR:
        vectors = _other_queries(data, field)
    else:
        vectors = _json_queries(data, field) if isinstance(data, msgspec.Raw) else _cbor_queries(data, field)
    if len(vectors) > WINDOW_MAX:
        raise _too_many(len(vectors))
    return vectors, None


def _anns_field(name: str, schema: CollectionSchema) -> FieldSchema:
    vectors = schema.vectors
    if not name:
        if len(vectors) == 1:
            return vectors[0]
        raise BadJson(
            "can only accept json format request, error: search without annsField, but already found multiple vector "
            f"fields: [{', '.join(one.name for one in vectors)}]"
        )
    for one in vectors:
        if one.name == name:
            return one
    raise BadJson(f"can only accept json format request, error: cannot find a vector field named: {name[:80]}")


def _json_queries(data: msgspec.Raw, field: FieldSchema) -> npt.NDArray[np.float32]:
    try:
        if len(memoryview(data)) <= OFFLOAD_BYTES_MIN:
            return _packed(_queries.decode(data), field)
        # One by one: other threads get their turn in between, and the numbers of all are never there at once.
        return np.concatenate([_packed([_query.decode(text)], field) for text in _lists_of(bytes(data), field.dim)])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, NotExact) as error:
        raise BadJson(
            f"can only accept json format request, error: data should be a list of vectors for field {field.name}, "
            f"each a list of {field.dim} numbers: {error}"
        ) from None


def _lists_of(data: bytes, dim: int) -> Iterator[bytes]:
    """Return the text of each list of `dim` numbers in the text of a list of them. Raises NotExact if it is none.

    The brackets are all it looks at, and it counts before anything becomes an object.
    """
    count = data.count(b"[") - 1
    if count > WINDOW_MAX:
        raise _too_many(count)
    if data[:1] != b"[" or count == 0:
        raise NotExact(f"a list of lists is expected, got {kind_of(data)}")
    place = 1
    for i in range(count):
        start, end = data.find(b"[", place), data.find(b"]", place) + 1
        if data[place : min(start, place + GAP_BYTES_MAX)].strip() != (b"," if i else b"") or end <= start:
            raise NotExact(f"query {i} is no list of numbers")
        if (numbers := data.count(b",", start, end) + 1) != dim:
            raise _unequal(dim, numbers)
        yield data[start:end]
        place = end
    if data[place:].strip() != b"]":
        raise NotExact("something follows the last query")


def _too_many(count: int) -> InvalidParameter:
    return InvalidParameter(
        f"nq [{count}] is invalid, it should be in range [1, {WINDOW_MAX}], but got {count}: invalid parameter"
    )


def _packed(rows: Sequence[Sequence[float]], field: FieldSchema) -> npt.NDArray[np.float32]:
    if not rows:
        raise MissingParameter("missing required parameters, error: data is required and holds no vector")
    dim = field.dim
    for row in rows:
        if len(row) != dim:
            raise _unequal(dim, len(row))
    pack = packer(dim).pack
    try:
        block = pack(*rows[0]) if len(rows) == 1 else b"".join([pack(*row) for row in rows])
    except (OverflowError, struct.error):
        raise BadJson("a component of a query vector is too large for a float32") from None
    return np.frombuffer(block, np.dtype("<f4")).reshape(len(rows), dim)


def _cbor_queries(data: Any, field: FieldSchema) -> npt.NDArray[np.float32]:
    dim = field.dim
    if isinstance(data, list) and data and all(type(row) is bytes for row in data):
        for row in data:
            if len(row) != 4 * dim:
                raise _unequal(dim, len(row) / 4)
        data = data[0] if len(data) == 1 else b"".join(data)
    if type(data) is bytes:
        if not data or len(data) % (4 * dim):
            raise _unequal(dim, len(data) / 4)
        vectors = np.frombuffer(data, np.dtype("<f4")).reshape(-1, dim)
    elif type(data) is list and all(type(row) is list and set(map(type, row)) <= {int, float} for row in data):
        vectors = _packed(data, field)
    else:
        raise BadJson(f"data should be a list of vectors for field {field.name}: lists of numbers or byte strings")
    if not np.isfinite(vectors).all():
        raise BadJson("a component of a query vector is NaN or infinite")
    return vectors


def _other_queries(data: Any, field: FieldSchema) -> Vectors:
    """Return query vectors of a field of another type than FloatVector: each is judged as a row's value is."""
    into = gatherer(field)
    number = 0
    try:
        if type(data) is bytes and (width := into.element_bytes()):
            if not data or len(data) % width:
                raise Misfit(f"{len(data)} bytes are no vectors of {width} bytes")
            return searchable(into.from_buffer(data, len(data) // width, None))
        if isinstance(data, msgspec.Raw):
            check_marks("data", bytes(data), SEARCHES_MARKS_MAX)
            data = split_list(data)
        if not isinstance(data, list):
            raise Misfit("a list of vectors is expected")
        if not data:
            raise MissingParameter("missing required parameters, error: data is required and holds no vector")
        if len(data) > WINDOW_MAX:
            raise _too_many(len(data))
        if isinstance(data, Singles) and field.type in (DataType.BINARY_VECTOR, DataType.SPARSE_FLOAT_VECTOR):
            raise Misfit("a list of numbers is none")
        for number, one in enumerate(data):  # noqa: B007 (the error names the vector reached)
            if isinstance(one, msgspec.Raw):
                into.add_json(bytes(one))
            else:
                into.add_plain(one)
        return searchable(into.finish())
    except (Misfit, NotExact) as error:
        raise BadJson(
            f"can only accept json format request, error: data should be a list of vectors for field {field.name} of "
            f"type {field.type}: vector {number}: {error}: invalid parameter[expected={field.type}]"
        ) from None


def _text_queries(data: Any, source: FieldSchema) -> Vectors:
    """Return the terms of texts that are searched for in a field that a function computes."""
    if isinstance(data, msgspec.Raw):
        check_marks("data", bytes(data), SEARCHES_MARKS_MAX)
        try:
            data = [loads(bytes(one)) for one in split_list(data)]
        except NotExact as error:
            raise BadJson(
                f"can only accept json format request, error: data should be a list of texts: {error}"
            ) from None
    if type(data) is not list or not all(type(one) is str for one in data):
        raise BadJson(
            f"can only accept json format request, error: data should be a list of texts, as they are in field "
            f"{source.name}: please provide text for BM25 function based search"
        )
    if not data:
        raise MissingParameter("missing required parameters, error: data is required and holds no text")
    if len(data) > WINDOW_MAX:
        raise _too_many(len(data))
    for one in data:
        if len(one.encode()) > VARCHAR_BYTES_MAX:
            raise InvalidParameter(f"a text to search for has more than {VARCHAR_BYTES_MAX} bytes: invalid parameter")
    return term_rows(data, source.analyzer)


def _unequal(dim: int, got: float) -> BadJson:
    return BadJson(
        f"can only accept json format request, error: dimension: {dim}, but length of []float: {got:g}: "
        f"invalid parameter[expected=FloatVector]"
    )


def _keys(given: Any, primary: FieldSchema) -> list[int | str]:
    """Return the primary keys of a `get`. Raises BadPrimaryKey."""
    try:
        if isinstance(given, msgspec.Raw):
            text = bytes(given)
            if text[:1] == b"[":
                check_list_text("id", text, IDS_MAX)
                items = split_list(given)
                check_list("id", len(items), IDS_MAX)
                given = [loads(bytes(item)) for item in items]
            else:
                given = loads(text)
    except NotExact as error:
        raise BadPrimaryKey(f"please check the primary key and its' type can only in [int, string], {error}") from None
    if type(given) is list:
        check_list("id", len(given), IDS_MAX)
    keys = []
    for value in given if type(given) is list else [given]:
        key = _key(value, primary)
        if key is None:
            raise BadPrimaryKey(
                "please check the primary key and its' type can only in [int, string], "
                f"error: {shortened(value)} is no {primary.type} for field {primary.name}"
            )
        keys.append(key)
    return keys


def _search_ids(given: Any, primary: FieldSchema) -> list[int | str]:
    if type(given) is not list:
        raise InvalidParameter("ids should be a list of primary keys: invalid parameter")
    check_list("ids", len(given), IDS_MAX)
    if not given:
        raise MissingParameter("missing required parameters, error: ids is required and holds no key")
    keys = []
    for value in given:
        key = _key(value, primary)
        if key is None or key == "":
            raise InvalidParameter(
                f"ids: {shortened(value)} is no {primary.type} for primary key {primary.name}: invalid parameter"
            )
        keys.append(key)
    return keys


def _key(value: Any, primary: FieldSchema) -> int | str | None:
    """Return the value as a primary key, digits in text being an Int64 key; None if it is none."""
    kind = type(value)
    if primary.type is DataType.VARCHAR:
        return str(value) if kind is str else None
    if kind is str and len(value) <= 20 and value.isascii() and value.removeprefix("-").isdigit():
        value, kind = int(value), int
    return int(value) if kind is int and -(1 << 63) <= value < 1 << 63 else None


HANDLERS: Final[Mapping[str, Handler]] = {
    "insert": insert,
    "upsert": upsert,
    "delete": delete,
    "get": get,
    "query": query,
    "search": search,
}
