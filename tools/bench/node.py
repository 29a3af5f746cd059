"""The process under test: started on a data directory, stopped or killed, weighed."""

from __future__ import annotations

import compileall
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType

from tools.bench.client import Client, wait_until
from tools.bench.loading import REPOSITORY
from tools.bench.wire import Address

ROOMS = ("node", "cluster", "storage", "index")
READY_S_MAX = 120
DRAIN_S_MAX = 60


class NodeDied(Exception):
    """The node ended when it should have served; the message ends with its last words."""


class NodeProcess:
    """`python -m node serve` on one data directory; its output is appended to `log_path`."""

    def __init__(
        self,
        data_dir: str,
        address: Address,
        *,
        log_path: str,
        environment: Mapping[str, str] | None = None,
        module: str = "node",
    ) -> None:
        self.data_dir = data_dir
        self.address = address
        self.client = Client(address)
        self._log_path = log_path
        self._module = module
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        for room in ROOMS:  # what is installed has its bytecode: without it a start takes a second and 45 MB more
            compileall.compile_dir(os.path.join(REPOSITORY, room), quiet=2)

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start the process without waiting for it to serve."""
        assert not self.running, "already running"
        command = [sys.executable, "-m", self._module, "serve", "--data", self.data_dir, "--listen", str(self.address)]
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY, env=self._environment
            )

    def wait_ready(self, timeout_s: float = READY_S_MAX) -> None:
        """Return when the node serves. Raises NodeDied if it ends instead, TimeoutError if it does neither."""
        wait_until(self._ready, timeout_s=timeout_s, what="node ready")

    def start(self) -> None:
        """Start the process and return when it serves."""
        self.spawn()
        self.wait_ready()

    def kill(self) -> None:
        """End the process with SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM and return at once."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGTERM)

    def wait_ended(self, timeout_s: float = DRAIN_S_MAX) -> int:
        """Return the exit code. Raises TimeoutError if the process goes on."""
        assert self._process is not None, "not started"
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"node still runs {timeout_s:g} s after SIGTERM") from None

    def stop(self) -> int:
        """Stop the process as an operator would and return its exit code."""
        self.terminate()
        return self.wait_ended()

    def memory_bytes(self) -> dict[str, int]:
        """Return resident memory: `rss`, and of it `anonymous` (the rest are pages of files)."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            sizes = {name: value.split() for name, _, value in (line.partition(":") for line in file)}
        return {"rss": int(sizes["VmRSS"][0]) * 1024, "anonymous": int(sizes["RssAnon"][0]) * 1024}

    def disk_bytes(self) -> int:
        """Return the space that the data directory takes on its disk."""
        return disk_bytes(self.data_dir)

    def disk_parts(self) -> dict[str, int]:
        """Return the same by the data directory's folders."""
        with os.scandir(self.data_dir) as entries:
            return {entry.name: disk_bytes(entry.path) for entry in entries if entry.is_dir()}

    def last_words(self, lines: int = 15) -> str:
        """Return the end of the log."""
        with open(self._log_path, encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[-lines:])

    def _ready(self) -> bool:
        if not self.running:
            code = self._process.returncode if self._process else None
            raise NodeDied(f"node ended with {code} at start:\n{self.last_words()}")
        return self.client.ready()


def disk_bytes(folder: str) -> int:
    """Return the bytes that a folder takes on its disk, whole blocks counted; files that vanish meanwhile do not."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def free_address(host: str = "127.0.0.1") -> Address:
    """Return an address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return Address(host, int(probe.getsockname()[1]))
