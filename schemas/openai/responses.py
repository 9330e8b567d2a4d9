"""`/v1/responses`: what may be asked for. The translation onto chat is `gateway.responses.to_chat`.

What Nexus cannot do is refused by name, since leaving it out would change the answer. Fields that OpenAI does not know reach
the backend untouched, as with chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ResponsesTier = Literal["auto", "default", "flex", "priority", "scale", "fast"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

UNSUPPORTED_FIELDS: dict[str, str] = {
    "conversation": "conversations are not kept here; name the response before this one with 'previous_response_id'",
    "prompt": "prompt templates are not kept here; send 'instructions' and 'input'",
    "context_management": "the context is not managed here",
    "moderation": "answers are not moderated here",
    "background_options": "background responses have no completion window here",
    "access_programs": "there are no access programs here",
    "image": "there are no options for images here; give each one its 'detail'",
    # Chat's names: the backend would take them for its own, against what the translation says.
    "messages": "this endpoint takes 'input'",
    "max_tokens": "this endpoint takes 'max_output_tokens'",
    "max_completion_tokens": "this endpoint takes 'max_output_tokens'",
    "response_format": "this endpoint takes 'text.format'",
    "reasoning_effort": "this endpoint takes 'reasoning.effort'",
    "verbosity": "this endpoint takes 'text.verbosity'",
    "functions": "this endpoint takes 'tools'",
    "function_call": "this endpoint takes 'tool_choice'",
    "n": "a response is one answer",
    "logprobs": "this endpoint takes 'include': ['message.output_text.logprobs']",
}
"""Fields that are refused, and why."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class InputItem(_Strict):
    """One item of the input: a message, a call of a function, or what the function returned."""

    type: str | None = None
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | dict[str, Any] | None = None


class TextConfig(_Strict):
    """What the answer's text is to look like."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(_Strict):
    """How much a model is to think."""

    effort: str | None = None
    summary: str | None = None


class ResponsesStreamOptions(_Strict):
    """Options of a stream. Nothing is padded here, so that `include_obfuscation` changes nothing."""

    include_obfuscation: bool | None = None


class ResponsesRequest(_Strict):
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
    """False: it cannot be retrieved afterwards."""
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    user: str | None = None
    # These have no effect here, and do not go to the backend.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None

    @property
    def stored(self) -> bool:
        """Whether it can be retrieved afterwards."""
        return self.store is not False
