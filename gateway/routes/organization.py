"""`/v1/organization`: usage and costs in OpenAI's own shapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway import clock
from gateway.audit.route import AuditedRoute
from gateway.dependencies import PartsDep, UsageReader
from gateway.routes.usage import visible_team
from gateway.usage.organization import KINDS, costs_page, usage_page
from gateway.usage.query import group_parameters

router = APIRouter(tags=["usage"], route_class=AuditedRoute)


def _add_usage_route(name: str) -> None:
    async def get_usage(request: Request, parts: PartsDep, caller: UsageReader) -> dict[str, Any]:
        parameters = group_parameters(request.query_params.multi_items())
        return await usage_page(parts.usage, name, parameters, own_team=visible_team(caller), now=clock.now())

    router.add_api_route(f"/v1/organization/usage/{name}", get_usage, methods=["GET"])


for _name in KINDS:
    _add_usage_route(_name)


@router.get("/v1/organization/costs")
async def get_costs(request: Request, parts: PartsDep, caller: UsageReader) -> dict[str, Any]:
    """Return costs by day. A key without the scope `admin:read` sees its own team."""
    parameters = group_parameters(request.query_params.multi_items())
    return await costs_page(parts.usage, parameters, own_team=visible_team(caller), now=clock.now())
