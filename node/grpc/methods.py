"""The table of Milvus's methods: which handler serves each, and why the others are refused."""

from __future__ import annotations

from typing import Final

from node.api.routes import HYBRID_UNSUPPORTED, SEARCH_UNSUPPORTED
from node.grpc import collections, entities, operations, users
from node.grpc.calls import Methods
from node.grpc.protocol import methods

SERVED: Final[Methods] = {**operations.METHODS, **collections.METHODS, **entities.METHODS, **users.METHODS}

_REASONS: Final = {
    "rows have no policies on this server: give each kind of user a collection, or a database": (
        "AddUserTags DeleteUserTags GetUserTags ListUsersWithTag CreateRowPolicy DropRowPolicy ListRowPolicies "
        "UpdateRowPolicy SetRLSPrincipalTags GetRLSPrincipalTags ListRLSPrincipals DeleteRLSPrincipalTags"
    ),
    "all nodes are alike on this server: there is one resource group, and nothing to move by hand": (
        "CreateResourceGroup DropResourceGroup UpdateResourceGroups TransferNode TransferReplica LoadBalance"
    ),
    "imports by the server are not supported: insert the rows": "Import GetImportState ListImportTasks",
    "functions come with the schema of a new collection and stay as they are": (
        "AddCollectionFunction AlterCollectionFunction DropCollectionFunction"
    ),
    "file resources are not supported by this server": "AddFileResource RemoveFileResource ListFileResources",
    "struct fields are not supported by this server: use a field of type JSON": "AddCollectionStructField",
    "snapshots are not implemented by this server (not implemented)": (
        "CreateSnapshot DropSnapshot ListSnapshots DescribeSnapshot RestoreSnapshot RestoreExternalSnapshot "
        "ExportSnapshot GetExportSnapshotState GetRestoreSnapshotState ListRestoreSnapshotJobs PinSnapshotData "
        "UnpinSnapshotData"
    ),
    "external collections are not supported by this server": (
        "RefreshExternalCollection GetRefreshExternalCollectionProgress ListRefreshExternalCollectionJobs "
        "BatchUpdateManifest"
    ),
    "this server copies its data by itself, and to no other system": (
        "ReplicateMessage UpdateReplicateConfiguration GetReplicateConfiguration GetReplicateInfo"
    ),
    "namespaces are not supported by this server: use databases or partitions": (
        "CreateNamespace DescribeNamespace ListNamespaces DropNamespace HasNamespace GetNamespaceStats"
    ),
    "metrics are served over HTTP, under /metrics": "GetMetrics",
}
PARTLY: Final = {
    "RestoreRBAC": "users whose passwords a server of this kind kept; none that are there already",
    "CreateCollection": "functions of type BM25; no struct fields, namespaces or external collections",
    "AlterCollectionField": "parameters are set, none is dropped",
    "AlterCollectionSchema": "one field is added or dropped, no functions",
    "DescribeCollection": "by name, not by id",
    "LoadCollection": "all fields; one replica of those that the shards have anyway",
    "LoadPartitions": "all fields; one replica of those that the shards have anyway",
    "GetReplicas": "one replica, which stands for the nodes that hold the shards",
    "ShowPartitions": "ids are places in the list",
    "CreateIndex": "of JSON values of one type, json_cast_type: JSON and json_cast_function are refused",
    "Upsert": "`field_ops`: REPLACE",
    "Search": f"no highlighter, {', '.join(SEARCH_UNSUPPORTED)}",
    "HybridSearch": f"no {', '.join(HYBRID_UNSUPPORTED)}",
}
"""Method -> what of it is refused, or is not what its name says."""
_OTHER: Final = "this server does not serve it"

REFUSED: Final = {
    **dict.fromkeys(sorted(methods().keys() - SERVED.keys()), _OTHER),
    **{name: reason for reason, names in _REASONS.items() for name in names.split()},
}
"""Method -> why it is answered with Unimplemented."""
