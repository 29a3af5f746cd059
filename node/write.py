"""Writes: rows to partitions, partitions to shards, one message a shard and partition, acknowledged when applied.

One request is atomic per shard, not across shards. Messages go to the shards' leaders, wherever they are; the router
repeats one under its own producer and sequence, so a write whose outcome was unknown is never applied twice.

Each message names the version of the schema that its rows have, and a shard whose schema has changed refuses it. When
this node's catalogue has the new schema too, a request of which nothing was written is decoded again by who can; of
another one, what was refused is fitted to the new schema, as if it had been written just before the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from cluster.catalog import DEFAULT_PARTITION, Collection
from cluster.membership import MEMBERS_MAX
from cluster.message import Body, Delete, Insert, Message
from cluster.route import by_number, channels_of, split
from node.keyed import InsertKey
from node.node import Node
from node.read import Reader
from node.scope import current
from node.service import WriteResult
from storage.bm25 import with_computed
from storage.columns import Batch, Column, ScalarColumn, StringColumn, concat_columns
from storage.errors import (
    BadRow,
    CollectionNotFound,
    Conflict,
    InvalidParameter,
    OutcomeUnknown,
    Overloaded,
    SchemaMismatch,
)
from storage.key_lookup import Keys, batch_keys, key_list
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.strings import StringArray
from storage.types import PartitionId, ShardId
from storage.view import absent_column

CONFLICT_RETRIES_MAX = 16
COMPUTED_ON_LOOP_MAX = 8
"""Rows whose texts are taken apart on the loop: 65,535 bytes take 4 ms, and most have few."""


class Writer:
    """Turns batches into messages. One per node."""

    def __init__(self, node: Node, reader: Reader) -> None:
        self._node = node
        self._reader = reader

    async def insert(self, collection: Collection, batch: Batch, partition: str, *, again: bool = False) -> WriteResult:
        """Add the rows; return when they are durable and visible.

        again  the rows can be decoded again: raise SchemaMismatch if they are of an older schema and none was written
        """
        self._check(batch)
        scope = current.get()
        name = None if scope is None else scope.insert_key
        batch, keys = self._with_keys(collection, fitted(batch, collection.schema), name)
        groups = self._partitions_of(collection, batch, partition)
        outcomes = await self._send(collection, batch, groups, again=again, name=name)
        rows = sum(int(one["rows"]) for one in outcomes)
        self._node.metrics.rows_inserted(rows)
        return WriteResult(rows, keys)

    async def upsert(
        self, collection: Collection, batch: Batch, partition: str, *, partial: bool, again: bool = False
    ) -> WriteResult:
        """Replace the rows with these primary keys; of several rows with one key the last counts.

        again  see `insert`
        """
        self._check(batch)
        primary = collection.schema.primary
        if primary.id not in batch.columns:
            raise BadRow(f"upsert needs the primary key field {primary.name} in every row")
        if partial:
            return await self._upsert_partial(collection, _last_of_each_key(batch, primary), partition, again)
        batch = _last_of_each_key(fitted(batch, collection.schema), primary)
        if primary.auto_id:
            return await self._upsert_generated(collection, batch, partition, again)
        keys = batch_keys(batch, primary.id)
        groups = self._partitions_of(collection, batch, partition)
        outcomes = await self._send(collection, batch, groups, replace_rows=True, again=again)
        rows = sum(int(one["rows"]) for one in outcomes)
        self._node.metrics.rows_inserted(rows)
        return WriteResult(rows, keys)

    async def _upsert_generated(self, collection: Collection, batch: Batch, partition: str, again: bool) -> WriteResult:
        """Replace rows whose keys the database gives: the old rows go, the new ones get fresh keys, as in Milvus.

        One message where there is one virtual channel. With several, old and new rows may belong to different shards:
        the new rows are written first, so that a crash between leaves both rather than none.
        """
        primary = collection.schema.primary
        old_keys = key_list(batch_keys(batch, primary.id))
        columns = {i: column for i, column in batch.columns.items() if i != primary.id}
        batch, keys = self._with_keys(collection, Batch(columns, batch.rows))
        groups = self._partitions_of(collection, batch, partition)
        single = len(collection.shards) == 1
        outcomes = await self._send(
            collection, batch, groups, replace_rows=single, delete_keys=old_keys if single else None, again=again
        )
        if not single:
            await self.delete_keys(collection, _typed(old_keys, primary), None)
        rows = sum(int(one["rows"]) for one in outcomes)
        self._node.metrics.rows_inserted(rows)
        return WriteResult(rows, keys)

    async def delete_keys(self, collection: Collection, keys: Keys, partitions: Sequence[PartitionId] | None) -> int:
        """Delete the rows with these primary keys; return how many there were."""
        shards = collection.shards
        messages: list[tuple[ShardId, Message, Body]] = []
        for shard_id, offsets in zip(shards, split(keys, len(shards)), strict=True):
            if len(offsets) == 0:
                continue
            if isinstance(keys, np.ndarray):
                mine: bytes | list[str] = keys[offsets].astype("<i8").tobytes()
            else:
                mine = [keys[i] for i in offsets.tolist()]
            messages.append((shard_id, Delete(collection.collection_id, mine, partitions), b""))
        outcomes = await self._node.router.change_all(messages)
        rows = sum(int(str(one["rows"])) for one in outcomes)
        self._node.metrics.rows_deleted(rows)
        return rows

    async def _send(
        self,
        collection: Collection,
        batch: Batch,
        groups: Sequence[tuple[PartitionId, npt.NDArray[np.int64]]],
        *,
        replace_rows: bool = False,
        expected: npt.NDArray[np.int64] | None = None,
        delete_keys: Sequence[int | str] | None = None,
        again: bool = False,
        name: InsertKey | None = None,
    ) -> list[Mapping[str, Any]]:
        """Propose one message per virtual channel that has rows; return their outcomes."""
        batch = await self._computed(batch, collection.schema)
        owner = channels_of(batch_keys(batch, collection.schema.primary.id), len(collection.shards))
        proposals: list[tuple[ShardId, Message, Body]] = []
        producers: dict[int, str] = {}
        for channel, shard_id in enumerate(collection.shards):
            parts = [(partition_id, chosen[owner[chosen] == channel]) for partition_id, chosen in groups]
            parts = [(partition_id, offsets) for partition_id, offsets in parts if len(offsets)]
            if not parts:
                continue
            rows = np.concatenate([offsets for _, offsets in parts])
            message = Insert(
                collection.collection_id,
                parts[0][0],
                replace_rows,
                delete_keys,
                None if expected is None else expected[rows].tolist(),
                [(partition_id, len(offsets)) for partition_id, offsets in parts[1:]],
                collection.schema.version,
            )
            whole = len(rows) == batch.rows and len(parts) == 1
            proposals.append((shard_id, message, batch if whole else batch.take(rows)))
            if name is not None:
                producers[id(message)] = name.producer(collection.collection_id, channel)
        if name is None:
            return await self._insert_all(collection, proposals, again)
        return await self._insert_named(proposals, producers, name.number)

    async def _computed(self, batch: Batch, schema: CollectionSchema) -> Batch:
        """Return the rows with what functions compute of them; on a thread where that takes long."""
        if not schema.functions:
            return batch
        if batch.rows <= COMPUTED_ON_LOOP_MAX:
            return with_computed(batch, schema)
        return await self._node.read(with_computed, batch, schema)

    async def _insert_named(
        self, proposals: list[tuple[ShardId, Message, Body]], producers: Mapping[int, str], sequence: int
    ) -> list[Mapping[str, Any]]:
        """Propose inserts that have a name of their own, each once: what they are refused for they are refused for.

        producers  by the identity of each message
        """

        async def change(shard_id: ShardId, message: Message, body: Body) -> Mapping[str, Any]:
            producer = producers[id(message)]
            return await self._node.router.change(shard_id, message, body, producer=producer, sequence=sequence)

        return await self._node.router.change_all(proposals, change)

    async def _insert_all(
        self, collection: Collection, proposals: list[tuple[ShardId, Message, Body]], again: bool
    ) -> list[Mapping[str, Any]]:
        """Propose inserts, and those that are refused as the schema has changed once more, with rows as that has them.

        Where some shards take their part and others have too much to do, these are asked until time is up.

        Raises SchemaMismatch if none was made, and that is wanted or the change does not come to its end in time;
        Overloaded if none was made.
        """
        deadline_s = self._node.router.deadline_s()
        attempt = 0
        outcomes: list[Mapping[str, Any]] = []
        while True:
            refused: list[tuple[ShardId, Message, Body]] = []
            mismatch: SchemaMismatch | None = None
            overload: Overloaded | None = None
            is_rest = bool(outcomes)

            async def change(shard_id: ShardId, message: Message, body: Body) -> Mapping[str, Any]:
                nonlocal mismatch, overload
                try:
                    return await self._node.router.change(shard_id, message, body, is_rest=is_rest)  # noqa: B023
                except SchemaMismatch as error:
                    mismatch = error
                except Overloaded as error:
                    overload = error
                refused.append((shard_id, message, body))  # noqa: B023  (of this round)
                return {}

            outcomes += [one for one in await self._node.router.change_all(proposals, change) if one]
            if overload is not None:
                if not outcomes:
                    raise overload
                attempt += 1
                if not await self._node.router.pause(attempt, deadline_s):
                    raise OutcomeUnknown(f"a part of the request is done. {overload}") from None
            if mismatch is None:
                if not refused:
                    return outcomes
                proposals = refused
                continue
            try:
                collection = await self._newer(collection, mismatch, deadline_s)
            except SchemaMismatch as error:
                if outcomes:
                    raise OutcomeUnknown(f"a part of the request is done. {error}") from None
                raise
            if again and not outcomes:
                raise mismatch
            proposals = [(shard_id, *_refitted(message, body, collection)) for shard_id, message, body in refused]

    async def _newer(self, collection: Collection, mismatch: SchemaMismatch, deadline_s: float) -> Collection:
        """Return the collection when this node's catalogue has a newer version of its schema.

        A shard has one before the catalogue, which has it when all shards do. Raises the mismatch if that takes long.
        """
        router, attempt = self._node.router, 0
        while True:
            await router.refresh_catalog()
            found = self._node.catalog.collections.get(collection.collection_id)
            if found is None:
                raise CollectionNotFound(collection.database, collection.name)
            if found.schema.version > collection.schema.version:
                return found
            attempt += 1
            if not await router.pause(attempt, deadline_s):
                raise mismatch

    def _check(self, batch: Batch) -> None:
        if self._node.mesh is None:
            self._node.check_writable()  # early; in a cluster it is the leader's room that counts
        if batch.rows == 0:
            raise InvalidParameter("no rows were given")

    def _with_keys(self, collection: Collection, batch: Batch, name: InsertKey | None = None) -> tuple[Batch, Keys]:
        """Return the batch with a primary key column, and the keys."""
        primary = collection.schema.primary
        if primary.id in batch.columns:
            return batch, batch_keys(batch, primary.id)
        if not primary.auto_id:
            raise BadRow(f"field {primary.name} is the primary key and is missing")
        ids = self._fresh_ids(batch.rows) if name is None else name.ids(collection.collection_id, batch.rows)
        column: Column = ScalarColumn(ids)
        if primary.type is DataType.VARCHAR:
            column = StringColumn(StringArray.from_strings([str(one) for one in ids.tolist()]))
        batch = Batch({primary.id: column, **batch.columns}, batch.rows)
        return batch, batch_keys(batch, primary.id)

    def _fresh_ids(self, count: int) -> npt.NDArray[np.int64]:
        """Return ascending ids that no node has given before nor will give.

        They are stamps of this node's hybrid clock, which is above all that it has given and, after a restart, above
        all ticks in its logs. Two nodes may have the same stamp; so each takes those that leave its own number when
        divided by how many nodes there can be.
        """
        number, ways = self._node.known.number, 1 if self._node.mesh is None else MEMBERS_MAX
        first = int(self._node.hybrid.stamp(ways * (count + 1)))
        first += (number - first) % ways
        return np.arange(count, dtype=np.int64) * ways + first

    def _partitions_of(
        self, collection: Collection, batch: Batch, partition: str
    ) -> list[tuple[PartitionId, npt.NDArray[np.int64]]]:
        """Return (partition, offsets of its rows)."""
        key = collection.schema.partition_key
        if key is None:
            everything = np.arange(batch.rows, dtype=np.int64)
            return [(collection.partition(partition or DEFAULT_PARTITION), everything)]
        if partition:
            raise InvalidParameter("not support manually specifying the partition names if partition key mode is used")
        ids = by_number(collection.partitions)
        parts = split(batch_keys(batch, key.id), len(ids))
        return [(partition_id, offsets) for partition_id, offsets in zip(ids, parts, strict=True) if len(offsets)]

    # partial updates

    async def _upsert_partial(self, collection: Collection, batch: Batch, partition: str, again: bool) -> WriteResult:
        """Merge the given fields into the rows that exist; whoever changes them meanwhile makes us read again."""
        keys = batch_keys(batch, collection.schema.primary.id)
        for attempt in range(CONFLICT_RETRIES_MAX):
            try:
                old, inserted = await self._reader.stored_rows(collection, keys)
            except SchemaMismatch as mismatch:
                collection = await self._newer(collection, mismatch, self._node.router.deadline_s())
                if again:
                    raise
                continue
            merged, expected = await self._node.read(_merge_partial, collection.schema, batch, old, inserted)
            groups = self._partitions_of(collection, merged, partition)
            try:
                outcomes = await self._send(
                    collection, merged, groups, replace_rows=True, expected=expected, again=again
                )
            except Conflict:
                await self._node.router.pause(attempt, self._node.router.deadline_s())
                continue
            return WriteResult(sum(int(one["rows"]) for one in outcomes), keys)
        raise Conflict("the rows are being changed by others all the time; try again")


def _merge_partial(
    schema: CollectionSchema, batch: Batch, old: Batch, inserted: npt.NDArray[np.int64]
) -> tuple[Batch, npt.NDArray[np.int64]]:
    """Return (whole rows, for each the insert tick of the row it replaces, 0 if it is new)."""
    batch = _without_unknown(batch, schema)
    wanted = key_list(batch_keys(batch, schema.primary.id))
    at = {key: offset for offset, key in enumerate(key_list(batch_keys(old, schema.primary.id)))}
    places = np.array([at.get(key, -1) for key in wanted], np.int64)
    is_new = places < 0
    expected = np.append(inserted, 0)[places]
    missing = [one for one in schema.fields if one.id not in batch.columns and one.id not in schema.computed]
    required = [one.name for one in missing if not one.nullable and one.default is None and not one.dynamic]
    if required and is_new.any():
        fresh = wanted[int(np.flatnonzero(is_new)[0])]
        raise BadRow(f"row {fresh} does not exist, so every field must be given: {', '.join(required)} missing")
    columns: dict[Any, Column] = dict(batch.columns)
    rows = np.where(is_new, old.rows, places)  # a new row takes the one behind the old ones
    for one in missing:
        if is_new.any():
            columns[one.id] = concat_columns([old.columns[one.id], absent_column(one, 1)]).take(rows)
        else:
            columns[one.id] = old.columns[one.id].take(rows)
    if schema.dynamic is not None and schema.dynamic.id in batch.columns:
        known = [*old.columns[schema.dynamic.id].to_list(), None]
        given = batch.columns[schema.dynamic.id].to_list()
        columns[schema.dynamic.id] = _merge_documents(given, [known[row] for row in rows.tolist()])
    return Batch(columns, batch.rows), expected


def _merge_documents(given: Sequence[str | None], replaced: Sequence[str | None]) -> StringColumn:
    """Return the rows' dynamic keys over those of the rows they replace; a null clears a key."""
    merged = []
    for new, old in zip(given, replaced, strict=True):
        known: dict[str, Any] = orjson.loads(old) if old else {}
        changed = orjson.loads(new) if new else {}
        kept = {key: value for key, value in {**known, **changed}.items() if value is not None}
        merged.append(orjson.dumps(kept).decode())
    return StringColumn(StringArray.from_strings(merged))


def fitted(batch: Batch, schema: CollectionSchema) -> Batch:
    """Return whole rows that were made for another version of the schema, as this one has them.

    Raises BadRow for a field that they should have.
    """
    if batch.columns.keys() == schema.by_id.keys():
        return batch
    batch = _without_unknown(batch, schema)
    columns = dict(batch.columns)
    for one in schema.fields:
        if one.id not in columns and not one.auto_id and one.id not in schema.computed:
            if not one.nullable and one.default is None:
                raise BadRow(f"the rows have no field {one.name}")
            columns[one.id] = absent_column(one, batch.rows)
    return Batch(columns, batch.rows)


def _refitted(message: Message, rows: Body, collection: Collection) -> tuple[Message, Batch]:
    """Return the insert with its rows as the collection's schema has them."""
    assert isinstance(message, Insert) and isinstance(rows, Batch), "only an insert has rows"
    rows = with_computed(fitted(rows, collection.schema), collection.schema)
    return replace(message, schema_version=collection.schema.version), rows


def _without_unknown(batch: Batch, schema: CollectionSchema) -> Batch:
    """Return the rows without fields that have been dropped."""
    known = [one for one in batch.columns if one in schema.by_id]
    return batch if len(known) == len(batch.columns) else batch.select(known)


def _last_of_each_key(batch: Batch, primary: FieldSchema) -> Batch:
    keys = key_list(batch_keys(batch, primary.id))
    last = {key: offset for offset, key in enumerate(keys)}
    if len(last) == batch.rows:
        return batch
    return batch.take(np.array(sorted(last.values()), np.int64))


def _typed(keys: Sequence[int | str], primary: FieldSchema) -> Keys:
    if primary.type is DataType.INT64:
        return np.array(keys, np.int64)
    return [str(key) for key in keys]
