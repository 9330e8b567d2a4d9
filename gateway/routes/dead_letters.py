"""`/v1/dlq`: jobs that killed their workers or used up their retries. Of all owners, for operators."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query

from gateway.dependencies import AdminCaller, PartsDep
from gateway.jobs.api import StoredDeadLetter
from gateway.jobs.records import job_object
from schemas.jobs import Envelope

router = APIRouter(tags=["operation"])

MAX_SHOWN = 256 * 1024
"""Bytes of a request that are shown whole."""


@router.get("/v1/dlq")
async def list_dead_letters(
    parts: PartsDep,
    _: AdminCaller,
    before: Annotated[int | None, Query(ge=1)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """Newest first; the next page is `before` the last one's `seq`."""
    letters = await parts.jobs.dead_letters(before=before, limit=limit + 1)
    return {
        "object": "list",
        "data": [_shape(letter) for letter in letters[:limit]],
        "has_more": len(letters) > limit,
    }


@router.get("/v1/dlq/{job_id}")
async def get_dead_letter(job_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """One, with its request where that is JSON and not too large."""
    letter = await parts.jobs.dead_letter(job_id)
    return _shape(letter) | {"request": _request(letter)}


@router.post("/v1/dlq/{job_id}/replay", status_code=202)
async def replay(job_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """A new run of its job."""
    return job_object(await parts.jobs.replay(job_id))


@router.delete("/v1/dlq/{job_id}")
async def delete_dead_letter(job_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Forget it; the job stays failed."""
    await parts.jobs.delete_dead_letters(job_id)
    return {"id": job_id, "object": "dead_letter", "deleted": True}


def _shape(letter: StoredDeadLetter) -> dict[str, Any]:
    word = letter.outcome
    return {
        "id": word.job,
        "object": "dead_letter",
        "seq": letter.seq,
        "endpoint": word.endpoint,
        "model": word.public_model,
        "capability": word.capability,
        "owner": word.owner,
        "error": word.error.body()["error"] if word.error is not None else None,
        "run": word.run,
        "attempts": word.attempts,
        "worker": word.worker or None,
        "dead_at": letter.stored_at,
        "request_id": word.request_id,
        "metadata": word.metadata,
    }


def _request(letter: StoredDeadLetter) -> Any:
    if not letter.message or len(letter.message) > MAX_SHOWN:
        return None
    try:
        envelope, body = Envelope.decode(letter.message)
        return orjson.loads(body if envelope.body_size is None else body[: envelope.body_size])
    except ValueError:
        return None
