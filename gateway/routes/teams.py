"""`/v1/teams`: create, list, change and delete teams."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway import clock
from gateway.dependencies import KeyAdmin, Parts, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.limits.effective import assigned_budgets
from gateway.operator_requests import NewTeam, TeamUpdate
from gateway.routes.budgets import budget_objects, check_budgets
from schemas.keys import LIMITS, Team

router = APIRouter(tags=["operation"])


@router.post("/v1/teams", status_code=201)
async def create_team(request: Request, parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """Create a team. Only the response to the request that sets `budget_webhook` contains `webhook_secret`."""
    body = await read_json(request, NewTeam)
    team_id = check_name(body.id, "a team's id", "id")
    check_budgets(parts, body)
    team = await parts.teams.create(team_id, expires_at=body.end(clock.now()), **body.limits())
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
async def change_team(team_id: str, request: Request, parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """Change a team's end or limits. All gateways apply the change within milliseconds, in the worst case within seconds."""
    body = await read_json(request, TeamUpdate)
    check_budgets(parts, body)
    changes = body.limits()
    if body.sets_end():
        changes["expires_at"] = body.end(clock.now())
    secret = (await parts.teams.get(team_id)).webhook_secret
    return _changed_object(parts, await parts.teams.change(team_id, **changes), secret)


@router.delete("/v1/teams/{team_id:path}")
async def delete_team(team_id: str, parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """Delete a team that has no key. Its jobs and files stay until their retention ends."""
    await parts.teams.delete(team_id)
    return {"id": team_id, "object": "team", "deleted": True}


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
        "created_at": team.created_at,
        "expires_at": team.expires_at,
    }
