"""`annulus import` and `annulus export` with real processes: what is in the files is in the collection, once."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.bulk.exporting import Exporter
from node.bulk.remote import Remote
from tests.process.running import PROJECT, Running, clean_environment, until

ROWS = 12_000
DIM = 8


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("import") / "n1") as running:
        yield running


def annulus(folder: Path, node: Running, *words: object) -> subprocess.Popen[str]:
    environment = clean_environment() | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "node", *map(str, words), "--address", f"127.0.0.1:{node.port}"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder: Path, node: Running, *words: object, status: int = 0) -> str:
    process = annulus(folder, node, *words)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status, said
    return said


def write_rows(path: Path, rows: int = ROWS, *, keys: bool = True) -> list[dict[str, Any]]:
    made = [
        {"number": i, "vector": [float(i % 97), 0.5, 1, 2, 3, 4, 5, i / 7], "name": f"row {i}"} for i in range(rows)
    ]
    if keys:
        made = [{"id": 3 * i, **row} for i, row in enumerate(made)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


def numbers(node: Running, collection: str) -> list[int]:
    """Return the `number` of all rows, ascending, also of those that are there twice."""
    found: list[int] = []
    for low in range(0, ROWS, 4_000):
        rows = node.ask(
            "/entities/query", collectionName=collection, filter=f"{low} <= number < {low + 4000}",
            outputFields=["number"], limit=16_384, consistencyLevel="Strong",
        )  # fmt: skip
        found += [row["number"] for row in rows]
    return sorted(found)


def done(folder: Path, collection: str) -> int:
    try:
        return int(sum(json.loads((folder / f"{collection}.import.json").read_text())["done"]))
    except OSError:
        return 0


@pytest.mark.parametrize("auto_id", [False, True], ids=["own keys", "autoID"])
def test_an_import_goes_on_after_its_client_was_killed(node: Running, tmp_path: Path, auto_id: bool) -> None:
    """Killed with batches in flight and resumed, every row is there once."""
    name = "killed_auto" if auto_id else "killed"
    write_rows(tmp_path / "rows.jsonl", keys=not auto_id)
    words = ["import", "rows.jsonl", "--collection", name, "--batch-rows", 50]
    process = annulus(tmp_path, node, *words)
    until(lambda: done(tmp_path, name) > ROWS // 4, what="half an import")
    process.kill()
    process.communicate()
    assert ROWS // 4 < done(tmp_path, name) < ROWS, "the import was over before it was killed"
    run(tmp_path, node, *words, status=1)
    run(tmp_path, node, *words, "--resume")
    assert node.count(name) == ROWS
    assert numbers(node, name) == list(range(ROWS))
    assert not (tmp_path / f"{name}.import.json").exists()


@pytest.mark.parametrize("patience", [1, 60], ids=["gives up", "waits"])
def test_an_import_goes_on_after_its_node_was_killed(node: Running, tmp_path: Path, patience: int) -> None:
    """The client stops and says how to go on, or waits for the node; every row is there once, with its content."""
    name = f"patience_{patience}"
    made = write_rows(tmp_path / "rows.jsonl", keys=False)
    words = ["import", "rows.jsonl", "--collection", name, "--batch-rows", 50, "--patience", patience]
    process = annulus(tmp_path, node, *words)
    until(lambda: done(tmp_path, name) > ROWS // 4, what="half an import")
    node.kill()
    if patience == 60:
        node.start()
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    else:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 3 and "--resume" in said, said
        node.start()
        run(tmp_path, node, *words, "--resume")
    assert node.count(name) == ROWS
    assert numbers(node, name) == list(range(ROWS))
    found = node.ask(
        "/entities/query",
        collectionName=name,
        filter="number in [17, 11999]",
        outputFields=["number", "vector", "name"],
    )
    for row in found:
        assert {key: row[key] for key in ("number", "name")} == {
            key: made[row["number"]][key] for key in ("number", "name")
        }
        assert np.allclose(row["vector"], made[row["number"]]["vector"])


def test_bad_rows_are_rejected_and_no_others(node: Running, tmp_path: Path) -> None:
    """Each with file, row and reason; a repeat under --max-rejects stops and can go on."""
    schema = {
        "schema": {
            "fields": [
                {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
                {"fieldName": "name", "dataType": "VarChar", "elementTypeParams": {"max_length": 4}},
                {"fieldName": "size", "dataType": "Int8", "nullable": True},
            ]
        },
        "indexParams": [{"fieldName": "vector"}],
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    lines = [json.dumps({"id": i, "vector": [i, 1], "name": "ok", "size": i % 100}) for i in range(30)]
    lines[3] = "{no json"
    lines[5] = json.dumps({"id": 5, "vector": [1, 2, 3], "name": "ok"})
    lines[8] = json.dumps({"id": 8, "vector": [1, 2], "name": "too long"})
    lines[13] = json.dumps({"id": 13, "vector": [1, 2], "name": "ok", "size": 200})
    lines[14] = json.dumps({"id": 14, "vector": [1, 2], "name": None})
    lines[20] = json.dumps([1])
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = ["import", "rows.jsonl", "--collection", "r", "--schema", "schema.json", "--batch-rows", 10]
    words += ["--in-flight", 1]
    assert "--resume" in run(tmp_path, node, *words, "--max-rejects", 3, status=3)
    run(tmp_path, node, *words, "--resume", status=4)
    rejects = [json.loads(line) for line in (tmp_path / "r.rejects.jsonl").read_text().splitlines()]
    assert [one["row"] for one in rejects] == [3, 5, 8, 13, 14, 20]
    reasons = ["no JSON", "'vector'", "'name'", "'size'", "'name'", "object"]
    assert all(part in one["reason"] for part, one in zip(reasons, rejects, strict=True)), rejects
    rows = node.ask("/entities/query", collectionName="r", filter="id >= 0", limit=100, outputFields=["id"])
    assert [row["id"] for row in rows] == [i for i in range(30) if i not in {3, 5, 8, 13, 14, 20}]


def test_the_same_rows_from_every_kind_of_file(node: Running, tmp_path: Path) -> None:
    """CSV, JSON in its three forms, arrays: the collection that is made for them holds the same."""
    made = [{"id": i, "vector": [i + 0.5, 1.0, 2.0], "name": f"n {i}", "ok": i % 2 == 0} for i in range(25)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, made)))
    (tmp_path / "b.json").write_text(json.dumps({"rows": made}, indent=1))
    (tmp_path / "c.json").write_text(json.dumps(made))
    table = ["id,vector,name,ok", *(f'{r["id"]},"{r["vector"]}",{r["name"]},{json.dumps(r["ok"])}' for r in made)]
    (tmp_path / "d.csv").write_text("\n".join(table))
    for key, kind in {"id": "i8", "vector": "f4", "name": "U", "ok": "?"}.items():
        np.save(tmp_path / f"{key}.npy", np.array([row[key] for row in made], kind))
    for i, files in enumerate((["a.jsonl"], ["b.json"], ["c.json"], ["d.csv"], [f"{key}.npy" for key in made[0]])):
        run(tmp_path, node, "import", *files, "--collection", f"kind_{i}", "--batch-rows", 10)
        assert node.ask("/entities/query", collectionName=f"kind_{i}", filter="id >= 0", limit=100) == made, files


TYPES: list[dict[str, Any]] = [
    {"fieldName": "flag", "dataType": "Bool", "nullable": True},
    {"fieldName": "i8", "dataType": "Int8"},
    {"fieldName": "i16", "dataType": "Int16", "nullable": True},
    {"fieldName": "i32", "dataType": "Int32", "defaultValue": 7},
    {"fieldName": "i64", "dataType": "Int64"},
    {"fieldName": "single", "dataType": "Float", "nullable": True},
    {"fieldName": "double", "dataType": "Double"},
    {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {"max_length": 100}, "nullable": True},
    {"fieldName": "doc", "dataType": "JSON", "nullable": True},
    {"fieldName": "ints", "dataType": "Array", "elementDataType": "Int32", "elementTypeParams": {"max_capacity": 9}},
    {"fieldName": "words", "dataType": "Array", "elementDataType": "VarChar", "nullable": True,
     "elementTypeParams": {"max_capacity": 9, "max_length": 50}},
    {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": 3}},
    {"fieldName": "half", "dataType": "Float16Vector", "elementTypeParams": {"dim": 3}},
    {"fieldName": "brain", "dataType": "BFloat16Vector", "elementTypeParams": {"dim": 3}},
    {"fieldName": "bits", "dataType": "BinaryVector", "elementTypeParams": {"dim": 16}},
    {"fieldName": "tiny", "dataType": "Int8Vector", "elementTypeParams": {"dim": 3}},
    {"fieldName": "sparse", "dataType": "SparseFloatVector"},
    {"fieldName": "body", "dataType": "VarChar", "elementTypeParams": {"max_length": 99, "enable_analyzer": True}},
    {"fieldName": "terms", "dataType": "SparseFloatVector"},
]  # fmt: skip


def a_row(key: int | str, dice: random.Random) -> dict[str, Any]:
    """Return a row of TYPES, with values of all sorts."""

    def sometimes(value: Any) -> Any:
        return None if dice.random() < 0.3 else value

    text = "".join(dice.choice('aé"\\,\n{}[]1 ☃') for _ in range(dice.randrange(20)))
    return {
        "id": key,
        "flag": sometimes(dice.random() < 0.5),
        "i8": dice.randrange(-128, 128),
        "i16": sometimes(dice.randrange(-(1 << 15), 1 << 15)),
        "i32": dice.randrange(-(1 << 31), 1 << 31),
        "i64": dice.choice([-(1 << 63), (1 << 63) - 1, dice.getrandbits(60)]),
        "single": sometimes(dice.uniform(-1e30, 1e30)),
        "double": dice.choice([dice.random(), 1e300, -0.0, 5e-324]),
        "text": sometimes(text),
        "doc": sometimes(dice.choice(["123", "null", text.replace("{", ""), 1.5, True, [1, None], {"a": {"b": []}}])),
        "ints": [dice.randrange(100) for _ in range(dice.randrange(5))],
        "words": sometimes([text, "x"][: dice.randrange(3)]),
        "vector": [dice.random() for _ in range(3)],
        "half": [dice.random() for _ in range(3)],
        "brain": [dice.random() for _ in range(3)],
        "bits": base64.b64encode(dice.randbytes(2)).decode(),
        "tiny": [dice.randrange(-128, 128) for _ in range(3)],
        "sparse": {str(dice.randrange(1 << 31)): dice.random() for _ in range(dice.randrange(1, 4))},
        "body": dice.choice(["wild horses run", "a horse", "cats"]),
        **({"extra": dice.choice([1, "t", [None], {"k": 1}]), "other key": text} if dice.random() < 0.5 else {}),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("key", ["Int64", "VarChar"])
def test_what_is_exported_is_imported_as_it_was(node: Running, tmp_path: Path, form: str, key: str) -> None:
    """Every type, nulls, dynamic keys, schema and indexes: the copy answers as the collection that it is of."""
    dice = random.Random(f"{form} {key}")
    name = f"trip_{form}_{key}"
    primary = {"fieldName": "id", "dataType": key, "isPrimary": True, "elementTypeParams": {"max_length": 40}}
    indexes = [{"fieldName": one["fieldName"]} for one in TYPES if one["dataType"].endswith("Vector")]
    indexes[0] |= {"metricType": "L2", "indexType": "HNSW", "params": {"M": 8, "efConstruction": 50}}
    indexes[-1] |= {"metricType": "BM25"}
    terms = {"name": "bm25", "type": "BM25", "inputFieldNames": ["body"], "outputFieldNames": ["terms"]}
    node.ask(
        "/collections/create", collectionName=name,
        schema={"enableDynamicField": True, "fields": [primary, *TYPES], "functions": [terms]},
        indexParams=indexes, properties={"collection.ttl.seconds": 86400}, consistencyLevel="Strong",
        description="as it was", params={"shardsNum": 2},
    )  # fmt: skip
    keys: list[Any] = dice.sample(range(-500, 500), 300)
    keys = keys if key == "Int64" else [f"k{one}☃" for one in keys]
    node.ask("/entities/insert", collectionName=name, data=[a_row(one, dice) for one in keys])
    run(tmp_path, node, "export", "out", "--collection", name, "--format", form, "--file-rows", 120)
    files = sorted(str(one.relative_to(tmp_path)) for one in (tmp_path / "out").glob("part-*"))
    assert files and not (tmp_path / "out" / "export.json").exists()
    schema = ["--schema", "out/collection.json"] if form == "jsonl" else []
    run(tmp_path, node, "import", *files, "--collection", f"{name}_copy", "--batch-rows", 70, *schema)

    def shown(collection: str) -> list[Any]:
        facts = node.ask("/collections/describe", collectionName=collection)
        indexes = [
            node.ask("/indexes/describe", collectionName=collection, indexName=one)[0]
            for one in node.ask("/indexes/list", collectionName=collection)
        ]
        rows = node.ask("/entities/query", collectionName=collection, limit=1000, outputFields=["*"])
        different = ("collectionName", "collectionID", "aliases")
        parts = ("indexName", "fieldName", "indexType", "metricType", "indexParams")
        kept = {part: value for part, value in facts.items() if part not in different}
        return [kept, [{part: one[part] for part in parts} for one in indexes], rows]

    assert shown(f"{name}_copy") == shown(name)


def test_an_export_goes_on_where_it_was_broken_off(node: Running, tmp_path: Path) -> None:
    """Killed and resumed, the files hold each row of the snapshot once, whatever is written meanwhile."""
    rows = [{"id": i, "vector": [i, 1.0]} for i in range(9_000)]
    node.ask("/collections/create", collectionName="e", dimension=2)
    node.ask("/entities/insert", collectionName="e", data=rows)
    words = ["export", "out", "--collection", "e", "--format", "jsonl", "--file-rows", 1]
    process = annulus(tmp_path, node, *words)
    out = tmp_path / "out"
    until(lambda: (out / "part-00000.jsonl").exists(), what="a file")
    process.kill()
    process.communicate()
    node.ask("/entities/delete", collectionName="e", filter="id >= 8000")
    if (out / "export.json").exists():
        run(tmp_path, node, *words, "--resume")
    found = [
        json.loads(line)["id"] for part in sorted(out.glob("part-*.jsonl")) for line in part.read_text().splitlines()
    ]
    assert found == list(range(9_000))


class Stopped(Exception):
    """Where the process would have been killed."""


def test_an_export_broken_off_at_any_step_goes_on_with_its_snapshot(
    node: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a file is there, what is written later never gets in beside it or in its place."""
    node.ask("/collections/create", collectionName="steps", dimension=2)
    node.ask("/entities/insert", collectionName="steps", data=[{"id": i, "vector": [i, 1.0]} for i in range(2_500)])
    remote = Remote(f"127.0.0.1:{node.port}")
    replace = os.replace

    def exported(folder: Path, steps: int, *, before: bool) -> list[int]:
        """Stop before or after the given number of renames, delete a row, go on; return the keys in the files."""
        done = 0

        def stopping(source: str, target: str) -> None:
            nonlocal done
            done += 1
            if before and done == steps:
                raise Stopped
            replace(source, target)
            if done == steps:
                raise Stopped

        monkeypatch.setattr("node.bulk.exporting.os.replace", stopping)
        exporter = Exporter(remote, str(folder), database="", collection="steps", format="jsonl", file_rows=1)
        try:
            exporter.run()
        except Stopped:
            monkeypatch.setattr("node.bulk.exporting.os.replace", replace)
            shown = {part.name: part.read_text() for part in folder.glob("part-*.jsonl")}
            node.ask("/entities/upsert", collectionName="steps", data=[{"id": 7, "vector": [steps, int(before)]}])
            resumed = Exporter(remote, str(folder), database="", collection="steps", format="jsonl", file_rows=1)
            if (folder / "export.json").exists():
                resumed.resume()
            resumed.run()
            assert all((folder / name).read_text() == text for name, text in shown.items())
        else:
            raise StopIteration
        return [
            json.loads(line)["id"]
            for part in sorted(folder.glob("part-*.jsonl"))
            for line in part.read_text().splitlines()
        ]

    with closing(remote), suppress(StopIteration):
        for steps in itertools.count(1):
            for before in (True, False):
                assert exported(tmp_path / f"{steps}-{before}", steps, before=before) == list(range(2_500))
    assert steps > 3
