"""The first command anybody runs: the right Python, an environment that mends itself, clear refusals."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tools import bootstrap, environment, nodes
from tools.environment import Failure, choose_python, explain_installation, find_python, is_made, stamp_of
from tools.nodes import Cluster, Member, Node, free_port, free_ports, read_members, read_nodes, require_free

STAND_ALONE = ("bootstrap.py", "environment.py", "nodes.py")


# --- Python ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, on_path, chosen",
    [
        pytest.param((3, 11), {}, "/own", id="this one will do"),
        pytest.param((3, 12), {(3, 11): "/311"}, "/own", id="this one rather than another"),
        pytest.param((3, 13), {(3, 11): "/311", (3, 12): "/312"}, "/312", id="newest on the path"),
        pytest.param((3, 9), {(3, 11): "/311"}, "/311", id="too old"),
    ],
)
def test_choice_of_python(own: tuple[int, int], on_path: dict[tuple[int, int], str], chosen: str) -> None:
    """A supported Python is used as it is, else the newest supported one on the PATH."""
    assert choose_python(own, "/own", on_path.get) == chosen


@pytest.mark.parametrize("own, reason", [((3, 13), "plyvel"), ((3, 8), "older ones lack")])
def test_no_python_will_do(own: tuple[int, int], reason: str) -> None:
    """Without a supported Python the refusal says which one is wanted and why."""
    with pytest.raises(Failure, match=rf"needs Python 3\.11 or 3\.12; this is Python {own[0]}\.{own[1]}.*{reason}"):
        choose_python(own, "/own", lambda version: None)


def test_names_that_lead_to_nothing_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version manager's dead name in front of the PATH does not hide the Python behind it."""
    version = sys.version_info[:2]
    for name, text in (("shims", "#!/bin/sh\nexit 127\n"), ("real", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')):
        program = tmp_path / name / "python{}.{}".format(*version)
        program.parent.mkdir()
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/shims:{tmp_path}/absent:{tmp_path}/real")
    assert find_python(version) == str(tmp_path / "real" / "python{}.{}".format(*version))
    monkeypatch.setenv("PATH", f"{tmp_path}/shims")
    assert find_python(version) is None


def test_old_pythons_can_read_it() -> None:
    """The stand-alone files parse as Python 3.7 and import only the standard library and each other."""
    for name in STAND_ALONE:
        text = (environment.PROJECT / "tools" / name).read_text(encoding="utf-8")
        for leaf in ast.walk(ast.parse(text, name, feature_version=(3, 7))):
            if isinstance(leaf, ast.ImportFrom):
                first = str(leaf.module).split(".")[0]
                assert first in sys.stdlib_module_names or leaf.module in ("tools.environment", "tools.nodes")
            elif isinstance(leaf, ast.Import):
                assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in leaf.names)


# --- the environment ---------------------------------------------------------------------------------------------


def test_a_stamp_decides(tmp_path: Path) -> None:
    """An environment is made only if its stamp is equal and its Python is there; dev's includes what demo needs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    stamp = stamp_of("3.11", "")
    assert not is_made(stamp, tmp_path), "no stamp: the installation was interrupted"
    for written, made in [
        (stamp, True),
        ({**stamp, "extras": "dev"}, True),
        ({**stamp, "setup": "other"}, False),
        ({**stamp, "project": "/elsewhere"}, False),
        ({**stamp, "python": "3.12"}, False),
    ]:
        (tmp_path / environment.STAMP).write_text(json.dumps(written))
        assert is_made(stamp, tmp_path) is made, written
    assert not is_made({**stamp, "extras": "dev"}, tmp_path)
    (tmp_path / environment.STAMP).write_text("{half")
    assert not is_made(stamp, tmp_path)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, whose installation is only noted down."""
    (tmp_path / "setup.cfg").write_text("[metadata]\n")
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    monkeypatch.setattr(environment, "ENVIRONMENT", tmp_path / ".venv")
    monkeypatch.setattr(environment, "is_made", lambda stamp: is_made(stamp, tmp_path / ".venv"))
    return tmp_path


def test_made_once_and_repaired(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call makes, the second does nothing, an interrupted or broken one is taken up again."""
    done: list[str] = []

    def make_venv(python: str) -> None:
        done.append("venv")
        (project / ".venv" / "bin").mkdir(parents=True)
        (project / ".venv" / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environment, "_make_venv", make_venv)
    monkeypatch.setattr(environment, "_install", lambda python, extras: done.append(f"install {extras}"))
    environment.make_environment("")
    assert done == ["venv", "install "]
    environment.make_environment("")
    assert done == ["venv", "install "]
    environment.make_environment("dev")
    environment.make_environment("")
    assert done == ["venv", "install ", "install dev"]
    (project / ".venv" / environment.STAMP).unlink()
    environment.make_environment("")
    assert done[3:] == ["install "], "what is there is kept"
    (project / ".venv" / "bin" / "python").unlink()
    environment.make_environment("")
    assert done[4:] == ["venv", "install "], "a broken environment is made anew"


def test_a_failed_installation_leaves_no_stamp(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the next call tries again."""

    def fail(*arguments: object) -> None:
        raise Failure("no network")

    monkeypatch.setattr(environment, "_make_venv", lambda python: (project / ".venv").mkdir())
    monkeypatch.setattr(environment, "_install", fail)
    for _ in range(2):
        with pytest.raises(Failure, match="no network"):
            environment.make_environment("")


def test_debian_without_venv(project: Path, tmp_path: Path) -> None:
    """Where the venv module lacks its other half, the refusal names the package to install."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ensurepip is not available.'\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(Failure, match="sudo apt install python3-venv"):
        environment._make_venv(str(python))


@pytest.mark.parametrize(
    "said, explained",
    [
        ("... Temporary failure in name resolution ...", "there is no way to the package index"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("a\n" * 50 + "error: the last line", "error: the last line"),
    ],
)
def test_failed_installations_are_explained(said: str, explained: str) -> None:
    """No network and no disk are told apart from the rest, and the log is named."""
    text = explain_installation(said, Path("/x/install.log"))
    assert explained in text
    assert "/x/install.log" in text
    assert len(text.splitlines()) < 20


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("demo", {"command": "demo", "port": 19530, "once": False}),
        ("demo --port 0 --once --dir /d", {"port": 0, "once": True, "dir": "/d"}),
        ("test", {"command": "test"}),
        ("up", {"nodes": None, "base_port": None, "dir": "annulus-data/nodes", "json": False}),
        ("up --nodes 3 --dir /d --base-port 7000 --json", {"nodes": 3, "base_port": 7000, "dir": "/d", "json": True}),
        ("down --dir /d", {"command": "down", "dir": "/d"}),
        ("status --json", {"command": "status", "json": True}),
    ],
)
def test_arguments(arguments: str, expected: dict[str, Any]) -> None:
    """Every command takes what it documents."""
    chosen = vars(bootstrap.parse(arguments.split()))
    assert {key: chosen[key] for key in expected} == expected


@pytest.mark.parametrize(
    "arguments", ["", "fly", "demo --port 70000", "up --nodes 0", "up --base-port 0", "up --nodes x"]
)
def test_wrong_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong argument is exit status 2 and a usage line."""
    with pytest.raises(SystemExit) as left:
        bootstrap.parse(arguments.split())
    assert left.value.code == 2
    assert "usage: bootstrap.py" in capsys.readouterr().err


@pytest.mark.parametrize("check", bootstrap.CHECKS, ids=lambda check: check[0])
def test_every_check_exists(check: tuple[str, ...]) -> None:
    """A check that has been moved away is noticed here, and fails the run."""
    assert find_spec(check[0]) is not None


def test_a_failing_check_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All checks are run; one that fails, or is not there, makes the exit status 1 and is named."""
    monkeypatch.setattr(bootstrap, "make_environment", lambda extras: Path(sys.executable))
    monkeypatch.setattr(bootstrap, "CHECKS", (("no_such_module_here",), ("this",)))
    assert bootstrap.main(["test"]) == 1
    assert "FAILED: no_such_module_here\n" in capsys.readouterr().err
    monkeypatch.setattr(bootstrap, "CHECKS", (("this",),))
    assert bootstrap.main(["test"]) == 0


# --- nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a "Python" that runs the fake node whatever it is told, used instead of the environment's."""
    program = tmp_path / "python"
    fake = Path(__file__).parent / "demo_node.py"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(bootstrap, "make_environment", lambda extras: program)
    yield program
    for directory in (tmp_path / "d", tmp_path / "demo"):
        for node in read_nodes(directory):
            if node.is_alive():
                os.kill(node.pid, signal.SIGKILL)


def test_up_status_down(fake_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """up returns when the node is ready, again changes nothing, after a kill restarts it; down stops it."""
    directory, port = str(tmp_path / "d"), str(free_port())
    up = ["up", "--dir", directory, "--base-port", port, "--json"]
    assert bootstrap.main(up) == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert first["name"] == "n1"
    assert first["client_address"] == f"127.0.0.1:{port}"
    assert Path(first["data_directory"]).is_dir()
    assert bootstrap.main(up) == 0
    assert json.loads(capsys.readouterr().out) == [first]

    assert bootstrap.main(["status", "--dir", directory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "ready"
    (node,) = read_nodes(Path(directory))
    os.kill(node.pid, signal.SIGKILL)
    until_s = time.monotonic() + 10
    while node.is_alive() and time.monotonic() < until_s:
        time.sleep(0.01)
    assert bootstrap.main(["status", "--dir", directory]) == 1
    assert re.search(r"n1 .* stopped", capsys.readouterr().out)

    assert bootstrap.main(up) == 0
    (second,) = json.loads(capsys.readouterr().out)
    assert second["pid"] != first["pid"]
    assert bootstrap.main(["down", "--dir", directory]) == 0
    assert "n1 stopped" in capsys.readouterr().err
    require_free(first["client_address"])
    assert bootstrap.main(["down", "--dir", directory]) == 0
    assert "no nodes in" in capsys.readouterr().err


def test_a_cluster(fake_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three nodes get names, ports and one secret of their own, keep them over a restart, and stop together."""
    directory = tmp_path / "d"
    base = free_ports(3)[0]
    up = ["up", "--dir", str(directory)]
    assert bootstrap.main([*up, "--nodes", "3", "--base-port", str(base), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in first] == ["n1", "n2", "n3"]
    assert [one["client_address"] for one in first] == [f"127.0.0.1:{base + i}" for i in range(3)]
    assert len({one["data_directory"] for one in first}) == 3
    members = read_members(directory)
    assert len({one.peer_address for one in members}) == 3
    secret = directory / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_text().strip()) == 64
    listed = ",".join(f"{one.name}={one.peer_address}" for one in members)
    for one, member in zip(first, members, strict=True):
        shown = Path(f"/proc/{one['pid']}/cmdline").read_text().split("\0")
        assert shown[shown.index("--peers") + 1] == listed
        assert shown[shown.index("--peer-listen") + 1] == member.peer_address
        assert secret.read_text().strip() not in " ".join(shown)

    assert bootstrap.main([*up, "--nodes", "2"]) == 1
    assert "holds a cluster of 3" in capsys.readouterr().err
    cluster = Cluster.make(fake_python, directory, nodes=3)
    cluster.kill("n2")
    assert bootstrap.main(["status", "--dir", str(directory)]) == 1
    assert re.search(r"n2 .* stopped", capsys.readouterr().out)
    assert cluster.stop("n3")
    assert bootstrap.main(["status", "--dir", str(directory)]) == 1
    assert "not running: n3" in capsys.readouterr().err
    assert bootstrap.main([*up, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [one["pid"] == old["pid"] for one, old in zip(again, first, strict=True)] == [True, False, False]
    assert [one["client_address"] for one in again] == [one["client_address"] for one in first]
    assert read_members(directory) == members
    assert bootstrap.main(["down", "--dir", str(directory)]) == 0
    assert capsys.readouterr().err.split() == "n1 stopped n2 stopped n3 stopped".split()
    assert bootstrap.main([*up, "--base-port", str(base + 7)]) == 0, "clients may find it elsewhere"
    assert secret.stat().st_size == 65
    assert bootstrap.main(["down", "--dir", str(directory)]) == 0


def test_one_node_of_a_cluster_that_dies_at_start(
    fake_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """up shows why, by the log of that node, and stops those it has started."""
    directory = tmp_path / "d"
    (directory / "n2").mkdir(parents=True)
    (directory / "n2" / "die").touch()
    assert bootstrap.main(["up", "--dir", str(directory), "--nodes", "3"]) == 1
    said = capsys.readouterr().err
    assert "node n2 stopped while starting" in said and "cannot live like this" in said
    assert read_nodes(directory) == []


def test_leaders_are_what_the_latest_term_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several answers the highest term counts, and in it one that knows the leader."""
    said = {
        "a:1": {"shards": [{"shard": 0, "term": 3, "leader": "n1"}, {"shard": 1, "term": 4, "leader": None}]},
        "a:2": {"shards": [{"shard": 0, "term": 5, "leader": None}, {"shard": 1, "term": 4, "leader": "n2"}]},
        "a:3": None,
    }
    members = [Member(f"n{number}", f"a:{number}", "") for number in (1, 2, 3)]
    cluster = Cluster(Path(sys.executable), tmp_path, members)
    monkeypatch.setattr(nodes, "node_status", said.get)
    monkeypatch.setattr(cluster, "is_alive", lambda name: True)
    assert cluster.leaders() == {0: None, 1: "n2"}


def test_a_node_that_dies_or_hangs_at_start(
    fake_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """up shows the end of the log of this start alone, and leaves no process and no pid file."""
    monkeypatch.setattr(nodes, "READY_S_MAX", 3.0)
    directory = tmp_path / "d"
    for mark, complaint in (("die", "stopped while starting"), ("mute", "is not ready after 3 s")):
        (directory / "n1").mkdir(parents=True, exist_ok=True)
        (directory / "n1" / mark).touch()
        port = free_port()
        assert bootstrap.main(["up", "--dir", str(directory), "--base-port", str(port)]) == 1
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("demo node n1") == 1
        assert ("cannot live like this" in said) is (mark == "die")
        (directory / "n1" / mark).unlink()
        assert read_nodes(directory) == []
        require_free(f"127.0.0.1:{port}")


def test_a_port_in_use(fake_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A taken port is one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in (["up", "--base-port", port], ["demo", "--port", port]):
            assert bootstrap.main([*command, "--dir", str(tmp_path / "d")]) == 1
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_a_pid_that_belongs_to_another(tmp_path: Path) -> None:
    """A pid file of a process that is gone does not make us signal whoever has its number now."""
    node = Node("n1", "127.0.0.1:1", os.getpid(), str(tmp_path), "1", 0)
    assert not node.is_alive()
    assert nodes.stop_node(node, tmp_path)


def test_demo_serves_until_interrupted(fake_python: Path, tmp_path: Path) -> None:
    """demo starts a node, keeps serving after the answers, and Ctrl-C stops the node cleanly."""
    directory, port = tmp_path / "demo", free_port()
    code = (
        "import sys; from pathlib import Path; from tools import bootstrap;"
        "python = Path(sys.argv.pop(1)); bootstrap.make_environment = lambda extras: python;"
        "sys.exit(bootstrap.main(sys.argv[1:]))"
    )
    # The stand-in answers as `python -m node demo` too: it sees no --data among its flags and fails.
    demo = subprocess.run(
        [sys.executable, "-c", code, str(fake_python), "demo", "--dir", str(directory), "--port", str(port)],
        cwd=environment.PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert demo.returncode == 1
    assert "the demo failed; the node's log is" in demo.stderr
    assert read_nodes(directory) == []

    dispatch = tmp_path / "dispatching"
    dispatch.write_text(
        f'#!/bin/sh\nif [ "$3" = serve ]; then exec "{fake_python}" "$@"; else exec "{sys.executable}" "$@"; fi\n'
    )
    dispatch.chmod(0o755)
    serving = subprocess.Popen(
        [sys.executable, "-c", code, str(dispatch), "demo", "--dir", str(directory), "--port", str(port)],
        cwd=environment.PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert serving.stdout is not None
    lines = []
    while "Ctrl-C stops the node" not in (line := serving.stdout.readline()) and line:
        lines.append(line)
    assert any("claret" in line for line in lines)
    (node,) = read_nodes(directory)
    assert node.is_ready()
    serving.send_signal(signal.SIGINT)
    serving.communicate(timeout=30)
    assert serving.returncode == 0
    until_s = time.monotonic() + 5
    while node.is_alive():
        assert time.monotonic() < until_s
    assert read_nodes(directory) == []
