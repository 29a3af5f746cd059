"""Handlers of rows: insert, upsert, delete, query, search, hybrid search, and the pages of iterators.

A read is put into the words of the REST API, checked by what checks it there, and asked of the service. Time is put
into Milvus's form: one timestamp, where REST has a token with a tick for each shard. What a write answers is the
greatest tick it made; a read that names one sees at least that of every shard.

**Iterators.** Clients name the moment of their first page with every other one, and all shards are read as of it. If
what it needs has been compacted away meanwhile, the page is of what is there now: pages follow each other by key or by
distance, so nothing comes twice. Pages of a search follow a bound of the distance, which they include strictly: rows of
one distance are therefore never split over two pages.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from node.api import routes
from node.api.entities import (
    OFFLOAD_BYTES_MIN,
    WINDOW_MAX,
    breathe,
    check_hits,
    check_query,
    queries_of,
    read_options,
    round_decimals,
    search_asked,
)
from node.api.forms import FORM_BYTES_MAX, FORMS_KEPT
from node.api.hybrid import check_hybrid_hits, hybrid_request
from node.api.limits import check_list, check_output
from node.api.replies import LARGE_REPLY_ROWS
from node.api.requests import parse_bool, parse_int
from node.api.routes import SEARCH_UNSUPPORTED, unsupported_given
from node.api.rows import Write
from node.grpc.calls import Call, Method, Methods, pairs
from node.grpc.columns import TYPES, batch_of, show_groups, show_rows
from node.grpc.protocol import DAMAGED, Message, enum_names, message
from node.grpc.schemas import consistency_name, schema_timestamp
from node.scope import EVERY_SHARD, Scope, current
from node.service import HybridRequest, ReadOptions, Rows, SearchRequest, SearchResult, WriteResult
from storage.errors import (
    BadRow,
    InvalidParameter,
    MissingParameter,
    SchemaMismatch,
    SnapshotGone,
    UnsupportedOperation,
)
from storage.evolution import with_timezone
from storage.merging import rounded
from storage.schema import CollectionSchema
from storage.times import TIMEZONE, zone_of
from storage.types import TICK_MAX, Tick

T = TypeVar("T")
PLACEHOLDERS: Final = enum_names("common.PlaceholderType")
_GROUP: Final = message("common.PlaceholderGroup")
_SEARCH: Final = message("milvus.SearchRequest")
SESSION_MIN: Final = 3
"""Smaller guarantee timestamps stand for levels: 0 Strong, 1 Eventually, 2 Bounded."""
COUNT: Final = "count(*)"
SIMILARITIES: Final = frozenset({"IP", "COSINE", "BM25"})
GROWTH: Final = 4
"""How many times more rows are asked for when all of a page have one distance."""
_ELSEWHERE: Final = frozenset(
    "topk offset anns_field round_decimal ignore_growing collection_id iterator search_iter_v2 search_iter_batch_size "
    "search_iter_last_bound search_iter_id group_by_field group_size strict_group_size order_by_fields timezone "
    "time_fields params".split()
)
"""Search parameters that are not the index's."""
_TEXTS: Final = frozenset(
    {"anns_field", "metric_type", "group_by_field", "search_iter_id", "order_by_fields", TIMEZONE}
)
FUNCTION_TYPES: Final = enum_names("schema.FunctionType")


# --- writes ------------------------------------------------------------------------------------------------------


async def insert(call: Call) -> None:
    async def send(batch: Any, version: int) -> WriteResult:
        return await call.service.insert(
            call.database, call.collection, batch, call.request.partition_name, schema_version=version
        )

    result = await _write(call, Write.INSERT, send)
    _show_written(call.response, result)
    call.response.insert_cnt = result.rows


async def upsert(call: Call) -> None:
    for one in call.request.field_ops:
        if one.op:
            raise UnsupportedOperation(f"field_ops of {one.field_name[:80]}: REPLACE is the op that is supported")
    partial = call.request.partial_update

    async def send(batch: Any, version: int) -> WriteResult:
        return await call.service.upsert(
            call.database,
            call.collection,
            batch,
            call.request.partition_name,
            partial=partial,
            schema_version=version,
        )

    result = await _write(call, Write.PARTIAL if partial else Write.UPSERT, send)
    _show_written(call.response, result)
    call.response.upsert_cnt = result.rows


async def delete(call: Call) -> None:
    if not call.request.expr.strip():
        raise MissingParameter("missing required parameters, error: expr is required")
    call.response.delete_cnt = await call.service.delete(
        call.database,
        call.collection,
        call.request.expr,
        _templates(call.request.expr_template_values),
        call.request.partition_name,
    )
    call.response.timestamp = _written_at()


async def _write(call: Call, write: Write, send: Callable[[Any, int], Awaitable[WriteResult]]) -> WriteResult:
    cost = await call.admission.take_request(call.database, call.collection, call.size_bytes)
    try:
        return await _admitted(call, write, send)
    finally:
        call.admission.give_request(call.database, call.collection, cost)


async def _admitted(call: Call, write: Write, send: Callable[[Any, int], Awaitable[WriteResult]]) -> WriteResult:
    """Decode the request's rows and send them, with the version of their schema; once more for each newer one."""
    schema = await call.service.collection_schema(call.database, call.collection)
    request = call.request
    while True:
        try:
            if call.size_bytes < OFFLOAD_BYTES_MIN:
                batch = batch_of(request.fields_data, request.num_rows, schema, write)
            else:
                batch = await call.offload(batch_of, request.fields_data, request.num_rows, schema, write, breathe)
            return await send(batch, schema.version)
        except (BadRow, SchemaMismatch) as error:
            newest = await call.service.collection_schema(call.database, call.collection, newest=True)
            if newest == schema:
                await _check_newest(call, error)
                raise
            schema = newest


async def _check_newest(call: Call, error: Exception) -> None:
    """Raise SchemaMismatch, for which clients fetch the schema anew, if the rows were made for an older one."""
    if not call.request.schema_timestamp or isinstance(error, SchemaMismatch):
        return
    info = await call.service.describe_collection(call.database, call.collection)
    if call.request.schema_timestamp != schema_timestamp(info):
        raise SchemaMismatch(f"the rows are made for another version of the schema: {error}") from None


def _show_written(response: Message, result: WriteResult) -> None:
    keys = result.primary_keys
    if isinstance(keys, np.ndarray):
        response.IDs.int_id.data.extend(keys.tolist())
    else:
        response.IDs.str_id.data.extend(keys)
    response.succ_index.extend(range(len(keys)))
    response.timestamp = _written_at()


def _written_at() -> Tick:
    scope = current.get()
    return Tick(max(scope.seen.values(), default=0)) if scope is not None else Tick(0)


# --- reads -------------------------------------------------------------------------------------------------------


async def query(call: Call) -> None:
    request = call.request
    params = pairs(request.query_params)
    names = list(request.output_fields)
    check_list("output_fields", len(names), routes.OUTPUT.values_max)
    values = {
        **routes.QUERY.defaults,
        "filter": request.expr,
        "outputFields": names,
        "partitionNames": list(request.partition_names),
        "exprParams": _templates(request.expr_template_values),
        "consistencyLevel": _level(request),
        "orderByFields": params.get("order_by_fields") or (),
        "groupByFields": params.get("group_by_fields") or (),
    }
    ignore_growing = parse_bool(params.get("ignore_growing") or False, "ignore_growing")
    options = read_options(values, (), ignore_growing=ignore_growing)
    limit, offset = _number(params, "limit"), _number(params, "offset")
    check_query(options, limit, offset)
    pages = parse_bool(params.get("iterator") or False, "iterator")

    async def read() -> Rows:
        return await call.service.query(call.database, call.collection, options, limit=limit, offset=offset)

    zone = _zone(params)
    rows = _in_zone(await _as_of(request.guarantee_timestamp, pages, read), zone)
    await _shown(call, _show_query, rows, rows, names)


def _zone(params: Mapping[str, Any]) -> str:
    """Return the time zone that a read wants times in; none is the collection's. Raises errors of bad requests."""
    if params.get("time_fields"):
        raise UnsupportedOperation("time_fields is not supported by this server: times are given as texts")
    zone = str(params.get(TIMEZONE) or "")
    zone_of(zone)
    return zone


def _in_zone(rows: Rows, zone: str) -> Rows:
    return replace(rows, schema=with_timezone(rows.schema, zone)) if zone else rows


async def search(call: Call) -> None:
    request = call.request
    if request.sub_reqs:
        raise UnsupportedOperation("searches within a search are not supported: send a HybridSearch")
    schema = await call.service.collection_schema(call.database, call.collection)
    values, timestamp = {}, request.guarantee_timestamp
    if request.WhichOneof("search_input") == "placeholder_group":
        values["data"] = _placeholders(request.placeholder_group)
        request.ClearField("placeholder_group")
    request.guarantee_timestamp = 0
    form = request.SerializeToString()
    asked, options, params, rest = (_form if len(form) <= FORM_BYTES_MAX else _form.__wrapped__)(form)
    values = {**rest, **values}
    if call.size_bytes > OFFLOAD_BYTES_MIN:
        vectors, ids = await call.offload(queries_of, values, schema)
    else:
        vectors, ids = queries_of(values, schema)
    wanted = SearchRequest(vectors, ids, **asked)
    count = len(ids or ()) if vectors is None else len(vectors)
    check_hits(count * wanted.limit * wanted.group_size, options, schema)
    pages = parse_bool(params.get("iterator") or False, "iterator")

    async def read() -> SearchResult:
        if parse_bool(params.get("search_iter_v2") or False, "search_iter_v2"):
            return await _page(call, wanted, options, params, schema)
        return await call.service.search(call.database, call.collection, wanted, options)

    zone = _zone(params)
    result = await _as_of(timestamp, pages, read)
    if zone:
        result = replace(result, rows=_in_zone(result.rows, zone))
    await _shown(call, _show_search, result, result.rows, count, request.output_fields)


@lru_cache(FORMS_KEPT)
def _form(form: bytes) -> tuple[dict[str, Any], ReadOptions, dict[str, Any], dict[str, Any]]:
    """Return what a search asks for beside its vectors and its moment, which differ from one of its kind to the next.

    fields of SearchRequest, the options, all parameters, and what else `queries_of` looks at
    """
    request = _SEARCH.FromString(form)
    params = _search_params(request.search_params)
    values = _search_values(request, params)
    rest = {name: values[name] for name in ("data", "ids", "annsField")}
    return *search_asked(values), params, rest


async def hybrid_search(call: Call) -> None:
    request = call.request
    params = _search_params(request.rank_params)
    names = list(request.output_fields)
    check_list("output_fields", len(names), routes.OUTPUT.values_max)
    values: dict[str, Any] = {
        **routes.HYBRID.defaults,
        "search": [_sub_search(one) for one in request.requests],
        "rerank": {
            "strategy": str(params.get("strategy") or ""),
            "params": {**(params.get("params") or {}), "rank_group_scorer": params.get("rank_group_scorer")},
        },
        "limit": _number(params, "limit"),
        "offset": _number(params, "offset"),
        "outputFields": names,
        "partitionNames": list(request.partition_names),
        "consistencyLevel": _level(request),
    }
    if request.HasField("function_score"):
        values["functionScore"] = _function_score(request.function_score)
    given = {
        "functionChains": bool(request.function_chains),
        "groupingField": params.get("group_by_field"),
        "groupSize": params.get("group_size"),
        "strictGroupSize": params.get("strict_group_size"),
        "orderByFields": params.get("order_by_fields"),
    }
    values |= {name: value for name, value in given.items() if value}
    if name := unsupported_given(values, routes.HYBRID_UNSUPPORTED):
        raise UnsupportedOperation(f"{name} is not supported by this server")
    schema = await call.service.collection_schema(call.database, call.collection)
    wanted: HybridRequest = await call.offload(hybrid_request, values, schema)
    wanted = replace(wanted, round_decimal=round_decimals(params.get("round_decimal")))
    options = read_options(values, ())
    check_hybrid_hits(wanted, options, schema)

    async def read() -> SearchResult:
        return await call.service.hybrid_search(call.database, call.collection, wanted, options)

    zone = _zone(params)
    result = await _as_of(request.guarantee_timestamp, False, read)
    if zone:
        result = replace(result, rows=_in_zone(result.rows, zone))
    await _shown(call, _show_search, result, result.rows, len(result.topks), request.output_fields)


def _sub_search(request: Message) -> dict[str, Any]:
    """Return one of the searches of a hybrid search in the words of the REST API."""
    values = _search_values(request, _search_params(request.search_params))
    if values["ids"] is not None:
        raise UnsupportedOperation("a search of a hybrid search has vectors, not ids")
    params = values["searchParams"]
    for name in ("round_decimal", "ignore_growing", "hints"):  # of the whole, not of one search
        params.pop(name, None)
    # Clients repeat what is of the whole with each search; Milvus looks at that alone.
    values |= {"offset": 0, "groupingField": ""}
    return {**routes.SUB_SEARCH.defaults, **{key: values[key] for key in routes.SUB_SEARCH.defaults if key in values}}


def _function_score(given: Message) -> dict[str, Any]:
    functions = [
        {"type": FUNCTION_TYPES.get(one.type, ""), "params": _loose_values(pairs(one.params))}
        for one in given.functions
    ]
    return {"functions": functions}


def _search_values(request: Message, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a search in the words of the REST API. Raises InvalidParameter."""
    names = list(request.output_fields)
    check_list("output_fields", len(names), routes.OUTPUT.values_max)
    values: dict[str, Any] = {
        **routes.SEARCH.defaults,
        "annsField": params.get("anns_field") or "",
        "filter": request.dsl,
        "limit": _number(params, "topk"),
        "offset": _number(params, "offset"),
        "outputFields": names,
        "partitionNames": list(request.partition_names),
        "searchParams": {
            **{key: value for key, value in params.items() if key not in _ELSEWHERE},
            "params": params.get("params") or {},
            **({"round_decimal": params["round_decimal"]} if "round_decimal" in params else {}),
            **({"ignore_growing": params["ignore_growing"]} if "ignore_growing" in params else {}),
        },
        "exprParams": _templates(request.expr_template_values),
        "consistencyLevel": _level(request),
    }
    given = {
        "functionScore": request.HasField("function_score"),
        "functionChains": bool(request.function_chains),
        "searchAggregation": request.HasField("search_aggregation"),
        "highlighter": request.HasField("highlighter"),
        "groupingField": params.get("group_by_field"),
        "groupSize": params.get("group_size"),
        "strictGroupSize": params.get("strict_group_size"),
        "orderByFields": params.get("order_by_fields"),
    }
    for name, value in given.items():
        if value and name not in values:
            raise UnsupportedOperation(f"{name} is not supported by this server")
        if value:
            values[name] = value
    if name := unsupported_given(values, SEARCH_UNSUPPORTED):
        raise UnsupportedOperation(f"{name} is not supported by this server")
    match request.WhichOneof("search_input"):
        case "ids":
            values["ids"] = _ids(request.ids)
        case "placeholder_group":
            values["data"] = _placeholders(request.placeholder_group)
    return values


def _placeholders(data: bytes) -> Any:
    """Return query vectors as the byte strings that they came as. Raises InvalidParameter."""
    try:
        group = _GROUP.FromString(data)
    except DAMAGED:
        raise InvalidParameter("placeholder_group is no PlaceholderGroup: invalid parameter") from None
    if len(group.placeholders) != 1:
        raise InvalidParameter(f"one placeholder is expected, got {len(group.placeholders)}: invalid parameter")
    one = group.placeholders[0]
    kind = PLACEHOLDERS.get(one.type, str(one.type))
    if kind == "VarChar":
        try:
            return [value.decode() for value in one.values]
        except UnicodeDecodeError as error:
            raise InvalidParameter(f"a text to search for is no UTF-8: {error}: invalid parameter") from None
    if kind.startswith("EmbList") or one.element_level:
        raise UnsupportedOperation("searching by lists of vectors is not supported by this server")
    return list(one.values)


def _ids(given: Message) -> list[Any]:
    which = given.WhichOneof("id_field")
    return [] if which is None else list(getattr(given, which).data)


# --- pages of a search -------------------------------------------------------------------------------------------


async def _page(
    call: Call, wanted: SearchRequest, options: Any, params: Mapping[str, Any], schema: CollectionSchema
) -> SearchResult:
    """Return the next rows behind a bound of the distance, and tell where they end."""
    if wanted.offset:
        raise InvalidParameter("offset is not supported by search iterators: invalid parameter")
    batch = _number(params, "search_iter_batch_size") or wanted.limit
    if not 1 <= batch <= WINDOW_MAX:
        raise InvalidParameter(f"batch size [{batch}] should be in range [1, {WINDOW_MAX}]: invalid parameter")
    bound = params.get("search_iter_last_bound")
    decimals, wanted = wanted.round_decimal, replace(wanted, round_decimal=-1)
    if bound is not None:
        wanted = await _behind(call, wanted, schema, np.float32(bound))
    limit = batch
    while True:
        limit = min(limit + 1, WINDOW_MAX)
        result = await call.service.search(call.database, call.collection, replace(wanted, limit=limit), options)
        count = len(result.scores)
        if count <= batch or count < limit:
            keep = count
        else:
            keep = _whole(result.scores, batch)
        if keep or not count or limit == WINDOW_MAX:
            keep = keep or count
            break
        limit *= GROWTH
    found = call.response.results.search_iterator_v2_results
    found.token = str(params.get("search_iter_id") or "") or secrets.token_hex(16)
    found.last_bound = float(result.scores[keep - 1]) if keep else float(bound or 0)
    return _cut(result, keep, decimals)


def _whole(scores: npt.NDArray[np.float32], batch: int) -> int:
    """Return how many rows of a page are surely all that have their distances, at most `batch`; 0 if none are.

    More than `batch` if the rows of the first distance alone are more.
    """
    ends = np.flatnonzero(scores[1:] != scores[:-1]) + 1  # where a new distance begins
    if not len(ends):
        return 0
    fitting = ends[ends <= batch]
    return int(fitting[-1]) if len(fitting) else int(ends[0])


async def _behind(call: Call, wanted: SearchRequest, schema: CollectionSchema, bound: np.float32) -> SearchRequest:
    """Return the search with its range beginning just behind the bound."""
    metric = wanted.metric_type
    if not metric:
        info = await call.service.describe_collection(call.database, call.collection)
        field = wanted.anns_field or schema.vectors[0].name
        metric = next((one.metric_type for one in info.indexes if one.field_name == field), "")
    params = dict(wanted.params)
    is_similarity = metric in SIMILARITIES
    edge = float(np.nextafter(bound, np.float32(-np.inf if is_similarity else np.inf)))
    given = params.get("range_filter")
    if given is not None:
        edge = min(edge, float(given)) if is_similarity else max(edge, float(given))
    radius = params.get("radius")
    if radius is not None and (edge <= float(radius) if is_similarity else edge >= float(radius)):
        edge = float(radius)  # nothing is left; the range must not be empty, so it is put where no row can be
        params["radius"] = float(np.nextafter(np.float32(edge), np.float32(-np.inf if is_similarity else np.inf)))
    params["range_filter"] = edge
    if radius is None:
        params["radius"] = -np.finfo(np.float32).max if is_similarity else np.finfo(np.float32).max
        params["radius"] = float(params["radius"])
    return replace(wanted, params=params)


def _cut(result: SearchResult, keep: int, decimals: int) -> SearchResult:
    rows, scores = result.rows, rounded(np.asarray(result.scores[:keep], np.float32), decimals)
    return SearchResult(replace(rows, batch=rows.batch.slice(0, keep)), scores, [keep])


# --- answers -----------------------------------------------------------------------------------------------------


async def _shown(call: Call, show: Callable[..., None], result: Any, rows: Rows, *more: Any) -> None:
    """Fill the response, on a worker thread where it has many rows. Raises InvalidParameter if it is too large."""
    count = rows.batch.rows
    if count:
        check_output(count, rows.batch.nbytes / count)
    scope = current.get()
    call.response.collection_name = call.collection
    call.response.session_ts = max(scope.read_at.values(), default=0) if scope is not None else 0
    if count <= LARGE_REPLY_ROWS:
        show(call.response, result, *more)
    else:
        await call.offload(show, call.response, result, *more)


def _show_query(response: Message, rows: Rows, names: list[str]) -> None:
    response.primary_field_name = rows.schema.primary.name
    if rows.count is not None:
        data = response.fields_data.add(type=TYPES["Int64"], field_name=COUNT)
        data.scalars.long_data.data.append(rows.count)
        response.output_fields.append(COUNT)
        return
    if rows.groups is not None:
        show_groups(rows.groups, names, response.fields_data)
        response.output_fields.extend(names)
        return
    show_rows(rows, response.fields_data, response.output_fields, with_key=True)


def _show_search(response: Message, result: SearchResult, queries: int, names: Sequence[str]) -> None:
    results, rows = response.results, result.rows
    primary = rows.schema.primary
    topks = list(result.topks) or [0] * queries
    results.num_queries, results.top_k = len(topks), max(topks, default=0)
    results.topks.extend(topks)
    results.primary_field_name = primary.name
    results.scores.extend(result.scores.tolist())
    column = rows.batch.columns.get(primary.id)
    keys = [] if column is None else column.to_list()
    if str(primary.type) == "VarChar":
        results.ids.str_id.data.extend(keys)
    else:
        results.ids.int_id.data.extend(keys)
    show_rows(rows, results.fields_data, results.output_fields, with_key="*" in names or primary.name in names)


# --- what requests share -----------------------------------------------------------------------------------------


async def _as_of(timestamp: int, pages: bool, read: Callable[[], Awaitable[T]]) -> T:
    """Read what a client must see that names a timestamp: no less, or for a page of an iterator just that."""
    scope = current.get()
    if scope is None or timestamp < SESSION_MIN:
        return await read()
    tick = Tick(min(timestamp, TICK_MAX))
    if pages:
        scope.at = {EVERY_SHARD: tick}
        try:
            return await read()
        except SnapshotGone:
            _start_anew(scope)
    scope.seen[EVERY_SHARD] = tick
    return await read()


def _start_anew(scope: Scope) -> None:
    scope.at = None
    scope.read_at.clear()


def _level(request: Message) -> str:
    """Return the name of the level that a read asks for, "" for the collection's."""
    return "" if request.use_default_consistency else consistency_name(request.consistency_level)


def _loose_values(given: Mapping[str, str]) -> dict[str, Any]:
    """Return values that are sent as JSON, or as they are where they are text."""
    params: dict[str, Any] = {}
    for key, text in given.items():
        try:
            params[key] = text if key in _TEXTS else orjson.loads(text)
        except orjson.JSONDecodeError:
            params[key] = text
    return params


def _search_params(given: Message) -> dict[str, Any]:
    """Return search parameters with their values decoded. Raises InvalidParameter."""
    params = _loose_values(pairs(given))
    if not isinstance(params.get("params", {}), dict):
        raise InvalidParameter("params of a search should be a JSON object: invalid parameter")
    return params


def _number(params: Mapping[str, Any], name: str) -> int:
    value = params.get(name)
    if value is None or value == "":
        return 0
    return parse_int(value, name)


def _templates(given: Message) -> dict[str, Any]:
    """Return the values of a filter's templates. Raises UnsupportedOperation for one of a kind that filters lack."""
    return {name: _template(name, value) for name, value in given.items()}


def _template(name: str, value: Message) -> Any:
    which = value.WhichOneof("val")
    if which is None:
        return None
    if which == "array_val":
        return _template_list(name, value.array_val)
    if which == "bytes_val":
        raise UnsupportedOperation(f"template {name[:80]}: values of bytes are not supported by this server")
    return getattr(value, which)


def _template_list(name: str, value: Message) -> list[Any]:
    which = value.WhichOneof("data")
    if which is None:
        return []
    values = getattr(value, which).data
    if which == "array_data":
        return [_template_list(name, one) for one in values]
    if which == "json_data":
        try:
            return [orjson.loads(one) for one in values]
        except orjson.JSONDecodeError:
            raise InvalidParameter(f"template {name[:80]}: a value is no JSON: invalid parameter") from None
    return list(values)


METHODS: Final[Methods] = {
    "Insert": Method(insert, mutates=True, rows=True),
    "Upsert": Method(upsert, mutates=True, rows=True),
    "Delete": Method(delete, mutates=True, plan="delete"),
    "Query": Method(query, plan="query", rows=True),
    "Search": Method(search, plan="query", rows=True),
    "HybridSearch": Method(hybrid_search, plan="query", rows=True),
}
