"""The README is true: its examples run on a real node and print what they show, its tables are current, links lead.

Examples are the `sh` and `python` blocks, in their order, in one shell and one directory; a `text` block right after
one is its output, `...` standing for anything. A comment before a block says when it is not run, or that it needs a
stopped node.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from node.app import EXIT_FAILED
from node.config import load
from node.settings import OPTIONS
from tools.bootstrap import CHECKS
from tools.docs import BLOCKS, README, main, names, refreshed, table
from tools.nodes import free_port, http_status

PROJECT = README.parent
TEXT = README.read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:19530"
DATA = "annulus-data/mine"
START_S_MAX = 20.0
RUN_S_MAX = 60.0
CURL = """
import sys, urllib.request
arguments = [one for one in sys.argv[1:] if one != "-s"]
body = arguments.pop(arguments.index("-d") + 1).encode() if "-d" in arguments else None
url = next(one for one in arguments if one != "-d")
sys.stdout.buffer.write(urllib.request.urlopen(urllib.request.Request(url, body)).read())
"""
"""What the examples use of curl, for machines that have none."""
_FENCE = re.compile(
    r"(?:<!-- (?P<note>[a-z ]+): (?P<why>[^>]*) -->\n)?"
    r"^```(?P<kind>[a-z]+)\n(?P<body>.*?)^```\n(?:```text\n(?P<shown>.*?)^```\n)?",
    re.S | re.M,
)
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Example:
    """A block that is run; `shown` is what the README says it prints, None if it does not say."""

    line: int
    kind: str
    body: str
    shown: str | None
    stopped: bool


@dataclass
class Session:
    """What happened when everything was run once."""

    printed: dict[int, str] = field(default_factory=dict)
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)
    exit_status: int = -1


def blocks(*kinds: str) -> Iterator[tuple[int, re.Match[str]]]:
    for found in _FENCE.finditer(TEXT):
        if found["kind"] in kinds:
            yield TEXT.count("\n", 0, found.start("kind")) + 1, found


EXAMPLES = [
    Example(line, found["kind"], found["body"], found["shown"], stopped=found["note"] == "run")
    for line, found in blocks("sh", "python")
    if found["note"] != "not run"
]


def filters() -> list[str]:
    """Return the expressions of the filter language's table."""
    rows = TEXT.split("| filter | keeps rows where |\n")[1].split("\n\n")[0].splitlines()[1:]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", row)[1])]


# --- the examples, run once --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Run every example on a node of its own, ask every filter, stop the node, run what needs it stopped."""
    place = tmp_path_factory.mktemp("readme")
    (place / "bin").mkdir()
    commands = {"annulus": " -m node", "python": "", "python3": ""}
    if shutil.which("curl") is None:
        (place / "curl.py").write_text(CURL)
        commands["curl"] = f" {place}/curl.py"
    for name, arguments in commands.items():
        command = place / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        command.chmod(0o700)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ANNULUS_")}
    environment = {**clean, "PATH": f"{place}/bin:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}
    address = f"127.0.0.1:{free_port()}"
    result = Session()
    with open(place / "node.log", "wb") as log:
        node = subprocess.Popen(
            ["annulus", "serve", "--data", DATA, "--listen", address], cwd=place, env=environment, stderr=log
        )
    try:
        _wait_ready(node, address, place / "node.log")
        result.printed |= _run([one for one in EXAMPLES if not one.stopped], place, environment, address)
        for text in filters():
            body = {"collectionName": "library", "filter": text, "exprParams": {"from": 1950}}
            result.filters[text] = _post(address, "/entities/query", body)
        node.send_signal(signal.SIGTERM)
        result.exit_status = node.wait(RUN_S_MAX)
    finally:
        with contextlib.suppress(ProcessLookupError):
            node.kill()
        node.wait()
    result.printed |= _run([one for one in EXAMPLES if one.stopped], place, environment, address)
    return result


def _wait_ready(node: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until_s = time.monotonic() + START_S_MAX
    while http_status(address, "/readyz") != 200:
        assert node.poll() is None and time.monotonic() < until_s, log.read_text(errors="replace")
        time.sleep(0.05)


def _run(examples: list[Example], place: Path, environment: dict[str, str], address: str) -> dict[int, str]:
    """Return line -> what was printed; one shell runs them all, so that variables live on as in a reader's shell."""
    script = []
    for one in examples:
        body = one.body.replace(ADDRESS, address)
        if one.kind == "python":
            (place / f"line_{one.line}.py").write_text(body)
            body = f"python line_{one.line}.py\n"
        script.append(f"{body}printf '\\n@@ {one.line}\\n'\n")
    done = subprocess.run(
        ["sh", "-e", "-c", "".join(script)],
        cwd=place, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX,
    )  # fmt: skip
    parts = re.split(r"\n@@ (\d+)\n", done.stdout)
    printed = {int(line): text for text, line in zip(parts[::2], parts[1::2], strict=False)}
    assert done.returncode == 0, f"after the examples {sorted(printed)}: {parts[-1]}\n{done.stderr}"
    return printed


def _post(address: str, route: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://{address}/v2/vectordb{route}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        reply: dict[str, Any] = json.load(answer)
        return reply


# --- claims ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [pytest.param(one, id=f"line {one.line}") for one in EXAMPLES])
def test_an_example_prints_what_it_shows(session: Session, example: Example) -> None:
    """Every example succeeds; where output is shown, it is that output."""
    printed = session.printed[example.line]
    if example.shown is not None:
        wanted = re.escape(example.shown.strip()).replace(re.escape("..."), r"[\s\S]*?")
        assert re.fullmatch(wanted, printed.strip()), printed


def test_the_node_ends_well(session: Session) -> None:
    """SIGTERM ends the node with status 0."""
    assert session.exit_status == 0


def test_every_filter_is_understood(session: Session) -> None:
    """Each expression of the filter table is accepted on the collection of the example."""
    assert len(session.filters) >= 20
    assert {text: reply["message"] for text, reply in session.filters.items() if reply["code"] != 0} == {}


def test_generated_tables_are_current() -> None:
    """Each table that code can make is there once, and is what the code says now (else: tools.docs --write)."""
    assert sorted(names(TEXT)) == sorted(BLOCKS)
    assert refreshed(TEXT) == TEXT
    assert main([]) == 0


def test_every_setting_is_described() -> None:
    """The README has a line with the key and the reason of every setting."""
    lines = TEXT.splitlines()
    assert [one.key for one in OPTIONS if not any(f"`{one.key}`" in line and one.why in line for line in lines)] == []


def test_settings_files_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TOML examples are settings files without a problem."""
    found = list(blocks("toml"))
    assert found
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text("s" * 32)
    Path("secret").chmod(0o600)
    for line, block in found:
        path = tmp_path / f"line_{line}.toml"
        path.write_text(block["body"])
        loaded = load(flags={}, environment={}, config_file=str(path))
        assert loaded.warnings == () and loaded.sources


def test_links_lead_somewhere() -> None:
    """Links go to files that exist, headings that exist, and names that their file defines."""
    headings = [line.lstrip("#").strip() for line in _prose().splitlines() if line.startswith("#")]
    anchors = {re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings}
    broken = []
    for found in _LINK.finditer(_prose()):
        path, _, anchor = found["target"].partition("#")
        if (anchor and anchor not in anchors) or not (PROJECT / path).exists():
            broken.append(found[0])
        elif found["text"].startswith("`") and path.endswith(".py"):
            name = found["text"].strip("`").rpartition(".")[2]
            source = (PROJECT / path).read_text(encoding="utf-8")
            if not re.search(rf"^\s*(?:async )?(?:def|class) {name}\b", source, re.M):
                broken.append(found[0])
    assert broken == []


def test_what_ci_runs_is_named() -> None:
    """The tools that `bootstrap.py test` runs are the ones the README lists, and every module it names exists."""
    assert [module for module, *_ in CHECKS if f"| `python -m {module}" not in TEXT] == []
    modules = {found[1] for found in re.finditer(r"python -m ([a-z_.]+)", TEXT)}
    missing = [
        name
        for name in sorted(modules)
        if not any((PROJECT / (name.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py"))
    ]
    assert missing == []


def test_exit_statuses() -> None:
    """The status of a node that cannot trust its disk is the one in the table."""
    assert f"| {EXIT_FAILED} | it cannot trust its disk" in TEXT


def test_lines_are_short() -> None:
    """Prose is wrapped at 120 characters; tables and shown output are not."""
    assert [line for line in _prose().splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_a_stale_table_is_noticed() -> None:
    """A block with other text is made anew, text around it stays, and a block that nobody makes is an error."""
    stale = "a\n<!-- generated: field_types -->\nold\n<!-- end of field_types -->\nb\n"
    assert refreshed(stale) == stale.replace("old\n", BLOCKS["field_types"]())
    with pytest.raises(KeyError):
        refreshed("<!-- generated: nothing -->\n<!-- end of nothing -->")


def test_a_bar_in_a_cell_is_escaped() -> None:
    """A cell's bar does not end the cell."""
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


def _prose() -> str:
    """Return the README without its code blocks."""
    return re.sub(r"^```.*?^```$", "", TEXT, flags=re.S | re.M)
