"""`/v1/inspector`: keep a team's requests and answers for a limited time, and read them."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gateway import clock
from gateway.audit.route import AuditedRoute
from gateway.dependencies import AuditDep, Caller, KeyAdmin, PartsDep
from gateway.http.request_body import read_json
from gateway.operator_requests import InspectionStart
from schemas.errors import InvalidRequest
from schemas.inspection import Inspection

own_router = APIRouter(tags=["operation"])
router = APIRouter(tags=["operation"], route_class=AuditedRoute)

MAX_INSPECTED_TEAMS = 10
Team = Annotated[str, Query(min_length=1, max_length=200)]


@own_router.get("/v1/inspector")
async def get_own_inspection(caller: Caller) -> dict[str, Any]:
    """Return whether administrators inspect the caller's requests."""
    return inspection_object(caller.owner, caller.limits.inspection)


@router.get("/v1/inspector/teams")
async def list_inspections(parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """List the teams that are inspected."""
    active = [team for team in parts.keys.inspected_teams() if is_active(team.inspection)]
    data = [inspection_object(team.id, team.inspection) for team in sorted(active, key=lambda team: team.id)]
    return {"object": "list", "data": data}


@router.put("/v1/inspector/teams/{team_id:path}")
async def start_inspection(
    team_id: str, request: Request, parts: PartsDep, _: KeyAdmin, audit: AuditDep
) -> dict[str, Any]:
    """Keep a team's requests from now on, or change for how long."""
    body = await read_json(request, InspectionStart)
    audit.target_team = team_id
    team = await parts.teams.get(team_id)
    if "none" in (team.retain, parts.keys.team_limits(team_id).retain):
        raise InvalidRequest(
            "Nothing is kept of this team's requests (`retain: none`), so that they cannot be inspected.",
            code="retention_not_allowed",
        )
    others = [one for one in parts.keys.inspected_teams() if is_active(one.inspection) and one.id != team_id]
    if len(others) >= MAX_INSPECTED_TEAMS:
        raise InvalidRequest(
            f"{MAX_INSPECTED_TEAMS} teams are inspected already, the most that are possible. Stop one."
        )
    inspection = Inspection(
        until=math.ceil(clock.now() + body.duration_s),
        max_requests=body.max_requests,
        keep_s=body.keep_s,
        redact=tuple(body.redact),
    )
    changed = await parts.teams.change(team_id, inspection=inspection)
    audit.compare(audited(team.inspection), audited(changed.inspection))
    return inspection_object(team_id, changed.inspection)


@router.delete("/v1/inspector/teams/{team_id:path}")
async def stop_inspection(team_id: str, parts: PartsDep, _: KeyAdmin, audit: AuditDep) -> dict[str, Any]:
    """Stop, and delete what was kept."""
    audit.target_team = team_id
    team = await parts.teams.get(team_id)
    await parts.teams.change(team_id, inspection=None)
    await parts.inspector.forget(team_id)
    audit.compare(audited(team.inspection), None)
    return inspection_object(team_id, None)


@router.get("/v1/inspector/requests")
async def list_inspected_requests(team: Team, parts: PartsDep, _: KeyAdmin, audit: AuditDep) -> dict[str, Any]:
    """List the kept requests of a team, newest first, without their bodies."""
    audit.target_team = team
    found = await parts.inspector.list_requests(team)
    return {"object": "list", "data": [{"object": "inspected_request", **one.model_dump()} for one in found]}


@router.get("/v1/inspector/requests/{request_id}")
async def get_inspected_request(
    request_id: str, team: Team, parts: PartsDep, _: KeyAdmin, audit: AuditDep
) -> dict[str, Any]:
    """Return one kept request with its answer and its times."""
    audit.target_team = team
    return {"object": "inspected_request", **(await parts.inspector.read(team, request_id)).model_dump()}


def is_active(inspection: Inspection | None) -> bool:
    """Return whether requests are kept now."""
    return inspection is not None and clock.now() < inspection.until


def audited(inspection: Inspection | None) -> dict[str, Any] | None:
    """Return the fields whose changes are recorded."""
    return inspection.model_dump(exclude={"redact"}) if inspection is not None else None


def inspection_object(team: str, inspection: Inspection | None) -> dict[str, Any]:
    """Return the state of a team's inspection. The patterns are left out: they may be secrets themselves."""
    active = inspection if inspection is not None and is_active(inspection) else None
    return {
        "object": "inspection",
        "team": team,
        "active": active is not None,
        "until": active.until if active is not None else None,
        "max_requests": active.max_requests if active is not None else None,
        "keep_s": active.keep_s if active is not None else None,
    }
