"""`POST /v1/completions` (legacy): the fields that Nexus reads. All others reach the backend untouched."""

from __future__ import annotations

from schemas.openai.chat import TextRequest, TokenId


class CompletionRequest(TextRequest):
    """A text completion request. `prompt` may be text, texts, token ids, or lists of token ids."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] | None = None
