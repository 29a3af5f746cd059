"""Nodes as processes on this machine: started detached, found again by pid files, stopped; standard library only.

A directory holds the nodes of one cluster. `cluster.json` says which they are and on which addresses; each has its data
in NAME/, its output in NAME.log, and while it runs a pid file NAME.node.json. Nodes prove themselves to each other with
the secret in `secret`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence  # noqa: UP035

from tools.environment import PROJECT, Failure, tail

READY_S_MAX = 60.0
STOP_S_MAX = 60.0
"""How long a node may take to drain and checkpoint before it is killed."""
PORTS = range(20_000, 32_000)
"""Where ports are chosen: below those that the kernel gives to outgoing connections, so that a port is still free when
the node that used it is started again."""

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


def start_node(
    python: Path,
    directory: Path,
    *,
    name: str,
    address: str,
    flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[Node, subprocess.Popen[bytes]]:
    """Start one node, detached, its output in DIR/NAME.log; returns at once, ready or not.

    flags        more of `annulus serve`
    prefix       goes in front of the command line
    environment  instead of this process's own
    """
    require_free(address)
    data = directory / name
    data.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "node", "serve", "--data", str(data), "--listen", address, "--name", name]
    with open(str(directory / f"{name}.log"), "ab") as output:
        process = subprocess.Popen(
            [*prefix, *command, *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=str(PROJECT),
            env=None if environment is None else dict(environment),
            start_new_session=True,  # Ctrl-C is for us; the node is told to stop by SIGTERM
        )
        log_bytes = output.tell()
    _children.append(process)
    node = Node(name, address, process.pid, str(data), _started(process.pid), log_bytes)
    _replace(directory / f"{name}.node.json", json.dumps(node._asdict()))
    return node, process


def wait_ready(
    node: Node, directory: Path, process: subprocess.Popen[bytes] | None = None, *, within_s: float = READY_S_MAX
) -> None:
    """Return when the node answers /readyz with 200. Raises Failure, with the end of its log, if it dies or hangs."""
    until_s = time.monotonic() + within_s
    while not node.is_ready():
        if process.poll() is not None if process else not node.is_alive():
            raise Failure(f"node {node.name} stopped while starting. {log_end(node, directory)}")
        if time.monotonic() > until_s:
            raise Failure(f"node {node.name} is not ready after {within_s:.0f} s. {log_end(node, directory)}")
        time.sleep(0.05)


def signal_node(node: Node, number: int) -> None:
    """Send the process a signal, if it is still that process."""
    if node.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, number)


def stop_node(node: Node, directory: Path) -> bool:
    """Stop the node, wait until it is gone, and forget its pid file; returns False if it had to be killed."""
    signal_node(node, signal.SIGTERM)
    gentle = _gone(node, wait_s=STOP_S_MAX)
    if not gentle:
        signal_node(node, signal.SIGKILL)
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


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that were free a moment ago, all different, the same again after a restart."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(Failure):
            require_free(f"127.0.0.1:{port}")
            found.append(port)
        if len(found) == count:
            return found
    raise Failure(f"no {count} free ports between {PORTS.start} and {PORTS.stop}")


def http_get(address: str, path: str) -> tuple[int, bytes] | None:
    """Return status and body of a GET, or None if nobody answers."""
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def http_status(address: str, path: str) -> int | None:
    """Return the status of a GET, or None if nobody answers."""
    answer = http_get(address, path)
    return None if answer is None else answer[0]


def node_status(address: str) -> dict[str, Any] | None:
    """Return what `annulus status --json` shows of a node, or None if it does not answer."""
    answer = http_get(address, "/status")
    try:
        found = None if answer is None or answer[0] != 200 else json.loads(answer[1].decode())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def log_end(node: Node, directory: Path) -> str:
    """Return where the node's log is and how it ends, as far as this run wrote it."""
    log = directory / f"{node.name}.log"
    with open(str(log), "rb") as file:
        file.seek(max(node.log_bytes, log.stat().st_size - 65_536))
        said = file.read().decode(errors="replace")
    return f"The end of {log}:\n{tail(said)}"


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


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


class Member(NamedTuple):
    """One node of a cluster, as written in `cluster.json`: it keeps name and addresses, running or not."""

    name: str
    client_address: str
    peer_address: str


class Cluster:
    """The nodes of one directory, started, killed, stopped one by one or together. A cluster of one has no peers.

    The helpers of a single node raise Failure with the end of its log when it does not do as told.
    """

    def __init__(
        self,
        python: Path,
        directory: Path,
        members: Sequence[Member],
        *,
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` are keys and values of `annulus config` for every node."""
        self.python = python
        self.directory = directory
        self.members = {member.name: member for member in members}
        self.founders = dict(self.members)
        """Those that form the cluster; others join it."""
        self.settings = dict(settings or {})
        self.environment = environment
        self.nodes: dict[str, Node] = {}
        self.ready_s_max = READY_S_MAX
        """How long nodes may take to become ready."""
        self.exit_statuses: dict[str, int] = {}
        """How processes that this one started and ended have ended last, by node."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.zones: dict[str, str] = {}
        """Node -> its zone, for those that have one."""
        self._entries: dict[str, list[str]] = {}
        """Node that joined -> the flags that say how."""

    @classmethod
    def make(
        cls,
        python: Path,
        directory: Path,
        *,
        nodes: int,
        base_port: int = 0,
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Cluster:
        """Return a new cluster, or that of the directory if it has as many nodes; the nodes that run are kept.

        base_port  the first node serves clients on it, the next on the port after; 0: on any free ones, or those that
                   it had before
        """
        directory.mkdir(parents=True, exist_ok=True)
        known = read_members(directory)
        if known and len(known) != nodes:
            raise Failure(
                f"{directory} holds a cluster of {len(known)}; its size cannot be changed in this version."
                f" Use --nodes {len(known)}, or another --dir"
            )
        running = {node.name for node in read_nodes(directory) if node.is_alive()}
        clients = range(base_port, base_port + nodes) if base_port else range(0)
        ports = [port for port in free_ports(3 * nodes) if port not in clients]
        old = {member.name: member for member in known}
        members = []
        for number in range(nodes):
            name = f"n{number + 1}"
            client, peer = f"127.0.0.1:{ports[2 * number]}", f"127.0.0.1:{ports[2 * number + 1]}"
            if name in old:
                # Peers of a running node must be where it looks for them.
                client, peer = old[name].client_address, old[name].peer_address if running else peer
            if base_port:
                client = f"127.0.0.1:{base_port + number}"
            members.append(Member(name, client, peer))
        cluster = cls(python, directory, members, settings=settings, environment=environment)
        cluster.nodes = {node.name: node for node in read_nodes(directory)}
        for member in members:
            node = cluster.nodes.get(member.name)
            if node is not None and node.is_alive() and node.client_address != member.client_address:
                raise Failure(f"{node.name} of {directory} runs on {node.client_address} already; stop it first (down)")
        if nodes > 1:
            cluster._make_secret()
        _replace(directory / "cluster.json", json.dumps([member._asdict() for member in members], indent=2) + "\n")
        return cluster

    # one node

    def start(self, name: str, *, peers: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Node:
        """Start a node without waiting until it is ready.

        peers   name -> address where nodes are looked for, this one too, for those that are not at their own
        prefix  goes in front of the command line
        """
        node, self._processes[name] = start_node(
            self.python,
            self.directory,
            name=name,
            address=self.members[name].client_address,
            flags=self.flags(name, peers or {}),
            prefix=prefix,
            environment=self.environment,
        )
        self.nodes[name] = node
        return node

    def flags(self, name: str, peers: Mapping[str, str]) -> list[str]:
        """Return the flags of `annulus serve` that a node gets beside those that every node has."""
        flags = [f"--{key.replace('.', '-').replace('_', '-')}={value}" for key, value in self.settings.items()]
        if len(self.founders) > 1:
            listed = ",".join(f"{one.name}={peers.get(one.name, one.peer_address)}" for one in self.founders.values())
            flags += self._entries.get(name) or ["--peers", listed]
            flags += ["--peer-listen", self.members[name].peer_address]
            flags += ["--peer-advertise", peers[name]] if name in peers else []
            flags += ["--cluster-secret-file", str(self.directory / "secret")]
            flags += ["--zone", self.zones[name]] if name in self.zones else []
        return flags

    def add(self, name: str, by: str, *, replaces: str = "") -> Member:
        """Know a new node from now on, which joins by another one when it is started. `cluster.json` stays as it is.

        replaces  the node whose shards it takes over
        """
        client, peer = (f"127.0.0.1:{port}" for port in free_ports(2))
        entry = ["--join", self.members[by].client_address]
        entry += ["--replaces", replaces] if replaces else []
        self.members[name], self._entries[name] = Member(name, client, peer), entry
        return self.members[name]

    def forget(self, name: str) -> None:
        """Know a node no longer: it is down, and for good."""
        self.nodes.pop(name, None)
        del self.members[name]
        (self.directory / f"{name}.node.json").unlink(missing_ok=True)

    def kill(self, name: str) -> None:
        """End the process as a power cut would, and wait until it is gone."""
        signal_node(self.nodes[name], signal.SIGKILL)
        if not _gone(self.nodes[name], wait_s=STOP_S_MAX):
            raise Failure(f"node {name} (pid {self.nodes[name].pid}) does not die")
        self._reap(name)

    def stop(self, name: str) -> bool:
        """Stop a node with SIGTERM and wait; returns False if it had to be killed."""
        gentle = stop_node(self.nodes[name], self.directory)
        self._reap(name)
        return gentle

    def signal(self, name: str, number: int) -> None:
        signal_node(self.nodes[name], number)

    def wait_ready(self, name: str) -> None:
        wait_ready(self.nodes[name], self.directory, self._processes.get(name), within_s=self.ready_s_max)

    def log_end(self, name: str) -> str:
        return log_end(self.nodes[name], self.directory)

    def is_alive(self, name: str) -> bool:
        return name in self.nodes and self.nodes[name].is_alive()

    # all nodes

    def start_all(self) -> None:
        """Start those that do not run and return when all are ready. If one fails, those that this started end."""
        started = []
        try:
            for name in self.members:
                if not self.is_alive(name):
                    self.start(name)
                    started.append(name)
            self.wait_all_ready()
        except (Failure, KeyboardInterrupt):
            for name in started:
                signal_node(self.nodes[name], signal.SIGTERM)
            for name in started:
                self.stop(name)
            raise

    def wait_all_ready(self) -> None:
        """Return when every node is ready. Raises Failure when one ends, or when the time for it is up."""
        until_s = time.monotonic() + self.ready_s_max
        waiting = list(self.members)
        while waiting:
            for name in list(waiting):
                if not self.nodes[name].is_alive():
                    raise Failure(f"node {name} stopped while starting. {self.log_end(name)}")
                if self.nodes[name].is_ready():
                    waiting.remove(name)
                elif time.monotonic() > until_s:
                    why = http_get(self.nodes[name].client_address, "/readyz")
                    reason = f" ({why[1].decode(errors='replace')})" if why else ""
                    raise Failure(
                        f"node {name} is not ready after {self.ready_s_max:.0f} s{reason}. {self.log_end(name)}"
                    )
            time.sleep(0.05)

    def stop_all(self) -> dict[str, bool]:
        """Stop all nodes at the same time; returns name -> whether it ended by itself."""
        for node in self.nodes.values():
            signal_node(node, signal.SIGTERM)
        return {name: self.stop(name) for name in list(self.nodes)}

    def leaders(self) -> dict[int, str | None]:
        """Return shard -> the node that leads it as far as the nodes that answer know, the latest term's word."""
        best: dict[int, tuple[int, str | None]] = {}
        for name, member in self.members.items():
            status = node_status(member.client_address) if self.is_alive(name) else None
            for one in status["shards"] if status else ():
                said = (int(one.get("term") or 0), one.get("leader") or None)
                if one["shard"] not in best or (said[0], said[1] is not None) > (
                    best[one["shard"]][0],
                    best[one["shard"]][1] is not None,
                ):
                    best[one["shard"]] = said
        return {shard: leader for shard, (_, leader) in sorted(best.items())}

    # inside

    def _make_secret(self) -> None:
        path = self.directory / "secret"
        if not path.exists():
            with open(os.open(str(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")

    def _reap(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            self.exit_statuses[name] = process.wait()


def read_members(directory: Path) -> list[Member]:
    """Return the nodes of the directory's cluster, running or not; none if it has no cluster yet."""
    path = directory / "cluster.json"
    if not path.exists():
        return []
    try:
        return [Member(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        raise Failure(f"{path} is damaged: it should list name, client_address and peer_address of each node") from None


def state_of(node: Node) -> str:
    return "stopped" if not node.is_alive() else "ready" if node.is_ready() else "starting"


def views(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Return what `up` and `status` print of each node; `leads` is how many shards it says it leads."""
    found = []
    for node in nodes:
        status = node_status(node.client_address) if node.is_alive() else None
        shards = status.get("shards", ()) if status else ()
        found.append(
            {
                "name": node.name,
                "client_address": node.client_address,
                "pid": node.pid,
                "data_directory": node.data_directory,
                "state": state_of(node),
                "leads": sum(1 for one in shards if one.get("leader") == node.name) if status else None,
            }
        )
    return found


def show(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print the nodes on standard output, as a table or as a JSON list."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = list(rows[0]) if rows else []
    texts = [{column: "" if row[column] is None else str(row[column]) for column in columns} for row in rows]
    widths = {column: max(len(column), *(len(row[column]) for row in texts)) for column in columns}
    for row in [{column: column.replace("_", " ") for column in columns}, *texts]:
        print("  ".join(f"{row[column]:<{widths[column]}}" for column in columns).rstrip())
