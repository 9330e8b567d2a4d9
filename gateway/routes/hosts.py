"""`/v1/hosts`: the workers by host; `/v1/workers/{worker_id}/logs`: what a worker logged last."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, PartsDep
from gateway.routes.logs import log_line
from schemas.errors import NotFound, Unavailable
from schemas.logs import LogQuery

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

MAX_LINES = 500


@router.get("/v1/hosts")
async def list_hosts(parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """List the hosts with their workers, and those that vanished a while ago."""
    return {"object": "list", "data": parts.hosts.hosts()}


@router.get("/v1/workers/{worker_id}/logs")
async def tail_worker_log(
    worker_id: str, parts: PartsDep, _: AdminReader, limit: Annotated[int, Query(ge=1, le=MAX_LINES)] = 100
) -> dict[str, Any]:
    """Return the newest log lines of one worker, oldest first."""
    snapshot = parts.dispatcher.registry.snapshot
    if snapshot is None or worker_id not in snapshot.workers:
        raise NotFound(
            f"Worker '{worker_id[:100]}' does not exist. `GET /v1/workers` lists all workers.", code="worker_not_found"
        )
    [process] = await parts.log_search.ask(LogQuery(limit=limit), worker_id)
    if process.answer is None:
        raise Unavailable(
            f"The worker '{worker_id[:100]}' did not answer in time. Read its log on its host.", code="worker_silent"
        )
    lines = [log_line(process, line) for line in process.lines][-limit:]
    return {"object": "list", "data": lines, "has_more": process.answer.has_more}
