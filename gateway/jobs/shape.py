"""A job as callers see it."""

from __future__ import annotations

from typing import Any

import orjson

from schemas.jobs import JobRecord


def shape(record: JobRecord, *, position: int | None = None, eta_s: float | None = None) -> dict[str, Any]:
    """The job object. `eta_seconds` is null where nothing is known about it."""
    out: dict[str, Any] = {
        "id": record.id,
        "object": "job",
        "endpoint": record.endpoint,
        "model": record.model,
        "service_tier": record.service_tier,
        "status": record.status,
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "expires_at": record.expires_at,
        "run": record.run,
        "attempts": record.attempts,
        "queue_position": position,
        "eta_seconds": eta_s,
        "progress": record.progress,
        "worker": record.worker,
        "usage": record.usage,
        "error": record.error,
        "metadata": record.metadata,
        "result_url": f"/v1/jobs/{record.id}/result",
        "events_url": f"/v1/jobs/{record.id}/events",
    }
    if record.adapted:
        out["adapted"] = list(record.adapted)
    if record.webhook is not None:
        out["webhook"] = record.webhook.model_dump(mode="json")
    if record.batch:
        out["batch"] = record.batch
    return out


def shape_json(record: JobRecord) -> bytes:
    """The same, as JSON."""
    return orjson.dumps(shape(record))
