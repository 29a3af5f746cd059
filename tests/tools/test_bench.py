"""The benchmark measures what it says: percentiles, recall, reads beside writes; and a tiny run from end to end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
from click.testing import CliRunner

from tools.bench import freshness
from tools.bench.__main__ import main
from tools.bench.builds import cpu_s
from tools.bench.data import Dataset, load_dataset
from tools.bench.goals import GOALS, Goal, Verdict
from tools.bench.load import content_length, read_frames, write_frames
from tools.bench.loading import Load, Replies, run_load
from tools.bench.node import NodeProcess, free_address
from tools.bench.report import as_json, number
from tools.bench.results import Results
from tools.bench.truth import exact, percentile, recall
from tools.bench.wire import Codec, Form, insert_requests, schema_body, search_hits, search_requests

DUMB = "tests.tools.dumb_node"
LINE = np.array([[float(i), 0.0] for i in range(10)], dtype=np.float32)
"""Ten points on a line: with L2 the neighbours of a place are those next to it."""


def dataset(rows: int = 10, metric: str = "L2") -> Dataset:
    vectors = LINE[:rows]
    return Dataset("line", vectors, LINE[:1], [{}] * rows, np.arange(rows, dtype=np.int32), metric)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        pytest.param([3, 1, 2], 50, 2, id="the middle one of three"),
        pytest.param([4, 1, 2, 3], 50, 2, id="half do not exceed it"),
        pytest.param(range(1, 101), 99, 99, id="the 99th of a hundred"),
        pytest.param(range(1, 1001), 99.9, 999, id="the 999th of a thousand"),
        pytest.param([7], 99, 7, id="one alone"),
        pytest.param([1, 100], 51, 100, id="no value is made up between two"),
    ],
)
def test_percentiles_are_values_that_were_measured(values: list[int], percent: float, expected: int) -> None:
    """Nearest rank: the smallest value that at least so many per cent do not exceed."""
    assert percentile(np.array(list(values), dtype=np.int64), percent) == expected


def test_no_values_have_no_percentile() -> None:
    """An empty measurement is not a fast one."""
    assert np.isnan(percentile(np.array([], dtype=np.int64), 50))


@pytest.mark.parametrize("metric", ["L2", "IP", "COSINE"])
@pytest.mark.parametrize("masked", [False, True])
def test_truth_is_what_sorting_everything_gives(metric: str, masked: bool) -> None:
    """Exact search equals a full sort, with and without a mask, also where fewer rows match than are asked for."""
    random = np.random.default_rng(3)
    vectors = random.standard_normal((150, 6)).astype(np.float32)
    queries = random.standard_normal((70, 6)).astype(np.float32)
    mask = random.random(150) < 0.05 if masked else None
    truth = exact(queries, vectors, 10, metric, mask)
    for i, query in enumerate(queries):
        distances = ((vectors - query) ** 2).sum(axis=1) if metric == "L2" else -(vectors @ query)
        chosen = np.flatnonzero(mask) if mask is not None else np.arange(150)
        expected = chosen[np.argsort(distances[chosen])][:10]
        assert truth.ids[i, : len(expected)].tolist() == expected.tolist()
        assert (truth.ids[i, len(expected) :] == -1).all()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param([0, 1, 2], 1.0, id="all"),
        pytest.param([2, 1, 0], 1.0, id="in any order"),
        pytest.param([0, 1], 2 / 3, id="one short"),
        pytest.param([0, 1, 9], 2 / 3, id="one wrong"),
        pytest.param([0, 0, 0], 1 / 3, id="a doubled hit counts once"),
        pytest.param([0, 1, 77], 2 / 3, id="an unknown row counts for nothing"),
        pytest.param([], 0.0, id="nothing"),
    ],
)
def test_recall_counts_distinct_true_neighbours(answer: list[int], expected: float) -> None:
    """Of the three rows nearest to the origin of the line."""
    truth = exact(LINE[:1], LINE, 3, "L2")
    assert recall([answer], truth, queries=LINE[:1], vectors=LINE, metric="L2") == pytest.approx(expected)


def test_equal_rows_cost_no_recall() -> None:
    """Any of the rows that lie equally near is as good as the one that the truth happens to name."""
    vectors = np.array([[0, 0], [1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    truth = exact(vectors[:1], vectors, 2, "L2")
    for other in (1, 2, 3):
        assert recall([[0, other]], truth, queries=vectors[:1], vectors=vectors, metric="L2") == 1.0


def test_recall_under_a_filter_is_over_the_rows_that_pass() -> None:
    """A hit that the filter forbids counts for nothing; where nothing passes, only an empty answer is right."""
    mask = np.arange(10) >= 5
    truth = exact(LINE[:1], LINE, 2, "L2", mask)

    def share(answer: list[int], passing: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
        best = exact(LINE[:1], LINE, 2, "L2", passing)
        return recall([answer], best, queries=LINE[:1], vectors=LINE, metric="L2", mask=passing)

    assert truth.ids.tolist() == [[5, 6]]
    assert share([5, 6], mask) == 1.0
    assert share([0, 5], mask) == 0.5
    nothing = np.zeros(10, dtype=bool)
    assert share([], nothing) == 1.0
    assert share([1], nothing) == 0.0


@pytest.mark.parametrize(
    ("ids", "shown", "wrong", "share"),
    [
        pytest.param([0, 1, 2], [0, 1, 4], 0, 1.0, id="exactly the acknowledged rows"),
        pytest.param([0, 1, 4], [0, 1, 16], 0, 2 / 3, id="a row under way may be shown, but not for a nearer one"),
        pytest.param([0, 1, 7], [0, 1, 49], 1, 2 / 3, id="a row that was not sent yet"),
        pytest.param([0, 1], [0, 1], 1, 2 / 3, id="fewer rows than there are"),
        pytest.param([0, 1, 1], [0, 1, 1], 1, 2 / 3, id="a row twice"),
        pytest.param([0, 1, 2], [0, 1, 5], 1, 1.0, id="a wrong score"),
    ],
)
def test_reads_beside_writes_are_judged_by_the_clock(
    ids: list[int], shown: list[float], wrong: int, share: float
) -> None:
    """Rows 0..3 were acknowledged before the search, 4 and 5 are under way, 6 and 7 are sent after its reply."""
    inserts = _replies([0, 1, 2, 3], sent=[0, 10, 90, 300], done=[50, 60, 400, 400])
    body = orjson.dumps(
        {"code": 0, "data": [{"id": i, "distance": score} for i, score in zip(ids, shown, strict=True)]}
    )
    searches = _replies([0], sent=[100], done=[200], bodies=[body])
    found = freshness.judge(searches, inserts, dataset(8), queries=1, batch_rows=2, codec=Codec.JSON, k=3)
    assert found.wrong == wrong
    assert found.recall == pytest.approx(share)


def test_a_refused_search_is_a_wrong_one() -> None:
    """An error in place of an answer counts against the node."""
    inserts = _replies([0], sent=[0], done=[10])
    searches = _replies([0], sent=[20], done=[30], bodies=[b'{"code":2,"message":"not now"}'])
    found = freshness.judge(searches, inserts, dataset(2), queries=1, batch_rows=2, codec=Codec.JSON, k=3)
    assert (found.wrong, found.searches) == (1, 1)


def test_frames_and_heads(tmp_path: Path) -> None:
    """Frames come back as written; the length of a reply is found whatever the letters, and never guessed."""
    with open(tmp_path / "frames", "wb") as file:
        write_frames(file, [b"one", b"", b"three"])
    assert [bytes(frame) for frame in read_frames(memoryview((tmp_path / "frames").read_bytes()))] == [
        b"one",
        b"",
        b"three",
    ]
    assert content_length(b"HTTP/1.1 200 OK\r\nX: 1\r\ncontent-LENGTH:  42") == 42
    with pytest.raises(ValueError, match="without Content-Length"):
        content_length(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked")


def test_a_sample_is_drawn_from_the_seed(tmp_path: Path) -> None:
    """The same seed gives the same rows; queries that are held out are not among them; COSINE rows have length 1."""
    np.save(tmp_path / "base.npy", np.random.default_rng(0).standard_normal((200, 5)).astype(np.float16))

    def load(seed: int) -> Dataset:
        path = str(tmp_path / "base.npy")
        return load_dataset(path, queries_path=None, rows=100, queries=50, seed=seed, metric="COSINE")

    one, again, other = load(1), load(1), load(2)
    assert np.array_equal(one.vectors, again.vectors) and not np.array_equal(one.vectors, other.vectors)
    assert len(one.queries) == 20 and one.rows == 100
    assert not any((one.vectors == query).all(axis=1).any() for query in one.queries)
    assert np.allclose(np.linalg.norm(one.vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        pytest.param(Goal("", "s", "n", "c", at_least=2), Verdict.PASS, id="reached"),
        pytest.param(Goal("", "s", "n", "c", at_least=2.1), Verdict.FAIL, id="missed"),
        pytest.param(Goal("", "s", "n", "c", at_most=2), Verdict.PASS, id="just within"),
        pytest.param(Goal("", "s", "n", "c", at_most=0), Verdict.FAIL, id="zero is a bound"),
        pytest.param(Goal("", "s", "n", "c", at_least=9, orientation=True), Verdict.BELOW, id="orientation"),
        pytest.param(Goal("", "s", "n", "other", at_least=1), Verdict.UNMEASURED, id="not measured"),
    ],
)
def test_goals_are_judged(goal: Goal, verdict: Verdict) -> None:
    """A bound holds or does not; what was not measured is not passed."""
    results = Results()
    results.add("s", "n", c=2.0)
    assert goal.judge(results)[1] == verdict


def test_numbers_have_the_digits_they_deserve() -> None:
    """Tables are read by people."""
    assert [number(x) for x in (None, 0.12345, 1.2345, 123.46, 1234.4, 3.0)] == [
        "",
        "0.123",
        "1.23",
        "123.5",
        "1,234",
        "3",
    ]


def test_a_run_as_json_is_plain() -> None:
    """Not-a-number becomes null, so that every reader of JSON can read it."""
    results = Results()
    results.add("search", "x", per_s=float("nan"), p50_ms=1.5)
    run = as_json(results, seed=3, command=["c"], machine={"cores": 2}, data={"rows": 1})
    assert run["results"] == [{"scenario": "search", "name": "x", "queries/s": None, "p50 ms": 1.5}]
    assert len(run["goals"]) == len(GOALS)
    assert json.loads(json.dumps(run, allow_nan=False))["seed"] == 3


@pytest.fixture
def dumb(tmp_path: Path) -> Iterator[NodeProcess]:
    """A dumb node that serves one small collection."""
    node = NodeProcess(str(tmp_path / "data"), free_address(), log_path=str(tmp_path / "node.log"), module=DUMB)
    with node:
        node.start()
        node.client.call("/collections/create", collectionName="c", schema=schema_body(dataset()))
        yield node


@pytest.mark.parametrize("form", list(Form))
def test_every_request_is_sent_once(dumb: NodeProcess, form: Form) -> None:
    """Without a cycle the load sends each request once over all connections, and keeps what came back."""
    requests = list(insert_requests(dumb.address, "c", dataset(), form, batch_rows=3))
    replies = run_load(dumb.address, requests, connections=2)
    assert sorted(replies.numbers.tolist()) == [0, 1, 2, 3]
    assert replies.failures == 0
    assert sorted(form.codec.loads(body)["data"]["insertCount"] for body in replies.bodies) == [1, 3, 3, 3]
    assert (replies.sent_ns <= replies.done_ns).all()
    counted = dumb.client.call("/entities/query", collectionName="c", outputFields=["count(*)"])
    assert counted == [{"count(*)": 10}]


@pytest.mark.parametrize("codec", list(Codec))
def test_a_load_goes_round_until_it_is_stopped(dumb: NodeProcess, codec: Codec) -> None:
    """At a fixed rate requests are taken in turn, latency counts from when one was due; a stop ends it cleanly."""
    run_load(dumb.address, insert_requests(dumb.address, "c", dataset(), Form.JSON), connections=1)
    requests = search_requests(dumb.address, "c", LINE[:3], codec, k=2)
    with Load(dumb.address, requests, connections=2, rate=100, cycle=True, seconds=0.5) as load:
        replies = load.replies()
    assert len(replies) >= 10 and set(replies.numbers.tolist()) == {0, 1, 2}
    assert (replies.due_ns <= replies.sent_ns).all()
    assert all(len(search_hits(body, codec)[0]) == 2 for body in replies.bodies)
    with Load(dumb.address, requests, connections=2, cycle=True) as endless:
        stopped = endless.stop()
    assert stopped.failures == 0


def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    """Every scenario runs on 500 rows, finds what is there, and leaves a table and a file."""
    random = np.random.default_rng(1)
    np.save(tmp_path / "base.npy", random.standard_normal((700, 16)).astype(np.float32))
    out = tmp_path / "run.bench.json"
    options = ["--data", str(tmp_path / "base.npy"), "--rows", "500", "--restart-rows", "600", "--seconds", "0.2"]
    options += [
        "--query-count",
        "40",
        "--efs",
        "64",
        "--search-rate",
        "30",
        "--settle",
        "0",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(main, options, catch_exceptions=False, env={**os.environ, "COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "goals" in done.output
    run = json.loads(out.read_text())
    by_name = {(row["scenario"], row["name"]): row for row in run["results"]}
    assert by_name["insert", "json"]["missing rows"] == 0
    assert by_name["mixed", "json"]["wrong"] == 0
    assert by_name["search", "json, 8 connections, ef 64"]["recall@10"] > 0.9
    assert all(row["recall@10"] > 0.9 for row in run["results"] if row["scenario"] == "filter")
    assert by_name["restart", "SIGKILL"]["rows"] == 600
    assert by_name["size", "memory"]["mb"] > 1


def _replies(numbers: list[int], *, sent: list[int], done: list[int], bodies: list[bytes] | None = None) -> Replies:
    sent_ns, done_ns = np.array(sent, dtype=np.int64), np.array(done, dtype=np.int64)
    statuses = np.full(len(numbers), 200, dtype=np.int64)
    return Replies(np.array(numbers, dtype=np.int64), sent_ns, sent_ns, done_ns, statuses, bodies or [b""] * len(sent))


def test_cpu_time_is_that_of_all_threads_of_all_processes() -> None:
    """The time that this process has used is counted, and never less later; twice the process is twice the time."""
    before_s = cpu_s([os.getpid()])
    assert 0 < before_s <= cpu_s([os.getpid()])
    assert cpu_s([os.getpid(), os.getpid()]) >= 2 * before_s
    assert cpu_s([]) == 0
