"""Parameters and responses that several routes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.openapi.operation import EVENT, JSON, JSON_TYPE, SSE_TYPE, Schema, SuccessResponse
from gateway.openapi.shapes.jobs import Job

MODEL = "smollm2"
"""The model in examples. `nexus up` serves it."""

LIMIT: JSON = {"description": "The maximum number of objects in a page."}
AFTER: JSON = {"description": "The `last_id` of the previous page. The page begins after this id."}
PAGE = {"limit": LIMIT, "after": AFTER}

PREFERENCES: dict[str, JSON] = {
    "Prefer": {
        "in": "header",
        "description": "RFC 7240. `respond-async` makes the request a durable job and returns 202 with the job. "
        "`respond-async, wait=10` first waits up to 10 seconds (at most 300) for the result itself. Unknown preferences are ignored.",
        "schema": {"type": "string"},
    },
    "x-nexus-resume": {
        "in": "header",
        "description": "`true`: each event of the stream has an id. Resume a broken stream at `GET /v1/jobs/{id}/events` with `Last-Event-ID`.",
        "schema": {"type": "string"},
    },
}
ACCEPTED = SuccessResponse(
    "The job, returned immediately because of `Prefer: respond-async`.",
    {JSON_TYPE: Job},
    ("x-nexus-job-id", "Location", "Preference-Applied"),
)


def identifier(prefix: str, what: str, pattern: str) -> JSON:
    """Return the description of a parameter that holds an id made by Nexus."""
    return {"description": what, "schema": {"pattern": pattern}, "example": prefix + "0" * 31 + "1"}


JOB_ID = identifier("job_", "The id of a job, from its `id` or the header `x-nexus-job-id`.", "^job_[0-9a-f]{32}$")


def inference_responses(
    shape: Schema | None, description: str, others: Mapping[str, Any] | None = None
) -> dict[int, SuccessResponse]:
    """Return the successful responses of a route whose requests become jobs."""
    content: dict[str, Schema] = {JSON_TYPE: shape} if shape is not None else {}
    return {
        200: SuccessResponse(description, content | dict(others or {}), ("x-nexus-job-id", "x-nexus-adapted")),
        202: ACCEPTED,
    }


STREAM: dict[str, Schema] = {
    SSE_TYPE: EVENT
    | {
        "description": "One server-sent event. Its `data` is JSON, except for a final `[DONE]`. Lines that begin with `:` are comments with the queue "
        "position or the progress. An error after the first event arrives as a final `data:` with an error object."
    }
}
