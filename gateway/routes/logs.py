"""`/v1/logs`: the log lines of one request, from all gateways and workers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, AuditDep, PartsDep
from gateway.log_search import ProcessLog

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

ID = r"^(req|job|batch|resp|file)_[A-Za-z0-9_-]{1,60}$"
MAX_LINES = 1000


@router.get("/v1/logs")
async def search_logs(
    parts: PartsDep,
    _: AdminReader,
    audit: AuditDep,
    id: Annotated[str, Query(pattern=ID)],  # noqa: A002 - the parameter's public name
    limit: Annotated[int, Query(ge=1, le=MAX_LINES)] = MAX_LINES,
) -> dict[str, Any]:
    """Return the log lines that hold an id, oldest first, and what is known of each process."""
    audit.target = id
    processes = await parts.log_search.search(id, limit)
    lines = [log_line(process, line) for process in processes for line in process.lines]
    lines.sort(key=lambda line: line["timestamp"])
    return {
        "object": "list",
        "data": lines[-limit:],
        "has_more": len(lines) > limit or any(one.answer is not None and one.answer.has_more for one in processes),
        "processes": [process_object(process) for process in processes],
    }


def log_line(process: ProcessLog, line: dict[str, Any]) -> dict[str, Any]:
    """Return a log line as the API shows it."""
    head = {name: str(line.pop(name, ""))[:200] for name in ("timestamp", "level", "event")}
    return {"object": "log_line", "process": process.id, "kind": process.kind, **head, "fields": line}


def process_object(process: ProcessLog) -> dict[str, Any]:
    """Return what the answer of a process covers."""
    answer = process.answer
    return {
        "id": process.id,
        "kind": process.kind,
        "answered": answer is not None,
        "lines": len(process.lines),
        "oldest_at": (answer.oldest_at or None) if answer is not None else None,
        "is_complete": answer.is_complete if answer is not None else None,
        "has_more": answer.has_more if answer is not None else None,
    }
