"""Handlers of everything about the server itself: connecting, flushing, compaction, segments, and what it has not."""

from __future__ import annotations

import itertools
import socket
from typing import Any, Final

from node.api.collections import VERSION, analyses
from node.api.routes import RUN_ANALYZER
from node.grpc.calls import Call, Method, Methods
from node.grpc.protocol import enum
from node.service import CollectionInfo, LoadState
from storage.errors import InvalidParameter, MissingParameter
from storage.types import Tick, tick_from_ms

RESOURCE_GROUP: Final = "__default_resource_group"
_COMPACTION_STATES: Final = {
    "UndefiedState": 0, "Executing": 1, "Completed": 2
}  # fmt: skip
_SEGMENT_STATES: Final = enum("common.SegmentState")
_LEVELS: Final = enum("common.SegmentLevel")
HEALTHY: Final = enum("common.StateCode")["Healthy"]
_connections: Final = itertools.count(1)


def _now(call: Call) -> Tick:
    return tick_from_ms(call.clock.wall_ms())


async def connect(call: Call) -> None:
    info = call.response.server_info
    info.build_tags, info.deploy_mode = f"annulus-{VERSION}", "STANDALONE"
    info.reserved["server"] = "annulus"
    call.response.identifier = next(_connections)


async def version(call: Call) -> None:
    call.response.version = VERSION


async def check_health(call: Call) -> None:
    reason = call.ready()
    call.response.isHealthy = not reason
    if reason:
        call.response.reasons.append(reason)


async def component_states(call: Call) -> None:
    call.response.state.role, call.response.state.state_code = "annulus", HEALTHY


async def dummy(call: Call) -> None:
    call.response.response = "unknown request type"


async def alloc_timestamp(call: Call) -> None:
    call.response.timestamp = _now(call)


async def run_analyzer(call: Call) -> None:
    request = call.request
    try:
        texts = [one.decode() for one in request.placeholder]
    except UnicodeDecodeError as error:
        raise InvalidParameter(f"a text is no UTF-8: {error}: invalid parameter") from None
    values = {
        **RUN_ANALYZER.defaults,
        "text": texts,
        "analyzerParams": request.analyzer_params,
        "withDetail": request.with_detail,
        "withHash": request.with_hash,
        "collectionName": request.collection_name,
        "fieldName": request.field_name,
        "analyzerNames": list(request.analyzer_names),
    }
    for result in await analyses(call.service, call.database, values, call.offload):
        shown = call.response.results.add()
        for token in result["tokens"]:
            shown.tokens.add(
                token=token["token"],
                start_offset=token.get("startOffset", 0),
                end_offset=token.get("endOffset", 0),
                position=token.get("position", 0),
                position_length=token.get("positionLength", 0),
                hash=token.get("hash", 0),
            )


# --- flushing and compaction -------------------------------------------------------------------------------------


async def flush(call: Call) -> None:
    """Flush collections; the answer comes when it is done, so that asking for the state finds it done."""
    if not call.request.collection_names:
        raise MissingParameter("missing required parameters, error: collection_names is required")
    call.response.db_name = call.database
    for name in call.request.collection_names:
        await call.service.flush(call.database, name)
        segments = await _segments(call, await call.service.describe_collection(call.database, name))
        ids = [one["segmentID"] for one in segments if one["state"] != "Growing"]
        call.response.coll_segIDs[name].data.extend(ids)
        call.response.flush_coll_segIDs[name].data.extend(ids)
        call.response.coll_seal_times[name] = call.clock.wall_ms() // 1000
        call.response.coll_flush_ts[name] = _now(call)


async def flush_all(call: Call) -> None:
    await call.service.flush_all()
    call.response.flush_all_ts = _now(call)


async def flush_state(call: Call) -> None:
    call.response.flushed = True  # the flush was answered when it was done


async def compact(call: Call) -> None:
    name = call.request.collection_name or await _name_of(call, call.request.collectionID)
    call.response.compactionID = await call.service.compact(call.database, name)
    call.response.compactionPlanCount = 1


async def _name_of(call: Call, collection_id: int) -> str:
    """Return the name of a collection of which older clients give the id. Raises InvalidParameter."""
    for name in await call.service.list_collections(call.database):
        if (await call.service.describe_collection(call.database, name)).collection_id == collection_id:
            return name
    raise InvalidParameter(f"there is no collection with id {collection_id}: invalid parameter")


async def compaction_state(call: Call) -> None:
    state, running, done = await call.service.compaction_state(call.request.compactionID)
    call.response.state = _COMPACTION_STATES.get(state, 0)
    call.response.executingPlanNo, call.response.completedPlanNo = running, done


async def compaction_plans(call: Call) -> None:
    state, _, _ = await call.service.compaction_state(call.request.compactionID)
    call.response.state = _COMPACTION_STATES.get(state, 0)


# --- segments and replicas ---------------------------------------------------------------------------------------


async def _segments(call: Call, info: CollectionInfo) -> list[Any]:
    return list(await call.service.describe_segments(info.collection_id, ()))


async def persistent_segments(call: Call) -> None:
    database = call.request.dbName or call.database
    info = await call.service.describe_collection(database, call.request.collectionName)
    for one in await _segments(call, info):
        if one["state"] != "Growing":
            _show_segment(call.response.infos.add(), one)


async def query_segments(call: Call) -> None:
    database = call.request.dbName or call.database
    info = await call.service.describe_collection(database, call.request.collectionName)
    if info.load_state is LoadState.NOT_LOADED:
        return
    for one in await _segments(call, info):
        shown = call.response.infos.add()
        _show_segment(shown, one)
        if info.indexes and one["state"] != "Growing":
            shown.index_name = info.indexes[0].index_name


def _show_segment(shown: Any, one: Any) -> None:
    shown.segmentID, shown.collectionID, shown.partitionID = one["segmentID"], one["collectionID"], one["partitionID"]
    shown.num_rows, shown.state = one["numRows"], _SEGMENT_STATES[one["state"]]
    shown.level, shown.is_sorted = _LEVELS[one["level"]], one["isSorted"]


async def replicas(call: Call) -> None:
    """One replica: what Milvus calls so is loading a collection several times, which nodes here do not."""
    name = call.collection or await _name_of(call, call.request.collectionID)
    info = await call.service.describe_collection(call.database, name)
    if info.load_state is LoadState.NOT_LOADED:
        return
    shown = call.response.replicas.add(replicaID=1, collectionID=info.collection_id)
    shown.resource_group_name = RESOURCE_GROUP
    shown.node_ids.append(1)
    for shard in range(info.shards):
        channel = f"annulus-dml_{shard}_{info.collection_id}v{shard}"
        shown.shard_replicas.add(leaderID=1, leader_addr=socket.gethostname(), dm_channel_name=channel, node_ids=[1])


async def list_resource_groups(call: Call) -> None:
    call.response.resource_groups.append(RESOURCE_GROUP)


async def describe_resource_group(call: Call) -> None:
    name = call.request.resource_group
    if name != RESOURCE_GROUP:
        raise InvalidParameter(f"resource group {name[:80]} not found; all nodes are in {RESOURCE_GROUP}")
    call.response.resource_group.name = name
    call.response.resource_group.capacity = call.response.resource_group.num_available_node = 1


METHODS: Final[Methods] = {
    "Connect": Method(connect),
    "GetVersion": Method(version),
    "CheckHealth": Method(check_health),
    "GetComponentStates": Method(component_states),
    "Dummy": Method(dummy),
    "AllocTimestamp": Method(alloc_timestamp),
    "RunAnalyzer": Method(run_analyzer),
    "Flush": Method(flush, mutates=True, patient=True),
    "FlushAll": Method(flush_all, mutates=True, patient=True),
    "GetFlushState": Method(flush_state),
    "GetFlushAllState": Method(flush_state),
    "ManualCompaction": Method(compact, mutates=True),
    "GetCompactionState": Method(compaction_state),
    "GetCompactionStateWithPlans": Method(compaction_plans),
    "GetPersistentSegmentInfo": Method(persistent_segments),
    "GetQuerySegmentInfo": Method(query_segments),
    "GetReplicas": Method(replicas),
    "ListResourceGroups": Method(list_resource_groups),
    "DescribeResourceGroup": Method(describe_resource_group),
}
