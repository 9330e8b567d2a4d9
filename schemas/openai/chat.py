"""Define the request of `POST /v1/chat/completions`: the fields that Nexus reads. All others reach the backend unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

ServiceTier = Literal["auto", "default", "priority", "flex", "scale", "standard_only"]


def _never(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_streamed", "Input should be false: this endpoint has no streams")
    return value


NeverStreamed = Annotated[bool, AfterValidator(_never), WithJsonSchema({"type": "boolean", "const": False})]
"""`stream` for endpoints without streams. `Literal[False]` would accept 0."""


TokenId = Annotated[int, Field(ge=0, lt=2**63)]


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True, title="Message")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[dict[str, Any]] | None = None


class ChatStreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None


class TextRequest(BaseModel):
    """The fields that chat and legacy completions share."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: ChatStreamOptions | None = None
    service_tier: ServiceTier | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = None


class ChatRequest(TextRequest):
    """A request for a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None


class TokenCountRequest(ChatRequest):
    """A chat request whose prompt is counted and not answered."""

    stream: NeverStreamed | None = None


class TokenCount(BaseModel):
    """How many tokens the prompt of a chat request has."""

    object: Literal["chat.completion.input_tokens"]
    model: str
    input_tokens: int
