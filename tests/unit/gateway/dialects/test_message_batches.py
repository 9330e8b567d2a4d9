"""Message Batches as batches of Nexus, and their results."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.dialects.anthropic.message_batches import (
    input_lines,
    message_batch,
    own_id,
    result_line,
    shown_id,
    unread_result_line,
)
from gateway.http.request_body import validate_body
from schemas.anthropic.batches import MessageBatchRequest
from schemas.batches import Batch, BatchError, BatchStatus, RequestCounts
from schemas.errors import InvalidRequest

HEX = "0192" + "0" * 28


def batch(status: BatchStatus = BatchStatus.COMPLETED, unfinished: int = 0, **counts: int) -> Batch:
    return Batch(
        id=f"batch_{HEX}",
        endpoint="/v1/messages",
        input_file_id="file-1",
        completion_window="24h",
        created_at=0,
        expires_at=86_400,
        completed_at=60 if status is BatchStatus.COMPLETED else None,
        cancelled_at=60 if status is BatchStatus.CANCELLED else None,
        owner="o",
        blob="b",
        output_keep_s=1,
        status=status,
        counts=RequestCounts(**counts),
        unfinished=unfinished,
        errors=(BatchError(code="x", message="No file."),) if status is BatchStatus.FAILED else (),
    )


def test_ids() -> None:
    """The ids of callers and of Nexus are the same but for their beginning; anything else is no id."""
    assert own_id(shown_id(f"batch_{HEX}")) == f"batch_{HEX}"
    assert own_id(f"batch_{HEX}") == own_id("msgbatch_x") == own_id("") == ""


def test_the_input() -> None:
    """Each request is a line; an id that occurs twice is refused."""

    def lines(*ids: str) -> list[Any]:
        requests = [{"custom_id": one, "params": {"model": "m"}} for one in ids]
        return [orjson.loads(line) for line in input_lines(validate_body({"requests": requests}, MessageBatchRequest))]

    assert lines("a", "b")[1] == {"custom_id": "b", "method": "POST", "url": "/v1/messages", "body": {"model": "m"}}
    with pytest.raises(InvalidRequest, match="twice"):
        lines("a", "a")
    with pytest.raises(InvalidRequest):
        lines("a b")


@pytest.mark.parametrize(
    ("found", "status", "counts"),
    [
        (batch(BatchStatus.VALIDATING, total=3), "in_progress", {"processing": 3}),
        (batch(BatchStatus.IN_PROGRESS, total=3, completed=1), "in_progress", {"processing": 3}),
        (batch(BatchStatus.CANCELLING, total=3, completed=1), "canceling", {"processing": 3}),
        (batch(total=3, completed=2, failed=1), "ended", {"succeeded": 2, "errored": 1}),
        (
            batch(BatchStatus.CANCELLED, total=3, completed=1, failed=2, unfinished=1),
            "ended",
            {"succeeded": 1, "errored": 1, "canceled": 1},
        ),
        (batch(BatchStatus.CANCELLED, total=3), "ended", {"canceled": 3}),
        (batch(BatchStatus.EXPIRED, total=2, failed=2, unfinished=2), "ended", {"expired": 2}),
        (batch(BatchStatus.FAILED, total=2), "ended", {"errored": 2}),
    ],
)
def test_states(found: Batch, status: str, counts: dict[str, int]) -> None:
    """Requests are processing until the batch has ended, and then add up to all of them."""
    shown = message_batch(found, "http://n")
    assert shown["processing_status"] == status
    assert {name: number for name, number in shown["request_counts"].items() if number} == counts
    url = f"http://n/v1/messages/batches/msgbatch_{HEX}/results"
    assert shown["results_url"] == (url if status == "ended" else None)
    assert (shown["created_at"], shown["expires_at"]) == ("1970-01-01T00:00:00Z", "1970-01-02T00:00:00Z")


def test_results() -> None:
    """A line of an output file is a message, an error, or the reason why there is neither."""

    def result(**fields: Any) -> Any:
        line = {"id": "i", "custom_id": "c", "response": None, "error": None, **fields}
        made = orjson.loads(result_line(orjson.dumps(line)))
        assert made["custom_id"] == "c"
        return made["result"]

    good = {"status_code": 200, "request_id": "req_1", "body": {"type": "message"}}
    assert result(response=good) == {"type": "succeeded", "message": {"type": "message"}}
    bad = {"status_code": 404, "request_id": "req_1", "body": {"error": {"message": "no model", "code": "x"}}}
    error = result(response=bad)["error"]
    assert (error["error"]["type"], error["error"]["message"]) == ("not_found_error", "no model")
    assert error["request_id"] == "req_1"
    assert result(error={"code": "batch_cancelled", "message": ""}) == {"type": "canceled"}
    assert result(error={"code": "batch_expired", "message": ""}) == {"type": "expired"}
    assert result(error={"code": "result_gone", "message": "gone"})["error"]["error"]["message"] == "gone"


def test_results_of_a_batch_that_never_began() -> None:
    """Its input says which requests there were."""

    def result(status: BatchStatus) -> Any:
        return orjson.loads(unread_result_line(b'{"custom_id": "c"}', batch(status)))["result"]

    assert result(BatchStatus.CANCELLED) == {"type": "canceled"}
    assert result(BatchStatus.FAILED)["error"]["error"]["message"] == "No file."
