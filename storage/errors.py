"""Every error that a caller may see, as one tree.

    AnnulusError
    ├── BadRequest                 the request is wrong; the same request fails the same way on every replica
    │   ├── InvalidParameter       ├── MissingParameter      ├── BadJson           ├── BadRow
    │   ├── BadPrimaryKey          ├── FilterError           ├── UnsupportedOperation
    │   ├── NameInvalid            ├── FieldNotFound         ├── MetricNotFound
    │   ├── DatabaseNotFound       ├── DatabaseLimit         ├── CollectionNotFound
    │   ├── CollectionNotLoaded    ├── CollectionLimit       ├── PartitionNotFound
    │   ├── PartitionNotLoaded     ├── AliasNotFound         ├── AliasExists       ├── AliasConflict
    │   ├── IndexNotFound          ├── IndexConflict         ├── SnapshotGone
    │   ├── Unauthenticated        ├── NotAuthenticated      ├── NotPermitted
    │   └── GroupNameInvalid
    ├── Unavailable                nothing is wrong with the request; it may succeed later
    │   ├── NoLeader               ├── Overloaded            ├── RequestTimeout
    │   ├── OutcomeUnknown         ├── NotFresh              ├── PeerUnreachable
    │   ├── Conflict               ├── SchemaMismatch        ├── Busy
    │   ├── MemoryShort            ├── TooManyAttempts       (both an Overloaded)
    │   └── ReadOnly               (the disk is full)
    └── StorageFault               this replica cannot trust its own disk; it stops loudly
        ├── ChunkDamaged           ├── JournalDamaged        └── DirectoryInUse

`code` is the stable name under which an error crosses the log and the wire; `node/api/faults.py` maps it to Milvus's
numbers. `retriable` tells a client whether the same request may succeed later. `deterministic` tells apply whether
the error may be an answer in the log (True) or must stop the replica (False).
"""

from __future__ import annotations

from typing import ClassVar


class AnnulusError(Exception):
    """Base of all errors with a meaning for callers; the message is a whole sentence for a person."""

    code: ClassVar[str] = "internal"
    retriable: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else self.code


class BadRequest(AnnulusError):
    code, deterministic = "bad_request", True


class InvalidParameter(BadRequest):
    code = "invalid_parameter"


class MissingParameter(BadRequest):
    code = "missing_parameter"


class BadJson(BadRequest):
    """The body does not parse or a declared field has the wrong type."""

    code = "bad_json"


class BadRow(BadRequest):
    """A row of an insert or upsert does not fit the schema."""

    code = "bad_row"


class BadPrimaryKey(BadRequest):
    code = "bad_primary_key"


class FilterError(BadRequest):
    """A filter expression does not parse or does not fit the schema; the message carries the caret."""

    code = "filter_error"


class UnsupportedOperation(BadRequest):
    code = "unsupported"


class NameInvalid(BadRequest):
    code = "name_invalid"


class FieldNotFound(BadRequest):
    code = "field_not_found"


class MetricNotFound(BadRequest):
    code = "metric_not_found"


class DatabaseNotFound(BadRequest):
    code = "database_not_found"

    def __init__(self, database: str) -> None:
        super().__init__(f"database not found[database={database}]")


class DatabaseLimit(BadRequest):
    code = "database_limit"


class CollectionNotFound(BadRequest):
    code = "collection_not_found"

    def __init__(self, database: str, collection: str) -> None:
        super().__init__(f"can't find collection[database={database}][collection={collection}]")


class CollectionNotLoaded(BadRequest):
    code = "collection_not_loaded"

    def __init__(self, collection: str) -> None:
        super().__init__(f"collection not loaded[collection={collection}]: load it first (collections/load)")


class CollectionLimit(BadRequest):
    code = "collection_limit"


class PartitionNotFound(BadRequest):
    code = "partition_not_found"

    def __init__(self, partition: str) -> None:
        super().__init__(f"partition not found[partition={partition}]")


class PartitionNotLoaded(BadRequest):
    code = "partition_not_loaded"

    def __init__(self, partition: str) -> None:
        super().__init__(f"partition not loaded[partition={partition}]: load it first (partitions/load)")


class AliasNotFound(BadRequest):
    code = "alias_not_found"

    def __init__(self, database: str, alias: str) -> None:
        super().__init__(f"alias not found[database={database}][alias={alias}]")


class AliasExists(BadRequest):
    code = "alias_exists"


class AliasConflict(BadRequest):
    """A name is an alias and a collection at once."""

    code = "alias_conflict"


class IndexNotFound(BadRequest):
    code = "index_not_found"

    def __init__(self, index_name: str) -> None:
        super().__init__(f"index not found[indexName={index_name}]")


class IndexConflict(BadRequest):
    """The field has another index already."""

    code = "index_conflict"


class SnapshotGone(BadRequest):
    """A read at an old tick, of which compaction has not kept everything."""

    code = "snapshot_gone"


class Unauthenticated(BadRequest):
    """The request shows no credentials, or wrong ones; which of the two, and what is wrong with them, is not said."""

    code = "unauthenticated"


class NotAuthenticated(BadRequest):
    """The old password of a change of passwords is not the user's."""

    code = "not_authenticated"


class NotPermitted(BadRequest):
    """The user lacks the privilege for what it asks, or nobody may do it."""

    code = "not_permitted"


class GroupNameInvalid(BadRequest):
    """No privilege group may have this name."""

    code = "group_name_invalid"


class Unavailable(AnnulusError):
    code, retriable = "unavailable", True


class NoLeader(Unavailable):
    code = "no_leader"


class OutcomeUnknown(Unavailable):
    """The leader was lost, or time was up, before it said whether the write was made; it may still be."""

    code = "outcome_unknown"


class PeerUnreachable(Unavailable):
    """Another node gave no answer: no session, the session ended, or time was up; what was asked may have been done."""

    code = "peer_unreachable"


class NotFresh(Unavailable):
    """No replica that answers is as fresh as the read asks for."""

    code = "not_fresh"


class Overloaded(Unavailable):
    """Too much is under way; nothing was changed."""

    code = "overloaded"


class MemoryShort(Overloaded):
    """Rows are slowed or refused for want of memory; deletes, drops, releases and reads go on."""

    code = "memory_short"


class TooManyAttempts(Overloaded):
    """Credentials were wrong too often, from here or for this user; these were not looked at."""

    code = "too_many_attempts"


class RequestTimeout(Unavailable):
    code = "request_timeout"


class Conflict(Unavailable):
    """A precondition of the write no longer holds; reading again and repeating is safe."""

    code, deterministic = "conflict", True


class Busy(Unavailable):
    """Others are changing what this change needs, and it has waited long enough; nothing was changed."""

    code = "busy"


class SchemaMismatch(Unavailable):
    """Rows, or a read, are of another version of the collection's schema than it has now; nothing was changed."""

    code, deterministic = "schema_mismatch", True


class ReadOnly(Unavailable):
    """The disk is full: reads go on, writes are refused until there is room again."""

    code = "read_only"


class StorageFault(AnnulusError):
    code = "storage_fault"


class ChunkDamaged(StorageFault):
    code = "chunk_damaged"


class JournalDamaged(StorageFault):
    code = "journal_damaged"


class DirectoryInUse(StorageFault):
    code = "directory_in_use"


def _tree(base: type[AnnulusError]) -> dict[str, type[AnnulusError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE = _tree(AnnulusError)


def let_go(error: BaseException) -> None:
    """Forget the frames that the error came through, once it has been told: they hold the request's rows, and are held
    in turn by whoever keeps the error, such as the task that raised it. Only the garbage collector would part them.
    """
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__


def error_from(code: str, message: str) -> AnnulusError:
    """Return the error that crossed the log or the wire as (code, message); an unknown code gives AnnulusError."""
    kind = BY_CODE.get(code, AnnulusError)
    error = kind.__new__(kind)
    error.args = (message,)
    return error
