"""What every request goes through on its way in and out, by whichever interface it comes.

A request has an id, a place in the metrics and in the audit log, a deadline, and a bound on how many run at the same
time, which is the node's: both interfaces share one `Edge`. A mutation is never cancelled half way. When its time is
up, or its client has gone, it goes on without them, and the node waits for it before it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

from node.admission import Admission
from node.api.deadlines import Deadlines
from node.clock import Clock
from node.guard import Guard
from node.logs import request_id
from node.metrics import Metrics
from node.scope import Scope, current
from node.settings import ApiSettings
from node.workers import Executor, Lane
from storage.errors import BadRequest, Overloaded, RequestTimeout

T = TypeVar("T")

log = logging.getLogger(__name__)

TIMEOUT_S_MAX: Final = 3600.0
REQUEST_ID_CHARS_MAX: Final = 128
RESERVED_RATIO: Final = 1 / 16
"""Of the requests that may run, what is kept for others than those of rows."""
ANSWER_S_MAX: Final = 0.5
ANSWER_RATIO_MAX: Final = 0.1
"""Of a request's time, what is kept for telling its client how it ended."""
LEFT: Final = -1
"""Code of a request whose client did not wait for the answer."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What can be asked: one per route and method."""

    name: str
    """In the metrics and in the log."""
    audit_name: str
    privilege: str
    """What it takes to be let in, as in `node.rules`."""
    is_rows: bool = False
    """It writes, reads or searches rows: some requests may run that others than these are for."""


class Edge:
    """One per node. Without a guard anybody may do everything, and nothing is written down of it."""

    def __init__(
        self,
        settings: ApiSettings,
        metrics: Metrics,
        *,
        clock: Clock,
        executor: Executor,
        admission: Admission,
        ready: Callable[[], str] = lambda: "",
        guard: Guard | None = None,
    ) -> None:
        """`ready` says why the node does not serve yet, or "" when it does."""
        self.settings = settings
        self.metrics = metrics
        self.clock = clock
        self.executor = executor
        self.admission = admission
        self.ready = ready
        self.guard = guard
        self.running = 0
        self.deadlines = Deadlines()
        self._abandoned: set[asyncio.Future[Any]] = set()
        """Mutations whose client was told that the time is up; they go on."""
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(4)

    def request(self, operation: Operation, address: str, given_id: str | None) -> Request:
        """Return the context that a request is served in.

        address   where it comes from, "" if that is not known
        given_id  the client's id for it, which is kept if it is short and printable
        """
        if given_id and len(given_id) <= REQUEST_ID_CHARS_MAX and given_id.isascii() and given_id.isprintable():
            return Request(self, operation, address, given_id)
        return Request(self, operation, address, f"{self._id_prefix}-{next(self._ids):x}")

    async def offload(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)` of immutable arguments, computed on a worker thread."""
        result, refused = await self.executor.run(Lane.PARSE, apart, function, *args)
        if refused is not None:
            raise refused
        return result

    def abandon(self, mutation: asyncio.Future[Any], name: str) -> None:
        """Let a mutation go on whose client has its answer."""
        self._abandoned.add(mutation)

        def done(mutation: asyncio.Future[Any]) -> None:
            self._abandoned.discard(mutation)
            if not mutation.cancelled() and (error := mutation.exception()) is not None:
                level = logging.INFO if isinstance(error, BadRequest) else logging.WARNING
                log.log(level, "request failed after its time was up route=%s error=%r", name, error)

        mutation.add_done_callback(done)

    async def drain(self) -> None:
        """Return when the abandoned mutations are done, or the time for that is up."""
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=self.settings.drain_s_max)


class Request:
    """One request while it is served: `with` this around everything that is done for it."""

    __slots__ = ("_began_s", "_edge", "_mutation", "_tokens", "address", "code", "identity", "operation", "scope")

    def __init__(self, edge: Edge, operation: Operation, address: str, identity: str) -> None:
        self._edge = edge
        self._mutation: asyncio.Future[Any] | None = None
        self.operation = operation
        self.address = address
        self.identity = identity
        self.code = 0
        """Of the answer, in Milvus's codes: whoever answers with an error sets it."""

    def __enter__(self) -> Request:
        edge = self._edge
        self._began_s = edge.clock.monotonic_s()
        self.scope = Scope(self._began_s)
        self._tokens: tuple[Token[str], Token[Scope | None]] = request_id.set(self.identity), current.set(self.scope)
        edge.metrics.request_begun()
        edge.running += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        edge = self._edge
        if kind is asyncio.CancelledError:
            self.code = LEFT
        edge.running -= 1
        what, seconds = self.operation, edge.clock.monotonic_s() - self._began_s
        edge.metrics.request_ended(route=what.name, code=self.code, seconds=seconds)
        if edge.guard is not None:
            edge.guard.note(what.audit_name, what.privilege, self.scope, self.address, self.code, self.identity)
        request_id.reset(self._tokens[0])
        current.reset(self._tokens[1])

    def take_place(self) -> None:
        """Raise Overloaded if too many requests run."""
        running, limit = self._edge.running, self._edge.settings.requests_running_max
        if self.operation.is_rows:
            limit -= int(RESERVED_RATIO * limit)
        if running > limit:
            raise Overloaded(
                f"{running} requests are running, {limit} at most may (api.requests_running_max raises it): "
                "try again soon"
            )

    def allot(self, timeout_s: float) -> None:
        """Set by when there must be an answer: a little before the client's time is up, to say first what is wrong."""
        self.scope.deadline_s = self._began_s + timeout_s - min(ANSWER_S_MAX, ANSWER_RATIO_MAX * timeout_s)

    @contextlib.contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """Raise RequestTimeout when what is in the context takes longer."""
        try:
            with self._edge.deadlines.within(timeout_s):
                yield
        except TimeoutError:
            if self._mutation is None:
                raise RequestTimeout("request timeout") from None
            self._edge.abandon(self._mutation, self.operation.name)
            raise RequestTimeout("request timeout: the change may still be made, look before repeating it") from None
        except asyncio.CancelledError:
            if self._mutation is not None:
                self._edge.abandon(self._mutation, self.operation.name)
            raise

    async def carry_out(self, work: Awaitable[T]) -> T:
        """Return what a mutation returns; once begun it goes on, whoever waits for it."""
        self._mutation = asyncio.ensure_future(work)
        return await asyncio.shield(self._mutation)


def apart(function: Callable[..., Any], *args: Any) -> tuple[Any, BadRequest | None]:
    """Return the function's result, or how it refused a bad request.

    A refusal comes without what it left behind, which is freed on this thread, and is a result like another: if the
    client has gone away meanwhile it is no fault that anybody need hear of.
    """
    try:
        return function(*args), None
    except BadRequest as error:
        error.__context__ = None
        return None, error.with_traceback(None)
