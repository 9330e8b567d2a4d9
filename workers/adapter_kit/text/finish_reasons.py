"""Servers' reasons for the end of an answer, as OpenAI's `finish_reason`. Pure."""

from __future__ import annotations

import re
from typing import Any

OPENAI_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
UNSET_VALUES = frozenset({"", "null", "none", "unfinished", "not_finished", "in_progress", "finish_reason_unspecified"})
"""Values that KoboldCpp, TensorRT-LLM and Gemini write into each chunk in place of null."""
FAILURES = frozenset({
    "error", "abort", "aborted", "cancelled", "canceled", "user_cancel", "network_error", "insufficient_system_resource",
})  # fmt: skip
"""Reasons for which a server breaks an answer off: OpenRouter, vLLM, SGLang, Cohere, z.ai, DeepSeek."""
REASON_PATTERNS = (
    ("length", re.compile(r"length|limit|max_|context_window|budget")),
    ("tool_calls", re.compile(r"tool|function")),
    ("content_filter", re.compile(r"filter|safety|block|prohibited|sensitive|refus|recitation|spii|toxic|guardrail")),
)
"""Patterns of the other reasons; every reason that matches none (`eos`, `COMPLETE`, `end_turn`, `stop_sequence`) is `stop`."""
MALFORMED_CALL = "malformed_function_call"
"""Gemini's reason where the answer holds no call after all."""


def standard_reason(reason: Any) -> str | None:
    """Return OpenAI's reason; None where the answer has not ended. A failure keeps the server's own reason."""
    if isinstance(reason, dict):
        reason = reason.get("type") or reason.get("reason")
    if reason in (None, False):
        return None
    if not isinstance(reason, str):
        return "stop"
    if reason in OPENAI_REASONS:
        return reason
    name = reason.lower().replace("-", "_").strip()
    if name in UNSET_VALUES:
        return None
    if name in OPENAI_REASONS or name in FAILURES:
        return name
    if name == MALFORMED_CALL:
        return "stop"
    return next((standard for standard, pattern in REASON_PATTERNS if pattern.search(name)), "stop")


def is_failure(reason: str | None) -> bool:
    """Return whether a reason says that the server broke the answer off."""
    return reason in FAILURES
