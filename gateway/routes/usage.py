"""`/v1/usage`: what teams, keys and models have used. OpenAI's own shapes are in `organization`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gateway import clock
from gateway.audit.route import AuditedRoute
from gateway.auth.authenticator import Principal
from gateway.dependencies import PartsDep, UsageReader
from gateway.usage.query import group_parameters, parse_usage_request
from gateway.usage.report import usage_csv, usage_object
from schemas.keys import Scope

router = APIRouter(tags=["usage"], route_class=AuditedRoute)

CSV = "text/csv"


@router.get("/v1/usage")
async def get_usage(request: Request, parts: PartsDep, caller: UsageReader) -> Response:
    """Add usage up. A key without the scope `admin:read` sees its own team."""
    parts.usage.require_ledger()
    wanted = parse_usage_request(
        group_parameters(request.query_params.multi_items()),
        own_team=visible_team(caller),
        accepts_csv=CSV in request.headers.get("accept", ""),
        now=clock.now(),
    )
    if wanted.csv:
        text = await usage_csv(parts.usage, wanted.query)
        return Response(text, media_type=f"{CSV}; charset=utf-8")
    return JSONResponse(await usage_object(parts.usage, wanted.query))


def visible_team(caller: Principal) -> str | None:
    """Return the only team whose usage the caller may see; None: all."""
    return None if Scope.ADMIN_READ in caller.scopes else caller.owner
