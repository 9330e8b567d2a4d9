"""`/v1/audit`: who did what to what, from where, with which result."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from gateway.audit.query import parse_export_request, parse_page_request
from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, PartsDep
from gateway.usage.query import group_parameters

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

JSON_LINES = "application/jsonl"


@router.get("/v1/audit")
async def list_audit_events(request: Request, parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """List audit events, newest first."""
    parts.audit.require_store()
    return await parts.audit.page(parse_page_request(group_parameters(request.query_params.multi_items())))


@router.get("/v1/audit/export")
async def export_audit_events(request: Request, parts: PartsDep, _: AdminReader) -> StreamingResponse:
    """Return all audit events as JSON lines, in the order of their `sequence`."""
    parts.audit.require_store()
    query, after = parse_export_request(group_parameters(request.query_params.multi_items()))
    pieces = parts.audit.export(query, after)
    first = await anext(pieces, b"")  # a failure here can still be sent as an error
    return StreamingResponse(_resume(first, pieces), media_type=JSON_LINES)


async def _resume(first: bytes, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece
