"""The handshake: it lets in who has the secret and is whom it says, here and now, and nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.handshake import (
    HELLO_BYTES,
    INCARNATION_BYTES,
    NONCE_BYTES,
    Handshake,
    Identity,
    Proven,
    Refused,
    Turn,
    Verdict,
    accept,
    dial,
)
from node.network import VERSION, Link

SECRET = "a secret of the cluster"
N1 = Identity.make("n1", "c", SECRET, b"1" * INCARNATION_BYTES)
N2 = Identity.make("n2", "c", SECRET, b"2" * INCARNATION_BYTES)


def welcome(_: Proven) -> Verdict:
    return Verdict.WELCOME


def accepting(
    me: Identity = N2, names: str = "n1", admit: Callable[[Proven], Verdict] = welcome, nonce: bytes | None = None
) -> Handshake:
    return accept(me, nonce or os.urandom(NONCE_BYTES), knows=lambda name: name in names.split(), admit=admit)


def dialing(me: Identity = N1, peer: str = "n2", link: Link = Link.SMALL) -> Handshake:
    return dial(me, peer, link, os.urandom(NONCE_BYTES))


class Side:
    """One side of a conversation, as a connection drives it."""

    def __init__(self, handshake: Handshake) -> None:
        self._handshake = handshake
        self.sent = b""
        self.result: Proven | Refused | None = None
        self._turn = Turn(b"", 0)
        self._step(None)

    @property
    def want(self) -> int:
        return 0 if self.result else self._turn.want

    def hear(self, data: bytes) -> None:
        assert len(data) == self.want
        self._step(data)

    def _step(self, data: bytes | None) -> None:
        try:
            self._turn = next(self._handshake) if data is None else self._handshake.send(data)
            self.sent += self._turn.send
            if not self._turn.want:
                self._step(b"")
        except Refused as refused:
            self.sent += refused.answer
            self.result = refused
        except StopIteration as done:
            self.result = done.value


def talk(dialer: Handshake, acceptor: Handshake, change: Callable[[bytes, int], bytes] = lambda data, _: data) -> tuple[
    Side, Side
]:  # fmt: skip
    """Let two sides talk until neither can go on; `change` sees what the dialer (0) and the acceptor (1) say."""
    sides = Side(dialer), Side(acceptor)
    heard = [0, 0]
    moved = True
    while moved:
        moved = False
        for me in (0, 1):
            mine, other = sides[me], sides[1 - me]
            stream = change(other.sent, 1 - me)
            if mine.want and len(stream) - heard[me] >= mine.want:
                want = mine.want
                mine.hear(stream[heard[me] : heard[me] + want])
                heard[me] += want
                moved = True
    return sides


def verdict(side: Side) -> Verdict | None:
    return side.result.verdict if isinstance(side.result, Refused) else None


@pytest.mark.parametrize("link", list(Link))
def test_two_nodes_of_a_cluster_prove_themselves(link: Link) -> None:
    """Each side learns the other's name, link and incarnation."""
    dialer, acceptor = talk(dialing(link=link), accepting())
    assert dialer.result == Proven("n2", link, N2.incarnation)
    assert acceptor.result == Proven("n1", link, N1.incarnation)


@pytest.mark.parametrize(
    ("dialer", "acceptor", "reason"),
    [
        pytest.param(Identity.make("n1", "c", "another", b"1" * 8), N2, Verdict.PROOF, id="wrong-secret"),
        pytest.param(Identity.make("n1", "c", "", b"1" * 8), N2, Verdict.PROOF, id="no-secret"),
        pytest.param(N1, Identity.make("n2", "c", "", b"2" * 8), Verdict.PROOF, id="acceptor-without"),
        pytest.param(Identity.make("n1", "d", SECRET, b"1" * 8), N2, Verdict.CLUSTER, id="wrong-cluster"),
        pytest.param(Identity.make("n9", "c", SECRET, b"1" * 8), N2, Verdict.NAME, id="unknown-name"),
        pytest.param(N1, replace(N2, name="n3"), Verdict.ADDRESS, id="wrong-address"),
    ],
)
def test_others_are_refused_and_told_why(dialer: Identity, acceptor: Identity, reason: Verdict) -> None:
    """Both sides can say what is wrong, in words for a person, and no secret is among them."""
    sides = talk(dialing(dialer), accepting(acceptor))
    for side in sides:
        assert verdict(side) is reason
        assert SECRET not in str(side.result) and SECRET.encode() not in side.sent
    assert SECRET not in repr(dialer) and (not dialer.key or repr(dialer.key) not in repr(dialer))


@pytest.mark.parametrize(
    ("dialers", "acceptors", "fits"),
    [("", "", True), ("a", "", True), ("", "a", True), ("a", "a", True), ("a", "b", False)],
)
def test_the_cluster_s_own_id_must_agree_once_known(dialers: str, acceptors: str, fits: bool) -> None:
    """Nodes of two clusters with the same names and secret refuse each other; a new node knows no id yet."""
    sides = talk(
        dialing(replace(N1, find_cluster_id=lambda: dialers)), accepting(replace(N2, find_cluster_id=lambda: acceptors))
    )
    assert [verdict(side) for side in sides] == [None if fits else Verdict.CLUSTER] * 2


@pytest.mark.parametrize("ids", [("i", "i"), ("i", ""), ("", "i")])
def test_a_node_that_joined_was_configured_with_no_cluster(ids: tuple[str, str]) -> None:
    """It knows the id, or comes before the other does; its secret is the same though it formed nothing."""
    joined = Identity.make("n1", "", SECRET, b"1" * 8, lambda: ids[0])
    sides = talk(dialing(joined), accepting(replace(N2, find_cluster_id=lambda: ids[1])))
    assert [verdict(side) for side in sides] == [None, None]


def test_who_knows_the_id_need_not_be_configured_alike() -> None:
    """The list of peers may be older or newer on one of the nodes: the id says that they are of one cluster."""
    other = Identity.make("n1", "another list", SECRET, b"1" * 8, lambda: "i")
    sides = talk(dialing(other), accepting(replace(N2, find_cluster_id=lambda: "i")))
    assert [verdict(side) for side in sides] == [None, None]


def test_who_admits_may_refuse() -> None:
    """A proved dialer can still be turned away, with the reason."""
    dialer, acceptor = talk(dialing(), accepting(admit=lambda _: Verdict.DUPLICATE))
    assert verdict(dialer) is verdict(acceptor) is Verdict.DUPLICATE


def test_who_has_not_proved_itself_is_not_admitted() -> None:
    """`admit`, which may end another's session, is not asked before the proof."""

    def admit(_: Proven) -> Verdict:
        raise AssertionError("asked too early")

    sides = talk(dialing(Identity.make("n1", "c", "another", b"1" * 8)), accepting(admit=admit))
    assert verdict(sides[1]) is Verdict.PROOF


@pytest.mark.parametrize("side", [0, 1])
def test_versions_tell_each_other(side: int) -> None:
    """A hello of another version is answered, so that the other side can say so too."""

    def other_version(data: bytes, speaker: int) -> bytes:
        if speaker != side or len(data) < 10:
            return data
        return data[:8] + (VERSION + 1).to_bytes(2, "little") + data[10:]

    sides = talk(dialing(), accepting(), other_version)
    assert verdict(sides[1 - side]) is Verdict.VERSION
    if side == 0:
        assert verdict(sides[0]) is Verdict.VERSION


def test_a_recorded_conversation_proves_nothing() -> None:
    """Replaying all that a dialer said fails at an acceptor, whose nonce is new; and the other way round."""
    dialer, acceptor = talk(dialing(), accepting())
    again = Side(accepting())
    again.hear(dialer.sent[: again.want])
    again.hear(dialer.sent[-again.want :])
    assert verdict(again) is Verdict.PROOF
    victim = Side(dialing())
    victim.hear(acceptor.sent[: victim.want])
    victim.hear(acceptor.sent[-victim.want :])
    assert verdict(victim) is Verdict.PROOF


def test_a_proof_is_not_reflected() -> None:
    """What a dialer says is no answer to itself, even where hello and nonces are the same."""
    dialer = Side(dialing(N1, "n1"))
    dialer.hear(dialer.sent[:HELLO_BYTES])
    proof = dialer.sent[HELLO_BYTES:]
    assert len(proof) == 32
    dialer.hear(b"\0" + proof)
    assert verdict(dialer) is Verdict.PROOF


@pytest.mark.parametrize("hello", [dialing(replace(N2, name="n3"), "n1"), dialing(N2, "n1", Link.BULK)])
def test_a_dialer_talks_to_nobody_else(hello: Handshake) -> None:
    """Whoever answers with another name, or for another link, gets no proof to work with."""
    dialer = Side(dialing())
    said = dialer.sent
    dialer.hear(Side(hello).sent)
    assert verdict(dialer) is Verdict.ADDRESS and dialer.sent == said


def test_a_proof_for_one_link_is_none_for_another() -> None:
    """A man in the middle cannot turn a bulk link into a session, nor one node's name into another's."""

    def as_bulk(data: bytes, speaker: int) -> bytes:
        return data[:11] + b"\1" + data[12:] if speaker == 0 and len(data) > 12 else data

    sides = talk(dialing(), accepting(), as_bulk)
    assert not isinstance(sides[1].result, Proven)


@given(st.integers(0, HELLO_BYTES * 8 - 1), st.booleans())
def test_no_flipped_bit_of_a_hello_is_accepted(bit: int, of_acceptor: bool) -> None:
    """Every byte of both hellos is covered by both proofs."""

    def flip(data: bytes, speaker: int) -> bytes:
        if speaker != of_acceptor or len(data) < HELLO_BYTES:
            return data
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        return bytes(changed)

    sides = talk(dialing(), accepting(), flip)
    assert not any(isinstance(side.result, Proven) for side in sides)


@given(st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES), st.binary(min_size=32, max_size=32))
def test_noise_is_refused(hello: bytes, rest: bytes) -> None:
    """Random bytes are refused without a word, a hello of ours with noise in it without an exception."""
    for noise in (
        hello,
        b"annulus\0" + hello[8:],
        b"annulus\0" + VERSION.to_bytes(2, "little") + bytes(2) + hello[12:],
    ):
        stranger = Side(accepting())
        stranger.hear(noise)
        assert isinstance(stranger.result, Refused)
        dialer = Side(dialing())
        dialer.hear(noise)
        assert isinstance(dialer.result, Refused)
    acceptor = Side(accepting())
    acceptor.hear(Side(dialing()).sent)
    acceptor.hear(rest)
    assert verdict(acceptor) is Verdict.PROOF
