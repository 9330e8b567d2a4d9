"""Name the fields of the API's job object."""

from __future__ import annotations

JOB_FIELDS = (
    "id", "object", "endpoint", "capability", "model", "service_tier", "status", "created_at", "queued_at", "started_at",
    "finished_at", "expires_at", "run", "attempts", "queue_position", "eta_seconds", "progress", "worker", "key", "request_id",
    "usage", "error", "metadata", "result_url", "events_url", "trace_id", "attempts_detail", "adapted", "webhook", "batch",
)  # fmt: skip
"""The fields of the job object. The last five may be missing."""
PRIVATE = ("metadata", "webhook", "result_url", "events_url", "error")
"""Fields of the job object that hold what callers wrote, or lead to it."""
JOB_STATE_FIELDS = (*(name for name in JOB_FIELDS if name not in PRIVATE), "team", "error_code")
"""The fields of the job object for operators."""
