"""The membership: what a change needs, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import pytest

from cluster.membership import (
    MEMBERS_MAX,
    FormCluster,
    Membership,
    MemberState,
    Moved,
    PauseMoves,
    PlanMove,
    RemoveMember,
    SetMember,
)
from cluster.message import Message
from storage.errors import BadRequest, Conflict
from storage.types import ShardId


def formed() -> Membership:
    membership = Membership()
    membership.form(FormCluster("c", {"n1": "h:1", "n2": "h:2", "n3": "h:3"}, 3), 4)
    return membership


@pytest.mark.parametrize(
    ("message", "why"),
    [
        pytest.param(SetMember("n4", "h:4"), "there is no node n4", id="a change of nobody"),
        pytest.param(
            SetMember("n2", "h:9", ticket="t"), "there is a node n2 in the cluster already, at h:2", id="name"
        ),
        pytest.param(SetMember("n4", "h:2", ticket="t"), "node n2 has the address h:2", id="address"),
        pytest.param(SetMember("n1", "h:1", state="asleep"), "a node is active, draining, gone", id="state"),
        pytest.param(SetMember("n4", "h:4", ticket="t", replaces="n7"), "cannot replace n7", id="replaces nobody"),
        pytest.param(SetMember("n1", "h:1", replaces="n1"), "cannot replace n1", id="replaces itself"),
        pytest.param(RemoveMember("n1"), "holds 4 shards", id="remove who holds"),
        pytest.param(PlanMove(ShardId(9), 0, ["n1"]), "there is no shard 9", id="no shard"),
        pytest.param(PlanMove(ShardId(0), 1, ["n1"]), "is in generation 0, not 1", id="generation"),
        pytest.param(PlanMove(ShardId(0), 0, ["n1", "n1"]), "are not different nodes", id="twice"),
    ],
)
def test_what_makes_no_sense_changes_nothing(message: Message, why: str) -> None:
    membership = formed()
    before = membership.to_plain()
    with pytest.raises((BadRequest, Conflict), match=why):
        membership.change(message)
    assert membership.to_plain() == before


def test_asking_to_join_again_changes_nothing_more() -> None:
    """The ticket tells a node that asks again, its answer lost, from another of the same name."""
    membership = formed()
    asked = SetMember("n4", "h:4", zone="z", ticket="mine")
    membership.change(asked)
    before = dict(membership.members)
    membership.change(asked)
    assert membership.members == before and before["n4"].number == 3
    with pytest.raises(Conflict):
        membership.change(SetMember("n4", "h:4", ticket="another"))
    membership.change(SetMember("n4", "h:5", client="c:1"))
    assert (membership.members["n4"].peer, membership.members["n4"].zone) == ("h:5", "z")


def test_numbers_are_different_and_few() -> None:
    """A number is free again when its node is gone from the cluster, and there is none for one too many."""
    membership = formed()
    for number in range(3, MEMBERS_MAX):
        membership.change(SetMember(f"m{number}", f"m:{number}", ticket="t"))
    assert sorted(one.number for one in membership.members.values()) == list(range(MEMBERS_MAX))
    with pytest.raises(BadRequest, match="at most 64 nodes"):
        membership.change(SetMember("more", "m:0", ticket="t"))
    membership.change(SetMember("m7", "m:7", state=MemberState.DRAINING))
    membership.change(RemoveMember("m7"))
    membership.change(SetMember("more", "m:0", ticket="t"))
    assert membership.members["more"].number == 7


def test_only_who_is_leaving_is_removed() -> None:
    membership = formed()
    membership.change(SetMember("n4", "h:4", ticket="t", replaces="n1"))
    assert membership.members["n1"].state is MemberState.DRAINING
    for shard in list(membership.placements):
        membership.change(PlanMove(shard, 0, ["n2", "n3", "n4"]))
        with pytest.raises(Conflict, match="holds"):
            membership.change(RemoveMember("n1"))
        membership.change(Moved(shard, 1, ["n2", "n3", "n4"], 5))
    membership.change(RemoveMember("n1"))
    assert list(membership.members) == ["n2", "n3", "n4"] and membership.members["n4"].replaces == ""
    membership.change(SetMember("n5", "h:5", ticket="t"))
    with pytest.raises(Conflict, match="is active: drain it first"):
        membership.change(RemoveMember("n5"))


def test_asking_to_join_again_is_no_mistake_when_the_replaced_node_is_gone() -> None:
    """The answer was lost, and what was asked for has been done meanwhile."""
    membership = formed()
    asked = SetMember("n4", "h:4", ticket="mine", replaces="n1")
    membership.change(asked)
    for shard in list(membership.placements):
        membership.change(Moved(shard, 1, ["n2", "n3", "n4"], 5))
    membership.change(RemoveMember("n1"))
    before = dict(membership.members)
    membership.change(asked)
    assert membership.members == before
    with pytest.raises(BadRequest, match="cannot replace n1"):
        membership.change(SetMember("n5", "h:5", ticket="another", replaces="n1"))


def test_who_stays_after_all_is_not_replaced() -> None:
    membership = formed()
    membership.change(SetMember("n4", "h:4", ticket="t", replaces="n1"))
    membership.change(SetMember("n1", "h:1", client="c:1"))
    assert membership.members["n1"].is_replaced
    membership.change(SetMember("n1", "h:1", state=MemberState.ACTIVE))
    assert not membership.members["n1"].is_replaced


def test_it_comes_back_from_a_checkpoint() -> None:
    membership = formed()
    for message in (SetMember("n4", "h:4", zone="z", ticket="t", replaces="n2"), PauseMoves(True)):
        membership.change(message)
    membership.change(PlanMove(ShardId(1), 0, ["n1", "n4"]))
    membership.change(Moved(ShardId(2), 3, ["n1", "n3"], 17))
    again = Membership.from_plain(membership.to_plain())
    assert again.to_plain() == membership.to_plain() == membership.copy().to_plain()
    assert again.members == membership.members and again.placements == membership.placements
