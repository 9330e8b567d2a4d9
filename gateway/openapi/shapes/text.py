"""Describe answers that are text or numbers: chat, completions, embeddings, rerank."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class TokenUsage(BaseModel):
    """The tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: dict[str, Any] | None = None
    """How many of the prompt's tokens were cached, where the server counts them."""
    completion_tokens_details: dict[str, Any] | None = None
    """How many tokens were reasoning, where the server counts them."""


class FunctionToCall(BaseModel):
    """A function of the caller's, and the arguments that the model calls it with."""

    name: str
    arguments: str
    """JSON, as a text."""


class ToolCall(BaseModel):
    """A call of one of the tools in the request."""

    id: str
    type: Literal["function"]
    function: FunctionToCall


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"]
    content: str | None = None
    """The text; null where the model calls tools instead."""
    refusal: str | None = None
    reasoning_content: str | None = None
    """What a reasoning model thought before it answered, where the server tells."""
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    """`stop`, `length`, `tool_calls` or `content_filter`."""
    logprobs: dict[str, Any] | None = None


class ChatCompletion(BaseModel):
    """A chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Unix seconds."""
    model: str
    """The model, as the request named it."""
    choices: list[ChatChoice]
    usage: TokenUsage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None


class TextChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    finish_reason: str | None = None
    """`stop` or `length`."""
    logprobs: dict[str, Any] | None = None


class TextCompletion(BaseModel):
    """The continuation of a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    """Unix seconds."""
    model: str
    choices: list[TextChoice]
    usage: TokenUsage | None = None


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    """The text's place in `input`."""
    embedding: list[float] | str
    """The numbers; with `encoding_format: base64` little-endian 32-bit floats in Base64."""


class EmbeddingList(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: TokenUsage | None = None


class RankedDocument(BaseModel):
    """One document and its score."""

    index: int
    """The document's place in `documents`."""
    relevance_score: float
    """Larger is more relevant."""
    document: dict[str, Any] | None = None
    """The document itself, with `return_documents`."""


class Ranking(BaseModel):
    """The documents by relevance, the best first."""

    object: Literal["list"] | None = None
    model: str
    results: list[RankedDocument]
    usage: dict[str, Any] | None = None
