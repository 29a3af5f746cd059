"""Compactions that a client asked for: which shards have yet to do theirs. Every node knows, so any can answer.

The leader of the control group asks the shards' leaders, one after the other, and notes who is done; another leader
goes on with those that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.catalog import Catalog
from cluster.message import Message
from storage.errors import CollectionNotFound
from storage.types import CollectionId, ShardId

JOBS_MAX: Final = 1_000
"""The oldest is forgotten when there are more."""


@dataclass(frozen=True)
class BeginCompaction(Message):
    """Merge what can be merged of a collection. Answers the id of the job."""

    kind = "begin_compaction"
    collection_id: CollectionId


@dataclass(frozen=True)
class CompactedShard(Message):
    """A shard has done its part of a job, or has nothing of the collection any more."""

    kind = "compacted_shard"
    job_id: int
    shard: ShardId


@dataclass(frozen=True)
class Job:
    job_id: int
    collection_id: CollectionId
    left: tuple[ShardId, ...]
    """Shards that are not done yet."""


class Jobs:
    """The compactions that are under way, and the last ones that were."""

    def __init__(self, known: Iterable[Job] = ()) -> None:
        self.known: dict[int, Job] = {one.job_id: one for one in known}

    @property
    def open(self) -> list[Job]:
        return [one for one in self.known.values() if one.left]

    def begin(self, catalog: Catalog, message: BeginCompaction) -> Mapping[str, Any]:
        """Raises CollectionNotFound."""
        found = catalog.collections.get(message.collection_id)
        if found is None:
            raise CollectionNotFound("", f"id {message.collection_id}")
        if len(self.known) >= JOBS_MAX:
            del self.known[next(iter(self.known))]
        job = Job(catalog.fresh_id(), found.collection_id, tuple(sorted(set(found.shards))))
        self.known[job.job_id] = job
        return {"job": job.job_id}

    def done(self, message: CompactedShard) -> None:
        job = self.known.get(message.job_id)
        if job is not None:
            left = tuple(one for one in job.left if one != message.shard)
            self.known[job.job_id] = Job(job.job_id, job.collection_id, left)

    def copy(self) -> Jobs:
        return Jobs(self.known.values())

    def to_plain(self) -> list[list[Any]]:
        return [[one.job_id, one.collection_id, list(one.left)] for one in self.known.values()]

    @classmethod
    def from_plain(cls, plain: Iterable[Sequence[Any]]) -> Jobs:
        return cls(Job(job_id, collection_id, tuple(left)) for job_id, collection_id, left in plain)
