"""An import: files into a collection, several batches in flight, each under a key of its own, and where to go on.

The state file says which files, which collection, under which name, and up to which row each file is done; it is
written before the first batch is sent, and replaced as a whole. What was in flight when an import broke off is sent
again under the same keys, so that it is there once. Rejected rows stand in a file of lines that grows with the state,
and is cut back to what the state knows when the import goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from node.bulk.fitting import as_columns, as_rows
from node.bulk.partitions import Partitions, by_partition
from node.bulk.remote import PASSING, Refused, Remote
from node.bulk.sources import Chunk, Source, sources_of
from node.keyed import InsertKey
from storage.errors import InvalidParameter
from storage.schema import CollectionSchema, DataType
from storage.types import CollectionId

KEY: Final = "Annulus-Idempotency-Key"
BAD_ROW_CODES: Final = frozenset({1804, 1806, 1801})
TOO_LARGE_CODE: Final = 1102
TOO_LATE: Final = "too late to tell"
"""What a shard says that does not remember whether it has written a batch."""
FILES_MAX: Final = 100_000
ROWS_OF_FILE_MAX: Final = 10**12
STATE_INTERVAL_S: Final = 0.5
LOOKUP_ROWS: Final = 4_096
BATCH_BYTES: Final = 4 << 20
BATCH_ROWS_MAX: Final = 5_000
VERSION: Final = 1


class ImportStopped(Exception):
    """The import can go on later from where it is."""


@dataclass
class State:
    """All that an import needs to go on."""

    name: str
    """Unique; the first part of the keys of its batches."""
    database: str
    collection: str
    collection_id: int
    partition: str
    batch_rows: int
    files: list[list[Any]]
    """Of each source: [label, [[path, bytes, modified_ns], ...]]."""
    done: list[int]
    """Of each source: rows from the beginning that are in the collection, or rejected."""
    imported: int = 0
    rejected: int = 0
    rejects_bytes: int = 0
    version: int = VERSION

    @classmethod
    def load(cls, path: str) -> State:
        """Raises InvalidParameter if the file is none."""
        try:
            with open(path, "rb") as file:
                found = cls(**json.load(file))
            if found.version != VERSION or len(found.done) != len(found.files):
                raise ValueError("it is of another version")
        except (OSError, ValueError, TypeError) as error:
            raise InvalidParameter(f"{path} is no state of an import: {error}") from None
        return found

    def save(self, path: str) -> None:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)


@dataclass
class Done:
    """What became of a batch."""

    rows: int
    imported: int
    bad: dict[int, str] = field(default_factory=dict)


def fingerprints(sources: Sequence[Source]) -> list[list[Any]]:
    """Return what tells whether the files are still the same."""
    found: list[list[Any]] = []
    for one in sources:
        facts = [(path, os.stat(path)) for path in one.paths]
        found.append([one.label, [[path, stat.st_size, stat.st_mtime_ns] for path, stat in facts]])
    return found


def batch_rows_for(schema: CollectionSchema) -> int:
    """Return how many rows make a batch of a good size."""
    width = 64
    for one in schema.user_fields:
        if one.type.is_vector:
            width += 4 * (one.dim or 256)
        elif one.type in (DataType.VARCHAR, DataType.JSON, DataType.ARRAY):
            width += 128
        else:
            width += 8
    return max(1, min(BATCH_ROWS_MAX, BATCH_BYTES // width))


def new_state(
    paths: Sequence[str], *, database: str, collection: str, collection_id: int, partition: str, batch_rows: int
) -> State:
    """Return the beginning of an import of the files."""
    sources = sources_of(paths)
    name = f"import-{secrets.token_hex(8)}"
    return State(
        name, database, collection, collection_id, partition, batch_rows, fingerprints(sources), [0] * len(sources)
    )


class Importer:
    """Runs one import to its end, or until it is stopped. `noted` is told (rows read, imported, rejected) so far."""

    def __init__(
        self,
        remote: Remote,
        schema: CollectionSchema,
        state: State,
        *,
        state_path: str,
        rejects_path: str,
        in_flight: int = 3,
        rejects_max: int | None = None,
        noted: Callable[[int, int, int], None] = lambda read, imported, rejected: None,
    ) -> None:
        self.state = state
        self._remote = remote
        self._schema = schema
        self._partitions = Partitions(remote, state.collection)
        self._state_path = state_path
        self._rejects_path = rejects_path
        self._in_flight = in_flight
        self._rejects_max = rejects_max
        self._noted = noted
        self._saved_s = 0.0
        self._stop = threading.Event()
        paths = [path for _, files in state.files for path, *_ in files]
        self._sources = sources_of(paths)
        if fingerprints(self._sources) != state.files:
            raise InvalidParameter(
                "the files have changed since the import began: it can not go on, because rows are known by their "
                "place; begin a new import with what is missing"
            )

    def stop(self) -> None:
        """End after the batches that are in flight."""
        self._stop.set()
        self._remote.stopped.set()

    def run(self) -> None:
        """Raises ImportStopped, Refused, Unreachable or InvalidParameter; the state is saved then."""
        self.state.save(self._state_path)
        with open(self._rejects_path, "ab") as rejects:
            rejects.truncate(self.state.rejects_bytes)
        try:
            for i, source in enumerate(self._sources):
                self._run_source(i, source)
        finally:
            self.state.save(self._state_path)

    def _run_source(self, i: int, source: Source) -> None:
        waiting: dict[Future[Done], int] = {}
        finished: dict[int, Done] = {}
        chunks = self._remaining(i, source)
        failure: BaseException | None = None
        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="import") as pool:
            while True:
                # one more than are sent at a time: it is read while they are on their way
                while failure is None and len(waiting) <= self._in_flight and not self._stop.is_set():
                    try:
                        chunk = next(chunks, None)
                    except InvalidParameter as error:
                        failure = error
                        break
                    if chunk is None:
                        break
                    waiting[pool.submit(self._send, i, chunk)] = chunk.first
                if not waiting:
                    break
                try:
                    over, _ = wait(waiting, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    self.stop()
                    failure = ImportStopped("it was interrupted")
                    continue
                for one in over:
                    first = waiting.pop(one)
                    if (fault := one.exception()) is None:
                        finished[first] = one.result()
                    elif failure is None:
                        failure = fault
                        self._remote.stopped.set()
                while (done := finished.pop(self.state.done[i], None)) is not None:
                    self._advance(i, done)
                if failure is None and self._rejects_max is not None and self.state.rejected > self._rejects_max:
                    failure = ImportStopped(
                        f"{self.state.rejected} rows were rejected, at most {self._rejects_max} may"
                    )
        if failure is not None:
            raise failure
        if self._stop.is_set():
            raise ImportStopped("it was interrupted")

    def _remaining(self, i: int, source: Source) -> Iterator[Chunk]:
        if source.rows is not None and source.rows <= self.state.done[i]:
            return iter(())
        return source.chunks(self.state.batch_rows, self.state.done[i])

    def _advance(self, i: int, done: Done) -> None:
        """Take a batch that follows what is done."""
        state = self.state
        if done.bad:
            label = state.files[i][0]
            with open(self._rejects_path, "ab") as file:
                for row, reason in sorted(done.bad.items()):
                    line = json.dumps({"file": label, "row": row, "reason": reason}, ensure_ascii=False)
                    file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                state.rejects_bytes = file.tell()
        state.done[i] += done.rows
        state.imported += done.imported
        state.rejected += len(done.bad)
        self._noted(sum(state.done), state.imported, state.rejected)
        now_s = time.monotonic()
        if now_s - self._saved_s >= STATE_INTERVAL_S:
            self._saved_s = now_s
            state.save(self._state_path)

    # one batch, on a thread of its own

    def _send(self, i: int, chunk: Chunk) -> Done:
        number = i * ROWS_OF_FILE_MAX + chunk.first
        done = Done(chunk.count, 0)
        wanted, keyed = self.state.partition, self._schema.partition_key is not None
        for partition, part in by_partition(chunk, wanted=wanted, keyed=keyed):
            name = InsertKey(self.state.name, number)
            if partition and partition != wanted:
                self._partitions.ensure(partition)
                name = InsertKey(f"{self.state.name}/{partition}", number)
            imported, bad = self._send_part(name, partition, part)
            done.imported += imported
            done.bad |= bad
        return done

    def _send_part(self, name: InsertKey, partition: str, chunk: Chunk) -> tuple[int, dict[int, str]]:
        """Write the rows that fit; return (how many, reasons for the others)."""
        columns = as_columns(chunk, self._schema)
        if columns is not None:
            try:
                self._insert(name, partition, columns, len(chunk.rows))
                return len(chunk.rows), chunk.bad
            except Refused as refused:
                if refused.code not in BAD_ROW_CODES:
                    raise
        good, bad = as_rows(chunk, self._schema)
        if good:
            self._insert(name, partition, good, len(good))
        return len(good), bad

    def _insert(self, name: InsertKey, partition: str, rows: Any, count: int) -> None:
        state = self.state
        try:
            written = self._remote.call(
                "/entities/insert",
                self._body(rows, partition),
                headers={KEY: f"{name.name}/{name.number}"},
                patient=lambda refused: refused.code in PASSING and TOO_LATE not in refused.message,
            )
        except Refused as refused:
            if refused.code == TOO_LARGE_CODE:
                raise Refused(
                    refused.code, f"{refused.message}: begin anew with fewer --batch-rows than {state.batch_rows}"
                ) from None
            if TOO_LATE not in refused.message:
                raise
            self._insert_late(name, partition, rows, count)
            return
        if written["insertCount"] != count:
            raise Refused(
                0,
                f"rows {name.number % ROWS_OF_FILE_MAX} and following were written before as "
                f"{written['insertCount']} rows, and are {count} now: the collection's schema changed in between, or "
                "the file did",
            )

    def _insert_late(self, name: InsertKey, partition: str, rows: Any, count: int) -> None:
        """Write what is missing of a batch of which the shards do not remember whether they have it."""
        primary = self._schema.primary
        if not primary.auto_id:
            self._remote.call("/entities/upsert", self._body(rows, partition))
            return
        keys: list[Any] = name.ids(CollectionId(self.state.collection_id), count).tolist()
        if primary.type is DataType.VARCHAR:
            keys = [str(one) for one in keys]
        there: set[Any] = set()
        for start in range(0, count, LOOKUP_ROWS):
            asked = {
                "collectionName": self.state.collection,
                "id": keys[start : start + LOOKUP_ROWS],
                "outputFields": [primary.name],
                "consistencyLevel": "Strong",
            }
            there.update(row[primary.name] for row in self._remote.call("/entities/get", asked))
        if len(there) == count:
            return
        if there:
            raise Refused(
                0,
                f"{len(there)} of the {count} rows from {name.number % ROWS_OF_FILE_MAX} on are there, and the others "
                "can not be told apart: delete these and begin anew",
            )
        again = {KEY: f"{name.name}.late/{name.number}"}
        self._remote.call("/entities/insert", self._body(rows, partition), headers=again)

    def _body(self, rows: Any, partition: str) -> Mapping[str, Any]:
        body = {"collectionName": self.state.collection, "data": rows}
        return body | {"partitionName": partition} if partition else body
