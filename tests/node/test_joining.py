"""A newcomer proves itself over real sockets and asks its one question; whoever cannot prove itself asks nothing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from node import joining
from node.handshake import Refused, Verdict
from node.joining import CannotJoin, join
from node.peer_tls import TlsFiles
from node.settings import Address, ApiSettings, ClusterSettings, NodeSettings, Settings
from storage.errors import AnnulusError, Conflict, InvalidParameter, NoLeader, Unavailable
from tests.node.peer_pair import SECRET, Host, free_addresses, run
from tests.node.test_peers_tls import Authority
from tests.process.authority import Authority as Signer
from tests.process.authority import Files, needs_openssl

ANSWER = {
    "cluster_id": "c",
    "shards": 4,
    "copies": 3,
    "members": ["n1"],
    "epoch": 7,
    "peers": {"n1": "a:1", "n4": "b:1"},
}


def settings(secret: str = SECRET, tls: TlsFiles | None = None) -> Settings:
    node = NodeSettings(
        name="n4", join=Address("127.0.0.1", 1), peer_listen=Address("127.0.0.1", 2), zone="z", cluster_secret=secret
    )
    if tls is None:
        return Settings(node=node)
    files = ClusterSettings(tls_certificate_file=tls.certificate, tls_key_file=tls.key, tls_ca_file=tls.authority)
    return Settings(node=node, cluster=files)


def meeting(
    monkeypatch: pytest.MonkeyPatch,
    story: Callable[[Host, list[tuple[str, Mapping[str, Any]]]], Awaitable[None]],
    answer: Mapping[str, Any] | AnnulusError = ANSWER,
    *,
    secret: str = SECRET,
    tls: TlsFiles | None = None,
) -> None:
    """Run the story with a member that answers so, and where it writes down what it is asked."""

    async def everything() -> None:
        addresses = free_addresses("n1")
        asked: list[tuple[str, Mapping[str, Any]]] = []

        async def handler(name: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
            asked.append((name, question))
            if isinstance(answer, AnnulusError):
                raise answer
            return answer

        async def find_entry(address: Address, credentials: str, api: ApiSettings) -> tuple[str, Address]:
            return "n1", addresses["n1"]

        monkeypatch.setattr(joining, "_find_entry", find_entry)
        async with Host("n1", addresses, secret=secret, tls=tls) as member:
            member.network.on_guest = handler
            await story(member, asked)

    run(everything())


def test_a_newcomer_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One question with its ticket, one answer, no session; and its directory is then a node's that has joined."""

    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        identity = await join(settings(), "ticket")
        question = {"peer": "127.0.0.1:2", "client": "127.0.0.1:19530", "zone": "z", "replaces": "", "ticket": "ticket"}
        assert asked == [("n4", question)]
        assert (identity.node, identity.cluster_id, identity.members, identity.shards) == ("n4", "c", ("n1",), 4)
        assert (identity.epoch, identity.peers, identity.ticket) == (7, ANSWER["peers"], "ticket")
        assert identity.has_joined and not identity.is_seated
        assert not member.network.is_up("n4") and member.diary.entries == []

    meeting(monkeypatch, story)


@pytest.mark.parametrize("secret", ["another one entirely", ""])
def test_without_the_secret_nothing_is_asked(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        with pytest.raises(CannotJoin, match="cluster_secret must be the same"):
            await join(settings(secret), "ticket")
        assert asked == [] and member.refused(Verdict.PROOF.label) == 1

    meeting(monkeypatch, story)


@pytest.mark.parametrize("error", [Conflict("there is a node n4 already"), InvalidParameter("n9 is nobody")])
def test_a_refusal_is_told_as_it_was_said(error: AnnulusError, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        with pytest.raises(CannotJoin, match=error.message):
            await join(settings(), "ticket")
        assert len(asked) == 1

    meeting(monkeypatch, story, error)


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster without a leader just now is asked again, with the same ticket, until the time is up."""
    monkeypatch.setattr(joining, "RETRY_S", 0.01)
    monkeypatch.setattr(joining, "TRY_S_MAX", 2.0)

    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        with pytest.raises(CannotJoin, match="no leader now"):
            await join(settings(), "ticket")
        assert len(asked) > 1 and {question["ticket"] for _, question in asked} == {"ticket"}

    meeting(monkeypatch, story, NoLeader("no leader now"))


def test_a_member_that_is_not_ready_for_guests_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        member.network.on_guest = None
        with pytest.raises(Refused) as refused:
            await joining._ask(settings(), member.network.clock, "ticket")
        assert refused.value.verdict is Verdict.CROWDED and asked == []

    meeting(monkeypatch, story)


def test_only_so_many_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests that wait for their answer keep others out, not the nodes of the cluster."""

    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        gate = asyncio.Event()

        async def slow(name: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
            await gate.wait()
            return ANSWER

        member.network.on_guest = slow
        clock = member.network.clock
        guests = [asyncio.create_task(joining._ask(settings(), clock, str(number))) for number in range(12)]
        await asyncio.wait(guests, return_when=asyncio.FIRST_COMPLETED)  # one that was refused: nobody has an answer
        gate.set()
        await asyncio.wait(guests)
        failed = [task for task in guests if task.exception() is not None]
        assert 0 < len(failed) <= 12 - 4 and all(isinstance(task.exception(), Refused) for task in failed)
        assert await joining._ask(settings(), clock, "later") == ANSWER

    meeting(monkeypatch, story)


@needs_openssl
def test_the_entry_is_asked_over_tls(tmp_path: Path) -> None:
    """Who has a certificate for clients asks over TLS, shows it, and trusts the authority that it is told of alone."""
    signer, other = Signer(tmp_path / "ours", "ours"), Signer(tmp_path / "theirs", "theirs")
    member, newcomer = signer.sign("n1", "IP:127.0.0.1"), signer.sign("n4", "IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(signer.certificate))
    context.load_cert_chain(*member)
    context.verify_mode = ssl.CERT_REQUIRED

    def settings_of(files: Files, ca: Path) -> ApiSettings:
        certificate, key = map(str, files)
        return ApiSettings(tls_certificate_file=certificate, tls_key_file=key, tls_ca_file=str(ca))

    async def story() -> None:
        async def entry(request: web.Request) -> web.Response:
            return web.json_response({"code": 0, "data": {"node": "n1", "peer": "10.0.0.1:1"}})

        app = web.Application()
        app.router.add_post(joining.ENTRY, entry)
        server = TestServer(app, scheme="https")
        await server.start_server(ssl=context)
        try:
            address = Address("127.0.0.1", server.port or 0)
            found = await joining._find_entry(address, "", settings_of(newcomer, signer.certificate))
            assert found == ("n1", Address("10.0.0.1", 1))
            for api in (settings_of(newcomer, other.certificate), ApiSettings()):
                with pytest.raises((Unavailable, InvalidParameter)):
                    await joining._find_entry(address, "", api)
        finally:
            await server.close()

    asyncio.run(story())


@needs_openssl
def test_a_certificate_proves_as_well_as_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must be of the authority, and bear the newcomer's own name; without TLS nothing is asked."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    monkeypatch.setattr(joining, "TRY_S_MAX", 0.0)

    async def story(member: Host, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
        for tls in (ours.sign("n5"), theirs.sign("n4"), None):
            with pytest.raises(CannotJoin):
                await join(settings("", tls), "ticket")
        assert asked == []
        assert (await join(settings("", ours.sign("n4")), "ticket")).cluster_id == "c"

    meeting(monkeypatch, story, secret="", tls=ours.sign("n1"))
