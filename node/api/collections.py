"""Handlers of everything but rows: databases, collections, partitions, indexes, aliases, the server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from node.api.calls import Call, Handler
from node.api.replies import success
from node.api.schemas import (
    collection_request,
    describe_collection,
    describe_index,
    field_of,
    index_requests,
    pairs,
    texts,
)
from node.service import LoadState, Service
from storage.analysis import Analyzer, analyzer_of, term_number
from storage.errors import (
    CollectionNotFound,
    DatabaseNotFound,
    InvalidParameter,
    MissingParameter,
    UnsupportedOperation,
)

Envelope = Mapping[str, Any]


def _version() -> str:
    try:
        return version("annulus")
    except PackageNotFoundError:  # run from a clone, not installed
        return "0.1.0"


VERSION: Final = _version()


def _changes(call: Call) -> tuple[dict[str, str], list[str]]:
    """Return (properties to set, properties to drop) of an alter or drop request; one of the two is empty."""
    changed = texts("properties", call.values.get("properties") or {})
    dropped = list(call.values.get("propertyKeys") or ())
    if not changed and not dropped:
        wanted = "propertyKeys" if "propertyKeys" in call.values else "properties"
        raise MissingParameter(f"missing required parameters, error: {wanted} is required and names none")
    return changed, dropped


# --- server ------------------------------------------------------------------------------------------------------


async def server_version(call: Call) -> Envelope:
    return success({"version": VERSION})


async def describe_segments(call: Call) -> Envelope:
    segments = await call.service.describe_segments(call.values["collectionID"], call.values["segmentIDs"])
    return success({"segmentInfos": segments})


async def run_analyzer(call: Call) -> Envelope:
    return success({"results": await analyses(call.service, call.database, call.values, call.offload)})


async def analyses(
    service: Service, database: str, values: Mapping[str, Any], offload: Callable[..., Awaitable[Any]]
) -> list[dict[str, Any]]:
    """Return the tokens of each text, as the REST API shows them. Raises errors of bad requests."""
    if values["analyzerNames"]:
        raise UnsupportedOperation("analyzerNames are not supported by this server: fields have one analyzer each")
    if bool(values["collectionName"]) != bool(values["fieldName"]):
        raise MissingParameter("missing required parameters, error: collectionName and fieldName go together")
    if values["collectionName"]:
        schema = await service.collection_schema(database, values["collectionName"])
        field = schema.field(values["fieldName"])
        if not field.has_analyzer:
            raise InvalidParameter(f"field {field.name} has no analyzer: set enable_analyzer where it is made")
        analyzer = field.analyzer
    else:
        analyzer = analyzer_of(values["analyzerParams"])
    found: list[dict[str, Any]] = await offload(
        _analyzed, analyzer, values["text"], values["withDetail"], values["withHash"]
    )
    return found


def _analyzed(analyzer: Analyzer, texts: Sequence[str], detail: bool, hashed: bool) -> list[dict[str, Any]]:
    results = []
    for text in texts:
        tokens = []
        for one in analyzer.tokens(text):
            shown: dict[str, Any] = {"token": one.term}
            if detail:
                shown |= {"startOffset": one.start, "endOffset": one.end, "position": one.position, "positionLength": 1}
            if hashed:
                shown["hash"] = term_number(one.term)
            tokens.append(shown)
        results.append({"tokens": tokens})
    return results


# --- databases ---------------------------------------------------------------------------------------------------


async def create_database(call: Call) -> Envelope:
    properties = texts("properties", call.values["properties"])
    await call.service.create_database(call.values["dbName"], properties)
    return success({})


async def list_databases(call: Call) -> Envelope:
    return success(await call.service.list_databases())


async def describe_database(call: Call) -> Envelope:
    database_id, properties = await call.service.describe_database(call.values["dbName"])
    return success({"dbName": call.values["dbName"], "dbID": database_id, "properties": pairs(properties)})


async def alter_database(call: Call) -> Envelope:
    await call.service.alter_database(call.values["dbName"], *_changes(call))
    return success({})


async def drop_database(call: Call) -> Envelope:
    with suppress(DatabaseNotFound):  # then what is wanted is so already
        await call.service.drop_database(call.values["dbName"])
    return success({})


# --- collections -------------------------------------------------------------------------------------------------


async def create_collection(call: Call) -> Envelope:
    await call.service.create_collection(call.database, collection_request(call.values))
    return success({})


async def list_collections(call: Call) -> Envelope:
    return success(await call.service.list_collections(call.database))


async def has_collection(call: Call) -> Envelope:
    return success({"has": await call.service.has_collection(call.database, call.collection)})


async def describe_one_collection(call: Call) -> Envelope:
    info = await call.service.describe_collection(call.database, call.collection)
    return success(describe_collection(info), message="")


async def collection_stats(call: Call) -> Envelope:
    return success({"rowCount": await call.service.row_count(call.database, call.collection)})


async def load_state(call: Call) -> Envelope:
    state, percent = await call.service.load_state(call.database, call.collection, call.values["partitionNames"])
    shown: dict[str, Any] = {"loadState": str(state)}
    if state is not LoadState.NOT_LOADED:
        shown["loadProgress"] = percent
    return success(shown, message="")


async def load_collection(call: Call) -> Envelope:
    await call.service.load(call.database, call.collection, call.values.get("partitionNames") or ())
    return success({})


async def release_collection(call: Call) -> Envelope:
    await call.service.release(call.database, call.collection, call.values.get("partitionNames") or ())
    return success({})


async def drop_collection(call: Call) -> Envelope:
    with suppress(CollectionNotFound):  # then what is wanted is so already
        await call.service.drop_collection(call.database, call.collection)
    return success({})


async def truncate_collection(call: Call) -> Envelope:
    await call.service.truncate_collection(call.database, call.collection)
    return success({})


async def rename_collection(call: Call) -> Envelope:
    await call.service.rename_collection(
        call.database, call.collection, call.values["newCollectionName"], call.values["newDbName"] or call.database
    )
    return success({})


async def flush(call: Call) -> Envelope:
    await call.service.flush(call.database, call.collection)
    return success({})


async def flush_all(call: Call) -> Envelope:
    await call.service.flush_all()
    return success({})


async def compact(call: Call) -> Envelope:
    return success({"compactionID": await call.service.compact(call.database, call.collection)})


async def compaction_state(call: Call) -> Envelope:
    job_id = call.values["jobID"]
    state, running, done = await call.service.compaction_state(job_id)
    return success(
        {
            "compactionID": job_id,
            "state": state,
            "executingPlanNumber": running,
            "timeoutPlanNumber": 0,
            "completedPlanNumber": done,
        }
    )


async def alter_collection(call: Call) -> Envelope:
    await call.service.alter_collection(call.database, call.collection, *_changes(call))
    return success({})


async def add_field(call: Call) -> Envelope:
    await call.service.add_field(call.database, call.collection, field_of(call.values["schema"]))
    return success({})


async def alter_field(call: Call) -> Envelope:
    params = texts("fieldParams", call.values["fieldParams"] or {})
    if not params:
        raise MissingParameter("missing required parameters, error: fieldParams is required and names none")
    await call.service.alter_field(call.database, call.collection, call.values["fieldName"], params)
    return success({})


async def drop_field(call: Call) -> Envelope:
    name, field_id = call.values["fieldName"], call.values["fieldId"]
    if bool(name) == (field_id > 0):
        raise MissingParameter("missing required parameters, error: exactly one of fieldName and fieldId is required")
    await call.service.drop_field(call.database, call.collection, name, field_id)
    return success({})


# --- partitions --------------------------------------------------------------------------------------------------


async def list_partitions(call: Call) -> Envelope:
    return success(await call.service.list_partitions(call.database, call.collection))


async def create_partition(call: Call) -> Envelope:
    await call.service.create_partition(call.database, call.collection, call.values["partitionName"])
    return success({})


async def drop_partition(call: Call) -> Envelope:
    await call.service.drop_partition(call.database, call.collection, call.values["partitionName"])
    return success({})


async def has_partition(call: Call) -> Envelope:
    has = await call.service.has_partition(call.database, call.collection, call.values["partitionName"])
    return success({"has": has})


async def partition_stats(call: Call) -> Envelope:
    rows = await call.service.row_count(call.database, call.collection, call.values["partitionName"])
    return success({"rowCount": rows})


# --- indexes -----------------------------------------------------------------------------------------------------


async def list_indexes(call: Call) -> Envelope:
    return success(await call.service.list_indexes(call.database, call.collection))


async def describe_one_index(call: Call) -> Envelope:
    info = await call.service.describe_index(call.database, call.collection, call.values["indexName"])
    return success([describe_index(info)])


async def create_index(call: Call) -> Envelope:
    schema = await call.service.collection_schema(call.database, call.collection)
    for request in index_requests(call.values["indexParams"], [one.name for one in schema.user_fields]):
        await call.service.create_index(call.database, call.collection, request)
    return success({})


async def drop_index(call: Call) -> Envelope:
    await call.service.drop_index(call.database, call.collection, call.values["indexName"])
    return success({})


async def alter_index(call: Call) -> Envelope:
    await call.service.alter_index(call.database, call.collection, call.values["indexName"], *_changes(call))
    return success({})


# --- aliases -----------------------------------------------------------------------------------------------------


async def list_aliases(call: Call) -> Envelope:
    return success(await call.service.list_aliases(call.database, call.collection))


async def describe_alias(call: Call) -> Envelope:
    alias = call.values["aliasName"]
    collection = await call.service.describe_alias(call.database, alias)
    return success({"dbName": call.database, "collectionName": collection, "aliasName": alias})


async def create_alias(call: Call) -> Envelope:
    await call.service.create_alias(call.database, call.collection, call.values["aliasName"])
    return success({})


async def alter_alias(call: Call) -> Envelope:
    await call.service.alter_alias(call.database, call.collection, call.values["aliasName"])
    return success({})


async def drop_alias(call: Call) -> Envelope:
    await call.service.drop_alias(call.database, call.values["aliasName"])
    return success({})


HANDLERS: Final[Mapping[str, Handler]] = {
    "server_version": server_version,
    "describe_segments": describe_segments,
    "run_analyzer": run_analyzer,
    "create_database": create_database,
    "list_databases": list_databases,
    "describe_database": describe_database,
    "alter_database": alter_database,
    "drop_database": drop_database,
    "create_collection": create_collection,
    "list_collections": list_collections,
    "has_collection": has_collection,
    "describe_collection": describe_one_collection,
    "collection_stats": collection_stats,
    "load_state": load_state,
    "load_collection": load_collection,
    "release_collection": release_collection,
    "drop_collection": drop_collection,
    "truncate_collection": truncate_collection,
    "rename_collection": rename_collection,
    "flush": flush,
    "flush_all": flush_all,
    "compact": compact,
    "compaction_state": compaction_state,
    "alter_collection": alter_collection,
    "add_field": add_field,
    "alter_field": alter_field,
    "drop_field": drop_field,
    "list_partitions": list_partitions,
    "create_partition": create_partition,
    "drop_partition": drop_partition,
    "has_partition": has_partition,
    "partition_stats": partition_stats,
    "list_indexes": list_indexes,
    "describe_index": describe_one_index,
    "create_index": create_index,
    "drop_index": drop_index,
    "alter_index": alter_index,
    "list_aliases": list_aliases,
    "describe_alias": describe_alias,
    "create_alias": create_alias,
    "alter_alias": alter_alias,
    "drop_alias": drop_alias,
}
