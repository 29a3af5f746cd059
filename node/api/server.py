"""The HTTP server: the aiohttp application, and what every request goes through on its way to its handler and back.

There is no chain of middlewares: `_serve` is the one function around every handler. It gives the request an id, counts
it, reads the body within bounds, decodes it, lets the handler work until its time is up, and turns whatever comes out
into a reply. What goes wrong on the way becomes code and message; nothing but the handler's own bug is a 500.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from hashlib import blake2b
from typing import Any, Final

import orjson
from aiohttp import ClientError, hdrs, web

from cluster.idempotency import KEY_CHARS_MAX
from node.admission import Gate
from node.api import collections, entities, hybrid, imports, nodes, users
from node.api.calls import Call, Handler
from node.api.faults import Refusal, crash, refusal
from node.api.forms import Form, Forms
from node.api.limits import SMALL_CBOR_BYTES
from node.api.openapi import document
from node.api.replies import Style, encode, encode_large, is_large, success
from node.api.requests import CBOR, JSON, decode_cbor, decode_json
from node.api.routes import ROUTES, VECTORS, Route
from node.edge import TIMEOUT_S_MAX, Edge, Operation, Request
from node.guard import names_in
from node.keyed import InsertKey
from node.metrics import CONTENT_TYPE as METRICS_TYPE
from node.rules import ROUTE_RULES, UNLISTED
from node.scope import Scope, current, from_token, to_token
from node.service import Service
from storage.errors import (
    AnnulusError,
    BadJson,
    InvalidParameter,
    Overloaded,
    UnsupportedOperation,
)

log = logging.getLogger(__name__)

JSON_TYPE: Final = "application/json; charset=utf-8"
SMALL_BODY_BYTES: Final = 64 << 10
"""Bodies up to here are not counted against the memory for bodies: the number of requests bounds them."""
LENGTH_TRUSTED_S: Final = 2.0
"""How long room is kept for a body that does not arrive; after that, for what has arrived of it."""
DECODE_OFFLOAD_BYTES_MIN: Final = 512 << 10
TOO_LARGE_CODE: Final = 1102
_HANDLERS: Final[Mapping[str, Handler]] = {
    **collections.HANDLERS,
    **entities.HANDLERS,
    **hybrid.HANDLERS,
    **nodes.HANDLERS,
    **imports.HANDLERS,
    **users.HANDLERS,
}
_ROWS: Final = frozenset({"insert", "upsert"})
_RESERVED_FROM: Final = frozenset(entities.HANDLERS) - {"delete"}
SESSION: Final = "Annulus-Session"
SNAPSHOT: Final = "Annulus-Snapshot"
KEY: Final = "Annulus-Idempotency-Key"
REPEATED: Final = "Annulus-Idempotency-Repeated"
"""Header of the answer that was given before."""
_CORS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Allow-Methods": "POST, GET, OPTIONS",
    "X-Content-Type-Options": "nosniff",
}
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})


Page = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TooLarge(Exception):
    """The body is larger than the limit."""


def make_app(service: Service, edge: Edge, *, standard_status: bool = False) -> web.Application:
    """Return the application; `standard_status` shows errors with their own HTTP status instead of Milvus's 200."""
    server = _Server(service, edge, standard_status)
    # The body limit is kept by `_read`, which can say so in the API's own words.
    app = web.Application(client_max_size=2 * edge.settings.body_bytes_max)
    for route in ROUTES:
        app.router.add_post(route.full_path, server.endpoint(route))
    app.router.add_get("/healthz", server.healthz)
    app.router.add_get("/readyz", server.readyz)
    app.router.add_get("/metrics", server.guarded(server.metrics_page))
    app.router.add_get("/status", server.guarded(server.status_page))
    app.router.add_get("/cluster/check", server.guarded(server.check_page))
    app.router.add_post("/cluster/check", server.guarded(server.check_page))
    app.router.add_get("/openapi.json", server.guarded(server.openapi))
    app.router.add_route("*", "/{path:.*}", server.guarded(server.elsewhere))
    app.on_cleanup.append(lambda _: edge.drain())
    return app


class _Server:
    def __init__(self, service: Service, edge: Edge, standard_status: bool) -> None:
        self.service = service
        self.edge = edge
        self.guard = edge.guard
        self.settings = settings = edge.settings
        self.standard_status = standard_status
        self.described = b""
        self.styles = {
            (cbor, text): Style(cbor, text, settings.legacy_array_response, settings.legacy_json_response)
            for cbor in (False, True)
            for text in (False, True)
        }

    # --- one request ---------------------------------------------------------------------------------------------

    def endpoint(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the function that serves a route."""
        handler = _HANDLERS[route.handler] if route.handler else _unsupported
        forms = Forms(route.shape) if VECTORS in route.shape.fields else None
        privilege = ROUTE_RULES.get(route.full_path, UNLISTED)
        operation = Operation(route.path, route.full_path, privilege, is_rows=route.handler in _RESERVED_FROM)

        async def serve(request: web.Request) -> web.StreamResponse:
            given_id = request.headers.get("X-Request-Id")
            with self.edge.request(operation, request.remote or "", given_id) as passing:
                return await self._serve(request, passing, route, handler, forms)

        return serve

    async def _serve(
        self, request: web.Request, passing: Request, route: Route, handler: Handler, forms: Forms | None
    ) -> web.StreamResponse:
        style = self._style(request.headers)
        try:
            envelope = await self._answer(request, passing, route, handler, forms, style)
            if is_large(envelope):
                body = await self.edge.offload(encode_large, envelope, style)
            else:
                body = encode(envelope, style)
            return _response(200, body, style, passing.identity, _tokens(passing.scope))
        except AnnulusError as error:
            refused = refusal(error, plan=route.plan, standard_status=self.standard_status)
        except TooLarge:
            refused = self._too_large()
        except Exception:
            log.exception("request failed unexpectedly route=%s", route.path)
            refused = crash(passing.identity)
        passing.code = refused.code
        body = encode({"code": refused.code, "message": refused.message}, style)
        response = _response(refused.status, body, style, passing.identity, refused.headers)
        if refused.code == TOO_LARGE_CODE:
            response.force_close()
        return response

    async def _answer(
        self,
        request: web.Request,
        passing: Request,
        route: Route,
        handler: Handler,
        forms: Forms | None,
        style: Style,
    ) -> Mapping[str, Any]:
        """Return the envelope of a success. Raises errors of `storage.errors` and TooLarge."""
        passing.take_place()
        headers, scope = request.headers, passing.scope
        rights = None
        if self.guard is not None:  # before anything of the body is looked at
            shown = headers.get(hdrs.AUTHORIZATION)
            if route.handler != "find_entry" or not self.guard.is_newcomer(shown):
                rights = await self.guard.admit(shown, passing.address, scope)
                if route.handler == "find_entry":
                    self.guard.check(rights, passing.operation.privilege, scope, "")
        timeout_s = self._timeout_s(headers.get("Request-Timeout"))
        passing.allot(timeout_s)
        if SESSION in headers:
            scope.seen = from_token(headers[SESSION], SESSION)
        if SNAPSHOT in headers:
            scope.at = from_token(headers[SNAPSHOT], SNAPSHOT)
        if KEY in headers:
            _check_key(headers[KEY], route)
            if not route.takes_key:
                scope.insert_key = InsertKey.parse(headers[KEY])
        room = _Room(self.edge.admission.bodies, request)
        try:
            with passing.within(timeout_s):
                body = await self._read(request, room)
                cbor = headers.get(hdrs.CONTENT_TYPE, "").startswith(CBOR)
                if forms is not None and len(body) < SMALL_CBOR_BYTES:
                    values, form = forms.decode_cbor(body) if cbor else forms.decode_json(body)
                else:
                    decode = decode_cbor if cbor else decode_json
                    if len(body) < (SMALL_CBOR_BYTES if cbor else DECODE_OFFLOAD_BYTES_MIN):
                        values = decode(body, route.shape)
                    else:
                        values = await self.edge.offload(decode, body, route.shape)
                    form = Form(values)
                database = values.get("dbName") or headers.get("DB-Name") or "default"
                if self.guard is not None and route.handler != "find_entry":
                    self.guard.check(rights, passing.operation.privilege, scope, database, **names_in(values))
                admission = self.edge.admission
                call = Call(self.service, route, values, database, style, self.edge.offload, form, admission, len(body))
                if route.handler in _ROWS:
                    room.release()  # it holds another from here on, which its collection shares with others
                if not route.mutates:
                    return await handler(call)
                if KEY in headers and route.takes_key:
                    handler = _keyed(handler, headers[KEY], body)
                return await passing.carry_out(handler(call))
        finally:
            room.release()

    async def _read(self, request: web.Request, room: _Room) -> bytes:
        """Return the body; a large one when there is room for it."""
        limit = self.settings.body_bytes_max
        length = request.content_length
        if length is not None and length > limit:
            raise TooLarge
        try:
            if length is not None and length <= SMALL_BODY_BYTES and hdrs.CONTENT_ENCODING not in request.headers:
                return await request.read()
            if length is not None:
                await room.expect(length)
            chunks = []
            async for chunk in request.content.iter_any():
                room.arrived += len(chunk)
                if room.arrived > limit:
                    raise TooLarge
                if not room.has_arrived:
                    raise Overloaded("the memory for request bodies is in use: try again soon")
                chunks.append(chunk)
            room.trim()
            return b"".join(chunks)
        except (web.RequestPayloadError, ClientError, ConnectionError) as error:
            raise BadJson(
                f"can only accept json format request, error: the body did not arrive whole: {type(error).__name__}"
            ) from None

    # --- headers -------------------------------------------------------------------------------------------------

    def _style(self, headers: Mapping[str, str]) -> Style:
        accept = headers.get(hdrs.ACCEPT, "")
        cbor = CBOR in accept
        if cbor == (JSON in accept):  # neither or both: answer in the form of the question
            cbor = headers.get(hdrs.CONTENT_TYPE, "").startswith(CBOR)
        numbers = headers.get("Accept-Type-Allow-Int64", "")
        text = numbers in _FALSE if numbers in _TRUE or numbers in _FALSE else not self.settings.accept_int64
        return self.styles[cbor, text]

    def _timeout_s(self, given: str | None) -> float:
        if given is None:
            return self.settings.request_timeout_s
        text = given.strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
            raise InvalidParameter(
                f"Request-Timeout parse failed, err: {given[:40]!r} is not a number of seconds above 0: "
                "invalid parameter"
            )
        return float(min(int(text), TIMEOUT_S_MAX))

    def _too_large(self) -> Refusal:
        limit = self.settings.body_bytes_max
        return Refusal(413, TOO_LARGE_CODE, f"the request body is too large: at most {limit} bytes are accepted", {})

    # --- pages ---------------------------------------------------------------------------------------------------

    def guarded(self, page: Page) -> Page:
        """Return the page for those who may see it."""
        if self.guard is None:
            return page
        guard = self.guard

        async def serve(request: web.Request) -> web.StreamResponse:
            if request.method == "OPTIONS":  # a browser asks without credentials whether it may ask with them
                return await page(request)
            scope, code = Scope(0.0), 0
            resource = request.match_info.route.resource
            what = f"{request.method}:{'*' if resource is None else resource.canonical}"
            privilege = ROUTE_RULES.get(what.replace("HEAD:", "GET:"), ROUTE_RULES["*"])
            try:
                rights = await guard.admit(request.headers.get(hdrs.AUTHORIZATION), request.remote or "", scope)
                guard.check(rights, privilege, scope, "")
            except AnnulusError as error:
                refused = refusal(error)
                code = refused.code
                return _page(refused.status, {"code": code, "message": refused.message})
            finally:
                guard.note(what, privilege, scope, request.remote or "", code)
            return await page(request)

        return serve

    async def healthz(self, request: web.Request) -> web.Response:
        return _page(200, {"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        reason = self.edge.ready()
        if reason and self.guard is not None and self.guard.is_on:
            reason = "not ready"  # anybody may ask: names of nodes are none of their business
        return _page(503, {"status": "not ready", "reason": reason}) if reason else _page(200, {"status": "ready"})

    async def metrics_page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.edge.metrics.render(), headers={hdrs.CONTENT_TYPE: METRICS_TYPE})

    async def status_page(self, request: web.Request) -> web.StreamResponse:
        return _page(200, dict(await self.service.status()))

    async def check_page(self, request: web.Request) -> web.StreamResponse:
        try:
            return _page(200, dict(await self.service.check_cluster(begin=request.method == "POST")))
        except AnnulusError as error:
            return _page(503, {"code": refusal(error).code, "message": error.message})

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        if not self.described:
            self.described = orjson.dumps(document())
        return web.Response(body=self.described, headers={hdrs.CONTENT_TYPE: JSON_TYPE, **_CORS})

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        """Answer what no route serves: a browser's preflight anywhere, else 404."""
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=_CORS)
        return web.Response(status=404, text="404 page not found", headers=_CORS)


class _Room:
    """What a body takes of the memory for bodies: its length at first, what has arrived if it takes its time."""

    def __init__(self, gate: Gate, request: web.Request) -> None:
        self.arrived = 0
        self._gate = gate
        self._request = request
        self._held = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _key(self) -> str:
        return self._request.remote or ""

    async def expect(self, length: int) -> None:
        """Take room for the whole body when there is. Raises Overloaded."""
        if not self._gate.enter(self._key, length):
            await self._gate.wait(self._key, length)
        self._held = length
        self._timer = asyncio.get_running_loop().call_later(LENGTH_TRUSTED_S, self.trim)

    @property
    def has_arrived(self) -> bool:
        """Whether there is room for what has arrived, which is taken if need be."""
        more = self.arrived - self._held
        if more > 0 and self._gate.enter(self._key, more):
            self._held += more
        return self.arrived <= self._held

    def trim(self) -> None:
        """Hold what has arrived, no more."""
        self._hold(min(self._held, self.arrived))

    def release(self) -> None:
        self._hold(0)

    def _hold(self, nbytes: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held > nbytes:
            self._gate.leave(self._key, self._held - nbytes)
            self._held = nbytes


async def _unsupported(call: Call) -> Mapping[str, Any]:
    raise UnsupportedOperation(call.route.unsupported)


def _response(
    status: int, body: bytes, style: Style, identity: str, more: Mapping[str, str] | None = None
) -> web.Response:
    headers = {
        hdrs.CONTENT_TYPE: CBOR if style.cbor else JSON_TYPE,
        "Access-Control-Allow-Origin": "*",
        "X-Content-Type-Options": "nosniff",
        "X-Request-Id": identity,
    }
    if more:
        headers.update(more)
    return web.Response(body=body, status=status, headers=headers)


def _tokens(scope: Scope) -> dict[str, str]:
    """Return the headers by which the client can say later what it has seen."""
    headers = {}
    if scope.seen:
        headers[SESSION] = to_token(scope.seen)
    if scope.read_at:
        headers[SNAPSHOT] = to_token(scope.read_at)
    if scope.is_repeat:
        headers[REPEATED] = "true"
    return headers


def _check_key(key: str, route: Route) -> None:
    """Raise InvalidParameter unless this may name a request of this route."""
    if not (route.takes_key or route.handler == "insert"):
        raise InvalidParameter(
            f"{KEY} names inserts and changes of the catalogue; {route.path} is none, leave the header out"
        )
    if not (1 <= len(key) <= KEY_CHARS_MAX and key.isascii() and key.isprintable()):
        raise InvalidParameter(f"{KEY} has 1 to {KEY_CHARS_MAX} printable ASCII characters")


def _keyed(handler: Handler, key: str, body: bytes) -> Handler:
    """Return the handler of a request that is carried out once, however often it comes under this key."""

    async def once(call: Call) -> Mapping[str, Any]:
        asked = blake2b(b"\0".join((call.route.path.encode(), call.database.encode(), body)), digest_size=16)
        scope = current.get()
        is_repeat = await call.service.once(key, asked.hexdigest(), lambda: handler(call))
        if scope is not None:
            scope.is_repeat = is_repeat
        return success({})

    return once


def _page(status: int, content: Mapping[str, Any]) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(content), headers={hdrs.CONTENT_TYPE: JSON_TYPE})
