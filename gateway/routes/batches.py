"""`/v1/batches`: OpenAI's Batch API."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gateway.dependencies import JobsCaller, PartsDep
from gateway.http.request_body import read_json
from gateway.pagination import list_object
from gateway.signed_urls import base_url
from schemas.batches import BatchRequest

router = APIRouter(tags=["batches"])

MAX_PAGE_SIZE = 100
DEFAULT_PAGE_SIZE = 20


@router.post("/v1/batches")
async def create_batch(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Create a batch."""
    body = await read_json(request, BatchRequest)
    await parts.budgets.require_some(caller.limits)
    return (await parts.batches.create(caller, body, base_url(request.scope))).to_openai()


@router.get("/v1/batches")
async def list_batches(
    parts: PartsDep,
    caller: JobsCaller,
    after: Annotated[str, Query(max_length=100)] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = DEFAULT_PAGE_SIZE,
) -> dict[str, Any]:
    """List the caller's batches, newest first."""
    found, more = await parts.batches.page(caller.owner, after=after, limit=limit)
    return list_object(found, more)


@router.get("/v1/batches/{batch_id}")
async def get_batch(batch_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Return a batch."""
    return (await parts.batches.get(caller.owner, batch_id)).to_openai()


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Cancel a batch. Its output file holds the responses that are complete by then."""
    return (await parts.batches.cancel(caller.owner, batch_id)).to_openai()
