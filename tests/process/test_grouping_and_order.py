"""Search for groups, order by and aggregates over REST, held against plain Python on the same rows.

Rows are in two shards, growing and sealed, some deleted, some with nulls.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.process.running import Running

ROWS = 200
RNG = np.random.default_rng(21)
V = RNG.normal(size=(ROWS, 4)).astype(np.float32)
COLOR = [f"c{int(one):02d}" for one in RNG.integers(0, 12, ROWS)]
NUMBER = [None if i % 7 == 0 else int(RNG.integers(0, 5)) for i in range(ROWS)]
PRICE = [float(RNG.integers(0, 40)) / 4 for _ in range(ROWS)]
THERE = [i for i in range(ROWS) if i not in (5, 6, 7)]


@pytest.fixture(scope="module", params=["L2", "IP"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("grouping")
    with Running(folder / "data", settings={"shards": "2", "index.rows_min": "1"}) as running:
        running.metric_type = request.param  # type: ignore[attr-defined]
        running.ask(
            "/collections/create",
            collectionName="c",
            consistencyLevel="Strong",
            params={"shardsNum": 2},
            schema={
                "fields": [
                    {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                    {"fieldName": "color", "dataType": "VarChar", "elementTypeParams": {"max_length": 9}},
                    {"fieldName": "number", "dataType": "Int32", "nullable": True},
                    {"fieldName": "price", "dataType": "Double"},
                    {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 4}},
                ]
            },
            indexParams=[{"fieldName": "v", "indexType": "AUTOINDEX", "metricType": request.param}],
        )
        for some in (range(120), range(120, ROWS)):
            data = [
                {"id": i, "color": COLOR[i], "number": NUMBER[i], "price": PRICE[i], "v": V[i].tolist()} for i in some
            ]
            running.ask("/entities/insert", collectionName="c", data=data)
            if some.start == 0:
                running.ask("/collections/flush", collectionName="c")
        running.ask("/entities/delete", collectionName="c", filter="id in [5, 6, 7]")
        yield running


def near(node: Running, query: np.ndarray, passing: list[int]) -> list[int]:
    wide = V.astype(np.float64)
    is_l2 = node.metric_type == "L2"  # type: ignore[attr-defined]
    distances = ((wide - query) ** 2).sum(axis=1) if is_l2 else -(wide @ query)
    return sorted(passing, key=lambda i: (np.float32(distances[i]), i))


def groups_of(order: list[int], values: list[Any], limit: int, offset: int, size: int) -> list[int]:
    groups: dict[Any, list[int]] = {}
    for i in order:
        groups.setdefault(values[i], []).append(i)
    return [i for rows in list(groups.values())[offset : offset + limit] for i in rows[:size]]


@pytest.mark.parametrize("field", ["color", "number"])
@pytest.mark.parametrize(("limit", "offset", "size"), [(3, 0, 1), (5, 2, 3), (20, 0, 10), (2, 30, 2)])
@pytest.mark.parametrize("text", ["", "price > 5", "id in [1, 2, 3, 190]"])
def test_groups(node: Running, field: str, limit: int, offset: int, size: int, text: str) -> None:
    """The best rows of each of the best groups, group by group, for two queries; null is a group too."""
    passing = {"": THERE, "price > 5": [i for i in THERE if PRICE[i] > 5]}.get(text, [1, 2, 3, 190])
    queries = [V[3] + np.float32(0.01), V[150] * np.float32(0.9)]
    reply = node.call(
        "/entities/search",
        collectionName="c",
        data=[query.tolist() for query in queries],
        limit=limit,
        offset=offset,
        filter=text,
        groupingField=field,
        groupSize=size,
        strictGroupSize=True,
        outputFields=["color"],
    )
    assert reply["code"] == 0, reply
    values: list[Any] = COLOR if field == "color" else NUMBER
    wanted = [groups_of(near(node, query.astype(float), passing), values, limit, offset, size) for query in queries]
    assert [row["id"] for row in reply["data"]] == [i for line in wanted for i in line]
    assert reply.get("topks", [0, 0]) == [len(line) for line in wanted]


@pytest.mark.parametrize("field", ["color", "number"])
@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("text", ["", "price > 5"])
def test_groups_of_many_queries(node: Running, field: str, size: int, text: str) -> None:
    """More groups are asked for than there are, for so many queries that not all rows are looked at for each."""
    passing = {"": THERE, "price > 5": [i for i in THERE if PRICE[i] > 5]}[text]
    queries, copies = [V[3] + np.float32(0.01), V[150] * np.float32(0.9)], 300
    reply = node.call(
        "/entities/search",
        collectionName="c",
        data=[query.tolist() for query in queries] * copies,
        limit=20,
        filter=text,
        groupingField=field,
        groupSize=size,
    )
    assert reply["code"] == 0, reply
    values: list[Any] = COLOR if field == "color" else NUMBER
    wanted = [groups_of(near(node, query.astype(float), passing), values, 20, 0, size) for query in queries]
    assert [row["id"] for row in reply["data"]] == [i for line in wanted for i in line] * copies
    assert reply["topks"] == [len(line) for line in wanted] * copies


@pytest.mark.parametrize("field", ["color", "number"])
@pytest.mark.parametrize(("limit", "offset", "size"), [(3, 0, 1), (4, 1, 3)])
def test_groups_of_a_hybrid_search(node: Running, field: str, limit: int, offset: int, size: int) -> None:
    """Each search finds its best groups; of their rows, ranked anew, those of the best groups come group by group."""
    values: list[Any] = COLOR if field == "color" else NUMBER
    queries = [V[3] + np.float32(0.01), V[150] * np.float32(0.9)]
    scores: dict[int, float] = {}
    for query, passing in zip(queries, (THERE, [i for i in THERE if PRICE[i] > 5]), strict=True):
        mine = groups_of(near(node, query.astype(float), passing), values, 6, 0, size)
        for rank, i in enumerate(mine, start=1):
            scores[i] = scores.get(i, 0.0) + 1 / (60 + rank)
    order = sorted(scores, key=lambda i: (-np.float32(scores[i]), i))
    reply = node.call(
        "/entities/hybrid_search",
        collectionName="c",
        search=[
            {"data": [queries[0].tolist()], "annsField": "v", "limit": 6},
            {"data": [queries[1].tolist()], "annsField": "v", "limit": 6, "filter": "price > 5"},
        ],
        rerank={"strategy": "rrf", "params": {"k": 60}},
        limit=limit,
        offset=offset,
        groupingField=field,
        groupSize=size,
    )
    assert reply["code"] == 0, reply
    assert [row["id"] for row in reply["data"]] == groups_of(order, values, limit, offset, size)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"groupingField": "v"}, "of type FloatVector is not supported"),
        ({"groupingField": "color", "groupSize": 11}, "group size [11] is invalid"),
        ({"rerank": {"strategy": "rrf", "params": {"rank_group_scorer": "min"}}}, "rank_group_scorer can be max, sum"),
    ],
)
def test_groups_of_a_hybrid_search_that_cannot_be(node: Running, wrong: dict[str, Any], says: str) -> None:
    body = {"search": [{"data": [V[0].tolist()], "annsField": "v", "limit": 6}], "rerank": {"strategy": "rrf"}}
    reply = node.call("/entities/hybrid_search", collectionName="c", **(body | wrong))
    assert reply["code"] != 0 and says in reply["message"]


def test_grouping_is_taken_from_search_params_too(node: Running) -> None:
    """As pymilvus sends it, and refused where it cannot be."""
    body = {"collectionName": "c", "data": [V[0].tolist()], "limit": 2}
    found = node.ask("/entities/search", **body, searchParams={"group_by_field": "color", "group_size": 2})
    assert len(found) == 4
    for more, words in (
        ({"groupingField": "v"}, "of type FloatVector is not supported"),
        ({"groupingField": "price"}, "of type Double is not supported"),
        ({"groupingField": "nope"}, "nope does not exist"),
        ({"groupingField": "color", "groupSize": 11}, "group size [11] is invalid"),
    ):
        reply = node.call("/entities/search", **body, **more)
        assert reply["code"] == 1100 and words in reply["message"], reply


def key_of(i: int, orders: list[tuple[list[Any], bool, bool]]) -> Any:
    key: list[Any] = []
    for values, descending, nulls_first in orders:
        value = values[i]
        if isinstance(value, str):
            value = [(-1 if descending else 1) * ord(one) for one in value]
        elif value is not None:
            value = -value if descending else value
        key += [(value is None) != nulls_first, 0 if value is None else value]
    return [*key, i]


@pytest.mark.parametrize(
    ("fields", "orders"),
    [
        (["price"], [(PRICE, False, False)]),
        (["number:desc", "price:asc"], [(NUMBER, True, True), (PRICE, False, False)]),
        (["number:asc:nulls_first", "color:descending"], [(NUMBER, False, True), (COLOR, True, True)]),
        (["number:desc:nulls_last", "id:desc"], [(NUMBER, True, False), (list(range(ROWS)), True, True)]),
    ],
)
@pytest.mark.parametrize(("limit", "offset"), [(10, 0), (50, 25), (1000, 190)])
def test_order_by(node: Running, fields: list[str], orders: list[Any], limit: int, offset: int) -> None:
    """A query's rows come in the order asked for, ties by primary key, over shards and pages; a search's hits too."""
    found = node.ask(
        "/entities/query", collectionName="c", limit=limit, offset=offset, orderByFields=fields, outputFields=["id"]
    )
    wanted = sorted(THERE, key=lambda i: key_of(i, orders))
    assert [row["id"] for row in found] == wanted[offset : offset + limit]
    hits = node.ask("/entities/search", collectionName="c", data=[V[9].tolist()], limit=20, orderByFields=fields)
    nearest = near(node, V[9].astype(float), THERE)[:20]
    assert [row["id"] for row in hits] == sorted(nearest, key=lambda i: [*key_of(i, orders)[:-1], nearest.index(i)])


def test_aggregates(node: Running) -> None:
    """count, sum, avg, min and max by groups, of matching rows; nulls count for count(*) only and are a group."""
    names = ["color", "count(*)", "count(number)", "sum(number)", "avg(price)", "min(price)", "max(color)"]
    found = node.ask(
        "/entities/query",
        collectionName="c",
        filter="price >= 2",
        groupByFields=["color"],
        outputFields=names,
    )
    passing = [i for i in THERE if PRICE[i] >= 2]
    for row, color in zip(found, sorted({COLOR[i] for i in passing}), strict=True):
        mine = [i for i in passing if COLOR[i] == color]
        numbers = [one for i in mine if (one := NUMBER[i]) is not None]
        assert row == {
            "color": color,
            "count(*)": len(mine),
            "count(number)": len(numbers),
            "sum(number)": sum(numbers) if numbers else None,
            "avg(price)": pytest.approx(sum(PRICE[i] for i in mine) / len(mine)),
            "min(price)": min(PRICE[i] for i in mine),
            "max(color)": color,
        }
    both = node.ask(
        "/entities/query",
        collectionName="c",
        groupByFields=["number", "color"],
        outputFields=["number", "color", "count(*)"],
        limit=1000,
    )
    assert sum(row["count(*)"] for row in both) == len(THERE)
    assert len(both) == len({(NUMBER[i], COLOR[i]) for i in THERE}) and both[-1]["number"] is None
    whole = node.ask("/entities/query", collectionName="c", outputFields=["sum(price)", "max(number)"], limit=10)
    known = [one for i in THERE if (one := NUMBER[i]) is not None]
    assert whole == [{"sum(price)": pytest.approx(sum(PRICE[i] for i in THERE)), "max(number)": max(known)}]
    none = node.ask("/entities/query", collectionName="c", filter="id < 0", outputFields=["count(id)", "min(id)"])
    assert none == [{"count(id)": 0, "min(id)": None}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"orderByFields": ["v"]}, "not sortable"),
        ({"orderByFields": ["nope"]}, "does not exist"),
        ({"orderByFields": ["price:up"]}, "invalid order direction"),
        ({"groupByFields": ["price"], "outputFields": ["count(*)"]}, "of type Double is not supported"),
        ({"groupByFields": ["color"], "outputFields": ["price"]}, "neither an aggregate"),
        ({"groupByFields": ["color"], "outputFields": ["sum(color)"]}, "sum is not supported for type VarChar"),
        ({"groupByFields": ["color"], "outputFields": ["sum(*)"]}, "only count takes a *"),
        ({"groupByFields": ["color"], "outputFields": ["max(nope)"]}, "nope does not exist"),
    ],
)
def test_what_is_refused(node: Running, body: dict[str, Any], words: str) -> None:
    """1100, naming the field."""
    reply = node.call("/entities/query", collectionName="c", limit=10, **body)
    assert reply["code"] == 1100 and words in reply["message"], reply
