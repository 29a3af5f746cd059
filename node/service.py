"""What a node can do for a client: the one layer that every client protocol calls.

REST and gRPC translate their requests into these calls and these results back; neither holds logic. All names are
checked here, all errors are of `storage.errors`. Vectors and rows travel as `Batch`es both ways.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.columns import Batch
from storage.fusion import GroupScorer, Ranker
from storage.schema import CollectionSchema, FieldSchema, FunctionSchema
from storage.types import Tick
from storage.vectors import Vectors

if TYPE_CHECKING:
    from node.access import AccessService


class Consistency(StrEnum):
    """How fresh a read is; Milvus's levels."""

    STRONG = "Strong"
    SESSION = "Session"
    BOUNDED = "Bounded"
    EVENTUALLY = "Eventually"
    CUSTOMIZED = "Customized"


class LoadState(StrEnum):
    NOT_LOADED = "LoadStateNotLoad"
    LOADING = "LoadStateLoading"
    LOADED = "LoadStateLoaded"


class IndexState(StrEnum):
    FINISHED = "Finished"
    IN_PROGRESS = "InProgress"
    UNISSUED = "Unissued"
    FAILED = "Failed"


@dataclass(frozen=True)
class IndexRequest:
    """An index to build: `params` holds everything the client gave beside type and metric, values as given."""

    field_name: str
    index_name: str = ""
    index_type: str = "AUTOINDEX"
    metric_type: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CollectionRequest:
    """A collection to create. Field ids are not given yet. `load` asks for it to be loaded once indexed."""

    name: str
    fields: Sequence[FieldSchema]
    functions: Sequence[FunctionSchema] = ()
    dynamic: bool = False
    description: str = ""
    shards: int = 1
    partitions: int = 16
    """Number of hidden partitions; used only with a partition key."""
    consistency: Consistency = Consistency.BOUNDED
    properties: Mapping[str, str] = field(default_factory=dict)
    indexes: Sequence[IndexRequest] = ()
    load: bool = False


@dataclass(frozen=True)
class IndexInfo:
    index_name: str
    field_name: str
    index_type: str
    metric_type: str
    params: Mapping[str, str]
    """As the client gave them, for `describe`."""
    state: IndexState
    total_rows: int
    indexed_rows: int
    pending_rows: int
    fail_reason: str = ""


@dataclass(frozen=True)
class CollectionInfo:
    database: str
    name: str
    collection_id: int
    schema: CollectionSchema
    description: str
    shards: int
    partitions: Sequence[str]
    aliases: Sequence[str]
    indexes: Sequence[IndexInfo]
    consistency: Consistency
    properties: Mapping[str, str]
    load_state: LoadState
    load_percent: int
    created_tick: Tick


@dataclass(frozen=True)
class WriteResult:
    """`primary_keys` in the order of the request's rows (int64 array or list of str); `rows` really written."""

    rows: int
    primary_keys: npt.NDArray[np.int64] | Sequence[str]


@dataclass(frozen=True)
class Order:
    """A field that rows are ordered by."""

    field_name: str
    descending: bool = False
    nulls_first: bool | None = None
    """None: as Milvus does, first where the order is descending."""


@dataclass(frozen=True)
class ReadOptions:
    """What all reads share."""

    partitions: Sequence[str] = ()
    """Names; none means all."""
    filter: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Values of the filter's {templates}."""
    output_fields: Sequence[str] = ()
    """Names, "*", "count(*)", dynamic keys; resolved by the service."""
    consistency: Consistency | None = None
    """None: the collection's."""
    staleness_s: float | None = None
    """How far behind a Bounded read may be; None: the collection's, or 5 s."""
    ignore_growing: bool = False
    explain: bool = False
    order_by: Sequence[Order] = ()
    """Of a query: its rows come in this order instead of the primary key's. Of a search: each query's hits do."""
    group_by: Sequence[str] = ()
    """Of a query: fields by whose values rows are aggregated; the output fields are these and aggregates."""


@dataclass(frozen=True)
class Rows:
    """Result rows: `batch` has the primary key, every asked field, and `$meta` when dynamic keys were asked for.

    `fields` are the declared fields to show, in order; `dynamic_keys` is None for "all keys of $meta", else the keys
    asked for (may be empty: show none).
    """

    schema: CollectionSchema
    batch: Batch
    fields: Sequence[str]
    dynamic_keys: Sequence[str] | None = ()
    count: int | None = None
    """Set for count(*) only; then the batch is empty."""
    groups: Sequence[Mapping[str, Any]] | None = None
    """Set for aggregates only, a row of names and values for each group; then the batch is empty."""
    explain: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class SearchResult:
    """Rows of all queries one after the other; `topks[i]` of them belong to query i; `scores` as the API shows them."""

    rows: Rows
    scores: npt.NDArray[np.float32]
    topks: Sequence[int]


@dataclass(frozen=True)
class SearchRequest:
    """Exactly one of `vectors` and `ids` (primary keys whose stored vectors are the queries)."""

    vectors: Vectors | None
    """(nq, dim) float32 for dense fields, (nq, dim / 8) uint8 for BinaryVector, SparseRows for SparseFloatVector."""
    ids: Sequence[int | str] | None = None
    anns_field: str = ""
    limit: int = 100
    offset: int = 0
    metric_type: str = ""
    """Empty, or checked against the index's."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """ef, nprobe, level, radius, range_filter, values as the client gave them."""
    round_decimal: int = -1
    group_by_field: str = ""
    """If given, `limit` and `offset` count groups, the rows with one value of this field."""
    group_size: int = 1
    """Rows of each group."""


@dataclass(frozen=True)
class SubSearch:
    """One of the searches of a hybrid search; its `request` has vectors."""

    request: SearchRequest
    filter: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Values of the filter's {templates}."""


@dataclass(frozen=True)
class HybridRequest:
    """Searches, of equally many query vectors each, whose hits are ranked anew (`storage.fusion`)."""

    searches: Sequence[SubSearch]
    ranker: Ranker
    limit: int = 100
    offset: int = 0
    round_decimal: int = -1
    group_by_field: str = ""
    """If given, limit and offset, also those of the searches, count groups, the rows with one value of this field."""
    group_size: int = 1
    """Rows of each group."""
    group_scorer: GroupScorer = GroupScorer.MAX


class Operation(Protocol):
    """What operators ask of the nodes of a cluster. See `node.nodes.Nodes`."""

    async def entry(self) -> Mapping[str, str]:
        """Return {"node", "peer"}: where a node that wants to join proves itself."""
        ...

    async def describe(self) -> Mapping[str, Any]: ...
    async def drain(self, name: str, *, undo: bool = False, force: bool = False) -> None: ...
    async def remove(self, name: str) -> None: ...
    async def replace(self, old: str, new: str) -> None: ...
    async def pause(self, paused: bool) -> None: ...


class Service(Protocol):
    """All calls raise errors of `storage.errors`; an alias names its collection wherever Milvus lets it."""

    # databases
    async def create_database(self, name: str, properties: Mapping[str, str]) -> None: ...
    async def drop_database(self, name: str) -> None: ...
    async def list_databases(self) -> list[str]: ...
    async def describe_database(self, name: str) -> tuple[int, Mapping[str, str]]:
        """Return (database id, properties)."""
        ...

    async def alter_database(self, name: str, changed: Mapping[str, str], dropped: Sequence[str]) -> None: ...

    # collections
    async def create_collection(self, database: str, request: CollectionRequest) -> None: ...
    async def list_collections(self, database: str) -> list[str]: ...
    async def has_collection(self, database: str, name: str) -> bool: ...
    async def describe_collection(self, database: str, name: str) -> CollectionInfo: ...
    async def rename_collection(self, database: str, name: str, new_name: str, new_database: str) -> None: ...
    async def drop_collection(self, database: str, name: str) -> None: ...
    async def truncate_collection(self, database: str, name: str) -> None: ...
    async def load(self, database: str, name: str, partitions: Sequence[str] = ()) -> None: ...
    async def release(self, database: str, name: str, partitions: Sequence[str] = ()) -> None: ...
    async def load_state(self, database: str, name: str, partitions: Sequence[str] = ()) -> tuple[LoadState, int]: ...
    async def row_count(self, database: str, name: str, partition: str = "") -> int:
        """Return the exact number of live rows."""
        ...

    async def flush(self, database: str, name: str) -> None:
        """Return when everything inserted before the call is sealed and on disk."""
        ...

    async def flush_all(self) -> None:
        """Return when everything inserted before the call, into any collection, is sealed and on disk."""
        ...

    async def once(self, key: str, request: str, work: Callable[[], Awaitable[object]]) -> bool:
        """Do `work`, changes of the catalogue that a client asked for under a key; return whether it was done already.

        request  a digest of all that was asked: the key is of that request for as long as it is remembered

        Raises what the request was refused for, the first time and again; InvalidParameter if the key is another's.
        """
        ...

    async def compact(self, database: str, name: str) -> int:
        """Start compaction and return its job id (> 0)."""
        ...

    async def compaction_state(self, job_id: int) -> tuple[str, int, int]:
        """Return (Executing or Completed, plans running, plans done)."""
        ...

    async def alter_collection(
        self, database: str, name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None: ...

    async def add_field(self, database: str, name: str, field: FieldSchema) -> None:
        """Add a field, whose id is not given yet: rows that are there have null or its default."""
        ...

    async def drop_field(self, database: str, name: str, field_name: str, field_id: int = 0) -> None:
        """Drop the field of this name, or if that is empty of this id, and its index."""
        ...

    async def alter_field(self, database: str, name: str, field_name: str, params: Mapping[str, str]) -> None:
        """Change type parameters of a field: max_length and max_capacity, which only grow, and mmap.enabled."""
        ...

    async def describe_segments(self, collection_id: int, segment_ids: Sequence[int]) -> list[Mapping[str, Any]]: ...

    # partitions
    async def create_partition(self, database: str, collection: str, partition: str) -> None: ...
    async def drop_partition(self, database: str, collection: str, partition: str) -> None: ...
    async def has_partition(self, database: str, collection: str, partition: str) -> bool: ...
    async def list_partitions(self, database: str, collection: str) -> list[str]: ...

    # indexes
    async def create_index(self, database: str, collection: str, request: IndexRequest) -> None: ...
    async def drop_index(self, database: str, collection: str, index_name: str) -> None: ...
    async def describe_index(self, database: str, collection: str, index_name: str) -> IndexInfo: ...
    async def list_indexes(self, database: str, collection: str) -> list[str]: ...
    async def alter_index(
        self, database: str, collection: str, index_name: str, changed: Mapping[str, str], dropped: Sequence[str]
    ) -> None: ...

    # aliases
    async def create_alias(self, database: str, collection: str, alias: str) -> None: ...
    async def alter_alias(self, database: str, collection: str, alias: str) -> None: ...
    async def drop_alias(self, database: str, alias: str) -> None: ...
    async def describe_alias(self, database: str, alias: str) -> str:
        """Return the collection's name."""
        ...

    async def list_aliases(self, database: str, collection: str = "") -> list[str]: ...

    # rows
    async def collection_schema(self, database: str, collection: str, *, newest: bool = False) -> CollectionSchema:
        """Return the schema against which rows are decoded; cheap, called once per write.

        newest  of the newest catalogue that can be had, which may take asking another node
        """
        ...

    async def insert(
        self, database: str, collection: str, batch: Batch, partition: str = "", *, schema_version: int = 0
    ) -> WriteResult:
        """`batch` has every field but an autoID primary key; values are checked against the schema already.

        schema_version  of the schema for which the rows were decoded: raises SchemaMismatch if it is an old one and no
                        row was written, so that they can be decoded again; with 0 they are fitted to the newest
        """
        ...

    async def upsert(
        self,
        database: str,
        collection: str,
        batch: Batch,
        partition: str = "",
        *,
        partial: bool = False,
        schema_version: int = 0,
    ) -> WriteResult:
        """`batch` has the primary key always; with `partial` any subset of the other fields."""
        ...

    async def delete(
        self, database: str, collection: str, filter: str, params: Mapping[str, Any], partition: str = ""
    ) -> int:
        """Return how many rows were deleted."""
        ...

    async def get(self, database: str, collection: str, ids: Sequence[int | str], options: ReadOptions) -> Rows: ...
    async def query(self, database: str, collection: str, options: ReadOptions, *, limit: int, offset: int) -> Rows: ...
    async def search(
        self, database: str, collection: str, request: SearchRequest, options: ReadOptions
    ) -> SearchResult: ...
    async def hybrid_search(
        self, database: str, collection: str, request: HybridRequest, options: ReadOptions
    ) -> SearchResult:
        """Return the best rows of several searches, all of one snapshot. The options' own filter is not looked at."""
        ...

    # operations
    async def status(self) -> Mapping[str, Any]:
        """Return collections, shards, segments, sizes and log positions as plain data."""
        ...

    @property
    def nodes(self) -> Operation: ...
    @property
    def imports(self) -> Any:
        """The import jobs of all nodes: `node.bulk.jobs_anywhere.JobsAnywhere`."""
        ...

    @property
    def access(self) -> AccessService: ...

    async def check_cluster(self, *, begin: bool) -> Mapping[str, Any]:
        """Return how far the round of healing is that was asked for here (`node/cluster_check.py`), or was the last.

        begin  begin one, unless one runs
        """
        ...
