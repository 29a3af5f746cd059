"""A copy of a collection of another server, any that speaks Milvus's gRPC: partition by partition, by primary key.

pymilvus's query iterator reads; each batch is an upsert, or where the database gives the keys an insert under a key of
its own (`node/keyed.py`), so that a batch that was on its way when the copy broke off may come again. The state is the
partition that is being read, and the greatest primary key of it that is here. Partitions and aliases come too. This is
the door to pymilvus, which only this needs: install `annulus[copy]`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from node.bulk.importing import KEY, batch_rows_for
from node.bulk.partitions import PARTITIONS, Partitions, named_partitions
from node.bulk.remote import Remote
from node.bulk.schemas import schema_of
from storage.errors import InvalidParameter
from storage.schema import CollectionSchema, DataType

LEVELS: Final = ("Strong", "Session", "Bounded", "Eventually")


class Origin:
    """The server that is copied from. Raises InvalidParameter if there is no pymilvus, or it can not be reached."""

    def __init__(self, address: str, *, database: str = "default", token: str = "", ca_path: str = "") -> None:
        """Connect; over TLS to an address with https://.

        ca_path  PEM file with what signed the server's certificate; "" for the system's authorities
        """
        try:
            from pymilvus import MilvusClient, MilvusException
        except ImportError:
            raise InvalidParameter("copying needs pymilvus: pip install 'annulus[copy]'") from None
        self.failure: type[Exception] = MilvusException
        try:
            trusted = {"secure": True, "server_pem_path": ca_path} if ca_path else {}
            self._client = MilvusClient(address, token=token, db_name=database, **trusted)
        except MilvusException as error:
            raise InvalidParameter(f"{address} does not answer as a Milvus server: {error}") from None

    def collections(self) -> list[str]:
        return sorted(self._client.list_collections())

    def create_request(self, collection: str) -> dict[str, Any]:
        """Return the body of `collections/create` for a collection like this one."""
        found = self._client.describe_collection(collection)
        indexes = []
        for name in self._client.list_indexes(collection):
            one = dict(self._client.describe_index(collection, name))
            known = {"field_name", "index_name", "index_type", "metric_type", "total_rows", "indexed_rows",
                     "pending_index_rows", "state"}  # fmt: skip
            indexes.append(
                {
                    "fieldName": one["field_name"],
                    "indexName": one["index_name"],
                    "indexType": one.get("index_type", "AUTOINDEX"),
                    "metricType": one.get("metric_type", ""),
                    "params": {key: value for key, value in one.items() if key not in known and value is not None},
                }
            )
        level = found.get("consistency_level", 2)
        body: dict[str, Any] = {
            "collectionName": collection,
            "description": found.get("description", ""),
            "consistencyLevel": LEVELS[level] if isinstance(level, int) and level < len(LEVELS) else "Bounded",
            "properties": {
                key: str(value) for key, value in (found.get("properties") or {}).items() if key != "timezone"
            },
            "params": {"shardsNum": found.get("num_shards", 1)},
            "schema": {
                "autoID": bool(found.get("auto_id")),
                "enableDynamicField": bool(found.get("enable_dynamic_field")),
                "fields": [_field(one) for one in found["fields"] if not one.get("is_dynamic")],
                "functions": [
                    {
                        "name": one["name"],
                        "type": getattr(one["type"], "name", str(one["type"])),
                        "description": one.get("description", ""),
                        "inputFieldNames": list(one["input_field_names"]),
                        "outputFieldNames": list(one["output_field_names"]),
                        "params": dict(one.get("params") or {}),
                    }
                    for one in found.get("functions") or ()
                ],
            },
            "indexParams": indexes,
        }
        keyed = any(one.get("is_partition_key") for one in found["fields"])
        if keyed:
            body["params"]["partitionsNum"] = found.get("num_partitions", 16)
        names = named_partitions(self._client.list_partitions(collection), keyed=keyed)
        return body | ({PARTITIONS: names} if names else {})

    def aliases(self, collection: str) -> list[str]:
        return sorted(self._client.list_aliases(collection)["aliases"])

    def rows(self, collection: str, partition: str, filter_text: str, batch_rows: int, fields: Sequence[str]) -> Any:
        """Return an iterator of pymilvus: `next()` gives rows, none at the end. "" is all partitions."""
        return self._client.query_iterator(
            collection,
            batch_size=batch_rows,
            filter=filter_text,
            output_fields=list(fields),
            partition_names=[partition] if partition else None,
        )


def _field(given: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "fieldName": given["name"],
        "dataType": _type_name(given["type"]),
        "isPrimary": bool(given.get("is_primary")),
        "isPartitionKey": bool(given.get("is_partition_key")),
        "isClusteringKey": bool(given.get("is_clustering_key")),
        "nullable": bool(given.get("nullable")),
        "description": given.get("description", ""),
        "elementTypeParams": dict(given.get("params") or {}),
    }
    if made["dataType"] == "Array":
        made["elementDataType"] = _type_name(given["element_type"])
    default = given.get("default_value")
    if default is not None and (kind := default.WhichOneof("data")):
        made["defaultValue"] = getattr(default, kind)
    return made


def _type_name(kind: Any) -> str:
    name = str(getattr(kind, "name", kind))
    if name not in DataType.__members__:  # which has the same names
        raise InvalidParameter(f"a field of type {name} can not be copied: this server has no such type")
    return str(DataType[name])


class Copier:
    """Copies one collection, or goes on with what the state file says. `noted` is told how many rows are here."""

    def __init__(
        self,
        origin: Origin,
        remote: Remote,
        collection: str,
        *,
        state_path: str,
        noted: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._origin = origin
        self._remote = remote
        self._collection = collection
        self._path = state_path
        self._noted = noted
        self._partitions = Partitions(remote, collection)
        self.rows = 0
        self._at = ""
        """The partition that is being copied; "" where they are not told apart."""
        self._last: Any = None
        self._name = f"copy-{secrets.token_hex(8)}"

    def run(self, *, resume: bool) -> None:
        """Raises Refused, Unreachable, InvalidParameter, or the origin's failure."""
        body = self._origin.create_request(self._collection)
        schema = schema_of(body)
        if resume:
            self._load()
        elif self._remote.call("/collections/has", {"collectionName": self._collection})["has"]:
            raise InvalidParameter(f"the collection {self._collection} is here already: drop it, or --resume")
        else:
            self._save()
            self._remote.call("/collections/create", body)
        for partition in body.get(PARTITIONS, [""]):
            if partition < self._at:
                continue
            if partition != self._at:
                self._at, self._last = partition, None
                self._partitions.ensure(partition)
            self._copy_rows(schema)
        for alias in self._origin.aliases(self._collection):
            self._remote.call("/aliases/create", {"collectionName": self._collection, "aliasName": alias})
        os.remove(self._path)

    def _copy_rows(self, schema: CollectionSchema) -> None:
        """Copy the rows of the partition that are not here yet."""
        primary = schema.primary
        fields = [one.name for one in schema.user_fields if one.id not in schema.computed]
        fields += ["$meta"] if schema.dynamic is not None else []
        if self._last is None:
            smallest = -(1 << 63)
            filter_text = f"{primary.name} >= {smallest}" if primary.type is DataType.INT64 else f'{primary.name} >= ""'
        else:
            filter_text = f"{primary.name} > {json.dumps(self._last, ensure_ascii=False)}"
        iterator = self._origin.rows(self._collection, self._at, filter_text, batch_rows_for(schema), fields)
        try:
            while rows := iterator.next():
                self._write([_row(one, schema) for one in rows], rows[-1][primary.name], schema)
        finally:
            iterator.close()

    def _write(self, rows: list[dict[str, Any]], last: Any, schema: CollectionSchema) -> None:
        body = {"collectionName": self._collection, "data": rows}
        if self._at:
            body["partitionName"] = self._at
        if schema.primary.auto_id:
            self._remote.call("/entities/insert", body, headers={KEY: f"{self._name}/{self.rows}"})
        else:
            self._remote.call("/entities/upsert", body)
        self.rows += len(rows)
        self._last = last
        self._save()
        self._noted(self.rows)

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as file:
                found = json.load(file)
            self._name, self.rows, self._last = str(found["name"]), int(found["rows"]), found["last"]
            self._at = str(found["partition"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidParameter(f"{self._path} is no state of a copy: {error}") from None

    def _save(self) -> None:
        with open(f"{self._path}.new", "w", encoding="utf-8") as file:
            state = {"name": self._name, "rows": self.rows, "partition": self._at, "last": self._last}
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self._path}.new", self._path)


def _row(given: Mapping[str, Any], schema: CollectionSchema) -> dict[str, Any]:
    """Return a row of pymilvus as the API takes it in CBOR."""
    row: dict[str, Any] = {}
    for name, value in given.items():
        one = schema.by_name.get(name)
        if one is not None and (one.auto_id or one.dynamic):
            continue
        if one is not None and value is not None:
            if one.type is DataType.SPARSE_FLOAT_VECTOR:
                value = {str(term): float(weight) for term, weight in value.items()}
            elif one.type.is_vector:
                value = _vector(value)
            elif one.type is DataType.ARRAY:
                value = list(value)
        row[name] = value
    return row


def _vector(value: Any) -> Any:
    """Return bytes, or numbers, in whatever form pymilvus gives them."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
        return value[0]
    if isinstance(value, bytes):
        return value
    if hasattr(value, "tobytes"):
        return value.tobytes()
    return [one if isinstance(one, int) else float(one) for one in value]
