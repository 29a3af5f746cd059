"""Handlers of import jobs (`node/bulk/jobs.py`, `jobs_anywhere.py`), in Milvus's words."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from node.api.calls import Call, Handler
from node.api.replies import success
from node.bulk.jobs import Job
from node.bulk.jobs_anywhere import JobsAnywhere
from storage.errors import InvalidParameter

Envelope = Mapping[str, Any]


async def create_import(call: Call) -> Envelope:
    values = call.values
    files = values["files"]
    if not isinstance(files, list) or not all(
        isinstance(group, list) and all(isinstance(one, str) for one in group) for group in files
    ):
        raise InvalidParameter("files is a list of lists of names, each list one table: invalid parameter")
    jobs: JobsAnywhere = call.service.imports
    job_id = await jobs.mine.create(call.database, call.collection, files, values["partitionName"], values["options"])
    return success({"jobId": str(job_id)})


async def list_imports(call: Call) -> Envelope:
    shown = []
    jobs: JobsAnywhere = call.service.imports
    known, silent = await jobs.known(call.database, call.collection)
    for one in known:
        record = {"jobId": str(one.job_id), "collectionName": one.collection, "state": one.state}
        shown.append({**record, "progress": one.progress, **_reason(one)})
    why = f"nodes that do not answer, and whose jobs are not here: {', '.join(silent)}" if silent else None
    return success({"records": shown}, message=why)


async def describe_import(call: Call) -> Envelope:
    jobs: JobsAnywhere = call.service.imports
    job = await jobs.describe(call.values["jobId"])
    known = [one for one in job.totals if one is not None]
    times = {"createTime": _time(job.created_ms), "completeTime": _time(job.completed_ms)}
    facts: dict[str, Any] = {
        "jobId": str(job.job_id),
        **times,
        "collectionName": job.collection,
        "state": job.state,
        "progress": job.progress,
        "importedRows": job.imported,
        "totalRows": sum(known),
        "fileSize": sum(job.bytes),
        **_reason(job),
    }
    names = [name for group in job.groups for name in group]
    if len(names) == len(job.totals):  # arrays are several files of one table
        facts["details"] = [
            {
                "fileName": name,
                "fileSize": size,
                "progress": 100 if job.state == "Completed" else min(99, 100 * done // total) if total else 0,
                "completeTime": times["completeTime"],
                "state": job.state,
                "importedRows": done,
                "totalRows": total or 0,
            }
            for name, size, done, total in zip(names, job.bytes, job.done, job.totals, strict=True)
        ]
    return success(facts)


def _reason(job: Job) -> dict[str, str]:
    return {"reason": "; ".join(reversed(job.reasons))} if job.reasons else {}


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if ms else ""


HANDLERS: Final[Mapping[str, Handler]] = {one.__name__: one for one in (create_import, list_imports, describe_import)}
