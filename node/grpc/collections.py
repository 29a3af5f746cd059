"""Handlers of databases, collections, partitions, indexes and aliases."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from node.api.schemas import texts
from node.grpc.calls import Call, Method, Methods, pairs, set_pairs
from node.grpc.protocol import enum
from node.grpc.schemas import added_field, creation_of, field_in, index_of, show_collection, show_index, state_number
from node.service import IndexInfo, LoadState
from storage.errors import (
    CollectionNotFound,
    DatabaseNotFound,
    IndexNotFound,
    InvalidParameter,
    MissingParameter,
    UnsupportedOperation,
)
from storage.types import tick_ms

LOAD_STATES: Final = enum("common.LoadState")
IN_MEMORY: Final = enum("milvus.ShowType")["InMemory"]


def _changes(call: Call, changed: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return (properties to set, properties to drop); one of the two may be empty. Raises MissingParameter."""
    dropped = list(call.request.delete_keys)
    if not changed and not dropped:
        raise MissingParameter("missing required parameters, error: properties or delete_keys is required")
    if changed and dropped:
        raise InvalidParameter("properties and delete_keys can not be given together: invalid parameter")
    return texts("properties", changed), dropped


# --- databases ---------------------------------------------------------------------------------------------------


async def create_database(call: Call) -> None:
    await call.service.create_database(call.request.db_name, texts("properties", pairs(call.request.properties)))


async def drop_database(call: Call) -> None:
    with suppress(DatabaseNotFound):  # then what is wanted is so already
        await call.service.drop_database(call.request.db_name)


async def list_databases(call: Call) -> None:
    for name in await call.service.list_databases():
        database_id, _ = await call.service.describe_database(name)
        call.response.db_names.append(name)
        call.response.db_ids.append(database_id)
        call.response.created_timestamp.append(0)


async def describe_database(call: Call) -> None:
    name = call.database
    call.response.db_name = name
    call.response.dbID, properties = await call.service.describe_database(name)
    set_pairs(call.response.properties, properties)


async def alter_database(call: Call) -> None:
    await call.service.alter_database(call.database, *_changes(call, pairs(call.request.properties)))


# --- collections -------------------------------------------------------------------------------------------------


async def create_collection(call: Call) -> None:
    await call.service.create_collection(call.database, creation_of(call.request))


async def drop_collection(call: Call) -> None:
    with suppress(CollectionNotFound):  # then what is wanted is so already
        await call.service.drop_collection(call.database, call.collection)


async def has_collection(call: Call) -> None:
    call.response.value = await call.service.has_collection(call.database, call.collection)


async def describe_collection(call: Call) -> None:
    if not call.collection:
        raise MissingParameter("missing required parameters, error: collection_name is required")
    show_collection(await call.service.describe_collection(call.database, call.collection), call.response)


async def batch_describe_collection(call: Call) -> None:
    for name in call.request.collection_name:
        show_collection(await call.service.describe_collection(call.database, name), call.response.responses.add())


async def show_collections(call: Call) -> None:
    wanted = set(call.request.collection_names)
    for name in await call.service.list_collections(call.database):
        if wanted and name not in wanted:
            continue
        try:
            info = await call.service.describe_collection(call.database, name)
        except CollectionNotFound:  # it was dropped meanwhile
            continue
        is_loaded = info.load_state is not LoadState.NOT_LOADED
        if call.request.type == IN_MEMORY and not is_loaded:
            continue
        call.response.collection_names.append(info.name)
        call.response.collection_ids.append(info.collection_id)
        call.response.created_timestamps.append(info.created_tick)
        call.response.created_utc_timestamps.append(tick_ms(info.created_tick))
        call.response.inMemory_percentages.append(info.load_percent)
        call.response.query_service_available.append(info.load_state is LoadState.LOADED)
        call.response.shards_num.append(info.shards)


async def rename_collection(call: Call) -> None:
    await call.service.rename_collection(
        call.database, call.request.oldName, call.request.newName, call.request.newDBName or call.database
    )


async def truncate_collection(call: Call) -> None:
    await call.service.truncate_collection(call.database, call.collection)


async def alter_collection(call: Call) -> None:
    changes = _changes(call, pairs(call.request.properties))
    await call.service.alter_collection(call.database, call.collection, *changes)


async def alter_collection_field(call: Call) -> None:
    if call.request.delete_keys:
        raise UnsupportedOperation("dropping parameters of a field is not supported by this server")
    params = texts("properties", pairs(call.request.properties))
    if not params:
        raise MissingParameter("missing required parameters, error: properties is required and names none")
    if "mmap_enabled" in params:
        params["mmap.enabled"] = params.pop("mmap_enabled")
    await call.service.alter_field(call.database, call.collection, call.request.field_name, params)


async def add_collection_field(call: Call) -> None:
    await call.service.add_field(call.database, call.collection, field_in(call.request.schema))


async def alter_collection_schema(call: Call) -> None:
    """Add a field or drop one."""
    action = call.request.action
    add, drop = action.add_request, action.drop_request
    if add.func_schema or drop.function_name:
        raise UnsupportedOperation("functions in a schema are not supported by this server")
    if action.WhichOneof("op") == "add_request":
        if len(add.field_infos) != 1:
            raise InvalidParameter(f"one field is added at a time, got {len(add.field_infos)}: invalid parameter")
        await call.service.add_field(call.database, call.collection, added_field(add.field_infos[0].field_schema))
        return
    if bool(drop.field_name) == (drop.field_id > 0):
        raise MissingParameter("missing required parameters, error: exactly one of field_name and field_id is required")
    await call.service.drop_field(call.database, call.collection, drop.field_name, drop.field_id)


async def statistics(call: Call) -> None:
    rows = await call.service.row_count(call.database, call.collection)
    set_pairs(call.response.stats, {"row_count": rows})


# --- loading -----------------------------------------------------------------------------------------------------


async def load(call: Call) -> None:
    await call.service.load(call.database, call.collection, list(getattr(call.request, "partition_names", ())))


async def release(call: Call) -> None:
    await call.service.release(call.database, call.collection, list(getattr(call.request, "partition_names", ())))


async def loading_progress(call: Call) -> None:
    partitions = list(call.request.partition_names)
    _, percent = await call.service.load_state(call.database, call.collection, partitions)
    call.response.progress = call.response.refresh_progress = percent


async def load_state(call: Call) -> None:
    try:
        state, _ = await call.service.load_state(call.database, call.collection, list(call.request.partition_names))
        call.response.state = LOAD_STATES[str(state)]
    except CollectionNotFound:
        call.response.state = LOAD_STATES["LoadStateNotExist"]


# --- partitions --------------------------------------------------------------------------------------------------


async def create_partition(call: Call) -> None:
    await call.service.create_partition(call.database, call.collection, call.request.partition_name)


async def drop_partition(call: Call) -> None:
    await call.service.drop_partition(call.database, call.collection, call.request.partition_name)


async def has_partition(call: Call) -> None:
    call.response.value = await call.service.has_partition(call.database, call.collection, call.request.partition_name)


async def show_partitions(call: Call) -> None:
    wanted = set(call.request.partition_names)
    for number, name in enumerate(await call.service.list_partitions(call.database, call.collection)):
        if wanted and name not in wanted:
            continue
        call.response.partition_names.append(name)
        call.response.partitionIDs.append(number)
        call.response.created_timestamps.append(0)
        call.response.created_utc_timestamps.append(0)
        call.response.inMemory_percentages.append(100)


async def partition_statistics(call: Call) -> None:
    rows = await call.service.row_count(call.database, call.collection, call.request.partition_name)
    set_pairs(call.response.stats, {"row_count": rows})


# --- indexes -----------------------------------------------------------------------------------------------------


async def _indexes(call: Call) -> list[IndexInfo]:
    """Return the indexes that a request names by index or by field, all if by neither. Raises IndexNotFound."""
    name = call.request.index_name
    field = getattr(call.request, "field_name", "")
    info = await call.service.describe_collection(call.database, call.collection)
    found = [one for one in info.indexes if name in ("", one.index_name) and field in ("", one.field_name)]
    if not found:
        raise IndexNotFound(name or field or call.collection)
    return found


async def create_index(call: Call) -> None:
    await call.service.create_index(call.database, call.collection, index_of(call.request))


async def describe_index(call: Call) -> None:
    for one in await _indexes(call):
        show_index(one, call.response.index_descriptions.add())


async def index_state(call: Call) -> None:
    one = (await _indexes(call))[0]
    call.response.state, call.response.fail_reason = state_number(one), one.fail_reason


async def index_progress(call: Call) -> None:
    one = (await _indexes(call))[0]
    call.response.indexed_rows, call.response.total_rows = one.indexed_rows, one.total_rows


async def drop_index(call: Call) -> None:
    try:
        found = await _indexes(call)
    except IndexNotFound:  # then what is wanted is so already
        return
    for one in found:
        await call.service.drop_index(call.database, call.collection, one.index_name)


async def alter_index(call: Call) -> None:
    changes = _changes(call, pairs(call.request.extra_params))
    await call.service.alter_index(call.database, call.collection, call.request.index_name, *changes)


# --- aliases -----------------------------------------------------------------------------------------------------


async def create_alias(call: Call) -> None:
    await call.service.create_alias(call.database, call.collection, call.request.alias)


async def alter_alias(call: Call) -> None:
    await call.service.alter_alias(call.database, call.collection, call.request.alias)


async def drop_alias(call: Call) -> None:
    await call.service.drop_alias(call.database, call.request.alias)


async def describe_alias(call: Call) -> None:
    call.response.collection = await call.service.describe_alias(call.database, call.request.alias)
    call.response.db_name, call.response.alias = call.database, call.request.alias


async def list_aliases(call: Call) -> None:
    call.response.db_name, call.response.collection_name = call.database, call.collection
    call.response.aliases.extend(await call.service.list_aliases(call.database, call.collection))


METHODS: Final[Methods] = {
    "CreateDatabase": Method(create_database, mutates=True),
    "DropDatabase": Method(drop_database, mutates=True),
    "ListDatabases": Method(list_databases),
    "DescribeDatabase": Method(describe_database),
    "AlterDatabase": Method(alter_database, mutates=True),
    "CreateCollection": Method(create_collection, mutates=True),
    "DropCollection": Method(drop_collection, mutates=True),
    "HasCollection": Method(has_collection),
    "DescribeCollection": Method(describe_collection),
    "BatchDescribeCollection": Method(batch_describe_collection),
    "ShowCollections": Method(show_collections),
    "RenameCollection": Method(rename_collection, mutates=True),
    "TruncateCollection": Method(truncate_collection, mutates=True),
    "AlterCollection": Method(alter_collection, mutates=True),
    "AlterCollectionField": Method(alter_collection_field, mutates=True),
    "AddCollectionField": Method(add_collection_field, mutates=True),
    "AlterCollectionSchema": Method(alter_collection_schema, mutates=True),
    "GetCollectionStatistics": Method(statistics),
    "LoadCollection": Method(load, mutates=True),
    "ReleaseCollection": Method(release, mutates=True),
    "LoadPartitions": Method(load, mutates=True),
    "ReleasePartitions": Method(release, mutates=True),
    "GetLoadingProgress": Method(loading_progress),
    "GetLoadState": Method(load_state),
    "CreatePartition": Method(create_partition, mutates=True),
    "DropPartition": Method(drop_partition, mutates=True),
    "HasPartition": Method(has_partition),
    "ShowPartitions": Method(show_partitions),
    "GetPartitionStatistics": Method(partition_statistics),
    "CreateIndex": Method(create_index, mutates=True),
    "DescribeIndex": Method(describe_index),
    "GetIndexStatistics": Method(describe_index),
    "GetIndexState": Method(index_state),
    "GetIndexBuildProgress": Method(index_progress),
    "DropIndex": Method(drop_index, mutates=True),
    "AlterIndex": Method(alter_index, mutates=True),
    "CreateAlias": Method(create_alias, mutates=True),
    "AlterAlias": Method(alter_alias, mutates=True),
    "DropAlias": Method(drop_alias, mutates=True),
    "DescribeAlias": Method(describe_alias),
    "ListAliases": Method(list_aliases),
}
