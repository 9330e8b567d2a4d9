"""The names of all keys in Redis. Parts that callers choose are percent-encoded: no invented id reaches another owner's key.

| key | type | content |
|---|---|---|
| `nexus:job:<owner>:<id>` | string | a job record as JSON, under its TTL |
| `nexus:jobs:<owner>` | sorted set, scores 0 | the ids of an owner's jobs |
| `nexus:job-owners` | sorted set, scores 0 | the owners that have such a list |
| `nexus:job-owners:complete` | string | says that no owner is missing: earlier versions did not list them |
| `nexus:queued:<key>`, `nexus:running:<key>` | sorted set by the time the record expires | `<owner>:<id>` of an API key's jobs in that status |
| `nexus:owner-queued:<owner>`, `nexus:owner-running:<owner>` | sorted set by the time the record expires | the same of an owner's jobs, over all keys |
| `nexus:timers` | sorted set by the time the timer runs out | `<owner>:<id>` of jobs |
| `nexus:lease:<job>` | string | the token of the attempt that holds it |
| `nexus:service:<capability>:<model>` | string | the mean service time of jobs, in seconds |
| `nexus:rate:<limit>` | sorted set by amount | the seconds in which something was taken of a limit per minute |
| `nexus:budget:<budget>:<start>` | hash | what was spent of a budget in the period that begins at `start`, and the gateways' shares |
| `nexus:bytes:<owner>` | sorted set by bytes | the ids of an owner's files and batches; their sum under the empty id |
| `nexus:byte-ends:<owner>` | sorted set by the time the file expires | the ids of these files |
| `nexus:bytes:<kind>:<owner>`, `nexus:byte-ends:<kind>:<owner>` | the same | other things with a size: `bodies`, `results`, `urls`, `responses`, `batches` |
| `nexus:doc:<kind>:<owner>:<id>` | string | a document |
| `nexus:docs:<kind>:<owner>` | sorted set, scores 0 | the ids of documents |

Times are Unix milliseconds by Redis's own clock. Ids stand as they are in the lists of ids, where they are sorted.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

from backbone.store.store import DueJob
from schemas.jobs import JobRecord, JobStatus

JOB = "nexus:job:"
JOBS = "nexus:jobs:"
JOB_OWNERS = "nexus:job-owners"
JOB_OWNERS_COMPLETE = "nexus:job-owners:complete"
TIMERS = "nexus:timers"


def member(owner: str, job_id: str) -> str:
    """Return a job's name in timers and counts: the part of its record's key after `JOB`."""
    return f"{_part(owner)}:{_part(job_id)}"


def parse_member(member: bytes) -> DueJob:
    """Return the job of a name from `member`."""
    owner, _, job_id = member.decode().partition(":")
    return DueJob(unquote(owner), unquote(job_id))


def job(owner: str, job_id: str) -> str:
    """Return the key of a job record."""
    return JOB + member(owner, job_id)


def jobs_prefix(owner: str) -> str:
    """Return the prefix of the keys of an owner's job records."""
    return f"{JOB}{_part(owner)}:"


def jobs_of(owner: str) -> str:
    """Return the key of the list of an owner's jobs."""
    return JOBS + _part(owner)


def owner_of(jobs: str) -> str:
    """Return the owner of a list of jobs, by its key."""
    return unquote(jobs.removeprefix(JOBS))


def queued(key: str) -> str:
    """Return the key of the jobs of an API key in status QUEUED."""
    return f"nexus:queued:{_part(key)}"


def running(key: str) -> str:
    """Return the key of the jobs of an API key in status IN_PROGRESS."""
    return f"nexus:running:{_part(key)}"


def counted_in(record: JobRecord) -> str:
    """Return the key under which the record is counted; empty: it is not counted."""
    if record.status is JobStatus.QUEUED:
        return queued(record.key)
    return running(record.key) if record.status is JobStatus.IN_PROGRESS else ""


def counted_by_owner(record: JobRecord) -> str:
    """Return the key under which the record is counted for its owner; empty: it is not counted."""
    if record.status is JobStatus.QUEUED:
        return f"nexus:owner-queued:{_part(record.owner)}"
    return f"nexus:owner-running:{_part(record.owner)}" if record.status is JobStatus.IN_PROGRESS else ""


def lease(job_id: str) -> str:
    """Return the key of the lease of a job's attempts."""
    return f"nexus:lease:{_part(job_id)}"


def rate(name: str) -> str:
    """Return the key of what was taken of a limit per minute."""
    return f"nexus:rate:{_part(name)}"


def stored_bytes(kind: str, owner: str) -> list[str]:
    """Return the keys of the sizes and of the ends of an owner's stored items of a kind. Files came first, and have no kind."""
    name = f"{_part(kind)}:{_part(owner)}" if kind else _part(owner)
    return [f"nexus:bytes:{name}", f"nexus:byte-ends:{name}"]


def budget(name: str, start: int) -> str:
    """Return the key of one period of a budget."""
    return f"nexus:budget:{_part(name)}:{start}"


def open_jobs(holder: str, holder_id: str) -> list[str]:
    """Return the keys of the jobs of a key or a team (`holder`) that wait, and that run."""
    if holder == "key":
        return [queued(holder_id), running(holder_id)]
    return [f"nexus:owner-{state}:{_part(holder_id)}" for state in ("queued", "running")]


def service(capability: str, model: str) -> str:
    """Return the key of the service time of a model."""
    return f"nexus:service:{_part(capability)}:{_part(model)}"


def documents_prefix(kind: str, owner: str) -> str:
    """Return the prefix of the keys of an owner's documents."""
    return f"nexus:doc:{_part(kind)}:{_part(owner)}:"


def document(kind: str, owner: str, doc_id: str) -> str:
    """Return the key of a document."""
    return documents_prefix(kind, owner) + _part(doc_id)


def documents_of(kind: str, owner: str) -> str:
    """Return the key of the list of an owner's documents."""
    return f"nexus:docs:{_part(kind)}:{_part(owner)}"


def _part(text: str) -> str:
    return quote(text, safe="")
