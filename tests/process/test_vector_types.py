"""Every type of vector over REST on a node of its own: written, found by brute force's order, read back, kept.

The same rows are growing, sealed and indexed in turn, with rows deleted, and are there again after a kill.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.process.running import Running, until

ROWS, DIM = 300, 16
RNG = np.random.default_rng(11)
GROUPS = [i % 5 for i in range(ROWS)]
DEAD = {3, 4, 50, 51, 52}

FLOATS = RNG.normal(size=(ROWS, DIM))
HALVES = FLOATS.astype(np.float16)
BRAINS = (FLOATS.astype(np.float32).view(np.uint32) >> 16 << 16).view(np.float32)
BYTES = RNG.integers(-128, 128, (ROWS, DIM)).astype(np.int8)
BITS = RNG.integers(0, 256, (ROWS, DIM // 8)).astype(np.uint8)
BITS[7] = BITS[8]
SPARSE = [
    {int(term): float(np.float32(RNG.integers(1, 9) / 8)) for term in RNG.choice(40, RNG.integers(1, 9), replace=False)}
    for _ in range(ROWS)
]
SPARSE[7] = SPARSE[8] = {4_294_967_294: 0.5, 0: 1.5}


def as_json(kind: str, i: int) -> Any:
    match kind:
        case "Float16Vector":
            return HALVES[i].tolist() if i % 2 else base64.b64encode(HALVES[i].tobytes()).decode()
        case "BFloat16Vector":
            return BRAINS[i].tolist()
        case "Int8Vector":
            return BYTES[i].tolist()
        case "BinaryVector":
            return base64.b64encode(BITS[i].tobytes()).decode()
    row = SPARSE[i]
    if i % 2:
        return {str(term): weight for term, weight in row.items()}
    return {"indices": list(row), "values": list(row.values())}


def as_shown(kind: str, i: int) -> Any:
    match kind:
        case "Float16Vector":
            return base64.b64encode(HALVES[i].tobytes()).decode()
        case "BFloat16Vector":
            return base64.b64encode((BRAINS[i].view(np.uint32) >> 16).astype("<u2").tobytes()).decode()
        case "Int8Vector":
            return base64.b64encode(BYTES[i].tobytes()).decode()
        case "BinaryVector":
            return as_json(kind, i)
    return {str(term): SPARSE[i][term] for term in sorted(SPARSE[i])}


def scores(kind: str, metric: str, i: int) -> list[float | None]:
    """Return what row i is to each row, by plain arithmetic; None where it is no hit at all."""
    if kind == "SparseFloatVector":
        products = [sum(weight * row.get(term, 0.0) for term, weight in SPARSE[i].items()) for row in SPARSE]
        return [product if product > 0 else None for product in products]
    if kind == "BinaryVector":
        bits = np.unpackbits(BITS, axis=1)
        both, either = (bits & bits[i]).sum(axis=1), (bits | bits[i]).sum(axis=1)
        found = (bits != bits[i]).sum(axis=1) if metric == "HAMMING" else 1 - both / np.maximum(either, 1)
        return [float(one) for one in found]
    stored: dict[str, Any] = {"Float16Vector": HALVES, "BFloat16Vector": BRAINS, "Int8Vector": BYTES}
    rows = stored[kind].astype(np.float64)
    if metric == "L2":
        return [float(one) for one in ((rows - rows[i]) ** 2).sum(axis=1)]
    if metric == "COSINE":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return [float(one) for one in rows @ rows[i]]


def expected(kind: str, metric: str, i: int, passing: list[int], limit: int) -> list[tuple[int, float]]:
    found = scores(kind, metric, i)
    hits = [(one, score) for one in passing if (score := found[one]) is not None]
    sign = 1 if metric in ("L2", "HAMMING", "JACCARD") else -1
    return sorted(hits, key=lambda hit: (np.float32(sign * hit[1]), hit[0]))[:limit]


CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("Float16Vector", "L2", "HNSW", {}),
    ("Float16Vector", "COSINE", "AUTOINDEX", {}),
    ("BFloat16Vector", "IP", "IVF_FLAT", {"nlist": 4}),
    ("BFloat16Vector", "COSINE", "FLAT", {}),
    ("Int8Vector", "L2", "HNSW", {}),
    ("Int8Vector", "COSINE", "AUTOINDEX", {}),
    ("BinaryVector", "HAMMING", "BIN_FLAT", {}),
    ("BinaryVector", "JACCARD", "BIN_FLAT", {}),
    ("BinaryVector", "JACCARD", "BIN_IVF_FLAT", {"nlist": 4}),
    ("BinaryVector", "HAMMING", "AUTOINDEX", {}),
    ("SparseFloatVector", "IP", "SPARSE_INVERTED_INDEX", {"inverted_index_algo": "DAAT_MAXSCORE"}),
    ("SparseFloatVector", "IP", "SPARSE_WAND", {"drop_ratio_build": 0.2}),
    ("SparseFloatVector", "IP", "AUTOINDEX", {}),
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("vector_types")
    with Running(folder / "data", settings={"index.rows_min": "1"}) as running:
        yield running


def create(node: Running, name: str, kind: str, metric: str, index: str, params: dict[str, Any]) -> None:
    dims = {} if kind == "SparseFloatVector" else {"elementTypeParams": {"dim": DIM}}
    node.ask(
        "/collections/create",
        collectionName=name,
        consistencyLevel="Strong",
        schema={
            "fields": [
                {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                {"fieldName": "group", "dataType": "Int32"},
                {"fieldName": "v", "dataType": kind, **dims},
            ]
        },
        indexParams=[{"fieldName": "v", "indexType": index, "metricType": metric, "params": params}],
    )


def insert(node: Running, name: str, kind: str, some: range) -> None:
    data = [{"id": i, "group": GROUPS[i], "v": as_json(kind, i)} for i in some]
    assert node.ask("/entities/insert", collectionName=name, data=data)["insertCount"] == len(some)


def check(node: Running, name: str, kind: str, metric: str, there: list[int]) -> None:
    """Searches, filtered and not, ranges, searches by key and reads give what brute force gives."""
    params = {"ef": 500, "nprobe": 4} if "Vector" in kind else {}
    for i in (8, 100, 299):
        for limit, text, passing in (
            (10, "", there),
            (7, "group == 2", [one for one in there if GROUPS[one] == 2]),
            (5, "id in [7, 8, 9, 60]", [one for one in there if one in (7, 8, 9, 60)]),
        ):
            found = node.ask(
                "/entities/search",
                collectionName=name,
                data=[as_json(kind, i)],
                annsField="v",
                limit=limit,
                filter=text,
                searchParams=params,
                outputFields=["v", "group"],
            )
            wanted = expected(kind, metric, i, passing, limit)
            assert [row["distance"] for row in found] == pytest.approx([score for _, score in wanted], rel=2e-6)
            assert len({row["id"] for row in found}) == len(found)
            exact = scores(kind, metric, i)
            for row in found:
                assert row["id"] in passing and row["v"] == as_shown(kind, row["id"])
                assert row["distance"] == pytest.approx(exact[row["id"]], rel=2e-6)
    by_key = node.ask("/entities/search", collectionName=name, ids=[60], annsField="v", limit=3, searchParams=params)
    wanted = expected(kind, metric, 60, there, 3)
    assert [row["distance"] for row in by_key] == pytest.approx([score for _, score in wanted], rel=2e-6)
    got = node.ask("/entities/get", collectionName=name, id=[1, 3, 8], outputFields=["*"])
    assert got == [{"id": i, "group": GROUPS[i], "v": as_shown(kind, i)} for i in (1, 3, 8) if i in there]


@pytest.mark.parametrize(("kind", "metric", "index", "params"), CASES)
def test_search_is_brute_force(node: Running, kind: str, metric: str, index: str, params: dict[str, Any]) -> None:
    """Growing, sealed, indexed, with rows deleted, after compaction: always the same hits as plain arithmetic gives."""
    name = f"{kind}_{metric}_{index}"
    create(node, name, kind, metric, index, params)
    insert(node, name, kind, range(200))
    everything = list(range(ROWS))
    check(node, name, kind, metric, everything[:200] if ROWS == 200 else [i for i in everything if i < 200])
    node.ask("/collections/flush", collectionName=name)
    until(lambda: node.index_finished(name, "v"), what="an index")
    insert(node, name, kind, range(200, ROWS))
    check(node, name, kind, metric, everything)
    assert node.ask("/entities/delete", collectionName=name, filter=f"id in {sorted(DEAD)}")["deleteCount"] == len(DEAD)
    check(node, name, kind, metric, [i for i in everything if i not in DEAD])
    node.ask("/collections/flush", collectionName=name)
    node.ask("/collections/compact", collectionName=name)
    until(lambda: node.index_finished(name, "v"), what="an index")
    check(node, name, kind, metric, [i for i in everything if i not in DEAD])
    node.ask("/collections/release", collectionName=name)
    node.ask("/collections/load", collectionName=name)
    check(node, name, kind, metric, [i for i in everything if i not in DEAD])


def test_everything_is_there_after_a_kill(node: Running) -> None:
    """Rows from the journal as well as from chunks; indexes are read, not lost."""
    for kind, metric, index, params in CASES[::3]:
        name = f"killed_{kind}_{metric}_{index}"
        create(node, name, kind, metric, index, params)
        insert(node, name, kind, range(100))
        node.ask("/collections/flush", collectionName=name)
        insert(node, name, kind, range(100, 200))
    node.restart(kill=True)
    for kind, metric, index, _ in CASES[::3]:
        check(node, f"killed_{kind}_{metric}_{index}", kind, metric, list(range(200)))


@pytest.mark.parametrize("kind", ["SparseFloatVector", "BinaryVector"])
def test_ranges_and_upserts(node: Running, kind: str) -> None:
    """A range search keeps what lies inside; an upserted vector is found, the old one is not."""
    metric = "IP" if kind == "SparseFloatVector" else "HAMMING"
    name = f"ranges_{kind}"
    create(node, name, kind, metric, "AUTOINDEX", {})
    insert(node, name, kind, range(150))
    node.ask("/collections/flush", collectionName=name)
    insert(node, name, kind, range(150, ROWS))
    exact = scores(kind, metric, 20)
    limits = {"radius": 0.5, "range_filter": 1.0} if metric == "IP" else {"radius": 8, "range_filter": 2}
    found = node.ask(
        "/entities/search", collectionName=name, data=[as_json(kind, 20)], annsField="v", limit=300, searchParams=limits
    )
    if metric == "IP":
        inside = {i for i, one in enumerate(exact) if one is not None and 0.5 < one <= 1.0}
    else:
        inside = {i for i, one in enumerate(exact) if one is not None and 2 <= one < 8}
    assert {row["id"] for row in found} == inside and inside
    node.ask("/entities/upsert", collectionName=name, data=[{"id": 1, "group": 9, "v": as_json(kind, 20)}])
    found = node.ask(
        "/entities/search",
        collectionName=name,
        data=[as_json(kind, 20)],
        annsField="v",
        limit=2,
        filter="id in [1, 20]",
    )
    assert [row["id"] for row in found] == [1, 20] or found[0]["distance"] == found[1]["distance"]


def test_quick_create(node: Running) -> None:
    """A type and a dimension are enough, and sparse vectors have none; the metric is the type's own."""
    for kind, metric in (("BinaryVector", "HAMMING"), ("SparseFloatVector", "IP"), ("Float16Vector", "COSINE")):
        dims = {} if kind == "SparseFloatVector" else {"dimension": DIM}
        node.ask("/collections/create", collectionName=f"quick_{kind}", vectorFieldType=kind, **dims)
        described = node.ask("/collections/describe", collectionName=f"quick_{kind}")
        assert [one["metricType"] for one in described["indexes"]] == [metric]
        node.ask("/entities/insert", collectionName=f"quick_{kind}", data=[{"id": 1, "vector": as_json(kind, 8)}])
        found = node.ask(
            "/entities/search", collectionName=f"quick_{kind}", data=[as_json(kind, 8)], consistencyLevel="Strong"
        )
        assert [row["id"] for row in found] == [1]


BAD_VALUES = [
    ("Float16Vector", [1.0], "the dim (1) of field data"),
    ("Float16Vector", [1e6] * DIM, "too large for a Float16Vector"),
    ("Float16Vector", base64.b64encode(b"\x00\x7c" * DIM).decode(), "NaN or infinite"),
    ("Float16Vector", "AQ==", "is not equal to schema dim"),
    ("Float16Vector", "???", "no base64"),
    ("BFloat16Vector", ["1"] * DIM, "is no BFloat16Vector"),
    ("Int8Vector", [128] + [0] * (DIM - 1), "whole numbers from -128 to 127"),
    ("Int8Vector", [0.5] * DIM, "whole numbers from -128 to 127"),
    ("Int8Vector", "[1]", "is no Int8Vector"),
    ("BinaryVector", [1, 2], "is no BinaryVector"),
    ("BinaryVector", "AQ==", "is not equal to schema dim"),
    ("BinaryVector", None, "a value is required"),
    ("SparseFloatVector", {"-1": 0.5}, "no index of a sparse vector"),
    ("SparseFloatVector", {"4294967295": 0.5}, "in range [0, 4294967294]"),
    ("SparseFloatVector", {"1": -0.5}, "negative value"),
    ("SparseFloatVector", {"1": 1e39}, "too large for a float32"),
    ("SparseFloatVector", {"1": "x"}, "no weight"),
    ("SparseFloatVector", {"1": True}, "no weight"),
    ("SparseFloatVector", {"a": 1}, "no index"),
    ("SparseFloatVector", {"01": 1, "1": 2}, "twice"),
    ("SparseFloatVector", {"indices": [1, 1], "values": [0.5, 0.5]}, "twice"),
    ("SparseFloatVector", {"indices": [1], "values": []}, "indices has 1 numbers, values has 0"),
    ("SparseFloatVector", {"indices": [1.5], "values": [1]}, "whole numbers"),
    ("SparseFloatVector", [1, 2], "no sparse vector"),
]


@pytest.mark.parametrize(("kind", "value", "words"), BAD_VALUES)
def test_bad_values_are_refused(node: Running, kind: str, value: Any, words: str) -> None:
    """As a row's value (1804) and as a query (1801): the message says what is wrong, and nothing is changed."""
    name = f"bad_{kind}"
    if not node.ask("/collections/has", collectionName=name)["has"]:
        create(node, name, kind, {"BinaryVector": "HAMMING"}.get(kind, "IP"), "AUTOINDEX", {})
    reply = node.call("/entities/insert", collectionName=name, data=[{"id": 1, "group": 1, "v": value}])
    assert reply["code"] == 1804 and words in reply["message"] and "'v'" in reply["message"], reply
    for _ in range(2):  # the second time the body's form is known
        reply = node.call("/entities/search", collectionName=name, data=[value], annsField="v", limit=1)
        assert reply["code"] == 1801 and "field v" in reply["message"], reply
    assert node.count(name) == 0


BAD_SCHEMAS = [
    ({"dataType": "BinaryVector", "elementTypeParams": {"dim": 12}}, {}, "multiple of 8"),
    ({"dataType": "SparseFloatVector", "elementTypeParams": {"dim": 8}}, {}, "dim should not be specified"),
    ({"dataType": "Int8Vector"}, {}, "invalid dimension: 0"),
    ({"dataType": "SparseFloatVector"}, {"indexType": "HNSW"}, "SPARSE_INVERTED_INDEX"),
    ({"dataType": "SparseFloatVector"}, {"metricType": "L2"}, "only IP&BM25 is the supported metric type for sparse"),
    ({"dataType": "BinaryVector", "elementTypeParams": {"dim": 8}}, {"indexType": "FLAT"}, "BIN_FLAT"),
    (
        {"dataType": "BinaryVector", "elementTypeParams": {"dim": 8}},
        {"metricType": "L2"},
        "binary vector index does not support metric type",
    ),
    (
        {"dataType": "Float16Vector", "elementTypeParams": {"dim": 8}},
        {"metricType": "HAMMING"},
        "float vector index does not support metric type",
    ),
]


@pytest.mark.parametrize(("field", "index", "words"), BAD_SCHEMAS)
def test_bad_schemas_are_refused(node: Running, field: dict[str, Any], index: dict[str, Any], words: str) -> None:
    """Dimensions and indexes or metrics that do not go with a type: 1100, naming the field and what there is."""
    reply = node.call(
        "/collections/create",
        collectionName="refused",
        schema={"fields": [{"fieldName": "id", "dataType": "Int64", "isPrimary": True}, {"fieldName": "v", **field}]},
        indexParams=[{"fieldName": "v", "metricType": "", **index}] if index else [],
    )
    assert reply["code"] == 1100 and words in reply["message"], reply
    assert "field v" in reply["message"] or "vector v" in reply["message"]


def test_cbor_bytes(node: Running) -> None:
    """CBOR carries halves, bits, bytes and pairs as they are, both ways."""
    cbor2 = pytest.importorskip("cbor2")
    kinds = {"Float16Vector": HALVES[5].tobytes(), "Int8Vector": BYTES[5].tobytes(), "BinaryVector": BITS[5].tobytes()}
    pairs = b"".join(struct.pack("<If", term, SPARSE[5][term]) for term in sorted(SPARSE[5]))
    for kind, value in (*kinds.items(), ("SparseFloatVector", pairs)):
        name = f"cbor_{kind}"
        create(node, name, kind, {"BinaryVector": "JACCARD"}.get(kind, "IP"), "AUTOINDEX", {})
        for path, body in (
            ("/entities/insert", {"data": [{"id": 5, "group": 0, "v": value}]}),
            ("/entities/search", {"data": [value], "limit": 1, "outputFields": ["v"]}),
        ):
            raw = cbor2.dumps({"collectionName": name, **body})
            reply = cbor2.loads(node.send(path, raw, Content_Type="application/cbor", Accept="application/cbor")[1])
            assert reply["code"] == 0, reply
        shown = value if kind != "SparseFloatVector" else {str(term): w for term, w in sorted(SPARSE[5].items())}
        assert reply["data"][0]["v"] == shown and not math.isnan(reply["data"][0]["distance"])
