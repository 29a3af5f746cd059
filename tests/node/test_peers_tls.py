"""TLS between nodes: the authority and the name in the certificate decide, before a byte of ours is looked at."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

import pytest

from node import peer_link
from node.handshake import Verdict
from node.peer_tls import TlsFiles
from tests.node.peer_pair import SECRET, Host, Stranger, free_addresses, run, until
from tests.process.authority import Authority as Signer
from tests.process.authority import needs_openssl

pytestmark = needs_openssl


class Authority:
    """Signs certificates for nodes."""

    def __init__(self, directory: Path, name: str) -> None:
        self._signer = Signer(directory, name)

    def sign(self, node: str, *, common: str = "", days: int = 2, file: str = "") -> TlsFiles:
        """Return the files of a node: its name is a DNS name of the certificate, or its common name."""
        names = () if common else (f"DNS:{node}",)
        file = f"{self._signer.name}-{file or node}"
        certificate, key = self._signer.sign(file, *names, days=days, common=common or "a node")
        return TlsFiles(str(certificate), str(key), str(self._signer.certificate))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.mark.parametrize(("secret", "slice_s"), [("", 0.005), (SECRET, 0.0)])
def test_nodes_with_certificates_meet(
    authority: Authority, secret: str, slice_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With or without a secret besides, frames of all sizes go through."""
    monkeypatch.setattr(peer_link, "SLICE_S", slice_s)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        tls = authority.sign("n1"), authority.sign("n2", common="n2")
        async with (
            Host("n1", addresses, tls=tls[0], secret=secret) as one,
            Host("n2", addresses, tls=tls[1], secret=secret) as two,
        ):
            await one.meets("n2")
            await two.meets("n1")
            blobs = [os.urandom(size) for size in (0, 1, 100_000, 3_000_000)]
            assert one.send("n2", 5, blobs) and two.send("n1", 6, blobs)
            assert all(one.send("n2", number) for number in range(1_000, 2_000))
            await until(lambda: [m[2]["n"] for m in two.diary.messages][-1_000:] == list(range(1_000, 2_000)))
            for host, number in ((two, 5), (one, 6)):
                await until(lambda host=host: len([1 for m in host.diary.messages if m[3]]) == 1)  # type: ignore[misc]
                ((_, _, header, got),) = [m for m in host.diary.messages if m[3]]
                assert header["n"] == number and got == blobs

    run(story())


def test_a_certificate_of_another_name_is_refused(authority: Authority) -> None:
    """A node cannot pose as another of the cluster, in neither direction."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2", "n3")
        thief = authority.sign("n2")
        async with Host("n2", addresses, tls=thief) as host, Host("n1", addresses, tls=thief) as poser:
            await until(lambda: host.refused(Verdict.CERTIFICATE.label) >= 1)
            await until(lambda: poser.refused(Verdict.CERTIFICATE.label) >= 1)
            assert not host.network.is_up("n1") and not poser.network.is_up("n2")
        async with Host("n1", addresses, tls=authority.sign("n1")) as host, Host("n3", addresses, tls=thief):
            await until(lambda: host.refused(Verdict.CERTIFICATE.label) >= 2)
            assert not host.network.is_up("n3")

    run(story())


def test_another_authority_s_certificate_is_refused(authority: Authority, other_authority: Authority) -> None:
    """The right name is worth nothing if a stranger's authority signed it, and the secret does not help."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with (
            Host("n1", addresses, tls=other_authority.sign("n1")) as one,
            Host("n2", addresses, tls=authority.sign("n2")) as two,
        ):
            await until(lambda: one.refused("tls") >= 2)
            assert not one.network.is_up("n2") and not two.network.is_up("n1")
            assert "TLS" in one.network.states()[0].trouble

    run(story())


def test_plain_and_tls_do_not_mix(authority: Authority) -> None:
    """A node without TLS gets nothing from one with it, nor the other way round, whatever secret it has."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses), Host("n2", addresses, tls=authority.sign("n2")) as two:
            await until(lambda: two.refused("tls") >= 1)
            assert two.diary.entries == []
        async with Host("n1", addresses, tls=authority.sign("n1")) as one, Host("n2", addresses):
            await until(lambda: "TLS" in one.network.states()[0].trouble)
            assert one.diary.entries == []

    run(story())


def test_a_client_without_a_certificate_is_refused(authority: Authority) -> None:
    """Knowing the secret is not enough where TLS is on."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses, tls=authority.sign("n2")) as host:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            stranger = Stranger(*await asyncio.open_connection(*addresses["n2"], ssl=context))
            assert await stranger.pose_as("n1", "n2") is None
            await until(lambda: host.refused("tls") >= 1)
            assert host.diary.entries == []

    run(story())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"certificate": "nothing.crt"}, "cannot read the file nothing.crt", id="no-file"),
        pytest.param({"key": "other"}, "is not that of the first certificate in", id="another-s-key"),
        pytest.param({"authority": "nothing.crt"}, "cannot read the file nothing.crt", id="no-authority"),
        pytest.param({"authority": "garbage"}, "holds no certificates", id="garbage"),
    ],
)
def test_files_that_do_not_fit_are_named(
    authority: Authority, change: dict[str, str], words: str, tmp_path: Path
) -> None:
    """The error at the start says which file is wrong."""
    files = authority.sign("n1")
    (tmp_path / "garbage").write_text("not a certificate")
    values = {
        "certificate": files.certificate, "key": files.key, "authority": files.authority, **change,
    }  # fmt: skip
    if values["key"] == "other":
        values["key"] = authority.sign("n2").key
    if values["authority"] == "garbage":
        values["authority"] = str(tmp_path / "garbage")
    with pytest.raises(OSError, match=words):
        Host("n1", free_addresses("n1", "n2"), tls=TlsFiles(**values))
