"""A node or cluster as a client sees it: REST calls in CBOR, repeated while that may help."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import cbor2

from node.api.faults import FAULTS
from storage.errors import (
    MemoryShort,
    NoLeader,
    OutcomeUnknown,
    Overloaded,
    RequestTimeout,
)

ANSWER_S: Final = 120.0
PAUSE_S_MAX: Final = 2.0
PASSING: Final = frozenset(
    FAULTS[kind].code for kind in (NoLeader, OutcomeUnknown, Overloaded, MemoryShort, RequestTimeout)
)
"""Codes of answers to what may succeed later."""


class Refused(Exception):
    """The server answered, and said no."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Unreachable(Exception):
    """No answer came for longer than one was to be waited for."""


class Remote:
    """Calls of one address from any thread; each thread has a connection of its own."""

    def __init__(
        self,
        address: str,
        *,
        database: str = "",
        token: str = "",
        patience_s: float = 60.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Make no connection yet.

        token  goes with each request, as `user:password` or as a key; it is shown nowhere
        tls    how connections are secured; without it, they are as the address says
        """
        parts = urlsplit(address if "://" in address else f"http://{address}")
        self.address = parts.netloc
        self._tls = tls or (ssl.create_default_context() if parts.scheme == "https" else None)
        self._host, self._port = (
            parts.hostname or "127.0.0.1",
            parts.port or (443 if parts.scheme == "https" else 19530),
        )
        self._headers = {"Content-Type": "application/cbor", "Accept": "application/cbor"}
        if database:
            self._headers["DB-Name"] = database
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._patience_s = patience_s
        self._own = threading.local()
        self.stopped = threading.Event()
        """Set: nothing is repeated any more."""

    def call(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        patient: Callable[[Refused], bool] = lambda refused: refused.code in PASSING,
        answered: dict[str, str] | None = None,
    ) -> Any:
        """Return the data of the answer, asking again under failures that may pass: only for what may be repeated.

        answered  gets the headers of the answer

        Raises Refused, or Unreachable after a while without any other answer.
        """
        data = cbor2.dumps(dict(body))
        began_s, pause_s = time.monotonic(), 0.05
        while True:
            why: Exception
            try:
                return self._once(path, data, dict(headers or {}), answered)
            except Refused as refused:
                if not patient(refused):
                    raise
                why = refused
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                why = error
            if time.monotonic() - began_s > self._patience_s or self.stopped.wait(pause_s):
                if isinstance(why, Refused):
                    raise why
                raise Unreachable(f"{self.address} does not answer: {why or type(why).__name__}")
            pause_s = min(PAUSE_S_MAX, 2 * pause_s)

    def _once(self, path: str, data: bytes, headers: Mapping[str, str], answered: dict[str, str] | None) -> Any:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            if self._tls is not None:
                connection = http.client.HTTPSConnection(self._host, self._port, timeout=ANSWER_S, context=self._tls)
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_S)
            self._own.connection = connection
        connection.request("POST", f"/v2/vectordb{path}", data, {**self._headers, **headers})
        answer = connection.getresponse()
        content = answer.read()
        try:
            reply = cbor2.loads(content)
            code, message = int(reply["code"]), str(reply.get("message", ""))
        except Exception as error:  # whatever answers there, it is no such server
            raise Refused(answer.status, f"HTTP {answer.status}, and no answer of this API") from error
        if code != 0:
            raise Refused(code, message)
        if answered is not None:
            answered.update(answer.getheaders())
        return reply.get("data")

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            self._own.connection = None

    def close(self) -> None:
        """Close the connection of this thread; another call opens a new one."""
        self._drop()
