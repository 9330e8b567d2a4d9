"""The response bodies of `/v1/messages`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ContentBlock(BaseModel):
    """A block of an answer: text, a thought, or the call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(BaseModel):
    """The token usage of a message."""

    input_tokens: int
    """Without those that were read from the cache."""
    cache_creation_input_tokens: int
    """0: no backend counts them."""
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, Any] | None = None


class MessageObject(BaseModel):
    """The model's answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    """The model name from the request."""
    content: list[ContentBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokenCount(BaseModel):
    """How many tokens a request has."""

    input_tokens: int


class MessageBatchCounts(BaseModel):
    """How many requests of a batch ended how. All of them are processing until the batch has ended."""

    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(BaseModel):
    """A batch of messages. Times have the form of RFC 3339."""

    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCounts
    created_at: str
    expires_at: str
    ended_at: str | None
    archived_at: None
    cancel_initiated_at: str | None
    results_url: str | None
    """Where the results are, once the batch has ended."""


class MessageBatchList(BaseModel):
    """A page of batches of messages."""

    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class MessageBatchDeleted(BaseModel):
    """Confirmation that a batch was deleted."""

    id: str
    type: Literal["message_batch_deleted"]
