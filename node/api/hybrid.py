"""Handler of hybrid searches: several searches in one request, and how their hits are ranked anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from node.api.calls import Call, Handler
from node.api.entities import (
    WINDOW_MAX,
    Envelope,
    check_hits,
    check_window,
    grouping_of,
    queries_of,
    read_options,
    search_params,
    shown,
)
from node.api.replies import search_reply
from node.api.requests import as_text, parse_bool
from node.api.routes import HYBRID_UNSUPPORTED, unsupported_given
from node.service import HybridRequest, ReadOptions, SearchRequest, SubSearch
from storage.errors import InvalidParameter, MissingParameter, UnsupportedOperation
from storage.fusion import GroupScorer, Ranker, ReciprocalRank, Weighted
from storage.schema import CollectionSchema

RRF_K_MAX: Final = 16_384


async def hybrid_search(call: Call) -> Envelope:
    if name := unsupported_given(call.values, HYBRID_UNSUPPORTED):
        raise UnsupportedOperation(f"{name} is not supported by this server")
    schema = await call.service.collection_schema(call.database, call.collection)
    request: HybridRequest = await call.offload(hybrid_request, call.values, schema)
    options = read_options(call.values, ())
    check_hybrid_hits(request, options, schema)
    result = await call.service.hybrid_search(call.database, call.collection, request, options)
    return await shown(call, search_reply, result, result.rows.batch.rows)


def hybrid_request(values: Mapping[str, Any], schema: CollectionSchema) -> HybridRequest:
    """Return what a hybrid search asks for beside its options. Raises errors of bad requests."""
    limit, offset = values["limit"], values["offset"]
    if limit < 1 or offset < 0 or limit + offset > WINDOW_MAX:
        raise InvalidParameter(
            "invalid max query result window, (offset+limit) should be in range "
            f"[1, {WINDOW_MAX}], but got {limit + offset} (offset {offset}, limit {limit}): invalid parameter"
        )
    if not values["search"]:
        raise MissingParameter("missing required parameters, error: search is required and holds no search")
    searches = _searches(values, schema)
    group_by, group_size = grouping_of(values, {})
    return HybridRequest(
        searches,
        ranker_of(values, len(searches)),
        limit,
        offset,
        group_by_field=group_by,
        group_size=group_size,
        group_scorer=_group_scorer(values["rerank"] or {}),
    )


def _group_scorer(rerank: Mapping[str, Any]) -> GroupScorer:
    given = (rerank.get("params") or {}).get("rank_group_scorer") or GroupScorer.MAX
    if given not in list(GroupScorer):
        raise InvalidParameter(
            f"rank_group_scorer can be {', '.join(GroupScorer)}, got {str(given)[:80]}: invalid parameter"
        )
    return GroupScorer(given)


def check_hybrid_hits(request: HybridRequest, options: ReadOptions, schema: CollectionSchema) -> None:
    """Raise InvalidParameter if so many hits would take more memory than a reply may."""
    searches = request.searches
    queries = sum(0 if one.request.vectors is None else len(one.request.vectors) for one in searches)
    limit = max(one.request.limit + one.request.offset for one in searches)
    check_hits(queries * limit * request.group_size, options, schema)


def _searches(values: Mapping[str, Any], schema: CollectionSchema) -> list[SubSearch]:
    return [_search(number, one, schema) for number, one in enumerate(values["search"])]


def _search(number: int, values: Mapping[str, Any], schema: CollectionSchema) -> SubSearch:
    if values["groupingField"]:
        raise UnsupportedOperation(f"search[{number}]: groupingField is not supported by this server")
    check_window(values["limit"], values["offset"])
    params = search_params(values["searchParams"], values["params"])
    metrics = {as_text(params.pop(name)) for name in ("metricType", "metric_type") if params.get(name)}
    metrics |= {values["metricType"]} if values["metricType"] else set()
    if len(metrics) > 1:
        raise InvalidParameter(f"ambiguous parameter: search[{number}] names several metric types: invalid parameter")
    vectors, _ = queries_of({**values, "ids": None}, schema)
    request = SearchRequest(
        vectors,
        anns_field=values["annsField"],
        limit=values["limit"],
        offset=values["offset"],
        metric_type=next(iter(metrics), ""),
        params=params,
    )
    return SubSearch(request, values["filter"], values["exprParams"] or {})


def ranker_of(values: Mapping[str, Any], searches: int) -> Ranker:
    """Return what `rerank` or `functionScore` asks for. Raises InvalidParameter in Milvus's words."""
    rerank = values["rerank"] or {"strategy": "", "params": {}}
    strategy, params = rerank["strategy"], rerank["params"] or {}
    if values["functionScore"]:
        strategy, params = _function(values["functionScore"])
    match strategy:
        case "rrf":
            return _reciprocal(params)
        case "weighted":
            return _weighted(params, searches)
    raise InvalidParameter(f"unsupported rank type {strategy[:80]}: use rrf or weighted: invalid parameter")


def _function(given: Any) -> tuple[str, Mapping[str, Any]]:
    functions = given.get("functions") if isinstance(given, dict) else None
    if not isinstance(functions, list) or len(functions) != 1 or not isinstance(functions[0], dict):
        raise UnsupportedOperation("functionScore: one function is supported, of type Rerank")
    params = functions[0].get("params")
    if str(functions[0].get("type")).lower() not in ("rerank", "3") or not isinstance(params, dict):
        raise UnsupportedOperation("functionScore: functions of type Rerank with params.reranker are supported")
    name = str(params.get("reranker"))
    if name not in ("rrf", "weighted"):
        raise UnsupportedOperation(f"functionScore: params.reranker can be rrf or weighted, got {name[:80]}")
    return name, params


def _reciprocal(params: Mapping[str, Any]) -> ReciprocalRank:
    k = _number(params.get("k", 60.0))
    if k is None:
        raise InvalidParameter("The type of rank param k should be float: invalid parameter")
    if not 0 < k < RRF_K_MAX:
        raise InvalidParameter(f"The rank params k should be in range (0, {RRF_K_MAX}), got {k:g}: invalid parameter")
    return ReciprocalRank(k)


def _weighted(params: Mapping[str, Any], searches: int) -> Weighted:
    given = params.get("weights")
    if given is None:
        raise InvalidParameter("weights not found in rank_params: invalid parameter")
    if not isinstance(given, list):
        raise InvalidParameter("The weights param should be an array: invalid parameter")
    if len(given) != searches:
        raise InvalidParameter(
            f"the length of weights param mismatch with ann search requests: invalid parameter[expected={searches}]"
            f"[actual={len(given)}]"
        )
    weights = []
    for value in given:
        weight = _number(value)
        if weight is None:
            raise InvalidParameter("The type of rank param weight should be float: invalid parameter")
        if not 0 <= weight <= 1:
            raise InvalidParameter(f"rank param weight should be in range [0, 1], got {weight:g}: invalid parameter")
        weights.append(weight)
    return Weighted(tuple(weights), parse_bool(params.get("norm_score", False), "norm_score"))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


HANDLERS: Final[Mapping[str, Handler]] = {"hybrid_search": hybrid_search}
