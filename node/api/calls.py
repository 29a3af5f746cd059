"""What a handler gets: the decoded request, who asks how, and the service behind it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from node.admission import Admission
from node.api.forms import Form
from node.api.replies import Style
from node.api.routes import Route
from node.service import Service


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `offload(function, *args)` runs a function of immutable arguments on a worker thread."""

    service: Service
    route: Route
    values: Mapping[str, Any]
    """Declared field -> value, defaults filled in."""
    database: str
    style: Style
    offload: Callable[..., Awaitable[Any]]
    form: Form
    """What it shares with requests that have other query vectors."""
    admission: Admission
    body_bytes: int

    @property
    def collection(self) -> str:
        name: str = self.values["collectionName"]
        return name


Handler = Callable[[Call], Awaitable[Mapping[str, Any]]]
"""Returns the envelope of a success; raises errors of `storage.errors`."""
