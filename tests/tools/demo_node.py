"""A stand-in for a node that knows just enough REST v2 for the demonstration; run as a program it takes serve's flags.

    python demo_node.py -m node serve --data DIR --listen HOST:PORT --name NAME

A file named `die` or `mute` in the data directory makes it stop at once, or never become ready.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cbor2
import numpy as np


class DemoNode(ThreadingHTTPServer):
    """Keeps one collection in memory; the first look at the index finds it half built."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.rows: list[dict[str, Any]] = []
        self.looks = 0
        self.ready = True
        self.calls: list[str] = []
        self.fail_with: str = ""

    def answer(self, route: str, body: dict[str, Any]) -> Any:
        self.calls.append(route)
        match route:
            case "/collections/has":
                return {"has": bool(self.rows)}
            case "/collections/drop":
                self.rows.clear()
            case "/entities/insert":
                self.rows.extend(body["data"])
                return {"insertCount": len(body["data"])}
            case "/indexes/describe":
                self.looks += 1
                done = len(self.rows) if self.looks > 1 else len(self.rows) // 2
                state = "Finished" if self.looks > 1 else "InProgress"
                return [{"indexState": state, "indexedRows": done, "pendingRows": len(self.rows) - done}]
            case "/entities/search":
                return self.search(body)
        return {}

    def search(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        rows = self.rows
        if found := re.fullmatch(r'category == "(.*)" and link_count >= (\d+)', body.get("filter", "")):
            rows = [row for row in rows if row["category"] == found[1] and row["link_count"] >= int(found[2])]
        scores = np.array([np.frombuffer(row["vector"], "<f4") for row in rows]) @ np.asarray(body["data"][0])
        best = np.argsort(-scores, kind="stable")[: body["limit"]]
        fields = ("id", *body["outputFields"])
        return [{**{name: rows[i][name] for name in fields}, "distance": float(scores[i])} for i in best]


class Handler(BaseHTTPRequestHandler):
    server: DemoNode
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(200 if self.server.ready else 503, b"{}")

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        is_cbor = self.headers["Content-Type"] == "application/cbor"
        body = cbor2.loads(text) if is_cbor else json.loads(text)
        if self.server.fail_with:
            answer: dict[str, Any] = {"code": 1100, "message": self.server.fail_with}
        else:
            answer = {"code": 0, "data": self.server.answer(self.path.removeprefix("/v2/vectordb"), body)}
        self.reply(200, cbor2.dumps(answer) if is_cbor else json.dumps(answer).encode())

    def reply(self, status: int, payload: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


@contextmanager
def demo_node() -> Iterator[tuple[DemoNode, str]]:
    """Yield a stand-in that serves from a thread, and its address."""
    server = DemoNode("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server, f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    flags = dict(zip(sys.argv[4::2], sys.argv[5::2], strict=False))
    print("demo node", flags["--name"], flush=True)
    if os.path.exists(os.path.join(flags["--data"], "die")):
        sys.exit("cannot live like this")
    host, _, port = flags["--listen"].rpartition(":")
    node = DemoNode(host, int(port))
    node.ready = not os.path.exists(os.path.join(flags["--data"], "mute"))
    node.serve_forever()
