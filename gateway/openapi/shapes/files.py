"""Describe files and batches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from schemas.batches import BatchError, BatchStatus, RequestCounts


class File(BaseModel):
    """A stored file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """Unix seconds."""
    expires_at: int
    """Unix seconds; the file is deleted then."""
    filename: str
    purpose: str
    """As uploaded, or `batch_output`."""
    status: Literal["processed"]
    status_details: str | None


class FileList(BaseModel):
    """A page of files. The next page is behind `last_id`."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchErrors(BaseModel):
    """Why a batch failed, line by line."""

    object: Literal["list"]
    data: list[BatchError]


class Batch(BaseModel):
    """Many requests from one file, answered in another one."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    """The model of the first request."""
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    """The answers, as JSON lines."""
    error_file_id: str | None
    """The requests that failed, as JSON lines."""
    created_at: int
    """Unix seconds, as are all times here."""
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: dict[str, Any] | None
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """A page of batches, the newest first. The next page is behind `last_id`."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
