"""Import jobs as any node of a cluster tells of them: its own, and by a question those of the others.

A job's number leaves the number of the node that runs it when divided by how many nodes there can be, so that one
question finds it. A node that does not answer is named: its jobs go on there, and nobody else knows how far.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from node.bulk.jobs import ImportJobs, Job, number_of
from node.calls import Mesh
from node.members import Members
from storage.errors import AnnulusError, InvalidParameter, PeerUnreachable

JOBS: Final = "imports/jobs"
ASK_S_MAX: Final = 5.0
log = logging.getLogger(__name__)


class JobsAnywhere:
    """One per node. `mine` are the jobs that this node runs."""

    def __init__(self, mine: ImportJobs, mesh: Mesh | None, members: Members) -> None:
        """`mesh` is None for a node without peers."""
        self.mine = mine
        self._mesh = mesh
        self._members = members
        if mesh is not None:
            mesh.serve(JOBS, self._tell)

    async def describe(self, job_id: str) -> Job:
        """Raises InvalidParameter if there is no such job, PeerUnreachable if the node that has it does not answer."""
        number = int(job_id) if job_id.isascii() and job_id.isdigit() and len(job_id) < 20 else -1
        if (found := self.mine.find(number)) is not None:
            return found
        missing = InvalidParameter(f"import job {job_id[:40]!r} does not exist")
        if self._mesh is None or number < 0:
            raise missing
        name = self._members.name_of(number_of(number))
        if name is None:
            raise InvalidParameter(f"{missing.message}: if it did, the node that began it has left the cluster")
        if name == self._mesh.me:
            raise missing
        try:
            jobs = await self._ask(name, {"job_id": number})
        except PeerUnreachable as error:
            raise PeerUnreachable(
                f"import job {job_id} is one of node {name}, which does not answer: {error.message}; it goes on when "
                "the node does"
            ) from None
        if not jobs:
            raise InvalidParameter(f"{missing.message} on node {name}, which its number is one of")
        return jobs[0]

    async def known(self, database: str, collection: str = "") -> tuple[Sequence[Job], Sequence[str]]:
        """Return (the jobs of all nodes, the oldest first; names of nodes that did not answer)."""
        jobs, silent = list(self.mine.known(database, collection)), []
        if self._mesh is not None:
            others = [name for name in self._members.names if name != self._mesh.me]
            asked = {"database": database, "collection": collection}
            answers = await asyncio.gather(*(self._ask(name, asked) for name in others), return_exceptions=True)
            for name, answer in zip(others, answers, strict=True):
                if isinstance(answer, AnnulusError):
                    log.info("the import jobs of node %s are not known: %s", name, answer.message)
                    silent.append(name)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    jobs += answer
        return sorted(jobs, key=lambda one: one.job_id), silent

    async def _ask(self, name: str, asked: dict[str, Any]) -> list[Job]:
        assert self._mesh is not None
        answer, _ = await self._mesh.call(name, JOBS, asked, timeout_s=ASK_S_MAX)
        try:
            return [Job(**one) for one in answer["jobs"]]
        except (KeyError, TypeError):
            raise PeerUnreachable(f"node {name} is of another version, and tells its import jobs otherwise") from None

    async def _tell(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        if "job_id" in arguments:
            found = self.mine.find(int(arguments["job_id"]))
            jobs: Sequence[Job] = [] if found is None else [found]
        else:
            jobs = self.mine.known(str(arguments["database"]), str(arguments["collection"]))
        return {"jobs": [asdict(one) for one in jobs]}, ()
