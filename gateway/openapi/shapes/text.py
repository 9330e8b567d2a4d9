"""The response bodies of chat, completions, embeddings and rerank."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class TokenUsage(BaseModel):
    """The token usage of a request."""

    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: dict[str, Any] | None = None
    """How many prompt tokens were cached, if the inference server counts them."""
    completion_tokens_details: dict[str, Any] | None = None
    """How many completion tokens were reasoning, if the inference server counts them."""


class FunctionToCall(BaseModel):
    """The name of a function and the arguments of the call."""

    name: str
    arguments: str
    """The arguments as a JSON string."""


class ToolCall(BaseModel):
    """A call of one of the request's tools."""

    id: str
    type: Literal["function"]
    function: FunctionToCall


class AssistantMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None = None
    """The text. Null if the model calls tools instead."""
    refusal: str | None = None
    reasoning_content: str | None = None
    """The reasoning that precedes the answer, if the inference server returns it."""
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of the `n` completions."""

    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    """`stop`, `length`, `tool_calls` or `content_filter`."""
    logprobs: dict[str, Any] | None = None


class ChatCompletion(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Unix seconds."""
    model: str
    """The model name from the request."""
    choices: list[ChatChoice]
    usage: TokenUsage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None


class TextChoice(BaseModel):
    """One of the `n` completions."""

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
    """The embedding of one text."""

    object: Literal["embedding"]
    index: int
    """The index of the text in `input`."""
    embedding: list[float] | str
    """The vector. With `encoding_format: base64`: little-endian 32-bit floats in Base64."""


class EmbeddingList(BaseModel):
    """The embeddings, in the order of the input texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: TokenUsage | None = None


class RankedDocument(BaseModel):
    """One document and its score."""

    index: int
    """The index of the document in `documents`."""
    relevance_score: float
    """The relevance. Higher is more relevant."""
    document: dict[str, Any] | None = None
    """The document itself, if the request sets `return_documents`."""


class Ranking(BaseModel):
    """The documents by relevance, most relevant first."""

    object: Literal["list"] | None = None
    model: str
    results: list[RankedDocument]
    usage: dict[str, Any] | None = None
