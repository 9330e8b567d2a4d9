"""The response bodies of errors."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """Details of an error."""

    message: str
    """A message for people: what failed, why, and what to do."""
    type: str = Field(examples=["invalid_request_error", "rate_limit_error", "server_error"])
    """The kind of the error."""
    param: str | None
    """The path of the invalid field, for example `messages.0.role`."""
    code: str | None = Field(examples=["model_not_found", "invalid_api_key"])
    """The reason, for programs to check."""


class Error(BaseModel):
    """OpenAI's error object. All errors of all routes have this form."""

    error: ErrorDetail
