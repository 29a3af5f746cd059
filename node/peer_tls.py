"""TLS between nodes: both show a certificate that the cluster's authority signed, and its name is the node's."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from node.certificates import load_authority, load_chain

WHAT: Final = "TLS between nodes"


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files. The certificate's name (DNS name or common name) must be the node's."""

    certificate: str
    key: str
    authority: str


def load_tls(files: TlsFiles, side: int) -> ssl.SSLContext:
    """Return the context of acceptor or dialer. Raises OSError that names the file at fault."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # nodes are called by name, wherever they are: the connection compares names
    context.verify_mode = ssl.CERT_REQUIRED
    load_chain(context, files.certificate, files.key, WHAT)
    load_authority(context, files.authority, WHAT)
    return context


def certificate_names(certificate: Mapping[str, Any]) -> frozenset[str]:
    """Return the names in what `ssl` tells of a verified certificate."""
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    names |= {value for parts in certificate.get("subject", ()) for key, value in parts if key == "commonName"}
    return frozenset(names)
