"""Sparse, binary and half vectors in a cluster: every node answers as plain arithmetic does, whoever holds the rows.

Also after flush, index and compaction, and when a node comes back without its disk and takes the chunks of others.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from index.sparse import SparseRows
from node.service import (
    CollectionRequest,
    HybridRequest,
    IndexRequest,
    IndexState,
    Order,
    ReadOptions,
    SearchRequest,
    SubSearch,
)
from storage.columns import Batch, ScalarColumn, SparseColumn, VectorColumn
from storage.fusion import ReciprocalRank
from storage.schema import DataType, FieldSchema
from storage.types import FieldId
from tests.node.cluster_of import STRONG, Site, on_a_cluster

ID, WORDS, BITS, HALVES = (FieldId(number) for number in range(100, 104))
ROWS = 90
RNG = np.random.default_rng(8)
TERMS = [sorted(RNG.choice(12, 4, replace=False).tolist()) for _ in range(ROWS)]
SPARSE = SparseRows.of([(terms, RNG.integers(1, 9, 4).tolist()) for terms in TERMS])
BINARY = RNG.integers(0, 256, (ROWS, 2)).astype(np.uint8)
HALF = RNG.normal(size=(ROWS, 4)).astype(np.float16)
OPTIONS = ReadOptions(consistency=STRONG, output_fields=["words", "bits", "halves"])

REQUEST = CollectionRequest(
    "t",
    [
        FieldSchema("id", DataType.INT64, primary=True),
        FieldSchema("words", DataType.SPARSE_FLOAT_VECTOR),
        FieldSchema("bits", DataType.BINARY_VECTOR, dim=16),
        FieldSchema("halves", DataType.FLOAT16_VECTOR, dim=4),
    ],
    indexes=[
        IndexRequest("words", "words", "SPARSE_INVERTED_INDEX", "IP"),
        IndexRequest("bits", "bits", "BIN_IVF_FLAT", "JACCARD", {"nlist": 2}),
        IndexRequest("halves", "halves", "HNSW_SQ", "L2"),
    ],
    load=True,
    shards=2,
)


def batch(some: range) -> Batch:
    rows = np.array(some)
    return Batch(
        {
            ID: ScalarColumn(rows.astype(np.int64)),
            WORDS: SparseColumn(SPARSE.take(rows)),
            BITS: VectorColumn(BINARY[rows]),
            HALVES: VectorColumn(HALF[rows]),
        },
        len(rows),
    )


def searches(i: int) -> list[SearchRequest]:
    probe = np.array([i])
    return [
        SearchRequest(SPARSE.take(probe), anns_field="words", limit=8),
        SearchRequest(BINARY[probe], anns_field="bits", limit=8, params={"nprobe": 2}),
        SearchRequest(HALF[probe].astype(np.float32), anns_field="halves", limit=8, params={"ef": 200}),
    ]


def expected(i: int, there: list[int]) -> list[list[float]]:
    def row(one: int) -> dict[int, float]:
        terms, weights = SPARSE.row(one)
        return dict(zip(terms.tolist(), weights.tolist(), strict=True))

    mine = row(i)
    products = [sum(weight * mine.get(term, 0) for term, weight in row(one).items()) for one in there]
    bits = np.unpackbits(BINARY, axis=1)
    both, either = (bits & bits[i]).sum(axis=1), (bits | bits[i]).sum(axis=1)
    jaccard = (1 - both / np.maximum(either, 1)).astype(np.float32)
    squared = ((HALF.astype(np.float64) - HALF[i].astype(np.float64)) ** 2).sum(axis=1).astype(np.float32)
    return [
        sorted((one for one in products if one > 0), reverse=True)[:8],
        sorted(jaccard[there].tolist())[:8],
        sorted(squared[there].tolist())[:8],
    ]


async def check(site: Site, there: list[int]) -> None:
    for name in site.world.machines:
        for i in (0, 50, 89):
            for request, wanted in zip(searches(i), expected(i, there), strict=True):
                found = await site.ask(name, lambda db, one=request: db.search("default", "t", one, OPTIONS))  # type: ignore[misc]
                assert found.scores.tolist() == wanted, (name, i, request.anns_field)
                columns = found.rows.batch.columns
                ids = columns[ID].to_list()
                assert columns[WORDS].to_list() == SparseColumn(SPARSE.take(np.array(ids))).to_list()
                assert np.array_equal(columns[BITS].values, BINARY[ids])
                assert np.array_equal(columns[HALVES].values, HALF[ids])
        hybrid = HybridRequest([SubSearch(one) for one in searches(50)], ReciprocalRank(), 1)
        best = await site.ask(name, lambda db, one=hybrid: db.hybrid_search("default", "t", one, OPTIONS))  # type: ignore[misc]
        assert best.rows.batch.columns[ID].to_list() == [50]
        last = replace(OPTIONS, output_fields=["id"], order_by=[Order("id", descending=True)])
        rows = await site.ask(name, lambda db, one=last: db.query("default", "t", one, limit=3, offset=0))  # type: ignore[misc]
        assert rows.batch.columns[ID].to_list() == sorted(there, reverse=True)[:3]
        sums = replace(OPTIONS, output_fields=["count(*)", "max(id)"])
        groups = await site.ask(name, lambda db, one=sums: db.query("default", "t", one, limit=0, offset=0))  # type: ignore[misc]
        assert groups.groups == [{"count(*)": len(there), "max(id)": max(there)}]
        near = replace(searches(50)[1], group_by_field="id", group_size=2, limit=5)
        grouped = await site.ask(name, lambda db, one=near: db.search("default", "t", one, OPTIONS))  # type: ignore[misc]
        assert grouped.scores.tolist() == expected(50, there)[1][:5]


async def indexed(site: Site) -> None:
    """Return when all sealed rows are indexed."""
    for field in ("words", "bits", "halves"):
        while True:
            info = await site.ask("n1", lambda db, one=field: db.describe_index("default", "t", one))  # type: ignore[misc]
            if info.state is IndexState.FINISHED and info.pending_rows == 0:
                break
            await asyncio.sleep(0.2)


def test_all_nodes_answer_the_same() -> None:
    """Growing, indexed, with rows deleted, compacted, and on a node whose disk was lost."""

    async def script(site: Site) -> None:
        await site.ask("n1", lambda db: db.create_collection("default", REQUEST))
        await site.ask("n2", lambda db: db.insert("default", "t", batch(range(60))))
        await check(site, list(range(60)))
        await site.ask("n3", lambda db: db.flush("default", "t"))
        await indexed(site)
        await site.ask("n4", lambda db: db.insert("default", "t", batch(range(60, ROWS))))
        await site.ask("n1", lambda db: db.delete("default", "t", "id in [50, 51, 70]", {}))
        await site.ask("n1", lambda db: db.upsert("default", "t", batch(range(50, 51))))
        there = [i for i in range(ROWS) if i not in (51, 70)]
        await check(site, there)
        await site.ask("n2", lambda db: db.flush("default", "t"))
        await site.ask("n2", lambda db: db.compact("default", "t"))
        await indexed(site)
        await check(site, there)
        site.kill("n2")
        site.world.machines["n2"].lose_disk()
        site.world.start("n2")
        await site.ready()
        await check(site, there)

    on_a_cluster(script, nodes=4, copies=3, shards=2)
