"""Describe the objects of the Responses API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ResponseItem(BaseModel):
    """A message, a call of a function, what a function returned, or the model's reasoning."""

    id: str
    type: str
    """`message`, `function_call`, `function_call_output` or `reasoning`."""
    status: str | None = None
    """`in_progress`, `completed` or `incomplete`."""
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    """Of a message: its parts, `output_text` among them."""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    """Of a call: JSON, as a text."""
    output: str | list[dict[str, Any]] | None = None


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class ResponseUsage(BaseModel):
    """The tokens that a response took."""

    input_tokens: int
    input_tokens_details: dict[str, Any]
    output_tokens: int
    output_tokens_details: dict[str, Any]
    total_tokens: int


class Response(BaseModel):
    """A response, finished or not."""

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
    """A response was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
