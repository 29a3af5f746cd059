"""Errors as the API shows them: one table, error class -> Milvus's code, the HTTP status, the words in front.

Milvus answers HTTP 200 for nearly every error and clients look at `code`. The statuses of the table are used when the
setting for standard statuses is on; only a timeout and a fault of the server itself always show their status.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from storage.errors import (
    AliasConflict,
    AliasExists,
    AliasNotFound,
    AnnulusError,
    BadJson,
    BadPrimaryKey,
    BadRequest,
    BadRow,
    Busy,
    ChunkDamaged,
    CollectionLimit,
    CollectionNotFound,
    CollectionNotLoaded,
    Conflict,
    DatabaseLimit,
    DatabaseNotFound,
    DirectoryInUse,
    FieldNotFound,
    FilterError,
    GroupNameInvalid,
    IndexConflict,
    IndexNotFound,
    InvalidParameter,
    JournalDamaged,
    MemoryShort,
    MetricNotFound,
    MissingParameter,
    NameInvalid,
    NoLeader,
    NotAuthenticated,
    NotFresh,
    NotPermitted,
    OutcomeUnknown,
    Overloaded,
    PartitionNotFound,
    PartitionNotLoaded,
    PeerUnreachable,
    ReadOnly,
    RequestTimeout,
    SchemaMismatch,
    SnapshotGone,
    StorageFault,
    TooManyAttempts,
    Unauthenticated,
    Unavailable,
    UnsupportedOperation,
    let_go,
)

UNEXPECTED_CODE: Final = 65_535
RETRY_AFTER_S: Final = 1
"""A new leader is there within two seconds and an overload passes sooner; asking once a second harms nobody."""
MEMORY_RETRY_AFTER_S: Final = 2
"""It takes a few seconds to write rows to chunks."""


@dataclass(frozen=True)
class Fault:
    """How one class of errors is shown; `outer` goes in front of the message unless it is there already."""

    code: int
    status: int = 400
    outer: str = ""
    always_status: bool = False


FAULTS: Final[Mapping[type[AnnulusError], Fault]] = {
    AnnulusError: Fault(UNEXPECTED_CODE, 500),
    BadRequest: Fault(1100),
    InvalidParameter: Fault(1100),
    MissingParameter: Fault(1802, outer="missing required parameters"),
    BadJson: Fault(1801, outer="can only accept json format request"),
    BadRow: Fault(1804, outer="fail to deal the insert data"),
    BadPrimaryKey: Fault(1806, outer="please check the primary key and its' type can only in [int, string]"),
    FilterError: Fault(1100),
    UnsupportedOperation: Fault(3000, outer="unsupported operation"),
    NameInvalid: Fault(1100),
    FieldNotFound: Fault(1700),
    MetricNotFound: Fault(1200),
    DatabaseNotFound: Fault(800),
    DatabaseLimit: Fault(801),
    CollectionNotFound: Fault(100),
    CollectionNotLoaded: Fault(101),
    CollectionLimit: Fault(102),
    PartitionNotFound: Fault(200),
    PartitionNotLoaded: Fault(201),
    AliasNotFound: Fault(1600),
    AliasExists: Fault(1602),
    AliasConflict: Fault(1601),
    IndexNotFound: Fault(700),
    IndexConflict: Fault(702),
    SnapshotGone: Fault(1100),
    Unauthenticated: Fault(1800, 401, always_status=True),
    NotAuthenticated: Fault(1400),
    NotPermitted: Fault(1401, 403, outer="privilege not permitted", always_status=True),
    GroupNameInvalid: Fault(1402),
    Unavailable: Fault(2, 503),
    NoLeader: Fault(1, 503),
    OutcomeUnknown: Fault(2, 503),
    NotFresh: Fault(2, 503),
    PeerUnreachable: Fault(2, 503),
    Overloaded: Fault(4, 429, outer="too many concurrent requests, queue is full"),
    MemoryShort: Fault(9, 429, outer="quota exceeded"),
    TooManyAttempts: Fault(1807, 429, outer="request is rejected by limiter", always_status=True),
    RequestTimeout: Fault(10_001, 408, always_status=True),
    Conflict: Fault(2, 503),
    Busy: Fault(2, 503),
    SchemaMismatch: Fault(109, 500, outer="collection schema mismatch"),
    ReadOnly: Fault(9, 429, outer="quota exceeded"),
    StorageFault: Fault(5, 500, always_status=True),
    ChunkDamaged: Fault(5, 500, always_status=True),
    JournalDamaged: Fault(5, 500, always_status=True),
    DirectoryInUse: Fault(5, 500, always_status=True),
}


@dataclass(frozen=True)
class Refusal:
    """An error as a reply: HTTP status, headers, and the envelope's code and message."""

    status: int
    code: int
    message: str
    headers: Mapping[str, str]


def refusal(error: AnnulusError, *, plan: str = "", standard_status: bool = False) -> Refusal:
    """Return how to show the error, which lets go of what it came through.

    plan  the kind of plan that a filter belongs to: "query" or "delete"
    """
    fault = next(FAULTS[kind] for kind in type(error).__mro__ if kind in FAULTS)
    message = error.message
    outer = f"failed to create {plan} plan" if plan and isinstance(error, FilterError) else fault.outer
    if outer and not message.startswith(outer):
        message = f"{outer}, error: {message}" if outer == fault.outer else f"{outer}: {message}"
    status = fault.status if standard_status or fault.always_status else 200
    # What timed out or lost its leader may still be made: a client that just repeats an insert could make it twice.
    retry = error.retriable and not isinstance(error, RequestTimeout | OutcomeUnknown)
    after_s = MEMORY_RETRY_AFTER_S if isinstance(error, MemoryShort) else RETRY_AFTER_S
    headers = {"Retry-After": str(after_s)} if retry else {}
    let_go(error)
    return Refusal(status, fault.code, message, headers)


def crash(request_id: str) -> Refusal:
    """Return the reply to a fault that nobody foresaw: it tells where to look, and nothing about our insides."""
    message = f"unexpected error: it is in the server's log under request id {request_id}"
    return Refusal(500, UNEXPECTED_CODE, message, {})
