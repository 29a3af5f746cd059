"""Certificates, keys and authorities from PEM files into TLS contexts, and what is wrong with them in plain words.

OpenSSL says `PEM lib` to most mistakes. Whoever has to mend one at three in the morning is told which file it is and
what to do.
"""

from __future__ import annotations

import ssl
from typing import Any, NamedTuple

_BEGIN = b"-----BEGIN "
_HANDSHAKE_STEPS = 3


class Shown(NamedTuple):
    """What those who connect are shown."""

    names: tuple[str, ...]
    """DNS names and addresses that the certificate is for."""
    expires_s: float
    """Unix time."""
    trouble: str
    """Why no client will accept it, "" if one may."""


def asking_context(authority: str, what: str) -> ssl.SSLContext:
    """Return how to ask a server whose certificate is signed by those in a file, or by the system's for "".

    Raises OSError as `load_chain` does.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authority:
        load_authority(context, authority, what)
    else:
        context.load_default_certs()
    return context


def load_chain(context: ssl.SSLContext, certificate: str, key: str, what: str) -> None:
    """Have the context show a certificate. `what` begins the message of the OSError that names the file at fault."""
    _must_hold(certificate, b"CERTIFICATE-----", f"{what}: {certificate} holds no certificate in PEM form")
    text = _must_hold(key, b"PRIVATE KEY-----", f"{what}: {key} holds no private key in PEM form")
    if b"ENCRYPTED" in text:
        raise OSError(
            f"{what}: the key in {key} is encrypted, and nobody is there to type its password: decrypt it with "
            f"`openssl pkey -in {key} -out plain.key`, and keep that file to its owner"
        )
    try:
        context.load_cert_chain(certificate, key, password=lambda: b"")  # a callable, so that none is asked for
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise OSError(
                f"{what}: the key in {key} is not that of the first certificate in {certificate}: put the node's own "
                "certificate before those that it is signed by, or name the key that belongs to it"
            ) from error
        raise OSError(f"{what}: {certificate} and {key} cannot be used: {error.reason or error}") from error


def load_authority(context: ssl.SSLContext, path: str, what: str) -> None:
    """Have the context trust what the certificates in a file have signed. Raises OSError as `load_chain` does."""
    _must_hold(path, b"CERTIFICATE-----", f"{what}: {path} holds no certificates in PEM form")
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise OSError(f"{what}: the certificates in {path} cannot be read: {error.reason or error}") from error


def look_at(certificate: str, key: str) -> Shown:
    """Return what a client would see, by being one; both files have been loaded before."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certificate, key, password=lambda: b"")
    client.check_hostname = False
    client.load_verify_locations(certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever signed it: the certificate itself is looked at
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(back, there)
    sides = (asking, server.wrap_bio(there, back, server_side=True))
    try:
        for step in range(_HANDSHAKE_STEPS):
            try:
                sides[step % 2].do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        return Shown((), 0.0, error.verify_message)
    found: dict[str, Any] = asking.getpeercert() or {}
    names = tuple(value for _, value in found.get("subjectAltName", ()))
    return Shown(names, float(ssl.cert_time_to_seconds(str(found["notAfter"]))), "")


def _must_hold(path: str, kind: bytes, text: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise OSError(f"cannot read the file {path}: {error.strerror}") from error
    if not any(line.startswith(_BEGIN) and line.rstrip().endswith(kind) for line in content.splitlines()):
        raise OSError(text)
    return content
