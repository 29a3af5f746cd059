"""What of Milvus's API is served: one table of every REST route and every gRPC method.

The table in the README is made from what the code declares (`python -m tools.docs`). A test asks a real node for each
route and each method, makes the same table from its answers, and holds both to be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from node.api.routes import BASE, HYBRID_UNSUPPORTED, ROUTES, Route
from node.grpc.methods import PARTLY, REFUSED, SERVED

_AREAS: Final = (
    ("aliases", "Alias"),
    ("resource_groups", "ResourceGroup|Transfer|LoadBalance"),
    ("entities", "^(Insert|Upsert|Delete|Search|HybridSearch|Query)$"),
    ("segments", "Segment"),
    ("indexes", "Index"),
    ("partitions", "Partition"),
    ("databases", "Database"),
    ("privilege_groups", "PrivilegeGroup"),
    ("roles", "Role$|Grant|OperatePrivilege|RBAC"),
    ("users", "User|Credential"),
    ("collections", "Collection|Load|Flush|Compact|Replicas"),
)
"""Which methods are about what: the first that fits."""
_ALSO: Final[Mapping[str, str]] = {
    "/collections/create": "functions of type BM25; no struct fields",
    "/indexes/create": PARTLY["CreateIndex"],
    "/entities/hybrid_search": f"no {', '.join(HYBRID_UNSUPPORTED)}",
}
"""What routes refuse beside the fields that their shapes say."""


class How(StrEnum):
    SUPPORTED = "supported"
    PARTLY = "partly"
    REFUSED = "refused"


class Finding(NamedTuple):
    """How one route (`/...`) or method is served, and for all but SUPPORTED what is not, or why not."""

    name: str
    how: How
    why: str = ""


def routes() -> list[Route]:
    """Return Milvus's routes: this server's own are none of its API."""
    return [route for route in ROUTES if route.base == BASE]


def refused_fields(route: Route) -> list[str]:
    """Return the fields of a request that are known and refused."""
    return [one.name for one in route.shape.fields if one.doc.startswith("not supported")]


def shortcoming(name: str) -> str:
    """Return what of a route or method that is served is refused, or is not what its name says; "" for nothing."""
    if not name.startswith("/"):
        return PARTLY.get(name, "")
    route = next(one for one in routes() if one.path == name)
    fields = refused_fields(route)
    return _ALSO.get(name) or (f"no {', '.join(fields)}" if fields else "")


def declared() -> list[Finding]:
    """Return what the code says of itself."""
    served = [(route.path, route.unsupported) for route in routes()]
    served += [(name, "") for name in SERVED] + list(REFUSED.items())
    return [found(name, why) for name, why in served]


def found(name: str, refusal: str) -> Finding:
    """Return the finding of a route or method that is refused with these words, or served if there are none."""
    if refusal:
        return Finding(name, How.REFUSED, refusal)
    why = shortcoming(name)
    return Finding(name, How.PARTLY if why else How.SUPPORTED, why)


def rows(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    """Return the rows of the table: how, routes, methods."""
    cells: dict[tuple[How, str], tuple[list[str], list[str]]] = {}
    for name, how, why in sorted(findings):
        both = cells.setdefault((how, why or area(name)), ([], []))
        both[not name.startswith("/")].append(f"`{name}`")
    order = list(How)
    return [
        (f"{how}: {what}", ", ".join(paths), ", ".join(names))
        for (how, what), (paths, names) in sorted(cells.items(), key=lambda one: (order.index(one[0][0]), one[0][1]))
    ]


def area(name: str) -> str:
    """Return what a route or a method is about, as the first part of the routes says it."""
    if name.startswith("/"):
        return name.split("/")[1]
    return next((what for what, pattern in _AREAS if re.search(pattern, name)), "server")
