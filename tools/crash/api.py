"""Calls with three outcomes: done, refused, unknown; and who may be believed when."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import aiohttp
import orjson

from tools.bench.wire import BASE_PATH, Address

REQUEST_S_MAX = 60.0
REFUSED_CODES = frozenset({1, 2, 4, 8, 9})
"""Not now: no leader, unavailable, overloaded, read-only. A valid request may get them. Nothing was done if the answer
says when to ask again; without that the leader was lost, and it may have been done."""
UNKNOWN_CODES = frozenset({5, 10_001, 65_535, 500})
"""Local fault, timeout, unexpected: it may have been done, or may yet be."""
INDEX_MISSING_CODE = 700
NOT_LOADED_CODES = frozenset({101, 103, INDEX_MISSING_CODE})
"""What a read gets while the index is being rebuilt."""


class Answered(Exception):
    """The node answered with a code other than 0; `retry_after_s` if it said when to ask again."""

    def __init__(self, path: str, code: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{path}: code {code}: {message}")
        self.code = code
        self.retry_after_s = retry_after_s


class Unknown(Exception):
    """The node did not answer, or not so that one knows what happened."""


class Unreachable(Unknown):
    """There was no connection, so nothing was sent."""


class Caller(Protocol):
    """Whoever carries a call to a database: to one node, or to any of several."""

    async def call(self, path: str, **body: Any) -> Any: ...


class Api:
    """One client connection pool to a node."""

    def __init__(self, address: Address, *, request_s_max: float = REQUEST_S_MAX) -> None:
        self._base = f"http://{address}{BASE_PATH}"
        self._request_s_max = request_s_max

    async def __aenter__(self) -> Api:
        timeout = aiohttp.ClientTimeout(total=self._request_s_max)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._session.close()

    async def call(self, path: str, **body: Any) -> Any:
        """Return the reply's data. Raises Answered for another code than 0, Unknown for less than an answer."""
        return (await self.exchange(path, body, {}))[0]

    async def exchange(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> tuple[Any, Mapping[str, str]]:
        """Return the reply's data and headers; these `headers` go with the request. Raises as `call` does."""
        sent = {"Content-Type": "application/json", "Request-Timeout": str(int(self._request_s_max)), **headers}
        try:
            async with self._session.post(self._base + path, data=orjson.dumps(body), headers=sent) as response:
                raw, status, after = await response.read(), response.status, response.headers.get("Retry-After", "")
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(f"{path}: {error!r}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unknown(f"{path}: {error!r}") from error
        try:
            reply = orjson.loads(raw)
            code = int(reply["code"])
        except (ValueError, KeyError, TypeError):
            raise Unknown(f"{path}: HTTP {status}: {raw[:200]!r}") from None
        if code in UNKNOWN_CODES or (code in REFUSED_CODES and not after):
            raise Unknown(f"{path}: code {code}: {reply.get('message')}")
        if code != 0:
            raise Answered(path, code, str(reply.get("message", "")), float(after) if after.isdigit() else None)
        return reply.get("data"), response.headers
