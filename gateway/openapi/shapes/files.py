"""The response bodies of `/v1/files` and `/v1/batches`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from schemas.batches import BatchError, BatchStatus, RequestCounts


class FileObject(BaseModel):
    """A stored file."""

    model_config = ConfigDict(title="File")

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """Unix seconds."""
    expires_at: int
    """When the file is deleted, in Unix seconds."""
    filename: str
    purpose: str
    """The purpose given at the upload, or `batch_output`."""
    status: Literal["processed"]
    status_details: str | None


class FileList(BaseModel):
    """A page of files. Request the next page with `after=last_id`."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """Confirmation that a file was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchErrors(BaseModel):
    """The errors of a failed batch, by line."""

    object: Literal["list"]
    data: list[BatchError]


class BatchObject(BaseModel):
    """A batch: requests from an input file, with their responses in an output file."""

    model_config = ConfigDict(title="Batch")

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
    """The file with the responses, as JSON lines."""
    error_file_id: str | None
    """The file with the failed requests, as JSON lines."""
    created_at: int
    """Unix seconds, like all times in this object."""
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
    """A page of batches, newest first. Request the next page with `after=last_id`."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
