"""Every route of the API in one table, with its request's shape: what the server serves and what the description shows.

Routes of Milvus that are not served answer 3000 with the sentence of their group, so that a client learns at once that
it is not its request that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from node.api.limits import SEARCHES_MARKS_MAX
from node.api.requests import Field, Kind, Shape

BASE: Final = "/v2/vectordb"
OWN_BASE: Final = "/v2/annulus"
"""Of routes that Milvus has not."""


@dataclass(frozen=True)
class Route:
    """One POST route. `handler` names the function that serves it; none means that it answers `unsupported`."""

    path: str
    shape: Shape
    doc: str
    handler: str = ""
    data: str = "{}"
    """What `data` of a success holds, for the description."""
    mutates: bool = False
    """A mutation is never cancelled half way: when its time is up it goes on, and the client is told so."""
    plan: str = ""
    """What kind of plan a filter of this route makes, for the error text."""
    unsupported: str = ""
    base: str = BASE

    @property
    def full_path(self) -> str:
        return self.base + self.path

    @property
    def takes_key(self) -> bool:
        """Whether a client may name the request by an idempotency key: it changes the catalogue, and answers {}."""
        return self.mutates and self.handler not in _NOT_OF_THE_CATALOGUE


_NOT_OF_THE_CATALOGUE: Final = frozenset(
    {
        *("insert", "upsert", "delete", "flush", "flush_all", "compact"),
        *("create_user", "update_password"),  # what is remembered under a key could be used to guess the password
        *("create_api_key", "rotate_api_key", "revoke_api_key"),  # which answer a secret, or are repeated safely
    }
)


def _text(name: str, doc: str, *, required: bool = False, default: str = "") -> Field:
    return Field(name, Kind.TEXT, doc, None if required else default, required)


DB = _text("dbName", "database; else the DB-Name header, else `default`")
COLLECTION = _text("collectionName", "collection, by name or alias", required=True)
PARTITION = _text("partitionName", "partition", required=True)
PARTITION_OPTIONAL = _text("partitionName", "partition to write to; `_default` if not given")
PARTITIONS = Field("partitionNames", Kind.TEXTS, "partitions; all if not given", ())
FILTER = _text("filter", "boolean expression over fields")
EXPR_PARAMS = Field("exprParams", Kind.MAP, "values of the filter's {templates}", {})
OUTPUT = Field("outputFields", Kind.TEXTS, "fields and dynamic keys to return; `*` for all, `count(*)` for the number")
CONSISTENCY = _text("consistencyLevel", "Strong, Session, Bounded, Eventually; the collection's if not given")
STALENESS = Field(
    "gracefulTime",
    Kind.INT64,
    "milliseconds that a Bounded read may be behind; the collection's, or 5000, if not given",
)
EXPLAIN = Field("explain", Kind.BOOL, "also return how each segment was searched and why", False)
PROPERTIES = Field("properties", Kind.MAP, "properties by name; values become text", {})
PROPERTY_KEYS = Field("propertyKeys", Kind.TEXTS, "names of properties to drop", ())

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_ROW = {"type": "object", "additionalProperties": True}
ROWS = Field(
    "data",
    Kind.RAW,
    "rows, each an object of field -> value. As CBOR: the same with FloatVector as a byte string of little-endian "
    "float32, or a map of columns, field -> list of values or byte string of all rows' values, little-endian, in the "
    "field's own width (or {values, valid} with one byte per row, 0 for null; of VarChar {values, lengths}, UTF-8 and "
    "uint32)",
    required=True,
    schema={"anyOf": [{"type": "array", "items": _ROW}, _ROW]},
    takes_views=True,
)
VECTORS = Field(
    "data",
    Kind.RAW,
    "query vectors. As CBOR: a list whose vectors may be byte strings of little-endian float32, or one byte string "
    "with all of them",
    schema={"type": "array", "items": _NUMBERS},
)
IDS = Field(
    "id",
    Kind.RAW,
    "one primary key or a list; Int64 keys may be text",
    required=True,
    schema={
        "anyOf": [
            {"type": ["integer", "string"]},
            {"type": "array", "items": {"type": ["integer", "string"]}},
        ]
    },
)

INDEX_PARAM = Shape(
    "IndexParam",
    (
        _text("fieldName", "field to index", default=""),
        _text("indexName", "name of the index; the field's if not given"),
        _text("indexType", "AUTOINDEX, FLAT, HNSW, IVF_FLAT, ...; may also be params.index_type"),
        _text("metricType", "L2, IP or COSINE"),
        Field("params", Kind.MAP, "build parameters: M, efConstruction, nlist, ...", {}),
    ),
)
FIELD_SCHEMA = Shape(
    "FieldSchema",
    (
        _text("fieldName", "name"),
        _text("dataType", "type, exact case"),
        _text("elementDataType", "type of an Array's elements"),
        Field("isPrimary", Kind.BOOL, "the primary key", False),
        Field("isPartitionKey", Kind.BOOL, "rows are spread over partitions by this field", False),
        Field("isClusteringKey", Kind.BOOL, "kept for description", False),
        Field("nullable", Kind.BOOL, "null is a value", False),
        Field("defaultValue", Kind.ANY, "value of rows that give none"),
        Field("elementTypeParams", Kind.MAP, "dim, max_length (bytes), max_capacity, ...", {}),
        Field("typeParams", Kind.MAP, "the same, under its other name", {}),
        _text("description", "for people"),
        Field("fields", Kind.ANY, "struct fields: not supported"),
        _text("externalField", "not supported"),
    ),
)
NEW_FIELD = Shape(
    "FieldSchema",
    tuple(replace(one, required=one.name in ("fieldName", "dataType")) for one in FIELD_SCHEMA.fields),
)
FUNCTION = Shape(
    "FunctionSchema",
    (
        _text("name", "name of the function"),
        _text("type", "BM25"),
        Field("inputFieldNames", Kind.TEXTS, "one field: VarChar with enable_analyzer", ()),
        Field("outputFieldNames", Kind.TEXTS, "one field: SparseFloatVector, which rows do not give", ()),
        _text("description", "for people"),
        Field("params", Kind.MAP, "kept for description", {}),
    ),
)
SCHEMA = Shape(
    "CollectionSchema",
    (
        Field("autoID", Kind.BOOL, "primary keys are generated", False),
        Field("enableDynamicField", Kind.BOOL, "rows may have keys that are no field", False),
        Field("fields", Kind.OBJECTS, "the fields", (), shape=FIELD_SCHEMA),
        Field("structFields", Kind.ANY, "not supported"),
        Field("functions", Kind.OBJECTS, "what fields are computed of others", (), shape=FUNCTION),
        _text("externalSource", "not supported"),
        _text("externalSpec", "not supported"),
    ),
)
CREATE = Shape(
    "CollectionReq",
    (
        DB,
        _text("collectionName", "name of the new collection", required=True),
        Field("dimension", Kind.INT32, "quick mode: components of the vectors", 0),
        _text("vectorFieldType", "quick mode: FloatVector"),
        _text("metricType", "quick mode: L2, IP or COSINE (default)"),
        _text("idType", "quick mode: Int64 (default) or VarChar (then params.max_length)"),
        Field("autoID", Kind.BOOL, "quick mode: primary keys are generated", False),
        _text("primaryFieldName", "quick mode: `id` if not given"),
        _text("vectorFieldName", "quick mode: `vector` if not given"),
        _text("description", "for people"),
        CONSISTENCY,
        Field(
            "params",
            Kind.MAP,
            "enableDynamicField (quick mode; default true), max_length, shardsNum, partitionsNum, ttlSeconds, "
            "consistencyLevel, partitionKeyIsolation",
            {},
        ),
        PROPERTIES,
        Field("schema", Kind.OBJECT, "schema mode: the fields", shape=SCHEMA),
        Field("indexParams", Kind.OBJECTS, "schema mode: indexes; with them it is loaded too", (), shape=INDEX_PARAM),
    ),
)
RUN_ANALYZER = Shape(
    "RunAnalyzerReq",
    (
        DB,
        Field("text", Kind.TEXTS, "the texts", required=True),
        _text("analyzerParams", "the analyzer, as JSON: standard if not given"),
        Field("withDetail", Kind.BOOL, "offsets, in bytes, and positions too", False),
        Field("withHash", Kind.BOOL, "the number that sparse vectors have for each token too", False),
        _text("collectionName", "instead of analyzerParams, with fieldName: the analyzer of a field"),
        _text("fieldName", "the field"),
        Field("analyzerNames", Kind.TEXTS, "not supported", ()),
    ),
)
_SEARCH_UNSUPPORTED: Final = (
    "functionScore",
    "groupByFields",
    "functionChains",
    "searchAggregation",
)


def _unsupported_fields(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, Kind.ANY, "not supported: answers 3000") for name in names)


_GROUPS: Final = (
    _text("groupingField", "limit and offset count groups: the rows with one value of this field"),
    Field("groupSize", Kind.INT32, "rows of each group, 1 to 10", 1),
    Field("strictGroupSize", Kind.BOOL, "accepted: groups have as many rows as there are, up to groupSize", False),
)
SEARCH = Shape(
    "SearchReqV2",
    (
        DB,
        COLLECTION,
        VECTORS,
        Field("ids", Kind.ANY, "instead of data: primary keys whose stored vectors are the queries"),
        _text("annsField", "vector field; may be left out where there is only one"),
        FILTER,
        Field("limit", Kind.INT32, "hits per query vector, 1 to 16384", 100),
        Field("offset", Kind.INT32, "hits to skip; limit + offset at most 16384", 0),
        OUTPUT,
        PARTITIONS,
        Field(
            "searchParams",
            Kind.MAP,
            "flat or in params: metricType, ef, nprobe, level, radius, range_filter, ignoreGrowing, round_decimal",
            {},
        ),
        Field("params", Kind.MAP, "the same as searchParams.params, under its old name", {}),
        CONSISTENCY,
        STALENESS,
        EXPR_PARAMS,
        EXPLAIN,
        *_GROUPS,
        Field("orderByFields", Kind.TEXTS, "each query's hits come by these, nearest first where they are equal", ()),
        *_unsupported_fields(*_SEARCH_UNSUPPORTED),
    ),
)
SUB_SEARCH = Shape(
    "SubSearchReq",
    (
        VECTORS,
        _text("annsField", "vector field; may be left out where there is only one"),
        FILTER,
        Field("limit", Kind.INT32, "hits of this search, 1 to 16384; needed", 0),
        Field("offset", Kind.INT32, "hits of this search to skip", 0),
        _text("metricType", "checked against the index's"),
        Field("params", Kind.MAP, "ef, nprobe, level, radius, range_filter", {}),
        Field("searchParams", Kind.MAP, "the same, as in a search", {}),
        EXPR_PARAMS,
        *_unsupported_fields("groupingField"),
    ),
)
RERANK = Shape(
    "Rand",
    (
        _text("strategy", "rrf or weighted"),
        Field(
            "params",
            Kind.MAP,
            "rrf: k (60); weighted: weights, norm_score (false); of groups rank_group_scorer: max, sum or avg",
            {},
        ),
    ),
)
HYBRID = Shape(
    "HybridSearchReq",
    (
        DB,
        COLLECTION,
        Field(
            "search",
            Kind.OBJECTS,
            "the searches, with equally many query vectors each",
            None,
            required=True,
            shape=SUB_SEARCH,
            marks_max=SEARCHES_MARKS_MAX,
        ),
        Field("rerank", Kind.OBJECT, "how their hits become one ranking", shape=RERANK),
        Field("limit", Kind.INT32, "rows per query vector", 100),
        Field("offset", Kind.INT32, "rows to skip; limit + offset at most 16384", 0),
        OUTPUT,
        PARTITIONS,
        CONSISTENCY,
        STALENESS,
        EXPLAIN,
        Field("functionScore", Kind.ANY, "instead of rerank: one function of type Rerank, params.reranker as strategy"),
        *_GROUPS,
        *_unsupported_fields("orderByFields", "functionChains"),
    ),
)
QUERY = Shape(
    "QueryReqV2",
    (
        DB,
        COLLECTION,
        FILTER,
        Field("limit", Kind.INT32, "rows to return; 0 for no limit, which needs a filter", 100),
        Field("offset", Kind.INT32, "rows to skip", 0),
        OUTPUT,
        PARTITIONS,
        EXPR_PARAMS,
        CONSISTENCY,
        STALENESS,
        EXPLAIN,
        Field("orderByFields", Kind.TEXTS, "field, field:asc, field:desc:nulls_first, ...; else by primary key", ()),
        Field("groupByFields", Kind.TEXTS, "outputFields are these and count(*), count, sum, avg, min, max(field)", ()),
    ),
)
GET = Shape("CollectionIDReq", (DB, COLLECTION, IDS, OUTPUT, PARTITIONS, CONSISTENCY, STALENESS))
INSERT = Shape("CollectionDataReq", (DB, COLLECTION, PARTITION_OPTIONAL, ROWS))
UPSERT = Shape(
    "CollectionDataReq",
    (
        DB,
        COLLECTION,
        PARTITION_OPTIONAL,
        ROWS,
        Field("partialUpdate", Kind.BOOL, "rows hold the key and the fields to change, the same in every row", False),
        *_unsupported_fields("fieldOps"),
    ),
)
DELETE = Shape(
    "CollectionFilterReq",
    (DB, COLLECTION, _text("filter", "which rows to delete", required=True), PARTITION_OPTIONAL, EXPR_PARAMS),
)
NAMED = Shape("CollectionNameReq", (DB, COLLECTION))
DATABASE = Shape("DatabaseReq", (_text("dbName", "database", required=True),))
DATABASE_PROPERTIES = Shape("DatabaseReqWithProperties", (_text("dbName", "database", required=True), PROPERTIES))
ALIAS = Shape("AliasCollectionReq", (DB, COLLECTION, _text("aliasName", "alias", required=True)))
INDEX = Shape("IndexReq", (DB, COLLECTION, _text("indexName", "index", required=True)))
ONE_PARTITION = Shape("PartitionReq", (DB, COLLECTION, PARTITION))
SOME_PARTITIONS = Shape(
    "PartitionsReq", (DB, COLLECTION, Field("partitionNames", Kind.TEXTS, "partitions", None, required=True))
)
NOTHING = Shape("EmptyReq")

_SERVED: Final = (
    Route("/server/version", NOTHING, "Version of the server.", "server_version", "{version}"),
    Route(
        "/segments/describe",
        Shape(
            "SegmentReq",
            (
                Field("collectionID", Kind.INT64, "collection", 0),
                Field("segmentIDs", Kind.INTS, "segments; all of the collection if not given", ()),
            ),
        ),
        "Segments of a collection.",
        "describe_segments",
        "{segmentInfos: [...]}",
    ),
    # collections
    Route(
        "/collections/create",
        CREATE,
        "Create a collection: quick (a dimension is enough) or with a schema.",
        "create_collection",
        mutates=True,
    ),
    Route("/collections/list", Shape("DatabaseReq", (DB,)), "Names of the collections.", "list_collections", "[names]"),
    Route("/collections/has", NAMED, "Whether the collection exists.", "has_collection", "{has: bool}"),
    Route("/collections/describe", NAMED, "Schema, indexes, aliases and state.", "describe_collection", "{...}"),
    Route("/collections/get_stats", NAMED, "Number of rows.", "collection_stats", "{rowCount: int}"),
    Route(
        "/collections/get_load_state",
        Shape("CollectionLoadReq", (DB, COLLECTION, PARTITIONS)),
        "Whether the collection is loaded.",
        "load_state",
        "{loadState, loadProgress}",
    ),
    Route("/collections/load", NAMED, "Make the collection searchable.", "load_collection", mutates=True),
    Route("/collections/refresh_load", NAMED, "Load what came after the load.", "load_collection", mutates=True),
    Route("/collections/release", NAMED, "Free the memory of the collection.", "release_collection", mutates=True),
    Route("/collections/drop", NAMED, "Drop the collection, if it exists.", "drop_collection", mutates=True),
    Route("/collections/truncate", NAMED, "Delete all rows.", "truncate_collection", mutates=True),
    Route(
        "/collections/rename",
        Shape(
            "RenameCollectionReq",
            (
                DB,
                COLLECTION,
                _text("newCollectionName", "the new name", required=True),
                _text("newDbName", "the new database; the same if not given"),
            ),
        ),
        "Rename the collection.",
        "rename_collection",
        mutates=True,
    ),
    Route("/collections/flush", NAMED, "Seal what was inserted before, on disk.", "flush", mutates=True),
    Route(
        "/collections/flush_all",
        Shape("FlushAllReq", ()),
        "Seal what was inserted before into any collection of any database, on disk.",
        "flush_all",
        mutates=True,
    ),
    Route(
        "/collections/compact",
        Shape("CompactReq", (DB, COLLECTION, Field("isClustering", Kind.BOOL, "ignored", False))),
        "Start merging segments.",
        "compact",
        "{compactionID: int}",
        mutates=True,
    ),
    Route(
        "/collections/get_compaction_state",
        Shape("GetCompactionStateReq", (Field("jobID", Kind.INT64, "compactionID of compact", 0),)),
        "How far a compaction is.",
        "compaction_state",
        "{compactionID, state, executingPlanNumber, timeoutPlanNumber, completedPlanNumber}",
    ),
    Route(
        "/collections/alter_properties",
        Shape("CollectionReqWithProperties", (DB, COLLECTION, PROPERTIES)),
        "Set properties, such as collection.ttl.seconds; dynamicfield.enabled switches the dynamic field on.",
        "alter_collection",
        mutates=True,
    ),
    Route(
        "/collections/drop_properties",
        Shape("DropCollectionPropertiesReq", (DB, COLLECTION, PROPERTY_KEYS)),
        "Drop properties.",
        "alter_collection",
        mutates=True,
    ),
    Route(
        "/collections/fields/add",
        Shape(
            "CollectionFieldReqWithSchema",
            (DB, COLLECTION, Field("schema", Kind.OBJECT, "the field", None, required=True, shape=NEW_FIELD)),
        ),
        "Add a scalar field that is nullable or has a default; rows that are there have null or the default.",
        "add_field",
        mutates=True,
    ),
    Route(
        "/collections/fields/alter_properties",
        Shape(
            "CollectionFieldReqWithParams",
            (
                DB,
                COLLECTION,
                _text("fieldName", "field", required=True),
                Field("fieldParams", Kind.MAP, "max_length and max_capacity, which only grow, and mmap.enabled", {}),
            ),
        ),
        "Let a field take longer values.",
        "alter_field",
        mutates=True,
    ),
    Route(
        "/collections/fields/drop",
        Shape(
            "CollectionFieldReq",
            (
                DB,
                COLLECTION,
                _text("fieldName", "field"),
                Field("fieldId", Kind.INT64, "instead of its name: its id", 0),
            ),
        ),
        "Drop a field and its index; not a key, nor the only vector field.",
        "drop_field",
        mutates=True,
    ),
    # partitions
    Route("/partitions/list", NAMED, "Names of the partitions.", "list_partitions", "[names]"),
    Route("/partitions/create", ONE_PARTITION, "Create a partition.", "create_partition", mutates=True),
    Route("/partitions/drop", ONE_PARTITION, "Drop a released partition.", "drop_partition", mutates=True),
    Route("/partitions/has", ONE_PARTITION, "Whether the partition exists.", "has_partition", "{has: bool}"),
    Route("/partitions/get_stats", ONE_PARTITION, "Number of rows.", "partition_stats", "{rowCount: int}"),
    Route("/partitions/load", SOME_PARTITIONS, "Make partitions searchable.", "load_collection", mutates=True),
    Route("/partitions/release", SOME_PARTITIONS, "Free their memory.", "release_collection", mutates=True),
    # indexes
    Route("/indexes/list", NAMED, "Names of the indexes.", "list_indexes", "[names]"),
    Route("/indexes/describe", INDEX, "Type, parameters and progress.", "describe_index", "[{...}]"),
    Route(
        "/indexes/create",
        Shape(
            "IndexParamReq",
            (
                DB,
                COLLECTION,
                Field("indexParams", Kind.OBJECTS, "the indexes to create", None, required=True, shape=INDEX_PARAM),
            ),
        ),
        "Create indexes.",
        "create_index",
        mutates=True,
    ),
    Route("/indexes/drop", INDEX, "Drop an index of a released collection.", "drop_index", mutates=True),
    Route(
        "/indexes/alter_properties",
        Shape("IndexReqWithProperties", (*INDEX.fields, PROPERTIES)),
        "Set properties of an index.",
        "alter_index",
        mutates=True,
    ),
    Route(
        "/indexes/drop_properties",
        Shape("DropIndexPropertiesReq", (*INDEX.fields, PROPERTY_KEYS)),
        "Drop properties of an index.",
        "alter_index",
        mutates=True,
    ),
    # aliases
    Route(
        "/aliases/list",
        Shape("OptionalCollectionNameReq", (DB, _text("collectionName", "only aliases of this collection"))),
        "Aliases.",
        "list_aliases",
        "[aliases]",
    ),
    Route(
        "/aliases/describe",
        Shape("AliasReq", (DB, _text("aliasName", "alias", required=True))),
        "What an alias stands for.",
        "describe_alias",
        "{dbName, collectionName, aliasName}",
    ),
    Route("/aliases/create", ALIAS, "Give a collection one more name.", "create_alias", mutates=True),
    Route("/aliases/alter", ALIAS, "Point an alias at another collection.", "alter_alias", mutates=True),
    Route(
        "/aliases/drop",
        Shape("AliasReq", (DB, _text("aliasName", "alias", required=True))),
        "Drop an alias.",
        "drop_alias",
        mutates=True,
    ),
    # databases
    Route("/databases/create", DATABASE_PROPERTIES, "Create a database.", "create_database", mutates=True),
    Route("/databases/list", NOTHING, "Names of the databases.", "list_databases", "[names]"),
    Route("/databases/describe", DATABASE, "Id and properties.", "describe_database", "{dbName, dbID, properties}"),
    Route("/databases/alter", DATABASE_PROPERTIES, "Set properties.", "alter_database", mutates=True),
    Route("/databases/alter_properties", DATABASE_PROPERTIES, "Set properties.", "alter_database", mutates=True),
    Route(
        "/databases/drop_properties",
        Shape("DropDatabasePropertiesReq", (_text("dbName", "database", required=True), PROPERTY_KEYS)),
        "Drop properties.",
        "alter_database",
        mutates=True,
    ),
    Route("/databases/drop", DATABASE, "Drop an empty database.", "drop_database", mutates=True),
    # entities
    Route("/entities/insert", INSERT, "Insert rows.", "insert", "{insertCount, insertIds}", mutates=True),
    Route(
        "/entities/upsert",
        UPSERT,
        "Insert rows, replacing those with the same key.",
        "upsert",
        "{upsertCount, upsertIds}",
        mutates=True,
    ),
    Route(
        "/entities/delete",
        DELETE,
        "Delete the rows that match a filter.",
        "delete",
        "{deleteCount: int}",
        mutates=True,
        plan="delete",
    ),
    Route("/entities/get", GET, "Rows by primary key.", "get", "[row]", plan="query"),
    Route("/entities/query", QUERY, "Rows that match a filter.", "query", "[row]", plan="query"),
    Route("/entities/search", SEARCH, "Nearest rows of each query vector.", "search", "[row]", plan="query"),
    *(
        Route(path, HYBRID, "Best rows of several searches, ranked anew.", "hybrid_search", "[row]", plan="query")
        for path in ("/entities/hybrid_search", "/entities/advanced_search")
    ),
    Route(
        "/common/run_analyzer",
        RUN_ANALYZER,
        "The terms that an analyzer makes of texts.",
        "run_analyzer",
        "{results: [{tokens: [{token, startOffset, endOffset, position, positionLength, hash}]}]}",
    ),
)

_IMPORTS: Final = (
    Route(
        "/jobs/import/create",
        Shape(
            "ImportReq",
            (
                DB,
                COLLECTION,
                PARTITION_OPTIONAL,
                Field("files", Kind.ANY, "lists of files below imports.directory; the arrays of a list are one table"),
                Field("options", Kind.MAP, "max_rejects: more rows that do not fit fail the job; 0 if not given", {}),
            ),
        ),
        "Begin to import files that this node has.",
        "create_import",
        "{jobId}",
    ),
    Route(
        "/jobs/import/list",
        Shape("ListImportReq", (DB, _text("collectionName", "only jobs of this collection"))),
        "Import jobs of all nodes; `message` names those that do not answer.",
        "list_imports",
        "{records: [{jobId, collectionName, state, progress, reason}]}",
    ),
    *(
        Route(
            path,
            Shape("ImportJobReq", (DB, _text("jobId", "the job", required=True))),
            "How far an import job is, of whichever node.",
            "describe_import",
            "{jobId, createTime, completeTime, collectionName, state, progress, importedRows, totalRows, fileSize, "
            "reason, details}",
        )
        for path in ("/jobs/import/describe", "/jobs/import/get_progress")
    ),
)

_UNSUPPORTED: Final[Mapping[str, str]] = {
    "struct fields are not supported by this server: use a field of type JSON": "/collections/struct_fields/add",
    "functions come with the schema of a new collection and stay as they are": (
        "/collections/add_function /collections/alter_function /collections/drop_function "
        "/collections/add_function_field /collections/drop_function_field"
    ),
    "rows of an import are there as they come: there is nothing to commit; what is not wanted is deleted by a filter": (
        "/jobs/import/commit /jobs/import/abort"
    ),
    "snapshots are not implemented by this server (not implemented)": (
        "/snapshots/create /snapshots/drop /snapshots/describe /snapshots/list /snapshots/pin /snapshots/unpin "
        "/snapshots/restore /jobs/snapshot/describe /jobs/snapshot/list /jobs/snapshot/export "
        "/jobs/snapshot/export/describe /jobs/snapshot/restore_external"
    ),
    "there are no resource groups on this server: all nodes are alike": (
        "/resource_groups/create /resource_groups/drop /resource_groups/describe /resource_groups/list "
        "/resource_groups/alter /resource_groups/transfer_replica"
    ),
    "file resources are not supported by this server": (
        "/file_resources/add /file_resources/remove /file_resources/list"
    ),
    "external collections are not supported by this server": (
        "/jobs/external_collection/refresh /jobs/external_collection/describe /jobs/external_collection/list"
    ),
    "there are no quotas on this server: see /metrics for its load": "/quotacenter/describe",
}

_USER: Final = _text("userName", "name of the user", required=True)
_ROLE: Final = _text("roleName", "name of the role", required=True)
_DESCRIPTION: Final = _text("description", "for people")
_GROUP: Final = _text("privilegeGroupName", "name of the privilege group", required=True)
_PRIVILEGE: Final = _text("privilege", "name of the privilege, or of a group where the route takes one", required=True)
_USER_ROLE: Final = Shape("UserRoleReq", (_USER, _ROLE))
_GRANT: Final = Shape(
    "GrantReq",
    (
        _ROLE,
        _text("objectType", "Collection, Global or User", required=True),
        _text("objectName", "collection or user; `*` for any", required=True),
        _PRIVILEGE,
        DB,
    ),
)
_GRANT_V2: Final = Shape(
    "GrantV2Req", (_ROLE, _PRIVILEGE, DB, _text("collectionName", "collection; `*`, or nothing, for any"))
)
_GROUP_PRIVILEGES: Final = Shape(
    "PrivilegeGroupReq", (_GROUP, Field("privileges", Kind.TEXTS, "names of privileges, or of other groups", ()))
)
_KEY_ID: Final = _text("keyId", "id of the key", required=True)
_LIFETIME: Final = Field(
    "lifetimeSeconds", Kind.INT64, "0 for a key that does not expire; auth.token_s if not given", -1
)
_ACCESS: Final = (
    Route("/users/list", NOTHING, "Names of the users.", "list_users", "[names]"),
    Route("/users/describe", Shape("UserReq", (_USER,)), "Roles of a user.", "describe_user", "[names]"),
    Route(
        "/users/create",
        Shape("PasswordReq", (_USER, _text("password", "6 to 72 characters", required=True), _DESCRIPTION)),
        "Create a user.",
        "create_user",
        mutates=True,
    ),
    Route(
        "/users/update_password",
        Shape(
            "NewPasswordReq",
            (
                _USER,
                _text("password", "the old one; root need not know that of others"),
                _text("newPassword", "6 to 72 characters", required=True),
                _DESCRIPTION,
            ),
        ),
        "Change a password; the old one is refused on every node from then on.",
        "update_password",
        mutates=True,
    ),
    Route("/users/drop", Shape("UserReq", (_USER,)), "Drop a user and its API keys.", "drop_user", mutates=True),
    Route("/users/grant_role", _USER_ROLE, "Give a user a role.", "grant_role", mutates=True),
    Route("/users/revoke_role", _USER_ROLE, "Take a role from a user.", "revoke_role", mutates=True),
    Route("/roles/list", NOTHING, "Names of the roles.", "list_roles", "[names]"),
    Route(
        "/roles/describe",
        Shape("RoleReq", (_ROLE,)),
        "Grants of a role.",
        "describe_role",
        "[{objectType, objectName, privilege, dbName, grantor}]",
    ),
    Route("/roles/create", Shape("NewRoleReq", (_ROLE, _DESCRIPTION)), "Create a role.", "create_role", mutates=True),
    Route("/roles/alter", Shape("NewRoleReq", (_ROLE, _DESCRIPTION)), "Describe a role.", "alter_role", mutates=True),
    Route(
        "/roles/drop",
        Shape("DropRoleReq", (_ROLE, Field("forceDrop", Kind.BOOL, "also if it has grants", False))),
        "Drop a role.",
        "drop_role",
        mutates=True,
    ),
    Route("/roles/grant_privilege", _GRANT, "Give a role a privilege.", "grant_privilege", mutates=True),
    Route("/roles/revoke_privilege", _GRANT, "Take a privilege from a role.", "revoke_privilege", mutates=True),
    Route(
        "/roles/grant_privilege_v2",
        _GRANT_V2,
        "Give a role a privilege, or a group of them, in a collection, a database or everywhere.",
        "grant_privilege_v2",
        mutates=True,
    ),
    Route("/roles/revoke_privilege_v2", _GRANT_V2, "Take it away again.", "revoke_privilege_v2", mutates=True),
    Route(
        "/privilege_groups/create", Shape("GroupReq", (_GROUP,)), "Create an empty group.", "create_group", mutates=True
    ),
    Route("/privilege_groups/drop", Shape("GroupReq", (_GROUP,)), "Drop an unused group.", "drop_group", mutates=True),
    Route(
        "/privilege_groups/list",
        NOTHING,
        "All groups, built in or not.",
        "list_groups",
        "{privilegeGroups: [{privilegeGroupName, privileges}]}",
    ),
    Route(
        "/privilege_groups/add_privileges_to_group",
        _GROUP_PRIVILEGES,
        "Put privileges into a group.",
        "add_to_group",
        mutates=True,
    ),
    Route(
        "/privilege_groups/remove_privileges_from_group",
        _GROUP_PRIVILEGES,
        "Take privileges out of a group.",
        "remove_from_group",
        mutates=True,
    ),
    Route(
        "/api_keys/create",
        Shape("ApiKeyReq", (_text("userName", "whom it acts as; who asks if not given"), _DESCRIPTION, _LIFETIME)),
        "Make an API key, which is shown this once.",
        "create_api_key",
        "{keyId, apiKey, userName, expiresMs}",
        mutates=True,
        base=OWN_BASE,
    ),
    Route(
        "/api_keys/list",
        Shape("ApiKeysReq", (_text("userName", "whose; those of who asks if not given"),)),
        "API keys, without their secrets.",
        "list_api_keys",
        "[{keyId, userName, description, createdMs, expiresMs}]",
        base=OWN_BASE,
    ),
    Route(
        "/api_keys/rotate",
        Shape(
            "RotateApiKeyReq",
            (_KEY_ID, _LIFETIME, Field("graceSeconds", Kind.INT64, "how long the old secret is good", 0)),
        ),
        "Give an API key another secret, which is shown this once.",
        "rotate_api_key",
        "{keyId, apiKey, userName, expiresMs}",
        mutates=True,
        base=OWN_BASE,
    ),
    Route(
        "/api_keys/revoke",
        Shape("ApiKeyIdReq", (_KEY_ID,)),
        "End an API key.",
        "revoke_api_key",
        mutates=True,
        base=OWN_BASE,
    ),
)

_NODE: Final = _text("nodeName", "name of the node", required=True)
_NODES: Final = tuple(
    replace(route, base=OWN_BASE)
    for route in (
        Route(
            "/nodes/list",
            NOTHING,
            "All nodes with what they hold and lead, and the moves under way.",
            "list_nodes",
            "{nodes: [{name, state, isUp, awaySeconds, peer, client, zone, shards, coming, leads, entriesPerSecond, "
            "votes, replaces}], moves: [{shard, from, to, seconds, bytesDone, bytesTotal, secondsLeft}], movesPaused, "
            "copies}",
        ),
        Route(
            "/nodes/drain",
            Shape(
                "DrainReq",
                (
                    _NODE,
                    Field("undo", Kind.BOOL, "it stays after all", False),
                    Field("force", Kind.BOOL, "also if fewer nodes remain than there are copies", False),
                ),
            ),
            "Move all shards away from a node, which serves meanwhile.",
            "drain_node",
            mutates=True,
        ),
        Route(
            "/nodes/remove",
            Shape("NodeReq", (_NODE,)),
            "A drained node is no node of the cluster any more; refused while it holds a shard.",
            "remove_node",
            mutates=True,
        ),
        Route(
            "/nodes/replace",
            Shape("ReplaceReq", (_NODE, _text("newNodeName", "the node that takes its place", required=True))),
            "Move all shards of a node to another one, then remove it.",
            "replace_node",
            mutates=True,
        ),
        Route("/nodes/pause_moves", NOTHING, "Plan no moves of shards until told to.", "pause_moves", mutates=True),
        Route("/nodes/resume_moves", NOTHING, "Plan moves of shards again.", "resume_moves", mutates=True),
        Route(
            "/nodes/entry",
            NOTHING,
            "Where a node that wants to join proves itself; gives nothing away but this node's name and peer address.",
            "find_entry",
            "{node, peer}",
        ),
    )
)

ROUTES: Final[tuple[Route, ...]] = (
    *_SERVED,
    *_IMPORTS,
    *_ACCESS,
    *_NODES,
    *(
        Route(path, NOTHING, "Not supported.", unsupported=sentence)
        for sentence, paths in _UNSUPPORTED.items()
        for path in paths.split()
    ),
)


def unsupported_given(values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of the names that a request gives a value for, or ""."""
    return next((name for name in names if values.get(name)), "")


SEARCH_UNSUPPORTED: Final = _SEARCH_UNSUPPORTED
HYBRID_UNSUPPORTED: Final = ("orderByFields", "functionChains")
QUERY_UNSUPPORTED: Final[tuple[str, ...]] = ()
