"""Define the request of `POST /v1/messages`. `gateway.dialects.anthropic.to_chat` translates it into a chat request.

Nexus refuses fields that it cannot honor, since ignoring them would change the answer. Fields that Anthropic does not define reach
the backend unchanged, as with chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_MESSAGES = 100_000
MAX_STOP_SEQUENCES = 1024

MessagesTier = Literal["auto", "standard_only", "default", "priority", "flex"]
"""Anthropic's tiers, and Nexus's own."""

UNSUPPORTED_FIELDS: dict[str, str] = {
    "container": "Nexus runs no containers; leave it out",
    "mcp_servers": "Nexus calls no MCP servers; let the client call them, and offer their tools in 'tools'",
    # Names of chat fields: the backend would read them instead of the translated ones.
    "max_completion_tokens": "use 'max_tokens'",
    "stop": "use 'stop_sequences'",
    "user": "use 'metadata.user_id'",
    "n": "a message is one answer; send several requests",
    "response_format": "use 'output_config.format'",
    "reasoning_effort": "use 'output_config.effort'",
    "parallel_tool_calls": "use 'tool_choice.disable_parallel_tool_use'",
    "functions": "use 'tools'",
    "function_call": "use 'tool_choice'",
    "stream_options": "the stream always ends with the usage; leave it out",
}
"""The fields that Nexus refuses, each with the reason and the alternative."""


class _MessagesModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class InputMessage(_MessagesModel):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class ThinkingConfig(_MessagesModel):
    """Whether the model thinks before it answers, and for how long."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(_MessagesModel):
    """How thoroughly the model answers, and in which form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class MessageMetadata(_MessagesModel):
    """Facts about the request."""

    user_id: Annotated[str, Field(max_length=512)] | None = None


class MessagesInput(_MessagesModel):
    """The fields that decide how many tokens a request has."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(MessagesInput):
    """A request for a message."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**63)]
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_SEQUENCES)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: MessageMetadata | None = None
    service_tier: MessagesTier | None = None
    # These have no effect, and are not sent to the backend.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None
