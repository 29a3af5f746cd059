"""The demonstration: the sample is sound, and loading and searching it works over REST, on a node of its own too."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from node.bulk.commands import COMMANDS
from node.bulk.demo import COLLECTION, SAMPLE, DemoError, free_place, indexed, load_sample, own_node, run
from node.bulk.remote import Remote
from tests.process.running import free_port
from tests.tools.demo_node import demo_node


@pytest.fixture
def remote() -> Iterator[Callable[[str], Remote]]:
    """Return what makes clients, which are closed at the end."""
    with contextlib.ExitStack() as ending:

        def made(address: str) -> Remote:
            one = Remote(address)
            ending.callback(one.close)
            return one

        yield made


def test_the_sample_is_sound() -> None:
    """3,000 rows with unit vectors, distinct ids in order, the licence beside them."""
    sample = load_sample()
    assert len(sample.rows) == 3000
    assert sample.vectors.shape == (3000, 384)
    assert sample.vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(sample.vectors, axis=1), 1, atol=1e-6)
    assert sample.queries.shape == (len(sample.sentences), 384)
    ids = [row["id"] for row in sample.rows]
    assert ids == sorted(set(ids))
    licence = (SAMPLE / "LICENSE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
    assert 'PROVIDED "AS IS"' in licence


def test_it_loads_searches_and_shows(tmp_path: Path, remote: Callable[[str], Remote]) -> None:
    """All rows arrive, the wait ends when the index is finished, both answers and the curl line are shown."""
    output = io.StringIO()
    body_file = tmp_path / "a b" / "search.json"
    with demo_node() as (node, address):
        run(remote(address), body_file=body_file, console=Console(file=output, width=140))
        assert len(node.rows) == 3000
        assert node.looks == 2
        run(remote(address), body_file=body_file, console=Console(file=io.StringIO(), width=140))
        assert len(node.rows) == 3000, "a second run starts anew"
        assert node.calls.count("/collections/drop") == 1
        (curl,) = [line for line in output.getvalue().splitlines() if line.startswith("  curl ")]
        try:
            repeated = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=20)
        except FileNotFoundError:
            pytest.skip("no shell")
    text = output.getvalue()
    assert 'Nearest to "The Bordeaux region produces great red wines"' in text
    assert "claret" in text
    assert 'where category == "noun.location" and link_count >= 2' in text
    assert "Aquitaine" in text
    body = json.loads(body_file.read_text())
    assert body["collectionName"] == COLLECTION
    assert len(body["data"][0]) == 384
    if repeated.returncode != 127:  # curl is not everywhere
        assert json.loads(repeated.stdout)["code"] == 0, repeated.stderr


def test_errors_are_sentences(tmp_path: Path) -> None:
    """A node that refuses is one line."""
    with demo_node() as (node, address):
        node.fail_with = "the disk is full"
        found = CliRunner().invoke(COMMANDS["demo"], ["--dir", str(tmp_path), "--address", address])
    assert (found.exit_code, found.output) == (1, "Error: the disk is full\n")


def test_an_index_that_never_ends(remote: Callable[[str], Remote]) -> None:
    """The wait for the index has an end, and says how far it came."""
    with demo_node() as (node, address):
        node.looks, node.rows = -1000, [{} for _ in range(3000)]
        with pytest.raises(DemoError, match="after 0 s only 1500 of 3000 rows are indexed"):
            list(indexed(remote(address), rows=3000, wait_s=0.0))


def test_a_node_is_started_where_none_is(tmp_path: Path, remote: Callable[[str], Remote]) -> None:
    """It answers while it is wanted, has stopped afterwards, and another's place is not taken."""
    address = f"127.0.0.1:{free_port()}"
    with own_node(tmp_path / "demo", address) as process:
        assert free_place(address) is None
        assert remote(address).call("/collections/list", {}) == []
    assert process.returncode == 0
    assert free_place(address) == address
    assert free_place("elsewhere.example:19530") is None
