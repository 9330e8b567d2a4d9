"""`/v1/services`: the registry's records of HTTP services that Nexus serves."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fastapi import APIRouter, Request

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, AuditDep, Operator, Parts, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.operator_requests import ServiceRegistration
from schemas.errors import InvalidRequest, NotFound
from schemas.presence import RegistrySnapshot, ServiceRecord, WorkerState

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

BACKEND = "service"
"""The adapter that serves registered services."""


@router.get("/v1/services")
async def list_services(parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """List all records with the state of the worker that serves each, or null."""
    snapshot = parts.dispatcher.registry.snapshot or RegistrySnapshot()
    records = sorted(snapshot.services.values(), key=lambda record: record.name)
    return {"object": "list", "data": [_service_object(record, snapshot) for record in records]}


@router.put("/v1/services/{name:path}")
async def put_service(name: str, request: Request, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Register a service, or replace its record, for example after it has moved."""
    body = await read_json(request, ServiceRegistration)
    if body.name not in {None, name}:
        raise InvalidRequest(
            "The name in the body differs from the name in the path. Use the same name or remove it from the body.",
            param="name",
        )
    record = ServiceRecord.model_validate(body.model_dump() | {"name": check_name(name, "a service's name", "name")})
    audit.compare(_audited(parts, record.name), _address(record))
    await parts.dispatcher.registry.put_service(record)
    return _service_object(record, parts.dispatcher.registry.snapshot or RegistrySnapshot())


@router.delete("/v1/services/{name:path}")
async def remove_service(name: str, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Delete a service's record. The service itself keeps running."""
    audit.compare(_audited(parts, name), None)
    if not await parts.dispatcher.registry.remove_service(name):
        raise NotFound(
            f"Service '{name[:100]}' does not exist. `GET /v1/services` lists all services.", code="service_not_found"
        )
    return {"id": name, "object": "service", "deleted": True}


def _audited(parts: Parts, name: str) -> dict[str, Any] | None:
    """Return the present addresses of a service; None: there is none."""
    snapshot = parts.dispatcher.registry.snapshot or RegistrySnapshot()
    record = snapshot.services.get(name)
    return _address(record) if record is not None else None


def _address(record: ServiceRecord) -> dict[str, str]:
    """Return the fields of a record that are recorded, without passwords and queries in URLs: others may be secret."""
    return {name: _without_secrets(getattr(record, name)) for name in ("base_url", "metadata_url")}


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _service_object(record: ServiceRecord, snapshot: RegistrySnapshot) -> dict[str, Any]:
    """Return the API's service object. Workers name a service as the owner of its models."""
    workers = [worker for worker in snapshot.workers.values() if worker.backend == BACKEND]
    states = {worker.state for worker in workers if any(model.owned_by == record.name for model in worker.models)}
    state = next((state for state in WorkerState if state in states), None)
    return record.model_dump() | {"id": record.name, "object": "service", "state": state}
