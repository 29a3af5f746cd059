"""Nodes as processes on this machine: started detached, found again by pid files, stopped; standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple, Sequence  # noqa: UP035

from tools.environment import PROJECT, Failure, tail

READY_S_MAX = 60.0
STOP_S_MAX = 60.0
"""How long a node may take to drain and checkpoint before it is killed."""


_children: list[subprocess.Popen[bytes]] = []
"""What this process started. Kept because a Popen that is collected complains of its running child, and a child that
has ended must be waited for, else it stays as a zombie."""


class Node(NamedTuple):
    """A node started by `up` or `demo`, as written in its pid file."""

    name: str
    client_address: str
    pid: int
    data_directory: str
    started: str
    """When the kernel says that the process began: a pid alone may belong to another by now."""
    log_bytes: int
    """How long the log was when the node was started: what comes after is this run's."""

    def is_alive(self) -> bool:
        return bool(self.started) and _started(self.pid) == self.started

    def is_ready(self) -> bool:
        return http_status(self.client_address, "/readyz") == 200


def pid_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.node.json"), key=lambda path: (len(path.name), path.name))


def read_nodes(directory: Path) -> list[Node]:
    """Return the nodes whose pid files are in the directory, dead or alive, in order of their names."""
    nodes = []
    for path in pid_files(directory):
        try:
            nodes.append(Node(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            raise Failure(f"{path} is damaged; if no node of it runs, remove it") from None
    return nodes


def start_node(python: Path, directory: Path, *, name: str, address: str) -> tuple[Node, subprocess.Popen[bytes]]:
    """Start one node, detached, its output in DIR/NAME.log; returns at once, ready or not."""
    require_free(address)
    data = directory / name
    data.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "node", "serve", "--data", str(data), "--listen", address, "--name", name]
    with open(str(directory / f"{name}.log"), "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=str(PROJECT),
            start_new_session=True,  # Ctrl-C is for us; the node is told to stop by SIGTERM
        )
        log_bytes = output.tell()
    _children.append(process)
    node = Node(name, address, process.pid, str(data), _started(process.pid), log_bytes)
    path = directory / f"{name}.node.json"
    unfinished = directory / f"{name}.node.json.new"
    unfinished.write_text(json.dumps(node._asdict()), encoding="utf-8")
    unfinished.replace(path)
    return node, process


def wait_ready(node: Node, directory: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    """Return when the node answers /readyz with 200. Raises Failure, with the end of its log, if it dies or hangs."""
    until_s = time.monotonic() + READY_S_MAX
    while not node.is_ready():
        if process.poll() is not None if process else not node.is_alive():
            raise Failure(f"node {node.name} stopped while starting. {log_end(node, directory)}")
        if time.monotonic() > until_s:
            raise Failure(f"node {node.name} is not ready after {READY_S_MAX:.0f} s. {log_end(node, directory)}")
        time.sleep(0.05)


def stop_node(node: Node, directory: Path) -> bool:
    """Stop the node, wait until it is gone, and forget its pid file; returns False if it had to be killed."""
    _signal(node, signal.SIGTERM)
    gentle = _gone(node, wait_s=STOP_S_MAX)
    if not gentle:
        _signal(node, signal.SIGKILL)
        _gone(node, wait_s=STOP_S_MAX)
    path = directory / f"{node.name}.node.json"
    if path.exists():
        path.unlink()
    return gentle


def require_free(address: str) -> None:
    """Raise Failure if something listens on the address already."""
    host, _, port = address.rpartition(":")
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise Failure(f"cannot listen on {address}: {error.strerror}. Choose another port.") from None


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_status(address: str, path: str) -> int | None:
    """Return the status of a GET, or None if nobody answers."""
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def log_end(node: Node, directory: Path) -> str:
    """Return where the node's log is and how it ends, as far as this run wrote it."""
    log = directory / f"{node.name}.log"
    with open(str(log), "rb") as file:
        file.seek(max(node.log_bytes, log.stat().st_size - 65_536))
        said = file.read().decode(errors="replace")
    return f"The end of {log}:\n{tail(said)}"


def _signal(node: Node, number: int) -> None:
    if node.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, number)


def _gone(node: Node, *, wait_s: float) -> bool:
    until_s = time.monotonic() + wait_s
    while node.is_alive():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


def _started(pid: int) -> str:
    """Return when the process began, as text that no later process of the same pid shares; "" if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        # While a zombie has threads left, they still hold its port and its data directory.
        if fields[0] == b"Z" and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return ""
        return fields[19].decode()
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return found.stdout.decode().strip()


def state_of(node: Node) -> str:
    return "stopped" if not node.is_alive() else "ready" if node.is_ready() else "starting"


def show(nodes: Sequence[Node], *, as_json: bool, states: dict[str, str] | None = None) -> None:
    """Print the nodes on standard output, as a table or as a JSON list."""
    rows: list[dict[str, Any]] = [
        {
            "name": node.name,
            "client_address": node.client_address,
            "pid": node.pid,
            "data_directory": node.data_directory,
            **({"state": states[node.name]} if states else {}),
        }
        for node in nodes
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = list(rows[0]) if rows else []
    widths = {column: max(len(column), *(len(str(row[column])) for row in rows)) for column in columns}
    for row in [{column: column.replace("_", " ") for column in columns}, *rows]:
        print("  ".join(f"{row[column]!s:<{widths[column]}}" for column in columns).rstrip())
