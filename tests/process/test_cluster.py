"""Three processes are one database: any takes any request, any may die, and what was acknowledged stays."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.clusters import SECRET, Trio, keys_of, put, row
from tests.process.running import PROGRAM, PROJECT, Running, check, clean_environment, free_port, until
from tests.process.test_damage import flip, journal_files


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with Trio(tmp_path_factory.mktemp("trio")) as cluster:
        cluster["n1"].ask("/collections/create", collectionName="c", dimension=2, params={"shardsNum": 4})
        yield cluster


def everywhere(trio: Trio, keys: set[int], collection: str = "c") -> None:
    """Every node has these rows: asked through a barrier, and then from its own copy."""
    for node in trio:
        found = keys_of(node, collection)
        assert (keys - found, found - keys) == (set(), set())
        until(lambda node=node: keys_of(node, collection, "Eventually") == keys, what="its own copy")  # type: ignore[misc]


def test_any_node_takes_any_request(trio: Trio) -> None:
    """A collection made on one node is written through each and read through each; all see everything at once."""
    written: set[int] = set()
    for number, node in enumerate(trio):
        keys = set(range(100 * number, 100 * number + 50))
        put(node, "c", keys)
        written |= keys
        for other in trio:
            assert keys_of(other, "c") == written
    (one,) = trio["n3"].ask("/entities/get", collectionName="c", id=107, outputFields=["word"])
    assert one["word"] == "w107"
    hits = trio["n2"].ask("/entities/search", collectionName="c", data=[[1.0, 1.0]], limit=5, consistencyLevel="Strong")
    assert len(hits) == 5
    trio["n2"].ask("/entities/delete", collectionName="c", filter="id >= 0")
    everywhere(trio, set())


def test_status_shows_every_replica(trio: Trio) -> None:
    """Each node tells the same leaders, and for every shard where its three replicas are."""
    seen = [node.status()["cluster"] for node in trio]
    for cluster in seen:
        assert [one["state"] for one in cluster["nodes"]] == ["ready"] * 3
        assert [one["group"] for one in cluster["groups"]] == ["control", "s0", "s1", "s2", "s3"]
        for group in cluster["groups"]:
            assert group["leader"] in ("n1", "n2", "n3")
            states = sorted(one["state"] for one in group["replicas"])
            assert states == ["follower", "follower", "leader"]
    assert len({json.dumps([group["leader"] for group in cluster["groups"]]) for cluster in seen}) == 1
    status, said = told(trio["n2"])
    assert status == 0 and "control" in said and said.count("leader") == 5 and said.count("follower") == 10, said


def test_a_leader_killed_under_load(trio: Trio) -> None:
    """kill -9 of a shard's leader while clients write: writes go on, nothing answered is lost, nothing is doubled."""
    answered: set[int] = set()
    stop = threading.Event()
    failed: list[str] = []
    victim = trio.leader("s0")
    others = [node for name, node in trio.nodes.items() if name != victim]

    def client(number: int, node: Running) -> None:
        key = 10_000 * (number + 1)
        while not stop.is_set():
            try:
                reply = node.call("/entities/upsert", collectionName="c", data=[row(key)])
            except (OSError, ValueError, http.client.HTTPException) as error:
                failed.append(repr(error))
                return
            if reply["code"] == 0:
                answered.add(key)
            else:
                failed.append(reply["message"])
            key += 1
            time.sleep(0.01)  # a query shows 16,384 rows at most

    clients = [threading.Thread(target=client, args=(n, others[n % 2])) for n in range(4)]
    for one in clients:
        one.start()
    until(lambda: len(answered) > 100, what="writes")
    trio[victim].kill()
    before = len(answered)
    trio.wait_leader("s0", next(name for name in trio.nodes if name != victim), other_than=victim)
    until(lambda: len(answered) > before + 200, what="writes after the leader is gone")
    trio[victim].launch()
    trio.wait_ready(trio[victim])
    stop.set()
    for one in clients:
        one.join()
    assert failed == []
    everywhere(trio, answered)


def test_a_graceful_stop_of_every_node_in_turn(trio: Trio) -> None:
    """SIGTERM ends a node with status 0 while the others serve; after a round all rows are where they were."""
    keys = keys_of(trio["n1"], "c")
    for number, name in enumerate(trio.nodes):
        assert trio[name].stop() == 0, trio[name].said()
        other = next(node for node in trio if node is not trio[name])
        put(other, "c", [1_000_000 + number])
        keys.add(1_000_000 + number)
        trio.start([name])
    everywhere(trio, keys)


def test_all_killed_at_once(trio: Trio) -> None:
    """What was acknowledged is on the disks of a majority: all nodes killed, all rows are back."""
    keys = keys_of(trio["n1"], "c")
    put(trio["n2"], "c", [2_000_000])
    trio.kill()
    trio.start()
    everywhere(trio, keys | {2_000_000})


def test_a_peer_that_sends_garbage(trio: Trio) -> None:
    """Strangers at the port for nodes are refused, counted and logged once; clients notice nothing."""
    noise = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4_096, b"annulus\0" + b"\xff" * 300, os.urandom(100_000)]
    for junk in noise:
        with socket.create_connection(("127.0.0.1", trio.peer_ports["n2"]), timeout=5) as stranger:
            try:
                stranger.sendall(junk)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4_096):
                    pass
            except OSError:
                pass
    assert trio["n2"].is_alive()
    put(trio["n2"], "c", [3_000_000])
    assert 3_000_000 in keys_of(trio["n1"], "c")
    lines = [one for one in trio["n2"].events() if "stranger" in one["message"]]
    assert lines and len(lines) <= len(noise)
    assert not [one for one in trio["n2"].events() if one["level"] in ("error", "critical")]


def test_a_second_node_of_a_name(trio: Trio, tmp_path: Path) -> None:
    """Another process that calls itself n2 gets no session; the one that there is goes on."""
    other = Running(tmp_path / "n2", settings={**trio["n2"].settings, "peer_listen": f"127.0.0.1:{free_port()}"})
    other.launch()
    try:
        until(lambda: "is it started twice" in other.said() or not other.is_alive(), what="a refusal")
        assert not other.is_ready()
        put(trio["n2"], "c", [4_000_000])
        assert 4_000_000 in keys_of(trio["n3"], "c")
    finally:
        other.kill()


def test_two_nodes_on_one_port(trio: Trio, tmp_path: Path) -> None:
    """A node whose address for other nodes is taken exits with 1 and names it."""
    other = Running(tmp_path / "n2", settings=trio["n2"].settings)
    assert other.launch().wait(30) == 1
    assert f"127.0.0.1:{trio.peer_ports['n2']}" in other.said() and "another node or program has it" in other.said()
    assert "Traceback" not in other.said()


def test_other_data_is_refused(trio: Trio, tmp_path: Path) -> None:
    """A directory of another node: exit 1, and what to do instead. Another list of peers is one that is out of date."""
    assert trio["n3"].stop() == 0
    settings = {**trio["n3"].settings, "name": "n2", "peer_listen": f"127.0.0.1:{free_port()}"}
    other = Running(trio["n3"].data, settings=settings, log=tmp_path / "log")
    assert other.launch().wait(30) == 1, other.said()
    assert "belongs to node n3" in other.said() and "Traceback" not in other.said()
    settings = {**trio["n3"].settings, "peers": ",".join(trio.peers.split(",")[1:])}
    with Running(trio["n3"].data, settings=settings, log=tmp_path / "log") as old_list:
        assert old_list.is_ready()
        assert old_list.stop() == 0
    trio.start(["n3"])


def test_a_wrong_secret(trio: Trio, tmp_path: Path) -> None:
    """A node with another secret gets nowhere and says why; with the right one it is back."""
    assert trio["n3"].stop() == 0
    wrong = tmp_path / "secret"
    wrong.write_text(SECRET[::-1])
    wrong.chmod(0o600)
    other = Running(trio["n3"].data, settings={**trio["n3"].settings, "cluster_secret_file": str(wrong)})
    other.launch()
    try:
        until(lambda: "cluster_secret must be the same" in other.said(), what="a refusal")
        until(lambda: b"no leader" in _readyz(other), what="a node that is not ready")  # sessions come before the port
        assert other.get("/healthz")[0] == 200
        assert SECRET not in other.said() and SECRET[::-1] not in other.said()
    finally:
        other.kill()
    put(trio["n1"], "c", [5_000_000])
    trio.start(["n3"])
    assert 5_000_000 in keys_of(trio["n3"], "c")


def test_a_lost_disk(trio: Trio) -> None:
    """A node whose directory is gone comes back as one that forgot, and has every row of its own again."""
    keys = keys_of(trio["n1"], "c")
    trio["n2"].kill()
    shutil.rmtree(trio["n2"].data)
    put(trio["n1"], "c", [6_000_000])
    trio.start(["n2"])
    assert "found the cluster" in trio["n2"].said()
    everywhere(trio, keys | {6_000_000})


def test_a_damaged_journal(trio: Trio) -> None:
    """A bad record in the middle: the node refuses and says how; told to repair, it takes everything from its peers."""
    node = trio["n1"]
    keys = keys_of(node, "c")
    node.kill()
    flip(max(journal_files(node.data), key=lambda path: path.stat().st_size), 0.02)
    assert check(node.data)[0] == 1
    assert node.launch().wait(30) == 1
    assert "cannot serve" in node.said() and "--cluster-repair-from-peers" in node.said()
    put(trio["n2"], "c", [7_000_000])
    node.settings["cluster.repair_from_peers"] = "true"
    trio.start(["n1"])
    assert (node.data / "damaged-1" / "journal").is_dir()
    everywhere(trio, keys | {7_000_000})
    assert node.stop() == 0
    assert check(node.data)[0] == 0
    # A node without its journal knows no more how it voted than one with a damaged journal.
    shutil.rmtree(node.data / "journal")
    del node.settings["cluster.repair_from_peers"]
    assert node.launch().wait(30) == 1
    assert "is gone" in node.said() and not (node.data / "damaged-2").exists()
    node.settings["cluster.repair_from_peers"] = "true"
    trio.start(["n1"])
    everywhere(trio, keys | {7_000_000})


def test_without_a_majority(trio: Trio, tmp_path: Path) -> None:
    """A node alone lives, is not ready, and answers with an error that may be repeated. With a majority it serves.

    Its data is that of a cluster with the names and the secret of ours: a node of ours that is given it is refused.
    """
    with Trio(tmp_path / "other") as other:
        other["n1"].kill()
        shutil.rmtree(other["n1"].data)
        other["n3"].ask("/collections/create", collectionName="theirs", dimension=2)
        other["n2"].kill()
        until(lambda: b"no leader: control, s0, s1, s2, s3" in _readyz(other["n3"]), what="a lost majority")
        assert (other["n3"].get("/readyz")[0], other["n3"].get("/healthz")[0]) == (503, 200)
        status, said = told(other["n3"])
        assert status == 1 and "node n2 is unreachable" in said and "s3 has no leader" in said, said
        with other["n3"].socket() as client:
            body = b'{"collectionName": "late", "dimension": 2}'
            head = f"POST /v2/vectordb/collections/create HTTP/1.1\r\nHost: n\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            answer = client.recv(65_536)
        assert b"Retry-After: " in answer and b'"code":1,' in answer, answer
        assert other["n3"].stop() == 0, other["n3"].said()

        alone = other["n1"]
        alone.launch()
        until(lambda: b"waiting for n2, n3" in _readyz(alone), what="a node that waits for a majority")
        assert alone.get("/healthz")[0] == 200
        reply = alone.call("/collections/list")
        assert reply["code"] == 1 and "waiting for n2, n3" in reply["message"]
        assert alone.stop() == 0, alone.said()

    assert trio["n3"].stop() == 0
    ours = trio["n3"].data.rename(tmp_path / "ours")
    shutil.copytree(other["n3"].data, trio["n3"].data)
    trio["n3"].launch()
    until(lambda: "another cluster" in trio["n3"].said() + trio["n1"].said(), what="a refusal")
    assert not trio["n3"].is_ready()
    put(trio["n1"], "c", [8_000_000])
    trio["n3"].kill()
    shutil.rmtree(trio["n3"].data)
    ours.rename(trio["n3"].data)
    trio.start(["n3"])
    assert 8_000_000 in keys_of(trio["n3"], "c")


def told(node: Running) -> tuple[int, str]:
    """Return (exit status, output) of `annulus status` for a node."""
    command = [*PROGRAM, "status", "--address", f"127.0.0.1:{node.port}"]
    done = subprocess.run(command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    return done.returncode, " ".join(done.stdout.split())


def _readyz(node: Running) -> bytes:
    try:
        return node.get("/readyz")[1]
    except OSError:
        return b""
