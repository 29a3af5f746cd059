"""Certificates for tests, and a node whose clients come by TLS."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.process.running import BASE_PATH, Running

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")


class Files(NamedTuple):
    certificate: Path
    key: Path


class Authority:
    """Signs certificates."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.name = directory, name
        self.certificate = directory / f"{name}.crt"
        self._openssl(
            *("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split()),
            *("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt"),
        )

    def sign(self, file: str, *names: str, days: int = 2, common: str = "annulus") -> Files:
        """Return certificate and key for names such as `DNS:localhost` or `IP:127.0.0.1`."""
        self._openssl(
            *("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes".split()),
            *("-subj", f"/CN={common}", "-keyout", f"{file}.key", "-out", f"{file}.csr"),
        )
        (self.directory / f"{file}.ext").write_text(f"subjectAltName={','.join(names)}\n" if names else "")
        self._openssl(
            *("x509", "-req", "-in", f"{file}.csr", "-CA", f"{self.name}.crt", "-CAkey", f"{self.name}.key"),
            *("-CAcreateserial", "-days", str(days), "-extfile", f"{file}.ext", "-out", f"{file}.crt"),
        )
        return Files(self.directory / f"{file}.crt", self.directory / f"{file}.key")

    def encrypt(self, key: Path) -> Path:
        """Return a copy of a key that needs a password."""
        self._openssl("pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", "encrypted.key")
        found = self.directory / "encrypted.key"
        found.chmod(0o600)
        return found

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True)


class Secured(Running):
    """A node with TLS for clients, asked over it."""

    authority: Path
    shown: Files | None = None
    """What the client shows."""

    def __enter__(self) -> Secured:
        self.start()
        return self

    def context(self) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(self.authority))
        if self.shown is not None:
            made.load_cert_chain(*self.shown)
        return made

    def get(self, path: str) -> tuple[int, bytes]:
        with self._connection() as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def send(self, path: str, body: bytes | Iterator[bytes], **headers: str) -> tuple[int, bytes]:
        with self._connection() as connection:
            given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request("POST", BASE_PATH + path, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def serial(self) -> str:
        """Return which certificate the node shows."""
        with self.context().wrap_socket(self.socket(), server_hostname="localhost") as connection:
            found = connection.getpeercert()
            assert found
            return str(found["serialNumber"])

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPSConnection]:
        made = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.context())
        with contextlib.closing(made) as connection:
            yield connection
