"""`/v1/queues/{model}`: hold and release the waiting jobs of a model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AuditDep, Operator, Parts, PartsDep
from gateway.http.request_body import read_json
from gateway.operator_requests import HoldReason
from schemas.errors import InvalidRequest

router = APIRouter(tags=["operation"], route_class=AuditedRoute)


@router.post("/v1/queues/{model:path}/hold")
async def hold_queue(model: str, request: Request, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Hold a model's waiting jobs; those that run go on."""
    body = await read_json(request, HoldReason)
    name = queue_model(parts, model)
    before = parts.holds.get(name)
    audit.compare(before.model_dump(include={"reason"}) if before is not None else None, body.model_dump())
    hold = await parts.holds.hold(name, body.reason)
    return {"model": name, "object": "queue", "is_held": True, "held_since": hold.since, "reason": hold.reason}


@router.post("/v1/queues/{model:path}/release")
async def release_queue(model: str, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Release a model's held jobs. It changes nothing where they are not held."""
    name = queue_model(parts, model)
    before = parts.holds.get(name)
    audit.compare(before.model_dump(include={"reason"}) if before is not None else None, None)
    await parts.holds.release(name)
    return {"model": name, "object": "queue", "is_held": False, "held_since": None, "reason": ""}


def queue_model(parts: Parts, name: str) -> str:
    """Return the model whose queue a request means. Raises ModelNotFound; InvalidRequest for an alias, whose jobs wait for its target."""
    catalog = parts.dispatcher.catalog
    if catalog.is_alias(name):
        raise InvalidRequest(
            f"'{name[:100]}' is an alias: its jobs wait in the queues of its targets. Name one of those.", param="model"
        )
    found = catalog.get(name)
    if found is not None:
        return found.name
    if parts.holds.get(name) is not None:
        return name
    raise catalog.not_found(name)
