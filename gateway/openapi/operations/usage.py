"""The descriptions of the routes of usage."""

from __future__ import annotations

from gateway.openapi.operation import JSON, JSON_TYPE, TEXT, Operation, SuccessResponse, json_response
from gateway.openapi.shapes.operators import BudgetList
from gateway.openapi.shapes.usage import UsagePage, UsageReport
from gateway.usage.organization import KINDS
from gateway.usage.query import BUCKETS, DEFAULT_LIMIT, FLAGS, FORMATS, MAX_LIMIT
from schemas.usage import DIMENSIONS

NO_LEDGER = {
    403: "The key sees its own team alone, and the query names another one.",
    404: "This gateway keeps no usage (`no_ledger`).",
}


def _text(description: str, **schema: object) -> JSON:
    return {"in": "query", "description": description, "schema": {"type": "string"} | schema}


def _whole(description: str, most: int, **schema: object) -> JSON:
    bounds = {"type": "integer", "minimum": 1, "maximum": most}
    return {"in": "query", "description": description, "schema": bounds | schema}


def _texts(description: str, **items: object) -> JSON:
    schema = {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 512} | items}
    return {"in": "query", "description": description, "schema": schema}


_TIME = "ISO 8601 (without a zone: UTC) or Unix seconds."
_QUERY: dict[str, JSON] = {
    "start": _text(f"The beginning, inclusive: {_TIME} Default: 30 days before the end.", format="date-time"),
    "end": _text(f"The end, exclusive: {_TIME} Default: now.", format="date-time"),
    "bucket": _text("The length of the intervals, in UTC. Without it there is one sum.", enum=list(BUCKETS)),
    "group_by": _texts("What to group by: repeated, or separated by commas.", enum=list(DIMENSIONS)),
    **{
        name: _text("Count only requests with this value.", enum=["true", "false"])
        if name in FLAGS
        else _texts("Count only requests with one of these values.")
        for name in DIMENSIONS
    },
    "limit": _whole("The maximum number of rows.", MAX_LIMIT, default=DEFAULT_LIMIT),
    "page": _text("The `next_page` of the previous answer.", pattern="^[0-9]{1,7}$"),
    "format": _text("`csv` for a table, as `Accept: text/csv`.", enum=list(FORMATS)),
}
_SECONDS: JSON = {"type": "integer", "minimum": 0, "maximum": 253_402_300_799}


def _openai(widths: list[str], group_by: list[str], most: int, *filters: str) -> dict[str, JSON]:
    return {
        "start_time": {"in": "query", "required": True, "description": "Unix seconds, inclusive.", "schema": _SECONDS},
        "end_time": {"in": "query", "description": "Unix seconds, exclusive. Default: now.", "schema": _SECONDS},
        "bucket_width": _text("The length of the intervals. Default: `1d`.", enum=widths),
        "group_by": _texts("What to group by.", enum=group_by),
        **{name: _texts("Count only requests with one of these values.") for name in filters},
        "limit": _whole("The maximum number of intervals in a page.", most),
        "page": _text("The `next_page` of the previous answer.", pattern="^[0-9]{1,12}$"),
    }


_FILTERS = ("project_ids", "user_ids", "api_key_ids", "models")

OPERATIONS = {
    "GET /v1/usage": Operation(
        id="getUsage",
        tag="usage",
        summary="Read usage",
        description="Add up what finished requests used, from the ledger: tokens, images, seconds, bytes, cost. A key without the scope `admin:read` sees "
        "its own team.",
        responses={
            200: SuccessResponse("The sums.", {JSON_TYPE: UsageReport, "text/csv": TEXT}),
        },
        errors=NO_LEDGER,
        parameters=_QUERY,
    ),
    "GET /v1/budgets": Operation(
        id="listBudgets",
        tag="usage",
        summary="List budgets",
        description="Return what is spent and left of the budgets of the caller's key and team; with the scope `admin:read`, of all keys and teams.",
        responses=json_response(BudgetList, "The budgets, sorted by holder."),
        parameters={
            "after": {"description": "The `next_after` of the page before."},
            "limit": {"description": "The number of budgets on a page."},
        },
    ),
    **{
        f"GET /v1/organization/usage/{name}": Operation(
            id="getOrganizationUsage" + "".join(part.title() for part in name.split("_")),
            tag="usage",
            summary=f"Read usage of {name.replace('_', ' ')} in OpenAI's shape",
            description="Return completed requests by interval, as OpenAI's API does. A project is a team, a user a person. A key without the scope "
            "`admin:read` sees its own team.",
            responses=json_response(UsagePage, "A page of intervals."),
            errors=NO_LEDGER,
            parameters=_openai(["1m", "1h", "1d"], list(kind.dimensions), 1440, *_FILTERS)
            | (
                {"batch": _text("Only lines of batches, or none of them.", enum=["true", "false"])}
                if "batch" in kind.dimensions
                else {}
            )
            | ({"sizes": _texts("Count only images of these sizes.")} if "size" in kind.dimensions else {}),
        )
        for name, kind in KINDS.items()
    },
    "GET /v1/organization/costs": Operation(
        id="getOrganizationCosts",
        tag="usage",
        summary="Read costs in OpenAI's shape",
        description="Return costs by day and the operator's price list. A line item is a model. A key without the scope `admin:read` sees its own team.",
        responses=json_response(UsagePage, "A page of days."),
        errors=NO_LEDGER,
        parameters=_openai(["1d"], ["project_id", "line_item", "api_key_id"], 180, "project_ids", "api_key_ids"),
    ),
}
