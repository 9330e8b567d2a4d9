"""`/v1/services`: HTTP services that are served without knowing of Nexus, by their records in the registry."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.dependencies import AdminCaller, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.operator_requests import Record
from schemas.errors import InvalidRequest, NotFound
from schemas.presence import RegistrySnapshot, ServiceRecord, WorkerState

router = APIRouter(tags=["operation"])

BACKEND = "service"
"""The adapter that serves what is recorded here."""


@router.get("/v1/services")
async def list_services(parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Every record, with the state of the worker that serves it; null while none does."""
    snapshot = parts.dispatcher.registry.snapshot or RegistrySnapshot()
    records = sorted(snapshot.services.values(), key=lambda record: record.name)
    return {"object": "list", "data": [_shape(record, snapshot) for record in records]}


@router.put("/v1/services/{name:path}")
async def put_service(name: str, request: Request, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Enter a service, or replace its record: a service that has moved is served at its new place."""
    body = await read_json(request, Record)
    if body.name not in {None, name}:
        raise InvalidRequest("the name in the body is not the one in the path", param="name")
    record = ServiceRecord.model_validate(body.model_dump() | {"name": check_name(name, "a service's name", "name")})
    await parts.dispatcher.registry.put_service(record)
    return _shape(record, parts.dispatcher.registry.snapshot or RegistrySnapshot())


@router.delete("/v1/services/{name:path}")
async def remove_service(name: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Remove a service's record. The service itself is left alone."""
    if not await parts.dispatcher.registry.remove_service(name):
        raise NotFound(f"there is no service '{name[:100]}'; GET /v1/services lists them", code="service_not_found")
    return {"id": name, "object": "service", "deleted": True}


def _shape(record: ServiceRecord, snapshot: RegistrySnapshot) -> dict[str, Any]:
    """A worker for services names each as the owner of the models that it serves."""
    workers = [worker for worker in snapshot.workers.values() if worker.backend == BACKEND]
    states = {worker.state for worker in workers if any(model.owned_by == record.name for model in worker.models)}
    state = next((state for state in WorkerState if state in states), None)
    return record.model_dump() | {"id": record.name, "object": "service", "state": state}
