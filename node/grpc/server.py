"""The gRPC server, and what every request goes through on its way to its handler and back. The door to grpcio.

It listens on a socket in the file system that only this process's user may use; clients come to the port of the HTTP
API, whose connections are looked at and passed on (`node/tunnel.py`). What a request is given here is what `node.api`
gives it: an id, a deadline, a place in the metrics, a bound on how many run at the same time, and an error in Milvus's
codes; nothing but a handler's own bug is an unexpected error, and that one says only where to look.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines, of broken clients most, would be among ours

import grpc

from node.admission import Admission
from node.api.deadlines import Deadlines
from node.api.faults import Refusal, crash, refusal
from node.api.server import ANSWER_RATIO_MAX, ANSWER_S_MAX, REQUEST_ID_CHARS_MAX, RESERVED_RATIO, TIMEOUT_S_MAX
from node.clock import Clock
from node.grpc.calls import Call, Method
from node.grpc.methods import REFUSED, SERVED
from node.grpc.protocol import DAMAGED, SERVICE, Message, Shape, methods
from node.grpc.status import refuse
from node.guard import Guard
from node.logs import request_id
from node.metrics import Metrics
from node.rules import METHOD_RULES, UNLISTED
from node.scope import Scope, current
from node.service import Service
from node.settings import ApiSettings
from node.workers import Executor, Lane
from storage.errors import (
    AnnulusError,
    BadRequest,
    InvalidParameter,
    NotPermitted,
    Overloaded,
    RequestTimeout,
    Unauthenticated,
)

log = logging.getLogger(__name__)

ANSWER_BYTES_MAX: Final = 512 << 20
"""Of one response; how many rows may be asked for keeps it below (`node.api.limits`)."""
PREFIX: Final = "annulus-grpc-"
IDLE_MS: Final = 600_000
"""A connection without a call is closed: clients open another one without noticing."""
HANDSHAKE_MS: Final = 30_000
DATABASE: Final = "dbname"
"""Metadata that names the database of a connection."""
IDENTITIES: Final = ("client-request-id", "client_request_id")
PARSE_OFFLOAD_BYTES_MIN: Final = 1 << 20
Context = Any


class GrpcServer:
    """Serves Milvus's methods at `path` from `start` to `stop`."""

    def __init__(
        self,
        service: Service,
        settings: ApiSettings,
        metrics: Metrics,
        *,
        clock: Clock,
        executor: Executor,
        admission: Admission,
        ready: Callable[[], str] = lambda: "",
        guard: Guard | None = None,
    ) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._executor = executor
        self._admission = admission
        self._ready = ready
        self._guard = guard
        self._running = 0
        self._deadlines = Deadlines()
        self._abandoned: set[asyncio.Future[Any]] = set()
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(4)
        self._server: Any = None
        self._directory = ""

    @property
    def path(self) -> str:
        """The socket in the file system."""
        return f"{self._directory}/grpc"

    async def start(self) -> None:
        _sweep()
        self._directory = tempfile.mkdtemp(prefix=PREFIX)  # which only its owner may enter
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
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def stop(self) -> None:
        """Take no more requests; return when those that run are done, or the time for that is up."""
        if self._server is not None:
            await self._server.stop(self._settings.drain_s_max)
            self._server = None
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=self._settings.drain_s_max)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _serve(self, name: str, shape: Shape, method: Method, body: bytes, context: Context) -> bytes:
        metadata = dict(context.invocation_metadata() or ())
        identity = self._identity(metadata)
        token = request_id.set(identity)
        began_s = self._clock.monotonic_s()
        self._metrics.request_begun()
        self._running += 1
        scope = Scope(began_s)
        scope_token = current.set(scope)
        code = 0
        try:
            response = shape.response()
            try:
                await self._answer(name, shape, method, body, context, metadata, response, scope)
            except (Unauthenticated, NotPermitted) as error:
                code = refusal(error).code
                status = grpc.StatusCode.UNAUTHENTICATED if code == 1800 else grpc.StatusCode.PERMISSION_DENIED
                await context.abort(status, error.message)
            except AnnulusError as error:
                refused = refusal(error, plan=method.plan)
            except Exception:
                log.exception("request failed unexpectedly method=%s", name)
                refused = crash(identity)
            else:
                return await self._encoded(response)
            code = refused.code
            return _refused(shape, refused)
        except asyncio.CancelledError:
            code = -1
            raise
        finally:
            self._running -= 1
            self._metrics.request_ended(route=name, code=code, seconds=self._clock.monotonic_s() - began_s)
            if self._guard is not None:
                self._guard.note(name, METHOD_RULES.get(name, UNLISTED), scope, "", code, identity)
            request_id.reset(token)
            current.reset(scope_token)

    async def _refuse_unknown(self, text: str, context: Context) -> None:
        """Say that a method is not served, to those who may hear it."""
        if self._guard is not None:
            scope, code = Scope(0.0), 0
            metadata = dict(context.invocation_metadata() or ())
            try:
                await self._guard.admit(_shown(metadata), "", scope)
            except AnnulusError as error:
                code = refusal(error).code
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
            finally:
                self._guard.note(text.split(":")[0][:100], UNLISTED, scope, "", code)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

    async def _answer(
        self,
        name: str,
        shape: Shape,
        method: Method,
        body: bytes,
        context: Context,
        metadata: dict[str, Any],
        response: Message,
        scope: Scope,
    ) -> None:
        """Fill the response. Raises errors of `storage.errors`."""
        rights = None if self._guard is None else await self._guard.admit(_shown(metadata), "", scope)
        limit = self._settings.requests_running_max
        if method.rows:
            limit -= int(RESERVED_RATIO * limit)
        if self._running > limit:
            raise Overloaded(
                f"{self._running} requests are running, {limit} at most may (api.requests_running_max raises it): "
                "try again soon"
            )
        timeout_s = self._timeout_s(method, context.time_remaining())
        scope.deadline_s += timeout_s - min(ANSWER_S_MAX, ANSWER_RATIO_MAX * timeout_s)
        mutation: asyncio.Future[None] | None = None
        try:
            with self._deadlines.within(max(0.0, scope.deadline_s - self._clock.monotonic_s())):
                call = Call(
                    self._service,
                    await self._parsed(shape, body),
                    response,
                    str(metadata.get(DATABASE, "")),
                    self._offload,
                    self._clock,
                    self._ready,
                    self._admission,
                    len(body),
                )
                if self._guard is not None:
                    privilege = METHOD_RULES.get(name, UNLISTED)
                    database = getattr(call.request, "dbName", "") or call.database
                    self._guard.check(rights, privilege, scope, database, **_named(call.request))
                if not method.mutates:
                    await method.handler(call)
                    return
                mutation = asyncio.ensure_future(method.handler(call))
                await asyncio.shield(mutation)
        except TimeoutError:
            if mutation is None:
                raise RequestTimeout("request timeout") from None
            self._abandon(mutation)
            raise RequestTimeout("request timeout: the change may still be made, look before repeating it") from None
        except asyncio.CancelledError:
            if mutation is not None:
                self._abandon(mutation)
            raise

    async def _parsed(self, shape: Shape, body: bytes) -> Message:
        try:
            if len(body) < PARSE_OFFLOAD_BYTES_MIN:
                return shape.request.FromString(body)
            return await self._offload(shape.request.FromString, body)
        except DAMAGED:
            raise InvalidParameter(
                f"the request is no {shape.request.DESCRIPTOR.name}: its bytes can not be parsed: invalid parameter"
            ) from None

    async def _encoded(self, response: Message) -> bytes:
        encoded: bytes = response.SerializeToString()
        return encoded

    async def _offload(self, function: Callable[..., Any], *args: Any) -> Any:
        result, refused = await self._executor.run(Lane.PARSE, _apart, function, *args)
        if refused is not None:
            raise refused
        return result

    def _abandon(self, mutation: asyncio.Future[None]) -> None:
        self._abandoned.add(mutation)

        def done(mutation: asyncio.Future[None]) -> None:
            self._abandoned.discard(mutation)
            if not mutation.cancelled() and (error := mutation.exception()) is not None:
                level = logging.INFO if isinstance(error, BadRequest) else logging.WARNING
                log.log(level, "request failed after its time was up error=%r", error)

        mutation.add_done_callback(done)

    def _identity(self, metadata: dict[str, Any]) -> str:
        """Return the request's id: the client's if it is short and printable, else a new one."""
        for name in IDENTITIES:
            given = metadata.get(name)
            if isinstance(given, str) and 0 < len(given) <= REQUEST_ID_CHARS_MAX and given.isprintable():
                return given
        return f"{self._id_prefix}-g{next(self._ids):x}"

    def _timeout_s(self, method: Method, left_s: float | None) -> float:
        if left_s is None:
            return TIMEOUT_S_MAX if method.patient else self._settings.request_timeout_s
        return min(max(left_s, 0.0), float(TIMEOUT_S_MAX))


def _sweep() -> None:
    """Remove the sockets of nodes that were killed: nobody listens there."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(f"{directory}/grpc")
            except ConnectionRefusedError:
                shutil.rmtree(directory)


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


Serve = Callable[[str, Shape, Method, bytes, Context], Awaitable[bytes]]
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
    async def function(body: bytes, context: Context) -> bytes:
        return await serve(name, shape, method, body, context)

    return function


def _refusing(text: str, refuse: Refuse) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def refusing(body: bytes, context: Context) -> bytes:
        await refuse(text, context)
        return b""

    return refusing


def _refused(shape: Shape, refused: Refusal) -> bytes:
    encoded: bytes = refuse(shape.response(), refused).SerializeToString()
    return encoded


def _apart(function: Callable[..., Any], *args: Any) -> tuple[Any, BadRequest | None]:
    """Return the function's result, or how it refused a bad request, freed of what it left behind on this thread."""
    try:
        return function(*args), None
    except BadRequest as error:
        error.__context__ = None
        return None, error.with_traceback(None)
