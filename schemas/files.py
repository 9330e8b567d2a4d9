"""Files that callers store, as OpenAI's Files API has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

UPLOAD_PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
"""What callers may upload for."""
BATCH_PURPOSE = "batch"
BATCH_OUTPUT_PURPOSE = "batch_output"

Seconds = Field(ge=3600, le=2_592_000)


class ExpiresAfter(BaseModel):
    """When a file is to end, as OpenAI says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Seconds


class UploadFields(BaseModel):
    """The fields of an upload's form beside the file."""

    purpose: str
    expires_after: ExpiresAfter | None = None


class FileRecord(BaseModel):
    """What is kept of a file beside its bytes."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`file-` and 32 hex digits of a UUIDv7."""
    filename: str
    purpose: str
    size: int
    """Bytes."""
    blob: str
    """Its name among the blobs."""
    content_type: str = "application/octet-stream"
    """As the uploader named it."""
    created_at: int
    """Unix seconds."""
    expires_at: int
    """Unix seconds; then it is gone."""

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's file object."""
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
