"""Damaged data is set aside whole, and the directory that replaces it knows whose it is and that it has forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.identity import IDENTITY_KEY, Identity, settle
from node.repair import advice, set_aside
from node.settings import Address, NodeSettings, Peer, Settings
from storage.chunks import LevelDbChunks
from storage.errors import StorageFault

PEERS = tuple(Peer(f"n{number}", Address("127.0.0.1", 7000 + number)) for number in (1, 2, 3))


def settings(data: Path, name: str = "n1") -> Settings:
    return Settings(node=NodeSettings(name=name, data=str(data), peers=PEERS))


def make(data: Path, identity: Identity) -> None:
    (data / "journal").mkdir(parents=True)
    (data / "journal" / "0.log").write_bytes(b"damaged")
    store = LevelDbChunks.open(str(data / "chunks"))
    store.commit([(IDENTITY_KEY, identity.to_bytes())])
    store.close()


def identity_of(data: Path) -> Identity:
    store = LevelDbChunks.open(str(data / "chunks"))
    raw = store.read(IDENTITY_KEY)
    store.close()
    return settle(raw, settings(data).node)


def test_the_directory_forgets_and_knows_its_cluster(tmp_path: Path) -> None:
    """Journal and chunks are kept beside the new ones, however often; the cluster's id stays, votes do not."""
    old = settle(None, settings(tmp_path).node).learnt("the id").seated({0: 3}, {})
    make(tmp_path, old)
    for number in (1, 2):
        aside = set_aside(settings(tmp_path))
        assert aside == str(tmp_path / f"damaged-{number}")
        assert list((tmp_path / "journal").iterdir()) == []
        found = identity_of(tmp_path)
        assert (found.cluster_id, found.is_seated, found.abstains) == ("the id", False, {})
    assert (tmp_path / "damaged-1/journal/0.log").read_bytes() == b"damaged"
    assert (tmp_path / "damaged-1/chunks/CURRENT").exists()


def test_a_store_that_cannot_be_read_is_moved_too(tmp_path: Path) -> None:
    """Then the directory is like a new one: its node asks the others for their cluster."""
    make(tmp_path, settle(None, settings(tmp_path).node).learnt("the id").seated({}, {}))
    (tmp_path / "chunks/CURRENT").unlink()
    set_aside(settings(tmp_path))
    assert identity_of(tmp_path).cluster_id == ""
    assert not identity_of(tmp_path).is_seated


def test_another_nodes_data_is_not_touched(tmp_path: Path) -> None:
    """Whose data it is comes before whether it is whole."""
    make(tmp_path, settle(None, settings(tmp_path).node))
    with pytest.raises(StorageFault, match="belongs to node n1"):
        set_aside(settings(tmp_path, "n2"))
    assert (tmp_path / "journal/0.log").exists()
    assert not (tmp_path / "damaged-1").exists()


def test_only_nodes_with_peers_are_told_of_them(tmp_path: Path) -> None:
    """A lone node has a backup or nothing; to a node with peers an old copy would be a false memory."""
    assert "--cluster-repair-from-peers true" in advice(settings(tmp_path))
    assert "backup" not in advice(settings(tmp_path)) and "from a backup" in advice(Settings())
