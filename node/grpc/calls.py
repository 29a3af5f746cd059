"""What a handler of a gRPC method gets, and what it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from node.admission import Admission
from node.clock import Clock
from node.grpc.protocol import Message
from node.service import Service


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `offload(function, *args)` runs a function of immutable arguments on a worker thread."""

    service: Service
    request: Message
    response: Message
    """Empty; the handler fills it."""
    metadata_database: str
    offload: Callable[..., Awaitable[Any]]
    clock: Clock
    ready: Callable[[], str]
    admission: Admission
    size_bytes: int
    """Of the request as it came."""

    @property
    def database(self) -> str:
        """The request's database, else the connection's, else `default`."""
        return getattr(self.request, "db_name", "") or self.metadata_database or "default"

    @property
    def collection(self) -> str:
        name: str = self.request.collection_name
        return name


Handler = Callable[[Call], Awaitable[None]]
"""Fills `call.response`; raises errors of `storage.errors`."""


@dataclass(frozen=True)
class Method:
    """A method that is served."""

    handler: Handler
    mutates: bool = False
    """A mutation is never cancelled half way: when its time is up it goes on, and the client is told so."""
    plan: str = ""
    """What kind of plan a filter of this method makes, for the error text."""
    rows: bool = False
    """It writes, reads or searches rows: some requests may run that others than these are for."""
    patient: bool = False
    """Waits as long as it takes for a client that names no deadline."""


Methods = Mapping[str, Method]


def pairs(given: Message) -> dict[str, str]:
    """Return a list of Milvus's key-value pairs as a map; the last of a key counts."""
    return {one.key: one.value for one in given}


def set_pairs(shown: Message, values: Mapping[str, Any]) -> None:
    """Append the values to a list of Milvus's key-value pairs."""
    for key, value in values.items():
        shown.add(key=key, value=str(value))
