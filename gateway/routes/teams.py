"""`/v1/teams`: create, list, change and delete teams."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway import clock
from gateway.audit.limits import audited_limits
from gateway.audit.route import AuditedRoute
from gateway.dependencies import AuditDep, KeyAdmin, Parts, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.limits.effective import assigned_budgets
from gateway.operator_requests import NewTeam, TeamUpdate
from gateway.routes.budgets import budget_objects, check_budgets
from schemas.keys import LIMITS, Team

router = APIRouter(tags=["operation"], route_class=AuditedRoute)


@router.post("/v1/teams", status_code=201)
async def create_team(request: Request, parts: PartsDep, _: KeyAdmin, audit: AuditDep) -> dict[str, Any]:
    """Create a team. Only the response to the request that sets `budget_webhook` contains `webhook_secret`."""
    body = await read_json(request, NewTeam)
    team_id = audit.target = audit.target_team = check_name(body.id, "a team's id", "id")
    check_budgets(parts, body)
    team = await parts.teams.create(team_id, expires_at=body.end(clock.now()), **body.changes())
    audit.compare(None, audited_team(team))
    return _changed_object(parts, team, "")


@router.get("/v1/teams")
async def list_teams(parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """List all teams, sorted by id."""
    return {"object": "list", "data": [_team_object(parts, team) for team in await parts.teams.list_all()]}


@router.get("/v1/teams/{team_id:path}")
async def get_team(team_id: str, parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """Return one team, and what is left of its budgets."""
    team = await parts.teams.get(team_id)
    usage = await budget_objects(parts, assigned_budgets("team", team.id, team))
    return _team_object(parts, team) | {"budget_usage": usage}


@router.patch("/v1/teams/{team_id:path}")
async def change_team(team_id: str, request: Request, parts: PartsDep, _: KeyAdmin, audit: AuditDep) -> dict[str, Any]:
    """Change a team's end, weight or limits. All gateways apply the change within milliseconds, in the worst case within seconds."""
    body = await read_json(request, TeamUpdate)
    check_budgets(parts, body)
    changes = body.changes()
    if body.sets_end():
        changes["expires_at"] = body.end(clock.now())
    audit.target_team = team_id
    old = await parts.teams.get(team_id)
    new = await parts.teams.change(team_id, **changes)
    audit.compare(audited_team(old), audited_team(new))
    return _changed_object(parts, new, old.webhook_secret)


@router.delete("/v1/teams/{team_id:path}")
async def delete_team(team_id: str, parts: PartsDep, _: KeyAdmin, audit: AuditDep) -> dict[str, Any]:
    """Delete a team that has neither keys nor people. Its jobs and files stay until their retention ends."""
    audit.target_team = team_id
    old = await parts.teams.get(team_id)
    await parts.teams.delete(team_id)
    audit.compare(audited_team(old), None)
    return {"id": team_id, "object": "team", "deleted": True}


def audited_team(team: Team) -> dict[str, Any]:
    """Return the fields of a team whose changes are recorded. None of them is a secret."""
    return audited_limits(team) | {"weight": team.weight, "expires_at": team.expires_at}


def _changed_object(parts: Parts, team: Team, secret_before: str) -> dict[str, Any]:
    secret = {"webhook_secret": team.webhook_secret} if team.webhook_secret not in ("", secret_before) else {}
    return _team_object(parts, team) | secret


def _team_object(parts: Parts, team: Team) -> dict[str, Any]:
    limits, effective = {name: getattr(team, name) for name in LIMITS}, parts.keys.team_limits(team.id)
    return {
        "id": team.id,
        "object": "team",
        **limits,
        "effective_limits": {name: getattr(effective, name) for name in LIMITS},
        "weight": team.weight,
        "created_at": team.created_at,
        "expires_at": team.expires_at,
    }
