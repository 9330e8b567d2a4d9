"""The response bodies of `/v1/responses`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseItem(BaseModel):
    """A message, a function call, the output of a function call, or the model's reasoning."""

    id: str
    type: str
    """`message`, `function_call`, `function_call_output` or `reasoning`."""
    status: str | None = None
    """`in_progress`, `completed` or `incomplete`."""
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    """For a message: its content parts, for example `output_text`."""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    """For a function call: its arguments as a JSON string."""
    output: str | list[dict[str, Any]] | None = None


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class ResponseUsage(BaseModel):
    """The token usage of a response."""

    input_tokens: int
    input_tokens_details: dict[str, Any]
    output_tokens: int
    output_tokens_details: dict[str, Any]
    total_tokens: int


class ResponseObject(BaseModel):
    """A response in any status."""

    model_config = ConfigDict(title="Response")

    id: str
    object: Literal["response"]
    created_at: int
    """Unix seconds."""
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    service_tier: str
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
    metadata: dict[str, str]


class ResponseItemList(BaseModel):
    """A page of a response's input items."""

    object: Literal["list"]
    data: list[ResponseItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(BaseModel):
    """Confirmation that a response was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
