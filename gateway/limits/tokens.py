"""Estimate the tokens of a request before it runs."""

from __future__ import annotations

from typing import Any

from schemas.jobs import Capability

BYTES_PER_TOKEN = 4
DEFAULT_ANSWER_TOKENS = 256
"""Estimate for an answer whose request sets no maximum."""
GENERATING = frozenset({Capability.CHAT, Capability.COMPLETIONS})
COUNTED = GENERATING | {Capability.EMBEDDINGS, Capability.RERANK}
"""Capabilities whose answers report tokens."""


def estimate_tokens(capability: Capability, request: Any, size: int) -> int:
    """Return the estimated tokens of prompt and answer. `size`: bytes of the body; `request`: validated by its endpoint's schema."""
    if capability not in COUNTED:
        return 0
    prompt = size // BYTES_PER_TOKEN
    if capability not in GENERATING:
        return prompt
    answer = getattr(request, "max_completion_tokens", None) or request.max_tokens or DEFAULT_ANSWER_TOKENS
    return prompt + int(answer) * (request.n or 1)
