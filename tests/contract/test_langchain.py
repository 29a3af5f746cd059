"""LangChain's Milvus store works on Annulus as it comes, on one node and on three.

It needs a pymilvus of its own, so it gets an environment of its own; the registry is asked for it once a run.
"""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest

from tests.process.clusters import Trio
from tests.process.running import Running

PROGRAM = Path(__file__).parent / "programs" / "langchain_store.py"
PACKAGE = "langchain-milvus>=0.4,<0.5"
INSTALL_S, RUN_S = 600, 120


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with LangChain's store."""
    folder: Path = tmp_path_factory.mktemp("langchain")
    venv.create(folder, with_pip=True)
    found = folder / "bin" / "python"
    install = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]
    done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_S)
    assert done.returncode == 0, done.stderr
    return found


def test_langchains_store_works_unchanged(python: Path, tmp_path: Path) -> None:
    """Documents go in, are found by likeness, filter and diversity, changed and deleted; also by words and vectors.

    What is written through one node is read through another.
    """
    with Running(tmp_path / "one") as node:
        _run(python, node.port, node.port)
    with Trio(tmp_path / "three") as trio:
        _run(python, trio["n1"].port, trio["n3"].port)


def _run(python: Path, *ports: int) -> None:
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    done = subprocess.run([str(python), str(PROGRAM), *addresses], capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stderr[-4_000:]
