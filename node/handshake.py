"""How two nodes prove themselves to each other, before anything else of a connection is looked at.

    dialer                                 acceptor
      hello      212 bytes   ------------->             who, to whom, cluster, link, nonce
                             <-------------  hello      the same of the acceptor, and a verdict
      proof       32 bytes   ------------->             HMAC over both hellos
                             <-------------  welcome    a verdict, and the acceptor's own HMAC

The proofs cover every byte of both hellos, so also both nonces: none can be replayed, and none can be reflected, as
the two roles are labelled. Whoever listens learns no secret; how hard a weak one is to guess is made harder by scrypt.
Everything has a fixed size, and nothing is trusted or shown before it is checked.

A proof says who opened the connection. Keeping others from changing bytes on their way is TLS's part.

A cluster is known by an id that it gives itself when it is formed: nodes of two clusters refuse each other, also with
the same names and the same secret. Who does not know it yet is known by what it was configured with to form the
cluster, which all that form it must agree on. Who joined later was not configured with any of it, and knows the id.

A guest is a node that wants to join: nobody knows its name yet. It proves itself like all others, and may then ask one
thing (`node/joining.py`); it has no session.

The sides are generators without I/O: they yield what to send and how many bytes to wait for.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from node.network import VERSION, Link

MAGIC: Final = b"annulus\0"
NAME_PATTERN: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
NONCE_BYTES: Final = 32
INCARNATION_BYTES: Final = 8
SCRYPT_COST: Final = 1 << 14
"""16 MiB and some 40 ms, once for each start."""
SCRYPT_SALT: Final = b"annulus nodes"
"""The same everywhere: a node that joins knows nothing of its cluster but the secret."""

_HELLO: Final = struct.Struct("<8sHBB8s16s16s64s64s32s")
"""magic, version, verdict, link, incarnation, formation, cluster id, from, to, nonce. Size, magic, version and verdict
stay where they are in all versions, so that different ones can tell each other."""
HELLO_BYTES: Final = _HELLO.size
_WELCOME: Final = struct.Struct("<B32s")
_PROOF_BYTES: Final = 32
_LINKS: Final = (Link.SMALL, Link.BULK)
_GUEST: Final = len(_LINKS)
"""What a guest says in the place of a link."""


class Verdict(IntEnum):
    """What the acceptor says to a hello or proof."""

    WELCOME = 0
    NOT_OURS = 1
    VERSION = 2
    CLUSTER = 3
    NAME = 4
    ADDRESS = 5
    PROOF = 6
    DUPLICATE = 7
    NO_SESSION = 8
    CERTIFICATE = 9
    CROWDED = 10

    @property
    def label(self) -> str:
        """The name under which refusals are counted."""
        return f"hello_{self.name.lower()}"


ADVICE: Final = {
    Verdict.NOT_OURS: "what came is no hello of Annulus: is the port a node's port for other nodes?",
    Verdict.VERSION: "the nodes speak different versions of the protocol: run the same version on all",
    Verdict.CLUSTER: "the nodes are of different clusters: names in peers, shards and replication_factor must agree, "
    "and so must the data directories",
    Verdict.NAME: "the name is not one of a node that may dial here: it is not a node of the cluster, as far as known",
    Verdict.ADDRESS: "another node answers there: each peer's address must lead to the node of that name",
    Verdict.PROOF: "the proof does not fit: cluster_secret must be the same on all nodes",
    Verdict.DUPLICATE: "there is a session with another process of that name: is it started twice?",
    Verdict.NO_SESSION: "the bulk link came without a session",
    Verdict.CROWDED: "it has no time for nodes that want to join: try again in a while",
    Verdict.CERTIFICATE: "the certificate is of another name: a node's certificate must bear the node's name",
}


class Refused(Exception):  # not an AnnulusError: no client ever sees it
    """The other side is not let in, or does not let us in; `answer` is what it is told before the end."""

    def __init__(self, verdict: Verdict, text: str = "", *, answer: bytes = b"") -> None:
        super().__init__(text or ADVICE[verdict])
        self.verdict = verdict
        self.answer = answer


@dataclass(frozen=True)
class Identity:
    """Who this process is. `incarnation` is different in every process that ever has the name."""

    name: str
    formation: bytes
    """Zeros of a node that joined."""
    key: bytes = field(repr=False)
    incarnation: bytes
    find_cluster_id: Callable[[], str] = field(default=lambda: "", repr=False)

    @classmethod
    def make(
        cls, name: str, formation: str, secret: str, incarnation: bytes, cluster_id: Callable[[], str] = lambda: ""
    ) -> Identity:
        """Return the identity.

        formation   any text that nodes have in common that form a cluster; "" of a node that joins one
        cluster_id  returns the id that the cluster gave itself, "" while it is not known here
        """
        assert NAME_PATTERN.fullmatch(name.encode()) and len(incarnation) == INCARNATION_BYTES
        key = hashlib.scrypt(secret.encode(), salt=SCRYPT_SALT, n=SCRYPT_COST, r=8, p=1, dklen=32) if secret else b""
        return cls(name, _digest(formation), key, incarnation, cluster_id)

    @property
    def cluster_id(self) -> bytes:
        """Zeros while it is not known."""
        return _digest(self.find_cluster_id())


@dataclass(frozen=True)
class Proven:
    """What is known of the other side after the handshake."""

    peer: str
    link: Link
    incarnation: bytes
    is_guest: bool = False


@dataclass(frozen=True)
class Turn:
    """What to send, and how many bytes of an answer are wanted."""

    send: bytes
    want: int


Handshake = Generator[Turn, bytes, Proven]


def dial(me: Identity, peer: str, link: Link, nonce: bytes, *, is_guest: bool = False) -> Handshake:
    """Prove ourselves to the peer, then have it prove itself. Raises Refused."""
    hello = _hello(me, peer, link, nonce, is_guest=is_guest)
    answer = yield Turn(hello, _HELLO.size)
    theirs = _parse(answer)
    if theirs.verdict is not Verdict.WELCOME:
        raise Refused(theirs.verdict, f"it refuses us: {ADVICE[theirs.verdict]}")
    _check_alike(me, theirs)
    if theirs.name != peer or theirs.link is not link or theirs.is_guest != is_guest:
        raise Refused(Verdict.ADDRESS)
    welcome = yield Turn(_proof(me, b"dialer", hello, answer), _WELCOME.size)
    code, proof = _WELCOME.unpack(welcome)
    if code:
        verdict = _verdict(code)
        raise Refused(verdict, f"it refuses us: {ADVICE[verdict]}")
    if not hmac.compare_digest(proof, _proof(me, b"acceptor", hello, answer)):
        raise Refused(Verdict.PROOF)
    return Proven(peer, link, theirs.incarnation, is_guest)


def accept(
    me: Identity, nonce: bytes, *, knows: Callable[[str], bool], admit: Callable[[Proven], Verdict]
) -> Handshake:
    """Have the dialer prove itself, then prove ourselves. Raises Refused.

    `knows(name)` tells whether a node of that name may dial, unless as a guest; `admit` may refuse one that has proved
    itself.
    """
    hello = yield Turn(b"", _HELLO.size)
    try:
        theirs = _parse(hello)
        _check_alike(me, theirs)
        if theirs.to != me.name:
            raise Refused(Verdict.ADDRESS, f"it wants to reach {theirs.to}: {ADVICE[Verdict.ADDRESS]}")
        if not theirs.is_guest and not knows(theirs.name):
            raise Refused(Verdict.NAME, f"{theirs.name}: {ADVICE[Verdict.NAME]}")
    except Refused as error:
        if error.verdict is not Verdict.NOT_OURS:
            error.answer = _hello(me, "", Link.SMALL, bytes(NONCE_BYTES), error.verdict)
        raise
    answer = _hello(me, theirs.name, theirs.link, nonce, is_guest=theirs.is_guest)
    proof = yield Turn(answer, _PROOF_BYTES)
    proven = Proven(theirs.name, theirs.link, theirs.incarnation, theirs.is_guest)
    verdict = Verdict.PROOF
    if hmac.compare_digest(proof, _proof(me, b"dialer", hello, answer)):
        verdict = admit(proven)
    if verdict is not Verdict.WELCOME:
        raise Refused(verdict, f"{theirs.name}: {ADVICE[verdict]}", answer=_WELCOME.pack(verdict, bytes(_PROOF_BYTES)))
    yield Turn(_WELCOME.pack(verdict, _proof(me, b"acceptor", hello, answer)), 0)
    return proven


@dataclass(frozen=True)
class _Hello:
    verdict: Verdict
    version: int
    link: Link
    is_guest: bool
    incarnation: bytes
    formation: bytes
    cluster_id: bytes
    name: str
    to: str


def _hello(
    me: Identity, to: str, link: Link, nonce: bytes, verdict: Verdict = Verdict.WELCOME, *, is_guest: bool = False
) -> bytes:
    assert len(nonce) == NONCE_BYTES
    number = _GUEST if is_guest else _LINKS.index(link)
    names = me.name.encode(), to.encode()
    return _HELLO.pack(MAGIC, VERSION, verdict, number, me.incarnation, me.formation, me.cluster_id, *names, nonce)


def dialer_of(hello: bytes) -> str:
    """Return the name in the first HELLO_BYTES of a connection between nodes; it is not proven. Raises Refused."""
    return _parse(hello).name


def _parse(data: bytes) -> _Hello:
    """Return the hello in the bytes. Raises Refused for another version, or for what is none."""
    magic, version, code, link, incarnation, formation, cluster_id, name, to, _ = _HELLO.unpack(data)
    if magic != MAGIC:
        raise Refused(Verdict.NOT_OURS)
    if version != VERSION:
        text = f"its version is {version}, ours {VERSION}: {ADVICE[Verdict.VERSION]}"
        raise Refused(Verdict.VERSION, text)
    verdict = _verdict(code)
    if link > _GUEST:
        raise Refused(Verdict.NOT_OURS)
    names = _name(name), "" if verdict else _name(to)
    is_guest = link == _GUEST
    return _Hello(
        verdict, version, Link.SMALL if is_guest else _LINKS[link], is_guest, incarnation, formation, cluster_id, *names
    )


def _verdict(code: int) -> Verdict:
    try:
        return Verdict(code)
    except ValueError:
        raise Refused(Verdict.NOT_OURS) from None


def _name(padded: bytes) -> str:
    name = padded.rstrip(b"\0")
    if not NAME_PATTERN.fullmatch(name):
        raise Refused(Verdict.NOT_OURS)
    return name.decode()


def _check_alike(me: Identity, theirs: _Hello) -> None:
    if any(theirs.cluster_id) and any(me.cluster_id):
        if theirs.cluster_id != me.cluster_id:
            raise Refused(
                Verdict.CLUSTER,
                f"{theirs.name} has the data of another cluster: one of the two has the wrong data directory, or the "
                "wrong addresses of other nodes",
            )
    elif any(theirs.formation) and any(me.formation) and theirs.formation != me.formation:
        raise Refused(Verdict.CLUSTER, f"{theirs.name}: {ADVICE[Verdict.CLUSTER]}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16] if text else bytes(16)


def _proof(me: Identity, role: bytes, dialers: bytes, acceptors: bytes) -> bytes:
    return hmac.digest(me.key, b"annulus proof of " + role + b"\0" + dialers + acceptors, "sha256")
