"""The response bodies of errors."""

from __future__ import annotations

from typing import Literal

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


class AnthropicErrorDetails(BaseModel):
    """What Nexus says of an error in addition."""

    error_code: str | None
    """Nexus's code."""
    param: str | None
    """The field that is wrong."""


class AnthropicErrorObject(BaseModel):
    """What failed, and what to do."""

    type: str
    """`invalid_request_error`, `authentication_error`, `permission_error`, `not_found_error`, `request_too_large`, `rate_limit_error`,
    `timeout_error`, `overloaded_error` or `api_error`."""
    message: str
    details: AnthropicErrorDetails | None = None


class AnthropicError(BaseModel):
    """An error in the form of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str
    """The id of the request, as in the header `request-id`."""
