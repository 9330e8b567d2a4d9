"""Translates Message Batches into Nexus's batches, and back. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from gateway.dialects.anthropic.endpoint import MESSAGES_PATH
from gateway.dialects.anthropic.errors import anthropic_error
from gateway.dialects.anthropic.models import rfc3339
from schemas.anthropic.batches import MessageBatchRequest
from schemas.batches import Batch, BatchStatus
from schemas.errors import InvalidRequest

JSON = dict[str, Any]

BATCHES_PATH = f"{MESSAGES_PATH}/batches"
WINDOW = "24h"
PREFIX, OWN_PREFIX = "msgbatch_", "batch_"
ID = re.compile(rf"{PREFIX}[0-9a-f]{{32}}")
CANCELED, EXPIRED, ERRORED, SUCCEEDED = "canceled", "expired", "errored", "succeeded"
RESULTS_BY_CODE = {
    "batch_cancelled": CANCELED,
    "job_cancelled": CANCELED,
    "batch_expired": EXPIRED,
    "job_expired": EXPIRED,
}
"""The results of requests that did not run to their end, by Nexus's code."""
RESULTS_BY_STATUS = {BatchStatus.CANCELLED: CANCELED, BatchStatus.EXPIRED: EXPIRED}
"""The results of the requests of a batch that ended before any of them began."""


def own_id(batch_id: str) -> str:
    """Return Nexus's id for a batch's id; empty for what is no such id."""
    return OWN_PREFIX + batch_id.removeprefix(PREFIX) if ID.fullmatch(batch_id) else ""


def shown_id(own: str) -> str:
    """Return the id that callers see."""
    return PREFIX + own.removeprefix(OWN_PREFIX)


def input_lines(request: MessageBatchRequest) -> Iterator[bytes]:
    """Yield the lines of the batch's input file. Raises InvalidRequest for an id that occurs twice."""
    seen: set[str] = set()
    for number, one in enumerate(request.requests):
        if one.custom_id in seen:
            raise InvalidRequest(f"The custom_id '{one.custom_id}' occurs twice.", param=f"requests.{number}.custom_id")
        seen.add(one.custom_id)
        line = {"custom_id": one.custom_id, "method": "POST", "url": MESSAGES_PATH, "body": one.params}
        yield orjson.dumps(line) + b"\n"


def message_batch(batch: Batch, base_url: str) -> JSON:
    """Return the batch as Anthropic's clients see it. `base_url`: where the caller reached the gateway."""
    ended_at = batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at
    status = "canceling" if batch.status is BatchStatus.CANCELLING else "in_progress"
    batch_id = shown_id(batch.id)
    return {
        "id": batch_id,
        "type": "message_batch",
        "processing_status": "ended" if batch.is_final else status,
        "request_counts": _counts(batch),
        "created_at": rfc3339(batch.created_at),
        "expires_at": rfc3339(batch.expires_at),
        "ended_at": rfc3339(ended_at) if batch.is_final and ended_at is not None else None,
        "archived_at": None,
        "cancel_initiated_at": rfc3339(batch.cancelling_at) if batch.cancelling_at is not None else None,
        "results_url": f"{base_url}{BATCHES_PATH}/{batch_id}/results" if batch.is_final else None,
    }


def _counts(batch: Batch) -> JSON:
    """Return how many requests ended how. All of them are processing until the batch has ended."""
    counts = batch.counts
    found = dict.fromkeys(("processing", SUCCEEDED, ERRORED, CANCELED, EXPIRED), 0)
    if not batch.is_final:
        return found | {"processing": counts.total}
    never_ran = counts.total - counts.completed - counts.failed
    found[SUCCEEDED] = counts.completed
    found[ERRORED] = counts.failed - batch.unfinished
    found[RESULTS_BY_STATUS.get(batch.status, ERRORED)] += batch.unfinished + never_ran
    return found


def result_line(line: bytes) -> bytes:
    """Return the result for a line of a batch's output or error file."""
    value = orjson.loads(line)
    response, error = value.get("response"), value.get("error")
    if response is None:
        kind = RESULTS_BY_CODE.get(error["code"])
        result = {"type": kind} if kind is not None else _errored(500, {"error": error}, "")
    elif response["status_code"] >= 400:
        result = _errored(response["status_code"], response["body"], response["request_id"])
    else:
        result = {"type": SUCCEEDED, "message": response["body"]}
    return orjson.dumps({"custom_id": value["custom_id"], "result": result}) + b"\n"


def unread_result_line(line: bytes, batch: Batch) -> bytes:
    """Return the result for a line of the input of a batch that ended before any request began."""
    kind = RESULTS_BY_STATUS.get(batch.status)
    message = batch.errors[0].message if batch.errors else "The batch failed."
    result = {"type": kind} if kind is not None else _errored(500, {"error": {"message": message}}, "")
    return orjson.dumps({"custom_id": orjson.loads(line)["custom_id"], "result": result}) + b"\n"


def _errored(status: int, body: JSON, request_id: str) -> JSON:
    return {"type": ERRORED, "error": anthropic_error(status, body, request_id)}
