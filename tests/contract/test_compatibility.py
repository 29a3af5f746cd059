"""The README's table of what is served is what a node answers to every REST route and every gRPC method."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from node.api.routes import HYBRID_UNSUPPORTED
from node.grpc.protocol import SERVICE, methods
from tests.node.api.test_access import body
from tests.process.running import Running
from tools.compatibility import Finding, How, declared, found, refused_fields, routes, rows
from tools.docs import README, table

UNSUPPORTED = 3000
PREFIX = "unsupported operation, error: "
TEXT = README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("compatibility") / "data", settings={"shards": "2"}) as running:
        yield running


def over_rest(node: Running) -> Iterator[Finding]:
    for route in routes():
        reply = node.call(route.path, **body(route))
        words = reply["message"].removeprefix(PREFIX) if reply["code"] == UNSUPPORTED else ""
        yield found(route.path, words)


def over_grpc(node: Running) -> Iterator[Finding]:
    with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
        for name in methods():
            words = ""
            try:
                channel.unary_unary(f"/{SERVICE}/{name}")(b"", timeout=60)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNIMPLEMENTED, (name, error)
                words = error.details().removeprefix(f"{name}: ")
            yield found(name, words)


def test_the_table_is_what_a_node_answers(node: Running) -> None:
    """Each is asked; what is refused is refused with the words of the table, and all else is served."""
    seen = [*over_rest(node), *over_grpc(node)]
    assert sorted(seen) == sorted(declared())
    assert f"<!-- generated: compatibility -->\n{table(('how', 'REST, `/v2/vectordb` +', 'gRPC'), rows(seen))}" in TEXT
    assert node.is_ready()


def test_refused_fields_are_refused(node: Running) -> None:
    """A field that the table has as missing is refused by its name, and the same request without it is served."""
    node.ask("/collections/create", collectionName="c", dimension=2)
    search = {"annsField": "vector", "data": [[1.0, 2.0]], "limit": 1}
    known = {
        "/entities/search": search,
        "/entities/hybrid_search": {
            "search": [search, search],
            "rerank": {"strategy": "rrf", "params": {}},
            "limit": 1,
        },
    }
    for route in routes():
        request = known.get(route.path)
        if request is None:
            continue
        assert node.call(route.path, collectionName="c", **request)["code"] == 0
        fields = refused_fields(route) or HYBRID_UNSUPPORTED
        for name in fields:
            reply = node.call(route.path, collectionName="c", **request, **{name: [{"field": "x"}]})
            assert reply["code"] == UNSUPPORTED and name in reply["message"], (name, reply)


def test_every_shortcoming_is_of_something_that_is_there() -> None:
    """Routes and methods are in the table once, those that are partly served with what is missing."""
    findings = declared()
    assert len({one.name for one in findings}) == len(findings)
    assert all(one.why for one in findings if one.how is not How.SUPPORTED)
    cells = [cell for _, paths, names in rows(findings) for cell in (paths, names) if cell]
    assert sorted(name.strip("`") for cell in cells for name in cell.split(", ")) == sorted(
        one.name for one in findings
    )
