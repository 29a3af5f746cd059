"""Milvus's privileges: their names, the kind of object that each is about, its level, and the groups that are built in.

Names are those of the API, without the protocol's prefix `Privilege`. Two are our own: ReadStatus for what operators
look at (status, metrics), and OperateNodes for what changes the nodes of a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

ANY: Final = "*"
ALL: Final = "All"
"""Every privilege that is about one kind of object; `*` says the same."""


class ObjectType(StrEnum):
    COLLECTION = "Collection"
    GLOBAL = "Global"
    USER = "User"


class Level(StrEnum):
    """How far a privilege reaches at least: what `dbName` and `collectionName` of a grant may say."""

    CLUSTER = "cluster"
    DATABASE = "database"
    COLLECTION = "collection"


_COLLECTION_READ: Final = (
    "Query Search IndexDetail GetFlushState GetLoadState GetLoadingProgress HasPartition ShowPartitions "
    "DescribeCollection DescribeAlias GetStatistics ListAliases GetImportProgress ListImport DescribeSnapshot "
    "ListSnapshots"
)
_COLLECTION_WRITE: Final = (
    "Load Release Insert Delete Upsert Import Flush Compaction LoadBalance CreateIndex DropIndex CreatePartition "
    "DropPartition AddCollectionField CreateSnapshot DropSnapshot RestoreSnapshot"
)
_COLLECTION_OTHERS: Final = "AlterCollectionSchema RefreshExternalCollection SkipRLS ViewRLS ManageRLS"
_CLUSTER_READ: Final = (
    "ListDatabases SelectOwnership SelectUser DescribeResourceGroup ListResourceGroups ListPrivilegeGroups "
    "ListFileResources GetReplicateConfiguration ReadStatus"
)
_CLUSTER_WRITE: Final = "FlushAll TransferNode TransferReplica UpdateResourceGroups"
_CLUSTER_ADMIN: Final = (
    "BackupRBAC RestoreRBAC CreateDatabase DropDatabase CreateOwnership DropOwnership ManageOwnership "
    "CreateResourceGroup DropResourceGroup UpdateUser RenameCollection CreatePrivilegeGroup DropPrivilegeGroup "
    "OperatePrivilegeGroup AddFileResource RemoveFileResource UpdateReplicateConfiguration OperateNodes"
)
_CLUSTER_OTHERS: Final = "PinSnapshotData UnpinSnapshotData RestoreExternalSnapshot ExportSnapshot ImportBinlog"

BUILT_IN_GROUPS: Final[Mapping[str, frozenset[str]]] = {
    name: frozenset(" ".join(parts).split())
    for name, parts in {
        "CollectionReadOnly": (_COLLECTION_READ,),
        "CollectionReadWrite": (_COLLECTION_READ, _COLLECTION_WRITE),
        "CollectionAdmin": (_COLLECTION_READ, _COLLECTION_WRITE, "CreateAlias DropAlias"),
        "DatabaseReadOnly": ("ShowCollections DescribeDatabase",),
        "DatabaseReadWrite": ("ShowCollections DescribeDatabase AlterDatabase",),
        "DatabaseAdmin": ("ShowCollections DescribeDatabase AlterDatabase CreateCollection DropCollection",),
        "ClusterReadOnly": (_CLUSTER_READ,),
        "ClusterReadWrite": (_CLUSTER_READ, _CLUSTER_WRITE),
        "ClusterAdmin": (_CLUSTER_READ, _CLUSTER_WRITE, _CLUSTER_ADMIN),
    }.items()
}
"""No group holds those of another level: who may do everything in a database has three grants."""

LEVELS: Final[Mapping[str, Level]] = {
    **dict.fromkeys((*BUILT_IN_GROUPS["CollectionAdmin"], *_COLLECTION_OTHERS.split()), Level.COLLECTION),
    **dict.fromkeys(BUILT_IN_GROUPS["DatabaseAdmin"], Level.DATABASE),
    **dict.fromkeys((*BUILT_IN_GROUPS["ClusterAdmin"], *_CLUSTER_OTHERS.split()), Level.CLUSTER),
}
"""Every privilege -> its level."""

_GLOBAL_IN_COLLECTIONS: Final = frozenset(
    {"DescribeCollection", "CreateAlias", "DropAlias", "DescribeAlias", "ListAliases"}
)
_OF_USERS: Final = frozenset({"UpdateUser", "SelectUser"})


def object_type_of(privilege: str) -> ObjectType:
    """Return the kind of object that a privilege is about. Raises KeyError for one that there is not."""
    if privilege in _OF_USERS:
        return ObjectType.USER
    if LEVELS[privilege] is Level.COLLECTION and privilege not in _GLOBAL_IN_COLLECTIONS:
        return ObjectType.COLLECTION
    return ObjectType.GLOBAL


PRIVILEGES_OF: Final[Mapping[str, frozenset[str]]] = {
    kind: frozenset(one for one in LEVELS if object_type_of(one) is kind) for kind in ObjectType
}
"""Kind of object -> the privileges that are about it."""
