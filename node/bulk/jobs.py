"""Imports that a node does by itself: files of one directory into collections, job after job, as `importing` does them.

A job's state is a file in the node's data directory, replaced as a whole; a node that starts goes on with those that
are not over. Only this node runs its jobs, because only it is sure to have the files; the others ask it for how far
they are (`jobs_anywhere`). What a client may name lies below `imports.directory` once all links are followed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from cluster.membership import MEMBERS_MAX
from node.api.rows import Write, rows_from_cbor
from node.bulk.fitting import as_columns, as_rows
from node.bulk.importing import ROWS_OF_FILE_MAX, TOO_LATE, batch_rows_for
from node.bulk.partitions import by_partition
from node.bulk.sources import Chunk, sources_of
from node.clock import Clock
from node.keyed import InsertKey
from node.scope import Scope, current
from node.service import CollectionInfo, WriteResult
from node.workers import Executor, Lane
from storage.columns import Batch
from storage.errors import AnnulusError, BadRow, InvalidParameter, UnsupportedOperation
from storage.schema import CollectionSchema

JOBS_KEPT: Final = 1_000
REASONS_KEPT: Final = 100
FILES_MAX: Final = 1_000
BATCH_S: Final = 60.0
PAUSE_S: Final = 0.5
PATIENCE_S: Final = 600.0
"""A job fails when nothing could be written for so long."""
log = logging.getLogger(__name__)


class Collections(Protocol):
    """What a job asks of the node's service."""

    async def describe_collection(self, database: str, name: str) -> CollectionInfo: ...
    async def has_partition(self, database: str, collection: str, partition: str) -> bool: ...
    async def collection_schema(self, database: str, collection: str, *, newest: bool = False) -> CollectionSchema: ...
    async def insert(self, database: str, collection: str, batch: Batch, partition: str = "") -> WriteResult: ...
    async def upsert(self, database: str, collection: str, batch: Batch, partition: str = "") -> WriteResult: ...


@dataclass
class Job:
    """All that is known of a job."""

    job_id: int
    database: str
    collection: str
    collection_id: int
    partition: str
    groups: list[list[str]]
    """Names of files as the client gave them; the files of a group are one table, or one after the other."""
    bytes: list[int]
    batch_rows: int
    rejects_max: int
    created_ms: int
    state: str = "Pending"
    completed_ms: int = 0
    done: list[int] = field(default_factory=list)
    """Of each source, in the order of reading: rows that are written or rejected."""
    totals: list[int | None] = field(default_factory=list)
    imported: int = 0
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.state in ("Completed", "Failed")

    @property
    def progress(self) -> int:
        if self.state == "Completed":
            return 100
        known = [one for one in self.totals if one is not None]
        if not known or len(known) < len(self.totals):
            return 0
        return min(99, sum(self.done) * 100 // max(1, sum(known)))


class ImportJobs:
    """The jobs of one node. `start` when it serves, `stop` before it ends."""

    def __init__(
        self,
        service: Collections,
        executor: Executor,
        clock: Clock,
        *,
        data: str,
        directory: str,
        number: Callable[[], int],
    ) -> None:
        """`directory` is "" where no files may be imported; `number` tells that of the node."""
        self._service = service
        self._executor = executor
        self._clock = clock
        self._number = number
        self._folder = os.path.join(data, "imports")
        self._directory = os.path.realpath(directory) if directory else ""
        self._jobs: dict[int, Job] = {}
        self._waiting: asyncio.Queue[Job] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Go on with the jobs that are not over."""
        for job in await self._executor.run(Lane.DISK, _load_all, self._folder):
            self._jobs[job.job_id] = job
            if not job.is_over:
                self._waiting.put_nowait(job)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # what clients ask

    async def create(
        self,
        database: str,
        collection: str,
        groups: Sequence[Sequence[str]],
        partition: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> int:
        """Return the id of a new job. Raises UnsupportedOperation, InvalidParameter, CollectionNotFound."""
        if not self._directory:
            raise UnsupportedOperation(
                "this node imports no files: set imports.directory to where they are, or use `annulus import`"
            )
        info = await self._service.describe_collection(database, collection)
        if partition and not await self._service.has_partition(database, collection, partition):
            raise InvalidParameter(f"partition {partition[:80]} not found in collection {info.name}")
        if not groups or not all(groups) or sum(map(len, groups)) > FILES_MAX:
            raise InvalidParameter(f"files is a list of 1 to {FILES_MAX} files, each in a list of its own")
        given = {key.lower(): str(value) for key, value in (options or {}).items()}
        if given.get("auto_commit", "true").lower() != "true":
            raise UnsupportedOperation("auto_commit false is not supported by this server: rows are there as they come")
        rejects = given.get("max_rejects", "0")
        if not rejects.isdigit() or len(rejects) > 9:
            raise InvalidParameter(f"options.max_rejects is a number, not {rejects[:40]!r}")
        totals, sizes = await self._executor.run(Lane.DISK, self._look, [list(one) for one in groups])
        job_id = _next_number(max([self._clock.wall_ms() * 1_000, *self._jobs]), self._number())
        job = Job(
            job_id, database, info.name, info.collection_id, partition, [list(one) for one in groups], sizes,
            batch_rows_for(info.schema), int(rejects), self._clock.wall_ms(), done=[0] * len(totals), totals=totals,
        )  # fmt: skip
        await self._save(job)
        self._jobs[job_id] = job
        self._waiting.put_nowait(job)
        await self._forget_oldest()
        return job_id

    def find(self, job_id: int) -> Job | None:
        """Return the job if it is one of this node."""
        return self._jobs.get(job_id)

    def known(self, database: str, collection: str = "") -> Sequence[Job]:
        """Return the jobs, the newest last."""
        return [one for one in self._jobs.values() if one.database == database and collection in ("", one.collection)]

    # the work

    async def _run(self) -> None:
        while True:
            job = await self._waiting.get()
            try:
                await self._import(job)
                job.state = "Completed"
            except AnnulusError as error:
                job.state = "Failed"
                job.reasons.append(self._shown(error.message))
            except Exception as error:
                log.exception("import job failed unexpectedly job=%d", job.job_id)
                job.state = "Failed"
                job.reasons.append(f"unexpected error: {type(error).__name__}: it is in the node's log")
            job.completed_ms = self._clock.wall_ms()
            try:
                await self._save(job)
            except OSError as error:
                log.warning("the state of import job %d can not be written: %s", job.job_id, error)

    async def _import(self, job: Job) -> None:
        job.state = "Importing"
        sizes = (await self._executor.run(Lane.DISK, self._look, job.groups))[1]
        if sizes != job.bytes:
            raise InvalidParameter("the files have changed since the job was made")
        number = 0
        for group in job.groups:
            for source in await self._executor.run(Lane.DISK, sources_of, [self._path(one) for one in group]):
                chunks = source.chunks(job.batch_rows, job.done[number])
                if job.totals[number] is not None and job.done[number] >= (job.totals[number] or 0):
                    chunks = iter(())
                await self._import_source(job, number, chunks)
                job.totals[number] = job.done[number]
                number += 1

    async def _import_source(self, job: Job, number: int, chunks: Iterator[Chunk]) -> None:
        while True:
            schema = await self._service.collection_schema(job.database, job.collection)
            found = await self._executor.run(Lane.DISK, _next, chunks, schema, job.partition)
            if found is None:
                return
            chunk, batches, bad = found
            for partition, batch in batches:
                name = f"job-{job.job_id}"
                if partition != job.partition:
                    await self._check_partition(job, partition)
                    name += f"/{partition}"
                key = InsertKey(name, number * ROWS_OF_FILE_MAX + chunk.first)
                await self._write(job, key, batch, schema, partition)
                job.imported += batch.rows
            job.rejected += len(bad)
            for row, reason in sorted(bad.items()):
                if len(job.reasons) < REASONS_KEPT:
                    job.reasons.append(f"file {number}, row {row}: {reason}")
            job.done[number] += chunk.count
            await self._save(job)
            if job.rejected > job.rejects_max:
                raise BadRow(f"{job.rejected} rows do not fit, options.max_rejects is {job.rejects_max}")

    async def _check_partition(self, job: Job, partition: str) -> None:
        """Raise InvalidParameter if the rows' partition is not there: who may import may not make any."""
        if not await self._service.has_partition(job.database, job.collection, partition):
            raise InvalidParameter(f"rows are of partition {partition[:80]}, which is not there: make it first")

    async def _write(self, job: Job, key: InsertKey, batch: Batch, schema: CollectionSchema, partition: str) -> None:
        """Write the batch once, however often that has to be tried."""
        until_s = self._clock.monotonic_s() + PATIENCE_S
        is_late = False
        while True:
            scope = Scope(self._clock.monotonic_s() + BATCH_S)
            token = current.set(scope)
            try:
                if is_late:
                    await self._service.upsert(job.database, job.collection, batch, partition)
                else:
                    scope.insert_key = key
                    await self._service.insert(job.database, job.collection, batch, partition)
                return
            except AnnulusError as error:
                if TOO_LATE in error.message and not schema.primary.auto_id:
                    is_late = True
                elif TOO_LATE in error.message or not error.retriable or self._clock.monotonic_s() > until_s:
                    raise
            finally:
                current.reset(token)
            await asyncio.sleep(PAUSE_S)

    # files; everything below runs on worker threads

    def _path(self, name: str) -> str:
        """Return the file of this name. Raises InvalidParameter if it is outside the directory, or none."""
        path = "" if "\0" in name else os.path.realpath(os.path.join(self._directory, name))
        if not path or os.path.commonpath([path, self._directory]) != self._directory:
            raise InvalidParameter(f"file {name[:200]!r} is not in the directory of imports")
        if not os.path.isfile(path):
            raise InvalidParameter(f"file {name[:200]!r} does not exist in the directory of imports")
        return path

    def _shown(self, message: str) -> str:
        """Return the message with files named as the client names them: where they are here is not told."""
        return message.replace(self._directory + os.sep, "")

    def _look(self, groups: list[list[str]]) -> tuple[list[int | None], list[int]]:
        """Return (rows of each source where they are known, bytes of each file)."""
        totals: list[int | None] = []
        sizes: list[int] = []
        for group in groups:
            paths = [self._path(one) for one in group]
            try:
                sources = sources_of(paths)
            except (AnnulusError, OSError) as error:
                said = error.message if isinstance(error, AnnulusError) else str(error.strerror)
                raise InvalidParameter(self._shown(said)) from None
            totals += [one.rows for one in sources]
            sizes += [os.path.getsize(one) for one in paths]
        return totals, sizes

    async def _save(self, job: Job) -> None:
        await self._executor.run(Lane.DISK, _save, self._folder, job.job_id, json.dumps(asdict(job)))

    async def _forget_oldest(self) -> None:
        over = [one for one in self._jobs.values() if one.is_over]
        for job in over[: max(0, len(self._jobs) - JOBS_KEPT)]:
            del self._jobs[job.job_id]
            with suppress(OSError):
                await self._executor.run(Lane.DISK, os.remove, _file_of(self._folder, job.job_id))


def number_of(job_id: int) -> int:
    """Return the number of the node that began a job."""
    return job_id % MEMBERS_MAX


def _next_number(last: int, node: int) -> int:
    """Return the number of a job of a node that comes after the last one."""
    return last + 1 + (node - last - 1) % MEMBERS_MAX


def _next(
    chunks: Iterator[Chunk], schema: CollectionSchema, wanted: str
) -> tuple[Chunk, list[tuple[str, Batch]], dict[int, str]] | None:
    """Return the next chunk, its rows that fit by partition, and reasons for the others; None at the end."""
    chunk = next(chunks, None)
    if chunk is None:
        return None
    batches: list[tuple[str, Batch]] = []
    bad: dict[int, str] = {}
    for partition, part in by_partition(chunk, wanted=wanted, keyed=schema.partition_key is not None):
        columns = as_columns(part, schema)
        if columns is not None:
            with suppress(BadRow):
                batches.append((partition, rows_from_cbor(columns, schema, Write.INSERT)))
                bad |= part.bad
                continue
        good, unfit = as_rows(part, schema)
        bad |= unfit
        if good:
            batches.append((partition, rows_from_cbor(good, schema, Write.INSERT)))
    return chunk, batches, bad


def _file_of(folder: str, job_id: int) -> str:
    return os.path.join(folder, f"{job_id}.json")


def _save(folder: str, job_id: int, text: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = _file_of(folder, job_id)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def _load_all(folder: str) -> list[Job]:
    jobs = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".json"):
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    jobs.append(Job(**json.load(file)))
            except (OSError, ValueError, TypeError) as error:
                log.warning("import job %s can not be read and is left alone: %s", name, error)
    return sorted(jobs, key=lambda one: one.job_id)
