"""`/v1/queues/{model}`: the jobs in the queue of a model, and to hold and release them."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, AuditDep, Operator, Parts, PartsDep
from gateway.http.request_body import read_json
from gateway.jobs.records import job_state_object
from gateway.operator_requests import HoldReason, LaneChoice
from schemas.errors import InvalidRequest
from schemas.jobs import Lane

router = APIRouter(tags=["operation"], route_class=AuditedRoute)


@router.get("/v1/queues/{model:path}/jobs")
async def list_queued_jobs(
    model: str,
    parts: PartsDep,
    _: AdminReader,
    after: Annotated[str, Query(max_length=40_000)] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """List the jobs that wait for a model, in the order in which they will start, and those that run."""
    name = queue_model(parts, model)
    hold = parts.holds.get(name)
    page = await parts.queues.page(name, after, limit)
    state = {
        "is_held": hold is not None,
        "held_since": hold.since if hold else None,
        "reason": hold.reason if hold else "",
    }
    return Response(orjson.dumps(page | state), media_type="application/json")


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


@router.post("/v1/admin/jobs/{job_id}/lane")
async def change_lane(
    job_id: str,
    team: Annotated[str, Query(min_length=1, max_length=200)],
    request: Request,
    parts: PartsDep,
    _: Operator,
    audit: AuditDep,
) -> dict[str, Any]:
    """Let a waiting job wait in another lane."""
    audit.target_team = team
    body = await read_json(request, LaneChoice)
    audit.compare({"lane": (await parts.jobs.get(team, job_id)).lane.value}, {"lane": body.lane})
    return job_state_object(await parts.jobs.change_lane(team, job_id, Lane(body.lane)))


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
