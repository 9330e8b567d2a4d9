"""Define the request of `POST /v1/responses`. `gateway.responses.to_chat` translates it into a chat request.

Nexus refuses fields that it cannot honor, since ignoring them would change the answer. Fields that OpenAI does not define reach
the backend unchanged, as with chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ResponsesTier = Literal["auto", "default", "flex", "priority", "scale", "fast"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

UNSUPPORTED_FIELDS: dict[str, str] = {
    "conversation": "Nexus stores no conversations; name the previous response in 'previous_response_id'",
    "prompt": "Nexus stores no prompt templates; send 'instructions' and 'input'",
    "context_management": "Nexus does not manage the context; shorten the input yourself",
    "moderation": "Nexus does not moderate answers; use /v1/moderations",
    "background_options": "background responses have no completion window; leave it out",
    "access_programs": "Nexus has no access programs; leave it out",
    "image": "Nexus has no common options for images; set 'detail' of each image",
    # Names of chat fields: the backend would read them instead of the translated ones.
    "messages": "use 'input'",
    "max_tokens": "use 'max_output_tokens'",
    "max_completion_tokens": "use 'max_output_tokens'",
    "response_format": "use 'text.format'",
    "reasoning_effort": "use 'reasoning.effort'",
    "verbosity": "use 'text.verbosity'",
    "functions": "use 'tools'",
    "function_call": "use 'tool_choice'",
    "n": "a response holds one answer; send several requests",
    "logprobs": "use 'include': ['message.output_text.logprobs']",
}
"""The fields that Nexus refuses, each with the reason and the alternative."""


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class InputItem(_StrictModel):
    """One item of the input: a message, a function call, or the output of a function."""

    type: str | None = None
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | dict[str, Any] | None = None


class TextConfig(_StrictModel):
    """The format of the answer's text."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(_StrictModel):
    """How much the model reasons."""

    effort: str | None = None
    summary: str | None = None


class ResponsesStreamOptions(_StrictModel):
    """Options of a stream. Nexus never pads a stream, so that `include_obfuscation` has no effect."""

    include_obfuscation: bool | None = None


class ResponsesRequest(_StrictModel):
    """A request for a response."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: Metadata | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: ResponsesTier | None = None
    store: bool | None = None
    """False: the response cannot be retrieved later."""
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    user: str | None = None
    # These have no effect, and are not sent to the backend.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None

    @property
    def stored(self) -> bool:
        """Return whether the response can be retrieved later."""
        return self.store is not False
