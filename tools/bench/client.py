"""A plain blocking client of the REST API, for what is not timed."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tools.bench.wire import BASE_PATH, Address, Codec, reply_data

T = TypeVar("T")

POLL_S = 0.05


class Client:
    """Calls one node; a connection per call, so a node that restarts in between does not matter."""

    def __init__(self, address: Address, *, timeout_s: float = 300) -> None:
        self.address = address
        self._timeout_s = timeout_s

    def call(self, path: str, **body: Any) -> Any:
        """Return the data of a call below /v2/vectordb. Raises Refused, or OSError if the node is not there."""
        raw = Codec.JSON.dumps(body)
        return reply_data(path, Codec.JSON.loads(self.exchange("POST", BASE_PATH + path, raw)[1]))

    def exchange(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return HTTP status and body of one exchange. Raises OSError if the node is not there."""
        connection = http.client.HTTPConnection(self.address.host, self.address.port, timeout=self._timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def ready(self) -> bool:
        """Return whether the node says that it serves."""
        try:
            return self.exchange("GET", "/readyz")[0] == 200
        except OSError:
            return False


def wait_until(found: Callable[[], T | None], *, timeout_s: float, what: str, poll_s: float = POLL_S) -> T:
    """Return the first result of `found` that is neither None nor False. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = found()
        if result is not None and result is not False:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)
