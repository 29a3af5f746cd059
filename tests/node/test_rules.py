"""The table of who may do what has everything that is served, and says what Milvus's own protocol says."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import message_factory

from cluster.privileges import LEVELS
from node.api.routes import ROUTES
from node.api.server import make_app
from node.grpc import protocol
from node.rules import ANYONE, METHOD_RULES, OPEN, ROUTE_RULES
from tests.node.api.fake import FakeService, Inline, edge_of

OPEN_ROUTES = {"GET:/healthz", "GET:/readyz"}


def test_every_route_has_a_rule() -> None:
    """No route and no page is served that the table forgets, and the table has none that is not served."""
    app = make_app(FakeService(), edge_of(Inline()))
    served = {route.full_path for route in ROUTES}
    pages = set()
    for one in app.router.routes():
        path = one.resource.canonical if one.resource is not None else ""
        if path not in served and one.method != "HEAD":
            pages.add("*" if one.method == "*" else f"{one.method}:{path}")
    assert served | pages == set(ROUTE_RULES)


def test_every_method_has_a_rule() -> None:
    """Every method of the protocol is in the table, served or not."""
    assert set(protocol.methods()) == set(METHOD_RULES)


def test_what_is_open_is_health() -> None:
    """Without credentials nothing is answered but whether the node lives and is ready."""
    assert {name for name, privilege in ROUTE_RULES.items() if privilege == OPEN} == OPEN_ROUTES
    assert OPEN not in METHOD_RULES.values()
    assert {*ROUTE_RULES.values(), *METHOD_RULES.values()} - {OPEN, ANYONE} <= LEVELS.keys()


@pytest.mark.parametrize("name", sorted(protocol.methods()))
def test_privileges_are_those_of_the_protocol(name: str) -> None:
    """Where the protocol says which privilege a method takes, it is the one of the table."""
    pool: Any = protocol._pool()
    extension = pool.FindExtensionByName("milvus.proto.common.privilege_ext_obj")
    options = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.MessageOptions"))
    given = options.FromString(protocol.methods()[name].request.DESCRIPTOR.GetOptions().SerializeToString())
    if given.HasExtension(extension):
        numbers = {number: one for one, number in protocol.enum("common.ObjectPrivilege").items()}
        assert METHOD_RULES[name] == numbers[given.Extensions[extension].object_privilege].removeprefix("Privilege")


def test_names_in_the_protocol_are_known() -> None:
    """Every privilege that Milvus has can be granted."""
    names = {one.removeprefix("Privilege") for one in protocol.enum("common.ObjectPrivilege")}
    assert {one for one in names if not one.startswith("Group")} - {"All"} <= LEVELS.keys()


def test_routes_and_methods_agree() -> None:
    """What both interfaces have takes the same privilege."""
    pairs = {
        "/entities/insert": "Insert",
        "/entities/search": "Search",
        "/collections/drop": "DropCollection",
        "/collections/list": "ShowCollections",
        "/users/create": "CreateCredential",
        "/roles/grant_privilege_v2": "OperatePrivilegeV2",
        "/partitions/load": "LoadPartitions",
        "/aliases/alter": "AlterAlias",
        "/collections/flush_all": "FlushAll",
    }
    for route, method in pairs.items():
        assert ROUTE_RULES["/v2/vectordb" + route] == METHOD_RULES[method]
