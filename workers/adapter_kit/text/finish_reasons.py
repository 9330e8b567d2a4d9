"""Servers' words for why an answer ended, as OpenAI's `finish_reason`: pure."""

from __future__ import annotations

import re
from typing import Any

OPENAI_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
UNSET = frozenset({"", "null", "none", "unfinished", "not_finished", "in_progress", "finish_reason_unspecified"})
"""Written into each chunk by servers that have no null: KoboldCpp, TensorRT-LLM, Gemini."""
FAILURES = frozenset({
    "error", "abort", "aborted", "cancelled", "canceled", "user_cancel", "network_error", "insufficient_system_resource",
})  # fmt: skip
"""The answer is cut short by the server's own trouble: OpenRouter, vLLM, SGLang, Cohere, z.ai, DeepSeek."""
KINDS = (
    ("length", re.compile(r"length|limit|max_|context_window|budget")),
    ("tool_calls", re.compile(r"tool|function")),
    ("content_filter", re.compile(r"filter|safety|block|prohibited|sensitive|refus|recitation|spii|toxic|guardrail")),
)
"""Told by their words; every other reason (`eos`, `COMPLETE`, `end_turn`, `stop_sequence`) is `stop`."""
MALFORMED = "malformed_function_call"
"""Gemini: there is no call."""


def standard_reason(reason: Any) -> str | None:
    """Return OpenAI's word; None where the answer has not ended. Another server's failure is returned in its own word."""
    if isinstance(reason, dict):
        reason = reason.get("type") or reason.get("reason")
    if reason in (None, False):
        return None
    if not isinstance(reason, str):
        return "stop"
    if reason in OPENAI_REASONS:
        return reason
    word = reason.lower().replace("-", "_").strip()
    if word in UNSET:
        return None
    if word in OPENAI_REASONS or word in FAILURES:
        return word
    if word == MALFORMED:
        return "stop"
    return next((standard for standard, words in KINDS if words.search(word)), "stop")


def is_failure(reason: str | None) -> bool:
    """Return whether a standard reason says that the server broke the answer off."""
    return reason in FAILURES
