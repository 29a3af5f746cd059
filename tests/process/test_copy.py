"""`annulus copy` from another server by its gRPC: here another Annulus, which answers as Milvus does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.process.running import Running, until
from tests.process.test_import import TYPES, a_row, annulus, run


def test_a_copy_is_as_its_origin_also_after_a_break(tmp_path: Path) -> None:
    """All types, schema and indexes; killed half way and resumed, each row is there once."""
    with Running(tmp_path / "n1") as old, Running(tmp_path / "n2") as new:
        dice = random.Random(3)
        primary = {"fieldName": "id", "dataType": "VarChar", "isPrimary": True, "elementTypeParams": {"max_length": 40}}
        fields = [one for one in TYPES if one["fieldName"] != "terms"]
        indexes = [{"fieldName": one["fieldName"]} for one in fields if one["dataType"].endswith("Vector")]
        schema = {"enableDynamicField": True, "fields": [primary, *fields]}
        old.ask("/collections/create", collectionName="all", schema=schema, indexParams=indexes)
        old.ask("/entities/insert", collectionName="all", data=[a_row(f"k{i}", dice) for i in range(300)])
        old.ask("/collections/create", collectionName="big", dimension=4, autoID=True)
        for first in range(0, 40_000, 5_000):
            rows = [{"vector": [1, 2, 3, i % 10], "number": i} for i in range(first, first + 5_000)]
            old.ask("/entities/insert", collectionName="big", data=rows)
        words = ["copy", "--from", f"http://127.0.0.1:{old.port}"]
        process = annulus(tmp_path, new, *words)
        state = tmp_path / "big.copy.json"
        until(lambda: state.exists() and json.loads(state.read_text())["rows"] > 0, what="half a copy")
        process.kill()
        process.communicate()
        run(tmp_path, new, *words, "--resume")

        def rows_of(node: Running, name: str, filter_text: str, *fields: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = node.ask(
                "/entities/query", collectionName=name, filter=filter_text, limit=16_384, outputFields=list(fields)
            )
            return found

        assert rows_of(new, "all", "", "*") == rows_of(old, "all", "", "*")
        assert new.count("big") == 40_000
        numbers = []
        for low in range(0, 40_000, 10_000):
            found = rows_of(new, "big", f"{low} <= number < {low + 10_000}", "number")
            numbers += [row["number"] for row in found]
        assert sorted(numbers) == list(range(40_000))
