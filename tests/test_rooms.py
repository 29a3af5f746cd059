"""The rooms: which way imports point, which library has which door, and what is used nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
ROOMS = ("node", "cluster", "storage", "index")  # a room may import itself and those to its right
INNER = ROOMS[1:]

WORLD = {"asyncio", "socket", "threading", "time", "random", "os", "aiohttp", "subprocess", "secrets", "uuid"}
"""Clock, chance, disk and network are arguments in the inner rooms, so that a seed replays a day."""

DOORS = {
    "pysyncobj": {"cluster/raft_core.py"},
    "plyvel": {"storage/chunks.py"},
    "nmslib": {"index/hnsw.py"},
    "faiss": {"index/kernels.py"},
    "pyarrow": {"storage/strings.py", "node/bulk/parquet.py"},  # text in the core, and files at the edge
    "lark": {"storage/filter/parser.py"},
    "uhashring": {"cluster/ring.py"},
    "regex": {"storage/analysis.py"},
    "Stemmer": {"storage/analysis.py"},
    "grpc": {"node/grpc/server.py"},
    "google": {"node/grpc/protocol.py"},
    "pymilvus": {"node/bulk/copying.py"},
}
NODE_ONLY = {"aiohttp", "uvloop", "prometheus_client", "click", "rich"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
REGISTRY_HOST = re.compile(
    r"\b(?:(?:test\.)?pypi|(?:files\.)?pythonhosted|registry\.npmjs|conda\.anaconda)\.(?:org|com)\b"
)


def sources(*places: str) -> list[str]:
    return [str(path.relative_to(PROJECT)) for place in places for path in sorted((PROJECT / place).rglob("*.py"))]


def tree(source: str) -> ast.Module:
    return ast.parse((PROJECT / source).read_text(encoding="utf-8"), source)


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Yield (first part of the module's name, file:line) of every import, also those inside functions."""
    for leaf in ast.walk(tree(source)):
        if isinstance(leaf, ast.Import):
            yield from ((alias.name.split(".")[0], f"{source}:{leaf.lineno}") for alias in leaf.names)
        elif isinstance(leaf, ast.ImportFrom):
            yield ("." if leaf.level else str(leaf.module).split(".")[0]), f"{source}:{leaf.lineno}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_rightwards(room: str) -> None:
    """A room imports itself and the rooms to its right, by full names; never tools, never tests."""
    allowed = set(ROOMS[ROOMS.index(room) :])
    ours = {*ROOMS, "tools", "tests", "."}
    assert [place for source in sources(room) for name, place in imported(source) if name in ours - allowed] == []


def test_inner_rooms_touch_no_world() -> None:
    """The inner rooms have no clock, no chance, no threads, no sockets and no files of their own."""
    banned = WORLD | NODE_ONLY
    assert [f"{place} {name}" for source in sources(*INNER) for name, place in imported(source) if name in banned] == []


def test_each_library_has_one_door() -> None:
    """A library that others must not depend on is imported in one file of the rooms."""
    strays = [
        f"{place} {name}"
        for source in sources(*ROOMS)
        for name, place in imported(source)
        if source not in DOORS.get(name, {source})
    ]
    assert strays == []


def test_nothing_unsafe_is_used() -> None:
    """No pickle on any wire or in any file, and no text is ever run as code."""
    found = []
    for source in sources(*ROOMS, "tools", "tests"):
        found += [f"{place} {name}" for name, place in imported(source) if name in UNSAFE_MODULES]
        for leaf in ast.walk(tree(source)):
            if isinstance(leaf, ast.Call) and isinstance(leaf.func, ast.Name) and leaf.func.id in UNSAFE_CALLS:
                found.append(f"{source}:{leaf.lineno} {leaf.func.id}")
            if isinstance(leaf, ast.keyword) and leaf.arg in ("allow_pickle", "shell") and _is_true(leaf.value):
                found.append(f"{source}:{leaf.value.lineno} {leaf.arg}=True")
    assert found == []


def test_no_package_registry_is_named() -> None:
    """Where packages come from is the installing machine's business, so no file names a registry's host."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git work tree")
    texts = [name for name in listed.stdout.split("\0") if name and not name.endswith((".npy", ".jsonl"))]
    assert [name for name in texts if REGISTRY_HOST.search(_text(PROJECT / name))] == []


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
