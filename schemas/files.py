"""Define the files that callers store, as in OpenAI's Files API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

UPLOAD_PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
"""The purposes for which callers may upload files."""
BATCH_PURPOSE = "batch"
BATCH_OUTPUT_PURPOSE = "batch_output"

Seconds = Field(ge=3600, le=2_592_000)


class ExpiresAfter(BaseModel):
    """When a file expires, in OpenAI's form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Seconds


class UploadFields(BaseModel):
    """The fields of an upload's form, without the file."""

    purpose: str
    expires_after: ExpiresAfter | None = None


class FileRecord(BaseModel):
    """The record of a stored file, without its bytes."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`file-` and 32 hex digits of a UUIDv7."""
    filename: str
    purpose: str
    size: int
    """Bytes."""
    blob: str
    """The name of its blob."""
    content_type: str = "application/octet-stream"
    """The content type that the uploader sent."""
    created_at: int
    """Unix seconds."""
    expires_at: int
    """Unix seconds at which the file is deleted."""

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }
