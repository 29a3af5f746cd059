"""How the commands ask a running node over HTTP or HTTPS, with the credentials of whoever types them.

Credentials come from a file, named by `--token-file` or ANNULUS_TOKEN_FILE, or from ANNULUS_TOKEN: `user:password` or
an API key. They are no flag, which every user of the machine could read in the list of processes. Files for TLS may be
named by flags or by variables.
"""

from __future__ import annotations

import http.client
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

import click

from node.certificates import asking_context, load_chain

VARIABLES: Final = (
    "ANNULUS_TOKEN",
    "ANNULUS_TOKEN_FILE",
    "ANNULUS_CA_FILE",
    "ANNULUS_CLIENT_CERTIFICATE_FILE",
    "ANNULUS_CLIENT_KEY_FILE",
)
"""What the commands look at in the environment besides the settings."""
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_TLS: Final = ("ca", "client_certificate", "client_key")
_SECURE: Final = "https://"


def access_options(command: Any) -> Any:
    """Give a command the options that say who asks, and what is trusted: `--token-file`, `--ca` and so on."""
    for name, variable, help_text in reversed(
        (
            (
                "ca",
                "ANNULUS_CA_FILE",
                "the node is asked over TLS, and this PEM file holds what signed its certificate",
            ),
            (
                "client_certificate",
                "ANNULUS_CLIENT_CERTIFICATE_FILE",
                "PEM certificate to show, where nodes ask for one",
            ),
            ("client_key", "ANNULUS_CLIENT_KEY_FILE", "PEM key of that certificate"),
        )
    ):
        flag = "--" + name.replace("_", "-")
        command = click.option(
            flag, name, type=_FILE, envvar=variable, expose_value=False, callback=_keep, help=help_text
        )(command)
    return click.option(
        "--token-file",
        type=_FILE,
        envvar="ANNULUS_TOKEN_FILE",
        expose_value=False,
        callback=_read,
        help="file with user:password or an API key, where the cluster asks who is there (or ANNULUS_TOKEN)",
    )(command)


def opened(address: str, path: str, body: bytes | None = None, *, timeout_s: float) -> http.client.HTTPResponse:
    """Return the answer to a GET, or to a POST if there is a body. Raises as urlopen does.

    address  host:port, which may have http:// or https:// before it
    """
    token = token_given()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    context = tls_given(address)
    url = ("http://" if context is None else _SECURE) + address.split("://")[-1] + path
    request = urllib.request.Request(url, body, headers)  # noqa: S310  # one of the two
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(  # noqa: S310
            request, timeout=timeout_s, context=context
        )
    except urllib.error.HTTPError as error:
        if error.code == 400 and error.headers.get_content_type() == "text/plain":
            text = error.read(200).decode(errors="replace").strip()
            raise urllib.error.URLError(f"{text} in front of the address, and --ca if need be") from error
        raise
    return answer


def tls_given(address: str) -> ssl.SSLContext | None:
    """Return how to secure connections to an address; None for plain text, which it is unless either says otherwise."""
    context = click.get_current_context(silent=True)
    ca, certificate, key = (None,) * 3 if context is None else (context.meta.get(f"{__name__}.{one}") for one in _TLS)
    if not ca and not certificate and not address.startswith(_SECURE):
        return None
    try:
        made = asking_context(str(ca or ""), "--ca")
        if certificate:
            load_chain(made, str(certificate), str(key or certificate), "--client-certificate")
    except OSError as error:
        raise click.ClickException(str(error)) from error
    return made


def token_given() -> str:
    """Return the credentials of who types the command, "" for none."""
    context = click.get_current_context(silent=True)
    token: str = context.meta.get(__name__, "") if context is not None else ""
    return token or os.environ.get("ANNULUS_TOKEN", "")


def _keep(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    context.meta[f"{__name__}.{option.name}"] = path


def _read(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    if path is not None:
        try:
            context.meta[__name__] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"cannot be read: {error}") from error
