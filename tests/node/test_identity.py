"""A directory is its node's: the record goes through bytes, and every difference is refused in words that help."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from node.identity import Identity, settle
from node.settings import Address, NodeSettings, Peer
from storage.errors import StorageFault


def node(name: str = "n1", members: str = "n1 n2 n3", **changed: Any) -> NodeSettings:
    peers = tuple(Peer(each, Address("127.0.0.1", 7000 + number)) for number, each in enumerate(members.split()))
    return NodeSettings(name=name, peers=peers if len(peers) > 1 else (), **changed)


def test_a_record_comes_back() -> None:
    """What was written is what is found, at every stage of a node's life."""
    new = settle(None, node())
    assert (new.members, new.copies, new.shards, new.cluster_id) == (("n1", "n2", "n3"), 3, 8, "")
    assert not new.is_seated
    assert new.form == "nodes n1,n2,n3; shards 8; copies 3"
    for stage in (
        new,
        new.learnt("c"),
        new.seated({}, {}),
        new.learnt("c").seated({0: 17}, {65536: ("n1", "n2")}),
        new.seated({1: 2}, {}).unseated(),
    ):
        assert settle(stage.to_bytes(), node()) == stage


def test_a_directory_of_a_lone_node_stays_one() -> None:
    """Directories that were made before there were clusters are those of a lone node that remembers."""
    old = settle(cbor2.dumps({"format": 1, "node": "n1", "shards": 4}), node(members="n1"))
    assert old == Identity("n1", 4, ("n1",), 1, is_seated=True)
    assert cbor2.loads(old.to_bytes()) == {"format": 1, "node": "n1", "shards": 4}


def test_addresses_may_change() -> None:
    """Nodes move to other machines: names count, addresses do not."""
    record = settle(None, node()).to_bytes()
    elsewhere = tuple(Peer(each, Address(f"10.0.0.{each[1]}", 1)) for each in ("n3", "n1", "n2"))
    settle(record, NodeSettings(name="n1", peers=elsewhere))


def test_the_list_of_peers_is_for_forming() -> None:
    """Once there is a cluster the list may be older or newer than its nodes; before, all must begin with the same."""
    formed = settle(None, node()).learnt("c").knowing(7, {"n1": "a:1", "n4": "d:1"}).to_bytes()
    for members in ("n1 n2", "n1 n2 n3 n4 n5", "n1 n4"):
        found = settle(formed, node(members=members))
        assert (found.members, found.copies, found.peers) == (("n1", "n2", "n3"), 3, {"n1": "a:1", "n4": "d:1"})
    with pytest.raises(StorageFault, match="keeps 3 copies"):
        settle(formed, node(members="n1 n2", replication_factor=2))


def test_a_node_that_joined_starts_without_a_list() -> None:
    """Its directory says what it belongs to, with --join or without; it needs to say where it listens."""
    joined = Identity("n4", 16, ("n1", "n2", "n3"), 2, "c", peers={"n1": "a:1", "n4": "d:1"})
    assert joined.has_joined and joined.has_peers
    listen, alone = Address("127.0.0.1", 7004), NodeSettings(name="n4")
    for again in (
        NodeSettings(name="n4", peer_listen=listen),
        NodeSettings(name="n4", peer_listen=listen, join=listen),
    ):
        assert settle(joined.to_bytes(), again) == joined
    with pytest.raises(StorageFault, match=r"node n4 of a cluster.*--peer-listen"):
        settle(joined.to_bytes(), alone)
    with pytest.raises(StorageFault, match="the node n4 alone, but the settings name a cluster"):
        settle(settle(None, alone).to_bytes(), NodeSettings(name="n4", peer_listen=listen))


@pytest.mark.parametrize(
    "other, what, help",
    [
        pytest.param(node("n2"), "belongs to node n1, not to n2", "--name n1", id="name"),
        pytest.param(node(members="n1 n2"), "the 3 nodes n1, n2, n3, but", "the peers that it was", id="fewer peers"),
        pytest.param(node(members="n1 n2 n4"), "the 3 nodes n1, n2, n4", "the peers that it was", id="another peer"),
        pytest.param(node(members="n1"), "the node n1 alone", "the peers that it was formed with", id="alone"),
        pytest.param(node(shards=16), "a cluster of 8 shards", "--shards 8", id="shards"),
        pytest.param(node(replication_factor=1), "keeps 3 copies", "--replication-factor 3", id="copies"),
    ],
)
def test_differences_are_refused(other: NodeSettings, what: str, help: str) -> None:
    """The message says what differs and what to start with instead."""
    with pytest.raises(StorageFault) as refused:
        settle(settle(None, node()).to_bytes(), other)
    assert what in refused.value.message and help in refused.value.message


def test_another_format_is_refused() -> None:
    """A newer program's directory is left alone."""
    for format_, members in ((2, {}), (1, {"members": ["n1", "n2"]})):
        with pytest.raises(StorageFault, match=f"has format {format_}, this program reads {3 - format_}"):
            settle(cbor2.dumps({"format": format_, **members}), node())
