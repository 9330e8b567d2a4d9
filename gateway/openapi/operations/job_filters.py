"""The parameters that find jobs, for the caller's own team and for operators."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.openapi.operation import JSON, TEXT, SuccessResponse
from schemas.job_fields import JOB_FIELDS, JOB_STATE_FIELDS
from schemas.jobs import Capability, JobStatus, Lane

_TIME = "ISO 8601 (without a zone: UTC) or Unix seconds."


def _one(description: str, **schema: object) -> JSON:
    return {"in": "query", "description": description, "schema": {"type": "string", **schema}}


def _texts(description: str, **items: object) -> JSON:
    schema = {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 512} | items}
    return {"in": "query", "description": f"{description} May be repeated.", "schema": schema}


def _time(description: str) -> JSON:
    forms = [{"type": "string", "format": "date-time"}, {"type": "integer", "minimum": 0, "maximum": 253_402_300_800}]
    return {"in": "query", "description": f"{description}: {_TIME}", "schema": {"anyOf": forms}}


def _seconds(description: str) -> JSON:
    return _one(description, pattern=r"^[0-9]{1,9}(\.[0-9]{1,3})?$")


def _fields(names: Sequence[str]) -> JSON:
    name = f"(?:{'|'.join(names)})"
    return _texts("Return only these fields of each job. May be a list with commas.", pattern=f"^{name}(?:,{name})*$")


_FILTERS: dict[str, JSON] = {
    "status": _texts("Only jobs with one of these statuses.", enum=list(JobStatus)),
    "model": _texts("Only jobs of these models, by the names in the requests."),
    "endpoint": _texts("Only jobs for these endpoints."),
    "capability": _texts("Only jobs of these capabilities.", enum=list(Capability)),
    "service_tier": _texts("Only jobs in these lanes.", enum=list(Lane)),
    "key": _texts("Only jobs that these API keys submitted, by the keys' ids."),
    "person": _texts("Only jobs that these people submitted, in a session or with a key that they made."),
    "worker": _texts("Only jobs that these workers run, or ran last."),
    "error": _texts("Only failed jobs whose error has one of these codes, or one of these types and no code."),
    "request_id": _one("Only the jobs of this request, by its `x-request-id`.", pattern="^(req_[0-9a-f]{24})?$"),
    "batch": _one("Only the jobs of this batch. Without this filter, jobs of batches are not found."),
    "id": _one("Only jobs whose id begins with this text.", pattern="^(job_[0-9a-f]{0,32})?$"),
    "created_from": _time("Only jobs that were created at this time or later"),
    "created_to": _time("Only jobs that were created before this time"),
    "finished_from": _time("Only jobs that ended at this time or later"),
    "finished_to": _time("Only jobs that ended before this time"),
    "min_duration": _seconds("Only ended jobs whose last attempt took at least this many seconds."),
    "max_duration": _seconds("Only ended jobs whose last attempt took at most this many seconds."),
    "order": _one("`desc`: the newest job first. `asc`: the oldest.", enum=["desc", "asc"], default="desc"),
    "after": _one("The `next_after` of the previous page.", pattern="^(job_[0-9a-f]{32})?$"),
}
_METADATA: JSON = {
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[NAME]=VALUE`: return only jobs with this metadata.",
    "schema": {
        "type": "object",
        "maxProperties": 16,
        "propertyNames": {"minLength": 1, "maxLength": 64},
        "additionalProperties": {"type": "string"},
    },
}
_TEAM = _texts("Only jobs of these teams. Default: of all.")


def _limit(default: int, most: int) -> JSON:
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"in": "query", "description": "The maximum number of jobs.", "schema": schema}


_FORMAT = _one("JSON lines, or CSV with a head.", enum=["jsonl", "csv"], default="jsonl")
_OWN: dict[str, JSON] = {**_FILTERS, "fields": _fields(JOB_FIELDS), "metadata": _METADATA}
_OPERATORS: dict[str, JSON] = {"team": _TEAM, **_FILTERS, "fields": _fields(JOB_STATE_FIELDS)}
OWN_PAGE = {**_OWN, "limit": _limit(20, 100)}
OWN_EXPORT = {**_OWN, "limit": _limit(1_000_000, 1_000_000), "format": _FORMAT}
OPERATORS_PAGE = {**_OPERATORS, "limit": _limit(20, 100)}
OPERATORS_EXPORT = {**_OPERATORS, "limit": _limit(1_000_000, 1_000_000), "format": _FORMAT}
EXPORTED = {200: SuccessResponse("The jobs.", {"application/jsonl": TEXT, "text/csv": TEXT}, ("Content-Disposition",))}
