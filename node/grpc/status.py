"""Errors as Milvus's `Status`: the codes and words of the REST API, and the numbers that clients before 2.3 look at."""

from __future__ import annotations

from typing import Final

from node.api.faults import Refusal
from node.grpc.protocol import Message, message

_STATUS: Final = message("common.Status")
UNEXPECTED_ERROR: Final = 1
OLD_CODES: Final = {
    1: 56,  # NotReadyServe
    3: 52,  # InsufficientMemoryToLoad
    8: 49,  # RateLimit
    9: 48,  # ForceDeny
    100: 4,  # CollectionNotExists
    109: 62,  # SchemaMismatch
    200: 15,  # MetaFailed
    700: 25,  # IndexNotExist
    1100: 5,  # IllegalArgument
}
"""Milvus's code -> the `ErrorCode` of its older protocol; others are UnexpectedError."""


def status_of(response: Message) -> Message:
    """Return the part of a response that says how it went."""
    if isinstance(response, _STATUS):
        return response
    return response.alter_status if hasattr(response, "alter_status") else response.status


def refuse(response: Message, refused: Refusal) -> Message:
    """Return the response, saying that the request was refused."""
    status = status_of(response)
    status.code = refused.code
    status.error_code = OLD_CODES.get(refused.code, UNEXPECTED_ERROR)
    status.reason = refused.message
    status.detail = refused.message
    status.retriable = "Retry-After" in refused.headers
    return response
