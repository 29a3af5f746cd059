"""Nodes that come and go in real processes: who is let in, who is not and why, and what becomes of rows meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.process.clusters import QUICK, Trio, keys_of, put
from tests.process.running import PROJECT, Running, clean_environment, free_port, refused, until

NODES = "/v2/annulus/nodes/"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with Trio(tmp_path_factory.mktemp("join"), settings={"shards": "4"}) as cluster:
        yield cluster


def joining(trio: Trio, **changed: str) -> dict[str, str]:
    """Return the settings of a node that joins."""
    settings = {
        "name": "n4",
        "peer_listen": f"127.0.0.1:{free_port()}",
        "join": f"127.0.0.1:{trio['n2'].port}",
        "cluster_secret_file": str(trio.secret),
    }
    return {key: value for key, value in (settings | changed).items() if value}


def command(*words: str) -> tuple[int, str]:
    """Return (exit status, output) of `annulus node ...`."""
    done = subprocess.run(
        [sys.executable, "-m", "node", "node", *words],
        cwd=PROJECT,
        env={**clean_environment(), "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return done.returncode, done.stdout.decode()


def listed(node: Running) -> Any:
    status, output = command("list", "--json", "--address", f"127.0.0.1:{node.port}")
    assert status == 0, output
    return json.loads(output)


def shards(node: Running) -> dict[str, int]:
    return {one["name"]: one["shards"] for one in listed(node)["nodes"]}


def test_who_may_not_join_is_told_why(trio: Trio, tmp_path: Path) -> None:
    """Each mistake ends with one sentence that says what to do, and the cluster is as it was."""
    with Running(tmp_path / "alone") as alone:
        cases = [
            ({"cluster_secret_file": "", "cluster_secret": "quite another one"}, "cluster_secret must be the same"),
            ({"cluster_secret_file": ""}, "cluster_secret must be the same"),
            ({"name": "n1"}, "there is a node n1 in the cluster already"),
            ({"name": "n2"}, "the node there is n2 too"),
            ({"replaces": "n9"}, "cannot replace n9"),
            ({"peer_listen": f"127.0.0.1:{trio['n3'].port}"}, "cannot be used"),
            ({"join": f"127.0.0.1:{alone.port}"}, "is alone: it was started without peers"),
            ({"join": f"127.0.0.1:{trio.peer_ports['n1']}"}, "cannot join by"),
            ({"join": f"127.0.0.1:{free_port()}"}, "no node answers there"),
            ({"join": ""}, "is new: say by which node"),
        ]

        def ask(number: int) -> tuple[int, str]:
            settings = {**QUICK, **joining(trio, **cases[number][0])}
            return refused(tmp_path / f"new{number}", free_port(), settings)

        with ThreadPoolExecutor(5) as asking:  # most of it is waiting
            answers = list(asking.map(ask, range(len(cases))))
        for (changed, why), (status, said) in zip(cases, answers, strict=True):
            assert status == 1 and why in said, (changed, said)
            assert trio.secret.read_text() not in said
    assert set(shards(trio["n1"])) == {"n1", "n2", "n3"}


def test_a_node_joins_and_leaves_again(trio: Trio, tmp_path: Path) -> None:
    """It takes its share while rows are written, starts again without --join, and gives all back when drained."""
    first, address = trio["n1"], f"127.0.0.1:{trio['n1'].port}"
    first.ask("/collections/create", collectionName="kept", dimension=2, params={"shardsNum": 4})
    put(first, "kept", range(100))
    with Running(tmp_path / "n4", settings={**QUICK, **joining(trio, zone="attic")}) as fourth:
        put(fourth, "kept", range(100, 200))
        until(lambda: shards(first) == dict.fromkeys(("n1", "n2", "n3", "n4"), 3), what="even shares")
        assert keys_of(fourth, "kept") == set(range(200))
        mine = next(one for one in listed(fourth)["nodes"] if one["name"] == "n4")
        assert (mine["zone"], mine["client"], mine["state"]) == ("attic", f"127.0.0.1:{fourth.port}", "active")
        del fourth.settings["join"]
        fourth.restart()
        assert keys_of(fourth, "kept") == set(range(200))
        # What leaves too few nodes, or is nobody's name, is refused.
        assert command("remove", "n4", "--address", address)[0] == 1
        status, said = command("drain", "n9", "--address", address)
        assert status == 1 and "there is no node n9; nodes: n1, n2, n3, n4" in said
        assert command("pause-moves", "--address", address)[0] == 0
        assert command("drain", "n4", "--address", address)[0] == 0
        status, said = command("drain", "n1", "--address", address)
        assert status == 1 and "join another node first" in said
        status, said = command("list", "--address", address)
        assert "moves are paused" in said and "draining" in said
        assert command("resume-moves", "--address", address)[0] == 0
        put(fourth, "kept", range(200, 300))
        status, said = command("drain", "n4", "--wait", "--address", address)
        assert status == 0 and "holds nothing any more" in said
        until(lambda: command("remove", "n4", "--address", address)[0] == 0, what="removed")
        fourth.stop()
    assert shards(first) == dict.fromkeys(("n1", "n2", "n3"), 4)
    assert keys_of(trio["n3"], "kept") == set(range(300))


def test_a_dead_node_is_replaced_by_one_command(trio: Trio, tmp_path: Path) -> None:
    """A blank node takes the place of one that is gone for good, and the cluster forgets that one."""
    first = trio["n1"]
    before = keys_of(first, "kept")
    trio["n3"].kill()
    with Running(tmp_path / "n5", settings={**QUICK, **joining(trio, name="n5", replaces="n3")}) as fifth:
        until(lambda: shards(first) == {"n1": 4, "n2": 4, "n5": 4}, seconds=60, what="whole again")
        assert keys_of(fifth, "kept") == before
        status, said = command("list", "--address", f"127.0.0.1:{fifth.port}")
        assert status == 0 and "n3" not in said
