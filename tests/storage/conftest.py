"""What tests of the storage room share."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from storage.chunks import ChunkStore, LevelDbChunks
from tests.sim.chunks import SimChunks


@pytest.fixture(params=["leveldb", "sim"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    """The real chunk store, and the simulated one."""
    if request.param == "sim":
        return SimChunks(Random(0))
    opened = LevelDbChunks.open(str(tmp_path / "chunks"))
    request.addfinalizer(opened.close)
    return opened
