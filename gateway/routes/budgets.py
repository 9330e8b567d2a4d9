"""`/v1/budgets`: what is spent and left of budgets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query

from gateway.audit.route import AuditedRoute
from gateway.dependencies import Parts, PartsDep, UsageReader
from gateway.limits.budget_state import budget_object
from gateway.limits.effective import AssignedBudget
from gateway.operator_requests import LimitFields
from schemas.budgets import BudgetUnit
from schemas.errors import InvalidRequest, NexusError
from schemas.keys import Scope

router = APIRouter(tags=["usage"], route_class=AuditedRoute)


@router.get("/v1/budgets")
async def list_budgets(
    parts: PartsDep,
    caller: UsageReader,
    after: Annotated[str, Query(max_length=600)] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
) -> dict[str, Any]:
    """List the budgets of the caller's key and team; with the scope `admin:read`, of all keys and teams."""
    sees_all = Scope.ADMIN_READ in caller.scopes
    assigned = parts.keys.assigned_budgets() if sees_all else sorted(caller.limits.budgets, key=lambda one: one.name)
    page = [one for one in assigned if one.name > after][: limit + 1]
    data = await budget_objects(parts, page[:limit])
    has_more = len(page) > limit
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "next_after": page[limit - 1].name if has_more else None,
    }


async def budget_objects(parts: Parts, budgets: Iterable[AssignedBudget]) -> list[dict[str, Any]]:
    """Return the API's objects for budgets. Raises Unavailable."""
    return [budget_object(await parts.budgets.state(assigned), parts.budgets.meter.currency()) for assigned in budgets]


def check_budgets(parts: Parts, body: LimitFields) -> None:
    """Raise InvalidRequest for budgets that this gateway cannot keep, and for a webhook that it cannot reach."""
    units = {budget.unit for budget in body.budgets or ()}
    if units and not parts.usage.has_ledger:
        raise InvalidRequest(
            "Budgets need the usage ledger, which this gateway does not have. Its operator must set LEDGER_URL.",
            param="budgets",
            code="no_ledger",
        )
    if BudgetUnit.COST in units and not parts.budgets.meter.currency():
        raise InvalidRequest(
            "A budget of cost needs a price list, which this gateway does not have. Its operator must set LEDGER_PRICES_FILE.",
            param="budgets",
            code="no_prices",
        )
    if body.budget_webhook is not None:
        try:
            parts.check_webhook(body.budget_webhook)
        except InvalidRequest as error:
            raise NexusError.from_info(error.info.model_copy(update={"param": "budget_webhook"})) from None
