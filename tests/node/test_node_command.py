"""`annulus node`: what it prints, and how it ends when a node refuses or none is there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from rich.console import Console

from node import node_command
from node.node_command import node, tables


def one(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "name": name, "state": "active", "isUp": True, "awaySeconds": 0.0, "peer": "h:1", "client": "h:2", "zone": "",
        "shards": 4, "coming": 0, "leads": 2, "entriesPerSecond": 0.0, "votes": True, "replaces": "",
    } | facts  # fmt: skip


def move(shard: int, source: str, **facts: Any) -> dict[str, Any]:
    return {
        "shard": shard, "from": [source, "n2"], "to": ["n2", "n4"], "seconds": 3.0, "bytesDone": 0, "bytesTotal": 0,
        "secondsLeft": None,
    } | facts  # fmt: skip


def found(*nodes: dict[str, Any], moves: tuple[dict[str, Any], ...] = (), paused: bool = False) -> dict[str, Any]:
    return {"nodes": list(nodes), "moves": list(moves), "movesPaused": paused, "copies": 3}


def shown(listed: dict[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        for table in tables(listed):
            console.print(table)
    return captured.get()


def test_a_list_shows_what_is_unusual() -> None:
    """Who is away, gone, draining or taking over, what is coming, and that nothing moves."""
    text = shown(
        found(
            one("n1", state="draining"),
            one("n2", isUp=False, awaySeconds=12.4),
            one("n3", state="gone", isUp=False, shards=0, votes=False),
            one("n4", replaces="n1", coming=2, zone="attic"),
            moves=(move(3, "n1", bytesDone=1 << 20, bytesTotal=4 << 20, secondsLeft=9.0), move(4, "n1")),
            paused=True,
        )
    )
    for part in ("draining", "active, away for 12 s", "gone", "replaces n1", "4 (+2)", "attic", "s3", "n1, n2"):
        assert part in text
    assert "1.0 MiB of 4.0 MiB" in text and "about 9 s" in text and "moves are paused" in text
    assert "on the move" not in shown(found(one("n1")))


class Script(BaseHTTPRequestHandler):
    """Answers with the replies of a list, and writes down what was asked."""

    replies: ClassVar[list[Any]] = []
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path.removeprefix("/v2/annulus/nodes/"), body))
        data = json.dumps(self.replies.pop(0)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(node_command, "LOOK_S", 0.0)
    Script.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Script) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


DONE = {"code": 0, "data": {}}


def say(address: str, words: str, *replies: Any) -> tuple[int, str]:
    Script.replies[:] = replies
    result = CliRunner().invoke(node, [*words.split(), "--address", address])
    assert not Script.replies, "everything was asked"
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        pytest.param(
            "drain n2", ("drain", {"nodeName": "n2", "undo": False, "force": False}), "being drained", id="drain"
        ),
        pytest.param(
            "drain n2 --undo", ("drain", {"nodeName": "n2", "undo": True, "force": False}), "stays", id="undo"
        ),
        pytest.param("drain n2 --force", ("drain", {"nodeName": "n2", "undo": False, "force": True}), "is", id="force"),
        pytest.param("remove n2", ("remove", {"nodeName": "n2"}), "is no node", id="remove"),
        pytest.param("replace a b", ("replace", {"nodeName": "a", "newNodeName": "b"}), "b takes over", id="replace"),
        pytest.param("pause-moves", ("pause_moves", {}), "no move begins", id="pause"),
        pytest.param("resume-moves", ("resume_moves", {}), "begin again", id="resume"),
    ],
)
def test_a_command_is_one_request(address: str, words: str, asked: tuple[str, Any], said: str) -> None:
    status, output = say(address, words, DONE)
    assert status == 0 and said in output and Script.asked == [asked]


def test_waiting_shows_how_far_it_is(address: str) -> None:
    """Each change is a line; it ends when nothing is left, and says what to do then."""
    busy = found(one("n1", shards=2), moves=(move(1, "n1", bytesDone=1, bytesTotal=2, secondsLeft=4.0),))
    left = [{"code": 0, "data": each} for each in (busy, busy, found(one("n1", shards=0)))]
    status, output = say(address, "drain n1 --wait", DONE, *left)
    assert status == 0
    assert output.splitlines() == [
        "2 shards left, 1 on the move, 1 B of 2 B copied, about 4 s for these",
        "node n1 holds nothing any more: `annulus node remove n1`, then stop it",
    ]
    heir = found(one("n1", shards=0), one("n4", replaces="n1"))
    status, output = say(address, "replace n1 n4 --wait", DONE, *({"code": 0, "data": one} for one in (heir, found())))
    assert status == 0 and output.splitlines()[-1] == "node n1 holds nothing any more, and is removed: stop it"


def test_refusals_and_silence_end_with_words(address: str) -> None:
    status, output = say(address, "remove n2", {"code": 2, "message": "node n2 holds 3 shards: drain it first"})
    assert status == 1 and "drain it first" in output
    status, output = say("127.0.0.1:1", "list")
    assert status == 1 and "no node answers on 127.0.0.1:1" in output
