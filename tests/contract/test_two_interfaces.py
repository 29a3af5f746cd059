"""Whatever is done through one interface looks the same through the other: random programs, run twice.

Two collections of one schema live on one node. Each step of a program is done to one of them through REST and to the
other through Milvus's client over gRPC; both must answer the same, values and codes of errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient, MilvusException

from tests.process.running import Running

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each error that a test asks for
REST, GRPC = "by_rest", "by_grpc"
KEYS = st.integers(0, 12)
SINGLES = st.floats(-8, 8, width=32)
LONGS = st.integers(-(1 << 63), (1 << 63) - 1)
ROWS = st.fixed_dictionaries(
    {
        "id": KEYS,
        "vector": st.lists(SINGLES, min_size=3, max_size=3),
        "small": st.integers(-200, 200),
        "words": st.lists(st.text(max_size=3), max_size=4),
    },
    optional={
        "text": st.none() | st.text(max_size=6),
        "float": st.none() | SINGLES,
        "double": st.floats(allow_nan=False, allow_infinity=False),
        "json": st.none() | st.dictionaries(st.text(max_size=3), LONGS | st.booleans() | st.text(max_size=3)),
        "extra": LONGS | st.text(max_size=3) | st.lists(st.booleans(), max_size=2),
    },
)
FILTERS = st.sampled_from(
    [
        "id >= 0", "small > 0", 'text like "a%"', "text is null", "extra > 3", "json is not null", "float < 1.5",
        "array_length(words) == 2", "id in [1, 2, 3]", "small = 1", "nothing == 1 or id > 5", "double ==",
    ]
)  # fmt: skip
OUTPUTS = st.sampled_from([["*"], ["small", "text"], ["vector", "words", "json"], ["extra", "float"], ["count(*)"]])
STEPS = st.one_of(
    st.tuples(st.just("insert"), st.lists(ROWS, min_size=1, max_size=4)),
    st.tuples(st.just("upsert"), st.lists(ROWS, min_size=1, max_size=4)),
    st.tuples(
        st.just("partial"), st.lists(st.fixed_dictionaries({"id": KEYS, "text": st.text(max_size=3)}), min_size=1)
    ),
    st.tuples(st.just("delete"), FILTERS),
    st.tuples(st.just("query"), FILTERS, OUTPUTS),
    st.tuples(st.just("search"), st.lists(SINGLES, min_size=2, max_size=3), FILTERS, OUTPUTS, st.integers(0, 5)),
)


class Pair:
    """A node, and what is asked of it both ways; each answer is (code, what came)."""

    def __init__(self, node: Running) -> None:
        self.node = node
        self.client = MilvusClient(uri=f"http://127.0.0.1:{node.port}")

    def rest(self, path: str, pick: Callable[[Any], Any], **body: Any) -> tuple[int, Any]:
        reply = self.node.call(path, collectionName=REST, **body)
        return reply["code"], pick(reply.get("data")) if reply["code"] == 0 else None

    def grpc(self, call: Callable[[], Any]) -> tuple[int, Any]:
        try:
            return 0, call()
        except MilvusException as error:
            return error.code, None

    def create(self) -> None:
        schema = self.client.create_schema(enable_dynamic_field=True)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=3)
        schema.add_field("small", DataType.INT8)
        schema.add_field("words", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=3, max_length=20)
        schema.add_field("text", DataType.VARCHAR, max_length=20, nullable=True)
        schema.add_field("float", DataType.FLOAT, nullable=True)
        schema.add_field("double", DataType.DOUBLE, default_value=0.5)
        schema.add_field("json", DataType.JSON, nullable=True)
        index = self.client.prepare_index_params("vector", metric_type="L2", index_type="FLAT")
        for name in (REST, GRPC):
            self.client.drop_collection(name)
            self.client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")

    def step(self, step: Any) -> tuple[tuple[int, Any], tuple[int, Any]]:
        """Return what both interfaces answer to one step."""
        client = self.client
        match step:
            case ("insert", rows):
                return self.rest("/entities/insert", lambda data: data["insertIds"], data=rows), self.grpc(
                    lambda: list(client.insert(GRPC, rows)["ids"])
                )
            case ("upsert", rows):
                return self.rest("/entities/upsert", lambda data: data["upsertIds"], data=rows), self.grpc(
                    lambda: list(client.upsert(GRPC, rows)["ids"])
                )
            case ("partial", rows):
                return self.rest(
                    "/entities/upsert", lambda data: data["upsertIds"], data=rows, partialUpdate=True
                ), self.grpc(lambda: list(client.upsert(GRPC, rows, partial_update=True)["ids"]))
            case ("delete", filter):
                return self.rest("/entities/delete", lambda data: data["deleteCount"], filter=filter), self.grpc(
                    lambda: client.delete(GRPC, filter=filter)["delete_count"]
                )
            case ("query", filter, output):
                asked: dict[str, Any] = {} if output == ["count(*)"] else {"limit": 20}
                return self.rest(
                    "/entities/query", _sorted, filter=filter, outputFields=output, **{"limit": 0, **asked}
                ), self.grpc(lambda: _sorted(client.query(GRPC, filter=filter, output_fields=output, **asked)))
            case ("search", vector, filter, output, offset):
                fields = [one for one in output if one != "count(*)"]
                return self.rest(
                    "/entities/search",
                    lambda hits: [(hit.pop("distance"), _shown(hit, fields)) for hit in hits],
                    data=[vector], filter=filter, outputFields=fields, limit=4, offset=offset,
                ), self.grpc(
                    lambda: [
                        (hit["distance"], _shown({"id": hit["id"], **hit["entity"]}, fields))
                        for hit in client.search(
                            GRPC, data=[vector], filter=filter, output_fields=fields, limit=4,
                            search_params={"offset": offset},
                        )[0]
                    ]
                )  # fmt: skip
        raise AssertionError(step)


def _sorted(rows: Any) -> list[Any]:
    return sorted((dict(row) for row in rows), key=str)


def _shown(hit: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """Return the hit as a plain dict with its key, which gRPC's is asked for by name and REST's is always there."""
    return dict(sorted(hit.items()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("interfaces")
    with Running(folder / "data", settings={"shards": "2"}) as node:
        made = Pair(node)
        made.create()
        yield made
        made.client.close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(program=st.lists(STEPS, min_size=1, max_size=8))
def test_both_interfaces_answer_the_same(pair: Pair, program: list[Any]) -> None:
    """Random inserts, upserts, partial ones, deletes, queries and searches: equal answers, equal codes of errors."""
    for name in (REST, GRPC):
        pair.client.delete(name, filter="id >= 0")
    for step in program:
        by_rest, by_grpc = pair.step(step)
        assert close(by_rest, by_grpc), f"{step}\nREST {by_rest}\ngRPC {by_grpc}"


def close(one: Any, other: Any) -> bool:
    """Return whether answers are equal, floats as near as JSON's shortest text of a float32 is to its value."""
    if isinstance(one, float) and isinstance(other, float | int):
        return one == pytest.approx(other, rel=1e-6, abs=1e-30)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool))
