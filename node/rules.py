"""The one table of who may do what: every route of HTTP and every method of gRPC, with the privilege that it takes.

A row is a privilege, then what it is asked for: routes below /v2/vectordb, `@` in front of those below /v2/annulus, and
pages with their method; then gRPC's methods. The privilege says what kind of object it is about (`cluster.privileges`),
and so where the request names it. `-` is for what every user may do, and `nobody` for what is answered without
credentials, which is health alone. Tests hold the table complete; what it forgets is for root and admins alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cluster.privileges import PRIVILEGES_OF, ObjectType, object_type_of

ANYONE: Final = "-"
"""Every user."""
OPEN: Final = "nobody"
"""Needs no credentials."""
UNLISTED: Final = "?"

_TABLE: Final = """
nobody              | GET:/healthz GET:/readyz |
-                   | /server/version GET:/openapi.json * | Connect GetVersion CheckHealth GetComponentStates Dummy
-                   | | AllocTimestamp RegisterLink CalcDistance
-                   | /collections/list /databases/list | ShowCollections ListDatabases
-                   | /collections/get_compaction_state |
-                   | | GetCompactionState GetCompactionStateWithPlans GetFlushAllState
-                   | /common/run_analyzer | RunAnalyzer ComputePhraseMatchSlop
ReadStatus          | GET:/metrics GET:/status GET:/cluster/check @/nodes/list @/nodes/entry | GetMetrics
ReadStatus          | /quotacenter/describe |
OperateNodes        | POST:/cluster/check @/nodes/drain @/nodes/remove @/nodes/replace |
OperateNodes        | @/nodes/pause_moves @/nodes/resume_moves |
CreateCollection    | /collections/create | CreateCollection
CreateCollection    | /collections/alter_properties /collections/drop_properties | AlterCollection
CreateCollection    | /collections/fields/alter_properties | AlterCollectionField
CreateCollection    | /collections/add_function /collections/alter_function /collections/drop_function |
CreateCollection    | /collections/add_function_field /collections/drop_function_field |
CreateCollection    | | AddCollectionFunction AlterCollectionFunction DropCollectionFunction
DropCollection      | /collections/drop /collections/truncate | DropCollection TruncateCollection
DescribeCollection  | /collections/describe /collections/has | DescribeCollection HasCollection
DescribeCollection  | /segments/describe | BatchDescribeCollection GetPersistentSegmentInfo GetQuerySegmentInfo
RenameCollection    | /collections/rename | RenameCollection
AddCollectionField  | /collections/fields/add /collections/struct_fields/add |
AddCollectionField  | | AddCollectionField AddCollectionStructField
AlterCollectionSchema | /collections/fields/drop | AlterCollectionSchema
GetStatistics       | /collections/get_stats /partitions/get_stats | GetCollectionStatistics GetPartitionStatistics
GetLoadState        | /collections/get_load_state | GetLoadState GetLoadingProgress GetReplicas
Load                | /collections/load /collections/refresh_load /partitions/load | LoadCollection LoadPartitions
Load                | | Prewarm DescribePrewarmTask
Release             | /collections/release /partitions/release | ReleaseCollection ReleasePartitions
Flush               | /collections/flush | Flush
FlushAll            | /collections/flush_all | FlushAll
GetFlushState       | | GetFlushState
Compaction          | /collections/compact | ManualCompaction
LoadBalance         | | LoadBalance
CreatePartition     | /partitions/create | CreatePartition CreateNamespace
DropPartition       | /partitions/drop | DropPartition DropNamespace
HasPartition        | /partitions/has | HasPartition HasNamespace
ShowPartitions      | /partitions/list | ShowPartitions DescribeNamespace ListNamespaces GetNamespaceStats
CreateIndex         | /indexes/create /indexes/alter_properties /indexes/drop_properties | CreateIndex AlterIndex
IndexDetail         | /indexes/list /indexes/describe | DescribeIndex GetIndexStatistics GetIndexState
IndexDetail         | | GetIndexBuildProgress ListIndexedSegment DescribeSegmentIndexData
DropIndex           | /indexes/drop | DropIndex
CreateAlias         | /aliases/create /aliases/alter | CreateAlias AlterAlias
DropAlias           | /aliases/drop | DropAlias
DescribeAlias       | /aliases/describe | DescribeAlias
ListAliases         | /aliases/list | ListAliases
CreateDatabase      | /databases/create | CreateDatabase
DropDatabase        | /databases/drop | DropDatabase
DescribeDatabase    | /databases/describe | DescribeDatabase
AlterDatabase       | /databases/alter /databases/alter_properties /databases/drop_properties | AlterDatabase
Insert              | /entities/insert | Insert BatchUpdateManifest
Upsert              | /entities/upsert | Upsert
Delete              | /entities/delete | Delete
Query               | /entities/get /entities/query | Query
Search              | /entities/search /entities/hybrid_search /entities/advanced_search | Search HybridSearch
SelectOwnership     | /users/list /roles/list /roles/describe | ListCredUsers SelectRole SelectGrant
SelectUser          | /users/describe | SelectUser GetUserTags ListUsersWithTag
CreateOwnership     | /users/create /roles/create /roles/alter | CreateCredential CreateRole AlterRole
UpdateUser          | /users/update_password | UpdateCredential AddUserTags DeleteUserTags
DropOwnership       | /users/drop /roles/drop | DeleteCredential DropRole
ManageOwnership     | /users/grant_role /users/revoke_role /roles/grant_privilege | OperateUserRole
ManageOwnership     | /roles/revoke_privilege |
ManageOwnership     | /roles/grant_privilege_v2 /roles/revoke_privilege_v2 | OperatePrivilege OperatePrivilegeV2
-                   | @/api_keys/create @/api_keys/list @/api_keys/rotate @/api_keys/revoke |
CreatePrivilegeGroup | /privilege_groups/create | CreatePrivilegeGroup
DropPrivilegeGroup  | /privilege_groups/drop | DropPrivilegeGroup
ListPrivilegeGroups | /privilege_groups/list | ListPrivilegeGroups
OperatePrivilegeGroup | /privilege_groups/add_privileges_to_group | OperatePrivilegeGroup
OperatePrivilegeGroup | /privilege_groups/remove_privileges_from_group |
BackupRBAC          | | BackupRBAC
RestoreRBAC         | | RestoreRBAC
ManageRLS           | | CreateRowPolicy DropRowPolicy UpdateRowPolicy SetRLSPrincipalTags DeleteRLSPrincipalTags
ViewRLS             | | ListRowPolicies GetRLSPrincipalTags ListRLSPrincipals
Import              | /jobs/import/create /jobs/import/commit /jobs/import/abort | Import
ListImport          | /jobs/import/list | ListImportTasks
GetImportProgress   | /jobs/import/describe /jobs/import/get_progress | GetImportState
CreateSnapshot      | /snapshots/create | CreateSnapshot
DropSnapshot        | /snapshots/drop | DropSnapshot
DescribeSnapshot    | /snapshots/describe | DescribeSnapshot
ListSnapshots       | /snapshots/list | ListSnapshots
RestoreSnapshot     | /snapshots/restore /jobs/snapshot/describe /jobs/snapshot/list | RestoreSnapshot
RestoreSnapshot     | | GetRestoreSnapshotState ListRestoreSnapshotJobs
PinSnapshotData     | /snapshots/pin | PinSnapshotData
UnpinSnapshotData   | /snapshots/unpin | UnpinSnapshotData
ExportSnapshot      | /jobs/snapshot/export /jobs/snapshot/export/describe | ExportSnapshot GetExportSnapshotState
RestoreExternalSnapshot | /jobs/snapshot/restore_external | RestoreExternalSnapshot
RefreshExternalCollection | /jobs/external_collection/refresh | RefreshExternalCollection
RefreshExternalCollection | /jobs/external_collection/describe | GetRefreshExternalCollectionProgress
RefreshExternalCollection | /jobs/external_collection/list | ListRefreshExternalCollectionJobs
CreateResourceGroup | /resource_groups/create | CreateResourceGroup
DropResourceGroup   | /resource_groups/drop | DropResourceGroup
DescribeResourceGroup | /resource_groups/describe | DescribeResourceGroup
ListResourceGroups  | /resource_groups/list | ListResourceGroups
UpdateResourceGroups | /resource_groups/alter | UpdateResourceGroups
TransferReplica     | /resource_groups/transfer_replica | TransferReplica
TransferNode        | | TransferNode
AddFileResource     | /file_resources/add | AddFileResource
RemoveFileResource  | /file_resources/remove | RemoveFileResource
ListFileResources   | /file_resources/list | ListFileResources
UpdateReplicateConfiguration | | UpdateReplicateConfiguration ReplicateMessage
GetReplicateConfiguration | | GetReplicateConfiguration GetReplicateInfo
"""

_READS: Final = frozenset(
    "- ReadStatus DescribeCollection GetStatistics GetLoadState GetFlushState HasPartition ShowPartitions IndexDetail "
    "DescribeAlias ListAliases DescribeDatabase Query Search SelectOwnership SelectUser ListPrivilegeGroups ListImport "
    "GetImportProgress Insert Upsert Delete".split()
)


def _full(route: str) -> str:
    if route.startswith("@"):
        return "/v2/annulus" + route[1:]
    return "/v2/vectordb" + route if route.startswith("/") else route


def _read() -> tuple[dict[str, str], dict[str, str]]:
    routes: dict[str, str] = {}
    methods: dict[str, str] = {}
    for line in filter(None, _TABLE.splitlines()):
        privilege, of_http, of_grpc = (part.strip() for part in line.split("|"))
        if privilege not in (ANYONE, OPEN):
            object_type_of(privilege)  # there is one
        for known, names in ((routes, map(_full, of_http.split())), (methods, iter(of_grpc.split()))):
            for name in names:
                assert name not in known, name
                known[name] = privilege
    return routes, methods


_routes, _methods = _read()
ROUTE_RULES: Final[Mapping[str, str]] = _routes
"""Path of a POST route, or `METHOD:PATH` of a page -> privilege. `*` is any other address."""
METHOD_RULES: Final[Mapping[str, str]] = _methods
"""gRPC's method -> privilege."""


def is_audited(privilege: str, *, reads: bool) -> bool:
    """Return whether an operation is worth a line: what changes something; with `reads` reads and rows too."""
    return reads or privilege not in _READS


def is_about_users(privilege: str) -> bool:
    return privilege in PRIVILEGES_OF[ObjectType.USER]
