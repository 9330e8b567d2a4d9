"""Estimates the tokens of a chat request that no server has counted. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.limits.tokens import BYTES_PER_TOKEN

JSON = dict[str, Any]

ATTACHMENT_TOKENS = 1600
"""Tokens of a picture or a document: what Anthropic counts for a large picture."""


def estimate_prompt(body: JSON) -> int:
    """Return the estimated tokens of a chat request's prompt: a quarter of its bytes, and a constant for each attachment."""
    attachments = 0
    texts: list[Any] = [body.get("tools")]
    for message in body["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        written = [part for part in parts if part["type"] == "text"]
        attachments += len(parts) - len(written)
        texts.append({**message, "content": written} if parts else message)
    return max(1, len(orjson.dumps(texts)) // BYTES_PER_TOKEN) + attachments * ATTACHMENT_TOKENS
