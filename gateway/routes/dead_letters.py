"""`/v1/dlq`: dead letters of all owners, for operators."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request

from gateway.audit.entry import AuditEntry
from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, AuditDep, Operator, Parts, PartsDep
from gateway.http.request_body import read_json
from gateway.job_requests import GroupRequest
from gateway.jobs.api import StoredDeadLetter
from gateway.jobs.bulk import change_all
from gateway.jobs.dead_letter_groups import find_letters, group_letters
from gateway.jobs.records import job_object
from schemas.jobs import Envelope

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

MAX_REQUEST_BYTES = 256 * 1024
"""The maximum size of a request in a response."""


@router.get("/v1/dlq")
async def list_dead_letters(
    parts: PartsDep,
    _: AdminReader,
    before: Annotated[int | None, Query(ge=1)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """List dead letters, newest first. The next page is `before` the last one's `seq`."""
    letters = await parts.jobs.dead_letters(before=before, limit=limit + 1)
    return {
        "object": "list",
        "data": [_dead_letter_object(letter) for letter in letters[:limit]],
        "has_more": len(letters) > limit,
    }


@router.get("/v1/dead-letter-groups")
async def list_dead_letter_groups(parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """Group the newest dead letters by error and model."""
    return await group_letters(parts.jobs)


@router.post("/v1/dlq/bulk/replay")
async def replay_dead_letters(request: Request, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Start new runs of the jobs of many dead letters."""
    return await _change(request, parts, audit, parts.jobs.replay, parts.jobs.replay_letter)


@router.post("/v1/dlq/bulk/delete")
async def delete_dead_letters(request: Request, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Delete many dead letters. Their jobs stay failed."""
    return await _change(request, parts, audit, parts.jobs.delete_dead_letters, parts.jobs.delete_letter)


async def _change(
    request: Request,
    parts: Parts,
    audit: AuditEntry,
    change_job: Callable[[str], Awaitable[object]],
    change_letter: Callable[[StoredDeadLetter], Awaitable[object]],
) -> dict[str, Any]:
    body = await read_json(request, GroupRequest)
    body.require_one_form()
    next_before = None
    if body.ids is not None:
        result = await change_all(list(dict.fromkeys(body.ids)), str, change_job)
    else:
        audit.details |= {"error": body.error, "model": body.model}
        letters, next_before = await find_letters(parts.jobs, body)
        result = await change_all(letters, lambda letter: letter.outcome.job, change_letter)
    audit.details |= result.details()
    summary = result.to_object(None)
    del summary["next_after"]
    return summary | {"has_more": next_before is not None, "next_before": next_before}


@router.get("/v1/dlq/{job_id}")
async def get_dead_letter(job_id: str, parts: PartsDep, _: AdminReader, audit: AuditDep) -> dict[str, Any]:
    """Return one dead letter, with its request if that is JSON of at most `MAX_REQUEST_BYTES`."""
    letter = await parts.jobs.dead_letter(job_id)
    audit.target_team = letter.outcome.owner
    return _dead_letter_object(letter) | {"request": _request(letter)}


@router.post("/v1/dlq/{job_id}/replay", status_code=202)
async def replay(job_id: str, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Start a new run of a dead letter's job."""
    record = await parts.jobs.replay(job_id)
    audit.target_team = record.owner
    return job_object(record)


@router.delete("/v1/dlq/{job_id}")
async def delete_dead_letter(job_id: str, parts: PartsDep, _: Operator) -> dict[str, Any]:
    """Delete a dead letter. Its job stays failed."""
    await parts.jobs.delete_dead_letters(job_id)
    return {"id": job_id, "object": "dead_letter", "deleted": True}


def _dead_letter_object(letter: StoredDeadLetter) -> dict[str, Any]:
    outcome = letter.outcome
    return {
        "id": outcome.job,
        "object": "dead_letter",
        "seq": letter.seq,
        "endpoint": outcome.endpoint,
        "model": outcome.public_model,
        "capability": outcome.capability,
        "owner": outcome.owner,
        "error": outcome.error.body()["error"] if outcome.error is not None else None,
        "run": outcome.run,
        "attempts": outcome.attempts,
        "worker": outcome.worker or None,
        "dead_at": letter.stored_at,
        "request_id": outcome.request_id,
        "metadata": outcome.metadata,
    }


def _request(letter: StoredDeadLetter) -> Any:
    if not letter.message or len(letter.message) > MAX_REQUEST_BYTES:
        return None
    try:
        envelope, body = Envelope.decode(letter.message)
        return orjson.loads(body if envelope.body_size is None else body[: envelope.body_size])
    except ValueError:
        return None
