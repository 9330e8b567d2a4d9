"""Health, readiness, metrics, and what workers and queues do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.deps import AdminCaller, PartsDep
from schemas.control import Control, ControlOp
from schemas.errors import NotFound

probes = APIRouter(tags=["operation"])
router = APIRouter(tags=["operation"])


@probes.get("/health")
async def health() -> dict[str, str]:
    """The process runs."""
    return {"status": "ok"}


@probes.get("/readyz")
async def readyz(parts: PartsDep) -> JSONResponse:
    """200 `ready` or `degraded`, 503 `unavailable` or `leaving`."""
    readiness = await parts.readiness.check()
    return JSONResponse(readiness.model_dump(), status_code=200 if readiness.ok else 503)


@probes.get("/metrics")
async def metrics(parts: PartsDep) -> Response:
    """Prometheus's text format."""
    return Response(generate_latest(parts.metrics), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/workers")
async def list_workers(parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Every worker in the registry."""
    snapshot = parts.dispatcher.registry.snapshot
    workers = sorted(snapshot.workers.values(), key=lambda w: w.id) if snapshot else []
    return {"object": "list", "data": [worker.model_dump(mode="json") for worker in workers]}


@router.post("/v1/workers/{worker_id}/drain", status_code=202)
async def drain_worker(worker_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, str]:
    """Tell a worker to finish what it runs and leave."""
    snapshot = parts.dispatcher.registry.snapshot
    if snapshot is None or worker_id not in snapshot.workers:
        raise NotFound(f"there is no worker '{worker_id[:100]}'; GET /v1/workers lists them", code="worker_not_found")
    parts.dispatcher.bus.control(worker_id, Control(op=ControlOp.DRAIN).model_dump_json().encode())
    return {"id": worker_id, "state": "draining"}


@router.get("/v1/queues")
async def list_queues(parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Every queue that holds a job."""
    depths = await parts.dispatcher.bus.depths()
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
