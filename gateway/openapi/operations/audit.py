"""The descriptions of the routes of the audit log."""

from __future__ import annotations

from gateway.audit.query import DEFAULT_LIMIT, FILTERS, MAX_LIMIT
from gateway.openapi.operation import JSON, TEXT, Operation, SuccessResponse, json_response
from gateway.openapi.shapes.audit import AuditEventList
from schemas.audit import ActorKind, AuditResult

NO_LEDGER = {404: "This gateway keeps no audit log (`no_ledger`)."}
_TIME = "ISO 8601 (without a zone: UTC) or Unix seconds."


def _texts(description: str, **items: object) -> JSON:
    schema = {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 512} | items}
    return {"in": "query", "description": description, "schema": schema}


_FILTERS: dict[str, JSON] = {
    "start": {
        "in": "query",
        "description": f"The beginning, inclusive: {_TIME}",
        "schema": {"type": "string", "format": "date-time"},
    },
    "end": {
        "in": "query",
        "description": f"The end, exclusive: {_TIME}",
        "schema": {"type": "string", "format": "date-time"},
    },
    "action": _texts(
        "Only these actions: `key.create`, or `key.*` for all about keys.", pattern=r"^[a-z_]+\.([a-z_]+|\*)$"
    ),
    "result": _texts("Only these results.", enum=list(AuditResult)),
    **{name: _texts("Only events with one of these values.") for name in FILTERS},
    "request_id": {
        "in": "query",
        "description": "Only the events of this request, by its `x-request-id`.",
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
    },
    "actor": _texts("Only these kinds of actors.", enum=list(ActorKind)),
}

OPERATIONS = {
    "GET /v1/audit": Operation(
        id="listAuditEvents",
        tag="operation",
        scope="admin:read",
        summary="List audit events",
        description="Return who did what to what, from where, with which result, newest first: administrative calls, changes of keys and teams, refused keys.",
        responses=json_response(AuditEventList, "A page of events."),
        errors=NO_LEDGER,
        parameters=_FILTERS
        | {
            "after": {
                "in": "query",
                "description": "The `last_id` of the previous page. The page begins after this id.",
                "schema": {"type": "string", "pattern": "^aud_[0-9a-f]{32}$"},
            },
            "limit": {
                "in": "query",
                "description": "The maximum number of events in a page.",
                "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
            },
        },
    ),
    "GET /v1/audit/export": Operation(
        id="exportAuditEvents",
        tag="operation",
        scope="admin:read",
        summary="Export audit events",
        description="Return all audit events as JSON lines, in the order of their `sequence`. An export that continues behind the last `sequence` misses no "
        "event; an event that gets its result later comes again, under its id. An export that cannot be completed breaks off.",
        responses={200: SuccessResponse("One event per line.", {"application/jsonl": TEXT})},
        errors=NO_LEDGER,
        parameters=_FILTERS
        | {
            "after": {
                "in": "query",
                "description": "The `sequence` of the last event of the previous export. Default: all events.",
                "schema": {"type": "integer", "minimum": 0, "maximum": 2**53, "default": 0},
            }
        },
    ),
}
