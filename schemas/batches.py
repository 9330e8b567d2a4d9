"""Define batches, as in OpenAI's Batch API."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.files import ExpiresAfter

MAX_REQUESTS = 50_000
"""The maximum number of lines in a batch."""
MAX_ERRORS = 100
"""The maximum number of invalid lines that a failed batch lists."""

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class BatchStatus(StrEnum):
    """The state of a batch, by OpenAI's names."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_TRANSITIONS: dict[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {
            BatchStatus.IN_PROGRESS,
            BatchStatus.FAILED,
            BatchStatus.EXPIRED,
            BatchStatus.CANCELLING,
            BatchStatus.CANCELLED,
        }
    ),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.FAILED, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset(
        {BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.FAILED, BatchStatus.CANCELLING}
    ),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED, BatchStatus.FAILED}),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}
"""The statuses that may follow each status. A batch that no gateway took goes from validating to expired or cancelled."""

FINAL_STATUSES = frozenset(status for status, following in BATCH_TRANSITIONS.items() if not following)


class BatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=100)]
    endpoint: Annotated[str, Field(min_length=1, max_length=200)]
    completion_window: Annotated[str, Field(min_length=1, max_length=20)]
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(BaseModel):
    """An error that made a batch fail."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    line: int | None = None
    """The line of the input file, from 1."""
    param: str | None = None


class RequestCounts(BaseModel):
    """The number of requests in a batch, and of those that have ended."""

    model_config = ConfigDict(frozen=True, title="Counts")

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchUsage(BaseModel):
    """The tokens of all answers of a batch."""

    model_config = ConfigDict(frozen=True)

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def add(self, prompt: int, cached: int, completion: int, reasoning: int) -> BatchUsage:
        """Return the usage with that of one more answer."""
        return BatchUsage(
            input=self.input + prompt,
            cached=self.cached + cached,
            output=self.output + completion,
            reasoning=self.reasoning + reasoning,
        )

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "input_tokens": self.input,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }


class Batch(BaseModel):
    """The record of a batch: what its caller sees, and what a gateway needs to run it."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`batch_` and 32 hex digits of a UUIDv7."""
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus = BatchStatus.VALIDATING
    metadata: dict[str, str] | None = None
    model: str | None = None
    """The model of its first request."""
    created_at: int
    """Unix seconds, like all times below."""
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    counts: RequestCounts = RequestCounts()
    errors: tuple[BatchError, ...] = ()
    tokens: BatchUsage | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None

    # Internal fields, which callers do not see

    owner: str
    key: str = ""
    """The id of the API key that created the batch. Its jobs count against the limits of that key."""
    blob: str
    """The blob of the input, so that the batch can finish after its input file was deleted."""
    output_keep_s: float
    """Seconds for which its output files are stored."""
    base_url: str = ""
    """The URL under which its caller reached the gateway, for results by URL."""
    runner: str = ""
    """The id of the newest run of the batch. Other runs stop."""
    unfinished: int = 0
    """The number of requests that were cancelled or expired with the batch. They count as failed too."""
    reserved: tuple[str, str] | None = None
    """The ids of the output file and the error file, once they are being written. Another run writes the same files."""

    @property
    def is_final(self) -> bool:
        """Return whether the batch has ended, so that it does not change any more."""
        return self.status in FINAL_STATUSES

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": [error.model_dump() for error in self.errors]}
            if self.errors
            else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": self.counts.model_dump(),
            "usage": self.tokens.to_openai() if self.tokens is not None else None,
            "metadata": self.metadata,
        }


_WINDOW = re.compile(r"([1-9][0-9]{0,5})([hmd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400}


def parse_window_s(text: str) -> int | None:
    """Parse a duration such as `24h`, `90m` or `2d` into seconds. Return None when it is no such duration."""
    match = _WINDOW.fullmatch(text)
    return int(match[1]) * _UNIT_S[match[2]] if match else None
