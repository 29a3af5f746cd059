"""The gRPC server, and what every request goes through on its way to its handler and back. The door to grpcio.

It listens on a socket in the file system that only this process's user may use; clients come to the port of the HTTP
API, whose connections are looked at and passed on (`node/tunnel.py`). What a request is given here is what `node.api`
gives it: an id, a deadline, a place in the metrics, a bound on how many run at the same time, and an error in Milvus's
codes; nothing but a handler's own bug is an unexpected error, and that one says only where to look.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines, of broken clients most, would be among ours

import grpc

from node.api.faults import crash, refusal
from node.edge import TIMEOUT_S_MAX, Edge, Operation, Request
from node.grpc.calls import Call, Method
from node.grpc.methods import REFUSED, SERVED
from node.grpc.protocol import DAMAGED, SERVICE, Message, Shape, methods
from node.grpc.status import refuse
from node.rules import METHOD_RULES, UNLISTED
from node.scope import Scope
from node.service import Service
from node.tunnel import Backend
from storage.errors import (
    AnnulusError,
    InvalidParameter,
    NotPermitted,
    Unauthenticated,
)

log = logging.getLogger(__name__)

ANSWER_BYTES_MAX: Final = 512 << 20
"""Of one response; how many rows may be asked for keeps it below (`node.api.limits`)."""
PREFIX: Final = "annulus-grpc-"
SWEPT_S_MIN: Final = 60.0
IDLE_MS: Final = 600_000
"""A connection without a call is closed: clients open another one without noticing."""
HANDSHAKE_MS: Final = 30_000
DATABASE: Final = "dbname"
"""Metadata that names the database of a connection."""
IDENTITIES: Final = ("client-request-id", "client_request_id")
PARSE_OFFLOAD_BYTES_MIN: Final = 1 << 20
Context = Any


class GrpcServer:
    """Serves Milvus's methods at `backend` from `start` to `stop`."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self._service = service
        self._edge = edge
        self._settings = edge.settings
        self._guard = edge.guard
        self._server: Any = None
        self._directory = ""
        self.backend: Backend

    async def start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix=PREFIX)  # which only its owner may enter
        _sweep(os.stat(self._directory).st_mtime - SWEPT_S_MIN)
        self.backend = Backend(self._directory)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._settings.body_bytes_max),
                ("grpc.max_send_message_length", ANSWER_BYTES_MAX),
                ("grpc.max_connection_idle_ms", IDLE_MS),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        self._server.add_generic_rpc_handlers((_Handlers(self._serve, self._refuse_unknown),))
        self._server.add_insecure_port(f"unix:{self.backend.path}")
        await self._server.start()

    async def stop(self) -> None:
        """Take no more requests; return when those that run are done, or the time for that is up."""
        if self._server is not None:
            await self._server.stop(self._settings.drain_s_max)
            self._server = None
        await self._edge.drain()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _serve(self, operation: Operation, shape: Shape, method: Method, body: bytes, context: Context) -> bytes:
        metadata = dict(context.invocation_metadata() or ())
        with self._edge.request(operation, self._address(context), _given_id(metadata)) as passing:
            response = shape.response()
            try:
                await self._answer(passing, shape, method, body, context, metadata, response)
            except (Unauthenticated, NotPermitted) as error:
                passing.code = refusal(error).code
                status = grpc.StatusCode.UNAUTHENTICATED if passing.code == 1800 else grpc.StatusCode.PERMISSION_DENIED
                await context.abort(status, error.message)
            except AnnulusError as error:
                refused = refusal(error, plan=method.plan)
            except Exception:
                log.exception("request failed unexpectedly method=%s", operation.name)
                refused = crash(passing.identity)
            else:
                return bytes(response.SerializeToString())
            passing.code = refused.code
            return bytes(refuse(shape.response(), refused).SerializeToString())

    async def _refuse_unknown(self, text: str, context: Context) -> None:
        """Say that a method is not served, to those who may hear it."""
        if self._guard is not None:
            scope, code, address = Scope(0.0), 0, self._address(context)
            metadata = dict(context.invocation_metadata() or ())
            try:
                await self._guard.admit(_shown(metadata), address, scope)
            except AnnulusError as error:
                code = refusal(error).code
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
            finally:
                self._guard.note(text.split(":")[0][:100], UNLISTED, scope, address, code)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

    async def _answer(
        self,
        passing: Request,
        shape: Shape,
        method: Method,
        body: bytes,
        context: Context,
        metadata: dict[str, Any],
        response: Message,
    ) -> None:
        """Fill the response. Raises errors of `storage.errors`."""
        edge, guard, scope = self._edge, self._guard, passing.scope
        rights = None if guard is None else await guard.admit(_shown(metadata), passing.address, scope)
        passing.take_place()
        passing.allot(self._timeout_s(method, context.time_remaining()))
        with passing.within(max(0.0, scope.deadline_s - edge.clock.monotonic_s())):
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

    def _address(self, context: Context) -> str:
        return self.backend.client_of(context.peer())

    def _timeout_s(self, method: Method, left_s: float | None) -> float:
        if left_s is None:
            return TIMEOUT_S_MAX if method.patient else self._settings.request_timeout_s
        return min(max(left_s, 0.0), TIMEOUT_S_MAX)


def _sweep(before_s: float) -> None:
    """Remove the sockets of nodes that were killed: nobody listens there. One that is younger may be starting."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if os.stat(directory).st_mtime >= before_s:
                continue
            try:
                probe.connect(f"{directory}/grpc")
            except ConnectionRefusedError:
                shutil.rmtree(directory)


def _given_id(metadata: dict[str, Any]) -> str | None:
    given = next((metadata[name] for name in IDENTITIES if name in metadata), None)
    return given if isinstance(given, str) else None


def _shown(metadata: dict[str, Any]) -> str | None:
    """Return the credentials of a request, as an HTTP header would have them."""
    shown = metadata.get("authorization")
    return None if not isinstance(shown, str) else shown if " " in shown else f"Basic {shown}"


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


Serve = Callable[[Operation, Shape, Method, bytes, Context], Awaitable[bytes]]
Refuse = Callable[[str, Context], Awaitable[None]]


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """The methods by their paths. Messages stay bytes here: what is wrong with them is answered like the rest."""

    def __init__(self, serve: Serve, refuse: Refuse) -> None:
        self._refuse = refuse
        self._known: dict[str, Any] = {}
        for name, shape in methods().items():
            if name in SERVED:
                function = _function(serve, name, shape, SERVED[name])
            else:
                function = _refusing(f"{name}: {REFUSED[name]}", refuse)
            self._known[f"/{SERVICE}/{name}"] = grpc.unary_unary_rpc_method_handler(function)

    def service(self, details: Any) -> Any:
        found = self._known.get(details.method)
        if found is None:
            text = f"{details.method[:100]} is no method of {SERVICE}"
            return grpc.unary_unary_rpc_method_handler(_refusing(text, self._refuse))
        return found


def _function(serve: Serve, name: str, shape: Shape, method: Method) -> Callable[[bytes, Context], Awaitable[bytes]]:
    operation = Operation(name, name, METHOD_RULES.get(name, UNLISTED), is_rows=method.rows)

    async def function(body: bytes, context: Context) -> bytes:
        return await serve(operation, shape, method, body, context)

    return function


def _refusing(text: str, refuse: Refuse) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def refusing(body: bytes, context: Context) -> bytes:
        await refuse(text, context)
        return b""

    return refusing
