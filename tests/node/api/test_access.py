"""Every route and page, asked without credentials and without privileges: nothing is answered, nothing is done."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from cluster.access import SetGrant
from node.api.requests import Kind
from node.api.routes import ROUTES, Route
from node.api.server import make_app
from node.rules import ANYONE, OPEN, ROUTE_RULES
from tests.node.api.fake import FakeService, Inline, edge_of
from tests.node.test_guard import House

INTERNAL: dict[str, str] = {
    "sourceID": "QHBAfmAjJCVeJiopXw==",
    "X-Forwarded-For": "127.0.0.1",
    "X-Annulus-Peer": "n1",
    "Authorization": "Bearer newcomer-",
}
"""What has let others in elsewhere (CVE-2025-64513), or looks as if it came from a node."""


def body(route: Route) -> dict[str, Any]:
    """Return a request with something in every field that must be there."""
    samples: dict[Kind, Any] = {Kind.TEXT: "x", Kind.TEXTS: ["x"], Kind.INT64: 1, Kind.BOOL: True, Kind.MAP: {}}
    return {one.name: samples.get(one.kind, [{}]) for one in route.shape.fields if one.required}


async def everything(service: FakeService, headers: dict[str, str]) -> dict[str, tuple[int, Any]]:
    """Return (HTTP status, reply) of every route and page."""
    house = House()
    house.user("ann", "secret-1")
    for privilege, kind in (("DescribeCollection", "Global"), ("ListAliases", "Global"), ("IndexDetail", "Collection")):
        house.say(SetGrant("public", kind, "*", privilege, "*", "root", False))
    app = make_app(service, edge_of(Inline(), guard=house.guard))
    found = {}
    async with TestClient(TestServer(app), timeout=aiohttp.ClientTimeout(20)) as client:
        for route in ROUTES:
            async with client.post(route.full_path, json=body(route), headers=headers) as answer:
                found[route.full_path] = answer.status, await answer.json(content_type=None)
        for rule in ROUTE_RULES:
            method, colon, path = rule.partition(":")
            if colon:
                async with client.request(method, path, headers=headers) as answer:
                    found[rule] = answer.status, await answer.text()
        for path in ("/", "/nothing", "/v1/vector/collections", "/expr", "/_cluster/configs", "/debug/pprof"):
            async with client.get(path, headers=headers) as answer:
                found[path] = answer.status, await answer.text()
    return found


@pytest.mark.parametrize("headers", [{}, INTERNAL, {"Authorization": "Bearer"}, {"Authorization": ":"}])
def test_nothing_is_answered_without_credentials(headers: dict[str, str]) -> None:
    """Every route and every page but health is 401, whatever else the request shows, and nothing was done."""
    service = FakeService()
    # Time stands still for the guard, so that wrong credentials would be slowed: each has an address of its own.
    found = asyncio.run(everything(service, headers))
    health = {name for name, rule in ROUTE_RULES.items() if rule == OPEN}
    assert {name for name, (status, _) in found.items() if status not in (401, 429)} == health
    assert not service.collections and not service.operations and service.databases == {"default": {}}


def test_nothing_is_done_without_privileges() -> None:
    """A user who has no privilege gets nothing of what takes one, on any route or page, and nothing was done."""
    service = FakeService()
    found = asyncio.run(everything(service, {"Authorization": "Bearer ann:secret-1"}))
    refused = 0
    for name, privilege in ROUTE_RULES.items():
        if privilege in (OPEN, ANYONE) or name not in found:
            continue
        status, reply = found[name]
        assert status == 403 or reply["code"] in (1801, 1802), (name, reply)  # of a body that is none
        refused += status == 403
    assert refused > 100
    assert not service.collections and not service.operations and service.databases == {"default": {}}
