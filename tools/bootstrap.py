"""python3 tools/bootstrap.py: from a clean clone to a running node, with nothing but Python and its standard library.

Makes the project's own environment in .venv, then runs what was asked in it. This file and the two of ours that it
imports are readable by any Python 3.7+.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Sequence  # noqa: UP035

if not __package__:  # run as a script: its own directory is in front of the path, the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.environment import PROJECT, Failure, make_environment, say
from tools.nodes import (
    STOP_S_MAX,
    Cluster,
    free_port,
    log_end,
    read_members,
    read_nodes,
    require_free,
    show,
    signal_node,
    start_node,
    stop_node,
    views,
    wait_ready,
)

BASE_PORT = 19530
"""Milvus's port."""
CHECKS = (
    ("tools.check", "--all"),
    ("tools.sim", "--minutes", "2", "--commit"),
    ("tools.crash", "--rounds", "5"),
    ("tools.chaos", "--minutes", "0.5", "--seed", "1"),
)
"""Modules that `test` runs, in order; all must pass, and one that is missing has failed."""


def command_test(chosen: argparse.Namespace) -> int:
    python = make_environment("dev")
    failed = []
    for module, *arguments in CHECKS:
        if subprocess.run([str(python), "-m", module, *arguments], cwd=str(PROJECT)).returncode != 0:
            failed.append(module)
    say("all checks passed" if not failed else f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def command_demo(chosen: argparse.Namespace) -> int:
    directory = Path(chosen.dir).resolve()
    address = f"127.0.0.1:{chosen.port or free_port()}"
    for old in read_nodes(directory):
        if old.is_alive():
            raise Failure(f"a demo runs already on {old.client_address} (pid {old.pid}). Use it, or stop it first.")
    require_free(address)
    python = make_environment("")
    # A shell that starts this in the background has Ctrl-C ignored, and so would the demo have it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    node, process = start_node(python, directory, name="demo", address=address)
    try:
        wait_ready(node, directory, process)
        body_file = directory / "demo-search.json"
        shown = _shortest(body_file)
        demo = [str(python), "-m", "node", "demo", "--address", address, "--body-file", shown]
        if subprocess.run(demo, env={**os.environ, "PYTHONPATH": str(PROJECT)}).returncode != 0:
            raise Failure(f"the demo failed; the node's log is {directory / 'demo.log'}")
        if chosen.once:
            return 0
        print(
            f"\nData: {_shortest(directory)}. Log: {_shortest(directory / 'demo.log')}. Ctrl-C stops the node.",
            flush=True,
        )
        status = process.wait()
        raise Failure(f"the node stopped by itself (status {status}). {log_end(node, directory)}")
    except KeyboardInterrupt:
        print("\nstopping", file=sys.stderr)
        return 0
    finally:
        if not stop_node(node, directory):
            say(f"the node did not stop within {STOP_S_MAX:.0f} s and was killed")


def command_up(chosen: argparse.Namespace) -> int:
    directory = Path(chosen.dir).resolve()
    known = read_members(directory)
    count = chosen.nodes or len(known) or 1
    base_port = chosen.base_port or (0 if known else BASE_PORT)
    if base_port + count - 1 > 65_535:
        raise Failure(f"{count} nodes from port {base_port} on need ports above 65535; choose a lower --base-port")
    python = make_environment("")
    cluster = Cluster.make(python, directory, nodes=count, base_port=base_port)
    cluster.start_all()
    show(views(list(cluster.nodes.values())), as_json=chosen.json)
    return 0


def command_down(chosen: argparse.Namespace) -> int:
    directory = Path(chosen.dir).resolve()
    nodes = read_nodes(directory)
    if not nodes:
        say(f"no nodes in {directory}")
    alive = [node.name for node in nodes if node.is_alive()]
    for node in nodes:  # all are told first: they stop side by side
        signal_node(node, signal.SIGTERM)
    for node in nodes:
        gentle = stop_node(node, directory)
        say(f"{node.name} {'was not running' if node.name not in alive else 'stopped' if gentle else 'killed'}")
    return 0


def command_status(chosen: argparse.Namespace) -> int:
    """Exit 0 if every node is ready, else 1."""
    directory = Path(chosen.dir).resolve()
    nodes = read_nodes(directory)
    if not nodes:
        say(f"no nodes in {directory}")
    seen = views(nodes)
    show(seen, as_json=chosen.json)
    members = {member.name for member in read_members(directory)}
    missing = sorted(members - {node.name for node in nodes})
    if nodes and missing:
        say(f"not running: {', '.join(missing)}")
    return 0 if seen and not missing and all(one["state"] == "ready" for one in seen) else 1


def _shortest(path: Path) -> str:
    """Return the path as seen from here, if that is shorter."""
    relative = os.path.relpath(str(path))
    return relative if len(relative) < len(str(path)) else str(path)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bootstrap.py",
        description="Makes the project's environment (.venv, once) and runs Annulus in it. Needs only Python.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True

    demo = commands.add_parser(
        "demo",
        help="start a node, load a sample, search it, keep serving",
        description="Start a node, load 3,000 WordNet rows, search them by example, and keep serving until Ctrl-C.",
    )
    demo.add_argument(
        "--port", type=port, default=BASE_PORT, help="port for clients (default %(default)s; 0: any free one)"
    )
    demo.add_argument("--dir", default="annulus-data/demo", help="where the node keeps its data (default %(default)s)")
    demo.add_argument("--once", action="store_true", help="stop the node after the answers instead of serving on")

    commands.add_parser(
        "test",
        help="run what CI runs",
        description="Run what CI runs: format, lint, types, tests, two minutes of simulation, and a real node"
        " killed and restarted under load."
        " Exit status 0 means that all passed.",
    )

    up = commands.add_parser(
        "up",
        help="start nodes on this machine, in the background",
        description="Start a cluster in the background and return when all its nodes are ready. Nodes that run already"
        " are kept; a directory that holds a cluster starts that cluster again.",
    )
    up.add_argument("--nodes", type=count, metavar="N", help="how many (default: as many as the directory has, else 1)")
    up.add_argument(
        "--base-port",
        type=port_of_a_node,
        metavar="P",
        help=f"the first node serves clients on P, the second on P+1, ... (default: as before, else {BASE_PORT})",
    )

    down = commands.add_parser(
        "down", help="stop the nodes of a directory", description="Stop the nodes that `up` started in a directory."
    )
    status = commands.add_parser(
        "status",
        help="show the nodes of a directory",
        description="Show the nodes that `up` started in a directory. Exit status 0 means that all are ready.",
    )
    for each in (up, down, status):
        each.add_argument(
            "--dir",
            default="annulus-data/nodes",
            metavar="DIR",
            help="data, logs and pid files of the nodes (default %(default)s)",
        )
    for each in (up, status):
        each.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return parser.parse_args(arguments)


def port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def port_of_a_node(text: str) -> int:
    if port(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a port a node can be found on")
    return int(text)


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes")
    return int(text)


COMMANDS = {
    "demo": command_demo,
    "test": command_test,
    "up": command_up,
    "down": command_down,
    "status": command_status,
}


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a demo told to stop stops its node too
    try:
        return COMMANDS[chosen.command](chosen)
    except Failure as failure:
        say(f"bootstrap: {failure}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
