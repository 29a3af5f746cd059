"""What clients meet before the node can answer them: the port is open, requests are told why, and when to ask again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from node.service import Service
from storage.errors import NoLeader


class Door:
    """Stands where the service will be. Every call is refused as retriable until `open`, but for `status`."""

    def __init__(self, node: str, why: Callable[[], str]) -> None:
        """`why` says what the node waits for."""
        self._node = node
        self._why = why
        self._service: Service | None = None

    @property
    def closed(self) -> str:
        """Why the door is closed, or ""."""
        return "" if self._service is not None else self._why() or "starting"

    def open(self, service: Service) -> None:
        self._service = service

    async def status(self) -> Mapping[str, Any]:
        if self._service is not None:
            return await self._service.status()
        return {"node": self._node, "state": "starting", "reason": self.closed}

    def __getattr__(self, name: str) -> Any:
        service = self.__dict__.get("_service")
        if service is None:
            raise NoLeader(f"node {self._node} does not answer requests yet: {self.closed}")
        return getattr(service, name)
