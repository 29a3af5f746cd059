"""What every request over gRPC goes through on its way to its handler and back.

What a request is given here is what `node.api` gives it: an id, a deadline, a place in the metrics, a bound on how many
run at the same time, and an error in Milvus's codes; nothing but a handler's own bug is an unexpected error, and that
one says only where to look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from node.api.faults import crash, refusal
from node.edge import TIMEOUT_S_MAX, Edge, Operation, Request
from node.grpc.calls import Call, Method
from node.grpc.http2 import Code, Http2Connection, Incoming, Refused, inflated
from node.grpc.methods import REFUSED, SERVED
from node.grpc.protocol import DAMAGED, SERVICE, Message, Shape, methods
from node.grpc.status import refuse
from node.rules import METHOD_RULES, UNLISTED
from node.scope import Scope
from node.service import Service
from storage.errors import (
    AnnulusError,
    InvalidParameter,
    NotPermitted,
    Unauthenticated,
)

log = logging.getLogger(__name__)

DATABASE: Final = "dbname"
"""Metadata that names the database of a connection."""
IDENTITIES: Final = ("client-request-id", "client_request_id")
PARSE_OFFLOAD_BYTES_MIN: Final = 1 << 20
TOO_LARGE_CODE: Final = 1102
"""Also of a message that is damaged under its compression."""
Serve = Callable[[Incoming], Awaitable[bytes]]


class GrpcServer:
    """Serves Milvus's methods on the connections that it is given, until it is stopped."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self._service = service
        self._edge = edge
        self._settings = edge.settings
        self._guard = edge.guard
        self._connections: set[Http2Connection] = set()
        self._methods: dict[str, Serve] = {}
        for name, shape in methods().items():
            if name in SERVED:
                self._methods[f"/{SERVICE}/{name}"] = self._serving(name, shape, SERVED[name])
            else:
                self._methods[f"/{SERVICE}/{name}"] = self._refusing(f"{name}: {REFUSED[name]}")

    def connection(self, transport: asyncio.Transport, gone: Callable[[], None]) -> Http2Connection:
        """Return the protocol of a client's connection; `gone` is called once, when it has ended."""

        def ended() -> None:
            self._connections.discard(made)
            gone()

        made = Http2Connection(transport, self, ended)
        self._connections.add(made)
        return made

    async def stop(self) -> None:
        """Take no more requests; return when those that run are done, or the time for that is up."""
        for one in self._connections:
            one.stop()
        if running := [task for one in self._connections for task in one.tasks]:
            await asyncio.wait(running, timeout=self._settings.drain_s_max)
        for one in list(self._connections):
            one.close()
        await self._edge.drain()

    # what connections ask

    @property
    def message_bytes_max(self) -> int:
        return self._settings.body_bytes_max

    def now_s(self) -> float:
        return self._edge.clock.monotonic_s()

    async def answer(self, request: Incoming) -> bytes:
        serve = self._methods.get(request.path)
        if serve is None:
            serve = self._refusing(f"{request.path[:100]} is no method of {SERVICE}")
        return await serve(request)

    # one request

    def _serving(self, name: str, shape: Shape, method: Method) -> Serve:
        operation = Operation(name, name, METHOD_RULES.get(name, UNLISTED), is_rows=method.rows)

        async def serve(request: Incoming) -> bytes:
            return await self._serve(operation, shape, method, request)

        return serve

    def _refusing(self, text: str) -> Serve:
        async def refusing(request: Incoming) -> bytes:
            await self._refuse_unknown(text, request)
            return b""

        return refusing

    async def _serve(self, operation: Operation, shape: Shape, method: Method, request: Incoming) -> bytes:
        with self._edge.request(operation, request.address, _given_id(request.metadata)) as passing:
            response = shape.response()
            try:
                await self._answer(passing, shape, method, request, response)
            except Refused:
                passing.code = TOO_LARGE_CODE
                raise
            except (Unauthenticated, NotPermitted) as error:
                passing.code = refusal(error).code
                code = Code.UNAUTHENTICATED if passing.code == 1800 else Code.PERMISSION_DENIED
                raise Refused(code, error.message) from None
            except AnnulusError as error:
                refused = refusal(error, plan=method.plan)
            except Exception:
                log.exception("request failed unexpectedly method=%s", operation.name)
                refused = crash(passing.identity)
            else:
                return bytes(response.SerializeToString())
            passing.code = refused.code
            return bytes(refuse(shape.response(), refused).SerializeToString())

    async def _refuse_unknown(self, text: str, request: Incoming) -> None:
        """Say that a method is not served, to those who may hear it. Raises Refused."""
        if self._guard is not None:
            scope, code = Scope(0.0), 0
            try:
                await self._guard.admit(_shown(request.metadata), request.address, scope)
            except AnnulusError as error:
                code = refusal(error).code
                raise Refused(Code.UNAUTHENTICATED, error.message) from None
            finally:
                self._guard.note(text.split(":")[0][:100], UNLISTED, scope, request.address, code)
        raise Refused(Code.UNIMPLEMENTED, text)

    async def _answer(
        self,
        passing: Request,
        shape: Shape,
        method: Method,
        request: Incoming,
        response: Message,
    ) -> None:
        """Fill the response. Raises errors of `storage.errors`, and Refused."""
        edge, guard, scope = self._edge, self._guard, passing.scope
        metadata, body = request.metadata, request.body
        rights = None if guard is None else await guard.admit(_shown(metadata), passing.address, scope)
        passing.take_place()
        passing.allot(self._timeout_s(method, request.until_s))
        with passing.within(max(0.0, scope.deadline_s - edge.clock.monotonic_s())):
            if request.encoding:
                body = await edge.offload(inflated, body, request.encoding, self.message_bytes_max)
            call = Call(
                self._service,
                await self._parsed(shape, body),
                response,
                str(metadata.get(DATABASE, "")),
                edge.offload,
                edge.clock,
                edge.ready,
                edge.admission,
                len(body),
            )
            if guard is not None:
                database = getattr(call.request, "dbName", "") or call.database
                guard.check(rights, passing.operation.privilege, scope, database, **_named(call.request))
            if method.mutates:
                await passing.carry_out(method.handler(call))
            else:
                await method.handler(call)

    async def _parsed(self, shape: Shape, body: bytes) -> Message:
        try:
            if len(body) < PARSE_OFFLOAD_BYTES_MIN:
                return shape.request.FromString(body)
            return await self._edge.offload(shape.request.FromString, body)
        except DAMAGED:
            raise InvalidParameter(
                f"the request is no {shape.request.DESCRIPTOR.name}: its bytes can not be parsed: invalid parameter"
            ) from None

    def _timeout_s(self, method: Method, until_s: float | None) -> float:
        if until_s is None:
            return TIMEOUT_S_MAX if method.patient else self._settings.request_timeout_s
        return min(max(until_s - self.now_s(), 0.0), TIMEOUT_S_MAX)


def _given_id(metadata: Mapping[str, str]) -> str | None:
    return next((metadata[name] for name in IDENTITIES if name in metadata), None)


def _shown(metadata: Mapping[str, str]) -> str | None:
    """Return the credentials of a request, as an HTTP header would have them."""
    shown = metadata.get("authorization")
    return None if shown is None else shown if " " in shown else f"Basic {shown}"


def _named(request: Message) -> dict[str, Any]:
    """Return what a request names, as `Guard.check` takes it; Milvus has several fields for one thing."""
    names: list[str] = []
    for field in ("collection_name", "collection_names", "collectionName", "oldName"):
        found = getattr(request, field, "")
        names += [found] if isinstance(found, str) else list(found)
    ids = getattr(request, "collectionID", 0)
    user = getattr(request, "username", "") or getattr(request, "user_name", "")
    if not user and hasattr(request, "user"):
        user = request.user.name
    return {
        "names": [name for name in names if name],
        "alias": getattr(request, "alias", ""),
        "collection_ids": [one for one in ([ids] if isinstance(ids, int) else ids) if one],
        "users": [user] if user else [],
    }
