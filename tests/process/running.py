"""A node in a process of its own, and a plain client of it: standard library only, one connection per request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
START_S_MAX = 60.0
STOP_S_MAX = 60.0
BASE_PATH = "/v2/vectordb"
PROGRAM = (sys.executable, "-m", "node")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """One node process on one data directory; `start` after `kill` or `stop` is a restart on the same data."""

    def __init__(
        self,
        data: Path,
        *,
        settings: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
        log: Path | None = None,
    ) -> None:
        """`settings` are keys and values of `annulus config`; `prefix` goes in front of the command line."""
        self.data = data
        self.settings = dict(settings or {})
        self.prefix = list(prefix)
        self.program = list(program)
        self.port = free_port()
        self.log = log or data.parent / f"{data.name}.log"
        self.log_offset = 0
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Running:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # the process

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting until it answers."""
        self.log_offset = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [*self.prefix, *command(self.data, self.port, self.settings, self.program)],
                cwd=PROJECT,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self.process

    def start(self) -> float:
        """Return how many seconds passed until the node was ready. Raises AssertionError with its log if it dies."""
        began_s = time.monotonic()
        self.launch()
        while not self.is_ready():
            assert self.process.poll() is None, f"exit {self.process.returncode} while starting\n{self.said()}"
            assert time.monotonic() - began_s < START_S_MAX, f"not ready\n{self.said()}"
            time.sleep(0.02)
        return time.monotonic() - began_s

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def kill(self) -> None:
        """End the process as a power cut would, and wait until it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S_MAX)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask the process to stop; return its exit status."""
        self.signal()
        return self.process.wait(STOP_S_MAX)

    def restart(self, *, kill: bool = False) -> float:
        """Return how long the node took to be ready again."""
        if kill:
            self.kill()
        else:
            status = self.stop()
            assert status == 0, f"exit {status}\n{self.said()}"
        return self.start()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """Return what this run of the process has written."""
        with open(self.log, "rb") as file:
            file.seek(self.log_offset)
            return file.read().decode(errors="replace")

    def rss_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_rss_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

    # requests

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def get(self, path: str) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def send(self, path: str, body: bytes | Iterator[bytes], **headers: str) -> tuple[int, bytes]:
        """Return (HTTP status, body) of a POST of these very bytes; an iterator is sent in chunks."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request("POST", BASE_PATH + path, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the whole reply, whatever its code."""
        reply: dict[str, Any] = json.loads(self.send(path, json.dumps(body).encode())[1])
        return reply

    def ask(self, path: str, **body: Any) -> Any:
        """Return the reply's data; any code but 0 fails the test."""
        reply = self.call(path, **body)
        assert reply["code"] == 0, f"{path}: {reply}"
        return reply.get("data")

    def count(self, collection: str, filter: str = "") -> int:
        """Return the number of rows, strongly consistent."""
        found = self.ask(
            "/entities/query",
            collectionName=collection,
            filter=filter,
            outputFields=["count(*)"],
            consistencyLevel="Strong",
        )
        return int(found[0]["count(*)"])

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.get("/metrics")[1].decode().splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{"))]
        assert values, f"no metric {name}"
        return sum(values)

    def status(self) -> Any:
        return json.loads(self.get("/status")[1])

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of the log that this run has written."""
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    def index_finished(self, collection: str, index: str = "vector") -> bool:
        (found,) = self.ask("/indexes/describe", collectionName=collection, indexName=index)
        return bool(found["indexState"] == "Finished" and found["pendingRows"] == 0)


def command(data: Path, port: int, settings: Mapping[str, str], program: Sequence[str] = PROGRAM) -> list[str]:
    flags = [f"--{key.replace('.', '-').replace('_', '-')}={value}" for key, value in settings.items()]
    return [*program, "serve", "--data", str(data), "--listen", f"127.0.0.1:{port}", *flags]


def check(data: Path, prefix: Sequence[str] = ()) -> tuple[int, str]:
    """Return (exit status, output) of the offline check of a data directory."""
    done = subprocess.run(
        [*prefix, *PROGRAM, "check", str(data)],
        cwd=PROJECT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return done.returncode, done.stdout.decode()


def refused(data: Path, port: int, settings: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Return (exit status, output) of a node that is expected not to start. Raises TimeoutExpired if it does."""
    done = subprocess.run(
        command(data, port, settings or {}),
        cwd=PROJECT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=START_S_MAX,
    )
    return done.returncode, done.stdout.decode()


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("ANNULUS_")}


def until(wanted: Callable[[], bool], *, seconds: float = 30.0, what: str = "") -> None:
    """Return when `wanted()` is true; fail after so many seconds."""
    end_s = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < end_s, f"not so after {seconds} s: {what}"
        time.sleep(0.05)
