"""`/health`, `/readyz`, `/metrics`, `/v1/workers` and `/v1/queues`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, Operator, Parts, PartsDep
from gateway.health import Readiness
from schemas.control import Control, ControlOp
from schemas.errors import NexusError, NotFound
from schemas.keys import Scope

health_router = APIRouter(tags=["operation"])
public_readiness = APIRouter(tags=["operation"])
readiness = APIRouter(tags=["operation"])
metrics_router = APIRouter(tags=["operation"])
router = APIRouter(tags=["operation"], route_class=AuditedRoute)


@health_router.get("/health")
async def health() -> dict[str, str]:
    """Return 200 while the process runs."""
    return {"status": "ok"}


@public_readiness.get("/readyz")
async def public_readyz(request: Request, parts: PartsDep) -> JSONResponse:
    """Return 200 `ready` or 503 `unavailable`, for load balancers. An admin key receives the full readiness."""
    found = await parts.readiness.get()
    if _is_admin(request, parts):
        return _readiness(found)
    return JSONResponse({"status": "ready" if found.ok else "unavailable"}, status_code=200 if found.ok else 503)


@readiness.get("/readyz")
async def readyz(parts: PartsDep) -> JSONResponse:
    """Return 200 `ready` or `degraded`, or 503 `unavailable` or `leaving`, with the state of each server."""
    return _readiness(await parts.readiness.get())


def _readiness(found: Readiness) -> JSONResponse:
    return JSONResponse(found.model_dump(), status_code=200 if found.ok else 503)


def _is_admin(request: Request, parts: Parts) -> bool:
    headers = request.scope["headers"]
    if not any(name == b"authorization" for name, _ in headers):
        return False
    try:
        parts.auth.authenticate(request.scope).require(Scope.ADMIN_READ)
    except NexusError:
        return False
    return True


@metrics_router.get("/metrics")
async def metrics(request: Request, parts: PartsDep) -> Response:
    """Return the metrics in Prometheus's text format, at most one second old."""
    text, content_type = await parts.exposition.scrape(request.headers.get("accept", ""))
    return Response(text, media_type=content_type)


@router.get("/v1/workers")
async def list_workers(parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """List all workers in the registry."""
    snapshot = parts.dispatcher.registry.snapshot
    workers = sorted(snapshot.workers.values(), key=lambda w: w.id) if snapshot else []
    return {"object": "list", "data": [worker.model_dump(mode="json") for worker in workers]}


@router.post("/v1/workers/{worker_id}/drain", status_code=202)
async def drain_worker(worker_id: str, parts: PartsDep, _: Operator) -> dict[str, str]:
    """Tell a worker to finish its jobs and stop."""
    snapshot = parts.dispatcher.registry.snapshot
    if snapshot is None or worker_id not in snapshot.workers:
        raise NotFound(
            f"Worker '{worker_id[:100]}' does not exist. `GET /v1/workers` lists all workers.", code="worker_not_found"
        )
    parts.dispatcher.bus.send_control(worker_id, Control(op=ControlOp.DRAIN).model_dump_json().encode())
    return {"id": worker_id, "state": "draining"}


@router.get("/v1/queues")
async def list_queues(parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """List all queues that hold a job."""
    depths = await parts.dispatcher.bus.queue_depths()
    data = [
        {
            "capability": d.queue.capability,
            "lane": d.queue.lane,
            "model": d.queue.model,
            "depth": d.waiting,
            "in_progress": d.in_progress,
        }
        for d in depths
    ]
    return {"object": "list", "data": sorted(data, key=lambda q: (q["capability"], q["lane"], q["model"]))}
