"""How a node joins a running cluster: what the newcomer asks, and what a member answers.

    newcomer                                              member
      HTTP  /v2/annulus/nodes/entry        ------->       its name, and its address for other nodes
      that address: handshake as a guest   ------->       proof of secret or certificate, both ways
      what it is, with a ticket            ------->       proposes it to the control group
                                           <-------       the cluster: its id and form, all nodes and their addresses

The ticket is made up and written down by the newcomer's directory before it asks: if the answer is lost it asks again
with it, and is the same node. Then it writes down whose it is, and is a node like any other. It has taken part in
nothing yet, so it has nothing to remember; it follows the control group, and the shards that the coordinator gives it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cluster.membership import SetMember
from node.certificates import asking_context, load_chain
from node.client_tls import WHAT
from node.clock import Clock, SystemClock
from node.guard import entry_token
from node.handshake import INCARNATION_BYTES, NONCE_BYTES, Handshake, Proven, Refused, Verdict, dial
from node.handshake import Identity as Proof
from node.identity import Identity
from node.members import own_facts
from node.network import Frame, Link, encode_message
from node.peer_link import PeerLink
from node.peer_tls import TlsFiles, load_tls
from node.settings import Address, ApiSettings, Settings, parse_address
from storage.errors import AnnulusError, Conflict, InvalidParameter, NoLeader, StorageFault, Unavailable, error_from

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

ENTRY: Final = "/v2/annulus/nodes/entry"
ANSWER_S_MAX: Final = 25.0
TRY_S_MAX: Final = 20.0
"""How long a newcomer tries on for reasons that pass."""
RETRY_S: Final = 0.5
TEXT_CHARS_MAX: Final = 255


class CannotJoin(StorageFault):
    """Why this node does not become one of the cluster, in words for a person."""

    code = "cannot_join"


# the member's side


async def admit(node: Node, name: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a newcomer has to know, after the control group has taken it up.

    name      what it proved its name to be
    question  {"peer", "client", "zone", "replaces", "ticket"}, all of them text

    Raises Conflict or InvalidParameter if it cannot be a node of the cluster, Unavailable if it might later.
    """
    facts = {key: question.get(key) for key in ("peer", "client", "zone", "replaces", "ticket")}
    if any(type(fact) is not str or len(fact) > TEXT_CHARS_MAX for fact in facts.values()) or not facts["ticket"]:
        raise InvalidParameter("a node that joins tells its addresses, its zone and a ticket")
    try:
        address = parse_address(str(facts["peer"]))
    except ValueError as error:
        raise InvalidParameter(f"the address for other nodes, {facts['peer']!r}, {error}") from None
    membership = node.control.machine.membership
    if not node.identity.cluster_id or not membership.members:
        raise NoLeader("the cluster is about to be formed")
    if not address.is_local and all(parse_address(one.peer).is_local for one in membership.members.values()):
        raise InvalidParameter(
            f"the nodes of this cluster are all on one machine, where {address} cannot find them: give them addresses "
            "that other machines reach first"
        )
    known = membership.members.get(name)
    if known is not None and known.ticket != facts["ticket"]:
        raise Conflict(
            f"there is a node {name} in the cluster already, at {known.peer}: give this one another --name; if it is "
            f"that node with an empty directory, join with another --name and --replaces {name}"
        )
    await node.router.control_change(SetMember(name, **{key: str(fact) for key, fact in facts.items()}))
    log.info("a node joins name=%s peer=%s zone=%s replaces=%s", name, address, facts["zone"], facts["replaces"])
    identity, membership = node.identity, node.control.machine.membership
    return {
        "cluster_id": identity.cluster_id,
        "shards": identity.shards,
        "copies": identity.copies,
        "members": list(identity.members),
        "epoch": membership.epoch,
        "peers": {one.name: one.peer for one in membership.members.values()},
    }


# the newcomer's side


async def join(settings: Settings, ticket: str) -> Identity:
    """Return whose directory this is from now on. Raises CannotJoin."""
    node = settings.node
    assert node.join is not None
    clock = SystemClock()
    until_s = clock.monotonic_s() + TRY_S_MAX
    while True:
        try:
            found = await _ask(settings, clock, ticket)
            break
        except Conflict as error:
            raise CannotJoin(f"cannot join by {node.join}: {error.message}") from error
        except Unavailable as error:
            if clock.monotonic_s() >= until_s:
                raise CannotJoin(f"cannot join by {node.join}: {error.message}") from error
            log.info("cannot join yet: %s", error.message)
        except (AnnulusError, Refused) as error:
            if isinstance(error, Refused) and error.verdict is Verdict.CROWDED and clock.monotonic_s() < until_s:
                await asyncio.sleep(RETRY_S)
                continue
            why = error.message if isinstance(error, AnnulusError) else str(error)
            raise CannotJoin(f"cannot join by {node.join}: {why}") from error
        await asyncio.sleep(RETRY_S)
    log.info("joined cluster=%s by=%s nodes=%s", found["cluster_id"], node.join, ",".join(found["peers"]))
    return belonging(node.name, ticket, found)


def belonging(name: str, ticket: str, found: Mapping[str, Any]) -> Identity:
    """Return the identity of a node that was let in, from what `admit` has answered."""
    return Identity(
        node=name,
        shards=found["shards"],
        members=tuple(found["members"]),
        copies=found["copies"],
        cluster_id=found["cluster_id"],
        peers=found["peers"],
        epoch=found["epoch"],
        ticket=ticket,
    )


async def _ask(settings: Settings, clock: Clock, ticket: str) -> Mapping[str, Any]:
    """Return a member's answer. Raises Refused, Unavailable for what may pass, or whatever the member refuses with."""
    node, cluster = settings.node, settings.cluster
    assert node.join is not None
    member, peer = await _find_entry(node.join, entry_token(node.cluster_secret), settings.api)
    if member == node.name:
        raise InvalidParameter(f"the node there is {member} too: give this one another --name")
    tls = None
    if cluster.tls_certificate_file:
        files = TlsFiles(cluster.tls_certificate_file, cluster.tls_key_file, cluster.tls_ca_file)
        tls = load_tls(files, ssl.PROTOCOL_TLS_CLIENT)
    proof = Proof.make(node.name, "", node.cluster_secret, os.urandom(INCARNATION_BYTES))
    asking = _Asking(clock)
    link = PeerLink(asking, dial(proof, member, Link.SMALL, os.urandom(NONCE_BYTES), is_guest=True), member)
    question = {**own_facts(node), "replaces": node.replaces, "ticket": ticket}
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await asyncio.get_running_loop().create_connection(lambda: link, *peer, ssl=tls)
            if (error := await link.outcome) is not None:
                raise error
            link.write(encode_message(question))
            answer = await asking.answer
    except ssl.SSLError as error:
        raise InvalidParameter(f"TLS with node {member} fails: {error.reason or error}") from error
    except TimeoutError:
        raise Unavailable(f"node {member} at {peer} does not answer") from None
    except ConnectionResetError as error:
        raise Unavailable(f"node {member} at {peer} ends the connection: do both use TLS, or neither?") from error
    except OSError as error:
        raise Unavailable(
            f"node {member} cannot be reached at its address for other nodes, {peer}: {error.strerror or error}"
        ) from error
    finally:
        link.abort()
    match answer:
        case {"answer": dict(found)}:
            return found
        case {"refused": [str(code), str(message)]}:
            raise error_from(code, message)
    raise InvalidParameter(f"node {member} answers what this program does not understand: run the same version on both")


async def _find_entry(address: Address, credentials: str, api: ApiSettings) -> tuple[str, Address]:
    """Return name and peer address of the node that serves clients at an address."""
    import aiohttp  # here: what serves clients imports it too, but a start need not wait for that

    headers = {"Authorization": credentials} if credentials else {}
    limit = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
    tls = _entry_tls(api)
    url = f"{'https' if tls else 'http'}://{address}{ENTRY}"
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers) as client,
            client.post(url, json={}, ssl=tls or True) as answer,
        ):
            found, may_pass = await answer.json(content_type=None), "Retry-After" in answer.headers
    except (aiohttp.ClientError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise Unavailable(f"no node answers there ({why}): give the client address of a node that runs") from error
    except (TimeoutError, ValueError) as error:
        raise InvalidParameter("what answers there is no node of Annulus") from error
    match found:
        case {"code": 0, "data": {"node": str(name), "peer": str(peer)}}:
            return name, parse_address(peer)
        case {"code": int(), "message": str(message)}:
            raise (Unavailable if may_pass else InvalidParameter)(message)
    raise InvalidParameter("what answers there is no node of Annulus, or one of another version")


def _entry_tls(api: ApiSettings) -> ssl.SSLContext | None:
    """Return how to ask a node of a cluster whose clients come by TLS, as this node's will."""
    if not api.tls_certificate_file:
        return None
    context = asking_context(api.tls_ca_file, WHAT)
    load_chain(context, api.tls_certificate_file, api.tls_key_file, WHAT)  # where clients must show one
    return context


class _Asking:
    """The one connection of a newcomer: it asks one thing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    def accept_handshake(self, connection: PeerLink) -> Handshake:
        raise AssertionError("a newcomer listens to nobody yet")

    def establish(self, connection: PeerLink, proven: Proven) -> bool:
        return True

    def lost(self, connection: PeerLink, proven: Proven, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionAbortedError(f"it ended the connection: {reason}"))

    def message_came(self, proven: Proven, frame: Frame) -> None:
        if not self.answer.done():
            self.answer.set_result(frame.header)

    def round_trip(self, peer: str, seconds: float) -> None: ...

    def refuse(self, who: str, reason: str, text: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionAbortedError(text))

    def say_duplicate(self, peer: str) -> None: ...
