"""Writes: rows to partitions, partitions to shards, one message a shard and partition, acknowledged when applied.

One request is atomic per shard, not across shards. Retries inside the node repeat a message under its own producer
and sequence, so a write whose outcome was unknown is never applied twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from cluster.catalog import DEFAULT_PARTITION, Collection
from cluster.message import Delete, Insert
from cluster.route import hash_keys, split
from node.node import Node
from node.service import WriteResult
from storage.columns import NUMPY_TYPES, ArrayColumn, Batch, Column, ScalarColumn, StringColumn
from storage.errors import BadRow, Conflict, InvalidParameter
from storage.key_lookup import Keys, batch_keys, key_list
from storage.schema import CollectionSchema, DataType, FieldSchema
from storage.strings import StringArray
from storage.types import TICK_MAX, PartitionId, Tick
from storage.view import SegmentView

CONFLICT_RETRIES_MAX = 16


class Writer:
    """Turns batches into messages. One per node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def insert(self, collection: Collection, batch: Batch, partition: str) -> WriteResult:
        """Add the rows; return when they are durable and visible."""
        self._check(batch)
        batch, keys = self._with_keys(collection, batch)
        outcomes = await self._send(collection, batch, self._partitions_of(collection, batch, partition))
        rows = sum(int(one["rows"]) for one in outcomes)
        self._node.metrics.rows_inserted(rows)
        return WriteResult(rows, keys)

    async def upsert(self, collection: Collection, batch: Batch, partition: str, *, partial: bool) -> WriteResult:
        """Replace the rows with these primary keys; of several rows with one key the last counts."""
        self._check(batch)
        primary = collection.schema.primary
        if primary.id not in batch.columns:
            raise BadRow(f"upsert needs the primary key field {primary.name} in every row")
        if partial:
            return await self._upsert_partial(collection, _last_of_each_key(batch, primary), partition)
        batch = _last_of_each_key(batch, primary)
        if primary.auto_id:
            return await self._upsert_generated(collection, batch, partition)
        keys = batch_keys(batch, primary.id)
        groups = self._partitions_of(collection, batch, partition)
        outcomes = await self._send(collection, batch, groups, replace_rows=True)
        rows = sum(int(one["rows"]) for one in outcomes)
        self._node.metrics.rows_inserted(rows)
        return WriteResult(rows, keys)

    async def _upsert_generated(self, collection: Collection, batch: Batch, partition: str) -> WriteResult:
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
            collection, batch, groups, replace_rows=single, delete_keys=old_keys if single else None
        )
        if not single:
            await self.delete_keys(collection, _typed(old_keys, primary), None)
        rows = sum(int(one["rows"]) for one in outcomes)
        self._node.metrics.rows_inserted(rows)
        return WriteResult(rows, keys)

    async def delete_keys(self, collection: Collection, keys: Keys, partitions: Sequence[PartitionId] | None) -> int:
        """Delete the rows with these primary keys; return how many there were."""
        self._node.check_journal()
        shards = collection.shards
        messages = []
        for shard_id, offsets in zip(shards, split(keys, len(shards)), strict=True):
            if len(offsets) == 0:
                continue
            if isinstance(keys, np.ndarray):
                mine: bytes | list[str] = keys[offsets].astype("<i8").tobytes()
            else:
                mine = [keys[i] for i in offsets.tolist()]
            messages.append((shard_id, Delete(collection.collection_id, mine, partitions)))
        outcomes = await asyncio.gather(
            *(self._node.shards[shard_id].change(message) for shard_id, message in messages)
        )
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
    ) -> list[dict[str, Any]]:
        """Propose one message per virtual channel that has rows; return their outcomes."""
        channels = split(batch_keys(batch, collection.schema.primary.id), len(collection.shards))
        owner = np.empty(batch.rows, np.int64)
        for channel, offsets in enumerate(channels):
            owner[offsets] = channel
        proposals = []
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
            )
            whole = len(rows) == batch.rows and len(parts) == 1
            body = (batch if whole else batch.take(rows)).to_bytes()
            proposals.append(self._node.shards[shard_id].change(message, body))
        return list(await asyncio.gather(*proposals))

    def _check(self, batch: Batch) -> None:
        self._node.check_writable()
        if batch.rows == 0:
            raise InvalidParameter("no rows were given")

    def _with_keys(self, collection: Collection, batch: Batch) -> tuple[Batch, Keys]:
        """Return the batch with a primary key column, and the keys."""
        primary = collection.schema.primary
        if primary.id in batch.columns:
            return batch, batch_keys(batch, primary.id)
        if not primary.auto_id:
            raise BadRow(f"field {primary.name} is the primary key and is missing")
        first = self._node.hybrid.stamp(batch.rows)
        ids = np.arange(first, first + batch.rows, dtype=np.int64)
        column: Column = ScalarColumn(ids)
        if primary.type is DataType.VARCHAR:
            column = StringColumn(StringArray.from_strings([str(one) for one in ids.tolist()]))
        batch = Batch({primary.id: column, **batch.columns}, batch.rows)
        return batch, batch_keys(batch, primary.id)

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
        ids = [collection.partitions[name] for name in sorted(collection.partitions, key=partition_number)]
        owner = hash_keys(batch_keys(batch, key.id)) % np.uint64(len(ids))
        return [
            (partition_id, offsets)
            for number, partition_id in enumerate(ids)
            if len(offsets := np.flatnonzero(owner == np.uint64(number)))
        ]

    # partial updates

    async def _upsert_partial(self, collection: Collection, batch: Batch, partition: str) -> WriteResult:
        """Merge the given fields into the rows that exist; whoever changes them meanwhile makes us read again."""
        for _ in range(CONFLICT_RETRIES_MAX):
            views, expire_before = self._views(collection)
            merged, expected = await self._node.read(_merge_partial, collection.schema, batch, views, expire_before)
            groups = self._partitions_of(collection, merged, partition)
            try:
                outcomes = await self._send(collection, merged, groups, replace_rows=True, expected=expected)
            except Conflict:
                continue
            return WriteResult(
                sum(int(one["rows"]) for one in outcomes), batch_keys(merged, collection.schema.primary.id)
            )
        raise Conflict("the rows are being changed by others all the time; try again")

    def _views(self, collection: Collection) -> tuple[list[SegmentView], Tick]:
        """Return what is there now, and the tick before which rows have expired."""
        views: list[SegmentView] = []
        expire_before = Tick(0)
        for shard_id in sorted(set(collection.shards)):
            state = self._node.shards[shard_id].machine.collection(collection.collection_id)
            views += [one.view() for one in state.segments()]
            expire_before = state.expire_before(self._node.hybrid.stamp())
        return views, expire_before


def _merge_partial(
    schema: CollectionSchema, batch: Batch, views: Sequence[SegmentView], expire_before: Tick
) -> tuple[Batch, npt.NDArray[np.int64]]:
    """Return (whole rows, for each the insert tick of the row it replaces, 0 if it is new)."""
    keys = batch_keys(batch, schema.primary.id)
    newest: dict[int | str, tuple[int, SegmentView, int]] = {}
    for view in views:
        offsets = view.find(keys, TICK_MAX, expire_before)
        found = key_list(batch_keys(view.fetch(offsets, [schema.primary.id]), schema.primary.id))
        for offset, key in zip(offsets.tolist(), found, strict=True):
            inserted = int(view.ticks[offset])
            if key not in newest or newest[key][0] < inserted:
                newest[key] = (inserted, view, offset)
    wanted = key_list(keys)
    expected = np.array([newest[key][0] if key in newest else 0 for key in wanted], np.int64)
    missing = [one for one in schema.fields if one.id not in batch.columns]
    fresh = [key for key in wanted if key not in newest]
    required = [one.name for one in missing if not one.nullable and one.default is None and not one.dynamic]
    if fresh and required:
        raise BadRow(f"row {fresh[0]} does not exist, so every field must be given: {', '.join(required)} missing")
    columns: dict[Any, Column] = dict(batch.columns)
    for one in missing:
        pieces = []
        for key in wanted:
            if key in newest:
                _, view, offset = newest[key]
                pieces.append(view.fetch(np.array([offset], np.int64), [one.id]))
            else:
                pieces.append(Batch({one.id: absent_column(one, 1)}, 1))
        columns[one.id] = Batch.concat(pieces).columns[one.id]
    if schema.dynamic is not None and schema.dynamic.id in batch.columns:
        columns[schema.dynamic.id] = _merge_documents(schema.dynamic, batch, [newest.get(key) for key in wanted])
    return Batch(columns, batch.rows), expected


def _merge_documents(
    dynamic: FieldSchema, batch: Batch, replaced: Sequence[tuple[int, SegmentView, int] | None]
) -> StringColumn:
    """Return the rows' dynamic keys over those of the rows they replace; a null clears a key."""
    merged = []
    for given, old in zip(batch.columns[dynamic.id].to_list(), replaced, strict=True):
        known: dict[str, Any] = {}
        if old is not None:
            _, view, offset = old
            (text,) = view.fetch(np.array([offset], np.int64), [dynamic.id]).columns[dynamic.id].to_list()
            known = orjson.loads(text) if text else {}
        changed = orjson.loads(given) if given else {}
        kept = {key: value for key, value in {**known, **changed}.items() if value is not None}
        merged.append(orjson.dumps(kept).decode())
    return StringColumn(StringArray.from_strings(merged))


def absent_column(one: FieldSchema, rows: int) -> Column:
    """Return a column of rows that say nothing about a field: its default, or null."""
    valid = None if one.default is not None else np.zeros(rows, np.bool_)
    if one.type in (DataType.VARCHAR, DataType.JSON):
        text = "" if one.default is None else str(one.default)
        return StringColumn(StringArray.from_strings([text] * rows), valid)
    if one.type is DataType.ARRAY:
        items: ScalarColumn | StringColumn = StringColumn(StringArray.from_strings([]))
        if one.element is not DataType.VARCHAR:
            assert one.element is not None
            items = ScalarColumn(np.zeros(0, NUMPY_TYPES[one.element]))
        return ArrayColumn(np.zeros(rows + 1, np.int64), items, valid)
    return ScalarColumn(np.full(rows, 0 if one.default is None else one.default, NUMPY_TYPES[one.type]), valid)


def partition_number(name: str) -> int:
    """Return the number at the end of a hidden partition's name (`_default_3`)."""
    _, _, number = name.rpartition("_")
    return int(number) if number.isdigit() else 0


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
