"""Describe errors."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """The details of an error."""

    message: str
    """A sentence for people: what failed, why, and what to do."""
    type: str = Field(examples=["invalid_request_error", "rate_limit_error", "server_error"])
    """The kind of the error."""
    param: str | None
    """The field that is wrong, as a path: `messages.0.role`."""
    code: str | None = Field(examples=["model_not_found", "invalid_api_key"])
    """The reason, for programs."""


class Error(BaseModel):
    """OpenAI's error object, which every error of every route is."""

    error: ErrorDetail
