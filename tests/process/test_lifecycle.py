"""A node's life as a process: stops, kills, restarts, and who else may use its directory, its port and its name."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.process.running import Running, free_port, refused, until

DIM = 16


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("life") / "n1", settings={"api.drain_s_max": "2"}) as running:
        running.ask("/collections/create", collectionName="kept", dimension=2)
        running.ask("/entities/insert", collectionName="kept", data=[{"id": 7, "vector": [1, 0]}])
        yield running


def rows(first: int, count: int, random: Random) -> list[dict[str, Any]]:
    return [
        {"id": key, "vector": [random.random() for _ in range(DIM)], "word": f"w{key}"}
        for key in range(first, first + count)
    ]


def test_a_second_process_is_refused(node: Running) -> None:
    """Another process on the same directory exits with 1 and says why; the first one serves on, and keeps its data."""
    status, said = refused(node.data, free_port())
    assert status == 1
    assert "cannot serve: the data directory is in use" in said and str(node.data) in said
    assert "Traceback" not in said
    node.ask("/entities/insert", collectionName="kept", data=[{"id": 8, "vector": [1, 0]}])
    assert node.count("kept") == 2


def test_a_port_in_use_is_said(node: Running, tmp_path: Path) -> None:
    """A node whose address is taken exits with 1 and names the address."""
    status, said = refused(tmp_path / "other", node.port)
    assert status == 1
    assert "cannot serve" in said and str(node.port) in said and "in use" in said
    assert "Traceback" not in said


def test_a_kill_straight_after_the_answer_loses_nothing(node: Running) -> None:
    """Killed as soon as the answer is in, the node has the row at the next start, and says that it replays."""
    node.ask("/entities/insert", collectionName="kept", data=[{"id": 9, "vector": [1, 0], "late": [1, {"a": None}]}])
    node.restart(kill=True)
    assert node.ask("/entities/get", collectionName="kept", id=9, outputFields=["late"]) == [
        {"id": 9, "late": [1, {"a": None}]}
    ]
    node.ask("/entities/delete", collectionName="kept", filter="id == 9")
    node.restart(kill=True)
    assert node.ask("/entities/get", collectionName="kept", id=9) == []


def test_a_stop_under_load_keeps_what_was_answered(node: Running) -> None:
    """SIGTERM, twice, while clients insert: exit 0, every answered row is there, and hardly anything is replayed."""
    node.ask("/collections/create", collectionName="load", dimension=2, params={"shardsNum": 4})
    answered: set[int] = set()

    def client(number: int) -> None:
        for key in range(number * 1_000_000, (number + 1) * 1_000_000):
            try:
                reply = node.call("/entities/insert", collectionName="load", data=[{"id": key, "vector": [1, 0]}])
            except (OSError, ValueError):
                return
            if reply["code"] != 0:
                return
            answered.add(key)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for one in clients:
        one.start()
    until(lambda: len(answered) > 200, what="inserts")
    node.signal()
    node.signal()
    node.signal(signal.SIGINT)
    assert node.process.wait(30) == 0, node.said()
    for one in clients:
        one.join()
    node.start()
    found = set()
    for number in range(4):
        low = number * 1_000_000
        page = node.ask(
            "/entities/query",
            collectionName="load",
            filter=f"{low} <= id < {low + 1_000_000}",
            limit=16_384,
            outputFields=["id"],
            consistencyLevel="Strong",
        )
        found |= {row["id"] for row in page}
    assert answered <= found
    assert len(found - answered) <= len(clients)  # what was under way may have been done
    for shard in node.status()["shards"]:
        # The new term's own entry, and what upkeep has done since; there were 50 inserts and more.
        assert shard["position"] - shard["checkpoint"] <= 8, shard


def test_a_stop_does_not_wait_for_idle_clients(node: Running) -> None:
    """Connections that send nothing, or half a request, hold a stop up for no longer than the drain time."""
    idle = [node.socket() for _ in range(3)]
    try:
        idle[1].sendall(b"POST /v2/vectordb/entities/insert HTTP/1.1\r\nHost: n\r\nContent-Le")
        idle[2].sendall(b"POST /v2/vectordb/entities/insert HTTP/1.1\r\nHost: n\r\nContent-Length: 900\r\n\r\n{")
        assert node.stop() == 0
    finally:
        for one in idle:
            one.close()
    node.start()


def test_another_name_is_refused(node: Running) -> None:
    """A directory belongs to the node that made it."""
    assert node.stop() == 0
    status, said = refused(node.data, free_port(), {"name": "other"})
    node.start()
    assert status == 1
    assert "belongs to node" in said and "--name" in said and "Traceback" not in said


def test_a_restart_uses_the_indexes_that_are_there(node: Running) -> None:
    """3,000 indexed rows: after a restart the answers are the same and no index was built again."""
    random = Random(5)
    node.ask("/collections/create", collectionName="words", dimension=DIM, metricType="L2")
    for first in range(0, 3_000, 1_000):
        node.ask("/entities/insert", collectionName="words", data=rows(first, 1_000, random))
    node.ask("/collections/flush", collectionName="words")
    until(lambda: node.index_finished("words"), what="index")
    queries = [[random.random() for _ in range(DIM)] for _ in range(20)]

    def answers() -> Any:
        return node.ask("/entities/search", collectionName="words", data=queries, limit=5, outputFields=["word"])

    before = answers()
    for kill in (False, True):
        node.restart(kill=kill)
        assert node.index_finished("words")
        assert answers() == before
        assert not [one for one in node.events() if "index built" in one["message"]]
        assert b"annulus_index_build_seconds_count" not in node.get("/metrics")[1]


def test_signals_while_starting(tmp_path: Path) -> None:
    """A node told to stop before it serves stops, and leaves a directory that the next one can use."""
    running = Running(tmp_path / "n1")
    for delay_s in (0.3, 0.6, 0.9):
        process = running.launch()
        try:
            process.wait(delay_s)
        except Exception:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM), running.said()
    with running:
        running.ask("/collections/list")


def test_only_the_address_asked_for(node: Running) -> None:
    """The node listens on the address that it was given and on no other."""
    assert node.get("/healthz")[0] == 200
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", node.port), timeout=2)


def test_sigterm_while_starting_stops_at_once(tmp_path: Path) -> None:
    """A node told to stop while it replays ends with status 0, and the next start has every row."""
    settings = {"storage.checkpoint_interval_s": "600", "storage.segment_idle_s_max": "600"}
    node = Running(tmp_path / "n1", settings=settings)
    with node:
        node.ask("/collections/create", collectionName="c", dimension=2)
        for number in range(40):
            data = [{"id": 1000 * number + i, "vector": [1.0, i]} for i in range(1000)]
            node.ask("/entities/insert", collectionName="c", data=data)
        node.kill()
        for message in ("journal opened", "leads group"):
            node.launch()
            until(lambda message=message: message in node.said(), what=message)  # type: ignore[misc]
            assert node.stop() == 0, node.said()
            assert "Traceback" not in node.said() and "critical" not in node.said()
        node.start()
        assert node.count("c") == 40_000
