"""Batches, as OpenAI's Batch API has them."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.files import ExpiresAfter

MAX_REQUESTS = 50_000
"""Lines of one batch."""
MAX_ERRORS = 100
"""Wrong lines that are told of."""

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class BatchStatus(StrEnum):
    """OpenAI's words for where a batch stands."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


FINAL_STATUSES = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


class BatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=100)]
    endpoint: Annotated[str, Field(min_length=1, max_length=200)]
    completion_window: Annotated[str, Field(min_length=1, max_length=20)]
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(BaseModel):
    """Why a batch failed."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    line: int | None = None
    """Of the input file, from 1."""
    param: str | None = None


class RequestCounts(BaseModel):
    """How many requests a batch has, and how many of them have ended."""

    model_config = ConfigDict(frozen=True, title="Counts")

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchUsage(BaseModel):
    """What a batch's answers took."""

    model_config = ConfigDict(frozen=True)

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def add(self, prompt: int, cached: int, completion: int, reasoning: int) -> BatchUsage:
        """With one more answer's."""
        return BatchUsage(
            input=self.input + prompt,
            cached=self.cached + cached,
            output=self.output + completion,
            reasoning=self.reasoning + reasoning,
        )

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "input_tokens": self.input,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }


class Batch(BaseModel):
    """What is kept of a batch: what its caller sees, and what a gateway needs to run it."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`batch_` and 32 hex digits of a UUIDv7."""
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus = BatchStatus.VALIDATING
    metadata: dict[str, str] | None = None
    model: str | None = None
    """Of its first request."""
    created_at: int
    """This and all that follow in Unix seconds."""
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

    # What its caller does not see

    owner: str
    key: str = ""
    """The id of the API key that made it; its jobs count against that."""
    max_queued: int | None = None
    max_running: int | None = None
    blob: str
    """The input's, so that it runs to its end whatever becomes of the file's record."""
    output_keep_s: float
    """How long its output files are kept."""
    base_url: str = ""
    """Where its caller reached us, for results by URL."""
    runner: str = ""
    """Which run of it is the newest: others stop."""
    reserved: tuple[str, str] | None = None
    """The ids of output and error file, once they are being written: written again, they are the same files."""

    @property
    def is_final(self) -> bool:
        """Nothing changes any more."""
        return self.status in FINAL_STATUSES

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's batch object."""
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
    """The seconds of `24h`, `90m`, `2d`; None: it is no such duration."""
    match = _WINDOW.fullmatch(text)
    return int(match[1]) * _UNIT_S[match[2]] if match else None
