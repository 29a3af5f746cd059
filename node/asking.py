"""How the commands ask a running node over HTTP, with the credentials of whoever types them.

Credentials come from a file, named by `--token-file` or ANNULUS_TOKEN_FILE, or from ANNULUS_TOKEN: `user:password` or
an API key. They are no flag, which every user of the machine could read in the list of processes.
"""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path
from typing import Any, Final

import click

TOKEN_VARIABLES: Final = ("ANNULUS_TOKEN", "ANNULUS_TOKEN_FILE")


def token_option(command: Any) -> Any:
    """Give a command the option `--token-file`."""
    return click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar="ANNULUS_TOKEN_FILE",
        expose_value=False,
        callback=_read,
        help="file with user:password or an API key, where the cluster asks who is there (or ANNULUS_TOKEN)",
    )(command)


def opened(url: str, body: bytes | None = None, *, timeout_s: float) -> http.client.HTTPResponse:
    """Return the answer to a GET, or to a POST if there is a body. Raises as urlopen does."""
    token = token_given()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, headers)  # noqa: S310  # http by design
    answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310
    return answer


def token_given() -> str:
    """Return the credentials of who types the command, "" for none."""
    context = click.get_current_context(silent=True)
    token: str = context.meta.get(__name__, "") if context is not None else ""
    return token or os.environ.get("ANNULUS_TOKEN", "")


def _read(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    if path is not None:
        try:
            context.meta[__name__] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"cannot be read: {error}") from error
