"""TLS for clients: REST and gRPC on one port, certificates renewed while it serves, and plain words for mistakes."""

from __future__ import annotations

import http.client
import json
import logging
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient, MilvusException

from node.certificates import load_authority, load_chain
from node.config import load
from node.settings import SettingsError
from tests.process.authority import Authority, Files, Secured, needs_openssl
from tests.process.running import PROGRAM, PROJECT, clean_environment, free_port, refused, until

pytestmark = needs_openssl
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
NAMES = ("DNS:localhost", "IP:127.0.0.1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


def secured(data: Path, authority: Authority, files: Files, **settings: str) -> Secured:
    made = Secured(
        data,
        settings={
            "shards": "2",
            "api.tls_certificate_file": str(files.certificate),
            "api.tls_key_file": str(files.key),
            **settings,
        },
    )
    made.authority = authority.certificate
    return made


@pytest.fixture(scope="module")
def node(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    files = authority.sign("node", *NAMES)
    place = tmp_path_factory.mktemp("secured")
    with secured(place / "data", authority, files, **{"auth.audit_file": str(place / "audit.jsonl")}) as running:
        yield running


def milvus(node: Secured, **options: Any) -> MilvusClient:
    return MilvusClient(uri=f"https://localhost:{node.port}", timeout=30, **options)


def test_both_interfaces_on_one_port(node: Secured) -> None:
    """pymilvus and REST do the same over TLS, with answers of megabytes too, and the audit log knows where they are."""
    client = milvus(node, secure=True, server_pem_path=str(node.authority), server_name="localhost")
    client.create_collection("both", dimension=8)
    rows = [{"id": i, "vector": [float(i)] * 8, "text": chr(97 + i % 26) * 8_000} for i in range(800)]
    assert client.insert("both", rows)["insert_count"] == len(rows)
    found = client.query("both", filter="id >= 0", output_fields=["text"], limit=1000)
    assert sorted((row["id"], row["text"]) for row in found) == [(row["id"], row["text"]) for row in rows]
    again = node.ask("/entities/query", collectionName="both", filter="id >= 0", outputFields=["text"], limit=1000)
    assert sorted((row["id"], row["text"]) for row in again) == [(row["id"], row["text"]) for row in rows]
    (hits,) = client.search("both", data=[[3.0] * 8], limit=1, search_params={"metric_type": "COSINE"})
    assert len(hits) == 1
    client.close()
    node.ask("/collections/drop", collectionName="both")
    audited = [json.loads(line) for line in (node.data.parent / "audit.jsonl").read_text().splitlines()]
    assert {"CreateCollection", "/v2/vectordb/collections/drop"} <= {one["operation"] for one in audited}
    assert {one["address"] for one in audited} == {"127.0.0.1"}


def test_a_copy_over_tls(node: Secured, tmp_path: Path) -> None:
    """`annulus copy` trusts what it is told to, for where it reads and for where it writes, and nothing else."""
    node.ask("/collections/create", collectionName="copied", dimension=2)
    node.ask("/entities/insert", collectionName="copied", data=[{"id": i, "vector": [i, 1.0]} for i in range(20)])
    node.ask("/databases/create", dbName="other")

    def copy(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*PROGRAM, "copy", "copied", "--from", f"https://localhost:{node.port}", *words]
        command += ["--address", f"https://localhost:{node.port}", "--database", "other", "--ca", str(node.authority)]
        environment = clean_environment() | {"PYTHONPATH": str(PROJECT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    stranger = copy()
    assert stranger.returncode == 1 and "does not answer" in stranger.stderr
    done = copy("--from-ca", str(node.authority))
    assert (done.returncode, done.stdout) == (0, "copied: 20 rows copied\n"), done.stderr
    for database in ("other", "default"):
        (counted,) = node.ask("/entities/query", dbName=database, collectionName="copied", outputFields=["count(*)"])
        assert counted["count(*)"] == 20
        node.ask("/collections/drop", dbName=database, collectionName="copied")


def test_who_offers_both_protocols_gets_http_1(node: Secured) -> None:
    """A client that offers HTTP/2 and HTTP/1 wants REST; one that offers HTTP/2 alone is gRPC's."""
    for offered, agreed in ((["h2", "http/1.1"], "http/1.1"), (["h2"], "h2"), (["http/1.1"], "http/1.1")):
        context = node.context()
        context.set_alpn_protocols(offered)
        with context.wrap_socket(node.socket(), server_hostname="localhost") as connection:
            assert connection.selected_alpn_protocol() == agreed


def test_plain_text_is_told_so(node: Secured) -> None:
    """HTTP on the port is answered by what to do, anything else is closed, and both leave the node serving."""
    plain = http.client.HTTPConnection("127.0.0.1", node.port, timeout=30)
    plain.request("GET", "/readyz")
    answer = plain.getresponse()
    assert (answer.status, answer.read()) == (400, b"this port speaks TLS: use https://\n")
    plain.close()
    for opening in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x16" * 4_000, b"\x16"):
        with node.socket() as raw:
            raw.sendall(opening)
            raw.shutdown(socket.SHUT_WR)
            raw.settimeout(30)
            assert raw.recv(100).startswith((b"", b"\x15"))  # at most an alert
    with pytest.raises(MilvusException):
        MilvusClient(uri=f"http://127.0.0.1:{node.port}", timeout=2)
    assert node.is_ready()


def test_what_is_not_trusted_is_not_asked(node: Secured, tmp_path: Path) -> None:
    """A client that trusts another authority, or asks for another name, ends the handshake; the node says why."""
    other = Authority(tmp_path / "other", "theirs")
    for context, name in (
        (ssl.create_default_context(cafile=str(other.certificate)), "localhost"),
        (node.context(), "elsewhere"),
    ):
        with pytest.raises(ssl.SSLCertVerificationError), node.socket() as raw:
            context.wrap_socket(raw, server_hostname=name)
    until(lambda: "TLS handshake failed" in node.said())
    with pytest.raises(MilvusException):
        # Clients of one host and port share a connection: this one goes by another name.
        MilvusClient(
            uri=f"https://127.0.0.1:{node.port}",
            timeout=3,
            server_pem_path=str(other.certificate),
            server_name="localhost",
        )


def test_the_commands_ask_over_tls(node: Secured, tmp_path: Path) -> None:
    """`annulus status` needs the authority; without it, it says what to give."""

    def status(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [*PROGRAM, "status", *arguments], cwd=PROJECT, env=clean_environment(), capture_output=True, timeout=120
        )
        return done.returncode, (done.stdout + done.stderr).decode()

    assert status("--address", f"localhost:{node.port}", "--ca", str(node.authority))[0] == 0
    code, said = status("--address", f"localhost:{node.port}")
    assert code == 1 and "this port speaks TLS: use https://" in said and "--ca" in said
    code, said = status("--address", f"https://localhost:{node.port}")
    assert code == 1 and "certificate verify failed" in said


def test_a_renewed_certificate_is_shown(authority: Authority, tmp_path: Path) -> None:
    """New files are noticed, or looked at on SIGHUP; broken ones change nothing; connections go on meanwhile."""
    files = authority.sign("old", *NAMES)
    certificate, key = tmp_path / "crt", tmp_path / "key"
    certificate.write_bytes(files.certificate.read_bytes())
    key.write_bytes(files.key.read_bytes())
    key.chmod(0o600)
    with secured(tmp_path / "data", authority, Files(certificate, key)) as node:
        with node.context().wrap_socket(node.socket(), server_hostname="localhost") as open_before:
            first = node.serial()
            certificate.write_text("half a certifi")
            node.signal(signal.SIGHUP)
            until(lambda: "certificate not renewed" in node.said())
            assert f"{certificate} holds no certificate in PEM form" in node.said()
            assert node.serial() == first
            renewed = authority.sign("new", *NAMES)
            key.write_bytes(renewed.key.read_bytes())
            certificate.write_bytes(renewed.certificate.read_bytes())
            until(lambda: node.serial() != first)
            open_before.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert open_before.recv(100).startswith(b"HTTP/1.1 200 ")
        assert node.stop() == 0


def test_clients_show_certificates_too(authority: Authority, tmp_path: Path) -> None:
    """With a CA for clients, nobody without a certificate that it signed is heard, by either interface."""
    clients = Authority(tmp_path / "clients", "clients")
    ann, eve = clients.sign("ann"), authority.sign("eve")
    settings = {"api.tls_client_ca_file": str(clients.certificate)}
    node = secured(tmp_path / "data", authority, authority.sign("mutual", *NAMES), **settings)
    node.shown = ann
    with node:
        client = milvus(
            node,
            ca_pem_path=str(node.authority),
            client_pem_path=str(ann.certificate),
            client_key_path=str(ann.key),
            server_name="localhost",
        )
        assert client.list_collections() == []
        client.close()
        with pytest.raises(MilvusException):
            MilvusClient(
                uri=f"https://127.0.0.1:{node.port}",
                timeout=3,
                server_pem_path=str(node.authority),
                server_name="localhost",
            )
        for shown in (None, eve):
            node.shown = shown
            with pytest.raises(OSError):
                node.get("/readyz")
        done = subprocess.run(
            [
                *(*PROGRAM, "status", "--address", f"localhost:{node.port}", "--ca", str(node.authority)),
                *("--client-certificate", str(ann.certificate), "--client-key", str(ann.key), "--json"),
            ],
            cwd=PROJECT,
            env=clean_environment(),
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0 and json.loads(done.stdout)


def test_mistakes_are_named(authority: Authority, tmp_path: Path) -> None:
    """Each file that cannot be used is named, with what to do; a node with such a file says so and does not start."""
    one, other = authority.sign("one", *NAMES), authority.sign("other", *NAMES)
    junk, none = tmp_path / "junk", tmp_path / "none"
    junk.write_text("hello")
    junk.chmod(0o600)
    encrypted = authority.encrypt(one.key)
    for certificate, key, words in (
        (junk, one.key, f"{junk} holds no certificate in PEM form"),
        (one.certificate, junk, f"{junk} holds no private key in PEM form"),
        (one.certificate, other.key, f"the key in {other.key} is not that of the first certificate in"),
        (one.certificate, encrypted, f"decrypt it with `openssl pkey -in {encrypted}"),
        (one.certificate, none, f"cannot read the file {none}"),
    ):
        with pytest.raises(OSError, match=re.escape(words)):
            load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), str(certificate), str(key), "TLS")
    with pytest.raises(OSError, match=re.escape(f"{junk} holds no certificates in PEM form")):
        load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), str(junk), "TLS")
    files = {"api.tls_certificate_file": str(one.certificate), "api.tls_key_file": str(other.key)}
    status, said = refused(tmp_path / "data", free_port(), files)
    assert status == 1 and f"cannot serve: TLS for clients: the key in {other.key} is not that of" in said
    nowhere = {"join": f"127.0.0.1:{free_port()}", "peer_listen": f"127.0.0.1:{free_port()}", "name": "n4"}
    status, said = refused(tmp_path / "guest", free_port(), files | nowhere)
    assert status == 1 and f"TLS for clients: the key in {other.key}" in said, "said before it joins a cluster"
    del files["api.tls_key_file"]
    with pytest.raises(SettingsError, match=r"api\.tls_key_file: is missing: TLS for clients needs"):
        load(flags=files, environment={})


def test_an_expired_certificate_is_cried_out(authority: Authority, tmp_path: Path) -> None:
    """The node serves, for a renewed one is taken without a restart, and says that clients will refuse."""
    files = authority.sign("expired", *NAMES, days=-1)
    node = secured(tmp_path / "data", authority, files)
    try:
        node.launch()
        until(lambda: "listening" in node.said(), seconds=60)
        assert "CLIENTS REFUSE THE CERTIFICATE" in node.said() and "certificate has expired" in node.said()
    finally:
        node.kill()
