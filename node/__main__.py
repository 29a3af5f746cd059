"""The command line: `annulus serve|status|config|check|node|import|export|copy|demo`, the same as `python -m node`."""

from __future__ import annotations

import json
import os
import sys

# Searches run side by side on threads of their own; numpy's would fight them. Read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The index engine's wait asleep: spinning ones take a core from the loop. Read when faiss is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from node.asking import access_options, opened
from node.config import config_flags, describe, from_flags
from node.memory import tame_allocator
from node.settings import Settings, SettingsError
from storage.errors import AnnulusError

EXIT_USAGE = 2
LATER = {"node": "node.node_command", **dict.fromkeys(("import", "export", "copy", "demo"), "node.bulk.commands")}
"""Command -> its module, whose `COMMANDS` it is in: imported when it is asked for, as what it needs takes long."""
try:
    VERSION = version("annulus")
except PackageNotFoundError:
    VERSION = "(not installed)"


class Commands(click.Group):
    """Those that are here, and those that come from elsewhere when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LATER])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LATER:
            return super().get_command(ctx, cmd_name)
        commands: dict[str, click.Command] = import_module(LATER[cmd_name]).COMMANDS
        return commands[cmd_name]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, message="annulus %(version)s")
def main() -> None:
    """Annulus: a vector database that speaks Milvus's API and needs no other server.

    Start with `annulus serve`; it keeps its data in ./annulus-data and answers on 127.0.0.1:19530.
    """


@main.command()
@config_flags
def serve(**flags: Any) -> None:
    """Start a node and serve until SIGTERM or Ctrl-C."""
    settings = _settings(flags)
    tame_allocator()
    with _quiet_imports():
        from node.app import run
    from node.logs import setup

    setup(settings.log.level, settings.log.format)
    try:
        sys.exit(run(settings))
    except (AnnulusError, OSError) as error:
        message = error.message if isinstance(error, AnnulusError) else str(error)
        click.echo(f"annulus: cannot serve: {message}", err=True)
        sys.exit(1)


@main.command()
@config_flags
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def config(as_json: bool, **flags: Any) -> None:
    """Show every setting, its value, and where the value comes from."""
    rows = describe(_settings(flags))
    if as_json:
        click.echo(json.dumps([row.__dict__ for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "unit", "from", "what it does", show_edge=False)
    for row in rows:
        table.add_row(row.key, row.value, row.unit, row.source, row.description)
    Console().print(table)


@main.command()
@click.option("--address", default="127.0.0.1:19530", show_default=True, help="client address of any node")
@access_options
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
def status(address: str, as_json: bool) -> None:
    """Show nodes, shards, collections and sizes, as any node of the cluster sees them.

    Exit status 0 if all is well; 1 if a node does not answer or is not ready, or a shard has no leader.
    """
    from node.status_tables import tables, troubles

    try:
        with opened(address, "/status", timeout_s=10) as answer:
            found = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise click.ClickException(f"no node answers on {address} ({error}); is it running there?") from error
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        console = Console()
        for one in tables(found):
            console.print(one)
    sys.exit(1 if troubles(found) else 0)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False), required=False)
@click.option("--cluster", is_flag=True, help="heal a running cluster now, and say what was found")
@click.option("--address", default="127.0.0.1:19530", show_default=True, help="client address of any node")
@access_options
@click.option("--json", "as_json", is_flag=True, help="with --cluster: print JSON instead of tables")
def check(directory: str | None, cluster: bool, address: str, as_json: bool) -> None:
    """Verify the data directory of a stopped node: journal records, digests, references. Exit status 1 if damaged.

    With --cluster instead of a directory: every node of a running cluster reads all its chunks, the replicas of every
    shard are compared, and what is not right is made good. Exit status 0 if all was right, 3 if something was not and
    is now, 1 if something still is not or a node did not answer.
    """
    if cluster == (directory is not None):
        raise click.UsageError("give a directory, or --cluster")
    if cluster:
        from node.cluster_check_command import run_check

        sys.exit(run_check(address, as_json=as_json))
    assert directory is not None
    with _quiet_imports():
        from node.check import check as findings

    damaged = 0
    try:
        for is_damage, sentence in findings(directory):
            damaged += is_damage
            click.echo(("DAMAGED " if is_damage else "ok      ") + sentence)
    except (AnnulusError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{directory}: {f'{damaged} damaged parts' if damaged else 'clean'}")
    sys.exit(1 if damaged else 0)


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Hide what native libraries print when they are loaded: nmslib's advice on building it would open every log."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _settings(flags: dict[str, Any]) -> Settings:
    try:
        return from_flags(flags, os.environ)
    except SettingsError as error:
        click.echo(f"annulus: {error}", err=True)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
