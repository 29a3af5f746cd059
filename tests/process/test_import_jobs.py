"""Import jobs of a node: files of one directory and no others, and no row lost or there twice if the node dies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.process.clusters import Trio
from tests.process.running import Running, until

ROWS = 40_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("jobs")
    with Running(folder / "n1", settings={"imports.directory": str(files)}) as running:
        yield running


def make(node: Running, name: str, *, auto_id: bool = False) -> None:
    fields = [
        {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
        {"fieldName": "number", "dataType": "Int64"},
        {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": 4}},
    ]
    schema = {"autoID": auto_id, "fields": fields}
    node.ask("/collections/create", collectionName=name, schema=schema, indexParams=[{"fieldName": "vector"}])


def begin(node: Running, collection: str, *groups: list[str], **options: str) -> str:
    return str(node.ask("/jobs/import/create", collectionName=collection, files=groups, options=options)["jobId"])


def job(node: Running, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = node.ask("/jobs/import/describe", jobId=job_id)
    return found


def finished(node: Running, job_id: str) -> dict[str, Any]:
    until(lambda: job(node, job_id)["state"] in ("Completed", "Failed"), seconds=60, what="the job's end")
    return job(node, job_id)


def test_a_job_survives_its_node(node: Running, files: Path) -> None:
    """Killed half way the node goes on after its start; each row is there once, also where it makes the keys."""
    lines = (json.dumps({"number": i, "vector": [i % 9, 1, 2, 3]}) for i in range(ROWS))
    (files / "rows.jsonl").write_text("\n".join(lines))
    make(node, "long", auto_id=True)
    job_id = begin(node, "long", ["rows.jsonl"])
    until(lambda: job(node, job_id)["importedRows"] > 0, what="the first rows")
    node.kill()
    node.start()
    assert finished(node, job_id)["importedRows"] == ROWS
    assert node.count("long") == ROWS
    numbers: list[int] = []
    for low in range(0, ROWS, 10_000):
        rows = node.ask(
            "/entities/query", collectionName="long", filter=f"{low} <= number < {low + 10_000}", limit=16_384,
            outputFields=["number"],
        )  # fmt: skip
        numbers += [row["number"] for row in rows]
    assert sorted(numbers) == list(range(ROWS))
    node.restart()
    facts = job(node, job_id)
    assert (facts["state"], facts["progress"], facts["totalRows"]) == ("Completed", 100, ROWS)
    assert job_id in [one["jobId"] for one in node.ask("/jobs/import/list", collectionName="long")["records"]]


def test_arrays_of_one_list_are_one_table(node: Running, files: Path) -> None:
    np.save(files / "id.npy", np.arange(100))
    np.save(files / "number.npy", np.arange(100) * 2)
    np.save(files / "vector.npy", np.ones((100, 4), np.float16))
    make(node, "arrays")
    done = finished(node, begin(node, "arrays", ["id.npy", "number.npy", "vector.npy"]))
    assert done["state"] == "Completed", done
    assert node.count("arrays", "number == 2 * 7") == 1 and node.count("arrays") == 100


def test_rows_that_do_not_fit_fail_a_job_or_are_left_out(node: Running, files: Path) -> None:
    rows = [{"id": i, "number": i, "vector": [1, 2, 3, 4]} for i in range(9)]
    rows[4]["vector"] = [1]
    (files / "bad.json").write_text(json.dumps({"rows": rows}))
    make(node, "bad")
    failed = finished(node, begin(node, "bad", ["bad.json"]))
    assert failed["state"] == "Failed" and "row 4" in failed["reason"]
    make(node, "some")
    done = finished(node, begin(node, "some", ["bad.json"], max_rejects="1"))
    assert (done["state"], done["importedRows"]) == ("Completed", 8) and "row 4" in done["reason"]
    assert node.count("some") == 8


def test_rows_come_into_the_partitions_that_they_name(node: Running, files: Path) -> None:
    """Where these are there; a job makes none, and partitionName overrides what rows say."""
    rows = [{"id": i, "number": i, "vector": [1, 2, 3, 4], "$partition": ["north", "south"][i % 2]} for i in range(9)]
    (files / "parts.json").write_text(json.dumps(rows))
    make(node, "parts")
    node.ask("/partitions/create", collectionName="parts", partitionName="north")
    failed = finished(node, begin(node, "parts", ["parts.json"]))
    assert failed["state"] == "Failed" and "partition south" in failed["reason"]
    node.ask("/partitions/create", collectionName="parts", partitionName="south")
    make(node, "whole")
    node.ask("/partitions/create", collectionName="whole", partitionName="all")
    for collection, partition, expected in (
        ("parts", None, {"north": [0, 2, 4, 6, 8], "south": [1, 3, 5, 7]}),
        ("whole", "all", {"all": list(range(9))}),
    ):
        node.ask("/entities/delete", collectionName=collection, filter="id >= 0")
        job_id = node.ask(
            "/jobs/import/create", collectionName=collection, files=[["parts.json"]], partitionName=partition
        )["jobId"]
        assert finished(node, job_id)["importedRows"] == 9
        for name, keys in expected.items():
            found = node.ask(
                "/entities/query", collectionName=collection, partitionNames=[name], limit=99, outputFields=["id"],
                consistencyLevel="Strong",
            )  # fmt: skip
            assert [row["id"] for row in found] == keys


def test_no_file_elsewhere_is_read(node: Running, files: Path, tmp_path: Path) -> None:
    """Not by dots, an absolute name, nor a link; what the answer says is the same whether there is such a file."""
    (tmp_path / "secret.json").write_text("[]")
    (files / "link.json").symlink_to(tmp_path / "secret.json")
    (files / "linked").symlink_to(tmp_path)
    make(node, "safe")
    relative = os.path.relpath(tmp_path / "secret.json", files)
    names = (relative, str(tmp_path / "secret.json"), "link.json", "linked/secret.json", "../none.json", "/etc/passwd")
    for name in names:
        reply = node.call("/jobs/import/create", collectionName="safe", files=[[name]])
        assert reply["code"] == 1100 and "is not in the directory" in reply["message"], (name, reply)
    assert node.call("/jobs/import/create", collectionName="safe", files=[["none.json"]])["code"] == 1100
    assert node.call("/jobs/import/create", collectionName="safe", files=[])["code"] == 1100
    assert node.call("/jobs/import/create", collectionName="none", files=[["bad.json"]])["code"] == 100
    assert node.call("/jobs/import/describe", jobId="17")["code"] == 1100
    with Running(tmp_path / "n2") as other:
        make(other, "c")
        reply = other.call("/jobs/import/create", collectionName="c", files=[["rows.jsonl"]])
        assert reply["code"] == 3000 and "imports.directory" in reply["message"]


def test_every_node_tells_of_a_job(files: Path, tmp_path: Path) -> None:
    """Any node describes and lists the jobs of all; of a node that is down it says so, and when it is back, again."""
    (files / "few.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "number": i, "vector": [1, 2, 3, 4]}) for i in range(9))
    )
    with Trio(tmp_path / "trio", settings={"imports.directory": str(files)}) as nodes:
        first, second, third = nodes["n1"], nodes["n2"], nodes["n3"]
        make(first, "jobs")
        ids = {begin(one, "jobs", ["few.jsonl"]): one for one in (first, second)}
        assert len(ids) == 2
        for job_id in ids:
            for one in (third, first, second):
                assert finished(one, job_id)["importedRows"] == 9
        listed = third.call("/jobs/import/list", collectionName="jobs")
        assert [one["jobId"] for one in listed["data"]["records"]] == sorted(ids) and "message" not in listed
        assert third.call("/jobs/import/describe", jobId="17")["code"] == 1100
        gone = next(job_id for job_id, one in ids.items() if one is second)
        second.kill()
        until(lambda: third.call("/jobs/import/describe", jobId=gone)["code"] != 0, what="the loss of n2")
        reply = third.call("/jobs/import/describe", jobId=gone)
        assert "node n2" in reply["message"] and gone in reply["message"], reply
        listed = third.call("/jobs/import/list")
        assert len(listed["data"]["records"]) == 1 and "n2" in listed["message"], listed
        second.start()
        until(lambda: third.call("/jobs/import/describe", jobId=gone)["code"] == 0, what="n2 is back")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"id": 1, "number": 2, "vector": [1, 2, 3, 4], "x": "\xff"}]', "is no JSON"),
        (b'[{"id": ' + b"9" * 5_000 + b', "number": 2, "vector": [1, 2, 3, 4]}]', "row 0"),
        (b'[{"id": 1, "number": 2, "vector": [1, 2, 3, 4], "x": "\\ud800"}]', "row 0: no JSON"),
        (b'[{"id": 1, "number": NaN, "vector": [1, 2, 3, 4]}]', "row 0: no JSON"),
        (b'{"rows": {"id": 1}}', '"rows" should be a list'),
        (b'[{"id": 1, "number": 2', "row 0 is no JSON"),
        (b"[" * 100_000, "row 0 is no JSON"),
    ],
)
def test_json_that_is_none(node: Running, files: Path, content: bytes, said: str) -> None:
    """A file that cannot be read fails its job with the reason, and does not tell where the file is on this machine."""
    (files / "odd.json").write_bytes(content)
    if not node.ask("/collections/has", collectionName="odd")["has"]:
        make(node, "odd")
    facts = finished(node, begin(node, "odd", ["odd.json"]))
    assert facts["state"] == "Failed" and said in facts["reason"], facts
    assert "unexpected error" not in facts["reason"] and str(files) not in facts["reason"]
    assert node.count("odd") == 0


def test_rows_of_a_list_are_those_of_lines(node: Running, files: Path) -> None:
    """The same rows, however the file has them."""
    rows = [{"id": i, "number": (1 << 62) + i, "vector": [0.5, i, -1e-7, 3]} for i in range(50)]
    (files / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "two.json").write_text(json.dumps(rows))
    (files / "three.json").write_text(json.dumps({"rows": rows}, indent=3))
    found = []
    for name in ("one.jsonl", "two.json", "three.json"):
        collection = name.split(".")[0]
        make(node, collection)
        assert finished(node, begin(node, collection, [name]))["importedRows"] == len(rows)
        found.append(node.ask("/entities/query", collectionName=collection, filter="id >= 0", outputFields=["*"]))
    assert found[0] == found[1] == found[2] and [row["number"] for row in found[0]] == [row["number"] for row in rows]


def test_a_name_with_a_zero_byte(node: Running) -> None:
    """No file has such a name: that is the client's mistake, not the node's."""
    make(node, "zero")
    reply = node.call("/jobs/import/create", collectionName="zero", files=[["a\0b"]])
    assert reply["code"] == 1100, reply
