"""Define the request of `POST /v1/completions` (legacy): the fields that Nexus reads. All others reach the backend unchanged."""

from __future__ import annotations

from schemas.openai.chat import TextRequest, TokenId


class CompletionRequest(TextRequest):
    """A request for a text completion. `prompt` is a text, several texts, token ids, or lists of token ids."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] | None = None
