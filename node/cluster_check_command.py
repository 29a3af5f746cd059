"""`annulus check --cluster`: asks a node for a round of healing, waits for it, and prints what came out."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from node.asking import opened
from node.status_tables import size

LOOK_S: Final = 0.25
SILENT_S_MAX: Final = 30.0
"""How long the node that was asked may not answer until that is the outcome."""
EXIT_STATUSES: Final = {"clean": 0, "healed": 3, "damaged": 1, "incomplete": 1}
_SENTENCES: Final = {
    "clean": "all chunks are whole, and all replicas are equal",
    "healed": "what was wrong was made good",
    "damaged": "something is wrong that could not be made good",
    "incomplete": "nothing wrong was found, but not everything could be looked at",
}


def run_check(address: str, *, as_json: bool) -> int:
    """Have the cluster checked through this node; return the exit status. Raises ClickException if it is not there."""
    try:
        found = _ask(address, begin=True)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise click.ClickException(f"no node begins a check on {address} ({error}); is it running there?") from error
    shows = sys.stderr.isatty()
    heard_s = time.monotonic()
    while found.get("finding") == "running":
        if shows:
            click.echo(f"\r{progress(found)}\x1b[K", nl=False, err=True)
        time.sleep(LOOK_S)
        try:
            found, heard_s = _ask(address), time.monotonic()
        except (urllib.error.URLError, OSError, ValueError) as error:
            if time.monotonic() - heard_s > SILENT_S_MAX:
                raise click.ClickException(f"the node on {address} does not answer any more ({error})") from error
    if shows:
        click.echo("\r\x1b[K", nl=False, err=True)
    if "finding" not in found:
        raise click.ClickException(f"the node on {address} was started anew and knows no check; begin again")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console = Console()
        for one in tables(found):
            console.print(one)
    return EXIT_STATUSES.get(found["finding"], 1)


def _ask(address: str, *, begin: bool = False) -> dict[str, Any]:
    body = b"" if begin else None  # which makes it a POST
    with opened(address, "/cluster/check", body, timeout_s=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def progress(found: Mapping[str, Any]) -> str:
    """Return how far a round is, in a line."""
    nodes, groups = found["nodes"].values(), found["groups"].values()
    done, total = (sum(node.get(name, 0) for node in nodes) for name in ("chunks_done", "chunks_total"))
    compared = sum(1 for group in groups if group["state"] == "compared")
    return f"{done:,} of {total:,} chunks read, {compared} of {len(groups)} shards compared"


def tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what to print of a round that has ended."""
    nodes = Table("node", "chunks read", "bytes", "damaged", "made good", "left", title="chunks")
    for name, one in found["nodes"].items():
        if one["state"] != "read":
            nodes.add_row(name, Text(f"{one['state']}: {one.get('why', '')}", style="red"))
            continue
        left = Text(str(one["left"]), style="bold red" if one["left"] else "")
        row = (f"{one['chunks_done']:,}", size(one["bytes_done"]), str(one["damaged"]), str(one["cured"]))
        nodes.add_row(name, *row, left)
    yield nodes
    groups = Table("shard", "at position", "replicas", "differed", "rebuilt", "no answer", title="replicas")
    for name, one in found["groups"].items():
        verdict = one["verdict"] if one.get("again") is None else f"{one['verdict']}, then {one['again']}"
        style = "" if verdict in ("equal", "alone") else "red"
        lists = (", ".join(one[part]) for part in ("wrong", "rebuilt", "silent"))
        groups.add_row(name, str(one.get("position", "")), Text(verdict, style=style), *lists)
    yield groups
    for name, one in found["nodes"].items():
        for sentence in one.get("lost", ()):
            yield Text(f"! {name}: {sentence}", style="bold red")
    finding = found["finding"]
    yield Text(f"{finding}: {_SENTENCES.get(finding, '')}", style="bold" if finding == "clean" else "bold red")
