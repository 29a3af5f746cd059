"""`annulus node`: lists the nodes of a cluster, and drains, removes and replaces them."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from node.asking import access_options, opened
from node.status_tables import moves_tables, size

LOOK_S: Final = 1.0
ANSWER_S: Final = 35.0


@click.group()
def node() -> None:
    """Show and change the nodes of a cluster; a node joins by `annulus serve --join`."""


def _address(command: Any) -> Any:
    address = click.option("--address", default="127.0.0.1:19530", show_default=True, help="client address of any node")
    return address(access_options(command))


def _wait(command: Any) -> Any:
    return click.option("--wait", is_flag=True, help="show how it goes, and return when it is done")(command)


@node.command("list")
@_address
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
def list_(address: str, as_json: bool) -> None:
    """Show all nodes, what they hold and lead, and which shards are on the move."""
    found = _ask(address, "list")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = Console()
    for one in tables(found):
        console.print(one)


@node.command()
@click.argument("name")
@_address
@_wait
@click.option("--undo", is_flag=True, help="it stays after all: shards may come to it again")
@click.option("--force", is_flag=True, help="also if fewer nodes remain than a shard has copies")
def drain(name: str, address: str, wait: bool, undo: bool, force: bool) -> None:
    """Move all shards away from a node; it serves meanwhile, and can be removed afterwards."""
    _ask(address, "drain", nodeName=name, undo=undo, force=force)
    if undo:
        click.echo(f"node {name} stays")
    elif wait:
        _wait_until_empty(address, name)
    else:
        click.echo(f"node {name} is being drained: `annulus node list` shows how far that is")


@node.command()
@click.argument("name")
@_address
def remove(name: str, address: str) -> None:
    """Have a drained node be no node of the cluster any more; stop it then."""
    _ask(address, "remove", nodeName=name)
    click.echo(f"node {name} is no node of the cluster any more")


@node.command()
@click.argument("old")
@click.argument("new")
@_address
@_wait
def replace(old: str, new: str, address: str, wait: bool) -> None:
    """Have the node NEW, which has joined, take over all that OLD holds; OLD is removed when it holds nothing.

    In one step: `annulus serve --name NEW --join HOST:PORT --replaces OLD`.
    """
    _ask(address, "replace", nodeName=old, newNodeName=new)
    if wait:
        _wait_until_empty(address, old)
    else:
        click.echo(f"node {new} takes over what {old} holds: `annulus node list` shows how far that is")


@node.command("pause-moves")
@_address
def pause_moves(address: str) -> None:
    """Begin no more moves of shards, also none that would replace lost copies; those under way go on."""
    _ask(address, "pause_moves")
    click.echo("no move begins until `annulus node resume-moves`")


@node.command("resume-moves")
@_address
def resume_moves(address: str) -> None:
    """Let moves of shards begin again."""
    _ask(address, "resume_moves")
    click.echo("moves begin again as they are needed")


COMMANDS: Final = {"node": node}


def tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """Return what to print of a list of nodes."""
    nodes = Table("node", "state", "zone", "shards", "leads", "entries/s", "votes", "clients", "nodes", title="nodes")
    mean = sum(one["entriesPerSecond"] for one in found["nodes"]) / max(1, len(found["nodes"]))
    for one in found["nodes"]:
        nodes.add_row(
            one["name"],
            _state(one),
            one["zone"],
            f"{one['shards']}" + (f" (+{one['coming']})" if one["coming"] else ""),
            str(one["leads"]),
            Text(f"{one['entriesPerSecond']:g}", style="red" if mean and one["entriesPerSecond"] > 2 * mean else ""),
            "yes" if one["votes"] else "",
            one["client"],
            one["peer"],
        )
    return [nodes, *moves_tables(found)]


def _state(one: Mapping[str, Any]) -> Text:
    state = str(one["state"])
    if not one["isUp"]:
        return Text(f"{state}, away for {one['awaySeconds']:.0f} s" if state != "gone" else "gone", style="red")
    if one["replaces"]:
        return Text(f"{state}, replaces {one['replaces']}", style="yellow")
    return Text(state, style="" if state == "active" else "yellow")


def _wait_until_empty(address: str, name: str) -> None:
    said = ""
    while True:
        found = _ask(address, "list")
        mine = next((one for one in found["nodes"] if one["name"] == name), None)
        if mine is None:
            click.echo(f"node {name} holds nothing any more, and is removed: stop it")
            return
        if not mine["shards"] and not mine["replaces"] and not _is_replaced(found, name):
            click.echo(f"node {name} holds nothing any more: `annulus node remove {name}`, then stop it")
            return
        left = [one for one in found["moves"] if name in one["from"]]
        copied = sum(one["bytesDone"] for one in left)
        total = sum(one["bytesTotal"] for one in left)
        rest = [one["secondsLeft"] for one in left if one["secondsLeft"] is not None]
        line = (
            f"{mine['shards']} shards left, {len(left)} on the move"
            + (f", {size(copied)} of {size(total)} copied" if total else "")
            + (f", about {max(rest):.0f} s for these" if rest else "")
        )
        if found["movesPaused"]:
            line += "; moves are paused"
        if line != said:
            click.echo(line)
            said = line
        time.sleep(LOOK_S)


def _is_replaced(found: Mapping[str, Any], name: str) -> bool:
    return any(one["replaces"] == name for one in found["nodes"])


def _ask(address: str, what: str, **body: Any) -> Any:
    """Return what the node answers. Ends the command with its words if it refuses, or none answers."""
    data = json.dumps(body).encode()
    try:
        with opened(address, f"/v2/annulus/nodes/{what}", data, timeout_s=ANSWER_S) as answer:
            reply = json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            reply = json.load(error)
        except ValueError:
            raise click.ClickException(f"what answers on {address} is no node of this version ({error})") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise click.ClickException(f"no node answers on {address} ({error}); is it running there?") from error
    if reply.get("code") != 0:
        click.echo(f"Error: {reply.get('message')}", err=True)
        sys.exit(1)
    return reply["data"]
