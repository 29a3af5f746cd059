"""`annulus import`, `export` and `copy`: files and other servers' collections; and the demonstration."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from node.asking import access_options, tls_given, token_given
from node.bulk.exporting import FORMATS, Exporter
from node.bulk.importing import Importer, ImportStopped, State, batch_rows_for, new_state
from node.bulk.parquet import ParquetFile
from node.bulk.partitions import PARTITIONS, Partitions
from node.bulk.remote import Refused, Remote, Unreachable
from node.bulk.schemas import create_request, inferred, schema_of
from node.bulk.sources import sources_of
from storage.errors import AnnulusError, InvalidParameter

SAMPLE_ROWS: Final = 10_000
EXIT_STOPPED: Final = 3


def _server(command: Any) -> Any:
    for option in reversed(
        (
            click.option("--address", default="127.0.0.1:19530", show_default=True, help="any node; may be a URL"),
            click.option("--database", default="default", show_default=True, help="database of the collection"),
            access_options,
            click.option("--user", default="", help="user, whose password is asked for"),
            click.option(
                "--patience", default=60.0, show_default=True, help="seconds without an answer that are borne"
            ),
        )
    ):
        command = option(command)
    return command


def _remote(address: str, database: str, user: str, patience: float) -> Remote:
    token = token_given()
    if user:
        token = f"{user}:{click.prompt(f'password of {user}', hide_input=True)}"
    return Remote(address, database=database, token=token, patience_s=patience, tls=tls_given(address))


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--collection", required=True, help="collection to write to; made if it does not exist")
@_server
@click.option("--partition", default="", help="partition to write all rows to, whatever the files name")
@click.option("--primary", default="", help="new collection: the primary key's column")
@click.option("--auto-id", is_flag=True, help="new collection: the database gives the primary keys")
@click.option("--metric", default="", help="new collection: COSINE (default), L2 or IP")
@click.option("--schema", "schema_path", type=click.Path(exists=True, dir_okay=False),
              help="new collection: JSON file with what collections/create takes")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="print the schema of the new collection, and do nothing")
@click.option("--batch-rows", type=click.IntRange(1, 100_000), help="rows of a request; else so many as have 4 MiB")
@click.option("--in-flight", default=3, show_default=True, type=click.IntRange(1, 64), help="requests at a time")
@click.option("--max-rejects", type=click.IntRange(0), help="stop when there are more; else all others are imported")
@click.option("--state", "state_path", help="where to go on after a break [default: COLLECTION.import.json]")
@click.option("--rejects", "rejects_path", help="rejected rows, with reasons [default: COLLECTION.rejects.jsonl]")
@click.option("--resume", is_flag=True, help="go on with an import that was broken off")
def import_(
    files: tuple[str, ...],
    collection: str,
    address: str,
    database: str,
    user: str,
    patience: float,
    partition: str,
    primary: str,
    auto_id: bool,
    metric: str,
    schema_path: str | None,
    dry_run: bool,
    batch_rows: int | None,
    in_flight: int,
    max_rejects: int | None,
    state_path: str | None,
    rejects_path: str | None,
    resume: bool,
) -> None:
    """Import FILES into a collection: Parquet, NumPy, JSON or CSV.

    \b
    .parquet              a column for each field
    .npy                  an array for each field, named like the file; all of them are one table
    .json .jsonl .ndjson  an object a line, or {"rows": [...]}, or a list
    .csv .tsv             with a line of names; vectors as JSON lists

    Rows go to the partition that a column `$partition` names, which is made if it is missing, or all to --partition.

    A collection that does not exist is made: with the schema that an export left in the Parquet file, with --schema,
    or with one that fits the first rows (see --dry-run). Its primary key is --primary, or a column `id` without
    repeats, or given by the database.

    Rows that do not fit are rejected, with the reason, and the others imported. An import that is broken off, even by
    kill -9 or the end of a node, goes on with --resume, and no row is lost or there twice. Exit status 0 if all rows
    were imported, 1 if it failed, 3 if it can go on, 4 if rows were rejected.
    """
    state_path = state_path or f"{collection}.import.json"
    rejects_path = rejects_path or f"{collection}.rejects.jsonl"
    remote = _remote(address, database, user, patience)
    if resume == (not os.path.exists(state_path)) and not dry_run:
        raise click.ClickException(
            f"there is no {state_path}: nothing to resume"
            if resume
            else f"{state_path} is there: an import was broken off. Go on with --resume, or remove the file"
        )
    with _failures():
        if resume:
            state = State.load(state_path)
            if sorted(path for _, paths in state.files for path, *_ in paths) != sorted(map(os.path.abspath, files)):
                raise click.ClickException(f"{state_path} is of an import of other files: give the same")
            if (state.database, state.collection) != (database, collection):
                raise click.ClickException(f"{state_path} is of an import into {state.database}.{state.collection}")
        paths = [os.path.abspath(one) for one in files]
        asked = {"collectionName": collection}
        if dry_run or not remote.call("/collections/has", asked)["has"]:
            if resume:
                raise click.ClickException(f"the collection {collection} is not there any more")
            body = _new_collection(collection, paths, schema_path, primary, auto_id, metric)
            if dry_run:
                click.echo(json.dumps(body, indent=2))
                return
            remote.call("/collections/create", body)
            for name in body.get(PARTITIONS, ()):
                Partitions(remote, collection).ensure(name)
        described = remote.call("/collections/describe", asked)
        schema = schema_of(create_request(described, []))
        if resume:
            if state.collection_id != described["collectionID"]:
                raise click.ClickException(f"the collection {collection} is another one than when the import began")
        else:
            state = new_state(
                paths,
                database=database,
                collection=collection,
                collection_id=described["collectionID"],
                partition=partition,
                batch_rows=batch_rows or batch_rows_for(schema),
            )
        with _bar(collection, state) as noted:
            importer = Importer(
                remote, schema, state, state_path=state_path, rejects_path=rejects_path, in_flight=in_flight,
                rejects_max=max_rejects, noted=noted,
            )  # fmt: skip
            previous = signal.signal(signal.SIGTERM, lambda *_: importer.stop())
            try:
                importer.run()
            except (ImportStopped, Unreachable, KeyboardInterrupt) as error:
                click.echo(f"stopped: {error or 'it was interrupted'}", err=True)
                click.echo(f"{_summary(state)}; go on with\n  {_again(resume)}", err=True)
                sys.exit(EXIT_STOPPED)
            except (Refused, AnnulusError):
                click.echo(f"{_summary(state)}; when the cause is gone, go on with\n  {_again(resume)}", err=True)
                raise
            finally:
                signal.signal(signal.SIGTERM, previous)
    os.remove(state_path)
    click.echo(_summary(state) + (f": see {rejects_path}" if state.rejected else ""))
    if state.rejected:
        sys.exit(4)
    os.remove(rejects_path)


def _new_collection(
    collection: str, paths: list[str], schema_path: str | None, primary: str, auto_id: bool, metric: str
) -> dict[str, Any]:
    """Return the body of `collections/create`. Raises errors of bad requests."""
    sources = sources_of(paths)
    body: dict[str, Any] = {}
    if schema_path is not None:
        with open(schema_path, "rb") as file:
            body = _object(file.read(), schema_path)
    elif paths[0].endswith(".parquet") and (found := ParquetFile(paths[0]).collection):
        body = _object(found, paths[0])
    if not body:
        sample = next(sources[0].chunks(SAMPLE_ROWS), None)
        if sample is None:
            raise InvalidParameter(f"{sources[0].label} has no rows to tell a schema from: give --schema")
        whole = sample.count < SAMPLE_ROWS and len(sources) == 1
        return inferred(collection, sample, whole=whole, primary=primary, auto_id=auto_id, metric=metric)
    body["collectionName"] = collection
    schema_of(body)
    return body


def _object(text: bytes, path: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f"{path}: the schema is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidParameter(f"{path}: the schema is a JSON object")
    return found


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (Refused, AnnulusError) as error:
        raise click.ClickException(error.message) from error
    except (Unreachable, OSError) as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _bar(title: str, state: State) -> Iterator[Any]:
    """Show how far the import is, on a terminal."""
    total = 0
    for one in sources_of([path for _, paths in state.files for path, *_ in paths]):
        total = -1 if one.rows is None or total < 0 else total + one.rows
    with _progress(title, total) as noted:
        noted(sum(state.done))
        yield noted


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Any]:
    """Show how many rows are done, on a terminal. A total below 0 is not known."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows {task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task: TaskID = progress.add_task(title, total=None if total < 0 else total, rate="")

        def noted(read: int, imported: int = 0, rejected: int = 0) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f}/s" if speed else ""
            progress.update(task, completed=read, rate=f"{rate} {rejected} rejected" if rejected else rate)

        yield noted


def _summary(state: State) -> str:
    return f"{state.imported} rows imported, {state.rejected} rejected"


def _again(resumed: bool) -> str:
    words = [os.path.basename(sys.argv[0]).replace("__main__.py", "python -m node"), *sys.argv[1:]]
    return " ".join(_quoted(one) for one in (words if resumed else [*words, "--resume"]))


def _quoted(word: str) -> str:
    return word if word and all(letter.isalnum() or letter in "-_./:=," for letter in word) else f"'{word}'"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--collection", required=True, help="collection to read")
@_server
@click.option("--format", type=click.Choice(FORMATS), default="parquet", show_default=True, help="kind of files")
@click.option("--filter", default="", help="only rows that it keeps")
@click.option("--partition", default="", help="only rows of this partition")
@click.option("--file-rows", default=1_000_000, show_default=True, type=click.IntRange(1), help="rows of a file, about")
@click.option("--live", is_flag=True, help="read what is there, not one snapshot, which may be gone after a while")
@click.option("--resume", is_flag=True, help="go on with an export that was broken off")
def export(
    folder: str,
    collection: str,
    address: str,
    database: str,
    user: str,
    patience: float,
    format: str,
    filter: str,
    partition: str,
    file_rows: int,
    live: bool,
    resume: bool,
) -> None:
    """Export a collection into files of FOLDER, rows by primary key, as of one moment.

    `annulus import FOLDER/*.parquet --collection NAME` makes it again, with its schema and indexes; for JSON lines give
    `--schema FOLDER/collection.json`. Where the database gives the primary keys, rows get new ones.
    """
    remote = _remote(address, database, user, patience)
    is_new = not os.path.isdir(folder) or not os.listdir(folder)
    if not resume and not is_new:
        raise click.ClickException(f"{folder} is not empty: give another folder, or --resume if an export broke off")
    with _failures(), _progress(collection, -1) as noted:
        exporter = Exporter(
            remote, folder, database=database, collection=collection, format=format, filter=filter,
            partition=partition, file_rows=file_rows, live=live, noted=noted,
        )  # fmt: skip
        if resume:
            exporter.resume()
        try:
            exporter.run()
        except (Refused, Unreachable, KeyboardInterrupt) as error:
            click.echo(f"stopped: {error or 'it was interrupted'}; go on with\n  {_again(resume)}", err=True)
            sys.exit(EXIT_STOPPED)
    click.echo(f"{exporter.state.rows} rows exported into {exporter.state.files} files of {folder}")


@click.command()
@click.argument("collections", nargs=-1)
@click.option("--from", "origin_address", required=True, help="URL of the server to copy from, as http://milvus:19530")
@click.option("--from-database", default="default", show_default=True, help="its database")
@click.option("--from-ca", type=click.Path(exists=True, dir_okay=False), default=None,
              help="it is asked over TLS, and this PEM file holds what signed its certificate")  # fmt: skip
@_server
@click.option("--resume", is_flag=True, help="go on with a copy that was broken off")
def copy(
    collections: tuple[str, ...],
    origin_address: str,
    from_database: str,
    from_ca: str | None,
    address: str,
    database: str,
    user: str,
    patience: float,
    resume: bool,
) -> None:
    """Copy COLLECTIONS, or all, of a Milvus or Annulus: schema, indexes, rows. Needs pymilvus: annulus[copy].

    Rows that change there meanwhile may be copied as they were or as they are. The origin's credentials are in
    ANNULUS_FROM_TOKEN, as user:password or an API key.
    """
    from node.bulk.copying import Copier, Origin

    remote = _remote(address, database, user, patience)
    with _failures():
        token = os.environ.get("ANNULUS_FROM_TOKEN", "")
        origin = Origin(origin_address, database=from_database, token=token, ca_path=from_ca or "")
        try:
            for name in collections or origin.collections():
                state_path = f"{name}.copy.json"
                is_begun = os.path.exists(state_path)
                if is_begun and not resume:
                    raise click.ClickException(f"{state_path} is there: a copy was broken off. Go on with --resume")
                if resume and not is_begun and remote.call("/collections/has", {"collectionName": name})["has"]:
                    click.echo(f"{name}: is here already")
                    continue
                with _progress(name, -1) as noted:
                    copier = Copier(origin, remote, name, state_path=state_path, noted=noted)
                    copier.run(resume=is_begun)
                click.echo(f"{name}: {copier.rows} rows copied")
        except (Unreachable, KeyboardInterrupt, origin.failure) as error:
            click.echo(f"stopped: {error or 'it was interrupted'}; go on with\n  {_again(resume)}", err=True)
            sys.exit(EXIT_STOPPED)


@click.command()
@_server
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), default="annulus-data/demo",
              show_default=True, help="data and log of a node that is started, and the body of the search")  # fmt: skip
@click.option("--body-file", type=click.Path(dir_okay=False, path_type=Path),
              help="file for the body of the search that the printed curl line repeats")  # fmt: skip
@click.option("--once", is_flag=True, help="stop a node that was started after the answers, instead of serving on")
def demo(
    address: str,
    database: str,
    user: str,
    patience: float,
    directory: Path,
    body_file: Path | None,
    once: bool,
) -> None:
    """Show semantic search: load 3,000 WordNet rows, and look for what is nearest to a sentence, also under a filter.

    On the node at --address; if none answers there and it is an address of this machine, on one that is started for
    it and serves until Ctrl-C. The collection is `wordnet_sample`, made anew each time.
    """
    from node.bulk.demo import DemoError, free_place, own_node, run

    remote = _remote(address, database, user, patience)
    body_file = body_file or directory / "demo-search.json"
    console = Console()
    try:
        with _failures():
            place = free_place(address)
            if place is None:
                run(remote, body_file=body_file, console=console)
                return
            click.echo(f"no node answers on {place}: starting one", err=True)
            with own_node(directory, place) as process:
                run(remote, body_file=body_file, console=console)
                if not once:
                    click.echo(f"\nData and log: {directory}. Ctrl-C stops the node.")
                    status = process.wait()
                    raise DemoError(f"the node stopped by itself (status {status}): see {directory}/demo.log")
    except DemoError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("\nstopped", err=True)
    finally:
        remote.close()


COMMANDS: Final[Mapping[str, click.Command]] = {"import": import_, "export": export, "copy": copy, "demo": demo}
