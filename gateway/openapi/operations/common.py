"""Hold what several routes share: pages, headers of requests, answers of inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.openapi.operation import EVENT, JSON, JSON_TYPE, SSE_TYPE, Answer, Schema
from gateway.openapi.shapes.jobs import Job

MODEL = "smollm2"
"""In examples: a model that `nexus up` serves."""

LIMIT: JSON = {"description": "The most objects in a page."}
AFTER: JSON = {"description": "The id behind which the page begins: `last_id` of the page before it."}
PAGE = {"limit": LIMIT, "after": AFTER}

PREFERENCES: dict[str, JSON] = {
    "Prefer": {
        "in": "header",
        "description": "RFC 7240. `respond-async` makes the request a durable job: the answer is 202 with the job. "
        "`respond-async, wait=10` waits up to so many seconds (at most 300) for the answer itself. Unknown preferences are ignored.",
        "schema": {"type": "string"},
    },
    "x-nexus-resume": {
        "in": "header",
        "description": "`true`: the stream's events have ids, so that it can be resumed at `GET /v1/jobs/{id}/events`.",
        "schema": {"type": "string"},
    },
}
ACCEPTED = Answer(
    "The job that answers later, with `Prefer: respond-async`.",
    {JSON_TYPE: Job},
    ("x-nexus-job-id", "Location", "Preference-Applied"),
)


def identifier(prefix: str, what: str, pattern: str) -> JSON:
    """Return the parameter for an id that Nexus makes."""
    return {"description": what, "schema": {"pattern": pattern}, "example": prefix + "0" * 31 + "1"}


JOB_ID = identifier("job_", "The id of a job, from its `id` or `x-nexus-job-id`.", "^job_[0-9a-f]{32}$")


def inferred(shape: Schema | None, description: str, others: Mapping[str, Any] | None = None) -> dict[int, Answer]:
    """Return the answers of a route whose requests become jobs."""
    content: dict[str, Schema] = {JSON_TYPE: shape} if shape is not None else {}
    return {
        200: Answer(description, content | dict(others or {}), ("x-nexus-job-id", "x-nexus-adapted")),
        202: ACCEPTED,
    }


STREAM: dict[str, Schema] = {
    SSE_TYPE: EVENT
    | {
        "description": "One server-sent event. Its `data` is JSON, that of the last one perhaps `[DONE]`; lines that begin with `:` are comments: the place in the "
        "queue, or progress. An error after the first event is a last `data:` with an error object."
    }
}
